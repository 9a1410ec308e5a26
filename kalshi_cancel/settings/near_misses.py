"""Finds the known name that a mistyped one was meant for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

NEAR, VERY_NEAR = 0.65, 0.9  # difflib's measure: 1 is the same


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that ``name`` is a near miss of; None when it is known, or another name of its own.

    A known name with a word before or after it (``risk-eu``, ``DEMO_API_KEY_ID``) is a name of its own.
    """
    if name in known:
        return None
    plain = {each.lower(): each for each in known}
    tried = name.strip().lower()
    any_known = "|".join(map(re.escape, plain))
    has_a_word_more = re.fullmatch(rf"[^-_.:]+[-_.:]({any_known})|({any_known})[-_.:][^-_.:]+", tried)
    found = difflib.get_close_matches(tried, plain, n=1, cutoff=VERY_NEAR if has_a_word_more else NEAR)
    return plain[found[0]] if found else None
