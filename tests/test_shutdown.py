"""SIGTERM: what is claimed is finished or put back at once, within a bounded time, and nothing twice."""

from __future__ import annotations

import signal
import time
from collections import Counter

import pytest
from crew import PATIENCE_S, wait_idle, wait_ready

from trials.stack import wait_until

SHUTDOWN_S = 8.0  # promised by default
EXIT_S = 1.0  # of a process that has nothing left to do, on a busy machine


@pytest.fixture
def crew(crew):
    """Without workers."""
    crew.workers(0)
    return crew


def terminate(worker, *, within_s):
    """Sends SIGTERM; the seconds that it took to end, with exit code 0."""
    asked = time.monotonic()
    worker.signal(signal.SIGTERM)
    assert worker.process.wait(PATIENCE_S) == 0, worker.log_text()[-2000:]
    took_s = time.monotonic() - asked
    assert took_s <= within_s, f"{took_s:.1f} s"
    return took_s


def all_given_back(crew):
    """Nothing is claimed: the next worker need not wait for any lease."""
    held = list(crew.client.open_cancels())
    assert not any(each.claimed for each in held)
    return held


def test_an_idle_worker_ends_at_once_with_exit_code_zero(crew):
    [worker] = crew.workers(1)
    terminate(worker, within_s=3.0)


def test_a_worker_that_has_just_worked_ends_at_once_with_exit_code_zero(crew):
    [worker] = crew.workers(1)
    results = crew.client.cancel_many(crew.place(20)).results(PATIENCE_S)
    assert Counter(result.outcome for result in results) == {"canceled": 20}
    terminate(worker, within_s=3.0)


def test_nothing_is_claimed_for_an_idle_worker_that_has_ended(crew):
    [worker] = crew.workers(1)
    wait_idle(crew.client, 1)
    terminate(worker, within_s=3.0)
    [order_id] = crew.place()
    pending = crew.client.cancel(order_id)
    assert not crew.client.status(order_id).open.claimed
    wait_ready(crew.stack.spawn_worker("-P", "processes", "-c", "2"))
    result = pending.result(timeout=PATIENCE_S)
    assert (result.outcome, result.attempts) == ("canceled", 1)


def test_a_call_in_flight_is_finished_and_its_result_stored_before_the_end(crew):
    [worker] = crew.workers(1)
    [order_id] = crew.place()
    crew.control.fault("slow", order_id=order_id, operation="cancel", effect="after", seconds=1.5)
    crew.in_flight(order_id)
    terminate(worker, within_s=SHUTDOWN_S + EXIT_S)
    assert crew.client.status(order_id).open is None
    result = crew.client.status(order_id).result
    assert (result.outcome, result.confirmed_by, result.attempts) == ("canceled", "cancel", 1)
    assert crew.sent()[order_id] == 1


def test_a_worker_that_is_told_to_end_while_it_starts_claims_nothing_and_ends_in_time(crew):
    order_ids = crew.place(20)
    crew.control.fault("hang", operation="limits", effect="none")
    worker = crew.stack.spawn_worker()
    wait_until(lambda: crew.control.calls("limits"), within_s=PATIENCE_S, what="its first call")
    pending = crew.client.cancel_many([{"order_id": each, "deadline_s": 60} for each in order_ids])
    terminate(worker, within_s=SHUTDOWN_S + EXIT_S)
    assert crew.sent() == Counter()
    assert len(all_given_back(crew)) == len(order_ids)
    crew.control.clear_faults()
    crew.workers(1)
    assert {result.outcome for result in pending.results(timeout=PATIENCE_S)} == {"canceled"}


def test_many_waiting_cancels_are_left_to_the_next_worker_without_waiting_for_a_lease(crew):
    [worker] = crew.workers(1)
    order_ids = crew.place(60)
    crew.control.configure(latency_s=0.5)
    crew.client.cancel_many(order_ids)
    crew.wait_many_sent(5)
    terminate(worker, within_s=SHUTDOWN_S + EXIT_S)
    waiting = all_given_back(crew)
    assert 0 < len(waiting) == 60 - crew.sent().total(), "each is settled, or was not sent"
    crew.control.configure(latency_s=0.0)
    crew.workers(1)
    results = [crew.client.cancel(each).result(timeout=PATIENCE_S) for each in order_ids]
    assert Counter(result.outcome for result in results) == {"canceled": 60}
    assert {result.attempts for result in results} == {1}
    assert crew.sent() == Counter(order_ids)


