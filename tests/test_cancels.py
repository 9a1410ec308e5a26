"""The laws of the cancel store, against real servers: Valkey, and Redis where it is installed."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal

import pytest
from claims import claim_from, claim_request
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kalshi_cancel.model.orders import OrderStatus
from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.model.results import CancelResult, ConfirmedBy, Outcome, Problem
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store import results
from kalshi_cancel.store.cancels import CancelStore, Fenced
from kalshi_cancel.store.keys import Keys
from kalshi_cancel.store.pending import Fence, Known, MakeDeadLetter, RetryLater, Settle
from kalshi_cancel.store.scripts import connect
from kalshi_cancel.store.workers import WorkerRegistry, WorkerShown
from trials.stack import wait_until

LONG_S = 60.0  # a lease or a pause that does not end within a test
BOTH = (Lane.RISK, Lane.STRATEGY)
WITH_PROBLEM = json.dumps(
    {"attempts": 3, "last_problem": {"code": "http_500", "message": "oops"}, "history": [[7, "http_500"]]}
)


@pytest.fixture
def dispatcher(server_of_each_make):
    """A store of the test's own, with a few shortcuts."""
    shortcuts = Shortcuts(server_of_each_make)
    yield shortcuts
    shortcuts.close()


class Shortcuts:
    """A store under a prefix of its own, and the operations as tests like to write them."""

    def __init__(self, server):
        self.prefix = f"t{uuid.uuid4().hex[:8]}"
        self.settings = settings = RedisSettings.from_env(
            {"REDIS_URL": server.url, "KALSHI_KEY_PREFIX": self.prefix}
        )
        self.celery_prefix = settings.celery_prefix
        self.server = connect(settings)
        self.store = CancelStore(self.server, settings)

    def close(self):
        self.server.close()

    def accept(
        self,
        *order_ids,
        lane=Lane.STRATEGY,
        deadline_s=LONG_S,
        reply_to="",
        fence=None,
        records_older_than_s=None,
        **fields,
    ):
        return self.store.accept(
            [CancelRequest(order_id, **fields) for order_id in order_ids],
            lane=lane,
            default_deadline_s=deadline_s,
            reply_to=[reply_to] * len(order_ids),
            fence=fence,
            records_older_than_s=records_older_than_s,
        )

    def claim(self, at_most=1, *, lanes=BOTH, lease_s=LONG_S, exchange_ms=None):
        """As a sender claims that wants so many: one call's worth after the other."""
        entries = []
        while len(entries) < at_most:
            more = self.claim_call(
                at_most - len(entries), lanes=lanes, lease_s=lease_s, exchange_ms=exchange_ms
            ).entries
            entries += more
            if not more or lease_s == 0:  # what is due again at once would be claimed again
                break
        return entries

    def claim_call(self, at_most=1, *, lanes=BOTH, lease_s=LONG_S, exchange_ms=None):
        return claim_from(self.store, lanes, at_most=at_most, lease_s=lease_s, exchange_ms=exchange_ms)

    def claim_one(self, **how):
        [entry] = self.claim(1, **how)
        return entry

    def settle(self, entry, outcome=Outcome.CANCELED, **known):
        [done] = self.store.conclude([Settle(entry, result(entry.order_id, outcome, **known))])
        return done

    def retry_later(self, entry, pause_s=0.0, progress=""):
        [done] = self.store.conclude([RetryLater(entry, progress, pause_s)])
        return done

    def make_dead_letter(self, entry, progress=WITH_PROBLEM):
        [done] = self.store.conclude([MakeDeadLetter(entry, progress)])
        return done

    def report_overdue(self):
        overdue = self.store.overdue(at_most=100)
        return self.store.report([result(each.order_id, Outcome.UNRESOLVED) for each in overdue])

    def open_ids(self):
        return [each.order_id for each in self.store.open_cancels()]

    def pause_until_next_ms(self):
        """Ages have milliseconds: what comes after this is younger than what came before."""
        seconds, micros = self.server.time()
        wait_until(lambda: self.server.time() > (seconds, micros + 1000), what="the next millisecond")


def result(order_id, outcome=Outcome.CANCELED, **known):
    known.setdefault("settled_at", "2026-11-22T12:00:00.000Z")
    if outcome is Outcome.CANCELED:
        known = {
            "status": OrderStatus.CANCELED,
            "reduced_by": Decimal("10.00"),
            "confirmed_by": ConfirmedBy.CANCEL,
            **known,
        }
    return CancelResult(order_id, outcome, **known)


def ids(number=1):
    return [str(uuid.uuid4()) for _ in range(number)]


# -- accepting


def test_what_is_accepted_is_open_until_it_is_settled(dispatcher):
    [order_id] = ids()
    assert dispatcher.accept(order_id, requested_by="mm-btc", reason="news").settled == {}
    shown = dispatcher.store.open_cancel(order_id)
    assert (shown.lane, shown.requested_by, shown.claimed, shown.unresolved) == (
        Lane.STRATEGY,
        ("mm-btc",),
        False,
        False,
    )
    assert shown.request.reason == "news"
    assert dispatcher.settle(dispatcher.claim_one())
    assert dispatcher.store.open_cancel(order_id) is None
    assert dispatcher.open_ids() == []
    assert dispatcher.store.record(order_id) == result(order_id, requested_by=("mm-btc",))


def test_accepting_the_same_order_again_joins_the_entry_that_is_there(dispatcher):
    [order_id] = ids()
    for name in ("a", "b", "a"):
        dispatcher.accept(order_id, requested_by=name)
    assert dispatcher.open_ids() == [order_id]
    assert dispatcher.store.open_cancel(order_id).requested_by == ("a", "b")
    entry = dispatcher.claim_one()
    dispatcher.accept(order_id, requested_by="c")  # while it is claimed
    assert dispatcher.claim() == []
    assert dispatcher.settle(entry)
    assert dispatcher.store.record(order_id).requested_by == ("a", "b", "c")


def test_a_later_request_adds_routing_that_was_not_known_and_overrules_none(dispatcher):
    [order_id] = ids()
    dispatcher.accept(order_id, exchange_index=2)
    dispatcher.accept(order_id, exchange_index=3, market_ticker="KXTEST", subaccount=1)
    request = dispatcher.claim_one().request
    assert (request.exchange_index, request.market_ticker, request.subaccount) == (2, "KXTEST", 1)


