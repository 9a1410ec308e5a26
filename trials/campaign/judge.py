"""Judges one run of the fault campaign: what was promised, held against what the exchange knows.

Pure: everything was seen and read before. Moments are epoch seconds of this machine's clock.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal

from kalshi_cancel.model.results import CancelResult, ConfirmedBy, Outcome
from kalshi_cancel.sandbox.control import Json

# What counts as settled; the others are visible answers, but somebody still has to do something.
SETTLED = frozenset({Outcome.CANCELED, Outcome.TOO_LATE, Outcome.UNKNOWN_ORDER})

CANCELS = ("cancel", "batch")
# Who of those that cancel orders is this service: its calls, as the exchange's history names them.
OURS = frozenset({*CANCELS, "cancel_all", "order_group", "tail"})
# A size that was shown longer ago than a second counts for nothing; half of one more for the call under way.
RESIZED_WITHIN_MS = 1_500


@dataclass(slots=True)
class Promise:
    """What the producers heard about one order: when it was first accepted, if it was.

    ``maybe``: an error said that it may have been accepted. ``refused``: an error said that it was not.
    """

    accepted_at: float | None = None
    maybe: bool = False
    refused: bool = False


@dataclass(slots=True)
class Evidence:
    """All that was seen of one run.

    ``promises``, ``records``, ``seen_at`` (when the settled record was first seen) by order id; ``open_ids``
    are in the store at the end; ``truth`` is the exchange's own; ``calls`` what it received; ``marks`` the
    moments from which recovery counts; ``upsets`` those at which a worker was killed, stopped or woken.
    ``unanswered`` are orders for which somebody waited in vain, ``answers`` what raw messages got;
    ``shown_as``: the status that reads gave some orders for good, in the exchange's place.
    """

    promises: Mapping[str, Promise]
    records: Mapping[str, CancelResult]
    seen_at: Mapping[str, float]
    open_ids: Collection[str]
    truth: Mapping[str, Json]
    calls: Sequence[Json]
    marks: Sequence[float]
    upsets: Sequence[float]
    call_limit_s: float
    unanswered: Collection[str] = ()
    answers: Sequence[CancelResult] = ()
    shown_as: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Finding:
    """What came of one run; ``resumed_s`` and ``recovered_s`` have a number for each mark that left any open.

    Lost: nothing of it is left, or who waits for it gets no answer. Stuck: open when time is over.
    False flat: an order rests in the scope of a mass cancel that is reported flat. Undecidable: canceled, and
    nobody can tell how much of it by us; ``reduced_by`` is null. Resized: an answer of ours was lost, and
    ``reduced_by`` is what was last shown, but somebody changed the order's size in the moments between.
    ``sweeps``: the mass cancels.
    Resumed: until the first result after the mark. Recovered: until all that was open at the mark is settled.
    """

    kind: str
    seed: int
    accepted: int = 0
    settled: int = 0
    sweeps: int = 0
    lost: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    misreported: list[str] = field(default_factory=list)
    false_flat: list[str] = field(default_factory=list)
    undecidable: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    sent_twice: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    resumed_s: list[float] = field(default_factory=list)
    recovered_s: list[float] = field(default_factory=list)
    slowest_producer_s: float = 0.0
    took_s: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether a promise was broken."""
        return bool(self.lost or self.stuck or self.misreported or self.false_flat or self.problems)


def judge(kind: str, seed: int, evidence: Evidence) -> Finding:
    """The finding of a run whose faults are over and whose time to settle has passed."""
    finding = Finding(kind, seed)
    for order_id, promise in evidence.promises.items():
        _judge_order(finding, order_id, promise, evidence)
    for answer in evidence.answers:
        _judge_answer(finding, answer, evidence)
    finding.sent_twice += _sent_twice(evidence)
    for mark in evidence.marks:
        _measure_recovery(finding, mark, evidence)
    return finding


def taken(order_id: str, evidence: Evidence) -> bool:
    """Whether the cancel was accepted: the producer was told so, or it was not told and it is there."""
    promise = evidence.promises[order_id]
    there = order_id in evidence.records or order_id in evidence.open_ids
    return promise.accepted_at is not None or (promise.maybe and there)


def _judge_order(finding: Finding, order_id: str, promise: Promise, evidence: Evidence) -> None:
    record = evidence.records.get(order_id)
    if not taken(order_id, evidence):
        if promise.refused and not promise.maybe and (record or removed_by_us(evidence.truth.get(order_id))):
            finding.misreported.append(f"{order_id}: a producer was told that it is not accepted, and it was")
        return
    finding.accepted += 1
    if record is None or record.outcome not in SETTLED:
        said = "" if record is None else f", record {record.outcome.value}: {record.error}"
        if order_id in evidence.open_ids:
            finding.stuck.append(f"{order_id}: open in the cancel store{said}")
        else:
            finding.lost.append(f"{order_id}: neither record nor entry{said}")
        return
    finding.settled += 1
    if order_id in evidence.open_ids:
        finding.problems.append(f"{order_id}: settled and still in the cancel store")
    if order_id in evidence.unanswered:
        finding.lost.append(f"{order_id}: who waits for it gets no answer")
    truth = evidence.truth.get(order_id)
    wrong = contradictions(record, truth, removed_by_us(truth), shown_as=evidence.shown_as.get(order_id))
    if wrong and _is_resized(record, truth):
        finding.resized.append(f"{order_id}: {'; '.join(wrong)}")
    elif wrong:
        finding.misreported.append(f"{order_id}: {'; '.join(wrong)}")
    elif record.reduced_by is None and truth is not None:
        finding.undecidable.append(order_id)


