"""The contenders as real processes: how each is started, fed, held for a moment, and looked at.

A session is one contender with a Redis of its own and so many worker processes, against the stub.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import psutil
import redis
import requests

from bench.produce import order_ids
from bench.work import RECORD_KEY
from trials.stack import KEY_ID, ROOT, Keys, Part, RedisServer, free_port, wait_until

BIN = Path(sys.executable).parent
STALLED_S = 60.0
LOOK_EVERY_S = 0.01
AT_ONCE = 200
WARM_ORDERS = 200

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Contender:
    """One queue: ``commands`` start its workers, for a number of processes and the exchange's latency in ms.

    ``listeners`` are the connections that then wait for work at Redis; ``drained`` is how many orders it is
    given to drain, at 0 and at 20 ms. ``fsync``: when its Redis has what it is told on disk; ``producer``:
    whose way of publishing it takes (empty: its own); ``environment``: besides what all have.
    """

    name: str
    title: str
    commands: Callable[[int, int], list[list[str]]]
    listeners: Callable[[int, int], int] = lambda processes, _ms: processes
    record_key: str = RECORD_KEY
    drained: tuple[int, int] = (10_000, 10_000)
    fsync: str = "everysec"  # Redis' own choice once the append-only file is on
    producer: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def _celery(app: str, *options: str) -> list[str]:
    name = f"w{next(_numbers)}@%h"
    return [str(BIN / "celery"), "-A", app, "worker", "-n", name, *options]


_QUIETLY = ("--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "warning")

OURS = Contender(
    "ours",
    "this service",
    # As the Procfile has it, a line of log for each outcome included.
    lambda n, _ms: [
        _celery("worker.app", "--without-gossip", "--without-mingle", "-l", "info") for _ in range(n)
    ],
)
# As our documentation wants it: a Redis that is killed has lost nothing.
OURS_SAFE = replace(
    OURS, name="ours_safe", title="this service, fsync always", fsync="always", producer="ours"
)
# Without what watches it, and with all of that.
OURS_UNWATCHED = replace(OURS, name="unwatched", environment={"KALSHI_AUDIT": "off"}, producer="ours")
OURS_WATCHED = replace(
    OURS,
    name="watched",
    commands=lambda n, ms: [
        ["env", f"KALSHI_METRICS_PORT={free_port()}", *command] for command in OURS.commands(n, ms)
    ],
    producer="ours",
)

# How many at once is the best found for each latency: threads, coroutines or processes.
CONTENDERS = (
    OURS,
    OURS_SAFE,
    Contender(
        "celery_shipped",
        "celery as shipped",
        lambda n, _ms: [_celery("bench.queue_celery", "-c", str(n), "-l", "warning")],
        listeners=lambda _n, _ms: 1,
        drained=(10_000, 2_000),
    ),
    Contender(
        "celery_best",
        "celery, best set-up",
        lambda n, ms: [
            _celery("bench.queue_celery_best", "-P", "threads", "-c", "32" if ms else "4", *_QUIETLY)
            for _ in range(n)
        ],
    ),
    Contender(
        "taskiq",
        "taskiq (list)",
        lambda n, ms: [
            [
                *(str(BIN / "taskiq"), "worker", "bench.queue_taskiq:broker", "--workers", str(n)),
                *("--max-async-tasks", "100" if ms else "20", "--log-level", "WARNING"),
            ]
        ],
    ),
    Contender(
        "huey",
        "huey (processes)",
        lambda n, ms: [
            [
                *(str(BIN / "huey_consumer"), "bench.queue_huey.huey", "-k", "process", "-q"),
                *("-w", str(n * (10 if ms else 2))),
            ]
        ],
        listeners=lambda n, ms: n * (10 if ms else 2),
    ),
    Contender(
        "bullmq",
        "bullmq (Python port)",
        lambda n, ms: [[sys.executable, "-m", "bench.queue_bullmq", "50" if ms else "10"] for _ in range(n)],
    ),
    Contender(
        "ardiq",
        "ardiq",
        # With one process, the plain command does not find this project.
        lambda n, _ms: [[sys.executable, "-m", "ardiq", "run", "bench.queue_ardiq:app", "-q", "-w", str(n)]],
        record_key="ardiq:bench:task:results:",
    ),
)
BY_NAME = {each.name: each for each in CONTENDERS}


def available() -> list[str]:
    """The contenders whose packages are installed: ardiq wants Python 3.12."""
    return [each.name for each in CONTENDERS if each.name != "ardiq" or find_spec("ardiq")]


class StubExchange:
    """The stub as a process, and its levers; ``key``: what it expects calls to be signed with (`Keys`)."""

    def __init__(self, folder: Path, *, key: str = "rsa") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.keys = Keys(folder / "keys", algorithm=key)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._session = requests.Session()
        self._session.trust_env = False
        command = ["-m", "bench.stub", "--port", str(self.port), "--public-key", str(self.keys.public_path)]
        self._part = Part([sys.executable, *command], log_path=folder / "stub.log")
        self._part.wait_ready(lambda: "ready" in self._part.log_text(), "the stub")

    def reset(self, **wishes: float) -> None:
        """Forgets what it saw; ``latency_ms`` and ``idle_close_s`` from now on."""
        self._ask("reset", wishes)

    def state(self) -> dict[str, Any]:
        """What it has seen, in numbers."""
        state: dict[str, Any] = self._ask("state")
        return state

    def arrivals(self) -> dict[str, float]:
        """When each order's first cancel arrived."""
        arrivals: dict[str, float] = self._ask("arrivals")
        return arrivals

    def _ask(self, lever: str, wishes: dict[str, float] | None = None) -> Any:
        return self._session.post(f"{self.url}/stub/{lever}", json=wishes or {}, timeout=30).json()

    def stop(self) -> None:
        """Ends it."""
        self._part.stop()
        self._session.close()


