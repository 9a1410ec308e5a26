"""Whose cancel it was, and what it removed: nothing is said that an answer does not prove.

Each case through a real worker at an exchange that loses answers, whose two clocks disagree, and at which
somebody else cancels, decreases and amends.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from crew import PATIENCE_S

from kalshi_cancel.exchange.clock import ANSWERS
from trials.stack import wait_until

ZERO, WHOLE = Decimal(0), Decimal("10.00")


@pytest.fixture
def crew(crew):
    crew.workers(1)
    return crew


def teach_the_clock(crew, cancels=2):
    """Has the worker see cancels of its own answered: from then on it knows the engine's clock."""
    for order_id in crew.place(cancels):
        assert crew.client.cancel(order_id).result(timeout=PATIENCE_S).outcome == "canceled"


def cancel(crew, order_id, **fields):
    return crew.client.cancel(order_id, **fields).result(timeout=PATIENCE_S)


def lose_cancels(crew, *, effect, times=1, **fields):
    """The next calls that cancel get no answer."""
    kind = "drop_after" if effect == "before" else "drop_before"
    crew.control.fault(kind, operation=["cancel", "batch"], times=times, **fields)


def is_somebody_elses(result):
    return (result.outcome, result.status, result.reduced_by) == ("too_late", "canceled", ZERO)


def is_ours_unproven(result):
    return (result.outcome, result.status, result.reduced_by) == ("canceled", "canceled", None)


# -- whose cancel it was


@pytest.mark.parametrize("ago_s", [0.5, 3.0])
def test_what_somebody_else_canceled_before_a_batch_whose_reply_is_lost_is_not_ours(crew, ago_s):
    teach_the_clock(crew)
    order_ids = crew.place(4)
    for order_id in order_ids:
        crew.control.cancel_elsewhere(order_id, ago_s=ago_s)
    lose_cancels(crew, effect="none")
    with crew.frozen(*crew.alive()):
        pending = crew.client.cancel_many(order_ids)
    assert all(is_somebody_elses(result) for result in pending.results(timeout=PATIENCE_S))


def test_a_worker_that_knows_no_clock_yet_claims_nothing_it_cannot_prove(crew):
    with crew.apart() as apart:
        apart.start()
        [order_id] = crew.place()
        crew.control.cancel_elsewhere(order_id, ago_s=0.5)
        lose_cancels(crew, effect="none")
        result = apart.client.cancel(order_id).result(timeout=PATIENCE_S)
        assert is_somebody_elses(result) or is_ours_unproven(result)


@pytest.mark.parametrize("front_skew_s", [3.2, -3.2, 8.0])
def test_clocks_of_the_exchange_that_disagree_do_not_make_our_own_cancel_somebody_elses(crew, front_skew_s):
    crew.control.configure(front_skew_s=front_skew_s)
    for taught in (False, True):
        if taught:
            teach_the_clock(crew)
        [order_id] = crew.place()
        lose_cancels(crew, effect="before")
        result = cancel(crew, order_id)
        assert result.outcome == "canceled"
        assert result.reduced_by in {None, WHOLE}


def test_an_engine_whose_clock_is_set_does_not_make_our_own_cancel_somebody_elses(crew):
    for engine_skew_s in (0.0, 60.0, -60.0, 0.0):
        crew.control.configure(engine_skew_s=engine_skew_s)
        teach_the_clock(crew)
        [order_id] = crew.place()
        lose_cancels(crew, effect="before")
        result = cancel(crew, order_id)
        assert result.outcome == "canceled"
        assert result.reduced_by in {None, WHOLE}


@pytest.mark.parametrize("skew_s", [-8.0, -120.0, 30.0])
def test_clocks_that_were_set_just_before_a_lost_reply_do_not_make_our_own_cancel_somebody_elses(
    crew, skew_s
):
    """Nothing has told of it yet but the answer of the read-back."""
    teach_the_clock(crew)
    order_ids = crew.place(3)
    crew.control.configure(skew_s=skew_s)
    lose_cancels(crew, effect="before")
    for order_id in order_ids:
        result = cancel(crew, order_id)
        assert result.outcome == "canceled"
        assert result.reduced_by in {None, WHOLE}


@pytest.mark.parametrize(
    "not_applied",
    [
        {"kind": "status", "status": 409, "code": "exchange_is_paused"},
        {"kind": "http_429"},
        {"kind": "status", "status": 401, "code": "header_timestamp_expired"},
        {"kind": "status", "status": 404, "code": "not_found"},
    ],
    ids=["paused", "429", "clock", "404"],
)
def test_an_attempt_that_was_answered_as_not_applied_is_not_the_first_that_may_have_worked(crew, not_applied):
    """It gets that answer, somebody else cancels, and the next attempt gets none."""
    teach_the_clock(crew)
    [order_id] = crew.place()
    crew.control.fault(**not_applied, order_id=order_id, operation="cancel")
    pending = crew.client.cancel(order_id)
    wait_until(lambda: crew.sent()[order_id] >= 1, within_s=PATIENCE_S, what="the first attempt")
    with crew.frozen(*crew.alive()):
        crew.control.cancel_elsewhere(order_id)
        crew.control.clear_faults()
        crew.control.fault("drop_before", order_id=order_id, operation="cancel", times=3)
    result = pending.result(timeout=PATIENCE_S)
    assert is_somebody_elses(result)


