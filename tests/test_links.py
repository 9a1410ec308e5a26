"""What is to follow one of our tasks: all of it is refused, and whoever waits for a part of it is told."""

from __future__ import annotations

import uuid

import pytest
from celery import chain, chord, group, signature
from celery.exceptions import InvalidTaskError

from worker.broker.links import followers

PATIENCE_S = 20.0
FOLLOWS = "nothing can follow this task"


@pytest.fixture
def cancel(celery_producer):
    """Makes the signature of a cancel, as a producer does that has none of our code."""

    def cancel(order_id, **options):
        return celery_producer.signature(
            "cancel_order",
            kwargs={"order_id": order_id},
            immutable=True,
            options={"queue": "cancels", **options},
        )

    return cancel


@pytest.fixture
def orders(control):
    """Resting orders; none of them is ever canceled."""
    order_ids = [str(uuid.uuid4()) for _ in range(4)]
    control.place_many([{"order_id": each} for each in order_ids])
    yield order_ids
    assert control.calls("cancel") == []
    assert {control.order(each)["status"] for each in order_ids} == {"resting"}


def refused(result, order_id):
    value = result.get(timeout=PATIENCE_S)
    assert (value["order_id"], value["outcome"]) == (order_id, "refused")
    assert FOLLOWS in value["error"]["message"]


def test_a_chain_is_refused_with_a_result_for_each_of_it_and_a_warning(stack, client, cancel, orders):
    last = chain(*map(cancel, orders)).apply_async()
    each = last
    for order_id in reversed(orders):
        refused(each, order_id)
        assert client.status(order_id).result.outcome == "refused"
        each = each.parent
    log = stack.workers[0].log_text()
    assert "event=message_refused message refused" in log
    assert "chain: nothing can follow this task" in log
    assert client.cancel_many([]).results() == []


def test_a_chord_is_refused_with_a_result_for_its_parts_and_for_its_body(cancel, orders, celery_producer):
    body = celery_producer.signature("report", options={"queue": "reports"})
    told = chord([cancel(each) for each in orders[:2]])(body)
    for part, order_id in zip(told.parent.results, orders, strict=False):
        refused(part, order_id)
    with pytest.raises(InvalidTaskError, match=f"chord: {FOLLOWS}"):
        told.get(timeout=PATIENCE_S, propagate=True, disable_sync_subtasks=False)


def test_callbacks_are_refused_as_well(cancel, orders, celery_producer):
    first, then, *_ = orders
    linked = cancel(first)
    linked.link(cancel(then).set(task_id=(then_id := str(uuid.uuid4()))))
    linked.link_error(signature("alarm", app=celery_producer).set(task_id=(alarm_id := str(uuid.uuid4()))))
    refused(linked.apply_async(), first)
    refused(celery_producer.AsyncResult(then_id), then)
    with pytest.raises(InvalidTaskError, match="callbacks, errbacks"):
        celery_producer.AsyncResult(alarm_id).get(timeout=PATIENCE_S)


def test_whatever_hangs_together_in_whatever_way_is_told(cancel, orders, celery_producer):
    one, *several = orders
    last = celery_producer.signature("report", options={"queue": "reports"})
    told = chain(cancel(one), group(map(cancel, several)), last).apply_async()
    with pytest.raises(InvalidTaskError, match=FOLLOWS):
        told.get(timeout=PATIENCE_S)
    parts = told.parent
    for part, order_id in zip(parts.results, several, strict=True):
        refused(part, order_id)
    refused(parts.parent, one)


def test_lists_and_mass_cancels_are_refused_in_their_own_forms(cancel, orders, celery_producer):
    one, other, *_ = orders
    many = celery_producer.signature(
        "cancel_orders", kwargs={"orders": [one, other]}, immutable=True, options={"queue": "cancels"}
    )
    mass = celery_producer.signature(
        "mass_cancel", kwargs={"scope": {"everything": True}}, immutable=True, options={"queue": "risk"}
    )
    for first, second in ((many, mass), (mass, many)):
        told = chain(first.clone(), second.clone()).apply_async()
        values = [told.get(timeout=PATIENCE_S), told.parent.get(timeout=PATIENCE_S)]
        [listed] = [value for value in values if isinstance(value, list)]
        [report] = [value for value in values if isinstance(value, dict)]
        assert [(each["order_id"], each["outcome"]) for each in listed] == [
            (one, "refused"),
            (other, "refused"),
        ]
        assert report["flat"] is False
        assert FOLLOWS in report["error"]


def test_messages_of_the_older_protocol_are_no_exception(cancel, orders, celery_producer):
    celery_producer.conf.task_protocol = 1
    first, then, *_ = orders
    linked = cancel(first)
    linked.link(cancel(then).set(task_id=(then_id := str(uuid.uuid4()))))
    refused(linked.apply_async(), first)
    refused(celery_producer.AsyncResult(then_id), then)


def test_in_a_flood_the_linked_ones_are_refused_and_the_others_served(control, cancel, celery_producer):
    order_ids = [str(uuid.uuid4()) for _ in range(60)]
    control.place_many([{"order_id": each} for each in order_ids])
    linked = [chain(cancel(each), cancel(each)) for each in order_ids[::10]]
    told = [each.apply_async() for each in linked]
    plain = [cancel(each).apply_async() for each in order_ids if each not in order_ids[::10]]
    assert {each.get(timeout=PATIENCE_S)["outcome"] for each in plain} == {"canceled"}
    for order_id, each in zip(order_ids[::10], told, strict=True):
        refused(each, order_id)
        assert control.order(order_id)["status"] == "resting"


def test_a_plain_group_is_served(control, cancel):
    order_ids = [str(uuid.uuid4()) for _ in range(3)]
    control.place_many([{"order_id": each} for each in order_ids])
    outcomes = group(map(cancel, order_ids)).apply_async().get(timeout=PATIENCE_S)
    assert [each["outcome"] for each in outcomes] == ["canceled"] * 3


def test_a_wake_up_with_more_to_come_is_warned_of(stack, celery_producer):
    wake_up = celery_producer.signature("wake_up", immutable=True, options={"queue": "cancels"})
    told = chain(wake_up.clone(), wake_up.set(task_id=str(uuid.uuid4()))).apply_async()
    with pytest.raises(InvalidTaskError, match=FOLLOWS):
        told.get(timeout=PATIENCE_S)


def test_a_result_that_is_there_is_not_replaced_by_a_refusal(control, stack, client, cancel, celery_producer):
    order_id, other = str(uuid.uuid4()), str(uuid.uuid4())
    control.place(order_id)
    known = cancel(order_id).apply_async()
    settled = known.get(timeout=PATIENCE_S)
    for named in (known.id, f"cancel:{order_id}"):
        linked = cancel(other)
        linked.link(cancel(order_id).set(task_id=named))
        refused(linked.apply_async(), other)
        with stack.redis.client() as server:
            assert server.get(f"celery-task-meta-{named}")
        assert celery_producer.AsyncResult(named).get(timeout=PATIENCE_S) == settled
    assert client.status(order_id).result.outcome == "canceled"


def test_however_much_is_to_follow_the_walk_through_it_ends():
    deep = {"task": "x", "options": {"task_id": "last"}}
    for number in range(5000):
        deep = {"task": "x", "options": {"task_id": str(number), "link": [deep]}}
    assert len(list(followers({"chain": [deep]}))) == 1000
    odd = [None, 5, "x", {"task": 3}, {"task": "x", "options": {"task_id": 7}}, {"options": {"task_id": "7"}}]
    assert list(followers({"chain": odd, "chord": "x", "callbacks": {"task": "x", "kwargs": 3}})) == []
