"""The page on the life of a cancel: its diagram and its tables tell the same, and what they name exists."""

from __future__ import annotations

import re
from itertools import product

from test_readme import DOCS, blocks, code_words, section, tables

from trials.stack import ROOT

PAGE = DOCS["docs/explanation/cancel-lifecycle.md"]
[DIAGRAM] = blocks(PAGE, "mermaid")
DRAWN = {
    (source.strip("[*]"), target.strip("[*]"), label)
    for source, target, label in re.findall(r"^ *(\S+) --> ([^\s:]+): (.+)$", DIAGRAM, re.MULTILINE)
}
[STATES] = tables(section("States", PAGE))
ARROWS, REPAIRS = tables(section("Arrows", PAGE))


def test_every_arrow_of_the_diagram_is_explained_and_no_other():
    told = set()
    for label, sources, targets, *_ in ARROWS:
        start, end = code_words(sources) or [""], code_words(targets) or [""]
        told |= {(one, one if targets == "the same" else two, label) for one, two in product(start, end)}
    assert told == DRAWN


def test_every_state_of_the_diagram_is_explained_and_no_other():
    drawn = {name for source, target, _ in DRAWN for name in (source, target)} - {""}
    assert {code_words(row[0])[0] for row in STATES} == drawn


def test_every_script_that_it_names_exists():
    named = {name for *_, cell in (*ARROWS, *REPAIRS) for name in code_words(cell)}
    there = {path.stem for path in (ROOT / "kalshi_cancel/store/lua").glob("*.lua")}
    assert named
    assert named - there == set()
