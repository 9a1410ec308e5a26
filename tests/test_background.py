"""What a worker does beside its work, in real workers: one bad thing stops nothing else, and is seen."""

from __future__ import annotations

import json
import os
import re
import sys
import uuid
from contextlib import closing

import pytest
import requests
from crew import PATIENCE_S, wait_ready

from kalshi_cancel.client import CancelClient
from trials.stack import ROOT, Part, free_port, wait_until

PREFIX = "kalshi-cancel"


@pytest.fixture(scope="module")
def crew_environment():
    return {"KALSHI_BATCH_MOST": ""}


class Watched:
    """A database of the test's own with one worker that has a port; its client and its Redis."""

    def __init__(self, crew, client, port):
        self.crew, self.client, self.port = crew, client, port
        self.server = client._server
        self.worker = None

    def services(self):
        return requests.get(f"http://127.0.0.1:{self.port}/ready", timeout=PATIENCE_S).json()["services"]

    def metric(self, name, service):
        text = requests.get(f"http://127.0.0.1:{self.port}/metrics", timeout=PATIENCE_S).text
        [line] = [
            line
            for line in text.splitlines()
            if line.startswith(f'kalshi_cancel_{name}{{service="{service}"}}')
        ]
        return float(line.split()[-1])

    def shown_services(self):
        """The names of all services that the worker shows."""
        text = requests.get(f"http://127.0.0.1:{self.port}/metrics", timeout=PATIENCE_S).text
        return set(re.findall(r'^kalshi_cancel_service_up{service="([^"]*)"}', text, re.MULTILINE))

    def wait_named(self, service):
        """Waits until the worker says that it is not ready, and of which background job that is."""
        return wait_until(
            # (For a moment, what has just failed may look like a failure of another process.)
            lambda: (
                (now := self.services()).startswith(f"{service} ")
                and "of a pool's process" not in now
                and now
            ),
            within_s=PATIENCE_S,
            what=f"{service} named",
        )

    def wait_well(self):
        wait_until(lambda: self.services() == "ok", within_s=PATIENCE_S, what="all is well")

    def cancels_still_go_through(self):
        order_ids = self.crew.place(5)
        results = self.client.cancel_many(order_ids).results(PATIENCE_S)
        assert {result.outcome for result in results} == {"canceled"}

    def overdue_is_told(self):
        """What cannot be known in time is told to its waiter at its deadline."""
        [order_id] = self.crew.place()
        self.crew.control.fault("http_503", order_id=order_id)
        pending = self.client.cancel(order_id, deadline_s=0.5)
        assert pending.result(timeout=PATIENCE_S).outcome == "unresolved"


@pytest.fixture
def watched(crew):
    port = free_port()
    with crew.apart(KALSHI_METRICS_PORT=str(port)) as apart:
        scene = Watched(crew, apart.client, port)
        [scene.worker] = apart.start()
        scene.wait_well()
        yield scene


def test_a_mass_cancel_that_cannot_be_read_keeps_no_other_from_its_runner(watched):
    for at, spoilt in enumerate(("[1, 2]", "null", "7", '{"scope": []}', "no JSON")):
        watched.server.hset(f"{PREFIX}:mass:spoilt-{at}", "request", spoilt)
        watched.server.sadd(f"{PREFIX}:mass_cancels:open", f"spoilt-{at}")
    watched.server.set(f"{PREFIX}:mass:other", "of another type")
    watched.server.sadd(f"{PREFIX}:mass_cancels:open", "other")
    wait_until(
        lambda: watched.worker.log_text().count("event=mass_cancel_") >= 6,
        within_s=PATIENCE_S,
        what="each is said",
    )
    order_ids = watched.crew.place(3, ticker="KXBG-26NOV22-A")
    pending = watched.client.mass_cancel({"tickers": ["KXBG-26NOV22-A"]})
    assert pending.result(timeout=PATIENCE_S)["flat"] is True
    assert set(order_ids) <= set(watched.crew.sent())
    watched.wait_well()


def test_a_worker_runs_every_service_of_the_list(watched):
    everywhere = {"leases", "worker registry", "limits", "audit log", "mass cancels", "key rotation"}
    main = {
        "report overdue",
        "answer lists",
        "wake lanes",
        "mend the store",
        "forget dead letters",
        "show listeners",
    }
    shown = watched.shown_services()
    assert {name for name in shown if not name.startswith("sender-")} == everywhere | main | {"monitor"}


