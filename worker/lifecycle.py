"""A worker process' life: refuses to start unfit, has one desk, sweeps the book, and stops in good order."""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import Any

from celery import Celery, bootsteps, signals

from worker import bells, book
from worker.book import Book, BookError
from worker.desk import Desk
from worker.dialects import Trouble
from worker.exchange import Exchange
from worker.orders import Lane
from worker.settings import SettingsError, WorkerSettings
from worker.signing import KeyProblem, permission_warning

log = logging.getLogger(__name__)

# What became claimable is noticed within two seconds: half a second for the look, one of patience.
SWEEP_EVERY_S = 0.5
SWEEP_PATIENCE_S = 1.0

_desks: dict[int, Desk] = {}
_desks_lock = threading.Lock()


def attach(app: Celery) -> None:
    """Gives the application's workers their sweep."""
    app.steps["consumer"].add(Sweep)


def desk() -> Desk:
    """This process' desk, made at its first use: what is opened before a fork must not be used after it."""
    with _desks_lock:
        mine = _desks.get(os.getpid())
        if mine is None:
            settings = WorkerSettings.from_env()
            exchange = Exchange.from_settings(settings)
            shown = exchange.warm_up()
            if isinstance(shown, Trouble):
                log.warning("the exchange does not answer yet: %s", shown.problem.message)
            mine = Desk(
                Book(book.connect(settings.redis), settings.redis),
                exchange,
                cancel_deadline_s=settings.cancel_deadline_s,
                read_lag_s=settings.read_lag_s,
            )
            _desks[os.getpid()] = mine
        return mine


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
    mine = _desks.get(os.getpid())
    if mine is not None:
        mine.stop()


class Sweep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Rings for what is claimable when nobody is coming; on the consumer's timer of every worker."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self._timer: Any = None
        self._book: Book | None = None

    def start(self, consumer: Any) -> None:
        """Starts the timer; called again after every reconnect."""
        settings = WorkerSettings.from_env()
        self._book = Book(book.connect(settings.redis), settings.redis)
        self._timer = consumer.timer.call_repeatedly(SWEEP_EVERY_S, self._sweep, (consumer.app,))

    def stop(self, _consumer: Any) -> None:
        """Stops the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _sweep(self, app: Celery) -> None:
        assert self._book is not None
        try:
            for lane in self._book.lanes_to_wake(tuple(Lane), patience_s=SWEEP_PATIENCE_S):
                log.info("waking up for the %s lane", lane.value)
                bells.wake_up(app, lane)
        except BookError as error:
            log.warning("no sweep: %s", error)
        except app.connection_for_write().connection_errors as error:
            log.warning("no wake-up: %s", error)
