"""A worker process' life: refuses to start unfit, has one desk, and stops in good order."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from celery import Celery, concurrency, signals
from celery.app import app_or_default
from kombu.exceptions import OperationalError

from worker import bells, logs, scripts
from worker.book import Book
from worker.desk import Desk
from worker.dialects import ACCOUNT_LIMITS, ENDPOINT_COSTS, Trouble
from worker.exchange import Exchange
from worker.fleet import Fleet
from worker.health import Heartbeat, is_young
from worker.mass import MassRunner, Means
from worker.masses import Masses
from worker.metrics import Metrics
from worker.monitor import Monitor, json_page
from worker.notices import Notice, Tell, tell_all
from worker.orders import Lane
from worker.pacing import Limits, Pacer
from worker.readiness import OK, Readiness
from worker.scripts import BookError
from worker.settings import SettingsError, WorkerSettings, read_log_format
from worker.signing import KeyProblem, permission_warning
from worker.tracing import open_tracer, send_what_is_left

log = logging.getLogger(__name__)

LIMITS_EVERY_S = 60.0
LIMITS_AGAIN_S = 5.0  # when they could not be read


@dataclass(frozen=True, slots=True)
class Office:
    """What one process works with."""

    desk: Desk
    mass_runner: MassRunner
    readiness: Readiness
    tell: Tell
    shutdown_s: float

    def stop(self) -> None:
        """What is in hand goes back into the book, what is under way to other workers."""
        self.desk.stop()
        self.mass_runner.stop()


@dataclass(slots=True)
class Watch:
    """How this worker is watched; decided once, at its start, and inherited by the processes of its pool."""

    heartbeat: Heartbeat
    metrics: Metrics | None = None
    monitor: Monitor | None = None
    folder: str | None = None  # where the processes of a pool count

    def close(self) -> None:
        """Lets go of what the worker has put down."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


_offices: dict[int, Office] = {}
_offices_lock = threading.Lock()
_watch = Watch(Heartbeat(None))


def desk() -> Desk:
    """This process' desk."""
    return _office().desk


def mass_runner() -> MassRunner:
    """This process' runner of mass cancels."""
    return _office().mass_runner


def tell(notice: Notice) -> None:
    """Tells whoever listens to this process."""
    _office().tell(notice)


def heartbeat() -> Heartbeat:
    """The beat of this worker's main loop."""
    return _watch.heartbeat


def _office() -> Office:
    """Made at its first use in a process: what is opened before a fork must not be used after it."""
    with _offices_lock:
        mine = _offices.get(os.getpid())
        if mine is None:
            mine = _offices[os.getpid()] = _open_office(WorkerSettings.from_env(), app_or_default())
        return mine


def _open_office(settings: WorkerSettings, app: Celery) -> Office:
    exchange = Exchange.from_settings(settings)
    shown = exchange.warm_up()
    if isinstance(shown, Trouble):
        log.warning("the exchange does not answer yet: %s", shown.problem.message)
    server = scripts.connect(settings.redis)
    pacer = Pacer(
        server,
        settings.redis.key_prefix,
        Limits(
            settings.read_tokens_per_s,
            settings.read_tokens_capacity,
            settings.write_tokens_per_s,
            settings.write_tokens_capacity,
        ),
    )
    threading.Thread(target=_keep_limits, args=(exchange, pacer), name="limits", daemon=True).start()
    consumed = {Lane.of_queue(name) for name in app.amqp.queues.consume_from}
    name = f"{socket.gethostname()}:{os.getpid()}"
    the_book = Book(server, settings.redis)
    tell = tell_all(_listeners(exchange))
    the_desk = Desk(
        the_book,
        exchange,
        pacer,
        cancel_deadline_s=settings.cancel_deadline_s,
        cancel_max_age_s=settings.cancel_max_age_s,
        read_lag_s=settings.read_lag_s,
        risk_reserve=settings.risk_reserve,
        batch_most=settings.batch_most,
        # Who listens to one queue only works that lane only: a risk worker keeps its hands free for risk.
        lanes=[lane for lane in Lane if lane in consumed],
        hands=app.conf.worker_concurrency,
        call_hand=lambda lane: _ring(bells.wake_up, app, lane),
        name=name,
        tell=tell,
    )
    runner = MassRunner(
        Means(
            book=the_book,
            masses=Masses(server, settings.redis),
            exchange=exchange,
            pacer=pacer,
            call_hands=lambda lane, waiting: _ring(bells.wake_up_all, app, lane, waiting=waiting),
            read_lag_s=settings.read_lag_s,
            name=name,
            stopping=threading.Event(),
            tell=tell,
        )
    )
    runner.start()
    metrics = _watch.metrics
    if metrics is not None:
        metrics.watch_fleet(Fleet(server, settings.redis))
    readiness = Readiness(the_book, exchange, metrics.gate_states if metrics else list)
    return Office(the_desk, runner, readiness, tell, settings.shutdown_s)


def _listeners(exchange: Exchange) -> list[Tell]:
    """Who is told what this process does."""
    listeners: list[Tell] = []
    if _watch.metrics is not None:
        key_id, algorithm = exchange.signs_with
        _watch.metrics.begin(
            key_id=key_id,
            algorithm=algorithm,
            skew_s=lambda: None if exchange.skew_ms is None else exchange.skew_ms / 1000,
        )
        listeners.append(_watch.metrics)
    tracer = open_tracer("kalshi-cancel-worker")
    if tracer is not None:
        from worker.spans import Spans  # noqa: PLC0415 - OpenTelemetry is an extra

        listeners.append(Spans(tracer))
    return listeners


