"""The laws of the book of open cancels, against real servers: Valkey, and Redis where it is installed."""

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
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kalshi_cancel.model.orders import (
    CancelRequest,
    CancelResult,
    ConfirmedBy,
    Lane,
    OrderStatus,
    Outcome,
    Problem,
)
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store import results
from kalshi_cancel.store.cancels import Book, Fence, Fenced, GiveBack, GiveUp, Known, Settle, connect
from kalshi_cancel.store.workers import Roster, WorkerShown
from trials.stack import wait_until

LONG_S = 60.0  # a lease or a pause that does not end within a test
BOTH = (Lane.RISK, Lane.STRATEGY)
TROUBLED = json.dumps(
    {"attempts": 3, "last_problem": {"code": "http_500", "message": "oops"}, "history": [[7, "http_500"]]}
)


@pytest.fixture
def desk(server_of_each_make):
    """A book of the test's own, with a few shortcuts."""
    shortcuts = Shortcuts(server_of_each_make)
    yield shortcuts
    shortcuts.close()


class Shortcuts:
    """A book under a prefix of its own, and the operations as tests like to write them."""

    def __init__(self, server):
        self.prefix = f"t{uuid.uuid4().hex[:8]}"
        self.settings = settings = RedisSettings.from_env(
            {"REDIS_URL": server.url, "KALSHI_KEY_PREFIX": self.prefix}
        )
        self.celery_prefix = settings.celery_prefix
        self.server = connect(settings)
        self.book = Book(self.server, settings)

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
        return self.book.accept(
            [CancelRequest(order_id, **fields) for order_id in order_ids],
            lane=lane,
            default_deadline_s=deadline_s,
            reply_to=[reply_to] * len(order_ids),
            fence=fence,
            records_older_than_s=records_older_than_s,
        )

    def claim(self, at_most=1, *, lanes=BOTH, lease_s=LONG_S, exchange_ms=None):
        """As a hand claims that wants so many: one call's worth after the other."""
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
        return self.book.claim(lanes, at_most=at_most, lease_s=lease_s, exchange_ms=exchange_ms)

    def claim_one(self, **how):
        [entry] = self.claim(1, **how)
        return entry

    def settle(self, entry, outcome=Outcome.CANCELED, **known):
        [done] = self.book.conclude([Settle(entry, result(entry.order_id, outcome, **known))])
        return done

    def give_back(self, entry, pause_s=0.0, learned=""):
        [done] = self.book.conclude([GiveBack(entry, learned, pause_s)])
        return done

    def give_up(self, entry, learned=TROUBLED):
        [done] = self.book.conclude([GiveUp(entry, learned)])
        return done

    def tell_overdue(self):
        overdue = self.book.overdue(at_most=100)
        return self.book.report([result(each.order_id, Outcome.UNRESOLVED) for each in overdue])

    def open_ids(self):
        return [each.order_id for each in self.book.open_cancels()]

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


def test_what_is_accepted_is_open_until_it_is_settled(desk):
    [order_id] = ids()
    assert desk.accept(order_id, requested_by="mm-btc", reason="news").settled == {}
    shown = desk.book.open_cancel(order_id)
    assert (shown.lane, shown.requested_by, shown.in_hand, shown.unresolved) == (
        Lane.STRATEGY,
        ("mm-btc",),
        False,
        False,
    )
    assert shown.request.reason == "news"
    assert desk.settle(desk.claim_one())
    assert desk.book.open_cancel(order_id) is None
    assert desk.open_ids() == []
    assert desk.book.record(order_id) == result(order_id, requested_by=("mm-btc",))


def test_accepting_the_same_order_again_joins_the_entry_that_is_there(desk):
    [order_id] = ids()
    for name in ("a", "b", "a"):
        desk.accept(order_id, requested_by=name)
    assert desk.open_ids() == [order_id]
    assert desk.book.open_cancel(order_id).requested_by == ("a", "b")
    entry = desk.claim_one()
    desk.accept(order_id, requested_by="c")  # while it is in a hand
    assert desk.claim() == []
    assert desk.settle(entry)
    assert desk.book.record(order_id).requested_by == ("a", "b", "c")


def test_a_later_request_adds_routing_that_was_not_known_and_overrules_none(desk):
    [order_id] = ids()
    desk.accept(order_id, exchange_index=2)
    desk.accept(order_id, exchange_index=3, market_ticker="KXTEST", subaccount=1)
    request = desk.claim_one().request
    assert (request.exchange_index, request.market_ticker, request.subaccount) == (2, "KXTEST", 1)


def test_a_later_deadline_counts_and_an_earlier_one_does_not(desk):
    [order_id] = ids()
    desk.accept(order_id, deadline_s=20)
    desk.accept(order_id, deadline_s=40)
    desk.accept(order_id, deadline_s=1)
    assert 30 < desk.claim_one().deadline_left_s <= 40


def test_a_request_from_the_risk_lane_takes_a_waiting_order_with_it_at_its_age(desk):
    older, upgraded, risky, younger = ids(4)
    for order_id in (older, upgraded):
        desk.accept(order_id)
        desk.pause_until_next_ms()
    desk.accept(risky, lane=Lane.RISK)
    desk.accept(younger)
    desk.accept(upgraded, lane=Lane.RISK)
    assert [entry.order_id for entry in desk.claim(9)] == [upgraded, risky, older, younger]


