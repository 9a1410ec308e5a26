"""The fault campaign: a short one on real processes, and proof that it sees what is lost or misreported."""

from __future__ import annotations

import json
import signal
import socket
import time
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from kalshi_cancel.model.orders import OrderStatus
from kalshi_cancel.model.requests import Lane
from kalshi_cancel.model.results import CancelResult, ConfirmedBy, Outcome
from trials.campaign.__main__ import Say, main
from trials.campaign.judge import Evidence, Finding, Promise, contradictions, judge, removed_by_us
from trials.campaign.kinds import KINDS, Kind
from trials.campaign.plan import SORTS, draw
from trials.campaign.relay import Relay
from trials.campaign.report import document, table
from trials.campaign.run import Campaign
from trials.campaign.sweeps import Sweep, judge_sweep
from trials.stack import wait_until

SHORT = (
    "worker-kill-all",
    "kill-after-effect",
    "worker-freeze-long",
    "redis-restart",
    "stale-reads",
    "skew-with-drop-after",
    "kill-with-drop-after",
    "everything",
    "canceled-elsewhere-before",
    "interim-responses",
    "cdn-pages",
    "key-revoked",
    "rollback",
    "mass-runner-frozen",
    "mass-with-placer",
    "mass-list-fails",
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
    assert (finding.lost, finding.stuck, finding.misreported) == ([], [], [])
    assert (finding.false_flat, finding.problems) == ([], [])
    assert finding.settled == finding.accepted > 0
    assert finding.sweeps == name.startswith("mass-")


# -- it sees what is wrong


def test_cancels_that_vanish_from_the_store_are_found_lost(campaign):
    def play(scene):
        for worker in scene.crew.workers:
            worker.signal(signal.SIGSTOP)
        scene.until_all_asked()
        gone = list(scene.redis.scan_iter("kalshi-cancel:pending:*", count=1000))
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


def test_a_raw_message_whose_answer_is_gone_is_found_lost(campaign):
    def play(scene):
        scene.until_all_asked()
        raw = campaign_raw_ids(scene)
        wait_until(lambda: scene.redis.delete(*raw) if scene.redis.exists(*raw) == len(raw) else False)

    def campaign_raw_ids(scene):
        """The keys of answers to raw messages; those of records have the order's id."""
        return wait_until(
            lambda: [
                key
                for key in scene.redis.scan_iter("celery-task-meta-*", count=1000)
                if not key.startswith(("celery-task-meta-cancel:", "celery-task-meta-mass:"))
            ]
        )

    finding = campaign.run("unheard", SEED, cancels=60, kind=Kind("", play, raw=True), settle_s=5.0)
    assert "who waits for it gets no answer" in finding.lost[0]


def test_a_mass_cancel_that_is_flat_while_an_order_rests_is_found_false(campaign):
    def play(scene):
        hidden, *_ = scene.place_mass(5)
        scene.fault("not_found", order_id=hidden)
        scene.await_report(scene.sweep())

    finding = campaign.run("hidden", SEED, cancels=20, kind=Kind("", play))
    assert finding.failed
    [line] = finding.false_flat
    assert "hidden-1-mass-0000: rests" in line


# -- the judge


def truth(status="canceled", *, filled="0.00", removed="10.00", by_call=True, at_ms=(0, 1), ticker="KX-1-A"):
    history = [{"event": "created", "at_ms": at_ms[0], "count": "10.00"}]
    if Decimal(removed):
        line = {"event": "canceled", "at_ms": at_ms[1], "count": removed}
        history.append(line | ({"call": 7, "by": "cancel"} if by_call else {"by": "elsewhere"}))
    counts = {"fill_count_fp": filled, "remaining_count_fp": "0.00"}
    return {"ticker": ticker, "status": status, **counts, "history": history}


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
        (replace(CANCELED, reduced_by=None), truth(), 10),
        (replace(CANCELED, reduced_by=None), truth(by_call=False), 0),
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
        (replace(CANCELED, reduced_by=None), truth("executed", filled="10.00", removed="0.00"), 0),
        (replace(CANCELED, reduced_by=None), truth("resting", removed="0.00"), 0),
        (replace(TOO_LATE, status=OrderStatus.EXPIRED, fill_count=None), truth(by_call=False), 0),
    ],
)
def test_a_false_record_is_contradicted(record, order, by_us):
    assert contradictions(record, order, Decimal(by_us))


