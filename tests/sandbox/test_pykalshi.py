"""A third party's client, unmodified, trades on the sandbox."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import serialization
from pykalshi import KalshiClient
from pykalshi.enums import Action, BookSide, OrderStatus, Side, TimeInForce
from pykalshi.exceptions import AuthenticationError, KalshiAPIError, ResourceNotFoundError
from signed import pem_of

TICKER = "KXTEST-26NOV22-A"


@pytest.fixture
def kalshi(sandbox, rsa_key, tmp_path):
    path = tmp_path / "key.txt"
    path.write_bytes(
        rsa_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
    )
    with KalshiClient("key-rsa", str(path), api_base=f"{sandbox.url}/trade-api/v2", max_retries=0) as client:
        yield client


def test_it_places_reads_lists_and_cancels(kalshi, control):
    order = kalshi.portfolio.place_order(
        TICKER, Action.BUY, Side.NO, "10.00", no_price_dollars="0.45", client_order_id="mine"
    )
    assert (order.status, order.remaining_count_fp) == (OrderStatus.RESTING, "10.00")

    read = kalshi.portfolio.get_order(order.order_id)
    # A buy of NO reads back as a sell of YES at the complementary price.
    assert (read.action, read.side, read.yes_price_dollars) == (Action.SELL, Side.YES, "0.5500")
    assert (read.book_side, read.client_order_id) == (BookSide.ASK, "mine")
    control.fill(order.order_id, "4.00")
    assert order.refresh().fill_count_fp == "4.00"

    listed = kalshi.portfolio.get_orders(status=OrderStatus.RESTING, ticker=TICKER)
    assert [each.order_id for each in listed] == [order.order_id]
    assert order.cancel().status == OrderStatus.CANCELED
    assert order.refresh().remaining_count_fp == "0.00"
    assert order.wait_until_terminal(timeout=5) is order
    with pytest.raises(ResourceNotFoundError):
        kalshi.portfolio.cancel_order(order.order_id)
    assert [fill.count_fp for fill in kalshi.portfolio.get_fills(order_id=order.order_id)] == ["4.00"]


def test_it_amends_and_decreases(kalshi, control):
    order = kalshi.portfolio.place_order(
        TICKER, book_side=BookSide.BID, price_dollars="0.45", count_fp="10.00"
    )

    order.amend(count_fp="8.00", price_dollars="0.50")
    order.decrease("3.00")

    truth = control.order(order.order_id)
    assert (truth["remaining_count_fp"], truth["yes_price_dollars"]) == ("5.00", "0.5000")
    assert order.remaining_count_fp == "5.00"


def test_it_places_and_cancels_in_batches(kalshi, control):
    item = {"ticker": TICKER, "action": "buy", "side": "yes", "count_fp": "1.00", "yes_price_dollars": "0.1"}
    placed = kalshi.portfolio.batch_place_orders([item] * 30)

    kalshi.portfolio.batch_cancel_orders([order.order_id for order in placed])

    assert {order["status"] for order in control.orders()} == {"canceled"}


def test_it_pages_through_many_orders(kalshi, control):
    control.place_many([{} for _ in range(250)])

    assert len(kalshi.portfolio.get_orders(limit=100, fetch_all=True)) == 250
    assert len(kalshi.portfolio.get_orders(limit=100)) == 100


def test_it_works_with_order_groups(kalshi, control):
    group = kalshi.portfolio.create_order_group("100.00")
    order = kalshi.portfolio.place_order(
        TICKER, book_side="bid", price_dollars="0.45", count_fp="10.00", order_group_id=group.id
    )
    assert kalshi.portfolio.get_order_group(group.id).orders == [order.order_id]

    kalshi.portfolio.update_order_group_limit(group.id, "50.00")
    kalshi.portfolio.trigger_order_group(group.id)

    assert order.refresh().status == OrderStatus.CANCELED
    assert kalshi.portfolio.get_order_groups()[0].contracts_limit_fp == "50.00"
    kalshi.portfolio.reset_order_group(group.id)
    assert kalshi.portfolio.get_order_groups()[0].is_auto_cancel_enabled


def test_it_reads_status_limits_and_the_account(kalshi, control):
    control.configure(tier="expert")
    assert kalshi.exchange.is_trading()
    control.configure(trading_paused=True)
    assert not kalshi.exchange.is_trading()
    assert kalshi.api_keys.get_limits().usage_tier == "expert"
    assert kalshi.portfolio.get_balance().balance > 0
    assert len(kalshi.portfolio.get_positions()) == 0


def test_it_understands_the_refusals(kalshi, control):
    ioc = kalshi.portfolio.place_order(
        TICKER, book_side="bid", price_dollars="0.45", count_fp="1.00", time_in_force=TimeInForce.IOC
    )
    assert ioc.status == OrderStatus.CANCELED
    kalshi.portfolio.place_order(
        TICKER, Action.BUY, Side.YES, "1.00", yes_price_dollars="0.4", client_order_id="c"
    )
    with pytest.raises(KalshiAPIError, match="order already exists"):
        kalshi.portfolio.place_order(
            TICKER, Action.BUY, Side.YES, "1.00", yes_price_dollars="0.4", client_order_id="c"
        )
    kalshi.api_key_id = "nobody"
    with pytest.raises(AuthenticationError):
        kalshi.portfolio.get_orders()


def test_it_keeps_its_promise_when_a_shard_is_not_named(kalshi, control):
    control.place("crypto", exchange_index=2)

    with pytest.raises(ResourceNotFoundError):
        kalshi.portfolio.cancel_order("crypto")
    assert control.order("crypto")["status"] == "resting"


def test_every_signature_it_sends_is_verified(kalshi, control, rsa_key):
    control.register_key("reader", pem_of(rsa_key), scope="read_only")
    kalshi.api_key_id = "reader"
    with pytest.raises(AuthenticationError) as refused:
        kalshi.portfolio.place_order(TICKER, book_side="bid", price_dollars="0.45", count_fp="1.00")
    assert refused.value.status_code == 403