def test_an_order_of_the_risk_lane_stays_there_when_a_strategy_asks_too(desk):
    [order_id] = ids()
    desk.accept(order_id, lane=Lane.RISK)
    desk.accept(order_id, lane=Lane.STRATEGY)
    assert desk.book.open_cancel(order_id).lane is Lane.RISK


def test_an_order_in_a_hand_can_be_upgraded_and_is_still_in_that_hand_alone(desk):
    [order_id] = ids()
    desk.accept(order_id)
    entry = desk.claim_one()
    desk.accept(order_id, lane=Lane.RISK)
    assert desk.claim(9) == []
    assert desk.book.extend([entry], lease_s=LONG_S) == [True]
    assert desk.settle(entry)
    assert desk.open_ids() == []


@pytest.mark.parametrize("outcome", [Outcome.CANCELED, Outcome.TOO_LATE])
def test_a_request_for_a_settled_order_is_answered_from_its_record(desk, outcome):
    [order_id] = ids()
    desk.accept(order_id)
    desk.settle(desk.claim_one(), outcome)
    accepted = desk.accept(order_id, reply_to=f"task-{order_id}")
    assert accepted.settled == {order_id: desk.book.record(order_id)}
    assert accepted.settled[order_id].outcome is outcome
    assert desk.claim() == []
    reply = json.loads(desk.server.get(results.task_key(f"task-{order_id}", desk.celery_prefix)))
    assert (reply["task_id"], reply["result"]["outcome"]) == (f"task-{order_id}", outcome.value)


@pytest.mark.parametrize("outcome", [Outcome.REFUSED, Outcome.UNKNOWN_ORDER])
def test_a_record_that_is_not_final_goes_when_the_order_is_asked_for_again(desk, outcome):
    [order_id] = ids()
    desk.accept(order_id)
    desk.settle(desk.claim_one(), outcome, error=Problem("some", '"outcome":"canceled"'))
    assert desk.accept(order_id).settled == {}
    assert desk.book.record(order_id) is None
    assert desk.claim_one().order_id == order_id


@pytest.mark.parametrize("outcome", [Outcome.CANCELED, Outcome.TOO_LATE])
def test_a_final_record_that_is_too_old_is_not_believed_and_the_order_is_canceled_again(desk, outcome):
    [order_id] = ids()
    desk.accept(order_id)
    desk.settle(desk.claim_one(), outcome)
    key, life_s = results.record_key(order_id, desk.celery_prefix), desk.settings.result_expires_s
    desk.server.expire(key, life_s - 30)  # as one that is 30 s old
    believed = desk.accept(order_id, records_older_than_s=40)
    assert list(believed.settled) == [order_id]
    again = desk.accept(order_id, records_older_than_s=20, exchange_index=2)
    assert again.settled == {}
    assert desk.book.record(order_id) is None, "who waits must not be told the old outcome"
    request = desk.claim_one().request
    assert (request.order_id, request.exchange_index, request.again) == (order_id, 2, True)


def test_a_record_is_not_believed_at_all_where_nothing_older_than_now_is(desk):
    fresh, for_ever, newer = ids(3)
    for order_id in (fresh, for_ever, newer):
        desk.accept(order_id)
        desk.settle(desk.claim_one())
    desk.server.persist(results.record_key(for_ever, desk.celery_prefix))
    desk.server.expire(results.record_key(newer, desk.celery_prefix), desk.settings.result_expires_s * 2)
    assert desk.accept(fresh, for_ever, newer, records_older_than_s=0).settled == {}
    assert sorted(desk.open_ids()) == sorted([fresh, for_ever, newer])


def test_many_orders_are_accepted_in_one_call_with_those_settled_told_apart(desk):
    order_ids = ids(450)  # more than one script takes
    desk.accept(order_ids[300])
    desk.settle(desk.claim_one())
    accepted = desk.accept(*order_ids)
    assert set(accepted.settled) == {order_ids[300]}
    assert sorted(desk.open_ids()) == sorted(set(order_ids) - {order_ids[300]})


def test_accepting_tells_how_many_messages_wait_in_the_lanes_queue(desk):
    try:
        desk.server.rpush(desk.celery_prefix + "risk", "a", "b")
        assert desk.accept(*ids(), lane=Lane.RISK).waiting_messages == 2
    finally:
        desk.server.delete(desk.celery_prefix + "risk")


def test_a_requests_names_and_reasons_come_back_as_they_were_whatever_they_are(desk):
    [order_id] = ids()
    names = ('q"uo\\te', "émoji 🎈", '","outcome":"too_late"', "[]", "{}")
    for name in names:
        desk.accept(order_id, requested_by=name, reason=name)
    desk.settle(desk.claim_one())
    assert desk.book.record(order_id).requested_by == names
    assert desk.book.record(order_id).outcome is Outcome.CANCELED


# -- claiming


def test_risk_is_claimed_first_and_within_a_lane_the_oldest(desk):
    order_ids = ids(6)
    lanes = [Lane.STRATEGY, Lane.STRATEGY, Lane.RISK, Lane.STRATEGY, Lane.RISK, Lane.STRATEGY]
    for order_id, lane in zip(order_ids, lanes, strict=True):
        desk.accept(order_id, lane=lane)
        desk.pause_until_next_ms()
    claimed = [entry.order_id for _ in order_ids for entry in desk.claim(1)]
    assert claimed == [order_ids[at] for at in (2, 4, 0, 1, 3, 5)]


