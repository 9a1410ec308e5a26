"""Every kind of fault, as a client meets it, and what it did to the order."""

from __future__ import annotations

import http.client
import threading
import time
import zlib

import pytest
import requests
from signed import Client

from sandbox import faults as sandbox_faults
from sandbox.control import Control, ControlError
from sandbox.faults import KINDS, STRANGER, Fault, Faults
from sandbox.server import SandboxServer
from sandbox.stack import wait_until

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
    for shape in ("nested", "service", "flat", "msg", "string", "html", "empty"):
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
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(control, fields, words):
    with pytest.raises(ControlError, match=words):
        control.fault(**fields)


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
