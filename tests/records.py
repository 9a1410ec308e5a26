"""What a record has to say of an order, and what reached the exchange for it."""

from __future__ import annotations

import time
from datetime import datetime
from math import floor

TICKER = "KXTEST-26NOV22-A"  # of the orders that the sandbox places
_NOTHING_KNOWN = {
    "status": None,
    "reduced_by": None,
    "fill_count": None,
    "remaining_count": None,
    "confirmed_by": None,
    "attempts": 1,
    "exchange_ts_ms": None,
    "requested_by": ["test"],
    "requested_by_left_out": 0,
    "error": None,
    "order": None,
}


# -- what is true, and what a record has to say about it


def says(value, order_id, outcome, **known):
    """Asserts on every field of a result; what is not named is not known, or the usual."""
    times = {"requested_at": value["requested_at"], "settled_at": value["settled_at"]}
    if outcome == "unresolved":
        assert times["settled_at"] is None
    else:
        requested, settled = (datetime.fromisoformat(text) for text in times.values())
        assert requested <= settled
        assert requested.utcoffset().total_seconds() == 0
        assert abs(settled.timestamp() - time.time()) < 60
    assert value == {"order_id": order_id, "outcome": outcome, **_NOTHING_KNOWN, **known, **times}


def by_cancel(truth, **more):
    """What a record knows of an order whose cancel was answered with a 200."""
    return {
        "outcome": "canceled",
        "status": "canceled",
        "reduced_by": truth["canceled_count_fp"],
        "remaining_count": "0.00",
        "confirmed_by": "cancel",
        "exchange_ts_ms": truth["history"][-1]["at_ms"],
        **more,
    }


class ProvenOrNull:
    """Equals the number of contracts, and null: where nothing proves the number, none is told."""

    def __init__(self, number):
        self.number = number

    def __eq__(self, other):
        return other is None or other == self.number

    def __hash__(self):
        return 0

    def __repr__(self):
        return f"{self.number!r} or None"


def by_read_back(truth, *, ours, **more):
    """What a record knows of an order that was read back; ``ours``: a cancel of ours did it."""
    shown = {name: value for name, value in truth.items() if name not in ("canceled_count_fp", "history")}
    return {
        "outcome": "canceled" if ours else "too_late",
        "status": truth["status"],
        "reduced_by": ProvenOrNull(truth["canceled_count_fp"]) if ours else "0.00",
        "fill_count": truth["fill_count_fp"],
        "remaining_count": truth["remaining_count_fp"],
        "confirmed_by": "read_back",
        "exchange_ts_ms": updated_ms(truth),
        "order": shown,
        **more,
    }


def updated_ms(order):
    """When an order last changed, on the exchange's clock."""
    return floor(datetime.fromisoformat(order["last_update_time"]).timestamp() * 1000)


def cancels(control, order_id):
    """The cancels that reached the exchange for an order."""
    return [call for call in control.calls(order_id=order_id) if call["method"] == "DELETE"]
