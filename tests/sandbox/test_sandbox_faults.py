"""Every kind of fault, as a client meets it, and what it did to the order."""

from __future__ import annotations

import http
import http.client
import socket
import threading
import time
import zlib
from email.utils import parsedate_to_datetime

import pytest
import requests
from signed import LIMIT_S, Client

from kalshi_cancel.sandbox import faults as sandbox_faults
from kalshi_cancel.sandbox.armed import Faults
from kalshi_cancel.sandbox.control import Control, ControlError
from kalshi_cancel.sandbox.faults import KINDS, OPERATIONS, STRANGER, Fault
from kalshi_cancel.sandbox.routes import ROUTES
from kalshi_cancel.sandbox.server import SandboxServer
from trials.stack import wait_until

LOST = (http.client.HTTPException, OSError)


def status_of(control, order_id="a"):
    return control.order(order_id)["status"]


@pytest.fixture(autouse=True)
def _an_order(control):
    control.place("a")


@pytest.mark.parametrize("effect", ["none", "before"])
@pytest.mark.parametrize(
    ("kind", "status", "text"),
    [
        ("http_500", 500, b"internal_server_error"),
        ("http_502_html", 502, b"<html>"),
        ("http_503", 503, b"service_unavailable"),
        ("status", 500, b"internal_server_error"),
        ("redirect", 302, b""),
    ],
)
def test_an_error_answer_comes_before_or_after_the_effect(  # a table of cases
    control, client, kind, status, text, effect
):
    control.fault(kind, effect=effect)

    answer = client.cancel("a")

    assert answer.status == status
    assert text in answer.body
    assert status_of(control) == ("resting" if effect == "none" else "canceled")
    call = control.calls("cancel")[0]
    assert (call["fault"], call["status"], len(call["effects"])) == (kind, status, effect == "before")


def test_a_status_fault_says_anything_in_any_shape(control, client):
    bodies = {}
    for shape in ("nested", "service", "flat", "msg", "string", "html", "message", "empty"):
        control.fault("status", times=1, status=409, code="exchange_is_paused", shape=shape)
        answer = client.cancel("a")
        assert answer.status == 409
        bodies[shape] = answer.json if answer.json is not None else answer.body
    message = "exchange is paused"
    assert bodies.pop("html").startswith(b"<html>")
    assert bodies == {
        "nested": {"error": {"code": "exchange_is_paused", "message": message}},
        "service": {"error": {"code": "exchange_is_paused", "message": message, "service": "exchange"}},
        "flat": {"code": "exchange_is_paused", "message": message, "details": ""},
        "msg": {"msg": message},
        "string": {"error": message},
        "message": {"message": message},
        "empty": b"",
    }
    assert [call["code"] for call in control.calls("cancel")][:2] == ["exchange_is_paused"] * 2


@pytest.mark.parametrize("body", ["text", b"\x00\xff\xfe", {"an": "object"}, [1]])
def test_a_status_fault_sends_any_body_and_headers(control, client, body):
    control.fault("status", status=299, body=body, headers={"X-Odd": "yes"}, content_type="x/y")

    answer = client.cancel("a")

    assert (answer.status, answer.headers["X-Odd"], answer.headers["Content-Type"]) == (299, "yes", "x/y")
    expected = (
        {"text": b"text", b"\x00\xff\xfe": b"\x00\xff\xfe"}.get(body)
        if not isinstance(body, dict | list)
        else None
    )
    assert answer.body == expected if expected else answer.json == body


def test_every_error_can_be_put_in_one_shape(control, client):
    control.configure(error_shape="msg")
    assert client.cancel("unknown").json == {"msg": "not found"}
    control.fault("http_500", times=1)
    assert client.cancel("a").json == {"msg": "internal server error"}
    control.configure(error_shape="empty", buckets={"write": [0, 0]})
    assert (client.cancel("a").status, client.cancel("a").body) == (429, b"")


