"""Whether a worker lives: the beat of its main loop, in memory and as the age of a file."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import say

log = logging.getLogger(__name__)

BEAT_EVERY_S = 1.0
# Longer than the longest single wait of the main loop, which is that for a silent Redis.
BEAT_OLD_S = 15.0


class Heartbeat:
    """The beat of a worker's main loop, also as the age of a file where one is named."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._at = time.monotonic()
        self._warned = False

    def start(self) -> None:
        """The first beat; raises OSError when the file cannot be touched."""
        self._at = time.monotonic()
        if self._file is not None:
            self._file.touch()

    def beat(self) -> None:
        """Says that the main loop goes on; to be called from nowhere else, as often as one likes."""
        if self.age_s < BEAT_EVERY_S / 2:
            return
        try:
            self.start()
        except OSError as error:
            if not self._warned:
                self._warned = True
                say(log, LogEvent.HEARTBEAT_FAILED, why=str(error))

    @property
    def age_s(self) -> float:
        """Seconds since the last beat."""
        return time.monotonic() - self._at


def age_of(file: Path) -> float | None:
    """Seconds since the last beat that a file tells; None when there is no such file."""
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return None


def is_young(age_s: float | None) -> bool:
    """Whether a beat of this age is one of a worker that lives.

    One that is still to come is none: a clock was set since, and who lives has beaten again by now.
    """
    return age_s is not None and abs(age_s) <= BEAT_OLD_S
