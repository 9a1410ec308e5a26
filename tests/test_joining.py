"""Many ask for one order: it is canceled once, and everybody is named and answered."""

from __future__ import annotations

import threading
from collections import Counter

from crew import PATIENCE_S

from kalshi_cancel.client import CancelClient, NotSettled
from kalshi_cancel.model.requests import Lane
from trials.stack import wait_until

# -- one cancel for everybody who asks


def ask_from_fifty_producers(crew, order_ids):
    """Each order is asked for by five of fifty producers; the results each waiter got, by order."""
    found = {order_id: [] for order_id in order_ids}
    ready = threading.Barrier(51)
    problems = []

    def produce(me):
        client = CancelClient(crew.redis.url, requested_by=f"producer-{me}")
        mine = [order_id for at, order_id in enumerate(order_ids) if me in askers(at)]
        try:
            ready.wait()
            pending = client.cancel_many(mine)
            for result in pending.results(timeout=PATIENCE_S):
                found[result.order_id].append(result)
        except (OSError, NotSettled, threading.BrokenBarrierError) as problem:
            problems.append(problem)
        finally:
            client.close()

    producers = [threading.Thread(target=produce, args=(me,)) for me in range(50)]
    for producer in producers:
        producer.start()
    ready.wait()
    yield
    for producer in producers:
        producer.join()
    assert problems == []
    yield found


def askers(at):
    return {(at + 10 * k) % 50 for k in range(5)}


def test_one_cancel_is_sent_however_many_producers_ask_at_once(crew):
    crew.workers(2)
    order_ids = crew.place(100)
    asking = ask_from_fifty_producers(crew, order_ids)
    next(asking)
    found = next(asking)
    assert crew.sent() == Counter(order_ids)
    for results in found.values():
        assert len(results) == 5
        assert len({str(result.to_json()) for result in results}) == 1
        assert results[0].outcome == "canceled"


def test_everybody_who_asked_before_it_was_settled_is_named_in_the_one_result(crew):
    workers = crew.workers(2)
    order_ids = crew.place(100)
    with crew.frozen(*workers):
        asking = ask_from_fifty_producers(crew, order_ids)
        next(asking)
        everybody = lambda: sum(len(each.requested_by) for each in crew.client.open_cancels()) == 500  # noqa: E731 - a condition
        wait_until(everybody, within_s=PATIENCE_S, what="500 requests accepted")
    found = next(asking)
    assert crew.sent() == Counter(order_ids)
    for at, order_id in enumerate(order_ids):
        assert len(found[order_id]) == 5
        assert len({str(result.to_json()) for result in found[order_id]}) == 1
        assert set(found[order_id][0].requested_by) == {f"producer-{me}" for me in askers(at)}


def test_a_second_request_while_the_first_is_in_flight_joins_it(crew):
    crew.workers(2)
    [order_id] = crew.place()
    crew.control.fault("slow", order_id=order_id, operation="cancel", seconds=0.7, times=1)
    crew.in_flight(order_id)
    second = crew.client.cancel(order_id, requested_by="risk", lane=Lane.RISK)
    result = second.result(timeout=PATIENCE_S)
    assert (result.outcome, result.requested_by, result.attempts) == ("canceled", ("test", "risk"), 1)
    assert crew.sent()[order_id] == 1


def test_a_waiting_cancel_asked_for_by_risk_is_the_next_one_sent(crew):
    order_ids = crew.place(30)
    with crew.apart("-c", "1") as apart:
        apart.client.cancel_many(order_ids)
        urgent = apart.client.cancel(order_ids[-1], requested_by="risk", lane=Lane.RISK)
        apart.start()
        assert urgent.result(timeout=PATIENCE_S).requested_by == ("mm", "risk")
        wait_until(lambda: not list(apart.client.open_cancels()), within_s=PATIENCE_S, what="all settled")
    assert crew.cancels()[0]["order_ids"] == order_ids[-1:]
    assert crew.sent() == Counter(order_ids)
