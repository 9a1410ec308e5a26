"""The paid caller takes the tokens of a call, has it sent, and tells everybody what came of it.

Executor, archive search and mass cancels all call the exchange through this: a 429 corrects the bucket, the
circuit breaker learns from each answer, listeners get one :class:`CallMade`, and a mass cancel notes what it
spends.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from kalshi_cancel.exchange.protocol import Failure, Meaning
from kalshi_cancel.model.requests import Lane
from kalshi_cancel.store.rate_limits import Limits, Pacer
from worker.dispatch.events import CallMade, Emit, nobody

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Payment:
    """Tokens that were taken from a bucket for one call, at a moment (monotonic)."""

    bucket: str
    tokens: float
    taken_at: float


@dataclass(frozen=True, slots=True)
class NoTokens:
    """The tokens are not there; they may be in ``wait_s``."""

    wait_s: float


@dataclass(frozen=True, slots=True)
class Target:
    """What a call is for; see :class:`CallMade`."""

    operation: str
    order_ids: tuple[str, ...] = ()
    lane: Lane | None = None


@dataclass(frozen=True, slots=True)
class Made(Generic[_Answer]):
    """A call that was made: its answer, its event, and when it began (monotonic).

    ``was_affordable``: a 429 although the tokens must have been there.
    """

    answer: _Answer
    call: CallMade
    began: float
    was_affordable: bool


class PaidCalls:
    """Makes paid calls for one owner; safe to share between threads.

    ``hear`` is told of each call how it failed, None where it did not (the breaker); ``spend`` the tokens of
    each call that the exchange has charged for. ``request_id`` is that of the mass cancel that calls.
    """

    def __init__(
        self,
        pacer: Pacer,
        *,
        emit: Emit = nobody,
        hear: Callable[[Failure | None], object] = lambda _failure: None,
        spend: Callable[[float], object] = lambda _tokens: None,
        request_id: str | None = None,
    ) -> None:
        self._pacer = pacer
        self._emit = emit
        self._hear = hear
        self._spend = spend
        self._request_id = request_id

    @property
    def limits(self) -> Limits:
        """The account's limits, and what calls cost."""
        return self._pacer.limits

    def take(self, bucket: str, tokens: float, *, kept_share: float = 0.0) -> Payment | NoTokens:
        """Takes the tokens of one call, if they are there above the share that is kept; raises StoreError."""
        taken_at = time.monotonic()
        wait_s = self._pacer.take(bucket, tokens, kept_share=kept_share)
        return NoTokens(wait_s) if wait_s > 0 else Payment(bucket, tokens, taken_at)

    def take_in_time(self, bucket: str, tokens: float, wait: Callable[[float], bool]) -> Payment | None:
        """Takes the tokens of one call as soon as they are there; raises StoreError.

        ``wait`` is told in how many seconds they may be there, and waits; None once it answers False.
        """
        while isinstance(paid := self.take(bucket, tokens), NoTokens):
            if not wait(paid.wait_s):
                return None
        return paid

    def send(
        self,
        payment: Payment,
        target: Target,
        ask: Callable[[], _Answer],
        *,
        failure_in: Callable[[_Answer], Failure | None] | None = None,
    ) -> Made[_Answer]:
        """Makes the call by ``ask``, and tells what came of it.

        ``failure_in`` tells how the call as a whole has failed, where that is not the answer itself.
        """
        began = time.monotonic()
        answer = ask()
        took_s = time.monotonic() - began
        failure = answer if isinstance(answer, Failure) else failure_in(answer) if failure_in else None
        self._hear(failure)
        call = CallMade(
            target.operation,
            target.order_ids,
            target.lane,
            failure,
            took_s,
            payment.bucket,
            payment.tokens,
            self._request_id,
        )
        self._emit(call)
        was_affordable = False
        if failure is not None and failure.meaning is Meaning.BUSY:
            was_affordable = self._pacer.correct(payment.bucket, payment.tokens, taken_at=payment.taken_at)
        if is_charged(failure):
            self._spend(payment.tokens)
        return Made(answer, call, began, was_affordable)


def is_charged(failure: Failure | None) -> bool:
    """Whether the exchange takes tokens for a call that ended so: not for a 429, nor for one not sent."""
    return failure is None or failure.meaning not in (Meaning.BUSY, Meaning.NOT_SENT)


def kept_share(bucket: str, lane: Lane, limits: Limits, *, risk_reserve: float) -> float:
    """The share of a bucket that an order's own call leaves: strategies to risk, reads to a listing."""
    if bucket == "read":  # the tokens of a listing are left to mass cancels
        return min(limits.list_cost, (limits.read_capacity - limits.read_cost) / 4) / limits.read_capacity
    return risk_reserve if lane is Lane.STRATEGY else 0.0
