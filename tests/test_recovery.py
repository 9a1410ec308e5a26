"""What was accepted comes back: after killed and frozen workers, lost messages, passed deadlines."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
from crew import PATIENCE_S

from kalshi_cancel.client import CancelClient, NotSettled
from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.scripts import connect
from trials.stack import wait_until

ROOT = Path(__file__).parent.parent
WORST_S = 5.0  # promised after a worker's death
MEDIAN_S = 3.0
LOST_WAKE_UP_S = 2.0  # promised from claimable to claimed
BACKLOG = 10_000
PROCESSING_S = 0.5  # of an order once it is claimed, on a busy machine


# -- killed


def test_what_killed_workers_had_in_flight_is_settled_by_others_within_seconds(crew):
    """Half of the cancels had taken effect when the worker died, half had not."""
    took_s = []
    for effect in ("none", "before", "none", "before", "before"):
        crew.workers(2)
        [order_id] = crew.place()
        crew.control.fault("hang", order_id=order_id, operation="cancel", effect=effect, times=1)
        victim = crew.in_flight(order_id)
        victim.kill()
        killed = time.monotonic()
        result = crew.client.cancel(order_id).result(timeout=PATIENCE_S)
        took_s.append(time.monotonic() - killed)
        confirmed_by = "cancel" if effect == "none" else "read_back"
        assert (result.outcome, result.confirmed_by) == ("canceled", confirmed_by)
        assert result.reduced_by == (Decimal("10.00") if effect == "none" else None)
        assert result.attempts == crew.sent()[order_id] == 2
    shown = ", ".join(f"{each:.2f}" for each in took_s)
    assert max(took_s) <= WORST_S, f"worst: {shown}"
    assert statistics.median(took_s) <= MEDIAN_S, f"median: {shown}"


def test_what_the_only_worker_had_in_flight_is_settled_by_its_successor(crew):
    [worker] = crew.workers(1)
    [order_id, waiting] = crew.place(2)
    crew.control.fault("hang", order_id=order_id, operation="cancel", effect="before", times=1)
    assert crew.in_flight(order_id) is worker
    worker.kill()
    crew.client.cancel(waiting)
    crew.workers(1)
    started = time.monotonic()
    results = [crew.client.cancel(each).result(timeout=PATIENCE_S) for each in (order_id, waiting)]
    assert time.monotonic() - started <= WORST_S
    assert [result.outcome for result in results] == ["canceled", "canceled"]
    assert [result.confirmed_by for result in results] == ["read_back", "cancel"]


def test_many_cancels_survive_two_of_three_workers_killed_in_the_middle_of_them(crew):
    workers = crew.workers(3)
    order_ids = crew.place(120)
    crew.control.configure(latency_s=0.1)
    pending = crew.client.cancel_many(order_ids)
    for victim, done in zip(workers[:2], (20, 50), strict=True):
        crew.wait_many_sent(done)
        victim.kill()
    results = pending.results(timeout=PATIENCE_S)
    assert Counter(result.outcome for result in results) == {"canceled": 120}
    assert {order["status"] for order in crew.control.orders()} == {"canceled"}
    assert {each.confirmed_by for each in results if each.reduced_by is None} <= {"read_back"}
    assert {result.reduced_by for result in results} <= {None, Decimal("10.00")}


# -- clocks


def test_workers_whose_clocks_differ_by_minutes_take_over_from_each_other_in_time(crew, tmp_path):
    """Each worker's own `time.time()` is set wrong; leases, ages and deadlines go by the server's clock."""
    for name, seconds in (("ahead", 180), ("behind", -240)):
        folder = tmp_path / name
        folder.mkdir()
        shifted = f"import time\nreal = time.time\ntime.time = lambda: real() + {seconds}\n"
        (folder / "sitecustomize.py").write_text(shifted, "utf-8")
    crew.workers(0)
    ahead, behind = (
        crew.stack.start_worker(PYTHONPATH=f"{tmp_path / name}{os.pathsep}{ROOT}")
        for name in ("ahead", "behind")
    )
    order_ids = crew.place(40)
    [hanging] = crew.place()
    crew.control.fault("hang", order_id=hanging, operation="cancel", effect="before", times=1)
    victim = crew.in_flight(hanging)
    results = crew.client.cancel_many(order_ids).results(timeout=PATIENCE_S)
    assert Counter((each.outcome, each.attempts) for each in results) == {("canceled", 1): 40}
    victim.kill()
    killed = time.monotonic()
    result = crew.client.cancel(hanging).result(timeout=PATIENCE_S)
    assert time.monotonic() - killed <= WORST_S
    assert (result.outcome, result.confirmed_by) == ("canceled", "read_back")
    survivor = behind if victim is ahead else ahead
    assert "event=clock_corrected" in survivor.log_text()


# -- frozen


def test_a_worker_frozen_past_its_lease_wakes_and_leaves_the_newer_truth_alone(crew):
    crew.workers(2)
    [order_id] = crew.place()
    crew.control.fault("slow", order_id=order_id, operation="cancel", effect="before", seconds=0.5, times=1)
    sleeper = crew.in_flight(order_id)
    with crew.frozen(sleeper):
        result = crew.client.cancel(order_id).result(timeout=PATIENCE_S)
        assert (result.outcome, result.confirmed_by) == ("canceled", "read_back")
    wait_until(lambda: "event=lease_lost" in sleeper.log_text(), what="the sleeper's notice")
    assert crew.client.status(order_id).result == result
    assert crew.sent()[order_id] == 2
    assert sleeper.process.poll() is None


def test_a_worker_frozen_past_its_lease_sends_no_further_cancel_when_its_call_has_failed(crew):
    crew.workers(2)
    [order_id] = crew.place()
    crew.control.fault("hang", order_id=order_id, operation="cancel", effect="none", times=1)
    sleeper = crew.in_flight(order_id)
    with crew.frozen(sleeper):
        result = crew.client.cancel(order_id).result(timeout=PATIENCE_S)
        assert (result.outcome, result.confirmed_by) == ("canceled", "cancel")
        crew.control.clear_faults()  # the hanging call ends without an answer
    wait_until(lambda: "event=lease_lost" in sleeper.log_text(), what="the sleeper's notice")
    assert crew.client.status(order_id).result == result
    assert crew.sent()[order_id] == 2


def test_a_worker_frozen_past_its_lease_works_on_afterwards(crew):
    [worker] = crew.workers(1)
    [before, after] = crew.place(2)
    crew.control.fault("hang", order_id=before, operation="cancel", effect="none", times=1)
    crew.in_flight(before)
    with crew.frozen(worker):
        crew.client.cancel(after)
        lease_over = lambda: all(each.next_due_s < 0 for each in crew.client.open_cancels())  # noqa: E731 - a condition
        wait_until(lease_over, within_s=PATIENCE_S, what="the lease's end")
    crew.control.clear_faults()
    for order_id in (before, after):
        assert crew.client.cancel(order_id).result(timeout=PATIENCE_S).outcome == "canceled"


# -- lost wake-ups


def test_an_entry_whose_message_was_never_published_is_noticed(crew):
    """As after the death of a producer between its entry and its message."""
    crew.workers(1)
    [order_id] = crew.place()
    settings = RedisSettings.from_env({"REDIS_URL": crew.redis.url})
    with connect(settings) as server:
        CancelStore(server, settings).accept([CancelRequest(order_id)], lane=Lane.RISK, default_deadline_s=10)
    started = time.monotonic()
    assert next(crew.client.results([order_id], timeout=PATIENCE_S)).outcome == "canceled"
    assert time.monotonic() - started <= LOST_WAKE_UP_S + PROCESSING_S


def test_entries_whose_messages_were_all_deleted_are_noticed(crew):
    crew.workers(0)
    order_ids = crew.place(20)
    pending = crew.client.cancel_many(order_ids)
    with crew.redis.client() as server:
        server.delete("cancels", *server.keys("kalshi-cancel:wake_up:*"))
        assert list(crew.client.open_cancels())
    crew.workers(1)
    started = time.monotonic()
    assert {result.outcome for result in pending.results(timeout=PATIENCE_S)} == {"canceled"}
    assert time.monotonic() - started <= LOST_WAKE_UP_S + PROCESSING_S


def test_a_long_backlog_drains_without_one_superfluous_wake_up(crew):
    """What drains by itself needs no wake-ups, however long it is and however long it takes to accept."""
    with crew.apart(workers=2, KALSHI_BATCH_MOST="") as apart:
        workers = apart.start()
        order_ids = crew.place(BACKLOG)
        pending = apart.client.cancel_many(order_ids)
        settled = Counter(result.outcome for result in pending.as_settled(timeout=90))
        assert settled == {"canceled": BACKLOG}
        assert sum(worker.log_text().count("event=lane_woken") for worker in workers) == 0
        assert crew.sent() == Counter(order_ids)


# -- one cancel for everybody who asks


def ask_from_fifty_producers(crew, order_ids):
    """Each order is asked for by five of fifty producers; the results each waiter got, by order."""
    found = {order_id: [] for order_id in order_ids}
    ready = threading.Barrier(51)
    problems = []

    def produce(me):
        client = CancelClient(crew.redis.url, requested_by=f"producer-{me}")
        mine = [order_id for at, order_id in enumerate(order_ids) if me in askers(at)]
        try:
            ready.wait()
            pending = client.cancel_many(mine)
            for result in pending.results(timeout=PATIENCE_S):
                found[result.order_id].append(result)
        except (OSError, NotSettled, threading.BrokenBarrierError) as problem:
            problems.append(problem)
        finally:
            client.close()

    producers = [threading.Thread(target=produce, args=(me,)) for me in range(50)]
    for producer in producers:
        producer.start()
    ready.wait()
    yield
    for producer in producers:
        producer.join()
    assert problems == []
    yield found


def askers(at):
    return {(at + 10 * k) % 50 for k in range(5)}


def test_one_cancel_is_sent_however_many_producers_ask_at_once(crew):
    crew.workers(2)
    order_ids = crew.place(100)
    asking = ask_from_fifty_producers(crew, order_ids)
    next(asking)
    found = next(asking)
    assert crew.sent() == Counter(order_ids)
    for results in found.values():
        assert len(results) == 5
        assert len({str(result.to_json()) for result in results}) == 1
        assert results[0].outcome == "canceled"


def test_everybody_who_asked_before_it_was_settled_is_named_in_the_one_result(crew):
    workers = crew.workers(2)
    order_ids = crew.place(100)
    with crew.frozen(*workers):
        asking = ask_from_fifty_producers(crew, order_ids)
        next(asking)
        everybody = lambda: sum(len(each.requested_by) for each in crew.client.open_cancels()) == 500  # noqa: E731 - a condition
        wait_until(everybody, within_s=PATIENCE_S, what="500 requests accepted")
    found = next(asking)
    assert crew.sent() == Counter(order_ids)
    for at, order_id in enumerate(order_ids):
        assert len(found[order_id]) == 5
        assert len({str(result.to_json()) for result in found[order_id]}) == 1
        assert set(found[order_id][0].requested_by) == {f"producer-{me}" for me in askers(at)}


def test_a_second_request_while_the_first_is_in_flight_joins_it(crew):
    crew.workers(2)
    [order_id] = crew.place()
    crew.control.fault("slow", order_id=order_id, operation="cancel", seconds=0.7, times=1)
    crew.in_flight(order_id)
    second = crew.client.cancel(order_id, requested_by="risk", lane=Lane.RISK)
    result = second.result(timeout=PATIENCE_S)
    assert (result.outcome, result.requested_by, result.attempts) == ("canceled", ("test", "risk"), 1)
    assert crew.sent()[order_id] == 1


def test_a_waiting_cancel_asked_for_by_risk_is_the_next_one_sent(crew):
    order_ids = crew.place(30)
    with crew.apart("-c", "1") as apart:
        apart.client.cancel_many(order_ids)
        urgent = apart.client.cancel(order_ids[-1], requested_by="risk", lane=Lane.RISK)
        apart.start()
        assert urgent.result(timeout=PATIENCE_S).requested_by == ("mm", "risk")
        wait_until(lambda: not list(apart.client.open_cancels()), within_s=PATIENCE_S, what="all settled")
    assert crew.cancels()[0]["order_ids"] == order_ids[-1:]
    assert crew.sent() == Counter(order_ids)


# -- unresolved, and given up


@pytest.mark.parametrize("kind", ["http_500", "hang"])
def test_a_cancel_past_its_deadline_is_unresolved_for_its_waiter_and_worked_on_until_settled(crew, kind):
    crew.workers(1)
    [order_id] = crew.place()
    crew.control.fault(kind, order_id=order_id)
    asked = time.monotonic()
    result = crew.client.cancel(order_id, deadline_s=0.5).result(timeout=PATIENCE_S)
    assert time.monotonic() - asked < 5  # its own deadline, not the default of ten seconds
    assert (result.outcome, result.status, result.reduced_by) == ("unresolved", None, None)
    status = crew.client.status(order_id)
    assert status.open.unresolved
    assert status.result == result
    crew.control.clear_faults()
    wait_until(lambda: crew.client.status(order_id).result.outcome == "canceled", within_s=PATIENCE_S)
    assert crew.client.status(order_id).open is None
    assert crew.client.status(order_id).result.attempts == crew.sent()[order_id]


def test_asking_again_for_an_unresolved_order_tries_it_at_once_and_waits_for_the_new_outcome(crew):
    crew.workers(1)
    [order_id] = crew.place()
    crew.control.fault("http_500", order_id=order_id)
    assert crew.client.cancel(order_id, deadline_s=2).result(timeout=PATIENCE_S).outcome == "unresolved"
    crew.control.clear_faults()
    asked = time.monotonic()
    result = crew.client.cancel(order_id, requested_by="again").result(timeout=PATIENCE_S)
    assert (result.outcome, result.requested_by) == ("canceled", ("test", "again"))
    assert time.monotonic() - asked <= LOST_WAKE_UP_S + PROCESSING_S


def test_what_is_unresolved_for_too_long_is_a_dead_letter_with_its_history_until_asked_for_again(crew):
    retried, asked_again = crew.place(2)
    with crew.apart(KALSHI_CANCEL_MAX_AGE_S="1") as apart:
        apart.start()
        client = apart.client
        for order_id in (retried, asked_again):
            crew.control.fault("http_500", order_id=order_id)
            told = client.cancel(order_id, deadline_s=0.3).result(timeout=PATIENCE_S)
            assert told.outcome == "unresolved"
        wait_until(lambda: len(list(client.dead_letters())) == 2, within_s=PATIENCE_S, what="given up")
        letters = {letter.order_id: letter for letter in client.dead_letters()}
        for order_id in (retried, asked_again):
            assert client.status(order_id).open is None
            assert client.status(order_id).result.outcome == "unresolved"
            progress = letters[order_id].progress
            assert progress.attempts == crew.sent()[order_id] >= 2
            assert progress.last_problem.http_status == 500
            assert len(progress.history) >= 2
        assert client.retry([retried, "nobody"]) == [retried]
        assert [letter.order_id for letter in client.dead_letters()] == [asked_again]
        crew.control.clear_faults()
        assert client.cancel(asked_again).result(timeout=PATIENCE_S).outcome == "canceled"
        [result] = client.results([retried], timeout=PATIENCE_S)
        assert result.outcome == "canceled"
        assert list(client.dead_letters()) == []
