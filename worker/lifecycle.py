"""A worker process' life: refuses to start unfit, has one desk, and stops in good order."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from typing import Any

from celery import Celery, signals
from celery.app import app_or_default

from worker import bells, book
from worker.book import Book, BookError
from worker.desk import Desk
from worker.dialects import Trouble
from worker.exchange import Exchange
from worker.orders import Lane
from worker.settings import SettingsError, WorkerSettings
from worker.signing import KeyProblem, permission_warning

log = logging.getLogger(__name__)

_desks: dict[int, Desk] = {}
_desks_lock = threading.Lock()


def desk() -> Desk:
    """This process' desk, made at its first use: what is opened before a fork must not be used after it."""
    with _desks_lock:
        mine = _desks.get(os.getpid())
        if mine is None:
            mine = _desks[os.getpid()] = _open_desk(WorkerSettings.from_env(), app_or_default())
        return mine


def _open_desk(settings: WorkerSettings, app: Celery) -> Desk:
    exchange = Exchange.from_settings(settings)
    shown = exchange.warm_up()
    if isinstance(shown, Trouble):
        log.warning("the exchange does not answer yet: %s", shown.problem.message)
    consumed = {Lane.of_queue(name) for name in app.amqp.queues.consume_from}
    return Desk(
        Book(book.connect(settings.redis), settings.redis),
        exchange,
        cancel_deadline_s=settings.cancel_deadline_s,
        cancel_max_age_s=settings.cancel_max_age_s,
        read_lag_s=settings.read_lag_s,
        # Who listens to one queue only works that lane only: a risk worker keeps its hands free for risk.
        lanes=[lane for lane in Lane if lane in consumed],
        hands=app.conf.worker_concurrency,
        call_hand=lambda lane: bells.wake_up(app, lane),
        name=f"{socket.gethostname()}:{os.getpid()}",
    )


@signals.worker_init.connect
def _refuse_to_start_unfit(**_: Any) -> None:
    """Ends the process in one line unless settings, key and Redis are fit."""
    # SystemExit, because Celery swallows ordinary exceptions of this signal's handlers and runs on.
    try:
        settings = WorkerSettings.from_env()
        Exchange.from_settings(settings).close()
        Book(book.connect(settings.redis), settings.redis).ping()
    except (SettingsError, KeyProblem) as problem:
        sys.exit(f"cannot start: {problem}")
    except BookError as problem:
        sys.exit(f"cannot start: no Redis at {settings.redis.masked_url}: {problem}")
    if settings.private_key_path and (warning := permission_warning(settings.private_key_path)):
        log.warning(warning)


@signals.worker_ready.connect
def _warm_up(**_: Any) -> None:
    desk()


@signals.worker_shutting_down.connect
def _give_back(**_: Any) -> None:
    """Stops the desk; ends the process anyway if something hangs: what it holds comes back by its lease."""
    settings = WorkerSettings.from_env()
    last_resort = threading.Timer(settings.shutdown_s, os._exit, (0,))
    last_resort.daemon = True
    last_resort.start()
    mine = _desks.get(os.getpid())
    if mine is not None:
        mine.stop()
