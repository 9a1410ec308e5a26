"""A worker process' life: refuses to start unfit, has one desk, and stops in good order."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis
from celery import Celery, signals
from celery.app import app_or_default
from kombu.exceptions import OperationalError

from worker import bells, scripts
from worker.audit import Trail
from worker.book import Book, WorkerShown
from worker.desk import Desk
from worker.dialects import ACCOUNT_LIMITS, ENDPOINT_COSTS, Trouble
from worker.exchange import Exchange
from worker.hands import Hands
from worker.mass import MassRunner, Means
from worker.masses import Masses
from worker.orders import Lane
from worker.outbox import Outbox
from worker.pacing import Limits, Pacer
from worker.rotation import Rotation
from worker.scripts import BookError
from worker.settings import SettingsError, WorkerSettings
from worker.signing import KeyProblem, permission_warning

log = logging.getLogger(__name__)

LIMITS_EVERY_S = 60.0
LIMITS_AGAIN_S = 5.0  # when they could not be read
TRIM_EVERY_S = 60.0
SHOW_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Office:
    """What one process works with."""

    desk: Desk
    hands: Hands
    mass_runner: MassRunner
    rotation: Rotation
    shutdown_s: float

    def stop(self) -> None:
        """What is in hand goes back into the book, what is under way to other workers."""
        self.desk.stop()
        self.hands.stop()
        self.mass_runner.stop()


_offices: dict[int, Office] = {}
_offices_lock = threading.Lock()


def desk() -> Desk:
    """This process' desk."""
    return _office().desk


def hands() -> Hands:
    """This process' hands."""
    return _office().hands


def mass_runner() -> MassRunner:
    """This process' runner of mass cancels."""
    return _office().mass_runner


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
    the_book = Book(server, settings.redis)
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
        )
    )
    runner.start()
    shown_as = WorkerShown(name, tuple(lane.value for lane in lanes), app.conf.worker_concurrency)
    threading.Thread(target=_keep_shown, args=(the_book, shown_as), name="shown", daemon=True).start()
    the_hands = Hands(the_desk, the_book, lanes, number=app.conf.worker_concurrency)
    rotation = Rotation(exchange, settings)
    if settings.private_key_path is not None:
        rotation.start()
    return Office(the_desk, the_hands, runner, rotation, settings.shutdown_s)


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
def _refuse_to_start_unfit(**_: Any) -> None:
    """Ends the process in one line unless settings, key and Redis are fit."""
    # SystemExit, because Celery swallows ordinary exceptions of this signal's handlers and runs on.
    try:
        settings = WorkerSettings.from_env()
        Exchange.from_settings(settings).close()
        Book(scripts.connect(settings.redis), settings.redis).ping()
    except (SettingsError, KeyProblem) as problem:
        sys.exit(f"cannot start: {problem}")
    except BookError as problem:
        sys.exit(f"cannot start: no Redis at {settings.redis.masked_url}: {problem}")
    if settings.private_key_path and (warning := permission_warning(settings.private_key_path)):
        log.warning(warning)


@signals.celeryd_after_setup.connect
def _note_concurrency(instance: Any, **_: Any) -> None:
    """What the command line says counts for our hands as for Celery's pool."""
    instance.app.conf.worker_concurrency = instance.concurrency


@signals.worker_ready.connect
def _begin(sender: Any = None, **_: Any) -> None:
    """Hands listen in the worker's own process; where a pool forks, they would be copied with their locks."""
    mine = _office()
    if sender is None or "prefork" not in str(type(sender.pool).__module__):
        mine.hands.start()
    # Where Celery would restart the process. At a terminal SIGHUP means that it was closed, and ends it.
    if callable(signal.getsignal(signal.SIGHUP)):
        signal.signal(signal.SIGHUP, lambda *_: mine.rotation.look_now())


@signals.worker_shutdown.connect
def _end(**_: Any) -> None:
    mine = _offices.get(os.getpid())
    if mine is not None:
        mine.hands.join(mine.shutdown_s)


@signals.worker_shutting_down.connect
def _give_back(**_: Any) -> None:
    """Stops the desk; ends the process anyway if something hangs: what it holds comes back by its lease."""
    mine = _offices.get(os.getpid())
    if mine is None:
        return
    last_resort = threading.Timer(mine.shutdown_s, os._exit, (0,))
    last_resort.daemon = True
    last_resort.start()
    mine.stop()
