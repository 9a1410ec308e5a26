"""Writes moments as text."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from functools import lru_cache


def utc_text(epoch_s: float) -> str:
    """A moment as ISO 8601 UTC with milliseconds."""
    seconds, ms = divmod(math.floor(epoch_s * 1000), 1000)
    return f"{_second_text(seconds)}.{ms:03d}Z"


@lru_cache(maxsize=64)  # thousands of orders a second share one
def _second_text(epoch_s: int) -> str:
    return datetime.fromtimestamp(epoch_s, tz=UTC).strftime("%Y-%m-%dT%H:%M:%S")
