"""`make conformance`: runs and notes tests, tries two clients, judges all answers, writes the page."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from conformance.clients import OF_OTHERS, OFFICIAL, Client, Tried, try_client
from conformance.document import Document
from conformance.judging import judge
from conformance.notes import Noted, read_notes
from conformance.report import write_report

TESTS = Path("tests")
# A test file with one of these words makes up answers.
MAKING_UP = ("decipher_", "parse_order(", "Limits.parse(", "CircuitBreaker(")


def main() -> int:
    """0 when nothing departs from the document but what is meant to."""
    options = _options()
    document, newest = Document(options.specs / "openapi.yaml"), Document(options.newest / "openapi.yaml")
    if newest.version != document.version:
        print(f"The newest kalshi-sdk has version {newest.version} of the document: SPECS={options.newest}")
    print("Running the tests of the sandbox, and those that make up answers ...")
    notes = _notes_of_tests(options.python)
    tried: dict[Client, list[Tried]] = {}
    for client in (OFFICIAL, OF_OTHERS):
        print(f"Trying {client.package} {client.version} ...")
        tried[client] = list(try_client(client))
        notes += [Noted.of(client.package, each) for play in tried[client] for each in play.answers]
    found = judge(document, notes)
    day = datetime.now(UTC).date().isoformat()
    options.write.write_text(write_report(document, found, tried, day))
    troubles = [
        f"{client.package}: {each.words}" for client in tried for each in tried[client] if each.failure
    ]
    for said in [*found.wrong, *troubles]:
        print(said)
    print(f"{len(found.wrong)} departures, {len(troubles)} calls of clients failed; see {options.write}")
    return 1 if found.wrong or troubles else 0


def _notes_of_tests(python: Path) -> list[Noted]:
    """What the tests note, also those that fail; SystemExit with their output when they could not be run."""
    making_up = [
        str(path)
        for path in sorted(TESTS.glob("test_*.py"))
        if any(word in path.read_text() for word in MAKING_UP)
    ]
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder, "notes.jsonl")
        plugin = ["-p", "conformance.recording", "--notes", str(notes)]
        ran = subprocess.run(  # noqa: S603  # our own tests
            [python, "-m", "pytest", "-p", "no:cacheprovider", *plugin, str(TESTS / "sandbox"), *making_up],
            capture_output=True,
            text=True,
            check=False,
        )
        if ran.returncode > 1:
            raise SystemExit(ran.stdout[-5000:] + ran.stderr)
        for line in ran.stdout.splitlines():
            if line.startswith(("FAILED", "ERROR")):
                print(line)
        return read_notes(notes)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m conformance", description=__doc__)
    parser.add_argument("--specs", type=Path, required=True, help="the folder with openapi.yaml")
    parser.add_argument("--newest", type=Path, required=True, help="the one of the newest kalshi-sdk")
    parser.add_argument("--python", type=Path, required=True, help="the Python that runs our tests")
    parser.add_argument("--write", type=Path, required=True, help="the page to write")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
