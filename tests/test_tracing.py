"""Traces across real processes: producer, Redis, worker, and an exporter that sends to a collector here."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections import Counter
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from celery import Celery
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from kalshi_cancel.client import CancelClient
from kalshi_cancel.model.fields import BadRequest
from kalshi_cancel.model.requests import CancelRequest
from kalshi_cancel.settings.foreign import read_traces_exporter
from trials.stack import ROOT, Stack, wait_until

PATIENCE_S = 30.0
TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"


class Seen:
    """A span as the collector got it."""

    def __init__(self, service, span):
        self.service, self.name = service, span.name
        self.trace_id, self.span_id = span.trace_id.hex(), span.span_id.hex()
        self.parent = span.parent_span_id.hex()
        self.links = [link.span_id.hex() for link in span.links]
        self.kind = span.kind
        self.took_ns = span.end_time_unix_nano - span.start_time_unix_nano
        self.about = {
            each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes
        }


class Collector:
    """An OTLP collector over HTTP that keeps what it gets."""

    def __init__(self):
        self.spans = []
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    names = {each.key: each.value.string_value for each in resource.resource.attributes}
                    for scope in resource.scope_spans:
                        spans.extend(Seen(names["service.name"], span) for span in scope.spans)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def wait(self, condition, what):
        """The spans that fulfil the condition, once there are any."""
        return wait_until(
            lambda: [span for span in list(self.spans) if condition(span)], within_s=PATIENCE_S, what=what
        )

    def settled(self, order_id):
        """The span of an order that a sender has settled."""
        spans = self.wait(
            lambda span: (
                span.name == "settle"
                and span.about["kalshi.order_id"] == order_id
                and span.about["kalshi.outcome"] != "open"
            ),
            f"the settle span of {order_id}",
        )
        assert len(spans) == 1
        return spans[0]


@pytest.fixture(scope="module")
def collector():
    with closing(Collector()) as collector:
        yield collector


@pytest.fixture(scope="module")
def own(tmp_path_factory, collector):
    """A stack whose one worker exports its traces."""
    with Stack(tmp_path_factory.mktemp("tracing"), environment=collector.environment) as stack:
        yield stack.start(workers=1)


@pytest.fixture(params=["threads", "processes"])
def of_a_pool(own, request):
    """The stack with a worker of either pool."""
    own.workers[-1].stop()
    own.start_worker("-P", request.param, "-c", "2")
    return own


def place(own, number=1):
    order_ids = [str(uuid.uuid4()) for _ in range(number)]
    own.control.place_many([{"order_id": each} for each in order_ids])
    return order_ids


PRODUCER = """
import sys
from kalshi_cancel.client import CancelClient
print([r.outcome.value for r in CancelClient.from_env().cancel_many(sys.argv[1:]).results(30)])
"""


def produce(own, *order_ids, text=PRODUCER, within_s=60, **environment):
    """Runs a producer as a process of its own; what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", text, *order_ids],
        cwd=ROOT,
        env={**own.environment, **environment},
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_trace_leads_from_the_producer_to_the_call_and_its_outcome(of_a_pool, collector):
    [order_id] = place(of_a_pool)
    assert produce(of_a_pool, order_id) == "['canceled']\n"
    settle = collector.settled(order_id)
    [cancel] = collector.wait(lambda span: span.span_id == settle.parent, "the producer's span")
    [call] = collector.wait(lambda span: span.parent == settle.span_id, "the call's span")
    assert [(each.service, each.name) for each in (cancel, settle, call)] == [
        ("kalshi-cancel-producer", "cancel"),
        ("kalshi-cancel-worker", "settle"),
        ("kalshi-cancel-worker", "exchange call"),
    ]
    assert {cancel.trace_id, settle.trace_id, call.trace_id} == {settle.trace_id}
    assert (cancel.about["kalshi.orders"], cancel.about["kalshi.lane"]) == (1, "strategy")
    assert (settle.about["kalshi.outcome"], settle.about["kalshi.attempts"]) == ("canceled", 1)
    assert (call.about["kalshi.operation"], call.about["http.response.status_code"]) == ("cancel", 200)
    assert 0 < call.took_ns <= settle.took_ns


def test_a_batch_is_linked_to_all_its_orders(own, collector):
    order_ids = place(own, 30)
    produce(own, *order_ids)
    settled = {collector.settled(each).span_id for each in order_ids}
    of_them = lambda span: span.name == "exchange call" and settled & {span.parent, *span.links}  # noqa: E731 - a condition
    wait_until(
        lambda: sum(span.about["kalshi.orders"] for span in collector.spans if of_them(span)) == len(settled),
        what="all calls",
    )
    batches = [
        span for span in collector.spans if of_them(span) and span.about["kalshi.operation"] == "batch"
    ]
    assert batches
    for batch in batches:
        assert batch.parent == batch.links[0]
        assert len(batch.links) == batch.about["kalshi.orders"]
        assert set(batch.links) <= settled


