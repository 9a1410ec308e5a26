"""Mass cancels, through real workers: planned, canceled, proven flat, and reported as it really was."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from decimal import Decimal

import pytest
from celery import Celery
from crew import PATIENCE_S, about_orders, ids
from here import cancelctl

from kalshi_cancel.cli.exits import Exit
from kalshi_cancel.client import CancelClient
from kalshi_cancel.model.fields import BadRequest
from kalshi_cancel.model.requests import Lane
from kalshi_cancel.sandbox.control import ControlError
from trials.stack import ROOT, wait_until

EVERYTHING = {"everything": True}
TICKERS = ("KXA-26NOV22-T1", "KXA-26NOV22-T2", "KXA-26DEC01-T1", "KXB-26NOV22-T1")
READ_LAG_S = 0.5  # crew.ENVIRONMENT
SLACK_S = 3.0  # of a machine that is busy with other things


@pytest.fixture
def crew(crew):
    """One worker at least for a start; one test's orders are the only ones."""
    crew.workers(max(len(crew.alive()), 1))
    return crew


def canceled(crew):
    """The order ids that are canceled at the exchange, with the contracts that were."""
    return {
        order["order_id"]: order["canceled_count_fp"]
        for order in crew.control.orders()
        if order["status"] == "canceled"
    }


def resting(crew):
    return {order["order_id"] for order in crew.control.orders() if order["status"] == "resting"}


def mass_cancel(crew, scope, **how):
    return crew.client.mass_cancel(scope, **how).result(timeout=PATIENCE_S)


def tells_the_truth(report, crew):
    """Compares a report with what the exchange knows: every order, and the totals of what is proven."""
    truth = {order["order_id"]: order for order in crew.control.orders()}
    unknown = [each["order_id"] for each in report["affected"] if each["reduced_by"] is None]
    for each in report["affected"]:
        order = truth[each["order_id"]]
        assert order["status"] == "canceled"
        assert each["reduced_by"] in (None, order["canceled_count_fp"])
    for each in report["not_affected"]:
        order = truth[each["order_id"]]
        assert each["reason"] == f"too_late_{order['status']}", (each, order)
    reported = [each["order_id"] for each in (*report["affected"], *report["not_affected"])]
    assert len(reported) == len(set(reported))
    removed = sum(
        Decimal(effect["reduced_by"])
        for call in crew.control.calls()
        for effect in call["effects"]
        if effect["order_id"] in set(reported) - set(unknown)
    )
    assert Decimal(report["contracts_canceled"]) == removed
    assert report["orders_count_unknown"] == len(unknown)
    assert report["orders_affected"] == len(report["affected"])


def spent(crew):
    """The tokens of all calls that reached the exchange, but for those that learn limits and costs."""
    return sum(call["tokens"] for call in about_orders(crew.control) if call["status"] != 429)


def no_order_was_canceled_twice(crew):
    """Neither twice with effect, nor by two calls at the same time."""
    assert set(crew.effective().values()) <= {1}
    spans = {}
    for call in crew.cancels():
        for order_id in call["order_ids"]:
            spans.setdefault(order_id, []).append(
                (call["received_ms"], call["received_ms"] + (call["duration_ms"] or 0))
            )
    for order_id, times in spans.items():
        for (_, first_end), (second_start, _) in itertools.pairwise(sorted(times)):
            assert second_start >= first_end - 2, f"{order_id}: two cancels at a time"


# -- the plan


def test_a_dry_run_plans_and_touches_nothing(crew):
    crew.place(3, ticker=TICKERS[0])
    crew.place(2, ticker=TICKERS[3], exchange_index=2, count="2.50")
    report = mass_cancel(crew, EVERYTHING, dry_run=True, requested_by="desk 7", reason="drill")
    plan = report["plan"]
    assert (plan["orders"], plan["contracts"], plan["tokens"]) == (5, "35.00", 10.0)
    assert plan["shards"] == {"0": 3, "2": 2}
    assert set(plan["paths"]) == {"0", "2"}
    assert 0 < plan["predicted_s"] == report["predicted_s"] < 5
    assert (report["flat"], report["dry_run"], report["why_not_flat"]) == (False, True, "only planned")
    assert (report["affected"], report["not_affected"]) == ([], [])
    assert crew.cancels() == []
    assert len(resting(crew)) == 5
    assert list(crew.client.open_cancels()) == []


def test_a_plan_is_made_of_all_pages_of_the_listing(crew):
    crew.place(2300)
    report = mass_cancel(crew, EVERYTHING, dry_run=True)
    assert report["plan"]["orders"] == 2300
    pages = [call for call in crew.control.calls("list") if "limit=1000" in call["query"]]
    assert len(pages) == 3


# -- the scope

PLACED = {
    "a": {"ticker": TICKERS[0], "client_order_id": "mm-1", "price": "0.20"},
    "b": {"ticker": TICKERS[1], "client_order_id": "mm-2", "side": "ask", "price": "0.60"},
    "c": {"ticker": TICKERS[2], "client_order_id": "arb-1", "exchange_index": 2},
    "d": {"ticker": TICKERS[3], "client_order_id": "arb-2", "subaccount": 1},
    "e": {"ticker": TICKERS[3], "client_order_id": "arb-3", "order_group_id": "group-1", "exchange_index": 1},
}


