"""Runs the jobs that a process does beside its work, each guarded by itself.

A round of a job may fail: that is logged, counted and shown, and the next round comes all the same. A thread
may die or hang: then another takes its place. No job keeps another from running, but for a short step: jobs
that are started to be done in turn share a thread, and each round of theirs is a step or two in Redis.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from kalshi_cancel.store.scripts import StoreError, say_failed
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import Seldom, say
from worker.dispatch.events import Emit, ServiceFailed, ServiceMoved, ServiceRestarted, nobody

log = logging.getLogger(__name__)

CHECK_EVERY_S = 1.0
# Until a round that went wrong is tried again: soon enough for what others wait for, and no flood of errors.
AGAIN_S = 1.0
# Longer than a round of any job may take: a few calls to the exchange, or to a Redis that does not answer.
HANGS_AFTER_S = 60.0
# What one thread does in turn is done together if it is due within this: each time it wakes up costs.
TOGETHER_S = 0.05


class Service:
    """A job that is done again and again.

    ``run`` does one round; it may answer after how many seconds the next is due, else that is ``every_s``.
    A round that has made no progress for ``hangs_after_s`` hangs: one that takes longer calls :meth:`beat`.
    None: its only round lasts until the end.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[], float | None],
        *,
        every_s: float = 0.0,
        hangs_after_s: float | None = HANGS_AFTER_S,
    ) -> None:
        self.name = name
        self.run = run
        self.every_s = every_s
        self.hangs_after_s = hangs_after_s
        self.is_wanted = False
        self.woken = threading.Event()  # of the thread that does it
        self._beat_at = time.monotonic()

    def wake(self) -> None:
        """Has the next round begin at once."""
        self.is_wanted = True
        self.woken.set()

    def beat(self) -> None:
        """Says that a round makes progress."""
        self._beat_at = time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds since it last made progress."""
        return time.monotonic() - self._beat_at


@dataclass(frozen=True, slots=True)
class ServiceState:
    """How a service is: ``failure`` is empty while all is well; ``good_s`` ago its last good round ended."""

    name: str
    failure: str
    good_s: float | None


class Services:
    """The services of one process, in one list; ``check`` replaces threads that died or hang."""

    def __init__(self, emit: Emit = nobody) -> None:
        self._emit = emit
        self._lock = threading.Lock()
        self._threads: list[_Thread] = []
        self._shared: _Thread | None = None
        self._watcher: threading.Thread | None = None
        self._stopping = threading.Event()
        self._redis_away = Seldom()

    def start(self, *services: Service, in_turn: bool = False) -> None:
        """Starts services, each in its own thread or all ``in_turn`` ones in one, and the watch over them."""
        with self._lock:
            for service in services:
                self._emit(ServiceMoved(service.name, well=True))
                if in_turn and self._shared is not None:
                    self._shared.add(service)
                    continue
                self._threads.append(thread := _Thread(service))
                self._begin(thread)
                if in_turn:
                    self._shared = thread
        self.check()

    def wake(self, name: str) -> None:
        """Has the next round of this one begin at once, if it is started."""
        for job in self._jobs():
            if job.service.name == name:
                job.service.wake()

    def stop(self, *, but: Collection[str] = ()) -> None:
        """Has each end after the round that it is in, those named excepted."""
        self._stopping.set()
        for job in self._jobs():
            if job.service.name not in but:
                job.stopping = True
                job.service.wake()

    def join(self, names: Collection[str], within_s: float) -> None:
        """Waits until these have ended."""
        give_up = time.monotonic() + within_s
        for thread in list(self._threads):
            running = thread.running
            if running is not None and any(job.service.name in names for job in thread.jobs):
                running.join(max(give_up - time.monotonic(), 0.0))

    def state(self) -> list[ServiceState]:
        """How each is."""
        now = time.monotonic()
        return [
            ServiceState(
                job.service.name,
                _why_not_well(thread, job),
                None if job.good_at is None else now - job.good_at,
            )
            for thread in list(self._threads)
            for job in thread.jobs
        ]

    def check(self) -> None:
        """Replaces each thread that has died or hangs, and the watcher's own."""
        with self._lock:
            if self._stopping.is_set():
                return
            if self._watcher is None or not self._watcher.is_alive():
                watcher = threading.Thread(target=self._watch, name="services", daemon=True)
                if _started(watcher):
                    self._watcher = watcher
            for thread in self._threads:
                for job in thread.jobs:
                    if failure := _ended(thread, job) or _hung(job):
                        self._replace(thread, job, failure)
                        break

    def _jobs(self) -> list[_Job]:
        return [job for thread in list(self._threads) for job in thread.jobs]

    def _watch(self) -> None:
        while not self._stopping.wait(CHECK_EVERY_S):
            try:
                self.check()
            except Exception as error:  # noqa: BLE001 - checked again in a second
                say(log, LogEvent.INTERNAL_ERROR, error=error, doing="check background jobs")

    def _replace(self, thread: _Thread, found: _Job, failure: str) -> None:
        """Has another thread do what this one did; the job that it was at when it ended is to blame."""
        job = next((job for job in thread.jobs if job.busy), found)
        job.failure = failure
        self._emit(ServiceRestarted(job.service.name, failure))
        self._begin(thread)
        # Where a round has no end, none can be good.
        is_well = job.service.hangs_after_s is None and thread.running is not None
        if is_well:
            job.failure = ""
        self._emit(ServiceMoved(job.service.name, well=is_well))

    def _begin(self, thread: _Thread) -> None:
        # What hangs may go on one day: by then it is not the one that counts, and ends.
        thread.generation += 1
        for job in thread.jobs:
            job.busy = False
            job.service.beat()
        running = threading.Thread(
            target=self._repeat, args=(thread, thread.generation), name=thread.name, daemon=True
        )
        thread.running = running if _started(running) else None

    def _repeat(self, thread: _Thread, generation: int) -> None:
        while True:
            now = time.monotonic()
            for job in thread.due(now):
                pause_s = self._round(thread, job, generation)
                if thread.generation != generation:
                    return
                job.due_at = time.monotonic() + pause_s
            if all(job.stopping for job in thread.jobs):
                return
            thread.wait()

    def _round(self, thread: _Thread, job: _Job, generation: int) -> float:
        """Does one round; how long until the next."""
        service = job.service
        service.beat()
        job.busy = True
        try:
            pause_s = service.run()
        except StoreError as error:
            if not error.can_pass:
                self._failed(job, error)
            else:
                say_failed(log, error, "run background jobs", seldom=self._redis_away)
            return AGAIN_S
        except Exception as error:  # noqa: BLE001 - a defect of ours must not end what others rely on
            self._failed(job, error)
            return AGAIN_S
        finally:
            if thread.generation == generation:
                job.busy = False
        if thread.generation != generation:  # it hung, and another is at it
            return 0.0
        job.good_at = time.monotonic()
        if job.failure:
            job.failure = ""
            self._emit(ServiceMoved(service.name, well=True))
        return service.every_s if pause_s is None else pause_s

    def _failed(self, job: _Job, error: Exception) -> None:
        # Where Redis refuses something its words say it all; else the traceback does.
        refused = isinstance(error, StoreError)
        words = str(error) if refused else repr(error)
        job.failure = f"failed: {words}"
        self._emit(ServiceFailed(job.service.name, words, None if refused else error))
        self._emit(ServiceMoved(job.service.name, well=False))