def test_a_claim_takes_from_the_lanes_it_names_only(desk):
    strategy, risk = ids(2)
    desk.accept(strategy)
    desk.accept(risk, lane=Lane.RISK)
    assert [entry.order_id for entry in desk.claim(9, lanes=[Lane.RISK])] == [risk]
    assert [entry.order_id for entry in desk.claim(9, lanes=[Lane.STRATEGY])] == [strategy]


def test_an_entry_in_a_hand_is_not_claimed_by_another(desk):
    order_ids = ids(3)
    desk.accept(*order_ids)
    assert len(desk.claim(2)) == 2
    assert len(desk.claim(9)) == 1
    assert desk.claim(9) == []
    assert all(each.in_hand for each in desk.book.open_cancels())


def test_what_is_to_be_read_back_is_claimed_alone_at_its_old_age(desk):
    older, read, younger = ids(3)
    for order_id in (older, read, younger):
        desk.accept(order_id)
        desk.pause_until_next_ms()
    in_hand = {entry.order_id: entry for entry in desk.claim(3)}
    desk.book.conclude([GiveBack(in_hand[order_id], "") for order_id in (older, younger)])
    desk.book.conclude([GiveBack(in_hand[read], TROUBLED, path="read")])
    calls = [[entry.order_id for entry in desk.claim_call(9).entries] for _ in range(3)]
    assert calls == [[older, younger], [read], []]


def test_orders_of_every_shard_are_open_and_claimable(desk):
    order_ids = ids(4)
    for order_id, shard in zip(order_ids, (None, 0, 1, 7), strict=True):
        desk.accept(order_id, exchange_index=shard)
    assert set(desk.open_ids()) == set(order_ids)
    claimed = desk.claim(4)
    assert {entry.order_id for entry in claimed} == set(order_ids)
    assert all(desk.settle(entry) for entry in claimed)
    assert desk.open_ids() == []


def test_a_claim_tells_when_there_is_more_to_come(desk):
    now, later = ids(2)
    assert desk.claim_call().next_due_s is None
    desk.accept(now, later)
    claim = desk.claim_call()
    assert claim.next_due_s == 0.0
    desk.give_back(desk.claim_one(), LONG_S)
    assert 0 < desk.claim_call().next_due_s <= LONG_S


def test_what_a_vanished_hand_held_is_claimable_when_its_lease_is_over_and_marked_as_interrupted(desk):
    [order_id] = ids()
    desk.accept(order_id)
    first = desk.claim_one(lease_s=0.05, exchange_ms=1234)
    assert not first.interrupted
    [second] = wait_until(desk.claim, within_s=2, what="the lease's end")
    assert (second.order_id, second.interrupted, second.first_sent_ms) == (order_id, True, "1234")


def test_a_lease_that_is_extended_does_not_run_out(desk):
    desk.accept(*ids())
    entry = desk.claim_one(lease_s=0.3)
    assert desk.book.extend([entry], lease_s=LONG_S) == [True]
    seen = time.monotonic()
    wait_until(lambda: time.monotonic() - seen > 0.4, what="the first lease's end")
    assert desk.claim() == []


def test_an_old_token_cannot_settle_extend_give_back_or_give_up(desk):
    [order_id] = ids()
    desk.accept(order_id)
    frozen = desk.claim_one(lease_s=0)
    newer = desk.claim_one()
    before = desk.server.hgetall(f"{desk.prefix}:entry:{order_id}")
    assert not desk.settle(frozen)
    assert not desk.give_back(frozen)
    assert not desk.give_up(frozen)
    assert desk.book.extend([frozen], lease_s=0) == [False]
    assert desk.server.hgetall(f"{desk.prefix}:entry:{order_id}") == before
    assert desk.book.record(order_id) is None
    assert desk.settle(newer, reduced_by=Decimal("7.00"))
    assert not desk.settle(frozen)
    assert desk.book.record(order_id).reduced_by == Decimal("7.00")


def test_a_hand_whose_order_was_settled_and_asked_for_anew_cannot_touch_the_new_entry(desk):
    [order_id] = ids()
    desk.accept(order_id)
    frozen = desk.claim_one(lease_s=0)
    desk.settle(desk.claim_one(), Outcome.UNKNOWN_ORDER)
    desk.accept(order_id)
    assert not desk.settle(frozen)
    assert desk.claim_one().order_id == order_id


def test_a_hand_late_but_not_overtaken_may_still_settle(desk):
    desk.accept(*ids())
    entry = desk.claim_one(lease_s=0)
    assert desk.settle(entry)


def test_an_index_whose_entry_was_deleted_by_hand_does_not_stop_the_line(desk):
    gone, order_id = ids(2)
    desk.accept(gone)
    desk.pause_until_next_ms()
    desk.accept(order_id)
    desk.server.delete(f"{desk.prefix}:entry:{gone}")
    claimed = [*desk.claim(1), *desk.claim(1)]
    assert [entry.order_id for entry in claimed] == [order_id]
    assert desk.open_ids() == [order_id]


# -- concluding


