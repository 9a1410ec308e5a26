"""`make conformance` says in one line what it lacks, and what it leaves out on purpose is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from conformance.answers import ANSWERS
from conformance.left_out import DRAWN, NOT_TAKEN, TAKEN

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "bench/results/conformance.md").read_text()


def make(**variables):
    given = [f"{name}={value}" for name, value in variables.items()]
    command = ["make", "-s", "--no-print-directory", "conformance", *given]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_without_the_document_it_says_where_to_get_it(tmp_path):
    ran = make(SPECS=tmp_path)
    assert ran.returncode
    [line] = ran.stdout.splitlines()
    assert line.startswith(f"No OpenAPI document at {tmp_path}/openapi.yaml: make conformance SPECS=FOLDER")


@pytest.mark.parametrize("python", ["", "false", "no-such-python"])
def test_without_a_python_that_is_new_enough_it_says_what_to_install(tmp_path, python):
    (tmp_path / "openapi.yaml").touch()
    ran = make(SPECS=tmp_path, PYTHON312=python)
    assert ran.returncode
    [line] = ran.stdout.splitlines()
    assert line.startswith("Python 3.12 or newer is needed for the clients: install python3.12 or newer")
    assert "PYTHON312=/path/to/" in line


def test_every_test_that_is_left_out_on_purpose_exists():
    text = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    there = set(re.findall(r"^def (test_\w+)", text, re.MULTILINE))
    named = [
        *DRAWN,
        *(test for reasons in (TAKEN, NOT_TAKEN) for tests in reasons.values() for test in tests),
    ]
    assert set(named) - there == set()
    assert {test for test in named if f"`{test}`" not in PAGE} == set(), "make conformance writes the page"


def test_the_page_has_every_endpoint_and_no_failure():
    assert re.findall(r"^\| `(\w+ /\S+)`", PAGE, re.MULTILINE) == list(ANSWERS)
    assert "Everything conforms" in PAGE
    assert " fails**" not in PAGE
    assert "not asked" not in PAGE
