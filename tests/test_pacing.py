"""The account's token buckets: their arithmetic, what is kept for risk, workers that never exceed them."""

from __future__ import annotations

import json
import math
import statistics
import threading
import time
import uuid
from collections import Counter
from contextlib import ExitStack

import pytest
from crew import PATIENCE_S, SENDERS, ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.pending import ClaimRequest, Known
from kalshi_cancel.store.rate_limits import Limits, Pacer
from kalshi_cancel.store.scripts import StoreError, connect
from trials.stack import wait_until
from worker.dispatch.read_slots import ReadSlots

LIMITS = Limits(200.0, 200.0, 300.0, 600.0)
A_MS = 0.31  # tokens: waits are told in whole milliseconds, at 300 tokens a second
ON_THE_WAY_S = (
    0.2  # kalshi_cancel/store/lua/buckets.lua: what a full bucket misses in this time is not counted on
)
HOLD_S = 0.25  # and for how long a corrected bucket stands still
RESERVE = 0.2
say = print  # figures for the reader; pytest -rA shows them
CANCEL_COST = 2
LIST_COST = 10.0


@pytest.fixture(scope="module")
def crew_environment():
    return {"KALSHI_BATCH_MOST": "100"}


class Account:
    """The buckets under a prefix of a test's own, where time can be let pass at once."""

    def __init__(self, url, limits=LIMITS):
        self.settings = RedisSettings.from_env(
            {"REDIS_URL": url, "KALSHI_KEY_PREFIX": f"test-{uuid.uuid4().hex[:8]}"}
        )
        self.server = connect(self.settings)
        self.prefix = self.settings.key_prefix
        self.pacer = self.another_workers(limits)
        self.pacer.set_limits(limits)

    def another_workers(self, limits=LIMITS):
        return Pacer(self.server, self.prefix, limits)

    def buckets(self):
        """The keys of the buckets that were paid from."""
        return self.server.keys(f"{self.prefix}:bucket:*")

    def level(self, bucket="write"):
        """How a bucket stands."""
        return self.pacer.levels([bucket])[bucket]

    def pass_time(self, seconds):
        """Moves every moment of the buckets back."""
        for key in self.buckets():
            for field in ("at_us", "share_at_us", "since_us"):
                if self.server.hexists(key, field):
                    self.server.hincrby(key, field, -round(seconds * 1e6))

    def tokens(self, bucket="write"):
        """The tokens that can be had at this moment, by asking for too many."""
        lacking = self.pacer.take(bucket, 1e9)
        refill = self.refill(bucket)
        return 1e9 - lacking * refill

    def refill(self, bucket):
        limits = self.pacer.limits
        return limits.read_refill if bucket == "read" else limits.write_refill


@pytest.fixture
def account(shared_crew):
    account = Account(shared_crew.redis.url)
    yield account
    account.server.close()


def usable(capacity, refill):
    """The part of a bucket that is ever counted on."""
    return max(capacity - refill * ON_THE_WAY_S, capacity / 2)


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


# -- what is kept for risk


def test_strategy_cannot_take_the_last_fifth_and_risk_can(account):
    full = usable(600, 300)
    assert account.pacer.take("write", full * (1 - RESERVE), kept_share=RESERVE) == 0
    assert account.pacer.take("write", 30, kept_share=RESERVE) > 0
    assert account.pacer.take("write", full * RESERVE) == 0
    assert account.pacer.take("write", 30) > 0


def claimed(account, store, lane, at_most=1000):
    return store.claim(
        [lane], at_most=at_most, lease_s=60, exchange_ms=None, risk_reserve=RESERVE, cancel_cost=CANCEL_COST
    )


def test_a_claim_takes_as_many_orders_as_there_are_tokens_above_the_reserve(account):
    store = CancelStore(account.server, account.settings)
    for lane in Lane:
        store.accept([CancelRequest(each) for each in ids(400)], lane=lane, default_deadline_s=60)
    strategy = claimed(account, store, Lane.STRATEGY)
    above = (1 - RESERVE) * usable(600, 300) / CANCEL_COST
    assert above <= len(strategy.entries) <= above + 5
    assert (strategy.bucket, strategy.tokens) == ("write", len(strategy.entries) * CANCEL_COST)
    held_up = claimed(account, store, Lane.STRATEGY)
    if not held_up.entries:
        assert 0 < held_up.tokens_in_s <= CANCEL_COST / 300 + 0.001
    risk = claimed(account, store, Lane.RISK)
    kept = RESERVE * usable(600, 300) / CANCEL_COST
    assert kept - 3 <= len(risk.entries) <= kept + 10
    assert claimed(account, store, Lane.STRATEGY).tokens_in_s > 0


