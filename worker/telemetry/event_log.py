"""Logs a worker's events: outcomes, mass cancels, and how the exchange and the background jobs are."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

from kalshi_cancel.model.requests import Lane
from kalshi_cancel.model.results import Outcome, Problem
from kalshi_cancel.store.pending import Conclusion, Entry, MakeDeadLetter, Progress, Settle
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import Line, Seldom, about, say, say_all
from worker.dispatch.breaker import BreakerState
from worker.dispatch.events import (
    BreakerMoved,
    BucketCorrected,
    Concluded,
    Event,
    MassStep,
    ServiceFailed,
    ServiceMoved,
    ServiceRestarted,
    WakeUpSent,
)

log = logging.getLogger(__name__)


class EventLog:
    """Writes the lines of one process' events; of a job that fails again and again, only some."""

    def __init__(self) -> None:
        self._seldom: defaultdict[str, Seldom] = defaultdict(Seldom)  # by service
        self._unwell: set[str] = set()

    def __call__(self, event: Event) -> None:
        """Writes the lines of an event, if it has any."""
        match event:
            case Concluded():
                _outcomes(event)
            case MassStep():
                _mass_step(event)
            case WakeUpSent(lane):
                say(log, LogEvent.LANE_WOKEN, lane=lane.value)
            case BucketCorrected(bucket):
                say(log, LogEvent.RATE_LIMITED, bucket=bucket)
            case BreakerMoved(BreakerState.CLOSED):
                say(log, LogEvent.BREAKER_CLOSED)
            case BreakerMoved(BreakerState.KEY_REFUSED, why):
                say(log, LogEvent.WORKER_KEY_REFUSED, why=why)
            case BreakerMoved(state):
                say(log, LogEvent.BREAKER_OPEN, state=state.value)
            case ServiceFailed(service, why, error):
                seldom = self._seldom[service]
                say(log, LogEvent.SERVICE_FAILED, seldom=seldom, error=error, service=service, why=why)
            case ServiceRestarted(service, why):
                say(log, LogEvent.SERVICE_RESTARTED, seldom=self._seldom[service], service=service, why=why)
            case ServiceMoved(service, well=False):
                self._unwell.add(service)
            case ServiceMoved(service) if service in self._unwell:
                self._unwell.discard(service)
                say(log, LogEvent.SERVICE_RECOVERED, service=service)
            case _:
                pass


def _outcomes(event: Concluded) -> None:
    by_level: dict[int, list[Line]] = {}
    for conclusion, ours, age_s in zip(event.conclusions, event.ours, event.ages_s, strict=True):
        line = _outcome(conclusion, age_s) if ours else _lease_lost(conclusion)
        if line is not None:
            by_level.setdefault(line[0].level, []).append(line)
    for level, lines in by_level.items():
        say_all(log, level, lines)


def _outcome(conclusion: Conclusion, age_s: float) -> Line | None:
    """The line of an outcome; None: it is not known yet."""
    entry = conclusion.entry
    if isinstance(conclusion, Settle):
        result = conclusion.result
        event = LogEvent.CANCEL_SETTLED if result.outcome.final else LogEvent.CANCEL_FAILED
        return event, _came_to(entry, result.outcome, result.attempts, result.error, age_s)
    if isinstance(conclusion, MakeDeadLetter):
        progress = Progress.parse(conclusion.progress)
        fields = _came_to(entry, Outcome.UNRESOLVED, progress.attempts, progress.last_problem, age_s)
        return LogEvent.CANCEL_GIVEN_UP, fields
    return None


def _lease_lost(conclusion: Conclusion) -> Line:
    if isinstance(conclusion, Settle):
        attempts = conclusion.result.attempts
    else:
        attempts = Progress.parse(conclusion.progress).attempts
    return LogEvent.LEASE_LOST, {**_about(conclusion.entry), "attempts": attempts}


def _came_to(
    entry: Entry, outcome: Outcome, attempts: int, problem: Problem | None, age_s: float
) -> dict[str, Any]:
    return {
        **_about(entry),
        "outcome": outcome.value,
        "attempts": attempts,
        "code": problem and problem.code,
        "age_s": round(age_s, 3),
    }


def _about(entry: Entry) -> dict[str, Any]:
    asked = entry.request
    return {"order_id": entry.order_id, **about(entry.lane, asked.request_id, asked.traceparent)}


def _mass_step(step: MassStep) -> None:
    told = about(Lane.RISK, step.request_id, step.traceparent)
    match step.step:
        case "started" if step.dry_run:
            say(log, LogEvent.MASS_PLAN_STARTED, **told, requested_by=step.requested_by)
        case "started":
            say(log, LogEvent.MASS_CANCEL_STARTED, **told, requested_by=step.requested_by)
        case "planned":
            say(log, LogEvent.MASS_PLAN_DONE, **told)
        case "flat":
            say(log, LogEvent.MASS_CANCEL_DONE, **told)
        case "not_flat":
            say(log, LogEvent.MASS_CANCEL_INCOMPLETE, **told, why=step.why)
        case _:
            pass