class Session:
    """A contender at work: its Redis, its workers, and whoever feeds them."""

    def __init__(
        self,
        contender: Contender,
        stub: StubExchange,
        folder: Path,
        *,
        processes: int = 2,
        latency_ms: int = 0,
    ) -> None:
        self.contender = contender
        self.stub = stub
        self._folder = folder / f"{contender.name}-{next(_numbers)}"
        self._processes = processes
        self._latency_ms = latency_ms
        self._redis = RedisServer(self._folder / "redis", options=["--appendfsync", contender.fsync])
        self._workers: list[Part] = []
        self.redis: redis.Redis = self._redis.client()

    def __enter__(self) -> Self:
        self._redis.start()
        self.stub.reset(latency_ms=self._latency_ms)
        try:
            commands = self.contender.commands(self._processes, self._latency_ms)
            for number, command in enumerate(commands):
                log_path = self._folder / f"worker{number}.log"
                self._workers.append(Part(command, log_path=log_path, env=self._environment))
            wanted = self.contender.listeners(self._processes, self._latency_ms)
            wait_until(
                lambda: self._count("clients", "blocked_clients") >= wanted,
                what=f"{self.contender.title} listens",
            )
            self._warm_up()
        except BaseException:
            print("".join(worker.log_text()[-2000:] for worker in self._workers), file=sys.stderr)
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            self._signal(worker, signal.SIGCONT)  # it may be held: a measure can fail
            worker.stop()
            self._signal(worker, signal.SIGKILL)  # what it left behind
        self._redis.stop()
        self.redis.close()

    @property
    def _environment(self) -> dict[str, str]:
        return {
            **{name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ},
            "REDIS_URL": self._redis.url,
            "KALSHI_BASE_URL": self.stub.url,
            "KALSHI_API_KEY_ID": KEY_ID,
            "KALSHI_PRIVATE_KEY_PATH": str(self.stub.keys.private_path),
            **self.contender.environment,
        }

    def _signal(self, worker: Part, signum: int) -> None:
        """To the worker and its children; nothing where all have ended."""
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signum)

    def _warm_up(self) -> None:
        with self.producer("single", WARM_ORDERS, producers=1) as producing:
            producing.run()
        self.await_stored(producing.ids)

    def fresh(self) -> None:
        """Has the stub forget what it has seen."""
        self.stub.reset(latency_ms=self._latency_ms)

    # -- feeding

    def producer(
        self, mode: str, count: int, *, producers: int = 4, rate: float = 0.0, name: str = ""
    ) -> Producing:
        """Producers as processes, for ``count`` orders in all, which wait to be told to begin."""
        return Producing(
            self._environment,
            name or self.contender.producer or self.contender.name,
            mode,
            each=count // producers,
            producers=producers,
            rate=rate,
        )

    def pause(self) -> None:
        """Holds the workers where they are."""
        for worker in self._workers:
            os.killpg(worker.pid, signal.SIGSTOP)

    def resume(self) -> float:
        """Lets them go on; the moment."""
        now = time.monotonic()
        for worker in self._workers:
            os.killpg(worker.pid, signal.SIGCONT)
        return now

    # -- looking

    def await_stored(self, ids: Sequence[str]) -> float:
        """The moment when every order has its record."""
        left = [self.contender.record_key + order_id for order_id in ids]
        progress = time.monotonic()
        while left:
            before = len(left)
            while left and int(self.redis.exists(*left[-AT_ONCE:])) == len(left[-AT_ONCE:]):
                del left[-AT_ONCE:]
            if len(left) < before:
                progress = time.monotonic()
            elif time.monotonic() > progress + STALLED_S:
                raise TimeoutError(f"{self.contender.title}: {len(left)} orders stay without a record")
            if left:
                time.sleep(LOOK_EVERY_S)
        return time.monotonic()

    def record_bytes(self, order_id: str) -> int:
        """How long an order's record is."""
        return int(self.redis.strlen(self.contender.record_key + order_id))

    def cpu_s(self) -> float:
        """Processor time that the workers have used so far, seconds; of children that have ended, too."""
        return sum(sum(process.cpu_times()[:4]) for process in self._processes_alive())

    def pss_mb(self) -> float:
        """Memory of all worker processes, shared pages counted once, in MB."""
        return sum(process.memory_full_info().pss for process in self._processes_alive()) / 1e6

    def threads(self) -> int:
        """Threads of all worker processes."""
        return sum(process.num_threads() for process in self._processes_alive())

    def redis_cpu_s(self) -> float:
        """Processor time that Redis has used so far, seconds."""
        return self._count("cpu", "used_cpu_user") + self._count("cpu", "used_cpu_sys")

    def _processes_alive(self) -> list[psutil.Process]:
        parents = [psutil.Process(worker.pid) for worker in self._workers]
        return [process for parent in parents for process in (parent, *parent.children(recursive=True))]

    def _count(self, section: str, field: str) -> float:
        facts: dict[str, Any] = self.redis.info(section)
        return float(facts[field])

    @contextmanager
    def noting_records(self) -> Iterator[dict[str, float]]:
        """The moment each record appears, by order id; Redis tells by its keyspace events."""
        noted: dict[str, float] = {}
        self.redis.config_set("notify-keyspace-events", "E$")
        stop = threading.Event()
        prefix = self.contender.record_key
        with self._redis.client() as client, client.pubsub(ignore_subscribe_messages=True) as events:
            events.subscribe("__keyevent@0__:set")

            def listen() -> None:
                while not stop.is_set():
                    event = events.get_message(timeout=0.2)
                    if event and str(event["data"]).startswith(prefix):
                        noted.setdefault(str(event["data"])[len(prefix) :], time.monotonic())

            thread = threading.Thread(target=listen, daemon=True)
            thread.start()
            try:
                yield noted
            finally:
                stop.set()
                thread.join()
                self.redis.config_set("notify-keyspace-events", "")