def test_a_429_may_ask_for_patience(control, client):
    control.fault("http_429", retry_after="2", times=1)

    answer = client.cancel("a")

    assert (answer.status, answer.body) == (429, b'{"error":"too many requests"}')
    assert answer.headers["Retry-After"] == "2"
    assert client.cancel("a").status == 200


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize(
    ("kind", "status", "filled"),
    [
        ("drop_before", "resting", "0.00"),
        ("drop_after", "canceled", "0.00"),
        ("drop_after_fill", "executed", "10.00"),
    ],
)
def test_a_dropped_call_took_effect_or_not_as_told(  # a table of cases
    control, client, kind, status, filled, how
):
    control.fault(kind, how=how, times=1)

    with pytest.raises(LOST):
        client.cancel("a")

    order = control.order("a")
    assert (order["status"], order["fill_count_fp"]) == (status, filled)
    assert control.calls("cancel")[0]["status"] is None
    assert client.cancel("a").status == (200 if status == "resting" else 404)


@pytest.mark.parametrize(("effect", "status"), [("none", "resting"), ("before", "canceled")])
def test_a_hanging_call_is_never_answered_and_ends_when_it_is_let_go(control, client, effect, status):
    control.fault("hang", effect=effect, times=1)
    outcome = []

    def cancel():
        try:
            outcome.append(client.cancel("a"))
        except LOST as error:
            outcome.append(error)

    thread = threading.Thread(target=cancel)
    thread.start()
    wait_until(lambda: any(call["fault"] == "hang" for call in control.calls("cancel")))
    assert thread.is_alive()
    assert status_of(control) == status
    control.clear_faults()
    thread.join(10)
    assert isinstance(outcome[0], LOST)


def test_a_server_with_hanging_calls_stops_promptly(rsa_key):
    server = SandboxServer().start()
    with Control(server.url) as control:
        control.fault("hang")
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.request("GET", "/trade-api/v2/exchange/status")
        wait_until(lambda: control.calls("status"))
        started = time.monotonic()
        server.stop()
        assert time.monotonic() - started < 3
        with pytest.raises(LOST):
            connection.getresponse()


@pytest.mark.parametrize("effect", ["before", "after"])
def test_a_slow_call_takes_effect_before_or_after_the_wait(control, client, effect):
    control.fault("slow", seconds=1, effect=effect)
    started = time.monotonic()

    assert client.cancel("a").status == 200

    assert time.monotonic() - started >= 1
    waited_ms = control.order("a")["history"][-1]["at_ms"] - control.calls("cancel")[0]["received_ms"]
    assert (waited_ms >= 900) == (effect == "after")


def test_latency_is_added_to_every_call(control, client):
    control.configure(latency_s=0.1)
    started = time.monotonic()
    client.cancel("a")
    assert time.monotonic() - started >= 0.1


def test_a_dripping_answer_is_complete_but_late(control, client):
    control.fault("drip", interval_s=0.0005)

    assert client.cancel("a").json["order_id"] == "a"


def test_a_dripping_answer_outlives_any_read_timeout_but_not_the_client(control, client):
    control.fault("drip", interval_s=0.005, times=1)
    started = time.monotonic()
    client.connection.timeout = 0.2
    client.connection.request(
        "DELETE",
        "/trade-api/v2/portfolio/events/orders/a",
        headers=client.headers("DELETE", "/trade-api/v2/portfolio/events/orders/a"),
    )
    client.connection.getresponse().read(1)
    assert time.monotonic() - started > 0.2


def test_a_truncated_answer_ends_before_its_length(control, client):
    control.fault("truncated", times=1)

    with pytest.raises(http.client.IncompleteRead) as error:
        client.cancel("a")

    assert error.value.partial.startswith(b'{"order_id":"a"')
    assert status_of(control) == "canceled"


@pytest.mark.parametrize("v1", [False, True])
def test_a_wrong_body_describes_another_order_though_ours_was_canceled(control, client, v1):
    control.configure(v1="alive_fp")
    control.fault("wrong_body", operation="cancel")

    answer = client.ask("DELETE", "/portfolio/orders/a") if v1 else client.cancel("a")

    body = answer.json["order"] if v1 else answer.json
    assert (answer.status, body["order_id"], status_of(control)) == (200, STRANGER, "canceled")
    assert client.cancel("a").json["error"]["code"] == "not_found"


