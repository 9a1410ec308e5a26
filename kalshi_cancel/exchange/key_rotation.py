"""Notices that the key was replaced on disk, and has calls signed with the new one once it is proven.

An id and a key that are replaced one after the other do not fit together for a moment, and a new key may not
be active yet: what does not load, or is not accepted for a read, is not used, and the old one stays.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import time
from collections.abc import Callable

from kalshi_cancel.exchange.client import Exchange, signer_from
from kalshi_cancel.exchange.signing import KeyProblem, permission_warning
from kalshi_cancel.settings.reader import SettingsError
from kalshi_cancel.settings.worker import WorkerSettings
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import say

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
# A new pair that is refused may become active by and by; what replaces it is tried at once.
TRY_AGAIN_S = 5.0


class Rotation:
    """Looks at the key's files every second, and at once when :meth:`look_now` is called.

    ``changed`` is called when calls are signed with another key, which the exchange accepts.
    """

    def __init__(
        self, exchange: Exchange, settings: WorkerSettings, *, changed: Callable[[], None] = lambda: None
    ) -> None:
        self._exchange = exchange
        self._changed = changed
        self._in_use = _pair(settings)
        self._tried: tuple[str, bytes] | None = None
        self._try_again_s = 0.0
        self._told = ""
        self._calls: queue.SimpleQueue[None] = queue.SimpleQueue()  # its put() may interrupt itself

    def look_now(self) -> None:
        """Has the files looked at at once; fit for a signal's handler."""
        self._try_again_s = 0.0
        self._calls.put(None)

    def watch(self) -> None:
        """Waits until the next look is due, and looks."""
        with contextlib.suppress(queue.Empty):
            self._calls.get(timeout=LOOK_EVERY_S)
        self._look()

    def _look(self) -> None:
        try:
            settings = WorkerSettings.from_env()
            pair = _pair(settings)
            if pair == self._in_use:
                self._told = ""
                return
            if pair == self._tried and time.monotonic() < self._try_again_s:
                return
            self._tried, self._try_again_s = pair, time.monotonic() + TRY_AGAIN_S
            failure = self._exchange.sign_with(signer_from(settings))
        except (SettingsError, KeyProblem) as problem:
            self._log_problem(str(problem))
            return
        if failure is not None:
            self._log_problem(f"{failure.problem.code}: {failure.problem.message}")
            return
        self._in_use = pair
        self._changed()
        say(log, LogEvent.KEY_ROTATED, key_id=settings.api_key_id)
        if settings.private_key_path and (warning := permission_warning(settings.private_key_path)):
            say(log, LogEvent.KEY_FILE_EXPOSED, why=warning)

    def _log_problem(self, why: str) -> None:
        """Says once why the old key stays in use."""
        if why != self._told:
            self._told = why
            say(log, LogEvent.KEY_NOT_USED, why=why)


def _pair(settings: WorkerSettings) -> tuple[str, bytes]:
    return settings.api_key_id, settings.private_key
