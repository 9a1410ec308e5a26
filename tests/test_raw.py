"""Raw messages of a producer that has none of our code: none is lost, whoever is killed or cut off."""

from __future__ import annotations

import json
import random
import threading
import time
from contextlib import contextmanager

import pytest
from celery import Celery
from crew import PATIENCE_S

from trials.campaign.relay import Relay
from trials.stack import wait_until

BLOWS = 5
MESSAGES = 1_000
UNANSWERED_MOST = 100  # so that each blow falls while messages are in all stages


@pytest.fixture
def stranger(crew):
    with Celery(broker=crew.redis.url, set_as_current=False) as app:
        yield app


def publish(stranger, order_id, **how):
    return stranger.send_task("cancel_order", kwargs={"order_id": order_id}, queue="cancels", **how).id


class Answers:
    """Every result that is published, by task id."""

    def __init__(self, crew):
        self._crew = crew
        self.told = {}

    @contextmanager
    def listening(self):
        with self._crew.redis.client() as server, server.pubsub(ignore_subscribe_messages=True) as channel:
            channel.psubscribe("celery-task-meta-*")
            ended = threading.Event()

            def listen():
                while not ended.is_set():
                    if message := channel.get_message(timeout=0.1):
                        value = json.loads(message["data"])
                        said = value["result"]["outcome"] if value["status"] == "SUCCESS" else value["status"]
                        self.told.setdefault(value["task_id"], set()).add(said)

            thread = threading.Thread(target=listen)
            thread.start()
            try:
                yield self
            finally:
                ended.set()
                thread.join()


def flow_under(crew, stranger, strike):
    """Has raw messages flow while blows fall; what became of them: orders without result, told by task id."""
    order_ids = crew.place(MESSAGES)
    answers, sent = Answers(crew), {}

    def flow():
        for order_id in order_ids:
            wait_until(lambda: len(sent) - len(answers.told) < UNANSWERED_MOST, within_s=PATIENCE_S)
            sent[publish(stranger, order_id)] = order_id

    with answers.listening():
        flowing = threading.Thread(target=flow)
        flowing.start()
        for at in sorted(random.sample(range(1, MESSAGES), BLOWS)):
            wait_until(lambda at=at: len(sent) >= at, within_s=PATIENCE_S, what=f"{at} messages")
            strike()
        flowing.join()
        open_orders, give_up = dict.fromkeys(order_ids), time.monotonic() + PATIENCE_S
        while open_orders and time.monotonic() < give_up:
            results = (crew.client.status(each).result for each in list(open_orders))
            for each in [result.order_id for result in results if result]:
                open_orders.pop(each)
        wait_until(lambda: open_orders or answers.told.keys() >= sent.keys(), what="each task has its answer")
    return list(open_orders), [told for told in answers.told.values() if told != {"canceled"}]


def test_no_raw_message_is_lost_when_workers_are_killed_again_and_again(crew, stranger):
    crew.workers(2)

    def strike():
        random.choice(crew.alive()).kill()
        crew.stack.spawn_worker()

    assert flow_under(crew, stranger, strike) == ([], [])


def test_no_raw_message_is_lost_when_connections_are_cut_again_and_again(crew, stranger):
    crew.workers(2)

    def strike():
        with crew.redis.client() as server:
            server.client_kill_filter(_type="normal", skipme=True)

    assert flow_under(crew, stranger, strike) == ([], [])


def settle_one(crew, stranger):
    """Has the workers settle a raw message, so that all connections are there and everybody is idle again."""
    [order_id] = crew.place()
    publish(stranger, order_id)
    assert [each.outcome for each in crew.client.results([order_id], timeout=PATIENCE_S)] == ["canceled"]


def test_what_reaches_a_queue_while_its_only_worker_is_frozen_is_there_when_that_is_killed(crew, stranger):
    for _ in range(3):
        [sleeper] = crew.workers(1)
        settle_one(crew, stranger)
        [order_id] = crew.place()
        with crew.frozen(sleeper):
            publish(stranger, order_id)
            sleeper.kill()
        crew.workers(1)
        assert [each.outcome for each in crew.client.results([order_id], timeout=PATIENCE_S)] == ["canceled"]


def test_what_reaches_a_queue_while_its_only_worker_is_cut_off_is_there_for_the_next(crew, stranger):
    for _ in range(3):
        crew.workers(0)
        with Relay(crew.redis.port) as relay:
            worker = crew.stack.start_worker(REDIS_URL=f"redis://127.0.0.1:{relay.port}/0")
            settle_one(crew, stranger)
            [order_id] = crew.place()
            relay.cut()
            publish(stranger, order_id)
            worker.kill()
            crew.workers(1)
            assert [each.outcome for each in crew.client.results([order_id], timeout=PATIENCE_S)] == [
                "canceled"
            ]
