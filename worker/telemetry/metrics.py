"""Counts what a worker tells about its work, in Prometheus' terms, cheaply enough for a flood.

It counts in memory, or, for a pool of processes, in files that the main process adds up.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import prometheus_client
from prometheus_client import CollectorRegistry, Gauge, Histogram, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from kalshi_cancel.exchange.protocol import GATEWAY_CODE, Meaning
from kalshi_cancel.model.requests import Lane
from kalshi_cancel.model.results import CancelResult, Outcome
from kalshi_cancel.settings.foreign import count_in_files
from kalshi_cancel.store.pending import MakeDeadLetter, Settle
from kalshi_cancel.store.scripts import StoreError
from kalshi_cancel.store.stats import Stats, StatsShown
from worker.dispatch.breaker import BreakerState
from worker.dispatch.events import (
    BreakerMoved,
    CallMade,
    Claimed,
    Concluded,
    Event,
    LeaseLost,
    MassStep,
    ServiceFailed,
    ServiceMoved,
    ServiceRestarted,
    WakeUpSent,
)

PREFIX = "kalshi_cancel_"
CODES_MOST = 40  # a stranger's words must not become ever more series

_WAIT_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_CALL_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_ATTEMPTS = (1.0, 2.0, 3.0, 5.0, 10.0, 20.0)

Kind: TypeAlias = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Meter:
    """One metric, as the table in docs/how-to/monitoring.md shows it; ``name`` without the common prefix.

    ``merge``: what a gauge of several processes comes to, in prometheus_client's words.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    meaning: str
    buckets: tuple[float, ...] = ()
    merge: Literal["livemax", "livemin", "livemostrecent"] = "livemax"


# What one worker has seen itself: add up over workers.
OF_THE_WORKER = (
    Meter("settled_total", "counter", ("outcome", "lane"), "Cancels whose outcome is known and stored."),
    Meter("dead_lettered_total", "counter", ("lane",), "Cancels that became dead letters."),
    Meter(
        "accepted_to_wire_seconds",
        "histogram",
        ("lane",),
        "From a cancel's acceptance until a sender claimed it to send it the first time.",
        _WAIT_S,
    ),
    Meter(
        "accepted_to_settled_seconds",
        "histogram",
        ("lane",),
        "From a cancel's acceptance until its outcome was stored.",
        _WAIT_S,
    ),
    Meter("attempts", "histogram", ("lane",), "Cancels sent for an order until it was settled.", _ATTEMPTS),
    Meter(
        "exchange_calls_total",
        "counter",
        ("operation", "status", "code"),
        "HTTP calls, by the answer to the whole call. Status `none`: no reply. Code `ok`: it was done.",
    ),
    Meter(
        "exchange_call_seconds",
        "histogram",
        ("operation",),
        "How long an HTTP call took.",
        _CALL_S,
    ),
    Meter("orders_sent_total", "counter", ("operation",), "Orders named in calls that cancel."),
    Meter(
        "unanswered_total",
        "counter",
        ("operation",),
        "Calls without a usable reply, which may have taken effect.",
    ),
    Meter(
        "gateway_answers_total",
        "counter",
        (),
        "Calls that a gateway in front of the exchange answered with a page of its own.",
    ),
    Meter("tokens_spent_total", "counter", ("bucket",), "Tokens paid for calls."),
    Meter("rate_limited_total", "counter", ("bucket",), "Calls that were answered 429."),
    Meter("leases_lost_total", "counter", (), "Claimed cancels that turned out to be another worker's."),
    Meter(
        "sweeper_wake_ups_total",
        "counter",
        ("lane",),
        "Wake-ups by the sweeper: for work that nobody came for.",
    ),
    Meter(
        "breaker_closed",
        "gauge",
        (),
        "1: the circuit breaker is closed, cancels pass; 0: it is open, they wait.",
        merge="livemin",
    ),
    Meter(
        "breaker_state",
        "gauge",
        ("state",),
        "1 for the breaker's state: closed, or why it is open: unreachable, paused or key_refused.",
    ),
    Meter(
        "clock_skew_seconds",
        "gauge",
        (),
        "The exchange's clock minus this host's.",
        merge="livemostrecent",
    ),
    Meter("key_info", "gauge", ("key_id", "algorithm"), "1, for the key that signs."),
    Meter(
        "service_up",
        "gauge",
        ("service",),
        "1: the background job is well; 0: its last round failed, or its thread died or hangs.",
        merge="livemin",
    ),
    Meter("service_failures_total", "counter", ("service",), "Rounds of a background job that went wrong."),
    Meter(
        "service_restarts_total",
        "counter",
        ("service",),
        "Threads of a background job that died or hung, and were replaced.",
    ),
    Meter(
        "mass_steps_total",
        "counter",
        ("step",),
        "Mass cancels that this worker started, planned, ended flat or not_flat, or left to others.",
    ),
)
# What is read from Redis as it is asked for, the same on every worker: take the greatest, do not add up.
OF_ALL_WORKERS = (
    Meter("accepted_total", "counter", ("lane",), "Cancel requests accepted."),
    Meter("open", "gauge", ("lane",), "Cancels that are accepted and not settled."),
    Meter(
        "oldest_age_seconds",
        "gauge",
        ("lane",),
        "Age of the oldest open cancel; 0: none is open.",
    ),
    Meter("unresolved", "gauge", (), "Open cancels whose waiters were told that there is no proof yet."),
    Meter("dead_letters", "gauge", (), "Cancels that were given up and wait for somebody to look."),
    Meter("set_aside", "gauge", (), "Entries that cannot be read and wait for somebody to look."),
    Meter(
        "audit_gaps_total", "counter", (), "Entries that the audit log is missing: they could not be written."
    ),
    Meter("queue_messages", "gauge", ("queue",), "Messages that wait in a queue."),
    Meter("bucket_tokens", "gauge", ("bucket",), "Tokens in the bucket now."),
    Meter("bucket_capacity", "gauge", ("bucket",), "The most tokens that we count on in the bucket."),
    Meter("bucket_refused_total", "counter", ("bucket",), "Times that a 429 corrected the bucket."),
    Meter("mass_cancels", "gauge", ("state",), "Of the latest hundred: running, flat and not_flat ones."),
    Meter("redis_round_trip_seconds", "gauge", (), "How long Redis took to answer a PING of this worker."),
    Meter("redis_up", "gauge", (), "1: Redis answers; 0: it does not, and what it knows is missing."),
)