@pytest.mark.parametrize(
    ("scope", "meant"),
    [
        (EVERYTHING, "abcde"),
        ({"order_ids": ["a", "d"]}, "ad"),
        ({"subaccount": 0}, "abce"),
        ({"subaccount": 1}, "d"),
        ({"tickers": TICKERS[0]}, "a"),
        ({"tickers": [TICKERS[0], TICKERS[3]]}, "ade"),
        ({"event_tickers": ["KXA-26NOV22"]}, "ab"),
        ({"series": "KXA"}, "abc"),
        ({"ticker_prefix": "KXA-26N"}, "ab"),
        ({"side": "ask"}, "b"),
        ({"side": "yes"}, "acde"),
        ({"client_order_id_prefix": "mm-"}, "ab"),
        ({"order_group_id": "group-1"}, "e"),
        ({"exchange_index": 2}, "c"),
        ({"min_price": "0.30", "max_price": "0.55"}, "cde"),
        ({"created_before": 1_000_000_000}, ""),
        ({"created_after": 1_000_000_000}, "abcde"),
        ({"series": "KXA", "side": "bid", "exchange_index": 0}, "a"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else value or "none",
)
def test_exactly_what_is_in_scope_is_canceled(crew, scope, meant):
    names = dict(zip(PLACED, ids(len(PLACED)), strict=True))
    placed = [{"order_id": names[name], **fields} for name, fields in PLACED.items()]
    for each in placed:
        each["client_order_id"] += f"-{each['order_id']}"
    crew.control.place_many(placed)
    if "order_ids" in scope:
        scope = {"order_ids": [names[name] for name in scope["order_ids"]]}
    report = mass_cancel(crew, scope)
    assert report["flat"]
    assert set(canceled(crew)) == {names[name] for name in meant}
    assert {each["order_id"] for each in report["affected"]} == set(canceled(crew))
    assert report["not_affected"] == []
    tells_the_truth(report, crew)


def test_ids_that_do_not_rest_are_reported_as_what_they_are(crew):
    [rests, executed, gone] = crew.place(3)
    crew.control.fill(executed)
    crew.control.cancel_elsewhere(gone)
    unknown = str(uuid.uuid4())
    report = mass_cancel(crew, {"order_ids": [rests, executed, gone, unknown]})
    assert report["flat"]
    assert report["affected"] == [{"order_id": rests, "reduced_by": "10.00"}]
    reasons = {each["order_id"]: each["reason"] for each in report["not_affected"]}
    assert reasons == {
        executed: "too_late_executed",
        gone: "too_late_canceled",
        unknown: "unknown_order",
    }


def test_an_id_that_rests_outside_of_the_other_filters_is_left_alone(crew):
    [inside] = crew.place(subaccount=1)
    [outside] = crew.place(subaccount=2)
    report = mass_cancel(crew, {"order_ids": [inside, outside], "subaccount": 1})
    assert report["flat"]
    assert set(canceled(crew)) == {inside}
    assert report["not_affected"] == [
        {"order_id": outside, "reason": "not_resting_in_scope", "error": None},
    ]


def test_a_sweep_over_one_subaccount_never_touches_anothers_orders_old_or_new(crew):
    crew.place(40, subaccount=1)
    others = [*crew.place(20, subaccount=0), *crew.place(20, subaccount=2)]
    report = mass_cancel(crew, {"subaccount": 1})
    others += [*crew.place(1, subaccount=0), *crew.place(1, subaccount=2)]
    assert report["flat"]
    assert resting(crew) == set(others)
    assert {order_id for call in crew.cancels() for order_id in call["order_ids"]}.isdisjoint(others)
    assert crew.control.calls("cancel_all") == []


# -- the report


def test_the_report_has_all_that_a_risk_desk_is_asked_for(crew):
    crew.place(30)
    asked = time.time()
    pending = crew.client.mass_cancel(EVERYTHING, requested_by="desk 7", reason="limit", automated=False)
    report = pending.result(timeout=PATIENCE_S)
    assert set(report) == {
        *("request_id", "requested_by", "reason", "automated", "scope", "accepted_at", "completed_at"),
        *("dry_run", "deadline_s", "allow_side_effects", "traceparent"),
        *("plan", "flat", "flat_listing", "why_not_flat", "key", "command", "canceled_by_command"),
        *("affected", "not_affected", "orders_affected", "contracts_canceled", "orders_count_unknown"),
        *(
            "orders_result_lost",
            "contracts_filled_meanwhile",
            "orders_fills_unknown",
            "tokens_spent",
            "rate_limited",
        ),
        *("predicted_s", "actual_s", "proven_s"),
    }
    assert report["request_id"] == pending.request_id
    assert (report["requested_by"], report["reason"], report["automated"]) == ("desk 7", "limit", False)
    assert report["scope"] == EVERYTHING
    assert report["accepted_at"] < report["completed_at"]
    assert re.fullmatch(r"[0-9a-f]{64}", report["flat_listing"]["sha256"])
    assert report["flat_listing"]["pages"] == 1
    assert (report["orders_affected"], report["contracts_canceled"]) == (30, "300.00")
    assert (report["orders_count_unknown"], report["orders_fills_unknown"]) == (0, 0)
    assert report["contracts_filled_meanwhile"] == "0.00"
    assert report["key"] == {"subaccount": None, "scopes": ["read", "write"], "may_cancel": True}
    assert (report["command"], report["canceled_by_command"]) == (None, [])
    assert report["rate_limited"] == 0
    assert report["tokens_spent"] == spent(crew)
    assert 0 <= report["actual_s"] <= report["proven_s"] <= time.time() - asked
    tells_the_truth(report, crew)


def test_every_order_of_a_mass_cancel_has_a_result_of_its_own(crew):
    [order_id, other] = crew.place(2)
    mass_cancel(crew, EVERYTHING, requested_by="desk 7")
    for each in (order_id, other):
        result = crew.client.status(each).result
        assert (result.outcome, result.reduced_by) == ("canceled", Decimal("10.00"))
        assert result.requested_by == ("desk 7",)


def test_a_mass_cancel_is_stored_and_listed_with_the_latest_first(crew):
    crew.place(2)
    first = mass_cancel(crew, EVERYTHING)
    second = mass_cancel(crew, EVERYTHING)
    listed = crew.client.mass_cancels(at_most=2)
    assert [(request_id, shown) for request_id, _, shown in listed] == [
        (second["request_id"], second),
        (first["request_id"], first),
    ]
    assert crew.client.mass_status(first["request_id"]) == first
    assert crew.client.mass_plan(first["request_id"])["orders"] == 2
    assert crew.client.mass_status("nobody") is None


# -- the exchange's own mass commands


def know_the_engines_clock(crew):
    """Has each worker know the clock that stamps orders well enough to tell what came first."""
    for order_id in crew.place(4 * len(crew.alive())):
        crew.client.cancel(order_id).result(timeout=PATIENCE_S)
    crew.control.configure(latency_s=0.05)


def commands(crew):
    """The exchange's own mass commands that were sent."""
    return [
        call["operation"]
        for call in crew.control.calls()
        if call["operation"] in {"cancel_all", "group_trigger"}
    ]


def test_with_side_effects_allowed_everything_is_canceled_by_one_command_and_read_back_in_listings(crew):
    know_the_engines_clock(crew)
    order_ids = crew.place(150)
    before = crew.control.calls()[-1]["seq"]
    report = mass_cancel(crew, EVERYTHING, allow_side_effects=True)
    assert report["flat"] is True
    assert commands(crew) == ["cancel_all"]
    assert [call for call in crew.cancels() if call["seq"] > before] == []
    assert {each["order_id"] for each in report["affected"]} == set(order_ids)
    assert (report["contracts_canceled"], report["orders_count_unknown"]) == ("1500.00", 0)
    assert (report["command"]["what"], report["command"]["sent"]) == ("cancel_all", 1)
    assert report["command"]["answer"] == "done"
    assert report["command"]["sent_at"] < report["command"]["in_force_until"]
    assert len(crew.control.calls("read")) < 20
    assert "next minute" in report["plan"]["paths"]["all"]
    assert crew.client.status(order_ids[0]).result.confirmed_by == "read_back"


def test_with_side_effects_allowed_an_order_group_is_triggered(crew):
    crew.place(30, order_group_id="group-7")
    others = crew.place(3)
    report = mass_cancel(crew, {"order_group_id": "group-7"}, allow_side_effects=True)
    assert (report["flat"], report["orders_affected"]) == (True, 30)
    assert commands(crew) == ["group_trigger"]
    assert resting(crew) == set(others)


@pytest.mark.parametrize("scope", [{"subaccount": 0}, {"order_group_id": "group-8", "side": "yes"}])
def test_a_command_that_would_reach_further_than_the_scope_is_never_sent(crew, scope):
    crew.place(5, order_group_id="group-8")
    report = mass_cancel(crew, scope, allow_side_effects=True)
    assert report["flat"] is True
    assert commands(crew) == []


@pytest.mark.parametrize("kind", ["http_500", "drop_before", "drop_after"])
def test_whatever_becomes_of_a_command_every_order_is_truthfully_reported(crew, kind):
    crew.place(40)
    crew.control.fault(kind, operation="cancel_all", times=1)
    report = mass_cancel(crew, EVERYTHING, allow_side_effects=True)
    assert (report["flat"], report["orders_affected"]) == (True, 40)
    proven = Decimal(report["contracts_canceled"])
    assert proven == 10 * (40 - report["orders_count_unknown"])
    assert resting(crew) == set()
    tells_the_truth(report, crew)


@pytest.mark.parametrize(
    ("kind", "how"), [("status", {"status": 403, "code": "forbidden"}), ("http_429", {})]
)
def test_a_command_that_did_nothing_is_not_taken_for_an_attempt_of_ours(crew, kind, how):
    order_ids = crew.place(4)
    crew.control.fault(kind, operation="cancel_all", times=1, **how)
    report = mass_cancel(crew, EVERYTHING, allow_side_effects=True)
    assert (report["flat"], report["orders_affected"], commands(crew)) == (True, 4, ["cancel_all"])
    results = [crew.client.status(order_id).result for order_id in order_ids]
    # Marked as perhaps canceled by it, they would be read back, and another's cancel be taken for ours.
    assert {(each.confirmed_by, each.attempts) for each in results} == {("cancel", 1)}


def test_a_command_that_was_not_given_leaves_no_mark_on_the_orders(crew):
    waiting, *others = crew.place(4)
    crew.control.fault("slow", order_id=waiting, operation="cancel", seconds=1.0, effect="after", times=1)
    crew.client.cancel(waiting)
    crew.wait_sent(waiting)
    report = mass_cancel(crew, EVERYTHING, allow_side_effects=True)
    assert (report["flat"], commands(crew)) == (True, [])
    results = [crew.client.status(order_id).result for order_id in others]
    assert {(each.confirmed_by, each.attempts) for each in results} == {("cancel", 1)}


def test_an_order_that_somebody_is_at_already_is_not_swept_from_under_their_hands(crew):
    waiting, *_ = crew.place(3)
    crew.control.fault("slow", order_id=waiting, operation="cancel", seconds=1.0, effect="after", times=1)
    crew.client.cancel(waiting)
    crew.wait_sent(waiting)
    report = mass_cancel(crew, EVERYTHING, allow_side_effects=True)
    assert (report["flat"], report["orders_affected"]) == (True, 3)
    assert commands(crew) == []


def test_an_empty_account_is_flat_at_once(crew):
    report = mass_cancel(crew, EVERYTHING)
    assert (report["flat"], report["orders_affected"], report["actual_s"]) == (True, 0, None)
    assert report["completed_at"] > report["accepted_at"]


def test_progress_is_seen_while_it_runs_and_the_report_comes_last(crew):
    crew.place(150)
    crew.control.configure(latency_s=0.1)
    states = list(crew.client.mass_cancel(EVERYTHING).progress(timeout=PATIENCE_S))
    *running, report = states
    assert report["flat"]
    assert running
    settled = [each["settled"] for each in running]
    assert settled == sorted(settled)
    assert all(each["orders"] == each["settled"] + each["open"] for each in running)
    assert any(0 < number < 150 for number in settled)


# -- how it is asked for


def test_a_raw_message_gets_the_report_under_its_own_task_id(crew):
    crew.place(3, subaccount=1)
    with Celery("raw", broker=crew.redis.url, backend=crew.redis.url, set_as_current=False) as app:
        sent = app.send_task(
            "mass_cancel",
            kwargs={"scope": {"subaccount": 1}, "requested_by": "elsewhere"},
            queue="risk",
        )
        report = sent.get(timeout=PATIENCE_S)
        assert report["flat"]
        assert report["request_id"] == sent.id
        assert (report["orders_affected"], report["requested_by"]) == (3, "elsewhere")
        assert app.AsyncResult(f"mass:{sent.id}").get(timeout=PATIENCE_S) == report


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({}, ["scope"]),
        ({"scope": {}}, ["scope: nothing is named"]),
        ({"scope": {"side": "up", "colour": "red"}, "reason": 7}, ["scope.side", "scope.'colour'", "reason"]),
        ({"scope": EVERYTHING, "use_cancel_all": True}, ["'use_cancel_all': unknown field"]),
        ({"scope": EVERYTHING, "deadline_s": 0}, ["deadline_s"]),
        ({"scope": EVERYTHING, "request_id": "a/b"}, ["request_id"]),
    ],
)
def test_a_message_that_cannot_be_meant_is_answered_with_every_bad_field(crew, message, named):
    [order_id] = crew.place()
    with Celery("raw", broker=crew.redis.url, backend=crew.redis.url, set_as_current=False) as app:
        answer = app.send_task("mass_cancel", kwargs=message, queue="risk").get(timeout=PATIENCE_S)
    assert answer["flat"] is False
    for name in named:
        assert name in answer["error"]
    assert resting(crew) == {order_id}


