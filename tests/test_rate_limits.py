"""The account's token buckets: their arithmetic, what a 429 teaches, workers that never exceed them."""

from __future__ import annotations

import json
import math
import threading
import time

import pytest
from buckets import LIMITS, ON_THE_WAY_S, Account, usable
from crew import PATIENCE_S
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kalshi_cancel.model.requests import Lane
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store.rate_limits import Limits, Pacer
from kalshi_cancel.store.scripts import StoreError, connect
from trials.stack import wait_until

A_MS = 0.31  # tokens: waits are told in whole milliseconds, at 300 tokens a second
HOLD_S = 0.25  # and for how long a corrected bucket stands still
RESERVE = 0.2
say = print  # figures for the reader; pytest -rA shows them
CANCEL_COST = 2
LIST_COST = 10.0


@pytest.fixture
def account(shared_crew):
    account = Account(shared_crew.redis.url)
    yield account
    account.server.close()


@pytest.fixture(scope="module")
def crew_environment():
    return {"KALSHI_BATCH_MOST": "100"}


# -- the arithmetic


class Oracle:
    """A token bucket written down once more; real time passes too, so a level is known within bounds."""

    def __init__(self, refill, capacity):
        self.refill = refill
        self.capacity = usable(capacity, refill)
        self.low = self.high = self.capacity

    def pass_time(self, least_s, most_s):
        self.low = min(self.capacity, self.low + self.refill * least_s)
        self.high = min(self.capacity, self.high + self.refill * most_s)

    def judge(self, wait_s, tokens, kept):
        """Checks an answer and follows it."""
        wanted, slack = tokens + kept * self.capacity, 0.01
        if wait_s == 0:
            assert wanted <= self.high + slack, "taken although too few were there"
            self.low, self.high = max(self.low, wanted) - tokens, self.high - tokens
        else:
            assert wanted >= self.low - slack, "refused although enough were there"
            assert wait_s >= (wanted - self.high) / self.refill - 0.001
            assert wait_s <= (wanted - self.low) / self.refill + 0.002
            self.high = min(self.high, wanted)


STEPS = st.lists(
    st.tuples(
        st.floats(0, 3, allow_nan=False),  # seconds that pass before
        st.integers(1, 400),  # tokens
        st.sampled_from([0.0, 0.2, 0.5]),  # kept for others
    ),
    min_size=1,
    max_size=25,
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, refill=st.sampled_from([100.0, 300.0, 4000.0]), capacity=st.sampled_from([100.0, 600.0]))
def test_a_bucket_is_a_token_bucket_with_continuous_refill(shared_crew, steps, refill, capacity):
    account = Account(shared_crew.redis.url, Limits(refill, capacity, refill, capacity))
    oracle = Oracle(refill, capacity)
    asked = time.monotonic()
    for seconds, tokens, kept in steps:
        account.pass_time(seconds)
        before, asked = asked, time.monotonic()
        wait_s = account.pacer.take("write", tokens, kept_share=kept)
        oracle.pass_time(round(seconds, 6), seconds + time.monotonic() - before)
        oracle.judge(wait_s, tokens, kept)
    account.server.close()


def test_what_is_taken_comes_back_at_the_refill_rate_and_not_beyond_the_capacity(account):
    full, began = usable(600, 300), time.monotonic()
    assert account.tokens() == pytest.approx(full, abs=A_MS)
    assert account.pacer.take("write", 300) == 0
    account.pass_time(0.5)
    came_back = account.tokens() - (full - 300)
    most_s = 0.5 + time.monotonic() - began  # the real time between the two counts too
    assert 300 * 0.5 - A_MS <= came_back <= 300 * most_s + A_MS
    account.pass_time(60)
    assert account.tokens() == pytest.approx(full, abs=A_MS)


def test_a_clock_that_is_set_back_takes_no_tokens_away(account):
    assert account.pacer.take("write", 10) == 0
    account.pass_time(-30)
    assert account.pacer.take("write", 10) == 0


def test_tokens_are_taken_all_or_none_and_the_wait_is_told(account):
    assert account.pacer.take("write", 500) == 0
    left = account.tokens()
    wait_s = account.pacer.take("write", left + 90)
    assert wait_s == pytest.approx(0.3, abs=0.1)
    assert account.tokens() >= left
    account.pass_time(wait_s)
    assert account.pacer.take("write", left + 90) == 0


def test_reads_writes_and_every_shards_writes_have_buckets_of_their_own(account):
    assert account.pacer.take("write", 540) == 0
    assert account.pacer.take("write", 100) > 0
    for bucket, tokens in (("read", 160), ("write:1", 540), ("write:2", 540)):
        assert account.pacer.take(bucket, tokens) == 0, bucket
        assert account.pacer.take(bucket, tokens) > 0, bucket
    paid_from = {key.removeprefix(f"{account.prefix}:bucket:") for key in account.buckets()}
    assert paid_from == {"read", "write", "write:1", "write:2"}


