"""Parts of a mass cancel that somebody has spoilt, or a newer version has written, keep no order resting."""

from __future__ import annotations

import json
import uuid

import pytest
import redis
from celery import Celery
from crew import PATIENCE_S

from trials.stack import wait_until

PREFIX = "kalshi-cancel"
PACE = f"{PREFIX}:mass_cancels:pace"


@pytest.fixture(scope="module")
def scene(shared_crew):
    """A database with one worker: its client, its Redis, and the worker."""
    with shared_crew.apart() as apart:
        [worker] = apart.start()
        with redis.Redis.from_url(apart.url, decode_responses=True) as server:
            yield apart.client, server, worker


def of_another_kind(part):
    return lambda server, key: server.sadd(f"{key}:{part}", "what is this?")


def field(name, value):
    return lambda server, key: server.hset(key, name, value)


def planned(text):
    return lambda server, key: server.hset(f"{key}:orders", "of-another", text)


def request(**fields):
    def spoil(server, key):
        asked = json.loads(server.hget(key, "request"))
        server.hset(key, "request", json.dumps({**asked, **fields}))

    return spoil


SPOILT = {
    "its orders of another kind": of_another_kind("orders"),
    "what is left of another kind": of_another_kind("left"),
    "its lease of another kind": of_another_kind("lease"),
    "a lease without an end": lambda server, key: server.set(f"{key}:lease", "somebody"),
    "its waiters of another kind": lambda server, key: server.set(f"{key}:waiters", "?"),
    "no JSON in the plan": field("plan", "{oops"),
    "a plan of another form": field("plan", '{"of": 2030}'),
    "no JSON in its beginning": field("begun", "{oops"),
    "a beginning of another form": field("begun", '{"of": 2030}'),
    "a list in its beginning": field("begun", "[1]"),
    "no JSON in its progress": field("progress", "{oops"),
    "no number of tokens": field("spent", "lots"),
    "no token": field("fence", "abc"),
    "no moment": field("entered_ms", "soon"),
    "an order noted in another form": planned('{"remaining": "1"}'),
    "an order noted without anything": planned("[]"),
    "an order noted with more": planned('["1", "0", false, false, false, true]'),
    "a request field more": request(urgency={"of": 2030}),
    "no pace": lambda server, _: server.set(PACE, "fast"),
    "a pace of another kind": lambda server, _: (server.delete(PACE), server.rpush(PACE, 1)),
}


def ask(crew, scene, spoil, **fields):
    """A mass cancel of two resting orders, of which something is spoilt before any worker takes it."""
    client, server, worker = scene
    ticker = f"KXSPOILT-{uuid.uuid4().hex[:6].upper()}"
    order_ids = crew.place(2, ticker=ticker)
    with crew.frozen(worker):
        pending = client.mass_cancel({"tickers": [ticker]}, deadline_s=20, **fields)
        spoil(server, f"{PREFIX}:mass:{pending.request_id}")
    return pending, order_ids


@pytest.mark.parametrize("what", SPOILT)
def test_a_mass_cancel_of_which_a_part_is_spoilt_cancels_all_the_same(crew, scene, what):
    pending, order_ids = ask(crew, scene, SPOILT[what])
    report = pending.result(timeout=PATIENCE_S)
    assert report["flat"] is True, report
    assert {crew.control.order(each)["status"] for each in order_ids} == {"canceled"}
    assert "Traceback" not in scene[2].log_text()
    scene[1].delete(PACE)


def test_a_command_that_another_version_has_noted_may_have_been_sent(crew, scene):
    client, server, worker = scene
    order_ids = crew.place(2)
    with crew.frozen(worker):
        pending = client.mass_cancel({"everything": True}, deadline_s=20, allow_side_effects=True)
        server.hset(f"{PREFIX}:mass:{pending.request_id}", "command", '{"of": 2030}')
    report = pending.result(timeout=PATIENCE_S)
    assert report["flat"] is True
    assert report["command"]["answer"] == "unanswered"
    assert {crew.control.order(each)["status"] for each in order_ids} == {"canceled"}


