"""Makes spans of a worker's events: one for each claimed order, mass cancel, and call to the exchange."""

from __future__ import annotations

import time
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kalshi_cancel.store.pending import Conclusion, Entry, RetryLater, Settle
from worker.dispatch.events import CallMade, Claimed, Concluded, Event, MassStep

_SERVER_FAILED = 500


class Spans:
    """Call it with a ``Event``; spans of what was asked for hang on its traceparent.

    A call for one order is a child of its ``settle`` span; a call for many is a child of the first one's,
    and linked to all; one that a mass cancel made itself, a child of its ``run mass cancel``.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._open_spans: dict[str, Span] = {}
        self._running: dict[str, Span] = {}  # mass cancels

    def __call__(self, event: Event) -> None:
        """Begins, adds or ends spans."""
        if isinstance(event, Claimed):
            for entry in event.entries:
                self._open_spans[entry.order_id] = self._settle(entry)
        elif isinstance(event, CallMade):
            self._call(event)
        elif isinstance(event, Concluded):
            for conclusion, ours in zip(event.conclusions, event.ours, strict=True):
                span = self._open_spans.pop(conclusion.entry.order_id, None)
                if span is not None:
                    span.set_attributes(_end_of(conclusion, ours=ours))
                    span.end()
        elif isinstance(event, MassStep):
            self._step(event)

    def _settle(self, entry: Entry) -> Span:
        asked = entry.request
        noted = {"kalshi.order_id": entry.order_id, "kalshi.lane": entry.lane.value}
        if asked.request_id is not None:
            noted["kalshi.request_id"] = asked.request_id
        return self._begin("settle", asked.traceparent, {**noted, "kalshi.age_s": entry.age_s})

    def _step(self, step: MassStep) -> None:
        if step.step == "started":
            noted = {"kalshi.request_id": step.request_id}
            self._running[step.request_id] = self._begin("run mass cancel", step.traceparent, noted)
        elif (span := self._running.pop(step.request_id, None)) is not None:
            span.set_attribute("kalshi.outcome", step.step)
            span.end()

    def _begin(self, name: str, traceparent: str | None, noted: Mapping[str, str | float]) -> Span:
        context = Context()  # what happens to be current in this thread is not its parent
        if traceparent is not None:
            carrier = {"traceparent": traceparent}
            context = TraceContextTextMapPropagator().extract(carrier, context=context)
        return self._tracer.start_span(name, context=context, kind=SpanKind.CONSUMER, attributes=noted)

    def _call(self, call: CallMade) -> None:
        senders = [span for each in call.order_ids if (span := self._open_spans.get(each)) is not None]
        if call.request_id is not None and call.request_id in self._running:
            senders.append(self._running[call.request_id])
        links = [Link(span.get_span_context()) for span in senders] if len(senders) > 1 else None
        ended_ns = time.time_ns()
        span = self._tracer.start_span(
            "exchange call",
            context=trace.set_span_in_context(senders[0], Context()) if senders else Context(),
            kind=SpanKind.CLIENT,
            links=links,
            start_time=ended_ns - round(call.duration_s * 1e9),
            attributes={
                "kalshi.operation": call.operation,
                "kalshi.orders": len(call.order_ids),
                "kalshi.bucket": call.bucket,
                "kalshi.tokens": call.tokens,
            },
        )
        problem = None if call.failure is None else call.failure.problem
        status = 200 if problem is None else problem.http_status
        if status is not None:
            span.set_attribute("http.response.status_code", status)
        if problem is not None:
            span.set_attribute("kalshi.code", problem.code)
        if status is None or status >= _SERVER_FAILED:
            span.set_status(StatusCode.ERROR)
        span.end(ended_ns)


def _end_of(conclusion: Conclusion, *, ours: bool) -> dict[str, str | int]:
    if not ours:
        return {"kalshi.outcome": "another_hand"}
    if isinstance(conclusion, Settle):
        result = conclusion.result
        code = {} if result.error is None else {"kalshi.code": result.error.code}
        return {"kalshi.outcome": result.outcome.value, "kalshi.attempts": result.attempts, **code}
    return {"kalshi.outcome": "open" if isinstance(conclusion, RetryLater) else "given_up"}
