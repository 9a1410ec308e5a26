"""The plan of a mass cancel: which command fits, what it costs, and how long it is to take."""

from __future__ import annotations

from decimal import Decimal

import pytest

from kalshi_cancel.model.mass_request import CANCEL_ALL, GROUP_TRIGGER, MassRequest
from kalshi_cancel.store.rate_limits import Limits
from worker.mass.planning import Found, Start, fitting_command, plan

LIMITS = Limits(read_refill=200, read_capacity=200, write_refill=100, write_capacity=100)
READ_LAG_S = 2.0


def start(**changes):
    facts = {"started_s": 1.0, "tokens": {0: 100.0, 1: 100.0}, "read_tokens": 200.0, "waiting": {}}
    return Start(**{**facts, "refused_calls": 0, **changes})


def predicted(shards=None, *, not_listed=0, settled=0, after_s=0.0, pace=None, command=None, **changes):
    found = Found(shards or {}, Decimal(0), not_listed, settled, "2026-11-22T10:00:00.000Z", after_s)
    made = plan(start(**changes), found, LIMITS, command=command, pace=pace, read_lag_s=READ_LAG_S)
    return made["predicted_s"]


def request(scope, *, allowed=True):
    return MassRequest.parse({"scope": scope, "allow_side_effects": allowed})


# -- how long it takes


def test_what_the_bucket_holds_takes_no_time():
    assert predicted({0: 50}) < 0.3
    assert predicted({}) < 0.3


def test_the_bucket_s_refill_is_what_many_orders_wait_for():
    assert predicted({0: 550}) == pytest.approx(10.0, abs=0.3)
    assert predicted({0: 550}, tokens={0: 0.0}) == pytest.approx(11.0, abs=0.3)


def test_a_shard_s_own_bucket_pays_for_some_of_its_orders():
    assert predicted({0: 50, 1: 50}) < 0.4
    assert predicted({1: 550}) == pytest.approx(4.5, abs=0.3), "from both buckets"


def test_cancels_that_wait_in_the_risk_lane_go_first():
    assert predicted({0: 50}, waiting={"write": 500}) == pytest.approx(10.0, abs=0.3)
    assert predicted({0: 1_000}, pace=100.0, tokens={0: 1e6}, waiting={"write": 1_000}) == pytest.approx(
        20, abs=1
    )


def test_reads_that_wait_do_not_hold_up_orders_that_rest():
    assert predicted({0: 50}, waiting={"read": 3_000, "reads": 500}) == predicted({0: 50})


def test_ids_that_no_listing_shows_take_the_read_lag_and_their_reads():
    assert READ_LAG_S < predicted(not_listed=1) < READ_LAG_S + 1.0
    few, many = predicted(not_listed=20), predicted(not_listed=500)
    assert READ_LAG_S < few < READ_LAG_S + 1.5
    # 3 reads of 2 tokens each, of which 200 are there.
    assert many > (500 * 3 * 2 - 200) / 200
    assert predicted({0: 10}, not_listed=500) >= many


def test_ids_that_are_settled_already_take_no_reads():
    assert predicted(settled=20) < 0.3


def test_reads_that_wait_hold_up_what_is_known_of_such_ids():
    assert predicted(not_listed=20, waiting={"read": 1_000}) > predicted(not_listed=20) + 5.0


def test_the_time_until_anything_was_found_is_a_part_of_it():
    assert predicted({0: 50}, after_s=6.5) == pytest.approx(predicted({0: 50}) + 6.5)


def test_the_measured_pace_counts_where_tokens_do_not_hold_it_up():
    assert predicted({0: 1_000}, tokens={0: 1e6}, pace=100.0) == pytest.approx(10.0, abs=0.3)


def test_what_there_was_at_the_start_reads_back_as_it_was_written_and_so_does_an_older_one():
    facts = start(waiting={"write:1": 3, "read": 2})
    assert Start.from_json(facts.to_json()) == facts
    assert (facts.waiting_cancels, facts.waiting_reads) == (3, 2)
    older = {"started_s": 1.0, "tokens": {"0": 5.0}, "refused_calls": 2}
    assert Start.from_json(older) == Start(1.0, {0: 5.0}, 0.0, {}, 2)


# -- the exchange's own commands


@pytest.mark.parametrize(
    ("scope", "what"),
    [
        ({"everything": True}, CANCEL_ALL),
        ({"order_group_id": "g-1"}, GROUP_TRIGGER),
        ({"order_group_id": "g-1", "subaccount": 2}, GROUP_TRIGGER),
        ({"order_group_id": "g-1", "subaccount": 2, "exchange_index": 1}, GROUP_TRIGGER),
        ({"order_group_id": "g/1"}, None),
        ({"order_group_id": "g-1", "side": "yes"}, None),
        ({"subaccount": 2}, None),
        ({"order_ids": ["a"]}, None),
    ],
)
def test_a_command_fits_when_it_reaches_no_further_than_the_scope(scope, what):
    command = fitting_command(request(scope))
    assert (command and command.what) == what
    assert fitting_command(request(scope, allowed=False)) is None