def test_storing_the_record_and_removing_the_entry_are_one_step(desk):
    """Whoever looks at both at once sees exactly one of them, at any moment."""
    order_ids = ids(300)
    desk.accept(*order_ids)
    wrong, over = [], threading.Event()

    def look():
        with desk.server.client() as mine:
            while not over.is_set():
                order_id = random.choice(order_ids)
                entry, record = (
                    mine.pipeline(transaction=True)
                    .exists(f"{desk.prefix}:entry:{order_id}")
                    .exists(results.record_key(order_id, desk.celery_prefix))
                    .execute()
                )
                if entry + record != 1:
                    wrong.append((entry, record))

    watcher = threading.Thread(target=look)
    watcher.start()
    for entry in desk.claim(300):
        desk.settle(entry)
    over.set()
    watcher.join()
    assert wrong == []
    assert desk.open_ids() == []


def test_every_task_that_asked_gets_the_result_under_its_own_id(desk):
    [order_id] = ids()
    tasks = [f"task-{n}-{order_id}" for n in range(3)]
    for task in tasks:
        desk.accept(order_id, reply_to=task, requested_by="raw")
    desk.accept(order_id, reply_to=tasks[0])
    desk.settle(desk.claim_one())
    record = json.loads(desk.server.get(results.record_key(order_id, desk.celery_prefix)))
    for task in tasks:
        reply = json.loads(desk.server.get(results.task_key(task, desk.celery_prefix)))
        assert reply == {**record, "task_id": task}


def test_given_back_without_a_pause_an_entry_has_its_old_place_in_the_line(desk):
    order_ids = ids(3)
    for order_id in order_ids:
        desk.accept(order_id)
        desk.pause_until_next_ms()
    first, second = desk.claim(2)
    assert desk.give_back(second)
    assert desk.give_back(first)
    again = desk.claim(3)
    assert [entry.order_id for entry in again] == order_ids
    assert not any(entry.interrupted for entry in again)


def test_given_back_with_a_pause_an_entry_comes_after_it_with_what_was_learned(desk):
    [order_id] = ids()
    desk.accept(order_id)
    assert desk.give_back(desk.claim_one(), 0.05, TROUBLED)
    assert desk.claim() == []
    shown = desk.book.open_cancel(order_id)
    assert (shown.in_hand, shown.progress.attempts, shown.progress.last_problem.code) == (
        False,
        3,
        "http_500",
    )
    [entry] = wait_until(desk.claim, within_s=2, what="the pause's end")
    assert (entry.learned, entry.interrupted) == (TROUBLED, False)


def test_what_is_given_up_is_kept_with_its_history_and_can_be_brought_back(desk):
    [order_id] = ids()
    desk.accept(order_id, requested_by="mm", reason="news")
    assert desk.give_up(desk.claim_one())
    assert desk.open_ids() == []
    [letter] = desk.book.dead_letters()
    assert (letter.order_id, letter.requested_by, letter.request.reason) == (order_id, ("mm",), "news")
    assert (letter.progress.attempts, letter.progress.history) == (3, ((7, "http_500"),))
    assert desk.book.retry([order_id, *ids()], deadline_s=10) == [order_id]
    assert list(desk.book.dead_letters()) == []
    entry = desk.claim_one()
    assert (entry.learned, entry.age_s < 5, entry.reported) == (TROUBLED, True, False)
    assert desk.book.retry([order_id], deadline_s=10) == []


def test_what_is_asked_for_again_while_it_is_being_given_up_is_not_given_up(desk):
    desk.accept("order", deadline_s=0.001)
    desk.pause_until_next_ms()
    assert desk.tell_overdue() == 1
    held = desk.claim_one()
    desk.accept("order", lane=Lane.RISK)
    assert desk.give_up(held)
    assert (desk.open_ids(), list(desk.book.dead_letters())) == (["order"], [])
    assert desk.claim_one().lane is Lane.RISK


def test_a_record_that_cannot_be_read_keeps_nobody_from_asking(desk):
    desk.accept("spoilt", "fine")
    for entry in desk.claim(2):
        desk.settle(entry)
    key = results.record_key("spoilt", desk.celery_prefix)
    text = desk.server.get(key).replace('"status":"canceled"', '"status":"on_hold"')
    desk.server.set(key, text)
    accepted = desk.accept("fine", "spoilt", "new")
    assert set(accepted.settled) == {"fine"}
    assert sorted(desk.open_ids()) == ["new", "spoilt"]
    asked_anew = {entry.order_id: entry.request.again for entry in desk.claim(2)}
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
def test_who_runs_a_mass_cancel_no_longer_enters_nothing_and_is_told_so(desk, mass):
    fence, key = Fence("mass-1", "8"), f"{desk.prefix}:mass:mass-1"
    desk.server.hset(key, mapping={"fence": "8"})
    desk.accept("mine", fence=fence)
    desk.server.delete(key)
    desk.server.hset(key, mapping={"request": "{}", **mass})
    with pytest.raises(Fenced, match="mass-1"):
        desk.accept("other", "mine", fence=fence)
    with pytest.raises(Fenced, match="mass-1"):
        desk.book.learn([CancelRequest("mine")], Known("{}", "read", 0.0), lane=Lane.RISK, fence=fence)
    assert desk.open_ids() == ["mine"]
    assert desk.claim_one().learned == ""


