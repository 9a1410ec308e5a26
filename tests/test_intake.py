"""A flood of raw messages: taken in together, each answered under its own task id, and none lost."""

from __future__ import annotations

from collections import Counter

import pytest
from celery import Celery
from crew import PATIENCE_S, SENDERS

from trials.stack import wait_until
from worker.broker import guard

FLOOD = 400


@pytest.fixture(scope="module")
def crew_environment():
    return {"KALSHI_BATCH_MOST": ""}


@pytest.fixture
def strangers(crew):
    """A producer that has none of our code."""
    with Celery(broker=crew.redis.url, backend=crew.redis.url, set_as_current=False) as app:
        yield app


def test_a_flood_of_raw_messages_is_taken_in_together_and_each_gets_its_own_result(crew, strangers):
    crew.workers(0)
    order_ids = crew.place(FLOOD)
    sent = {
        each: strangers.send_task("cancel_order", kwargs={"order_id": each}, queue="cancels")
        for each in order_ids
    }
    ugly = strangers.send_task("cancel_order", kwargs={"order_id": "no such/id"}, queue="cancels")
    other = strangers.send_task("wake_up", queue="cancels")
    crew.workers(2)
    values = {each: task.get(timeout=PATIENCE_S) for each, task in sent.items()}
    assert Counter(value["outcome"] for value in values.values()) == {"canceled": FLOOD}
    assert {each: value["order_id"] for each, value in values.items()} == {each: each for each in order_ids}
    assert ugly.get(timeout=PATIENCE_S)["outcome"] == "refused"
    assert other.get(timeout=PATIENCE_S) is None
    assert crew.sent() == Counter(order_ids)
    taken_by_celery = sum(worker.log_text().count("cancel_order[") for worker in crew.alive())
    assert taken_by_celery < FLOOD, "most never went through Celery's loop"
    with crew.redis.client() as server:
        wait_until(lambda: server.llen("cancels") == 0, within_s=PATIENCE_S, what="the queue is empty")


def test_a_flood_survives_the_death_of_who_takes_it_in(crew, strangers):
    crew.workers(0)
    order_ids = crew.place(FLOOD)
    for each in order_ids:
        strangers.send_task("cancel_order", kwargs={"order_id": each}, queue="cancels", ignore_result=True)
    [first, _second] = crew.workers(2)
    crew.wait_many_sent(1)
    first.kill()
    # (What Celery had popped, one for each thread at most, comes back after the visibility timeout.)
    settled = sum(1 for _ in crew.client.results(order_ids, timeout=PATIENCE_S / 3))
    assert settled >= FLOOD - SENDERS


@pytest.mark.parametrize("timing", [{"countdown": 5}, {"expires": 60}])
def test_what_asks_for_a_time_is_left_to_celery(crew, strangers, timing):
    crew.workers(0)
    with crew.redis.client() as server:
        server.delete("cancels")
    for how in ({}, timing):
        strangers.send_task("cancel_order", kwargs={"order_id": "x"}, queue="cancels", **how)
    with crew.redis.client() as server:
        timed, plain = (item.encode() for item in server.lrange("cancels", 0, -1))
        server.delete("cancels")
    assert guard.plain_call(timed, "cancels") is None
    call = guard.plain_call(plain, "cancels")
    assert call is not None
    assert (call.task, call.kwargs) == ("cancel_order", {"order_id": "x"})
    assert guard.plain_call(b"not a message", "cancels") is None
