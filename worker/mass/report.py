"""The report of a mass cancel: pure, from what was planned and what became of each order.

In the shape of FIX's mass cancel report: affected orders with what was removed, the others with the reason.
Sums are of what is proven; how much is not is counted beside them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

from kalshi_cancel.model.counts import count_text
from kalshi_cancel.model.mass_request import MassRequest
from kalshi_cancel.model.orders import OrderStatus
from kalshi_cancel.model.results import CancelResult, ConfirmedBy, Outcome
from kalshi_cancel.model.scope import Scope
from kalshi_cancel.store.mass_claim import Planned

NOTHING_PROVEN = "its time was over before a listing could prove it"
# Canceled, and nothing tells any more whether by us: Redis has lost the result, or it was kept long enough.
RESULT_LOST = "result_lost"
PACE_FROM_ORDERS = 500  # fewer tell nothing about it


@dataclass(frozen=True, slots=True)
class End:
    """How a mass cancel has ended.

    ``flat_listing`` is the listing that proves it, None without a proof; ``why_not_flat`` says what is
    missing. ``lost``: orders without a result that nobody works on any more. ``cannot_tell``: orders that
    nobody can judge, with the reason; ``not_asked``: orders in scope that were not asked for, with the code
    of the reason.
    """

    completed_at: str
    why_not_flat: str | None
    flat_listing: Mapping[str, Any] | None
    proven_s: float | None
    tokens_spent: float
    rate_limited: int
    key: Mapping[str, Any] | None = None
    command: Mapping[str, Any] | None = None
    canceled_by_command: Collection[str] = ()
    lost: Collection[str] = ()
    cannot_tell: Mapping[str, str] = field(default_factory=dict)
    not_asked: Mapping[str, str] = field(default_factory=dict)


def report(
    request: MassRequest,
    plan: Mapping[str, Any],
    planned: Mapping[str, Planned],
    results: Mapping[str, CancelResult],
    end: End,
) -> dict[str, Any]:
    """The report, as it is stored."""
    mine = [each for order_id, each in results.items() if not planned[order_id].settled]
    return {
        **request.to_json(),
        "completed_at": end.completed_at,
        "flat": end.flat_listing is not None,
        "why_not_flat": None if end.flat_listing is not None else end.why_not_flat,
        "flat_listing": end.flat_listing,
        "key": end.key,
        "plan": dict(plan),
        "command": end.command,
        **_tally(planned, results, end, named=request.scope.order_ids),
        "canceled_by_command": sorted(set(end.canceled_by_command) - planned.keys()),
        "tokens_spent": end.tokens_spent,
        "rate_limited": end.rate_limited,
        "predicted_s": plan["predicted_s"],
        "actual_s": seconds_until_last(mine, plan["started_s"]),
        "proven_s": end.proven_s,
    }


def _tally(
    planned: Mapping[str, Planned], results: Mapping[str, CancelResult], end: End, *, named: Collection[str]
) -> dict[str, Any]:
    """What became of the planned orders, and of those that were named and never planned; with totals."""
    affected, not_affected = [], []
    counts, fills = _Sum(), _Sum()
    for order_id, had in planned.items():
        result = results.get(order_id)
        if result is not None and result.outcome is Outcome.CANCELED and not had.settled:
            affected.append({"order_id": order_id, "reduced_by": count_text(result.reduced_by)})
            counts.add(result.reduced_by)
        else:
            not_affected.append({"order_id": order_id, **_why_not(result, had, lost=order_id in end.lost)})
        if result is not None and not had.settled:
            fills.add(_filled_meanwhile(had, result))
    others = [
        *((order_id, "cannot_tell", why) for order_id, why in end.cannot_tell.items()),
        *((order_id, "not_asked", why) for order_id, why in end.not_asked.items()),
        *((order_id, "not_resting_in_scope", None) for order_id in named),
    ]
    known = set(planned)
    for order_id, reason, error in others:
        if order_id not in known:
            known.add(order_id)
            not_affected.append({"order_id": order_id, "reason": reason, "error": error})
    return {
        "affected": affected,
        "not_affected": not_affected,
        "orders_affected": len(affected),
        "contracts_canceled": count_text(counts.proven),
        "orders_count_unknown": counts.unknown,
        "orders_result_lost": sum(each["reason"] == RESULT_LOST for each in not_affected),
        "contracts_filled_meanwhile": count_text(fills.proven),
        "orders_fills_unknown": fills.unknown,
    }


class _Sum:
    """Contracts as far as they are proven, and how many orders' are not."""

    def __init__(self) -> None:
        self.proven = Decimal(0)
        self.unknown = 0

    def add(self, count: Decimal | None) -> None:
        """Adds those of one order."""
        if count is None:
            self.unknown += 1
        else:
            self.proven += count


