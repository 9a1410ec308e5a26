"""The outcome rules: decides from each answer whether a cancel is settled, and if not, what to ask next.

Pure functions over answers. The rules, in one breath: "canceled" is said only when the exchange said so,
to the cancel or on a read-back; a 404 is never an outcome by itself but a reason to read the order back;
an attempt without a usable reply may have taken effect, so what comes after it is read in that light.

A :class:`Case` is what we know about one cancel so far. Feeding it an answer gives a :class:`Verdict`, or
:class:`Next`: the wiser case, with the step to take and the kind of pause before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from enum import Enum, StrEnum, auto

from worker.dialects import CancelAnswer, Canceled, Meaning, ReadAnswer, Routing, Trouble
from worker.orders import CancelRequest, ConfirmedBy, Order, OrderStatus, Outcome, Problem

# A 404 on a read proves nothing by itself (reads lag writes): so many, over at least the read lag, do.
NOT_FOUND_READS_FOR_PROOF = 3
# `Date` has whole seconds, and the measured skew inherits that: closer than this is not "clearly before".
CLOCK_MARGIN_MS = 2_000
# An order's time stamp that lies so far in the exchange's own future is from before its clock was set back.
FUTURE_MARGIN_MS = 10_000
HISTORY_MOST = 20  # the latest troubles of a case that are kept for the operator


class Step(StrEnum):
    """What to ask the exchange next."""

    CANCEL = "cancel"
    READ_BACK = "read_back"


class Pause(Enum):
    """How long to wait before the next step."""

    NONE = auto()  # the answer already told where to go: at once
    BACK_OFF = auto()  # growing, jittered


@dataclass(frozen=True, slots=True)
class Instant:
    """A moment in a cancel's life: on the exchange's clock, and since the cancel was accepted.

    Only orders' own time stamps are held against the exchange's clock, which may be set; what took how long
    is told by the age.
    """

    exchange_ms: int
    age_ms: int


@dataclass(frozen=True, slots=True)
class Case:
    """What is known about one cancel; ``first_attempt_ms`` is a moment on the exchange's clock.

    ``unanswered_age_ms``: when an attempt of ours last got no usable reply, so may have taken effect.
    ``accepted_age_ms``: when a cancel was accepted by a reply that does not describe our order.
    ``not_found_age_ms``: when a cancel last got a 404.
    ``refused``: a permanent error that still needs a read-back before it may be reported.
    ``history``: the latest troubles, each with its moment and its code.
    ``seen``: a read-back has shown the order; ``order`` is what it showed, in this hand only.
    """

    request: CancelRequest
    routing: Routing
    step: Step = Step.CANCEL
    attempts: int = 0
    back_offs: int = 0
    first_attempt_ms: int | None = None
    first_attempt_age_ms: int = 0
    unanswered_age_ms: int | None = None
    accepted_age_ms: int | None = None
    not_found_age_ms: int | None = None
    unknown_reads: int = 0
    first_unknown_age_ms: int | None = None
    refused: Problem | None = None
    last_problem: Problem | None = None
    history: tuple[tuple[int, str], ...] = ()
    seen: bool = False
    order: Order | None = None

    @classmethod
    def of(cls, request: CancelRequest) -> Case:
        """A case nothing is known about but the request."""
        return cls(request, Routing(request.market_ticker, request.exchange_index, request.subaccount))

    @classmethod
    def swept(cls, request: CancelRequest, exchange_ms: int | None) -> Case:
        """A case whose order a mass command of the exchange's own is about to cancel, perhaps."""
        return replace(
            cls.of(request),
            step=Step.READ_BACK,
            attempts=1,
            first_attempt_ms=exchange_ms,
            unanswered_age_ms=0,
        )

    def to_json(self) -> str:
        """What was learned, as the book keeps it between two hands; the request is kept beside it."""
        learned = {name: value for name in _PLAIN if (value := getattr(self, name)) not in (None, ())}
        nested = {name: asdict(value) for name in _PROBLEMS if (value := getattr(self, name)) is not None}
        return json.dumps({**learned, **nested, "routing": asdict(self.routing)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, request: CancelRequest, text: str) -> Case:
        """The case that :meth:`to_json` wrote; an empty text is a case nothing is known about."""
        case = cls.of(request)
        if not text:
            return case
        known_fields = {*_PLAIN, *_PROBLEMS, "routing"}  # a newer version may have noted more
        learned = {name: value for name, value in json.loads(text).items() if name in known_fields}
        learned.setdefault("routing", {})
        problems = {name: Problem(**learned.pop(name)) for name in _PROBLEMS if name in learned}
        # Routing that a later request added fills what was not known.
        routing = {
            name: learned["routing"].get(name) if learned["routing"].get(name) is not None else asked
            for name, asked in asdict(case.routing).items()
        }
        learned["history"] = tuple((at_ms, code) for at_ms, code in learned.get("history", ()))
        known = {
            **learned,
            **problems,
            "routing": Routing(**routing),
            "step": Step(learned.get("step", Step.CANCEL)),
        }
        return replace(case, **known)

    def troubled(self, problem: Problem, now: Instant) -> Case:
        """The case with one more trouble in its history."""
        history = (*self.history, (now.exchange_ms, problem.code))[-HISTORY_MOST:]
        return replace(self, last_problem=problem, history=history)

    def interrupted(self, first_attempt_ms: int | None, first_attempt_age_ms: int, now: Instant) -> Case:
        """The case as whoever takes over must see it: a vanished hand may have sent an attempt.

        Its first one at the earliest at that moment on the exchange's clock, and at that age.
        """
        return replace(
            self.troubled(Problem("interrupted", "a worker vanished while it may have been sending"), now),
            attempts=self.attempts + 1,
            first_attempt_ms=self.first_attempt_ms if self.attempts else first_attempt_ms,
            first_attempt_age_ms=self.first_attempt_age_ms if self.attempts else first_attempt_age_ms,
            unanswered_age_ms=now.age_ms,
        )

    def sending(self, now: Instant, *, clock_known: bool = True) -> Case:
        """The case once a cancel is about to be sent; whether the exchange's clock is known at all."""
        if self.attempts:
            return replace(self, attempts=self.attempts + 1)
        first_ms = now.exchange_ms if clock_known else None
        if not self.history:  # nothing went wrong, so nothing was learned: most of thousands a second
            return Case(
                self.request,
                self.routing,
                attempts=1,
                first_attempt_ms=first_ms,
                first_attempt_age_ms=now.age_ms,
            )
        return replace(self, attempts=1, first_attempt_ms=first_ms, first_attempt_age_ms=now.age_ms)


_PLAIN = (
    "attempts",
    "back_offs",
    "first_attempt_ms",
    "first_attempt_age_ms",
    "unanswered_age_ms",
    "accepted_age_ms",
    "not_found_age_ms",
    "unknown_reads",
    "first_unknown_age_ms",
    "history",
    "seen",
    "step",
)
_PROBLEMS = ("refused", "last_problem")


@dataclass(frozen=True, slots=True)
class Verdict:
    """A known outcome; ``order`` is the exchange's order where one was seen."""

    outcome: Outcome
    status: OrderStatus | None = None
    reduced_by: Decimal | None = None
    confirmed_by: ConfirmedBy | None = None
    exchange_ts_ms: int | None = None
    problem: Problem | None = None
    order: Order | None = None


@dataclass(frozen=True, slots=True)
class Next:
    """Not known yet: the case with what was just learned and the step to take, and the pause before it."""

    case: Case
    pause: Pause
    at_least_s: float = 0.0


def after_cancel(case: Case, answer: CancelAnswer, now: Instant) -> Verdict | Next:
    """What an answer to the cancel means for ``case``."""
    if isinstance(answer, Canceled):
        return Verdict(
            Outcome.CANCELED,
            OrderStatus.CANCELED,
            answer.reduced_by,
            ConfirmedBy.CANCEL,
            answer.ts_ms,
            order=answer.order,
        )
    return _AFTER_CANCEL[answer.meaning](case.troubled(answer.problem, now), answer, now)


def _at_once(case: Case, step: Step) -> Next:
    return Next(replace(case, step=step), Pause.NONE)


def _back_off(case: Case, step: Step, at_least_s: float = 0.0) -> Next:
    return Next(replace(case, step=step, back_offs=case.back_offs + 1), Pause.BACK_OFF, at_least_s)


def _ask_again_later(case: Case, answer: Trouble, _now: Instant) -> Next:
    return _back_off(case, Step.CANCEL, answer.retry_after_s or 0.0)


def _ask_again_perhaps_applied(case: Case, answer: Trouble, now: Instant) -> Next:
    return _ask_again_later(replace(case, unanswered_age_ms=now.age_ms), answer, now)


def _read_back(case: Case, _answer: Trouble, now: Instant) -> Next:
    return _at_once(replace(case, not_found_age_ms=now.age_ms), Step.READ_BACK)


def _read_back_accepted(case: Case, _answer: Trouble, now: Instant) -> Next:
    # The known response bug: the cancel did happen, the body tells of another order (its ts_ms too).
    return _at_once(replace(case, unanswered_age_ms=now.age_ms, accepted_age_ms=now.age_ms), Step.READ_BACK)


def _refuse(case: Case, answer: Trouble, _now: Instant) -> Verdict | Next:
    if (
        case.unanswered_age_ms is not None
    ):  # an earlier attempt may have canceled it: only a read-back may say what is true
        return _at_once(replace(case, refused=answer.problem), Step.READ_BACK)
    return Verdict(Outcome.REFUSED, problem=answer.problem, order=case.order)


_AFTER_CANCEL: dict[Meaning, Callable[[Case, Trouble, Instant], Verdict | Next]] = {
    Meaning.NOT_FOUND: _read_back,
    Meaning.RETIRED: _ask_again_later,  # the exchange client has moved to the other dialect
    Meaning.CLOCK: _ask_again_later,  # the exchange client has corrected its clock
    Meaning.KEY_REFUSED: _refuse,
    Meaning.REFUSED: _refuse,
    Meaning.PAUSED: _ask_again_later,
    Meaning.UNAVAILABLE: _ask_again_perhaps_applied,
    Meaning.BUSY: _ask_again_later,
    Meaning.UNCLEAR: _read_back_accepted,
    Meaning.UNANSWERED: _ask_again_perhaps_applied,
    Meaning.NOT_SENT: _ask_again_later,
}


def after_lost_batch(case: Case, trouble: Trouble, now: Instant) -> Next:
    """A batch got no usable reply: what it did is read back; asking again would spend write tokens first."""
    case = case.troubled(trouble.problem, now)
    return _at_once(replace(case, unanswered_age_ms=now.age_ms), Step.READ_BACK)


def after_read(case: Case, answer: ReadAnswer, asked: Instant, *, read_lag_ms: int) -> Verdict | Next:
    """What an answer to the read-back means; ``read_lag_ms``: how long reads may show an older state."""
    if isinstance(answer, Order):
        case = replace(case, order=answer, seen=True, unknown_reads=0, first_unknown_age_ms=None)
        if answer.status is OrderStatus.EXECUTED:
            return _too_late(answer)
        if answer.status is OrderStatus.CANCELED:
            return _already_canceled(case, answer, asked)
        return _still_resting(case, answer, asked.age_ms, read_lag_ms)
    case = case.troubled(answer.problem, asked)
    if answer.meaning is Meaning.NOT_FOUND and answer.proof:
        return _unknown(case, asked.age_ms, read_lag_ms)
    if answer.meaning is Meaning.REFUSED and case.unanswered_age_ms is None:
        return Verdict(Outcome.REFUSED, problem=answer.problem, order=case.order)
    return _back_off(case, Step.READ_BACK, answer.retry_after_s or 0.0)


def _too_late(order: Order) -> Verdict:
    return Verdict(
        Outcome.TOO_LATE,
        order.status,
        Decimal(0),
        ConfirmedBy.READ_BACK,
        order.last_update_ms,
        order=order,
    )


def _already_canceled(case: Case, order: Order, asked: Instant) -> Verdict:
    """Ours if a cancel of ours can have done it, else somebody was there before us."""
    if case.unanswered_age_ms is None or _clearly_before_us(case, order.last_update_ms, asked):
        return _too_late(order)
    removed: Decimal | None = None
    if order.initial_count is not None and order.fill_count is not None:
        removed = order.initial_count - order.fill_count
    return Verdict(
        Outcome.CANCELED,
        order.status,
        removed if removed is not None and removed >= 0 else None,
        ConfirmedBy.READ_BACK,
        order.last_update_ms,
        order=order,
    )


def _clearly_before_us(case: Case, updated_ms: int | None, asked: Instant) -> bool:
    """Whether the order's end, as the exchange stamped it, lies before any attempt of ours.

    The exchange's clock may have been set since, once: what cannot be told apart then counts as ours.
    """
    first_ms = case.first_attempt_ms
    if updated_ms is None or first_ms is None:
        return False
    first_by_its_clock_now_ms = asked.exchange_ms - (asked.age_ms - case.first_attempt_age_ms)
    if updated_ms > asked.exchange_ms + FUTURE_MARGIN_MS:  # stamped before the clock was set back
        sent_after_that = first_ms <= first_by_its_clock_now_ms + CLOCK_MARGIN_MS
        return sent_after_that or updated_ms < first_ms - CLOCK_MARGIN_MS
    return updated_ms < min(first_ms, first_by_its_clock_now_ms) - CLOCK_MARGIN_MS


def _still_resting(case: Case, order: Order, age_ms: int, read_lag_ms: int) -> Verdict | Next:
    """Resting: elsewhere than where we asked, or shown as it was before (a stale read)."""
    asked_there = _asked_where_it_rests(case.routing, order)
    contradicted_age_ms = [
        case.accepted_age_ms,
        case.not_found_age_ms if asked_there else None,
        case.unanswered_age_ms if case.refused else None,
    ]
    # (A moment still to come is from before the cancel was given up and asked for again.)
    if any(then_ms is not None and 0 <= age_ms - then_ms < read_lag_ms for then_ms in contradicted_age_ms):
        return _back_off(case, Step.READ_BACK)
    if case.refused is not None:
        return Verdict(Outcome.REFUSED, problem=case.refused, order=order)
    there = _routing_to(order, case.routing)
    moved = not asked_there and there != case.routing
    case = replace(case, routing=there, accepted_age_ms=None, not_found_age_ms=None)
    return _at_once(case, Step.CANCEL) if moved else _back_off(case, Step.CANCEL)


def _routing_to(order: Order, asked: Routing) -> Routing:
    """Where the order says it rests; a shard that it does not name is left to the exchange to find."""
    ticker = asked.market_ticker if order.ticker is None else order.ticker
    unknown_shard = None if ticker is None else -1
    shard = unknown_shard if order.exchange_index is None else order.exchange_index
    return Routing(ticker, shard, order.subaccount)


def _asked_where_it_rests(asked: Routing, order: Order) -> bool:
    """Whether a cancel with this routing reaches the order: without shard and ticker it goes to shard 0."""
    if asked.market_ticker is not None and asked.market_ticker != order.ticker:
        return False
    if (asked.subaccount or 0) != (order.subaccount or 0):
        return False
    auto_routed = asked.exchange_index == -1 or (
        asked.exchange_index is None and asked.market_ticker is not None
    )
    return auto_routed or (asked.exchange_index or 0) == (order.exchange_index or 0)


def _unknown(case: Case, age_ms: int, read_lag_ms: int) -> Verdict | Next:
    """Unknown once enough reads over enough time agree, and none ever showed the order."""
    first_ms = min(age_ms, age_ms if case.first_unknown_age_ms is None else case.first_unknown_age_ms)
    case = replace(case, unknown_reads=case.unknown_reads + 1, first_unknown_age_ms=first_ms)
    long_enough = case.unknown_reads >= NOT_FOUND_READS_FOR_PROOF and age_ms - first_ms >= read_lag_ms
    if long_enough and not case.seen:
        return Verdict(Outcome.UNKNOWN_ORDER, confirmed_by=ConfirmedBy.READ_BACK, problem=case.last_problem)
    return _back_off(case, Step.READ_BACK)
