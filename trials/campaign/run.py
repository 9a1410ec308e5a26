"""Plays runs of the fault campaign on one stack: producers ask, a fault plays, and everything is observed."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kalshi_cancel.model.results import CancelResult
from kalshi_cancel.store import results
from trials.campaign.judge import SETTLED, Evidence, Finding, judge, taken
from trials.campaign.kinds import KINDS, Kind
from trials.campaign.plan import PRODUCERS, Plan, draw
from trials.campaign.producers import EXPIRED, Producers, meddle, play_meddling
from trials.campaign.scene import Crew, Scene
from trials.campaign.sweeps import judge_sweep
from trials.stack import RedisServer, Stack

WORKERS = 2
# Producers ask for this long; at 500 cancels, faster than two cores cancel them, so that a queue builds up.
LOAD_S = 1.5
# With "everysec", Redis acknowledges before it has written, for up to two seconds while the disk is busy: a
# SIGKILL then loses what it said was accepted.
FSYNC = "always"
# After the fault's end everything that was accepted must settle within this; the longest pause is 30 s.
SETTLE_WITHIN_S = 60.0
LOOK_EVERY_S = 0.025
LOOK_WITHIN_S = 0.3
READ_LAG_S = 0.5  # what the workers expect of the exchange; it lags less
SANDBOX_READ_LAG_S = 0.3
# Of each call, as over a good line; without it hardly anything is under way when a blow falls.
SANDBOX_LATENCY_S = 0.02
READ_TIMEOUT_S = 1.0
CALL_DEADLINE_S = 1.5

# Hanging replies must not make the campaign long: the workers give up on a call sooner than by default.
ENVIRONMENT = {
    "KALSHI_READ_LAG_S": str(READ_LAG_S),
    "KALSHI_READ_TIMEOUT_S": str(READ_TIMEOUT_S),
    "KALSHI_CALL_DEADLINE_S": str(CALL_DEADLINE_S),
    "PYTHONFAULTHANDLER": "1",  # SIGABRT has a worker write down what each of its threads does
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
        load_s = cancels / kind.per_s if kind.per_s else LOAD_S
        plan = draw(
            name,
            seed,
            cancels=cancels,
            load_s=load_s,
            raw=kind.raw,
            raw_only=kind.raw_only,
            mix=kind.mix,
        )
        self._arrange(plan, seed)
        chance = random.Random(f"{name}/{seed}/play")
        scene = Scene(
            self.stack, self.crew, name=f"{name}-{seed}", cancels=cancels, chance=chance, load_s=load_s
        )
        try:
            kind.prepare(scene)
            scene.begin()
            producers, evidence = self._play(kind, plan, scene, settle_s)
        finally:
            scene.close()
        finding = judge(name, seed, evidence)
        for sweep in scene.sweeps:
            judge_sweep(finding, sweep, evidence.truth, evidence.calls, read_lag_s=SANDBOX_READ_LAG_S)
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
        control.configure(seed=seed, read_lag_s=SANDBOX_READ_LAG_S, latency_s=SANDBOX_LATENCY_S)
        control.place_many(plan.placed)
        for each in plan.earlier:
            meddle(control, each.order_id, each.deed, ago_s=-each.at_s)

    def _play(self, kind: Kind, plan: Plan, scene: Scene, settle_s: float) -> tuple[Producers, Evidence]:
        producers = Producers(self.stack.redis.url, plan, started=scene.started)
        with (
            _Observer(self.stack, list(producers.promises)) as observer,
            ThreadPoolExecutor(2 * PRODUCERS + 2) as pool,
        ):
            asking = [pool.submit(producers.ask, number) for number in range(PRODUCERS)]
            waiting = [pool.submit(producers.wait, number) for number in range(PRODUCERS)]
            meddling = pool.submit(play_meddling, self.stack.control.url, plan.meddling, scene.started)
            over = pool.submit(_set_when_done, scene.asked, asking)
            try:
                try:
                    kind.play(scene)
                finally:
                    producers.patience.set()
                    for each in (*asking, meddling, over):
                        each.result()
                evidence = self._wait_until_settled(producers, observer, scene, settle_s)
            finally:
                producers.over.set()
                for each in waiting:
                    each.result()
        with self.stack.redis.client() as server:
            evidence.answers, unanswered = producers.answers(server)
        evidence.unanswered = {*unanswered, *producers.unanswered()}
        expired = {each.order_id for each in plan.earlier if each.deed == "expire"}
        evidence.shown_as = dict.fromkeys(expired, EXPIRED)
        return producers, evidence

    def _wait_until_settled(
        self, producers: Producers, observer: _Observer, scene: Scene, settle_s: float
    ) -> Evidence:
        """The evidence once all is settled, or once time is over."""
        give_up = time.monotonic() + settle_s
        with self.stack.redis.client() as server:
            while True:
                over = time.monotonic() > give_up
                try:
                    # In this order: what settles in between is seen at least once.
                    open_ids = _entries(server)
                    found = results.read(server, list(producers.promises))
                except redis.RedisError:
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
                if over or (_all_settled(evidence) and not _left(open_ids, scene)):
                    break
                time.sleep(2 * LOOK_EVERY_S)
        scene.look_at_the_end()
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


def _entries(server: redis.Redis) -> set[str]:
    """The orders that have an entry, read past the service's own code: that may be what fails."""
    sign = "kalshi-cancel:pending:"
    return {str(key).removeprefix(sign) for key in server.scan_iter(f"{sign}*", count=1000)}


def _left(open_ids: Collection[str], scene: Scene) -> bool:
    """Whether orders of mass cancels are worked on still."""
    return any(order_id.startswith(f"{scene.name}-mass-") for order_id in open_ids)


def _set_when_done(event: threading.Event, futures: Sequence[Future[None]]) -> None:
    try:
        for future in futures:
            future.result()
    finally:
        event.set()


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
                    found = results.read(server, list(self._missing))
                except redis.RedisError:
                    continue  # a fault is playing
                self._note(found)

    def _note(self, found: dict[str, CancelResult]) -> None:
        for order_id, record in found.items():
            if record.outcome in SETTLED:
                self.seen_at[order_id] = time.time()
                del self._missing[order_id]
