"""Whatever happens to orders, their numbers add up and every view of them agrees."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from kalshi_cancel.sandbox.market import Filter, Market, Moment, NewOrder

CENTS = st.integers(1, 2000).map(lambda n: Decimal(n) / 100)
DEEDS = st.lists(
    st.tuples(
        st.sampled_from(["place", "fill", "cancel", "decrease", "amend", "restore", "wait"]),
        st.integers(0, 9),
        CENTS,
    ),
    max_size=40,
)


@given(DEEDS, st.sampled_from([0.0, 2.5]))
def test_counts_add_up_after_any_history_and_indexes_agree_with_the_orders(deeds, read_lag_s):
    market, tick = Market(read_lag_s=read_lag_s), 0
    resized = Counter()
    for deed, index, count in deeds:
        tick += 1
        moment = Moment(tick * 1_000_000, float(tick))
        orders = list(market.orders())
        if deed == "place":
            market.place(NewOrder(ticker=f"KX{index % 2}-{index % 3}-A", count=count), moment)
            continue
        if not orders or deed == "wait":
            continue
        order = orders[index % len(orders)]
        if deed == "restore" and order.state.status == "canceled":
            market.restore(order, moment)
        if order.state.status != "resting" or deed == "restore":
            continue
        before = order.state.remaining
        if deed == "fill":
            market.fill(order, moment, min(count, order.state.remaining))
        elif deed == "cancel":
            market.cancel(order, moment, by="test")
        elif deed == "decrease":
            market.decrease(order, moment, by=count)
        else:
            market.resize(order, moment, total=count)
        if deed in {"decrease", "amend"} and order.state.status != "canceled":
            resized[order.order_id] += order.state.remaining - before

    now = Moment((tick + 1) * 1_000_000, tick + 1.0)
    for order in market.orders():
        state = order.state
        assert state.initial + resized[order.order_id] == state.filled + state.remaining + state.canceled
        assert min(state.filled, state.remaining, state.canceled) >= 0
        assert (state.status == "resting") == (state.remaining > 0)
        assert state.status != "executed" or state.filled > 0
    assert market.resting() == [order for order in market.orders() if order.state.status == "resting"]
    newest_first = list(reversed(list(market.orders())))
    for wanted in (
        Filter(),
        Filter(status="resting"),
        Filter(status="canceled"),
        Filter(ticker="KX0-0-A"),
        Filter(event_tickers=("KX1-1", "KX0-2", "KX1-1"), status="resting"),
    ):
        expected = [
            order
            for order in newest_first
            if (state := market.visible(order, now)) is not None and wanted.takes(order, state)
        ]
        found, before = [], None
        while True:
            page, before = market.page(wanted, moment=now, before=before, limit=3)
            found += [order for order, _ in page]
            if before is None:
                break
        assert found == expected


def test_a_lagging_order_shows_its_states_in_turn():
    market = Market(read_lag_s=2.0)
    order = market.place(NewOrder(count=Decimal(10)), Moment(0, 0.0), lag_s=2.0)
    market.fill(order, Moment(1, 1.0), Decimal(4))
    market.cancel(order, Moment(2, 1.5), by="test")

    seen = [market.visible(order, Moment(0, at_s)) for at_s in (1.9, 2.1, 3.1, 3.6)]

    assert seen[0] is None
    assert [(state.status, state.filled) for state in seen[1:]] == [
        ("resting", 0),
        ("resting", 4),
        ("canceled", 4),
    ]
