"""The circuit breaker by itself: when cancels are held back, and when a failure is an order's own."""

from __future__ import annotations

import threading

from kalshi_cancel.exchange.protocol import Failure, Meaning
from kalshi_cancel.model.results import Problem
from worker.dispatch.breaker import FAILURES_TO_OPEN, BreakerState, CircuitBreaker

ACTIVE = {"exchange_active": True, "trading_active": True}


def failure(meaning):
    return Failure(meaning, Problem(meaning.name.lower(), "in a test"))


def test_so_many_failures_in_a_row_close_it_and_one_usable_reply_begins_the_count_anew():
    breaker = CircuitBreaker(lambda _state: ACTIVE)
    for _ in range(FAILURES_TO_OPEN - 1):
        breaker.note(failure(Meaning.UNAVAILABLE))
    breaker.note(failure(Meaning.NOT_FOUND))
    for _ in range(FAILURES_TO_OPEN - 1):
        breaker.note(failure(Meaning.UNANSWERED))
    assert breaker.is_closed
    breaker.note(failure(Meaning.NOT_SENT))
    assert breaker.state is BreakerState.UNREACHABLE


def test_the_watch_opens_it_when_the_status_says_active():
    told = []
    breaker = CircuitBreaker(lambda _state: ACTIVE, told.append)
    breaker.note(failure(Meaning.PAUSED))
    assert breaker.state is BreakerState.PAUSED
    assert breaker.keep_watch(threading.Event())
    assert (breaker.is_closed, told) == (True, [BreakerState.PAUSED, BreakerState.CLOSED])


def test_what_fails_while_the_status_says_active_does_not_close_it_again():
    breaker = CircuitBreaker(lambda _state: ACTIVE)
    breaker.note(failure(Meaning.PAUSED))
    breaker.keep_watch(threading.Event())
    for meaning in (Meaning.PAUSED, *[Meaning.UNAVAILABLE] * 2 * FAILURES_TO_OPEN):
        breaker.note(failure(meaning))
    assert breaker.is_closed, "those are orders of which something else is wrong"
