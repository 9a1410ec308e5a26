"""Limits how many senders of a process read back at a time, so that new cancels find a free one."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Read-backs let new cancels go first, but not for ever.
READS_AFTER_S = 1.0
READS_LAST_S = 3600.0


class ReadSlots:
    """How many senders of a process may read back at a time: half of them, so that new cancels find one."""

    def __init__(self, senders: int) -> None:
        self._most = max(senders // 2, 1)
        self._is_lone = senders == 1
        self._lock = threading.Lock()
        self._taken = 0
        self._last_read = False

    @property
    def free(self) -> int:
        """How many more may begin."""
        return max(self._most - self._taken, 0)

    @property
    def after_s(self) -> float:
        """How much later than it is a read-back counts as due; a lone sender takes turns."""
        if self._is_lone:
            return READS_LAST_S if self._last_read else 0.0
        return READS_AFTER_S

    @contextmanager
    def of(self, reads: bool) -> Iterator[ReadSlot]:  # noqa: FBT001 - the claim is one of reads, or not
        """The slot of a sender for the body's time; of one that ``reads``, it is taken."""
        slot = ReadSlot(self)
        self._last_read = reads
        if reads:
            self.take(slot, at_most=math.inf)
        try:
            yield slot
        finally:
            with self._lock:
                self._taken -= slot.is_taken

    def take(self, slot: ReadSlot, *, at_most: float) -> bool:
        """Takes the slot, unless so many are taken."""
        with self._lock:
            if self._taken < at_most:
                slot.is_taken = True
                self._taken += 1
            return slot.is_taken

    def may_take(self, slot: ReadSlot) -> bool:
        """Takes a slot for a sender that came to cancel and has to read back."""
        return self.take(slot, at_most=self._most)


class ReadSlot:
    """Whether one sender may read back."""

    def __init__(self, slots: ReadSlots) -> None:
        self._slots = slots
        self.is_taken = False

    def may_read(self) -> bool:
        """Whether it has its slot, or gets one now."""
        return self.is_taken or self._slots.may_take(self)
