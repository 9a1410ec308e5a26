"""A lone cancel is claimed in the step that accepts it where a worker is idle; else nothing is different."""

from __future__ import annotations

import json
import time
import uuid
from contextlib import closing
from dataclasses import replace

import pytest
from claims import claim_from, claim_request
from crew import PATIENCE_S, ids, wait_idle

from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.exchange.protocol import Failure, Meaning
from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.model.results import CancelResult, Outcome, Problem
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.settings.worker import WorkerSettings
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.keys import Keys
from kalshi_cancel.store.pending import Fence, Known, Settle, WakeUp
from kalshi_cancel.store.rate_limits import Limits, Pacer
from kalshi_cancel.store.scripts import connect
from trials.stack import wait_until
from worker.dispatch.dispatcher import Dispatcher
from worker.dispatch.leases import LEASE_S
from worker.dispatch.settings import DispatchSettings

BOTH = (Lane.RISK, Lane.STRATEGY)
LONG_S = 600.0
WORST_S = 5.0  # promised after a worker's death
IDLE = claim_request(BOTH, at_most=5, lease_s=LONG_S, exchange_ms="1000:2000", idle_s=LONG_S)


class Idle:
    """A store of one test's own, with a worker that is idle and listens."""

    def __init__(self, server):
        settings = RedisSettings.from_env(
            {"REDIS_URL": server.url, "KALSHI_KEY_PREFIX": f"t-{uuid.uuid4().hex}"}
        )
        self.server = connect(settings)
        self.keys = Keys(settings.key_prefix)
        self.store = CancelStore(self.server, settings, name="a-host:1")
        self.pacer = Pacer(self.server, settings.key_prefix, Limits(0.01, 100, 0.01, 100))
        self.pacer.set_limits(self.pacer.limits)
        self.store.show_listeners(BOTH, life_s=LONG_S)
        self.become_idle()

    def close(self):
        self.server.close()

    def become_idle(self, **offer):
        [claim] = self.store.turn((), replace(IDLE, **offer)).claims
        assert claim.entries == ()

    def accept(self, *order_ids, lane=Lane.STRATEGY, known=None, fence=None, **fields):
        requests = [CancelRequest(order_id, **fields) for order_id in order_ids]
        return self.store.accept(requests, lane=lane, default_deadline_s=LONG_S, known=known, fence=fence)

    def woken(self, *lanes):
        """The claim that comes with the wake-up, None if it carries none."""
        wake_up = self.store.listen(lanes or BOTH, within_s=0.1)
        assert wake_up is not None, "somebody is woken up in any case"
        return wake_up.claim

    def claim(self):
        return claim_from(self.store, BOTH, at_most=5, lease_s=LONG_S, exchange_ms=None)

    def tokens(self, bucket="write"):
        return self.pacer.levels([bucket])[bucket].tokens


@pytest.fixture
def idle(server_of_each_make):
    with closing(Idle(server_of_each_make)) as idle:
        yield idle


def test_a_lone_cancel_comes_with_the_wake_up_claimed_and_paid_for(idle):
    [order_id], before = ids(1), idle.tokens()
    accepted = idle.accept(order_id, requested_by="ann", market_ticker="T", deadline_s=60)
    assert accepted.listener_woken
    claim = idle.woken()
    [entry] = claim.entries
    assert (entry.order_id, entry.request.market_ticker) == (order_id, "T")
    assert (entry.lane, entry.interrupted, entry.progress, entry.reported) == ("strategy", False, "", False)
    assert (entry.age_s, entry.deadline_left_s) == (0.0, 60.0)
    assert (claim.bucket, claim.tokens, claim.is_more) == ("write", 2.0, False)
    assert before - idle.tokens() == pytest.approx(2.0, abs=0.1)
    shown = idle.store.open_cancel(order_id)
    assert (shown.claimed, shown.request.market_ticker) == (True, "T")
    assert idle.claim().entries == (), "it is nobody else's"
    assert idle.store.conclude([Settle(entry, CancelResult(order_id, Outcome.CANCELED))]) == [True]
    assert idle.store.record(order_id).requested_by == ("ann",)


def test_a_cancel_of_a_shard_is_paid_from_the_shards_own_bucket(idle):
    idle.accept(*ids(1), exchange_index=3)
    assert idle.woken().bucket == "write:3"


def test_one_offer_is_taken_once(idle):
    first, second = ids(2)
    idle.accept(first)
    assert idle.woken().entries[0].order_id == first
    idle.accept(second)
    assert idle.woken() is None
    assert [entry.order_id for entry in idle.claim().entries] == [second]


def without_tokens(idle):
    idle.pacer.take("write", 98.5)


def with_tokens_kept_for_risk(idle):
    idle.become_idle(risk_reserve=0.99)
    idle.pacer.take("write", 5.0)


def when_the_offer_is_over(idle):
    idle.become_idle(idle_s=0.001)
    over = time.monotonic() + 0.01
    wait_until(lambda: time.monotonic() > over)


def by_risk_alone(idle):
    idle.become_idle(lanes=(Lane.RISK,))


