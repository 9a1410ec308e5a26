"""Prints tables for people, and lines of JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kalshi_cancel.model.results import Problem
from kalshi_cancel.store.pending import DeadLetter, OpenCancel

NAMES_SHOWN = 3  # of those who asked for one cancel, in a table


def print_json(value: object) -> None:
    """One value on a line of its own, at once."""
    print(json.dumps(value), flush=True)


def print_line(cells: Sequence[str], widths: Sequence[int]) -> None:
    """One line of a table, at once."""
    padded = (f"{clean(cell):<{width}}" for cell, width in zip(cells, widths, strict=False))
    print("  ".join(padded).rstrip(), flush=True)


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, nothing: str = "") -> None:
    """The rows under their titles, or ``nothing`` where there are none."""
    all_rows = [titles, *rows]
    if len(all_rows) == 1:
        print(nothing)
        return
    widths = [max(len(row[column]) for row in all_rows) for column in range(len(titles))]
    for row in all_rows:
        print_line(row, widths)


def clean(text: str) -> str:
    """Text that cannot steer a terminal: the exchange's words and order ids are strangers'."""
    return "".join(char if char.isprintable() else "?" for char in text)


def problem_text(problem: Problem | None) -> str:
    """A problem for a table's cell."""
    return "" if problem is None else f"{problem.code}: {problem.message}"


def progress_json(entry: OpenCancel | DeadLetter) -> dict[str, Any]:
    """The progress of an open or dead cancel."""
    progress = entry.progress
    return {
        "attempts": progress.attempts,
        "last_problem": progress.last_problem and asdict(progress.last_problem),
        "history": [{"ts_ms": at_ms, "code": code} for at_ms, code in progress.history],
    }


def names_text(who: Sequence[str]) -> str:
    """Who asked, shortened."""
    more = len(who) - NAMES_SHOWN
    return (", ".join(who[:NAMES_SHOWN]) or "-") + (f" and {more} more" if more > 0 else "")


def duration(seconds: float) -> str:
    """A time for eyes."""
    if seconds < 60:  # noqa: PLR2004 - a minute
        return f"{max(seconds, 0):.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest_s:02} s"


def print_lines(lines: Mapping[str, str]) -> None:
    """Names and values, one to a line."""
    width = max(map(len, lines))
    for name, value in lines.items():
        print_line([name, value], [width, 0])
