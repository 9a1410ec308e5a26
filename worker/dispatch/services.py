"""Runs the jobs that a process does beside its work, each in a thread of its own and guarded by itself.

A round of a job may fail: that is logged, counted and shown, and the next round comes all the same. A thread
may die or hang: then another takes its place. No job keeps another from running.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
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
        self._woken = threading.Event()
        self._beat_at = time.monotonic()

    def wake(self) -> None:
        """Has the next round begin at once."""
        self._woken.set()

    def beat(self) -> None:
        """Says that a round makes progress."""
        self._beat_at = time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds since it last made progress."""
        return time.monotonic() - self._beat_at

    def wait(self, seconds: float) -> None:
        """Waits for the next round; at least until :meth:`wake`."""
        self._woken.wait(seconds)
        self._woken.clear()


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
        self._jobs: list[_Job] = []
        self._watcher: threading.Thread | None = None
        self._stopping = threading.Event()
        self._redis_away = Seldom()

    def start(self, *services: Service) -> None:
        """Starts services, and the watch over them."""
        with self._lock:
            for service in services:
                self._jobs.append(job := _Job(service))
                self._emit(ServiceMoved(service.name, well=True))
                self._begin(job)
        self.check()

    def wake(self, name: str) -> None:
        """Has the next round of this one begin at once, if it is started."""
        for job in list(self._jobs):
            if job.service.name == name:
                job.service.wake()

    def stop(self, *, but: Collection[str] = ()) -> None:
        """Has each end after the round that it is in, those named excepted."""
        self._stopping.set()
        for job in list(self._jobs):
            if job.service.name not in but:
                job.stopping = True
                job.service.wake()

    def join(self, names: Collection[str], within_s: float) -> None:
        """Waits until these have ended."""
        give_up = time.monotonic() + within_s
        for job in list(self._jobs):
            if job.service.name in names and job.thread is not None and job.thread.is_alive():
                job.thread.join(max(give_up - time.monotonic(), 0.0))

    def state(self) -> list[ServiceState]:
        """How each is."""
        now = time.monotonic()
        return [
            ServiceState(
                job.service.name,
                _why_not_well(job),
                None if job.good_at is None else now - job.good_at,
            )
            for job in list(self._jobs)
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
            for job in self._jobs:
                if failure := _ended(job) or _hung(job):
                    self._replace(job, failure)

    def _watch(self) -> None:
        while not self._stopping.wait(CHECK_EVERY_S):
            try:
                self.check()
            except Exception as error:  # noqa: BLE001 - checked again in a second
                say(log, LogEvent.INTERNAL_ERROR, error=error, doing="check background jobs")

    def _replace(self, job: _Job, failure: str) -> None:
        job.failure = failure
        say(log, LogEvent.SERVICE_RESTARTED, seldom=job.seldom, service=job.service.name, why=failure)
        self._emit(ServiceRestarted(job.service.name))
        self._emit(ServiceMoved(job.service.name, well=False))
        self._begin(job)
        if job.service.hangs_after_s is None and job.thread is not None:  # its round has no end to be good
            job.failure = ""
            self._emit(ServiceMoved(job.service.name, well=True))

    def _begin(self, job: _Job) -> None:
        # What hangs may go on one day: by then it is not the one that counts, and ends.
        job.generation += 1
        job.service.beat()
        thread = threading.Thread(
            target=self._repeat, args=(job, job.generation), name=job.service.name, daemon=True
        )
        job.thread = thread if _started(thread) else None

    def _repeat(self, job: _Job, generation: int) -> None:
        while not job.stopping and job.generation == generation:
            pause_s = self._round(job, generation)
            if job.stopping or job.generation != generation:
                return
            job.service.beat()
            job.service.wait(pause_s)
            job.service.beat()

    def _round(self, job: _Job, generation: int) -> float:
        """Does one round; how long until the next."""
        service = job.service
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
            if job.generation == generation:
                job.busy = False
        if job.generation != generation:  # it hung, and another is at it
            return 0.0
        job.good_at = time.monotonic()
        if job.failure:
            job.failure = ""
            say(log, LogEvent.SERVICE_RECOVERED, service=service.name)
            self._emit(ServiceMoved(service.name, well=True))
        return service.every_s if pause_s is None else pause_s

    def _failed(self, job: _Job, error: Exception) -> None:
        # Where Redis refuses something its words say it all; else the traceback does.
        refused = isinstance(error, StoreError)
        words = str(error) if refused else repr(error)
        job.failure = f"failed: {words}"
        say(
            log,
            LogEvent.SERVICE_FAILED,
            seldom=job.seldom,
            error=None if refused else error,
            service=job.service.name,
            why=words,
        )
        self._emit(ServiceFailed(job.service.name))
        self._emit(ServiceMoved(job.service.name, well=False))


class _Job:
    """A service with the thread that does it; only the latest ``generation`` of its threads counts."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.thread: threading.Thread | None = None
        self.generation = 0
        self.busy = False
        self.good_at: float | None = None
        self.failure = ""
        self.stopping = False
        self.seldom = Seldom()


def _why_not_well(job: _Job) -> str:
    if job.stopping:
        return ""
    return _ended(job) or _hung(job) or job.failure


def _ended(job: _Job) -> str:
    is_there = job.stopping or (job.thread is not None and job.thread.is_alive())
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