@pytest.mark.parametrize("form", ["epoch_ms", "epoch_s", "offset", "utc"])
def test_a_time_stamp_in_any_form_that_can_be_read_as_utc_counts(crew, form):
    teach_the_clock(crew)
    crew.control.configure(last_update_form=form)
    [order_id] = crew.place()
    crew.control.cancel_elsewhere(order_id, ago_s=60.0)
    lose_cancels(crew, effect="none")
    assert is_somebody_elses(cancel(crew, order_id))


@pytest.mark.parametrize("form", ["naive", "unreadable", "absent"])
def test_a_time_stamp_that_cannot_be_read_counts_for_nobody(crew, form):
    crew.control.configure(last_update_form=form)
    [order_id] = crew.place()
    crew.control.cancel_elsewhere(order_id, ago_s=60.0)
    lose_cancels(crew, effect="none")
    assert is_ours_unproven(cancel(crew, order_id))


@pytest.mark.parametrize("stamp", ["0001-01-01T00:00:00Z", "1970-01-01T00:00:00Z", 0])
def test_a_time_stamp_that_was_never_set_does_not_make_our_own_cancel_somebody_elses(crew, stamp):
    teach_the_clock(crew)
    alone, *together = crew.place(4)
    for order_id in (alone, *together):
        crew.control.fault("odd_fields", order_id=order_id, fields={"last_update_time": stamp})
    lose_cancels(crew, effect="before", order_id=alone)
    assert is_ours_unproven(cancel(crew, alone))
    lose_cancels(crew, effect="before")
    report = crew.client.mass_cancel({"everything": True}).result(timeout=PATIENCE_S)
    assert {each["order_id"] for each in report["affected"]} == set(together)


def test_a_time_stamp_in_whole_seconds_does_not_make_our_own_cancel_somebody_elses(crew):
    """Written with zeros behind the point, it looks as if it were exact."""
    teach_the_clock(crew)
    tried = 0
    for order_id in crew.place(8):
        wait_until(lambda: datetime.now(UTC).microsecond < 300_000, what="the first part of a second")
        second = datetime.now(UTC).replace(microsecond=0)
        lose_cancels(crew, effect="before", order_id=order_id)
        whole = f"{second:%Y-%m-%dT%H:%M:%S}.000000Z"
        crew.control.fault("odd_fields", order_id=order_id, fields={"last_update_time": whole})
        outcome = cancel(crew, order_id).outcome
        if crew.control.order(order_id)["history"][-1]["at_ms"] // 1000 == second.timestamp():
            tried += 1
            assert outcome == "canceled"
    assert tried, "at least one ended in the second that its stamp names"


# -- what it removed


def test_an_order_that_was_decreased_before_our_lost_cancel_gives_no_false_number(crew):
    teach_the_clock(crew)
    [order_id] = crew.place()
    crew.control.decrease(order_id, to="6.00")
    lose_cancels(crew, effect="before")
    result = cancel(crew, order_id)
    assert result.outcome == "canceled"
    assert result.reduced_by in {None, Decimal("6.00")}
    assert result.fill_count == ZERO


def test_what_a_stale_read_has_shown_less_later_fills_is_what_our_lost_cancel_removed(crew):
    """The reads lag, so the one after the lost cancel still shows what was left before it."""
    teach_the_clock(crew)
    crew.control.configure(latency_s=0.05)  # longer than what the clock is known to
    teach_the_clock(crew, ANSWERS)  # and how long a cancel takes now
    proven = 0
    for order_id in crew.place(6, read_lag_s=0.3):
        crew.control.decrease(order_id, to="6.00", ago_s=1.0)
        lose_cancels(crew, effect="before", order_id=order_id)
        result = cancel(crew, order_id)
        assert result.outcome == "canceled"
        assert result.reduced_by in {None, Decimal("6.00")}
        proven += result.reduced_by is not None
    assert proven, "an end after our attempt, and a count that was shown: that proves a number"


def test_what_an_ended_order_is_said_to_have_left_is_not_told(crew):
    [order_id] = crew.place()
    crew.control.cancel_elsewhere(order_id, ago_s=60.0)
    crew.control.fault(
        "odd_fields", operation="read", order_id=order_id, fields={"remaining_count_fp": "10.00"}
    )
    result = cancel(crew, order_id)
    assert (result.outcome, result.status, result.remaining_count) == ("too_late", "canceled", None)


def test_our_own_cancel_whose_record_is_gone_is_not_called_nothing_removed(crew):
    [order_id] = crew.place()
    assert cancel(crew, order_id).outcome == "canceled"
    crew.stack.redis.client().delete(f"celery-task-meta-cancel:{order_id}")
    crew.control.archive(order_id)
    with crew.apart(KALSHI_RESULT_EXPIRES_S="60") as apart:
        apart.start()
        gone = crew.place()[0]
        crew.control.cancel_elsewhere(gone, ago_s=90.0)
        result = apart.client.cancel(gone).result(timeout=PATIENCE_S)
        assert (result.outcome, result.status, result.reduced_by) == ("too_late", "canceled", None)


