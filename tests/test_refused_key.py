"""A worker whose key is refused: it claims nothing more, says so, and the others go on."""

from __future__ import annotations

import uuid
from collections import Counter
from contextlib import contextmanager

import pytest
from crew import PATIENCE_S, wait_ready

from trials.stack import wait_until


@contextmanager
def worker_with_a_key_of_its_own(crew, apart, *options, **rights):
    """A worker on that database with a key id that nobody else has; the id, and the worker."""
    key_id = str(uuid.uuid4())
    crew.control.register_key(key_id, crew.stack.keys.public_path.read_text(), **rights)
    worker = crew.stack.spawn_worker(*options, REDIS_URL=apart.url, KALSHI_API_KEY_ID=key_id)
    wait_ready(worker)
    try:
        yield key_id, worker
    finally:
        worker.kill()


def register(crew, key_id):
    crew.control.register_key(key_id, crew.stack.keys.public_path.read_text())


def test_a_revoked_key_of_one_worker_is_not_the_orders_failure(crew):
    order_ids = crew.place(100)
    with crew.apart() as apart, worker_with_a_key_of_its_own(crew, apart) as (key_id, worker):
        apart.start()
        crew.control.revoke_key(key_id)
        pending = [apart.client.cancel(order_id) for order_id in order_ids]
        assert {each.result(timeout=PATIENCE_S).outcome for each in pending} == {"canceled"}
        for _ in range(5):  # until it has tried one
            if "event=worker_key_refused" in worker.log_text():
                break
            more = crew.place(40)
            results = [apart.client.cancel(each) for each in more]
            assert {each.result(timeout=PATIENCE_S).outcome for each in results} == {"canceled"}
        assert worker.log_text().count("CRITICAL/MainProcess] event=worker_key_refused") == 1
        refused = wait_until(apart.client.held_back, within_s=PATIENCE_S, what="it says so")
        assert list(refused.values()) == ["key_refused"]


def test_where_no_key_works_the_waiter_is_told_refused_at_its_deadline_and_it_is_canceled_once_one_works(
    crew,
):
    [order_id] = crew.place()
    with crew.apart() as apart, worker_with_a_key_of_its_own(crew, apart) as (key_id, _worker):
        crew.control.revoke_key(key_id)
        result = apart.client.cancel(order_id, deadline_s=1.5).result(timeout=PATIENCE_S)
        assert (result.outcome, result.error.http_status) == ("refused", 401)
        assert crew.control.order(order_id)["status"] == "resting"
        calls = [call for call in crew.control.calls() if call["operation"] == "cancel"]
        assert len(calls) <= 2, "it is not hammered"
        register(crew, key_id)
        crew.wait_settled(order_id, apart.client)
        assert apart.client.status(order_id).result.outcome == "canceled"


def test_a_refusal_of_the_key_for_one_order_alone_is_that_orders_own(crew):
    struck, *others = crew.place(4)
    crew.control.fault("status", order_id=struck, operation="cancel", status=401, code="authentication_error")
    with crew.apart() as apart:
        apart.start()
        result = apart.client.cancel(struck).result(timeout=PATIENCE_S)
        assert (result.outcome, result.error.http_status) == ("refused", 401)
        results = apart.client.cancel_many(others).results(timeout=PATIENCE_S)
        assert {each.outcome for each in results} == {"canceled"}


# -- a key that may do, or see, less than another (403, or a 404 for what it does not see)


def wait_known(apart, number=2):
    """Waits until so many workers are in the registry."""
    wait_until(
        lambda: len(apart.client.workers()) == number, within_s=PATIENCE_S, what="they know each other"
    )


LESS = {
    "read only": {"scope": "read_only"},
    "another subaccount": {"subaccount": 2},
}


@pytest.mark.parametrize("named", [True, False], ids=["named", "not named"])
@pytest.mark.parametrize("less", LESS)
def test_what_one_workers_key_may_not_cancel_goes_to_those_with_another(crew, less, named):
    order_ids = crew.place(30, subaccount=1)
    where = {"subaccount": 1} if named else {}
    with crew.apart() as apart, worker_with_a_key_of_its_own(crew, apart, **LESS[less]):
        [other] = apart.start()
        wait_known(apart)
        with crew.frozen(other):
            together = apart.client.cancel_many([{"order_id": each, **where} for each in order_ids[3:]])
            singles = [apart.client.cancel(each, **where) for each in order_ids[:3]]
            wait_until(crew.cancels, within_s=PATIENCE_S, what="the one has tried")
        results = list(together.results(timeout=PATIENCE_S))
        results += [each.result(timeout=PATIENCE_S) for each in singles]
    assert {each.outcome for each in results} == {"canceled"}
    assert crew.effective() == dict.fromkeys(order_ids, 1)