def _ring(bell: Callable[..., None], app: Celery, lane: Lane, **how: Any) -> None:
    try:
        bell(app, lane, **how)
    except (OperationalError, OSError) as error:  # who rings goes on: the sweep rings again
        log.warning("nobody could be woken up: %s", error)


def _keep_limits(exchange: Exchange, pacer: Pacer) -> None:
    """Asks the exchange for the account's limits, at once and then now and again: they change."""
    while True:
        limits, costs = exchange.fetch(ACCOUNT_LIMITS), exchange.fetch(ENDPOINT_COSTS)
        known = (
            None if isinstance(limits, Trouble) or isinstance(costs, Trouble) else Limits.parse(limits, costs)
        )
        try:
            if known is not None:
                pacer.set_limits(known)
            else:
                log.warning("the account's limits cannot be read: what was last known counts")
                pacer.set_limits_unless_known()
        except BookError as error:
            log.warning("limits cannot be shared: %s", error)
        time.sleep(LIMITS_EVERY_S if known is not None else LIMITS_AGAIN_S)


@signals.worker_init.connect
def _refuse_to_start_unfit(sender: Any = None, **_: Any) -> None:
    """Ends the process in one line unless settings, key and Redis are fit, and it can be watched."""
    # SystemExit, because Celery swallows ordinary exceptions of this signal's handlers and runs on.
    try:
        settings = WorkerSettings.from_env()
        Exchange.from_settings(settings).close()
        Book(scripts.connect(settings.redis), settings.redis).ping()
    except (SettingsError, KeyProblem) as problem:
        sys.exit(f"cannot start: {problem}")
    except BookError as problem:
        sys.exit(f"cannot start: no Redis at {settings.redis.masked_url}: {problem}")
    _start_watch(settings, forks=_forks(sender))


@signals.after_setup_logger.connect
@signals.after_setup_task_logger.connect
def _format_log(logger: logging.Logger, **_: Any) -> None:
    logs.set_format(logger, read_log_format())


@signals.celeryd_after_setup.connect
def _greet(instance: Any, **_: Any) -> None:
    """The first words after the log is set up."""
    if logs.is_json(logging.getLogger()):
        instance.quiet = True  # Celery's banner is no JSON
    path = WorkerSettings.from_env().private_key_path
    if path and (warning := permission_warning(path)):
        log.warning(warning)


def _forks(worker: Any) -> bool:
    """Whether a worker's pool is one of processes."""
    pool = concurrency.get_implementation(worker.pool_cls)
    return bool(pool.__module__ == "celery.concurrency.prefork")


def _start_watch(settings: WorkerSettings, *, forks: bool) -> None:
    """Opens what the worker is to be watched by, or ends the process in one line."""
    _watch.heartbeat = Heartbeat(settings.heartbeat_file)
    try:
        _watch.heartbeat.start()
    except OSError as problem:
        sys.exit(f"cannot start: KALSHI_HEARTBEAT_FILE cannot be touched: {problem}")
    if not settings.metrics_port:
        return
    try:
        _watch.monitor = Monitor(settings.metrics_host, settings.metrics_port)
    except OSError as problem:
        address = f"{settings.metrics_host}:{settings.metrics_port}"
        sys.exit(f"cannot start: KALSHI_METRICS_PORT cannot be opened at {address}: {problem.strerror}")
    _watch.folder = tempfile.mkdtemp(prefix="kalshi-cancel-metrics-") if forks else None
    _watch.metrics = Metrics(_watch.folder)


@signals.worker_process_init.connect
def _leave_the_port_to_the_parent(**_: Any) -> None:
    if _watch.monitor is not None:
        _watch.monitor.close()


@signals.worker_process_shutdown.connect
def _send_what_is_left(**_: Any) -> None:
    send_what_is_left()


@signals.worker_ready.connect
def _warm_up(**_: Any) -> None:
    office, metrics, monitor = _office(), _watch.metrics, _watch.monitor
    if metrics is None or monitor is None:
        return

    def show_metrics(accept: str) -> tuple[HTTPStatus, str, bytes]:
        return HTTPStatus.OK, *metrics.exposition(accept)

    def show_life(_accept: str) -> tuple[HTTPStatus, str, bytes]:
        age_s = _watch.heartbeat.age_s
        return json_page({"heartbeat_age_s": round(age_s, 3)}, ok=is_young(age_s))

    def show_readiness(_accept: str) -> tuple[HTTPStatus, str, bytes]:
        found = office.readiness.look()
        return json_page(found, ok=all(each == OK for each in found.values()))

    monitor.serve({"/metrics": show_metrics, "/healthz": show_life, "/ready": show_readiness})


@signals.worker_shutdown.connect
def _stop_watch(**_: Any) -> None:
    _watch.close()


@signals.worker_shutting_down.connect
def _give_back(**_: Any) -> None:
    """Stops the desk; ends the process anyway if something hangs: what it holds comes back by its lease."""
    mine = _offices.get(os.getpid())
    if mine is None:
        return
    last_resort = threading.Timer(mine.shutdown_s, _end_anyway)
    last_resort.daemon = True
    last_resort.start()
    mine.stop()


def _end_anyway() -> None:
    _watch.close()
    os._exit(0)
