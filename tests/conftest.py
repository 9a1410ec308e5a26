"""What the tests run against: a real Redis, a real exchange (the sandbox) and real workers, as processes.

One stack serves the whole session. Tests do not disturb each other because each makes up its own order
ids; nothing is flushed. A part that does not start fails the tests that need it: nothing is skipped. What a
test stops, kills or fills up is its module's own: a crew, or a Redis.
"""

from __future__ import annotations

import gc
import ipaddress
import os
import shutil
import signal
import ssl
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import hypothesis
import pytest
from celery import Celery
from crew import Crew, serves
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kalshi_cancel.client import CancelClient
from kalshi_cancel.sandbox.control import Control
from trials.stack import Part, RedisServer, Stack

READ_LAG_S = 0.5  # how long the workers here expect reads to lag; the sandbox lags less
LOG_TAIL_CHARS = 6_000


# Few tests that take long: they begin first, or the others wait for them at the end.
LONG_FILES = (
    *("test_sentinel.py", "test_packaging.py", "test_security.py", "test_health.py", "test_audit.py"),
    *("test_tracing.py", "test_mass.py", "test_atomic.py", "test_shutdown.py", "test_campaign.py"),
    *("test_hostile.py", "test_spoilt.py", "test_refused_key.py", "test_executor.py", "test_consumer.py"),
    *("test_mass_proof.py", "test_cli.py", "test_rotation.py", "test_schemas.py", "test_outages.py"),
    *("test_readme.py", "test_mass_at_once.py", "test_top.py", "test_dispatcher.py", "test_batches.py"),
)


# Every write to the append-only file is forced to the disk (`appendfsync always`); on a machine whose disk is
# busy that takes seconds, for Redis and for all who wait for it. Memory keeps what a killed server wrote too.
MEMORY_FOLDER = Path("/dev/shm")
ROOM_BYTES = 2 << 30


def pytest_configure() -> None:
    """Has the tests keep their files in memory where there is room enough, and examples take their time.

    Ctrl-C reaches what the tests start, also where they run in the background.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    hypothesis.settings.register_profile("patient", deadline=None)
    hypothesis.settings.load_profile("patient")
    if os.access(MEMORY_FOLDER, os.W_OK) and shutil.disk_usage(MEMORY_FOLDER).free > ROOM_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY_FOLDER))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Keeps the garbage collector away from the thousands of tests: they stay until the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the long files first (xdist is told to keep the order)."""
    rank = {name: at for at, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


class Marks:
    """Every signature and timestamp that reached the exchange during the session, to find reused ones.

    A timestamp alone may well be the same for two orders in the same millisecond; a signature may not, and
    neither may a timestamp for the same method and order. Two processes may list, or read the account's
    limits, in the same millisecond.
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
            marks = [("signature", signature)]
            if call["operation"] in ("cancel", "read"):
                marks.append(("timestamp", timestamp, str(call["method"]), str(call["path"])))
            for mark in marks:
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


@pytest.fixture(scope="module")
def crew_environment() -> dict[str, str]:
    """What a module's crew is set to beside its usual; for modules to say otherwise."""
    return {}


@pytest.fixture(scope="module")
def shared_crew(tmp_path_factory, crew_environment) -> Iterator[Crew]:
    """The module's own Redis and sandbox, as the last test left them."""
    crew = Crew(tmp_path_factory.mktemp("crew"), **crew_environment)
    yield crew
    crew.close()


@pytest.fixture
def crew(shared_crew) -> Iterator[Crew]:
    """The module's own Redis and sandbox; the sandbox empty, the workers those of the last test."""
    shared_crew.control.reset()
    yield shared_crew
    shared_crew.leave()


@pytest.fixture(scope="module")
def own_redis(tmp_path_factory) -> Iterator[RedisServer]:
    """The module's own Redis, at which no worker works: what is accepted stays open."""
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture(scope="module", params=["valkey", "redis-server"])
def server_of_each_make(request, tmp_path_factory) -> Iterator[RedisServer]:
    """The module's own server: Valkey, and Redis where it is installed."""
    program = None
    if request.param == "redis-server":
        program = shutil.which("redis-server")
        if program is None:
            if os.environ.get("CI") == "true":
                pytest.fail("redis-server is not installed, and here it has to be")
            pytest.skip("redis-server is not installed")
    server = RedisServer(tmp_path_factory.mktemp(request.param), program=program).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory) -> tuple[ssl.SSLContext, Path]:
    """A certificate for 127.0.0.1 that nobody signed: a server's context, and the file to trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    trusted, private = folder / "cert.pem", folder / "key.pem"
    trusted.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(trusted, private)
    return context, trusted


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


@pytest.fixture
def worker(stack: Stack, control: Control, client: CancelClient) -> Iterator[Part]:
    """The session's worker; it is the same process at the end, and serves."""
    worker = stack.workers[0]
    yield worker
    assert worker.process.poll() is None, worker.log_text()[-3000:]
    serves(control, client)
