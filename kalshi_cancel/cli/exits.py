"""Picks the exit code of a command: a code for every outcome, and of several the worst.

Exit codes, the worst first. If several apply, you get the first of them in this list:

    130  interrupted (accepted cancels stay accepted), or not confirmed
    141  the program that read the output has closed the pipe
      2  wrong usage: the command line, a field of a request, or the settings
      5  Redis could not be reached, did not accept the cancels, or has lost them: ask again
      7  not flat: a mass cancel ended without the proof that no order in its scope rests
      1  refused, or given up: no worker tries again (doctor, health, audit: they found a problem)
      6  not known here: nobody asked for it, or its result has expired; or it is not a dead letter
      4  unresolved, or not settled in time: the order may still rest, and workers keep trying
      3  unknown order: the exchange has no such order
      0  settled: canceled, or too late (with --no-wait: accepted)
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from enum import IntEnum

from kalshi_cancel.cli.printing import clean
from kalshi_cancel.model.fields import BadRequest
from kalshi_cancel.model.results import Outcome

PROBLEMS_SHOWN = 3  # in one line on stderr


class Exit(IntEnum):
    """Exit codes; their meanings stand in the module's docstring, which is part of the help."""

    SETTLED = 0
    REFUSED = 1
    USAGE = 2
    UNKNOWN_ORDER = 3
    NOT_SETTLED = 4
    REDIS = 5
    NOT_KNOWN_HERE = 6
    NOT_FLAT = 7
    INTERRUPTED = 130  # as shells have it: 128 + SIGINT
    READER_GONE = 141  # 128 + SIGPIPE


# By exposure: an order that may rest while nobody works on it is worse than one that is worked on.
WORST_FIRST = (
    Exit.REDIS,
    Exit.NOT_FLAT,
    Exit.REFUSED,
    Exit.NOT_KNOWN_HERE,
    Exit.NOT_SETTLED,
    Exit.UNKNOWN_ORDER,
    Exit.SETTLED,
)
EXIT_OF = {
    Outcome.CANCELED: Exit.SETTLED,
    Outcome.TOO_LATE: Exit.SETTLED,
    Outcome.REFUSED: Exit.REFUSED,
    Outcome.UNKNOWN_ORDER: Exit.UNKNOWN_ORDER,
    Outcome.UNRESOLVED: Exit.NOT_SETTLED,
}
CODES_IN_HELP = "Exit codes" + (__doc__ or "").partition("Exit codes")[2]  # -OO drops docstrings


class UsageError(ValueError):
    """Arguments that do not go together."""


def complain(message: str, code: Exit) -> Exit:
    """Says in one line on stderr why it ends so; the code."""
    print(f"cancelctl: {clean(message)}", file=sys.stderr)
    return code


def words_of(bad: BadRequest) -> str:
    """The first problems of a request, in one line."""
    problems = [f"{field}: {problem}" for field, problem in bad.problems.items()]
    more = len(problems) - PROBLEMS_SHOWN
    return "; ".join(problems[:PROBLEMS_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def worst(codes: Collection[Exit]) -> Exit:
    """The code that wins."""
    return next((code for code in WORST_FIRST if code in codes), Exit.SETTLED)