@pytest.mark.parametrize("body", [b"\x80garbage", b"", "[]", "null", '{"order_id": 7}', "9" * 5000])
def test_garbage_is_sent_as_given(control, client, body):
    control.fault("garbage", body=body, effect="none")

    answer = client.cancel("a")

    assert answer.status == 200
    if body:
        assert answer.body == (body if isinstance(body, bytes) else body.encode())
    assert status_of(control) == "resting"


def test_a_redirect_leads_where_it_is_told(control, client):
    control.fault("redirect", status=307, location="http://127.0.0.1:9/x")

    answer = client.cancel("a")

    assert (answer.status, answer.headers["Location"]) == (307, "http://127.0.0.1:9/x")


def test_a_flood_of_headers_breaks_ordinary_clients(control, client):
    control.fault("headers_flood", times=1)

    with pytest.raises(http.client.HTTPException, match="headers"):
        client.cancel("a")


def test_a_gzip_bomb_is_small_on_the_wire_and_large_unpacked(control, client):
    control.fault("gzip_bomb", megabytes=8)

    answer = client.cancel("a")

    assert answer.headers["Content-Encoding"] == "gzip"
    assert len(answer.body) < 100_000
    assert len(zlib.decompress(answer.body, wbits=31)) == 8 << 20


def test_an_endless_answer_flows_until_the_client_hangs_up(sandbox, control):
    control.fault("endless", operation="status", interval_s=0.0)

    with requests.get(f"{sandbox.url}/trade-api/v2/exchange/status", stream=True, timeout=20) as answer:
        chunks = answer.iter_content(1 << 16)
        received = 0
        while received < 4 << 20:
            received += len(next(chunks))
    wait_until(lambda: len(sandbox._open) == 1)  # the control's own connection


def test_one_call_can_see_the_clock_skewed(control, client):
    control.fault("skew", seconds=60, times=1, order_id="a")

    assert client.cancel("b").json["error"]["code"] == "not_found"
    assert client.cancel("a").json["error"]["code"] == "header_timestamp_expired"
    assert client.cancel("a").status == 200


def test_stale_reads_show_the_order_before_its_last_change(control, client):
    control.fault("stale_read", order_id="a", times=2)
    before = client.get("/portfolio/orders/a").json["order"]
    client.cancel("a")

    assert client.get("/portfolio/orders/a").json["order"] == before
    assert client.get("/portfolio/orders/a").json["order"]["status"] == "canceled"


def test_stale_reads_concern_lists_too(control, client):
    client.cancel("a")
    control.fault("stale_read", seconds=60)

    assert client.get("/portfolio/orders/a").json["order"]["status"] == "resting"
    assert len(client.get("/portfolio/orders", "status=resting").json["orders"]) == 1


def test_stale_reads_can_end_some_seconds_after_the_change(control, client):
    client.cancel("a")
    control.fault("stale_read", seconds=0.05)

    wait_until(lambda: client.get("/portfolio/orders/a").json["order"]["status"] == "canceled")
    assert client.get("/portfolio/orders", "status=resting").json["orders"] == []


def test_a_read_can_miss_an_order_that_is_there(control, client):
    control.place("b")
    control.fault("not_found", order_id="a", operation="read", times=1)
    control.fault("not_found", order_id="b", operation="list")

    assert client.get("/portfolio/orders/a").status == 404
    assert client.get("/portfolio/orders/a").status == 200
    assert [o["order_id"] for o in client.get("/portfolio/orders").json["orders"]] == ["a"]


def entries(answer):
    return [(each["order_id"], each.get("error", {}).get("code")) for each in answer.json["orders"]]


