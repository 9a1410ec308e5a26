"""The bounds of a foreign clock: they hold the truth while it drifts, and let go of it when it is set."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_cancel.exchange.clock import ANSWERS, FORGOTTEN_AFTER_S, LONGER, AnswerTimes, BoundedClock, Span

OFFSET_MS = 3_200.0


def hear(clock, at_s, *, offset_ms=OFFSET_MS, round_trip_s=0.04, **how):
    """An answer that was stamped in the middle between sending and answer."""
    stamp = at_s * 1000 + offset_ms
    half = round_trip_s / 2
    return clock.learn(Span(stamp, stamp + 1), sent_s=at_s - half, received_s=at_s + half, **how)


def test_nothing_is_known_before_an_answer_and_nothing_long_after_the_last():
    clock = BoundedClock()
    assert clock.at(5.0) is None
    hear(clock, 5.0)
    assert clock.at(6.0) is not None
    assert clock.at(5.0 + FORGOTTEN_AFTER_S + 1) is None


def test_each_answer_narrows_the_bounds():
    clock = BoundedClock()
    hear(clock, 5.0, round_trip_s=0.5)
    wide = clock.at(5.0)
    hear(clock, 5.1, round_trip_s=0.01)
    narrow = clock.at(5.1)
    assert wide.high_ms - wide.low_ms > 400
    assert narrow.high_ms - narrow.low_ms < 15
    hear(clock, 5.2, round_trip_s=0.5)
    assert clock.at(5.2).high_ms - clock.at(5.2).low_ms < 15


def test_bounds_widen_with_age():
    clock = BoundedClock()
    hear(clock, 5.0, round_trip_s=0.0)
    assert clock.at(65.0).high_ms - clock.at(65.0).low_ms == pytest.approx(121, abs=2)


def test_one_answer_that_contradicts_leaves_it_unsure_and_two_that_agree_move_it():
    clock = BoundedClock()
    hear(clock, 5.0)
    hear(clock, 6.0, offset_ms=0.0)
    assert clock.surely_at(6.0) is None
    assert clock.at(6.0).middle_ms == pytest.approx(6_000 + OFFSET_MS, abs=2)
    hear(clock, 7.0, offset_ms=0.0)
    assert clock.surely_at(7.0).middle_ms == pytest.approx(7_000, abs=2)


def test_one_wrong_answer_among_right_ones_changes_nothing():
    clock = BoundedClock()
    for at_s, offset_ms in ((5.0, OFFSET_MS), (6.0, 90_000.0), (7.0, OFFSET_MS)):
        hear(clock, at_s, offset_ms=offset_ms)
    assert clock.surely_at(7.0).middle_ms == pytest.approx(7_000 + OFFSET_MS, abs=2)


def test_answers_that_never_agree_are_never_believed():
    clock = BoundedClock()
    for n in range(9):
        hear(clock, 5.0 + n, offset_ms=n * 1_000.0)
        assert n == 0 or clock.surely_at(5.0 + n) is None


def test_where_something_else_says_so_too_one_answer_moves_it():
    clock = BoundedClock()
    hear(clock, 5.0)
    hear(clock, 6.0, offset_ms=60_000.0, is_sure=True)
    assert clock.surely_at(6.0).middle_ms == pytest.approx(66_000, abs=2)


def test_learning_says_whether_it_agrees_and_a_clock_can_be_forgotten():
    clock = BoundedClock()
    assert hear(clock, 5.0)
    assert hear(clock, 6.0)
    assert not hear(clock, 7.0, offset_ms=OFFSET_MS - 8_000)
    assert not hear(clock, 8.0, offset_ms=OFFSET_MS + 60_000, is_sure=True)
    clock.forget()
    assert clock.at(8.0) is None
    assert hear(clock, 9.0, offset_ms=OFFSET_MS - 8_000)


def test_an_answer_that_contradicts_itself_says_nothing():
    clock = BoundedClock()
    clock.learn(Span(9_000, 1_000), sent_s=5.0, received_s=5.1)
    assert clock.at(5.1) is None


@given(
    offset_ms=st.floats(-1e6, 1e6),
    drift=st.floats(-0.0005, 0.0005),
    answers=st.lists(
        st.tuples(st.floats(0.001, 60.0), st.floats(0.0, 2.0), st.floats(0.0, 1.0)), min_size=1, max_size=30
    ),
    later_s=st.floats(0.0, 800.0),
)
def test_the_bounds_hold_the_truth_however_it_drifts_and_whenever_it_was_told(
    offset_ms, drift, answers, later_s
):
    clock, now_s = BoundedClock(), 1_000.0

    def truth_ms(at_s):
        return at_s * 1000 * (1 + drift) + offset_ms

    for pause_s, round_trip_s, share in answers:
        sent_s = now_s + pause_s
        now_s = sent_s + round_trip_s
        stamp = truth_ms(sent_s + share * round_trip_s)
        clock.learn(Span(stamp - 0.01, stamp + 1), sent_s=sent_s, received_s=now_s)
        assert clock.surely_at(now_s) is not None
    span = clock.surely_at(now_s + later_s)
    assert span.low_ms - 0.5 <= truth_ms(now_s + later_s) <= span.high_ms + 0.5


def test_answers_tell_how_long_most_take_and_old_ones_are_forgotten():
    times = AnswerTimes()
    for took_s in (0.5, *[0.004] * (ANSWERS - 2)):
        times.learn(took_s)
    assert times.usual_s == math.inf
    times.learn(0.01)
    assert times.usual_s == pytest.approx(LONGER * 0.004)
    for _ in range(ANSWERS):
        times.learn(0.02)
    assert times.usual_s == pytest.approx(LONGER * 0.02)
