"""What a worker counts, scraped from real ones; the shared state; and the table of it all in the docs."""

from __future__ import annotations

import os
import re
import signal
import time
import uuid
from contextlib import closing
from pathlib import Path

import pytest
import requests
from claims import claim_from
from prometheus_client.parser import text_string_to_metric_families

from kalshi_cancel.client import CancelClient
from kalshi_cancel.exchange.protocol import Failure, Meaning
from kalshi_cancel.model.mass_request import MassRequest
from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.model.results import CancelResult, Outcome, Problem
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.mass_cancels import MassCancels
from kalshi_cancel.store.mass_claim import MassClaims
from kalshi_cancel.store.pending import MakeDeadLetter
from kalshi_cancel.store.rate_limits import Limits, Pacer
from kalshi_cancel.store.scripts import connect
from kalshi_cancel.store.stats import ENDS, Stats
from trials.stack import ROOT, Stack, free_port, wait_until
from worker.dispatch.events import CallMade, emit_to_all
from worker.mass.report import in_short
from worker.telemetry.metrics import CODES_MOST, OF_ALL_WORKERS, OF_THE_WORKER, PREFIX, Metrics

PATIENCE_S = 30.0


class Scrape:
    """What /metrics of a port says at one moment."""

    def __init__(self, port):
        answer = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S)
        assert answer.status_code == 200
        self.text = answer.text
        self.families = {family.name: family for family in text_string_to_metric_families(answer.text)}

    def value(self, name, **labels):
        """The sum of the samples of this name that have at least these labels; None: there is none."""
        found = [
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == PREFIX + name and labels.items() <= sample.labels.items()
        ]
        return sum(found) if found else None


def ids(number):
    return [str(uuid.uuid4()) for _ in range(number)]


# -- real workers


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A stack of this module's own: its worker must not share the work with another."""
    with Stack(tmp_path_factory.mktemp("metrics"), environment={"KALSHI_READ_LAG_S": "0.2"}) as stack:
        yield stack.start(workers=0)


@pytest.fixture
def worker(own):
    """Starts a worker that is watched; it and its port. Gone after the test."""
    started = []

    def start(*options):
        port = free_port()
        started.append(own.start_worker(*options, KALSHI_METRICS_PORT=str(port), KALSHI_BATCH_MOST="5"))
        return started[-1], port

    own.control.reset()
    yield start
    for each in started:
        each.stop()


def asked(own, lane, *, canceled=0, executed=0, unknown=0, **fault):
    """Asks for cancels that will have these outcomes; how many attempts they took."""
    resting = ids(canceled)
    gone = ids(executed)
    own.control.place_many([{"order_id": each} for each in [*resting, *gone]])
    for each in gone:
        own.control.fill(each)
    for each in resting if fault else ():
        own.control.fault(order_id=each, operation="cancel", times=1, **fault)
    with closing(CancelClient(own.redis.url)) as client:
        results = client.cancel_many([*resting, *gone, *ids(unknown)], lane=lane).results(PATIENCE_S)
    assert [each.outcome for each in results].count("canceled") == canceled
    return sum(each.attempts for each in results)


@pytest.mark.parametrize("pool", [("-P", "threads"), ("-P", "processes", "-c", "2")], ids=" ".join)
def test_what_became_of_the_cancels_is_counted_whatever_the_pool(own, worker, pool):
    _, port = worker(*pool)
    attempts = asked(own, Lane.STRATEGY, canceled=40, executed=3, unknown=2)
    risky = asked(own, Lane.RISK, canceled=4)
    told = (
        "settled_total",
        "accepted_to_wire_seconds_count",
        "accepted_to_settled_seconds_count",
        "attempts_count",
    )
    scrape = wait_until(
        lambda: all((now := Scrape(port)).value(name) == 49 for name in told) and now, what="49 settled"
    )
    assert scrape.value("settled_total", lane="strategy", outcome="canceled") == 40
    assert scrape.value("settled_total", lane="strategy", outcome="too_late") == 3
    assert scrape.value("settled_total", lane="strategy", outcome="unknown_order") == 2
    assert scrape.value("settled_total", lane="risk", outcome="canceled") == 4
    for name in ("accepted_to_wire_seconds", "accepted_to_settled_seconds", "attempts"):
        assert scrape.value(f"{name}_count", lane="strategy") == 45, name
        assert scrape.value(f"{name}_count", lane="risk") == 4, name
    assert scrape.value("attempts_sum") == attempts + risky
    wire, settled = (scrape.value(f"accepted_to_{end}_seconds_sum") for end in ("wire", "settled"))
    assert 0 < wire < settled < 49 * PATIENCE_S
    calls = own.control.calls()
    for operation, name in (("cancel", "cancel"), ("batch", "batch"), ("read", "read_back")):
        there = sum(call["operation"] == operation for call in calls)
        assert scrape.value("exchange_calls_total", operation=name) == (there or None), operation
        assert scrape.value("exchange_call_seconds_count", operation=name) == there, operation
    sent = sum(len(call["order_ids"]) for call in calls if call["operation"] in ("cancel", "batch"))
    assert scrape.value("orders_sent_total") == sent == attempts + risky
    assert scrape.value("tokens_spent_total", bucket="write") == 2 * sent
    wait_until(lambda: Scrape(port).value("breaker_closed") == 1, what="each process says so")
    assert scrape.value("breaker_state", state="closed") == 1
    assert scrape.value("breaker_state") == 1
    assert abs(scrape.value("clock_skew_seconds")) <= 1
    assert scrape.value("open") == 0
    assert scrape.value("redis_up") == 1


