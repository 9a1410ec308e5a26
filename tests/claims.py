"""Claims as a dispatcher makes them: by a plan, out of a snapshot of the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kalshi_cancel.model.requests import Lane
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.pending import Claim, ClaimRequest
from kalshi_cancel.store.rate_limits import Limits
from kalshi_cancel.store.steps import Snapshot
from worker.dispatch.planner import plan

NOTHING_SEEN = Snapshot()


def claim_request(
    lanes: Sequence[Lane],
    *,
    snapshot: Snapshot = NOTHING_SEEN,
    at_most: int = 1,
    lease_s: float = 60.0,
    exchange_ms: str | None = None,
    calls: int = 1,
    risk_reserve: float = 0.0,
    reads: int = 1_000,
    reads_after_s: float = 0.0,
    cancel_cost: float = 2.0,
    list_cost: float = 10.0,
    idle_s: float = 0.0,
) -> ClaimRequest:
    """What a dispatcher would ask for, had it seen this snapshot."""
    limits = Limits(1.0, 1.0, 1.0, 1.0, cancel_cost=cancel_cost, list_cost=list_cost)
    steps = plan(
        snapshot,
        limits,
        lanes,
        free_senders=calls,
        batch_limit=at_most,
        reserve=risk_reserve,
        reads=reads,
        reads_after_s=reads_after_s,
    )
    return ClaimRequest(
        tuple(lanes),
        steps,
        lease_s=lease_s,
        exchange_ms=exchange_ms,
        calls=calls,
        reads=reads,
        risk_reserve=risk_reserve,
        cancel_cost=cancel_cost,
        idle_s=idle_s,
    )


def seen(store: CancelStore, lanes: Sequence[Lane]) -> Snapshot:
    """What a turn sees that claims nothing."""
    snapshot = store.turn((), ClaimRequest(tuple(lanes), (), lease_s=0.0, exchange_ms=None)).snapshot
    assert snapshot is not None
    return snapshot


def claims_from(store: CancelStore, lanes: Sequence[Lane], **wanted: Any) -> list[Claim]:
    """What one turn claims that has just seen the store."""
    return store.turn((), claim_request(lanes, snapshot=seen(store, lanes), **wanted)).claims


def claim_from(store: CancelStore, lanes: Sequence[Lane], **wanted: Any) -> Claim:
    """The first of what one turn claims that has just seen the store."""
    return claims_from(store, lanes, **wanted)[0]
