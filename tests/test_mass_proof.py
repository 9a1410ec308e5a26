"""What proves that nothing in scope rests, what stands in the way, and that whatever rests is named."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from decimal import Decimal

import pytest
from crew import PATIENCE_S, ids

from trials.stack import KEY_ID, wait_until

EVERYTHING = {"everything": True}


@pytest.fixture
def crew(crew):
    """One worker; one test's orders are the only ones, and its key may see all."""
    crew.workers(1)
    yield crew
    confine_key(crew, None)


def confine_key(crew, subaccount):
    """Has the workers' key see this subaccount only, or all."""
    crew.control.register_key(KEY_ID, crew.stack.keys.public_path.read_text(), subaccount=subaccount)


def resting(crew):
    return {order["order_id"] for order in crew.control.orders() if order["status"] == "resting"}


def mass_cancel(crew, scope, **how):
    return crew.client.mass_cancel(scope, **how).result(timeout=PATIENCE_S)


def affected(report):
    return {each["order_id"] for each in report["affected"]}


def reasons(report):
    return {each["order_id"]: each["reason"] for each in report["not_affected"]}


def lists(crew):
    return [call for call in crew.control.calls("list") if "limit=1000" in call["query"]]


# -- listing goes on


def test_one_order_that_is_stuck_hides_no_new_ones(crew):
    [stuck] = crew.place(1, exchange_index=1)
    first = crew.place(2)
    crew.control.configure(exchange_paused=[1])
    pending = crew.client.mass_cancel(EVERYTHING, deadline_s=10.0)
    wait_until(lambda: resting(crew) == {stuck}, within_s=PATIENCE_S, what="the first are gone")
    late = crew.place(20)
    placed_at = time.monotonic()
    wait_until(lambda: resting(crew) == {stuck}, within_s=PATIENCE_S, what="the late ones are gone")
    gone_s = time.monotonic() - placed_at
    print(f"late ones gone after {gone_s:.2f} s")
    assert gone_s < 6.0, "long before the deadline"
    report = pending.result(timeout=PATIENCE_S)
    assert (report["flat"], affected(report)) == (False, {*first, *late})
    assert reasons(report).keys() == {stuck}
    assert report["why_not_flat"].startswith("1 orders were still resting at ")


def test_what_is_placed_past_the_deadline_is_named(crew):
    stop, placed = threading.Event(), {}

    def place():
        while not stop.wait(0.02):
            [order_id] = crew.place(1)
            placed[order_id] = time.time()

    crew.place(3)
    placer = threading.Thread(target=place)
    placer.start()
    try:
        report = mass_cancel(crew, EVERYTHING, deadline_s=4.0)
    finally:
        stop.set()
        placer.join()
    last_s = lists(crew)[-1]["received_ms"] / 1000
    listed = {order_id for order_id, at in placed.items() if at < last_s}
    named = affected(report) | reasons(report).keys()
    assert report["flat"] is False
    assert len(listed) > 50
    assert listed <= named
    assert reasons(report).keys() & resting(crew) <= {
        each for each, why in reasons(report).items() if why == "open"
    }


# -- what cannot be judged


@pytest.mark.parametrize(
    ("scope", "odd", "why"),
    [
        ({"max_price": "0.60"}, {"without": ["yes_price_dollars", "no_price_dollars"]}, "no readable price"),
        ({"max_price": "0.60"}, {"fields": {"yes_price_dollars": "NaN"}}, "no readable price"),
        ({"created_after": 1_000_000_000}, {"without": ["created_time"]}, "no readable created_time"),
        (
            {"client_order_id_prefix": "mm-"},
            {"fields": {"client_order_id": 7}},
            "no readable client_order_id",
        ),
        ({"series": "KXODD"}, {"without": ["ticker"]}, "no readable ticker"),
        ({"side": "bid"}, {"without": ["outcome_side", "book_side", "side", "action"]}, "no readable side"),
    ],
    ids=["no price", "NaN", "no created_time", "client_order_id", "no ticker", "no side"],
)
def test_an_order_that_nobody_can_judge_is_named_and_no_proof_while_the_others_are_canceled(
    crew, scope, odd, why
):
    fine = [
        each["order_id"]
        for each in crew.control.place_many(
            [{"ticker": "KXODD-26-T1", "client_order_id": f"mm-{time.time_ns()}-{n}"} for n in range(50)]
        )
    ]
    [unclear] = crew.place(1, ticker="KXODD-26-T1")
    crew.control.fault("odd_fields", order_id=unclear, **odd)
    report = mass_cancel(crew, scope, deadline_s=20.0)
    assert report["flat"] is False
    assert affected(report) == set(fine)
    assert report["not_affected"] == [{"order_id": unclear, "reason": "cannot_tell", "error": why}]
    assert report["why_not_flat"] == (
        f"of 1 resting orders nobody can tell whether they are in scope ({unclear}: {why})"
    )
    assert resting(crew) == {unclear}


