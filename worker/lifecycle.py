"""A worker process' life: refuses to start unfit, has one desk, and stops in good order."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import redis
from celery import Celery, concurrency, signals
from celery.app import app_or_default
from kombu.exceptions import OperationalError

from worker import bells, logs, scripts
from worker.audit import Trail
from worker.book import Book, WorkerShown
from worker.desk import Desk
from worker.dialects import ACCOUNT_LIMITS, ENDPOINT_COSTS, Trouble
from worker.exchange import Exchange
from worker.fleet import Fleet
from worker.hands import Hands
from worker.health import Heartbeat, is_young
from worker.intake import Intake
from worker.mass import MassRunner, Means
from worker.masses import Masses
from worker.metrics import Metrics
from worker.monitor import Monitor, json_page
from worker.notices import Notice, Tell, tell_all
from worker.orders import Lane
from worker.outbox import Outbox
from worker.pacing import Limits, Pacer
from worker.readiness import OK, Readiness
from worker.rotation import Rotation
from worker.scripts import BookError
from worker.settings import SettingsError, WorkerSettings, read_log_format
from worker.signing import KeyProblem, permission_warning
from worker.tracing import open_tracer, send_what_is_left

log = logging.getLogger(__name__)

LIMITS_EVERY_S = 15.0  # which keeps a connection warm as well
EARS_LIFE_S = 2.0  # that hands listen is said with each sweep
LIMITS_AGAIN_S = 5.0  # when they could not be read
TRIM_EVERY_S = 60.0
SHOW_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Office:
    """What one process works with."""

    desk: Desk
    hands: Hands
    intake: Intake
    mass_runner: MassRunner
    rotation: Rotation
    readiness: Readiness
    tell: Tell
    shutdown_s: float

    def stop(self) -> None:
        """What is in hand goes back into the book, what is under way to other workers."""
        self.desk.stop()
        self.hands.stop()
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


def hands() -> Hands:
    """This process' hands."""
    return _office().hands


def intake() -> Intake:
    """This process' intake of raw messages."""
    return _office().intake


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
    outbox = Outbox()
    exchange = Exchange.from_settings(settings, on_sent=outbox.sent)
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
    threading.Thread(target=_keep_trimmed, args=(server, settings), name="trail", daemon=True).start()
    consumed = {Lane.of_queue(name) for name in app.amqp.queues.consume_from}
    # Who listens to one queue only works that lane only: a risk worker keeps its hands free for risk.
    lanes = [lane for lane in Lane if lane in consumed]
    name = f"{socket.gethostname()}:{os.getpid()}"
    the_book = Book(server, settings.redis, name=name)
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
        lanes=lanes,
        outbox=outbox,
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
    shown_as = WorkerShown(name, tuple(lane.value for lane in lanes), app.conf.worker_concurrency)
    threading.Thread(target=_keep_shown, args=(the_book, shown_as), name="shown", daemon=True).start()
    metrics = _watch.metrics
    if metrics is not None:
        metrics.watch_fleet(Fleet(server, settings.redis))
    rotation = Rotation(exchange, settings)
    if settings.private_key_path is not None:
        rotation.start()
    return Office(
        the_desk,
        Hands(the_desk, the_book, lanes, number=app.conf.worker_concurrency),
        Intake(scripts.connect(settings.redis, in_bytes=True), settings.redis, the_desk),
        runner,
        rotation,
        Readiness(the_book, exchange, metrics.gate_states if metrics else list),
        tell,
        settings.shutdown_s,
    )


def _listeners(exchange: Exchange) -> list[Tell]:
    """Who is told what this process does."""
    listeners: list[Tell] = []
    if _watch.metrics is not None:
        _watch.metrics.begin(
            signs_with=lambda: exchange.signs_with,
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


def _keep_shown(book: Book, worker: WorkerShown) -> None:
    """Says again and again that this process runs, for `cancelctl top`."""
    while True:
        try:
            book.show_worker(worker)
        except BookError as error:
            log.info("this worker cannot be shown: %s", error)
        time.sleep(SHOW_EVERY_S)


def _keep_trimmed(server: redis.Redis, settings: WorkerSettings) -> None:
    """Trims the audit trail now and again; that several workers do so costs next to nothing."""
    trail = Trail(server, settings.redis)
    while True:
        try:
            trail.trim(max_age_s=settings.audit_max_age_s, max_entries=settings.audit_max_entries)
        except BookError as error:
            log.warning("the audit trail cannot be trimmed: %s", error)
        time.sleep(TRIM_EVERY_S)


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
    # What the command line says counts for our hands as for Celery's pool.
    instance.app.conf.worker_concurrency = instance.concurrency
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
def _begin(sender: Any, **_: Any) -> None:
    """Hands listen in the worker's own process; where a pool forks, they would be copied with their locks."""
    mine = _office()
    if not _forks(sender.controller):
        mine.hands.start()
        with suppress(BookError):  # each sweep says so again
            mine.hands.show_ears(life_s=EARS_LIFE_S)
    # Where Celery would restart the process. At a terminal SIGHUP means that it was closed, and ends it.
    if callable(signal.getsignal(signal.SIGHUP)):
        signal.signal(signal.SIGHUP, lambda *_: mine.rotation.look_now())
    _serve_monitor(mine)


def _serve_monitor(office: Office) -> None:
    metrics, monitor = _watch.metrics, _watch.monitor
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
def _end(**_: Any) -> None:
    mine = _offices.get(os.getpid())
    if mine is not None:
        mine.hands.join(mine.shutdown_s)
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