@pytest.mark.parametrize(
    ("args", "fields", "named"),
    [
        ([EVERYTHING], {}, "positional arguments"),
        ([], {"self": 1, "scope": EVERYTHING}, "'self (field)': unknown field"),
    ],
)
def test_a_message_in_another_shape_is_answered_too(crew, args, fields, named):
    with Celery("raw", broker=crew.redis.url, backend=crew.redis.url, set_as_current=False) as app:
        answer = app.send_task("mass_cancel", args=args, kwargs=fields, queue="risk").get(timeout=PATIENCE_S)
    assert answer["flat"] is False
    assert named in answer["error"]


def test_an_id_that_is_taken_is_refused_and_the_same_message_again_gets_the_report_again(crew):
    first, second = crew.place(1, subaccount=1), crew.place(1, subaccount=2)
    request_id = f"daily-{uuid.uuid4().hex[:8]}"
    with Celery("raw", broker=crew.redis.url, backend=crew.redis.url, set_as_current=False) as app:

        def ask(subaccount):
            message = {"scope": {"subaccount": subaccount}, "request_id": request_id}
            sent = app.send_task("mass_cancel", kwargs=message, queue="risk")
            return sent.get(timeout=PATIENCE_S)

        report = ask(1)
        assert [each["order_id"] for each in report["affected"]] == first
        again, other = ask(1), ask(2)
    assert again == report
    assert (other["flat"], resting(crew)) == (False, set(second))
    assert other["error"].startswith("request_id: is taken by another mass cancel")
    with crew.redis.client() as server:
        assert request_id not in server.smembers("kalshi-cancel:mass_cancels:open")


