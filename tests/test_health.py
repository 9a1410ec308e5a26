"""Whether a worker lives and is ready, asked of real ones while what they need goes away."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import uuid
from contextlib import closing

import pytest
import requests
from here import cancelctl

from kalshi_cancel.client import CancelClient
from kalshi_cancel.heartbeat import BEAT_OLD_S, Heartbeat, is_young
from trials.stack import ROOT, Part, Stack, free_port, wait_until

PATIENCE_S = 30.0
# Well below what takes a worker for dead, and above each single wait of the main loop.
LIVELY_S = 10.0
OUTAGE_S = BEAT_OLD_S + 3.0
ALL_OK = dict.fromkeys(("redis", "key", "clock", "exchange", "breaker", "services"), "ok")


class Watched:
    """A stack whose one worker has a port and a heartbeat file."""

    def __init__(self, folder, **environment):
        self.file = folder / "alive"
        self.port = free_port()
        watch = {"KALSHI_METRICS_PORT": str(self.port), "KALSHI_HEARTBEAT_FILE": str(self.file)}
        self.stack = Stack(folder / "stack", environment={**watch, **environment})
        self.stack.start(workers=0)

    def get(self, path):
        answer = requests.get(f"http://127.0.0.1:{self.port}/{path}", timeout=PATIENCE_S)
        return answer.status_code, answer.json()

    def ready(self):
        return self.get("ready") == (200, ALL_OK)

    def age_s(self):
        return time.time() - self.file.stat().st_mtime

    def oldest_during(self, seconds):
        """The greatest age of the file in a time that is long enough for a dead loop to show."""
        ages, end = [0.0], time.monotonic() + seconds

        def look():
            ages.append(self.age_s())
            return time.monotonic() >= end

        wait_until(look, within_s=2 * seconds + PATIENCE_S, what="the time is over")
        return max(ages)

    def ctl(self, *arguments):
        return cancelctl("health", *arguments, env={"KALSHI_HEARTBEAT_FILE": str(self.file)})


@pytest.fixture
def watched(tmp_path):
    """Makes a stack of the test's own, gone after it."""
    made = []

    def make(**environment):
        made.append(Watched(tmp_path, **environment))
        return made[-1]

    yield make
    for each in made:
        each.stack.redis.part.signal(signal.SIGCONT)
        each.stack.stop()


@pytest.mark.parametrize("pool", [("-P", "threads"), ("-P", "processes", "-c", "2")], ids=" ".join)
def test_a_worker_lives_and_is_not_ready_while_redis_is_gone(watched, pool):
    scene = watched()
    scene.stack.start_worker(*pool)
    wait_until(scene.ready, what="a ready worker")
    scene.stack.redis.kill()
    wait_until(lambda: scene.get("ready")[0] == 503, what="not ready")
    assert scene.oldest_during(OUTAGE_S) < LIVELY_S
    assert scene.get("healthz")[0] == 200
    assert scene.ctl().returncode == 0
    status, found = scene.get("ready")
    assert status == 503
    assert found == {**ALL_OK, "redis": found["redis"]}
    assert "Connection refused" in found["redis"]
    scene.stack.redis.start()
    wait_until(scene.ready, what="ready again")


def test_a_worker_lives_while_redis_is_silent(watched):
    scene = watched()
    scene.stack.start_worker()
    wait_until(scene.ready, what="a ready worker")
    scene.stack.redis.part.signal(signal.SIGSTOP)
    assert scene.oldest_during(2 * OUTAGE_S) < LIVELY_S
    assert scene.get("healthz")[0] == 200
    assert scene.get("ready")[1]["redis"] != "ok"
    scene.stack.redis.part.signal(signal.SIGCONT)
    wait_until(scene.ready, what="ready again")


STUCK = """
import time
from celery import bootsteps
from worker.app import app

class Stuck(bootsteps.StartStopStep):
    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer):
        consumer.timer.call_after(1, time.sleep, (3600,))

app.steps["consumer"].add(Stuck)
"""