def test_a_claim_that_finds_nothing_due_takes_no_tokens(account):
    store = CancelStore(account.server, account.settings)
    claim = claimed(account, store, Lane.RISK)
    assert (claim.entries, claim.tokens) == ((), 0)
    assert account.tokens() == pytest.approx(usable(600, 300), abs=1)


# -- several calls in one step


@pytest.fixture
def shards(account):
    """A store with risk cancels of shards from 1, and how senders claim them."""

    class Shards:
        store = CancelStore(account.server, account.settings)

        def accept(self, shard, number):
            requests = [CancelRequest(each, exchange_index=shard) for each in ids(number)]
            self.store.accept(requests, lane=Lane.RISK, default_deadline_s=60)

        def claims(self, calls, at_most=1):
            wanted = ClaimRequest((Lane.RISK,), at_most=at_most, lease_s=60, exchange_ms=None, calls=calls)
            return self.store.turn((), wanted)[1]

    return Shards()


def test_in_one_step_each_of_several_hands_is_given_a_single_call_that_its_shards_bucket_pays_for(
    account, shards
):
    for shard in (1, 2, 3):
        shards.accept(shard, 2)
    claims = shards.claims(5)
    assert [(len(claim.entries), claim.tokens) for claim in claims] == [(1, CANCEL_COST)] * 5
    for claim in claims:
        assert claim.bucket == f"write:{claim.entries[0].request.exchange_index}"
        assert claim.is_more
    assert len({claim.entries[0].order_id for claim in claims}) == 5
    assert account.tokens() == pytest.approx(usable(600, 300), abs=1), "nothing else was paid from"
    last, nothing = shards.claims(5), shards.claims(5)
    assert [(len(claim.entries), claim.is_more) for claim in last + nothing] == [(1, False), (0, False)]


def test_a_call_for_many_has_its_step_to_itself(shards):
    shards.accept(0, 30)
    shards.accept(1, 3)
    [claim] = shards.claims(5, at_most=20)
    assert (len(claim.entries), claim.is_more) == (20, True)


def test_a_step_ends_where_the_tokens_do(account, shards):
    shards.accept(1, 4)
    account.pacer.take("write:1", usable(600, 300) - 2 * CANCEL_COST)
    claims = shards.claims(4)
    assert 2 <= len(claims) <= 3, "one more at most has been refilled meanwhile"
    assert not claims[0].is_more
    assert 0 < claims[0].tokens_in_s <= CANCEL_COST / 300 + 0.001


def test_the_shards_bucket_that_holds_the_most_is_spent_first(account, shards):
    for shard in (1, 2, 3):
        shards.accept(shard, 60)
    account.pacer.take("write:1", 100)
    account.pacer.take("write:3", 50)
    paid = Counter(claim.bucket for claim in shards.claims(60))
    assert paid["write:2"] > paid["write:3"] > paid["write:1"] == 0


def test_the_unscoped_bucket_is_kept_for_those_whom_nothing_else_pays_for(account, shards):
    shards.accept(0, 400)
    shards.accept(1, 60)
    paid = []
    while (claims := shards.claims(10, at_most=50))[0].entries:
        paid += [(claim.bucket, entry.request.exchange_index) for claim in claims for entry in claim.entries]
    assert {shard for bucket, shard in paid if bucket == "write"} == {0}
    assert Counter(paid)["write:1", 1] == 60


def test_a_bucket_that_refills_fast_saves_the_shards_single_calls(account, shards):
    account.pacer.set_limits(Limits(1000, 1000, 1000, 2000))
    shards.accept(0, 5)
    shards.accept(1, 60)
    [first], [second] = shards.claims(10, at_most=50), shards.claims(10, at_most=50)
    assert [(len(claim.entries), claim.bucket) for claim in (first, second)] == [(50, "write"), (15, "write")]


def test_a_bucket_that_refills_slowly_is_kept_while_the_shards_have_tokens(account, shards):
    shards.accept(0, 5)
    shards.accept(1, 60)
    [first] = shards.claims(10, at_most=50)
    assert (len(first.entries), first.bucket) == (5, "write"), "others of its own may come yet"
    assert {claim.bucket for claim in shards.claims(10, at_most=50)} == {"write:1"}


def test_a_bucket_that_refills_slowly_helps_shards_that_have_no_tokens(account, shards):
    account.pacer.set_limits(Limits(300, 600, 0.1, 600))
    shards.accept(1, 60)
    assert account.pacer.take("write:1", usable(600, 0.1)) == 0
    [claim] = shards.claims(10, at_most=50)
    assert (len(claim.entries), claim.bucket) == (50, "write")


# -- after a 429