def test_the_client_refuses_a_bad_scope_by_name_before_anything_is_asked_for(crew):
    with pytest.raises(BadRequest) as caught:
        crew.client.mass_cancel({"side": "up", "subaccount": "1"})
    assert set(caught.value.problems) == {"scope.side", "scope.subaccount"}


def test_a_mass_cancel_whose_message_was_lost_is_noticed(crew):
    crew.place(2)
    workers = crew.alive()
    with crew.frozen(*workers):
        pending = crew.client.mass_cancel(EVERYTHING)
        with crew.redis.client() as server:
            server.delete("risk")
    assert pending.result(timeout=PATIENCE_S)["flat"]


# -- in trouble


def test_a_sweep_among_fills_new_orders_lost_answers_and_a_killed_runner_ends_flat_and_true(crew):
    victim, _ = crew.workers(2)
    placed = crew.place(400)
    crew.control.configure(latency_s=0.15)
    for operation in ("batch", "cancel"):
        crew.control.fault("drop_after", operation=operation, probability=0.08)
        crew.control.fault("drop_before", operation=operation, probability=0.04)
    with crew.frozen(*[each for each in crew.alive() if each is not victim]):
        pending = crew.client.mass_cancel(EVERYTHING)
        crew.wait_many_sent(40)
    with crew.redis.client() as server:
        runner = server.get(f"kalshi-cancel:mass:{pending.request_id}:lease") or ""
    assert runner.split("#")[0].endswith(f":{victim.pid}"), runner
    arrived = []

    def meanwhile():
        """Every twentieth order is filled, wholly or in part, and as many arrive new."""
        for at, order_id in enumerate(reversed(placed[::20])):
            with contextlib.suppress(ControlError):  # the sweeper was there first
                crew.control.fill(order_id, "4.00" if at % 2 else None)
            arrived.extend(crew.place(1))

    disturber = threading.Thread(target=meanwhile)
    disturber.start()
    crew.wait_many_sent(80)
    victim.kill()
    report = pending.result(timeout=60)
    disturber.join()
    assert report["flat"], report["why_not_flat"]
    assert resting(crew) <= set(arrived)
    known = {each["order_id"] for each in (*report["affected"], *report["not_affected"])}
    assert set(placed) <= known
    tells_the_truth(report, crew)
    truth = {order["order_id"]: order for order in crew.control.orders()}
    filled = sum(Decimal(truth[order_id]["fill_count_fp"]) for order_id in known)
    # A partial fill is proven where the exchange has shown the order after it; each was of four contracts.
    not_proven = filled - Decimal(report["contracts_filled_meanwhile"])
    assert 0 <= not_proven <= 4 * report["orders_fills_unknown"]
    unknown = [each["order_id"] for each in report["affected"] if each["reduced_by"] is None]
    canceled_unproven = sum(Decimal(truth[order_id]["canceled_count_fp"]) for order_id in unknown)
    assert Decimal(report["contracts_canceled"]) + canceled_unproven + filled == 10 * len(known)
    no_order_was_canceled_twice(crew)
    assert sum(fault["struck"] for fault in crew.control.faults()) > 0