def test_the_status_that_reads_gave_an_order_is_as_true_as_its_own():
    expired = replace(TOO_LATE, status=OrderStatus.EXPIRED, fill_count=None)
    assert contradictions(expired, truth(by_call=False), Decimal(0), shown_as="expired") == []


def test_what_a_decrease_took_away_was_not_removed_by_us():
    order = truth(removed="6.00")
    order["history"].insert(1, {"event": "decreased", "at_ms": 1, "count": "4.00", "call": 3})
    assert removed_by_us(order) == 6
    by_decrease = {**order, "history": [{**line, "by": "decrease"} for line in order["history"]]}
    assert removed_by_us(by_decrease) == removed_by_us(None) == 0


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


def test_a_cancel_that_is_open_when_time_is_over_is_stuck():
    finding = judge("kind", 1, evidence(records={}, open_ids=["o"]))
    assert (finding.accepted, finding.settled, finding.lost) == (1, 0, [])
    assert finding.stuck == ["o: open in the cancel store"]


def test_a_cancel_of_which_nothing_is_left_is_lost():
    assert judge("kind", 1, evidence(records={})).lost == ["o: neither record nor entry"]


def test_a_waiter_without_an_answer_is_lost():
    finding = judge("kind", 1, evidence(unanswered=["o"]))
    assert finding.lost == ["o: who waits for it gets no answer"]
    assert finding.settled == 1


def test_a_raw_message_must_be_told_what_the_record_says_once_that_is_known():
    told = replace(UNKNOWN, outcome=Outcome.UNRESOLVED)
    assert not judge("kind", 1, evidence(answers=[CANCELED, told])).failed
    [line] = judge("kind", 1, evidence(answers=[TOO_LATE])).misreported
    assert "told too_late, the record says canceled" in line


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


@pytest.mark.parametrize("by_call", [True, False])
def test_only_a_null_is_undecidable_and_a_number_must_be_true(by_call):
    order = {"o": truth(by_call=by_call)}
    inferred = replace(CANCELED, confirmed_by=ConfirmedBy.READ_BACK)
    unclaimed = judge("kind", 1, evidence(records={"o": replace(inferred, reduced_by=None)}, truth=order))
    assert (unclaimed.undecidable, unclaimed.failed) == (["o"], False)
    claimed = judge("kind", 1, evidence(records={"o": inferred}, truth=order))
    assert (claimed.undecidable, bool(claimed.misreported)) == ([], not by_call)


@pytest.mark.parametrize(
    ("ago_ms", "confirmed_by", "is_excused"),
    [
        (900, ConfirmedBy.READ_BACK, True),
        (2_000, ConfirmedBy.READ_BACK, False),  # what was shown before that proves nothing
        (900, ConfirmedBy.CANCEL, False),  # its own answer has the number
    ],
)
def test_a_size_that_was_changed_just_before_a_lost_answer_is_told_by_itself(
    ago_ms, confirmed_by, is_excused
):
    order = truth(removed="13.00", at_ms=(0, 5_000))
    order["history"].insert(1, {"event": "amended", "at_ms": 5_000 - ago_ms, "count": "13.00"})
    finding = judge(
        "kind", 1, evidence(records={"o": replace(CANCELED, confirmed_by=confirmed_by)}, truth={"o": order})
    )
    assert (bool(finding.resized), finding.failed) == (is_excused, not is_excused)


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


# -- the judge of mass cancels: moments are seconds after 2030


BEGIN_S = datetime(2030, 1, 1, tzinfo=UTC).timestamp()


def at(second):
    return datetime.fromtimestamp(BEGIN_S + second, UTC).isoformat()


def scoped(created_s, ended_s=None, *, by_call=True):
    ms = [round((BEGIN_S + second) * 1000) for second in (created_s, ended_s or 0)]
    if ended_s is None:
        return truth("resting", removed="0.00", at_ms=ms)
    return truth(at_ms=ms, by_call=by_call)


