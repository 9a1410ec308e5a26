"""Which armed fault strikes a call: by order, by operation, and by how often it has struck already."""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from kalshi_cancel.sandbox.spoiling import BESIDE, SPOILERS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from kalshi_cancel.sandbox.faults import Fault


@dataclass(slots=True, eq=False)
class Armed:
    """A fault that waits for its calls, and what it has seen of them; `until_s`: when its time is over."""

    number: int
    fault: Fault
    until_s: float | None
    seen: int = 0
    struck: int = 0
    draws: Counter[str] = field(default_factory=Counter)

    @property
    def used_up(self) -> bool:
        """Whether it has struck as often as it may."""
        return self.fault.times is not None and self.struck >= self.fault.times


class Faults:
    """The armed faults. Not thread-safe: its owner locks."""

    def __init__(self, seed: int = 0, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.seed = seed
        self._clock = clock
        self._count = 0
        self._armed: defaultdict[str | None, list[Armed]] = defaultdict(list)
        self._kinds: Counter[str] = Counter()

    def arm(self, fault: Fault) -> int:
        """Arms `fault` and returns its number."""
        self._count += 1
        until_s = None if fault.for_s is None else self._clock() + fault.for_s
        self._armed[fault.order_id].append(Armed(self._count, fault, until_s))
        self._kinds[fault.kind] += 1
        return self._count

    def armed(self) -> list[dict[str, Any]]:
        """All armed faults, how often they were met and how often they struck."""
        return [
            {"id": armed.number, "seen": armed.seen, "struck": armed.struck, **asdict(armed.fault)}
            for armed in sorted((a for many in self._armed.values() for a in many), key=lambda a: a.number)
            if not self._is_over(armed)
        ]

    def has(self, kind: str) -> bool:
        """Whether a fault of this kind is armed at all (cheap)."""
        return self._kinds[kind] > 0

    def call_fault(self, operation: str, order_ids: Sequence[str]) -> Fault | None:
        """The fault that strikes this call as a whole, if one does."""
        return self._strike(SPOILERS, operation, order_ids)

    def beside(self, operation: str, order_ids: Sequence[str]) -> dict[str, Fault]:
        """The faults that strike this call whatever else does, by their kinds."""
        struck = {kind: self.strike(kind, operation, order_ids) for kind in BESIDE}
        return {kind: fault for kind, fault in struck.items() if fault is not None}

    def strike(self, kind: str, operation: str, order_ids: Sequence[str]) -> Fault | None:
        """The fault of `kind` that strikes these orders within a call, if one does."""
        return self._strike({kind}, operation, order_ids) if self.has(kind) else None

    def random(self, salt: str) -> random.Random:
        """Randomness for this seed and `salt`."""
        return random.Random(f"{self.seed}/{salt}")

    def _strike(self, kinds: Collection[str], operation: str, order_ids: Sequence[str]) -> Fault | None:
        if not self._armed:
            return None
        for key in (*order_ids, None):
            for armed in self._armed.get(key, ()):
                fault = armed.fault
                if (
                    fault.kind in kinds
                    and fault.strikes(operation)
                    and not self._is_over(armed)
                    and self._fires(armed, operation, order_ids)
                ):
                    if armed.used_up:
                        self._disarm(key, armed)
                    return fault
        return None

    def _is_over(self, armed: Armed) -> bool:
        return armed.until_s is not None and self._clock() >= armed.until_s

    def _fires(self, armed: Armed, operation: str, order_ids: Sequence[str]) -> bool:
        armed.seen += 1
        if armed.seen <= armed.fault.skip:
            return False
        if armed.fault.probability < 1:
            about = order_ids[0] if len(order_ids) == 1 else operation
            armed.draws[about] += 1
            draw = self.random(f"{armed.number}/{about}/{armed.draws[about]}").random()
            if draw >= armed.fault.probability:
                return False
        armed.struck += 1
        return True

    def _disarm(self, key: str | None, armed: Armed) -> None:
        self._armed[key].remove(armed)
        self._kinds[armed.fault.kind] -= 1
        if not self._armed[key]:
            del self._armed[key]