@pytest.mark.parametrize("pool", ["threads", "processes"])
def test_what_was_not_sent_yet_is_sent_as_a_worker_ends(own, collector, pool):
    own.workers[-1].stop()
    late = {**collector.environment, "OTEL_BSP_SCHEDULE_DELAY": "600000"}
    part = own.start_worker("-P", pool, "-c", "2", **late)
    [order_id] = place(own)
    produce(own, order_id)
    assert part.stop() == 0
    assert collector.settled(order_id).about["kalshi.outcome"] == "canceled"
    own.start_worker()


@contextmanager
def dead_collector(*, listens):
    """The environment that asks for a collector where nobody is, or somebody who never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if listens:
            listener.listen(50)
        port = listener.getsockname()[1]
        # Left to itself, an exporter goes on for a minute.
        yield {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_EXPORTER_OTLP_TIMEOUT": "60"}


@pytest.mark.parametrize(
    ("pool", "listens"), [("threads", True), ("processes", False)], ids=["silent", "gone"]
)
def test_a_dead_collector_delays_the_end_of_no_process(own, pool, listens):
    own.workers[-1].stop()
    with dead_collector(listens=listens) as environment:
        part = own.start_worker("-P", pool, "-c", "2", KALSHI_SHUTDOWN_S="50", **environment)
        [order_id, other] = place(own, 2)
        produce(own, order_id, within_s=20, **environment)
        done = subprocess.run(
            [sys.executable, "-m", "kalshi_cancel.cli", "cancel", other],
            cwd=ROOT,
            env={**own.environment, **environment},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert "canceled" in done.stdout
        assert done.returncode == 0
        part.signal(signal.SIGTERM)
        assert part.process.wait(20) == 0
    own.start_worker()


WITHOUT = """
import sys
sys.modules["opentelemetry"] = None  # as if it were not installed
from kalshi_cancel.client import CancelClient
print(CancelClient.from_env().cancel(sys.argv[1]).result(30).outcome.value)
"""


def test_without_the_extra_a_cancel_goes_through_and_it_is_said_that_nothing_is_traced(own, collector):
    [order_id] = place(own)
    text = WITHOUT.replace("import sys\n", "import sys, logging\nlogging.basicConfig(stream=sys.stdout)\n", 1)
    printed = produce(own, order_id, text=text)
    assert (
        "event=tracing_not_installed tracing is configured, but kalshi-cancel[tracing] is not installed"
        in printed
    )
    assert printed.endswith("canceled\n")


@pytest.mark.parametrize("how", ["field", "header"])
def test_a_raw_producers_traceparent_is_followed(own, collector, how):
    [order_id] = place(own)
    kwargs = {"order_id": order_id, **({"traceparent": TRACEPARENT} if how == "field" else {})}
    headers = {"traceparent": TRACEPARENT} if how == "header" else {}
    with Celery("raw", broker=own.redis.url, set_as_current=False) as app:
        app.send_task("cancel_order", kwargs=kwargs, headers=headers, queue="cancels")
    settle = collector.settled(order_id)
    assert (settle.trace_id, settle.parent) == (TRACE_ID, SPAN_ID)


def test_a_list_of_a_raw_producer_is_followed_and_what_is_no_traceparent_is_ignored(own, collector):
    ours, theirs = place(own, 2)
    with Celery("raw", broker=own.redis.url, set_as_current=False) as app:
        app.send_task(
            "cancel_orders", kwargs={"orders": [ours]}, headers={"traceparent": TRACEPARENT}, queue="cancels"
        )
        app.send_task(
            "cancel_order", kwargs={"order_id": theirs}, headers={"traceparent": ["x"]}, queue="risk"
        )
    assert collector.settled(ours).trace_id == TRACE_ID
    assert collector.settled(theirs).parent == ""


SWEEPER = """
import sys
from kalshi_cancel.client import CancelClient
pending = CancelClient.from_env().mass_cancel({"tickers": sys.argv[1:]})
print(pending.request_id, pending.result(30)["flat"])
"""


def test_one_trace_leads_from_a_mass_cancel_to_its_listings_and_each_of_its_orders(of_a_pool, collector):
    ticker = f"KXTRACE-{uuid.uuid4()}".upper()
    order_ids = [str(uuid.uuid4()) for _ in range(12)]
    of_a_pool.control.place_many([{"order_id": each, "ticker": ticker} for each in order_ids])
    request_id, flat = produce(of_a_pool, ticker, text=SWEEPER).split()
    assert flat == "True"
    of_it = lambda span: span.about.get("kalshi.request_id") == request_id  # noqa: E731 - a condition
    [asked] = collector.wait(lambda span: span.name == "mass cancel" and of_it(span), "the producer's span")
    [run] = collector.wait(lambda span: span.name == "run mass cancel" and of_it(span), "the runner's span")
    settled = [collector.settled(each) for each in order_ids]
    assert (asked.service, run.service) == ("kalshi-cancel-producer", "kalshi-cancel-worker")
    assert {span.trace_id for span in (run, *settled)} == {asked.trace_id}
    assert {span.parent for span in (run, *settled)} == {asked.span_id}
    assert all(of_it(span) for span in settled)
    assert run.about["kalshi.outcome"] == "flat"
    of_the_run = collector.wait(lambda span: span.parent == run.span_id, "the run's own calls")
    assert {span.name for span in of_the_run} == {"exchange call"}
    operations = Counter(span.about["kalshi.operation"] for span in of_the_run)
    assert set(operations) == {"list", "api_keys"}
    assert operations["list"] >= 2, "one to plan, one to prove"
    assert operations["api_keys"] == 1, "what the key sees"
    ours = {span.span_id for span in settled}
    calls = [span for span in collector.spans if span.name == "exchange call" and span.parent in ours]
    assert sum(span.about["kalshi.orders"] for span in calls) == len(order_ids)


@pytest.mark.parametrize("how", ["field", "header"])
def test_a_raw_mass_cancels_traceparent_is_followed_by_its_orders(own, collector, how):
    [order_id] = place(own)
    kwargs = {"scope": {"order_ids": [order_id]}} | ({"traceparent": TRACEPARENT} if how == "field" else {})
    headers = {"traceparent": TRACEPARENT} if how == "header" else {}
    with Celery("raw", broker=own.redis.url, backend=own.redis.url, set_as_current=False) as app:
        sent = app.send_task("mass_cancel", kwargs=kwargs, headers=headers, queue="risk")
        assert sent.get(timeout=PATIENCE_S)["traceparent"] == TRACEPARENT
    settle = collector.settled(order_id)
    assert (settle.trace_id, settle.parent) == (TRACE_ID, SPAN_ID)


def test_what_has_to_be_asked_again_stays_in_its_trace(own, collector):
    [order_id] = place(own)
    own.control.fault("http_500", order_id=order_id, operation="cancel", times=1)
    produce(own, order_id)
    settle = collector.settled(order_id)
    calls = collector.wait(
        lambda span: span.name == "exchange call" and span.trace_id == settle.trace_id, "the calls"
    )
    assert {span.about.get("http.response.status_code") for span in calls} >= {500}


JOINED = """
import sys
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
trace.set_tracer_provider(TracerProvider())
from kalshi_cancel.client import CancelClient
with trace.get_tracer("app").start_as_current_span("strategy") as span:
    CancelClient.from_env().cancel(sys.argv[1]).result(30)