_LANES: list[tuple[str, ...]] = [(lane.value,) for lane in Lane]
_BUCKETS: list[tuple[str, ...]] = [("read",), ("write",)]
_CANCELS: list[tuple[str, ...]] = [("cancel",), ("batch",)]
_CALLS = [*_CANCELS, ("read_back",), ("list",)]
# What is there with a 0 before it first happens, so that its first time shows as an increase.
_FROM_THE_START: dict[str, list[tuple[str, ...]]] = {
    "settled_total": [
        (outcome.value, lane.value)
        for outcome in Outcome
        if outcome is not Outcome.UNRESOLVED  # which is not settled
        for lane in Lane
    ],
    **dict.fromkeys(("dead_lettered_total", "sweeper_wake_ups_total", "attempts"), _LANES),
    **dict.fromkeys(("accepted_to_wire_seconds", "accepted_to_settled_seconds"), _LANES),
    **dict.fromkeys(("unanswered_total", "exchange_call_seconds"), _CALLS),
    "orders_sent_total": _CANCELS,
    **dict.fromkeys(("tokens_spent_total", "rate_limited_total"), _BUCKETS),
    "mass_steps_total": [(step,) for step in ("started", "planned", "flat", "not_flat", "left")],
}


class Metrics:
    """The counts of one worker; call it with a :class:`worker.dispatch.events.Notice`.

    ``folder``: where its processes count, when they are several; None: there is one.
    """

    def __init__(self, folder: str | None = None) -> None:
        count_in_files(folder)
        # prometheus_client decides this by itself as it is imported, which others may have done before.
        values.ValueClass = values.MutexValue if folder is None else values.MultiProcessValue()  # type: ignore[no-untyped-call]
        self._folder = folder
        self._main_pid = os.getpid()
        self._own = CollectorRegistry()
        self._meters: dict[str, Any] = {each.name: _make(each, self._own) for each in OF_THE_WORKER}
        self._registry = self._own
        if folder is not None:
            self._registry = CollectorRegistry()
            MultiProcessCollector(self._registry, path=folder)  # type: ignore[no-untyped-call]
        self._shown = CollectorRegistry()
        self._shown.register(_Everything(self._registry))
        self._codes: set[str] = set()
        self._skew_s: Callable[[], float | None] = lambda: None
        self._signs_with: Callable[[], tuple[str, str]] = lambda: ("", "")
        self._key: tuple[str, str] | None = None
        self._lock = threading.Lock()
        if folder is not None:
            # A child that is forked while another thread counts would wait for that thread's lock for ever.
            os.register_at_fork(
                before=self._lock.acquire,
                after_in_parent=self._lock.release,
                after_in_child=self._lock.release,
            )

    def watch_stats(self, stats: Stats) -> None:
        """Shows the shared state as well, from now on."""
        self._shown.register(_StatsCollector(stats))

    def begin(self, *, signs_with: Callable[[], tuple[str, str]], skew_s: Callable[[], float | None]) -> None:
        """Notes what this process works with, before anything is told."""
        with self._lock:
            self._signs_with, self._skew_s = signs_with, skew_s
            for name, labels in _FROM_THE_START.items():
                for each in labels:
                    self._meters[name].labels(*each)
            self._note_skew()
            self._note_key()
            self._meters["breaker_closed"].set(1)
            # The main process of several works on no order: it has no breaker whose state says anything.
            if self._folder is None or os.getpid() != self._main_pid:
                self._note_breaker(BreakerState.CLOSED)

    def __call__(self, event: Event) -> None:
        """Counts an event: in bulk, so that an order among many costs next to nothing."""
        with self._lock:
            match event:
                case Claimed():
                    self._claimed(event)
                case CallMade():
                    self._call_made(event)
                case Concluded():
                    self._concluded(event)
                case LeaseLost(entries):
                    self._meters["leases_lost_total"].inc(entries)
                case WakeUpSent(lane):
                    self._meters["sweeper_wake_ups_total"].labels(lane.value).inc()
                case BreakerMoved(state):
                    self._meters["breaker_closed"].set(state is BreakerState.CLOSED)
                    self._note_breaker(state)
                case MassStep(step=step):
                    self._meters["mass_steps_total"].labels(step).inc()
                case ServiceMoved(service, well):
                    self._meters["service_up"].labels(service).set(well)
                    for name in ("service_failures_total", "service_restarts_total"):
                        self._meters[name].labels(service)  # a 0 before it first happens
                case ServiceFailed(service):
                    self._meters["service_failures_total"].labels(service).inc()
                case ServiceRestarted(service):
                    self._meters["service_restarts_total"].labels(service).inc()

    def exposition(self, accepted: str) -> tuple[str, bytes]:
        """Content type and text of everything, in the form that an Accept header asks for."""
        self._forget_dead_processes()
        encode, content_type = choose_encoder(accepted)
        return content_type, encode(self._shown)

    def breaker_states(self) -> list[str]:
        """The states, other than closed, that a breaker of this worker's processes is in."""
        self._forget_dead_processes()
        name = f"{PREFIX}breaker_state"
        held = [state.value for state in BreakerState if state is not BreakerState.CLOSED]
        return [each for each in held if self._registry.get_sample_value(name, {"state": each})]

    def services_down(self) -> list[str]:
        """The background jobs, of any of this worker's processes, that are not well."""
        self._forget_dead_processes()
        return [
            sample.labels["service"]
            for family in self._registry.collect()
            if family.name == f"{PREFIX}service_up"
            for sample in family.samples
            if not sample.value
        ]

    def _claimed(self, claimed: Claimed) -> None:
        # Progress or a sent cancel shows that it is not the first time.
        first = [each for each in claimed.entries if not each.progress and not each.interrupted]
        for lane in {each.lane for each in first}:
            ages_s = [each.age_s for each in first if each.lane is lane]
            self._meters["accepted_to_wire_seconds"].labels(lane.value).observe_all(ages_s)

    def _concluded(self, concluded: Concluded) -> None:
        settled: dict[Lane, list[tuple[CancelResult, float]]] = {}
        for conclusion, ours, age_s in zip(
            concluded.conclusions, concluded.ours, concluded.ages_s, strict=True
        ):
            if not ours:
                continue
            if isinstance(conclusion, Settle):
                settled.setdefault(conclusion.entry.lane, []).append((conclusion.result, age_s))
            elif isinstance(conclusion, MakeDeadLetter):
                self._meters["dead_lettered_total"].labels(conclusion.entry.lane.value).inc()
        for lane, many in settled.items():
            for outcome, number in Counter([result.outcome for result, _ in many]).items():
                self._meters["settled_total"].labels(outcome.value, lane.value).inc(number)
            ages_s = [age_s for _, age_s in many]
            self._meters["accepted_to_settled_seconds"].labels(lane.value).observe_all(ages_s)
            attempts = [result.attempts for result, _ in many]
            self._meters["attempts"].labels(lane.value).observe_all(attempts)

    def _call_made(self, call: CallMade) -> None:
        failure, operation, meters = call.failure, call.operation, self._meters
        status, code = "200", "ok"
        if failure is not None:
            status = str(failure.problem.http_status or "none")
            code = self._bounded(failure.problem.code)
            if failure.no_usable_answer and failure.may_have_taken_effect:
                meters["unanswered_total"].labels(operation).inc()
            if failure.problem.code == GATEWAY_CODE:
                meters["gateway_answers_total"].inc()
            elif failure.meaning is Meaning.BUSY:
                meters["rate_limited_total"].labels(call.bucket).inc()
        meters["exchange_calls_total"].labels(operation, status, code).inc()
        meters["exchange_call_seconds"].labels(operation).observe(call.duration_s)
        if operation in ("cancel", "batch"):
            meters["orders_sent_total"].labels(operation).inc(len(call.order_ids))
        meters["tokens_spent_total"].labels(call.bucket).inc(call.tokens)
        self._note_skew()
        self._note_key()

    def _bounded(self, code: str) -> str:
        code = code.partition(":")[0]
        if code not in self._codes:
            if len(self._codes) >= CODES_MOST:
                return "other"
            self._codes.add(code)
        return code

    def _note_skew(self) -> None:
        skew_s = self._skew_s()
        if skew_s is not None:
            self._meters["clock_skew_seconds"].set(skew_s)

    def _note_key(self) -> None:
        """Shows the key in use, and no longer the one before it."""
        key = self._signs_with()
        if key != self._key:
            if self._key is not None:
                self._meters["key_info"].labels(*self._key).set(0)
            self._meters["key_info"].labels(*key).set(1)
            self._key = key

    def _note_breaker(self, state: BreakerState) -> None:
        for each in BreakerState:
            self._meters["breaker_state"].labels(each.value).set(each is state)

    def _forget_dead_processes(self) -> None:
        """What a killed child has counted stays; what it was, it is not any more."""
        if self._folder is None:
            return
        for path in Path(self._folder).glob("gauge_live*.db"):
            try:
                os.kill(int(path.stem.rpartition("_")[2]), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)