def test_an_order_that_nobody_can_judge_is_canceled_when_it_is_named(crew):
    [unclear] = crew.place()
    crew.control.fault("odd_fields", order_id=unclear, without=["yes_price_dollars", "no_price_dollars"])
    report = mass_cancel(crew, {"order_ids": [unclear], "max_price": "0.60"})
    assert (report["flat"], affected(report)) == (True, {unclear})


@pytest.mark.parametrize(
    "fields",
    [
        {"ticker": "KX odd/ticker\x00"},
        {"exchange_index": -7},
        {"subaccount_number": 10**9},
        {"remaining_count_fp": "NaN", "fill_count_fp": []},
        {"status": "dreaming"},
        {"status": None},
    ],
    ids=str,
)
def test_an_order_with_an_odd_field_is_canceled_like_the_others(crew, fields):
    order_ids = crew.place(5)
    crew.control.fault("odd_fields", operation="list", order_id=order_ids[2], fields=fields)
    report = mass_cancel(crew, EVERYTHING)
    assert report["flat"], report["why_not_flat"]
    assert affected(report) == set(order_ids)
    assert resting(crew) == set()


@pytest.mark.parametrize("form", ["null", "absent"])
def test_a_page_without_a_list_and_without_a_cursor_is_an_empty_page(crew, form):
    crew.control.configure(empty_page=form)
    order_ids = crew.place(3)
    report = mass_cancel(crew, EVERYTHING)
    assert (report["flat"], affected(report)) == (True, set(order_ids))


# -- several pages


def test_an_order_that_one_page_hid_from_the_next_is_found_and_canceled(crew):
    """Newest first, a thousand to a page: when one leaves the first page, one of the next is hidden."""
    crew.control.configure(cursors="offset")
    crew.place(5, ticker="KXOTHER-1")
    [hidden] = crew.place(1, ticker="KXMEANT-1")
    others = crew.place(1000, ticker="KXOTHER-1")
    for skip in (1, 2):  # the second page of the first listing, and then of the second
        crew.control.fault("slow", operation="list", seconds=2.0, effect="after", skip=skip, times=1)
    pending = crew.client.mass_cancel({"series": "KXMEANT"}, deadline_s=30.0)
    wait_until(lambda: len(lists(crew)) == 2, within_s=PATIENCE_S, what="the second page is asked for")
    crew.control.cancel_elsewhere(others[500])
    wait_until(lambda: lists(crew)[1]["duration_ms"] is not None, within_s=PATIENCE_S, what="it is there")
    crew.place(1, ticker="KXOTHER-1")
    wait_until(lambda: len(lists(crew)) == 4, within_s=PATIENCE_S, what="the second page is asked for again")
    crew.control.cancel_elsewhere(others[501])
    report = pending.result(timeout=PATIENCE_S)
    assert report["flat"], report["why_not_flat"]
    assert affected(report) == {hidden}
    assert hidden not in resting(crew)


def test_of_a_listing_of_several_pages_two_that_agree_are_a_proof(crew):
    crew.control.configure(cursors="offset")
    others = crew.place(1500, ticker="KXOTHER-1")
    mine = crew.place(3, ticker="KXMEANT-1")
    report = mass_cancel(crew, {"series": "KXMEANT"})
    assert (report["flat"], affected(report)) == (True, set(mine))
    assert report["flat_listing"]["pages"] == 2
    assert resting(crew) == set(others)


@pytest.mark.parametrize(
    "odd",
    [{"fields": {"cursor": None}}, {"without": ["cursor"]}, {"fields": {"error": {"code": "x"}}}],
    ids=["null", "absent", "an error"],
)
def test_a_page_that_may_not_be_all_is_no_proof_and_what_it_shows_is_canceled(crew, odd):
    crew.place(1, ticker="KXMEANT-1")  # on the second page
    others = crew.place(1000, ticker="KXOTHER-1")
    mine = crew.place(1, ticker="KXMEANT-1")
    crew.control.fault("odd_page", operation="list", **odd)
    report = mass_cancel(crew, {"series": "KXMEANT"}, deadline_s=3.0)
    assert (report["flat"], affected(report)) == (False, set(mine))
    assert report["why_not_flat"] == "no listing could be had: partial_listing"
    assert set(others) <= resting(crew)


