"""The outcome rules: decides from each answer whether a cancel is settled, and if not, what to ask next.

Pure functions over answers. The rules, in one breath: "canceled" is said only when the exchange said so,
to the cancel or on a read-back; a 404 is never an outcome by itself but a reason to read the order back;
an attempt without a usable reply may have taken effect, so what comes after it is read in that light.

A number of contracts is reported only where it is proven: by the cancel's own answer, or by what a listing or
a read has last shown of the order, less what was filled since, when its end is not before us (see ``clock``).

A :class:`Case` is what we know about one cancel so far (see ``case``). Feeding it an answer gives a
:class:`Verdict`, or :class:`Next`: the wiser case, with the step to take and the kind of pause before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from enum import Enum, auto
from http import HTTPStatus

from kalshi_cancel.exchange.calls import Routing
from kalshi_cancel.exchange.clock import Span
from kalshi_cancel.exchange.protocol import CancelAnswer, Canceled, Failure, Meaning, ReadAnswer
from kalshi_cancel.model.orders import Order, OrderStatus
from kalshi_cancel.model.results import ConfirmedBy, Outcome, Problem
from worker.dispatch.case import UNKNOWN_STATUS, Attempt, Case, Instant, Step

# A 404 on a read proves nothing by itself (reads lag writes): so many, over at least the read lag, do.
NOT_FOUND_READS_FOR_PROOF = 3
# A cancel's age is told by whoever has claimed it: each handing over may cost so much exactness.
AGE_UNSURE_MS = 1_000
# So much wider a clock's bounds may be for their age alone (clock.py).
AGED_MS = 2_000
# A size that was shown longer than this before our attempt proves nothing: somebody may have amended it.
SHOWN_RECENTLY_MS = 1_000
# An order's time stamp that lies so far in the engine's future is from before its clock was set back.
FUTURE_MARGIN_MS = 100
KEY_REFUSALS_MOST = 5  # of one order, while the key works for others
_KEY_OR_SCOPE = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)


class Pause(Enum):
    """How long to wait before the next step."""

    NONE = auto()  # the answer already told where to go: at once
    BACK_OFF = auto()  # growing, jittered


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

    @property
    def is_of_the_key(self) -> bool:
        """Whether another key might be told otherwise: one may do, and see, more than another."""
        if self.outcome is Outcome.REFUSED:
            return self.problem is not None and self.problem.http_status in _KEY_OR_SCOPE
        return self.outcome is Outcome.UNKNOWN_ORDER


@dataclass(frozen=True, slots=True)
class Next:
    """Not known yet: the case with its new progress and the step to take, and the pause before it."""

    case: Case
    pause: Pause
    at_least_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Lags:
    """``read_ms``: how long reads may show an older state; ``record_ms``: how long our records are kept."""

    read_ms: int
    record_ms: int = 86_400_000


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
    case = case.with_problem(answer.problem, now)
    if answer.may_have_taken_effect:
        case = case.doubted(now)
    return _AFTER_CANCEL[answer.meaning](case, answer, now)


def _at_once(case: Case, step: Step) -> Next:
    return Next(replace(case, step=step), Pause.NONE)


def _back_off(case: Case, step: Step, at_least_s: float = 0.0) -> Next:
    return Next(replace(case, step=step, back_offs=case.back_offs + 1), Pause.BACK_OFF, at_least_s)


def _ask_again_later(case: Case, answer: Failure, _now: Instant) -> Next:
    return _back_off(case, Step.CANCEL, answer.retry_after_s or 0.0)


def _not_sent(case: Case, answer: Failure, now: Instant) -> Next:
    return _ask_again_later(replace(case, attempts=max(case.attempts - 1, 0)), answer, now)


def _look_what_it_did(case: Case, answer: Failure, _now: Instant) -> Next:
    # A cancel that keeps failing may have worked the first time: it takes turns with reads.
    return _back_off(case, Step.READ_BACK, answer.retry_after_s or 0.0)


def _read_back(case: Case, _answer: Failure, now: Instant) -> Next:
    return _at_once(replace(case, not_found_age_ms=now.age_ms), Step.READ_BACK)


def _read_back_accepted(case: Case, _answer: Failure, now: Instant) -> Next:
    # The known response bug: the cancel did happen, the body tells of another order (its ts_ms too).
    return _at_once(replace(case, accepted_age_ms=now.age_ms), Step.READ_BACK)


def _refuse(case: Case, answer: Failure, _now: Instant) -> Verdict | Next:
    # What may have been canceled, or may be over, is looked at before anybody is told "refused".
    if case.unanswered_age_ms is None and answer.problem.http_status in _KEY_OR_SCOPE:
        return Verdict(Outcome.REFUSED, problem=answer.problem, order=case.order)
    return _at_once(replace(case, refused=answer.problem), Step.READ_BACK)


def _refuse_key(case: Case, answer: Failure, now: Instant) -> Verdict | Next:
    # The key is this worker's: it claims nothing more, and workers with another key go on. Only where the key
    # works for everything else is it the order that is refused.
    case = replace(case, key_refusals=case.key_refusals + 1)
    if case.key_refusals >= KEY_REFUSALS_MOST:
        return _refuse(case, answer, now)
    return _back_off(case, case.step)


_AFTER_CANCEL: dict[Meaning, Callable[[Case, Failure, Instant], Verdict | Next]] = {
    Meaning.NOT_FOUND: _read_back,
    Meaning.RETIRED: _ask_again_later,  # the exchange client has moved to the other dialect
    Meaning.CLOCK: _ask_again_later,  # the exchange client has corrected its clock
    Meaning.KEY_REFUSED: _refuse_key,
    Meaning.REFUSED: _refuse,
    Meaning.PAUSED: _ask_again_later,
    Meaning.UNAVAILABLE: _look_what_it_did,
    Meaning.BUSY: _ask_again_later,
    Meaning.UNCLEAR: _read_back_accepted,
    Meaning.UNANSWERED: _look_what_it_did,
    Meaning.NOT_SENT: _not_sent,
}


def after_lost_batch(case: Case, failure: Failure, now: Instant) -> Next:
    """A batch got no usable reply: what it did is read back; asking again would spend write tokens first."""
    case = case.with_problem(failure.problem, now)
    return _at_once(case.doubted(now) if failure.may_have_taken_effect else case, Step.READ_BACK)


def after_read(case: Case, answer: ReadAnswer, asked: Instant, lags: Lags) -> Verdict | Next:
    """What an answer to the read-back means."""
    if isinstance(answer, Order):
        return _shown(case, answer, asked, lags)
    case = case.with_problem(answer.problem, asked)
    if answer.meaning is Meaning.NOT_FOUND and answer.proof:
        return _unknown(case, asked.age_ms, lags)
    if answer.meaning is Meaning.KEY_REFUSED:
        return _back_off(case, case.step)
    if answer.meaning is Meaning.REFUSED and case.unanswered_age_ms is None:
        return Verdict(Outcome.REFUSED, problem=case.refused or answer.problem, order=case.order)
    # Where a cancel got no answer and now a read gets none, cancels and reads take turns.
    answered = case.refused or case.not_found_age_ms is not None or case.accepted_age_ms is not None
    takes_turns = case.unanswered_age_ms is not None and not answered
    return _back_off(case, Step.CANCEL if takes_turns else Step.READ_BACK, answer.retry_after_s or 0.0)


def after_search(case: Case, found: ReadAnswer | None, asked: Instant, lags: Lags) -> Verdict | Next:
    """What the archive tells about an order that reads do not show; None: it is not there either."""
    if found is None:
        if not case.seen:
            return Verdict(
                Outcome.UNKNOWN_ORDER, confirmed_by=ConfirmedBy.READ_BACK, problem=case.last_problem
            )
        return _back_off(replace(case, unknown_reads=0, first_unknown_age_ms=None), Step.READ_BACK)
    if isinstance(found, Order):
        return _shown(case, found, asked, lags)
    case = case.with_problem(found.problem, asked)
    return _back_off(case, Step.SEARCH_ARCHIVE, found.retry_after_s or 0.0)


def _shown(case: Case, order: Order, asked: Instant, lags: Lags) -> Verdict | Next:
    case = replace(case, order=order, seen=True, unknown_reads=0, first_unknown_age_ms=None)
    if order.status is OrderStatus.CANCELED:
        return _already_canceled(case, order, asked, lags)
    if order.status.terminal:
        return _too_late(order, Decimal(0))
    if order.status is OrderStatus.UNKNOWN:
        word = ascii(order.raw.get("status"))
        said = f"the exchange shows it with the status {word}, which is not known here"
        case = case.with_problem(Problem(UNKNOWN_STATUS, said), asked)
    return _still_resting(case, order, asked.age_ms, lags)


def _too_late(order: Order, reduced_by: Decimal | None) -> Verdict:
    return Verdict(
        Outcome.TOO_LATE,
        order.status,
        reduced_by,
        ConfirmedBy.READ_BACK,
        order.last_update_ms,
        order=order,
    )


class _End(Enum):
    """When an order ended, seen from our first attempt that may have taken effect."""

    BEFORE_US = auto()
    NOT_BEFORE_US = auto()
    CANNOT_TELL = auto()


def _already_canceled(case: Case, order: Order, asked: Instant, lags: Lags) -> Verdict:
    """Ours if a cancel of ours may have done it, else somebody was there before us."""
    end = _end_of(case, order, asked, lags)
    if case.unanswered_age_ms is None or end is _End.BEFORE_US:
        return _too_late(order, None if _perhaps_ours_long_ago(case, order, asked, lags) else Decimal(0))
    removed = _removed(case, order, asked) if end is _End.NOT_BEFORE_US else None
    return Verdict(
        Outcome.CANCELED,
        order.status,
        removed,
        ConfirmedBy.READ_BACK,
        order.last_update_ms,
        order=order,
    )


def _end_of(case: Case, order: Order, asked: Instant, lags: Lags) -> _End:
    """Compares the order's end with our first doubtful attempt, by the engine's clock."""
    end, sent = _stamp(order), _sent_by_engine(case.first_doubt, asked)
    if end is None or sent is None:
        return _End.CANNOT_TELL
    if asked.engine is not None and end.low_ms > asked.engine.high_ms + FUTURE_MARGIN_MS:
        return _End.CANNOT_TELL  # stamped before the clock was set back
    if end.is_before(sent):
        return _End.CANNOT_TELL if _rested_after(end, case, asked, lags) else _End.BEFORE_US
    return _End.NOT_BEFORE_US if sent.is_before(end) else _End.CANNOT_TELL


def _rested_after(end: Span, case: Case, asked: Instant, lags: Lags) -> bool:
    """Whether a read has shown the order resting after its end: then the clock was set in between."""
    if case.shown_age_ms is None or asked.engine is None:
        return False
    shown = asked.engine.moved(case.shown_age_ms - asked.age_ms - lags.read_ms, unsure_ms=AGE_UNSURE_MS)
    return end.is_before(shown)


def _stamp(order: Order) -> Span | None:
    at_ms = order.last_update_ms
    return None if at_ms is None else Span(at_ms, at_ms + order.last_update_within_ms)


def _sent_by_engine(doubt: Attempt | None, asked: Instant) -> Span | None:
    """When a doubtful attempt was sent: as it was known then, and as its age tells now.

    Where the two contradict each other the clock was set in between, and nobody can tell. Where less is known
    now than then, it may have been set without showing: what either of them allows is possible.
    """
    if doubt is None or doubt.engine is None or asked.engine is None:
        return None
    by_age = asked.engine.moved(doubt.age_ms - asked.age_ms, unsure_ms=AGE_UNSURE_MS)
    if not doubt.engine.overlaps(by_age):
        return None
    if asked.engine.width_ms > doubt.engine.width_ms + AGED_MS:
        return doubt.engine.hull(by_age)
    return doubt.engine.within(by_age)


def _removed(case: Case, order: Order, asked: Instant) -> Decimal | None:
    """What our cancel removed, where that is proven; the order's end is not before us."""
    if case.remaining is None or case.filled is None or order.fill_count is None or case.rested_after_doubt:
        return None
    end, sent = _stamp(order), _sent_by_engine(case.last_doubt, asked)
    if end is None or sent is None or case.last_doubt is None or case.unanswered_age_ms is None:
        return None
    if case.last_doubt.age_ms - (case.shown_age_ms or 0) > SHOWN_RECENTLY_MS:
        return None  # somebody may have changed its size since
    under_way_ms = min(case.unanswered_age_ms - case.last_doubt.age_ms, case.last_doubt.effect_ms)
    if not sent.is_before(end) or end.high_ms > sent.high_ms + under_way_ms:
        return None  # it came when no attempt was under way: perhaps somebody else's
    removed = case.remaining - (order.fill_count - case.filled)
    return removed if order.fill_count >= case.filled and removed > 0 else None