def _make(meter: Meter, registry: CollectorRegistry) -> MetricWrapperBase:
    name, about = PREFIX + meter.name, (meter.meaning, meter.labels)
    if meter.kind == "counter":
        return prometheus_client.Counter(name, *about, registry=registry)
    if meter.kind == "gauge":
        return Gauge(name, *about, registry=registry, multiprocess_mode=meter.merge)
    return _BulkHistogram(name, *about, registry=registry, buckets=meter.buckets)


class _BulkHistogram(Histogram):
    """A histogram that takes many observations at the price of a few."""

    def observe_all(self, amounts: Sequence[float]) -> None:
        """Observes each of the amounts."""
        bounds = self._upper_bounds
        for at, number in Counter([bisect_left(bounds, amount) for amount in amounts]).items():
            self._buckets[at].inc(number)
        self._sum.inc(sum(amounts))


class _Everything(Collector):
    """What a registry has, as part of another."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        return self._registry.collect()

    def describe(self) -> Iterable[Metric]:
        return ()


class _StatsCollector(Collector):
    """Asks for the shared state whenever it is asked for its metrics."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        return ()  # else it would be asked as it is registered

    def collect(self) -> Iterator[Metric]:
        try:
            state = self._stats.look()
        except StoreError:
            found: dict[str, dict[str, float]] = {"redis_up": {"": 0}}
        else:
            found = _values(state)
        for meter in OF_ALL_WORKERS:
            if meter.name in found:
                kind = CounterMetricFamily if meter.kind == "counter" else GaugeMetricFamily
                family = kind(PREFIX + meter.name, meter.meaning, labels=meter.labels)
                for label, value in found[meter.name].items():
                    family.add_metric([label] if meter.labels else [], value)
                yield family


def _values(state: StatsShown) -> dict[str, dict[str, float]]:
    """The value of each shared metric, by its one label."""
    lanes, buckets = state.lanes.items(), state.buckets.items()
    return {
        "accepted_total": {lane.value: each.accepted for lane, each in lanes},
        "open": {lane.value: each.open for lane, each in lanes},
        "oldest_age_seconds": {lane.value: each.oldest_s or 0 for lane, each in lanes},
        "unresolved": {"": state.unresolved},
        "dead_letters": {"": state.dead_letters},
        "set_aside": {"": state.set_aside},
        "audit_gaps_total": {"": state.audit_gaps},
        "queue_messages": {lane.queue: each.messages for lane, each in lanes},
        "bucket_tokens": {name: each.tokens for name, each in buckets},
        "bucket_capacity": {name: each.capacity for name, each in buckets},
        "bucket_refused_total": {name: each.refused for name, each in buckets},
        "mass_cancels": dict(state.mass_cancels),
        "redis_round_trip_seconds": {"": state.redis_round_trip_s},
        "redis_up": {"": 1},
    }


prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # as many series again, for nobody
