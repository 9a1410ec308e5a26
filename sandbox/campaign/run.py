"""Plays runs of the fault campaign on one stack: producers ask, a fault plays, and everything is observed."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Self

import redis
from celery import Celery
from redis.backoff import NoBackoff
from redis.retry import Retry

from sandbox.campaign.judge import SETTLED, Evidence, Finding, Promise, judge, taken
from sandbox.campaign.kinds import KINDS, Kind
from sandbox.campaign.plan import PRODUCERS, Ask, Meddling, Plan, draw
from sandbox.campaign.scene import Crew, Scene
from sandbox.control import Control, ControlError
from sandbox.stack import RedisServer, Stack
from worker import records
from worker.client import BookError, CancelClient
from worker.orders import CancelResult

WORKERS = 2
# Producers ask for this long; at 500 cancels, faster than two cores cancel them, so that a queue builds up.
LOAD_S = 1.5
# With "everysec", Redis acknowledges before it has written, for up to two seconds while the disk is busy: a
# SIGKILL then loses what it said was accepted.
FSYNC = "always"
# After the fault's end everything that was accepted must settle within this; the longest pause is 30 s.
SETTLE_WITHIN_S = 60.0
PRODUCER_WITHIN_S = 2.0
LOOK_EVERY_S = 0.025
LOOK_WITHIN_S = 0.3
ASK_AGAIN_AFTER_S = 0.1
READ_LAG_S = 0.5  # what the workers expect of the exchange; it lags less
SANDBOX_READ_LAG_S = 0.3
# Of each call, as over a good line; without it hardly anything is under way when a blow falls.
SANDBOX_LATENCY_S = 0.02
READ_TIMEOUT_S = 1.0
CALL_DEADLINE_S = 1.5
LONG_AGO_S = -60.0

# Hanging replies must not make the campaign long: the workers give up on a call sooner than by default.
ENVIRONMENT = {
    "KALSHI_READ_LAG_S": str(READ_LAG_S),
    "KALSHI_READ_TIMEOUT_S": str(READ_TIMEOUT_S),
    "KALSHI_CALL_DEADLINE_S": str(CALL_DEADLINE_S),
}


class Campaign:
    """One stack on which any number of runs are played, one after the other."""

    def __init__(self, folder: Path, *, workers: int = WORKERS, fsync: str = FSYNC) -> None:
        self.stack = Stack(folder, environment=ENVIRONMENT)
        self.stack.redis = RedisServer(folder / "redis", options=["--appendfsync", fsync])
        self.crew = Crew(self.stack, workers)

    def __enter__(self) -> Self:
        try:
            self.stack.start(workers=0)
            self.crew.make_ready()
        except BaseException:
            self.stack.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.stop()

    def run(
        self,
        name: str,
        seed: int,
        *,
        cancels: int,
        kind: Kind | None = None,
        settle_s: float = SETTLE_WITHIN_S,
    ) -> Finding:
        """Plays one run and judges it; ``kind`` when it is none of the table."""
        kind = kind or KINDS[name]
        started = time.monotonic()
        plan = draw(name, seed, cancels=cancels, load_s=LOAD_S, raw=kind.raw)
        self._arrange(plan, seed)
        scene = Scene(self.stack, self.crew, chance=random.Random(f"{name}/{seed}/play"), load_s=LOAD_S)
        try:
            producers, evidence = self._play(kind, plan, scene, settle_s)
        finally:
            scene.close()
        finding = judge(name, seed, evidence)
        finding.problems += [*producers.problems, *scene.problems]
        finding.slowest_producer_s = producers.slowest_s
        finding.took_s = time.monotonic() - started
        self.stack.control.clear_faults()
        if kind.fresh:
            self.crew.dismiss()
            self.stack.control.reset()
        self.crew.make_ready()
        return finding

    def _arrange(self, plan: Plan, seed: int) -> None:
        control = self.stack.control
        control.reset()
        # What ended before the run must have ended clearly before: nobody else can tell whose cancel it was.
        # The workers sleep meanwhile, because they would notice.
        for worker in self.crew.workers:
            worker.signal(signal.SIGSTOP)
        control.configure(skew_s=LONG_AGO_S)
        control.place_many(plan.placed_before)
        control.configure(skew_s=0.0, seed=seed, read_lag_s=SANDBOX_READ_LAG_S, latency_s=SANDBOX_LATENCY_S)
        for worker in self.crew.workers:
            worker.signal(signal.SIGCONT)
        control.place_many(plan.placed)

    def _play(self, kind: Kind, plan: Plan, scene: Scene, settle_s: float) -> tuple[_Producers, Evidence]:
        producers = _Producers(self.stack.redis.url, plan, started=scene.started)
        with _Observer(self.stack, list(producers.promises)) as observer, ThreadPoolExecutor() as pool:
            asking = [pool.submit(producers.ask, number) for number in range(PRODUCERS)]
            meddling = pool.submit(_meddle, self.stack.control.url, plan.meddling, scene.started)
            over = pool.submit(_set_when_done, scene.asked, asking)
            try:
                kind.play(scene)
            finally:
                producers.patience.set()
                for each in (*asking, meddling, over):
                    each.result()
            evidence = self._wait_until_settled(producers, observer, scene, settle_s)
        evidence.contested = {each.order_id for each in plan.meddling if each.deed == "cancel"}
        return producers, evidence

    def _wait_until_settled(
        self, producers: _Producers, observer: _Observer, scene: Scene, settle_s: float
    ) -> Evidence:
        """The evidence once all is settled, or once time is over."""
        give_up = time.monotonic() + settle_s
        with closing(CancelClient(self.stack.redis.url)) as client, self.stack.redis.client() as server:
            while True:
                over = time.monotonic() > give_up
                try:
                    # In this order: what settles in between is seen at least once.
                    open_ids = {each.order_id for each in client.open_cancels()}
                    found = records.read(server, list(producers.promises))
                except (BookError, redis.RedisError):
                    if over:
                        raise
                    continue  # a stalled disk makes Redis silent for a moment
                evidence = Evidence(
                    promises=producers.promises,
                    open_ids=open_ids,
                    records=found,
                    seen_at=dict(observer.seen_at),
                    truth={},
                    calls=[],
                    marks=scene.marks,
                    upsets=scene.upsets,
                    call_limit_s=READ_TIMEOUT_S,
                )
                if over or _all_settled(evidence):
                    break
                time.sleep(2 * LOOK_EVERY_S)
        control = self.stack.control
        evidence.truth = {order["order_id"]: order for order in control.orders()}
        evidence.calls = control.calls()
        return evidence


def _all_settled(evidence: Evidence) -> bool:
    settled = (order_id for order_id, record in evidence.records.items() if record.outcome in SETTLED)
    missing = set(evidence.promises).difference(settled)
    return not (
        any(taken(order_id, evidence) for order_id in missing)
        or set(evidence.open_ids) & set(evidence.promises)
        or set(evidence.records).difference(evidence.seen_at)
    )


def _set_when_done(event: threading.Event, futures: Sequence[Future[None]]) -> None:
    try:
        for future in futures:
            future.result()
    finally:
        event.set()


def _meddle(url: str, meddling: Sequence[Meddling], started: float) -> None:
    """Fills and cancels orders as others would; what is no longer resting is left alone."""
    with Control(url) as control:
        for each in sorted(meddling, key=lambda each: each.at_s):
            time.sleep(max(0.0, started + each.at_s - time.time()))
            try:
                if each.deed == "cancel":
                    control.cancel_elsewhere(each.order_id)
                else:
                    control.fill(each.order_id, "4.00" if each.deed == "fill_some" else None)
            except ControlError:
                continue  # our cancel was there first


class _Producers:
    """The producers of one run: what they ask, and what they were told."""

    def __init__(self, redis_url: str, plan: Plan, *, started: float) -> None:
        self._redis_url = redis_url
        self._plan = plan
        self._started = started
        self._lock = threading.Lock()
        # Set when the fault is over: from then on nobody asks again for what was not accepted.
        self.patience = threading.Event()
        self.promises = {str(order["order_id"]): Promise() for ask in plan.asks for order in ask.orders}
        self.problems: list[str] = []
        self.slowest_s = 0.0

    def ask(self, number: int) -> None:
        """Asks for what this producer has to ask for, in time, again when it was not accepted."""
        with (
            closing(CancelClient(self._redis_url, requested_by=f"producer-{number}")) as client,
            Celery(broker=self._redis_url, set_as_current=False) as celery,
        ):
            for ask in self._plan.asks:
                if ask.producer == number:
                    time.sleep(max(0.0, self._started + ask.at_s - time.time()))
                    call = _raw(celery, ask) if ask.raw else _by_client(client, ask)
                    while not self._is_answered(ask, call) and not ask.once and not self.patience.is_set():
                        time.sleep(ASK_AGAIN_AFTER_S)

    def _is_answered(self, ask: Ask, call: Callable[[], object]) -> bool:
        """Asks once; False when it is worth asking again."""
        promises = [self.promises[str(order["order_id"])] for order in ask.orders]
        asked = time.monotonic()
        error: BookError | None = None
        try:
            call()
        except BookError as refusal:
            error = refusal
        except Exception as unexpected:  # noqa: BLE001 - producers are promised BookError and nothing else
            self.problems.append(f"a producer got {unexpected!r}")
            return True
        took_s = time.monotonic() - asked
        with self._lock:
            self.slowest_s = max(self.slowest_s, took_s)
            for promise in promises:
                if error is None:
                    promise.accepted_at = promise.accepted_at or time.time()
                elif error.may_be_accepted:
                    promise.maybe = True
                else:
                    promise.refused = True
        if took_s > PRODUCER_WITHIN_S and not ask.raw:
            self.problems.append(f"a producer waited {took_s:.2f} s ({'error' if error else 'accepted'})")
        return error is None


def _by_client(client: CancelClient, ask: Ask) -> Callable[[], object]:
    if len(ask.orders) == 1:
        return lambda: client.cancel(**ask.orders[0], lane=ask.lane)
    return lambda: client.cancel_many(ask.orders, lane=ask.lane)


def _raw(celery: Celery, ask: Ask) -> Callable[[], object]:
    [order] = ask.orders
    return lambda: celery.send_task("cancel_order", kwargs=dict(order), queue=ask.lane.queue)


class _Observer:
    """Sees when each order's settled record appears, also while Redis comes and goes."""

    def __init__(self, stack: Stack, order_ids: Sequence[str]) -> None:
        self._stack = stack
        self._missing = dict.fromkeys(order_ids)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="observer")
        self.seen_at: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        server = redis.Redis(
            port=self._stack.redis.port,
            decode_responses=True,
            socket_timeout=LOOK_WITHIN_S,
            retry=Retry(NoBackoff(), 0),
        )
        with server:
            while not self._ended.wait(LOOK_EVERY_S):
                try:
                    found = records.read(server, list(self._missing))
                except redis.RedisError:
                    continue  # a fault is playing
                self._note(found)

    def _note(self, found: dict[str, CancelResult]) -> None:
        for order_id, record in found.items():
            if record.outcome in SETTLED:
                self.seen_at[order_id] = time.time()
                del self._missing[order_id]
