"""Keeps account of one mass cancel: what there was at its start, its plan, its progress and its report."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from kalshi_cancel.model.mass_request import MassRequest
from kalshi_cancel.model.requests import SHARDS, Lane, write_path
from kalshi_cancel.model.results import CancelResult, ConfirmedBy
from kalshi_cancel.store.mass_claim import MassClaim
from kalshi_cancel.store.rate_limits import Level
from worker.mass import planning, report
from worker.mass.listing import Listing
from worker.mass.means import Means
from worker.mass.planning import Command, Found, Start
from worker.mass.report import End

RESULTS_AT_ONCE = 30  # read with each look: more would take the processor from those that cancel


@dataclass(slots=True)
class Findings:
    """What a run has found out by now, beside its orders; see :class:`~worker.mass.report.End`."""

    why_not_flat: str
    flat_listing: Mapping[str, Any] | None = None
    proven_s: float | None = None
    key: Mapping[str, Any] | None = None
    command: Mapping[str, Any] | None = None
    command_may_have_worked: bool = False
    canceled_by_command: set[str] = field(default_factory=set)
    cannot_tell: Mapping[str, str] = field(default_factory=dict)
    not_asked: Mapping[str, str] = field(default_factory=dict)


class Account:
    """The account of one mass cancel; everything raises StoreError, and what writes raises Fenced."""

    def __init__(
        self,
        request: MassRequest,
        claim: MassClaim,
        means: Means,
    ) -> None:
        self._request = request
        self._claim = claim
        self._store = means.store
        self._mass_cancels = means.mass_cancels
        self._pacer = means.pacer
        self._read_lag_s = means.read_lag_s
        self.results: dict[
            str, CancelResult
        ] = {}  # final ones, as far as they were read: Redis may lose them
        self._to_read: deque[str] = deque()
        self.plan = planning.stored_plan(claim.read("plan"))
        self.start = self._begin()

    def _begin(self) -> Start:
        """What there was when the first runner began."""
        levels = self._levels()
        now = Start(
            started_s=self._claim.now_s(),
            tokens={shard: levels[write_path(shard)].tokens for shard in range(SHARDS)},
            read_tokens=levels["read"].tokens,
            waiting=self._store.waiting(Lane.RISK),
            refused_calls=_refused_calls(levels),
        )
        try:
            return Start.from_json(self._claim.begin(now.to_json()))
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
        ):  # noted by another version in words of its own
            self._claim.note(begun=now.to_json())
            return now

    def make_plan(
        self, listing: Listing | None, *, after_s: float, command: Command | None
    ) -> dict[str, Any]:
        """Plans what was found, ``after_s`` seconds after the start."""
        resting = {} if listing is None else listing.resting
        missing, settled = self._not_shown(resting)
        found = Found(
            shards=Counter(order.exchange_index or 0 for order in resting.values()),
            contracts=sum((order.remaining_count or Decimal(0) for order in resting.values()), Decimal(0)),
            not_listed=missing,
            settled=settled,
            listed_at=None if listing is None else listing.at,
            after_s=after_s,
        )
        self.plan = planning.plan(
            self.start,
            found,
            self._pacer.limits,
            command=command,
            pace=self._mass_cancels.pace(),
            read_lag_s=self._read_lag_s,
        )
        self._claim.note_audit("planned", **self.plan)
        if not self._request.dry_run:
            self._claim.note(plan=self.plan)
        return self.plan

    def _not_shown(self, resting: Collection[str]) -> tuple[int, int]:
        """Of the ids that were entered unlisted: how many a listing does not show, and are settled by now."""
        if not self._request.scope.names_orders_only:
            return 0, 0
        noted = self._claim.orders()
        ids = [
            each
            for each in self._request.scope.order_ids
            if each not in resting and not _is_settled(noted.get(each))
        ]
        settled = self._store.records(ids) if noted else {}
        return len(ids) - len(settled), len(settled)

    def report_progress(self, still: int, overdue: int) -> None:
        """Tells how many orders are open, and of how many whoever waits was told they are unresolved."""
        orders = self._claim.count_orders()
        still = min(still, orders)  # what was noted twice is left twice, for a moment
        progress = {
            "request_id": self._request.request_id,
            "orders": orders,
            "settled": orders - still,
            "open": still,
            "unresolved": overdue,
            "at": self._store.clock.now(),
        }
        self._claim.note(progress=progress)

    def read_results(self) -> None:
        """Reads some more of the results that are there by now."""
        if not self._to_read:
            self._to_read.extend(each for each in self._claim.noted if each not in self.results)
        some = [self._to_read.popleft() for _ in range(min(len(self._to_read), RESULTS_AT_ONCE))]
        found = self._store.records(some)
        self.results |= {
            each: replace(found[each], order=None) for each in found if found[each].outcome.final
        }

    def all_named_are_over(self) -> bool:
        """Whether it is known of each order by itself that it is over: then no listing need show it."""
        scope = self._request.scope
        if not scope.names_orders_only:
            return False
        records = self._store.records(scope.order_ids)
        return all(each in records and records[each].outcome.final for each in scope.order_ids)

    def note_refused(self, key_id: str) -> set[str]:
        """Notes that the exchange refuses a worker's key; all those keys."""
        noted = self._claim.read("refused") or {}
        key_ids = {*noted.get("key_ids", ()), key_id}
        self._claim.note(refused={"key_ids": sorted(key_ids)})
        return key_ids

    def report(self, findings: Findings) -> dict[str, Any]:
        """The report."""
        plan = self.plan or self.make_plan(None, after_s=0.0, command=None)
        planned = {} if self._request.dry_run else self._claim.orders()
        results = self._store.records(list(planned))
        results |= {
            each: known
            for each, known in self.results.items()
            if each not in results or report.is_lost(results[each])
        }
        others = self._store.standing(planned.keys() - results.keys())
        results |= others.results  # of those that were settled meanwhile
        rate_limited = max(
            _refused_calls(self._levels()) - plan["refused_calls_before"], 0
        )  # (Redis may have lost them)
        pace = report.pace_shown(
            plan, planned, results, rate_limited=rate_limited, overhead_s=planning.OVERHEAD_S
        )
        if pace is not None:
            self._mass_cancels.note_pace(pace)
        still_open = len(others.open) + len(others.dead)
        if still_open and findings.why_not_flat == report.NOTHING_PROVEN:
            findings.why_not_flat = f"{still_open} orders were not settled in time"
        end = End(
            completed_at=self._store.clock.now(),
            why_not_flat=findings.why_not_flat,
            flat_listing=findings.flat_listing,
            proven_s=findings.proven_s,
            tokens_spent=self._claim.spent()
            + self._tokens_of(planned, results, by_command=findings.command_may_have_worked),
            rate_limited=rate_limited,
            key=findings.key,
            command=findings.command,
            canceled_by_command=findings.canceled_by_command,
            lost=frozenset(others.lost),
            cannot_tell=findings.cannot_tell,
            not_asked=findings.not_asked,
        )
        return report.report(self._request, plan, planned, results, end)

    def _tokens_of(
        self, planned: Mapping[str, Any], results: Mapping[str, Any], *, by_command: bool
    ) -> float:
        """What the orders' own calls cost at least: cancels, and one read where that told the outcome."""
        limits = self._pacer.limits
        tokens: float = sum(
            (each.attempts - (by_command and planned[order_id].swept)) * limits.cancel_cost
            + (each.confirmed_by is ConfirmedBy.READ_BACK) * limits.read_cost
            for order_id, each in results.items()
            if not planned[order_id].settled
        )
        return tokens

    def _levels(self) -> dict[str, Level]:
        return self._pacer.levels(["read", *(write_path(shard) for shard in range(SHARDS))])


def _refused_calls(levels: Mapping[str, Level]) -> int:
    return sum(level.refused for level in levels.values())


def _is_settled(had: Any) -> bool:
    return had is not None and had.settled