def test_who_runs_a_mass_cancel_enters_and_teaches_as_anybody_does(desk):
    fence = Fence("mass-1", "8")
    desk.server.hset(f"{desk.prefix}:mass:mass-1", mapping={"request": "{}", "fence": "8"})
    desk.accept("order", fence=fence)
    taught = desk.book.learn(
        [CancelRequest("order")], Known('{"attempts":1}', "read", 0.0), lane=Lane.RISK, fence=fence
    )
    assert (taught, json.loads(desk.claim_one().learned)) == (1, {"attempts": 1})


def test_a_hand_that_only_read_back_leaves_no_attempt_behind(desk):
    desk.accept("order")
    [held] = desk.claim(1)
    desk.book.conclude([GiveBack(held, TROUBLED, 0.0, "read")])
    reading = desk.claim_one(lease_s=0)
    assert not reading.interrupted
    assert not desk.claim_one().interrupted, "the hand before had sent nothing"


def test_when_the_first_attempt_was_sent_is_known_by_its_age_too(desk):
    desk.accept("order")
    time_passes_s = 0.05
    wait_until(lambda: desk.book.open_cancel("order").age_s >= time_passes_s, what="the order to wait")
    desk.claim_one(lease_s=0, exchange_ms=1234)
    second = desk.claim_one(exchange_ms=5678)
    assert (second.interrupted, second.first_sent_ms) == (True, "1234")
    assert second.first_sent_age_ms >= 1000 * time_passes_s


def test_shards_far_beyond_those_there_are_have_no_line_of_their_own(desk):
    for number in range(40):
        desk.accept(f"order-{number}", exchange_index=1000 + number)
    assert desk.server.smembers(f"{desk.prefix}:paths") == {"write"}


def test_asking_again_for_what_was_given_up_opens_it_again(desk):
    [order_id] = ids()
    desk.accept(order_id)
    desk.give_up(desk.claim_one())
    desk.accept(order_id, requested_by="again")
    assert desk.open_ids() == [order_id]
    assert list(desk.book.dead_letters()) == []
    assert desk.settle(desk.claim_one())


def test_what_is_known_of_an_entry_can_be_changed_until_a_hand_has_had_it(desk):
    fresh, taken = "fresh", "taken"
    perhaps = Known(TROUBLED, "reads", LONG_S)
    requests = [CancelRequest(order_id, exchange_index=2) for order_id in (fresh, taken)]
    desk.book.accept(requests[1:], lane=Lane.RISK, default_deadline_s=LONG_S)
    held = desk.claim_one()
    desk.book.accept(requests[:1], lane=Lane.RISK, default_deadline_s=LONG_S, known=perhaps)
    assert desk.claim(2) == [], "it is not due yet"
    assert desk.book.learn(requests, None, lane=Lane.RISK) == 1
    [entry] = desk.claim(2)
    assert (entry.order_id, entry.learned) == (fresh, "")
    desk.give_back(held, learned=TROUBLED)
    assert desk.book.learn(requests, None, lane=Lane.RISK) == 0
    assert desk.claim_one().learned == TROUBLED


def test_several_conclusions_are_judged_each_by_itself(desk):
    order_ids = ids(4)
    desk.accept(*order_ids)
    old = {entry.order_id: entry for entry in desk.claim(1, lease_s=0)}
    entries = {entry.order_id: entry for entry in desk.claim(4)}
    settled, back, up = (entries[each] for each in order_ids if each not in old)
    [stale] = old.values()
    done = desk.book.conclude(
        [
            Settle(stale, result(stale.order_id)),
            Settle(settled, result(settled.order_id)),
            GiveBack(back, "", 0.0),
            GiveUp(up, ""),
        ]
    )
    assert done == [False, True, True, True]
    assert desk.open_ids() == [back.order_id, stale.order_id]
    assert [each.order_id for each in desk.book.dead_letters()] == [up.order_id]


# -- deadlines


def test_an_overdue_entry_is_told_unresolved_once_and_stays_open(desk):
    late, in_time = ids(2)
    desk.accept(late, deadline_s=0, reply_to=f"task-{late}", requested_by="mm")
    desk.accept(in_time)
    assert [each.order_id for each in desk.book.overdue(at_most=9)] == [late]
    assert desk.tell_overdue() == 1
    assert desk.book.overdue(at_most=9) == []
    told = desk.book.record(late)
    assert (told.outcome, told.requested_by) == (Outcome.UNRESOLVED, ("mm",))
    reply = json.loads(desk.server.get(results.task_key(f"task-{late}", desk.celery_prefix)))
    assert (reply["task_id"], reply["result"]["outcome"]) == (f"task-{late}", "unresolved")
    assert desk.book.open_cancel(late).unresolved
    entry = next(each for each in desk.claim(2) if each.order_id == late)
    assert entry.reported
    desk.settle(entry)
    assert desk.book.record(late).outcome is Outcome.CANCELED


def test_an_entry_settled_between_the_look_and_the_report_is_not_told_unresolved(desk):
    [order_id] = ids()
    desk.accept(order_id, deadline_s=0)
    overdue = desk.book.overdue(at_most=9)
    desk.settle(desk.claim_one())
    assert desk.book.report([result(each.order_id, Outcome.UNRESOLVED) for each in overdue]) == 0
    assert desk.book.record(order_id).outcome is Outcome.CANCELED


