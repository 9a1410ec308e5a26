"""The line on the way out: one sender at a time, which serves those behind it; nobody is left standing."""

from __future__ import annotations

import threading

import pytest

from trials.stack import wait_until
from worker.dispatch.completions import TOGETHER_MOST, Completions, Place

RISK, STRATEGY = "risk", "strategy"
BOTH = frozenset((RISK, STRATEGY))
PATIENCE_S = 20.0


class Sender(threading.Thread):
    """Stands in line once; at its turn it serves, and goes on, when it is told to."""

    def __init__(self, completions, takes=BOTH, orders=1):
        super().__init__(daemon=True)
        self.completions, self.place = completions, Place(None, orders, takes)
        self.served = None  # the places it served, once its turn has come
        self.given = None
        self.may_serve, self.may_go_on = threading.Event(), threading.Event()
        self.start()

    def run(self):
        with self.completions.at_it(self.place) as places:
            self.served = places
            if places:
                assert self.may_serve.wait(PATIENCE_S)
                for place in places:
                    place.serve(self.name)
                assert self.may_go_on.wait(PATIENCE_S)
            self.given = self.place.given()

    def ended(self):
        self.may_serve.set()
        self.may_go_on.set()
        self.join(PATIENCE_S)
        assert not self.is_alive()
        return self


def in_line(completions, *senders):
    wait_until(lambda: [sender.place for sender in senders] == completions._line, what="they stand in line")


@pytest.fixture
def patient(monkeypatch):
    """Nobody gives up waiting."""
    monkeypatch.setattr("worker.dispatch.completions.IN_LINE_MOST_S", PATIENCE_S)


def first_at_it(completions, **how):
    sender = Sender(completions, **how)
    wait_until(lambda: sender.served is not None, what="it is its turn")
    return sender


def next_two(completions):
    """Two that have come while one was at it, which is gone now."""
    first = first_at_it(completions)
    second = Sender(completions)
    in_line(completions, second)
    third = Sender(completions)
    in_line(completions, second, third)
    assert first.ended().given == first.name
    return second, third


def test_those_who_come_while_one_is_at_it_are_served_together_by_the_next(patient):
    second, third = next_two(Completions())
    wait_until(lambda: second.served is not None, what="the next is at it")
    second.ended()
    third.join(PATIENCE_S)
    assert (second.given, third.given) == (second.name, second.name)
    assert (second.served, third.served) == ([second.place, third.place], [])


def test_a_hand_that_was_served_goes_on_while_the_one_that_served_it_is_still_at_it(patient):
    second, third = next_two(Completions())
    second.may_serve.set()
    third.join(PATIENCE_S)
    assert third.given == second.name
    assert second.is_alive(), "it signs and sends"
    second.ended()


def test_who_takes_risk_only_is_not_served_by_one_that_takes_both_but_serves_it(patient):
    completions = Completions()
    first = first_at_it(completions)
    both = Sender(completions)
    in_line(completions, both)
    risk_only = Sender(completions, takes=frozenset((RISK,)))
    in_line(completions, both, risk_only)
    first.ended()
    wait_until(lambda: both.served is not None, what="the next is at it")
    another = Sender(completions)
    in_line(completions, risk_only, another)
    assert both.ended().served == [both.place]
    wait_until(lambda: risk_only.served is not None, what="the next is at it")
    assert risk_only.ended().served == [risk_only.place, another.place]
    another.join(PATIENCE_S)
    assert another.given == risk_only.name


def test_one_step_puts_down_so_many_orders_at_most(patient):
    completions = Completions()
    first = first_at_it(completions)
    senders = []
    for _ in range(3):
        senders.append(Sender(completions, orders=TOGETHER_MOST // 2))
        in_line(completions, *senders)
    first.ended()
    wait_until(lambda: senders[0].served is not None, what="the next is at it")
    assert senders[0].ended().served == [senders[0].place, senders[1].place]
    assert senders[2].ended().served == [senders[2].place]


def test_a_hand_that_is_held_up_does_not_keep_the_others():
    completions = Completions()
    held_up = first_at_it(completions)
    other = Sender(completions)
    wait_until(lambda: other.served is not None, what="the other does not wait any longer")
    assert other.ended().given == other.name
    assert held_up.is_alive()
    held_up.ended()
    assert first_at_it(completions).ended().served, "the line is in order afterwards"


def test_everybody_is_served_once_and_one_is_at_it_at_a_time_however_many_come(patient):
    completions, each, rounds = Completions(), 12, 200
    given = [0] * each
    at_it, most_at_it, lock = [0], [0], threading.Lock()

    def sender(number):
        for _ in range(rounds):
            place = Place(number, 1, BOTH)
            with completions.at_it(place) as places:
                with lock:
                    at_it[0] += bool(places)
                    most_at_it[0] = max(most_at_it[0], at_it[0])
                for served in places:
                    served.serve(served.held)
                with lock:
                    at_it[0] -= bool(places)
                assert place.given() == number
                given[number] += 1

    threads = [threading.Thread(target=sender, args=(number,), daemon=True) for number in range(each)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert given == [rounds] * each
    assert most_at_it[0] == 1
