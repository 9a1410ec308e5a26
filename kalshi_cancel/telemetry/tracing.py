"""OpenTelemetry, if it is wanted: a tracer for this process, and the traceparent that travels with a cancel.

We load nothing of it, and it costs nothing, unless the standard OTEL_* variables name an exporter, or
the application that we are part of uses OpenTelemetry already.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kalshi_cancel.settings.foreign import read_traces_exporter
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import say

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext, Tracer

log = logging.getLogger(__name__)

NAME = "kalshi-cancel"
LAST_EXPORT_S = 1.0


def open_tracer(service: str) -> Tracer | None:
    """A tracer whose spans are exported as ``service``'s, or None; to be called after a fork, not before.

    An application's own provider is used where there is one.
    """
    exporter = read_traces_exporter()
    if exporter is None and "opentelemetry.trace" not in sys.modules:
        return None
    try:
        from opentelemetry import trace  # noqa: PLC0415 - see the first lines
    except ImportError:
        say(log, LogEvent.TRACING_NOT_INSTALLED)
        return None
    provider: Any = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider):  # nobody has set one up
        provider = None if exporter is None else _provider(service, exporter)
    return None if provider is None else provider.get_tracer(NAME)


def send_what_is_left() -> None:
    """Exports what waits for it, for at most a second: who only observes must not delay the end of a process.

    Python's own end does it; a process that ends without that has to.
    """
    give_up = time.monotonic() + LAST_EXPORT_S
    mine = [last for last in _lasts if last.pid == os.getpid()]
    for last in mine:
        last.wanted.set()
    for last in mine:
        last.done.wait(max(give_up - time.monotonic(), 0.0))


@dataclass(frozen=True, slots=True)
class _Last:
    """The last export of one provider of our own making, by a thread that waits for it from the beginning.

    At its end Python starts no threads any more.
    """

    pid: int
    wanted: threading.Event
    done: threading.Event


_lasts: list[_Last] = []


def _export_at_the_end(provider: Any) -> None:
    last = _Last(os.getpid(), threading.Event(), threading.Event())

    def run() -> None:
        last.wanted.wait()
        provider.shutdown()
        last.done.set()

    threading.Thread(target=run, name="last export", daemon=True).start()
    if not _lasts:
        atexit.register(send_what_is_left)
    _lasts.append(last)


def _provider(service: str, exporter: str) -> Any:
    try:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415 - see the first lines
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

        sink = _exporter(exporter)
    except ImportError:
        say(log, LogEvent.TRACING_NOT_INSTALLED)
        return None
    named = Resource({"service.name": service}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=named, shutdown_on_exit=False)  # that has no bound
    provider.add_span_processor(BatchSpanProcessor(sink))
    _export_at_the_end(provider)
    return provider


def _exporter(name: str) -> Any:
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter  # noqa: PLC0415 - see the first lines

        return ConsoleSpanExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

    return OTLPSpanExporter()


@contextmanager
def asking(tracer: Tracer | None, name: str, **about: str | int) -> Iterator[str | None]:
    """A producer's span for the body's time; gives its traceparent, None without a tracer."""
    if tracer is None:
        yield None
        return
    from opentelemetry.trace import SpanKind  # noqa: PLC0415 - see the first lines

    noted = {f"kalshi.{field}": value for field, value in about.items()}
    with tracer.start_as_current_span(name, kind=SpanKind.PRODUCER, attributes=noted) as span:
        context = span.get_span_context()
        yield traceparent_of(context) if context.is_valid else None


def traceparent_of(context: SpanContext) -> str:
    """A span as W3C Trace Context writes it."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