def test_an_entry_asked_for_again_between_the_look_and_the_report_is_not_told_unresolved(desk):
    [order_id] = ids()
    desk.accept(order_id, deadline_s=0)
    overdue = desk.book.overdue(at_most=9)
    desk.accept(order_id, deadline_s=LONG_S)
    assert desk.book.report([result(each.order_id, Outcome.UNRESOLVED) for each in overdue]) == 0
    assert desk.book.record(order_id) is None


def test_asking_again_for_an_unresolved_order_forgets_the_record_and_makes_it_due_at_once(desk):
    [order_id] = ids()
    desk.accept(order_id, deadline_s=0)
    desk.give_back(desk.claim_one(), LONG_S, TROUBLED)
    desk.tell_overdue()
    assert desk.accept(order_id, deadline_s=LONG_S).settled == {}
    assert desk.book.record(order_id) is None
    entry = desk.claim_one()
    assert (entry.learned, entry.reported, 0 < entry.deadline_left_s <= LONG_S) == (TROUBLED, False, True)


# -- refusing


def test_a_refusal_is_stored_unless_the_order_has_an_entry_or_a_record(desk):
    stranger, open_one, settled = ids(3)
    refusal = {"outcome": Outcome.REFUSED, "error": Problem("invalid_request", "no"), "requested_by": ("x",)}
    desk.accept(settled)
    desk.settle(desk.claim_one())
    desk.accept(open_one)
    assert desk.book.refuse(CancelResult(stranger, **refusal))
    assert not desk.book.refuse(CancelResult(open_one, **refusal))
    assert not desk.book.refuse(CancelResult(settled, **refusal))
    assert desk.book.record(stranger).outcome is Outcome.REFUSED
    assert desk.book.record(open_one) is None
    assert desk.book.record(settled).outcome is Outcome.CANCELED


# -- sweeping


def lanes_to_wake(desk, patience_s=0.05):
    return list(desk.book.lanes_to_wake(BOTH, patience_s=patience_s))


def wait_for_ring(desk, patience_s=0.05):
    return wait_until(lambda: lanes_to_wake(desk, patience_s), within_s=5, what="a ring")


def test_the_sweep_rings_once_for_what_nobody_is_coming_for(desk):
    assert lanes_to_wake(desk) == []
    desk.accept(*ids(2), lane=Lane.RISK)
    assert wait_for_ring(desk, 0.5) == [Lane.RISK]
    assert lanes_to_wake(desk, 0.5) == []  # another sweeper has just rung


def test_the_sweep_rings_again_after_its_patience_when_the_first_ringer_died(desk):
    desk.accept(*ids())
    assert wait_for_ring(desk) == [Lane.STRATEGY]
    assert wait_for_ring(desk) == [Lane.STRATEGY]


def test_the_sweep_does_not_ring_for_what_was_accepted_just_now_because_its_message_is_on_the_way(desk):
    desk.accept(*ids(2))
    assert lanes_to_wake(desk, LONG_S) == []


def test_the_sweep_does_not_ring_while_a_hand_is_claiming(desk):
    desk.accept(*ids(2), lane=Lane.STRATEGY)
    desk.claim(1, lease_s=0)  # over at once: it would be rung for
    assert lanes_to_wake(desk, LONG_S) == []
    assert wait_for_ring(desk) == [Lane.STRATEGY]


def test_the_sweep_does_not_ring_while_a_message_waits(desk):
    desk.accept(*ids(), lane=Lane.RISK)
    desk.claim(1, lease_s=0)
    try:
        desk.server.rpush(desk.celery_prefix + "risk", "a bell")
        waited = time.monotonic()
        wait_until(lambda: time.monotonic() - waited > 0.1, what="longer than the patience")
        assert lanes_to_wake(desk) == []
    finally:
        desk.server.delete(desk.celery_prefix + "risk")
    assert lanes_to_wake(desk) == [Lane.RISK]


def test_where_a_hand_listens_the_sweep_rings_for_it_and_nothing_is_to_be_published(desk):
    desk.accept(*ids())
    desk.book.show_ears([Lane.STRATEGY], life_s=60)
    wanted = lambda: desk.book.lanes_to_wake(BOTH, patience_s=0.05)  # noqa: E731 - a condition
    assert wait_until(wanted, within_s=5, what="a ring") == {Lane.STRATEGY: True}
    assert desk.book.listen([Lane.STRATEGY], within_s=0.5)
    assert not desk.book.listen([Lane.STRATEGY], within_s=0.1), "one bell is enough"


def test_accepting_rings_for_a_hand_that_listens_and_once_only(desk):
    assert not desk.accept(*ids()).heard
    desk.book.show_ears(BOTH, life_s=60)
    for _ in range(3):
        assert desk.accept(*ids(), lane=Lane.RISK).heard
    assert desk.book.listen(BOTH, within_s=0.5)
    assert not desk.book.listen(BOTH, within_s=0.1)


def test_the_sweep_rings_for_a_vanished_hands_orders_as_soon_as_their_lease_is_over(desk):
    desk.accept(*ids())
    desk.claim(1, lease_s=0.6)
    assert lanes_to_wake(desk, 0.5) == []
    claimed = time.monotonic()
    assert wait_for_ring(desk, 0.5) == [Lane.STRATEGY]
    assert time.monotonic() - claimed < 1.0  # the lease, but no patience after it


