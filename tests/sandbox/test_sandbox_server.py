"""Connections, the control's own manners, the record, and the command line."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from email.utils import parsedate_to_datetime

import pytest
from signed import Client, pem_of

from kalshi_cancel.sandbox.control import Control, ControlError
from kalshi_cancel.sandbox.server import SandboxServer
from trials.stack import wait_until

STATUS = "/trade-api/v2/exchange/status"


def talk(server, data):
    """Sends bytes on a fresh connection and returns all that comes back."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while piece := connection.recv(65536):
            received += piece
        return received


def test_a_connection_is_kept_alive_and_the_record_shows_it(control, client, sandbox, rsa_key):
    for _ in range(3):
        client.get("/portfolio/orders")
    Client(sandbox.url, rsa_key).get("/portfolio/orders")

    connections = [call["connection"] for call in control.calls("list")]
    assert connections[0] == connections[1] == connections[2] != connections[3]


def test_answers_carry_the_date(client):
    date = parsedate_to_datetime(client.get("/portfolio/orders").headers["Date"])
    assert abs(date.timestamp() - time.time()) < 10


def test_requests_may_be_pipelined(sandbox):
    request = f"GET {STATUS} HTTP/1.1\r\nHost: x\r\n\r\n".encode()

    assert talk(sandbox, request * 3).count(b"HTTP/1.1 200 OK") == 3


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: many\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 10\r\n\r\nshort",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 300 + b"\r\n",
    ],
)
def test_bytes_that_are_no_request_are_a_400_and_the_end_of_the_connection(sandbox, control, request_bytes):
    assert talk(sandbox, request_bytes).startswith(b"HTTP/1.1 400 ")
    assert control.orders() == []


def test_http_1_0_and_connection_close_are_honoured(sandbox):
    for request in (f"GET {STATUS} HTTP/1.0\r\n\r\n", f"GET {STATUS} HTTP/1.1\r\nConnection: close\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", sandbox.port), timeout=10) as connection:
            connection.sendall(request.encode())
            received = b""
            while piece := connection.recv(65536):
                received += piece
        assert b"Connection: close" in received


def test_a_client_that_waits_for_a_go_ahead_gets_it(sandbox):
    request = b"POST /sandbox/configure HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}"

    assert talk(sandbox, request).startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")


def test_it_can_stand_in_for_a_proxy(sandbox):
    request = f"GET http://exchange.test{STATUS}?a=b HTTP/1.1\r\n\r\n".encode()

    assert b"exchange_active" in talk(sandbox, request)


def test_it_listens_on_loopback_only():
    for host in ("0.0.0.0", "192.0.2.1"):
        with pytest.raises(ValueError, match="loopback"):
            SandboxServer(host=host)


def test_several_live_side_by_side_and_know_nothing_of_each_other(control):
    with SandboxServer() as other, Control(other.url) as its_control:
        its_control.place("a")
        assert control.orders() == []
        assert other.url != control.url


def test_a_stopped_server_leaves_nothing_running(rsa_key):
    server = SandboxServer(keys={"key-rsa": pem_of(rsa_key)}).start()
    client = Client(server.url, rsa_key)
    client.get("/portfolio/orders")
    server.stop()
    server.stop()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sandbox")]
    with pytest.raises((OSError, http.client.HTTPException)):
        client.get("/portfolio/orders")


def test_many_threads_cancel_at_once_and_each_order_is_canceled_once(sandbox, control, rsa_key):
    names = [f"o{n}" for n in range(100)]
    control.place_many([{"order_id": name} for name in names])
    statuses = []

    def worker():
        mine = Client(sandbox.url, rsa_key)
        statuses.extend(mine.cancel(name).status for name in names)

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (statuses.count(200), statuses.count(404)) == (100, 300)
    removed = [effect for call in control.calls("cancel") for effect in call["effects"]]
    assert sorted(effect["order_id"] for effect in removed) == sorted(names)
    assert {order["canceled_count_fp"] for order in control.orders()} == {"10.00"}