@pytest.mark.parametrize("less", LESS)
def test_the_key_of_a_worker_that_fell_silent_is_waited_for(crew, less):
    order_ids = crew.place(10, subaccount=1)
    with crew.apart() as apart, worker_with_a_key_of_its_own(crew, apart, **LESS[less]):
        [other] = apart.start()
        wait_known(apart)
        with crew.frozen(other):
            wait_known(apart, 1)
            together = apart.client.cancel_many(order_ids)
            wait_until(crew.cancels, within_s=PATIENCE_S, what="the one has tried")
        results = list(together.results(timeout=PATIENCE_S))
    assert {each.outcome for each in results} == {"canceled"}
    assert crew.effective() == dict.fromkeys(order_ids, 1)


def test_an_order_is_refused_once_every_workers_key_was(crew):
    order_ids = crew.place(10, subaccount=1)
    with (
        crew.apart() as apart,
        worker_with_a_key_of_its_own(crew, apart, scope="read_only"),
        worker_with_a_key_of_its_own(crew, apart, subaccount=2),
    ):
        wait_known(apart)
        results = apart.client.cancel_many(
            [{"order_id": each, "subaccount": 1, "deadline_s": 20} for each in order_ids]
        ).results(timeout=PATIENCE_S)
        assert {(each.outcome, each.error.http_status) for each in results} == {("refused", 403)}
        assert list(apart.client.open_cancels()) == []
    tries = Counter(
        each for call in crew.cancels() if call["operation"] == "cancel" for each in call["order_ids"]
    )
    assert max(tries.values()) <= 2, "each key was asked once"


def test_an_id_is_unknown_once_every_workers_key_does_not_see_it(crew):
    with crew.apart() as apart, worker_with_a_key_of_its_own(crew, apart, subaccount=2):
        apart.start()
        wait_known(apart)
        result = apart.client.cancel(str(uuid.uuid4()), deadline_s=20).result(timeout=PATIENCE_S)
        assert result.outcome == "unknown_order"


@pytest.mark.parametrize("other", ["the same key", "another lane", "a refused key"])
def test_where_nobody_else_can_cancel_it_an_order_is_refused_at_once(crew, other):
    [order_id] = crew.place()
    with crew.apart() as apart, worker_with_a_key_of_its_own(crew, apart, scope="read_only") as (key_id, _):
        environment = {"REDIS_URL": apart.url}
        if other == "the same key":
            environment["KALSHI_API_KEY_ID"] = key_id
        if other == "a refused key":
            environment["KALSHI_API_KEY_ID"] = str(uuid.uuid4())
        second = crew.stack.spawn_worker(*(["-Q", "risk"] if other == "another lane" else []), **environment)
        try:
            wait_ready(second)
            wait_known(apart)
            if other == "a refused key":
                other_one = crew.place(1)[0]
                while "event=worker_key_refused" not in second.log_text():
                    apart.client.cancel(other_one).result(timeout=PATIENCE_S)
                wait_until(apart.client.held_back, within_s=PATIENCE_S, what="it says so")
            result = apart.client.cancel(order_id, deadline_s=60).result(timeout=PATIENCE_S)
        finally:
            second.kill()
        assert (result.outcome, result.error.http_status) == ("refused", 403)
    assert crew.sent()[order_id] == 1


def test_a_key_that_was_given_more_rights_cancels_what_is_asked_for_again(crew):
    [order_id] = crew.place()
    with crew.apart() as apart, worker_with_a_key_of_its_own(crew, apart, scope="read_only") as (key_id, _):
        assert apart.client.cancel(order_id).result(timeout=PATIENCE_S).outcome == "refused"
        register(crew, key_id)
        assert apart.client.cancel(order_id).result(timeout=PATIENCE_S).outcome == "canceled"
