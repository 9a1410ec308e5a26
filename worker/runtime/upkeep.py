"""The background jobs of a worker: the limits, the audit log, and the sweep over the store."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError

from kalshi_cancel import wake_ups
from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.exchange.protocol import ACCOUNT_LIMITS, ENDPOINT_COSTS, Failure
from kalshi_cancel.log_events import LogEvent
from kalshi_cancel.logs import say
from kalshi_cancel.model.orders import Lane
from kalshi_cancel.store.audit import AuditLog
from kalshi_cancel.store.lists import Lists
from kalshi_cancel.store.rate_limits import Limits, Pacer
from kalshi_cancel.store.redis_errors import words
from kalshi_cancel.store.scripts import StoreError, say_failed
from worker.dispatch.dispatcher import Dispatcher
from worker.dispatch.events import BellRung, Emit
from worker.dispatch.senders import Senders
from worker.dispatch.services import Service

log = logging.getLogger(__name__)

LIMITS_EVERY_S = 15.0  # which keeps a connection warm as well
LIMITS_AGAIN_S = 5.0  # when they could not be read, or not be shared
LIMITS_LEAST_S = 1.0  # between two questions, however many 429s come
TRIM_EVERY_S = 60.0
FORGET_EVERY_S = 600.0
SHOW_EVERY_S = 1.0
# What became claimable is noticed well within two seconds: a quarter until the look, its patience of one.
SWEEP_EVERY_S = 0.25
MEND_EVERY_S = 1.0  # a look at some two hundred keys
EARS_EVERY_S = 1.0  # well within the life of what is said


def known_limits(exchange: Exchange, pacer: Pacer) -> Service:
    """Asks the exchange for the account's limits again and again, and at once when woken.

    Has the configured ones count at once: senders begin while the exchange is still being asked, and without
    any limits the first flood is not paced.
    """
    try:
        _share(pacer.set_limits_unless_known)
    except StoreError as error:
        say_failed(log, error, "share the rate limits")

    asked_at = -math.inf

    def ask() -> float:
        nonlocal asked_at
        early_s = asked_at + LIMITS_LEAST_S - time.monotonic()
        if early_s > 0:
            return early_s
        asked_at = time.monotonic()
        answers = exchange.fetch(ACCOUNT_LIMITS), exchange.fetch(ENDPOINT_COSTS)
        limits, costs = answers
        known = (
            None if isinstance(limits, Failure) or isinstance(costs, Failure) else Limits.parse(limits, costs)
        )
        if known is None:
            failure = next((each for each in answers if isinstance(each, Failure)), None)
            why = failure.problem.message if failure else "their answer cannot be understood"
            say(log, LogEvent.LIMITS_UNAVAILABLE, why=why)
            _share(pacer.set_limits_unless_known)
            return LIMITS_AGAIN_S
        return LIMITS_EVERY_S if _share(lambda: pacer.set_limits(known)) else LIMITS_AGAIN_S

    return Service("limits", ask, every_s=LIMITS_EVERY_S)


def _share(set_limits: Callable[[], None]) -> bool:
    try:
        set_limits()
    except StoreError as error:
        if not error.can_pass:
            raise
        say_failed(log, error, "share the rate limits")
        return False
    return True


def trimmed_audit_log(audit_log: AuditLog, *, max_age_s: float, max_entries: int) -> Service:
    """Trims the audit log now and again; that several workers do so costs next to nothing."""

    def trim() -> None:
        audit_log.trim(max_age_s=max_age_s, max_entries=max_entries)

    return Service("audit trail", trim, every_s=TRIM_EVERY_S)


def sweep(app: Celery, dispatcher: Dispatcher, senders: Senders, lists: Lists, emit: Emit) -> list[Service]:
    """Looks again and again for what nobody is coming for, and for those who wait; each job by itself."""

    def wake_lanes() -> None:
        for lane, heard in dispatcher.lanes_to_wake().items():
            emit(BellRung(lane))
            if not heard:
                ring(wake_ups.wake_up, app, lane)

    return [
        Service("tell overdue", dispatcher.tell_overdue, every_s=SWEEP_EVERY_S),
        Service("answer lists", lists.answer, every_s=SWEEP_EVERY_S),
        Service("wake lanes", wake_lanes, every_s=SWEEP_EVERY_S),
        Service("mend the book", dispatcher.mend, every_s=MEND_EVERY_S),
        Service("forget the dead", dispatcher.forget_dead, every_s=FORGET_EVERY_S),
        Service("show that hands listen", senders.show_ears, every_s=EARS_EVERY_S),
    ]


def ring(bell: Callable[..., None], app: Celery, lane: Lane, **how: Any) -> None:
    """Publishes a bell, if that can be done; the sweep rings again."""
    try:
        bell(app, lane, **how)
    except (OperationalError, OSError) as error:
        say(log, LogEvent.WAKE_UP_FAILED, why=words(error))