# -- what the key sees


def test_with_a_key_that_sees_one_subaccount_the_whole_account_is_never_called_flat(crew):
    hidden, seen = crew.place(3, subaccount=0), crew.place(3, subaccount=1)
    confine_key(crew, 1)
    report = mass_cancel(crew, EVERYTHING)
    assert (report["flat"], affected(report), resting(crew)) == (False, set(seen), set(hidden))
    assert report["why_not_flat"] == "this key sees subaccount 1 only: what rests in others is not known"
    assert report["key"] == {"subaccount": 1, "scopes": ["read", "write"], "may_cancel": True}


def test_what_such_a_key_sees_is_called_flat(crew):
    crew.place(3, subaccount=0)
    seen = crew.place(3, subaccount=1)
    confine_key(crew, 1)
    report = mass_cancel(crew, {"subaccount": 1})
    assert (report["flat"], affected(report)) == (True, set(seen))


def test_named_orders_that_are_all_over_are_flat_whatever_the_key_sees(crew):
    seen = crew.place(3, subaccount=1)
    confine_key(crew, 1)
    report = mass_cancel(crew, {"order_ids": seen})
    assert (report["flat"], affected(report)) == (True, set(seen))
    [hidden] = crew.place(1, subaccount=0)
    assert mass_cancel(crew, {"order_ids": [hidden]})["flat"] is False


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "http_500"},
        {"kind": "status", "status": 403, "code": "forbidden"},
        {"kind": "status", "status": 404, "code": "not_found"},
        {"kind": "garbage", "body": '{"api_keys": null}'},
    ],
    ids=lambda fault: fault["kind"],
)
def test_while_it_is_not_known_what_the_key_sees_nothing_is_called_flat(crew, fault):
    order_ids = crew.place(3)
    crew.control.fault(operation="api_keys", **fault)
    report = mass_cancel(crew, EVERYTHING, deadline_s=2.0)
    assert (report["flat"], affected(report)) == (False, set(order_ids))
    assert report["why_not_flat"].startswith("what this key sees is not known: ")
    assert report["key"] is None


def test_once_it_is_known_again_what_the_key_sees_it_is_flat(crew):
    order_ids = crew.place(3)
    crew.control.fault("http_500", operation="api_keys", for_s=2.0)
    report = mass_cancel(crew, EVERYTHING, deadline_s=15.0)
    assert (report["flat"], affected(report)) == (True, set(order_ids))


# -- what the exchange says last


def test_an_order_that_the_exchange_has_restored_is_canceled_again(crew):
    [restored, other] = crew.place(2)
    assert crew.client.cancel(restored).result(timeout=PATIENCE_S).outcome == "canceled"
    crew.control.restore(restored)  # a listing within the read lag proves nothing yet: it is listed again
    report = mass_cancel(crew, EVERYTHING)
    assert report["flat"], report["why_not_flat"]
    assert affected(report) == {restored, other}
    assert resting(crew) == set()


def test_only_what_is_proven_is_summed_up(crew):
    decreased, whole = crew.place(2)
    crew.control.decrease(decreased, to="6.00")
    crew.control.fault("drop_after", order_id=decreased, operation=["cancel", "batch"], times=1)
    report = mass_cancel(crew, EVERYTHING)
    assert report["flat"], report["why_not_flat"]
    counts = {each["order_id"]: each["reduced_by"] for each in report["affected"]}
    assert counts[whole] in ("10.00", None)
    assert counts[decreased] in ("6.00", None)
    proven = sum(Decimal(count) for count in counts.values() if count is not None)
    assert Decimal(report["contracts_canceled"]) == proven
    assert report["orders_count_unknown"] == list(counts.values()).count(None)


def test_a_size_that_a_slow_listing_has_shown_long_ago_proves_nothing(crew):
    for order_id in crew.place(2):  # from then on the worker knows the engine's clock
        assert crew.client.cancel(order_id).result(timeout=PATIENCE_S).outcome == "canceled"
    crew.control.configure(latency_s=0.05)
    [order_id] = crew.place()
    crew.control.fault("slow", operation="list", seconds=2.0, effect="before", times=1)
    crew.control.fault("drop_after", order_id=order_id, operation=["cancel", "batch"], times=1)
    pending = crew.client.mass_cancel(EVERYTHING)
    wait_until(lambda: crew.control.calls("list"), within_s=PATIENCE_S, what="a listing")
    wait_until(
        lambda: time.time() - crew.control.calls("list")[0]["received_ms"] / 1000 > 0.5,
        within_s=PATIENCE_S,
        what="it has seen the order",
    )
    crew.control.decrease(order_id, to="6.00")
    [each] = pending.result(timeout=PATIENCE_S)["affected"]
    assert each["reduced_by"] in ("6.00", None)