def _why_not(result: CancelResult | None, had: Planned, *, lost: bool) -> dict[str, Any]:
    if result is None and not lost:
        return {"reason": "open", "error": None}
    if result is None or (is_lost(result) and not had.settled):
        return {"reason": RESULT_LOST, "error": None}
    reason = result.outcome.value
    if result.outcome in (Outcome.TOO_LATE, Outcome.CANCELED) and result.status:
        reason = f"too_late_{result.status.value}"
    return {"reason": reason, "error": result.error.code if result.error else None}


def is_lost(result: CancelResult) -> bool:
    """Whether a record that is not kept any more may have told that we have canceled it."""
    is_canceled = result.outcome is Outcome.TOO_LATE and result.status is OrderStatus.CANCELED
    return is_canceled and result.reduced_by is None


def _filled_meanwhile(had: Planned, result: CancelResult) -> Decimal | None:
    """Contracts of an order that were filled between the plan and its end; None where that is not proven.

    A smaller rest alone proves nothing: orders are decreased as well.
    """
    if result.fill_count is not None and had.fill_count is not None:
        return max(result.fill_count - had.fill_count, Decimal(0))
    if result.outcome is Outcome.CANCELED:
        is_whole = result.reduced_by is not None and result.reduced_by == had.remaining_count
        return Decimal(0) if is_whole else None
    # What never rested as far as we saw was not filled meanwhile; what is not over may be later.
    was_seen = had.remaining_count is not None
    return None if was_seen and result.outcome is Outcome.TOO_LATE else Decimal(0)


def seconds_until_last(results: Iterable[CancelResult], started_s: float) -> float | None:
    """From the start until the last order was settled; None when there was nothing to cancel."""
    settled = [_moment_s(each) for each in results if each.settled_at]
    return round(max(max(settled) - started_s, 0.0), 3) if settled else None


def _moment_s(result: CancelResult) -> float:
    return datetime.fromisoformat(result.settled_at or "").timestamp()


def pace_shown(
    plan: Mapping[str, Any],
    planned: Mapping[str, Planned],
    results: Mapping[str, CancelResult],
    *,
    rate_limited: int,
    overhead_s: float,
) -> float | None:
    """Orders a second that the first round shows when nothing hindered it; None when something did.

    What came later than the plan came when it came, and what was asked for twice, waited for tokens, or was
    canceled by others tells how fast that was.
    """
    first = {order_id for order_id, had in planned.items() if not had.late and not had.settled}
    outcomes = [results[order_id] for order_id in first if order_id in results]
    if len(outcomes) < max(len(first), PACE_FROM_ORDERS) or rate_limited or plan["command"]:
        return None
    if any(each.attempts != 1 or each.confirmed_by is not ConfirmedBy.CANCEL for each in outcomes):
        return None
    took_s = seconds_until_last(outcomes, plan["started_s"])
    if not took_s or max(plan["tokens_s"], plan["found_after_s"]) >= took_s / 2:
        return None
    return len(outcomes) / max(took_s - overhead_s, took_s / 2)


def refused(request_id: str, why: str) -> dict[str, Any]:
    """What is told of a mass cancel that could not be meant."""
    return {"request_id": request_id, "flat": False, "error": why}


def in_short(report_: Mapping[str, Any]) -> dict[str, Any]:
    """A report without what is said of each order: the audit log has that already."""
    lists = ("affected", "not_affected", "canceled_by_command", "plan")
    short = {name: value for name, value in report_.items() if name not in lists}
    if "scope" in short:
        short["scope"] = Scope.from_json(short["scope"]).in_short()
    counts = {
        f"orders_{name}": len(report_.get(name, ())) for name in ("not_affected", "canceled_by_command")
    }
    return {**short, **counts}
