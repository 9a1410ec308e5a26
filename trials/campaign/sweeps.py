"""Judges the mass cancels of one run: what their reports say, held against the exchange's own history.

Pure: everything was seen and read before. Moments are epoch seconds of this machine's clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from http.client import OK

from kalshi_cancel.sandbox.control import Json
from trials.campaign.judge import Finding, ended_at, removed_by_us


@dataclass(slots=True)
class Sweep:
    """A mass cancel of one ticker; ``report``: the first that was seen, ``last``: what is kept at the end."""

    request_id: str
    ticker: str
    report: Json | None = None
    last: Json | None = None


def judge_sweep(
    finding: Finding, sweep: Sweep, truth: Mapping[str, Json], calls: Sequence[Json], *, read_lag_s: float
) -> None:
    """Adds to the finding what is wrong with a mass cancel; its order counts and its flatness above all.

    ``calls``: what the exchange received; the last listing of the ticker tells what could be known.
    """
    finding.sweeps += 1
    report = sweep.report
    if report is None:
        finding.stuck.append(f"mass cancel {sweep.request_id}: no report")
        return
    if sweep.last != report:
        finding.misreported.append(f"mass cancel {sweep.request_id}: its report was changed afterwards")
    scope = {order_id: order for order_id, order in truth.items() if order["ticker"] == sweep.ticker}
    wrong = [*_wrong_entries(finding, report, truth), *_wrong_totals(report), *_revived(report, scope)]
    ended_s = _moment(report["completed_at"])
    if report["flat"]:
        proven_s = _moment((report.get("flat_listing") or {}).get("at") or report["completed_at"])
        finding.false_flat += [
            f"{order_id}: rests, and mass cancel {sweep.request_id} is flat"
            for order_id, order in scope.items()
            if _rests_throughout(order, proven_s - read_lag_s, ended_s)
        ]
    else:
        named = {each["order_id"] for name in ("affected", "not_affected") for each in report[name]}
        listed_s = _last_listing_s(sweep, calls, before_s=ended_s)
        wrong += [
            f"{order_id}: rests and is not named"
            for order_id, order in scope.items()
            if order_id not in named and _rests_throughout(order, listed_s - read_lag_s, ended_s)
        ]
    finding.misreported += [f"mass cancel {sweep.request_id}: {each}" for each in wrong]


def _wrong_entries(finding: Finding, report: Json, truth: Mapping[str, Json]) -> Iterator[str]:
    for each in report["affected"]:
        order_id, removed = each["order_id"], removed_by_us(truth.get(each["order_id"]))
        if each["reduced_by"] is None:
            finding.undecidable.append(order_id)
        elif Decimal(each["reduced_by"]) != removed:
            yield f"{order_id}: reduced_by {each['reduced_by']}, truly {removed}"
    for each in report["not_affected"]:
        order_id, removed = each["order_id"], removed_by_us(truth.get(each["order_id"]))
        if each["reason"].startswith(("too_late", "unknown_order")) and removed:
            yield f"{order_id}: {each['reason']}, our calls removed {removed}"


def _wrong_totals(report: Json) -> Iterator[str]:
    proven = sum((Decimal(each["reduced_by"] or 0) for each in report["affected"]), Decimal(0))
    if Decimal(report["contracts_canceled"]) != proven:
        yield f"contracts_canceled {report['contracts_canceled']}, its orders' counts make {proven}"
    if report["orders_affected"] != len(report["affected"]):
        yield f"orders_affected {report['orders_affected']}, it names {len(report['affected'])}"


def _revived(report: Json, scope: Mapping[str, Json]) -> Iterator[str]:
    """What was placed after the report and canceled all the same: a finished work came back."""
    ended_s = _moment(report["completed_at"])
    for order_id, order in scope.items():
        if _created_s(order) > ended_s and removed_by_us(order):
            yield f"{order_id}: canceled, and was placed after the report"


def _last_listing_s(sweep: Sweep, calls: Sequence[Json], *, before_s: float) -> float:
    """When the exchange received the last call for a first page that it answered well."""
    return max(
        (
            call["received_ms"] / 1000
            for call in calls
            if call["operation"] == "list"
            and call["status"] == OK
            and call["received_ms"] / 1000 < before_s
            and sweep.ticker.rpartition("-")[0] in call["query"]  # by ticker or by event
            and "cursor=" not in call["query"]
        ),
        default=0.0,
    )


def _rests_throughout(order: Json, from_s: float, until_s: float) -> bool:
    ended_s = ended_at(order)
    return _created_s(order) < from_s and (ended_s is None or ended_s > until_s)


def _created_s(order: Json) -> float:
    return float(order["history"][0]["at_ms"]) / 1000


def _moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