def test_the_tokens_of_shards_can_be_looked_at_without_taking_any(account):
    account.pacer.take("write:2", 500)
    for _ in range(2):
        now = account.pacer.levels(["write", "write:1", "write:2"])
        assert now["write"].tokens == now["write:1"].tokens == usable(600, 300)
        assert 40 <= now["write:2"].tokens < 200


def test_workers_share_the_buckets_and_the_limits(account):
    other = account.another_workers(Limits(1.0, 1.0, 1.0, 1.0))
    assert other.take("write", 540) == 0, "the shared limits count, not a worker's own"
    assert account.pacer.take("write", 540) > 1
    other.set_limits_unless_known()
    account.pass_time(2)
    assert account.pacer.take("write", 540) == 0, "what is configured does not overrule what is known"
    other.set_limits(Limits(100.0, 100.0, 50.0, 50.0))
    assert account.tokens() <= usable(50, 50) + 1


def test_configured_limits_count_until_true_ones_are_known(shared_crew):
    account = Account(shared_crew.redis.url)
    account.server.delete(f"{account.prefix}:limits")
    pacer = account.another_workers(Limits(10.0, 10.0, 20.0, 20.0))
    pacer.set_limits_unless_known()
    assert pacer.levels(["write"])["write"].tokens == usable(20, 20)
    account.server.close()


def test_an_outage_of_redis_is_an_error_for_who_asks_and_none_for_who_reports_a_429(shared_crew):
    settings = RedisSettings.from_env({"REDIS_URL": "redis://127.0.0.1:1/0"})
    pacer = Pacer(connect(settings), "p", LIMITS)
    with pytest.raises(StoreError):
        pacer.take("write", 1)
    pacer.correct("write", 1, taken_at=time.monotonic())


# -- after a 429


def turned_away(account, tokens=2, *, taken_ago_s=0.0, by=None):
    """A call of so many tokens, taken so long ago, gets a 429; whether the tokens must have been there."""
    return (by or account.pacer).correct("write", tokens, taken_at=time.monotonic() - taken_ago_s)


def share(account):
    """What of the refill counts."""
    return account.level().share


def after_the_hold(account, seconds=0.0):
    """Lets the time pass for which a corrected bucket stands still, and more."""
    account.pass_time(HOLD_S + seconds)


def test_a_429_corrects_the_bucket_once_for_all_workers(account):
    for pacer in (account.pacer, account.another_workers(), account.another_workers()):
        turned_away(account, by=pacer)
    assert account.level().refused == 1
    assert share(account) == 0.5
    assert account.pacer.take("write", 60) > 0, "the exchange's bucket is empty, so is ours"
    assert account.pacer.take("read", 100) == 0


def test_who_corrects_a_bucket_is_told_and_nobody_else(account):
    told = []
    pacers = [Pacer(account.server, account.prefix, LIMITS, corrected=told.append) for _ in range(2)]
    for pacer in pacers:
        turned_away(account, by=pacer)
    assert told == ["write"]


def test_what_is_turned_away_while_nothing_is_let_through_for_a_second_lacks_no_tokens(account):
    """Its size may be the reason; also where it is turned away several times within that second."""
    told = []
    for _ in range(4):
        told.append(turned_away(account, 44))
        after_the_hold(account, 0.35)
    assert told == [False, False, True, True]
    [bucket] = account.buckets()
    account.server.hincrbyfloat(
        bucket, "spent", 46
    )  # this call's tokens, and those of one that was let through
    assert not turned_away(account, 44)


def test_a_corrected_bucket_stands_still_for_a_moment(account):
    turned_away(account)
    assert account.pacer.take("write", 2) == pytest.approx(HOLD_S + 2 / 150, abs=0.1)
    after_the_hold(account, 0.1)
    assert account.level().tokens == pytest.approx(15, abs=10)


def test_calls_that_were_under_way_when_a_bucket_was_corrected_are_no_news(account):
    turned_away(account)
    after_the_hold(account, 1)
    turned_away(account, taken_ago_s=2)
    assert account.level().refused == 1
    turned_away(account)
    assert account.level().refused == 2


def test_after_a_429_the_refill_recovers_by_a_twentieth_a_second(account):
    turned_away(account)
    after_the_hold(account, 11)
    account.pacer.take("write", account.level().tokens)
    account.pass_time(1)
    assert account.level().tokens >= 0.98 * 300


def test_the_refill_follows_what_was_let_through_since_the_last_429(account):
    turned_away(account)
    after_the_hold(account, 1.0)
    for tokens in (100, 40):
        assert account.pacer.take("write", tokens) == 0
    turned_away(account, 40)
    assert share(account) == pytest.approx(100 / 300, abs=0.05)