def test_a_job_that_fails_again_and_again_is_named_and_stops_no_other(watched):
    watched.server.set(f"{PREFIX}:lists", "of another type")
    found = watched.wait_named("answer lists")
    assert "WRONGTYPE" in found
    assert watched.metric("service_up", "answer lists") == 0
    assert watched.metric("service_failures_total", "answer lists") >= 1
    assert watched.metric("service_up", "report overdue") == 1
    watched.overdue_is_told()
    watched.cancels_still_go_through()
    assert (
        'event=service_failed background job failed service="answer lists" why=' in watched.worker.log_text()
    )
    watched.server.delete(f"{PREFIX}:lists")
    watched.wait_well()
    assert watched.metric("service_up", "answer lists") == 1


def test_a_list_of_results_is_answered_though_nobody_can_be_told_that_the_worker_runs(watched):
    watched.server.set(f"{PREFIX}:workers", "of another type")
    assert "WRONGTYPE" in watched.wait_named("worker registry")
    watched.cancels_still_go_through()
    watched.server.delete(f"{PREFIX}:workers")
    watched.wait_well()
    assert [worker.lanes for worker in watched.client.workers()] == [("risk", "strategy")]


def test_what_a_stranger_says_among_the_workers_hides_none_of_them(watched):
    for said in ("[]", "7", "no JSON", '{"name": "x"}', '{"name": "y", "lanes": 7, "senders": {}}'):
        watched.server.zadd(f"{PREFIX}:workers", {said: 4e12})
    [worker] = watched.client.workers()
    assert worker.name.endswith(f":{watched.worker.pid}")
    assert watched.client.held_back() == {}


DIES = """
import os, sys
from worker.app import app
from kalshi_cancel.store.workers import WorkerRegistry

show = WorkerRegistry.show

def dies(self, worker):
    if os.path.exists(os.environ["DEADLY"]):
        sys.exit()  # as nothing that is guarded does: the thread ends
    return show(self, worker)

WorkerRegistry.show = dies
"""


def test_a_thread_that_dies_makes_the_worker_not_ready_is_counted_and_comes_back(crew, tmp_path):
    (tmp_path / "dying.py").write_text(DIES)
    port = free_port()
    deadly = tmp_path / "deadly"
    environment = {
        **crew.stack.environment,
        "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT))),
        "DEADLY": str(deadly),
        "KALSHI_METRICS_PORT": str(port),
    }
    command = [sys.executable, "-m", "celery", "-A", "dying", "worker", "-l", "info"]
    worker = Part(command, log_path=tmp_path / "dying.log", env=environment)
    with closing(CancelClient(crew.redis.url)) as client:
        try:
            wait_ready(worker)
            scene = Watched(crew, client, port)
            scene.wait_well()
            deadly.touch()
            assert "has died" in scene.wait_named("worker registry")
            scene.cancels_still_go_through()
            deadly.unlink()
            scene.wait_well()
            assert scene.metric("service_restarts_total", "worker registry") >= 1
            assert scene.metric("service_up", "worker registry") == 1
            assert "CRITICAL" in next(
                line
                for line in worker.log_text().splitlines()
                if 'background job restarted service="worker registry" why="has died"' in line
            )
        finally:
            worker.kill()


TWIN = """
import os, socket
os.getpid = lambda: 1  # as in every container
socket.gethostname = lambda: "the-host"  # as with a network of the host's
from worker.app import app
"""


@pytest.fixture
def twins(crew, tmp_path):
    """Two workers that have the same process id on the same host, on a database of their own."""
    (tmp_path / "twin.py").write_text(TWIN)
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    with crew.apart(PYTHONPATH=path) as apart:
        started = []
        for name in ("one", "two"):
            command = [sys.executable, "-m", "celery", "-A", "twin", "worker", "-l", "info"]
            environment = {**crew.stack.environment, "PYTHONPATH": path, "REDIS_URL": apart.url}
            log_path = tmp_path / f"{name}.log"
            started.append(Part([*command, "-n", name], log_path=log_path, env=environment))
        try:
            for worker in started:
                wait_ready(worker)
            yield apart.client, started
        finally:
            for worker in started:
                worker.kill()


def test_two_workers_with_the_same_host_name_and_process_id_are_two(crew, twins):
    client, [first, second] = twins
    shown = wait_until(
        lambda: len(now := client.workers()) == 2 and now, within_s=PATIENCE_S, what="both shown"
    )
    assert len({worker.worker_id for worker in shown}) == 2
    assert len({worker.name for worker in shown}) == 2, "they can be told apart by eye"
    assert all(worker.name.startswith("the-host:1#") for worker in shown)
    first.stop()
    left = wait_until(
        lambda: len(now := client.workers()) == 1 and now, within_s=PATIENCE_S, what="one has left"
    )
    assert left[0].name == "the-host:1"
    assert second.process.poll() is None


