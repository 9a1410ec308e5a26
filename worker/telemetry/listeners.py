"""The listeners of a process: the log, and metrics and traces as far as they are wanted."""

from __future__ import annotations

from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.telemetry.tracing import open_tracer
from worker.dispatch.events import Emit
from worker.telemetry.event_log import EventLog
from worker.telemetry.watch import watch


def listeners(exchange: Exchange) -> list[Emit]:
    """Who is told what this process does."""
    found: list[Emit] = [EventLog()]
    if watch.metrics is not None:
        watch.metrics.begin(
            signs_with=lambda: exchange.signs_with,
            skew_s=lambda: None if exchange.skew_ms is None else exchange.skew_ms / 1000,
        )
        found.append(watch.metrics)
    tracer = open_tracer("kalshi-cancel-worker")
    if tracer is not None:
        from worker.telemetry.spans import Spans  # noqa: PLC0415 - OpenTelemetry is an extra

        found.append(Spans(tracer))
    return found
