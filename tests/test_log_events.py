"""Every log line is in the table of events, every row of the table is used, and the page is the table."""

from __future__ import annotations

import ast
import logging
import re
import subprocess
import sys
from functools import cache
from typing import get_type_hints

import pytest

from kalshi_cancel.telemetry import log_events
from kalshi_cancel.telemetry.log_events import LogEvent, LogFields
from trials.stack import ROOT

PAGE = ROOT / "docs" / "reference" / "log-events.md"
COMMAND = ("-m", "kalshi_cancel.telemetry.log_events")
# The sandbox is no part of the service; the last one is where lines are written.
APART = (ROOT / "kalshi_cancel" / "sandbox", ROOT / "kalshi_cancel" / "telemetry" / "logs.py")
METHODS = {"debug", "info", "warning", "error", "critical", "exception", "log"}
OF_THE_CALL = {"seldom", "error"}  # what is no field of the line


@cache
def trees():
    """The syntax trees of what writes to the log."""
    return {
        path: ast.parse(path.read_text("utf-8"))
        for package in ("kalshi_cancel", "worker")
        for path in sorted((ROOT / package).rglob("*.py"))
        if not any(path.is_relative_to(each) for each in APART)
    }


@cache
def calls():
    return [
        (path, node)
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


def said():
    """Each call that writes a line: where, the names of its events, the fields that it names."""
    for path, call in calls():
        if ast.unparse(call.func) in ("say", "logs.say"):
            event = ast.unparse(call.args[1])
            if path.name == "scripts.py" and event == "event":  # one of two, for say_failed
                continue
            yield f"{path.name}:{call.lineno}", event.removeprefix("LogEvent."), fields_of(call)


def fields_of(call):
    return {each.arg for each in call.keywords if each.arg is not None} - OF_THE_CALL


def test_every_line_is_written_with_an_event_of_the_table():
    past_it = [
        f"{path.name}:{call.lineno}"
        for path, call in calls()
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in METHODS
        and ast.unparse(call.func.value) in ("log", "logger", "logging", "_log")
    ]
    assert past_it == []
    found = list(said())
    assert len(found) > 40
    assert {event for _, event, _ in found} - set(LogEvent.__members__) == set()


def test_every_event_of_the_table_is_used():
    used = {
        node.attr
        for path, tree in trees().items()
        if path.name != "log_events.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "LogEvent"
    }
    assert used == set(LogEvent.__members__)


def test_a_line_names_only_the_fields_that_its_row_has():
    more = {where: fields - set(LogEvent[event].fields) for where, event, fields in said()}
    assert {where: fields for where, fields in more.items() if fields} == {}
    both = set(LogEvent.REDIS_UNAVAILABLE.fields) & set(LogEvent.REDIS_REFUSED.fields)
    failed = [call for _, call in calls() if ast.unparse(call.func) in ("say_failed", "scripts.say_failed")]
    assert len(failed) > 15
    assert set().union(*map(fields_of, failed)) - both == set()


def test_every_field_has_a_meaning_and_is_had_by_some_event():
    assert {field for event in LogEvent for field in event.fields} == set(get_type_hints(LogFields))


@pytest.mark.parametrize("event", LogEvent, ids=lambda event: event.slug)
def test_a_row_says_all_that_somebody_needs_at_night(event):
    assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)+", event.slug)
    assert event.level in (logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)
    assert len(event.text.split()) <= 14
    assert event.text.isprintable()
    assert event.meaning.endswith(".")
    assert event.action.endswith(".")
    assert "|" not in event.text + event.meaning + event.action


def test_no_two_events_say_the_same():
    assert len({event.text for event in LogEvent}) == len(list(LogEvent)) == len(LogEvent.__members__)


def test_the_page_is_the_table(tmp_path):
    assert PAGE.read_text("utf-8") == log_events.page(), f"run: python {' '.join(COMMAND)} {PAGE}"
    made = tmp_path / "page.md"
    subprocess.run([sys.executable, *COMMAND, str(made)], cwd=ROOT, check=True)
    assert made.read_text("utf-8") == PAGE.read_text("utf-8")


def test_every_link_of_the_page_leads_to_a_heading():
    links = re.findall(r"\]\(([^)#]+)#([^)]+)\)", PAGE.read_text("utf-8"))
    assert links
    for file, anchor in links:
        heads = re.findall(r"^#+ (.+)$", (PAGE.parent / file).read_text("utf-8"), re.MULTILINE)
        slugs = {re.sub(r"[^a-z0-9 -]", "", head.lower()).replace(" ", "-") for head in heads}
        assert anchor in slugs, f"{file}#{anchor}"
