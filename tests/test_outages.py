"""Outages of Redis and of the exchange: what was accepted is held, and goes on when they are back."""

from __future__ import annotations

import time
from collections import Counter
from decimal import Decimal

import pytest
from crew import PATIENCE_S

from kalshi_cancel.store.scripts import StoreError
from trials.stack import free_port, wait_until

NOT_STORED = 'event=redis_unavailable Redis unavailable doing="store results" why='
RESUMED_S = 3.0  # promised after Redis is back
EXCHANGE_BACK_S = 2.0  # promised after the exchange is back
PROCESSING_S = 0.5  # of a few orders, on a busy machine
PRODUCER_S = 2.0  # promised to a producer, whatever Redis does


@pytest.fixture
def crew(crew):
    """With two workers."""
    crew.workers(2)
    return crew


def all_canceled(crew, order_ids):
    """Every order has the one true result: canceled, by us, with one effective cancel."""
    results = [crew.client.cancel(order_id).result(timeout=PATIENCE_S) for order_id in order_ids]
    assert Counter(result.outcome for result in results) == {"canceled": len(order_ids)}
    assert {each.confirmed_by for each in results if each.reduced_by is None} <= {"read_back"}
    assert {each.reduced_by for each in results} <= {None, Decimal("10.00")}
    effective = crew.effective()
    assert {order_id: effective[order_id] for order_id in order_ids} == dict.fromkeys(order_ids, 1)
    assert {crew.control.order(order_id)["status"] for order_id in order_ids} == {"canceled"}


def one_more_within(crew, seconds):
    """A fresh cancel is settled within so many seconds from now."""
    [order_id] = crew.place()
    asked = time.monotonic()
    while True:
        try:
            pending = crew.client.cancel(order_id)
            break
        except StoreError:
            assert time.monotonic() - asked < seconds
    assert pending.result(timeout=PATIENCE_S).outcome == "canceled"
    took_s = time.monotonic() - asked
    assert took_s <= seconds, f"resumed after {took_s:.1f} s"


# -- Redis


def test_redis_killed_and_restarted_loses_nothing_and_work_resumes_within_three_seconds(crew):
    order_ids = crew.place(200)
    crew.control.configure(latency_s=0.1)
    crew.client.cancel_many(order_ids)
    with crew.redis.client() as server:
        crew.wait_many_sent(30)
        server.set("the last word", 1)
        assert server.waitaof(1, 0, 5000)[0] == 1  # what a lost disk would lose is not the subject
    crew.redis.kill()
    down = time.monotonic()
    wait_until(lambda: time.monotonic() - down > 1.0, what="an outage of a second")
    crew.redis.start()
    crew.control.configure(latency_s=0.0)
    one_more_within(crew, RESUMED_S)
    all_canceled(crew, order_ids)


def test_redis_silent_for_three_seconds_loses_nothing_and_work_resumes(crew):
    order_ids = crew.place(60)
    crew.control.configure(latency_s=0.1)
    crew.client.cancel_many(order_ids)
    crew.wait_many_sent(10)
    with crew.frozen(crew.redis.part):
        silent = time.monotonic()
        with pytest.raises(StoreError) as told:
            crew.client.cancel(order_ids[0])
        assert told.value.may_be_accepted
        assert time.monotonic() - silent <= PRODUCER_S
        wait_until(lambda: time.monotonic() - silent > 3.0, what="a silence of three seconds")
    one_more_within(crew, RESUMED_S)
    all_canceled(crew, order_ids)
    assert len(crew.alive()) == 2


def test_every_connection_to_redis_killed_again_and_again_disturbs_nothing(crew):
    order_ids = crew.place(100)
    crew.control.configure(latency_s=0.05)
    crew.client.cancel_many(order_ids)
    with crew.redis.client() as server:
        for sent in (10, 30, 50):
            crew.wait_many_sent(sent)
            for kind in ("normal", "pubsub"):
                server.client_kill_filter(_type=kind, skipme=True)
    one_more_within(crew, RESUMED_S)
    all_canceled(crew, order_ids)
    assert len(crew.alive()) == 2


