"""What is sent next, and by whom: lanes, paths, buckets, and senders that are kept for risk."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from contextlib import ExitStack

import pytest
from buckets import Account, usable
from claims import claim_from, claims_from
from crew import PATIENCE_S, SENDERS, ids

from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.settings.worker import WorkerSettings
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.pending import Known
from kalshi_cancel.store.rate_limits import Limits
from kalshi_cancel.store.scripts import connect
from trials.stack import wait_until
from worker.dispatch.dispatcher import Dispatcher
from worker.dispatch.read_slots import ReadSlots
from worker.dispatch.settings import DispatchSettings

ON_THE_WAY_S = (
    0.2  # kalshi_cancel/store/lua/buckets.lua: what a full bucket misses in this time is not counted on
)
RESERVE = 0.2
say = print  # figures for the reader; pytest -rA shows them
CANCEL_COST = 2
LIST_COST = 10.0


@pytest.fixture(scope="module")
def crew_environment():
    return {"KALSHI_BATCH_MOST": "100"}


@pytest.fixture
def account(shared_crew):
    account = Account(shared_crew.redis.url)
    yield account
    account.server.close()


# -- what is kept for risk


def test_strategy_cannot_take_the_last_fifth_and_risk_can(account):
    full = usable(600, 300)
    assert account.pacer.take("write", full * (1 - RESERVE), kept_share=RESERVE) == 0
    assert account.pacer.take("write", 30, kept_share=RESERVE) > 0
    assert account.pacer.take("write", full * RESERVE) == 0
    assert account.pacer.take("write", 30) > 0


def claimed(account, store, lane, at_most=1000):
    return claim_from(
        store,
        [lane],
        at_most=at_most,
        lease_s=60,
        exchange_ms=None,
        risk_reserve=RESERVE,
        cancel_cost=CANCEL_COST,
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
            return claims_from(self.store, (Lane.RISK,), at_most=at_most, calls=calls)

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
    assert [each.order_id for each in claim_from(store, [Lane.RISK], **wanted).entries] == [new]
    nothing = claim_from(store, [Lane.RISK], **wanted, reads=0)
    assert (nothing.entries, nothing.is_more, nothing.next_due_s) == ((), False, pytest.approx(60, abs=5))
    assert [each.order_id for each in claim_from(store, [Lane.RISK], **wanted, reads=1).entries] == [old]


def test_a_read_back_that_has_waited_for_long_goes_first(account):
    store = CancelStore(account.server, account.settings)
    [old], [new] = ids(1), ids(1)
    store.accept([CancelRequest(old)], lane=Lane.RISK, default_deadline_s=60, known=Known("", "read", -9.0))
    store.accept([CancelRequest(new)], lane=Lane.RISK, default_deadline_s=60)
    claim = claim_from(store, [Lane.RISK], at_most=5, lease_s=60, exchange_ms=None, reads_after_s=1.0)
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


def test_who_is_given_a_claim_is_busy_before_it_begins_or_none_would_be_left_to_risk(shared_crew, account):
    """Two senders were just given claims and are slow to begin, one has the turn, and the fourth looks."""

    class Pool:
        listens = True

        def draft(self):
            return range(2)

        def dismiss(self, _others, given):
            if given:  # (the first turn only looks what there is)
                rooms.append((len(given), dispatcher.lanes_with_room))
                dispatcher.stopping.set()

    rooms = []
    environment = {**shared_crew.stack.environment, "KALSHI_BATCH_MOST": "1"}
    settings = WorkerSettings.from_env(environment)
    store = CancelStore(account.server, account.settings)
    store.accept([CancelRequest(each) for each in ids(4)], lane=Lane.STRATEGY, default_deadline_s=60)
    exchange = Exchange.from_settings(settings)
    dispatcher = Dispatcher(
        store, exchange, account.pacer, DispatchSettings.of(settings, lanes=tuple(Lane), senders=4)
    )
    dispatcher.pool = Pool()
    dispatcher.serve()
    exchange.close()
    assert rooms == [(2, (Lane.RISK,))]


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
