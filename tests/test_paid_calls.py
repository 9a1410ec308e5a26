"""Paid calls: what is kept of a bucket, what counts as spent, and who is told of a call."""

from __future__ import annotations

import uuid

import pytest

from kalshi_cancel.exchange.protocol import Canceled, Failure, Meaning
from kalshi_cancel.model.requests import Lane
from kalshi_cancel.model.results import Problem
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store.rate_limits import Limits, Pacer
from kalshi_cancel.store.scripts import connect
from worker.dispatch.events import CallMade
from worker.dispatch.paid_calls import NoTokens, PaidCalls, Payment, Target, is_charged, kept_share

LIMITS = Limits(100.0, 100.0, 100.0, 100.0)
DONE = Canceled(None, None, None)


def failure(meaning):
    return Failure(meaning, Problem("code", "words"))


class Told:
    """Paid calls on buckets of a test's own, and all that they tell."""

    def __init__(self, url):
        settings = RedisSettings.from_env(
            {"REDIS_URL": url, "KALSHI_KEY_PREFIX": f"test-{uuid.uuid4().hex[:8]}"}
        )
        self.corrected, self.events, self.heard, self.spent = [], [], [], []
        self.pacer = Pacer(connect(settings), settings.key_prefix, LIMITS, corrected=self.corrected.append)
        self.pacer.set_limits(LIMITS)
        self.calls = PaidCalls(
            self.pacer,
            emit=self.events.append,
            hear=self.heard.append,
            spend=self.spent.append,
            request_id="mass-1",
        )

    def made(self, answer, **how):
        paid = self.calls.take("write", 10)
        assert isinstance(paid, Payment)
        return self.calls.send(paid, Target("cancel", ("a",), Lane.RISK), lambda: answer, **how)


@pytest.fixture
def told(own_redis):
    return Told(own_redis.url)


def test_strategies_leave_a_share_of_the_write_tokens_to_risk_and_everybody_a_listing_of_the_read_tokens():
    assert kept_share("write", Lane.STRATEGY, LIMITS, risk_reserve=0.2) == 0.2
    assert kept_share("write:1", Lane.RISK, LIMITS, risk_reserve=0.2) == 0.0
    for lane in Lane:
        assert kept_share("read", lane, LIMITS, risk_reserve=0.2) == pytest.approx(0.1)
    small = Limits(100.0, 22.0, 100.0, 100.0)
    assert kept_share("read", Lane.RISK, small, risk_reserve=0.2) == pytest.approx(5 / 22), (
        "a quarter at most"
    )


@pytest.mark.parametrize("meaning", [None, *Meaning])
def test_the_exchange_charges_for_all_but_a_429_and_what_was_not_sent(meaning):
    free = (Meaning.BUSY, Meaning.NOT_SENT)
    assert is_charged(meaning and failure(meaning)) == (meaning not in free)


def test_tokens_are_taken_only_above_what_is_kept(told):
    assert isinstance(told.calls.take("write", 30), Payment)
    none = told.calls.take("write", 30, kept_share=0.5)
    assert isinstance(none, NoTokens)
    assert none.wait_s > 0


def test_tokens_are_waited_for_until_they_are_there_or_the_waiter_gives_up(told):
    waits = []

    def wait(seconds):
        waits.append(seconds)
        return len(waits) < 3

    assert told.calls.take_in_time("write", 1000, wait) is None
    assert len(waits) == 3
    paid = told.calls.take_in_time("write", 10, wait)
    assert (paid.bucket, paid.tokens) == ("write", 10)
    assert len(waits) == 3, "they were there"


def test_a_call_that_is_done_is_told_to_everybody_and_corrects_nothing(told):
    made = told.made(DONE)
    assert (made.answer, made.was_affordable) == (DONE, False)
    [event] = told.events
    assert event == made.call
    assert event == CallMade("cancel", ("a",), Lane.RISK, None, event.duration_s, "write", 10, "mass-1")
    assert (told.heard, told.spent, told.corrected) == ([None], [10], [])


def test_a_429_corrects_its_bucket_and_is_not_spent(told):
    busy = failure(Meaning.BUSY)
    told.made(busy)
    assert (told.heard, told.spent, told.corrected) == ([busy], [], ["write"])
    assert [event.failure for event in told.events] == [busy]


def test_a_429_of_one_order_of_a_batch_is_one_of_the_call(told):
    busy = failure(Meaning.BUSY)
    told.made({"a": busy, "b": DONE}, failure_in=lambda answers: answers["a"])
    assert (told.heard, told.corrected) == ([busy], ["write"])


def test_what_is_not_sent_is_not_spent(told):
    told.made(failure(Meaning.NOT_SENT))
    assert (told.spent, told.corrected) == ([], [])
