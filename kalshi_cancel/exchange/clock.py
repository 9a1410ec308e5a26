"""A foreign clock, known by bounds: two moments on it are compared only where their bounds do not overlap.

The exchange shows two clocks. The *front's* is the ``Date`` of its answers, in whole seconds; it judges the
timestamps that we sign. The *engine's* stamps orders: ``ts_ms`` of a cancel, ``last_update_time`` of an
order. They may disagree by seconds. Each is measured from answers to calls of our own: what an answer says
was true at some moment between the sending of the call and its answer. Each answer narrows the bounds.

The rule for whose cancel ended an order (the resolution applies it): the order's end, as the engine has
stamped it, is *before us* when it lies wholly before the sending of our first attempt that may have taken
effect, *not before us* when it lies wholly after that, and else nobody can tell.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections import deque
from dataclasses import dataclass

# Two clocks that are both corrected by NTP may part by twice its largest correction, 500 millionths.
DRIFT = 0.001
# A clock may be set. What nothing has confirmed for so long is not known any more.
FORGOTTEN_AFTER_S = 900.0
# So many answers tell how long one takes. It may take so many times as long as most of them.
ANSWERS = 20
LONGER = 2.0


@dataclass(frozen=True, slots=True)
class Span:
    """A moment that lies somewhere from ``low_ms`` to ``high_ms``, epoch milliseconds."""

    low_ms: float
    high_ms: float

    def is_before(self, other: Span) -> bool:
        """Whether it surely lies before ``other``."""
        return self.high_ms < other.low_ms

    def overlaps(self, other: Span) -> bool:
        """Whether the two may be the same moment."""
        return not self.is_before(other) and not other.is_before(self)

    def within(self, other: Span) -> Span:
        """What both bounds leave; only of two that overlap."""
        return Span(max(self.low_ms, other.low_ms), min(self.high_ms, other.high_ms))

    def hull(self, other: Span) -> Span:
        """What either of the two allows, and what lies between."""
        return Span(min(self.low_ms, other.low_ms), max(self.high_ms, other.high_ms))

    @property
    def width_ms(self) -> float:
        """How far apart the bounds are."""
        return self.high_ms - self.low_ms

    def moved(self, by_ms: float, *, unsure_ms: float = 0.0) -> Span:
        """The moment so much later (or earlier), known so much worse."""
        return Span(self.low_ms + by_ms - unsure_ms, self.high_ms + by_ms + unsure_ms)

    @property
    def middle_ms(self) -> float:
        """The best guess."""
        return (self.low_ms + self.high_ms) / 2


class BoundedClock:
    """One foreign clock, held against this process' monotonic one (seconds); shared by all threads.

    An answer that contradicts the bounds means that the clock was set, or that the answer is wrong. The next
    answer decides: until then the clock is not ``sure``.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._offset: Span | None = None  # the foreign clock minus ours
        self._at_s = 0.0  # when the offset was narrowed last
        self._contradiction: tuple[Span, float] | None = None

    def learn(self, shown: Span, *, sent_s: float, received_s: float, is_sure: bool = False) -> bool:
        """Narrows the bounds: the clock stood in ``shown`` at some moment from ``sent_s`` to ``received_s``.

        ``is_sure``: something else says as well that the clock is not where it was thought to be. False where
        this contradicts what was known.
        """
        heard = Span(shown.low_ms - received_s * 1000, shown.high_ms - sent_s * 1000)
        if heard.low_ms > heard.high_ms:
            return True  # it contradicts itself, and tells nothing
        with self._lock:
            known = self._offset_at(received_s)
            agrees = known is None or known.overlaps(heard)
            if not agrees and not is_sure:
                self._contradict(heard, received_s)
                return False
            self._offset = heard if known is None or is_sure else known.within(heard)
            self._at_s, self._contradiction = received_s, None
        return agrees

    def forget(self) -> None:
        """Forgets the bounds: the clock may have been set."""
        with self._lock:
            self._offset = self._contradiction = None

    def _contradict(self, heard: Span, at_s: float) -> None:
        if self._contradiction is not None:
            before, before_s = self._contradiction
            before = _aged(before, at_s - before_s)
            if before.overlaps(heard):  # two agree with each other: the clock was set
                self._offset, self._at_s, self._contradiction = before.within(heard), at_s, None
                return
        self._contradiction = heard, at_s

    def at(self, moment_s: float) -> Span | None:
        """The clock at a moment of our monotonic one; None while it is not known."""
        with self._lock:
            offset = self._offset_at(moment_s)
        return None if offset is None else offset.moved(moment_s * 1000)

    def surely_at(self, moment_s: float) -> Span | None:
        """The same; None also while the last answer contradicts what is known."""
        return None if self._contradiction is not None else self.at(moment_s)

    def _offset_at(self, moment_s: float) -> Span | None:
        age_s = abs(moment_s - self._at_s)
        if self._offset is None or age_s > FORGOTTEN_AFTER_S:
            return None
        return _aged(self._offset, age_s)


class AnswerTimes:
    """How long the last answers took; shared by all threads."""

    def __init__(self) -> None:
        self._took_s: deque[float] = deque(maxlen=ANSWERS)

    def learn(self, took_s: float) -> None:
        """Another answer took so long."""
        self._took_s.append(took_s)

    @property
    def usual_s(self) -> float:
        """Within this most answers come, if nothing has changed; infinite until enough is known."""
        took_s = tuple(self._took_s)
        return LONGER * statistics.median(took_s) if len(took_s) == ANSWERS else math.inf


def _aged(offset: Span, age_s: float) -> Span:
    return offset.moved(0.0, unsure_ms=age_s * 1000 * DRIFT)
