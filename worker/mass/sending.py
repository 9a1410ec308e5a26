"""Sends the exchange's own mass command: one signed call, paid for, and only under a valid claim."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kalshi_cancel.exchange.calls import CANCEL_ALL, Call, compose_trigger
from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.exchange.protocol import Failure
from kalshi_cancel.model.mass_request import CANCEL_ALL as CANCEL_ALL_WORD
from kalshi_cancel.model.requests import Lane
from kalshi_cancel.model.times import utc_text
from kalshi_cancel.store.cancels import Fenced
from kalshi_cancel.store.mass_claim import MassClaim
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import say
from worker.dispatch.paid_calls import PaidCalls, Payment, Target
from worker.mass.planning import Command

log = logging.getLogger(__name__)

CANCEL_ALL_TAIL_S = 60.0  # new orders are canceled for so long
TOKENS_WITHIN_S = 1.0  # longer, and order by order is as good


@dataclass(frozen=True, slots=True)
class Address:
    """Where an order group is; a command for the whole account has none."""

    subaccount: int | None = None
    exchange_index: int | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """What has become of the command so far, as it is stored and reported.

    ``sent`` times; ``answer``: "done", the code of what was answered last, or why it was not sent; None: none
    yet. ``sent_ms``: when it was first sent, on the exchange's clock.
    """

    sent: int = 0
    sent_ms: int | None = None
    answer: str | None = None
    may_have_worked: bool = False

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Given:
        """What :meth:`to_json` wrote; where another version has noted other words, it may have worked."""
        try:
            known = cls(**{name: value[name] for name in ("sent", "sent_ms", "answer", "may_have_worked")})
        except KeyError:
            return cls(sent=1, may_have_worked=True)
        are_numbers = isinstance(known.sent, int) and isinstance(known.sent_ms, int | None)
        return known if are_numbers else cls(sent=1, may_have_worked=True)

    def to_json(self) -> dict[str, Any]:
        """The stored form."""
        return {
            "sent": self.sent,
            "sent_ms": self.sent_ms,
            "answer": self.answer,
            "may_have_worked": self.may_have_worked,
        }

    def told(self, what: str) -> dict[str, Any]:
        """What the report says of it."""
        until = None
        if self.may_have_worked and self.sent_ms is not None and what == CANCEL_ALL_WORD:
            until = utc_text(self.sent_ms / 1000 + CANCEL_ALL_TAIL_S)
        return {
            "what": what,
            "sent": self.sent,
            "sent_at": None if self.sent_ms is None else utc_text(self.sent_ms / 1000),
            "answer": self.answer,
            "in_force_until": until,
        }


class CommandSender:
    """Sends the command, paid for and under the claim; tells about each call."""

    def __init__(self, command: Command, claim: MassClaim, exchange: Exchange, calls: PaidCalls) -> None:
        self.command = command
        self._claim = claim
        self._exchange = exchange
        self._calls = calls

    def pay(self) -> Payment | None:
        """Takes the tokens of one call; None: they are not there in time."""
        give_up = time.monotonic() + TOKENS_WITHIN_S

        def wait(seconds: float) -> bool:
            if time.monotonic() + seconds > give_up:
                return False
            time.sleep(seconds)
            return True

        return self._calls.take_in_time("write", self._calls.limits.cancel_cost, wait)

    def send(self, paid: Payment, address: Address, given: Given) -> Failure | None:
        """Gives the command once, which makes it ``given``; what stood in the way. Raises Fenced."""
        fence = self._claim.fence
        self._claim.note(command=given.to_json())
        self._claim.keep()
        if not self._claim.is_surely_held:  # stopped in between: somebody else may have finished
            raise Fenced(fence)
        target = Target("command", lane=Lane.RISK)
        failure = self._calls.send(paid, target, lambda: self._exchange.command(self._call(address))).answer
        code = None if failure is None else failure.problem.code
        self._claim.note_audit("command", what=self.command.what, error=code)
        if failure is not None:
            why = failure.problem.message
            say(log, LogEvent.MASS_COMMAND_FAILED, request_id=fence.request_id, code=code, why=why)
        return failure

    def _call(self, address: Address) -> Call:
        if self.command.order_group_id is None:
            return CANCEL_ALL
        return compose_trigger(
            self.command.order_group_id,
            subaccount=address.subaccount,
            exchange_index=address.exchange_index,
        )
