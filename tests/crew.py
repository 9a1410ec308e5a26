"""A stack whose parts a test may kill: Redis, the sandbox and as many workers as the test asks for."""

from __future__ import annotations

import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox.stack import Part, Stack, wait_until
from worker.client import CancelClient

PATIENCE_S = 30.0
READ_LAG_S = "0.5"  # how long the workers here expect reads to lag; the sandbox does not lag
LOG_TAIL_CHARS = 5_000


def ids(number: int) -> list[str]:
    """So many order ids that nobody has used."""
    return [str(uuid.uuid4()) for _ in range(number)]


def is_idle(worker: Part) -> bool:
    """Whether the worker has finished every message that it has received."""
    log = worker.log_text()
    return log.count(" received") == sum(log.count(end) for end in _ENDS_OF_A_MESSAGE)


_ENDS_OF_A_MESSAGE = (" ignored", " succeeded in ", " rejected")


class Crew:
    """Redis and the sandbox in one folder, with workers that come and go."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.stack = Stack(folder, environment={"KALSHI_READ_LAG_S": READ_LAG_S, **environment})
        self.stack.start(workers=0)
        self.control = self.stack.control
        self.redis = self.stack.redis
        self.client = CancelClient(self.redis.url, requested_by="test")

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
            worker.wait_ready(lambda worker=worker: " ready." in worker.log_text(), "the worker")
        return crew

    def place(self, number: int = 1, **fields: object) -> list[str]:
        """The ids of so many resting orders."""
        order_ids = ids(number)
        self.control.place_many([{"order_id": order_id, **fields} for order_id in order_ids])
        return order_ids

    def cancels(self, *order_ids: str) -> list[dict[str, object]]:
        """The cancels that reached the exchange, of these orders or of all, in the order of their arrival."""
        calls = self.control.calls(operation="cancel")
        return [call for call in calls if not order_ids or set(call["order_ids"]) & set(order_ids)]

    def wait_sent(self, order_id: str, times: int = 1) -> None:
        """Waits until so many cancels of the order have reached the exchange."""
        wait_until(
            lambda: len(self.cancels(order_id)) >= times, within_s=PATIENCE_S, what=f"cancel {times} sent"
        )

    def wait_settled(self, order_id: str) -> float:
        """Waits until nothing is open for the order; the monotonic moment."""
        wait_until(
            lambda: self.client.status(order_id).open is None,
            within_s=PATIENCE_S,
            what=f"{order_id} settled",
        )
        return time.monotonic()

    def in_flight(self, order_id: str) -> Part:
        """Asks for a cancel whose call will not be answered soon; the worker that has sent it."""
        wait_until(
            lambda: all(map(is_idle, self.alive())), within_s=PATIENCE_S, what="every hand without work"
        )
        before = {worker: worker.log_text().count(" received") for worker in self.alive()}
        self.client.cancel(order_id)
        self.wait_sent(order_id)
        [worker] = [each for each, seen in before.items() if each.log_text().count(" received") > seen]
        return worker

    def log(self) -> str:
        """What all workers have printed."""
        return "\n".join(worker.log_text() for worker in self.stack.workers)

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
        """For the end of a test: no faults, nothing stopped, and the ends of the logs for a failed one."""
        self.redis.part.signal(signal.SIGCONT)
        for worker in self.alive():
            worker.signal(signal.SIGCONT)
            print(f"--- {worker.log_path.name}\n{worker.log_text()[-LOG_TAIL_CHARS:]}")
        if self.stack.exchange.process.poll() is None:
            self.control.reset()
