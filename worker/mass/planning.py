"""Plans a mass cancel: what it costs and how long it takes, from what was found.

Pure: the numbers come in, the plan goes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

from kalshi_cancel.model.counts import count_text
from kalshi_cancel.model.fields import is_order_id
from kalshi_cancel.model.mass_request import CANCEL_ALL, GROUP_TRIGGER, MassRequest
from kalshi_cancel.store.rate_limits import Limits

# What plan, hand-over and the last results take on top of the tokens' time.
OVERHEAD_S = 0.15
# Orders a second that one machine lists and settles when tokens do not hold it up, until measured.
ORDERS_PER_S = 7_000.0
# Single calls a second that two cores sign and send; only these are paid for by a shard's own bucket.
SINGLES_PER_S = 800.0
COMMAND_CATCH_UP_S = 0.5  # until listings show what a command has canceled
# An id that the exchange does not know is read so many times, the last time after the read lag; and the
# pauses on top. Two cores sign and send so many reads a second.
READS_OF_UNKNOWN = 3
PAUSES_OF_UNKNOWN_S = 0.5
READS_PER_S = 500.0


@dataclass(frozen=True, slots=True)
class Start:
    """What there was when the first runner began; ``started_s`` is the server's clock, epoch seconds.

    ``tokens`` in the write buckets by shard (0: the unscoped one) and in the read bucket; ``waiting``:
    cancels and reads of the risk lane that were asked for before, by the bucket that pays for them.
    """

    started_s: float
    tokens: Mapping[int, float]
    read_tokens: float
    waiting: Mapping[str, int]
    refused_calls: int

    def to_json(self) -> dict[str, Any]:
        """The stored form."""
        return {**asdict(self), "tokens": {str(shard): level for shard, level in self.tokens.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Start:
        """What :meth:`to_json` wrote, in this version or one before."""
        return cls(
            value["started_s"],
            {int(shard): level for shard, level in value["tokens"].items()},
            value.get("read_tokens", 0.0),
            value.get("waiting", {}),
            value.get("refused_calls", 0),
        )

    @property
    def waiting_cancels(self) -> int:
        """How many cancels wait."""
        return sum(number for path, number in self.waiting.items() if path.startswith("write"))

    @property
    def waiting_reads(self) -> int:
        """How many reads wait."""
        return sum(number for path, number in self.waiting.items() if path.startswith("read"))


@dataclass(frozen=True, slots=True)
class Found:
    """What there is to cancel: orders that a listing shows, by shard, and named ids that none shows.

    ``settled``: named ids that are settled already, and so are listed no more.
    ``after_s``: when the first of it was known, seconds since the start. ``listed_at`` None: there was no
    listing.
    """

    shards: Mapping[int, int]
    contracts: Decimal
    not_listed: int
    settled: int
    listed_at: str | None
    after_s: float

    @property
    def orders(self) -> int:
        """How many that are."""
        return sum(self.shards.values()) + self.not_listed + self.settled


@dataclass(frozen=True, slots=True)
class Command:
    """A mass command of the exchange's own that fits a scope; ``words`` say what it is and does besides."""

    what: str
    words: str
    order_group_id: str | None = None


def fitting_command(request: MassRequest) -> Command | None:
    """The exchange's own mass command for this very scope, if its side effects are allowed.

    None for a subaccount: whether cancel-all's minute for new orders keeps to it is not known.
    """
    scope = request.scope
    if not request.allow_side_effects:
        return None
    if scope.everything:
        return Command(CANCEL_ALL, "the exchange's cancel-all, which also hits orders of the next minute")
    # A group is in one subaccount, on one shard: naming them takes nothing of it away.
    is_group = scope.to_json().keys() - {"subaccount", "exchange_index"} == {"order_group_id"}
    if is_group and is_order_id(scope.order_group_id):
        words = "the order group's trigger, which closes the group until it is reset"
        return Command(GROUP_TRIGGER, words, scope.order_group_id)
    return None


