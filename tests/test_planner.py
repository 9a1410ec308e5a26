"""The planner's laws, on a store and buckets that are a model: no server, any state, out of date or not."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalshi_cancel.model.requests import Lane
from kalshi_cancel.store.rate_limits import Limits
from kalshi_cancel.store.steps import Filled, Line, Snapshot, Step
from worker.dispatch.planner import HEAD_START_MS, READS_AT_ONCE, WORTH_A_CALL, plan

BOTH = (Lane.RISK, Lane.STRATEGY)
PATHS = ("write", "write:1", "write:2", "write:3", "read", "reads")
BUCKETS = ("read", "write", "write:1", "write:2", "write:3")
LIMITS = Limits(300.0, 600.0, 300.0, 600.0)
RESERVE = 0.2
BATCH_LIMIT = 50
TURN_MS = 10


@dataclass
class Store:
    """Due moments by lane and path, and buckets: does what ``lua/claim.lua`` does."""

    waiting: dict[tuple[Lane, str], list[int]] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BUCKETS, 600.0))
    refill: float = 300.0
    now_ms: int = 0

    def add(self, lane, path, number=1, *, at_ms=None):
        line = self.waiting.setdefault((lane, path), [])
        line += [self.now_ms if at_ms is None else at_ms] * number
        line.sort()

    def due(self, lane, path):
        return sum(at_ms <= self.now_ms for at_ms in self.waiting.get((lane, path), ()))

    def snapshot(self):
        lines = tuple(
            Line(lane, path, line[0], self.due(lane, path))
            for (lane, path), line in self.waiting.items()
            if line
        )
        filled = tuple((name, Filled(tokens, 600.0, self.refill)) for name, tokens in self.tokens.items())
        return Snapshot(self.now_ms, lines, filled)

    def pass_time(self, ms):
        self.now_ms += ms
        for name, tokens in self.tokens.items():
            self.tokens[name] = min(tokens + self.refill * ms / 1000, 600.0)

    def paid_for(self, step):
        there = self.tokens[step.bucket] - step.keep - step.share * 600.0
        if step.together:
            return step.most if there >= step.cost else 0
        behind = self.due(step.lane, step.behind) if step.behind else 0
        return max(min(step.most, int(there // step.cost) - behind), 0)

    def execute(self, steps, calls):
        """The calls: each as its step, and the lane and the due moment of each of its orders."""
        made: list[tuple[Step, list[tuple[str, int]]]] = []
        for step in steps:
            for _ in range(step.times):
                is_full = len(made) >= calls or (made and len(made[-1][1]) > 1)
                taken = [] if is_full else self.take(step)
                if not taken:
                    break
                made.append((step, taken))
        return made

    def take(self, step):
        if sum(self.due(step.lane, path) for path in step.paths) < step.least:
            return []
        left, taken = self.paid_for(step), []
        for path in step.paths:
            count = min(left, self.due(step.lane, path))
            line = self.waiting.get((step.lane, path), [])
            taken += [(path, at_ms) for at_ms in line[:count]]
            del line[:count]
            left -= count
        if taken:
            self.tokens[step.bucket] -= step.cost if step.together else step.cost * len(taken)
        return taken

    def more(self, steps):
        """Whether one of the steps could be executed now."""
        return any(
            self.paid_for(step) > 0 and sum(self.due(step.lane, path) for path in step.paths) >= step.least
            for step in steps
        )


def a_plan(store_or_snapshot, *, free_senders=1, **how):
    snapshot = store_or_snapshot.snapshot() if isinstance(store_or_snapshot, Store) else store_or_snapshot
    usual = {"batch_limit": BATCH_LIMIT, "reserve": RESERVE}
    return plan(snapshot, LIMITS, BOTH, free_senders=free_senders, **{**usual, **how})


@st.composite
def stores(draw):
    """Any store: with orders that are due, or not yet, on any path, and with any tokens."""
    store = Store(refill=draw(st.sampled_from([10.0, 300.0, 4_000.0])), now_ms=1_000)
    store.tokens = {name: draw(st.floats(-50.0, 600.0)) for name in BUCKETS}
    for lane in BOTH:
        for path in draw(st.sets(st.sampled_from(PATHS))):
            store.add(lane, path, draw(st.integers(1, 60)), at_ms=draw(st.integers(0, 1_500)))
    return store


@given(stores(), stores(), st.integers(1, 8))
def test_risk_goes_first_also_what_has_come_in_since_the_snapshot(seen, store, free_senders):
    steps = a_plan(seen, free_senders=free_senders)
    lanes = [step.lane for step in steps]
    assert lanes == sorted(lanes, key=BOTH.index)
    of_risk = [step for step in steps if step.lane is Lane.RISK]
    could = store.more(of_risk)
    made = store.execute(steps, free_senders)
    assert not could or made[0][0].lane is Lane.RISK
    assert all(step.lane is Lane.RISK for step, _ in made) or not store.more(of_risk)


@given(stores(), st.integers(1, 8))
def test_there_is_a_step_for_whatever_may_have_come_in(seen, free_senders):
    steps = a_plan(seen, free_senders=free_senders)
    assert {(lane, path) for lane in BOTH for path in PATHS} <= {
        (step.lane, path) for step in steps for path in step.paths
    }


@given(stores(), stores(), st.integers(1, 8))
def test_nobody_comes_away_empty_while_something_is_due_and_paid_for(seen, store, free_senders):
    steps = a_plan(seen, free_senders=free_senders)
    made = store.execute(steps, free_senders)
    could_be_more = store.more(a_plan(store))
    assert made or not could_be_more
    assert store.more(steps) == could_be_more, "others are woken where there is more"


def test_what_has_come_in_for_risk_gets_all_free_senders_before_what_was_seen_of_strategy():
    store = Store(now_ms=1_000)
    store.add(Lane.STRATEGY, "write:1", 50)
    steps = a_plan(store, free_senders=8)
    store.add(Lane.RISK, "write:1", 20)
    assert [step.lane for step, _ in store.execute(steps, 8)] == [Lane.RISK] * 8


def test_cancels_that_have_come_in_without_a_shard_keep_their_tokens_from_shards():
    store = Store(now_ms=1_000)
    store.tokens |= {"write:1": 0.0, "write": 60.0}
    store.add(Lane.RISK, "write:1", 30)
    steps = a_plan(store)
    store.add(Lane.RISK, "write", 25, at_ms=999)
    [(step, taken)] = store.execute(steps, 1)
    assert (step.behind, len(taken)) == ("write", 5)


@given(st.dictionaries(st.sampled_from(PATHS[1:4]), st.integers(1, 5), min_size=1), st.integers(1, 8))
def test_each_free_sender_gets_a_call_where_calls_are_for_one_order_each(due, free_senders):
    store = Store()
    for path, number in due.items():
        store.add(Lane.STRATEGY, path, number)
    made = store.execute(a_plan(store, free_senders=free_senders), free_senders)
    assert len(made) == min(free_senders, sum(due.values()))


@given(stores(), stores(), st.integers(1, 8))
def test_what_is_kept_for_risk_and_for_a_listing_stays(seen, store, free_senders):
    before = dict(store.tokens)
    for step, _ in store.execute(a_plan(seen, free_senders=free_senders), free_senders):
        if step.bucket == "read":
            assert store.tokens["read"] >= LIMITS.list_cost
        elif step.lane is Lane.STRATEGY:
            assert store.tokens[step.bucket] >= RESERVE * 600.0
    assert all(store.tokens[name] >= min(before[name], 0.0) for name in BUCKETS)


@given(stores(), st.integers(1, 8))
def test_the_calls_of_a_plan_are_paid_for_by_the_tokens_that_it_has_seen(store, free_senders):
    """So that what it leaves out for lack of tokens is what lacks tokens."""
    left = {name: max(tokens, 0.0) for name, tokens in store.tokens.items()}
    for step, taken in store.execute(a_plan(store, free_senders=free_senders), free_senders):
        left[step.bucket] -= step.cost if step.together else step.cost * len(taken)
    assert all(tokens >= 0.0 for tokens in left.values())


@settings(deadline=None)
@given(
    path=st.sampled_from(PATHS),
    arrivals=st.lists(st.lists(st.sampled_from(PATHS), max_size=3), min_size=1, max_size=5),
    lane=st.sampled_from(BOTH),
)
def test_nothing_starves_however_much_comes_in_on_other_paths(path, arrivals, lane):
    """While there are tokens, what is due goes out within a bounded number of turns."""
    store = Store(refill=4_000.0)
    store.add(lane, path)
    # A head start; then the shards' buckets, of which the fullest pays first, are level.
    bound = HEAD_START_MS // TURN_MS + 3 * int(600.0 / LIMITS.cancel_cost) + 10
    for turn in range(bound):
        steps = a_plan(store)
        for _, taken in store.execute(steps, 1):
            if (path, 0) in taken:
                return
        store.pass_time(TURN_MS)
        for other in arrivals[turn % len(arrivals)]:
            if other != path:
                store.add(lane, other)
    raise AssertionError(f"it still waits after {bound} turns")


@given(st.dictionaries(st.sampled_from(PATHS[1:4]), st.integers(1, 5), min_size=1), st.integers(1, 8))
def test_a_few_cancels_of_shards_leave_the_unscoped_bucket_to_others(due, free_senders):
    assert sum(due.values()) < WORTH_A_CALL
    store = Store()
    for path, number in due.items():
        store.add(Lane.RISK, path, number)
    while made := store.execute(a_plan(store, free_senders=free_senders), free_senders):
        assert all(step.bucket == taken[0][0] for step, taken in made)
    assert store.tokens["write"] == 600.0


def test_many_cancels_of_shards_go_out_in_one_call_where_the_unscoped_bucket_refills_fast():
    store = Store(refill=4_000.0)
    store.add(Lane.RISK, "write:1", 30)
    store.add(Lane.RISK, "write:2", 30)
    [(step, taken)] = store.execute(a_plan(store, free_senders=4), 4)
    assert (step.bucket, len(taken)) == ("write", BATCH_LIMIT)


def test_the_fullest_of_the_shards_buckets_is_spent_first():
    store = Store()
    store.tokens |= {"write:1": 100.0, "write:2": 102.0, "write:3": 50.0}
    for path in ("write:1", "write:2", "write:3"):
        store.add(Lane.RISK, path, 2)
    made = store.execute(a_plan(store, free_senders=3), 3)
    assert [step.bucket for step, _ in made] == ["write:2", "write:1", "write:2"]


def test_what_has_no_tokens_takes_no_sender_from_what_has():
    store = Store(now_ms=1_000)
    store.tokens["read"] = 0.0
    store.add(Lane.RISK, "read", 5, at_ms=1)
    store.add(Lane.RISK, "write:1", 5, at_ms=2)
    made = store.execute(a_plan(store, free_senders=3), 3)
    assert [step.bucket for step, _ in made] == ["write:1"] * 3


def test_shards_are_not_lent_what_the_unscoped_bucket_is_wanted_for_itself():
    store = Store(now_ms=1_000)
    store.tokens |= {"write:1": 0.0, "write": 20.0}
    store.add(Lane.RISK, "write:1", 30, at_ms=1)
    store.add(Lane.RISK, "write", 4, at_ms=900)
    [(step, taken)] = store.execute(a_plan(store), 1)
    assert (step.bucket, taken) == ("write", [("write:1", 1)] * 6)


def test_what_cannot_go_out_in_one_call_goes_out_in_single_ones():
    store = Store(refill=4_000.0)
    store.tokens["write"] = 10.0
    store.add(Lane.RISK, "write:1", 30)
    made = store.execute(a_plan(store, free_senders=4), 4)
    assert [(step.bucket, len(taken)) for step, taken in made] == [("write:1", 1)] * 4


@pytest.mark.parametrize(("tokens", "reads"), [(11.0, 0), (12.0, 1)])
def test_a_read_back_leaves_the_tokens_of_a_listing(tokens, reads):
    store = Store()
    store.tokens["read"] = tokens
    store.add(Lane.RISK, "read")
    assert len(store.execute(a_plan(store), 1)) == reads


def test_a_shard_without_tokens_is_lent_what_nobody_else_waits_for():
    store = Store()
    store.tokens |= {"write:1": 0.0, "write": 20.0}
    store.add(Lane.RISK, "write:1", 30)
    store.add(Lane.RISK, "write", 4)
    [(step, taken)] = store.execute(a_plan(store), 1)
    assert (step.bucket, len(taken)) == ("write", 10)
    assert [path for path, _ in taken] == ["write"] * 4 + ["write:1"] * 6


def test_what_goes_out_together_has_a_head_start_and_read_backs_come_later():
    store = Store(now_ms=5_000)
    store.add(Lane.RISK, "read", at_ms=4_000)
    store.add(Lane.RISK, "write:1", at_ms=4_500)
    store.add(Lane.RISK, "write", at_ms=4_500 + HEAD_START_MS - 1)
    order = [store.execute(a_plan(store, reads_after_s=1.0), 1)[0][1][0][0] for _ in range(3)]
    assert order == ["write", "write:1", "read"]


@pytest.mark.parametrize(("due", "together", "cost"), [(5, False, 2.0), (6, True, 10.0)])
def test_many_read_backs_are_one_listing_where_that_is_cheaper(due, together, cost):
    store = Store()
    store.add(Lane.RISK, "reads", due)
    for seen in (store, Store()):  # also where nothing was due when it was looked at
        now = deepcopy(store)
        [(step, taken)] = now.execute(a_plan(seen), 1)
        assert (step.together, step.cost, step.most) == (together, cost, READS_AT_ONCE if together else 1)
        assert len(taken) == (due if together else 1)


@pytest.mark.parametrize("reads", [0, 1, 2])
def test_no_more_read_backs_are_planned_than_there_may_be(reads):
    store = Store()
    store.add(Lane.RISK, "read", 5)
    steps = a_plan(store, free_senders=4, reads=reads)
    planned = [step for step in steps if step.reads and step.lane is Lane.RISK and step.paths == ("read",)]
    assert len(planned) == reads


def test_what_was_not_due_yet_is_due_by_now_and_tokens_have_come_in():
    store = Store(now_ms=1_000)
    store.tokens["write:1"] = 0.0
    store.add(Lane.RISK, "write:1", at_ms=1_200)
    early, late = a_plan(store)[0], a_plan(store, ago_s=0.3)[0]
    assert (early.paths, late.paths) == (("write",), ("write:1",))


def test_before_anything_was_seen_cancels_are_asked_for_on_the_usual_paths():
    steps = a_plan(Snapshot())
    assert [(step.lane, *step.paths) for step in steps] == [
        (lane, path) for lane in BOTH for path in ("write", "reads", "reads", "read")
    ]


def test_a_turn_of_one_lane_keeps_what_was_seen_of_the_others_and_learns_of_every_bucket():
    store = Store(now_ms=1_000)
    for lane in BOTH:
        store.add(lane, "write:1", 3)
    earlier = replace(store.snapshot(), buckets=())
    store.add(Lane.RISK, "write:2")
    seen = store.snapshot()
    of_risk = replace(seen, lines=tuple(line for line in seen.lines if line.lane is Lane.RISK))
    merged = of_risk.with_lines_of(earlier, [Lane.RISK])
    assert sorted((line.lane, line.path) for line in merged.lines) == [
        (Lane.RISK, "write:1"),
        (Lane.RISK, "write:2"),
        (Lane.STRATEGY, "write:1"),
    ]
    assert ("write:2",) in [step.paths for step in a_plan(merged)]


def test_where_a_newer_version_left_off_is_read_back():
    [first, *_] = a_plan(Snapshot(5, (Line(Lane.RISK, "odd", 1, 3),)))
    assert (first.paths, first.bucket, first.most, first.reads) == (("odd",), "read", 1, True)
