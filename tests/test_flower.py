"""Flower, started as the documentation says and as the Redis user that may only look."""

from __future__ import annotations

import os
import re
import shlex
import sys
from contextlib import closing
from pathlib import Path

import pytest
import requests
from celery import Celery
from test_security import PATIENCE_S, Guarded, place, url_of

from kalshi_cancel.client import CancelClient
from trials.stack import ROOT, Part, free_port, wait_until

LOGIN = ("somebody", "secret")


def documented() -> list[str]:
    """The words of the command in the documentation."""
    [line] = re.findall(
        r"^celery -A worker\.app flower .*$", (ROOT / "docs/how-to/operating.md").read_text(), re.MULTILINE
    )
    return shlex.split(line.replace("USER:PASSWORD", ":".join(LOGIN)))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    with Guarded(tmp_path_factory.mktemp("guarded"), None) as stack:
        stack.start(workers=0)
        for options in ((), ("-E",)):  # the first is silent about its tasks
            stack.start_worker(*options)
        yield stack


@pytest.fixture(scope="module")
def flower(guarded, tmp_path_factory):
    """What it answers to a path, as JSON."""
    port = free_port()
    env = {"REDIS_URL": url_of(guarded.redis, "monitor")}  # and nothing else that a worker needs
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env["PYTHONPATH"] = str(ROOT / ".venv" / "flower")  # where `make .venv/ready` puts it
    command = [*documented(), "--address=127.0.0.1", f"--port={port}"]
    part = Part(command, log_path=tmp_path_factory.mktemp("flower") / "log", env=env)

    def ask(path):
        return requests.get(f"http://127.0.0.1:{port}{path}", auth=LOGIN, timeout=10)

    def answers():
        try:
            return ask("/healthcheck").status_code == 200
        except requests.ConnectionError:
            return False

    part.wait_ready(answers, "Flower")
    yield lambda path: ask(path).json()
    print(part.log_text()[-5000:])
    part.stop()


def test_it_shows_our_workers_queues_and_tasks_to_the_user_that_may_only_look(guarded, flower):
    workers = lambda: {each["hostname"]: each for each in flower("/workers?json=1")["data"]}  # noqa: E731 - a question
    wait_until(
        lambda: sum(each.get("status", False) for each in workers().values()) == 2, what="both workers"
    )
    assert [queue["name"] for queue in flower("/api/queues/length")["active_queues"]] == ["cancels", "risk"]
    with closing(CancelClient(url_of(guarded.redis, "producer"))) as client:

        def shown():
            [order_id] = place(guarded)
            report = client.mass_cancel({"order_ids": [order_id]}).result(PATIENCE_S)
            assert report["orders_affected"] == 1
            tasks = flower("/api/tasks").values()
            return {(task["name"], task["state"]) for task in tasks} >= {("mass_cancel", "SUCCESS")}

        wait_until(shown, what="a task of the worker with -E")
    silent, telling = (re.search(r"(\S+@\S+) ready\.", each.log_text())[1] for each in guarded.workers)
    assert "task-received" not in workers()[silent]
    assert workers()[telling]["task-received"] >= 1
    assert guarded.denials() == set()


def test_who_may_only_look_cannot_shut_workers_down_or_push_messages(guarded):
    url = url_of(guarded.redis, "monitor")
    with Celery("looker", broker=url, set_as_current=False) as app:
        with pytest.raises(Exception, match=r"(?i)permission"):
            app.control.shutdown()
        with pytest.raises(Exception, match=r"(?i)permission"):
            app.send_task("cancel_order", ["1"], queue="cancels", retry=False)
    with closing(CancelClient(url_of(guarded.redis, "producer"))) as client:
        assert client.cancel(*place(guarded)).result(PATIENCE_S).outcome == "canceled"
    assert [worker.process.poll() for worker in guarded.workers] == [None, None]