def test_an_order_that_is_asked_again_and_again_is_given_back(crew):
    [worker] = crew.workers(1)
    [order_id] = crew.place()
    crew.control.fault("http_503", order_id=order_id, operation="cancel")
    crew.client.cancel(order_id, deadline_s=60)
    crew.wait_sent(order_id, times=2)
    terminate(worker, within_s=3.0)
    [waiting] = all_given_back(crew)
    assert waiting.progress.attempts == crew.sent()[order_id]
    assert waiting.progress.last_problem.http_status == 503
    crew.control.clear_faults()
    crew.workers(1)
    result = crew.client.cancel(order_id).result(timeout=PATIENCE_S)
    assert (result.outcome, result.attempts) == ("canceled", waiting.progress.attempts + 1)


def test_a_worker_that_holds_everything_back_ends_at_once(crew):
    [worker] = crew.workers(1)
    order_ids = crew.place(10)
    crew.control.configure(exchange_paused=True)
    crew.client.cancel_many([{"order_id": each, "deadline_s": 60} for each in order_ids])
    wait_until(crew.client.held_back, within_s=PATIENCE_S, what="the breaker opened")
    terminate(worker, within_s=3.0)
    assert len(all_given_back(crew)) == 10
    crew.control.configure(exchange_paused=False)
    crew.workers(1)
    results = [crew.client.cancel(each).result(timeout=PATIENCE_S) for each in order_ids]
    assert Counter(result.outcome for result in results) == {"canceled": 10}


def test_a_call_that_hangs_does_not_keep_a_worker_beyond_its_limit(crew):
    limits = {"KALSHI_SHUTDOWN_S": "2", "KALSHI_CALL_DEADLINE_S": "30", "KALSHI_READ_TIMEOUT_S": "30"}
    worker = crew.stack.start_worker(**limits)
    [order_id] = crew.place()
    crew.control.fault("hang", order_id=order_id, operation="cancel", effect="before", times=1)
    crew.client.cancel(order_id, deadline_s=60)
    crew.wait_sent(order_id)
    terminate(worker, within_s=2.0 + EXIT_S)
    assert crew.client.status(order_id).open is not None
    crew.workers(1)
    result = crew.client.cancel(order_id).result(timeout=PATIENCE_S)  # its lease is over by and by
    assert (result.outcome, result.confirmed_by, result.attempts) == ("canceled", "read_back", 2)


@pytest.mark.parametrize("outage", ["silent", "gone"])
def test_a_worker_without_redis_ends_within_its_limit(crew, outage):
    [worker] = crew.workers(1)
    if outage == "silent":
        with crew.frozen(crew.redis.part):
            terminate(worker, within_s=SHUTDOWN_S + EXIT_S)
    else:
        crew.redis.kill()
        wait_until(lambda: "event=redis_unavailable" in worker.log_text(), what="the outage noticed")
        terminate(worker, within_s=SHUTDOWN_S + EXIT_S)
        crew.redis.start()


@pytest.mark.parametrize("outage", ["silent", "gone"])
def test_a_call_in_flight_when_redis_goes_and_the_worker_must_end_is_settled_rightly_by_the_next(
    crew, outage
):
    [worker] = crew.workers(1)
    [order_id] = crew.place()
    crew.control.fault("slow", order_id=order_id, operation="cancel", effect="before", seconds=0.5)
    crew.in_flight(order_id)
    if outage == "silent":
        with crew.frozen(crew.redis.part):
            terminate(worker, within_s=SHUTDOWN_S + EXIT_S)
    else:
        crew.redis.kill()
        terminate(worker, within_s=SHUTDOWN_S + EXIT_S)
        crew.redis.start()
    crew.workers(1)
    result = crew.client.cancel(order_id).result(timeout=PATIENCE_S)
    assert result.outcome == "canceled"
    if outage == "gone":  # (A server that was only silent may find the worker's last words in its socket.)
        assert result.confirmed_by == "read_back"
    assert crew.effective()[order_id] == 1


def test_workers_that_are_replaced_one_after_the_other_lose_nothing_and_do_nothing_twice(crew):
    """As in a rolling deployment, under load."""
    first, second = crew.workers(2)
    order_ids = crew.place(300)
    crew.control.configure(latency_s=0.05)
    pending = crew.client.cancel_many(order_ids)
    crew.wait_many_sent(40)
    terminate(first, within_s=SHUTDOWN_S + EXIT_S)
    crew.workers(2)
    terminate(second, within_s=SHUTDOWN_S + EXIT_S)
    results = pending.results(PATIENCE_S)
    assert Counter((result.outcome, result.attempts) for result in results) == {("canceled", 1): 300}
    assert crew.sent() == Counter(order_ids)