def test_the_sweep_does_not_ring_for_what_is_in_a_hand_or_paused_and_does_when_that_is_over(desk):
    desk.accept(*ids(2))
    _held, paused = desk.claim(2, lease_s=0.3)
    desk.give_back(paused, 0.3)
    assert lanes_to_wake(desk, 0.001) == []
    assert wait_for_ring(desk, 0.001) == [Lane.STRATEGY]


# -- keys and cost


def test_every_key_is_under_the_prefix(desk):
    before = set(desk.server.scan_iter(count=1000))
    order_ids = ids(5)
    desk.accept(*order_ids, deadline_s=0)
    first, second, third, *_ = desk.claim(5)
    desk.settle(first)
    desk.give_up(second)
    desk.give_back(third, 1.0)
    desk.tell_overdue()
    lanes_to_wake(desk)
    desk.book.keep_unreadable("?")
    roster = Roster(desk.server, desk.settings)
    roster.show(WorkerShown("me", ("risk",), 1))
    keys = set(desk.server.scan_iter(count=1000)) - before
    assert {key for key in keys if not key.startswith(f"{desk.prefix}:")} == set()


def test_a_settled_order_leaves_nothing_behind_but_its_record(desk):
    order_ids = ids(3)
    desk.accept(*order_ids, deadline_s=0)
    desk.accept(order_ids[0], lane=Lane.RISK)
    for entry in desk.claim(3):
        desk.settle(entry)
    indexes = [key for key in desk.server.scan_iter(f"{desk.prefix}:*") if desk.server.type(key) == "zset"]
    entries = list(desk.server.scan_iter(f"{desk.prefix}:entry:*"))
    assert (indexes, entries) == ([], [])


def commands_of_one_round(desk, *, waiting):
    """How many commands a claim, its conclusions, a sweep and a look for overdue ones take in the server."""
    desk.accept(*ids(waiting))
    desk.server.config_resetstat()
    entries = desk.claim(5)
    assert len(entries) == 5
    desk.book.extend(entries, lease_s=LONG_S)
    desk.book.conclude(
        [*(Settle(each, result(each.order_id)) for each in entries[:3]), GiveBack(entries[3], "", 1.0)]
    )
    desk.accept(*ids(2))
    desk.book.overdue(at_most=10)
    lanes_to_wake(desk, LONG_S)
    stats = desk.server.info("commandstats")
    return {name: each["calls"] for name, each in stats.items() if "info" not in name}


def test_the_cost_of_every_operation_is_independent_of_the_books_length(server_of_each_make):
    costs = []
    for waiting in (10, 10_000):
        desk = Shortcuts(server_of_each_make)
        commands_of_one_round(desk, waiting=10)  # every script is loaded
        desk.close()
        desk = Shortcuts(server_of_each_make)
        costs.append(commands_of_one_round(desk, waiting=waiting))
        desk.close()
    assert costs[0] == costs[1]


# -- laws, under any sequence of operations


def test_no_order_is_settled_twice_by_hands_that_often_lose_their_leases(desk):
    """Real threads, real time: leases shorter than the work, so that claims overtake each other."""
    settled, overtaken, lock = Counter(), Counter(), threading.Lock()

    def work(seed):
        dice = random.Random(seed)
        while desk.open_ids():
            for entry in desk.claim(3, lease_s=0.004):
                threading.Event().wait(dice.uniform(0, 0.006))
                done = desk.settle(entry, reduced_by=Decimal(entry.token))
                with lock:
                    (settled if done else overtaken)[entry.order_id] += 1

    order_ids = []
    for _ in range(20):  # until some claim was overtaken: before that, nothing is shown
        fresh = ids(150)
        desk.accept(*fresh)
        order_ids += fresh
        hands = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for hand in hands:
            hand.start()
        for hand in hands:
            hand.join()
        if overtaken:
            break
    assert settled == Counter(order_ids)
    assert overtaken.total() > 0