def _perhaps_ours_long_ago(case: Case, order: Order, asked: Instant, lags: Lags) -> bool:
    """Whether a record of ours may have told of this end, which is not kept any more."""
    if case.request.again:
        return True
    ended_ms = order.last_update_ms
    return ended_ms is None or asked.exchange_ms - ended_ms > lags.record_ms


def _still_resting(case: Case, order: Order, age_ms: int, lags: Lags) -> Verdict | Next:
    """Resting: elsewhere than where we asked, or shown as it was before (a stale read)."""
    asked_there = _asked_where_it_rests(case.routing, order)
    there = _routing_to(order, case.routing)
    moved = not asked_there and there != case.routing
    case = replace(case, remaining=order.remaining_count, filled=order.fill_count, shown_age_ms=age_ms)
    contradicted_age_ms = [
        case.accepted_age_ms,
        case.not_found_age_ms if asked_there else None,
        case.unanswered_age_ms if case.refused else None,
    ]
    if any(_is_within(then_ms, age_ms, lags) for then_ms in contradicted_age_ms):
        return _back_off(case, Step.READ_BACK)
    if case.refused is not None and not moved:
        return Verdict(Outcome.REFUSED, problem=case.refused, order=order)
    asked_before = case.not_found_age_ms is not None or case.accepted_age_ms is not None
    case = replace(case, routing=there, accepted_age_ms=None, not_found_age_ms=None, refused=None)
    if not _is_within(case.unanswered_age_ms, age_ms, lags):
        case = replace(case, rested_after_doubt=case.unanswered_age_ms is not None)
    # After a lost answer the pause came before the read.
    return _at_once(case, Step.CANCEL) if moved or not asked_before else _back_off(case, Step.CANCEL)


