"""A worker process' life: refuses to start unfit, has one context, and stops in good order."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from celery import signals

from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.exchange.signing import KeyProblem, permission_warning
from kalshi_cancel.settings.reader import SettingsError
from kalshi_cancel.settings.worker import WorkerSettings, read_log_format
from kalshi_cancel.store import scripts
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.scripts import StoreError
from kalshi_cancel.telemetry import logs
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.tracing import send_what_is_left
from worker.runtime import options as worker_options
from worker.runtime.context import context, opened_context
from worker.telemetry.watch import CannotBeWatchedError, watch

log = logging.getLogger(__name__)

_stopping = threading.Event()  # this process was told to end


@signals.celeryd_init.connect
def _refuse_options(conf: Any, options: Mapping[str, Any], **_: Any) -> None:
    """Ends the process in one line if the command line asks for what cannot work."""
    if found := worker_options.problems(options, pool=conf.worker_pool):
        sys.exit(f"cannot start: {'; '.join(found)}")


@signals.worker_init.connect
def _refuse_to_start_unfit(sender: Any = None, **_: Any) -> None:
    """Ends the process in one line unless settings, key, Redis and host are fit, and it can be watched."""
    if sender is not None:
        # Of no use here, and gossip ends a worker over what a stranger publishes.
        sender.options |= {"without_gossip": True, "without_mingle": True}
    # SystemExit, because Celery swallows ordinary exceptions of this signal's handlers and runs on.
    try:
        settings = WorkerSettings.from_env()
        Exchange.from_settings(settings).close()
        CancelStore(scripts.connect(settings.redis), settings.redis).ping()
        watch.open(settings, forks=_forks(sender))
    except (SettingsError, KeyProblem, CannotBeWatchedError) as problem:
        sys.exit(f"cannot start: {problem}")
    except StoreError as problem:
        sys.exit(f"cannot start: no Redis at {settings.redis.masked_url}: {problem}")
    if _forks(sender) and (lacking := _lacking_for_processes()):
        sys.exit(f"cannot start: -P processes needs {lacking}")


def _lacking_for_processes() -> str:
    """What the host lacks for Celery's pool of processes; empty: nothing."""
    try:
        tempfile.gettempdir()
    except OSError:
        return "a folder for temporary files that can be written to: set TMPDIR"
    try:
        multiprocessing.get_context("fork").Lock()
    except OSError as problem:
        return f"semaphores, for which /dev/shm must be writable: {problem.strerror}"
    return ""


@signals.after_setup_logger.connect
@signals.after_setup_task_logger.connect
def _format_log(logger: logging.Logger, **_: Any) -> None:
    logs.set_format(logger, read_log_format())


@signals.celeryd_after_setup.connect
def _greet(instance: Any, **_: Any) -> None:
    """The first words after the log is set up."""
    # What the command line says counts for our senders as for Celery's pool.
    instance.app.conf.worker_concurrency = instance.concurrency
    if logs.is_json(logging.getLogger()):
        instance.quiet = True  # Celery's banner is no JSON
    path = WorkerSettings.from_env().private_key_path
    if path and (warning := permission_warning(path)):
        logs.say(log, LogEvent.KEY_FILE_EXPOSED, why=warning)


@signals.worker_process_init.connect
def _begin_a_process_of_the_pool(**_: Any) -> None:
    watch.leave_the_port()
    _collect_garbage_seldom()


@signals.worker_process_shutdown.connect
def _send_what_is_left(**_: Any) -> None:
    send_what_is_left()


@signals.worker_ready.connect
def _begin(sender: Any, **_: Any) -> None:
    """Senders listen in the worker's own process; a pool that forks would copy them with their locks."""
    mine = context()
    if _stopping.is_set():  # told to end while it was opened
        mine.stop()
        return
    _collect_garbage_seldom()
    mine.begin()
    if not _forks(sender.controller):
        mine.doers.senders.start(mine.services)
        with suppress(StoreError):  # it is said again and again
            mine.doers.senders.show_listeners()
    # Where Celery would restart the process. At a terminal SIGHUP means that it was closed, and ends it.
    if callable(signal.getsignal(signal.SIGHUP)):
        signal.signal(signal.SIGHUP, lambda *_: mine.doers.rotation.look_now())
    watch.serve(mine.readiness, mine.services)


def _collect_garbage_seldom() -> None:
    """Spares the garbage collector what is there after the start, because that stays.

    A look at all of it takes 50 ms, in which nothing is sent.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 5)  # thousands of orders are made at once, and stay for a while, too


@signals.worker_shutdown.connect
def _end(**_: Any) -> None:
    mine = opened_context()
    if mine is not None:
        mine.join()
    watch.close()


@signals.worker_shutting_down.connect
def _retry_later(**_: Any) -> None:
    """Stops the dispatcher; ends the process if something hangs: what it holds comes back by its lease."""
    _stopping.set()
    mine = opened_context()
    last_resort = threading.Timer(WorkerSettings.from_env().shutdown_s, _end_anyway)
    last_resort.daemon = True
    last_resort.start()
    if mine is not None:
        mine.stop()


def _end_anyway() -> None:
    watch.close()
    os._exit(0)


def _forks(worker: Any) -> bool:
    """Whether a worker's pool is one of processes."""
    return worker_options.forks(worker.pool_cls)
