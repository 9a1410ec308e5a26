"""What a mass cancel does without waiting: what is named before a listing, a listing before read-backs."""

from __future__ import annotations

import time
from contextlib import closing

import pytest
from buckets import Account
from crew import PATIENCE_S, about_orders, ids

from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.settings.worker import WorkerSettings
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.pending import Known
from kalshi_cancel.store.scripts import connect
from trials.stack import KEY_ID, wait_until
from worker.dispatch.paid_calls import PaidCalls
from worker.mass.key_sight import KeySight

EVERYTHING = {"everything": True}
SOON_S = 2.0  # with room for a busy machine; what it must not wait for takes longer
READ_LAG_S = 0.5  # crew.ENVIRONMENT
FORBIDDEN = {"status": 403, "code": "forbidden"}


@pytest.fixture
def crew(crew):
    """One worker; one test's orders are the only ones, and its key may do all."""
    crew.workers(1)
    yield crew
    set_key(crew)


def set_key(crew, **rights):
    """Has the workers' key have these rights."""
    crew.control.register_key(KEY_ID, crew.stack.keys.public_path.read_text(), **rights)


def resting(crew):
    return {order["order_id"] for order in crew.control.orders() if order["status"] == "resting"}


def ask(crew, scope, **how):
    """Asks for a mass cancel; it, and when that was, epoch seconds."""
    at = time.time()
    return crew.client.mass_cancel(scope, **how), at


def first_after_s(crew, operations, asked):
    """Seconds from then to the first of these calls, once there is one."""

    def calls():
        return [call for call in crew.control.calls() if call["operation"] in operations]

    wait_until(calls, within_s=PATIENCE_S, what=f"one of {operations}")
    after_s = calls()[0]["received_ms"] / 1000 - asked
    print(f"{operations}: first after {after_s:.3f} s")
    return after_s


def spent(crew):
    """What all calls have cost that were not turned away."""
    costs = {"list": 10, "api_keys": 10, "read": 2, "cancel": 2, "cancel_all": 2, "batch": 2}
    calls = [
        call for call in about_orders(crew.control) if call["operation"] in costs and call["status"] != 429
    ]
    return sum(costs[call["operation"]] * max(len(call["order_ids"]), 1) for call in calls)


def reasons(report):
    return {each["order_id"]: each["reason"] for each in report["not_affected"]}


# -- what is named


def test_named_orders_are_canceled_at_once_while_nothing_can_be_listed(crew):
    order_ids = crew.place(30)
    crew.control.fault("http_503", operation="list")
    pending, asked = ask(crew, {"order_ids": order_ids}, deadline_s=4.0)
    assert first_after_s(crew, {"cancel", "batch"}, asked) < SOON_S
    report = pending.result(timeout=PATIENCE_S)
    assert {each["order_id"] for each in report["affected"]} == set(order_ids)
    assert (report["flat"], resting(crew)) == (False, set())
    assert report["why_not_flat"].startswith("no listing could be had: ")


def test_named_orders_with_a_filter_are_looked_at_one_by_one_while_nothing_can_be_listed(crew):
    inside, outside = crew.place(3, subaccount=1), crew.place(3, subaccount=2)
    crew.control.fault("http_503", operation="list", for_s=8.0)
    scope = {"order_ids": [*inside, *outside], "subaccount": 1}
    pending, asked = ask(crew, scope, deadline_s=20.0)
    assert first_after_s(crew, {"cancel", "batch"}, asked) < 3 * SOON_S
    report = pending.result(timeout=PATIENCE_S)
    assert report["flat"], report["why_not_flat"]
    assert {each["order_id"] for each in report["affected"]} == set(inside)
    assert resting(crew) == set(outside)
    assert reasons(report) == dict.fromkeys(outside, "not_resting_in_scope")


@pytest.mark.parametrize(
    ("inside", "outside", "scope", "settings"),
    [
        ({"ticker": "KXA-1-T"}, {"ticker": "KXB-1-T"}, {"event_tickers": ["KXA-1"]}, {}),
        ({"subaccount": 1}, {"subaccount": 0}, {"subaccount": 1}, {"order_form": "int"}),
    ],
    ids=["event", "old form"],
)
def test_what_a_listing_would_have_left_out_is_not_canceled_because_it_is_named(
    crew, inside, outside, scope, settings
):
    crew.control.configure(**settings)
    meant, others = crew.place(3, **inside), crew.place(3, **outside)
    crew.control.fault("http_503", operation="list", for_s=4.0)
    report = crew.client.mass_cancel({"order_ids": [*meant, *others], **scope}).result(timeout=PATIENCE_S)
    assert report["flat"], report["why_not_flat"]
    assert {each["order_id"] for each in report["affected"]} == set(meant)
    assert resting(crew) == set(others)


def test_a_mass_cancel_lists_until_its_deadline_and_not_until_half_of_it(crew):
    order_ids = crew.place(5)
    crew.control.fault("http_503", operation="list", for_s=4.0)
    report = crew.client.mass_cancel(EVERYTHING, deadline_s=6.0).result(timeout=PATIENCE_S)
    assert report["flat"], report["why_not_flat"]
    assert {each["order_id"] for each in report["affected"]} == set(order_ids)


