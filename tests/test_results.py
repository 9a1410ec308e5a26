"""Records on a real server: Celery reads them, and waiters get them whatever becomes of their connection."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal

import pytest
import redis
from celery import Celery

from kalshi_cancel.model.orders import OrderStatus
from kalshi_cancel.model.results import CancelResult, ConfirmedBy, Outcome, Problem
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store import results
from kalshi_cancel.store.scripts import connect
from trials.stack import RedisServer, wait_until

DONE = "2026-11-22T13:00:01.250Z"
RESULT = CancelResult(
    order_id="o",
    outcome=Outcome.CANCELED,
    status=OrderStatus.CANCELED,
    reduced_by=Decimal("7.50"),
    fill_count=Decimal("2.50"),
    remaining_count=Decimal(0),
    confirmed_by=ConfirmedBy.CANCEL,
    attempts=1,
    requested_at="2026-11-22T13:00:01.000Z",
    settled_at=DONE,
    exchange_ts_ms=1_795_352_401_250,
    requested_by=("maker", 'a "risk" system', "é\u2028"),
    error=Problem("http_503", "down\n</script>", 503),
    order={"order_id": "o", "note": '"],}\ud800'},
)


@pytest.fixture
def server(own_redis):
    """A client as producers and workers have it: it fails fast and asks nothing twice."""
    client = connect(RedisSettings.from_env({"REDIS_URL": own_redis.url}))
    yield client
    client.close()


@pytest.fixture
def admin(own_redis):
    with own_redis.client() as client:
        client.flushdb()  # a server of our own
        yield client


def text_of(result):
    """A record as the store writes it, put together from its parts."""
    head, tail = results.record_parts(result, date_done=DONE)
    who = json.dumps(list(result.requested_by)) + f',"requested_by_left_out":{result.requested_by_left_out}'
    return head + who + tail + json.dumps(f"cancel:{result.order_id}") + "}"


def store(admin, order_id, *, tell=True, **changes):
    """Stores a record; whether anybody is told of it is what `tell` says."""
    result = replace(RESULT, order_id=order_id, **changes)
    admin.set(results.record_key(order_id), text_of(result))
    if tell:
        admin.publish(results.record_key(order_id), text_of(result))
    return result


def wait_for_a_waiter(admin, channel=None):
    wanted = channel and results.record_key(channel)
    wait_until(
        lambda: [each for each in admin.pubsub_channels() if wanted in (None, each)], what="a subscription"
    )


class Waiting:
    """A waiter in a thread of its own; `early` holds what it has so far."""

    def __init__(self, server, order_ids, timeout_s=20.0):
        self.early = []
        self._pool = ThreadPoolExecutor(1)
        self._done = self._pool.submit(self._wait, server, order_ids, timeout_s)
        self._pool.shutdown(wait=False)

    def _wait(self, server, order_ids, timeout_s):
        for result in results.await_each(server, order_ids, timeout_s=timeout_s):
            self.early.append(result)
        return self.early

    def results(self):
        return self._done.result(30)


# -- the format


def test_a_record_is_json_in_celerys_result_format():
    record = json.loads(text_of(RESULT))
    assert {name: value for name, value in record.items() if name != "result"} == {
        "status": "SUCCESS",
        "traceback": None,
        "children": [],
        "date_done": DONE,
        "task_id": "cancel:o",
    }
    assert record["result"] == RESULT.to_json()


def test_a_record_says_what_was_put_in():
    assert results.parse_record(text_of(RESULT)) == RESULT
    assert results.parse_record(text_of(RESULT).encode()) == RESULT


@pytest.mark.parametrize("outcome", Outcome)
def test_a_record_of_little_knowledge_is_read_back_too(outcome):
    result = CancelResult("o", outcome)
    assert results.parse_record(text_of(result)) == result


def test_celerys_own_async_result_reads_a_record(own_redis, admin):
    store(admin, "o")
    with Celery(broker=own_redis.url, backend=own_redis.url, set_as_current=False) as app:
        found = app.AsyncResult("cancel:o")
        assert (found.state, found.successful(), found.ready()) == ("SUCCESS", True, True)
        assert found.get(timeout=5) == RESULT.to_json()
        assert found.date_done is not None
        assert app.AsyncResult("cancel:another").state == "PENDING"


def test_celerys_own_async_result_is_woken_by_a_record_that_comes_later(own_redis, admin):
    app = Celery(broker=own_redis.url, backend=own_redis.url, set_as_current=False)
    with app, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(app.AsyncResult("cancel:later").get, timeout=20)
        wait_for_a_waiter(admin, "later")
        store(admin, "later")
        assert waiting.result(20)["order_id"] == "later"


# -- garbage in the record

GARBAGE = [
    "",
    "{",
    "null",
    "[]",
    "5",
    '"text"',
    "{}",
    '{"result": null}',
    '{"result": []}',
    '{"result": "canceled"}',
    '{"result": {}}',
    '{"result": {"order_id": "o"}}',
    '{"result": {"order_id": "o", "outcome": "gone"}}',
    '{"result": {"order_id": "o", "outcome": "canceled", "status": "gone"}}',
    '{"result": {"order_id": "o", "outcome": "canceled", "reduced_by": "many"}}',
    '{"result": {"order_id": "o", "outcome": "canceled", "reduced_by": {}}}',
    '{"result": {"order_id": "o", "outcome": "canceled", "error": "text"}}',
    '{"result": {"order_id": "o", "outcome": "canceled", "error": {"words": 1}}}',
    '{"result": {"order_id": "o", "outcome": "canceled", "requested_by": 5}}',
    '{"status": "FAILURE", "result": {"exc_type": "KeyError", "exc_message": ["x"]}}',
    "[" * 100_000,
]


@pytest.mark.parametrize("text", GARBAGE, ids=lambda text: text[:60])
def test_what_is_no_record_of_ours_is_a_value_error(text):
    with pytest.raises(ValueError):  # noqa: PT011 - JSON's own words are as good as ours
        results.parse_record(text)


def test_bytes_that_are_no_text_are_a_value_error():
    with pytest.raises(ValueError):  # noqa: PT011 - see above
        results.parse_record(b'{"result": "\xff\xfe"}')


def test_a_spoilt_record_is_told_in_the_log_and_does_not_hide_the_others(server, admin, caplog):
    admin.set(results.record_key("spoilt"), '{"result": {}}')
    assert results.read(server, ["spoilt", "missing"]) == {}
    assert "event=result_unreadable stored result unreadable order_id=spoilt why=" in caplog.text


# -- reading


def test_reading_finds_the_records_there_are(server, admin):
    stored = {order_id: store(admin, order_id) for order_id in ("a", "b")}
    assert results.read(server, ["a", "missing", "b"]) == stored
    assert results.read(server, []) == {}


def test_reading_many_records_takes_several_portions(server, admin):
    ids = [f"o-{n}" for n in range(1_234)]
    with admin.pipeline(transaction=False) as pipeline:
        for order_id in ids[::2]:
            pipeline.set(results.record_key(order_id), text_of(CancelResult(order_id, Outcome.CANCELED)))
        pipeline.execute()
    assert list(results.read(server, ids)) == ids[::2]


# -- waiting


def test_waiting_for_records_that_are_there_takes_no_subscription(server, admin):
    stored = [store(admin, order_id) for order_id in ("a", "b")]
    admin.config_resetstat()
    assert list(results.await_each(server, ["a", "b"], timeout_s=None)) == stored
    assert "cmdstat_subscribe" not in admin.info("commandstats")


def test_waiting_for_nothing_ends_at_once(server):
    assert list(results.await_each(server, [], timeout_s=None)) == []


def test_an_order_named_twice_is_told_once(server, admin):
    store(admin, "a")
    assert len(list(results.await_each(server, ["a", "a"], timeout_s=5))) == 1


def test_a_record_that_comes_later_is_told_when_it_comes(server, admin):
    waiting = Waiting(server, ["later"])
    wait_for_a_waiter(admin, "later")
    stored = store(admin, "later")
    assert waiting.results() == [stored]


def test_a_notice_wakes_the_waiter_long_before_the_next_look(server, admin):
    admin.config_resetstat()
    waiting = Waiting(server, ["later"])
    wait_for_a_waiter(admin, "later")
    wait_until(lambda: reads_of(admin) >= 2, what="the look after the subscription")
    started = time.monotonic()
    store(admin, "later")
    waiting.results()
    assert time.monotonic() - started < 1.5  # the next look would be 2 s after the last


def reads_of(admin):
    return admin.info("commandstats").get("cmdstat_mget", {"calls": 0})["calls"]


def test_each_is_told_as_it_comes_those_already_there_first(server, admin):
    first = store(admin, "there")
    waiting = Waiting(server, ["late", "there", "later"])
    wait_for_a_waiter(admin, "late")
    wait_until(lambda: waiting.early == [first], what="the record that was there")
    second = store(admin, "later")
    wait_until(lambda: waiting.early == [first, second], what="the record that came")
    third = store(admin, "late")
    assert waiting.results() == [first, second, third]


def test_a_record_whose_notice_was_lost_is_found_by_looking_again(server, admin):
    waiting = Waiting(server, ["quiet"])
    wait_for_a_waiter(admin, "quiet")
    stored = store(admin, "quiet", tell=False)
    assert waiting.results() == [stored]


def test_a_record_told_twice_is_one_result(server, admin):
    waiting = Waiting(server, ["a", "b"])
    wait_for_a_waiter(admin, "b")
    first = store(admin, "a")
    store(admin, "a")
    second = store(admin, "b")
    assert waiting.results() == [first, second]


def test_waiting_ends_when_time_is_over_with_what_came(server, admin):
    stored = store(admin, "there")
    started = time.monotonic()
    assert list(results.await_each(server, ["there", "never"], timeout_s=0.3)) == [stored]
    assert 0.25 < time.monotonic() - started < 20


@pytest.mark.parametrize("timeout_s", [0.0, -1.0])
def test_without_time_there_is_one_look(server, admin, timeout_s):
    stored = store(admin, "there")
    assert list(results.await_each(server, ["there", "never"], timeout_s=timeout_s)) == [stored]


def test_many_waiters_of_one_record_are_all_told(server, admin):
    waiting = [Waiting(server, ["shared"]) for _ in range(5)]
    wait_until(lambda: admin.pubsub_numsub(results.record_key("shared"))[0][1] == 5, what="five waiters")
    stored = store(admin, "shared")
    assert [each.results() for each in waiting] == [[stored]] * 5


def test_waiting_for_more_orders_than_one_portion_holds(server, admin):
    ids = [f"o-{n}" for n in range(1_100)]
    waiting = Waiting(server, ids)
    wait_until(lambda: len(admin.pubsub_channels()) == len(ids), what="all subscriptions")
    for order_id in ids:
        store(admin, order_id)
    assert {result.order_id for result in waiting.results()} == set(ids)


# -- connections that go


def kill_the_waiters_connection(admin, channel):
    """CLIENT KILL; returns once the waiter has subscribed anew."""
    before = {each["id"] for each in admin.client_list(_type="pubsub")}
    assert before
    for each in before:
        admin.client_kill_filter(_id=each)
    wait_until(
        lambda: [
            each
            for each in admin.client_list(_type="pubsub")
            if each["id"] not in before and int(each["sub"]) > 0
        ],
        what=f"a new subscription for {channel}",
    )


def test_a_waiter_whose_connection_is_killed_is_told_all_the_same(server, admin):
    waiting = Waiting(server, ["a", "b"])
    wait_for_a_waiter(admin, "b")
    kill_the_waiters_connection(admin, "a")
    first = store(admin, "a")
    wait_until(lambda: waiting.early == [first], what="the first record")
    kill_the_waiters_connection(admin, "b")
    second = store(admin, "b")
    assert waiting.results() == [first, second]


def test_what_was_stored_while_the_connection_was_gone_is_found(server, admin):
    waiting = Waiting(server, ["a"])
    wait_for_a_waiter(admin, "a")
    with admin.pipeline(transaction=True) as pipeline:  # nobody hears the notice: it is gone in between
        for each in admin.client_list(_type="pubsub"):
            pipeline.client_kill_filter(_id=each["id"])
        pipeline.set(results.record_key("a"), text_of(replace(RESULT, order_id="a")))
        pipeline.execute()
    assert [result.order_id for result in waiting.results()] == ["a"]


def test_a_waiter_survives_that_all_its_connections_are_killed(server, admin):
    waiting = Waiting(server, ["a"])
    wait_for_a_waiter(admin, "a")
    for each in admin.client_list():
        if each["id"] != str(admin.client_id()):
            admin.client_kill_filter(_id=each["id"])
    stored = store(admin, "a")
    assert waiting.results() == [stored]


@pytest.fixture
def mortal(tmp_path):
    """A server that may be killed."""
    own = RedisServer(tmp_path / "redis")
    try:
        yield own.start()
    finally:
        own.stop()


@pytest.fixture
def mortals_client(mortal):
    client = connect(RedisSettings.from_env({"REDIS_URL": mortal.url}))
    yield client
    client.close()


def test_a_waiter_outlives_a_restart_of_the_server(mortal, mortals_client):
    waiting = Waiting(mortals_client, ["before", "after"])
    with mortal.client() as admin:
        wait_for_a_waiter(admin, "after")
        first = store(admin, "before")
        wait_until(lambda: waiting.early == [first], what="the first record")
    mortal.kill()
    mortal.start()
    with mortal.client() as admin:
        second = store(admin, "after")
    assert waiting.results() == [first, second]


def test_a_server_that_stays_away_is_an_error_when_time_is_over(mortal, mortals_client):
    waiting = Waiting(mortals_client, ["a"], timeout_s=1.0)
    with mortal.client() as admin:
        wait_for_a_waiter(admin, "a")
    mortal.kill()
    with pytest.raises(redis.ConnectionError):
        waiting.results()
    with pytest.raises(redis.ConnectionError):
        results.read(mortals_client, ["a"])


def test_a_waiter_that_leaves_early_leaves_no_subscription_behind(server, admin):
    there = store(admin, "there")
    waiting = results.await_each(server, ["there", "later", "never"], timeout_s=30)
    assert next(waiting) == there
    later = store(admin, "later")
    assert next(waiting) == later
    waiting.close()
    wait_until(lambda: admin.pubsub_channels() == [], what="no subscription")