def test_two_overlapping_mass_cancels_do_no_double_work(crew):
    crew.workers(2)
    crew.place(100, subaccount=0)
    crew.place(100, subaccount=1)
    crew.control.configure(latency_s=0.1)
    both = [crew.client.mass_cancel(EVERYTHING), crew.client.mass_cancel({"subaccount": 1})]
    reports = [pending.result(timeout=PATIENCE_S) for pending in both]
    assert [report["flat"] for report in reports] == [True, True]
    assert [report["orders_affected"] for report in reports] == [200, 100]
    no_order_was_canceled_twice(crew)
    assert set(crew.sent().values()) == {1}
    for report in reports:
        tells_the_truth(report, crew)


def test_what_a_strategy_waits_for_already_is_taken_along_and_canceled_once(crew):
    placed = crew.place(60)
    crew.control.configure(latency_s=0.1)
    strategy = crew.client.cancel_many(placed[:30], lane=Lane.STRATEGY)
    report = mass_cancel(crew, EVERYTHING)
    assert report["flat"]
    assert {result.outcome for result in strategy.results(timeout=PATIENCE_S)} == {"canceled"}
    assert crew.effective() == Counter(placed)
    assert set(crew.sent().values()) == {1}


def test_what_cannot_be_canceled_is_reported_with_its_reason_and_nothing_is_called_flat(crew):
    [stuck, forbidden, fine] = crew.place(3)
    crew.control.fault("http_500", order_id=stuck)
    crew.control.fault("status", order_id=forbidden, status=403, code="forbidden")
    report = mass_cancel(crew, EVERYTHING, deadline_s=2.0)
    assert report["flat"] is False
    assert report["flat_listing"] is None
    assert report["why_not_flat"]
    assert report["affected"] == [{"order_id": fine, "reduced_by": "10.00"}]
    reasons = {each["order_id"]: each for each in report["not_affected"]}
    assert reasons[stuck]["reason"] in {"open", "unresolved"}
    assert reasons[forbidden] in (
        {"order_id": forbidden, "reason": "refused", "error": "forbidden"},
        {"order_id": forbidden, "reason": "open", "error": None},  # it is tried again and again
    )
    assert resting(crew) == {stuck, forbidden}
    crew.control.clear_faults()
    assert mass_cancel(crew, EVERYTHING)["flat"]


def test_what_stays_refused_is_reported_so_long_before_the_deadline(crew):
    [forbidden] = crew.place()
    crew.control.fault("status", order_id=forbidden, status=403, code="forbidden")
    asked = time.monotonic()
    report = mass_cancel(crew, EVERYTHING, deadline_s=60.0)
    assert time.monotonic() - asked < PATIENCE_S
    assert report["not_affected"] == [{"order_id": forbidden, "reason": "refused", "error": "forbidden"}]
    assert report["why_not_flat"] == "1 orders rest and are refused: forbidden"
    assert crew.sent()[forbidden] <= 4


def test_a_listing_whose_key_is_refused_is_asked_for_seldom_until_the_deadline(crew):
    crew.place()
    crew.control.fault("status", operation="list", status=401, code="authentication_error")
    report = mass_cancel(crew, EVERYTHING, deadline_s=4.0)
    assert (report["flat"], report["why_not_flat"]) == (
        False,
        "no listing could be had: authentication_error",
    )
    assert 2 <= len(crew.control.calls("list")) <= 4


def test_a_key_that_works_again_before_the_deadline_cancels_all(crew):
    order_ids = crew.place(3)
    crew.control.fault("status", operation="list", status=401, code="authentication_error", times=1)
    report = mass_cancel(crew, EVERYTHING, deadline_s=PATIENCE_S)
    assert (report["flat"], report["orders_affected"]) == (True, len(order_ids))


def test_a_listing_that_is_refused_is_not_asked_for_again_and_again(crew):
    crew.place()
    crew.control.fault("status", operation="list", status=400, code="invalid_parameters")
    report = mass_cancel(crew, EVERYTHING, deadline_s=60.0)
    assert (report["flat"], report["why_not_flat"]) == (False, "no listing could be had: invalid_parameters")
    assert len(crew.control.calls("list")) == 1