def _is_resized(record: CancelResult, truth: Json | None) -> bool:
    """Whether a number is wrong only because the size changed between the last look and a lost answer."""
    if truth is None or record.confirmed_by is not ConfirmedBy.READ_BACK or record.reduced_by is None:
        return False
    before, last = truth["history"][:-1], truth["history"][-1]
    late = [
        line
        for line in before
        if line["event"] in ("amended", "decreased") and last["at_ms"] - line["at_ms"] <= RESIZED_WITHIN_MS
    ]
    as_shown = replace(record, reduced_by=removed_by_us(truth))
    return bool(late) and not contradictions(as_shown, truth, removed_by_us(truth))


def _judge_answer(finding: Finding, answer: CancelResult, evidence: Evidence) -> None:
    """A raw message's own answer is the record's, unless it came before the outcome was known."""
    record = evidence.records.get(answer.order_id or "")
    if record is not None and answer.outcome in SETTLED and answer.outcome is not record.outcome:
        said = f"a raw message was told {answer.outcome.value}, the record says {record.outcome.value}"
        finding.misreported.append(f"{answer.order_id}: {said}")


def contradictions(
    record: CancelResult, truth: Json | None, removed_by_us: Decimal, *, shown_as: str | None = None
) -> list[str]:
    """How a record differs from the exchange's own state and history of its order; empty: not at all.

    Where ``reduced_by`` is null, the record claims no number; whose cancel it was is then not claimed either.
    """
    if truth is None or record.outcome is Outcome.UNKNOWN_ORDER:
        if truth is None and record.outcome is Outcome.UNKNOWN_ORDER:
            return []
        return [f"reported {record.outcome.value}, the exchange has {truth and truth['status']}"]
    wrong = []
    if record.status is None or record.status.value not in {truth["status"], shown_as}:
        wrong.append(f"status {record.status}, truly {truth['status']}")
    if record.reduced_by is None and truth["status"] == "canceled":
        pass
    elif (record.outcome is Outcome.CANCELED) != (removed_by_us > 0):
        wrong.append(f"reported {record.outcome.value}, our calls removed {removed_by_us}")
    elif record.reduced_by != removed_by_us:
        wrong.append(f"reduced_by {record.reduced_by}, truly {removed_by_us}")
    for name in ("fill_count", "remaining_count"):
        said = getattr(record, name)
        if said is not None and said != Decimal(truth[f"{name}_fp"]):
            wrong.append(f"{name} {said}, truly {truth[f'{name}_fp']}")
    return wrong


def removed_by_us(truth: Json | None) -> Decimal:
    """Contracts that cancels of this service took off an order."""
    history = truth["history"] if truth else ()
    ours = [line for line in history if line["event"] == "canceled" and line.get("by") in OURS]
    return sum((Decimal(line["count"]) for line in ours), Decimal(0))


def ended_at(truth: Json) -> float | None:
    """When an order ended; None while it rests."""
    return None if truth["status"] == "resting" else float(truth["history"][-1]["at_ms"]) / 1000


def _sent_twice(evidence: Evidence) -> list[str]:
    """Orders with two cancels under way at once, unless the first one's sender was gone or had given up."""
    by_order: dict[str, list[Json]] = {}
    for call in evidence.calls:
        for order_id in call["order_ids"] if call["operation"] in CANCELS else ():
            by_order.setdefault(order_id, []).append(call)
    found = []
    for order_id, calls in by_order.items():
        calls.sort(key=lambda call: (call["received_ms"], call["seq"]))
        for first, second in itertools.pairwise(calls):
            start_s, again_s = first["received_ms"] / 1000, second["received_ms"] / 1000
            # Until the reply was ready; what hangs or drips is under way for longer, which is not seen here.
            under_way = again_s * 1000 < first["received_ms"] + (first["duration_ms"] or 0)
            # By the senders' own clocks too: a frozen exchange receives late, and all at once.
            sent_apart_s = (int(second["timestamp"] or 0) - int(first["timestamp"] or 0)) / 1000
            given_up = max(again_s - start_s, sent_apart_s) >= evidence.call_limit_s
            upset = any(start_s - 0.1 <= moment <= again_s + 0.1 for moment in evidence.upsets)
            if under_way and not given_up and not upset:
                found.append(f"{order_id}: calls {first['seq']} and {second['seq']}")
    return found


def _measure_recovery(finding: Finding, mark: float, evidence: Evidence) -> None:
    open_then = [
        seen_at
        for order_id, seen_at in evidence.seen_at.items()
        if seen_at > mark and (evidence.promises[order_id].accepted_at or mark) < mark
    ]
    if open_then:
        finding.resumed_s.append(min(open_then) - mark)
        finding.recovered_s.append(max(open_then) - mark)
