"""The outcome rules: row by row, and against an exchange that loses answers, lags and is not alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalshi_cancel.exchange.calls import Routing
from kalshi_cancel.exchange.clock import BoundedClock, Span
from kalshi_cancel.exchange.protocol import Canceled, Failure, Meaning
from kalshi_cancel.model.orders import Order, OrderStatus
from kalshi_cancel.model.requests import CancelRequest
from kalshi_cancel.model.results import ConfirmedBy, Outcome, Problem
from worker.dispatch import resolution
from worker.dispatch.case import UNDER_WAY_MOST_MS, Attempt, Case, Instant, Step
from worker.dispatch.resolution import (
    KEY_REFUSALS_MOST,
    NOT_FOUND_READS_FOR_PROOF,
    Lags,
    Next,
    Pause,
    Verdict,
)

ORDER_ID = "order-1"
TICKER = "KXBTC-26NOV22-B"
T0 = 1_795_352_400_000  # a moment on the exchange's clock, ms
LAG_MS = 1_000
UNSURE_MS = 5  # of the engine's clock, either way
DAY_MS = 86_400_000
PROBLEM = Problem("some_code", "some words", 500)
RESTING, CANCELED, EXECUTED = OrderStatus.RESTING, OrderStatus.CANCELED, OrderStatus.EXECUTED


def case_of(**request):
    return Case.of(CancelRequest(ORDER_ID, **request))


def sent(case=None, at_ms=T0):
    return (case or case_of()).sending(at(at_ms))


def failure(meaning, code="some_code", retry_after_s=None, *, proof=True, status=500):
    return Failure(meaning, Problem(code, "some words", status), retry_after_s, proof)


NOT_FOUND = failure(Meaning.NOT_FOUND, "not_found")
LOST = failure(Meaning.UNANSWERED)


def order(status, **known):
    fields = {
        "ticker": TICKER,
        "exchange_index": 0,
        "subaccount": 0,
        "initial_count": Decimal(10),
        "fill_count": Decimal(0),
        "remaining_count": Decimal(10) if status is RESTING else Decimal(0),
        "last_update_ms": T0 + 50,
    }
    return Order(order_id=ORDER_ID, status=status, raw={"order_id": ORDER_ID}, **{**fields, **known})


def at(now_ms, age_ms=None):
    """A moment in the life of a cancel that was accepted at T0, unless its age is given."""
    return Instant(now_ms, now_ms - T0 if age_ms is None else age_ms, engine_at(now_ms))


def engine_at(now_ms):
    return Span(now_ms - UNSURE_MS, now_ms + UNSURE_MS)


def after_cancel(case, answer, now_ms, age_ms=None):
    return resolution.after_cancel(case, answer, at(now_ms, age_ms))


def after_lost_batch(case, answer, now_ms):
    return resolution.after_lost_batch(case, answer, at(now_ms))


def after_read_at(case, answer, now_ms, age_ms=None):
    return resolution.after_read(case, answer, at(now_ms, age_ms), Lags(LAG_MS, DAY_MS))


def onward(decided):
    """The case of an answer that settled nothing."""
    assert isinstance(decided, Next)
    return decided.case


def lost_then_404():
    """Sent at T0, its answer lost at T0 + 1,000; a read shows 10 left; sent again, a 404 at T0 + 1,200."""
    lost = onward(after_cancel(sent(), LOST, T0 + 1_000))
    lost = onward(after_read_at(lost, order(RESTING), T0 + 1_050))
    return onward(after_cancel(lost.sending(at(T0 + 1_100)), NOT_FOUND, T0 + 1_200))


def a_404():
    """Sent at T0, a 404 at T0 + 100."""
    return onward(after_cancel(sent(), NOT_FOUND, T0 + 100))


# -- the cancel's own answer


def test_the_exchanges_own_word_settles_a_cancel():
    shown = order(CANCELED)
    assert after_cancel(sent(), Canceled(Decimal("7.50"), T0 + 5, shown), T0 + 9) == Verdict(
        Outcome.CANCELED, CANCELED, Decimal("7.50"), ConfirmedBy.CANCEL, T0 + 5, order=shown
    )


def test_the_exchanges_own_word_counts_whatever_came_before():
    verdict = after_cancel(
        lost_then_404().sending(at(T0 + 2_000)), Canceled(Decimal(3), None, None), T0 + 2_100
    )
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.CANCELED, Decimal(3))
    assert verdict.confirmed_by is ConfirmedBy.CANCEL


NOT_APPLIED = [Meaning.RETIRED, Meaning.CLOCK, Meaning.PAUSED, Meaning.BUSY, Meaning.NOT_SENT]
PERHAPS_APPLIED = [Meaning.UNAVAILABLE, Meaning.UNANSWERED]


def test_the_rules_and_the_table_of_answers_agree_on_what_may_have_taken_effect():
    maybe = {meaning for meaning in Meaning if meaning.may_have_taken_effect}
    assert maybe == {*PERHAPS_APPLIED, Meaning.UNCLEAR}


@pytest.mark.parametrize("meaning", [*NOT_APPLIED, *PERHAPS_APPLIED])
def test_an_answer_that_asks_for_patience_is_followed_up_after_a_pause(meaning):
    decided = after_cancel(sent(), failure(meaning), T0 + 70)
    assert isinstance(decided, Next)
    assert (decided.pause, decided.at_least_s) == (Pause.BACK_OFF, 0.0)
    assert decided.case.step is (Step.CANCEL if meaning in NOT_APPLIED else Step.READ_BACK)
    assert decided.case.back_offs == 1
    assert decided.case.last_problem is not None
    assert decided.case.last_problem.code == "some_code"


@pytest.mark.parametrize("meaning", NOT_APPLIED)
def test_what_was_not_applied_leaves_no_doubt_behind(meaning):
    case = onward(after_cancel(sent(), failure(meaning), T0 + 70))
    assert (case.unanswered_age_ms, case.accepted_age_ms, case.not_found_age_ms) == (None, None, None)
    assert case.first_doubt is None


def test_a_call_that_never_left_us_is_no_attempt():
    case = onward(after_cancel(sent(), failure(Meaning.NOT_SENT), T0 + 70))
    assert case.attempts == 0


def test_only_attempts_that_may_have_taken_effect_count_as_the_first():
    paused = onward(after_cancel(sent(), failure(Meaning.PAUSED), T0 + 70))
    lost = onward(after_cancel(paused.sending(at(T0 + 6_000)), LOST, T0 + 6_200))
    assert lost.first_doubt == Attempt(6_000, engine_at(T0 + 6_000))
    elsewhere = order(CANCELED, last_update_ms=T0 + 5_000)
    verdict = after_read_at(lost, elsewhere, T0 + 6_300)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.TOO_LATE, Decimal(0))


@pytest.mark.parametrize("meaning", PERHAPS_APPLIED)
def test_after_a_lost_answer_reads_and_cancels_take_turns(meaning):
    failed = after_cancel(sent(), failure(meaning), T0 + 70)
    assert isinstance(failed, Next)
    assert (failed.pause, failed.case.step) == (Pause.BACK_OFF, Step.READ_BACK)
    resting = after_read_at(failed.case, order(RESTING), T0 + 100)
    assert isinstance(resting, Next)
    assert (resting.pause, resting.case.step) == (Pause.NONE, Step.CANCEL)  # the pause came before the read
    unread = after_read_at(failed.case, LOST, T0 + 100)
    assert isinstance(unread, Next)
    assert (unread.pause, unread.case.step) == (Pause.BACK_OFF, Step.CANCEL)
    again = after_cancel(resting.case.sending(at(T0 + 200)), failure(meaning), T0 + 270)
    assert isinstance(again, Next)
    assert again.case.step is Step.READ_BACK


@pytest.mark.parametrize("meaning", [*PERHAPS_APPLIED, Meaning.UNCLEAR])
def test_what_may_have_been_applied_is_remembered_with_its_moment(meaning):
    assert onward(after_cancel(sent(), failure(meaning), T0 + 70)).unanswered_age_ms == 70


@pytest.mark.parametrize("meaning", [Meaning.BUSY, Meaning.UNAVAILABLE, Meaning.PAUSED])
def test_a_retry_after_is_the_least_pause(meaning):
    decided = after_cancel(sent(), failure(meaning, retry_after_s=1.5), T0)
    assert isinstance(decided, Next)
    assert decided.at_least_s == 1.5


def test_back_offs_are_counted_over_all_answers():
    case = case_of()
    for n in range(5):
        case = onward(after_cancel(case.sending(at(T0 + n)), failure(Meaning.BUSY), T0 + n))
    assert (case.back_offs, case.attempts, case.first_doubt) == (5, 5, None)


def test_a_404_is_no_outcome_but_is_read_back_at_once():
    decided = after_cancel(sent(), NOT_FOUND, T0 + 100)
    assert isinstance(decided, Next)
    assert decided.pause is Pause.NONE
    assert (decided.case.step, decided.case.not_found_age_ms) == (Step.READ_BACK, 100)
    assert decided.case.unanswered_age_ms is None


def test_an_answer_about_another_order_is_read_back_at_once():
    decided = after_cancel(sent(), failure(Meaning.UNCLEAR, "wrong_order"), T0 + 100)
    assert isinstance(decided, Next)
    assert decided.pause is Pause.NONE
    assert (decided.case.step, decided.case.accepted_age_ms) == (Step.READ_BACK, 100)


def test_a_refused_key_is_its_workers_failure_until_it_is_refused_for_this_order_alone():
    case, refusal = case_of(), failure(Meaning.KEY_REFUSED, status=401)
    for n in range(KEY_REFUSALS_MOST - 1):
        decided = after_cancel(case.sending(at(T0 + n)), refusal, T0 + n)
        assert isinstance(decided, Next)
        assert decided.case.step is Step.CANCEL
        case = decided.case
    assert after_cancel(case.sending(at(T0 + 9)), refusal, T0 + 9) == Verdict(
        Outcome.REFUSED, problem=refusal.problem
    )


def test_a_key_that_may_not_cancel_is_the_outcome_when_no_answer_was_lost():
    refusal = failure(Meaning.REFUSED, status=403)
    assert after_cancel(sent(), refusal, T0) == Verdict(Outcome.REFUSED, problem=refusal.problem)


@pytest.mark.parametrize("status", [400, 409, 413, 422])
def test_before_a_request_is_called_refused_the_order_is_read_once(status):
    refusal = failure(Meaning.REFUSED, status=status)
    decided = after_cancel(sent(), refusal, T0)
    assert isinstance(decided, Next)
    assert (decided.pause, decided.case.step) == (Pause.NONE, Step.READ_BACK)
    over = after_read_at(decided.case, order(EXECUTED), T0 + 50)
    assert isinstance(over, Verdict)
    assert over.outcome is Outcome.TOO_LATE
    resting = after_read_at(decided.case, order(RESTING), T0 + 50)
    assert isinstance(resting, Verdict)
    assert (resting.outcome, resting.problem) == (Outcome.REFUSED, refusal.problem)
    nowhere = after_read_at(decided.case, NOT_FOUND, T0 + 50)
    assert isinstance(nowhere, Verdict)
    assert (nowhere.outcome, nowhere.problem) == (Outcome.REFUSED, refusal.problem)


def test_a_refused_cancel_whose_order_rests_elsewhere_is_asked_for_there():
    refused = onward(after_cancel(sent(), failure(Meaning.REFUSED, status=400), T0))
    decided = after_read_at(refused, order(RESTING, exchange_index=2), T0 + 50)
    assert isinstance(decided, Next)
    assert (decided.case.step, decided.case.routing) == (Step.CANCEL, Routing(TICKER, 2, 0))
    assert decided.case.refused is None


def test_a_permanent_error_after_a_lost_answer_is_read_back_before_it_is_reported():
    lost = onward(after_cancel(sent(), LOST, T0 + 1_000))
    decided = after_cancel(lost.sending(at(T0 + 1_100)), failure(Meaning.REFUSED), T0 + 1_200)
    assert isinstance(decided, Next)
    assert (decided.pause, decided.case.step) == (Pause.NONE, Step.READ_BACK)
    canceled = after_read_at(decided.case, order(CANCELED, fill_count=Decimal(4)), T0 + 1_300)
    assert isinstance(canceled, Verdict)
    assert (canceled.outcome, canceled.reduced_by) == (Outcome.CANCELED, None)


def test_a_refused_cancel_whose_order_still_rests_after_the_lag_is_refused():
    lost = onward(after_cancel(sent(), LOST, T0))
    refused = onward(after_cancel(lost.sending(at(T0 + 10)), failure(Meaning.REFUSED), T0 + 20))
    early = after_read_at(refused, order(RESTING), T0 + LAG_MS - 1)
    assert isinstance(early, Next)
    assert (early.case.step, early.pause) == (Step.READ_BACK, Pause.BACK_OFF)
    late = after_read_at(early.case, order(RESTING), T0 + LAG_MS)
    assert isinstance(late, Verdict)
    assert (late.outcome, late.problem) == (Outcome.REFUSED, PROBLEM)


def test_a_batch_without_an_answer_is_read_back_at_once_and_its_loss_is_remembered():
    decided = after_lost_batch(sent(), LOST, T0 + 300)
    assert (decided.pause, decided.case.step) == (Pause.NONE, Step.READ_BACK)
    assert decided.case.unanswered_age_ms == 300
    verdict = after_read_at(decided.case, order(CANCELED), T0 + 400)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.CANCELED, None)


def test_a_batch_that_was_not_applied_leaves_no_doubt_behind():
    decided = after_lost_batch(sent(), NOT_FOUND, T0 + 300)
    assert (decided.case.step, decided.case.unanswered_age_ms) == (Step.READ_BACK, None)


def test_every_meaning_has_a_rule():
    for meaning in Meaning:
        assert isinstance(after_cancel(sent(), failure(meaning), T0), Verdict | Next)
        assert isinstance(after_read_at(a_404(), failure(meaning), T0), Verdict | Next)


# -- a read-back that shows a terminal order


def test_an_executed_order_is_too_late_and_nothing_was_removed():
    shown = order(EXECUTED, fill_count=Decimal(10), last_update_ms=T0 + 20)
    assert after_read_at(a_404(), shown, T0 + 200) == Verdict(
        Outcome.TOO_LATE, EXECUTED, Decimal(0), ConfirmedBy.READ_BACK, T0 + 20, order=shown
    )


def test_an_executed_order_is_too_late_even_after_a_lost_answer():
    verdict = after_read_at(lost_then_404(), order(EXECUTED, fill_count=Decimal(10)), T0 + 1_300)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.TOO_LATE, Decimal(0))


def test_a_404_without_a_lost_answer_and_then_canceled_is_too_late():
    verdict = after_read_at(a_404(), order(CANCELED, fill_count=Decimal(4)), T0 + 200)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.status) == (Outcome.TOO_LATE, CANCELED)
    assert verdict.reduced_by == Decimal(0)
    assert verdict.confirmed_by is ConfirmedBy.READ_BACK


# -- whose cancel it was, and how many contracts it removed


def test_what_our_lost_cancel_removed_is_what_was_last_shown_less_what_was_filled_since():
    """Placed as 20, decreased to 10 before the read, a quarter of that filled before the cancel."""
    shown = order(CANCELED, initial_count=Decimal(20), fill_count=Decimal("2.50"))
    assert after_read_at(lost_then_404(), shown, T0 + 1_300) == Verdict(
        Outcome.CANCELED, CANCELED, Decimal("7.50"), ConfirmedBy.READ_BACK, T0 + 50, order=shown
    )


def test_what_was_removed_is_null_where_nothing_has_shown_what_was_left():
    lost = onward(after_cancel(sent(), LOST, T0 + 1_000))
    verdict = after_read_at(lost, order(CANCELED), T0 + 1_300)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.CANCELED, None)


def test_what_a_listing_has_shown_proves_what_was_removed_as_a_read_does():
    listed = case_of(seen_remaining=Decimal(6), seen_filled=Decimal(1))
    lost = onward(after_cancel(sent(listed), LOST, T0 + 1_000))
    verdict = after_read_at(lost, order(CANCELED, fill_count=Decimal(3)), T0 + 1_300)
    assert isinstance(verdict, Verdict)
    assert verdict.reduced_by == Decimal(4)


@pytest.mark.parametrize(("after_ms", "removed"), [(900, Decimal(4)), (1_100, None)])
def test_what_was_shown_long_before_our_attempt_proves_nothing(after_ms, removed):
    listed = case_of(seen_remaining=Decimal(6), seen_filled=Decimal(1))
    lost = onward(after_cancel(sent(listed, T0 + after_ms), LOST, T0 + after_ms + 1_000))
    ended = order(CANCELED, fill_count=Decimal(3), last_update_ms=T0 + after_ms + 50)
    verdict = after_read_at(lost, ended, T0 + after_ms + 1_300)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.CANCELED, removed)


@pytest.mark.parametrize(
    "shown", [{"fill_count": None}, {"fill_count": Decimal(11)}, {"fill_count": Decimal(10)}]
)
def test_what_was_removed_is_null_when_the_order_does_not_tell_or_contradicts_itself(shown):
    verdict = after_read_at(lost_then_404(), order(CANCELED, **shown), T0 + 1_300)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.CANCELED, None)


def test_what_was_removed_is_null_when_it_was_shown_resting_after_the_doubtful_attempt():
    lost = onward(after_cancel(sent(), LOST, T0 + 100))
    rested = onward(after_read_at(lost, order(RESTING), T0 + 100 + LAG_MS))
    paused = onward(after_cancel(rested.sending(at(T0 + 1_200)), failure(Meaning.PAUSED), T0 + 1_250))
    case = replace(paused, step=Step.READ_BACK)
    verdict = after_read_at(case, order(CANCELED, last_update_ms=T0 + 2_000), T0 + 3_000)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.CANCELED, None)


@pytest.mark.parametrize("after_ms", [UNDER_WAY_MOST_MS + 10, 900, 60_000])
def test_what_was_removed_is_null_when_it_ended_while_no_attempt_was_under_way(after_ms):
    shown = order(CANCELED, last_update_ms=T0 + after_ms)
    verdict = after_read_at(lost_then_404(), shown, T0 + after_ms + 300)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.CANCELED, None)


@pytest.mark.parametrize(("effect_ms", "removed"), [(70, Decimal(10)), (20, None)])
def test_what_ended_later_than_cancels_take_at_present_is_perhaps_not_our_doing(effect_ms, removed):
    case = case_of().sending(replace(at(T0), effect_ms=effect_ms))
    lost = replace(onward(after_cancel(case, LOST, T0 + 1_000)), remaining=Decimal(10), filled=Decimal(0))
    kept = Case.from_json(lost.request, lost.to_json())
    verdict = after_read_at(kept, order(CANCELED, last_update_ms=T0 + 60), T0 + 1_300)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.CANCELED, removed)


def test_attempts_that_a_version_without_it_has_noted_are_read():
    lost = onward(after_cancel(case_of().sending(replace(at(T0), effect_ms=20)), LOST, T0 + 1_000))
    noted = json.loads(lost.to_json())
    assert len(noted["last_doubt"]) == 3, "which that version can read, too"
    assert Case.from_json(lost.request, json.dumps(noted)).last_doubt == lost.last_doubt
    del noted["effect_ms"]
    older = Case.from_json(lost.request, json.dumps(noted))
    assert older.last_doubt == replace(lost.last_doubt, effect_ms=UNDER_WAY_MOST_MS)


def test_what_was_removed_is_null_when_it_ended_after_the_attempt_was_given_up_on():
    lost = onward(after_cancel(sent(), LOST, T0 + 40))
    lost = onward(after_read_at(lost, order(RESTING), T0 + 50))
    paused = onward(after_cancel(lost.sending(at(T0 + 60)), failure(Meaning.PAUSED), T0 + 90))
    case = replace(paused, step=Step.READ_BACK)
    verdict = after_read_at(case, order(CANCELED, last_update_ms=T0 + 100), T0 + 300)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.CANCELED, None)


@pytest.mark.parametrize(
    ("before_ms", "rested_since"), [(2 * UNSURE_MS + 2, True), (500, True), (60_000, False)]
)
def test_an_end_before_our_first_attempt_is_somebody_elses(before_ms, rested_since):
    shown = order(CANCELED, last_update_ms=T0 - before_ms)
    lost = lost_then_404() if rested_since else onward(after_cancel(sent(), LOST, T0 + 1_000))
    verdict = after_read_at(lost, shown, T0 + 1_300)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.TOO_LATE, Decimal(0))


@pytest.mark.parametrize(
    "stamp",
    [
        {"last_update_ms": T0 - UNSURE_MS - 1},
        {"last_update_ms": T0},
        {"last_update_ms": T0 + UNSURE_MS},
        {"last_update_ms": None},
        {"last_update_ms": T0 - 900, "last_update_within_ms": 1_000},
        {"last_update_ms": T0 + 60_000},  # still to come: the clock was set back since
    ],
)
def test_where_the_clocks_bounds_overlap_nobody_can_tell_and_no_number_is_given(stamp):
    verdict = after_read_at(lost_then_404(), order(CANCELED, **stamp), T0 + 1_300)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.CANCELED, None)


def test_without_knowing_the_engines_clock_nobody_can_tell():
    lost = onward(after_cancel(case_of().sending(Instant(T0, 0)), LOST, T0 + 1_000))
    verdict = after_read_at(lost, order(CANCELED, last_update_ms=T0 - 3_600_000), T0 + 1_300)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.CANCELED, None)


def test_a_clock_that_was_set_since_the_attempt_tells_nothing():
    lost = onward(after_cancel(sent(), LOST, T0 + 1_000))
    for set_by_ms in (-60_000, -3_000, 3_000, 60_000):
        shown = order(CANCELED, last_update_ms=T0 + set_by_ms - 20_000)
        verdict = after_read_at(lost, shown, T0 + set_by_ms + 1_300, age_ms=1_300)
        assert isinstance(verdict, Verdict)
        assert (verdict.outcome, verdict.reduced_by) == (Outcome.CANCELED, None)


def test_an_end_before_a_read_that_showed_it_resting_tells_of_a_clock_that_was_set_there_and_back():
    lost = onward(after_cancel(sent(), LOST, T0 + 1_000))
    elsewhere = onward(after_read_at(lost, order(RESTING, subaccount=1), T0 + 2_000 + LAG_MS))
    again = elsewhere.sending(Instant(T0 + 3_000 + LAG_MS, 3_000 + LAG_MS, Span(T0, T0 + 10_000 + LAG_MS)))
    lost_again = onward(after_cancel(again, LOST, T0 + 4_000 + LAG_MS))
    shown = order(CANCELED, subaccount=1, last_update_ms=T0 - 120_000)
    verdict = after_read_at(lost_again, shown, T0 + 5_000 + LAG_MS)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.CANCELED, None)


def test_a_clock_that_is_known_worse_than_at_the_attempt_may_have_been_set_since():
    lost = onward(after_cancel(sent(), LOST, T0 + 1_000))
    now = Instant(T0 + 1_300, 1_300, Span(T0 - 13_700, T0 + 16_300))
    for ended_ms, outcome in ((T0 - 8_000, Outcome.CANCELED), (T0 - 20_000, Outcome.TOO_LATE)):
        verdict = resolution.after_read(
            lost, order(CANCELED, last_update_ms=ended_ms), now, Lags(LAG_MS, DAY_MS)
        )
        assert isinstance(verdict, Verdict)
        assert (verdict.outcome, verdict.reduced_by) == (
            outcome,
            Decimal(0) if ended_ms < T0 - 9_000 else None,
        )


@pytest.mark.parametrize("ended_ms", [T0 - DAY_MS - 1_000, None])
def test_an_end_that_a_record_of_ours_may_have_told_of_is_not_called_nothing_removed(ended_ms):
    verdict = after_read_at(a_404(), order(CANCELED, last_update_ms=ended_ms), T0 + 200)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.TOO_LATE, None)


def test_after_a_record_was_not_believed_an_end_is_not_called_nothing_removed():
    case = onward(after_cancel(sent(case_of(again=True)), NOT_FOUND, T0 + 100))
    verdict = after_read_at(case, order(CANCELED), T0 + 200)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.TOO_LATE, None)


@pytest.mark.parametrize("status", [OrderStatus.EXPIRED, OrderStatus.REJECTED])
def test_an_end_of_another_kind_is_too_late_even_after_a_lost_answer(status):
    verdict = after_read_at(lost_then_404(), order(status), T0 + 1_300)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.status, verdict.reduced_by) == (Outcome.TOO_LATE, status, Decimal(0))


def test_a_status_that_nobody_knows_is_named_and_the_order_is_canceled_like_a_resting_one():
    odd = replace(order(OrderStatus.UNKNOWN), raw={"status": "on_hold"})
    case = onward(after_read_at(a_404(), odd, T0 + 100 + LAG_MS))
    assert case.step is Step.CANCEL
    assert case.last_problem is not None
    assert case.last_problem.code == "unknown_status"
    assert "'on_hold'" in case.last_problem.message
    again = onward(after_cancel(case.sending(at(T0 + 1_200)), NOT_FOUND, T0 + 1_300))
    assert again.last_problem == case.last_problem  # that there is nothing to cancel says less


def test_a_200_about_another_order_is_ours_once_the_order_reads_canceled():
    case = onward(after_cancel(sent(), failure(Meaning.UNCLEAR, "wrong_order"), T0 + 100))
    verdict = after_read_at(case, order(CANCELED, fill_count=Decimal(1)), T0 + 200)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.CANCELED, None)


def test_a_vanished_hands_attempt_is_perhaps_ours():
    taken_over = case_of().interrupted(Attempt(0, engine_at(T0)), at(T0 + 5_000))
    assert (taken_over.attempts, taken_over.unanswered_age_ms) == (1, 5_000)
    assert taken_over.first_doubt == Attempt(0, engine_at(T0))
    case = onward(after_cancel(taken_over.sending(at(T0 + 5_001)), NOT_FOUND, T0 + 5_100))
    assert case.attempts == 2
    verdict = after_read_at(case, order(CANCELED), T0 + 5_200)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.CANCELED, None)


def test_what_somebody_else_canceled_while_ours_waited_for_its_first_attempt_is_not_ours():
    waited_ms = 60_000
    attempt = Attempt(waited_ms, engine_at(T0 + waited_ms))
    taken_over = case_of().interrupted(attempt, at(T0 + waited_ms + 5_000))
    sent_at = T0 + waited_ms + 5_001
    case = onward(after_cancel(taken_over.sending(at(sent_at)), NOT_FOUND, sent_at + 100))
    elsewhere = order(CANCELED, last_update_ms=T0 + waited_ms // 2)
    verdict = after_read_at(case, elsewhere, sent_at + 200)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.TOO_LATE, Decimal(0))


def test_what_a_newer_version_has_learned_is_read_as_far_as_we_know_it():
    case = onward(after_cancel(sent(), LOST, T0 + 1_000))
    newer = {**json.loads(case.to_json()), "whim": {"of": 2030}}
    assert Case.from_json(case.request, json.dumps(newer)) == Case.from_json(case.request, case.to_json())
    assert Case.from_json(case.request, "{}") == Case.of(case.request)


def test_a_hand_that_vanished_later_does_not_move_the_first_attempt():
    lost = onward(after_cancel(sent(), LOST, T0 + 1_000))
    case = lost.interrupted(Attempt(3_000, engine_at(T0 + 3_000)), at(T0 + 5_000))
    assert case.first_doubt == Attempt(0, engine_at(T0))


@pytest.mark.parametrize(
    "strange",
    [{"step": "consult_oracle"}, {"step": None}, {"refused": {"code": "c", "message": "m", "more": 1}}],
)
def test_what_a_newer_version_says_in_words_of_its_own_does_not_stop_this_one(strange):
    case = onward(after_cancel(sent(), LOST, T0 + 1_000))
    newer = {**json.loads(case.to_json()), **strange}
    assert Case.from_json(case.request, json.dumps(newer)).unanswered_age_ms == 1_000


@pytest.mark.parametrize(
    "strange",
    [
        {"attempts": "many"},
        {"unanswered_age_ms": {"low": 1, "high": 2}},
        {"first_doubt": {"age_ms": 1_000}},
        {"first_doubt": [1_000]},
        {"last_problem": "http_502"},
        {"history": 7},
        {"history": [{"at_ms": 1, "code": "http_502", "more": 1}]},
        {"routing": [1, 2]},
        {"seen": "yes"},
        {"remaining": {"lots": 10}},
    ],
    ids=str,
)
def test_what_a_newer_version_says_in_another_form_leaves_everything_in_doubt_and_proves_no_number(strange):
    case = onward(after_cancel(sent(), LOST, T0 + 1_000))
    kept = Case.from_json(case.request, json.dumps({**json.loads(case.to_json()), **strange}))
    assert kept.step is Step.READ_BACK
    verdict = after_read_at(kept, order(CANCELED, last_update_ms=T0 - 60_000), T0 + 2_000)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.CANCELED, None)


# -- a read-back that shows a resting order


@pytest.mark.parametrize(
    ("asked", "rests", "goes_to"),
    [
        ({}, {"exchange_index": 2}, Routing(TICKER, 2, 0)),
        ({"exchange_index": 0}, {"exchange_index": 3}, Routing(TICKER, 3, 0)),
        ({"exchange_index": 2}, {"exchange_index": 0}, Routing(TICKER, 0, 0)),
        ({"market_ticker": "KXOTHER"}, {"exchange_index": 2}, Routing(TICKER, 2, 0)),
        ({"market_ticker": "KXOTHER", "exchange_index": -1}, {}, Routing(TICKER, 0, 0)),
        ({}, {"subaccount": 4}, Routing(TICKER, 0, 4)),
        ({"subaccount": 4}, {"subaccount": 0}, Routing(TICKER, 0, 0)),
        (
            {"exchange_index": 1, "subaccount": 1},
            {"exchange_index": 2, "subaccount": 2},
            Routing(TICKER, 2, 2),
        ),
    ],
)
def test_an_order_that_rests_elsewhere_is_canceled_again_there_at_once(asked, rests, goes_to):
    case = onward(after_cancel(sent(case_of(**asked)), NOT_FOUND, T0 + 100))
    decided = after_read_at(case, order(RESTING, **rests), T0 + 101)
    assert isinstance(decided, Next)
    assert (decided.pause, decided.case.step) == (Pause.NONE, Step.CANCEL)
    assert decided.case.routing == goes_to


@pytest.mark.parametrize(
    ("asked", "rests"),
    [
        ({}, {"exchange_index": 0}),
        ({}, {"exchange_index": None, "subaccount": None}),
        ({"exchange_index": 2}, {"exchange_index": 2}),
        ({"exchange_index": -1, "market_ticker": TICKER}, {"exchange_index": 3}),
        ({"market_ticker": TICKER}, {"exchange_index": 3}),
        ({"subaccount": 4}, {"subaccount": 4}),
    ],
)
def test_a_read_that_shows_it_resting_where_we_asked_is_stale_until_the_lag_has_passed(asked, rests):
    case = onward(after_cancel(sent(case_of(**asked)), NOT_FOUND, T0 + 100))
    stale = after_read_at(case, order(RESTING, **rests), T0 + 100 + LAG_MS - 1)
    assert isinstance(stale, Next)
    assert (stale.pause, stale.case.step) == (Pause.BACK_OFF, Step.READ_BACK)
    fresh = after_read_at(stale.case, order(RESTING, **rests), T0 + 100 + LAG_MS)
    assert isinstance(fresh, Next)
    assert (fresh.pause, fresh.case.step) == (Pause.BACK_OFF, Step.CANCEL)


def test_a_stale_read_that_turns_canceled_settles():
    stale = onward(after_read_at(lost_then_404(), order(RESTING), T0 + 1_250))
    verdict = after_read_at(stale, order(CANCELED), T0 + 1_600)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.reduced_by) == (Outcome.CANCELED, Decimal(10))


def test_an_accepted_cancel_makes_every_resting_read_within_the_lag_stale_even_elsewhere():
    case = onward(after_cancel(sent(), failure(Meaning.UNCLEAR, "wrong_order"), T0 + 100))
    decided = after_read_at(case, order(RESTING, exchange_index=2), T0 + 200)
    assert isinstance(decided, Next)
    assert (decided.pause, decided.case.step) == (Pause.BACK_OFF, Step.READ_BACK)


def test_once_canceled_elsewhere_the_404_of_the_first_place_is_forgotten():
    first = onward(after_cancel(sent(), NOT_FOUND, T0 + 100))
    there = onward(after_read_at(first, order(RESTING, exchange_index=2), T0 + 110))
    assert there.not_found_age_ms is None
    verdict = after_cancel(there.sending(at(T0 + 120)), Canceled(Decimal(10), T0 + 130, None), T0 + 140)
    assert isinstance(verdict, Verdict)
    assert verdict.outcome is Outcome.CANCELED


# -- a read-back without an order


def test_one_404_on_a_read_is_no_proof():
    decided = after_read_at(a_404(), NOT_FOUND, T0 + 60_000)
    assert isinstance(decided, Next)
    assert (decided.pause, decided.case.step) == (Pause.BACK_OFF, Step.READ_BACK)


def missing():
    """Three reads over the read lag do not show it."""
    case = a_404()
    for n in range(NOT_FOUND_READS_FOR_PROOF):
        case = onward(after_read_at(case, NOT_FOUND, T0 + 200 + n * LAG_MS))
    return case


def after_search(case, found):
    return resolution.after_search(case, found, at(T0 + 5_000), Lags(LAG_MS, DAY_MS))


def test_once_enough_reads_over_the_lag_agree_the_archive_is_searched():
    assert missing().step is Step.SEARCH_ARCHIVE


def test_an_order_that_neither_reads_nor_the_archive_have_is_unknown():
    assert after_search(missing(), None) == Verdict(
        Outcome.UNKNOWN_ORDER, confirmed_by=ConfirmedBy.READ_BACK, problem=NOT_FOUND.problem
    )


def test_an_order_in_the_archive_ended_as_that_says():
    executed = after_search(missing(), order(EXECUTED, last_update_ms=T0 - 21 * DAY_MS))
    assert isinstance(executed, Verdict)
    assert (executed.outcome, executed.status, executed.reduced_by) == (Outcome.TOO_LATE, EXECUTED, 0)
    canceled = after_search(missing(), order(CANCELED, last_update_ms=T0 - 21 * DAY_MS))
    assert isinstance(canceled, Verdict)
    assert (canceled.outcome, canceled.status, canceled.reduced_by) == (Outcome.TOO_LATE, CANCELED, None)


def test_an_archive_that_cannot_be_searched_leaves_it_open():
    decided = after_search(missing(), failure(Meaning.UNANSWERED, "gateway"))
    assert isinstance(decided, Next)
    assert (decided.case.step, decided.pause) == (Step.SEARCH_ARCHIVE, Pause.BACK_OFF)


def test_the_read_that_can_prove_it_waits_for_the_lag_and_none_before_it_takes_a_sender():
    first = after_read_at(a_404(), NOT_FOUND, T0 + 200)
    second = after_read_at(onward(first), NOT_FOUND, T0 + 300)
    assert (first.at_least_s, second.at_least_s) == (0.0, (LAG_MS - 100) / 1000)
    third = after_read_at(onward(second), NOT_FOUND, T0 + 200 + LAG_MS)
    assert (third.case.step, third.at_least_s) == (Step.SEARCH_ARCHIVE, 0.0)


def test_many_404s_within_the_lag_are_no_proof():
    case = a_404()
    for n in range(50):
        case = onward(after_read_at(case, NOT_FOUND, T0 + 200 + n * LAG_MS // 51))
        assert case.step is Step.READ_BACK
    assert onward(after_read_at(case, NOT_FOUND, T0 + 200 + LAG_MS)).step is Step.SEARCH_ARCHIVE


def test_a_404_that_is_not_the_exchanges_own_is_no_proof_however_often():
    case = a_404()
    for n in range(10):
        case = onward(after_read_at(case, failure(Meaning.NOT_FOUND, proof=False), T0 + n * LAG_MS))
    assert case.step is Step.READ_BACK


def test_an_order_that_was_ever_seen_is_never_unknown():
    case = onward(after_read_at(a_404(), order(RESTING), T0 + 200))
    for n in range(10):
        case = onward(after_read_at(case, NOT_FOUND, T0 + 300 + n * LAG_MS))
    assert onward(after_search(case, None)).step is Step.READ_BACK


def test_an_order_that_is_seen_makes_earlier_404s_void():
    case = a_404()
    for n in range(2):
        case = onward(after_read_at(case, NOT_FOUND, T0 + 200 + n * LAG_MS))
    case = onward(after_read_at(case, order(RESTING), T0 + 200 + 2 * LAG_MS))
    assert (case.unknown_reads, case.first_unknown_age_ms) == (0, None)


@pytest.mark.parametrize(
    "meaning", [Meaning.BUSY, Meaning.UNAVAILABLE, Meaning.UNANSWERED, Meaning.NOT_SENT, Meaning.CLOCK]
)
def test_a_read_that_fails_is_asked_again_as_a_read(meaning):
    decided = after_read_at(a_404(), failure(meaning, retry_after_s=0.5), T0 + 200)
    assert isinstance(decided, Next)
    assert (decided.pause, decided.at_least_s) == (Pause.BACK_OFF, 0.5)
    assert decided.case.step is Step.READ_BACK
    assert decided.case.unanswered_age_ms is None  # a read that is lost changes nothing at the exchange


def test_a_read_that_is_refused_settles_only_when_no_answer_was_lost():
    verdict = after_read_at(a_404(), failure(Meaning.REFUSED), T0 + 200)
    assert isinstance(verdict, Verdict)
    assert verdict.outcome is Outcome.REFUSED
    decided = after_read_at(lost_then_404(), failure(Meaning.REFUSED), T0 + 1_300)
    assert isinstance(decided, Next)
    assert (decided.pause, decided.case.step) == (Pause.BACK_OFF, Step.READ_BACK)


# -- what the store keeps between two senders

moments = st.none() | st.integers(0, 10**14)
counts = st.none() | st.decimals(0, 100, places=2)
problems = st.none() | st.builds(
    Problem, st.text(max_size=9), st.text(max_size=9), st.none() | st.integers(100, 599)
)
requests = st.builds(
    CancelRequest,
    order_id=st.just(ORDER_ID),
    market_ticker=st.none() | st.just("KXASKED"),
    exchange_index=st.none() | st.integers(-1, 5),
    subaccount=st.none() | st.integers(0, 5),
)
spans = st.builds(Span, st.floats(0, 10**14), st.floats(0, 10**14))
routings = st.builds(
    Routing,
    st.none() | st.just(TICKER),
    st.none() | st.integers(-1, 5),
    st.none() | st.integers(0, 5),
)


@st.composite
def cases(draw):
    request = draw(requests)
    blank = Case.of(request)
    seen_at = draw(routings)
    routing = Routing(
        *(
            getattr(seen_at, name) if getattr(seen_at, name) is not None else getattr(blank.routing, name)
            for name in ("market_ticker", "exchange_index", "subaccount")
        )
    )
    return replace(
        blank,
        routing=routing,
        step=draw(st.sampled_from(Step)),
        attempts=draw(st.integers(0, 99)),
        back_offs=draw(st.integers(0, 99)),
        first_doubt=draw(st.none() | st.builds(Attempt, st.integers(0, 9), st.none() | spans)),
        last_doubt=draw(st.none() | st.builds(Attempt, st.integers(0, 9), st.none() | spans)),
        remaining=draw(counts),
        filled=draw(counts),
        rested_after_doubt=draw(st.booleans()),
        unanswered_age_ms=draw(moments),
        accepted_age_ms=draw(moments),
        not_found_age_ms=draw(moments),
        unknown_reads=draw(st.integers(0, 9)),
        first_unknown_age_ms=draw(moments),
        turned_away=tuple(draw(st.lists(st.tuples(st.text(max_size=9), st.integers(0, 9)), max_size=2))),
        refused=draw(problems),
        last_problem=draw(problems),
        seen=draw(st.booleans()),
    )


def test_a_key_that_was_turned_away_is_asked_again_after_a_minute_or_once_the_order_is_asked_for_anew():
    case = sent().left_to_others("one", at(T0 + 1_000)).left_to_others("two", at(T0 + 30_000))
    assert case.keys_turned_away(at(T0 + 30_000)) == {"one", "two"}
    assert case.keys_turned_away(at(T0 + 61_000)) == {"two"}
    assert case.left_to_others("one", at(T0 + 61_000)).keys_turned_away(at(T0 + 61_000)) == {"one", "two"}
    assert case.keys_turned_away(at(T0 + 500)) == set(), "from before a retry"


def test_what_is_left_to_another_key_is_asked_from_the_beginning_and_what_is_in_doubt_stays_so():
    assert sent().left_to_others("one", at(T0)).step is Step.CANCEL
    doubtful = onward(after_cancel(sent(), LOST, T0 + 1_000))
    left = doubtful.left_to_others("one", at(T0 + 2_000))
    assert (left.step, left.first_doubt) == (Step.READ_BACK, doubtful.first_doubt)


@pytest.mark.parametrize(
    "told",
    [
        {"step": Step.SEARCH_ARCHIVE},
        {"refused": Problem("forbidden", "no", 403)},
        {"not_found_age_ms": 5},
        {"unknown_reads": 2, "first_unknown_age_ms": 5},
        {"key_refusals": 1},
    ],
    ids=lambda told: next(iter(told)),
)
def test_what_one_key_was_told_counts_for_that_key_only(told):
    kept = replace(sent(), **told).to_json("one")
    case = Case.from_json(case_of().request, kept)
    assert case.asked_by("one") == case == replace(case, asked_with="one", **told)
    afresh = case.asked_by("another")
    assert (afresh.step, afresh.unknown_reads, afresh.refused) == (Step.CANCEL, 0, None)
    assert afresh.not_found_age_ms is afresh.first_unknown_age_ms is None
    assert (afresh.key_refusals, afresh.attempts) == (0, case.attempts)


def test_what_an_order_has_shown_counts_whoever_goes_on():
    case = replace(sent(), seen=True, remaining=Decimal(3), filled=Decimal(1), step=Step.READ_BACK)
    kept = Case.from_json(case_of().request, case.to_json("one"))
    assert kept.asked_by("another") == kept


@given(cases())
def test_a_case_survives_its_json(case):
    assert Case.from_json(case.request, case.to_json()) == case


@given(cases())
def test_the_order_itself_is_not_kept_but_that_it_was_seen_is(case):
    seen = replace(case, order=order(RESTING), seen=True)
    kept = Case.from_json(seen.request, seen.to_json())
    assert kept == replace(seen, order=None)
    assert "order" not in json.loads(seen.to_json())


def test_an_empty_text_is_a_case_nothing_is_known_about():
    request = CancelRequest(ORDER_ID, exchange_index=2)
    assert Case.from_json(request, "") == Case.of(request)


def test_routing_that_a_later_request_adds_fills_only_what_is_not_known():
    stored = replace(case_of(), routing=Routing(exchange_index=2)).to_json()
    later = CancelRequest(ORDER_ID, market_ticker="KXLATER", exchange_index=0, subaccount=3)
    assert Case.from_json(later, stored).routing == Routing("KXLATER", 2, 3)


# -- a random walk: the verdict never contradicts what really happened

STEP_MS = 120


@dataclass
class Truth:
    """One order at an exchange of our own making, with everything that ever happened to it."""

    exists: bool
    home: int
    subaccount: int
    initial: Decimal
    fill: Decimal
    now_ms: int
    status: OrderStatus = RESTING
    remaining: Decimal = Decimal(0)
    updated_ms: int = 0
    removed_by_us: Decimal = Decimal(0)
    removed_by_others: Decimal = Decimal(0)
    foreign_ms: int | None = None
    first_doubt_ms: int | None = None
    decreased_ms: int | None = None
    shown_ms: int | None = None  # the moment that the last read was true for
    clock_ms: int = 0  # what its clock shows beyond the true time
    drift: float = 0.0

    def stamp_ms(self):
        return round(self.now_ms + self.clock_ms + (self.now_ms - T0) * self.drift)

    def __post_init__(self):
        self.remaining = self.initial - self.fill
        self.updated_ms = self.stamp_ms()
        self.past = []
        self.note()

    def note(self):
        """Keeps what a read may still show for a while."""
        shown = Order(
            order_id=ORDER_ID,
            status=self.status,
            ticker=TICKER,
            exchange_index=self.home,
            subaccount=self.subaccount,
            initial_count=self.initial,
            fill_count=self.fill,
            remaining_count=self.remaining,
            last_update_ms=self.updated_ms,
            raw={},
        )
        self.past.append((self.now_ms, shown))

    def end(self, status):
        self.status, self.remaining, self.updated_ms = status, Decimal(0), self.stamp_ms()
        self.note()

    def trade(self, count):
        if self.status is not RESTING:
            return
        count = min(count, self.remaining)
        self.fill += count
        self.remaining -= count
        self.updated_ms = self.stamp_ms()
        if self.remaining:
            self.note()
        else:
            self.end(EXECUTED)

    def decrease(self):
        if self.status is RESTING and self.remaining > Decimal("0.01"):
            self.remaining -= Decimal("0.01")
            self.updated_ms, self.decreased_ms = self.stamp_ms(), self.now_ms
            self.note()

    def cancel_elsewhere(self):
        if self.status is RESTING:
            self.foreign_ms, self.removed_by_others = self.now_ms, self.remaining
            self.end(CANCELED)

    def reached_by(self, routing):
        if not self.exists or self.status is not RESTING or (routing.subaccount or 0) != self.subaccount:
            return False
        auto = routing.exchange_index == -1 or (routing.exchange_index is None and routing.market_ticker)
        if auto:
            return routing.market_ticker in (None, TICKER)
        return (routing.exchange_index or 0) == self.home

    def cancel(self, routing):
        """What an undisturbed cancel gets."""
        if not self.reached_by(routing):
            return NOT_FOUND
        removed, self.removed_by_us = self.remaining, self.remaining
        self.end(CANCELED)
        return Canceled(removed, self.stamp_ms(), None)

    def read(self, lag_ms):
        """What an undisturbed read gets, as it was `lag_ms` ago: a new order is not there yet."""
        shown = [order for at_ms, order in self.past if at_ms <= self.now_ms - lag_ms]
        if not self.exists or not shown:
            return NOT_FOUND
        self.shown_ms = self.now_ms - lag_ms
        return shown[-1]


# What may happen to a cancel: whether it takes effect, and what is heard of it (None: the answer itself).
MISHAPS = {
    "none": (True, None),
    "lost before": (False, LOST),
    "lost after": (True, LOST),
    "wrong body": (True, failure(Meaning.UNCLEAR, "wrong_order")),
    "refused": (False, failure(Meaning.REFUSED)),
    "busy": (False, failure(Meaning.BUSY)),
}
READ_MISHAPS = {
    "none": None,
    "lost": LOST,
    "refused": failure(Meaning.REFUSED),
    "not ours": failure(Meaning.NOT_FOUND, proof=False),
}
EVENTS = ("none", "fill", "execute", "foreign", "decrease", "clock", "another cancel")
JUMPS_MS = [-120_000, -30_000, -3_200, 3_200, 120_000]


def learn_from_another_cancel(engine, truth, round_trip_ms):
    """The engine's clock as another order's cancel, answered at this moment, tells it."""
    received_s, stamp_ms = truth.now_ms / 1000, truth.stamp_ms()
    engine.learn(
        Span(stamp_ms - 0.5, stamp_ms + 1), sent_s=received_s - round_trip_ms / 1000, received_s=received_s
    )


def ask_to_cancel(truth, routing, mishap):
    takes_effect, heard = MISHAPS[mishap]
    answer = truth.cancel(routing) if takes_effect else heard
    if heard is None or (mishap == "wrong body" and answer is NOT_FOUND):
        return answer
    if heard.may_have_taken_effect and truth.first_doubt_ms is None:
        truth.first_doubt_ms = truth.now_ms
    return heard


def check_verdict(verdict, truth):
    """The verdict against what really happened; the ambiguities that are documented are let through."""
    if verdict.outcome is Outcome.UNKNOWN_ORDER:
        assert not truth.exists
        return
    if verdict.outcome is Outcome.REFUSED:
        assert truth.removed_by_us == 0
        return
    assert truth.exists
    assert verdict.status is truth.status
    if verdict.outcome is Outcome.TOO_LATE:
        assert truth.removed_by_us == 0
        assert verdict.reduced_by == 0
        return
    if truth.removed_by_us == 0:
        # Somebody else canceled it, and an attempt of ours, without effect, got no answer: who can tell?
        assert verdict.confirmed_by is ConfirmedBy.READ_BACK
        assert truth.first_doubt_ms is not None
    if verdict.reduced_by is None:
        assert verdict.confirmed_by is ConfirmedBy.READ_BACK
    elif truth.removed_by_us:
        decreased_unseen = truth.decreased_ms is not None and truth.decreased_ms > (truth.shown_ms or 0)
        assert verdict.reduced_by == truth.removed_by_us or decreased_unseen
    else:
        # (In the walk an attempt takes no time at all, so nobody can get in between.)
        pytest.fail(f"{verdict.reduced_by} of somebody else's cancel were claimed")


def some_of(names):
    """A few of these, so that rare combinations meet often; the first is always among them."""
    names = list(names)
    return st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True).map(
        lambda few: sorted({names[0], *few}, key=names.index)
    )


@pytest.mark.timeout(300)  # hundreds of examples, on a machine that may be busy
@settings(max_examples=600, deadline=None)
@given(st.data())
def test_whatever_the_exchange_does_the_verdict_does_not_contradict_it(data):  # noqa: PLR0915 - one walk
    draw = data.draw
    initial = draw(st.decimals("0.01", 100, places=2), "initial")
    truth = Truth(
        exists=draw(st.sampled_from([True] * 5 + [False]), "exists"),
        home=draw(st.sampled_from([0, 0, 0, 2]), "home"),
        subaccount=draw(st.sampled_from([0, 0, 0, 1]), "subaccount"),
        initial=initial,
        fill=min(draw(st.decimals(0, 100, places=2), "fill"), initial - Decimal("0.01")),
        now_ms=T0,
        clock_ms=draw(st.sampled_from([0, -3_200, 3_200, 9_000]), "engine's clock"),
        drift=draw(st.sampled_from([0.0, 0.0005, -0.0005]), "drift"),
    )
    engine = BoundedClock()
    for _ in range(draw(st.integers(0, 3), "cancels before")):
        learn_from_another_cancel(engine, truth, draw(st.integers(0, 60), "round trip"))
    event = draw(st.sampled_from(["none", "none", *EVENTS]), "before we come")
    if event == "foreign":
        truth.cancel_elsewhere()
    elif event == "execute":
        truth.trade(initial)
    truth.now_ms += draw(st.sampled_from([0, 100, LAG_MS, 4_000, 3_600_000]), "age")
    mishaps, read_mishaps, events = (draw(some_of(names)) for names in (MISHAPS, READ_MISHAPS, EVENTS))
    longest_pause_ms = draw(st.sampled_from([0, STEP_MS, 3 * LAG_MS]), "longest pause")
    case = Case.of(draw(st.just(CancelRequest(ORDER_ID)) | requests, "request"))
    accepted_ms = truth.now_ms
    faulty_steps = draw(st.integers(0, 25), "faulty steps")
    for step in range(faulty_steps + 60):
        is_faulty = step < faulty_steps
        truth.now_ms += draw(st.integers(0, longest_pause_ms), "pause") if is_faulty else STEP_MS
        if is_faulty:
            event = draw(st.sampled_from(["none", "none", *events]), "event")
            if event == "fill":
                truth.trade(Decimal("0.01"))
            elif event == "execute":
                truth.trade(initial)
            elif event == "foreign":
                truth.cancel_elsewhere()
            elif event == "decrease":
                truth.decrease()
            elif event == "another cancel":
                learn_from_another_cancel(engine, truth, draw(st.integers(0, 60), "round trip"))
            elif event == "clock":
                truth.clock_ms += draw(st.sampled_from(JUMPS_MS), "jump")
                for _ in range(2):  # (set with nobody to notice, a clock cannot be known)
                    learn_from_another_cancel(engine, truth, draw(st.integers(0, 60), "round trip"))
            if draw(st.booleans(), "another sender takes over"):
                case = Case.from_json(case.request, case.to_json())
        front_ms = truth.now_ms
        moment = Instant(front_ms, truth.now_ms - accepted_ms, engine.surely_at(truth.now_ms / 1000))
        if case.step is Step.CANCEL:
            case = case.sending(moment)
            mishap = draw(st.sampled_from(mishaps), "mishap") if is_faulty else "none"
            answer = ask_to_cancel(truth, case.routing, mishap)
            decided = resolution.after_cancel(case, answer, moment)
        elif case.step is Step.READ_BACK:
            lag_ms = draw(st.integers(0, LAG_MS), "lag")
            mishap = draw(st.sampled_from(read_mishaps), "read mishap") if is_faulty else "none"
            answer = READ_MISHAPS[mishap] or truth.read(lag_ms)
            decided = resolution.after_read(case, answer, moment, Lags(LAG_MS, DAY_MS))
        else:
            decided = resolution.after_search(case, None, moment, Lags(LAG_MS, DAY_MS))
        if isinstance(decided, Verdict):
            check_verdict(decided, truth)
            return
        case = decided.case
    pytest.fail("the exchange behaved for 60 steps and the outcome is still not known")


def test_doubts_from_before_a_dead_letter_was_asked_for_again_do_not_hold_it_up():
    waited = onward(after_cancel(sent(), NOT_FOUND, T0 + 3_600_000))
    revived = onward(after_read_at(waited, order(RESTING), T0 + 3_700_000, age_ms=100))
    assert revived.step is Step.CANCEL
