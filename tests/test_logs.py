"""The log of real workers, as text and as JSON: one line for each outcome, with its fields."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys
import uuid
from contextlib import closing

import pytest

from kalshi_cancel.client import CancelClient
from kalshi_cancel.model.requests import Lane
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import JsonFormatter, Lines, Seldom, about, is_json, say, set_format
from trials.stack import ROOT, Stack, wait_until

PATIENCE_S = 30.0
EVERYWHERE = ["at", "level", "logger", "process", "message"]
CELERY = (sys.executable, "-m", "celery", "-A", "worker.app", "worker", "-l", "info")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A stack of this module's own: its worker must not share the work with another."""
    with Stack(tmp_path_factory.mktemp("logs")) as stack:
        yield stack.start(workers=0)


@pytest.fixture
def worker(own):
    """Starts a worker that is gone after the test."""
    started = []

    def start(log_format, **environment):
        started.append(own.start_worker(KALSHI_LOG_FORMAT=log_format, **environment))
        return started[-1]

    yield start
    for each in started:
        each.stop()


# What Celery says past its log: to root before the log is set up, and to whoever ends it.
_PLAIN = re.compile(
    r"|.*SecurityWarning: .*|absolutely not recommended!|Please specify .*|User information: .*|uid=.*"
    r"|  _warn_or_raise_security_error.*|worker: Warm shutdown .*"
)


def lines_of(text):
    """The objects that the lines are; each line must be one, but for a few of Celery's."""
    lines = text.splitlines()
    assert [line for line in lines if not line.startswith("{") and not _PLAIN.fullmatch(line)] == []
    return [json.loads(line) for line in lines if line.startswith("{")]


def outcomes_of(lines):
    return {line["order_id"]: line for line in lines if "outcome" in line}


def test_each_line_is_a_json_object_and_each_outcome_has_one_with_its_fields(own, worker):
    part = worker("json")
    resting, gone, unknown, risky = (str(uuid.uuid4()) for _ in range(4))
    own.control.place_many([{"order_id": each} for each in (resting, gone, risky)])
    own.control.fill(gone)
    own.control.fault("http_500", order_id=resting, operation="cancel", times=1)
    with closing(CancelClient(own.redis.url)) as client:
        results = client.cancel_many([resting, gone, unknown]).results(PATIENCE_S)
        results += client.cancel_many([risky], lane=Lane.RISK).results(PATIENCE_S)
    # (Read at the end only, when no line is half written.)
    assert part.stop() == 0
    lines = lines_of(part.log_text())
    assert [list(line)[: len(EVERYWHERE)] for line in lines] == [EVERYWHERE] * len(lines)
    told = [line["order_id"] for line in lines if "outcome" in line]
    assert sorted(told) == sorted([resting, gone, unknown, risky])
    by_id = outcomes_of(lines)
    for result in results:
        line = by_id[result.order_id]
        assert line["outcome"] == result.outcome
        assert line["attempts"] == result.attempts
        assert line["code"] == (result.error and result.error.code)
        assert line["lane"] == ("risk" if result.order_id == risky else "strategy")
        assert 0 < line["age_s"] < PATIENCE_S
        assert (line["event"], line["level"]) == (
            ("cancel_failed", "WARNING") if result.order_id == unknown else ("cancel_settled", "INFO")
        )
    moment = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
    assert [line["at"] for line in lines if not moment.fullmatch(line["at"])] == []


def test_a_refused_message_and_a_mass_cancel_are_told_with_their_ids(own, worker, celery_of):
    part = worker("json")
    order_id = str(uuid.uuid4())
    celery_of.send_task("cancel_order", kwargs={"order_id": order_id, "side": "yes"}, queue="cancels")
    celery_of.send_task("mass_cancel", kwargs={"request_id": "limit-7", "scope": {}}, queue="risk")
    with closing(CancelClient(own.redis.url)) as client:
        mass = client.mass_cancel({"tickers": ["NONE-26"]})
        mass.result(PATIENCE_S)
    wait_until(lambda: part.log_text().count('"event":"message_refused"') == 2, what="both refusals")
    wait_until(lambda: '"event":"mass_cancel_done"' in part.log_text(), what="the mass cancel's end")
    assert part.stop() == 0
    lines = lines_of(part.log_text())
    [refused] = [line for line in lines if line.get("outcome") == "refused"]
    assert (refused["order_id"], refused["code"]) == (order_id, "invalid_request")
    assert (refused["lane"], refused["attempts"]) == ("strategy", 0)
    told = [line["event"] for line in lines if line.get("request_id") == mass.request_id]
    assert told == ["mass_cancel_started", "mass_cancel_done"]
    [refused_mass] = [line for line in lines if line.get("request_id") == "limit-7"]
    assert (refused_mass["event"], refused_mass["code"]) == ("message_refused", "invalid_request")
    assert refused_mass["why"].startswith("scope: ")
    assert (refused_mass["level"], refused_mass["lane"]) == ("WARNING", "risk")


