"""A stack whose parts a test may kill: Redis, the sandbox and as many workers as the test asks for."""

from __future__ import annotations

import itertools
import signal
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kalshi_cancel.client import CancelClient
from kalshi_cancel.sandbox.control import Control
from trials.stack import Part, Stack, wait_until

PATIENCE_S = 30.0
PROMPT_S = 3.0  # for a fresh order while or after something hostile is dealt with
SETTLED_PATIENCE_S = 90.0  # one pause of an overdue cancel may be 30 s
SENDERS = 16  # of a worker, as celeryconfig has it
ENVIRONMENT = {
    "KALSHI_READ_LAG_S": "0.5",  # the sandbox does not lag at all
    "KALSHI_BATCH_MOST": "5",  # so that many orders take many calls, single ones among them
}
LOG_TAIL_CHARS = 5_000


def ids(number: int) -> list[str]:
    """So many order ids that nobody has used."""
    return [str(uuid.uuid4()) for _ in range(number)]


def wait_ready(worker: Part) -> None:
    """Waits until the worker takes messages."""
    worker.wait_ready(lambda: " ready." in worker.log_text(), "the worker")


@dataclass(frozen=True, slots=True)
class Apart:
    """A database of one test's own: its client, and ``start``, which starts its workers."""

    url: str
    client: CancelClient
    start: Callable[[], list[Part]]


def about_orders(control: Control) -> list[dict[str, Any]]:
    """The calls but for those that learn limits and costs, which a worker makes whenever it is time to."""
    return [call for call in control.calls() if call["operation"] not in {"limits", "costs"}]


def serves(control: Control, client: CancelClient, *, within_s: float = PROMPT_S) -> None:
    """A fresh order is settled promptly."""
    order_id = str(uuid.uuid4())
    control.place(order_id)
    asked = time.monotonic()
    assert client.cancel(order_id).result(timeout=PATIENCE_S).outcome == "canceled"
    assert time.monotonic() - asked <= within_s


def wait_idle(client: CancelClient, number: int) -> None:
    """Waits until so many workers of the client's database say that they are idle."""
    server = client._server
    wait_until(lambda: server.hlen("kalshi-cancel:idle") >= number, within_s=PATIENCE_S, what="they are idle")


class Crew:
    """Redis and the sandbox in one folder, with workers that come and go."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.stack = Stack(folder, environment={**ENVIRONMENT, **environment})
        self.stack.start(workers=0)
        self.control = self.stack.control
        self.redis = self.stack.redis
        self.client = CancelClient(self.redis.url, requested_by="test")
        self._databases = itertools.count(1)

    def close(self) -> None:
        """Ends everything."""
        self.redis.part.signal(signal.SIGCONT)
        for worker in self.alive():
            worker.kill()
        self.client.close()
        self.stack.stop()

    def alive(self) -> list[Part]:
        """The workers that run."""
        return [worker for worker in self.stack.workers if worker.process.poll() is None]

    def workers(self, number: int) -> list[Part]:
        """Exactly so many idle, ready workers: the latest stay, what lacks is started."""
        for worker in self.alive()[: -number or None]:
            worker.kill()
        for _ in range(number - len(self.alive())):
            self.stack.spawn_worker()
        crew = self.alive()
        for worker in crew:
            wait_ready(worker)
        return crew

    def place(self, number: int = 1, **fields: object) -> list[str]:
        """The ids of so many resting orders."""
        order_ids = ids(number)
        self.control.place_many([{"order_id": order_id, **fields} for order_id in order_ids])
        return order_ids

    def cancels(self) -> list[dict[str, Any]]:
        """The calls that asked the exchange for cancels, single and batch, in the order of their arrival."""
        return [call for call in self.control.calls() if call["operation"] in {"cancel", "batch"}]

    def sent(self) -> Counter[str]:
        """How often a cancel of each order has reached the exchange."""
        return Counter(order_id for call in self.cancels() for order_id in call["order_ids"])

    def effective(self) -> Counter[str]:
        """How many of the cancels of each order have removed something."""
        return Counter(effect["order_id"] for call in self.cancels() for effect in call["effects"])

    def wait_many_sent(self, number: int) -> None:
        """Waits until so many cancels have reached the exchange, of whatever orders."""
        wait_until(lambda: self.sent().total() >= number, within_s=PATIENCE_S, what=f"{number} cancels sent")

    def wait_sent(self, order_id: str, times: int = 1) -> None:
        """Waits until so many cancels of the order have reached the exchange."""
        wait_until(lambda: self.sent()[order_id] >= times, within_s=PATIENCE_S, what=f"cancel {times} sent")

    def wait_settled(self, order_id: str, client: CancelClient | None = None) -> float:
        """Waits until nothing is open for the order; the monotonic moment."""
        wait_until(
            lambda: (client or self.client).status(order_id).open is None,
            within_s=SETTLED_PATIENCE_S,
            what=f"{order_id} settled",
        )
        return time.monotonic()

    def in_flight(self, order_id: str) -> Part:
        """Asks for a cancel whose call will not be answered soon; the worker that has sent it."""
        self.client.cancel(order_id)
        self.wait_sent(order_id)

        def holder() -> Part | None:
            entry = self.client.status(order_id).open
            assert entry is not None
            assert entry.claimed
            return next((each for each in self.alive() if entry.claimed_by.endswith(f":{each.pid}")), None)

        # Of what came with a wake-up, it is known from the first extension of its lease on.
        held_by: Part = wait_until(holder, within_s=PATIENCE_S, what="its worker is known")
        return held_by

    @contextmanager
    def apart(self, *options: str, workers: int = 1, **environment: str) -> Iterator[Apart]:
        """Workers of one test's own, on a database that no other worker listens to, and their client."""
        url = self.redis.url.removesuffix("/0") + f"/{next(self._databases)}"
        client = CancelClient(url, requested_by="mm")

        def start() -> list[Part]:
            crew = [self.stack.spawn_worker(*options, REDIS_URL=url, **environment) for _ in range(workers)]
            mine.extend(crew)
            for worker in crew:
                wait_ready(worker)
            return crew

        mine: list[Part] = []
        try:
            yield Apart(url, client, start)
        finally:
            client.close()
            for worker in mine:
                worker.kill()

    @contextmanager
    def frozen(self, *parts: Part) -> Iterator[None]:
        """The processes are stopped for the body's time."""
        for part in parts:
            part.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for part in parts:
                part.signal(signal.SIGCONT)

    def leave(self) -> None:
        """For the end of a test: no faults, nothing stopped, and the ends of the logs for a failed one.

        No task may ever have ended with an exception: what goes wrong is waited out or has a result.
        """
        self.redis.part.signal(signal.SIGCONT)
        for worker in self.alive():
            worker.signal(signal.SIGCONT)
            sys.stdout.write(f"--- {worker.log_path.name}\n{worker.log_text()[-LOG_TAIL_CHARS:]}\n")
        if self.stack.exchange.process.poll() is None:
            self.control.reset()
        assert [worker.log_path.name for worker in self.stack.workers if _has_raised(worker)] == []


def _has_raised(worker: Part) -> bool:
    return " raised unexpected" in worker.log_text()