def test_of_two_twins_the_one_that_froze_leaves_a_mass_cancel_to_the_other(crew, twins):
    client, workers = twins
    ticker = "KXTWIN-26NOV22-A"
    order_ids = crew.place(2, ticker=ticker)
    crew.control.fault("http_503", order_id=order_ids[0])  # so that it lasts for longer than a lease
    pending = client.mass_cancel({"tickers": [ticker]}, deadline_s=30)
    starts = f"event=mass_cancel_started mass cancel started request_id={pending.request_id} "
    runs = lambda: [worker for worker in workers if starts in worker.log_text()]  # noqa: E731
    [runner] = wait_until(runs, within_s=PATIENCE_S, what="one runs it")
    with crew.frozen(runner):
        wait_until(lambda: len(runs()) == 2, within_s=PATIENCE_S, what="the other has taken over")
    left = "event=mass_cancel_taken_over"
    wait_until(lambda: left in runner.log_text(), within_s=PATIENCE_S, what="the first one sees that")
    crew.control.clear_faults()
    assert pending.result(timeout=PATIENCE_S)["flat"] is True
    [other] = [worker for worker in workers if worker is not runner]
    assert left not in other.log_text()


def test_the_registry_is_left_at_once_by_a_worker_that_ends_in_good_order(watched):
    wait_until(watched.client.workers, within_s=PATIENCE_S, what="it is shown")
    assert watched.worker.stop() == 0
    assert watched.client.workers() == []


def test_the_claim_of_an_order_names_host_and_process_for_people(watched):
    [order_id] = watched.crew.place()
    watched.crew.control.fault("slow", order_id=order_id, operation="cancel", seconds=1.0, effect="after")
    pending = watched.client.cancel(order_id)
    entry = wait_until(
        lambda: (now := watched.client.status(order_id).open) and now.claimed_by.partition(":")[2] and now,
        within_s=PATIENCE_S,
        what="who has claimed it is known",
    )
    assert entry.claimed_by.endswith(f":{watched.worker.pid}")
    assert pending.result(timeout=PATIENCE_S).outcome == "canceled"


def test_a_spoilt_note_of_a_bulk_message_and_a_good_one_are_told_apart(watched):
    good, [order_id] = str(uuid.uuid4()), watched.crew.place()
    watched.client.cancel(order_id).result(timeout=PATIENCE_S)
    for task_id, orders in (("bad", "[7]"), ("worse", "{}"), ("worst", "no JSON"), (good, f'["{order_id}"]')):
        watched.server.hset(f"{PREFIX}:list:{task_id}", mapping={"orders": orders, "refused": "[]"})
        watched.server.sadd(f"{PREFIX}:lists", task_id)
    stored = wait_until(
        lambda: watched.server.get(f"celery-task-meta-{good}"), within_s=PATIENCE_S, what="its list"
    )
    assert json.loads(stored)["result"][0]["order_id"] == order_id


ENDS = """
import os, sys
from worker.app import app
from worker.dispatch.executor import Executor

execute = Executor.execute

def ends(self, claim, *, since):
    if os.path.exists(os.environ["DEADLY"]):
        os.unlink(os.environ["DEADLY"])
        sys.exit()  # as nothing that is guarded does: the thread ends in the middle of its work
    return execute(self, claim, since=since)

Executor.execute = ends
"""


def test_what_a_thread_was_at_when_it_ended_is_due_again_by_its_lease(crew, tmp_path):
    (tmp_path / "ending.py").write_text(ENDS)
    deadly = tmp_path / "deadly"
    [order_id] = crew.place()
    environment = {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT))), "DEADLY": str(deadly)}
    with crew.apart() as apart:
        command = [sys.executable, "-m", "celery", "-A", "ending", "worker", "-l", "info"]
        env = {**crew.stack.environment, **environment, "REDIS_URL": apart.url}
        worker = Part(command, log_path=tmp_path / "ending.log", env=env)
        try:
            wait_ready(worker)
            deadly.touch()
            assert apart.client.cancel(order_id, deadline_s=20).result(timeout=20).outcome == "canceled"
            assert not deadly.exists()
            assert 'why="has died"' in worker.log_text()
        finally:
            worker.kill()
