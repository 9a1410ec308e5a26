"""The record of every call the exchange received, for assertions."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kalshi_cancel.sandbox.market import Tail


@dataclass(slots=True)
class Call:
    """One call as it was received, and what came of it.

    `received_ms` is the machine's clock (never skewed), `duration_ms` runs until the reply was ready.
    `status` is None while the call is under way and for a reply that was never sent.
    `effects` are the contracts this very call removed; `tail` those that a cancel-all's minute removed
    since, from orders that came after it. `reused` names what an earlier call had
    too: the signature, or the timestamp for the same method and path.
    """

    seq: int
    received_ms: int
    connection: int
    method: str
    path: str
    query: str
    operation: str
    order_ids: list[str]
    key_id: str
    timestamp: str
    signature: str
    body: str
    status: int | None = None
    code: str | None = None
    bucket: str | None = None
    tokens: int = 0
    effects: list[dict[str, str]] = field(default_factory=list)
    tail: Tail | None = None
    fault: str | None = None
    reused: list[str] = field(default_factory=list)
    duration_ms: float | None = None


_FIELDS = tuple(item.name for item in fields(Call))


class Calls:
    """All calls in the order of their arrival; safe from many threads."""

    def __init__(self) -> None:
        self.kept = True
        self._lock = threading.Lock()
        self._seq = 0
        self._calls: list[Call] = []
        self._seen: set[tuple[str, ...]] = set()

    def add(self, **fields: Any) -> Call:
        """A new record; it is filled in while the call is served."""
        with self._lock:
            self._seq += 1
            call = Call(seq=self._seq, **fields)
            if self.kept:
                self._calls.append(call)
                self._note_reuse(call)
        return call

    def _note_reuse(self, call: Call) -> None:
        if not call.signature:
            return
        # Two orders may well be canceled in the same millisecond; the same call may not be repeated in it.
        for name, mark in (
            ("signature", (call.key_id, call.signature)),
            ("timestamp", (call.key_id, call.timestamp, call.method, call.path)),
        ):
            if mark in self._seen:
                call.reused.append(name)
            self._seen.add(mark)

    def since(
        self, seq: int = 0, *, operation: str | None = None, order_id: str | None = None
    ) -> list[dict[str, Any]]:
        """The calls after number `seq` that match, oldest first."""
        with self._lock:
            calls = list(self._calls)
        return [
            {name: getattr(call, name) for name in _FIELDS} | {"tail": _victims(call.tail)}
            for call in calls
            if call.seq > seq
            and (operation is None or call.operation == operation)
            and (order_id is None or order_id in call.order_ids)
        ]

    def clear(self) -> None:
        """Forgets all calls; numbers go on, so that `since` stays meaningful."""
        with self._lock:
            self._calls.clear()
            self._seen.clear()


def _victims(tail: Tail | None) -> list[dict[str, str]]:
    victims = () if tail is None else tuple(tail.victims)
    return [{"order_id": order.order_id, "reduced_by": f"{count:.2f}"} for order, count in victims]
