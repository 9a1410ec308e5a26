"""`python -m trials.campaign`: plays the kinds and seeds that are asked for, and tells what was found.

Exit codes: 0 every promise was kept; 1 one was broken; 2 the parts did not start.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from trials.campaign.judge import Finding
from trials.campaign.kinds import KINDS
from trials.campaign.report import BROKEN, document, summary, table
from trials.campaign.run import FSYNC, Campaign
from trials.stack import NotReady

LINES_SHOWN = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Plays the campaign; the exit code."""
    options = _parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # parts are ended on the way out
    names = options.only or list(KINDS)
    seeds = [options.seed] if options.seed is not None else list(range(1, options.seeds + 1))
    findings: list[Finding] = []
    say = Say(quiet=options.json)
    try:
        with _folder(options.keep) as folder, Campaign(folder, fsync=options.fsync) as campaign:
            for name in names:
                for seed in seeds:
                    finding = campaign.run(name, seed, cancels=options.cancels)
                    findings.append(finding)
                    say.run(finding, cancels=options.cancels)
    except NotReady as part:
        print(f"The campaign cannot start: {part}", file=sys.stderr)
        return 2
    failed = any(finding.failed for finding in findings)
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print("\n" + summary(findings))
        print("\n" + table(findings))
    if options.write:
        command = "python -m trials.campaign " + " ".join(sys.argv[1:] if argv is None else argv)
        options.write.parent.mkdir(exist_ok=True)
        options.write.write_text(document(findings, command=command, cancels=options.cancels), "utf-8")
    return 1 if failed else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trials.campaign",
        description="Plays faults on real processes, and counts what was lost or misreported.",
        epilog="kinds of fault:\n" + "\n".join(f"  {name:27}{kind.does}" for name, kind in KINDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each kind (1)")
    parser.add_argument("--cancels", type=int, default=150, metavar="N", help="orders of each run (150)")
    parser.add_argument(
        "--only", action="append", choices=KINDS, metavar="KIND", help="this kind (may be repeated)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="this seed alone")
    parser.add_argument(
        "--write", type=Path, metavar="PATH", help="write the table with date and machine there"
    )
    parser.add_argument(
        "--fsync", choices=("always", "everysec"), default=FSYNC, help=f"Redis' appendfsync ({FSYNC})"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON, and nothing else")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the logs in this folder")
    return parser.parse_args(argv)


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="cancel-faults-") as folder:
        yield Path(folder)


class Say:
    """One line for each run as it ends, and below it what was wrong with the command to play it again."""

    def __init__(self, *, quiet: bool) -> None:
        self._stream = sys.stderr if quiet else sys.stdout

    def run(self, finding: Finding, *, cancels: int) -> None:
        """Tells one finding."""
        worst = max(finding.recovered_s, default=0.0)
        self._print(
            f"{finding.kind:27} seed {finding.seed:<3} accepted {finding.accepted:4}"
            f"  settled {finding.settled:4}  lost {len(finding.lost)}  stuck {len(finding.stuck)}"
            f"  misreported {len(finding.misreported)}  false flat {len(finding.false_flat)}"
            f"  undecidable {len(finding.undecidable)}"
            f"  recovered in {worst:5.2f} s  took {finding.took_s:4.1f} s"
        )
        for what in (*BROKEN, "resized", "sent_twice"):
            lines = getattr(finding, what)
            for line in lines[:LINES_SHOWN]:
                self._print(f"    {what}: {line}")
            if len(lines) > LINES_SHOWN:
                self._print(f"    {what}: and {len(lines) - LINES_SHOWN} more")
        if finding.failed:
            self._print(
                f"    again: {Path(sys.executable).name} -m trials.campaign"
                f" --only {finding.kind} --seed {finding.seed} --cancels {cancels}"
            )

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


if __name__ == "__main__":
    sys.exit(main())
