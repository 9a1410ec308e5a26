"""Describes a case: what is known about one cancel so far, and its JSON in the cancel store.

A case is never changed: each method gives a new one. The moment is passed in.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from typing import Any

from kalshi_cancel.exchange.calls import Routing
from kalshi_cancel.exchange.clock import Span
from kalshi_cancel.model.orders import Order
from kalshi_cancel.model.requests import CancelRequest
from kalshi_cancel.model.results import Problem

# An end while our attempt was under way is its doing. Of a slow or lost one only the beginning counts: a
# cancel reaches the exchange within tens of milliseconds at most, and a later end is perhaps not ours.
UNDER_WAY_MOST_MS = 100
HISTORY_MOST = 20  # the latest failures of a case that are kept for the operator
UNKNOWN_STATUS = "unknown_status"
# What one key was told of an order is asked again after this: a key may be given more rights.
KEYS_WORD_STANDS_MS = 60_000


class Step(StrEnum):
    """What to ask the exchange next."""

    CANCEL = "cancel"
    READ_BACK = "read_back"
    SEARCH_ARCHIVE = "search_archive"

    @property
    def reads(self) -> bool:
        """Whether it only looks, and so is paid for from the read bucket."""
        return self is not Step.CANCEL


@dataclass(frozen=True, slots=True)
class Instant:
    """A moment in a cancel's life: on the exchange's two clocks, and since the cancel was accepted.

    ``engine`` is the clock that stamps orders, None while it is not known; ``exchange_ms``, the front's, is
    for people to read. What took how long is told by the age. ``effect_ms``: how long after this moment a
    cancel that is sent at it may have its effect.
    """

    exchange_ms: int
    age_ms: int
    engine: Span | None = None
    effect_ms: int = UNDER_WAY_MOST_MS


@dataclass(frozen=True, slots=True)
class Attempt:
    """The sending of a cancel: when, on the engine's clock as it was known then, and at what age.

    An end later than ``effect_ms`` after it is perhaps not its doing.
    """

    age_ms: int
    engine: Span | None = None
    effect_ms: int = UNDER_WAY_MOST_MS


@dataclass(slots=True)  # thousands are made a second: frozen, each would take three times as long
class Case:
    """What is known about one cancel.

    ``attempt`` is the latest one; ``first_doubt`` the first one that may have taken effect without a usable
    reply, ``last_doubt`` the latest such, and ``unanswered_age_ms`` when that was given up on.
    ``accepted_age_ms``: when a cancel was accepted by a reply that does not describe our order.
    ``not_found_age_ms``: when a cancel last got a 404.
    ``key_refusals``: how often a worker's key was refused for it.
    ``turned_away``: the keys (by id) that may not cancel the order, or do not see it, and at what age.
    ``refused``: a permanent error that still needs a read-back before it may be reported.
    ``asked_with``: the key (by id) whose calls found it missing, or were refused.
    ``history``: the latest failures, each with its moment and its code.
    ``seen``: a read-back has shown the order; ``order`` is what it showed, in this claim only.
    ``remaining``, ``filled``: what a read or a listing has last shown of the order while it rested, and
    ``shown_age_ms``: at which age (None: with the request itself).
    ``rested_after_doubt``: since the last doubtful attempt it was shown resting by a read that is no older
    state.
    """

    request: CancelRequest
    routing: Routing
    step: Step = Step.CANCEL
    attempts: int = 0
    back_offs: int = 0
    attempt: Attempt | None = None
    first_doubt: Attempt | None = None
    last_doubt: Attempt | None = None
    unanswered_age_ms: int | None = None
    accepted_age_ms: int | None = None
    not_found_age_ms: int | None = None
    unknown_reads: int = 0
    first_unknown_age_ms: int | None = None
    key_refusals: int = 0
    turned_away: tuple[tuple[str, int], ...] = ()
    asked_with: str = ""
    refused: Problem | None = None
    last_problem: Problem | None = None
    history: tuple[tuple[int, str], ...] = ()
    seen: bool = False
    remaining: Decimal | None = None
    filled: Decimal | None = None
    shown_age_ms: int | None = None
    rested_after_doubt: bool = False
    order: Order | None = None

    @classmethod
    def of(cls, request: CancelRequest) -> Case:
        """A case nothing is known about but the request."""
        return cls(
            request,
            Routing(request.market_ticker, request.exchange_index, request.subaccount),
            remaining=request.seen_remaining,
            filled=request.seen_filled,
        )

    @classmethod
    def swept(cls, request: CancelRequest, engine: Span | None) -> Case:
        """A case whose order a mass command of the exchange's own is about to cancel, perhaps."""
        attempt = Attempt(0, engine)
        return replace(
            cls.of(request),
            step=Step.READ_BACK,
            attempts=1,
            attempt=attempt,
            first_doubt=attempt,
            last_doubt=attempt,
            unanswered_age_ms=UNDER_WAY_MOST_MS,
        )

    def to_json(self, key_id: str = "") -> str:
        """The progress made with a key, as the store keeps it between claims, with the request beside it."""
        stored = {name: value for name in _PLAIN if _says_something(value := getattr(self, name))}
        if key_id and self._is_partly_turned_away:
            stored["asked_with"] = key_id
        nested = {name: asdict(value) for name in _PROBLEMS if (value := getattr(self, name)) is not None}
        attempts = {name: _told(value) for name in _ATTEMPTS if (value := getattr(self, name)) is not None}
        counts = {name: str(value) for name in _COUNTS if (value := getattr(self, name)) is not None}
        # (By itself, so that a version without it can read the attempts.)
        effect = {"effect_ms": self.last_doubt.effect_ms} if self.last_doubt is not None else {}
        known = {**stored, **nested, **attempts, **effect, **counts, "routing": asdict(self.routing)}
        return json.dumps(known, separators=(",", ":"))

    @classmethod
    def from_json(cls, request: CancelRequest, text: str) -> Case:
        """The case that :meth:`to_json` wrote; an empty text is a case nothing is known about.

        What another version has noted in words of its own is left out: then the exchange is asked again.
        """
        case = cls.of(request)
        if not text:
            return case
        try:
            return case.informed(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
            return case.in_doubt()

    def in_doubt(self) -> Case:
        """The case when the stored progress cannot be understood: anything may have been sent, and worked."""
        return replace(
            self,
            request=replace(self.request, again=True),
            step=Step.READ_BACK,
            first_doubt=Attempt(0),
            unanswered_age_ms=0,
            remaining=None,
            filled=None,
        )

    def informed(self, stored: dict[str, Any]) -> Case:
        """The case with the stored progress; raises TypeError and the like when that is of another form."""
        case = self
        known: dict[str, Any] = {name: _plain(name, stored[name]) for name in _PLAIN if name in stored}
        known |= {name: _problem(stored[name]) for name in _PROBLEMS if name in stored}
        known |= {name: _attempt(stored[name]) for name in _ATTEMPTS if name in stored}
        known |= {name: _count(stored[name]) for name in _COUNTS if name in stored}
        if "last_doubt" in known and "effect_ms" in stored:
            known["last_doubt"] = replace(known["last_doubt"], effect_ms=int(stored["effect_ms"]))
        noted = stored.get("routing", {})
        # Routing that a later request added fills what was not known.
        routing = {
            name: noted.get(name) if noted.get(name) is not None else asked
            for name, asked in asdict(case.routing).items()
        }
        known["history"] = tuple((at_ms, code) for at_ms, code in stored.get("history", ()))
        known["turned_away"] = tuple((str(key), int(age_ms)) for key, age_ms in stored.get("turned_away", ()))
        known["routing"] = Routing(**routing)
        step = stored.get("step", Step.CANCEL)
        # A step that only a newer version takes: where that left off is read.
        known["step"] = Step(step) if step in list(Step) else Step.READ_BACK
        return replace(case, **known)

    def with_problem(self, problem: Problem, now: Instant) -> Case:
        """The case with one more failure in its history."""
        history = (*self.history, (now.exchange_ms, problem.code))[-HISTORY_MOST:]
        # That a cancel finds nothing there says less than the word which nobody here understands.
        keeps = self.last_problem is not None and self.last_problem.code == UNKNOWN_STATUS
        said = self.last_problem if keeps and problem.code != UNKNOWN_STATUS else problem
        return replace(self, last_problem=said, history=history)

    def doubted(self, now: Instant) -> Case:
        """The case once its latest attempt has got no usable reply, so may have taken effect."""
        attempt = self.attempt or Attempt(0)
        return replace(
            self,
            first_doubt=self.first_doubt or attempt,
            last_doubt=attempt,
            unanswered_age_ms=now.age_ms,
            rested_after_doubt=False,
        )

    def keys_turned_away(self, now: Instant) -> frozenset[str]:
        """The ids of the keys that were turned away lately."""
        # (What was noted before a retry seems to be still to come: it counts no more.)
        return frozenset(
            key for key, age_ms in self.turned_away if 0 <= now.age_ms - age_ms < KEYS_WORD_STANDS_MS
        )

    def left_to_others(self, key_id: str, now: Instant) -> Case:
        """The case for workers with another key, as this one was turned away: they ask from the beginning."""
        others = tuple(each for each in self.turned_away if each[0] != key_id)
        return replace(self._from_the_beginning(), turned_away=(*others, (key_id, now.age_ms)))

    def asked_by(self, key_id: str) -> Case:
        """The case as a worker with this key goes on with it.

        What another key is not shown, or may not do, says nothing of what this one is: it asks for itself.
        """
        if self.asked_with == key_id or not self._is_partly_turned_away:
            return self
        return self._from_the_beginning()

    @property
    def _is_partly_turned_away(self) -> bool:
        return (
            self.step is Step.SEARCH_ARCHIVE
            or self.refused is not None
            or self.not_found_age_ms is not None
            or self.key_refusals + self.unknown_reads > 0
        )

    def _from_the_beginning(self) -> Case:
        return replace(
            self,
            step=Step.CANCEL if self.unanswered_age_ms is None else Step.READ_BACK,
            asked_with="",
            key_refusals=0,
            refused=None,
            not_found_age_ms=None,
            unknown_reads=0,
            first_unknown_age_ms=None,
        )

    def interrupted(self, attempt: Attempt, now: Instant) -> Case:
        """The case as whoever takes over must see it: a vanished sender may have sent an attempt.

        At the earliest at that moment.
        """
        problem = Problem("interrupted", "a worker vanished while it may have been sending")
        return replace(self.with_problem(problem, now), attempts=self.attempts + 1, attempt=attempt).doubted(
            now
        )

    def sending(self, now: Instant) -> Case:
        """The case once a cancel is about to be sent."""
        attempt = Attempt(now.age_ms, now.engine, now.effect_ms)
        if not self.attempts and not self.history:  # no progress yet: most of thousands a second
            return Case(
                self.request,
                self.routing,
                attempts=1,
                attempt=attempt,
                remaining=self.remaining,
                filled=self.filled,
                shown_age_ms=self.shown_age_ms,
            )
        return replace(self, attempts=self.attempts + 1, attempt=attempt)


_PLAIN = (
    "attempts",
    "back_offs",
    "unanswered_age_ms",
    "accepted_age_ms",
    "not_found_age_ms",
    "unknown_reads",
    "first_unknown_age_ms",
    "key_refusals",
    "turned_away",
    "asked_with",
    "history",
    "seen",
    "shown_age_ms",
    "rested_after_doubt",
    "step",
)
_KINDS = {
    "history": list,
    "turned_away": list,
    "step": object,
    "asked_with": str,
    "seen": bool,
    "rested_after_doubt": bool,
}  # others: int
_PROBLEMS = ("refused", "last_problem")
_ATTEMPTS = ("first_doubt", "last_doubt")
_COUNTS = ("remaining", "filled")


def _says_something(value: object) -> bool:
    return value is not None and value is not False and value not in ((), "")


def _told(attempt: Attempt) -> list[float | None]:
    if attempt.engine is None:
        return [attempt.age_ms, None, None]
    return [attempt.age_ms, attempt.engine.low_ms, attempt.engine.high_ms]


def _plain(name: str, told: Any) -> Any:
    expected = _KINDS.get(name, int)
    if expected is not object and type(told) is not expected:
        raise TypeError(f"{name} is no {expected.__name__}")
    return told


def _attempt(told: Any) -> Attempt:
    age_ms, low_ms, high_ms = told
    return Attempt(int(age_ms), None if low_ms is None else Span(float(low_ms), float(high_ms)))


def _problem(told: Any) -> Problem:
    return Problem(str(told["code"]), str(told["message"]), told.get("http_status"))


def _count(told: Any) -> Decimal | None:
    try:
        return Decimal(told)
    except InvalidOperation:
        return None
