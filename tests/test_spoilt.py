"""What somebody else, or a newer version, has put into the store harms nobody else; and many who wait."""

from __future__ import annotations

import json

import pytest
import redis
from celery import Celery
from crew import PATIENCE_S, ids
from here import cancelctl

from kalshi_cancel.model.requests import Lane
from trials.stack import wait_until

PREFIX = "kalshi-cancel"


@pytest.fixture
def apart(crew):
    """A database of the test's own, and workers that start when it says so."""
    with crew.apart(KALSHI_CANCEL_DEADLINE_S="60") as apart:
        yield apart


@pytest.fixture
def server(apart):
    with redis.Redis.from_url(apart.url, decode_responses=True) as server:
        yield server


def entry_of(order_id):
    return f"{PREFIX}:pending:{order_id}"


def progress(server, order_id, **fields):
    """Stored progress as another version may have left it."""
    known = json.loads(server.hget(entry_of(order_id), "progress") or "{}")
    server.hset(entry_of(order_id), "progress", json.dumps({**known, **fields}))


# Of a newer version: worked on, however strange.
NEWER = {
    "a progress field more": lambda server, order_id: progress(server, order_id, whim={"of": 2030}),
    "a field more of a problem": lambda server, order_id: progress(
        server, order_id, last_problem={"code": "http_502", "message": "m", "http_status": 502, "more": 1}
    ),
    "an unknown step": lambda server, order_id: progress(server, order_id, step="consult_oracle"),
    "attempts of another form": lambda server, order_id: progress(server, order_id, attempts={"sent": 2}),
    "history of another form": lambda server, order_id: progress(server, order_id, history=[{"at": 1}]),
    "a request field more": lambda server, order_id: server.hset(
        entry_of(order_id), "request", json.dumps({"order_id": order_id, "urgency": {"of": 2030}})
    ),
    "an entry field more": lambda server, order_id: server.hset(entry_of(order_id), "of_2030", "{"),
    "an unknown path": lambda server, order_id: move(server, order_id, "strategy", "stream"),
    "an unknown lane": lambda server, order_id: move(server, order_id, "kill", "write"),
    "no place in line": lambda server, order_id: server.zrem(f"{PREFIX}:due:strategy:write", order_id),
    "no place in line, and no deadline": lambda server, order_id: (
        server.zrem(f"{PREFIX}:due:strategy:write", order_id),
        server.zrem(f"{PREFIX}:deadline", order_id),
    ),
}
# Nobody can say what is meant: set aside.
SPOILT = {
    "no JSON in the request": lambda server, order_id: server.hset(entry_of(order_id), "request", "{oops"),
    "no object in the request": lambda server, order_id: server.hset(entry_of(order_id), "request", "[1]"),
    "no request": lambda server, order_id: server.hdel(entry_of(order_id), "request"),
    "no JSON in the progress": lambda server, order_id: server.hset(entry_of(order_id), "progress", "{oops"),
    "no object in the progress": lambda server, order_id: server.hset(entry_of(order_id), "progress", "7"),
    "a moment that is none": lambda server, order_id: server.hset(entry_of(order_id), "accepted_ms", "soon"),
    "a deadline that is none": lambda server, order_id: server.hset(entry_of(order_id), "deadline_ms", ""),
    "nested without end": lambda server, order_id: server.hset(entry_of(order_id), "progress", "[" * 100_000),
    "a text instead": lambda server, order_id: (
        server.delete(entry_of(order_id)),
        server.set(entry_of(order_id), "what is this?"),
    ),
    "a list instead": lambda server, order_id: (
        server.delete(entry_of(order_id)),
        server.rpush(entry_of(order_id), "a", "b"),
    ),
}


def move(server, order_id, lane, path):
    """The entry stands in another line, as a newer version may have it."""
    server.zrem(f"{PREFIX}:due:strategy:write", order_id)
    server.zadd(f"{PREFIX}:due:{lane}:{path}", {order_id: 1})
    server.sadd(f"{PREFIX}:paths", path)
    server.hset(entry_of(order_id), mapping={"lane": lane, "path": path})


def ask_for(apart, order_ids, **fields):
    return apart.client.cancel_many([{"order_id": order_id, **fields} for order_id in order_ids])


def wait_canceled(apart, order_id, what):
    def is_canceled():
        result = apart.client.status(order_id).result
        return result is not None and result.outcome == "canceled"

    wait_until(is_canceled, within_s=PATIENCE_S, what=what)


def test_what_a_newer_version_has_stored_is_worked_on_and_harms_nobody_else(crew, apart, server):
    strange = dict(zip(NEWER, crew.place(len(NEWER)), strict=True))
    others = crew.place(30)
    apart.client.cancel_many([*strange.values(), *others])
    for what, order_id in strange.items():
        NEWER[what](server, order_id)
    [worker] = apart.start()
    for order_id in others:
        wait_canceled(apart, order_id, "the others")
    for what, order_id in strange.items():
        wait_canceled(apart, order_id, what)
        assert crew.control.order(order_id)["status"] == "canceled"
    assert list(apart.client.dead_letters()) == []
    assert "Traceback" not in worker.log_text()