# -- a command


def test_an_allowed_command_is_sent_at_once_while_nothing_can_be_listed(crew):
    crew.place(40)
    crew.control.fault("http_503", operation="list")
    pending, asked = ask(crew, EVERYTHING, allow_side_effects=True, deadline_s=3.0)
    assert first_after_s(crew, {"cancel_all"}, asked) < SOON_S
    report = pending.result(timeout=PATIENCE_S)
    assert (report["flat"], resting(crew)) == (False, set())
    command = report["command"]
    assert (command["what"], command["sent"], command["answer"]) == ("cancel_all", 1, "done")
    assert report["tokens_spent"] == spent(crew)


def test_an_allowed_command_does_not_wait_for_a_slow_listing(crew):
    order_ids = crew.place(10)
    crew.control.fault("slow", operation="list", seconds=3.0, effect="after", times=1)
    pending, asked = ask(crew, EVERYTHING, allow_side_effects=True)
    assert first_after_s(crew, {"cancel_all"}, asked) < SOON_S
    report = pending.result(timeout=PATIENCE_S)
    assert report["flat"], report["why_not_flat"]
    assert {each["order_id"] for each in report["affected"]} == set(order_ids), "as seen among the canceled"
    assert report["orders_count_unknown"] == 10


def test_a_command_that_fails_is_sent_again_while_nothing_can_be_listed(crew):
    crew.place(5)
    crew.control.fault("http_503", operation="list", for_s=6.0)
    crew.control.fault("http_500", operation="cancel_all", times=1)
    report = crew.client.mass_cancel(EVERYTHING, allow_side_effects=True).result(timeout=PATIENCE_S)
    assert report["flat"], report["why_not_flat"]
    assert (report["command"]["sent"], report["command"]["answer"]) == (2, "done")


def test_of_a_refused_command_the_report_says_so_and_every_token_is_counted(crew):
    order_ids = crew.place(20)
    crew.control.fault("status", operation="cancel_all", **FORBIDDEN)
    report = crew.client.mass_cancel(EVERYTHING, allow_side_effects=True).result(timeout=PATIENCE_S)
    assert (report["flat"], report["orders_affected"]) == (True, len(order_ids))
    assert (report["command"]["sent"], report["command"]["answer"]) == (1, "forbidden")
    assert report["command"]["in_force_until"] is None
    assert report["tokens_spent"] == spent(crew)


def test_where_nothing_rests_no_command_is_sent_and_the_report_says_why(crew):
    report = crew.client.mass_cancel(EVERYTHING, allow_side_effects=True).result(timeout=PATIENCE_S)
    assert report["flat"]
    assert report["command"]["sent"] == 0
    assert report["command"]["answer"] == "not sent: nothing rested in scope"
    assert crew.control.calls("cancel_all") == []


@pytest.mark.parametrize("named", [{}, {"subaccount": 2, "exchange_index": 2}, {"subaccount": 2}])
def test_a_groups_trigger_goes_to_the_subaccount_and_the_shard_of_its_orders(crew, named):
    group = f"group-{len(named)}"
    crew.place(10, order_group_id=group, subaccount=2, exchange_index=2)
    others = crew.place(2, subaccount=2, exchange_index=2)
    scope = {"order_group_id": group, **named}
    report = crew.client.mass_cancel(scope, allow_side_effects=True).result(timeout=PATIENCE_S)
    assert (report["flat"], report["orders_affected"], resting(crew)) == (True, 10, set(others))
    [trigger] = crew.control.calls("group_trigger")
    assert trigger["status"] == 200
    assert (report["command"]["what"], report["command"]["answer"]) == ("order_group_trigger", "done")
    assert crew.cancels() == []


def test_a_groups_trigger_finds_its_way_once_orders_can_be_listed(crew):
    crew.place(4, order_group_id="group-late", subaccount=1, exchange_index=1)
    crew.control.fault("http_503", operation="list", for_s=2.0)
    scope = {"order_group_id": "group-late"}
    report = crew.client.mass_cancel(scope, allow_side_effects=True).result(timeout=PATIENCE_S)
    assert (report["flat"], report["orders_affected"]) == (True, 4)
    assert [call["status"] for call in crew.control.calls("group_trigger")][-1] == 200
    assert report["command"]["answer"] == "done"


def test_orders_of_others_that_the_commands_minute_cancels_are_named(crew):
    mine = crew.place(10)
    pending, asked = ask(crew, EVERYTHING, allow_side_effects=True)
    first_after_s(crew, {"cancel_all"}, asked)
    others = crew.place(7, meets_tail=True)
    report = pending.result(timeout=PATIENCE_S)
    assert report["flat"], report["why_not_flat"]
    assert {each["order_id"] for each in report["affected"]} == set(mine)
    assert report["canceled_by_command"] == sorted(others)
    assert set(others).isdisjoint(reasons(report))