def with_work(idle):
    """It has claimed something since."""
    idle.accept(*ids(2))
    idle.woken()
    assert len(idle.claim().entries) == 2


def spoilt(idle):
    idle.server.hset(idle.keys.idle, "a-host:1", "whenever:and:ever")


def of_another_kind(idle):
    idle.server.delete(idle.keys.idle)
    idle.server.set(idle.keys.idle, "no hash")


@pytest.mark.parametrize(
    "otherwise",
    [
        *(without_tokens, with_tokens_kept_for_risk, when_the_offer_is_over, by_risk_alone, with_work),
        *(spoilt, of_another_kind),
    ],
)
def test_where_no_worker_is_idle_or_the_tokens_are_not_there_the_cancel_is_due_and_somebody_woken(
    idle, otherwise
):
    otherwise(idle)
    [order_id], before = ids(1), idle.tokens()
    assert idle.accept(order_id).listener_woken
    assert idle.tokens() >= before
    assert idle.woken() is None
    assert not idle.store.open_cancel(order_id).claimed


def test_the_tokens_that_are_kept_for_risk_pay_for_risk(idle):
    with_tokens_kept_for_risk(idle)
    idle.accept(*ids(1), lane=Lane.RISK)
    assert idle.woken().entries[0].lane == "risk"


def test_while_a_wake_up_waits_for_somebody_none_carries_a_claim(idle):
    idle.accept(*ids(2))
    [order_id] = ids(1)
    idle.accept(order_id)
    assert idle.woken() is None
    assert not idle.store.open_cancel(order_id).claimed


def test_where_nobody_listens_none_is_claimed(idle):
    idle.server.delete(idle.keys.listeners("strategy"))
    [order_id] = ids(1)
    assert not idle.accept(order_id).listener_woken
    assert not idle.store.open_cancel(order_id).claimed


def one_of_two(idle, order_id):
    idle.accept(order_id, *ids(1))


def one_of_which_something_is_known(idle, order_id):
    idle.accept(order_id, known=Known("{}", "read", 0.0))


def one_of_a_mass_cancel(idle, order_id):
    idle.server.hset(idle.keys.mass_cancel("m"), mapping={"fence": "1"})
    idle.accept(order_id, fence=Fence("m", "1"))


def one_that_joins(idle, order_id):
    idle.server.delete(idle.keys.idle)
    idle.accept(order_id)
    assert idle.woken() is None
    idle.store.show_listeners(BOTH, life_s=LONG_S, idle=IDLE)
    assert idle.accept(order_id, requested_by="bob").joined


@pytest.mark.parametrize(
    "accept_it", [one_of_two, one_of_which_something_is_known, one_of_a_mass_cancel, one_that_joins]
)
def test_what_is_not_a_lone_new_cancel_is_due(idle, accept_it):
    [order_id] = ids(1)
    accept_it(idle, order_id)
    assert idle.woken() is None
    assert not idle.store.open_cancel(order_id).claimed
    assert idle.server.hlen(idle.keys.idle) == 1, "a worker is idle all the while"


def test_who_stops_listening_takes_back_its_offer_and_what_nobody_has_come_to(idle):
    idle.accept("a")
    idle.become_idle()
    [(lane, wake_up)] = idle.store.stop_listening(BOTH).items()
    assert lane is Lane.STRATEGY
    assert [entry.order_id for entry in wake_up.claim.entries] == ["a"]
    idle.accept("b")
    assert [entry.order_id for entry in idle.claim().entries] == ["b"]
    assert idle.store.stop_listening(BOTH) == {}


def test_the_claim_of_a_wake_up_ends_with_its_lease_and_is_fenced_from_then_on(idle):
    [order_id] = ids(1)
    idle.become_idle(lease_s=0.05)
    idle.accept(order_id)
    [granted] = idle.woken().entries
    [newer] = wait_until(lambda: idle.claim().entries, within_s=2, what="the lease's end")
    assert (newer.order_id, newer.interrupted, newer.first_sent_ms) == (order_id, True, "1000:2000")
    assert idle.store.extend([granted], lease_s=LONG_S) == [False]
    settled = [Settle(each, CancelResult(order_id, Outcome.CANCELED)) for each in (granted, newer)]
    assert idle.store.conclude(settled) == [False, True]


def test_who_has_the_claim_of_a_wake_up_is_known_once_its_lease_is_extended(idle):
    [order_id] = ids(1)
    idle.accept(order_id)
    [entry] = idle.woken().entries
    assert ":" not in idle.store.open_cancel(order_id).claimed_by
    assert idle.store.extend([entry], lease_s=LONG_S) == [True]
    assert idle.store.open_cancel(order_id).claimed_by == "a-host:1"


def test_a_claim_counts_from_before_it_was_made_however_long_the_wake_up_has_waited(idle):
    asked = time.monotonic()
    idle.become_idle()
    idle.accept(*ids(1))
    made = time.monotonic()
    wait_until(lambda: time.monotonic() > made + 0.3)
    wake_up = idle.store.listen(BOTH, within_s=0.1)
    assert asked - 0.002 <= wake_up.since <= made
    fresh = CancelStore(idle.server, RedisSettings.from_env({"REDIS_URL": "redis://127.0.0.1:1/0"}))
    assert fresh.clock.earliest_s(time.time()) < asked - LEASE_S, "who has never heard the time knows nothing"