print(f"{span.get_span_context().trace_id:032x}")
"""


def test_a_producer_that_traces_by_itself_is_joined(own, collector):
    [order_id] = place(own)
    off = dict.fromkeys(collector.environment, "")
    trace_id = produce(own, order_id, text=JOINED, **off).strip()
    assert collector.settled(order_id).trace_id == trace_id


UNTRACED = """
import sys
from kalshi_cancel.client import CancelClient
client = CancelClient.from_env()
client.cancel(sys.argv[1]).result(30)
# (redis-py looks for OpenTelemetry by itself, for metrics of its own.)
print(client._tracer, [name for name in sys.modules if "opentelemetry.exporter" in name])
"""


def test_without_an_exporter_nothing_of_it_is_loaded_and_nothing_sent(own, collector):
    [order_id] = place(own)
    off = dict.fromkeys(collector.environment, "")
    assert produce(own, order_id, text=UNTRACED, **off) == "None []\n"
    assert collector.settled(order_id).parent == ""


@pytest.mark.parametrize(
    ("environment", "exporter"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, "otlp"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "otlp"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, None),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"}, None),
    ],
)
def test_the_standard_variables_decide(environment, exporter):
    assert read_traces_exporter(environment) == exporter


@pytest.mark.parametrize(
    "value",
    [
        "",
        "x",
        TRACEPARENT.upper(),
        TRACEPARENT + "0",
        f"00-{'0' * 32}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        1,
    ],
)
def test_what_is_no_traceparent_is_refused_by_name(value):
    with pytest.raises(BadRequest, match="traceparent: expected a W3C traceparent"):
        CancelRequest.parse({"order_id": "a", "traceparent": value})


def test_a_second_producer_joins_the_order_and_not_the_trace(own, collector):
    [order_id] = place(own)
    own.control.fault("http_429", order_id=order_id, operation="cancel", times=2)
    with closing(CancelClient(own.redis.url)) as client:
        client.cancel_many([{"order_id": order_id, "traceparent": TRACEPARENT}])
        client.cancel_many([{"order_id": order_id, "traceparent": TRACEPARENT.replace("4", "5")}]).results(30)
    assert collector.settled(order_id).trace_id == TRACE_ID
