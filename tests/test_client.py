"""The producers' client, against a real Redis, a real worker and the sandbox."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
import uuid
from contextlib import closing, contextmanager

import pytest
from crew import about_orders

from kalshi_cancel.client import CancelClient, NotSettled
from kalshi_cancel.model.fields import BadRequest
from kalshi_cancel.settings.reader import SettingsError
from kalshi_cancel.store.scripts import StoreError
from trials.stack import free_port, wait_until

PATIENCE_S = 20.0
PROMISED_S = 2.0  # an answer from the client, whatever Redis does


def ids(number):
    return [str(uuid.uuid4()) for _ in range(number)]


def cancels(control, order_id):
    """The calls that asked the exchange to cancel an order, alone or in a batch."""
    return [call for call in control.calls(order_id=order_id) if call["method"] == "DELETE"]


@contextmanager
def silent(server):
    """Redis accepts connections and bytes, and answers nothing."""
    server.part.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.part.signal(signal.SIGCONT)


# -- asking


def test_three_lines_cancel_an_order(control, stack, order_id, monkeypatch):
    monkeypatch.setenv("REDIS_URL", stack.redis.url)
    control.place(order_id)
    client = CancelClient.from_env()
    pending = client.cancel(order_id, requested_by="mm-btc")
    result = pending.result(timeout=10)
    assert (result.outcome, result.requested_by) == ("canceled", ("mm-btc",))
    assert control.order(order_id)["status"] == "canceled"


def test_a_client_can_be_used_for_the_length_of_a_block(stack, order_id):
    with CancelClient(stack.redis.url) as client:
        client.cancel(order_id).result(timeout=PATIENCE_S)
        connections = client._server.connection_pool
        assert connections._available_connections[0].is_connected
    assert not any(each.is_connected for each in connections._available_connections)


def test_the_clients_name_stands_in_the_result_unless_a_call_gives_another(control, client):
    one, other = ids(2)
    control.place_many([{"order_id": one}, {"order_id": other}])
    assert client.cancel(one).result(timeout=PATIENCE_S).requested_by == ("test",)
    assert client.cancel(other, requested_by="me").result(timeout=PATIENCE_S).requested_by == ("me",)


def test_many_are_asked_for_by_id_or_by_fields_and_answered_in_the_order_asked(control, client):
    plain, routed, executed = ids(3)
    control.place(plain)
    control.place(routed, exchange_index=2)
    control.place(executed, status="executed", filled="10.00")
    pending = client.cancel_many([executed, {"order_id": routed, "exchange_index": 2}, plain])
    assert pending.order_ids == (executed, routed, plain)
    results = pending.results(timeout=PATIENCE_S)
    assert [result.order_id for result in results] == [executed, routed, plain]
    assert [result.outcome for result in results] == ["too_late", "canceled", "canceled"]
    assert len(cancels(control, routed)) == 1  # sent to the shard that was named: no detour


def test_an_order_named_twice_is_canceled_once_and_answered_once(control, client):
    first, second = ids(2)
    control.place_many([{"order_id": first}, {"order_id": second}])
    pending = client.cancel_many([first, second, {"order_id": first}, first])
    assert pending.order_ids == (first, second)
    assert len(pending.results(timeout=PATIENCE_S)) == 2
    assert len(cancels(control, first)) == 1


def test_nothing_to_cancel_is_answered_with_nothing(client):
    assert client.cancel_many([]).results(timeout=1) == []


def test_results_come_as_they_are_settled(control, client):
    slow, fast = ids(2)
    control.place_many([{"order_id": slow}, {"order_id": fast}])
    control.fault("slow", order_id=slow, operation="cancel", seconds=0.5, times=1)
    client.cancel(slow)
    wait_until(lambda: cancels(control, slow), what="the slow call")
    pending = client.cancel_many([slow, fast])
    assert [result.order_id for result in pending.as_settled(timeout=PATIENCE_S)] == [fast, slow]


def test_a_settled_cancel_is_answered_at_once_and_the_exchange_not_asked_again(control, client):
    canceled, executed = ids(2)
    control.place(canceled)
    control.place(executed, status="executed", filled="10.00")
    before = client.cancel_many([canceled, executed]).results(timeout=PATIENCE_S)
    calls = [control.calls(order_id=order_id) for order_id in (canceled, executed)]
    assert client.cancel_many([canceled, executed]).results(timeout=0) == before
    assert [control.calls(order_id=order_id) for order_id in (canceled, executed)] == calls


def test_a_refused_cancel_is_tried_again_when_it_is_asked_for_again(control, client, order_id):
    control.place(order_id)
    control.fault("status", order_id=order_id, operation="cancel", status=403, code="forbidden", times=1)
    assert client.cancel(order_id).result(timeout=PATIENCE_S).outcome == "refused"
    assert client.cancel(order_id).result(timeout=PATIENCE_S).outcome == "canceled"
    assert control.order(order_id)["status"] == "canceled"


def test_an_unknown_order_is_tried_again_when_it_is_asked_for_again(control, client, order_id):
    assert client.cancel(order_id).result(timeout=PATIENCE_S).outcome == "unknown_order"
    control.place(order_id)
    assert client.cancel(order_id).result(timeout=PATIENCE_S).outcome == "canceled"


def test_an_unresolved_cancel_is_tried_again_at_once_when_it_is_asked_for_again(control, client, order_id):
    control.place(order_id)
    control.configure(exchange_paused=True)
    assert client.cancel(order_id, deadline_s=0.3).result(timeout=PATIENCE_S).outcome == "unresolved"
    control.configure(exchange_paused=False)
    asked = time.monotonic()
    result = client.cancel(order_id).result(timeout=PATIENCE_S)
    assert (result.outcome, result.confirmed_by) == ("canceled", "cancel")
    assert time.monotonic() - asked < 3  # a sweep away at most: not what was left of a long pause
    assert result.attempts == len(cancels(control, order_id))


# -- waiting


def test_waiting_ends_with_the_names_of_what_is_not_settled(control, client):
    paused, done = ids(2)
    control.place_many([{"order_id": paused, "exchange_index": 3}, {"order_id": done}])
    control.configure(exchange_paused=[3])
    pending = client.cancel_many([{"order_id": paused, "exchange_index": 3}, done])
    asked = time.monotonic()
    with pytest.raises(NotSettled) as raised:
        pending.results(timeout=0.7)
    assert 0.7 <= time.monotonic() - asked < PATIENCE_S
    assert raised.value.order_ids == (paused,)
    assert isinstance(raised.value, TimeoutError)
    assert [result.order_id for result in pending.as_settled(timeout=0)] == [done]
    with pytest.raises(NotSettled, match=paused):
        client.cancel(paused).result(timeout=0)
    control.configure(exchange_paused=False)
    assert [each.outcome for each in pending.results(timeout=PATIENCE_S)] == ["canceled", "canceled"]


def test_who_waits_from_before_and_who_comes_later_get_the_same_result(control, stack, client, order_id):
    control.place(order_id)
    control.fault("slow", order_id=order_id, operation="cancel", seconds=0.3, times=1)
    with closing(CancelClient(stack.redis.url, requested_by="other")) as other:
        early = other.cancel(order_id)
        late = client.cancel(order_id)
        assert early.result(timeout=PATIENCE_S) == late.result(timeout=PATIENCE_S)
        assert other.cancel(order_id).result(timeout=0) == early.result(timeout=0)


# -- status


def test_the_status_of_an_order_that_nobody_asked_for_is_empty(client, order_id):
    status = client.status(order_id)
    assert (status.order_id, status.result, status.open) == (order_id, None, None)


def test_the_status_shows_an_open_cancel_and_then_its_result(control, client, order_id):
    control.place(order_id)
    control.configure(exchange_paused=True)
    pending = client.cancel(order_id, requested_by="desk", reason="why", market_ticker="KXTEST-26NOV22-A")
    wait_until(lambda: cancels(control, order_id), what="an attempt")
    status = client.status(order_id)
    assert status.result is None
    assert status.open.order_id == order_id
    assert (status.open.lane, status.open.requested_by) == ("strategy", ("desk",))
    assert 0 <= status.open.age_s < PATIENCE_S
    assert not status.open.unresolved
    assert status.open.request.reason == "why"
    control.configure(exchange_paused=False)
    result = pending.result(timeout=PATIENCE_S)
    status = client.status(order_id)
    assert (status.result, status.open) == (result, None)


# -- what cannot be meant


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"order_id": "a/b"}, {"order_id"}),
        ({"order_id": ""}, {"order_id"}),
        ({"order_id": "..", "exchange_index": -2}, {"order_id", "exchange_index"}),
        ({"order_id": "x", "subaccount": "1"}, {"subaccount"}),
        ({"order_id": "x", "deadline_s": float("nan")}, {"deadline_s"}),
        ({"order_id": "x", "requested_by": "\n"}, {"requested_by"}),
        ({"order_id": "x", "market_ticker": "a&b"}, {"market_ticker"}),
    ],
    ids=lambda value: str(sorted(value)),
)
def test_fields_that_cannot_be_meant_are_named(client, fields, named):
    with pytest.raises(BadRequest) as raised:
        client.cancel(**fields)
    assert set(raised.value.problems) == named


@pytest.mark.parametrize("orders", ["5b1f", b"5b1f", {"order_id": "5b1f"}])
def test_one_order_where_a_list_is_expected_is_refused(client, orders):
    with pytest.raises(BadRequest) as caught:
        client.cancel_many(orders)
    assert list(caught.value.problems) == ["orders"]


def test_a_lane_is_known_by_its_name_and_any_other_is_refused(client, order_id):
    assert client.cancel(order_id, lane="risk").result(timeout=20).order_id == order_id
    with pytest.raises(BadRequest) as caught:
        client.cancel(order_id, lane="fast")
    assert caught.value.problems == {"lane": "expected risk or strategy, got 'fast'"}


def test_a_list_with_one_bad_request_is_refused_whole_and_nothing_of_it_is_accepted(control, client):
    good, other = ids(2)
    with pytest.raises(BadRequest) as raised:
        client.cancel_many(
            [good, {"order_id": other, "shard": 1}, 7, {"exchange_index": 0}, {"order_id": "a b"}]
        )
    assert set(raised.value.problems) == {
        "orders[1].'shard'",
        "orders[2].message",
        "orders[3].order_id",
        "orders[4].order_id",
    }
    for order_id in (good, other):
        assert dataclasses.astuple(client.status(order_id)) == (order_id, None, None, None)
    assert about_orders(control) == []


def test_an_environment_without_redis_is_refused_by_name(monkeypatch):
    monkeypatch.delenv("REDIS_URL", raising=False)
    with pytest.raises(SettingsError, match="REDIS_URL"):
        CancelClient.from_env()


# -- Redis away


def test_a_redis_that_refuses_connections_is_told_at_once_and_nothing_can_have_been_accepted(order_id):
    client = CancelClient(f"redis://127.0.0.1:{free_port()}/0")
    asked = time.monotonic()
    with pytest.raises(StoreError) as raised:
        client.cancel(order_id)
    assert time.monotonic() - asked < PROMISED_S
    assert not raised.value.may_be_accepted
    for ask in (lambda: client.status(order_id), lambda: list(client.results([order_id], timeout=1))):
        with pytest.raises(StoreError):
            ask()


@pytest.mark.parametrize("connected", [True, False], ids=["connected before", "not connected yet"])
def test_a_redis_that_is_silent_is_told_in_time_and_asking_again_is_safe(own_redis, order_id, connected):
    client = CancelClient(own_redis.url)
    if connected:
        client.cancel(str(uuid.uuid4()))
    with silent(own_redis):
        asked = time.monotonic()
        with pytest.raises(StoreError) as raised:
            client.cancel(order_id)
        assert time.monotonic() - asked < PROMISED_S
        assert raised.value.may_be_accepted == connected
        asked = time.monotonic()
        with pytest.raises(StoreError):
            client.status(order_id) if connected else list(client.results([order_id], timeout=1))
        assert time.monotonic() - asked < PROMISED_S
    client.cancel(order_id)
    assert client.status(order_id).open is not None


def test_an_accepted_cancel_outlives_a_bell_that_cannot_be_rung(own_redis, order_id, caplog):
    with own_redis.client() as server:
        server.acl_setuser(
            "no-wake-ups",
            enabled=True,
            nopass=True,
            keys=["kalshi-cancel:*", "celery-task-meta-*", "cancels", "risk"],
            channels=["*"],
            commands=["+@all", "-lpush"],
        )
    client = CancelClient(f"redis://no-wake-ups:any@127.0.0.1:{own_redis.port}/0")
    asked = time.monotonic()
    client.cancel(order_id)
    assert time.monotonic() - asked < PROMISED_S
    assert client.status(order_id).open is not None
    assert "event=wake_up_failed" in caplog.text


# -- sharing


def test_fifty_threads_share_one_client(control, client):
    order_ids = ids(50)
    control.place_many([{"order_id": order_id} for order_id in order_ids])
    results, failures = {}, []
    together = threading.Barrier(len(order_ids))

    def ask(order_id):
        try:
            together.wait()
            results[order_id] = client.cancel(order_id).result(timeout=PATIENCE_S)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test must show it
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(order_id,)) for order_id in order_ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert {result.order_id: result.outcome for result in results.values()} == dict.fromkeys(
        order_ids, "canceled"
    )
    assert all(len(cancels(control, order_id)) == 1 for order_id in order_ids)
