"""Describes what the planner decides by and what it decides, as ``lua/claim.lua`` gives and takes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kalshi_cancel.model.requests import Lane


@dataclass(frozen=True, slots=True)
class Line:
    """What waits in one lane on one path: ``due`` cancels now, the first of them since ``head_ms``."""

    lane: Lane
    path: str
    head_ms: int
    due: int


@dataclass(frozen=True, slots=True)
class Filled:
    """A bucket's tokens, the most that we count on, and the tokens that come in each second."""

    tokens: float
    capacity: float
    refill: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The cancel store and the buckets after a turn, at ``at_ms`` on Redis' clock."""

    at_ms: int = 0
    lines: tuple[Line, ...] = ()
    buckets: tuple[tuple[str, Filled], ...] = ()

    def next_due_s(self, *, reads: int) -> float | None:
        """In how many seconds something is due next, read-backs only if there may be any; None: never."""
        heads = [line.head_ms for line in self.lines if reads > 0 or line.path.startswith("write")]
        return max(min(heads) - self.at_ms, 0) / 1000 if heads else None

    def with_lines_of(self, earlier: Snapshot, lanes: Sequence[Lane]) -> Snapshot:
        """With the lines of other lanes than these, as they were."""
        return replace(
            self, lines=self.lines + tuple(each for each in earlier.lines if each.lane not in lanes)
        )

    @classmethod
    def parse(cls, at_ms: int, lines: Iterable[Sequence[Any]], buckets: Iterable[Sequence[Any]]) -> Snapshot:
        """As ``lua/lines.lua`` gives it."""
        return cls(
            at_ms,
            tuple(Line(Lane(lane), path, head_ms, due) for lane, path, head_ms, due in lines),
            tuple((name, Filled(*(each / 1000 for each in filled))) for name, *filled in buckets),
        )


@dataclass(slots=True)  # dozens are made for each turn: frozen, each would take three times as long
class Step:
    """One call: up to ``most`` orders of these paths in turn, paid from ``bucket``.

    Each costs ``cost`` tokens, or all ``together``. ``keep`` tokens and a ``share`` of the capacity stay in
    the bucket, and those of what is due on the path ``behind``. ``reads``: it is a read-back. Where fewer
    than ``least`` are due it is left out. ``times``: it may be so many calls.
    """

    lane: Lane
    paths: tuple[str, ...]
    bucket: str
    cost: float
    most: int = 1
    share: float = 0.0
    keep: float = 0.0
    together: bool = False
    reads: bool = False
    least: int = 1
    behind: str = ""
    times: int = 1

    def told(self) -> dict[str, Any]:
        """As ``lua/steps.lua`` takes it."""
        return {
            "lane": self.lane.value,
            "paths": self.paths,
            "bucket": self.bucket,
            "cost": self.cost,
            "most": self.most,
            "share": self.share,
            "keep": self.keep,
            "together": self.together,
            "reads": self.reads,
            "least": self.least,
            "behind": self.behind,
            "times": self.times,
        }