@pytest.mark.parametrize("fields", [{"deadline_s": "soon"}, {"dry_run": "no"}, {"scope": {"of": 2030}}])
def test_a_request_whose_fields_cannot_be_meant_is_answered_by_name_and_nothing_is_canceled(
    crew, scene, fields
):
    pending, order_ids = ask(crew, scene, request(**fields))
    report = pending.result(timeout=PATIENCE_S)
    assert report["flat"] is False
    assert "cannot be read" in json.dumps(report)
    assert {crew.control.order(each)["status"] for each in order_ids} == {"resting"}


def test_what_redis_refuses_for_good_in_the_middle_is_reported_and_not_tried_for_ever(crew, scene):
    client, server, _ = scene
    ticker = "KXMIDDLE-26NOV22-A"
    order_ids = crew.place(2, ticker=ticker)
    crew.control.fault("http_503", order_id=order_ids[0])  # so that it lasts
    pending = client.mass_cancel({"tickers": [ticker]}, deadline_s=60)
    orders = f"{PREFIX}:mass:{pending.request_id}:orders"
    wait_until(lambda: server.exists(orders), within_s=PATIENCE_S, what="it is at work")
    server.delete(orders)
    server.set(orders, "what is this?")
    report = pending.result(timeout=2 * PATIENCE_S)
    crew.control.clear_faults()
    assert report["flat"] is False
    assert "WRONGTYPE" in json.dumps(report)


# -- lists of results


LISTS = {
    "no JSON": lambda server, key: server.hset(key, "orders", "{oops"),
    "an object": lambda server, key: server.hset(key, "orders", '{"of": 2030}'),
    "numbers": lambda server, key: server.hset(key, "orders", "[7]"),
    "nested without end": lambda server, key: server.hset(key, "orders", "[" * 100_000),
    "nothing refused": lambda server, key: server.hdel(key, "refused"),
    "another kind": lambda server, key: (server.delete(key), server.set(key, "?")),
}


@pytest.mark.parametrize("what", LISTS)
def test_whoever_waits_for_a_list_that_cannot_be_read_is_told_and_others_get_theirs(crew, scene, what):
    client, server, _ = scene
    spoilt, fine = crew.place(2), crew.place(2)
    url = "redis://{host}:{port}/{db}".format(**server.connection_pool.connection_kwargs)
    crew.control.configure(exchange_paused=True)
    with Celery("raw", broker=url, backend=url, set_as_current=False) as raw:
        lists = [
            raw.send_task("cancel_orders", kwargs={"orders": each}, queue="cancels")
            for each in (spoilt, fine)
        ]
        keys = [f"{PREFIX}:list:{each.id}" for each in lists]
        wait_until(
            lambda: all(server.hexists(key, "refused") for key in keys), within_s=PATIENCE_S, what="noted"
        )
        LISTS[what](server, keys[0])
        crew.control.configure(exchange_paused=False)
        assert [each["outcome"] for each in lists[1].get(timeout=PATIENCE_S)] == ["canceled", "canceled"]
        with pytest.raises(Exception, match="cannot be read"):
            lists[0].get(timeout=PATIENCE_S)
    results = list(client.results(spoilt, timeout=PATIENCE_S))
    assert {each.outcome for each in results} == {"canceled"}
    assert not server.exists(*keys)


# -- what newer versions say


@pytest.mark.parametrize(
    "more",
    [
        {"problem": {"kind": "of 2030"}},
        {"problem": "of 2030"},
        {"senders": None},
        {"senders": {"risk": 2}},
        {"of": 2030},
    ],
    ids=str,
)
def test_a_worker_of_a_newer_version_is_shown_as_far_as_it_is_understood(scene, more):
    client, server, _ = scene
    said = {
        "name": "newer",
        "lanes": ["risk"],
        "senders": 4,
        "worker_id": "a1",
        "key_id": "k",
        "breaker": "open",
    }
    text = json.dumps({**said, **more})
    server.zadd(f"{PREFIX}:workers", {text: 4e12})
    try:
        [shown] = [each for each in client.workers() if each.name == "newer"]
    finally:
        server.zrem(f"{PREFIX}:workers", text)
    assert (shown.lanes, shown.key_id, shown.breaker) == (("risk",), "k", "open")
