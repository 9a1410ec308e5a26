"""Has a sandbox's own answers noted, before a fault spoils them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kalshi_cancel.sandbox.exchange import Exchange
from kalshi_cancel.sandbox.routes import PREFIX
from kalshi_cancel.sandbox.settings import Settings
from kalshi_cancel.sandbox.visit import Visit
from kalshi_cancel.sandbox.wire import Reply

# With these settings the sandbox plays what the document does not have: yesterday's dialects, other services.
DIALECTS = ("order_form", "v1", "last_update_form", "empty_page", "error_shape")


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer: of which endpoint (see ANSWERS), and what made it odd, if anything."""

    endpoint: str
    status: int
    body: bytes
    odd: str | None


def watch(note: Callable[[Answered], None]) -> Callable[[], None]:
    """From now on each answer of any sandbox in this process is given to `note`; the function ends that."""
    served = Exchange._served

    def noted(exchange: Exchange, visit: Visit, skew_s: float) -> Reply:
        reply = served(exchange, visit, skew_s)
        note(Answered(endpoint_of(visit), reply.status, reply.body, _oddity(visit)))
        return reply

    Exchange._served = noted  # type: ignore[method-assign]

    def end() -> None:
        Exchange._served = served  # type: ignore[method-assign]

    return end


def endpoint_of(visit: Visit) -> str:
    """Method and path of a call's endpoint, as in `answers.ANSWERS`."""
    return f"{visit.route.method} {visit.route.path.removeprefix(PREFIX)}"


def _oddity(visit: Visit) -> str | None:
    if visit.record.fault:
        return f"fault {visit.record.fault}"
    usual = Settings()
    for name in DIALECTS:
        if (value := getattr(visit.settings, name)) != getattr(usual, name):
            return f"setting {name}={value}"
    return None
