"""The error bodies of the exchange, in each of the shapes they come in."""

from __future__ import annotations

import json

from kalshi_cancel.sandbox.wire import JSON, Reply

# nested: today's; flat, msg: other services behind the same host; string: the rate limiter;
# service: nested, as it was earlier; html, message, empty: a proxy or the CDN in between.
SHAPES = ("nested", "service", "flat", "msg", "string", "html", "message", "empty")


class Refusal(Exception):  # noqa: N818  # it is an answer of the exchange, not a mishap of ours
    """What the exchange answers instead of doing what was asked."""

    def __init__(
        self, status: int, code: str, message: str | None = None, details: str | None = None
    ) -> None:
        super().__init__(code)
        self.status = status
        self.code = code
        self.message = code.replace("_", " ") if message is None else message
        self.details = details

    def fields(self) -> dict[str, str]:
        """Code, message and, where there are any, details."""
        fields = {"code": self.code, "message": self.message}
        return fields if self.details is None else {**fields, "details": self.details}


def not_found() -> Refusal:
    """The one 404: terminal, unknown and on another shard look alike, byte for byte."""
    return Refusal(404, "not_found")


def invalid(details: str) -> Refusal:
    """A 400: the request is wrong in itself."""
    return Refusal(400, "invalid_parameters", None, details)


def too_many_requests() -> Refusal:
    """The rate limiter's 429, whose `error` is a bare string."""
    return Refusal(429, "too many requests", "too many requests")


def refuse(refusal: Refusal, shape: str | None = None) -> Reply:
    """The reply to a refused request; without a `shape` the one the exchange uses for that status."""
    if shape is None:
        shape = "string" if refusal.status == 429 else "nested"
    if shape == "empty":
        return Reply(refusal.status)
    if shape == "html":
        return Reply(refusal.status, html(refusal.status, refusal.message), content_type="text/html")
    fields = refusal.fields()
    bodies: dict[str, object] = {
        "nested": {"error": fields},
        "service": {"error": {**fields, "service": "exchange"}},
        "flat": {"details": "", **fields},
        "msg": {"msg": refusal.message},
        "string": {"error": refusal.message},
        "message": {"message": refusal.message},
    }
    return Reply(refusal.status, json.dumps(bodies[shape], separators=(",", ":")).encode(), content_type=JSON)


def html(status: int, message: str) -> bytes:
    """An error page as a proxy in front of the exchange would write it."""
    title = f"{status} {message}"
    return (
        f"<html>\r\n<head><title>{title}</title></head>\r\n<body>\r\n<center><h1>{title}</h1></center>\r\n"
        "<hr><center>cloudfront</center>\r\n</body>\r\n</html>\r\n"
    ).encode()