@pytest.mark.parametrize("refusal", ["out of memory", "read-only"])
def test_a_redis_that_refuses_writes_is_told_to_producers_and_waited_out_by_workers(crew, refusal):
    [in_flight, fresh] = crew.place(2)
    crew.control.fault("slow", order_id=in_flight, operation="cancel", seconds=1.0, times=1)
    crew.in_flight(in_flight)
    with crew.redis.client() as server:
        if refusal == "out of memory":
            server.config_set("maxmemory", 1)
        else:
            server.replicaof("127.0.0.1", free_port())
        refused = time.monotonic()
        with pytest.raises(StoreError) as told:
            crew.client.cancel(fresh)
        assert not told.value.may_be_accepted
        assert time.monotonic() - refused <= PRODUCER_S
        wait_until(lambda: time.monotonic() - refused > 3.5, what="longer than the call and the lease")
        assert len(crew.alive()) == 2
        if refusal == "out of memory":
            server.config_set("maxmemory", 0)
        else:
            server.replicaof("NO", "ONE")
    one_more_within(crew, RESUMED_S)
    all_canceled(crew, [in_flight, fresh])


@pytest.mark.parametrize("outage", ["silent", "killed"])
def test_a_result_that_cannot_be_stored_is_stored_when_redis_is_back(crew, outage):
    """Redis goes while the call is in flight; the exchange says "canceled" only once."""
    crew.workers(1)
    [order_id] = crew.place()
    crew.control.fault("slow", order_id=order_id, operation="cancel", effect="before", seconds=1.0, times=1)
    worker = crew.in_flight(order_id)
    answered = lambda: crew.cancels()[0]["status"] == 200  # noqa: E731 - a condition
    if outage == "silent":
        with crew.frozen(crew.redis.part):
            wait_until(answered, what="the exchange's answer")
            wait_until(
                lambda: NOT_STORED in worker.log_text(),
                what="a try to store it",
            )
    else:
        crew.redis.kill()
        wait_until(answered, what="the exchange's answer")
        wait_until(
            lambda: NOT_STORED in worker.log_text(),
            what="a try to store it",
        )
        crew.redis.start()
    back = time.monotonic()
    result = wait_until(lambda: crew.client.status(order_id).result, within_s=PATIENCE_S)
    assert time.monotonic() - back <= RESUMED_S
    assert result.outcome == "canceled"
    assert result.reduced_by in {None, Decimal("10.00")}
    all_canceled(crew, [order_id])
    one_more_within(crew, RESUMED_S)


# -- the exchange


def held_back(crew):
    return set(crew.client.held_back().values())


def patient(order_ids):
    """Requests whose waiters have a minute."""
    return [{"order_id": order_id, "deadline_s": 60} for order_id in order_ids]


def wait_while_held(client, *, seconds):
    """Waits so many seconds and asserts that nothing was settled and nothing is claimed at their end."""
    since, waiting = time.monotonic(), len(list(client.open_cancels()))
    wait_until(lambda: time.monotonic() - since > seconds, what=f"an outage of {seconds:g} s")
    held = list(client.open_cancels())
    assert len(held) == waiting
    assert not any(each.claimed for each in held)
    return held


def test_an_exchange_that_is_gone_is_not_hammered_and_work_resumes_within_two_seconds_of_its_return(crew):
    order_ids = sorted(crew.place(50))
    crew.stack.exchange.kill()
    try:
        crew.client.cancel_many(patient(order_ids))
        wait_until(lambda: held_back(crew) == {"unreachable"}, within_s=PATIENCE_S, what="the breaker opened")
        held = wait_while_held(crew.client, seconds=5.0)
        assert len(held) == 50
        assert max(each.progress.attempts for each in held) <= 12
    finally:
        crew.stack.start_exchange()
    crew.control.place_many([{"order_id": order_id} for order_id in order_ids])
    back = time.monotonic()
    wait_until(crew.cancels, within_s=PATIENCE_S, what="the first cancel sent")
    assert time.monotonic() - back <= EXCHANGE_BACK_S
    wait_until(lambda: not held_back(crew), within_s=PATIENCE_S, what="the breakers closed")
    all_canceled(crew, order_ids)