def test_what_comes_back_late_with_a_429_was_not_let_through_either(account):
    turned_away(account)
    after_the_hold(account, 1.0)
    for tokens in (60, 40, 40):
        assert account.pacer.take("write", tokens) == 0
    turned_away(account, 40)
    turned_away(account, 40, taken_ago_s=0.5)
    assert account.level().refused == 2
    assert share(account) == pytest.approx(60 / 300, abs=0.04)


def test_one_429_after_the_other_never_stops_the_refill_altogether(account):
    for _ in range(30):
        turned_away(account)
        after_the_hold(account, 0.1)
    assert account.level().refused == 30
    account.pass_time(1)
    assert account.level().tokens >= 2


def test_other_limits_explain_the_429s_and_count_at_once(account):
    turned_away(account)
    account.pacer.set_limits(account.pacer.limits)
    assert share(account) == 0.5, "these were known"
    account.pacer.set_limits(Limits(200, 200, 100, 200))
    assert share(account) == 1
    assert account.pacer.take("write", 2) <= 0.02 + 0.001, "it stands still no more"
    turned_away(account, taken_ago_s=1)
    assert share(account) == 1, "that call was sent by the old limits"


def test_a_clock_that_is_set_back_does_not_hold_a_corrected_bucket(account):
    turned_away(account)
    account.pass_time(-30)
    assert account.pacer.take("write", 2) < 1
    turned_away(account)
    assert account.level().refused == 2


# -- what the exchange says of the limits

BODY = {
    "usage_tier": "advanced",
    "read": {"refill_rate": 300, "bucket_capacity": 300},
    "write": {"refill_rate": 300, "bucket_capacity": 600},
    "grants": [],
}
COSTS = {
    "default_cost": 10,
    "endpoint_costs": [
        {"method": "DELETE", "path": "/trade-api/v2/portfolio/events/orders/:order_id", "cost": 3},
        {"method": "GET", "path": "/trade-api/v2/portfolio/orders/:order_id", "cost": 4},
        {"method": "GET", "path": "/trade-api/v2/portfolio/orders/", "cost": 12},
    ],
}


def test_limits_and_costs_are_read_as_the_exchange_writes_them():
    assert Limits.parse(BODY, COSTS) == Limits(300, 300, 300, 600, 3, 4, 12)
    braces = json.loads(json.dumps(COSTS).replace(":order_id", "{id}"))
    assert Limits.parse(BODY, braces) == Limits.parse(BODY, COSTS), "whatever a parameter is called"
    assert Limits.parse(BODY, {"endpoint_costs": []}) == Limits(300, 300, 300, 600, 10, 10, 10)


@pytest.mark.parametrize(
    ("limits", "costs"),
    [
        ({}, COSTS),
        ({**BODY, "write": None}, COSTS),
        ({**BODY, "write": {"refill_rate": "many", "bucket_capacity": 1}}, COSTS),
        ({**BODY, "write": {"refill_rate": 0, "bucket_capacity": 100}}, COSTS),
        ({**BODY, "read": {"refill_rate": -1, "bucket_capacity": 100}}, COSTS),
        ({**BODY, "read": {"refill_rate": math.nan, "bucket_capacity": 100}}, COSTS),
        ({**BODY, "read": {"refill_rate": math.inf, "bucket_capacity": 100}}, COSTS),
        (BODY, {}),
        (BODY, {"endpoint_costs": None}),
        (BODY, {"endpoint_costs": [{"method": "GET"}]}),
        (BODY, {"endpoint_costs": ["GET"]}),
        (BODY, {"default_cost": 0, "endpoint_costs": []}),
    ],
)
def test_limits_that_cannot_be_true_are_none(limits, costs):
    assert Limits.parse(limits, costs) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "read",
                    "write",
                    "refill_rate",
                    "bucket_capacity",
                    "endpoint_costs",
                    "method",
                    "path",
                    "cost",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(limits=st.dictionaries(st.sampled_from(["read", "write"]), JSON), costs=JSON)
def test_whatever_the_exchange_says_the_limits_are_usable_or_none(limits, costs):
    known = Limits.parse(limits, costs if isinstance(costs, dict) else {})
    assert known is None or known.write_refill > 0


# -- several workers


def within_the_bucket(calls, capacity, refill):
    """Whether no stretch of time saw more tokens than the bucket can have given (as far as ms can tell)."""
    paid = sorted((call["received_ms"], call["tokens"]) for call in calls if call["tokens"])
    worst = 0.0
    for start in range(len(paid)):
        spent = 0
        for at_ms, tokens in paid[start:]:
            spent += tokens
            seconds = (at_ms - paid[start][0]) / 1000 + 0.005
            worst = max(worst, spent - (capacity + refill * seconds))
    return worst <= 0