class _Job:
    """A service, when its next round is due (monotonic), and how its last ones were."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.due_at = -math.inf
        self.busy = False
        self.good_at: float | None = None
        self.failure = ""
        self.stopping = False


class _Thread:
    """What does some jobs in turn; only the latest ``generation`` of its threads counts."""

    def __init__(self, service: Service) -> None:
        self.name = service.name
        self.jobs: tuple[_Job, ...] = ()
        self.running: threading.Thread | None = None
        self.generation = 0
        self._woken = threading.Event()
        self.add(service)

    def add(self, service: Service) -> None:
        """Has one more done in turn, from now on."""
        service.woken = self._woken
        self.jobs = (*self.jobs, _Job(service))
        self._woken.set()

    def due(self, now: float) -> Iterator[_Job]:
        """The jobs that are to have a round at this moment."""
        for job in self.jobs:
            wanted, job.service.is_wanted = job.service.is_wanted, False
            if not job.stopping and (wanted or job.due_at <= now + TOGETHER_S * (len(self.jobs) > 1)):
                yield job

    def wait(self) -> None:
        """Until the next job is due, or one is woken."""
        next_at = min(job.due_at for job in self.jobs if not job.stopping)
        self._woken.wait(max(next_at - time.monotonic(), 0.0))
        self._woken.clear()


def _why_not_well(thread: _Thread, job: _Job) -> str:
    if job.stopping:
        return ""
    return _ended(thread, job) or _hung(job) or job.failure


def _ended(thread: _Thread, job: _Job) -> str:
    is_there = job.stopping or (thread.running is not None and thread.running.is_alive())
    return "" if is_there else "has died"


def _hung(job: _Job) -> str:
    most_s = job.service.hangs_after_s
    if job.stopping or not job.busy or most_s is None or job.service.silent_s < most_s:
        return ""
    return f"has hung for {job.service.silent_s:.0f} s"


def _started(thread: threading.Thread) -> bool:
    try:
        thread.start()
    except RuntimeError:  # the system gives no more threads: tried again with the next check
        return False
    return True