def test_a_decrease_meanwhile_is_not_taken_for_a_fill(crew):
    [order_id] = crew.place()
    crew.control.fault("slow", operation=["cancel", "batch"], seconds=1.0, effect="after", times=1)
    pending = crew.client.mass_cancel(EVERYTHING)
    crew.wait_sent(order_id)
    crew.control.decrease(order_id, to="6.00")
    report = pending.result(timeout=PATIENCE_S)
    assert report["affected"] == [{"order_id": order_id, "reduced_by": "6.00"}]
    assert (report["contracts_filled_meanwhile"], report["orders_fills_unknown"]) == ("0.00", 1)


# -- a listing without an end


def test_a_listing_that_gives_a_new_cursor_for_ever_proves_nothing_and_ends(crew):
    placed = crew.place(5)
    crew.control.fault("endless_cursor", operation="list")
    report = mass_cancel(crew, EVERYTHING, deadline_s=2.0)
    assert (report["flat"], affected(report)) == (False, set(placed))
    assert report["why_not_flat"] == "no listing could be had: endless_listing"
    assert len(lists(crew)) < 200, "each listing ends by itself, and they come at a measured pace"


def test_an_endless_listing_of_canceled_orders_or_of_the_archive_holds_nobody_up(crew):
    lost, [unknown] = crew.place(20), ids(1)
    crew.control.fault("endless_cursor")
    crew.control.fault("drop_before", operation="batch", times=1)
    with crew.frozen(*crew.alive()):
        pending = crew.client.cancel_many([*lost, {"order_id": unknown, "deadline_s": 1}])
    outcomes = Counter(each.outcome for each in pending.results(timeout=PATIENCE_S))
    assert outcomes["canceled"] == 20
    assert len(crew.control.calls("list")) + len(crew.control.calls("history")) < 200


def test_a_worker_that_ends_leaves_a_listing_of_many_pages_to_another(crew):
    crew.place(5_000)
    crew.control.fault("slow", operation="list", seconds=1.0)
    [worker] = crew.workers(1)
    pending = crew.client.mass_cancel(EVERYTHING, dry_run=True)
    wait_until(lambda: lists(crew), within_s=PATIENCE_S, what="the first page")
    worker.signal(signal.SIGTERM)
    assert worker.process.wait(PATIENCE_S) == 0
    assert len(lists(crew)) <= 3, "it ends with the page that it is at"
    crew.control.clear_faults()
    crew.workers(1)
    assert pending.result(timeout=PATIENCE_S)["plan"]["orders"] == 5_000


def test_a_listing_ends_with_the_page_at_which_its_time_is_over(crew):
    crew.place(6_000)
    crew.control.fault("slow", operation="list", seconds=1.0)
    report = mass_cancel(crew, EVERYTHING, dry_run=True, deadline_s=2.0)
    assert report["why_not_flat"] == "no listing could be had: no_time"
    assert len(lists(crew)) <= 4


# -- Redis loses data meanwhile


@pytest.mark.parametrize("after", ["the first cancels", "most cancels"])
def test_a_mass_cancel_under_which_redis_loses_everything_accounts_for_all_of_its_orders(crew, after):
    crew.control.configure(latency_s=0.05)
    placed = crew.place(400)
    pending = crew.client.mass_cancel(EVERYTHING, requested_by="risk")
    few = 20 if after == "the first cancels" else 300
    wait_until(lambda: len(resting(crew)) <= 400 - few, within_s=PATIENCE_S, what="some are canceled")
    with crew.redis.client() as server:
        server.flushall()
    report = pending.result(timeout=PATIENCE_S)
    assert (report["flat"], resting(crew)) == (True, set())
    assert affected(report) | reasons(report).keys() == set(placed)
    assert set(reasons(report).values()) <= {"result_lost"}, "nothing is said to be somebody else's"
    assert report["orders_result_lost"] == len(reasons(report))
    assert report["requested_by"] == "risk"
    assert pending.request_id in [request_id for request_id, *_ in crew.client.mass_cancels()]
