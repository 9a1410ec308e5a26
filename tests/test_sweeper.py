"""What nobody came for, with real workers: lost wake-ups, passed deadlines, dead letters."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from buckets import Account
from claims import claim_from
from crew import PATIENCE_S, ids

from kalshi_cancel.exchange.protocol import Failure, Meaning
from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.model.results import Problem
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.scripts import connect
from trials.stack import wait_until
from worker.dispatch.breaker import CircuitBreaker
from worker.dispatch.sweeper import Sweeper

LOST_WAKE_UP_S = 2.0  # promised from claimable to claimed
BACKLOG = 10_000
PROCESSING_S = 0.5  # of an order once it is claimed, on a busy machine


# -- lost wake-ups


def test_an_entry_whose_message_was_never_published_is_noticed(crew):
    """As after the death of a producer between its entry and its message."""
    crew.workers(1)
    [order_id] = crew.place()
    settings = RedisSettings.from_env({"REDIS_URL": crew.redis.url})
    with connect(settings) as server:
        CancelStore(server, settings).accept([CancelRequest(order_id)], lane=Lane.RISK, default_deadline_s=10)
    started = time.monotonic()
    assert next(crew.client.results([order_id], timeout=PATIENCE_S)).outcome == "canceled"
    assert time.monotonic() - started <= LOST_WAKE_UP_S + PROCESSING_S


def test_entries_whose_messages_were_all_deleted_are_noticed(crew):
    crew.workers(0)
    order_ids = crew.place(20)
    pending = crew.client.cancel_many(order_ids)
    with crew.redis.client() as server:
        server.delete("cancels", *server.keys("kalshi-cancel:wake_up:*"))
        assert list(crew.client.open_cancels())
    crew.workers(1)
    started = time.monotonic()
    assert {result.outcome for result in pending.results(timeout=PATIENCE_S)} == {"canceled"}
    assert time.monotonic() - started <= LOST_WAKE_UP_S + PROCESSING_S


def test_a_long_backlog_drains_without_one_superfluous_wake_up(crew):
    """What drains by itself needs no wake-ups, however long it is and however long it takes to accept."""
    with crew.apart(workers=2, KALSHI_BATCH_MOST="") as apart:
        workers = apart.start()
        order_ids = crew.place(BACKLOG)
        pending = apart.client.cancel_many(order_ids)
        settled = Counter(result.outcome for result in pending.as_settled(timeout=90))
        assert settled == {"canceled": BACKLOG}
        assert sum(worker.log_text().count("event=lane_woken") for worker in workers) == 0
        assert crew.sent() == Counter(order_ids)


# -- unresolved, and given up


@pytest.mark.parametrize("kind", ["http_500", "hang"])
def test_a_cancel_past_its_deadline_is_unresolved_for_its_waiter_and_worked_on_until_settled(crew, kind):
    crew.workers(1)
    [order_id] = crew.place()
    crew.control.fault(kind, order_id=order_id)
    asked = time.monotonic()
    result = crew.client.cancel(order_id, deadline_s=0.5).result(timeout=PATIENCE_S)
    assert time.monotonic() - asked < 5  # its own deadline, not the default of ten seconds
    assert (result.outcome, result.status, result.reduced_by) == ("unresolved", None, None)
    status = crew.client.status(order_id)
    assert status.open.unresolved
    assert status.result == result
    crew.control.clear_faults()
    wait_until(lambda: crew.client.status(order_id).result.outcome == "canceled", within_s=PATIENCE_S)
    assert crew.client.status(order_id).open is None
    assert crew.client.status(order_id).result.attempts == crew.sent()[order_id]


def test_asking_again_for_an_unresolved_order_tries_it_at_once_and_waits_for_the_new_outcome(crew):
    crew.workers(1)
    [order_id] = crew.place()
    crew.control.fault("http_500", order_id=order_id)
    assert crew.client.cancel(order_id, deadline_s=2).result(timeout=PATIENCE_S).outcome == "unresolved"
    crew.control.clear_faults()
    asked = time.monotonic()
    result = crew.client.cancel(order_id, requested_by="again").result(timeout=PATIENCE_S)
    assert (result.outcome, result.requested_by) == ("canceled", ("test", "again"))
    assert time.monotonic() - asked <= LOST_WAKE_UP_S + PROCESSING_S


def test_what_is_unresolved_for_too_long_is_a_dead_letter_with_its_history_until_asked_for_again(crew):
    retried, asked_again = crew.place(2)
    with crew.apart(KALSHI_CANCEL_MAX_AGE_S="1") as apart:
        apart.start()
        client = apart.client
        for order_id in (retried, asked_again):
            crew.control.fault("http_500", order_id=order_id)
            told = client.cancel(order_id, deadline_s=0.3).result(timeout=PATIENCE_S)
            assert told.outcome == "unresolved"
        wait_until(lambda: len(list(client.dead_letters())) == 2, within_s=PATIENCE_S, what="given up")
        letters = {letter.order_id: letter for letter in client.dead_letters()}
        for order_id in (retried, asked_again):
            assert client.status(order_id).open is None
            assert client.status(order_id).result.outcome == "unresolved"
            progress = letters[order_id].progress
            assert progress.attempts == crew.sent()[order_id] >= 2
            assert progress.last_problem.http_status == 500
            assert len(progress.history) >= 2
        assert client.retry([retried, "nobody"]) == [retried]
        assert [letter.order_id for letter in client.dead_letters()] == [asked_again]
        crew.control.clear_faults()
        assert client.cancel(asked_again).result(timeout=PATIENCE_S).outcome == "canceled"
        [result] = client.results([retried], timeout=PATIENCE_S)
        assert result.outcome == "canceled"
        assert list(client.dead_letters()) == []


# -- what one sweep does


@pytest.fixture
def store(shared_crew):
    account = Account(shared_crew.redis.url)
    yield CancelStore(account.server, account.settings)
    account.server.close()


def sweeper(store, *, refused=False, others_serve=True):
    """A sweeper whose worker's key is refused, or not."""
    breaker = CircuitBreaker(lambda _state: {})
    if refused:
        breaker.note(Failure(Meaning.KEY_REFUSED, Problem("INVALID_KEY", "no such key", 401)))
    return Sweeper(store, breaker, others_serve=lambda: others_serve)