def test_entries_of_a_batch_fail_vanish_change_their_names_and_places(control, client):
    control.place_many([{"order_id": name} for name in "bcdef"])
    control.fault("entry_error", order_id="a", code="internal_error", times=1)
    control.fault("entry_error", order_id="b", code="timeout", effect="before", times=1)
    control.fault("entry_missing", order_id="c", times=1)
    control.fault("entry_missing", order_id="d", effect="none", times=1)
    control.fault("entry_foreign", order_id="e", times=1)

    answer = client.batch(*"abcdef")

    assert answer.status == 200
    assert entries(answer) == [("a", "internal_error"), ("b", "timeout"), (STRANGER, None), ("f", None)]
    truth = {order["order_id"]: order["status"] for order in control.orders()}
    assert truth == {
        "a": "resting",
        "b": "canceled",
        "c": "canceled",
        "d": "resting",
        "e": "canceled",
        "f": "canceled",
    }
    effects = [effect["order_id"] for effect in control.calls("batch")[0]["effects"]]
    assert effects == ["b", "c", "e", "f"]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({}, {"code": "internal_error", "message": "internal error"}),
        (
            {"code": "ORDER_ALREADY_CANCELED", "message": "no"},
            {"code": "ORDER_ALREADY_CANCELED", "message": "no"},
        ),
        ({"body": "too many requests"}, "too many requests"),
        ({"body": {}}, {}),
        ({"body": {"code": "Not_Found"}}, {"code": "Not_Found"}),
    ],
)
@pytest.mark.parametrize("effect", ["none", "before"])
def test_the_error_of_an_entry_can_be_anything(control, client, fields, error, effect):
    control.fault("entry_error", effect=effect, **fields)

    [entry] = client.batch("a").json["orders"]

    assert entry == {"order_id": "a", "reduced_by": "0.00", "ts_ms": None, "error": error}
    assert status_of(control) == ("resting" if effect == "none" else "canceled")


@pytest.mark.parametrize("operation", ["read", "list", "cancel", "batch"])
def test_an_order_can_be_shown_with_odd_fields(control, client, operation):
    control.place("b")
    control.fault(
        "odd_fields",
        operation=operation,
        order_id="a",
        fields={"status": "expired", "yes_price_dollars": "NaN"},
        without=["client_order_id"],
    )

    asks = {
        "read": lambda order_id: client.get(f"/portfolio/orders/{order_id}").json["order"],
        "list": lambda order_id: {
            each["order_id"]: each
            for each in client.get("/portfolio/orders", "status=resting").json["orders"]
        }[order_id],
        "cancel": lambda order_id: client.cancel(order_id).json,
        "batch": lambda order_id: client.batch(order_id).json["orders"][0],
    }
    odd, plain = (asks[operation](order_id) for order_id in "ab")

    assert (odd["order_id"], odd["status"], odd["yes_price_dollars"]) == ("a", "expired", "NaN")
    assert "client_order_id" not in odd
    assert "client_order_id" in plain
    assert plain.get("status") in {None, "resting"}


def test_a_status_can_be_said_in_other_words(control, client):
    control.place("b")
    control.fault("odd_fields", words={"canceled": "Cancelled"})
    client.cancel("a")

    said = {each["order_id"]: each["status"] for each in client.get("/portfolio/orders").json["orders"]}
    assert said == {"a": "Cancelled", "b": "resting"}


def test_a_page_can_lack_its_orders_or_say_null(control, client):
    control.fault("odd_page", fields={"orders": None}, times=1)
    control.fault("odd_page", without=["orders"], fields={"cursor": None}, times=1)

    pages = [client.get("/portfolio/orders").json for _ in range(3)]

    assert pages[:2] == [{"orders": None, "cursor": ""}, {"cursor": None}]
    assert [order["order_id"] for order in pages[2]["orders"]] == ["a"]


def test_a_listing_can_have_no_end(control, client):
    control.fault("endless_cursor")
    cursors, orders, cursor = set(), [], ""
    for _ in range(20):
        page = client.get("/portfolio/orders", f"cursor={cursor}").json
        cursor = page["cursor"]
        cursors.add(cursor)
        orders += page["orders"]

    assert (len(cursors), [order["order_id"] for order in orders]) == (20, ["a"])
    control.clear_faults()
    assert client.get("/portfolio/orders", f"cursor={cursor}").json == {"orders": [], "cursor": ""}


def test_a_listing_can_fail_for_a_while(control, client):
    control.fault("http_503", operation="list", for_s=0.3)
    assert client.get("/portfolio/orders").status == 503

    wait_until(lambda: client.get("/portfolio/orders").status == 200)

    assert control.faults() == []