def mass_report(*affected, flat=True, not_affected=(), **changes):
    known = {
        "flat": flat,
        "flat_listing": {"at": at(9)} if flat else None,
        "completed_at": at(10),
        "affected": [{"order_id": order_id, "reduced_by": count} for order_id, count in affected],
        "not_affected": [{"order_id": order_id, "reason": reason} for order_id, reason in not_affected],
        "orders_affected": len(affected),
        "contracts_canceled": f"{sum(Decimal(count or 0) for _, count in affected):.2f}",
    }
    return {**known, **changes}


def listing(second, query="ticker=KX-1-A&status=resting", status=200):
    received_ms = (BEGIN_S + second) * 1000
    return {"operation": "list", "status": status, "query": query, "received_ms": received_ms}


def judged(orders, report, last=None, calls=()):
    finding = Finding("kind", 1)
    sweep = Sweep("m", "KX-1-A", report, report if last is None else last)
    judge_sweep(finding, sweep, orders, calls or [listing(9)], read_lag_s=0.3)
    return finding


def test_a_true_report_is_found_true():
    orders = {"a": scoped(0, 5), "b": scoped(0, 4, by_call=False), "c": scoped(0, 5), "later": scoped(11)}
    report = mass_report(("a", "10.00"), ("c", None), not_affected=[("b", "too_late_canceled")])
    finding = judged(orders, report)
    assert (finding.failed, finding.undecidable, finding.sweeps) == (False, ["c"], 1)


@pytest.mark.parametrize(
    ("orders", "report", "words"),
    [
        ({"a": scoped(0, 5)}, mass_report(("a", "9.00")), "reduced_by 9.00, truly 10.00"),
        ({"a": scoped(0, 5, by_call=False)}, mass_report(("a", "10.00")), "truly 0"),
        ({"a": scoped(0, 5)}, mass_report(not_affected=[("a", "too_late_canceled")]), "our calls removed 10"),
        ({"a": scoped(0, 5)}, mass_report(("a", None), contracts_canceled="10.00"), "counts make 0"),
        ({"a": scoped(0, 5)}, mass_report(("a", "10.00"), orders_affected=2), "it names 1"),
        ({"a": scoped(11, 12)}, mass_report(), "placed after the report"),
        ({"a": scoped(0)}, mass_report(flat=False), "rests and is not named"),
    ],
)
def test_a_false_report_is_found_misreported(orders, report, words):
    finding = judged(orders, report)
    assert words in finding.misreported[0]


def test_a_report_that_is_changed_after_its_delivery_is_found_misreported():
    assert judged({}, mass_report(), mass_report(flat=False)).misreported
    assert judged({}, None).stuck


@pytest.mark.parametrize(
    ("order", "is_false"),
    [
        (scoped(0), True),
        (scoped(8.5), True),
        (scoped(8.9), False),  # reads lag: no listing can show it
        (scoped(0, 12), True),
        (scoped(0, 9.5), False),
    ],
)
def test_flat_is_false_when_an_order_rested_from_the_listing_to_the_report(order, is_false):
    assert bool(judged({"a": order}, mass_report()).false_flat) is is_false


@pytest.mark.parametrize(
    ("order", "calls"),
    [
        (scoped(8.9), [listing(9)]),
        (scoped(0, 5), [listing(9)]),
        (scoped(0), [listing(9, status=503), listing(11), listing(9, query="ticker=KX-2-A")]),
        (scoped(0), [listing(9, query="event_ticker=KX-1&cursor=x")]),
    ],
    ids=["not seen yet", "gone", "no listing", "a later page"],
)
def test_what_no_listing_could_show_need_not_be_named(order, calls):
    assert not judged({"a": order}, mass_report(flat=False), calls=calls).failed