ENTRY = ["an-order", "g1", '{"order_id": "an-order"}', "", "", "", "risk", "1000", "9000", "", ""]


@pytest.mark.parametrize(
    "text",
    [
        "1",
        "",
        "no JSON",
        "[",
        "[]",
        "{}",
        "[1]",
        json.dumps([1000, []]),
        json.dumps(["when", ["write", "2", [ENTRY]]]),
        json.dumps([1000, ["write", "2", []]]),
        json.dumps([1000, ["write", "many", [ENTRY]]]),
        json.dumps([1000, ["write", "2", [ENTRY, ENTRY]]]),
        json.dumps([1000, ["write", "2", [["../orders", *ENTRY[1:]]]]]),
        json.dumps([1000, ["write", "2", [ENTRY[:5]]]]),
        json.dumps([1000, ["write", "2", [[*ENTRY[:6], "no lane", *ENTRY[7:]]]]]),
    ],
)
def test_a_wake_up_that_carries_no_claim_is_a_wake_up_like_any_other(idle, text):
    idle.server.lpush(idle.keys.wake_up("risk"), text)
    assert idle.store.listen(BOTH, within_s=0.1) == WakeUp()


# -- through real workers


def test_a_lone_cancel_is_sent_and_settled_without_another_claim(crew):
    with crew.apart() as apart:
        apart.start()
        for _ in range(10):
            wait_idle(apart.client, 1)
            [order_id] = crew.place()
            result = apart.client.cancel(order_id).result(timeout=PATIENCE_S)
            assert (result.outcome, result.attempts, result.confirmed_by) == ("canceled", 1, "cancel")
        # (On a busy machine a worker may be slow to listen again.)
        assert int(apart.client._server.get("kalshi-cancel:fence") or 0) <= 5, "a claim takes a number"


def test_a_wake_up_that_killed_workers_have_taken_is_made_up_for_within_seconds(crew):
    with crew.apart(workers=2) as apart:
        workers = apart.start()
        wait_idle(apart.client, 2)
        [order_id] = crew.place()
        with crew.frozen(*workers):
            pending = apart.client.cancel(order_id)
            assert apart.client.status(order_id).open.claimed
            for each in workers[:1]:
                each.kill()
        killed = time.monotonic()
        result = pending.result(timeout=PATIENCE_S)
        assert time.monotonic() - killed <= WORST_S
        assert result.outcome == "canceled"
        assert crew.effective()[order_id] == 1


@pytest.mark.parametrize("meaning", [Meaning.PAUSED, Meaning.KEY_REFUSED])
def test_while_the_breaker_is_open_what_a_wake_up_carries_goes_back_unsent(crew, meaning):
    [order_id] = crew.place()
    with crew.apart() as apart:
        environment = {**crew.stack.environment, "REDIS_URL": apart.url}
        settings = WorkerSettings.from_env(environment)
        server = connect(settings.redis)
        store = CancelStore(server, settings.redis, name="a-host:1")
        pacer = Pacer(server, settings.redis.key_prefix, Limits(100, 100, 100, 100))
        pacer.set_limits(pacer.limits)
        store.show_listeners(BOTH, life_s=LONG_S)
        store.turn((), IDLE)
        apart.client.cancel(order_id)
        wake_up = store.listen(BOTH, within_s=PATIENCE_S)
        assert wake_up.claim is not None
        dispatcher = Dispatcher(
            store,
            Exchange.from_settings(settings),
            pacer,
            DispatchSettings.of(settings, lanes=BOTH, senders=1),
        )
        dispatcher.breaker.note(Failure(meaning, Problem("x", "in a test", 401)))
        dispatcher.stopping.set()
        dispatcher.serve(wake_up=wake_up)
        assert crew.sent()[order_id] == 0
        [entry] = claim_from(store, BOTH, at_most=5, lease_s=LONG_S, exchange_ms=None).entries
        assert entry.order_id == order_id
        server.close()


def test_a_worker_that_was_frozen_past_the_lease_sends_nothing_of_what_its_wake_up_carried(crew):
    with crew.apart() as apart:
        [worker] = apart.start()

        def calls_for_one():
            """How many there are for an order whose claim the worker gets when its lease is over."""
            wait_idle(apart.client, 1)
            [order_id] = crew.place()
            with crew.frozen(worker):
                pending = apart.client.cancel(order_id)
                frozen = time.monotonic()
                wait_until(lambda: time.monotonic() > frozen + 2 * LEASE_S)
                assert apart.client.status(order_id).open.next_due_s < 0
            assert pending.result(timeout=PATIENCE_S).outcome == "canceled"
            return crew.sent()[order_id]

        # On a busy machine the lease of the one that was sent may run out, too; but not each time.
        assert any(calls_for_one() == 1 for _ in range(4))
