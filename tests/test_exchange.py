"""The exchange client against the sandbox: both dialects, clocks, keys, and what it says aloud."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from kalshi_cancel.exchange.calls import (
    ACCOUNT_LIMITS,
    ENDPOINT_COSTS,
    EXCHANGE_STATUS,
    LIST_ONE_ORDER,
    Dialect,
    Routing,
)
from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.exchange.clock import ANSWERS
from kalshi_cancel.exchange.protocol import Canceled, Failure, Meaning
from kalshi_cancel.exchange.signing import RequestSigner
from kalshi_cancel.exchange.transport import Transport
from kalshi_cancel.model.orders import Order, OrderStatus
from kalshi_cancel.sandbox.control import Control
from kalshi_cancel.sandbox.server import SandboxServer
from kalshi_cancel.settings.worker import WorkerSettings
from trials.stack import wait_until

RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
ED25519_KEY = ed25519.Ed25519PrivateKey.generate()
STRANGERS_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
KEYS = {"key-rsa": RSA_KEY, "key-ed25519": ED25519_KEY, "key-unknown": RSA_KEY, "key-wrong": STRANGERS_KEY}
HERE = Routing()
TIME_LEFT_S = 5.0


def public_pem_of(key):
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


def private_pem_of(key):
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@pytest.fixture
def sandbox():
    keys = {name: public_pem_of(RSA_KEY) for name in ("key-rsa", "key-wrong")}
    with SandboxServer(keys={**keys, "key-ed25519": public_pem_of(ED25519_KEY)}) as server:
        yield server


@pytest.fixture
def control(sandbox):
    with Control(sandbox.url) as remote:
        yield remote


@pytest.fixture
def connect(sandbox):
    with contextlib.ExitStack() as stack:

        def make(key_id="key-rsa", *, url=sandbox.url, **options):
            transport = Transport(
                url, connect_timeout_s=1, read_timeout_s=2, max_body_bytes=1 << 20, pool_size=8
            )
            made = Exchange(transport, RequestSigner(key_id, KEYS[key_id]), **options)
            stack.callback(made.close)
            return made

        yield make


def canceled(exchange, order_id, routing=HERE):
    answer = exchange.cancel(order_id, routing, time_left_s=TIME_LEFT_S)
    assert isinstance(answer, Canceled), answer
    return answer


def failed(exchange, order_id, routing=HERE, *, time_left_s=TIME_LEFT_S):
    answer = exchange.cancel(order_id, routing, time_left_s=time_left_s)
    assert isinstance(answer, Failure), answer
    return answer


def loud(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.CRITICAL]


# -- cancels


def test_a_v2_cancel_removes_the_rest_of_the_order(connect, control):
    control.place("o-1", count="10.00", filled="2.50")
    answer = canceled(connect(), "o-1")
    assert (answer.reduced_by, answer.order) == (Decimal("7.50"), None)
    assert abs(answer.ts_ms - time.time() * 1000) < 10_000
    truth = control.order("o-1")
    assert (truth["status"], truth["canceled_count_fp"]) == ("canceled", "7.50")
    [call] = control.calls("cancel")
    assert call["path"] == "/trade-api/v2/portfolio/events/orders/o-1"
    assert (call["query"], call["body"]) == ("", "")


def test_a_v2_cancel_is_routed_by_its_query(connect, control):
    control.place("o-1", ticker="KXBTC-26NOV22-B", exchange_index=2, subaccount=3)
    exchange = connect()
    assert failed(exchange, "o-1").meaning is Meaning.NOT_FOUND
    assert failed(exchange, "o-1", Routing(exchange_index=2)).meaning is Meaning.NOT_FOUND
    canceled(exchange, "o-1", Routing("KXBTC-26NOV22-B", 2, 3))
    assert (
        control.calls("cancel")[-1]["query"] == "subaccount=3&exchange_index=2&market_ticker=KXBTC-26NOV22-B"
    )
    assert control.calls("cancel")[-1]["bucket"] == "write:2"


@pytest.mark.parametrize(("form", "reduced_by"), [("alive_int", "8"), ("alive_fp", "7.50")])
def test_a_v1_cancel_brings_the_whole_order(connect, control, form, reduced_by):
    control.configure(v1=form)
    control.place("o-1", count="10.00", filled="2.00" if form == "alive_int" else "2.50")
    exchange = connect(dialect=Dialect.V1)
    answer = canceled(exchange, "o-1")
    assert answer.reduced_by == Decimal(reduced_by)
    assert isinstance(answer.order, Order)
    assert (answer.order.order_id, answer.order.status) == ("o-1", OrderStatus.CANCELED)
    assert answer.order.remaining_count == 0
    assert exchange.dialect is Dialect.V1
    assert control.calls("cancel")[0]["path"] == "/trade-api/v2/portfolio/orders/o-1"


def test_a_read_shows_the_order_in_either_generation_of_fields(connect, control):
    control.place("o-1", count="10.00", filled="2.00", exchange_index=1, subaccount=2)
    exchange = connect()
    shown = exchange.read_order("o-1", time_left_s=TIME_LEFT_S)
    control.configure(order_form="int")
    older = exchange.read_order("o-1", time_left_s=TIME_LEFT_S)
    for order in (shown, older):
        assert isinstance(order, Order)
        assert (order.initial_count, order.fill_count, order.remaining_count) == (10, 2, 8)
        assert order.last_update_ms is not None
    assert (shown.exchange_index, shown.subaccount) == (1, 2)


@pytest.mark.parametrize(
    ("fault", "meaning"),
    [
        ({"kind": "http_500"}, Meaning.UNANSWERED),
        ({"kind": "http_502_html"}, Meaning.UNANSWERED),
        ({"kind": "http_503"}, Meaning.UNAVAILABLE),
        ({"kind": "http_429"}, Meaning.BUSY),
        ({"kind": "drop_before"}, Meaning.UNANSWERED),
        ({"kind": "drop_after", "how": "reset"}, Meaning.UNANSWERED),
        ({"kind": "truncated"}, Meaning.UNANSWERED),
        ({"kind": "garbage"}, Meaning.UNANSWERED),
        ({"kind": "garbage", "body": ""}, Meaning.UNANSWERED),
        ({"kind": "wrong_body"}, Meaning.UNCLEAR),
        ({"kind": "redirect"}, Meaning.UNANSWERED),
        ({"kind": "headers_flood"}, Meaning.UNANSWERED),
        ({"kind": "gzip_bomb", "megabytes": 8}, Meaning.UNANSWERED),
        ({"kind": "endless", "interval_s": 0}, Meaning.UNANSWERED),
        ({"kind": "status", "status": 410, "code": "deprecated_v1_order_endpoint"}, Meaning.RETIRED),
        ({"kind": "status", "status": 409, "code": "exchange_is_paused"}, Meaning.PAUSED),
        ({"kind": "status", "status": 422, "code": "invalid", "shape": "flat"}, Meaning.REFUSED),
        ({"kind": "status", "status": 400, "code": "invalid", "shape": "msg"}, Meaning.REFUSED),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else value.name,
)
def test_whatever_goes_wrong_is_a_failure_with_a_meaning_and_is_not_asked_twice(
    connect, control, fault, meaning
):
    control.place("o-1")
    control.fault(**fault, operation="cancel", times=1)
    assert failed(connect(), "o-1").meaning is meaning
    assert len(control.calls("cancel")) == 1


@pytest.mark.parametrize("kind", ["hang", "drip"])
def test_a_call_without_an_end_ends_with_its_time(connect, control, kind):
    control.place("o-1")
    control.fault(kind, order_id="o-1")
    started = time.monotonic()
    answer = failed(connect(), "o-1", time_left_s=0.4)
    assert time.monotonic() - started < 4.0, "without that it would take 5 s"
    assert answer.meaning is Meaning.UNANSWERED
    control.clear_faults()


def test_a_call_has_a_deadline_of_its_own_however_much_time_is_left(connect, control):
    control.fault("hang")
    exchange = connect(call_deadline_s=0.3)
    started = time.monotonic()
    assert failed(exchange, "o-1", time_left_s=float("inf")).meaning is Meaning.UNANSWERED
    fetched = exchange.fetch(ACCOUNT_LIMITS)
    assert isinstance(fetched, Failure)
    assert time.monotonic() - started < 9.0, "without that two calls would take 10 s"
    control.clear_faults()


def test_what_never_left_us_is_told_apart(connect):
    nobody = connect(url="http://127.0.0.1:9")
    answer = failed(nobody, "o-1")
    assert (answer.meaning, answer.problem.code, answer.problem.http_status) == (
        Meaning.NOT_SENT,
        "not_sent",
        None,
    )
    assert failed(connect(), "o-1", time_left_s=0.0).meaning is Meaning.NOT_SENT


# -- batches


def test_a_batch_answers_for_each_of_its_orders(connect, control):
    control.place("o-1", count="4.00")
    control.place("o-2", exchange_index=2, ticker="KXBTC-26NOV22-B", count="5.00")
    control.place("o-3", status="executed", filled="10.00")
    control.fault("shuffled", times=1)
    orders = [
        ("o-1", HERE),
        ("o-2", Routing(exchange_index=2)),
        ("o-3", HERE),
        ("nobody", HERE),
    ]
    answers = connect().cancel_batch(orders, time_left_s=TIME_LEFT_S)
    assert isinstance(answers, dict)
    counts = {name: answer.reduced_by for name, answer in answers.items() if isinstance(answer, Canceled)}
    assert counts == {"o-1": Decimal(4), "o-2": Decimal(5)}
    assert {answers[name].meaning for name in ("o-3", "nobody")} == {Meaning.NOT_FOUND}
    [call] = control.calls("batch")
    assert (call["bucket"], call["tokens"]) == ("write", 8)


@pytest.mark.parametrize(
    ("fault", "meaning"),
    [
        ({"kind": "entry_missing"}, Meaning.UNANSWERED),
        ({"kind": "entry_foreign"}, Meaning.UNANSWERED),
        ({"kind": "entry_error", "code": "internal_error"}, Meaning.NOT_FOUND),
    ],
    ids=["missing", "foreign", "error"],
)
def test_an_order_whose_entry_of_a_batch_is_spoilt_is_never_called_canceled(connect, control, fault, meaning):
    control.place("o-1")
    control.place("o-2")
    control.fault(**fault, order_id="o-1", times=1)
    answers = connect().cancel_batch([("o-1", HERE), ("o-2", HERE)], time_left_s=TIME_LEFT_S)
    assert isinstance(answers, dict)
    assert isinstance(answers["o-1"], Failure)
    assert answers["o-1"].meaning is meaning
    assert isinstance(answers["o-2"], Canceled)


def test_a_v1_batch_speaks_v1_and_moves_on_when_it_is_retired(connect, control, caplog):
    control.configure(v1="alive_fp")
    control.place_many([{"order_id": f"o-{n}"} for n in range(3)])
    exchange = connect(dialect=Dialect.V1)
    answers = exchange.cancel_batch([("o-0", HERE), ("o-1", HERE)], time_left_s=TIME_LEFT_S)
    assert isinstance(answers, dict)
    assert all(isinstance(answer, Canceled) for answer in answers.values())
    control.configure(v1="retired")
    retired = exchange.cancel_batch([("o-2", HERE)], time_left_s=TIME_LEFT_S)
    assert isinstance(retired, Failure)
    assert (retired.meaning, exchange.dialect) == (Meaning.RETIRED, Dialect.V2)
    assert len(loud(caplog)) == 1


@pytest.mark.parametrize(
    ("fault", "meaning"),
    [
        ({"kind": "oversize"}, Meaning.REFUSED),
        ({"kind": "http_429"}, Meaning.BUSY),
        ({"kind": "drop_after"}, Meaning.UNANSWERED),
        ({"kind": "truncated"}, Meaning.UNANSWERED),
        ({"kind": "garbage"}, Meaning.UNANSWERED),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else value.name,
)
def test_a_batch_can_fail_as_a_whole(connect, control, fault, meaning):
    control.place("o-1")
    control.fault(**fault, operation="batch", times=1)
    answer = connect().cancel_batch([("o-1", HERE)], time_left_s=TIME_LEFT_S)
    assert isinstance(answer, Failure)
    assert answer.meaning is meaning


# -- the move from a retired V1


def test_a_retired_v1_is_left_for_v2_and_the_next_cancel_succeeds(connect, control, caplog):
    control.place("o-1")
    exchange = connect(dialect=Dialect.V1)
    assert failed(exchange, "o-1").meaning is Meaning.RETIRED
    assert exchange.dialect is Dialect.V2
    canceled(exchange, "o-1")
    assert [call["status"] for call in control.calls("cancel")] == [410, 200]
    [said] = loud(caplog)
    assert "V2" in said
    assert "KALSHI_ORDERS_API=v2" in said


def test_the_move_is_said_once_however_many_threads_run_into_it(connect, control, caplog):
    threads = 8
    exchange = connect(dialect=Dialect.V1)
    control.fault(
        "slow", seconds=0.1, operation="cancel", times=threads
    )  # all of them are in V1 when it ends
    for n in range(threads):
        control.place(f"o-{n}")
    together = threading.Barrier(threads)

    def ask(n):
        together.wait()
        return failed(exchange, f"o-{n}").meaning

    with ThreadPoolExecutor(threads) as pool:
        assert set(pool.map(ask, range(threads))) == {Meaning.RETIRED}
    assert len(loud(caplog)) == 1
    for n in range(threads):
        canceled(exchange, f"o-{n}")
    assert len(loud(caplog)) == 1


def test_a_410_in_v2_moves_nothing(connect, control, caplog):
    control.fault("status", status=410, code="deprecated_v1_order_endpoint", times=1)
    exchange = connect()
    assert failed(exchange, "o-1").meaning is Meaning.RETIRED
    assert exchange.dialect is Dialect.V2
    assert loud(caplog) == []


# -- clocks


@pytest.mark.parametrize("skew_s", [60.0, -60.0, 3600.0])
def test_a_clock_that_is_off_is_corrected_by_the_date_and_the_next_attempt_succeeds(
    connect, control, skew_s, caplog
):
    control.configure(skew_s=skew_s)
    control.place("o-1")
    exchange = connect()
    assert failed(exchange, "o-1").meaning is Meaning.CLOCK
    canceled(exchange, "o-1")
    assert abs(exchange.skew_ms - skew_s * 1000) <= 1000
    assert abs(exchange.now_ms() - (time.time() + skew_s) * 1000) <= 1000
    assert [call["code"] for call in control.calls("cancel")] == ["header_timestamp_expired", None]
    assert any("event=clock_corrected" in record.getMessage() for record in caplog.records)


def test_an_exchange_whose_clock_jumps_is_followed(connect, control):
    exchange = connect()
    for n, skew_s in enumerate((0.0, 45.0, -45.0)):
        control.configure(skew_s=skew_s)
        control.place(f"o-{n}")
        if skew_s:
            assert failed(exchange, f"o-{n}").meaning is Meaning.CLOCK
        canceled(exchange, f"o-{n}")
        assert abs(exchange.skew_ms - skew_s * 1000) <= 1000


def test_a_clock_that_is_off_within_the_window_is_warned_about_once_and_works(connect, control, caplog):
    control.configure(skew_s=4.0)
    control.place("o-1")
    exchange = connect()
    canceled(exchange, "o-1")
    for _ in range(3):
        failed(exchange, "o-1")
    warnings = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert len([each for each in warnings if "event=clock_off" in each]) == 1
    assert abs(exchange.skew_ms - 4_000) <= 1000


def test_the_measured_skew_gets_narrower_than_the_second_that_date_is_cut_to(connect, control):
    exchange = connect()
    wait_until(
        lambda: [exchange.warm_up(), exchange.skew_ms is not None and abs(exchange.skew_ms) <= 100][1],
        within_s=15,
        what="a skew known to 100 ms",
    )


def test_before_any_answer_the_skew_is_not_known(connect):
    exchange = connect()
    assert exchange.skew_ms is None
    assert abs(exchange.now_ms() - time.time() * 1000) < 1000


def test_answered_cancels_tell_how_soon_one_takes_effect_and_what_failed_does_not(connect, control):
    control.place_many([{"order_id": f"o-{at}"} for at in range(ANSWERS)])
    exchange = connect()
    for at in range(ANSWERS):
        assert exchange.effect_within_s == math.inf
        failed(exchange, "o-none")
        canceled(exchange, f"o-{at}")
    assert 0 < exchange.effect_within_s < TIME_LEFT_S


def test_an_answer_without_a_usable_date_changes_nothing(connect, control):
    exchange = connect()
    exchange.warm_up()
    known = exchange.skew_ms
    control.fault("drop_before", times=1)
    failed(exchange, "o-1")
    assert exchange.skew_ms == known


# -- signatures


@pytest.mark.parametrize("key_id", ["key-rsa", "key-ed25519"])
def test_both_kinds_of_key_sign_so_that_the_exchange_verifies(connect, control, key_id):
    control.place("o-1")
    canceled(connect(key_id), "o-1")
    assert control.calls("cancel")[0]["key_id"] == key_id


def test_every_attempt_has_a_timestamp_and_a_signature_of_its_own(connect, control):
    control.place("o-1")
    control.fault("http_503", operation="cancel", times=5)
    exchange = connect()
    for _ in range(5):
        failed(exchange, "o-1")
        exchange.read_order("o-1", time_left_s=TIME_LEFT_S)
    canceled(exchange, "o-1")
    calls = control.calls()
    assert len(calls) == 11
    assert len({call["signature"] for call in calls}) == 11
    assert [call["seq"] for call in calls if call["reused"]] == []


def test_concurrent_attempts_share_no_signature(connect, control):
    exchange = connect()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: failed(exchange, f"o-{n}"), range(80)))
    calls = control.calls("cancel")
    assert len({call["signature"] for call in calls}) == len(calls) == 80
    assert len({(call["timestamp"], call["path"]) for call in calls}) == 80


def test_one_connection_carries_call_after_call(connect, control):
    exchange = connect()
    exchange.warm_up()
    for _ in range(5):
        failed(exchange, "o-1")
    assert len({call["connection"] for call in control.calls()}) == 1


# -- refusals of the key


def test_a_read_only_key_is_refused_and_that_is_said_once_loudly(connect, control, caplog):
    control.register_key("key-rsa", public_key_pem=public_pem_of(RSA_KEY), scope="read_only")
    control.place("o-1")
    exchange = connect()
    for _ in range(3):
        answer = failed(exchange, "o-1")
        assert (answer.meaning, answer.problem.http_status) == (Meaning.REFUSED, 403)
    assert isinstance(exchange.read_order("o-1", time_left_s=TIME_LEFT_S), Order)
    [said] = loud(caplog)
    assert "403" in said
    assert "read-only" in said
    assert control.order("o-1")["status"] == "resting"


@pytest.mark.parametrize(
    ("key_id", "details"), [("key-unknown", "NOT_FOUND"), ("key-wrong", "INCORRECT_API_KEY_SIGNATURE")]
)
def test_an_unknown_key_and_a_wrong_one_are_refused_and_told_apart(connect, caplog, key_id, details):
    answer = failed(connect(key_id), "o-1")
    assert answer.meaning is Meaning.KEY_REFUSED
    assert details in answer.problem.message
    [said] = loud(caplog)
    assert details in said


def test_neither_key_nor_signature_is_ever_logged(connect, control, caplog):
    caplog.set_level(logging.DEBUG)
    control.configure(skew_s=60.0)
    exchange = connect("key-wrong")
    control.fault("drop_before", times=1)
    for _ in range(4):
        failed(exchange, "o-1")
    signatures = [call["signature"] for call in control.calls() if call["signature"]]
    assert signatures
    text = caplog.text + repr(exchange) + repr([vars(record) for record in caplog.records])
    assert not [signature for signature in signatures if signature in text]
    assert "PRIVATE KEY" not in text


def test_a_refusal_of_a_request_is_told_in_its_result_and_not_aloud(connect, control, caplog):
    control.fault("status", status=422, code="invalid", times=1)
    assert failed(connect(), "o-1").meaning is Meaning.REFUSED
    assert loud(caplog) == []


# -- facts


def test_a_warm_up_opens_a_connection_and_measures_the_clock(connect, control):
    control.place("o-1")
    exchange = connect()
    assert exchange.warm_up()["write"]["refill_rate"] > 0
    assert exchange.skew_ms is not None
    canceled(exchange, "o-1")
    assert len({call["connection"] for call in control.calls()}) == 1


def test_a_warm_up_of_an_exchange_that_is_away_is_a_failure(connect):
    answer = connect(url="http://127.0.0.1:9").warm_up()
    assert isinstance(answer, Failure)
    assert answer.meaning is Meaning.NOT_SENT


def test_the_accounts_limits_and_the_costs_are_fetched(connect, control):
    control.configure(tier="basic")
    exchange = connect()
    limits = exchange.fetch(ACCOUNT_LIMITS)
    assert (limits["usage_tier"], limits["write"]) == (
        "basic",
        {"refill_rate": 100, "bucket_capacity": 100},
    )
    costs = exchange.fetch(ENDPOINT_COSTS)
    assert costs["default_cost"] == 10
    cancel = "/trade-api/v2/portfolio/events/orders/:order_id"
    assert {"method": "DELETE", "path": cancel, "cost": 2} in costs["endpoint_costs"]
    assert exchange.fetch(EXCHANGE_STATUS)["trading_active"] is True


def test_a_query_is_sent_but_not_signed(connect, control):
    control.place("o-1")
    control.place("o-2")
    assert len(connect().fetch(LIST_ONE_ORDER)["orders"]) == 1
    [call] = control.calls("list")
    assert (call["path"], call["query"], call["status"]) == (
        "/trade-api/v2/portfolio/orders",
        "limit=1",
        200,
    )


# -- from settings


def test_the_exchange_of_the_environment_speaks_as_it_says(sandbox, control):
    control.configure(v1="alive_fp")
    control.place("o-1")
    settings = WorkerSettings.from_env(
        {
            "REDIS_URL": "redis://127.0.0.1/0",
            "KALSHI_BASE_URL": sandbox.url,
            "KALSHI_API_KEY_ID": "key-ed25519",
            "KALSHI_PRIVATE_KEY": private_pem_of(ED25519_KEY).decode(),
            "KALSHI_ORDERS_API": "v1",
        }
    )
    exchange = Exchange.from_settings(settings)
    assert exchange.dialect is Dialect.V1
    assert canceled(exchange, "o-1").order is not None
    exchange.close()
