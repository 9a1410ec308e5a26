"""The report of a mass cancel: pure, from what was planned and what became of each order.

In the shape of FIX's mass cancel report: affected orders with what was removed, the others with the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

from worker.masses import Planned
from worker.orders import CancelResult, OrderStatus, Outcome, count_text


def tally(
    planned: Mapping[str, Planned], results: Mapping[str, CancelResult], *, named: Collection[str]
) -> dict[str, Any]:
    """What became of the planned orders, and of those that were named and never planned; with totals."""
    affected, not_affected = [], []
    contracts, filled = Decimal(0), Decimal(0)
    for order_id, had in planned.items():
        result = results.get(order_id)
        if result is not None and result.outcome is Outcome.CANCELED and not had.settled:
            affected.append({"order_id": order_id, "reduced_by": count_text(result.reduced_by)})
            contracts += result.reduced_by or Decimal(0)
        else:
            not_affected.append({"order_id": order_id, **_why_not(result)})
        filled += _filled_meanwhile(had, result)
    not_affected += [
        {"order_id": each, "reason": "not_resting_in_scope", "error": None}
        for each in named
        if each not in planned
    ]
    return {
        "affected": affected,
        "not_affected": not_affected,
        "orders_affected": len(affected),
        "contracts_canceled": count_text(contracts),
        "contracts_filled_meanwhile": count_text(filled),
    }


def seconds_until_last(results: Iterable[CancelResult], started_s: float) -> float | None:
    """From the plan until the last order was settled; None when there was nothing to cancel."""
    settled = [datetime.fromisoformat(each.settled_at).timestamp() for each in results if each.settled_at]
    return round(max(max(settled) - started_s, 0.0), 3) if settled else None


def in_short(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report without what is said of each order: the trail has that already."""
    short = {
        name: value for name, value in report.items() if name not in ("affected", "not_affected", "plan")
    }
    return {**short, "orders_not_affected": len(report["not_affected"])}


def _why_not(result: CancelResult | None) -> dict[str, Any]:
    if result is None:
        return {"reason": "open", "error": None}
    reason = result.outcome.value
    if result.outcome in (Outcome.TOO_LATE, Outcome.CANCELED) and result.status:
        reason = f"too_late_{result.status.value}"
    return {"reason": reason, "error": result.error.code if result.error else None}


def _filled_meanwhile(had: Planned, result: CancelResult | None) -> Decimal:
    """Contracts of an order that were filled between the plan and its end, as far as both are known."""
    if result is None or had.remaining_count is None:
        return Decimal(0)
    if result.status is OrderStatus.EXECUTED:
        return had.remaining_count
    if result.fill_count is not None and had.fill_count is not None:
        return max(result.fill_count - had.fill_count, Decimal(0))
    if result.outcome is Outcome.CANCELED and result.reduced_by is not None:
        return max(had.remaining_count - result.reduced_by, Decimal(0))
    return Decimal(0)