def test_a_later_deadline_counts_and_an_earlier_one_does_not(dispatcher):
    [order_id] = ids()
    dispatcher.accept(order_id, deadline_s=20)
    dispatcher.accept(order_id, deadline_s=40)
    dispatcher.accept(order_id, deadline_s=1)
    assert 30 < dispatcher.claim_one().deadline_left_s <= 40


def test_a_request_from_the_risk_lane_takes_a_waiting_order_with_it_at_its_age(dispatcher):
    older, upgraded, risky, younger = ids(4)
    for order_id in (older, upgraded):
        dispatcher.accept(order_id)
        dispatcher.pause_until_next_ms()
    dispatcher.accept(risky, lane=Lane.RISK)
    dispatcher.accept(younger)
    dispatcher.accept(upgraded, lane=Lane.RISK)
    assert [entry.order_id for entry in dispatcher.claim(9)] == [upgraded, risky, older, younger]


def test_an_order_of_the_risk_lane_stays_there_when_a_strategy_asks_too(dispatcher):
    [order_id] = ids()
    dispatcher.accept(order_id, lane=Lane.RISK)
    dispatcher.accept(order_id, lane=Lane.STRATEGY)
    assert dispatcher.store.open_cancel(order_id).lane is Lane.RISK


def test_an_order_in_a_hand_can_be_upgraded_and_is_still_in_that_hand_alone(dispatcher):
    [order_id] = ids()
    dispatcher.accept(order_id)
    entry = dispatcher.claim_one()
    dispatcher.accept(order_id, lane=Lane.RISK)
    assert dispatcher.claim(9) == []
    assert dispatcher.store.extend([entry], lease_s=LONG_S) == [True]
    assert dispatcher.settle(entry)
    assert dispatcher.open_ids() == []


@pytest.mark.parametrize("outcome", [Outcome.CANCELED, Outcome.TOO_LATE])
def test_a_request_for_a_settled_order_is_answered_from_its_record(dispatcher, outcome):
    [order_id] = ids()
    dispatcher.accept(order_id)
    dispatcher.settle(dispatcher.claim_one(), outcome)
    accepted = dispatcher.accept(order_id, reply_to=f"task-{order_id}")
    assert accepted.settled == {order_id: dispatcher.store.record(order_id)}
    assert accepted.settled[order_id].outcome is outcome
    assert dispatcher.claim() == []
    reply = json.loads(dispatcher.server.get(results.task_key(f"task-{order_id}", dispatcher.celery_prefix)))
    assert (reply["task_id"], reply["result"]["outcome"]) == (f"task-{order_id}", outcome.value)


@pytest.mark.parametrize("outcome", [Outcome.REFUSED, Outcome.UNKNOWN_ORDER])
def test_a_record_that_is_not_final_goes_when_the_order_is_asked_for_again(dispatcher, outcome):
    [order_id] = ids()
    dispatcher.accept(order_id)
    dispatcher.settle(dispatcher.claim_one(), outcome, error=Problem("some", '"outcome":"canceled"'))
    assert dispatcher.accept(order_id).settled == {}
    assert dispatcher.store.record(order_id) is None
    assert dispatcher.claim_one().order_id == order_id


@pytest.mark.parametrize("outcome", [Outcome.CANCELED, Outcome.TOO_LATE])
def test_a_final_record_that_is_too_old_is_not_believed_and_the_order_is_canceled_again(dispatcher, outcome):
    [order_id] = ids()
    dispatcher.accept(order_id)
    dispatcher.settle(dispatcher.claim_one(), outcome)
    key, life_s = results.record_key(order_id, dispatcher.celery_prefix), dispatcher.settings.result_expires_s
    dispatcher.server.expire(key, life_s - 30)  # as one that is 30 s old
    believed = dispatcher.accept(order_id, records_older_than_s=40)
    assert list(believed.settled) == [order_id]
    again = dispatcher.accept(order_id, records_older_than_s=20, exchange_index=2)
    assert again.settled == {}
    assert dispatcher.store.record(order_id) is None, "who waits must not be told the old outcome"
    request = dispatcher.claim_one().request
    assert (request.order_id, request.exchange_index, request.again) == (order_id, 2, True)


def test_a_record_is_not_believed_at_all_where_nothing_older_than_now_is(dispatcher):
    fresh, for_ever, newer = ids(3)
    for order_id in (fresh, for_ever, newer):
        dispatcher.accept(order_id)
        dispatcher.settle(dispatcher.claim_one())
    dispatcher.server.persist(results.record_key(for_ever, dispatcher.celery_prefix))
    dispatcher.server.expire(
        results.record_key(newer, dispatcher.celery_prefix), dispatcher.settings.result_expires_s * 2
    )
    assert dispatcher.accept(fresh, for_ever, newer, records_older_than_s=0).settled == {}
    assert sorted(dispatcher.open_ids()) == sorted([fresh, for_ever, newer])


def test_many_orders_are_accepted_in_one_call_with_those_settled_told_apart(dispatcher):
    order_ids = ids(450)  # more than one script takes
    dispatcher.accept(order_ids[300])
    dispatcher.settle(dispatcher.claim_one())
    accepted = dispatcher.accept(*order_ids)
    assert set(accepted.settled) == {order_ids[300]}
    assert sorted(dispatcher.open_ids()) == sorted(set(order_ids) - {order_ids[300]})


def test_accepting_tells_how_many_messages_wait_in_the_lanes_queue(dispatcher):
    try:
        dispatcher.server.rpush(dispatcher.celery_prefix + "risk", "a", "b")
        assert dispatcher.accept(*ids(), lane=Lane.RISK).waiting_messages == 2
    finally:
        dispatcher.server.delete(dispatcher.celery_prefix + "risk")


def test_a_requests_names_and_reasons_come_back_as_they_were_whatever_they_are(dispatcher):
    [order_id] = ids()
    names = ('q"uo\\te', "émoji 🎈", '","outcome":"too_late"', "[]", "{}")
    for name in names:
        dispatcher.accept(order_id, requested_by=name, reason=name)
    dispatcher.settle(dispatcher.claim_one())
    assert dispatcher.store.record(order_id).requested_by == names
    assert dispatcher.store.record(order_id).outcome is Outcome.CANCELED


# -- claiming


def test_risk_is_claimed_first_and_within_a_lane_the_oldest(dispatcher):
    order_ids = ids(6)
    lanes = [Lane.STRATEGY, Lane.STRATEGY, Lane.RISK, Lane.STRATEGY, Lane.RISK, Lane.STRATEGY]
    for order_id, lane in zip(order_ids, lanes, strict=True):
        dispatcher.accept(order_id, lane=lane)
        dispatcher.pause_until_next_ms()
    claimed = [entry.order_id for _ in order_ids for entry in dispatcher.claim(1)]
    assert claimed == [order_ids[at] for at in (2, 4, 0, 1, 3, 5)]


