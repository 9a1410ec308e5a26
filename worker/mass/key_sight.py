"""Asks the exchange what the account's key may do and see (``GET /api_keys``), beside a mass cancel."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.exchange.key_rights import KeyRights, rights_of
from kalshi_cancel.exchange.protocol import API_KEYS, Failure, Meaning
from kalshi_cancel.store.rate_limits import Pacer
from kalshi_cancel.store.scripts import StoreError
from worker.dispatch.events import CallMade, Emit


class KeySight:
    """Reads what this process' key may do, in a thread of its own: nobody waits for it longer than need be.

    ``spend`` is told what each call has cost.
    """

    def __init__(
        self, exchange: Exchange, pacer: Pacer, request_id: str, *, emit: Emit, spend: Callable[[float], None]
    ) -> None:
        self._exchange = exchange
        self._pacer = pacer
        self._id = request_id
        self._emit = emit
        self._spend = spend
        self._answered = threading.Event()
        self._thread: threading.Thread | None = None
        self._key_id = ""
        self.rights: KeyRights | None = None
        self.failure = "nothing is known yet"

    def read(self, within_s: float) -> KeyRights | None:
        """The rights of the key that signs now, once they are known; asks again after a failure."""
        if self.rights is not None and self._key_id == self._exchange.signs_with[0]:
            return self.rights
        if self._thread is None or not self._thread.is_alive():
            self._answered.clear()
            self._thread = threading.Thread(target=self._ask, name="key rights", daemon=True)
            self._thread.start()
        self._answered.wait(within_s)
        return self.rights

    def _ask(self) -> None:
        try:
            self.rights = None
            self.rights = self._rights()
        except StoreError as error:
            self.failure = str(error)
        finally:
            self._answered.set()

    def _rights(self) -> KeyRights | None:
        cost = self._pacer.limits.list_cost  # as dear: the default
        if self._pacer.take("read", cost) > 0:
            self.failure = "no_tokens"
            return None
        self._key_id, started = self._exchange.signs_with[0], time.monotonic()
        answer = self._exchange.fetch(API_KEYS)
        failure = answer if isinstance(answer, Failure) else None
        took_s = time.monotonic() - started
        self._emit(CallMade("api_keys", (), None, failure, took_s, "read", cost, self._id))
        if failure is None or failure.meaning not in (Meaning.BUSY, Meaning.NOT_SENT):
            self._spend(cost)
        if failure is not None and failure.meaning is Meaning.BUSY:
            self._pacer.correct("read", cost, taken_at=started)
        if isinstance(answer, Failure):
            self.failure = answer.problem.code
            return None
        self.failure = "its answer does not show this key"
        return rights_of(self._key_id, answer)