def test_a_relay_that_is_cut_lets_nothing_pass_until_it_is_mended():
    with socket.create_server(("127.0.0.1", 0)) as server, Relay(server.getsockname()[1]) as relay:
        near = socket.create_connection(("127.0.0.1", relay.port), timeout=20)
        far, _ = server.accept()
        far.settimeout(20)
        near.sendall(b"one")
        assert far.recv(3) == b"one"
        relay.cut()
        near.sendall(b"two")
        far.settimeout(0.5)
        with pytest.raises(TimeoutError):
            far.recv(3)
        relay.mend()
        far.settimeout(20)
        assert far.recv(3) == b"two"
        near.close()
        assert far.recv(1) == b""
        far.close()


# -- the plan and the report


def test_the_same_seed_draws_the_same_plan_and_another_seed_another():
    plans = [draw("kind", seed, cancels=100, load_s=1.0, raw=True) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


def test_a_plan_asks_for_every_order_and_mixes_sorts_lanes_and_ways_of_asking():
    plan = draw("kind", 1, cancels=500, load_s=1.0, raw=True)
    asked = {order["order_id"] for ask in plan.asks for order in ask.orders}
    assert len(asked) == 500
    assert {order_id.rpartition("-")[2] for order_id in asked} == {
        name for name, sort in SORTS.items() if sort.share
    }
    assert {each.deed for each in plan.earlier} == {"cancel", "decrease", "amend"}
    assert all(-3 <= each.at_s <= 0 for each in plan.earlier)
    assert any("deadline_s" in order for ask in plan.asks for order in ask.orders)
    assert {ask.lane for ask in plan.asks} == set(Lane)
    assert {ask.raw for ask in plan.asks} == {ask.once for ask in plan.asks} == {True, False}
    assert {len(ask.orders) > 1 for ask in plan.asks} == {True, False}


def test_a_kind_may_have_another_mix_of_orders():
    shares = {**dict.fromkeys(SORTS, 0), "expired": 1}
    plan = draw("kind", 1, cancels=20, load_s=1.0, raw=True, mix=shares)
    assert {each.deed for each in plan.earlier} == {"expire"}
    assert len(plan.placed) == len(plan.earlier) == 20


def test_a_plan_has_no_raw_messages_where_celerys_own_may_be_lost():
    plan = draw("kind", 1, cancels=500, load_s=1.0, raw=False)
    assert not any(ask.raw for ask in plan.asks)


def test_a_failing_run_prints_how_to_play_it_again(capsys):
    Say(quiet=False).run(Finding("redis-restart", 7, lost=["o: open in the cancel store"]), cancels=500)
    printed = capsys.readouterr().out
    assert "lost: o: open in the cancel store" in printed
    assert "-m trials.campaign --only redis-restart --seed 7 --cancels 500" in printed


def test_the_table_adds_up_the_runs_of_a_kind_and_names_the_worst_and_the_median():
    runs = [
        Finding("none", seed, accepted=500, settled=500, recovered_s=[seed / 10], resumed_s=[0.01])
        for seed in (1, 2, 6)
    ]
    [row] = [line for line in table(runs).splitlines() if line.startswith("| none")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    counts = ["1,500", "1,500", *["0"] * 7]
    assert cells == ["none", *counts, "0.01 / 0.01", "0.60 / 0.20", "0.00"]


def test_the_document_tells_the_command_and_what_was_wrong():
    runs = [
        Finding("none", 1, accepted=1, settled=1, recovered_s=[0.5], undecidable=["o"], sweeps=2),
        Finding("hang", 4, misreported=["o: a lie"], false_flat=["p: rests"], stuck=["q"], recovered_s=[1.5]),
    ]
    text = document(runs, command="make faults", cancels=500)
    assert "`make faults`" in text
    assert KINDS["hang"].does in text
    assert "- `hang`, seed 4: misreported: o: a lie" in text
    assert "- `hang`, seed 4: false_flat: p: rests" in text
    assert '0 lost, 1 stuck, 1 misreported, 1 false "flat"' in text
    assert "1 undecidable" in text
    assert "2 mass cancels" in text
    assert "slowest recovery took 1.50 s (hang, seed 4)" in text


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
    assert finding["undecidable"] == []  # null is for lost replies, and none is lost here
    assert "| none" in path.read_text("utf-8")
    assert time.monotonic() - started < 30