def test_a_worker_whose_main_loop_hangs_is_dead_though_its_threads_live(watched, tmp_path):
    (tmp_path / "stuck.py").write_text(STUCK)
    scene = watched(PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))))
    command = [sys.executable, "-m", "celery", "-A", "stuck", "worker", "-l", "info"]
    hung = Part(command, log_path=tmp_path / "hung.log", env=scene.stack.environment)
    try:
        hung.wait_ready(lambda: " ready." in hung.log_text(), "the worker that hangs")
        wait_until(lambda: scene.age_s() > 2, within_s=PATIENCE_S, what="the hanging")
        assert scene.get("healthz")[0] == 200
        assert scene.ctl().returncode == 0
        wait_until(lambda: scene.age_s() > BEAT_OLD_S, within_s=PATIENCE_S, what="an old heartbeat")
        wait_until(lambda: scene.get("healthz")[0] == 503, within_s=5, what="the same over HTTP")
        assert scene.ready()
        done = scene.ctl()
        assert (done.returncode, done.stdout) == (1, "")
        assert f"({scene.file})" in done.stderr
    finally:
        hung.kill()


def test_without_the_exchange_a_worker_is_not_ready_and_says_that_cancels_are_held(watched):
    scene = watched()
    scene.stack.start_worker()
    wait_until(scene.ready, what="a ready worker")
    scene.stack.exchange.kill()
    with closing(CancelClient(scene.stack.redis.url)) as client:
        client.cancel_many([str(uuid.uuid4()) for _ in range(10)])
    held = {**ALL_OK, "breaker": "unreachable"}
    found = wait_until(
        lambda: (now := scene.get("ready"))[1] | {"exchange": "ok"} == held and now, what="what is held"
    )
    assert found[0] == 503
    wait_until(lambda: scene.get("ready")[1]["exchange"].startswith("not_sent: "), what="the exchange missed")
    assert scene.get("healthz")[0] == 200
    scene.stack.start_exchange()
    wait_until(scene.ready, what="ready again")


def test_a_key_that_is_refused_and_a_clock_that_is_off_are_told_apart_from_an_exchange_that_is_gone(watched):
    scene = watched()
    scene.stack.start_worker()
    wait_until(scene.ready, what="a ready worker")
    scene.stack.control.fault("status", status=401, code="authentication_error")
    found = wait_until(lambda: (now := scene.get("ready"))[0] == 503 and now, what="a refused key")[1]
    assert found["key"].startswith("authentication_error: ")
    assert found == {**ALL_OK, "key": found["key"]}
    scene.stack.control.clear_faults()
    wait_until(scene.ready, what="ready again")
    scene.stack.control.configure(skew_s=8)
    found = wait_until(lambda: (now := scene.get("ready"))[0] == 503 and now, what="a wrong clock")[1]
    assert found == {**ALL_OK, "clock": found["clock"]}
    assert "this host's clock is off" in found["clock"]


def test_a_heartbeat_file_that_cannot_be_touched_keeps_a_worker_from_starting(watched, tmp_path):
    scene = watched(KALSHI_HEARTBEAT_FILE=str(tmp_path / "no" / "folder"))
    part = scene.stack.spawn_worker()
    assert part.process.wait(PATIENCE_S) != 0
    [line] = [line for line in part.log_text().splitlines() if "cannot start: " in line]
    assert "KALSHI_HEARTBEAT_FILE cannot be touched" in line
    assert "Traceback" not in part.log_text()


@pytest.mark.parametrize(
    ("age_s", "young"), [(0, True), (BEAT_OLD_S / 3, True), (BEAT_OLD_S + 1, False), (-3600, False)]
)
def test_the_command_goes_by_the_age_of_the_file(tmp_path, age_s, young):
    scene = Watched.__new__(Watched)
    scene.file = file = tmp_path / "alive"
    file.touch()

    def ctl(*options):
        os.utime(file, (time.time() - age_s,) * 2)
        return scene.ctl(*options)

    assert ctl().returncode == (0 if young else 1)
    done = ctl("--json")
    assert json.loads(done.stdout)["alive"] is young
    assert done.returncode == (0 if young else 1)


def test_the_command_says_when_there_is_nothing_to_look_at(tmp_path):
    scene = Watched.__new__(Watched)
    scene.file = tmp_path / "none"
    assert (scene.ctl().returncode, "there is none" in scene.ctl().stderr) == (1, True)
    scene.file = ""
    assert (scene.ctl().returncode, "is not set" in scene.ctl().stderr) == (2, True)


def test_a_beat_that_cannot_be_written_is_warned_of_once_and_counts_in_memory(tmp_path, caplog):
    folder = tmp_path / "folder"
    folder.mkdir()
    heart = Heartbeat(folder / "alive")
    heart.start()
    (folder / "alive").unlink()
    folder.rmdir()
    for _ in range(2):
        heart._at -= 5
        heart.beat()
        assert heart.age_s < 4  # it beat anew
    assert caplog.text.count("event=heartbeat_failed") == 1


def test_no_beat_is_no_life():
    assert not is_young(None)