def test_a_claim_takes_from_the_lanes_it_names_only(dispatcher):
    strategy, risk = ids(2)
    dispatcher.accept(strategy)
    dispatcher.accept(risk, lane=Lane.RISK)
    assert [entry.order_id for entry in dispatcher.claim(9, lanes=[Lane.RISK])] == [risk]
    assert [entry.order_id for entry in dispatcher.claim(9, lanes=[Lane.STRATEGY])] == [strategy]


def test_an_entry_in_a_hand_is_not_claimed_by_another(dispatcher):
    order_ids = ids(3)
    dispatcher.accept(*order_ids)
    assert len(dispatcher.claim(2)) == 2
    assert len(dispatcher.claim(9)) == 1
    assert dispatcher.claim(9) == []
    assert all(each.claimed for each in dispatcher.store.open_cancels())


def test_what_is_to_be_read_back_is_claimed_alone_at_its_old_age(dispatcher):
    older, read, younger = ids(3)
    for order_id in (older, read, younger):
        dispatcher.accept(order_id)
        dispatcher.pause_until_next_ms()
    claimed = {entry.order_id: entry for entry in dispatcher.claim(3)}
    dispatcher.store.conclude([RetryLater(claimed[order_id], "") for order_id in (older, younger)])
    dispatcher.store.conclude([RetryLater(claimed[read], WITH_PROBLEM, path="read")])
    calls = [[entry.order_id for entry in dispatcher.claim_call(9).entries] for _ in range(3)]
    assert calls == [[older, younger], [read], []]


def test_orders_of_every_shard_are_open_and_claimable(dispatcher):
    order_ids = ids(4)
    for order_id, shard in zip(order_ids, (None, 0, 1, 7), strict=True):
        dispatcher.accept(order_id, exchange_index=shard)
    assert set(dispatcher.open_ids()) == set(order_ids)
    claimed = dispatcher.claim(4)
    assert {entry.order_id for entry in claimed} == set(order_ids)
    assert all(dispatcher.settle(entry) for entry in claimed)
    assert dispatcher.open_ids() == []


def test_a_claim_tells_when_there_is_more_to_come(dispatcher):
    now, later = ids(2)
    assert dispatcher.claim_call().next_due_s is None
    dispatcher.accept(now, later)
    claim = dispatcher.claim_call()
    assert claim.next_due_s == 0.0
    dispatcher.retry_later(dispatcher.claim_one(), LONG_S)
    assert 0 < dispatcher.claim_call().next_due_s <= LONG_S


def test_what_a_vanished_hand_held_is_claimable_when_its_lease_is_over_and_marked_as_interrupted(dispatcher):
    [order_id] = ids()
    dispatcher.accept(order_id)
    first = dispatcher.claim_one(lease_s=0.05, exchange_ms=1234)
    assert not first.interrupted
    [second] = wait_until(dispatcher.claim, within_s=2, what="the lease's end")
    assert (second.order_id, second.interrupted, second.first_sent_ms) == (order_id, True, "1234")


def test_a_lease_that_is_extended_does_not_run_out(dispatcher):
    dispatcher.accept(*ids())
    entry = dispatcher.claim_one(lease_s=0.3)
    assert dispatcher.store.extend([entry], lease_s=LONG_S) == [True]
    seen = time.monotonic()
    wait_until(lambda: time.monotonic() - seen > 0.4, what="the first lease's end")
    assert dispatcher.claim() == []


def test_an_old_token_cannot_settle_extend_retry_later_or_make_a_dead_letter(dispatcher):
    [order_id] = ids()
    dispatcher.accept(order_id)
    frozen = dispatcher.claim_one(lease_s=0)
    newer = dispatcher.claim_one()
    before = dispatcher.server.hgetall(f"{dispatcher.prefix}:pending:{order_id}")
    assert not dispatcher.settle(frozen)
    assert not dispatcher.retry_later(frozen)
    assert not dispatcher.make_dead_letter(frozen)
    assert dispatcher.store.extend([frozen], lease_s=0) == [False]
    assert dispatcher.server.hgetall(f"{dispatcher.prefix}:pending:{order_id}") == before
    assert dispatcher.store.record(order_id) is None
    assert dispatcher.settle(newer, reduced_by=Decimal("7.00"))
    assert not dispatcher.settle(frozen)
    assert dispatcher.store.record(order_id).reduced_by == Decimal("7.00")


def test_a_hand_whose_order_was_settled_and_asked_for_anew_cannot_touch_the_new_entry(dispatcher):
    [order_id] = ids()
    dispatcher.accept(order_id)
    frozen = dispatcher.claim_one(lease_s=0)
    dispatcher.settle(dispatcher.claim_one(), Outcome.UNKNOWN_ORDER)
    dispatcher.accept(order_id)
    assert not dispatcher.settle(frozen)
    assert dispatcher.claim_one().order_id == order_id


def test_a_hand_late_but_not_overtaken_may_still_settle(dispatcher):
    dispatcher.accept(*ids())
    entry = dispatcher.claim_one(lease_s=0)
    assert dispatcher.settle(entry)


def test_an_index_whose_entry_was_deleted_by_hand_does_not_stop_the_line(dispatcher):
    gone, order_id = ids(2)
    dispatcher.accept(gone)
    dispatcher.pause_until_next_ms()
    dispatcher.accept(order_id)
    dispatcher.server.delete(f"{dispatcher.prefix}:pending:{gone}")
    claimed = [*dispatcher.claim(1), *dispatcher.claim(1)]
    assert [entry.order_id for entry in claimed] == [order_id]
    assert dispatcher.open_ids() == [order_id]


# -- concluding


def test_storing_the_record_and_removing_the_entry_are_one_step(dispatcher):
    """Whoever looks at both at once sees exactly one of them, at any moment."""
    order_ids = ids(300)
    dispatcher.accept(*order_ids)
    wrong, over = [], threading.Event()

    def look():
        with dispatcher.server.client() as mine:
            while not over.is_set():
                order_id = random.choice(order_ids)
                entry, record = (
                    mine.pipeline(transaction=True)
                    .exists(f"{dispatcher.prefix}:pending:{order_id}")
                    .exists(results.record_key(order_id, dispatcher.celery_prefix))
                    .execute()
                )
                if entry + record != 1:
                    wrong.append((entry, record))

    watcher = threading.Thread(target=look)
    watcher.start()
    for entry in dispatcher.claim(300):
        dispatcher.settle(entry)
    over.set()
    watcher.join()
    assert wrong == []
    assert dispatcher.open_ids() == []