def test_what_cannot_be_read_is_set_aside_with_its_text_and_the_others_go_on(crew, apart, server):
    spoilt = dict(zip(SPOILT, crew.place(len(SPOILT)), strict=True))
    others = crew.place(30)
    ask_for(apart, [*spoilt.values(), *others], deadline_s=30)
    for what, order_id in spoilt.items():
        SPOILT[what](server, order_id)
    with Celery("raw", broker=apart.url, backend=apart.url, set_as_current=False) as raw:
        listed = raw.send_task("cancel_orders", args=[[others[0], others[1]]], queue="cancels")
        [worker] = apart.start()
        assert [each["outcome"] for each in listed.get(timeout=PATIENCE_S)] == ["canceled", "canceled"]
    for order_id in others:
        wait_canceled(apart, order_id, "the others")

    def all_dead():
        found = {each.order_id: each for each in apart.client.dead_letters()}
        return len(found) == len(spoilt) and found

    dead = wait_until(all_dead, within_s=PATIENCE_S, what="all are set aside")
    for what, order_id in spoilt.items():
        assert dead[order_id].progress.last_problem.code == "spoilt_entry", what
        told = apart.client.status(order_id).result
        assert (told.outcome, told.error.code) == ("unresolved", "spoilt_entry"), what
        assert apart.client.status(order_id).open is None, what
    assert dead[spoilt["no JSON in the request"]].stored["request"] == "{oops"
    assert dead[spoilt["a text instead"]].stored == {"text": "what is this?"}
    assert "Traceback" not in worker.log_text()
    assert worker.log_text().count("event=cancel_unreadable") == len(spoilt)
    assert server.keys(f"{PREFIX}:pending:*") == []
    assert server.zcard(f"{PREFIX}:due:strategy:write") == server.zcard(f"{PREFIX}:deadline") == 0
    # Whoever asks again, or has it retried, starts it anew.
    order_ids = list(spoilt.values())
    assert sorted(apart.client.retry(order_ids[::2])) == sorted(order_ids[::2])
    apart.client.cancel_many(order_ids[1::2])
    for what, order_id in spoilt.items():
        wait_canceled(apart, order_id, what)
    assert list(apart.client.dead_letters()) == []


def test_the_waiters_of_an_overdue_entry_that_cannot_be_read_are_told_and_so_are_all_others(
    crew, apart, server
):
    spoilt, *others = crew.place(5)
    crew.control.configure(exchange_paused=True)
    apart.start()
    apart.client.cancel(others[0], deadline_s=0.3)
    wait_until(apart.client.held_back, within_s=PATIENCE_S, what="the worker knows that it is paused")
    ask_for(apart, [spoilt, *others], deadline_s=0.3)
    server.hset(entry_of(spoilt), "progress", "{oops")
    results = {each.order_id: each for each in apart.client.results([spoilt, *others], timeout=PATIENCE_S)}
    assert {order_id: results[order_id].outcome for order_id in others} == dict.fromkeys(others, "unresolved")
    assert results[spoilt].error.code == "spoilt_entry"
    crew.control.configure(exchange_paused=False)
    for order_id in others:
        wait_canceled(apart, order_id, "the others")


def test_lists_show_what_cannot_be_read_beside_everything_else(crew, apart, server):
    spoilt, fine, strange = ids(3)
    ask_for(apart, [spoilt, fine, strange], requested_by="desk 7")
    server.hset(entry_of(spoilt), mapping={"request": "{oops", "requested_by": "[7, {}]"})
    progress(server, strange, last_problem={"code": "c", "message": "m", "of_2030": 1}, history=[7])
    shown = {each.order_id: each for each in apart.client.open_cancels()}
    assert set(shown) == {spoilt, fine, strange}
    assert shown[spoilt].progress.last_problem.code == "spoilt_entry"
    assert shown[strange].progress.last_problem.code == "c"
    assert shown[fine].requested_by == ("desk 7",)
    assert apart.client.status(spoilt).open is not None
    server.delete(entry_of(spoilt))
    server.set(entry_of(spoilt), "text")
    assert {each.order_id for each in apart.client.open_cancels()} == set(shown)
    assert apart.client.status(spoilt).open.progress.last_problem.code == "spoilt_entry"
    done = cancelctl("open", "--json", env={"REDIS_URL": apart.url})
    assert {json.loads(line)["order_id"] for line in done.stdout.splitlines()} == set(shown)


def test_an_order_whose_entry_cannot_be_read_can_be_asked_for_by_everybody(crew, apart, server):
    [order_id] = crew.place()
    apart.client.cancel(order_id, requested_by="first")
    server.hset(entry_of(order_id), "request", '{"order_id": NaN')
    apart.client.cancel(order_id, requested_by="second", lane=Lane.RISK)
    assert apart.client.status(order_id).open.requested_by == ("first", "second")
    assert [each.stored["request"] for each in apart.client.dead_letters()] == ['{"order_id": NaN']
    apart.start()
    result = next(apart.client.results([order_id], timeout=PATIENCE_S))
    assert (result.outcome, result.requested_by) == ("canceled", ("first", "second"))


