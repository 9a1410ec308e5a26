"""The report of a mass cancel: what it says of each order, and sums of what is proven only."""

from __future__ import annotations

from decimal import Decimal

import pytest

from kalshi_cancel.model.mass_request import MassRequest
from kalshi_cancel.model.orders import OrderStatus
from kalshi_cancel.model.results import CancelResult, ConfirmedBy, Outcome, Problem
from kalshi_cancel.store.mass_claim import Planned
from worker.mass.report import End, pace_shown, report

PLAN = {
    "started_s": 1_795_341_600.0,
    "predicted_s": 1.0,
    "tokens_s": 0.0,
    "found_after_s": 0.0,
    "command": False,
}
AT = "2026-11-22T10:00:02.000Z"  # two seconds after the start
HAD = Planned(Decimal(10), Decimal(0))


def end(**changes):
    facts = {"completed_at": AT, "why_not_flat": "why", "flat_listing": None, "proven_s": None}
    return End(**{**facts, "tokens_spent": 0.0, "rate_limited": 0, **changes})


def canceled(count="10.00", **changes):
    facts = {"outcome": Outcome.CANCELED, "status": OrderStatus.CANCELED, "attempts": 1, "settled_at": AT}
    removed = None if count is None else Decimal(count)
    return CancelResult(
        "a", **{**facts, "reduced_by": removed, "confirmed_by": ConfirmedBy.CANCEL, **changes}
    )


def made(planned, results, scope=None, **changes):
    request = MassRequest.parse({"scope": scope or {"everything": True}})
    return report(request, PLAN, planned, results, end(**changes))


def test_contracts_are_summed_where_they_are_proven_and_the_others_are_counted():
    planned = dict.fromkeys("abc", HAD)
    results = {"a": canceled("10.00"), "b": canceled(None), "c": canceled("2.50")}
    said = made(planned, results)
    assert (said["contracts_canceled"], said["orders_count_unknown"]) == ("12.50", 1)
    assert said["affected"][1] == {"order_id": "b", "reduced_by": None}
    assert said["orders_affected"] == 3


@pytest.mark.parametrize(
    ("had", "result", "filled", "unknown"),
    [
        (HAD, canceled("10.00"), "0.00", 0),
        (HAD, canceled("6.00"), "0.00", 1),
        (HAD, canceled("6.00", fill_count=Decimal(0)), "0.00", 0),
        (HAD, canceled("6.00", fill_count=Decimal(4)), "4.00", 0),
        (HAD, canceled(None), "0.00", 1),
        (HAD, canceled("0.00", outcome=Outcome.TOO_LATE, fill_count=Decimal(10)), "10.00", 0),
        (HAD, canceled("0.00", outcome=Outcome.TOO_LATE), "0.00", 1),
        (Planned(None, None), canceled("0.00", outcome=Outcome.TOO_LATE, fill_count=Decimal(10)), "0.00", 0),
        (HAD, canceled(None, outcome=Outcome.REFUSED, status=None), "0.00", 0),
        (Planned(Decimal(6), Decimal(4)), canceled("6.00", fill_count=Decimal(4)), "0.00", 0),
        (Planned(Decimal(10), Decimal(0), settled=True), canceled("10.00", fill_count=Decimal(5)), "0.00", 0),
    ],
)
def test_a_fill_is_a_difference_of_two_fill_counts_and_not_what_is_missing(had, result, filled, unknown):
    said = made({"a": had}, {"a": result})
    assert (said["contracts_filled_meanwhile"], said["orders_fills_unknown"]) == (filled, unknown)


def test_every_order_that_rests_is_named_once_with_its_reason():
    planned = {"open": HAD, "refused": HAD, "done": HAD, "before": Planned(None, None, settled=True)}
    results = {
        "refused": canceled(
            None, outcome=Outcome.REFUSED, status=None, error=Problem("forbidden", "no", 403)
        ),
        "done": canceled(),
        "before": canceled(),
    }
    said = made(
        planned,
        results,
        {"order_ids": ["open", "never", "unclear"]},
        cannot_tell={"unclear": "no readable price", "open": "no readable price"},
        not_asked={"rest": "forbidden", "refused": "forbidden"},
    )
    assert said["not_affected"] == [
        {"order_id": "open", "reason": "open", "error": None},
        {"order_id": "refused", "reason": "refused", "error": "forbidden"},
        {"order_id": "before", "reason": "too_late_canceled", "error": None},
        {"order_id": "unclear", "reason": "cannot_tell", "error": "no readable price"},
        {"order_id": "rest", "reason": "not_asked", "error": "forbidden"},
        {"order_id": "never", "reason": "not_resting_in_scope", "error": None},
    ]
    assert [each["order_id"] for each in said["affected"]] == ["done"]


def test_what_a_command_hit_is_named_unless_it_is_an_order_of_this_mass_cancel():
    said = made({"a": HAD}, {"a": canceled()}, canceled_by_command={"b", "a", "c"})
    assert said["canceled_by_command"] == ["b", "c"]


def test_it_is_flat_by_a_listing_only():
    assert made({}, {})["flat"] is False
    said = made({}, {}, flat_listing={"at": AT, "sha256": "0", "pages": 1}, proven_s=2.5)
    assert (said["flat"], said["why_not_flat"], said["proven_s"]) == (True, None, 2.5)


def test_the_time_until_the_last_order_leaves_out_what_was_settled_before():
    planned = {"a": HAD, "b": Planned(None, None, settled=True)}
    late = canceled(settled_at="2026-11-22T11:00:00.000Z")
    assert made(planned, {"a": canceled(), "b": late})["actual_s"] == 2.0
    assert made({"b": planned["b"]}, {"b": late})["actual_s"] is None


# -- what it teaches


def pace(planned=None, results=None, *, rate_limited=0, **plan):
    many = {f"o-{n}": HAD for n in range(1_000)}
    planned = {**many, **(planned or {})}
    results = {**dict.fromkeys(many, canceled()), **(results or {})}
    return pace_shown({**PLAN, **plan}, planned, results, rate_limited=rate_limited, overhead_s=0.15)


def test_the_pace_is_what_the_first_round_shows():
    assert pace() == pytest.approx(1_000 / 1.85)


def test_orders_that_came_later_say_nothing_about_the_pace():
    late = Planned(Decimal(1), Decimal(0), late=True)
    much_later = canceled(settled_at="2026-11-22T10:00:12.000Z")
    assert pace({"late": late}, {"late": much_later}) == pace()


@pytest.mark.parametrize(
    "hindrance",
    [
        {"rate_limited": 1},
        {"tokens_s": 1.5},
        {"found_after_s": 1.5},
        {"command": True},
        {"results": {"o-7": canceled(attempts=2)}},
        {"results": {"o-7": canceled(confirmed_by=ConfirmedBy.READ_BACK)}},
        {"planned": {"open": HAD}},
    ],
    ids=str,
)
def test_a_round_that_was_hindered_teaches_nothing(hindrance):
    assert pace(**hindrance) is None


def test_a_few_orders_teach_nothing():
    few = {f"o-{n}": HAD for n in range(100)}
    assert pace_shown(PLAN, few, dict.fromkeys(few, canceled()), rate_limited=0, overhead_s=0.15) is None
