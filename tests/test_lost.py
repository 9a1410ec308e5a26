"""The end of a wait: what Redis has of a cancel then decides what is said. Redis really loses it here."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import uuid
from contextlib import closing

import pytest
from claims import claim_from
from crew import ids

from kalshi_cancel.cli.exits import Exit
from kalshi_cancel.client import CancelClient, Lost, NotSettled
from kalshi_cancel.model.requests import Lane
from kalshi_cancel.model.results import CancelResult, Outcome
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.pending import MakeDeadLetter, Settle
from kalshi_cancel.store.scripts import StoreError, connect
from trials.stack import ROOT, RedisServer, wait_until

PATIENCE_S = 30.0
PREFIX = "kalshi-cancel"
EVERYTHING = {"everything": True}


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory):
    """A Redis that keeps nothing on disk, at which no worker works."""
    server = RedisServer(tmp_path_factory.mktemp("forgetful"), options=["--appendonly", "no"]).start()
    yield server
    server.stop()


@pytest.fixture
def client(forgetful):
    with closing(CancelClient(forgetful.url)) as client:
        yield client


@pytest.fixture
def store(forgetful):
    settings = RedisSettings.at(forgetful.url)
    return CancelStore(connect(settings), settings)


def flush(server):
    with server.client() as redis:
        redis.flushall()


def restart(server):
    server.kill()
    server.start()


def waiting(wait):
    """Has a thread wait; what it was told, once it is."""
    told = []

    def run():
        try:
            told.append(wait())
        except (StoreError, TimeoutError) as error:
            told.append(error)

    threading.Thread(target=run, daemon=True).start()
    return lambda: wait_until(lambda: told, within_s=PATIENCE_S, what="the end of the wait")[0]


def listens(server):
    def subscribed():
        with server.client() as redis:
            return redis.pubsub_channels()

    wait_until(subscribed, what="somebody waits")


@pytest.mark.parametrize("timeout", [None, 60.0], ids=["for ever", "for a while"])
@pytest.mark.parametrize("lose", [flush, restart])
def test_who_waits_for_what_redis_has_lost_is_told_to_ask_again(forgetful, client, order_id, lose, timeout):
    pending = client.cancel(order_id)
    told = waiting(lambda: pending.result(timeout=timeout))
    listens(forgetful)
    lose(forgetful)
    error = told()
    assert isinstance(error, Lost)
    assert str(error) == f"Redis has lost it: ask again for {order_id}"
    assert (error.order_ids, error.may_be_accepted) == ((order_id,), False)
    client.cancel(order_id)
    with pytest.raises(NotSettled, match="still being worked on"):
        pending.result(timeout=0)


@pytest.mark.parametrize("lose", [flush, restart])
def test_a_mass_cancel_that_redis_has_lost_is_told_as_well(forgetful, client, lose):
    pending = client.mass_cancel(EVERYTHING)
    with pytest.raises(NotSettled, match=r"mass cancel .*; still being worked on"):
        pending.result(timeout=0.3)
    told = waiting(pending.result)
    lose(forgetful)
    error = told()
    assert isinstance(error, Lost)
    assert pending.request_id in str(error)
    with pytest.raises(Lost):
        pending.result(timeout=0)


def test_a_wait_that_has_no_time_looks_all_the_same(forgetful, client):
    pending = client.cancel_many(ids(3))
    flush(forgetful)
    for wait in (lambda: pending.results(timeout=0), lambda: list(pending.as_settled(timeout=0))):
        with pytest.raises(Lost) as told:
            wait()
        assert told.value.order_ids == pending.order_ids


def test_of_several_the_lost_ones_are_named_and_the_others_can_be_waited_for(forgetful, client, store):
    gone, settled, rests = ids(3)
    pending = client.cancel_many([gone, settled, rests])
    for entry in claim_from(store, (Lane.STRATEGY,), at_most=100, lease_s=60, exchange_ms=None).entries:
        if entry.order_id == settled:
            store.conclude([Settle(entry, CancelResult(settled, Outcome.CANCELED))])
    with forgetful.client() as redis:
        redis.delete(f"{PREFIX}:pending:{gone}")
    got = []
    with pytest.raises(Lost) as told:
        got.extend(result.order_id for result in pending.as_settled(timeout=60))
    assert told.value.order_ids == (gone,)
    with pytest.raises(Lost):
        pending.results(timeout=60)
    client.cancel(gone)
    assert [result.order_id for result in pending.as_settled(timeout=0)] == [settled]
    with pytest.raises(NotSettled) as open_still:
        pending.results(timeout=0)
    assert open_still.value.order_ids == (gone, rests)


def test_what_was_given_up_is_not_said_to_be_worked_on(forgetful, client, store):
    dead, rests = ids(2)
    pending = client.cancel_many([dead, rests])
    for entry in claim_from(store, (Lane.STRATEGY,), at_most=100, lease_s=60, exchange_ms=None).entries:
        if entry.order_id == dead:
            store.conclude([MakeDeadLetter(entry, "")])
    with forgetful.client() as redis:
        redis.delete(f"celery-task-meta-cancel:{dead}")  # as after its life
    with pytest.raises(NotSettled) as told:
        pending.results(timeout=0)
    assert (
        str(told.value) == f"no outcome yet for {rests}; still being worked on; given up, ask again: {dead}"
    )
    assert told.value.given_up == (dead,)


def test_a_record_that_somebody_has_spoilt_is_to_be_asked_for_again(forgetful, client, order_id):
    pending = client.cancel(order_id)
    with forgetful.client() as redis:
        redis.delete(f"{PREFIX}:pending:{order_id}")
        redis.set(f"celery-task-meta-cancel:{order_id}", "no record")
    with pytest.raises(Lost):
        pending.result(timeout=0)


def test_results_of_orders_that_nobody_here_has_asked_for_are_waited_for_as_long_as_it_takes(
    client, order_id
):
    assert list(client.results([order_id], timeout=0.2)) == []


def test_redis_away_at_the_end_of_a_wait_is_told_as_that(forgetful, client, order_id):
    pending = client.cancel(order_id)
    forgetful.kill()
    try:
        with pytest.raises(StoreError) as told:
            pending.result(timeout=0.5)
    finally:
        forgetful.start()
    assert not isinstance(told.value, Lost)


def test_an_outage_that_loses_nothing_ends_no_wait(tmp_path, order_id):
    server = RedisServer(tmp_path).start()
    try:
        with closing(CancelClient(server.url)) as client:
            pending = client.cancel(order_id)
            told = waiting(pending.result)
            listens(server)
            server.kill()
            down = time.monotonic()
            wait_until(lambda: time.monotonic() - down > 4.0, what="longer than between two looks")
            server.start()
            settings = RedisSettings.at(server.url)
            store = CancelStore(connect(settings), settings)
            [entry] = claim_from(store, (Lane.STRATEGY,), at_most=1, lease_s=60, exchange_ms=None).entries
            store.conclude([Settle(entry, CancelResult(order_id, Outcome.CANCELED))])
            assert told().outcome == "canceled"
    finally:
        server.stop()


def command(server, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "kalshi_cancel.cli", *arguments],
        cwd=ROOT,
        env={"REDIS_URL": server.url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_line_says_so_with_an_exit_code(forgetful):
    order_ids = [str(uuid.uuid4()) for _ in range(2)]
    cancel = command(forgetful, "cancel", "--timeout", "60", *order_ids)
    mass = command(forgetful, "mass", "--everything", "--yes")
    with forgetful.client() as redis:
        wait_until(lambda: redis.zcard(f"{PREFIX}:mass_cancels"), within_s=PATIENCE_S, what="a mass cancel")
        wait_until(
            lambda: redis.exists(f"{PREFIX}:pending:{order_ids[1]}"), within_s=PATIENCE_S, what="cancels"
        )
        flush(forgetful)
    out, err = cancel.communicate(timeout=PATIENCE_S)
    assert [
        line.split()[-1] for line in out.splitlines() if line[:8] in {each[:8] for each in order_ids}
    ] == ["lost"] * 2
    assert "Redis has lost it: ask again for " in err
    assert "worked on" not in err
    _, mass_err = mass.communicate(timeout=PATIENCE_S)
    assert "Redis has lost it: ask again for mass cancel " in mass_err
    assert "goes on" not in mass_err
    assert (cancel.returncode, mass.returncode) == (Exit.REDIS, Exit.REDIS)
