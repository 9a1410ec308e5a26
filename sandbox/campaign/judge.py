"""Judges one run of the fault campaign: what was promised, held against what the exchange knows.

Pure: everything was seen and read before. Moments are epoch seconds of this machine's clock.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from sandbox.control import Json
from worker.orders import CancelResult, ConfirmedBy, Outcome

# What counts as settled; the others are visible answers, but somebody still has to do something.
SETTLED = frozenset({Outcome.CANCELED, Outcome.TOO_LATE, Outcome.UNKNOWN_ORDER})

CANCELS = ("cancel", "batch")


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
    are in the book at the end; ``truth`` is the exchange's own; ``calls`` what it received; ``marks`` the
    moments from which recovery counts; ``upsets`` those at which a worker was killed, stopped or woken;
    ``contested`` are orders that somebody else tried to cancel meanwhile.
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
    contested: Collection[str] = ()


@dataclass(slots=True)
class Finding:
    """What came of one run; ``resumed_s`` and ``recovered_s`` have a number for each mark that left any open.

    Resumed: until the first result after the mark. Recovered: until all that was open at the mark is settled.
    """

    kind: str
    seed: int
    accepted: int = 0
    settled: int = 0
    lost: list[str] = field(default_factory=list)
    misreported: list[str] = field(default_factory=list)
    undecidable: list[str] = field(default_factory=list)
    sent_twice: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    resumed_s: list[float] = field(default_factory=list)
    recovered_s: list[float] = field(default_factory=list)
    slowest_producer_s: float = 0.0
    took_s: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether a promise was broken."""
        return bool(self.lost or self.misreported or self.problems)


def judge(kind: str, seed: int, evidence: Evidence) -> Finding:
    """The finding of a run whose faults are over and whose time to settle has passed."""
    finding = Finding(kind, seed)
    for order_id, promise in evidence.promises.items():
        _judge_order(finding, order_id, promise, evidence)
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
        if promise.refused and not promise.maybe and (record or _removed_by_us(order_id, evidence)):
            finding.misreported.append(f"{order_id}: a producer was told that it is not accepted, and it was")
        return
    finding.accepted += 1
    if record is None or record.outcome not in SETTLED:
        where = "open in the book" if order_id in evidence.open_ids else "neither record nor entry"
        said = "" if record is None else f", record {record.outcome.value}: {record.error}"
        finding.lost.append(f"{order_id}: {where}{said}")
        return
    finding.settled += 1
    if order_id in evidence.open_ids:
        finding.problems.append(f"{order_id}: settled and still in the book")
    removed = _removed_by_us(order_id, evidence)
    wrong = contradictions(record, evidence.truth.get(order_id), removed)
    if wrong and not removed and order_id in evidence.contested and _has_lost_reply(record):
        finding.undecidable.append(order_id)
    elif wrong:
        finding.misreported.append(f"{order_id}: {'; '.join(wrong)}")


def contradictions(record: CancelResult, truth: Json | None, removed_by_us: Decimal) -> list[str]:
    """How a record differs from the exchange's own state and history of its order; empty: not at all."""
    if truth is None or record.outcome is Outcome.UNKNOWN_ORDER:
        if truth is None and record.outcome is Outcome.UNKNOWN_ORDER:
            return []
        return [f"reported {record.outcome.value}, the exchange has {truth and truth['status']}"]
    wrong = []
    if record.status is None or record.status.value != truth["status"]:
        wrong.append(f"status {record.status}, truly {truth['status']}")
    if (record.outcome is Outcome.CANCELED) != (removed_by_us > 0):
        wrong.append(f"reported {record.outcome.value}, our calls removed {removed_by_us}")
    elif record.reduced_by != removed_by_us:
        wrong.append(f"reduced_by {record.reduced_by}, truly {removed_by_us}")
    for name in ("fill_count", "remaining_count"):
        said = getattr(record, name)
        if said is not None and said != Decimal(truth[f"{name}_fp"]):
            wrong.append(f"{name} {said}, truly {truth[f'{name}_fp']}")
    return wrong


def _removed_by_us(order_id: str, evidence: Evidence) -> Decimal:
    history = evidence.truth.get(order_id, {}).get("history", ())
    ours = [line for line in history if line["event"] == "canceled" and line.get("call") is not None]
    return sum((Decimal(line["count"]) for line in ours), Decimal(0))


def _has_lost_reply(record: CancelResult) -> bool:
    """Whether it is a cancel of ours only by inference; the exchange does not tell who canceled an order."""
    return record.outcome is Outcome.CANCELED and record.confirmed_by is ConfirmedBy.READ_BACK


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
