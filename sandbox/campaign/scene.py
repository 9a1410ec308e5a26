"""What a fault of the campaign can lay its hands on: the running parts, the seed's chance, and the clock.

A scene lasts for one run. Whatever a fault does to a worker is noted as an upset; the moments from which
recovery is to be counted are marks.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import redis

from sandbox.campaign.judge import CANCELS
from sandbox.control import Control
from sandbox.stack import Part, Stack, wait_until

# A worker that is asked to end has eight seconds by default; a second for the interpreter's own end.
TERM_WITHIN_S = 9.0


class Crew:
    """The workers of a campaign: a fixed number, each replaced when it is gone."""

    def __init__(self, stack: Stack, number: int) -> None:
        self._stack = stack
        self._number = number
        self.workers: list[Part] = []

    def fill_up(self) -> None:
        """Starts what is missing, without waiting."""
        self.workers = [worker for worker in self.workers if worker.process.poll() is None]
        self.workers += [self._stack.spawn_worker() for _ in range(self._number - len(self.workers))]

    def make_ready(self) -> None:
        """Starts what is missing and waits until all take messages."""
        self.fill_up()
        for worker in self.workers:
            worker.wait_ready(partial(_is_ready, worker), "the worker")

    def dismiss(self) -> None:
        """Ends all of them."""
        for worker in self.workers:
            worker.stop()
        self.workers = []


class Scene:
    """One run in the eyes of its fault."""

    def __init__(self, stack: Stack, crew: Crew, *, chance: random.Random, load_s: float) -> None:
        self.stack = stack
        self.crew = crew
        self.chance = chance
        self.control = Control(stack.control.url)
        self.redis: redis.Redis = stack.redis.client()
        self.started = time.time()
        self.load_s = load_s
        self.marks: list[float] = []
        self.upsets: list[float] = []
        self.problems: list[str] = []
        self.asked = threading.Event()

    def close(self) -> None:
        """Closes its connections."""
        self.control.close()
        self.redis.close()

    def mark(self) -> None:
        """Recovery counts from now."""
        self.marks.append(time.time())

    def until(self, share: float) -> None:
        """Waits until a share of the time of asking is over."""
        time.sleep(max(0.0, self.started + share * self.load_s - time.time()))

    def until_all_asked(self) -> None:
        """Waits until the producers have nothing left to ask."""
        self.asked.wait()

    def pause(self, low_s: float, high_s: float) -> None:
        """Lets a drawn time pass."""
        time.sleep(self.chance.uniform(low_s, high_s))

    # -- workers

    def any_worker(self) -> Part:
        """One of the running workers, drawn."""
        return self.chance.choice(self.crew.workers)

    def kill(self, victims: Sequence[Part]) -> None:
        """SIGKILL to all of them at once, and new ones in their place."""
        self.upsets.append(time.time())
        for victim in victims:
            os.kill(victim.pid, signal.SIGKILL)
        self.mark()
        for victim in victims:
            victim.process.wait()
        self.crew.fill_up()

    def freeze(self, victim: Part, low_s: float, high_s: float) -> None:
        """SIGSTOP, a drawn time, SIGCONT."""
        self.upsets.append(time.time())
        victim.signal(signal.SIGSTOP)
        self.pause(low_s, high_s)
        self.upsets.append(time.time())
        victim.signal(signal.SIGCONT)

    def replace(self, victim: Part) -> None:
        """SIGTERM, with a new worker started at the same time; notes an end that is late or not 0."""
        asked_s = time.monotonic()
        self.mark()
        victim.signal(signal.SIGTERM)
        self.crew.workers.remove(victim)
        self.crew.fill_up()
        code = victim.stop(within_s=2 * TERM_WITHIN_S)
        took_s = time.monotonic() - asked_s
        if code != 0 or took_s > TERM_WITHIN_S:
            self.problems.append(f"SIGTERM: {victim.log_path.name} ended with {code} after {took_s:.1f} s")

    # -- Redis

    def restart_redis(self, low_s: float, high_s: float) -> None:
        """SIGKILL to Redis, a drawn time, and a new start with what it had on disk."""
        self.stack.redis.kill()
        self.pause(low_s, high_s)
        self.stack.redis.start()
        self.mark()

    def freeze_part(self, part: Part, low_s: float, high_s: float) -> None:
        """SIGSTOP to Redis or the exchange, a drawn time, SIGCONT."""
        part.signal(signal.SIGSTOP)
        self.pause(low_s, high_s)
        part.signal(signal.SIGCONT)
        self.mark()

    @contextmanager
    def watching(self) -> Iterator[Callable[[str], None]]:
        """Gives a function that returns as soon as Redis serves a command that contains a text (MONITOR)."""
        client = self.stack.redis.client()
        with client, client.monitor() as monitor:
            commands: Iterator[dict[str, Any]] = monitor.listen()

            def until(text: str) -> None:
                for command in commands:
                    if text in command["command"]:
                        return

            yield until

    # -- the exchange

    def fault(self, kind: str, **fields: Any) -> None:
        """Arms a fault of the sandbox."""
        self.control.fault(kind, **fields)

    def clear_faults(self) -> None:
        """Ends all faults of the sandbox."""
        self.control.clear_faults()
        self.mark()

    def until_slow_call(self, *, within_s: float = 5.0) -> None:
        """Waits until a cancel has been under way for 50 ms; not for ever, a drawn fault need not strike."""

        def under_way() -> bool:
            before_ms = time.time() * 1000 - 50
            return any(
                call["operation"] in CANCELS
                and call["duration_ms"] is None
                and call["received_ms"] < before_ms
                for call in self.control.calls()
            )

        with suppress(TimeoutError):
            wait_until(under_way, within_s=within_s)


def _is_ready(worker: Part) -> bool:
    return " ready." in worker.log_text()