def test_every_task_that_asked_gets_the_result_under_its_own_id(dispatcher):
    [order_id] = ids()
    tasks = [f"task-{n}-{order_id}" for n in range(3)]
    for task in tasks:
        dispatcher.accept(order_id, reply_to=task, requested_by="raw")
    dispatcher.accept(order_id, reply_to=tasks[0])
    dispatcher.settle(dispatcher.claim_one())
    record = json.loads(dispatcher.server.get(results.record_key(order_id, dispatcher.celery_prefix)))
    for task in tasks:
        reply = json.loads(dispatcher.server.get(results.task_key(task, dispatcher.celery_prefix)))
        assert reply == {**record, "task_id": task}


def test_given_back_without_a_pause_an_entry_has_its_old_place_in_the_line(dispatcher):
    order_ids = ids(3)
    for order_id in order_ids:
        dispatcher.accept(order_id)
        dispatcher.pause_until_next_ms()
    first, second = dispatcher.claim(2)
    assert dispatcher.retry_later(second)
    assert dispatcher.retry_later(first)
    again = dispatcher.claim(3)
    assert [entry.order_id for entry in again] == order_ids
    assert not any(entry.interrupted for entry in again)


def test_given_back_with_a_pause_an_entry_comes_after_it_with_what_was_learned(dispatcher):
    [order_id] = ids()
    dispatcher.accept(order_id)
    assert dispatcher.retry_later(dispatcher.claim_one(), 0.05, WITH_PROBLEM)
    assert dispatcher.claim() == []
    shown = dispatcher.store.open_cancel(order_id)
    assert (shown.claimed, shown.progress.attempts, shown.progress.last_problem.code) == (
        False,
        3,
        "http_500",
    )
    [entry] = wait_until(dispatcher.claim, within_s=2, what="the pause's end")
    assert (entry.progress, entry.interrupted) == (WITH_PROBLEM, False)


def test_what_is_given_up_is_kept_with_its_history_and_can_be_brought_back(dispatcher):
    [order_id] = ids()
    dispatcher.accept(order_id, requested_by="mm", reason="news")
    assert dispatcher.make_dead_letter(dispatcher.claim_one())
    assert dispatcher.open_ids() == []
    [letter] = dispatcher.store.dead_letters()
    assert (letter.order_id, letter.requested_by, letter.request.reason) == (order_id, ("mm",), "news")
    assert (letter.progress.attempts, letter.progress.history) == (3, ((7, "http_500"),))
    assert dispatcher.store.retry([order_id, *ids()], deadline_s=10) == [order_id]
    assert list(dispatcher.store.dead_letters()) == []
    entry = dispatcher.claim_one()
    assert (entry.progress, entry.age_s < 5, entry.reported) == (WITH_PROBLEM, True, False)
    assert dispatcher.store.retry([order_id], deadline_s=10) == []


def test_what_is_asked_for_again_while_it_is_being_given_up_is_not_given_up(dispatcher):
    dispatcher.accept("order", deadline_s=0.001)
    dispatcher.pause_until_next_ms()
    assert dispatcher.report_overdue() == 1
    held = dispatcher.claim_one()
    dispatcher.accept("order", lane=Lane.RISK)
    assert dispatcher.make_dead_letter(held)
    assert (dispatcher.open_ids(), list(dispatcher.store.dead_letters())) == (["order"], [])
    assert dispatcher.claim_one().lane is Lane.RISK


def test_a_record_that_cannot_be_read_keeps_nobody_from_asking(dispatcher):
    dispatcher.accept("spoilt", "fine")
    for entry in dispatcher.claim(2):
        dispatcher.settle(entry)
    key = results.record_key("spoilt", dispatcher.celery_prefix)
    text = dispatcher.server.get(key).replace('"status":"canceled"', '"status":"on_hold"')
    dispatcher.server.set(key, text)
    accepted = dispatcher.accept("fine", "spoilt", "new")
    assert set(accepted.settled) == {"fine"}
    assert sorted(dispatcher.open_ids()) == ["new", "spoilt"]
    asked_anew = {entry.order_id: entry.request.again for entry in dispatcher.claim(2)}
    assert asked_anew == {"new": False, "spoilt": True}, "an earlier cancel may have been ours"


@pytest.mark.parametrize(
    "mass",
    [
        {},
        {"fence": "7"},
        {"fence": "8", "report": "{}"},
        {"report": "{}"},
    ],
    ids=["no runner", "another runner", "a report", "a report and no runner"],
)
def test_who_runs_a_mass_cancel_no_longer_enters_nothing_and_is_told_so(dispatcher, mass):
    fence, key = Fence("mass-1", "8"), f"{dispatcher.prefix}:mass:mass-1"
    dispatcher.server.hset(key, mapping={"fence": "8"})
    dispatcher.accept("mine", fence=fence)
    dispatcher.server.delete(key)
    dispatcher.server.hset(key, mapping={"request": "{}", **mass})
    with pytest.raises(Fenced, match="mass-1"):
        dispatcher.accept("other", "mine", fence=fence)
    with pytest.raises(Fenced, match="mass-1"):
        dispatcher.store.set_progress(
            [CancelRequest("mine")], Known("{}", "read", 0.0), lane=Lane.RISK, fence=fence
        )
    assert dispatcher.open_ids() == ["mine"]
    assert dispatcher.claim_one().progress == ""


def test_who_runs_a_mass_cancel_enters_and_teaches_as_anybody_does(dispatcher):
    fence = Fence("mass-1", "8")
    dispatcher.server.hset(f"{dispatcher.prefix}:mass:mass-1", mapping={"request": "{}", "fence": "8"})
    dispatcher.accept("order", fence=fence)
    taught = dispatcher.store.set_progress(
        [CancelRequest("order")], Known('{"attempts":1}', "read", 0.0), lane=Lane.RISK, fence=fence
    )
    assert (taught, json.loads(dispatcher.claim_one().progress)) == (1, {"attempts": 1})


def test_a_hand_that_only_read_back_leaves_no_attempt_behind(dispatcher):
    dispatcher.accept("order")
    [held] = dispatcher.claim(1)
    dispatcher.store.conclude([RetryLater(held, WITH_PROBLEM, 0.0, "read")])
    reading = dispatcher.claim_one(lease_s=0)
    assert not reading.interrupted
    assert not dispatcher.claim_one().interrupted, "the sender before had sent nothing"