_NUMBERS_OF_A_PLAN = (
    "started_s",
    "found_after_s",
    "orders",
    "tokens",
    "tokens_s",
    "predicted_s",
    "refused_calls_before",
)


def stored_plan(value: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The plan that was stored; None for one that another version has made in words of its own."""
    if value is None or not all(isinstance(value.get(name), int | float) for name in _NUMBERS_OF_A_PLAN):
        return None
    return dict(value) if isinstance(value.get("command"), bool) else None


def plan(
    start: Start,
    found: Found,
    limits: Limits,
    *,
    command: Command | None,
    pace: float | None,
    read_lag_s: float,
) -> dict[str, Any]:
    """The plan, as it is stored and reported; ``pace``: orders a second, as far as that was measured."""
    shards = dict(found.shards)
    if not_shown := found.not_listed + found.settled:
        shards[0] = shards.get(0, 0) + not_shown
    tokens_s = _tokens_s(shards, start, limits)
    work_s = (found.orders + start.waiting_cancels) / (pace or ORDERS_PER_S)
    cancels_s = max(tokens_s, work_s) if command is None else COMMAND_CATCH_UP_S + work_s
    reads_s = _reads_s(found.not_listed, start, limits, read_lag_s)
    predicted_s = OVERHEAD_S + (found.after_s + cancels_s + reads_s if found.orders else 0.0)
    return {
        "started_s": start.started_s,
        "listed_at": found.listed_at,
        "found_after_s": round(found.after_s, 3),
        "orders": found.orders,
        "ids_not_listed": found.not_listed,
        "contracts": count_text(found.contracts),
        "tokens": limits.cancel_cost * (found.orders if command is None else 1),
        "shards": {str(shard): number for shard, number in sorted(shards.items())},
        "paths": _paths(shards) if command is None else {"all": command.words},
        "tokens_s": round(tokens_s, 3),
        "command": command is not None,
        "predicted_s": round(predicted_s, 3),
        "refused_calls_before": start.refused_calls,
    }


def _tokens_s(shards: Mapping[int, int], start: Start, limits: Limits) -> float:
    """Seconds until the last of these orders is paid for, after what waits, from what the buckets hold."""
    ahead = {_shard_of(path): number for path, number in start.waiting.items() if path.startswith("write")}
    demand = {shard: shards.get(shard, 0) + ahead.get(shard, 0) for shard in {*shards, *ahead}}
    wanted = sum(demand.values()) * limits.cancel_cost
    low, high = 0.0, wanted / limits.write_refill
    for _ in range(60):
        middle = (low + high) / 2
        refilled = limits.write_refill * middle
        by_singles = sum(
            min(orders * limits.cancel_cost, start.tokens.get(shard, 0.0) + refilled)
            for shard, orders in demand.items()
            if shard != 0
        )
        by_singles = min(by_singles, SINGLES_PER_S * limits.cancel_cost * middle)
        if wanted - by_singles <= start.tokens.get(0, 0.0) + refilled:
            high = middle
        else:
            low = middle
    return high


def _shard_of(path: str) -> int:
    shard = path.partition(":")[2]
    return int(shard) if shard.isdecimal() else 0


def _reads_s(ids: int, start: Start, limits: Limits, read_lag_s: float) -> float:
    """Seconds until it is known of ids that no listing shows what became of them, once each was asked for."""
    if not ids:
        return 0.0

    def until_read(times: int) -> float:
        reads = ids * times + start.waiting_reads
        tokens_s = max(reads * limits.read_cost - start.read_tokens, 0.0) / limits.read_refill
        return max(tokens_s, reads / READS_PER_S)

    last_but_one_s = until_read(READS_OF_UNKNOWN - 1)
    return max(until_read(READS_OF_UNKNOWN), last_but_one_s + read_lag_s + PAUSES_OF_UNKNOWN_S)


def _paths(shards: Mapping[int, int]) -> dict[str, str]:
    return {
        str(shard): "batches from the unscoped budget"
        + ("" if shard == 0 else ", and singles from the shard's own")
        for shard in sorted(shards)
    }