def test_one_order_that_cannot_be_understood_hides_no_other_and_is_no_proof(crew):
    order_ids = crew.place(3)
    strange = {"order_id": "no id/at all", "status": "resting"}
    listed = [{"order_id": each, "status": "resting", "remaining_count_fp": "10.00"} for each in order_ids]
    body = {"orders": [strange, *listed], "cursor": ""}
    crew.control.fault("status", operation="list", status=200, body=body, times=1)
    empty = {"orders": [strange], "cursor": ""}
    crew.control.fault("status", operation="list", status=200, body=empty)
    report = mass_cancel(crew, EVERYTHING, deadline_s=2.0)
    assert resting(crew) == set()
    assert (report["flat"], report["orders_affected"]) == (False, 3)
    assert report["why_not_flat"] == "1 listed orders cannot be understood"


def test_orders_of_the_old_form_are_found_where_the_exchange_lists_them(crew):
    crew.control.configure(order_form="int")
    [order_id] = crew.place(1, subaccount=3, exchange_index=2)
    others = crew.place(1, subaccount=4, exchange_index=1)
    report = mass_cancel(crew, {"subaccount": 3, "exchange_index": 2})
    assert (report["flat"], [each["order_id"] for each in report["affected"]]) == (True, [order_id])
    assert resting(crew) == set(others)


def test_what_was_final_before_takes_neither_time_nor_tokens(crew):
    order_ids = crew.place(2)
    crew.client.cancel_many(order_ids).results(timeout=PATIENCE_S)
    report = mass_cancel(crew, {"order_ids": order_ids})
    reads = len(crew.control.calls("list")) + len(crew.control.calls("api_keys"))
    assert (report["flat"], report["actual_s"]) == (True, None)
    assert report["tokens_spent"] == 10 * reads


def test_without_a_listing_nothing_is_called_flat_and_it_ends_at_its_deadline(crew):
    [order_id] = crew.place()
    crew.control.fault("http_500", operation="list")
    asked = time.monotonic()
    report = mass_cancel(crew, EVERYTHING, deadline_s=1.0)
    assert time.monotonic() - asked < 1.0 + SLACK_S
    assert report["flat"] is False
    assert report["why_not_flat"].startswith("no listing could be had: ")
    assert report["plan"]["listed_at"] is None
    assert resting(crew) == {order_id}


def test_orders_that_are_named_are_canceled_even_when_nothing_can_be_listed(crew):
    order_ids = crew.place(3)
    crew.control.fault("http_500", operation="list")
    report = mass_cancel(crew, {"order_ids": order_ids}, deadline_s=6.0)
    assert report["flat"] is False
    assert report["why_not_flat"].startswith("no listing could be had: ")
    assert {each["order_id"] for each in report["affected"]} == set(order_ids)
    assert resting(crew) == set()


def test_a_step_that_takes_longer_than_the_lease_is_not_begun_by_a_second_runner(crew):
    crew.place(3_100)
    crew.control.fault("slow", operation="list", seconds=1.3, effect="before", times=4)
    report = mass_cancel(crew, EVERYTHING)
    assert report["flat"]
    started = f"event=mass_cancel_started mass cancel started request_id={report['request_id']}"
    begun = [worker.log_text().count(started) for worker in crew.alive()]
    assert sum(begun) == 1


def test_reads_that_lag_delay_the_proof_and_do_not_fool_it(crew):
    crew.place(20, read_lag_s=0.4)
    report = mass_cancel(crew, EVERYTHING)
    assert report["flat"]
    assert report["orders_affected"] == 20
    assert set(crew.sent().values()) == {1}, "a stale listing is no reason to cancel again"


def test_an_order_that_arrives_during_the_sweep_is_found_by_the_next_listing(crew):
    crew.place(60)
    crew.control.configure(latency_s=0.15)
    pending = crew.client.mass_cancel(EVERYTHING)
    crew.wait_many_sent(10)
    late = crew.place(2)
    report = pending.result(timeout=PATIENCE_S)
    assert report["flat"]
    assert resting(crew) == set()
    assert set(late) <= {each["order_id"] for each in report["affected"]}
    assert report["plan"]["orders"] == 60


# -- how long it takes


def test_the_prediction_comes_true(crew):
    """600 orders at 150 a second, less what the bucket holds at the start."""
    crew.control.configure(tier="advanced")
    with crew.apart(KALSHI_BATCH_MOST="100") as apart:
        apart.start()
        crew.place(600)
        report = apart.client.mass_cancel(EVERYTHING).result(timeout=PATIENCE_S)
    predicted_s, actual_s = report["predicted_s"], report["actual_s"]
    print(f"predicted {predicted_s:.2f} s, actual {actual_s:.2f} s, ratio {actual_s / predicted_s:.3f}")
    assert report["flat"]
    assert (report["orders_affected"], report["rate_limited"]) == (600, 0)
    assert {call["status"] for call in crew.cancels()} == {200}
    assert predicted_s == pytest.approx(actual_s, rel=0.25)
    assert predicted_s >= (1200 - 600) / 300, "no less than the exchange's own arithmetic"


# -- the command line


@pytest.fixture
def ctl(crew):
    """Runs `cancelctl mass` without a terminal."""
    return lambda *arguments: cancelctl("mass", *arguments, env=environment(crew))


def environment(crew):
    """What a producer has: no key, no exchange."""
    known = crew.stack.environment.items()
    return {name: value for name, value in known if not name.startswith("KALSHI_")}