@pytest.mark.parametrize("pause_status", [409, 503])
def test_a_paused_exchange_is_asked_for_its_status_and_cancels_go_on_in_order_when_it_is_back(
    crew, pause_status
):
    order_ids = sorted(crew.place(60))  # accepted in one step, so equally old, they are served by their ids
    with crew.apart("-c", "1") as apart:  # one sender: what it claims in order, it sends in order
        apart.start()
        client = apart.client
        crew.control.configure(exchange_paused=True, pause_status=pause_status)
        pending = client.cancel_many(patient(order_ids))
        closed = lambda: set(client.held_back().values()) == {"paused"}  # noqa: E731 - a condition
        wait_until(closed, within_s=PATIENCE_S, what="the breaker opened")
        before = len(crew.cancels())
        [impatient] = crew.place()
        told = client.cancel(impatient, deadline_s=0.1).result(PATIENCE_S)
        assert (told.outcome, told.error.code) == ("unresolved", "exchange_paused")
        looks = len(crew.control.calls(operation="status"))
        wait_while_held(client, seconds=4.0)
        looks = len(crew.control.calls(operation="status")) - looks
        assert len(crew.cancels()) == before <= 5
        assert 3 <= looks <= 6, "about once a second"
        crew.control.configure(exchange_paused=False)
        back = time.monotonic()
        wait_until(lambda: len(crew.cancels()) > before, within_s=PATIENCE_S, what="the first cancel sent")
        assert time.monotonic() - back <= EXCHANGE_BACK_S
        assert {result.outcome for result in pending.results(PATIENCE_S)} == {"canceled"}
        crew.wait_settled(impatient, apart.client)
    assert list(crew.effective()) == [*order_ids, impatient]


def test_a_status_page_that_does_not_answer_holds_no_cancels_while_the_exchange_does(crew):
    crew.control.fault("cdn", operation="status")
    crew.control.fault("drop_before", operation=["cancel", "batch", "read"], times=20)
    order_ids = crew.place(8)
    pending = [crew.client.cancel(order_id, deadline_s=15) for order_id in order_ids]
    assert {each.result(timeout=PATIENCE_S).outcome for each in pending} == {"canceled"}
    assert crew.control.calls("status"), "it was held back, and looked after"


def test_a_pause_of_one_shard_holds_no_other_shard(crew):
    paused, others = crew.place(3, exchange_index=2), crew.place(30, exchange_index=1)
    crew.control.configure(exchange_paused=[2])
    for order_id in paused:
        crew.client.cancel(order_id, exchange_index=2, deadline_s=60)
    for order_id in paused:
        crew.wait_sent(order_id)
    asked = time.monotonic()
    pending = crew.client.cancel_many([{"order_id": each, "exchange_index": 1} for each in others])
    assert Counter(result.outcome for result in pending.results(PATIENCE_S)) == {"canceled": 30}
    assert time.monotonic() - asked <= EXCHANGE_BACK_S
    assert {each.order_id for each in crew.client.open_cancels()} == set(paused)
    crew.control.configure(exchange_paused=False)
    back = time.monotonic()
    all_canceled(crew, paused)
    assert time.monotonic() - back <= EXCHANGE_BACK_S + PROCESSING_S


@pytest.mark.parametrize("trouble", ["no such name", "no TLS there"])
def test_a_worker_whose_exchange_cannot_be_reached_starts_and_holds_and_says_so(crew, trouble):
    base_url = "https://nonexistent.invalid"
    if trouble == "no TLS there":
        base_url = crew.control.url.replace("http:", "https:")
    order_ids = crew.place(20)
    with crew.apart(KALSHI_BASE_URL=base_url) as apart:
        [worker] = apart.start()
        client = apart.client
        pending = client.cancel_many([{"order_id": order_id, "deadline_s": 1.5} for order_id in order_ids])
        results = pending.results(PATIENCE_S)
        assert Counter(result.outcome for result in results) == {"unresolved": 20}
        assert {result.error.code for result in results} <= {"not_sent", "exchange_unreachable", "no_answer"}
        wait_until(lambda: set(client.held_back().values()) == {"unreachable"}, within_s=PATIENCE_S)
        held = list(client.open_cancels())
        assert len(held) == 20
        assert max(each.progress.attempts for each in held) <= 12
        assert worker.process.poll() is None
    assert crew.cancels() == []