# The exchange may be slow to tell the limits, or not tell them at all (the configured ones are Basic's).
@pytest.mark.parametrize("fault", [("slow", {"seconds": 1.0}), ("http_500", {})])
def test_a_worker_that_starts_with_cancels_waiting_paces_the_very_first(crew, fault):
    kind, how = fault
    crew.control.configure(tier="basic")
    crew.control.fault(kind, operation="limits", **how)
    order_ids = crew.place(120)
    with crew.apart() as apart:
        pending = apart.client.cancel_many(order_ids, lane=Lane.RISK)
        apart.start()
        assert {result.outcome for result in pending.results(timeout=PATIENCE_S)} == {"canceled"}
    crew.control.clear_faults()
    assert [call for call in crew.cancels() if call["status"] == 429] == []
    assert within_the_bucket(crew.cancels(), 100, 100)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("tier", "bucket", "orders"), [("basic", (100, 100), 150), ("advanced", (300, 600), 600)]
)
def test_workers_never_exceed_the_bucket_together_and_waste_little(crew, tier, bucket, orders, workers):
    refill, capacity = bucket
    crew.control.configure(tier=tier)
    order_ids = crew.place(orders)
    with crew.apart(workers=workers) as apart:
        apart.start()
        started = time.monotonic()
        pending = apart.client.cancel_many(order_ids, lane=Lane.RISK)
        assert {result.outcome for result in pending.results(timeout=PATIENCE_S)} == {"canceled"}
        took_s = time.monotonic() - started
    calls = crew.cancels()
    bound_s = (orders * CANCEL_COST - capacity) / refill
    refused = [call for call in crew.control.calls() if call["status"] == 429]
    figures = f"{took_s:.2f} s, bound {bound_s:.2f} s, {len(calls)} calls, {len(refused)} 429s"
    say(f"{tier}, {workers} workers: {figures}")
    # None on a quiet machine; a call that a busy one delays by more than ON_THE_WAY_S may meet one.
    assert len(refused) <= len(calls) // 50
    assert within_the_bucket(calls, capacity, refill)
    assert took_s <= bound_s + ON_THE_WAY_S + 2.0


def test_a_foreign_client_that_spends_half_of_the_budget_unseen_is_lived_with(crew):
    crew.control.configure(tier="advanced")
    order_ids = crew.place(400)
    done = threading.Event()

    def spend():
        """150 tokens a second, in small portions."""
        last = time.monotonic()
        while not done.wait(0.02):
            now = time.monotonic()
            crew.control.drain("write", (now - last) * 150)
            last = now

    foreign = threading.Thread(target=spend)
    with crew.apart(workers=2) as apart:
        apart.start()
        crew.control.drain("write", 300)
        foreign.start()
        started = time.monotonic()
        try:
            pending = apart.client.cancel_many([{"order_id": each, "deadline_s": 60} for each in order_ids])
            results = pending.results(timeout=PATIENCE_S)
        finally:
            took_s = time.monotonic() - started
            done.set()
            foreign.join()
    refused = [call for call in crew.cancels() if call["status"] == 429]
    bound_s = (400 * CANCEL_COST - 300) / 150
    share = f"{len(refused)} 429s of {len(crew.cancels())} calls"
    say(f"half of the budget: {took_s:.2f} s, bound {bound_s:.2f} s, ratio {took_s / bound_s:.2f}, {share}")
    assert {result.outcome for result in results} == {"canceled"}
    assert len(refused) <= 40
    assert took_s <= 3 * bound_s


@pytest.mark.parametrize("told", [True, False])
def test_limits_that_fall_unseen_cost_a_mass_cancel_few_429s(crew, told):
    """`told`: whether the exchange says what its limits are when it is asked."""
    crew.control.configure(buckets={"read": [10_000, 10_000], "write": [8_000, 16_000]})
    with crew.apart() as apart:
        apart.start()
        server = connect(RedisSettings.from_env({"REDIS_URL": apart.url}))
        wait_until(lambda: server.hget("kalshi-cancel:limits", "write_refill") == "8000", what="limits")
        crew.place(1000)
        crew.control.configure(buckets={"read": [600, 600], "write": [600, 1_200]})
        if not told:
            crew.control.fault("http_500", operation="limits")
        pending = apart.client.mass_cancel({"everything": True})
        report = pending.result(timeout=PATIENCE_S)
        server.close()
    crew.control.clear_faults()
    refused = [call for call in crew.control.calls() if call["status"] == 429]
    sizes = [len(call["order_ids"]) for call in crew.control.calls("batch")]
    say(f"told {told}: {len(refused)} 429s of {len(sizes)} batches; {report['actual_s']} s")
    assert (report["flat"], report["orders_affected"]) == (True, 1000)
    assert len(refused) <= 20
