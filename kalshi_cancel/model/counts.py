"""Reads and writes counts of contracts: decimal strings on the wire, ``Decimal`` inside."""

from __future__ import annotations

import re
from decimal import Decimal
from functools import lru_cache

_COUNT = re.compile(r"[0-9]{1,15}(\.[0-9]{1,6})?")
_CENT_OF_A_CONTRACT = Decimal("0.01")


@lru_cache(maxsize=1024)  # orders of a few sizes come by the thousand
def count_text(count: Decimal | None) -> str | None:
    """Contracts as a decimal string: two places, more only where rounding would change the value."""
    if count is None:
        return None
    rounded = count.quantize(_CENT_OF_A_CONTRACT)
    return (
        f"{rounded if rounded == count else count.normalize():f}"  # equal counts share a place in the cache
    )


def parse_count(value: object) -> Decimal | None:
    """Contracts from the wire, an integer or a decimal string; None for anything that is neither."""
    if type(value) is str:  # most of thousands a second
        return _count(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, int) and value.bit_length() > 64:  # noqa: PLR2004 - far above any count; str() of a huge one fails
        return None
    return _count(str(value))


@lru_cache(maxsize=1024)  # orders of a few sizes come by the thousand
def _count(text: str) -> Decimal | None:
    return Decimal(text) if _COUNT.fullmatch(text) else None
