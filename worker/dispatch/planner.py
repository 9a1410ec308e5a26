"""Plans what to claim next: of which lane, on which path, for how many orders, and from which bucket.

A pure function over what the last turn has left in the store. By now that may be out of date: others claim,
too, and cancels come in. So a plan begins with what the snapshot says, and goes on with a step for every
other path, in case something waits there by now. ``lua/steps.lua`` executes the steps in turn, as far as
something is due and paid for. No step can take more than there is.

The rules: the lanes in turn, the most urgent first. Within a lane the path whose head has waited longest, but
for a head start: what was never sent goes before what is to be read back. Paths:

- ``write``: as many cancels as the unscoped bucket pays for, in one call, filled up from the shards' paths.
- ``write:N``: one cancel of a shard from its own bucket, the fullest first; or many from what the unscoped
  bucket can spare. It lends to the shards where it refills as fast as single calls are made, and where they
  have no tokens.
- ``read``: one read-back. ``reads``: many that one listing may answer, or one if that is cheaper. A read-back
  leaves the tokens of a listing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kalshi_cancel.model.requests import Lane
from kalshi_cancel.store.rate_limits import Limits
from kalshi_cancel.store.steps import Filled, Line, Snapshot, Step

READS_AT_ONCE = 200  # what is put down in one step, too
# A call costs as much as ten orders: for few, singles are as good and leave the unscoped bucket to fill up.
WORTH_A_CALL = 20
# Of a sender's time: a bucket that takes longer to refill is kept for what only it pays for.
SINGLE_CALL_S = 0.003
# Of what goes out many at a time, before singles that came with it.
HEAD_START_MS = 100

WRITE, READ, READS = "write", "read", "reads"


def plan(
    snapshot: Snapshot,
    limits: Limits,
    lanes: Sequence[Lane],
    *,
    free_senders: int,
    batch_limit: int,
    reserve: float,
    ago_s: float = 0.0,
    reads: int = 1_000,
    reads_after_s: float = 0.0,
) -> tuple[Step, ...]:
    """The steps to take for so many free senders, the most urgent first.

    Up to ``batch_limit`` orders are canceled in one call. ``reserve`` is the share of each write bucket that
    only the risk lane may touch. ``ago_s``: the snapshot's age. At most ``reads`` of the calls are
    read-backs, and each of those counts as due ``reads_after_s`` later than it is.
    """
    buckets = {name: _refilled(filled, ago_s) for name, filled in snapshot.buckets}
    may = _May(limits, batch_limit, snapshot.at_ms + ago_s * 1000, reads, reads_after_s * 1000)
    steps: list[Step] = []
    for lane in lanes:
        lines = [line for line in snapshot.lines if line.lane is lane]
        steps += _Lane(lane, lines, buckets, may, 0.0 if lane is Lane.RISK else reserve).steps(free_senders)
    return tuple(steps)


def _refilled(filled: Filled, in_s: float) -> Filled:
    tokens = filled.tokens + filled.refill * in_s
    return Filled(min(tokens, filled.capacity), filled.capacity, filled.refill)


def _is_shard(path: str) -> bool:
    return path.startswith("write:")


@dataclass(slots=True)
class _May:
    """What a plan may do, in all lanes; ``reads`` are those that are left."""

    limits: Limits
    batch_limit: int
    now_ms: float
    reads: int
    reads_after_ms: float


class _Lane:
    """One lane as it will be after the steps that are planned so far; all lanes share the ``buckets``."""

    def __init__(
        self, lane: Lane, lines: Sequence[Line], buckets: dict[str, Filled], may: _May, share: float
    ) -> None:
        self._lane = lane
        self._lines = lines
        self._buckets = buckets
        self._may = may
        self._limits = may.limits
        self._batch_limit = may.batch_limit
        self._share = share
        self._times = 1  # how many calls each step may be
        # (Since the snapshot the first of a line may have become due.)
        self._due = {line.path: max(line.due, 1) for line in lines if line.due or line.head_ms <= may.now_ms}

    def steps(self, free_senders: int) -> list[Step]:
        """One for each free sender, as long as something is due, and then one for every other path."""
        steps: list[Step] = []
        for _ in range(free_senders):
            step = self._next()
            if step is None:
                break
            # (By now so many may wait that one listing is cheaper.)
            steps += [self._listing(), step] if step.paths == (READS,) and step.most == 1 else [step]
            if step.most > 1:  # a call for many has its turn to itself
                break
            self._take(step)
        return steps + self._in_case(free_senders)

    def _next(self) -> Step | None:
        """The next call; None: nothing that is due can be paid for."""
        heads = sorted((self._since(line), line.path) for line in self._lines if line.path in self._due)
        shards = self._shards([path for _, path in heads])
        for _, path in heads:
            if _is_shard(path):
                step = self._of_shards(shards)
            elif path == WRITE:
                lent = reversed(shards) if self._lends_to(shards) else ()
                step = self._together((WRITE, *lent), self._batch_limit)
            elif path == READS and self._due[path] >= self._worth_a_listing:
                step = self._listing()
            else:
                step = self._read(path)
            if step is not None and self._pays(step):
                return step
        return None

    def _since(self, line: Line) -> float:
        """Since when it waits, with its head start."""
        if line.path == WRITE:
            return line.head_ms - HEAD_START_MS
        return line.head_ms if _is_shard(line.path) else line.head_ms + self._may.reads_after_ms

    def _shards(self, paths: Sequence[str]) -> list[str]:
        """Those of shards, the one whose bucket holds the most first: what a full one refills is lost."""
        shards = [path for path in paths if _is_shard(path)]
        return sorted(shards, key=lambda path: -self._bucket(path).tokens)

    def _of_shards(self, shards: Sequence[str]) -> Step | None:
        """A single one from the fullest bucket, or many from what the unscoped one can spare."""
        due = sum(self._due[path] for path in shards)
        paid = self._orders(WRITE, self._limits.cancel_cost)
        many = min(paid, self._batch_limit, due, paid - self._due.get(WRITE, 0))
        lacking = self._lacks(shards)
        if many > 1 and self._lends_to(shards) and (lacking or many >= min(due, WORTH_A_CALL)):
            return self._lending(shards, many)
        return None if lacking else self._single(shards[0])

    def _lacks(self, shards: Sequence[str]) -> bool:
        return bool(shards) and self._orders(shards[0], self._limits.cancel_cost) == 0

    def _lends_to(self, shards: Sequence[str]) -> bool:
        """Whether the unscoped bucket pays for cancels of shards, too."""
        refills_fast = self._bucket(WRITE).refill * SINGLE_CALL_S >= self._limits.cancel_cost
        return self._lacks(shards) or refills_fast

    def _in_case(self, free_senders: int) -> list[Step]:
        """Steps for every path, in case more waits there by now than was seen."""
        shards = self._shards([name for name in self._buckets if _is_shard(name)])
        self._times = free_senders
        steps = [self._together((WRITE,), self._batch_limit), *map(self._single, shards)]
        if self._may.reads > 0:
            others = [line.path for line in self._lines if line.path not in (WRITE, READ, READS, *shards)]
            steps += [self._listing(), *map(self._read, (READS, READ, *others))]
        if shards and self._batch_limit > 1:  # (by then their own buckets are empty)
            steps.append(self._lending(shards, self._batch_limit))
        return steps

    # -- the kinds of steps

    def _together(self, paths: tuple[str, ...], most: int, behind: str = "") -> Step:
        cost = self._limits.cancel_cost
        return Step(self._lane, paths, WRITE, cost, most, self._share, behind=behind, times=self._times)

    def _lending(self, shards: Sequence[str], most: int) -> Step:
        """Many of shards, from what the unscoped bucket's own cancels leave."""
        return self._together(tuple(reversed(shards)), most, behind=WRITE)

    def _single(self, path: str) -> Step:
        return Step(self._lane, (path,), path, self._limits.cancel_cost, 1, self._share, times=self._times)

    def _read(self, path: str) -> Step:
        """One read-back; also where a newer version than this one left off."""
        cost = self._limits.read_cost
        keep = self._kept_for_listings(cost)
        return Step(self._lane, (path,), READ, cost, keep=keep, reads=True, times=self._times)

    def _listing(self) -> Step:
        """One listing for many, if that is cheaper than to read each."""
        cost = self._limits.list_cost
        return Step(
            self._lane,
            (READS,),
            READ,
            cost,
            READS_AT_ONCE,
            keep=self._kept_for_listings(cost),
            together=True,
            reads=True,
            least=self._worth_a_listing,
        )

    @property
    def _worth_a_listing(self) -> int:
        return math.floor(self._limits.list_cost / self._limits.read_cost) + 1

    def _kept_for_listings(self, cost: float) -> float:
        return min(self._limits.list_cost, max(self._bucket(READ).capacity - cost, 0.0) / 2)

    # -- what it comes to

    def _bucket(self, name: str) -> Filled:
        return self._buckets.get(name) or Filled(math.inf, math.inf, math.inf)

    def _orders(self, bucket: str, cost: float, *, keep: float = 0.0) -> int:
        """How many of this cost there are tokens for."""
        filled = self._bucket(bucket)
        share = self._share if bucket != READ else 0.0
        there = (filled.tokens - keep - (share * filled.capacity if share else 0.0)) / cost
        return max(math.floor(there), 0) if there < math.inf else self._batch_limit

    def _pays(self, step: Step) -> bool:
        if step.reads and self._may.reads <= 0:
            return False
        return self._orders(step.bucket, step.cost, keep=step.keep) >= 1

    def _take(self, step: Step) -> None:
        """One order less, and its tokens."""
        path = next(path for path in step.paths if path in self._due)
        self._due[path] -= 1
        if not self._due[path]:
            del self._due[path]
        self._may.reads -= step.reads
        filled = self._bucket(step.bucket)
        self._buckets[step.bucket] = replace(filled, tokens=filled.tokens - step.cost)
