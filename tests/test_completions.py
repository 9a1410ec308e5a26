"""The turn at Redis: one sender at a time has it, nobody waits for it, and nothing left is forgotten."""

from __future__ import annotations

import math
import threading

import pytest

from trials.stack import wait_until
from worker.dispatch.completions import (
    ENOUGH,
    GATHER_S,
    HELD_UP_S,
    LARGE_CALL,
    SEVERAL,
    TOGETHER_MOST,
    Completions,
)
from worker.dispatch.executor import Completion

PATIENCE_S = 20.0


def completed(orders=1):
    return Completion([object()] * orders)


@pytest.fixture
def calls():
    """When a free sender was called."""
    return []


@pytest.fixture
def completions(calls):
    return Completions(lambda: calls.append(1))


@pytest.fixture
def patient(monkeypatch):
    """Nobody takes the turn over from one that is at it."""
    monkeypatch.setattr("worker.dispatch.completions.HELD_UP_S", PATIENCE_S)


def elsewhere(do):
    """What this comes to in another thread."""
    found = []
    thread = threading.Thread(target=lambda: found.append(do()))
    thread.start()
    thread.join(PATIENCE_S)
    return found[0]


def test_while_one_has_the_turn_another_is_told_at_once_to_come_later(completions, patient):
    assert completions.take_turn() == 0.0
    assert 0.0 < elsewhere(completions.take_turn) <= PATIENCE_S
    assert completions.take_turn() == 0.0, "it is still the first one's"
    completions.pass_on()
    assert elsewhere(completions.take_turn) == 0.0


def test_what_others_have_left_meanwhile_is_put_down_together_by_the_next_who_is_called(
    completions, calls, patient
):
    completions.take_turn()
    handed_in = [completed(), completed(3)]
    for each in handed_in:
        elsewhere(lambda each=each: (completions.leave(each), completions.take_turn()))
    assert calls == []
    completions.pass_on()
    assert calls == [1]
    assert elsewhere(lambda: (completions.take_turn(), completions.take())) == (0.0, handed_in)
    assert completions.take() == []


def test_the_turn_is_passed_on_when_the_request_is_on_its_way_and_by_nobody_else(completions, patient):
    completions.take_turn()
    elsewhere(completions.sent)
    assert elsewhere(completions.take_turn) > 0.0
    completions.sent()
    assert elsewhere(completions.take_turn) == 0.0


def test_nobody_is_called_where_nobody_came_and_nothing_was_left(completions, calls):
    completions.take_turn()
    completions.claimed(1, is_more=False)
    completions.leave(Completion())
    completions.pass_on()
    assert calls == []


def test_where_more_can_be_claimed_another_is_called_once_the_request_is_on_its_way(completions, calls):
    completions.take_turn()
    completions.claimed(1, is_more=True)
    assert calls == []
    completions.sent()
    assert calls == [1]


def test_a_large_call_lets_the_next_one_go_before_it_is_signed(completions, patient):
    completions.take_turn()
    completions.claimed(LARGE_CALL, is_more=False)
    completions.leave(completed())
    completions.pass_on()
    assert elsewhere(completions.take_turn) > 0.0, "several came: in a moment there are more"
    completions.take_turn()
    wait_until(lambda: completions.take_turn() == 0.0, within_s=PATIENCE_S, what="that is over")
    completions.claimed(ENOUGH, is_more=False)
    assert elsewhere(completions.take_turn) == 0.0


@pytest.mark.parametrize(
    ("orders", "is_more", "waits"),
    [(SEVERAL - 1, False, False), (SEVERAL, False, True), (SEVERAL, True, False), (ENOUGH, False, False)],
)
def test_after_a_call_for_several_the_next_turn_gathers_for_a_moment(completions, orders, is_more, waits):
    completions.take_turn()
    completions.claimed(orders, is_more=is_more)
    completions.pass_on()
    later_s = elsewhere(completions.take_turn)
    assert later_s <= GATHER_S
    assert (later_s > 0.0) == waits


def test_one_step_puts_down_so_many_orders_at_most(completions):
    half = TOGETHER_MOST // 2
    handed_in = [completed(half), completed(half), completed(1), completed(2 * TOGETHER_MOST), completed(1)]
    for each in handed_in:
        completions.leave(each)
    taken = [completions.take() for _ in range(4)]
    assert taken == [handed_in[:2], handed_in[2:3], handed_in[3:4], handed_in[4:]]
    for each in handed_in:
        completions.leave(each)
    assert completions.take(math.inf) == handed_in


def test_one_that_is_held_up_does_not_keep_the_others(completions):
    completions.take_turn()
    later_s = elsewhere(completions.take_turn)
    assert 0.0 < later_s <= HELD_UP_S
    wait_until(
        lambda: elsewhere(completions.take_turn) == 0.0,
        within_s=PATIENCE_S,
        what="another takes the turn over",
    )
    completions.pass_on()
    assert completions.take_turn() > 0.0, "it is not the first one's any more"


def test_what_is_to_be_done_when_the_request_is_on_its_way_is_done_once_and_by_its_own_thread(completions):
    done = []
    completions.when_sent(lambda: done.append(1))
    elsewhere(completions.sent)
    assert done == []
    completions.sent()
    completions.sent()
    assert done == [1]


def test_everything_is_put_down_once_and_one_at_a_time_however_many_come(completions, patient):
    each, rounds = 12, 200
    put_down, at_it, most_at_it, lock = [], [0], [0], threading.Lock()

    def sender():
        for _ in range(rounds):
            completions.leave(completed())
            if completions.take_turn():
                continue  # whoever has it sees to it, or the next who comes
            with lock:
                at_it[0] += 1
                most_at_it[0] = max(most_at_it[0], at_it[0])
            taken = completions.take()
            with lock:
                at_it[0] -= 1
                put_down.extend(taken)
            completions.pass_on()

    threads = [threading.Thread(target=sender, daemon=True) for _ in range(each)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    put_down.extend(completions.take(math.inf))
    assert len(put_down) == each * rounds == len({id(one) for one in put_down})
    assert most_at_it[0] == 1