def test_what_goes_wrong_is_counted(own, worker):
    _, port = worker()
    asked(own, Lane.STRATEGY, canceled=1, kind="http_429")
    asked(own, Lane.STRATEGY, canceled=1, kind="drop_after")
    asked(own, Lane.STRATEGY, canceled=1, kind="http_500")
    scrape = wait_until(lambda: (now := Scrape(port)).value("settled_total") == 3 and now, what="3 settled")
    assert scrape.value("rate_limited_total", bucket="write") == 1
    assert scrape.value("exchange_calls_total", operation="cancel", status="429") == 1
    assert scrape.value("exchange_calls_total", operation="cancel", status="none", code="unanswered") == 1
    assert scrape.value("exchange_calls_total", operation="cancel", status="500") == 1
    assert scrape.value("unanswered_total", operation="cancel") == 2
    assert scrape.value("bucket_refused_total", bucket="write") >= 1


def children(pid):
    """The processes of a worker's pool."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()
    return [int(each) for each in listed]


def test_what_a_killed_process_has_counted_stays_and_what_it_was_goes(own, worker):
    part, port = worker("-P", "processes", "-c", "2")
    asked(own, Lane.STRATEGY, canceled=20)
    scrape = wait_until(lambda: (now := Scrape(port)).value("settled_total") == 20 and now, what="20 settled")
    own.control.fault("drop_before", how="reset")
    with closing(CancelClient(own.redis.url)) as client:
        client.cancel_many(ids(10))
        wait_until(
            lambda: Scrape(port).value("breaker_state", state="unreachable") == 1, what="an open breaker"
        )
        assert Scrape(port).value("breaker_closed") == 0
        ready = requests.get(f"http://127.0.0.1:{port}/ready", timeout=PATIENCE_S)
        assert (ready.status_code, ready.json()["breaker"]) == (503, "unreachable")
        own.control.clear_faults()
        for child in children(part.pid):
            os.kill(child, signal.SIGKILL)
        wait_until(lambda: next(client.open_cancels(), None) is None, what="the others at work")
    scrape = wait_until(lambda: (now := Scrape(port)).value("settled_total") == 30 and now, what="30 settled")
    assert scrape.value("settled_total", outcome="canceled") == 20
    assert scrape.value("settled_total", outcome="unknown_order") == 10
    assert scrape.value("breaker_closed") == 1
    assert scrape.value("breaker_state", state="unreachable") == 0


def test_a_worker_whose_port_is_taken_refuses_to_start_in_one_line(own, worker):
    _, port = worker()
    second = own.spawn_worker(KALSHI_METRICS_PORT=str(port))
    assert second.process.wait(PATIENCE_S) != 0
    [line] = [line for line in second.log_text().splitlines() if "cannot start: " in line]
    assert f"KALSHI_METRICS_PORT cannot be opened at 127.0.0.1:{port}" in line
    assert "Traceback" not in second.log_text()


def test_a_worker_of_several_processes_leaves_no_folder_behind(own, worker, tmp_path):
    part = own.start_worker(
        "-P", "processes", "-c", "2", KALSHI_METRICS_PORT=str(free_port()), TMPDIR=str(tmp_path)
    )
    assert [path.name[:22] for path in tmp_path.glob("kalshi*")] == ["kalshi-cancel-metrics-"]
    assert part.stop() == 0
    assert list(tmp_path.glob("kalshi*")) == []


def test_a_mass_cancels_steps_and_listings_are_counted(own, worker):
    _, port = worker()
    own.control.place_many([{"order_id": each, "client_order_id": f"m-{each}"} for each in ids(7)])
    with closing(CancelClient(own.redis.url)) as client:
        scope = {"client_order_id_prefix": "m-"}
        assert client.mass_cancel(scope).result(PATIENCE_S)["flat"]
        client.mass_cancel(scope, dry_run=True).result(PATIENCE_S)
    ends = {"started": 2, "planned": 1, "flat": 1, "not_flat": 0, "left": 0}
    for step, number in ends.items():
        wait_until(lambda: Scrape(port).value("mass_steps_total", step=step) == number, what=step)  # noqa: B023
    scrape = Scrape(port)
    assert scrape.value("exchange_calls_total", operation="list") >= 3
    assert scrape.value("settled_total", lane="risk", outcome="canceled") == 7
    assert [scrape.value("mass_cancels", state=each) for each in ("running", "flat", "not_flat")] == [0, 1, 0]


def test_a_scrape_has_every_metric_of_the_table_with_its_type_labels_and_meaning_and_no_other(own, worker):
    _, port = worker()
    asked(own, Lane.STRATEGY, canceled=1)
    families = Scrape(port).families
    table = {PREFIX + each.name.removesuffix("_total"): each for each in (*OF_THE_WORKER, *OF_ALL_WORKERS)}
    assert sorted(families) == sorted(table)
    for name, meter in table.items():
        family = families[name]
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert (family.type, labels, family.documentation) == (meter.kind, set(meter.labels), meter.meaning)


def test_without_redis_a_scrape_says_so_and_what_the_worker_has_seen(tmp_path):
    port = free_port()
    with Stack(tmp_path) as stack:
        stack.start(workers=0)
        stack.start_worker(KALSHI_METRICS_PORT=str(port))
        assert Scrape(port).value("redis_up") == 1
        stack.redis.kill()
        scrape = Scrape(port)
        assert scrape.value("redis_up") == 0
        assert scrape.value("open") is None
        assert scrape.value("settled_total") == 0
        stack.redis.start()
        wait_until(lambda: Scrape(port).value("redis_up") == 1, what="Redis back")


# -- the shared state


@pytest.fixture
def settings(own_redis):
    return RedisSettings.from_env({"REDIS_URL": own_redis.url, "KALSHI_KEY_PREFIX": f"p{uuid.uuid4().hex}"})


@pytest.fixture
def store(settings):
    with connect(settings) as client:
        yield CancelStore(client, settings)


@pytest.fixture
def stats(settings):
    with connect(settings) as client:
        yield Stats(client, settings)


def enter(store, number, lane=Lane.STRATEGY, deadline_s=60.0):
    order_ids = ids(number)
    store.accept([CancelRequest(each) for each in order_ids], lane=lane, default_deadline_s=deadline_s)
    return order_ids


def make_older(store, order_id, *, by_s):
    """Has the entry be older than it is."""
    key = f"{store._prefix}:pending:{order_id}"
    store._server.hset(key, "accepted_ms", int(store._server.hget(key, "accepted_ms")) - by_s * 1000)


def take(store, at_most):
    return claim_from(store, [Lane.STRATEGY], at_most=at_most, lease_s=30, exchange_ms=None).entries


def test_what_is_open_is_counted_by_lane_with_the_age_of_the_oldest_also_when_that_is_claimed(store, stats):
    assert all((lane.open, lane.oldest_s) == (0, None) for lane in stats.look().lanes.values())
    waiting = enter(store, 3)
    enter(store, 2, Lane.RISK)
    make_older(store, waiting[0], by_s=100)
    lanes = stats.look().lanes
    assert (lanes[Lane.STRATEGY].open, lanes[Lane.RISK].open) == (3, 2)
    assert 100 <= lanes[Lane.STRATEGY].oldest_s < 100 + PATIENCE_S
    assert lanes[Lane.RISK].oldest_s < PATIENCE_S
    assert len(take(store, 3)) == 3
    enter(store, 2 * ENDS)
    lanes = stats.look().lanes
    assert lanes[Lane.STRATEGY].open == 2 * ENDS + 3
    assert lanes[Lane.STRATEGY].oldest_s >= 100


def test_what_is_accepted_is_read_where_it_is_counted(store, stats):
    store._server.hset(f"{store._prefix}:counts", mapping={"accepted:risk": 3})
    lanes = stats.look().lanes
    assert (lanes[Lane.RISK].accepted, lanes[Lane.STRATEGY].accepted) == (3, 0)


def test_those_whose_waiters_were_told_are_unresolved_and_what_is_given_up_is_a_dead_letter(store, stats):
    enter(store, 4)
    [entry] = take(store, 1)
    enter(store, 1, deadline_s=0.001)
    overdue = wait_until(lambda: store.overdue(at_most=9), what="an overdue one")
    assert store.report([CancelResult(each.order_id, Outcome.UNRESOLVED) for each in overdue]) == 1
    state = stats.look()
    assert (state.unresolved, state.dead_letters) == (1, 0)
    store._server.zrem(f"{store._prefix}:deadline", entry.order_id)  # as if its waiters had been told
    store.conclude([MakeDeadLetter(entry, "")])
    state = stats.look()
    assert (state.unresolved, state.dead_letters, state.lanes[Lane.STRATEGY].open) == (1, 1, 4)


def test_the_buckets_are_those_of_the_account_and_of_the_shards_in_use(store, stats, settings):
    assert stats.look().buckets == {}  # nobody knows the limits yet
    pacer = Pacer(store._server, settings.key_prefix, Limits(200, 200, 100, 100))
    pacer.set_limits(pacer.limits)
    store.accept([CancelRequest("a", exchange_index=3)], lane=Lane.RISK, default_deadline_s=9)
    assert pacer.take("write", 50) == 0
    pacer.correct("read", 2, taken_at=time.monotonic())
    buckets = stats.look().buckets
    assert sorted(buckets) == ["read", "write", "write:3"]
    assert buckets["write"].tokens < buckets["write"].capacity == 80
    assert buckets["write:3"].tokens == buckets["write:3"].capacity
    assert (buckets["read"].refused, buckets["write"].refused) == (1, 0)


def test_waiting_messages_are_counted_whatever_their_priority(store, stats, settings):
    before = stats.look().lanes
    store._server.lpush(f"{settings.celery_prefix}risk", "m")
    store._server.lpush(f"{settings.celery_prefix}risk\x06\x166", "m", "m")
    after = stats.look().lanes
    more = {lane: after[lane].messages - before[lane].messages for lane in Lane}
    assert more == {Lane.RISK: 3, Lane.STRATEGY: 0}


def test_mass_cancels_are_told_apart_by_how_they_ended_and_a_plan_is_no_end(store, stats, settings):
    mass_cancels, claims = (
        MassCancels(store._server, settings),
        MassClaims(store._server, settings, name="host:1"),
    )
    fields = {"scope": {"everything": True}, "reason": '"flat": true'}
    running, *ended = (MassRequest.parse(fields) for _ in range(4))
    for request in (running, *ended):
        mass_cancels.enter(request)
    assert stats.look().mass_cancels == {"running": 4, "flat": 0, "not_flat": 0}
    for request, flat, dry in zip(ended, (True, False, False), (False, False, True), strict=True):
        report = {**request.to_json(), "dry_run": dry, "flat": flat}
        claims.take(request.request_id).finish(report, in_short(report))
    for _ in range(2):  # also from memory
        assert stats.look().mass_cancels == {"running": 1, "flat": 1, "not_flat": 1}


# -- in small


def call(code):
    failure = Failure(Meaning.UNCLEAR, Problem(code, "", 418))
    return CallMade("cancel", ("a",), Lane.RISK, failure, 0.01, "write", 2.0)


def test_a_strangers_codes_do_not_become_ever_more_series():
    metrics = Metrics()
    for number in range(CODES_MOST + 5):
        metrics(call(f"code{number}: with words"))
        metrics(call("code0: with other words"))
    _, text = metrics.exposition("")
    name = f"{PREFIX}exchange_calls"
    [family] = [each for each in text_string_to_metric_families(text.decode()) if each.name == name]
    counted = {sample.labels["code"]: sample.value for sample in family.samples}
    assert len(counted) == CODES_MOST + 1
    assert (counted["code0"], counted["other"]) == (CODES_MOST + 6, 5)


def test_a_listener_that_fails_stops_neither_the_work_nor_the_others(caplog):
    heard = []

    def fail(_event):
        raise OSError("the disk is gone")

    emit_to_all([fail, heard.append])(call("x"))
    assert heard == [call("x")]
    assert "event=internal_error" in caplog.text
    assert "the disk is gone" in caplog.text


def test_the_tables_of_the_docs_are_those_of_the_code():
    text = (ROOT / "docs/how-to/monitoring.md").read_text()
    found = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) ?\| (.+) \|$", text, re.MULTILINE)
    expected = [
        (each.name, each.kind, ", ".join(f"`{label}`" for label in each.labels), each.meaning)
        for each in (*OF_THE_WORKER, *OF_ALL_WORKERS)
    ]
    assert found == expected