def test_when_the_first_attempt_was_sent_is_known_by_its_age_too(dispatcher):
    dispatcher.accept("order")
    time_passes_s = 0.05
    wait_until(lambda: dispatcher.store.open_cancel("order").age_s >= time_passes_s, what="the order to wait")
    dispatcher.claim_one(lease_s=0, exchange_ms=1234)
    second = dispatcher.claim_one(exchange_ms=5678)
    assert (second.interrupted, second.first_sent_ms) == (True, "1234")
    assert second.first_sent_age_ms >= 1000 * time_passes_s


def test_shards_far_beyond_those_there_are_have_no_line_of_their_own(dispatcher):
    for number in range(40):
        dispatcher.accept(f"order-{number}", exchange_index=1000 + number)
    assert dispatcher.server.smembers(f"{dispatcher.prefix}:paths") == {"write"}


def test_asking_again_for_what_was_given_up_opens_it_again(dispatcher):
    [order_id] = ids()
    dispatcher.accept(order_id)
    dispatcher.make_dead_letter(dispatcher.claim_one())
    dispatcher.accept(order_id, requested_by="again")
    assert dispatcher.open_ids() == [order_id]
    assert list(dispatcher.store.dead_letters()) == []
    assert dispatcher.settle(dispatcher.claim_one())


def test_what_is_known_of_an_entry_can_be_changed_until_a_hand_has_had_it(dispatcher):
    fresh, taken = "fresh", "taken"
    perhaps = Known(WITH_PROBLEM, "reads", LONG_S)
    requests = [CancelRequest(order_id, exchange_index=2) for order_id in (fresh, taken)]
    dispatcher.store.accept(requests[1:], lane=Lane.RISK, default_deadline_s=LONG_S)
    held = dispatcher.claim_one()
    dispatcher.store.accept(requests[:1], lane=Lane.RISK, default_deadline_s=LONG_S, known=perhaps)
    assert dispatcher.claim(2) == [], "it is not due yet"
    assert dispatcher.store.set_progress(requests, None, lane=Lane.RISK) == 1
    [entry] = dispatcher.claim(2)
    assert (entry.order_id, entry.progress) == (fresh, "")
    dispatcher.retry_later(held, progress=WITH_PROBLEM)
    assert dispatcher.store.set_progress(requests, None, lane=Lane.RISK) == 0
    assert dispatcher.claim_one().progress == WITH_PROBLEM


def test_several_conclusions_are_judged_each_by_itself(dispatcher):
    order_ids = ids(4)
    dispatcher.accept(*order_ids)
    old = {entry.order_id: entry for entry in dispatcher.claim(1, lease_s=0)}
    entries = {entry.order_id: entry for entry in dispatcher.claim(4)}
    settled, back, up = (entries[each] for each in order_ids if each not in old)
    [stale] = old.values()
    done = dispatcher.store.conclude(
        [
            Settle(stale, result(stale.order_id)),
            Settle(settled, result(settled.order_id)),
            RetryLater(back, "", 0.0),
            MakeDeadLetter(up, ""),
        ]
    )
    assert done == [False, True, True, True]
    assert dispatcher.open_ids() == [back.order_id, stale.order_id]
    assert [each.order_id for each in dispatcher.store.dead_letters()] == [up.order_id]


# -- deadlines


def test_an_overdue_entry_is_told_unresolved_once_and_stays_open(dispatcher):
    late, in_time = ids(2)
    dispatcher.accept(late, deadline_s=0, reply_to=f"task-{late}", requested_by="mm")
    dispatcher.accept(in_time)
    assert [each.order_id for each in dispatcher.store.overdue(at_most=9)] == [late]
    assert dispatcher.report_overdue() == 1
    assert dispatcher.store.overdue(at_most=9) == []
    told = dispatcher.store.record(late)
    assert (told.outcome, told.requested_by) == (Outcome.UNRESOLVED, ("mm",))
    reply = json.loads(dispatcher.server.get(results.task_key(f"task-{late}", dispatcher.celery_prefix)))
    assert (reply["task_id"], reply["result"]["outcome"]) == (f"task-{late}", "unresolved")
    assert dispatcher.store.open_cancel(late).unresolved
    entry = next(each for each in dispatcher.claim(2) if each.order_id == late)
    assert entry.reported
    dispatcher.settle(entry)
    assert dispatcher.store.record(late).outcome is Outcome.CANCELED


def test_an_entry_settled_between_the_look_and_the_report_is_not_told_unresolved(dispatcher):
    [order_id] = ids()
    dispatcher.accept(order_id, deadline_s=0)
    overdue = dispatcher.store.overdue(at_most=9)
    dispatcher.settle(dispatcher.claim_one())
    assert dispatcher.store.report([result(each.order_id, Outcome.UNRESOLVED) for each in overdue]) == 0
    assert dispatcher.store.record(order_id).outcome is Outcome.CANCELED


def test_an_entry_asked_for_again_between_the_look_and_the_report_is_not_told_unresolved(dispatcher):
    [order_id] = ids()
    dispatcher.accept(order_id, deadline_s=0)
    overdue = dispatcher.store.overdue(at_most=9)
    dispatcher.accept(order_id, deadline_s=LONG_S)
    assert dispatcher.store.report([result(each.order_id, Outcome.UNRESOLVED) for each in overdue]) == 0
    assert dispatcher.store.record(order_id) is None


def test_asking_again_for_an_unresolved_order_forgets_the_record_and_makes_it_due_at_once(dispatcher):
    [order_id] = ids()
    dispatcher.accept(order_id, deadline_s=0)
    dispatcher.retry_later(dispatcher.claim_one(), LONG_S, WITH_PROBLEM)
    dispatcher.report_overdue()
    assert dispatcher.accept(order_id, deadline_s=LONG_S).settled == {}
    assert dispatcher.store.record(order_id) is None
    entry = dispatcher.claim_one()
    assert (entry.progress, entry.reported, 0 < entry.deadline_left_s <= LONG_S) == (
        WITH_PROBLEM,
        False,
        True,
    )


# -- refusing