def test_every_cancel_can_fail_though_the_first_took_effect_while_reads_work(control, client):
    control.fault("http_500", operation=["cancel", "batch"], times=1, effect="before")
    control.fault("http_500", operation=["cancel", "batch"])

    assert [client.batch("a").status, client.cancel("a").status, client.batch("a").status] == [500] * 3
    assert client.get("/portfolio/orders/a").json["order"]["status"] == "canceled"


@pytest.mark.parametrize("effect", ["none", "before"])
@pytest.mark.parametrize("status", [200, 403, 404, 429, 502, 503])
def test_the_cdn_says_what_is_not_the_exchanges_word(control, client, status, effect):
    shown = []
    for fields in ({}, {"shape": "message"}, {"shape": "empty"}, {"body": "<h1>", "content_type": "x/y"}):
        control.fault("cdn", status=status, effect=effect, times=1, **fields)
        answer = client.cancel("a")
        assert (answer.status, answer.headers["Server"]) == (status, "CloudFront")
        shown.append((answer.headers.get("Content-Type"), answer.body))

    phrase = http.HTTPStatus(status).phrase
    assert [kind for kind, _ in shown] == ["text/html", "application/json", None, "x/y"]
    assert f"<title>{status} {phrase}</title>".encode() in shown[0][1]
    assert shown[1][1] == f'{{"message":"{phrase}"}}'.encode()
    assert [body for _, body in shown[2:]] == [b"", b"<h1>"]
    assert status_of(control) == ("resting" if effect == "none" else "canceled")


def raw_answer(sandbox, client, *, until):
    """All bytes that a cancel of `a` is answered with, up to the end of its body."""
    path = "/trade-api/v2/portfolio/events/orders/a"
    headers = "".join(f"{name}: {value}\r\n" for name, value in client.headers("DELETE", path).items())
    with socket.create_connection(("127.0.0.1", sandbox.port), timeout=20) as connection:
        connection.sendall(f"DELETE {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())
        received = b""
        while until not in received and (more := connection.recv(65536)):
            received += more
    return received


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [103, 200]),
        ({"status": 102}, [102, 200]),
        ({"status": 100, "count": 3}, [100, 100, 100, 200]),
        ({"seconds": 0.2, "count": 2}, [103, 103, 200]),
    ],
)
def test_interim_responses_come_before_the_answer(sandbox, control, client, fields, expected):
    control.fault("interim", **fields)
    started = time.monotonic()

    received = raw_answer(sandbox, client, until=b"reduced_by")

    statuses = [int(line.split()[1]) for line in received.split(b"\r\n") if line.startswith(b"HTTP/1.1")]
    assert statuses == expected
    assert time.monotonic() - started >= fields.get("seconds", 0) * fields.get("count", 1)
    assert control.calls("cancel")[0]["fault"] == "interim"


def test_an_interim_response_may_be_all_there_is(sandbox, control, client):
    control.fault("interim")
    control.fault("drop_after")

    received = raw_answer(sandbox, client, until=b"nothing")

    assert received.startswith(b"HTTP/1.1 103 Early Hints\r\n")
    assert received.count(b"HTTP/1.1") == 1
    assert (status_of(control), control.calls("cancel")[0]["fault"]) == ("canceled", "drop_after+interim")


def test_an_interim_response_is_followed_by_the_next_answers_in_turn(control, client):
    control.fault("interim", operation="status", status=100, seconds=0.05)

    assert client.get("/exchange/status").json["exchange_active"]
    assert client.cancel("a").json["order_id"] == "a"


def test_a_cached_answer_carries_its_age_and_an_old_date(control, client):
    control.fault("cached", seconds=40, operation="status")

    old, fresh = client.get("/exchange/status").headers, client.get("/portfolio/orders").headers

    assert old["Age"] == "40"
    assert "Age" not in fresh
    apart = parsedate_to_datetime(fresh["Date"]) - parsedate_to_datetime(old["Date"])
    assert 40 <= apart.total_seconds() < 40 + LIMIT_S


