"""The gate by itself: when cancels are held back, and when what fails is an order's own trouble."""

from __future__ import annotations

import threading

from kalshi_cancel.exchange.protocol import Meaning, Trouble
from kalshi_cancel.model.orders import Problem
from worker.dispatch.breaker import FAILURES_TO_CLOSE, Gate, GateState

ACTIVE = {"exchange_active": True, "trading_active": True}


def trouble(meaning):
    return Trouble(meaning, Problem(meaning.name.lower(), "in a test"))


def test_so_many_failures_in_a_row_close_it_and_one_usable_reply_begins_the_count_anew():
    gate = Gate(lambda _state: ACTIVE)
    for _ in range(FAILURES_TO_CLOSE - 1):
        gate.note(trouble(Meaning.UNAVAILABLE))
    gate.note(trouble(Meaning.NOT_FOUND))
    for _ in range(FAILURES_TO_CLOSE - 1):
        gate.note(trouble(Meaning.UNANSWERED))
    assert gate.is_open
    gate.note(trouble(Meaning.NOT_SENT))
    assert gate.state is GateState.UNREACHABLE


def test_the_watch_opens_it_when_the_status_says_active():
    told = []
    gate = Gate(lambda _state: ACTIVE, told.append)
    gate.note(trouble(Meaning.PAUSED))
    assert gate.state is GateState.PAUSED
    assert gate.keep_watch(threading.Event())
    assert (gate.is_open, told) == (True, [GateState.OPEN])


def test_what_fails_while_the_status_says_active_does_not_close_it_again():
    gate = Gate(lambda _state: ACTIVE)
    gate.note(trouble(Meaning.PAUSED))
    gate.keep_watch(threading.Event())
    for meaning in (Meaning.PAUSED, *[Meaning.UNAVAILABLE] * 2 * FAILURES_TO_CLOSE):
        gate.note(trouble(meaning))
    assert gate.is_open, "those are orders of which something else is wrong"
