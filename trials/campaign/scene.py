"""What a fault of the campaign can reach: the running parts, the seed's chance, and the clock.

A scene lasts for one run. Whatever a fault does to a worker is noted as an upset; the moments from which
recovery is to be counted are marks.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import redis

from kalshi_cancel.client import CancelClient
from kalshi_cancel.sandbox.control import Control
from kalshi_cancel.store.scripts import StoreError
from trials.campaign.judge import CANCELS, SETTLED
from trials.campaign.relay import Relay
from trials.campaign.sweeps import Sweep
from trials.stack import Part, Stack, wait_until

# A worker that is asked to end has eight seconds by default; a second for the interpreter's own end.
TERM_WITHIN_S = 9.0
# A mass cancel gives up 60 s beyond its prediction; the faults that play meanwhile are shorter.
REPORT_WITHIN_S = 90.0
SECOND_KEY_ID = "5b0c3f3e-9d6c-4f7e-8f1b-5a1d2e6c7f80"  # made up


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

    def replace_one(self, **environment: str) -> Part:
        """Another worker in the place of one, with an environment of its own; waits until it is ready."""
        self.workers.pop().stop()
        other = self._stack.spawn_worker(**environment)
        self.workers.append(other)
        other.wait_ready(partial(_is_ready, other), "the worker")
        return other

    def dismiss(self) -> None:
        """Ends all of them."""
        for worker in self.workers:
            worker.stop()
        self.workers = []


class Scene:
    """One run in the eyes of its fault; ``name`` begins the ids of all its orders."""

    def __init__(
        self, stack: Stack, crew: Crew, *, name: str, cancels: int, chance: random.Random, load_s: float
    ) -> None:
        self.stack = stack
        self.crew = crew
        self.name = name
        self.cancels = cancels
        self.chance = chance
        self.control = Control(stack.control.url)
        self.redis: redis.Redis = stack.redis.client()
        self.started = time.time()
        self.load_s = load_s
        self.marks: list[float] = []
        self.upsets: list[float] = []
        self.problems: list[str] = []
        self.asked = threading.Event()
        self.sweeps: list[Sweep] = []
        self.relay: Relay | None = None
        self._risk = CancelClient(stack.redis.url, requested_by="risk")
        self._placed = 0
        self._lasting = ExitStack()

    def begin(self) -> None:
        """The run starts now."""
        self.started = time.time()

    def close(self) -> None:
        """Closes its connections."""
        self._lasting.close()
        self._risk.close()
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

    def watch_answers(self) -> None:
        """From now on, whoever is told two different outcomes is a problem."""
        self._lasting.enter_context(self._told_once())

    @contextmanager
    def _told_once(self) -> Iterator[None]:
        told: dict[str, set[str]] = {}
        ended = threading.Event()

        def listen() -> None:
            while not ended.is_set():
                if message := channel.get_message(timeout=0.1):
                    task_id, outcome = _answered(json.loads(message["data"]))
                    if outcome in SETTLED:
                        told.setdefault(task_id, set()).add(outcome)

        with self.stack.redis.client() as server, server.pubsub(ignore_subscribe_messages=True) as channel:
            channel.psubscribe("celery-task-meta-*")
            thread = threading.Thread(target=listen, name="listens for answers")
            thread.start()
            try:
                yield
            finally:
                ended.set()
                thread.join()
        self.problems += [f"{task} was told {sorted(both)}" for task, both in told.items() if len(both) > 1]

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
        with suppress(subprocess.TimeoutExpired):
            victim.process.wait(TERM_WITHIN_S + 1)
        victim.signal(signal.SIGABRT)  # one that hangs writes down where, and ends
        code = victim.stop()
        took_s = time.monotonic() - asked_s
        if code != 0 or took_s > TERM_WITHIN_S:
            self.problems.append(f"SIGTERM: {victim.log_path.name} ended with {code} after {took_s:.1f} s")

    # -- mass cancels

    @property
    def mass_ticker(self) -> str:
        """The market of the orders that mass cancels are about; nobody asks for them one by one."""
        return "KXMASS-26NOV22-A"

    def place_mass(self, number: int) -> list[str]:
        """So many new orders in the market of the mass cancels."""
        order_ids = [f"{self.name}-mass-{self._placed + at:04d}" for at in range(number)]
        self._placed += number
        self.control.place_many(
            [{"order_id": order_id, "ticker": self.mass_ticker} for order_id in order_ids]
        )
        return order_ids

    def sweep(self, *, deadline_s: float = 60.0) -> Sweep:
        """Asks for a mass cancel of that market."""
        pending = self._risk.mass_cancel({"tickers": [self.mass_ticker]}, deadline_s=deadline_s)
        self.sweeps.append(Sweep(pending.request_id, self.mass_ticker))
        return self.sweeps[-1]

    def await_report(self, sweep: Sweep) -> None:
        """Waits for the report, not for ever: a mass cancel without one is judged as stuck."""
        with suppress(TimeoutError):
            wait_until(partial(self.look_at, sweep), within_s=REPORT_WITHIN_S)

    def look_at(self, sweep: Sweep) -> bool:
        """Notes the report that there is at this moment; whether there is one."""
        with suppress(StoreError):
            shown = self._risk.mass_status(sweep.request_id)
            sweep.last = shown if shown and "flat" in shown else None
        sweep.report = sweep.report or sweep.last
        return sweep.report is not None

    def look_at_the_end(self) -> None:
        """Notes what is kept of the mass cancels, and whether the open cancels can be listed."""
        for sweep in self.sweeps:
            self.look_at(sweep)
        try:
            list(self._risk.open_cancels())
        except Exception as error:  # noqa: BLE001 - whatever it is, an operator would see nothing
            self.problems.append(f"the open cancels cannot be listed: {error!r}")

    def until_swept(self, *, within_s: float = 10.0) -> None:
        """Waits until a cancel of an order of the mass cancel has reached the exchange."""
        sign = f"{self.name}-mass-"

        def begun() -> bool:
            calls = (call for each in CANCELS for call in self.control.calls(each))
            return any(order_id.startswith(sign) for call in calls for order_id in call["order_ids"])

        with suppress(TimeoutError):
            wait_until(begun, within_s=within_s)

    # -- one worker among others

    def second_key(self) -> None:
        """One of the workers gets a key of its own."""
        self.control.register_key(SECOND_KEY_ID, self.stack.keys.public_path.read_text())
        self.crew.replace_one(KALSHI_API_KEY_ID=SECOND_KEY_ID)

    def revoke_second_key(self) -> None:
        """The exchange refuses that key from now on."""
        self.control.revoke_key(SECOND_KEY_ID)

    def relayed_worker(self) -> None:
        """One of the workers, the last, reaches Redis by a relay only."""
        self.relay = self._lasting.enter_context(Relay(self.stack.redis.port))
        self.crew.replace_one(REDIS_URL=f"redis://127.0.0.1:{self.relay.port}/0")

    # -- Redis

    def age_entries(self, share: float) -> None:
        """Gives a share of the open entries fields as a newer version may have stored them."""
        for key in self.redis.scan_iter("kalshi-cancel:pending:*", count=1000):
            if self.chance.random() >= share:
                continue
            for field in ("request", "progress"):
                text = self.redis.hget(key, field)
                if text:
                    newer = json.dumps(_from_a_newer_version(json.loads(text)))
                    self.redis.eval(_SET_IF_SAME, 1, key, field, text, newer)

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


def _answered(said: dict[str, Any]) -> tuple[str, str]:
    """Which task was answered, and with which outcome (empty: with something else)."""
    result = said["result"]
    return said["task_id"], str(result.get("outcome", "")) if isinstance(result, dict) else ""


# An entry that is settled meanwhile must not come back as a stump.
_SET_IF_SAME = """
if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then
  return redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
end
"""


def _from_a_newer_version(value: Any) -> Any:
    """The same JSON with a field more in each of its objects."""
    if isinstance(value, dict):
        return {name: _from_a_newer_version(each) for name, each in value.items()} | {"of_a_newer_version": 1}
    return [_from_a_newer_version(each) for each in value] if isinstance(value, list) else value


def _is_ready(worker: Part) -> bool:
    return " ready." in worker.log_text()
