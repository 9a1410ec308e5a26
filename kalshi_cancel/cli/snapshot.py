"""Reads from Redis the state of the service at this moment, for `cancelctl top`."""

from __future__ import annotations

import re
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store.audit import AuditLog, Noted
from kalshi_cancel.store.mass_cancels import MassCancels
from kalshi_cancel.store.rate_limits import Level
from kalshi_cancel.store.scripts import connect
from kalshi_cancel.store.stats import LaneState, Stats
from kalshi_cancel.store.workers import WorkerRegistry, WorkerShown

WINDOW_S = 10.0  # over which rates are told


@dataclass(frozen=True, slots=True)
class Rates:
    """What happened within the last ``WINDOW_S``, each a second, out of the audit log.

    ``accepted`` by lane, ``settled`` by outcome, ``answers`` by status or code of the exchange's answers;
    ``call_ms`` and ``slowest_ms`` are the median and the longest call, None without calls.
    """

    accepted: dict[str, float]
    settled: dict[str, float]
    answers: dict[str, float]
    calls: float
    call_ms: float | None
    slowest_ms: float | None


@dataclass(frozen=True, slots=True)
class MassShown:
    """A mass cancel that runs; ``progress`` None until its plan is made."""

    request_id: str
    requested_by: str | None
    reason: str | None
    progress: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The service at ``now_s``, epoch seconds by the server's clock; ``rates`` None: there is no audit log.

    ``held_back`` are the workers whose breaker is open, and why: they send nothing.
    """

    now_s: float
    where: str
    lanes: tuple[LaneState, ...]
    dead_letters: int
    rates: Rates | None
    buckets: tuple[Level, ...]
    workers: tuple[WorkerShown, ...]
    held_back: dict[str, str]
    mass_cancels: tuple[MassShown, ...]


class Watcher:
    """Takes one snapshot after the other. Needs to read only; everything raises StoreError."""

    def __init__(self, settings: RedisSettings) -> None:
        self._settings = settings
        self._server = connect(settings)
        self._stats = Stats(self._server, settings)
        self._registry = WorkerRegistry(self._server, settings)
        self._mass_cancels = MassCancels(self._server, settings)
        self._recent = _Recent(AuditLog(self._server, settings)) if settings.audit else None

    def snapshot(self) -> Snapshot:
        """The service now."""
        seen = self._stats.look()
        return Snapshot(
            now_s=seen.now_s,
            where=f"{self._settings.key_prefix} at {_address(self._settings.masked_url)}",
            lanes=tuple(seen.lanes.values()),
            dead_letters=seen.dead_letters,
            rates=None if self._recent is None else self._recent.rates(seen.now_s),
            buckets=tuple(seen.buckets.values()),
            workers=tuple(self._registry.workers()),
            held_back=self._registry.held_back(),
            mass_cancels=tuple(
                MassShown(request.request_id, request.requested_by, request.reason, progress)
                for request, progress in self._mass_cancels.running()
            ),
        )


def _address(url: str) -> str:
    """What of the URL is worth a place in a short line: neither how nor as whom one looks."""
    return re.sub("^[a-z]+://([^/]*@)?", "", url)


class _Recent:
    """What the audit log's latest entries tell, read once each."""

    def __init__(self, audit_log: AuditLog) -> None:
        self._audit_log = audit_log
        self._last_id = ""
        self._events: deque[tuple[int, Counter[tuple[str, str]], list[float]]] = deque()

    def rates(self, now_s: float) -> Rates:
        since_ms = int((now_s - WINDOW_S) * 1000)
        for noted in self._audit_log.read(since_ms=since_ms, after_id=self._last_id):
            self._last_id = noted.entry_id
            self._events.append((noted.at_ms, *_told(noted)))
        while self._events and self._events[0][0] < since_ms:
            self._events.popleft()
        counts: Counter[tuple[str, str]] = Counter()
        times_ms: list[float] = []
        for _, told, took_ms in self._events:
            counts.update(told)
            times_ms += took_ms
        times_ms.sort()

        def each_second(what: str) -> dict[str, float]:
            return {name: count / WINDOW_S for (kind, name), count in counts.most_common() if kind == what}

        return Rates(
            each_second("accepted"),
            each_second("settled"),
            each_second("answers"),
            len(times_ms) / WINDOW_S,
            times_ms[len(times_ms) // 2] if times_ms else None,
            times_ms[-1] if times_ms else None,
        )


def _told(noted: Noted) -> tuple[Counter[tuple[str, str]], list[float]]:
    """What an entry counts for, and how long its calls took, ms; nothing when somebody has spoilt it."""
    counts: Counter[tuple[str, str]] = Counter()
    times_ms: list[float] = []
    body = noted.fields()
    try:
        if noted.kind == "request":
            counts["accepted", str(body["lane"])] += len(body["orders"])
        elif noted.kind == "work":
            for call in body["calls"]:
                answer = call["code"] or call["status"]
                counts["answers", str(answer)] += 1
                times_ms.append(float(call["ms"]))
            for conclusion in body["orders"].values():
                if conclusion[0] == "settled":
                    counts["settled", str(conclusion[1])] += 1
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return Counter(), []
    return counts, times_ms
