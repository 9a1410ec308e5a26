"""A worker whose key is refused: it claims nothing more, says so, and the others go on."""

from __future__ import annotations

import uuid
from contextlib import contextmanager

from crew import PATIENCE_S, wait_ready

from sandbox.stack import wait_until


@contextmanager
def worker_with_a_key_of_its_own(crew, apart):
    """A worker on that database with a key id that nobody else has; the id, and the worker."""
    key_id = str(uuid.uuid4())
    crew.control.register_key(key_id, crew.stack.keys.public_path.read_text())
    worker = crew.stack.spawn_worker(REDIS_URL=apart.url, KALSHI_API_KEY_ID=key_id)
    wait_ready(worker)
    try:
        yield key_id, worker
    finally:
        worker.kill()


def register(crew, key_id):
    crew.control.register_key(key_id, crew.stack.keys.public_path.read_text())


def test_a_revoked_key_of_one_worker_is_not_the_orders_trouble(crew):
    order_ids = crew.place(100)
    with crew.apart() as apart, worker_with_a_key_of_its_own(crew, apart) as (key_id, worker):
        apart.start()
        crew.control.revoke_key(key_id)
        pending = [apart.client.cancel(order_id) for order_id in order_ids]
        assert {each.result(timeout=PATIENCE_S).outcome for each in pending} == {"canceled"}
        for _ in range(5):  # until it has tried one
            if "its key is refused" in worker.log_text():
                break
            more = crew.place(40)
            results = [apart.client.cancel(each) for each in more]
            assert {each.result(timeout=PATIENCE_S).outcome for each in results} == {"canceled"}
        assert worker.log_text().count("CRITICAL/MainProcess] this worker claims nothing") == 1
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