# -- many waiters, many names


def ask_raw(raw, number, **fields):
    """So many messages of a producer that has none of our code, each wanting the result."""
    with raw.producer_pool.acquire(block=True) as producer:
        return [
            raw.send_task("cancel_order", kwargs=fields, queue="cancels", producer=producer)
            for _ in range(number)
        ]


def test_everybody_who_wants_the_result_of_one_order_gets_it_however_many_they_are(crew, apart, server):
    [order_id] = crew.place()
    with Celery("raw", broker=apart.url, backend=apart.url, set_as_current=False) as raw:
        waiting = ask_raw(raw, 1_300, order_id=order_id)
        crew.control.configure(exchange_paused=True)
        apart.start()
        wait_until(lambda: server.llen("cancels") == 0, within_s=PATIENCE_S, what="all are entered")
        crew.control.configure(exchange_paused=False)
        outcomes = {task.get(timeout=PATIENCE_S)["outcome"] for task in waiting}
    assert outcomes == {"canceled"}
    assert crew.effective()[order_id] == 1


def test_everybody_is_told_unresolved_and_then_what_became_of_it(crew, apart, server):
    [order_id] = crew.place()
    crew.control.configure(exchange_paused=True)
    with Celery("raw", broker=apart.url, backend=apart.url, set_as_current=False) as raw:
        waiting = ask_raw(raw, 1_200, order_id=order_id, deadline_s=4)
        apart.start()
        assert {task.get(timeout=PATIENCE_S)["outcome"] for task in waiting} == {"unresolved"}
    crew.control.configure(exchange_paused=False)
    keys = [f"celery-task-meta-{task.id}" for task in waiting]
    wait_until(
        lambda: all('"outcome":"canceled"' in text for text in server.mget(keys)),
        within_s=PATIENCE_S,
        what="everybody knows the end",
    )
    assert server.keys(f"{PREFIX}:waiters:*") == []
    assert server.exists(f"{PREFIX}:replies_left") == 0


def test_names_that_the_list_has_no_room_for_are_counted(crew, apart):
    [order_id] = crew.place()
    names = [f"desk {number} {'x' * 400}" for number in range(50)] + [f"d{number}" for number in range(200)]
    for name in names:
        apart.client.cancel(order_id, requested_by=name)
    entry = apart.client.status(order_id).open
    assert entry.left_out == len(names) - len(entry.requested_by)
    assert 0 < len(entry.requested_by) <= 100
    apart.start()
    result = next(apart.client.results([order_id], timeout=PATIENCE_S))
    assert result.requested_by == entry.requested_by
    assert result.requested_by_left_out == entry.left_out
    assert result.to_json()["requested_by_left_out"] == entry.left_out


def test_what_is_stored_of_names_is_bounded_and_every_other_request_is_counted(apart, server):
    [order_id] = ids(1)
    for number in [*range(40), *range(40)]:
        apart.client.cancel(order_id, requested_by=f"{number} {'n' * 500}")
    assert server.hstrlen(entry_of(order_id), "requested_by") < 5_000
    shown = apart.client.status(order_id).open
    assert len(shown.requested_by) + shown.left_out // 2 == 40


# -- asked again after a retry


def test_after_a_retry_whoever_asks_is_told_the_new_outcome(crew):
    [order_id] = crew.place()
    with crew.apart(KALSHI_CANCEL_MAX_AGE_S="1") as apart:
        [worker] = apart.start()
        crew.control.fault("http_500", order_id=order_id)
        told = apart.client.cancel(order_id, deadline_s=0.3).result(timeout=PATIENCE_S)
        assert told.outcome == "unresolved"
        wait_until(lambda: list(apart.client.dead_letters()), within_s=PATIENCE_S, what="given up")
        with crew.frozen(worker):
            assert apart.client.retry([order_id]) == [order_id]
            assert apart.client.status(order_id).result is None
            pending = apart.client.cancel(order_id, deadline_s=30)
            crew.control.clear_faults()
        assert pending.result(timeout=PATIENCE_S).outcome == "canceled"


def test_the_command_that_retries_is_followed_by_the_new_outcome(crew):
    [order_id] = crew.place()
    with crew.apart(KALSHI_CANCEL_MAX_AGE_S="1") as apart:
        apart.start()
        crew.control.fault("http_500", order_id=order_id)
        apart.client.cancel(order_id, deadline_s=0.3).result(timeout=PATIENCE_S)
        wait_until(lambda: list(apart.client.dead_letters()), within_s=PATIENCE_S, what="given up")
        crew.control.clear_faults()
        env = {"REDIS_URL": apart.url}
        assert "worked on again" in cancelctl("retry", order_id, env=env).stdout
        assert "canceled" in cancelctl("cancel", order_id, env=env).stdout
