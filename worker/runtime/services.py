"""The periodic services of a worker: what a process does again and again beside its work, in one list.

Each is guarded by itself (``dispatch/services``). Those whose rounds are a step or two in Redis share a
thread, the others have one each. Two more join them: the senders, which wait for wake-ups, and the monitor's
page, which is served until the end.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError

from kalshi_cancel import wake_ups
from kalshi_cancel.exchange.calls import ACCOUNT_LIMITS, ENDPOINT_COSTS
from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.exchange.key_rotation import Rotation
from kalshi_cancel.exchange.protocol import Failure
from kalshi_cancel.model.requests import Lane
from kalshi_cancel.settings.worker import WorkerSettings
from kalshi_cancel.store.audit import AuditLog
from kalshi_cancel.store.lists import Lists
from kalshi_cancel.store.rate_limits import Limits, Pacer
from kalshi_cancel.store.redis_errors import words
from kalshi_cancel.store.scripts import StoreError, say_failed
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import say
from worker.dispatch.dispatcher import Dispatcher
from worker.dispatch.events import Emit, WakeUpSent
from worker.dispatch.leases import EXTEND_EVERY_S
from worker.dispatch.senders import Senders
from worker.dispatch.services import Service
from worker.dispatch.sweeper import Sweeper
from worker.mass.runner import FIND_EVERY_S, MassRunner

log = logging.getLogger(__name__)

LIMITS_EVERY_S = 15.0  # which keeps a connection warm as well
LIMITS_AGAIN_S = 5.0  # when they could not be read, or not be shared
LIMITS_LEAST_S = 1.0  # between two questions, however many 429s come
TRIM_EVERY_S = 60.0
FORGET_EVERY_S = 600.0
SHOW_EVERY_S = 1.0
# What became claimable is noticed well within two seconds: a half until the look, its patience of one.
SWEEP_EVERY_S = 0.5
MEND_EVERY_S = 1.0  # a look at some two hundred keys
LISTENERS_EVERY_S = 1.0  # well within the life of what is said
AT_ONCE_S = 0.0  # its round waits by itself

REGISTRY = "worker registry"
LIMITS = "limits"
MASS_CANCELS = "mass cancels"


class Start(StrEnum):
    """Where a service runs."""

    EVERYWHERE = "in each process that works, from its first use on"
    MAIN = "in the worker's main process, once it is ready"


class Stop(StrEnum):
    """When a service stops, once its process is told to end."""

    AT_ONCE = "after its round"
    LAST = "once nothing is claimed any more"


@dataclass(frozen=True, slots=True)
class Periodic:
    """One service: the seconds from the end of a round to the next, what a round does, and when it runs."""

    name: str
    every_s: float
    run: Callable[[], float | None]
    start: Start
    stop: Stop
    in_turn: bool = False  # it shares a thread with others: its rounds are short

    def service(self) -> Service:
        """As it is started."""
        return Service(self.name, self.run, every_s=self.every_s)


@dataclass(frozen=True, slots=True)
class Doers:
    """Who does the rounds; ``key_in_file``: the key may be replaced on disk."""

    dispatcher: Dispatcher
    sweeper: Sweeper
    senders: Senders
    lists: Lists
    mass_runner: MassRunner
    rotation: Rotation
    key_in_file: bool
    limits: KnownLimits
    trim_audit_log: Callable[[], None]
    show_worker: Callable[[], None]
    wake_lanes: Callable[[], None]


def periodic(doers: Doers) -> tuple[Periodic, ...]:
    """All of them. Leases are kept until the last, so that what a process still works on stays its own."""
    dispatcher, sweeper, senders = doers.dispatcher, doers.sweeper, doers.senders
    every, main, at_once, turn = Start.EVERYWHERE, Start.MAIN, Stop.AT_ONCE, True
    # fmt: off
    return (
        Periodic("leases",              EXTEND_EVERY_S,    dispatcher.extend_leases, every, Stop.LAST),
        Periodic(LIMITS,                LIMITS_EVERY_S,    doers.limits.ask,         every, at_once),
        Periodic(MASS_CANCELS,          FIND_EVERY_S,      doers.mass_runner.find,   every, at_once),
        *([
        Periodic("key rotation",        AT_ONCE_S,         doers.rotation.watch,     every, at_once),
        ] if doers.key_in_file else []),
        Periodic(REGISTRY,              SHOW_EVERY_S,      doers.show_worker,        every, at_once, turn),
        Periodic("audit log",           TRIM_EVERY_S,      doers.trim_audit_log,     every, at_once, turn),
        Periodic("wake lanes",          SWEEP_EVERY_S,     doers.wake_lanes,         main,  at_once, turn),
        Periodic("report overdue",      SWEEP_EVERY_S,     sweeper.report_overdue,   main,  at_once, turn),
        Periodic("answer lists",        SWEEP_EVERY_S,     doers.lists.answer,       main,  at_once, turn),
        Periodic("show listeners",      LISTENERS_EVERY_S, senders.show_listeners,   main,  at_once, turn),
        Periodic("mend the store",      MEND_EVERY_S,      sweeper.mend,             main,  at_once, turn),
        Periodic("forget dead letters", FORGET_EVERY_S,    sweeper.forget_dead,      main,  at_once, turn),
    )
    # fmt: on


class KnownLimits:
    """Asks the exchange for the account's limits, again and again, and shares them with all workers."""

    def __init__(self, exchange: Exchange, pacer: Pacer) -> None:
        self._exchange = exchange
        self._pacer = pacer
        self._asked_at = -math.inf

    def share_configured(self) -> None:
        """Has the configured limits count until true ones are known.

        Senders begin while the exchange is still being asked, and without any limits the first flood is not
        paced.
        """
        try:
            _share(self._pacer.set_limits_unless_known)
        except StoreError as error:
            say_failed(log, error, "share the rate limits")

    def ask(self) -> float:
        """One round; in how many seconds the next is due."""
        early_s = self._asked_at + LIMITS_LEAST_S - time.monotonic()
        if early_s > 0:
            return early_s
        self._asked_at = time.monotonic()
        answers = self._exchange.fetch(ACCOUNT_LIMITS), self._exchange.fetch(ENDPOINT_COSTS)
        limits, costs = answers
        known = (
            None if isinstance(limits, Failure) or isinstance(costs, Failure) else Limits.parse(limits, costs)
        )
        if known is None:
            failure = next((each for each in answers if isinstance(each, Failure)), None)
            why = failure.problem.message if failure else "their answer cannot be understood"
            say(log, LogEvent.LIMITS_UNAVAILABLE, why=why)
            _share(self._pacer.set_limits_unless_known)
            return LIMITS_AGAIN_S
        return LIMITS_EVERY_S if _share(lambda: self._pacer.set_limits(known)) else LIMITS_AGAIN_S


def _share(set_limits: Callable[[], None]) -> bool:
    try:
        set_limits()
    except StoreError as error:
        if not error.can_pass:
            raise
        say_failed(log, error, "share the rate limits")
        return False
    return True


def trim(audit_log: AuditLog, settings: WorkerSettings) -> None:
    """Trims the audit log; that several workers do so costs next to nothing."""
    audit_log.trim(max_age_s=settings.audit_max_age_s, max_entries=settings.audit_max_entries)


def wake_lanes(app: Celery, sweeper: Sweeper, emit: Emit) -> None:
    """Wakes workers up for each lane in which something waits that nobody is coming for."""
    for lane, woken in sweeper.lanes_to_wake().items():
        emit(WakeUpSent(lane))
        if not woken:
            publish_wake_up(wake_ups.wake_up, app, lane)


def publish_wake_up(publish: Callable[..., None], app: Celery, lane: Lane, **how: Any) -> None:
    """Publishes a wake-up if it can; the sweeper sends another later."""
    try:
        publish(app, lane, **how)
    except (OperationalError, OSError) as error:
        say(log, LogEvent.WAKE_UP_FAILED, why=words(error))