def overdue(store, number=1):
    """Cancels whose deadline has passed."""
    order_ids = ids(number)
    requests = [CancelRequest(each) for each in order_ids]
    store.accept(requests, lane=Lane.STRATEGY, default_deadline_s=0)
    return order_ids


def test_of_a_passed_deadline_the_waiter_is_told_once_and_the_work_goes_on(store):
    [order_id] = overdue(store)
    sweeper(store).report_overdue()
    told = store.record(order_id)
    assert (told.outcome, told.error.code) == ("unresolved", "no_answer")
    assert store.open_cancel(order_id) is not None
    assert store.overdue(at_most=10) == []


def test_however_many_deadlines_have_passed_one_sweep_tells_of_all(store):
    order_ids = overdue(store, 250)
    sweeper(store).report_overdue()
    assert store.records(order_ids).keys() == set(order_ids)


@pytest.mark.parametrize(("others_serve", "outcome"), [(True, "unresolved"), (False, "refused")])
def test_a_refused_key_is_an_orders_failure_only_where_no_worker_has_another(store, others_serve, outcome):
    [order_id] = overdue(store)
    sweeper(store, refused=True, others_serve=others_serve).report_overdue()
    told = store.record(order_id)
    assert told.outcome == outcome
    assert told.error.code == ("INVALID_KEY" if outcome == "refused" else "exchange_key_refused")


def test_what_is_claimable_wakes_its_lane_after_a_while_only(store):
    [order_id] = ids(1)
    store.accept([CancelRequest(order_id)], lane=Lane.RISK, default_deadline_s=60)
    assert sweeper(store).lanes_to_wake() == {}, "somebody may be coming"
    wait_until(
        lambda: Lane.RISK in sweeper(store).lanes_to_wake(), within_s=PATIENCE_S, what="nobody has come"
    )


def test_an_entry_without_a_place_in_line_gets_one(store):
    [order_id] = ids(1)
    store.accept([CancelRequest(order_id)], lane=Lane.RISK, default_deadline_s=60)
    store._server.delete(store._keys.due("risk", "write"))
    sweeping = sweeper(store)

    def is_claimed():
        sweeping.mend()
        claim = claim_from(store, (Lane.RISK,), at_most=1, lease_s=1.0, exchange_ms=None)
        return [each.order_id for each in claim.entries] == [order_id]

    wait_until(is_claimed, within_s=PATIENCE_S, what="it was found")