def test_what_somebody_else_canceled_before_is_not_put_down_to_the_command(crew):
    [gone] = crew.place()
    crew.control.cancel_elsewhere(gone, ago_s=60.0)
    crew.place(3)
    report = crew.client.mass_cancel(EVERYTHING, allow_side_effects=True).result(timeout=PATIENCE_S)
    assert report["flat"]
    assert report["canceled_by_command"] == []
    assert gone not in {each["order_id"] for each in report["affected"]}


# -- a key that may not cancel


def test_with_a_read_only_key_only_a_few_are_asked_for(crew):
    order_ids = crew.place(200)
    set_key(crew, scope="read_only")
    report = crew.client.mass_cancel(EVERYTHING, deadline_s=30.0).result(timeout=PATIENCE_S)
    assert report["flat"] is False
    assert report["key"] == {"subaccount": None, "scopes": ["read"], "may_cancel": False}
    assert "refuses this key's cancels: " in report["why_not_flat"]
    assert len(crew.cancels()) < 20
    assert resting(crew) == set(order_ids) == set(reasons(report)), "each is named"
    assert set(reasons(report).values()) == {"refused", "not_asked"}
    assert list(crew.client.open_cancels()) == []


def test_when_the_first_are_all_forbidden_the_rest_is_not_asked_for(crew):
    order_ids = crew.place(200)
    crew.control.fault("status", operation=["cancel", "batch"], **FORBIDDEN)
    report = crew.client.mass_cancel(EVERYTHING, deadline_s=30.0).result(timeout=PATIENCE_S)
    assert report["flat"] is False
    assert "refuses this key's cancels: forbidden" in report["why_not_flat"]
    print(f"{len(crew.cancels())} calls")
    assert len(crew.cancels()) <= len(order_ids), "none is asked for a second time"
    assert resting(crew) == set(order_ids) == set(reasons(report))
    assert list(crew.client.open_cancels()) == []


def test_where_only_one_subaccount_is_forbidden_the_others_are_canceled(crew):
    allowed = crew.place(30, subaccount=1)
    forbidden = crew.place(30, subaccount=2)
    for order_id in forbidden:
        crew.control.fault("status", operation="cancel", order_id=order_id, **FORBIDDEN)
        crew.control.fault("status", operation="batch", order_id=order_id, **FORBIDDEN)
    report = crew.client.mass_cancel(EVERYTHING, deadline_s=30.0).result(timeout=PATIENCE_S)
    assert report["flat"] is False
    assert {each["order_id"] for each in report["affected"]} == set(allowed)
    assert resting(crew) == set(forbidden) == set(reasons(report))


# -- how long it is to take


@pytest.mark.parametrize(("live", "unknown"), [(0, 20), (100, 300)])
def test_the_prediction_counts_ids_that_the_exchange_does_not_know(crew, live, unknown):
    order_ids = [*crew.place(live), *ids(unknown)]
    report = crew.client.mass_cancel({"order_ids": order_ids}).result(timeout=PATIENCE_S)
    predicted_s, actual_s = report["predicted_s"], report["actual_s"]
    print(f"{live} live, {unknown} unknown: predicted {predicted_s:.2f} s, actual {actual_s:.2f} s")
    assert report["flat"], report["why_not_flat"]
    assert unknown <= report["plan"]["ids_not_listed"] <= unknown + live
    assert predicted_s > READ_LAG_S, "what is not there is known only after the lag"


def test_what_the_key_sees_is_asked_once_there_are_tokens_for_it(crew):
    """A listing that proves takes the last ones, and while read-backs wait the next are soon gone."""
    settings = WorkerSettings.from_env(crew.stack.environment)
    with closing(Exchange.from_settings(settings)) as exchange, closing(Account(crew.redis.url)) as account:
        account.pacer.take("read", account.tokens("read"))
        rights = KeySight(exchange, PaidCalls(account.pacer)).read(PATIENCE_S)
    assert rights is not None
    assert rights.may_cancel


def test_a_listing_does_not_wait_for_the_read_backs_of_thousands(crew):
    executed, live = crew.place(1_500), crew.place(50)
    for order_id in executed:
        crew.control.fill(order_id)
    crew.control.configure(tier="advanced")
    with crew.apart() as apart:
        settings = RedisSettings.from_env({"REDIS_URL": apart.url})
        with connect(settings) as server:
            CancelStore(server, settings).accept(
                [CancelRequest(each) for each in executed],
                lane=Lane.RISK,
                default_deadline_s=600,
                known=Known("", "read", 0.0),
            )
        apart.start()
        wait_until(lambda: len(crew.control.calls("read")) > 200, within_s=PATIENCE_S, what="many reads")
        asked, pending = time.time(), apart.client.mass_cancel(EVERYTHING)
        assert first_after_s(crew, {"list"}, asked) < SOON_S
        report = pending.result(timeout=PATIENCE_S)
        assert sum(1 for _ in apart.client.open_cancels()) > 500, "it was done before they were read"
    assert {each["order_id"] for each in report["affected"]} == set(live)
    assert report["flat"]
    assert [call for call in crew.control.calls() if call["status"] == 429] == []