def test_a_refusal_is_stored_unless_the_order_has_an_entry_or_a_record(dispatcher):
    stranger, open_one, settled = ids(3)
    refusal = {"outcome": Outcome.REFUSED, "error": Problem("invalid_request", "no"), "requested_by": ("x",)}
    dispatcher.accept(settled)
    dispatcher.settle(dispatcher.claim_one())
    dispatcher.accept(open_one)
    assert dispatcher.store.refuse(CancelResult(stranger, **refusal))
    assert not dispatcher.store.refuse(CancelResult(open_one, **refusal))
    assert not dispatcher.store.refuse(CancelResult(settled, **refusal))
    assert dispatcher.store.record(stranger).outcome is Outcome.REFUSED
    assert dispatcher.store.record(open_one) is None
    assert dispatcher.store.record(settled).outcome is Outcome.CANCELED


# -- sweeping


def lanes_to_wake(dispatcher, patience_s=0.05):
    return list(dispatcher.store.lanes_to_wake(BOTH, patience_s=patience_s))


def wait_for_ring(dispatcher, patience_s=0.05):
    return wait_until(lambda: lanes_to_wake(dispatcher, patience_s), within_s=5, what="a wake-up")


def test_the_sweep_rings_once_for_what_nobody_is_coming_for(dispatcher):
    assert lanes_to_wake(dispatcher) == []
    dispatcher.accept(*ids(2), lane=Lane.RISK)
    assert wait_for_ring(dispatcher, 0.5) == [Lane.RISK]
    assert lanes_to_wake(dispatcher, 0.5) == []  # another sweeper has just sent a wake-up


def test_the_sweep_rings_again_after_its_patience_when_the_first_ringer_died(dispatcher):
    dispatcher.accept(*ids())
    assert wait_for_ring(dispatcher) == [Lane.STRATEGY]
    assert wait_for_ring(dispatcher) == [Lane.STRATEGY]


def test_the_sweep_does_not_ring_for_what_was_accepted_just_now_because_its_message_is_on_the_way(dispatcher):
    dispatcher.accept(*ids(2))
    assert lanes_to_wake(dispatcher, LONG_S) == []


def test_the_sweep_does_not_ring_while_a_hand_is_claiming(dispatcher):
    dispatcher.accept(*ids(2), lane=Lane.STRATEGY)
    dispatcher.claim(1, lease_s=0)  # over at once: it would get a wake-up
    assert lanes_to_wake(dispatcher, LONG_S) == []
    assert wait_for_ring(dispatcher) == [Lane.STRATEGY]


def test_the_sweep_does_not_ring_while_a_message_waits(dispatcher):
    dispatcher.accept(*ids(), lane=Lane.RISK)
    dispatcher.claim(1, lease_s=0)
    try:
        dispatcher.server.rpush(dispatcher.celery_prefix + "risk", "a wake-up")
        waited = time.monotonic()
        wait_until(lambda: time.monotonic() - waited > 0.1, what="longer than the patience")
        assert lanes_to_wake(dispatcher) == []
    finally:
        dispatcher.server.delete(dispatcher.celery_prefix + "risk")
    assert lanes_to_wake(dispatcher) == [Lane.RISK]


def test_where_a_hand_listens_the_sweep_rings_for_it_and_nothing_is_to_be_published(dispatcher):
    dispatcher.accept(*ids())
    dispatcher.store.show_listeners([Lane.STRATEGY], life_s=60)
    wanted = lambda: dispatcher.store.lanes_to_wake(BOTH, patience_s=0.05)  # noqa: E731 - a condition
    assert wait_until(wanted, within_s=5, what="a wake-up") == {Lane.STRATEGY: True}
    assert dispatcher.store.listen([Lane.STRATEGY], within_s=0.5)
    assert not dispatcher.store.listen([Lane.STRATEGY], within_s=0.1), "one wake-up is enough"


def test_accepting_rings_for_a_hand_that_listens_and_once_only(dispatcher):
    assert not dispatcher.accept(*ids()).listener_woken
    dispatcher.store.show_listeners(BOTH, life_s=60)
    for _ in range(3):
        assert dispatcher.accept(*ids(), lane=Lane.RISK).listener_woken
    assert dispatcher.store.listen(BOTH, within_s=0.5)
    assert not dispatcher.store.listen(BOTH, within_s=0.1)


def test_the_sweep_rings_for_a_vanished_hands_orders_as_soon_as_their_lease_is_over(dispatcher):
    dispatcher.accept(*ids())
    dispatcher.claim(1, lease_s=0.6)
    assert lanes_to_wake(dispatcher, 0.5) == []
    claimed = time.monotonic()
    assert wait_for_ring(dispatcher, 0.5) == [Lane.STRATEGY]
    assert time.monotonic() - claimed < 1.0  # the lease, but no patience after it


def test_the_sweep_does_not_ring_for_what_is_claimed_or_paused_and_does_when_that_is_over(dispatcher):
    dispatcher.accept(*ids(2))
    _held, paused = dispatcher.claim(2, lease_s=0.3)
    dispatcher.retry_later(paused, 0.3)
    assert lanes_to_wake(dispatcher, 0.001) == []
    assert wait_for_ring(dispatcher, 0.001) == [Lane.STRATEGY]


# -- keys and cost


def test_every_key_is_under_the_prefix(dispatcher):
    before = set(dispatcher.server.scan_iter(count=1000))
    order_ids = ids(5)
    dispatcher.accept(*order_ids, deadline_s=0)
    first, second, third, *_ = dispatcher.claim(5)
    dispatcher.settle(first)
    dispatcher.make_dead_letter(second)
    dispatcher.retry_later(third, 1.0)
    dispatcher.report_overdue()
    lanes_to_wake(dispatcher)
    dispatcher.store.keep_unreadable("?")
    registry = WorkerRegistry(dispatcher.server, dispatcher.settings)
    registry.show(WorkerShown("me", ("risk",), 1))
    keys = set(dispatcher.server.scan_iter(count=1000)) - before
    assert {key for key in keys if not key.startswith(f"{dispatcher.prefix}:")} == set()


def test_a_settled_order_leaves_nothing_behind_but_its_record(dispatcher):
    order_ids = ids(3)
    dispatcher.accept(*order_ids, deadline_s=0)
    dispatcher.accept(order_ids[0], lane=Lane.RISK)
    for entry in dispatcher.claim(3):
        dispatcher.settle(entry)
    indexes = [
        key
        for key in dispatcher.server.scan_iter(f"{dispatcher.prefix}:*")
        if dispatcher.server.type(key) == "zset"
    ]
    entries = list(dispatcher.server.scan_iter(f"{dispatcher.prefix}:pending:*"))
    assert (indexes, entries) == ([], [])


