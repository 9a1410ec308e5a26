"""What the tests run against: a real Redis, a real exchange (the sandbox) and real workers, as processes.

One stack serves the whole session. Tests do not disturb each other because each makes up its own order
ids; nothing is flushed. A part that does not start fails the tests that need it: nothing is skipped.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from celery import Celery

from sandbox.control import Control
from sandbox.stack import Stack
from worker.client import CancelClient

READ_LAG_S = 0.5  # how long the workers here expect reads to lag; the sandbox lags less
LOG_TAIL_CHARS = 6_000


# Few tests that take long: they begin first, or the others wait for them at the end.
LONG_FILES = (
    *("test_sentinel.py", "test_campaign.py", "test_recovery.py", "test_outages.py", "test_mass.py"),
    *("test_service.py", "test_hostile.py", "test_deploy.py", "test_security.py", "test_pacing.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the long files first (xdist is told to keep the order)."""
    rank = {name: at for at, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


class Marks:
    """Every signature and timestamp that reached the exchange during the session, to find reused ones.

    A timestamp alone may well be the same for two orders in the same millisecond; a signature may not, and
    neither may a timestamp for the same method and path.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[str, ...]] = set()

    def add(self, calls: list[dict[str, object]]) -> list[str]:
        """Notes the calls' marks; what was there before, in words."""
        reused = []
        for call in calls:
            signature, timestamp = str(call["signature"]), str(call["timestamp"])
            if not signature:
                continue
            for mark in (
                ("signature", signature),
                ("timestamp", timestamp, str(call["method"]), str(call["path"])),
            ):
                if mark in self._seen:
                    reused.append(f"{mark[0]} of call {call['seq']} ({call['method']} {call['path']})")
                self._seen.add(mark)
        return reused


_stack_key = pytest.StashKey[Stack]()


@pytest.fixture(scope="session")
def stack(tmp_path_factory, request) -> Iterator[Stack]:
    """Redis, the sandbox and one worker, for the whole session."""
    folder = tmp_path_factory.mktemp("stack")
    with Stack(folder, environment={"KALSHI_READ_LAG_S": str(READ_LAG_S)}) as stack:
        request.config.stash[_stack_key] = stack
        yield stack.start(workers=1)


@pytest.fixture(scope="session")
def marks() -> Marks:
    """The signatures and timestamps of the session so far."""
    return Marks()


@pytest.fixture
def control(stack, marks) -> Iterator[Control]:
    """The session's exchange, empty and without faults; at the end no signature may have been used twice."""
    stack.control.reset()
    yield stack.control
    stack.control.clear_faults()
    assert marks.add(stack.control.calls()) == []


@pytest.fixture
def client(stack) -> CancelClient:
    """A producer's client."""
    return CancelClient(stack.redis.url, requested_by="test")


@pytest.fixture
def order_id() -> str:
    """An order id that nobody has used."""
    return str(uuid.uuid4())


@pytest.fixture
def celery_producer(stack) -> Iterator[Celery]:
    """A Celery producer that has none of our code: broker and result backend, nothing else."""
    with Celery("producer", broker=stack.redis.url, backend=stack.redis.url, set_as_current=False) as app:
        yield app


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Shows the end of the workers' logs with a failed test."""
    outcome = yield
    report = outcome.get_result()
    stack = item.config.stash.get(_stack_key, None)
    if report.failed and stack is not None:
        for worker in stack.workers:
            text = worker.log_text()[-LOG_TAIL_CHARS:]
            report.sections.append((f"log of {worker.log_path.stem} (end)", text))