@pytest.mark.parametrize("kind", ["http_429", "http_503"])
def test_patience_can_be_asked_for_as_a_date_on_the_fronts_clock(control, client, kind):
    control.configure(front_skew_s=3600, engine_skew_s=-3600, timestamp_window_s=7200)
    control.fault(kind, retry_date_s=4)

    headers = client.cancel("a").headers

    apart = parsedate_to_datetime(headers["Retry-After"]) - parsedate_to_datetime(headers["Date"])
    assert 3 <= apart.total_seconds() <= 4


def test_a_shuffled_batch_answers_in_another_order(control, client):
    control.fault("shuffled", order_id="7")
    names = [str(n) for n in range(20)]

    answer = client.batch(*names)

    answered = [each["order_id"] for each in answer.json["orders"]]
    assert sorted(answered) == sorted(names)
    assert answered != names


def test_a_batch_can_be_refused_as_oversize_once(control, client):
    control.fault("oversize", times=1)

    assert client.batch("a").status == 400
    assert client.batch("a").status == 200


def test_faults_choose_their_calls_by_order_operation_and_number(control, client):
    control.place("b")
    control.fault("http_500", order_id="a", operation="cancel", skip=1, times=1, effect="none")

    assert client.cancel("b").status == 200
    assert client.get("/portfolio/orders/a").status == 200
    client.cancel("a", "exchange_index=3")
    assert client.cancel("a").status == 500
    assert client.cancel("a").status == 200
    assert control.faults() == []


def test_a_fault_of_the_order_itself_goes_first_and_the_armed_are_listed(control, client):
    control.fault("http_503")
    control.fault("http_500", order_id="a", times=2)

    assert client.cancel("a").status == 500
    assert [(each["kind"], each["seen"], each["struck"]) for each in control.faults()] == [
        ("http_503", 0, 0),
        ("http_500", 1, 1),
    ]
    assert client.cancel("a").status == 500
    assert client.cancel("a").status == 503
    control.clear_faults()
    assert client.cancel("a").status == 200


def draws(faults, order_id, times=40):
    return [faults.call_fault("cancel", [order_id]) is not None for _ in range(times)]


def test_probability_is_drawn_per_order_whatever_other_orders_do():
    alone, among = Faults(seed=7), Faults(seed=7)
    for faults in (alone, among):
        faults.arm(Fault("http_500", probability=0.5))
    interleaved = []
    for n in range(40):
        among.call_fault("cancel", [f"other-{n % 3}"])
        interleaved.append(among.call_fault("cancel", ["a"]) is not None)

    assert draws(alone, "a") == interleaved
    assert 5 < sum(interleaved) < 35
    other_seed = Faults(seed=8)
    other_seed.arm(Fault("http_500", probability=0.5))
    assert draws(other_seed, "a") != interleaved


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "gremlin"}, "gremlin"),
        ({"kind": "drop_before", "effect": "before"}, "effect"),
        ({"kind": "http_500", "shape": "round"}, "shape"),
        ({"kind": "entry_missing", "operation": "cancel"}, "batch"),
        ({"kind": "slow"}, "seconds"),
        ({"kind": "http_500", "colour": "red"}, "colour"),
        ({"kind": "http_500", "operation": "cancle"}, "cancle"),
        ({"kind": "interim", "status": 200}, "199"),
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(control, fields, words):
    with pytest.raises(ControlError, match=words):
        control.fault(**fields)


def test_faults_can_name_every_operation_there_is():
    assert {route.operation for route in ROUTES} == OPERATIONS


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"endless"}))
def test_every_kind_of_fault_is_in_the_table_and_leaves_the_server_working(sandbox, control, rsa_key, kind):
    assert f"\n{kind} " in sandbox_faults.__doc__
    control.fault(kind, times=1, seconds=0.0, interval_s=0.0001, megabytes=1)
    impatient = Client(sandbox.url, rsa_key)
    impatient.connection.timeout = 0.3
    for ask in (impatient.batch, impatient.cancel):
        try:
            ask("a")
        except LOST:
            break
    control.clear_faults()
    assert Client(sandbox.url, rsa_key).get("/portfolio/orders/a").status == 200
