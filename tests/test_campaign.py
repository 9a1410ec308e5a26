"""The fault campaign: a short one on real processes, and proof that it sees what is lost or misreported."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from decimal import Decimal

import pytest

from sandbox.campaign.__main__ import Say, main
from sandbox.campaign.judge import Evidence, Finding, Promise, contradictions, judge
from sandbox.campaign.kinds import KINDS, Kind
from sandbox.campaign.plan import SORTS, draw
from sandbox.campaign.report import document, table
from sandbox.campaign.run import Campaign
from sandbox.stack import wait_until
from worker.orders import CancelResult, ConfirmedBy, Lane, OrderStatus, Outcome

SHORT = (
    "worker-kill-all",
    "kill-after-effect",
    "worker-freeze-long",
    "redis-restart",
    "stale-reads",
    "skew-with-drop-after",
    "kill-with-drop-after",
    "everything",
)
CANCELS = 60
SEED = 1


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    with Campaign(tmp_path_factory.mktemp("campaign")) as campaign:
        yield campaign


# -- a short campaign


@pytest.mark.parametrize("name", SHORT)
def test_nothing_is_lost_and_nothing_misreported_under(campaign, name):
    finding = campaign.run(name, SEED, cancels=CANCELS)
    assert (finding.lost, finding.misreported, finding.problems) == ([], [], [])
    assert finding.settled == finding.accepted > 0


# -- it sees what is wrong


def test_cancels_that_vanish_from_the_book_are_found_lost(campaign):
    def play(scene):
        for worker in scene.crew.workers:
            worker.signal(signal.SIGSTOP)
        scene.until_all_asked()
        gone = list(scene.redis.scan_iter("kalshi-cancel:entry:*", count=1000))
        scene.redis.delete(*gone)
        for worker in scene.crew.workers:
            worker.signal(signal.SIGCONT)

    finding = campaign.run("vanish", SEED, cancels=20, kind=Kind("", play), settle_s=1.0)
    assert finding.failed
    assert finding.accepted == 20
    assert len(finding.lost) == 20 - finding.settled > 0
    assert "neither record nor entry" in finding.lost[0]


def test_a_record_that_says_something_else_than_the_exchange_is_found_misreported(campaign):
    def play(scene):
        scene.until_all_asked()
        pattern = "celery-task-meta-cancel:forged-*-resting"
        records = wait_until(lambda: list(scene.redis.scan_iter(pattern, count=1000)))
        text = scene.redis.get(records[0])
        scene.redis.set(records[0], text.replace('"reduced_by":"10.00"', '"reduced_by":"9.00"'))

    finding = campaign.run("forged", SEED, cancels=20, kind=Kind("", play))
    assert finding.failed
    [line] = finding.misreported
    assert "reduced_by 9.00, truly 10.00" in line


# -- the judge


def truth(status="canceled", *, filled="0.00", removed="10.00", by_call=True):
    history = [{"event": "created", "at_ms": 0, "count": "10.00"}]
    if Decimal(removed):
        line = {"event": "canceled", "at_ms": 1, "count": removed}
        history.append(line | ({"call": 7, "by": "cancel"} if by_call else {"by": "elsewhere"}))
    return {"status": status, "fill_count_fp": filled, "remaining_count_fp": "0.00", "history": history}


CANCELED = CancelResult(
    "o",
    Outcome.CANCELED,
    OrderStatus.CANCELED,
    Decimal(10),
    remaining_count=Decimal(0),
    confirmed_by=ConfirmedBy.CANCEL,
)
TOO_LATE = CancelResult("o", Outcome.TOO_LATE, OrderStatus.EXECUTED, Decimal(0), fill_count=Decimal(10))
UNKNOWN = CancelResult("o", Outcome.UNKNOWN_ORDER)


@pytest.mark.parametrize(
    ("record", "order", "by_us"),
    [
        (CANCELED, truth(), 10),
        (TOO_LATE, truth("executed", filled="10.00", removed="0.00"), 0),
        (replace(TOO_LATE, status=OrderStatus.CANCELED, fill_count=None), truth(by_call=False), 0),
        (UNKNOWN, None, 0),
    ],
)
def test_a_true_record_contradicts_nothing(record, order, by_us):
    assert contradictions(record, order, Decimal(by_us)) == []


@pytest.mark.parametrize(
    ("record", "order", "by_us"),
    [
        (CANCELED, truth("resting", removed="0.00"), 0),
        (CANCELED, truth("executed", filled="10.00", removed="0.00"), 0),
        (CANCELED, truth(by_call=False), 0),
        (CANCELED, None, 0),
        (CANCELED, truth(filled="4.00", removed="6.00"), 6),
        (TOO_LATE, truth(), 10),
        (replace(TOO_LATE, status=OrderStatus.CANCELED), truth(filled="3.00", by_call=False), 0),
        (UNKNOWN, truth(), 10),
    ],
)
def test_a_false_record_is_contradicted(record, order, by_us):
    assert contradictions(record, order, Decimal(by_us))


def evidence(**changes):
    known = Evidence(
        promises={"o": Promise(accepted_at=1.0)},
        records={"o": CANCELED},
        seen_at={"o": 3.0},
        open_ids=(),
        truth={"o": truth()},
        calls=[],
        marks=[2.0],
        upsets=[],
        call_limit_s=1.0,
    )
    return replace(known, **changes)


def call(seq, received_ms, duration_ms, operation="cancel", sent_ms=None):
    return {
        "seq": seq,
        "operation": operation,
        "order_ids": ["o"],
        "received_ms": received_ms,
        "duration_ms": duration_ms,
        "timestamp": str(received_ms if sent_ms is None else sent_ms),
    }


def test_recovery_is_counted_from_each_mark_that_left_something_open():
    finding = judge("kind", 1, evidence(marks=[0.5, 2.0, 3.5]))
    assert finding.recovered_s == finding.resumed_s == [1.0]
    assert not finding.failed


def test_a_cancel_that_is_open_when_time_is_over_is_lost():
    finding = judge("kind", 1, evidence(records={}, open_ids=["o"]))
    assert (finding.accepted, finding.settled) == (1, 0)
    assert finding.lost == ["o: open in the book"]


@pytest.mark.parametrize("outcome", [Outcome.REFUSED, Outcome.UNRESOLVED])
def test_a_cancel_that_ends_refused_or_unresolved_is_not_settled(outcome):
    finding = judge("kind", 1, evidence(records={"o": replace(CANCELED, outcome=outcome)}))
    assert finding.settled == 0
    assert finding.lost


def test_what_was_not_accepted_counts_neither_way_but_must_not_have_happened():
    refused = {"o": Promise(refused=True)}
    nothing = judge("kind", 1, evidence(promises=refused, records={}, truth={"o": truth(removed="0.00")}))
    assert (nothing.accepted, nothing.failed) == (0, False)
    assert judge("kind", 1, evidence(promises=refused, records={})).misreported


def test_what_may_be_accepted_counts_when_it_is_there():
    maybe = {"o": Promise(maybe=True)}
    assert judge("kind", 1, evidence(promises=maybe)).accepted == 1
    assert judge("kind", 1, evidence(promises=maybe, records={})).accepted == 0


def test_canceled_by_others_while_our_reply_was_lost_is_undecidable_and_nothing_else_is():
    inferred = replace(CANCELED, confirmed_by=ConfirmedBy.READ_BACK)
    by_others = evidence(records={"o": inferred}, truth={"o": truth(by_call=False)})
    assert judge("kind", 1, replace(by_others, contested=["o"])).undecidable == ["o"]
    assert judge("kind", 1, by_others).misreported
    assert judge("kind", 1, replace(by_others, contested=["o"], records={"o": CANCELED})).misreported


def test_two_cancels_of_one_order_under_way_at_once_are_found():
    calls = [call(1, 1000, 50.0), call(2, 1040, 5.0, "batch")]
    assert judge("kind", 1, evidence(calls=calls)).sent_twice == ["o: calls 1 and 2"]


@pytest.mark.parametrize(
    ("calls", "upsets"),
    [
        ([call(1, 1000, 30.0), call(2, 1040, 5.0)], []),
        ([call(1, 1000, 50.0), call(2, 1040, 5.0)], [1.02]),
        ([call(1, 1000, 5000.0), call(2, 2100, 5.0)], []),
        ([call(1, 5000, 50.0, sent_ms=1000), call(2, 5001, 5.0, sent_ms=2100)], []),
        ([call(1, 1000, 50.0), call(2, 1040, 5.0, "read")], []),
    ],
    ids=["after its end", "after a kill", "after it was given up", "received late", "a read"],
)
def test_a_second_cancel_for_a_reason_is_not_sent_twice(calls, upsets):
    assert judge("kind", 1, evidence(calls=calls, upsets=upsets)).sent_twice == []


# -- the plan and the report


def test_the_same_seed_draws_the_same_plan_and_another_seed_another():
    plans = [draw("kind", seed, cancels=100, load_s=1.0, raw=True) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


def test_a_plan_asks_for_every_order_and_mixes_sorts_lanes_and_ways_of_asking():
    plan = draw("kind", 1, cancels=500, load_s=1.0, raw=True)
    asked = {order["order_id"] for ask in plan.asks for order in ask.orders}
    assert len(asked) == 500
    assert {order_id.rpartition("-")[2] for order_id in asked} == set(SORTS)
    assert {ask.lane for ask in plan.asks} == set(Lane)
    assert {ask.raw for ask in plan.asks} == {ask.once for ask in plan.asks} == {True, False}
    assert {len(ask.orders) > 1 for ask in plan.asks} == {True, False}


def test_a_plan_has_no_raw_messages_where_celerys_own_may_be_lost():
    plan = draw("kind", 1, cancels=500, load_s=1.0, raw=False)
    assert not any(ask.raw for ask in plan.asks)


def test_a_failing_run_prints_how_to_play_it_again(capsys):
    Say(quiet=False).run(Finding("redis-restart", 7, lost=["o: open in the book"]), cancels=500)
    printed = capsys.readouterr().out
    assert "lost: o: open in the book" in printed
    assert "-m sandbox.campaign --only redis-restart --seed 7 --cancels 500" in printed


def test_the_table_adds_up_the_runs_of_a_kind_and_names_the_worst_and_the_median():
    runs = [
        Finding("none", seed, accepted=500, settled=500, recovered_s=[seed / 10], resumed_s=[0.01])
        for seed in (1, 2, 6)
    ]
    [row] = [line for line in table(runs).splitlines() if line.startswith("| none")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["none", "1,500", "1,500", "0", "0", "0", "0", "0.01 / 0.01", "0.60 / 0.20", "0.00"]


def test_the_document_tells_the_command_and_what_was_wrong():
    runs = [Finding("none", 1, accepted=1, settled=1), Finding("hang", 1, misreported=["o: a lie"])]
    text = document(runs, command="make faults", cancels=500)
    assert "`make faults`" in text
    assert KINDS["hang"].does in text
    assert "- o: a lie" in text


def test_the_command_line_plays_the_named_kinds_and_writes_the_document(tmp_path, capsys):
    path = tmp_path / "docs" / "faults.md"
    before = signal.getsignal(signal.SIGTERM)
    started = time.monotonic()
    try:
        code = main(["--only", "none", "--cancels", "20", "--json", "--write", str(path)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 0
    [finding] = json.loads(capsys.readouterr().out)
    assert (finding["accepted"], finding["settled"], finding["lost"]) == (20, 20, [])
    assert "| none" in path.read_text("utf-8")
    assert time.monotonic() - started < 30