def test_calls_are_recorded_in_full_and_filtered(control, client):
    control.place("a")
    client.cancel("a", "exchange_index=0")
    client.batch("b", "a")

    single, batch = control.calls()
    assert single.pop("received_ms") == pytest.approx(time.time() * 1000, abs=20_000)
    assert single.pop("duration_ms") > 0
    assert len(single.pop("signature")) > 100
    assert single.pop("timestamp").isdigit()
    assert single == {
        "seq": 1,
        "connection": single["connection"],
        "method": "DELETE",
        "path": "/trade-api/v2/portfolio/events/orders/a",
        "query": "exchange_index=0",
        "operation": "cancel",
        "order_ids": ["a"],
        "key_id": "key-rsa",
        "body": "",
        "status": 200,
        "code": None,
        "bucket": "write",
        "tokens": 2,
        "effects": [{"order_id": "a", "reduced_by": "10.00"}],
        "tail": [],
        "fault": None,
        "reused": [],
    }
    assert (batch["operation"], batch["order_ids"], batch["tokens"]) == ("batch", ["b", "a"], 4)
    assert batch["body"] == '{"orders": [{"order_id": "b"}, {"order_id": "a"}]}'
    assert [call["seq"] for call in control.calls(order_id="a")] == [1, 2]
    assert [call["seq"] for call in control.calls(order_id="b")] == [2]
    assert [call["seq"] for call in control.calls(since=1)] == [2]
    assert control.calls("create") == []
    assert control.order("a")["history"][-1]["call"] == 1


def test_the_record_can_be_switched_off(control, client):
    control.configure(record=False)
    client.cancel("a")
    assert control.calls() == []


def test_a_reset_brings_back_the_first_settings_and_keeps_the_keys(rsa_key):
    with (
        SandboxServer(keys={"key-rsa": pem_of(rsa_key)}, tier="basic") as server,
        Control(server.url) as control,
    ):
        client = Client(server.url, rsa_key)
        first_id = client.create().json["order_id"]
        control.configure(tier="prime", read_lag_s=9)
        control.fault("http_500")
        control.reset()

        assert control.orders() == control.calls() == control.faults() == []
        assert client.get("/account/limits").json["usage_tier"] == "basic"
        assert client.create().json["order_id"] == first_id
        assert control.calls()[0]["seq"] == 2


def test_the_history_tells_what_became_of_an_order(control, client):
    control.place("a")
    control.fill("a", "3.00")
    control.cancel_elsewhere("a")

    history = control.order("a")["history"]
    assert [(each["event"], each["count"], each.get("by")) for each in history] == [
        ("created", "10.00", None),
        ("filled", "3.00", None),
        ("canceled", "7.00", "elsewhere"),
    ]


def test_the_control_says_what_is_wrong(control):
    control.place("a", client_order_id="mine")
    for deed, words in (
        (lambda: control.order("b"), "no order 'b'"),
        (lambda: control.place("a"), "already there"),
        (lambda: control.place("b", client_order_id="mine"), "already there"),
        (lambda: control.place("b", filled="11"), "filled"),
        (lambda: control.place("b", count="ten"), "Decimal|Invalid"),
        (lambda: control.place("b", status="open"), "open"),
        (lambda: control.place("b", side="yes"), "yes"),
        (lambda: control.place_many([{"colour": "red"}]), "colour"),
        (lambda: control.fill("a", "11"), "cannot fill"),
        (lambda: control.fill("b"), "no order"),
        (lambda: [control.cancel_elsewhere("a") for _ in range(2)], "canceled"),
        (lambda: control._ask("POST", "dance"), "no lever"),
    ):
        with pytest.raises(ControlError, match=words):
            deed()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def public_key(tmp_path, rsa_key):
    path = tmp_path / "public.txt"
    path.write_text(pem_of(rsa_key))
    return path


def run(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "kalshi_cancel.sandbox", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


@pytest.mark.parametrize(("signum", "port"), [(signal.SIGTERM, None), (signal.SIGINT, 0)])
def test_the_command_serves_sample_orders_until_it_is_told_to_stop(rsa_key, public_key, signum, port):
    options = f"--port {free_port() if port is None else port} --tier basic --sample --no-record"
    arguments = (*options.split(), "--key-id", "k", "--public-key", public_key)
    process = run(*arguments)
    try:
        url = re.fullmatch(r"sandbox exchange on (http://127\.0\.0\.1:\d+)\n", process.stdout.readline())[1]
        assert "sample-resting" in process.stdout.readline()
        client = Client(url, rsa_key, "k")
        with Control(url) as control:
            wait_until(lambda: len(control.orders()) == 7)
            assert client.cancel("sample-resting").status == 200
            assert client.get("/account/limits").json["usage_tier"] == "basic"
            assert control.calls() == []
        process.send_signal(signum)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.communicate()


def test_the_command_refuses_what_it_cannot_serve(sandbox, tmp_path, public_key):
    no_key = tmp_path / "empty"
    no_key.write_text("")
    for arguments in (
        ("--host", "0.0.0.0"),
        ("--port", sandbox.port),
        ("--key-id", "k"),
        ("--key-id", "k", "--public-key", no_key),
        ("--key-id", "k", "--public-key", tmp_path / "missing"),
        ("--tier", "gold"),
    ):
        process = run(*arguments)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 2
        assert (out, "Traceback" in err) == ("", False)
        assert err
