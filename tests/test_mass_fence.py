"""Who runs a mass cancel: one at a time, and whoever was away for too long changes nothing."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from decimal import Decimal

import pytest
from celery import Celery
from claims import claim_from
from crew import PATIENCE_S

from kalshi_cancel.model.mass_request import MassRequest
from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.model.results import CancelResult, Outcome
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store.cancels import CancelStore, Fenced
from kalshi_cancel.store.mass_cancels import MassCancels
from kalshi_cancel.store.mass_claim import LEASE_MS, MassClaims, Planned
from kalshi_cancel.store.pending import Fence, MakeDeadLetter, Settle
from kalshi_cancel.store.rate_limits import Limits, Pacer
from kalshi_cancel.store.scripts import connect
from trials.stack import wait_until
from worker.mass.account import Account, Findings
from worker.mass.entering import Entering
from worker.mass.means import Means

EVERYTHING = {"everything": True}
PREFIX = "kalshi-cancel"


def resting(crew):
    return {order["order_id"] for order in crew.control.orders() if order["status"] == "resting"}


def runner_of(crew, server, pending, workers):
    """The worker that runs a mass cancel."""
    wait_until(
        lambda: server.get(f"{PREFIX}:mass:{pending.request_id}:lease"), within_s=PATIENCE_S, what="a runner"
    )
    name = server.get(f"{PREFIX}:mass:{pending.request_id}:lease")
    [runner] = [each for each in workers if f":{each.pid}" in name]
    return runner


def lists(crew):
    return len(crew.control.calls("list"))


class Link:
    """The way from one worker to Redis, which can be cut and mended."""

    def __init__(self, port):
        self._target = ("127.0.0.1", port)
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = self._door.getsockname()[1]
        self._whole = threading.Event()
        self._whole.set()
        self._ends = []
        threading.Thread(target=self._listen, daemon=True).start()

    def cut(self):
        """Nothing gets through any more, in either direction; new connections end at once."""
        self._whole.clear()
        for end in self._ends:
            end.close()
        self._ends.clear()

    def mend(self):
        self._whole.set()

    def close(self):
        self.cut()
        self._door.close()

    def _listen(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._door.accept()
                if not self._whole.is_set():
                    near.close()
                    continue
                far = socket.create_connection(self._target)
                self._ends += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    def _carry(self, source, target):
        with contextlib.suppress(OSError):
            while (data := source.recv(65536)) and self._whole.is_set():
                target.sendall(data)
        for end in (source, target):
            end.close()


# -- a runner that comes back


def test_a_runner_that_was_stopped_longer_than_its_lease_cancels_nothing_new_and_changes_no_report(crew):
    workers = crew.workers(2)
    old = crew.place(30)
    crew.control.fault("slow", operation="list", seconds=2.0, effect="after", skip=1, times=1)  # of the proof
    with crew.redis.client() as server:
        pending = crew.client.mass_cancel(EVERYTHING)
        wait_until(lambda: lists(crew) == 2, within_s=PATIENCE_S, what="it is about to prove it")
        runner = runner_of(crew, server, pending, workers)
        with crew.frozen(runner):
            report = pending.result(timeout=PATIENCE_S)
            assert report["flat"], report["why_not_flat"]
            new = crew.place(5)
    others = "event=mass_cancel_taken_over"
    wait_until(lambda: others in runner.log_text(), within_s=PATIENCE_S, what="the first one has noticed")
    assert resting(crew) == set(new)
    assert crew.client.mass_status(pending.request_id) == report
    assert {each["order_id"] for each in report["affected"]} == set(old)
    assert not set(new) & set(crew.sent())


def test_a_runner_that_was_stopped_before_its_command_does_not_send_it_afterwards(crew):
    workers = crew.workers(2)
    crew.place(10)
    crew.control.fault("slow", operation=["list", "cancel_all"], seconds=1.0, effect="after", times=2)
    with crew.redis.client() as server:
        pending = crew.client.mass_cancel(EVERYTHING, allow_side_effects=True)
        wait_until(lambda: lists(crew) == 1, within_s=PATIENCE_S, what="it lists")
        runner = runner_of(crew, server, pending, workers)
        with crew.frozen(runner):
            report = pending.result(timeout=PATIENCE_S)
            new = crew.place(5)
            sent = len(crew.control.calls("cancel_all"))
        others = "event=mass_cancel_taken_over"
        wait_until(lambda: others in runner.log_text(), within_s=PATIENCE_S, what="the first one has noticed")
    assert report["flat"], report["why_not_flat"]
    assert len(crew.control.calls("cancel_all")) == sent
    assert resting(crew) == set(new)
    assert crew.client.mass_status(pending.request_id) == report


def test_a_runner_that_was_cut_off_from_redis_cancels_nothing_new_and_changes_no_report(crew):
    crew.workers(0)
    old = crew.place(30)
    crew.control.fault("slow", operation="list", seconds=2.0, effect="after", skip=1, times=1)
    link = Link(int(crew.redis.url.rpartition(":")[2].partition("/")[0]))
    try:
        away = crew.stack.spawn_worker(REDIS_URL=f"redis://127.0.0.1:{link.port}/0")
        away.wait_ready(lambda: " ready." in away.log_text(), "the worker")
        pending = crew.client.mass_cancel(EVERYTHING)
        wait_until(lambda: lists(crew) == 2, within_s=PATIENCE_S, what="it is about to prove it")
        link.cut()
        here = crew.stack.spawn_worker()
        here.wait_ready(lambda: " ready." in here.log_text(), "the worker")
        report = pending.result(timeout=PATIENCE_S)
        new = crew.place(5)
        link.mend()
        others = "event=mass_cancel_taken_over"
        wait_until(lambda: others in away.log_text(), within_s=PATIENCE_S, what="the first one has noticed")
        assert report["flat"], report["why_not_flat"]
        assert {each["order_id"] for each in report["affected"]} == set(old)
        assert resting(crew) == set(new)
        assert crew.client.mass_status(pending.request_id) == report
    finally:
        link.close()


# -- what cannot be read


@pytest.mark.parametrize("text", ['["a", "list"]', "no json", '{"scope": {"hue": 7}}', "7", "{}"])
def test_a_spoilt_request_is_answered_and_keeps_nobody_from_the_others(crew, text):
    crew.workers(1)
    [order_id] = crew.place()
    spoilt = f"spoilt-{time.time_ns()}"
    with crew.redis.client() as server:
        server.hset(f"{PREFIX}:mass:{spoilt}", "request", text)
        server.sadd(f"{PREFIX}:mass_cancels:open", spoilt)
        server.sadd(f"{PREFIX}:mass:{spoilt}:waiters", f"waiter-{spoilt}")
        report = crew.client.mass_cancel(EVERYTHING).result(timeout=PATIENCE_S)
        assert (report["flat"], [each["order_id"] for each in report["affected"]]) == (True, [order_id])
        with Celery("raw", broker=crew.redis.url, backend=crew.redis.url, set_as_current=False) as app:
            answer = app.AsyncResult(f"waiter-{spoilt}").get(timeout=PATIENCE_S)
        assert (answer["request_id"], answer["flat"]) == (spoilt, False)
        assert answer["error"].startswith("its request cannot be read: ")
        assert spoilt not in server.smembers(f"{PREFIX}:mass_cancels:open")
        kept = [json.loads(each) for each in server.lrange(f"{PREFIX}:unreadable", 0, -1)]
        assert {"mass_cancel": spoilt, "request": text} in kept
        assert server.hget(f"{PREFIX}:mass:{spoilt}", "request") == text, "as it was"


# -- claims, one by one


@pytest.fixture
def settings(own_redis):
    return RedisSettings.from_env(
        {"REDIS_URL": own_redis.url, "KALSHI_KEY_PREFIX": f"fence-{time.time_ns()}"}
    )


@pytest.fixture
def server(own_redis):
    with own_redis.client() as server:
        yield server


@pytest.fixture
def request_id(server, settings):
    request = MassRequest.parse({"scope": EVERYTHING})
    MassCancels(server, settings).enter(request)
    return request.request_id


def take(server, settings, request_id, name="host:1"):
    claim = MassClaims(server, settings, name=name).take(request_id)
    assert claim is not None
    return claim


WRITES = {
    "keep": lambda claim: claim.keep(),
    "leave": lambda claim: claim.leave(),
    "begin": lambda claim: claim.begin({"started_s": 1.0}),
    "note": lambda claim: claim.note(progress={"orders": 1}),
    "spend": lambda claim: claim.spend(2.0),
    "add_orders": lambda claim: claim.add_orders({"a": Planned(None, None)}),
    "still_open": lambda claim: claim.still_open(),
    "withdraw": lambda claim: claim.withdraw([]),
    "finish": lambda claim: claim.finish({"flat": False}, {}),
}


def everything_in(server, settings):
    """All keys of a prefix with what they hold, but for how long they live."""
    return {key: server.dump(key) for key in server.scan_iter(f"{settings.key_prefix}:*")}


def test_a_mass_cancel_is_in_one_runners_hands(server, settings, request_id):
    first = take(server, settings, request_id)
    assert MassClaims(server, settings, name="host:2").take(request_id) is None
    first.leave()
    second = take(server, settings, request_id, "host:2")
    assert second.fence.token != first.fence.token


@pytest.mark.parametrize("name", sorted(set(WRITES) - {"withdraw"}))
def test_once_another_has_it_a_runner_writes_nothing(server, settings, request_id, name):
    first = take(server, settings, request_id)
    server.delete(f"{settings.key_prefix}:mass:{request_id}:lease")  # it has run out
    take(server, settings, request_id, "host:2")
    before = everything_in(server, settings)
    with pytest.raises(Fenced):
        WRITES[name](first)
    assert everything_in(server, settings) == before


@pytest.mark.parametrize("name", sorted(set(WRITES) - {"withdraw", "finish"}))
def test_once_there_is_a_report_its_own_runner_writes_nothing_either(server, settings, request_id, name):
    claim = take(server, settings, request_id)
    claim.finish({"flat": True}, {})
    before = everything_in(server, settings)
    with pytest.raises(Fenced):
        WRITES[name](claim)
    assert everything_in(server, settings) == before


def test_a_report_is_written_once(server, settings, request_id):
    claim = take(server, settings, request_id)
    claim.finish({"flat": True}, {})
    claim.finish({"flat": False}, {})  # as after a lost answer
    assert MassCancels(server, settings).report(request_id) == {"flat": True}
    assert MassClaims(server, settings, name="host:2").take(request_id) is None


def test_a_lease_that_ran_out_unnoticed_is_taken_up_again_by_the_same_runner(server, settings, request_id):
    claim = take(server, settings, request_id)
    server.delete(f"{settings.key_prefix}:mass:{request_id}:lease")
    claim.keep()
    assert MassClaims(server, settings, name="host:2").take(request_id) is None
    assert 0 < server.pttl(f"{settings.key_prefix}:mass:{request_id}:lease") <= LEASE_MS


def test_a_token_is_never_given_out_twice_even_if_redis_forgets(server, settings, request_id):
    first = take(server, settings, request_id)
    request = server.hget(f"{settings.key_prefix}:mass:{request_id}", "request")
    server.delete(
        f"{settings.key_prefix}:mass:{request_id}", f"{settings.key_prefix}:mass:{request_id}:lease"
    )
    server.hset(f"{settings.key_prefix}:mass:{request_id}", "request", request)
    wait_until(lambda: time.time_ns() // 1_000_000 > int(first.fence.token), what="the next millisecond")
    second = take(server, settings, request_id, "host:2")
    assert second.fence.token != first.fence.token


def test_what_redis_loses_between_two_looks_counts_as_open_again(server, settings, request_id):
    claim, store = take(server, settings, request_id), CancelStore(server, settings)
    request = MassRequest.parse({"request_id": request_id, "scope": {"order_ids": ["order-1", "order-2"]}})
    means = Means(
        store=store,
        mass_cancels=MassCancels(server, settings),
        exchange=None,
        pacer=None,
        call_senders=lambda _lane, _messages: None,
        read_lag_s=0.5,
        stopping=threading.Event(),
    )
    entering = Entering(request, claim, means, now_s=time.time)
    entering.named()
    assert claim.still_open() == (2, 0)
    server.delete(*server.scan_iter(f"{settings.key_prefix}:*"))
    assert (claim.still_open(), claim.has_lost) == ((0, 0), True), "put back, and no order has an entry"
    entering.lost(but=["order-2"])
    assert store.open_cancel("order-1") is not None
    assert claim.still_open() == (1, 0)


def test_orders_are_entered_with_a_valid_claim_only(server, settings, request_id):
    store = CancelStore(server, settings)
    claim = take(server, settings, request_id)
    request = CancelRequest("order-1", request_id=request_id)
    with pytest.raises(Fenced):
        store.accept([request], lane=Lane.RISK, default_deadline_s=1.0, fence=Fence(request_id, "0"))
    assert store.open_cancel("order-1") is None
    store.accept([request], lane=Lane.RISK, default_deadline_s=1.0, fence=claim.fence)
    assert store.open_cancel("order-1") is not None


def test_only_what_nobody_is_at_and_nobody_else_wants_is_withdrawn(server, settings, request_id):
    from kalshi_cancel.model.results import Problem  # noqa: PLC0415
    from worker.mass.entering import _not_asked_for  # noqa: PLC0415

    store = CancelStore(server, settings)
    claim = take(server, settings, request_id)
    mine = [CancelRequest(name, request_id=request_id, requested_by="risk") for name in ("free", "wanted")]
    store.accept(mine, lane=Lane.RISK, default_deadline_s=9.0, fence=claim.fence)
    other = CancelRequest("wanted", requested_by="mm")
    foreign = CancelRequest("foreign", requested_by="mm")
    store.accept([other, foreign], lane=Lane.STRATEGY, default_deadline_s=9.0)
    claimed = CancelRequest("claimed", request_id=request_id)
    store.accept([claimed], lane=Lane.RISK, default_deadline_s=9.0, fence=claim.fence)
    names = ("free", "wanted", "foreign", "gone")
    done = claim.withdraw([_not_asked_for(each, Problem("forbidden", "no", 403)) for each in names])
    assert done == 1
    result = store.record("free")
    assert (result.outcome, result.attempts, result.error.code) == ("refused", 0, "forbidden")
    assert result.requested_by == ("risk",)
    assert store.open_cancel("free") is None
    for still in ("wanted", "foreign", "claimed"):
        assert store.open_cancel(still) is not None
    assert server.zscore(f"{settings.key_prefix}:deadline", "free") is None


# -- what is settled, and what is lost, while the report is made


class SettledMeanwhile(CancelStore):
    """A store in which somebody else settles an order between two looks."""

    settle = staticmethod(lambda: None)

    def records(self, order_ids):
        found = super().records(order_ids)
        self.settle()
        return found


def test_what_is_settled_while_the_report_is_made_is_in_it_and_a_dead_letter_is_open(own_redis):
    settings = RedisSettings.from_env({"REDIS_URL": own_redis.url, "KALSHI_KEY_PREFIX": "report"})
    server = connect(settings)
    store, mass_cancels = SettledMeanwhile(server, settings), MassCancels(server, settings)
    request = MassRequest.parse({"scope": {"order_ids": ["late", "dead", "lost"]}})
    mass_cancels.enter(request)
    claim = MassClaims(server, settings, name="a-runner").take(request.request_id)
    claim.add_orders(dict.fromkeys(("late", "dead", "lost"), Planned(Decimal(10), Decimal(0))))
    store.accept([CancelRequest("late"), CancelRequest("dead")], lane=Lane.RISK, default_deadline_s=60)
    entries = {
        each.order_id: each
        for each in claim_from(store, [Lane.RISK], at_most=5, lease_s=60, exchange_ms=None).entries
    }
    store.conclude([MakeDeadLetter(entries.pop("dead"), "")])
    result = CancelResult("late", Outcome.CANCELED, reduced_by=Decimal(10))
    pacer = Pacer(server, settings.key_prefix, Limits(100, 200, 100, 200))
    means = Means(
        store=store,
        mass_cancels=mass_cancels,
        exchange=None,
        pacer=pacer,
        call_senders=lambda _lane, _waiting: None,
        read_lag_s=0.5,
        stopping=threading.Event(),
    )
    account = Account(request, claim, means)
    account.make_plan(None, after_s=0.0, command=None)
    store.settle = lambda: entries and store.conclude([Settle(entries.pop("late"), result)])
    report = account.report(Findings("its time was over"))
    assert report["affected"] == [{"order_id": "late", "reduced_by": "10.00"}]
    assert {each["order_id"]: each["reason"] for each in report["not_affected"]} == {
        "dead": "open",
        "lost": "result_lost",
    }
    server.close()