def _is_within(then_ms: int | None, age_ms: int, lags: Lags) -> bool:
    """Whether a read at this age may still show what was before that."""
    # (A moment still to come is from before the cancel was given up and asked for again.)
    return then_ms is not None and 0 <= age_ms - then_ms < lags.read_ms


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


def _unknown(case: Case, age_ms: int, lags: Lags) -> Verdict | Next:
    """Not here once enough reads over enough time agree; then the archive may have it."""
    if case.refused is not None and case.unanswered_age_ms is None:
        return Verdict(Outcome.REFUSED, problem=case.refused)
    first_ms = min(age_ms, age_ms if case.first_unknown_age_ms is None else case.first_unknown_age_ms)
    case = replace(case, unknown_reads=case.unknown_reads + 1, first_unknown_age_ms=first_ms)
    left_ms = lags.read_ms - (age_ms - first_ms)
    if case.unknown_reads >= NOT_FOUND_READS_FOR_PROOF and left_ms <= 0:
        return _at_once(case, Step.SEARCH_ARCHIVE)
    # The last read is the one that counts: others before it would only take tokens and senders from the rest.
    enough_before = case.unknown_reads >= NOT_FOUND_READS_FOR_PROOF - 1
    return _back_off(case, Step.READ_BACK, max(left_ms / 1000, 0.0) if enough_before else 0.0)