def turned_away(account, tokens=2, *, taken_ago_s=0.0, by=None):
    """A call of so many tokens, taken so long ago, is answered with a 429."""
    (by or account.pacer).correct("write", tokens, taken_at=time.monotonic() - taken_ago_s)


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


# -- risk first


def test_risk_overtakes_thousands_of_waiting_strategy_cancels(crew):
    crew.control.configure(tier="advanced")
    calm, urgent = crew.place(2000), crew.place(20)
    with crew.apart(workers=2) as apart:
        apart.start()
        apart.client.cancel_many([{"order_id": each, "deadline_s": 60} for each in calm])
        crew.wait_many_sent(200)  # what the bucket held is gone: from now on everybody waits for tokens
        took_ms = []
        for order_id in urgent:
            asked_ms = time.time() * 1000
            pending = apart.client.cancel(order_id, lane=Lane.RISK)
            assert pending.result(timeout=PATIENCE_S).outcome == "canceled"
            [call, *_] = [each for each in crew.control.calls(order_id=order_id) if each["tokens"]]
            took_ms.append(call["received_ms"] - asked_ms)
        still = sum(1 for each in apart.client.open_cancels() if each.lane is Lane.STRATEGY)
    p50, p99 = statistics.median(took_ms), max(took_ms)
    say(f"risk on the wire after {p50:.0f} ms (p50), {p99:.0f} ms (worst of 20); {still} others waiting")
    assert still > 500, "it was an overtaking indeed"
    assert max(took_ms) < 500
    assert [call for call in crew.control.calls() if call["status"] == 429] == []


@pytest.mark.parametrize("lane", list(Lane))
def test_new_cancels_do_not_wait_behind_the_read_backs_of_hundreds_of_unknown_orders(crew, lane):
    live = crew.place(40)
    with crew.apart(KALSHI_READ_LAG_S="2") as apart:
        apart.start()
        apart.client.cancel_many([{"order_id": each, "deadline_s": 60} for each in ids(600)], lane=Lane.RISK)
        wait_until(lambda: crew.control.calls("read"), within_s=PATIENCE_S, what="the first read-backs")
        results = apart.client.cancel_many(live, lane=lane).results(timeout=PATIENCE_S)
        assert {result.outcome for result in results} == {"canceled"}
        assert sum(1 for _ in apart.client.open_cancels()) > 300, "they were overtaken"


def test_read_backs_leave_the_tokens_of_a_listing(account):
    store = CancelStore(account.server, account.settings)
    requests = [CancelRequest(each) for each in ids(400)]
    known = Known("", "read", 0.0)
    store.accept(requests, lane=Lane.RISK, default_deadline_s=60, known=known)
    while claimed(account, store, Lane.RISK).entries:
        pass
    assert account.pacer.take("read", LIST_COST) == 0.0


def test_what_was_never_sent_is_claimed_before_what_is_to_be_read_back(account):
    store = CancelStore(account.server, account.settings)
    [old], [new] = ids(1), ids(1)
    store.accept([CancelRequest(old)], lane=Lane.RISK, default_deadline_s=60, known=Known("", "read", 0.0))
    store.accept([CancelRequest(new)], lane=Lane.RISK, default_deadline_s=60)
    wanted = {"at_most": 5, "lease_s": 60, "exchange_ms": None, "reads_after_s": 1.0}
    assert [each.order_id for each in store.claim([Lane.RISK], **wanted).entries] == [new]
    nothing = store.claim([Lane.RISK], **wanted, reads=0)
    assert (nothing.entries, nothing.is_more, nothing.next_due_s) == ((), False, pytest.approx(60, abs=5))
    assert [each.order_id for each in store.claim([Lane.RISK], **wanted, reads=1).entries] == [old]


def test_a_read_back_that_has_waited_for_long_goes_first(account):
    store = CancelStore(account.server, account.settings)
    [old], [new] = ids(1), ids(1)
    store.accept([CancelRequest(old)], lane=Lane.RISK, default_deadline_s=60, known=Known("", "read", -9.0))
    store.accept([CancelRequest(new)], lane=Lane.RISK, default_deadline_s=60)
    claim = store.claim([Lane.RISK], at_most=5, lease_s=60, exchange_ms=None, reads_after_s=1.0)
    assert [each.order_id for each in claim.entries] == [old]


@pytest.mark.parametrize(("senders", "most"), [(1, 1), (2, 1), (3, 1), (16, 8)])
def test_half_of_the_senders_may_read_back(senders, most):
    slots = ReadSlots(senders)
    with ExitStack() as busy:
        for _ in range(most):
            assert slots.free > 0
            busy.enter_context(slots.of(reads=True))
        assert slots.free == 0
        late = busy.enter_context(slots.of(reads=False))
        assert not late.may_read()
    assert slots.free == most