def commands_of_one_round(dispatcher, *, waiting):
    """How many commands the server runs for a claim, its conclusions and two jobs of the sweeper."""
    dispatcher.accept(*ids(waiting))
    dispatcher.server.config_resetstat()
    entries = dispatcher.claim(5)
    assert len(entries) == 5
    dispatcher.store.extend(entries, lease_s=LONG_S)
    dispatcher.store.conclude(
        [*(Settle(each, result(each.order_id)) for each in entries[:3]), RetryLater(entries[3], "", 1.0)]
    )
    dispatcher.accept(*ids(2))
    dispatcher.store.overdue(at_most=10)
    lanes_to_wake(dispatcher, LONG_S)
    stats = dispatcher.server.info("commandstats")
    return {name: each["calls"] for name, each in stats.items() if "info" not in name}


def test_the_cost_of_every_operation_is_independent_of_the_stores_length(server_of_each_make):
    costs = []
    for waiting in (10, 10_000):
        dispatcher = Shortcuts(server_of_each_make)
        commands_of_one_round(dispatcher, waiting=10)  # every script is loaded
        dispatcher.close()
        dispatcher = Shortcuts(server_of_each_make)
        costs.append(commands_of_one_round(dispatcher, waiting=waiting))
        dispatcher.close()
    assert costs[0] == costs[1]


# -- laws, under any sequence of operations


def test_no_order_is_settled_twice_by_hands_that_often_lose_their_leases(dispatcher):
    """Real threads, real time: leases shorter than the work, so that claims overtake each other."""
    settled, overtaken, lock = Counter(), Counter(), threading.Lock()

    def work(seed):
        dice = random.Random(seed)
        while dispatcher.open_ids():
            for entry in dispatcher.claim(3, lease_s=0.004):
                threading.Event().wait(dice.uniform(0, 0.006))
                done = dispatcher.settle(entry, reduced_by=Decimal(entry.token))
                with lock:
                    (settled if done else overtaken)[entry.order_id] += 1

    order_ids = []
    for _ in range(20):  # until some claim was overtaken: before that, nothing is shown
        fresh = ids(150)
        dispatcher.accept(*fresh)
        order_ids += fresh
        senders = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        if overtaken:
            break
    assert settled == Counter(order_ids)
    assert overtaken.total() > 0


@dataclass
class _Open:
    """What the model knows about an entry; ``leased``: claimed under a lease that does not end in the test.

    ``sent``: a sender that has not put it down may have sent a cancel; ``reads``: it is to be read back;
    ``asked_anew``: while claimed, it was asked for again after its waiters were told that it is unresolved.
    """

    lane: Lane
    names: list[str]
    token: str | None = None
    leased: bool = False
    paused: bool = False
    told: bool = False
    sent: bool = False
    reads: bool = False
    asked_anew: bool = False


@dataclass
class _Model:
    open: dict[str, _Open] = field(default_factory=dict)
    dead: dict[str, _Open] = field(default_factory=dict)
    records: dict[str, CancelResult] = field(default_factory=dict)
    accepted: set[str] = field(default_factory=set)
    held: list = field(default_factory=list)  # every entry that any sender believes to hold