class Producing:
    """Producer processes that start together."""

    def __init__(
        self, environment: dict[str, str], name: str, mode: str, *, each: int, producers: int, rate: float
    ) -> None:
        self._prefixes = [str(uuid.uuid4())[:27] for _ in range(producers)]
        self.ids = [order_id for prefix in self._prefixes for order_id in order_ids(prefix, each)]
        self.warm_ids = [f"{prefix}-warm" for prefix in self._prefixes]
        self.began = 0.0
        command = [sys.executable, "-m", "bench.produce", name, mode]
        options = ["--rate", str(rate / producers)] if rate else []
        self._processes = [
            subprocess.Popen(
                [*command, prefix, str(each), *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                cwd=ROOT,
                text=True,
            )
            for prefix in self._prefixes
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def run(self) -> Produced:
        """Lets them go and waits until they are done."""
        self.begin()
        return self.wait()

    def begin(self) -> None:
        """Waits until all are connected and lets them go."""
        for process in self._processes:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("a producer did not get ready")
        self.began = time.monotonic()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()

    def wait(self) -> Produced:
        """What they did, once they are done."""
        told = [json.loads(process.communicate()[0].splitlines()[-1]) for process in self._processes]
        return Produced(
            min(each["began"] for each in told),
            max(each["ended"] for each in told),
            sum(each["cpu_s"] for each in told),
            {order_id: at for each in told for order_id, at in each["published"].items()},
        )


@dataclass(frozen=True, slots=True)
class Produced:
    """When publishing began and ended, the processor time it took, and for a rate each order's moment."""

    began: float
    ended: float
    cpu_s: float
    published: dict[str, float]