def at_a_terminal(crew, *arguments, answer):
    """Runs `cancelctl mass` at a terminal of its own and answers its question; what was seen, the code."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "kalshi_cancel.cli", "mass", *arguments],
        env=environment(crew),
        cwd=ROOT,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    seen, answered = "", False
    while True:
        try:
            portion = os.read(leader, 4096)
        except OSError:  # Linux says so when the other end is closed
            break
        seen += portion.decode()
        if "[y/N]" in seen and not answered:
            answered = True
            os.write(leader, answer.encode())
    os.close(leader)
    return seen.replace("\r\n", "\n"), process.wait(PATIENCE_S)


def test_the_command_shows_the_plan_and_cancels_nothing_when_it_is_only_to_plan(crew, ctl):
    crew.place(3, exchange_index=2)
    done = ctl("--everything", "--dry-run")
    assert done.returncode == Exit.SETTLED
    assert re.search(r"^orders +3$", done.stdout, re.MULTILINE)
    assert re.search(r"^contracts +30\.00$", done.stdout, re.MULTILINE)
    assert re.search(r"^tokens +6$", done.stdout, re.MULTILINE)
    assert re.search(r"^predicted +flat in \d", done.stdout, re.MULTILINE)
    assert re.search(r"^shard 2 +3 orders: batches .* singles", done.stdout, re.MULTILINE)
    assert len(resting(crew)) == 3
    [planned] = map(json.loads, ctl("--everything", "--dry-run", "--json").stdout.splitlines())
    assert planned["plan"]["orders"] == 3


def test_a_dry_run_that_is_told_yes_is_a_dry_run(crew, ctl):
    crew.place(3)
    done = ctl("--everything", "--dry-run", "--yes")
    assert done.returncode == Exit.SETTLED
    assert re.search(r"^predicted +flat in \d", done.stdout, re.MULTILINE)
    assert len(resting(crew)) == 3


def test_a_scope_in_which_nothing_rested_is_pointed_out(crew, ctl):
    crew.place()
    done = ctl("--ticker", "KXTYPO", "--yes")
    assert done.returncode == Exit.SETTLED
    assert "no order rested in this scope: is it the scope that you meant?" in done.stderr


def test_the_command_refuses_to_cancel_unattended_without_being_told_so(crew):
    crew.place()
    for stdin, options in ((subprocess.DEVNULL, ()), (subprocess.PIPE, ("--json",))):
        refused = subprocess.run(
            [sys.executable, "-m", "kalshi_cancel.cli", "mass", "--everything", *options],
            env=environment(crew),
            cwd=ROOT,
            text=True,
            stdin=stdin,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert refused.returncode == Exit.USAGE
        assert refused.stdout == ""
        assert "use --yes or --dry-run" in refused.stderr
    assert len(resting(crew)) == 1


def test_the_command_cancels_when_told_so_and_shows_the_report(crew, ctl):
    placed = crew.place(4)
    crew.control.fill(placed[0])
    done = ctl("--order-id", *placed, "--yes", "--reason", "limit breached", "--requested-by", "desk 7")
    assert done.returncode == Exit.SETTLED
    assert re.search(r"^flat +yes, proven by the listing of ....-..-..T", done.stdout, re.MULTILINE)
    assert re.search(r"^orders +3 canceled, 1 too_late_executed$", done.stdout, re.MULTILINE)
    assert re.search(r"^contracts +30\.00 canceled, 0\.00 filled", done.stdout, re.MULTILINE)
    assert resting(crew) == set()
    [latest, *_] = crew.client.mass_cancels()
    report = latest[2]
    assert (report["requested_by"], report["reason"]) == ("desk 7", "limit breached")
    assert report["automated"] is True


def test_every_option_of_the_scope_reaches_it(crew, ctl):
    options = {
        "--ticker": ("A-1", "A-2"),
        "--event": ("A",),
        "--series": ("A",),
        "--ticker-prefix": ("A",),
        "--subaccount": ("1",),
        "--order-id": ("a", "b"),
        "--side": ("bid",),
        "--client-order-id-prefix": ("mm-",),
        "--order-group": ("g",),
        "--shard": ("2",),
        "--created-after": ("2026-11-22T10:00:00Z",),
        "--created-before": ("1795341600.5",),
        "--min-price": ("0.10",),
        "--max-price": ("0.90",),
    }
    words = itertools.chain.from_iterable((option, *values) for option, values in options.items())
    done = ctl(*words, "--dry-run", "--json")
    assert done.returncode == Exit.SETTLED
    assert json.loads(done.stdout)["scope"] == {
        "order_ids": ["a", "b"],
        "subaccount": 1,
        "tickers": ["A-1", "A-2"],
        "event_tickers": ["A"],
        "series": "A",
        "ticker_prefix": "A",
        "side": "bid",
        "client_order_id_prefix": "mm-",
        "order_group_id": "g",
        "exchange_index": 2,
        "created_after": "2026-11-22T10:00:00Z",
        "created_before": "2026-11-22T10:00:00.500000Z",
        "min_price": "0.10",
        "max_price": "0.90",
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no scope: give a filter, or --everything"),
        (["--yes"], "no scope: give a filter, or --everything"),
        (["--everything", "--side", "bid", "--yes"], "scope.everything: means the whole account"),
        (["--side", "up", "--yes"], "scope.side: expected yes, no, bid or ask"),
        (["--min-price", "2", "--yes"], "scope.min_price: expected a yes price"),
        (["--everything", "--deadline", "0", "--yes"], "deadline_s: expected seconds"),
        (["--subaccount", "one"], "invalid int value"),
        (["--everything", "list"], "list and show take no scope"),
        (["show"], "required: ID"),
        (["all"], "invalid choice: 'all'"),
    ],
)
def test_wrong_usage_is_said_in_one_line_and_cancels_nothing(crew, ctl, arguments, words):
    crew.place()
    done = ctl(*arguments)
    assert done.returncode == Exit.USAGE
    assert words in done.stderr.splitlines()[-1]
    assert len(resting(crew)) == 1


def test_the_whole_report_is_json_when_asked_for_and_progress_is_lines_on_stderr(crew, ctl):
    crew.place(100)
    crew.control.configure(latency_s=0.15)
    done = ctl("--everything", "--yes", "--json")
    [report] = map(json.loads, done.stdout.splitlines())
    assert report == crew.client.mass_status(report["request_id"])
    assert report["flat"]
    assert re.search(r"^\d+ of 100 settled", done.stderr, re.MULTILINE)
    assert "\r" not in done.stderr
    shown = ctl("show", "--json", report["request_id"])
    assert (json.loads(shown.stdout), shown.returncode) == (report, Exit.SETTLED)
    assert ctl("--json", "show", report["request_id"]).stdout == shown.stdout


def test_what_is_not_flat_has_an_exit_code_of_its_own_and_names_what_is_exposed(crew, ctl):
    [stuck, _] = crew.place(2)
    crew.control.fault("http_500", order_id=stuck)
    done = ctl("--everything", "--yes", "--deadline", "1.5")
    assert done.returncode == Exit.NOT_FLAT
    assert re.search(r"^flat +NO: 1 orders ", done.stdout, re.MULTILINE)
    assert re.search(rf"^{stuck} +(open|unresolved)", done.stdout, re.MULTILINE)
    [latest, *_] = crew.client.mass_cancels()
    assert ctl("show", latest[0]).returncode == Exit.NOT_FLAT


def test_mass_cancels_are_listed_for_eyes_and_for_machines(crew, ctl):
    crew.place(2)
    flat = mass_cancel(crew, EVERYTHING, requested_by="desk 7", reason="limit")
    planned = mass_cancel(crew, EVERYTHING, dry_run=True)
    lines = ctl("list").stdout.splitlines()
    assert lines[0].split() == ["REQUEST", "ACCEPTED", "STATE", "ORDERS", "CONTRACTS", "WHO", "REASON"]
    assert re.match(rf"{planned['request_id']} +\S+Z +planned only +0 +0\.00 ", lines[1])
    assert re.match(rf"{flat['request_id']} +\S+Z +flat +2 +20\.00 +desk 7 +limit", lines[2])
    first, second, *_ = map(json.loads, ctl("list", "--json").stdout.splitlines())
    assert (first["request_id"], first["flat"]) == (planned["request_id"], False)
    assert (second["request_id"], second["flat"], second["orders_affected"]) == (flat["request_id"], True, 2)


def test_a_mass_cancel_that_nobody_asked_for_and_one_under_way_have_codes_of_their_own(crew, ctl):
    done = ctl("show", "nobody")
    assert done.returncode == Exit.NOT_KNOWN_HERE
    assert "nobody asked" in done.stderr
    with crew.frozen(*crew.alive()):
        pending = crew.client.mass_cancel(EVERYTHING)
        waits = ctl("show", pending.request_id)
        assert waits.returncode == Exit.NOT_SETTLED
        assert "waits for a worker" in waits.stderr
        late = ctl("--everything", "--yes", "--timeout", "0.2")
        assert late.returncode == Exit.NOT_SETTLED
        assert "goes on; cancelctl mass show " in late.stderr
        unplanned = ctl("--everything", "--dry-run", "--timeout", "0.2")
        assert unplanned.returncode == Exit.NOT_SETTLED
        assert "is a worker running?" in unplanned.stderr
    assert pending.result(timeout=PATIENCE_S)["flat"]


def test_at_a_terminal_it_shows_the_plan_and_cancels_nothing_unless_told_yes(crew):
    crew.place(3)
    seen, code = at_a_terminal(crew, "--everything", answer="\n")
    assert re.search(r"^orders +3$", seen, re.MULTILINE)
    assert "Cancel 3 orders" in seen
    assert "nothing was canceled" in seen
    assert code == Exit.INTERRUPTED
    assert len(resting(crew)) == 3


def test_at_a_terminal_yes_cancels_under_a_bar_and_counts_as_manual(crew):
    crew.place(100)
    crew.control.configure(latency_s=0.15)
    seen, code = at_a_terminal(crew, "--everything", answer="y\n")
    assert code == Exit.SETTLED
    assert re.search(r"\[#*\.+\] \d+ of 100 settled, .*/s, .* left, about \d+ tokens", seen)
    assert re.search(r"^orders +100 canceled$", seen, re.MULTILINE)
    assert resting(crew) == set()
    [latest, *_] = crew.client.mass_cancels()
    assert latest[2]["automated"] is False


def test_interrupted_the_command_ends_and_the_mass_cancel_goes_on(crew):
    crew.place(60)
    crew.control.configure(latency_s=0.2)
    running = subprocess.Popen(
        [sys.executable, "-m", "kalshi_cancel.cli", "mass", "--everything", "--yes"],
        env=environment(crew),
        cwd=ROOT,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    running.stderr.readline()  # the first line of its progress
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == Exit.INTERRUPTED
    [request_id] = re.findall(r"interrupted; mass cancel (\S+) goes on", err)
    client = CancelClient(crew.redis.url)
    wait_until(lambda: "flat" in (client.mass_status(request_id) or {}), within_s=PATIENCE_S)
    assert client.mass_status(request_id)["flat"]
    client.close()
