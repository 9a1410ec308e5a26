"""Lays a snapshot of the service out on a screen. No I/O: a snapshot and a size in, text out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kalshi_cancel.cli.printing import clean, duration
from kalshi_cancel.cli.snapshot import MassShown, Rates, Snapshot
from kalshi_cancel.model.times import utc_text
from kalshi_cancel.store.rate_limits import Level
from kalshi_cancel.store.stats import LaneState
from kalshi_cancel.store.workers import WorkerShown

BAR_CHARS = 20
NAMES_SHOWN = 4  # outcomes and answers in a line


def frame(snapshot: Snapshot, width: int, height: int | None = None, *, failure: str = "") -> str:
    """Lines of at most ``width`` columns, and at most ``height`` of them (None: all).

    Where they do not fit, the longest list is cut first, and it is said how much is left out. ``failure``
    says why it is an old snapshot.
    """
    at = utc_text(snapshot.now_s)[:19].replace("T", " ")
    head = [_ends(f"cancelctl top  {snapshot.where}", f"{at} UTC", width)]
    if failure:
        head.append(f"OLD: {failure}")
    for section in (_lanes(snapshot), _rates(snapshot.rates)):
        head += ["", *section]
    lists = [_buckets(snapshot.buckets), _mass_cancels(snapshot.mass_cancels), _workers(snapshot)]
    if height is not None:
        lists = _cut(lists, height - len(head))
    lines = [*head, *(line for section in lists for line in ("", *section))]
    return "\n".join(_fit(line, width) for line in lines[:height])


# --- sections, each a title and its lines -----------------------------------------------------------------


def _lanes(snapshot: Snapshot) -> list[str]:
    titles = ("LANE", "OPEN", "CLAIMED", "OLDEST", "MEDIAN", "UNRESOLVED", "MESSAGES")
    lines = _table([titles, *map(_lane_cells, snapshot.lanes)], (8, -7, -8, -12, -12, -11, -9))
    dead = snapshot.dead_letters
    return [*lines, f"DEAD LETTERS {dead}: cancelctl dead"] if dead else lines


def _lane_cells(lane: LaneState) -> tuple[str, ...]:
    more = "+" if lane.looked_at < lane.open else ""
    oldest, median = ("-" if age is None else duration(age) for age in (lane.oldest_s, lane.median_s))
    return (
        lane.lane.value,
        str(lane.open),
        f"{lane.claimed}{more}",
        oldest,
        median,
        f"{lane.unresolved}{more}",
        str(lane.messages),
    )


def _rates(rates: Rates | None) -> list[str]:
    if rates is None:
        return ["RATES    not known: there is no audit log (KALSHI_AUDIT)"]
    took = ""
    if rates.call_ms is not None and rates.slowest_ms is not None:
        took = f", median {rates.call_ms:.0f} ms, slowest {rates.slowest_ms:.0f} ms"
    return [
        f"ACCEPTED {_sum(rates.accepted)}",
        f"SETTLED  {_sum(rates.settled)}",
        f"CALLS    {rates.calls:.1f}/s{took}",
        f"ANSWERS  {_listed(rates.answers) or '-'}",
    ]


def _sum(each: Mapping[str, float]) -> str:
    parts = _listed(each)
    return f"{sum(each.values()):.1f}/s" + (f": {parts}" if parts else "")


def _listed(each: Mapping[str, float]) -> str:
    """The most frequent ones; how often all others together."""
    ranked = sorted(each.items(), key=lambda item: -item[1])
    shown = [f"{name} {rate:.1f}" for name, rate in ranked[:NAMES_SHOWN]]
    others = sum(rate for _, rate in ranked[NAMES_SHOWN:])
    return ", ".join([*shown, *([f"others {others:.1f}"] if others else [])])


def _buckets(levels: Sequence[Level]) -> list[str]:
    rows = [("BUCKET", "", "TOKENS", "OF", "REFILL", "COUNTS", "429S")]
    rows += [
        (
            level.bucket,
            _bar(level.tokens, level.capacity),
            str(round(level.tokens)),  # (as a float, a little less than none would be "-0")
            f"{level.capacity:.0f}",
            f"{level.refill:.0f}/s",
            f"{level.share:.0%}",
            str(level.refused),
        )
        for level in levels
    ]
    return _table(rows, (8, BAR_CHARS + 2, -7, -7, -9, -7, -6))


def _mass_cancels(mass_cancels: Sequence[MassShown]) -> list[str]:
    if not mass_cancels:
        return ["MASS CANCELS  none runs"]
    return [f"MASS CANCELS  {len(mass_cancels)} running", *map(_mass_line, mass_cancels)]


def _mass_line(mass: MassShown) -> str:
    who = f"  {mass.requested_by or '-'}" + (f": {mass.reason}" if mass.reason else "")
    if mass.progress is None:
        return f"{mass.request_id[:8]}  {'planning':<{BAR_CHARS + 2}}{who}"
    settled, orders, unresolved = (mass.progress.get(name, 0) for name in ("settled", "orders", "unresolved"))
    late = f", {unresolved} unresolved" if unresolved else ""
    return f"{mass.request_id[:8]}  {_bar(settled, orders)}  {settled}/{orders} settled{late}{who}"


def _workers(snapshot: Snapshot) -> list[str]:
    held_back, running = snapshot.held_back, {worker.name for worker in snapshot.workers}
    if not snapshot.workers and not held_back:
        return ["WORKERS  NONE RUNS"]
    senders = sum(worker.senders for worker in snapshot.workers)
    breakers = f"{len(held_back)} HOLD CANCELS BACK" if held_back else "every breaker is closed"
    first = f"WORKERS  {len(snapshot.workers)} with {senders} senders; {breakers}"
    # Those that hold cancels back first: they are what somebody looks for.
    shown = sorted(snapshot.workers, key=lambda worker: worker.name not in held_back)
    lines = [_worker_line(worker, held_back.get(worker.name)) for worker in shown]
    gone = [f"{name}  HOLDS BACK: {why}" for name, why in held_back.items() if name not in running]
    return [first, *gone, *lines]


def _worker_line(worker: WorkerShown, why: str | None) -> str:
    state = "sends" if why is None else f"HOLDS BACK: {why}"
    return f"{worker.name:<24} {'+'.join(worker.lanes):<13} {worker.senders:>3} senders  {state}"


# --- laying out -------------------------------------------------------------------------------------------


def _cut(lists: Sequence[list[str]], height: int) -> list[list[str]]:
    """The lists with a blank line before each, in so many lines: the longest loses its last ones."""
    kept, left_out = [list(each) for each in lists], [0] * len(lists)

    def size() -> int:
        return sum(len(each) + 1 + (out > 0) for each, out in zip(kept, left_out, strict=True))

    while size() > height and max(map(len, kept)) > 1:
        longest = max(range(len(kept)), key=lambda at: len(kept[at]))
        kept[longest].pop()
        left_out[longest] += 1
    more = ([f"... and {out} more"] if out else [] for out in left_out)
    return [[*each, *words] for each, words in zip(kept, more, strict=True)]


def _table(rows: Iterable[Sequence[str]], widths: Sequence[int]) -> list[str]:
    """Columns of these widths, negative ones aligned to the right."""
    aligned = [f"<{width}" if width > 0 else f">{-width}" for width in widths]
    return [
        " ".join(f"{cell:{how}}" for cell, how in zip(row, aligned, strict=True)).rstrip() for row in rows
    ]


def _bar(part: float, whole: float) -> str:
    filled = round(BAR_CHARS * min(max(part / whole, 0.0), 1.0)) if whole > 0 else 0
    return f"[{'#' * filled}{'.' * (BAR_CHARS - filled)}]"


def _ends(left: str, right: str, width: int) -> str:
    """One text at either end of a line; the right one is kept whole."""
    room = max(width - len(right) - 2, 0)
    return f"{_fit(left, room):<{room}}  {right}"


def _fit(line: str, width: int) -> str:
    """The line in so many columns of a terminal, without anything that could steer it."""
    from wcwidth import wcwidth  # noqa: PLC0415 - takes 35 ms to load, which other commands need not wait for

    used, shown = 0, list[str]()
    for char in clean(line):
        columns = max(wcwidth(char), 0)
        used += columns
        if used > width:
            break
        if columns or shown:  # (a mark at the beginning would go to the end of the line before)
            shown.append(char)
    return "".join(shown).rstrip()