@dataclass
class _Open:
    """What the model knows about an entry; ``leased``: in a hand whose lease does not end in the test.

    ``sent``: a hand that has not put it down may have sent a cancel; ``reads``: it is to be read back;
    ``asked_anew``: in a hand, it was asked for again after its waiters were told that it is unresolved.
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
    held: list = field(default_factory=list)  # every entry that any hand believes to hold


class BookMachine(RuleBasedStateMachine):
    """Producers, several hands and sweepers against one book, compared with a model after each step."""

    server = None

    def __init__(self):
        super().__init__()
        self.desk = Shortcuts(self.server)
        self.order_ids = ids(4)
        self.model = _Model()
        self.serial = itertools.count(1)

    def teardown(self):
        self.desk.close()

    orders = st.integers(0, 3)
    leases = st.sampled_from([0.0, LONG_S])
    picks = st.integers(0, 1000)

    @rule(
        order=orders,
        lane=st.sampled_from(BOTH),
        name=st.sampled_from("abc"),
        late=st.booleans(),
        shard=st.sampled_from([None, 1]),
    )
    def accept(self, order, lane, name, late, shard):
        order_id, model = self.order_ids[order], self.model
        accepted = self.desk.accept(
            order_id, lane=lane, requested_by=name, deadline_s=0 if late else LONG_S, exchange_index=shard
        )
        model.accepted.add(order_id)
        record = model.records.get(order_id)
        if record is not None and record.outcome.final:
            assert accepted.settled == {order_id: record}
            return
        assert accepted.settled == {}
        if order_id in model.dead:  # it is open again, with all who asked and all that was learned
            model.open[order_id] = model.dead.pop(order_id)
            model.open[order_id].told, model.open[order_id].token = True, None
        entry = model.open.get(order_id)
        if entry is None:
            model.records.pop(order_id, None)
            model.open[order_id] = _Open(lane, [name])
            return
        entry.names += [name] if name not in entry.names else []
        entry.lane = Lane.RISK if lane is Lane.RISK else entry.lane
        if entry.told:
            entry.told = False
            model.records.pop(order_id, None)
            if entry.token is None:
                entry.paused = False
            else:
                entry.asked_anew = True

    @rule(at_most=st.integers(1, 4), lanes=st.sampled_from([BOTH, BOTH[:1], BOTH[1:]]), lease_s=leases)
    def claim(self, at_most, lanes, lease_s):
        due = {
            order_id: entry.lane
            for order_id, entry in self.model.open.items()
            if entry.lane in lanes and not entry.leased and not entry.paused
        }
        entries = self.desk.claim_call(at_most, lanes=lanes, lease_s=lease_s).entries
        claimed = [entry.order_id for entry in entries]
        assert set(claimed) <= set(due), "in two hands"
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
        [done] = self.desk.book.conclude([Settle(entry, value)])
        assert done == (known is not None), "fenced"
        if done:
            del self.model.open[entry.order_id]
            [stored] = self.desk.book.await_records([entry.order_id], timeout_s=1)
            assert (stored.attempts, stored.requested_by) == (value.attempts, tuple(known.names))
            self.model.records[entry.order_id] = stored

    @precondition(lambda self: self.model.held)
    @rule(pick=picks, pause_s=st.sampled_from([0.0, LONG_S]), path=st.sampled_from(["", "read", "write"]))
    def give_back(self, pick, pause_s, path):
        entry, known = self._pick(pick)
        [done] = self.desk.book.conclude([GiveBack(entry, "", pause_s, path)])
        assert done == (known is not None), "fenced"
        if known:
            known.token, known.leased, known.sent, known.paused = None, False, False, pause_s > 0
            known.reads = path == "read" if path else known.reads
            known.asked_anew = False

    @precondition(lambda self: self.model.held)
    @rule(pick=picks)
    def give_up(self, pick):
        entry, known = self._pick(pick)
        assert self.desk.give_up(entry) == (known is not None), "fenced"
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
        assert self.desk.book.extend([entry], lease_s=lease_s) == [known is not None], "fenced"
        if known:
            known.leased = lease_s > 0

    @rule(order=orders)
    def retry(self, order):
        order_id = self.order_ids[order]
        revived = self.desk.book.retry([order_id], deadline_s=LONG_S)
        assert revived == ([order_id] if order_id in self.model.dead else [])
        if revived:
            self.model.records.pop(order_id, None)  # who asks is told what comes of this
            self.model.open[order_id] = self.model.dead.pop(order_id)
            self.model.open[order_id].told = False

    @rule()
    def tell_overdue(self):
        for each in self.desk.book.overdue(at_most=100):
            value = result(each.order_id, Outcome.UNRESOLVED)
            assert self.desk.book.report([value]) == 1
            known = self.model.open[each.order_id]
            assert not known.told
            known.told = True
            self.model.records[each.order_id] = self.desk.book.record(each.order_id)

    @rule()
    def sweep(self):
        for lane in lanes_to_wake(self.desk, 0.001):
            assert any(
                entry.lane is lane and not entry.leased and not entry.paused
                for entry in self.model.open.values()
            )

    @invariant()
    def every_accepted_order_is_open_or_dead_or_settled_and_settled_never_reverts(self):
        is_open = {each.order_id: each for each in self.desk.book.open_cancels()}
        dead = {each.order_id for each in self.desk.book.dead_letters()}
        found = {order_id: self.desk.book.record(order_id) for order_id in self.order_ids}
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
            assert each.in_hand == (known.token is not None)


def test_the_books_laws_hold_under_any_sequence_of_operations(server_of_each_make):
    BookMachine.server = server_of_each_make
    run_state_machine_as_test(
        BookMachine,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_an_entry_of_a_newer_version_is_worked_on_and_keeps_what_only_that_knows(desk):
    [order_id] = ids(1)
    desk.accept(order_id)
    entry = f"{desk.prefix}:entry:{order_id}"
    newer = {**json.loads(desk.server.hget(entry, "request")), "of_the_future": {"a": 1}}
    desk.server.hset(entry, "request", json.dumps(newer))
    [claimed] = desk.claim(9)
    assert claimed.request == CancelRequest(order_id)
    assert json.loads(desk.server.hget(entry, "request")) == newer


def test_an_entry_that_somebody_has_spoilt_is_kept_as_a_dead_letter_and_stops_nobody(desk):
    spoilt, sound = ids(2)
    desk.accept(spoilt, sound)
    desk.server.hset(f"{desk.prefix}:entry:{spoilt}", "request", "no JSON")
    assert [entry.order_id for entry in desk.claim(9)] == [sound]
    [letter] = desk.book.dead_letters()
    assert (letter.order_id, letter.progress.last_problem.code) == (spoilt, "spoilt_entry")