class StoreMachine(RuleBasedStateMachine):
    """Producers, several senders and sweepers against one store, compared with a model after each step."""

    server = None

    def __init__(self):
        super().__init__()
        self.dispatcher = Shortcuts(self.server)
        self.order_ids = ids(4)
        self.model = _Model()
        self.serial = itertools.count(1)
        self.offered_s = None  # the lease that an idle worker offers

    def teardown(self):
        self.dispatcher.close()

    orders = st.integers(0, 3)
    leases = st.sampled_from([0.0, LONG_S])
    picks = st.integers(0, 1000)

    @rule(lease_s=leases)
    def be_idle(self, lease_s):
        offer = claim_request(BOTH, lease_s=lease_s, idle_s=LONG_S)
        self.dispatcher.store.show_listeners(BOTH, life_s=LONG_S, idle=offer)
        self.offered_s = lease_s

    @rule(
        order=orders,
        lane=st.sampled_from(BOTH),
        name=st.sampled_from("abc"),
        late=st.booleans(),
        shard=st.sampled_from([None, 1]),
    )
    def accept(self, order, lane, name, late, shard):
        order_id, model = self.order_ids[order], self.model
        wake_ups = Keys(self.dispatcher.prefix).wake_up(lane)
        self.dispatcher.server.delete(wake_ups)
        accepted = self.dispatcher.accept(
            order_id, lane=lane, requested_by=name, deadline_s=0 if late else LONG_S, exchange_index=shard
        )
        model.accepted.add(order_id)
        record = model.records.get(order_id)
        if record is not None and record.outcome.final:
            assert accepted.settled == {order_id: record}
            return
        assert accepted.settled == {}
        if order_id in model.dead:  # it is open again, with all who asked and its progress
            model.open[order_id] = model.dead.pop(order_id)
            model.open[order_id].told, model.open[order_id].token = True, None
        entry = model.open.get(order_id)
        if entry is None:
            model.records.pop(order_id, None)
            model.open[order_id] = _Open(lane, [name])
            self._granted(order_id, self.dispatcher.server.lrange(wake_ups, 0, -1))
            return
        assert self.dispatcher.server.lrange(wake_ups, 0, -1) in ([], ["1"]), "only a new one is claimed"
        entry.names += [name] if name not in entry.names else []
        entry.lane = Lane.RISK if lane is Lane.RISK else entry.lane
        if entry.told:
            entry.told = False
            model.records.pop(order_id, None)
            if entry.token is None:
                entry.paused = False
            else:
                entry.asked_anew = True

    def _granted(self, order_id, wake_ups):
        """What comes with the wake-up of a new one: its claim, if a worker is idle."""
        if self.offered_s is None:
            assert wake_ups in ([], ["1"])
            return
        [text] = wake_ups
        [entry] = self.dispatcher.store._wake_up(text).claim.entries
        assert (entry.order_id, entry.interrupted) == (order_id, False)
        known = self.model.open[order_id]
        known.token, known.leased, known.sent = entry.token, self.offered_s > 0, True
        self.model.held.append(entry)
        self.offered_s = None

    @rule(at_most=st.integers(1, 4), lanes=st.sampled_from([BOTH, BOTH[:1], BOTH[1:]]), lease_s=leases)
    def claim(self, at_most, lanes, lease_s):
        due = {
            order_id: entry.lane
            for order_id, entry in self.model.open.items()
            if entry.lane in lanes and not entry.leased and not entry.paused
        }
        entries = self.dispatcher.claim_call(at_most, lanes=lanes, lease_s=lease_s).entries
        claimed = [entry.order_id for entry in entries]
        self.offered_s = None if claimed else self.offered_s  # it is idle no more
        assert set(claimed) <= set(due), "claimed twice"
        assert len(claimed) == len(set(claimed)) <= at_most
        if due:
            first = Lane.RISK if Lane.RISK in due.values() else Lane.STRATEGY
            assert {due[order_id] for order_id in claimed} == {first}, "risk is first, and nobody waits"
        for entry in entries:
            known = self.model.open[entry.order_id]
            assert entry.interrupted == known.sent
            known.token, known.leased, known.sent = entry.token, lease_s > 0, known.sent or not known.reads
            self.model.held.append(entry)

    def _pick(self, pick):
        entry = self.model.held[pick % len(self.model.held)]
        known = self.model.open.get(entry.order_id)
        return entry, known if known is not None and known.token == entry.token else None

    @precondition(lambda self: self.model.held)
    @rule(pick=picks, outcome=st.sampled_from([o for o in Outcome if o is not Outcome.UNRESOLVED]))
    def settle(self, pick, outcome):
        entry, known = self._pick(pick)
        value = result(entry.order_id, outcome, attempts=next(self.serial))
        [done] = self.dispatcher.store.conclude([Settle(entry, value)])
        assert done == (known is not None), "fenced"
        if done:
            del self.model.open[entry.order_id]
            [stored] = self.dispatcher.store.await_records([entry.order_id], timeout_s=1)
            assert (stored.attempts, stored.requested_by) == (value.attempts, tuple(known.names))
            self.model.records[entry.order_id] = stored

    @precondition(lambda self: self.model.held)
    @rule(pick=picks, pause_s=st.sampled_from([0.0, LONG_S]), path=st.sampled_from(["", "read", "write"]))
    def retry_later(self, pick, pause_s, path):
        entry, known = self._pick(pick)
        [done] = self.dispatcher.store.conclude([RetryLater(entry, "", pause_s, path)])
        assert done == (known is not None), "fenced"
        if known:
            known.token, known.leased, known.sent, known.paused = None, False, False, pause_s > 0
            known.reads = path == "read" if path else known.reads
            known.asked_anew = False

    @precondition(lambda self: self.model.held)
    @rule(pick=picks)
    def make_dead_letter(self, pick):
        entry, known = self._pick(pick)
        assert self.dispatcher.make_dead_letter(entry) == (known is not None), "fenced"
        if known:
            known.token, known.leased, known.sent, known.paused = None, False, False, False
            if known.asked_anew:
                known.asked_anew = False
                return
            self.model.dead[entry.order_id] = self.model.open.pop(entry.order_id)

    @precondition(lambda self: self.model.held)
    @rule(pick=picks, lease_s=leases)
    def extend(self, pick, lease_s):
        entry, known = self._pick(pick)
        assert self.dispatcher.store.extend([entry], lease_s=lease_s) == [known is not None], "fenced"
        if known:
            known.leased = lease_s > 0

    @rule(order=orders)
    def retry(self, order):
        order_id = self.order_ids[order]
        revived = self.dispatcher.store.retry([order_id], deadline_s=LONG_S)
        assert revived == ([order_id] if order_id in self.model.dead else [])
        if revived:
            self.model.records.pop(order_id, None)  # who asks is told what comes of this
            self.model.open[order_id] = self.model.dead.pop(order_id)
            self.model.open[order_id].told = False

    @rule()
    def report_overdue(self):
        for each in self.dispatcher.store.overdue(at_most=100):
            value = result(each.order_id, Outcome.UNRESOLVED)
            assert self.dispatcher.store.report([value]) == 1
            known = self.model.open[each.order_id]
            assert not known.told
            known.told = True
            self.model.records[each.order_id] = self.dispatcher.store.record(each.order_id)

    @rule()
    def sweep(self):
        for lane in lanes_to_wake(self.dispatcher, 0.001):
            assert any(
                entry.lane is lane and not entry.leased and not entry.paused
                for entry in self.model.open.values()
            )

    @invariant()
    def every_accepted_order_is_open_or_dead_or_settled_and_settled_never_reverts(self):
        is_open = {each.order_id: each for each in self.dispatcher.store.open_cancels()}
        dead = {each.order_id for each in self.dispatcher.store.dead_letters()}
        found = {order_id: self.dispatcher.store.record(order_id) for order_id in self.order_ids}
        assert set(is_open) == set(self.model.open)
        assert dead == set(self.model.dead)
        for order_id in self.model.accepted:
            settled = found[order_id] is not None and found[order_id].outcome is not Outcome.UNRESOLVED
            assert (order_id in is_open) + (order_id in dead) + settled == 1
            if order_id in self.model.records:
                assert found[order_id] == self.model.records[order_id]
        for order_id, each in is_open.items():
            known = self.model.open[order_id]
            assert (each.lane, each.requested_by) == (known.lane, tuple(known.names))
            assert each.claimed == (known.token is not None)


@pytest.mark.timeout(300)  # hundreds of examples, on a machine that may be busy
def test_the_stores_laws_hold_under_any_sequence_of_operations(server_of_each_make):
    StoreMachine.server = server_of_each_make
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_an_entry_of_a_newer_version_is_worked_on_and_keeps_what_only_that_knows(dispatcher):
    [order_id] = ids(1)
    dispatcher.accept(order_id)
    entry = f"{dispatcher.prefix}:pending:{order_id}"
    newer = {**json.loads(dispatcher.server.hget(entry, "request")), "of_the_future": {"a": 1}}
    dispatcher.server.hset(entry, "request", json.dumps(newer))
    [claimed] = dispatcher.claim(9)
    assert claimed.request == CancelRequest(order_id)
    assert json.loads(dispatcher.server.hget(entry, "request")) == newer


def test_an_entry_that_somebody_has_spoilt_is_kept_as_a_dead_letter_and_stops_nobody(dispatcher):
    spoilt, sound = ids(2)
    dispatcher.accept(spoilt, sound)
    dispatcher.server.hset(f"{dispatcher.prefix}:pending:{spoilt}", "request", "no JSON")
    assert [entry.order_id for entry in dispatcher.claim(9)] == [sound]
    [letter] = dispatcher.store.dead_letters()
    assert (letter.order_id, letter.progress.last_problem.code) == (spoilt, "spoilt_entry")
