"""Asks the exchange what the account's key may do and see (``GET /api_keys``), beside a mass cancel."""

from __future__ import annotations

import threading
import time

from kalshi_cancel.exchange.calls import API_KEYS
from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.exchange.key_rights import KeyRights, rights_of
from kalshi_cancel.exchange.protocol import Failure
from kalshi_cancel.store.scripts import StoreError
from worker.dispatch.paid_calls import PaidCalls, Target

# Its tokens are waited for: a listing has mostly taken the last, and read-backs leave no more than these.
TOKENS_WITHIN_S = 5.0


class KeySight:
    """Reads what the key of this process may do, in a thread of its own: nobody has to wait for it."""

    def __init__(self, exchange: Exchange, calls: PaidCalls) -> None:
        self._exchange = exchange
        self._calls = calls
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
        give_up = time.monotonic() + TOKENS_WITHIN_S

        def wait(seconds: float) -> bool:
            time.sleep(min(seconds, TOKENS_WITHIN_S))
            return time.monotonic() < give_up

        paid = self._calls.take_in_time("read", self._calls.limits.list_cost, wait)  # as dear: the default
        if paid is None:
            self.failure = "no_tokens"
            return None
        self._key_id = self._exchange.signs_with[0]
        answer = self._calls.send(paid, Target("api_keys"), lambda: self._exchange.fetch(API_KEYS)).answer
        if isinstance(answer, Failure):
            self.failure = answer.problem.code
            return None
        self.failure = "its answer does not show this key"
        return rights_of(self._key_id, answer)