def test_by_its_request_id_a_mass_cancel_is_found_and_each_of_its_orders(own, worker):
    own.control.reset()
    listed, waiting, elsewhere = (str(uuid.uuid4()) for _ in range(3))
    own.control.place_many([{"order_id": each, "ticker": "KXLOG-26"} for each in (listed, waiting)])
    own.control.place(elsewhere)
    own.control.fault("http_429", order_id=waiting, times=1, retry_after="1")
    part = worker("json")
    with closing(CancelClient(own.redis.url)) as client:
        client.cancel_many([waiting, {"order_id": elsewhere, "request_id": "mine-7"}])
        given_back = lambda: (entry := client.status(waiting).open).progress.attempts and not entry.claimed  # noqa: E731 - a condition
        wait_until(given_back, what="the order that waits for its next try")
        mass = client.mass_cancel({"tickers": ["KXLOG-26"]})
        named = client.mass_cancel({"order_ids": [listed, str(uuid.uuid4())]})
        assert mass.result(PATIENCE_S)["flat"]
        unknown = named.result(PATIENCE_S)["not_affected"][-1]["order_id"]
        assert next(client.results([elsewhere], timeout=PATIENCE_S)).outcome == "canceled"
    wait_until(
        lambda: part.log_text().count('"event":"mass_cancel_done"') == 2, what="both mass cancels' ends"
    )
    assert part.stop() == 0
    lines = lines_of(part.log_text())
    by_id = outcomes_of(lines)
    assert by_id[elsewhere]["request_id"] == "mine-7"
    assert by_id[waiting]["request_id"] == mass.request_id, "it was asked for before, and not claimed"
    assert by_id[unknown]["request_id"] == named.request_id, "no listing has shown it"
    assert by_id[listed]["request_id"] in {mass.request_id, named.request_id}
    for request_id in (mass.request_id, named.request_id):
        told = [line for line in lines if line.get("request_id") == request_id]
        assert {line["lane"] for line in told} == {"risk"}
        own_lines = [line for line in told if "order_id" not in line]
        assert {line["event"] for line in own_lines} == {"mass_cancel_started", "mass_cancel_done"}


@pytest.fixture
def celery_of(own):
    from celery import Celery  # noqa: PLC0415 - a producer without our code

    with Celery("producer", broker=own.redis.url, set_as_current=False) as app:
        yield app


def test_text_is_as_celery_writes_it_with_the_event_first_and_the_fields_last(own, worker):
    part = worker("text")
    order_id = str(uuid.uuid4())
    own.control.place(order_id)
    with closing(CancelClient(own.redis.url)) as client:
        client.cancel(order_id).result(PATIENCE_S)
    line = (
        rf"^\[[\d :,-]+: INFO/MainProcess\] event=cancel_settled cancel settled order_id={order_id}"
        r" lane=strategy outcome=canceled attempts=1 age_s=[\d.]+$"
    )
    wait_until(lambda: re.search(line, part.log_text(), re.MULTILINE), what="the line")


def test_by_itself_what_no_terminal_shows_is_json_also_in_a_file(own, worker, tmp_path):
    part = worker("")
    assert part.stop() == 0
    assert any(line["message"].endswith(" ready.") for line in lines_of(part.log_text()))
    file = tmp_path / "worker.log"
    other = own.spawn_worker("-f", str(file), KALSHI_LOG_FORMAT="auto")
    wait_until(lambda: file.exists() and " ready." in file.read_text(), what="a worker that logs to a file")
    assert other.stop() == 0
    assert any(line["message"].endswith(" ready.") for line in lines_of(file.read_text()))


