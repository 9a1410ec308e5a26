"""How requests and replies look as bytes: the sandbox's HTTP/1.1, free of sockets."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import threading
    from collections.abc import Mapping

# How a reply is put on the wire; anything but "whole" is a fault.
Manner = Literal["whole", "close", "reset", "hang", "drip", "truncated", "endless"]

JSON = "application/json"


class BadRequestError(ValueError):
    """The bytes are not a request that this server understands."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request; `path` and `query` are raw, as received: the signature covers those bytes."""

    method: str
    path: str
    query: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    connection: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer, and the manner in which it reaches the client (or does not)."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    content_type: str = JSON
    manner: Manner = "whole"
    interval_s: float = 0.0
    offset_s: float = 0.0
    interim: tuple[int, ...] = ()  # statuses of the responses before it, and the seconds after each
    interim_s: float = 0.0
    released: threading.Event | None = None


class Head(NamedTuple):
    """A request's first line and headers (names in lower case)."""

    method: str
    path: str
    query: str
    version: str
    headers: dict[str, str]

    @property
    def length(self) -> int:
        """Bytes of body that follow; BadRequestError when the headers do not say so plainly."""
        if "transfer-encoding" in self.headers:
            raise BadRequestError("chunked requests are not supported")
        text = self.headers.get("content-length", "0")
        if not text.isascii() or not text.isdigit():
            raise BadRequestError(f"Content-Length {text!r}")
        return int(text)

    @property
    def keeps_alive(self) -> bool:
        """Whether the client means to send another request on this connection."""
        wish = self.headers.get("connection", "").lower()
        return wish == "keep-alive" if self.version == "HTTP/1.0" else wish != "close"


def parse_head(lines: list[bytes]) -> Head:
    """A request's head from its lines (line ends stripped); BadRequestError when it is none."""
    try:
        method, target, version = lines[0].decode("ascii").split(" ")
    except (ValueError, IndexError) as error:
        raise BadRequestError("request line") from error
    if version not in {"HTTP/1.1", "HTTP/1.0"}:
        raise BadRequestError(f"version {version!r}")
    if target.startswith("http://"):  # sent to us as to a proxy
        target = "/" + target.removeprefix("http://").partition("/")[2]
    path, _, query = target.partition("?")
    headers = {}
    for line in lines[1:]:
        name, colon, value = line.decode("latin-1").partition(":")
        if not colon:
            raise BadRequestError("header line")
        headers[name.strip().lower()] = value.strip()
    return Head(method, path, query, version, headers)


def encode_head(reply: Reply, *, now_s: float, close: bool = False) -> bytes:
    """The status line and headers of `reply`; `now_s` is the front's clock, for `Date`."""
    lines = [_status_line(reply.status), f"Date: {http_date(int(now_s))}"]
    if reply.manner == "endless":
        lines.append("Transfer-Encoding: chunked")
    elif reply.status != 204:
        lines.append(f"Content-Length: {len(reply.body)}")
    if reply.body or reply.manner == "endless":
        lines.append(f"Content-Type: {reply.content_type}")
    lines += [f"{name}: {value}" for name, value in reply.headers]
    if close:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")


def encode_interim(status: int) -> bytes:
    """An interim response: a status line, perhaps a hint, and no body ever."""
    hint = "Link: </style.css>; rel=preload; as=style\r\n" if status == HTTPStatus.EARLY_HINTS else ""
    return f"{_status_line(status)}\r\n{hint}\r\n".encode()


def _status_line(status: int) -> str:
    try:
        return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"
    except ValueError:
        return f"HTTP/1.1 {status} Unknown"


@functools.lru_cache(maxsize=64)
def http_date(second: int) -> str:
    """A second since 1970 as HTTP writes dates."""
    return formatdate(second, usegmt=True)