def test_a_lone_hand_takes_turns_between_cancels_and_read_backs():
    slots = ReadSlots(1)
    assert slots.after_s == 0.0
    with slots.of(reads=True):
        pass
    assert slots.after_s > 60
    with slots.of(reads=False) as slot:
        assert slot.may_read()
    assert slots.after_s == 0.0


def test_a_waiting_strategy_cancel_that_risk_asks_for_is_sent_before_the_others(crew):
    crew.control.configure(tier="basic")
    order_ids = crew.place(300)
    with crew.apart() as apart:
        apart.start()
        apart.client.cancel_many([{"order_id": each, "deadline_s": 60} for each in order_ids])
        crew.wait_many_sent(30)
        last = order_ids[-1]
        assert apart.client.cancel(last, lane=Lane.RISK).result(timeout=PATIENCE_S).outcome == "canceled"
        assert crew.sent().total() < 200
    assert crew.sent()[last] == 1


# -- what a decision costs


def test_a_decision_costs_a_few_milliseconds_at_most(account):
    store = CancelStore(account.server, account.settings)
    account.pacer.set_limits(Limits(1e9, 1e9, 1e9, 1e9))
    for lane in Lane:
        for shard in range(4):
            requests = [CancelRequest(each, exchange_index=shard) for each in ids(400)]
            store.accept(requests, lane=lane, default_deadline_s=600)
    decisions = {
        "claim": lambda: claimed(account, store, Lane.RISK, at_most=1),
        "take": lambda: account.pacer.take("write", 2),
    }
    for name, decide in decisions.items():
        cpu_before_s, took = cpu_s(account.server), []
        for _ in range(1000):
            started = time.perf_counter()
            decide()
            took.append((time.perf_counter() - started) * 1000)
        cpu_ms = cpu_s(account.server) - cpu_before_s  # of a thousand
        say(f"{name}: {cpu_ms:.3f} ms of Redis' CPU; round trip {statistics.median(took):.3f} ms (median)")
        assert cpu_ms < 5, "whatever the machine: far below what a scan of all that waits would take"


def cpu_s(server):
    """The CPU time that Redis has used: unlike a clock, it does not count what else the machine does."""
    used = server.info("cpu")
    return used["used_cpu_user_main_thread"] + used["used_cpu_sys_main_thread"]


def test_under_load_the_shards_own_buckets_are_spent_too(crew):
    crew.control.configure(tier="basic")
    placed = [crew.place(40, exchange_index=shard) for shard in range(4)]
    orders = [
        {"order_id": order_id, "exchange_index": shard, "deadline_s": 60}
        for shard, order_ids in enumerate(placed)
        for order_id in order_ids
    ]
    with crew.apart() as apart:
        apart.start()
        started = time.monotonic()
        pending = apart.client.cancel_many(orders, lane=Lane.RISK)
        assert {result.outcome for result in pending.results(timeout=PATIENCE_S)} == {"canceled"}
        took_s = time.monotonic() - started
    assert took_s < (160 * CANCEL_COST - 100) / 100, "what the unscoped bucket alone would take"
    assert {"write:1", "write:2", "write:3"} & {call["bucket"] for call in crew.cancels()}
    # Several senders' results may be stored in one step; still each is told with the call that it is from.
    with connect(RedisSettings.from_env({"REDIS_URL": apart.url})) as server:
        audit_log = [fields for _, fields in server.xrange("kalshi-cancel:audit")]
    stories = [json.loads(fields["body"]) for fields in audit_log if fields["kind"] == "work"]
    assert sum(len(body["orders"]) for body in stories) == len(orders)
    assert all(sum(call["orders"] for call in body["calls"]) == len(body["orders"]) for body in stories)
    assert [call for call in crew.control.calls() if call["status"] == 429] == []


def test_a_hand_is_free_for_risk_while_all_others_wait_for_slow_answers(crew):
    risk, *strategies = crew.place(3 * SENDERS)
    with crew.apart(KALSHI_BATCH_MOST="1", KALSHI_READ_TIMEOUT_S="20", KALSHI_CALL_DEADLINE_S="20") as apart:
        apart.start()
        for order_id in strategies:
            crew.control.fault("hang", order_id=order_id, operation="cancel", effect="none", times=1)
        apart.client.cancel_many([{"order_id": each, "deadline_s": 60} for each in strategies])
        wait_until(
            lambda: len(crew.cancels()) >= SENDERS - 1,
            within_s=PATIENCE_S,
            what="other senders have calls",
        )
        asked = time.monotonic()
        assert apart.client.cancel(risk, lane=Lane.RISK).result(PATIENCE_S).outcome == "canceled"
        assert time.monotonic() - asked < 10.0, "the others wait for 20 s"
        crew.control.clear_faults()
