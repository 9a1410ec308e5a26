"""Keeps the leases of what is claimed alive, and knows which ones have run out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.pending import Entry

# A vanished worker's orders are due again after this; kept alive while the sender lives.
LEASE_S = 1.5
EXTEND_EVERY_S = 0.3
# Longer than any call takes with all that follows it: a sender that has had an entry for so long hangs.
HELD_MOST_S = 90.0


class Leases:
    """The leases of one process; :meth:`extend` is to be called every ``EXTEND_EVERY_S``.

    Judged by this process' own monotonic clock from before each call: a host that was frozen finds its
    leases over when it wakes, before it asks anybody.
    """

    def __init__(self, store: CancelStore, *, lost: Callable[[int], None] = lambda _entries: None) -> None:
        self._store = store
        self._lost = lost
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}  # by token
        self._valid_until: dict[str, float] = {}
        self._since: dict[str, float] = {}

    def hold(self, entries: Sequence[Entry], *, since: float) -> None:
        """Keeps the leases of entries claimed at ``since`` (monotonic) alive until they are released."""
        with self._lock:
            for entry in entries:
                self._entries[entry.token] = entry
                self._valid_until[entry.token] = since + LEASE_S
                self._since[entry.token] = since

    def release(self, entries: Sequence[Entry]) -> None:
        """Lets go of entries; of those that are not held, nothing happens."""
        with self._lock:
            for entry in entries:
                self._entries.pop(entry.token, None)
                self._valid_until.pop(entry.token, None)
                self._since.pop(entry.token, None)

    def is_held(self, entry: Entry) -> bool:
        """Whether no other sender can have the entry yet."""
        return time.monotonic() < self._valid_until[entry.token]

    def extend(self) -> None:
        """Has all leases run anew; raises StoreError."""
        asked = time.monotonic()
        with self._lock:
            entries = [
                entry for token, entry in self._entries.items() if asked - self._since[token] < HELD_MOST_S
            ]
        if not entries:
            return
        held = self._store.extend(entries, lease_s=LEASE_S)
        lost = 0
        with self._lock:
            for entry, still in zip(entries, held, strict=True):
                if entry.token in self._valid_until:
                    self._valid_until[entry.token] = asked + LEASE_S if still else 0.0
                    lost += not still
        if lost:
            self._lost(lost)