# -- words that nobody expects


@pytest.mark.parametrize(
    ("word", "status"), [("expired", "expired"), ("Expired", "expired"), ("CANCELLED", "canceled")]
)
def test_an_end_in_other_words_is_understood(crew, word, status):
    [order_id] = crew.place()
    crew.control.cancel_elsewhere(order_id)
    crew.control.fault("odd_fields", operation="read", fields={"status": word}, order_id=order_id)
    result = cancel(crew, order_id)
    assert (result.outcome, result.status, result.reduced_by) == ("too_late", status, ZERO)


def test_a_status_that_nobody_knows_is_named_and_the_order_is_not_given_up(crew):
    [order_id] = crew.place()
    crew.control.cancel_elsewhere(order_id)
    crew.control.fault("odd_fields", operation="read", fields={"status": "on_hold"}, order_id=order_id)
    result = cancel(crew, order_id, deadline_s=1.5)
    assert result.outcome == "unresolved"
    assert result.error.code == "unknown_status"
    assert "'on_hold'" in result.error.message
    crew.control.clear_faults()
    crew.wait_settled(order_id)
    assert crew.client.status(order_id).result.outcome == "too_late"


@pytest.mark.parametrize(("status", "filled"), [("executed", "10.00"), ("canceled", "3.00")])
def test_an_order_that_has_moved_to_the_archive_ended_as_that_says(crew, status, filled):
    order_ids = crew.place(3, status=status, filled=filled)
    for order_id in order_ids:
        crew.control.archive(order_id)
    results = crew.client.cancel_many(order_ids).results(timeout=PATIENCE_S)
    assert {(each.outcome, each.status, each.fill_count) for each in results} == {
        ("too_late", status, Decimal(filled))
    }


def test_while_the_archive_does_not_answer_nobody_says_that_an_order_is_unknown(crew):
    [order_id] = crew.place(status="executed", filled="10.00")
    crew.control.archive(order_id)
    crew.control.fault("http_503", operation="history")
    result = cancel(crew, order_id, deadline_s=3.0)
    assert result.outcome == "unresolved"
    crew.control.clear_faults()
    crew.wait_settled(order_id)
    assert crew.client.status(order_id).result.status == "executed"


# -- who has answered, and when


def test_interim_responses_give_no_order_anothers_answer(crew):
    crew.control.fault("interim", status=103, seconds=0.06)
    resting, executed = crew.place(8), crew.place(4, status="executed", filled="10.00")
    pending = [crew.client.cancel(each) for each in (*resting, *executed)]
    for each in pending:
        result = each.result(timeout=PATIENCE_S)
        expected = "canceled" if result.order_id in resting else "too_late"
        assert result.outcome == expected
        assert crew.control.order(result.order_id)["status"] == result.status


@pytest.mark.parametrize("count", ["0.00", "10.00", None])
def test_an_error_beside_the_count_of_a_single_cancel_makes_nobody_elses_cancel_ours(crew, count):
    teach_the_clock(crew)
    [order_id] = crew.place()
    crew.control.cancel_elsewhere(order_id)
    body = {"order_id": order_id, "reduced_by": count, "error": {"code": "ORDER_ALREADY_CANCELED"}}
    crew.control.fault("garbage", operation="cancel", order_id=order_id, body=body)
    result = cancel(crew, order_id)
    assert is_somebody_elses(result) or is_ours_unproven(result)


@pytest.mark.parametrize("page", [{"status": 403}, {"status": 404, "shape": "message"}, {"status": 503}])
def test_a_page_of_the_cdn_decides_nothing(crew, page):
    [order_id] = crew.place()
    crew.control.fault("cdn", operation=["cancel", "read"], order_id=order_id, times=3, **page)
    result = cancel(crew, order_id)
    assert (result.outcome, crew.control.order(order_id)["status"]) == ("canceled", "canceled")


def test_a_retry_after_that_is_a_date_is_honored_on_the_exchanges_clock(crew):
    crew.control.configure(front_skew_s=6.0)
    teach_the_clock(crew)
    [order_id] = crew.place()
    crew.control.fault("http_429", operation="cancel", order_id=order_id, times=1, retry_date_s=2.5)
    assert cancel(crew, order_id).outcome == "canceled"
    first, second = (call for call in crew.cancels() if order_id in call["order_ids"])
    assert second["received_ms"] - first["received_ms"] >= 1_400  # the date has whole seconds


def test_before_an_order_is_called_refused_it_is_read(crew):
    [order_id] = crew.place(status="executed", filled="10.00")
    crew.control.fault("status", operation="cancel", order_id=order_id, status=422, code="bad_order")
    result = cancel(crew, order_id)
    assert (result.outcome, result.status) == ("too_late", "executed")
