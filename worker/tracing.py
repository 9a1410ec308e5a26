"""OpenTelemetry, if it is wanted: a tracer for this process, and the traceparent that travels with a cancel.

We load nothing of it, and it costs nothing, unless the standard OTEL_* variables name an exporter, or
the application that we are part of uses OpenTelemetry already.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from worker.settings import read_traces_exporter

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext, Tracer

log = logging.getLogger(__name__)

NAME = "kalshi-cancel"


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
        log.warning("traces are asked for, but cannot be made: install kalshi-cancel[tracing]")
        return None
    provider: Any = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider):  # nobody has set one up
        provider = None if exporter is None else _provider(service, exporter)
    return None if provider is None else provider.get_tracer(NAME)


def send_what_is_left() -> None:
    """Exports what waits for it, for a process that ends without Python's own end."""
    for provider in _providers:
        provider.shutdown()


_providers: list[Any] = []  # of our own making


def _provider(service: str, exporter: str) -> Any:
    try:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415 - see the first lines
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

        sink = _exporter(exporter)
    except ImportError:
        log.warning("traces are asked for, but cannot be made: install kalshi-cancel[tracing]")
        return None
    named = Resource({"service.name": service}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=named)
    provider.add_span_processor(BatchSpanProcessor(sink))
    _providers.append(provider)
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
