"""One clock for all times: hosts whose own is an hour off do not show in what is stored.

Such a host is a process whose `time.time` is off, as all of its code sees it; Redis' clock is not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from contextlib import closing
from datetime import datetime

import pytest
from celery import Celery
from crew import PATIENCE_S

from kalshi_cancel.client import CancelClient
from kalshi_cancel.model.results import CancelResult, Outcome
from kalshi_cancel.model.times import utc_text
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.scripts import connect
from kalshi_cancel.store.server_clock import HEARD_FOR_S, ServerClock
from trials.stack import ROOT, RedisServer, wait_until

HOUR_S = 3600.0
NEAR_S = 60.0  # patience, and nothing to an hour
OFF = """
import os, time
real, off_s = time.time, float(os.environ.get("CLOCK_OFF_S", "0"))
time.time = lambda: real() + off_s
"""


@pytest.fixture(scope="module")
def off(tmp_path_factory):
    """The environment of a host whose clock is off by so much."""
    folder = tmp_path_factory.mktemp("off")
    (folder / "sitecustomize.py").write_text(OFF)
    return lambda seconds: {"PYTHONPATH": f"{folder}:{ROOT}", "CLOCK_OFF_S": str(seconds)}


def seconds_from_now(text):
    return datetime.fromisoformat(text).timestamp() - time.time()


def moments(value):
    """Every time of ours in a result or a report, by its place."""
    found = {}
    for name, each in value.items():
        if name in {"accepted_at", "completed_at", "requested_at", "settled_at", "at", "listed_at"} and each:
            found[name] = seconds_from_now(each)
        elif isinstance(each, dict):
            found |= {f"{name}.{inner}": away for inner, away in moments(each).items()}
    return found


def run(crew, off_s, off, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "kalshi_cancel.cli", *arguments],
        cwd=ROOT,
        env={**crew.stack.environment, **off(off_s)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S * 2,
        check=False,
    )


@pytest.mark.parametrize("off_s", [HOUR_S, -HOUR_S], ids=["ahead", "behind"])
def test_a_worker_an_hour_off_tells_all_times_by_redis_clock(crew, off, off_s):
    with crew.apart(**off(off_s)) as apart:
        apart.start()
        [one] = crew.place(1)
        result = apart.client.cancel(one).result(timeout=PATIENCE_S)
        assert result.requested_at <= result.settled_at
        crew.place(3)
        report = apart.client.mass_cancel({"everything": True}).result(timeout=PATIENCE_S)
        shown = {**moments(result.to_json()), **moments(report)}
        assert {
            "accepted_at",
            "completed_at",
            "settled_at",
            "flat_listing.at",
            "plan.listed_at",
        } <= shown.keys()
        assert {name: away for name, away in shown.items() if abs(away) > NEAR_S} == {}
        assert 0 <= report["actual_s"] < NEAR_S
        with Celery(broker=apart.url, backend=apart.url, set_as_current=False) as stranger:
            refused = stranger.send_task("cancel_order", kwargs={"order_id": "?"}, queue="cancels")
            away = moments(refused.get(timeout=PATIENCE_S))
            assert away.keys() == {"requested_at", "settled_at"}
            assert max(map(abs, away.values())) < NEAR_S


@pytest.mark.parametrize("off_s", [HOUR_S, -HOUR_S], ids=["ahead", "behind"])
def test_a_producer_an_hour_off_has_its_mass_cancel_accepted_now(crew, off, off_s):
    crew.workers(1)
    crew.place(2)
    since = datetime.fromtimestamp(time.time() - 5).astimezone().isoformat()
    done = run(crew, off_s, off, "mass", "--created-after", since, "--yes", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert {name: away for name, away in moments(report).items() if abs(away) > NEAR_S} == {}
    assert 0 <= report["actual_s"] < NEAR_S
    [(_, accepted_at, _), *_] = crew.client.mass_cancels(at_most=1)
    assert abs(seconds_from_now(accepted_at)) < NEAR_S


def test_the_doctor_compares_three_clocks(crew, off):
    for arguments in (("doctor", "--json"), ("doctor", "--producer", "--json")):
        found = [json.loads(line) for line in run(crew, HOUR_S, off, *arguments).stdout.splitlines()]
        [of_redis] = [each for each in found if each["check"] == "redis clock"]
        assert of_redis["health"] == "warning"
        assert f"differs from this host's by {-HOUR_S:+.1f} s" in of_redis["found"]
    found = [json.loads(line) for line in run(crew, HOUR_S, off, "doctor", "--json").stdout.splitlines()]
    [clock] = [each for each in found if each["check"] == "clock"]
    assert clock["health"] == "failed"
    assert ", from Redis' by +0." in clock["found"] or ", from Redis' by -0." in clock["found"]
    fine = run(crew, 0, off, "doctor", "--json").stdout
    assert "redis clock" not in fine
    assert ", from Redis' by " in fine


# -- the clock itself


@pytest.fixture
def server(tmp_path):
    server = RedisServer(tmp_path).start()
    yield server
    server.stop()


def test_it_is_asked_for_once_and_goes_on_while_redis_is_away(server):
    with closing(connect(RedisSettings.at(server.url))) as client:
        clock = ServerClock(client)
        assert abs(clock.now_s() - time.time()) < NEAR_S
        server.kill()
        first = clock.now_s()
        wait_until(lambda: clock.now_s() > first, what="it goes on")


def test_a_clock_that_is_a_moment_behind_settles_nothing_before_it_was_asked_for(server):
    settings = RedisSettings.at(server.url)
    with closing(connect(settings)) as client:
        ahead = CancelResult("a", Outcome.REFUSED, requested_at=utc_text(time.time() + 60.0))
        assert CancelStore(client, settings).refuse(ahead)
        stored = CancelStore(client, settings).records(["a"])["a"]
    assert stored.settled_at == stored.requested_at == ahead.requested_at


def test_without_redis_it_is_this_hosts(server):
    server.kill()
    with closing(connect(RedisSettings.at(server.url))) as client:
        assert abs(ServerClock(client).now_s() - time.time()) < NEAR_S


def test_a_late_answer_does_not_set_it_back_and_a_clock_that_was_set_does(server):
    with closing(connect(RedisSettings.at(server.url))) as client:
        clock = ServerClock(client)
        clock.heard(1000.0)
        clock.heard(999.5)
        assert 1000.0 <= clock.now_s() < 1000.0 + HEARD_FOR_S
        clock.heard(1003.0)
        assert clock.now_s() >= 1003.0
        clock.heard(500.0)
        assert 500.0 <= clock.now_s() < 600.0


def test_a_cancel_is_never_settled_before_it_was_asked_for(crew):
    crew.workers(2)
    order_ids = crew.place(60)
    with closing(CancelClient(crew.redis.url, requested_by=str(uuid.uuid4()))) as other:
        pending = [crew.client.cancel_many(order_ids[::2]), other.cancel_many(order_ids[1::2])]
        for result in (each for one in pending for each in one.results(timeout=PATIENCE_S)):
            assert result.requested_at <= result.settled_at


@pytest.mark.parametrize("told_late_s", [0.0, 0.0005, 0.000999])
def test_the_earliest_moment_allows_for_times_that_are_told_in_whole_milliseconds(told_late_s):
    clock = ServerClock(server=None)
    asked_s = time.monotonic() - 60.0
    server_is_ahead_s = 1_000_000.0  # of our monotonic clock
    told_s = asked_s + server_is_ahead_s - told_late_s
    clock.heard(told_s, asked_s=asked_s)
    event_s = asked_s + 5.0
    assert clock.earliest_s(event_s + server_is_ahead_s) <= event_s + 1e-6
