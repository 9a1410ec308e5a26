"""Reads the moments that the exchange tells: in headers, time stamps and orders, as numbers or as text."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from decimal import Decimal
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any

_NUMBER = re.compile(r"[0-9]{10,20}(\.[0-9]{1,9})?")
_SECONDS = re.compile(r"[Tt ][0-9]{2}:?[0-9]{2}:?[0-9]{2}(?:[.,]([0-9]{1,3}))?")


@lru_cache(maxsize=8)  # the same in all replies of a second
def parse_date_s(date: str) -> float | None:
    """The moment of a ``Date`` header, epoch seconds, UTC where it names no zone; None: it cannot be read."""
    try:
        moment = parsedate_to_datetime(date)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def parse_ts_ms(value: object) -> int | None:
    """A ``ts_ms`` of the engine, epoch ms; None: it cannot be one."""
    return value if type(value) is int and _MS_FROM <= value < _MS_TO else None


# A number that tells a moment is of one of these units, by its size: (from, to, units a second).
_EPOCHS = ((10**9, 10**10, 1), (10**12, 10**13, 1000), (10**15, 10**16, 10**6), (10**18, 10**19, 10**9))
_MS_FROM, _MS_TO, _ = _EPOCHS[1]


def parse_time_ms(value: object) -> tuple[int | None, int]:
    """A moment as UTC, ms, and how many ms wide it is told; None where it cannot be read as UTC.

    A year like 1 or 1970 is a moment that was never set, and one without seconds tells too little.
    """
    at_ms, within_ms = _number_ms(value) if _is_number(value) else _text_ms(value)
    if at_ms is None or not _MS_FROM <= at_ms < _MS_TO:
        return None, 1
    return at_ms, within_ms if at_ms % 1000 else 1000  # whole seconds may be all that it is kept in


def _is_number(value: object) -> bool:
    if isinstance(value, str):
        return _NUMBER.fullmatch(value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number_ms(value: Any) -> tuple[int | None, int]:
    number = Decimal(value) if isinstance(value, str) else value
    units = next((per_s for low, high, per_s in _EPOCHS if low <= number < high), None)
    return (None if units is None else math.floor(number * 1000 / units)), 1


def _text_ms(value: Any) -> tuple[int | None, int]:
    try:
        moment = datetime.fromisoformat(value.upper())
        at_ms = math.floor(moment.timestamp() * 1000 + 0.001) if moment.tzinfo else None
    except (AttributeError, TypeError, ValueError, OverflowError):
        return None, 1
    seconds = _SECONDS.search(value)
    if seconds is None:
        return None, 1
    return at_ms, 10 ** (3 - len(seconds[1] or ""))