def test_by_itself_what_a_terminal_shows_is_text(own):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        CELERY,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**own.environment, "KALSHI_LOG_FORMAT": "auto"},
        cwd=ROOT,
        start_new_session=True,
    )
    os.close(theirs)
    shown = ""
    try:
        while " ready." not in shown:
            shown += os.read(ours, 65536).decode()
    finally:
        process.terminate()
        while process.poll() is None:
            try:
                os.read(ours, 65536)
            except OSError:  # the terminal is gone with its last process
                process.wait(PATIENCE_S)
        os.close(ours)
    assert re.search(r"INFO/MainProcess\] \S+ ready\.", shown)
    assert '"level"' not in shown


# -- in small


def record(message, *args, **extra):
    made = logging.getLogger("worker.test").makeRecord(
        "worker.test", logging.INFO, "", 0, message, args, None, extra=extra
    )
    text = JsonFormatter().format(made)
    return json.loads(text), text


def said(**fields):
    """A line of ours as JSON, and as text."""
    message = Lines([(LogEvent.LANE_WOKEN, fields)])
    return record(message)[0], str(message)


def test_a_line_has_the_ids_that_there_are():
    assert about(Lane.RISK, None, None) == {"lane": "risk"}
    line, text = said(**about(Lane.RISK, "limit-7", f"00-{'a' * 32}-{'b' * 16}-01"))
    assert {name: line[name] for name in line if name not in EVERYWHERE} == {
        "event": "lane_woken",
        "request_id": "limit-7",
        "lane": "risk",
        "trace_id": "a" * 32,
    }
    assert text == f"event=lane_woken waking up workers request_id=limit-7 lane=risk trace_id={'a' * 32}"


def test_no_text_can_end_a_line_or_colour_a_terminal():
    nasty = '"}\n{"level":"CRITICAL\x1b[31m\u2028é'
    line, text = record("%s", nasty)
    assert line["message"] == nasty
    ours, in_text = said(order_id=nasty)
    assert ours["order_id"] == nasty
    for each in (text, in_text):
        assert each.isascii()
        assert each.isprintable()


def test_in_text_a_value_that_could_be_read_as_several_is_quoted_and_one_that_is_missing_left_out():
    _, text = said(order_id="a b", why='said "no"', code="x=y", state="plain", count=3, outcome=None)
    assert text.endswith(r' order_id="a b" why="said \"no\"" code="x=y" state=plain count=3')


def test_what_else_hangs_on_a_record_is_not_told():
    line, _ = record("received", data={"kwargs": "a stranger's words"}, order_id="hush")
    assert list(line) == EVERYWHERE


def test_a_line_that_repeats_is_left_out_for_a_while_and_then_says_how_often(caplog):
    now = [0.0]
    seldom = Seldom(10.0, clock=lambda: now[0])
    for at in (0.0, 1.0, 9.9, 10.0, 20.0):
        now[0] = at
        say(logging.getLogger("apart"), LogEvent.REDIS_UNAVAILABLE, seldom=seldom, why="gone")
    assert [each.getMessage() for each in caplog.records] == [
        "event=redis_unavailable Redis unavailable why=gone",
        "event=redis_unavailable Redis unavailable why=gone repeats=2",
        "event=redis_unavailable Redis unavailable why=gone",
    ]
    assert {each.levelname for each in caplog.records} == {"ERROR"}


@pytest.mark.parametrize("value", ["text", 3, 0.25, None, True, ["a"], Lane.RISK])
def test_a_field_keeps_its_kind(value):
    assert said(code=value)[0]["code"] == value


def test_a_traceback_is_a_field_of_its_line():
    try:
        {}["what is missing"]
    except KeyError:
        lines = Lines([(LogEvent.INTERNAL_ERROR, {"doing": "it"})])
        made = logging.getLogger("a").makeRecord("a", logging.ERROR, "", 0, lines, (), sys.exc_info())
    line = json.loads(JsonFormatter().format(made))
    assert (line["message"], line["event"], line["doing"]) == ("internal error", "internal_error", "it")
    assert line["exception"].endswith("KeyError: 'what is missing'")


@pytest.mark.parametrize(("log_format", "json_wanted"), [("json", True), ("auto", True), ("text", False)])
def test_the_format_is_set_for_handlers_that_are_there(log_format, json_wanted, tmp_path):
    logger = logging.getLogger(f"apart.{log_format}")
    logger.addHandler(logging.FileHandler(tmp_path / "log"))
    set_format(logger, log_format)
    assert is_json(logger) is json_wanted
