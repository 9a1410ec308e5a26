"""The transport against real sockets: servers that are silent, slow, endless, broken or rude."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import socket
import struct
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest

from kalshi_cancel.exchange.calls import Call
from kalshi_cancel.exchange.transport import NoReply, NotSent, Transport, TransportError, UnusableEnvironment
from trials.stack import free_port

CALL = Call("DELETE", "/trade-api/v2/portfolio/events/orders/abc-1", "exchange_index=2&market_ticker=A%3AB")
SECRET = "c2lnbmF0dXJl"
SIGNED = {
    "KALSHI-ACCESS-KEY": "key-1",
    "KALSHI-ACCESS-SIGNATURE": SECRET,
    "KALSHI-ACCESS-TIMESTAMP": "1795352400000",
}
MAX_BODY = 4096
BODY = b'{"order_id":"abc-1","reduced_by":"1.00","ts_ms":1795352400000}'
GRACE_S = 4.0  # what a machine under load may add to a deadline; without one it would take 5 s


class Server:
    """A listener on loopback; `talk(connection, number)` converses, each connection in a thread.

    `heard` holds what each request was, and `closed` is set when a conversation is over.
    """

    def __init__(self, talk, context=None):
        self.heard = []
        self.connections = 0
        self.closed = threading.Event()
        self._talk = talk
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self):
        return self._listener.getsockname()[1]

    @property
    def url(self):
        return f"{'https' if self._context else 'http'}://127.0.0.1:{self.port}"

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                self._open.append(connection)
                threading.Thread(
                    target=self._converse, args=(connection, self.connections), daemon=True
                ).start()

    def _converse(self, connection, number):
        with contextlib.suppress(OSError):
            if self._context:
                connection = self._context.wrap_socket(connection, server_side=True)
                self._open.append(connection)
            self._talk(self, connection, number)
        with contextlib.suppress(OSError):
            connection.close()
        self.closed.set()

    def hear(self, connection):
        """One request's head; empty when the client hung up."""
        head = b""
        while b"\r\n\r\n" not in head:
            some = connection.recv(65536)
            if not some:
                return b""
            head += some
        self.heard.append(head)
        return head

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            # Each conversation closes its own: one closed beneath TLS is a ValueError there, not an OSError.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)


def whole(body=BODY, status="200 OK", *more):
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *more]
    return "\r\n".join([*lines, "", ""]).encode() + body


def says(*replies):
    """A server that answers each request of a connection with the next reply, the last one for ever."""

    def talk(server, connection, _number):
        for at in range(1_000_000):
            if not server.hear(connection):
                return
            connection.sendall(replies[min(at, len(replies) - 1)])

    return talk


def once(raw):
    """A server that answers one request with these bytes and hangs up."""

    def talk(server, connection, _number):
        server.hear(connection)
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)

    return talk


def drips(first, drop=b"x", every_s=0.05):
    """A server that answers at once with `first`, then byte by byte until the client hangs up."""

    def talk(server, connection, _number):
        server.hear(connection)
        connection.sendall(first)
        connection.settimeout(every_s)
        hung_up = False
        while not hung_up:
            connection.sendall(drop)
            with contextlib.suppress(TimeoutError):
                hung_up = not connection.recv(1)

    return talk


def silent(server, connection, _number):
    server.hear(connection)
    connection.recv(1)


@pytest.fixture
def serve():
    with contextlib.ExitStack() as stack:
        yield lambda talk, context=None: stack.enter_context(Server(talk, context))


@pytest.fixture
def transport():
    with contextlib.ExitStack() as stack:

        def make(url, **options):
            settings = {
                "connect_timeout_s": 1.0,
                "read_timeout_s": 5.0,
                "max_body_bytes": MAX_BODY,
                "pool_size": 4,
            }
            made = Transport(url, **{**settings, **options})
            stack.callback(made.close)
            return made

        yield make


def fails(made, kind, *, call=CALL, within_s=5.0, time_left_s=5.0):
    """The words of the error, which is of exactly this kind and in time."""
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        made.send(call, SIGNED, time_left_s=time_left_s)
    assert time.monotonic() - started < within_s + GRACE_S
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    return str(caught.value)


# -- a good exchange


def test_a_reply_arrives_whole_with_lower_case_header_names(serve, transport):
    server = serve(says(whole(BODY, "201 Created", "X-Odd: 1", "Date: Sun, 22 Nov 2026 13:00:00 GMT")))
    reply = transport(server.url).send(CALL, SIGNED, time_left_s=5)
    assert (reply.status, reply.body) == (201, BODY)
    assert reply.headers["x-odd"] == "1"
    assert reply.headers["date"].startswith("Sun")


@pytest.mark.parametrize("call", [CALL, Call("DELETE", "/a%7Eb", "c=%7E")], ids=["an order's", "escaped"])
def test_the_path_goes_out_byte_for_byte_as_it_was_signed(serve, transport, call):
    server = serve(says(whole()))
    transport(server.url).send(call, SIGNED, time_left_s=5)
    [head] = server.heard
    first, *lines = head.decode().split("\r\n")
    assert first == f"DELETE {call.path}?{call.query} HTTP/1.1"
    sent = dict(line.lower().split(": ", 1) for line in lines if line)
    assert sent["kalshi-access-signature"] == SECRET.lower()
    assert sent["accept-encoding"] == "identity"
    assert sent["user-agent"] == "kalshi-cancel"
    assert sent["host"] == f"127.0.0.1:{server.port}"


@pytest.mark.parametrize(
    "path",
    ["/a%2db", "/a b", "/a\u00e9", "/a/../b", "/a#b", "/a%zz", '/a"b', "/a\\b"],
    ids=ascii,
)
def test_a_path_that_would_be_rewritten_on_its_way_is_not_sent(serve, transport, path):
    server = serve(says(whole()))
    made = transport(server.url)
    assert "signed" in fails(made, NotSent, call=Call("GET", path))
    assert server.connections == 0


def test_a_body_goes_out_as_json_and_none_without_one(serve, transport):
    def takes_a_body(server, connection, _number):
        head = server.hear(connection)
        while not head.endswith(b'{"orders":[]}'):
            head += connection.recv(65536)
        server.heard[-1] = head
        connection.sendall(whole())
        server.hear(connection)
        connection.sendall(whole())

    server = serve(takes_a_body)
    made = transport(server.url)
    made.send(Call("DELETE", "/batched", body=b'{"orders":[]}'), SIGNED, time_left_s=5)
    made.send(CALL, SIGNED, time_left_s=5)
    first, second = (head.lower() for head in server.heard)
    assert b"content-type: application/json\r\n" in first
    assert b"content-length: 13\r\n" in first
    assert b"content-type" not in second
    assert second.endswith(b"\r\n\r\n")


def test_one_connection_serves_call_after_call(serve, transport):
    server = serve(says(whole()))
    made = transport(server.url)
    for _ in range(5):
        made.send(CALL, SIGNED, time_left_s=5)
    assert (server.connections, len(server.heard)) == (1, 5)


def test_threads_share_the_pool_and_no_more_connections_than_threads_are_opened(serve, transport):
    server = serve(says(whole()))
    made = transport(server.url)
    with ThreadPoolExecutor(4) as threads:
        replies = list(threads.map(lambda _: made.send(CALL, SIGNED, time_left_s=5), range(40)))
    assert {reply.body for reply in replies} == {BODY}
    assert server.connections <= 4


def test_an_idle_connection_that_the_server_closed_is_replaced_unnoticed(serve, transport):
    def closes_after_one(server, connection, _number):
        server.hear(connection)
        connection.sendall(whole())

    server = serve(closes_after_one)
    made = transport(server.url)
    for n in range(1, 4):
        server.closed.clear()
        assert made.send(CALL, SIGNED, time_left_s=5).body == BODY
        assert server.closed.wait(5)
        assert server.connections == n


def test_the_time_to_connect_does_not_limit_how_long_an_answer_takes(serve, transport):
    def thinks(server, connection, _number):
        server.hear(connection)
        connection.settimeout(0.6)
        with contextlib.suppress(TimeoutError):
            connection.recv(1)  # who hangs up before that is answered to nobody
        connection.sendall(whole())

    made = transport(serve(thinks).url, connect_timeout_s=0.2, read_timeout_s=5.0)
    assert made.send(CALL, SIGNED, time_left_s=5).body == BODY


def test_a_body_of_exactly_the_most_bytes_is_taken(serve, transport):
    server = serve(says(whole(b"x" * MAX_BODY)))
    assert len(transport(server.url).send(CALL, SIGNED, time_left_s=5).body) == MAX_BODY


def test_a_chunked_body_is_put_together(serve, transport):
    server = serve(
        says(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"a":\r\n3\r\n 1}\r\n0\r\n\r\n')
    )
    made = transport(server.url)
    assert made.send(CALL, SIGNED, time_left_s=5).body == b'{"a": 1}'
    assert made.send(CALL, SIGNED, time_left_s=5).body == b'{"a": 1}'
    assert server.connections == 1


def answers_late(*interim, patience_s=0.06):
    """A server of interim responses; the answer, its number, waits for a client that takes them for it."""

    def talk(server, connection, _number):
        for at in range(1_000_000):
            if not server.hear(connection):
                return
            for each in interim:
                connection.sendall(each)
            connection.settimeout(patience_s)
            with contextlib.suppress(TimeoutError):
                connection.recv(1, socket.MSG_PEEK)  # whoever takes them for the answer asks again
            connection.settimeout(None)
            connection.sendall(whole(str(at).encode()))

    return talk


HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\nLink: <x>\r\n\r\n"
INTERIM = [
    (HINTS,),
    (b"HTTP/1.1 102 Processing\r\n\r\n",),
    (b"HTTP/1.1 100 Continue\r\n\r\n", HINTS, HINTS),
    (b"HTTP/1.1 199 Whatever\r\nContent-Length: 5\r\n\r\n",),
]


@pytest.mark.parametrize("interim", INTERIM, ids=["103", "102", "several", "with a length"])
def test_interim_responses_are_not_the_answer_and_each_call_gets_its_own(serve, transport, interim):
    server = serve(answers_late(*interim))
    sender = transport(server.url)
    for at in range(3):
        reply = sender.send(CALL, SIGNED, time_left_s=5)
        assert (reply.status, reply.body) == (200, str(at).encode())
    assert server.connections == 1


def test_an_interim_response_without_an_answer_may_have_taken_effect(serve, transport):
    server = serve(answers_late(HINTS, patience_s=30))
    sender = transport(server.url)
    with pytest.raises(NoReply):
        sender.send(CALL, SIGNED, time_left_s=0.3)
    with pytest.raises(NoReply):
        sender.send(CALL, SIGNED, time_left_s=0.3)
    assert server.connections == 2, "a connection that owes an answer is not used again"


@pytest.mark.parametrize("interim", [HINTS * 200, b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"])
def test_interim_responses_without_end_and_another_protocol_are_no_answer(serve, transport, interim):
    with pytest.raises(NoReply):
        transport(serve(answers_late(interim)).url).send(CALL, SIGNED, time_left_s=5)


def test_a_204_without_a_body_is_complete(serve, transport):
    server = serve(says(b"HTTP/1.1 204 No Content\r\n\r\n"))
    made = transport(server.url)
    assert [made.send(CALL, SIGNED, time_left_s=5).status for _ in range(2)] == [204, 204]


# -- nothing was sent


def test_a_refused_connection_is_not_sent(transport):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, but nobody listens
        words = fails(transport(f"http://127.0.0.1:{nobody.getsockname()[1]}"), NotSent)
    assert "refused" in words


def test_a_name_that_does_not_resolve_is_not_sent(transport):
    fails(transport("http://exchange.invalid"), NotSent, within_s=20)


def test_without_time_left_nothing_is_sent(serve, transport):
    server = serve(says(whole()))
    made = transport(server.url)
    for time_left_s in (0.0, 0.009, -1.0, float("-inf")):
        fails(made, NotSent, time_left_s=time_left_s)
    assert server.connections == 0


def test_a_server_that_does_not_accept_in_time_is_not_sent(transport):
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with contextlib.ExitStack() as waiting:
            with contextlib.suppress(TimeoutError):  # fill the queue until a connect hangs
                for _ in range(20):
                    waiting.enter_context(socket.create_connection(full.getsockname(), timeout=0.2))
            made = transport(f"http://127.0.0.1:{full.getsockname()[1]}", connect_timeout_s=0.3)
            fails(made, NotSent, within_s=0.3)


def test_tls_to_a_server_that_speaks_none_is_not_sent(serve, transport):
    def plain(_server, connection, _number):
        connection.recv(1)
        connection.sendall(whole(b"", "400 Bad Request"))
        connection.recv(65536)

    fails(transport(serve(plain).url.replace("http:", "https:")), NotSent)


def test_tls_to_a_silent_server_is_not_sent_and_in_time(serve, transport):
    server = serve(silent)
    fails(transport(server.url.replace("http:", "https:")), NotSent, time_left_s=0.3, within_s=0.3)


def test_a_reset_in_the_tls_handshake_is_not_sent(serve, transport):
    server = serve(resets_when_it_hears_something)
    fails(transport(server.url.replace("http:", "https:")), NotSent)


# -- TLS


def test_an_untrusted_certificate_is_not_sent(serve, transport, certificate):
    server = serve(says(whole()), certificate[0])
    assert "certificate" in fails(transport(server.url), NotSent)
    assert server.heard == []


def test_a_certificate_of_another_name_is_not_sent(serve, transport, certificate):
    server = serve(says(whole()), certificate[0])
    made = transport(server.url.replace("127.0.0.1", "localhost"), ca_bundle=str(certificate[1]))
    assert "localhost" in fails(made, NotSent)
    assert server.heard == []


def test_a_trusted_certificate_is_spoken_to_over_one_kept_connection(serve, transport, certificate):
    server = serve(says(whole()), certificate[0])
    made = transport(server.url, ca_bundle=str(certificate[1]))
    assert [made.send(CALL, SIGNED, time_left_s=5).body for _ in range(3)] == [BODY] * 3
    assert server.connections == 1


def test_over_tls_a_drip_cannot_outlive_the_deadline_either(serve, transport, certificate):
    server = serve(drips(b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n"), certificate[0])
    made = transport(server.url, ca_bundle=str(certificate[1]))
    fails(made, NoReply, time_left_s=0.5, within_s=0.5)


# -- sent, and no complete reply: it may have taken effect


def resets_when_it_hears_something(_server, connection, _number):
    connection.recv(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def resets_at_once(_server, connection, _number):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def hangs_up_after_the_request(server, connection, _number):
    server.hear(connection)


def test_a_connection_that_is_reset_at_once_may_or_may_not_have_carried_something(serve, transport):
    # Whether the reset comes before or after the first byte is the scheduler's choice.
    fails(transport(serve(resets_at_once).url), TransportError)


@pytest.mark.parametrize("talk", [resets_when_it_hears_something, hangs_up_after_the_request])
def test_a_connection_that_ends_without_a_reply_may_have_taken_effect(serve, transport, talk):
    fails(transport(serve(talk).url), NoReply)


def test_a_kept_connection_that_is_reset_in_mid_call_may_have_taken_effect(serve, transport):
    def second_is_reset(server, connection, number):
        server.hear(connection)
        connection.sendall(whole())
        server.hear(connection)
        if number == 1:
            resets_at_once(server, connection, number)
        else:
            connection.sendall(whole())

    server = serve(second_is_reset)
    made = transport(server.url)
    made.send(CALL, SIGNED, time_left_s=5)
    fails(made, NoReply)
    assert len(server.heard) == 2  # asked once, not twice: asking again has another owner
    assert made.send(CALL, SIGNED, time_left_s=5).body == BODY


@pytest.mark.parametrize(
    ("options", "time_left_s"),
    [({"read_timeout_s": 0.3}, 5.0), ({"read_timeout_s": 5.0}, 0.3)],
    ids=["read timeout", "deadline"],
)
def test_silence_is_waited_out_no_longer_than_the_shorter_limit(serve, transport, options, time_left_s):
    made = transport(serve(silent).url, **options)
    fails(made, NoReply, time_left_s=time_left_s, within_s=0.3)


@pytest.mark.parametrize(
    ("first", "drop"),
    [
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x"),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"T: t\r\n"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 4000\r\n\r\n", b"x"),
    ],
    ids=[
        "status line",
        "header line",
        "headers",
        "body",
        "chunks",
        "chunk size",
        "trailers",
        "body without length",
        "continue",
        "redirect",
    ],
)
def test_a_dripping_reply_does_not_outlive_the_deadline(serve, transport, first, drop):
    server = serve(drips(first, drop, every_s=0.03))
    fails(transport(server.url), NoReply, time_left_s=0.5, within_s=0.5)


@pytest.mark.parametrize(
    "raw",
    [
        b"hello\r\n\r\n",
        b"\x00\xff\x00\xff",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 99999 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + BODY,
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"H" * 100_000,
    ],
    ids=[
        "no HTTP",
        "binary",
        "odd status",
        "huge status",
        "body cut short",
        "body cut off",
        "chunk cut short",
        "chunk of odd size",
        "header flood",
        "long header",
        "long status line",
    ],
)
def test_what_is_no_whole_http_reply_may_have_taken_effect(serve, transport, raw):
    fails(transport(serve(once(raw)).url), NoReply)


def endless(head, piece):
    def talk(server, connection, _number):
        server.hear(connection)
        connection.sendall(head)
        while True:
            connection.sendall(piece)

    return talk


@pytest.mark.parametrize(
    "talk",
    [
        says(whole(b"x" * (MAX_BODY + 1))),
        endless(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 1000),
        endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"4\r\nabcd\r\n" * 100),
        endless(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n", b"x" * 1000),
    ],
    ids=["one byte too many", "no length", "chunks", "huge length"],
)
def test_a_body_beyond_the_bound_is_given_up_at_once(serve, transport, talk):
    words = fails(transport(serve(talk).url), NoReply, within_s=0.5)
    assert str(MAX_BODY) in words


@pytest.mark.parametrize(
    "broken",
    [
        whole(b"x" * (MAX_BODY + 500)),
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nhalf",
    ],
    ids=["too large", "half a body", "half a chunk"],
)
def test_what_is_left_of_a_broken_reply_is_never_read_as_the_next_one(serve, transport, broken):
    def first_is_broken(server, connection, number):
        server.hear(connection)
        connection.sendall(broken if number == 1 else whole())
        server.hear(connection)
        connection.sendall(whole(b"a reply to somebody else"))

    server = serve(first_is_broken)
    made = transport(server.url)
    fails(made, NoReply, time_left_s=0.3, within_s=0.3)
    assert made.send(CALL, SIGNED, time_left_s=5).body == BODY
    assert server.connections == 2


def test_a_compressed_body_is_not_inflated(serve, transport):
    bomb = gzip.compress(bytes(2 << 20))
    assert len(bomb) < MAX_BODY
    server = serve(says(whole(bomb, "200 OK", "Content-Encoding: gzip")))
    assert transport(server.url).send(CALL, SIGNED, time_left_s=5).body == bomb


# -- where a call does not go


@pytest.mark.parametrize(
    "status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"]
)
def test_a_redirect_is_a_reply_and_is_not_followed(serve, transport, status):
    elsewhere = serve(says(whole()))
    server = serve(says(whole(b"", status, f"Location: {elsewhere.url}/trade-api/v2/x")))
    reply = transport(server.url).send(CALL, SIGNED, time_left_s=5)
    assert reply.status == int(status[:3])
    assert (elsewhere.connections, len(server.heard)) == (0, 1)


def test_the_body_of_a_redirect_is_bounded_and_not_inflated_either(serve, transport):
    bomb = gzip.compress(bytes(2 << 20))
    head = "Location: /elsewhere", "Content-Encoding: gzip"
    server = serve(says(whole(bomb, "302 Found", *head)))
    assert transport(server.url).send(CALL, SIGNED, time_left_s=5).body == bomb
    flood = serve(endless(b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\n\r\n", b"x" * 1000))
    assert str(MAX_BODY) in fails(transport(flood.url), NoReply, within_s=0.5)


@pytest.mark.parametrize("location", ["", "http://", "http://[", "\xff\xfe", "javascript:1", "//x:99999/"])
def test_a_redirect_to_nowhere_is_a_reply_like_any_other(serve, transport, location):
    reply = f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode("latin-1")
    assert transport(serve(says(reply)).url).send(CALL, SIGNED, time_left_s=5).status == 302


@pytest.fixture
def bare_environment(monkeypatch, tmp_path):
    for name in (
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "NO_PROXY",
        "REQUESTS_CA_BUNDLE",
        "NETRC",
        "CURL_CA_BUNDLE",
    ):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return monkeypatch


def test_a_proxy_of_the_environment_sees_nothing(serve, transport, bare_environment):
    proxy, server = serve(says(whole(b"proxy"))), serve(says(whole()))
    bare_environment.setenv("HTTP_PROXY", proxy.url)
    bare_environment.setenv("http_proxy", proxy.url)
    bare_environment.setenv("ALL_PROXY", proxy.url)
    assert transport(server.url).send(CALL, SIGNED, time_left_s=5).body == BODY
    assert proxy.connections == 0


def test_a_proxy_of_the_environment_is_used_when_it_is_trusted(serve, transport, bare_environment):
    proxy, server = serve(says(whole(b"proxy"))), serve(says(whole()))
    bare_environment.setenv("http_proxy", proxy.url)
    assert transport(server.url, trust_env=True).send(CALL, SIGNED, time_left_s=5).body == b"proxy"
    assert server.connections == 0


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "NO_PROXY"])
def test_a_configured_proxy_outranks_whatever_the_trusted_environment_says(
    serve, transport, bare_environment, name
):
    proxy, server = serve(says(whole(b"proxy"))), serve(says(whole()))
    bare_environment.setenv(name, "*" if name == "NO_PROXY" else f"http://127.0.0.1:{free_port()}")
    made = transport(server.url, proxy_url=proxy.url, trust_env=True)
    assert made.send(CALL, SIGNED, time_left_s=5).body == b"proxy"
    assert server.connections == 0


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "ALL_PROXY"])
def test_a_configured_proxy_opens_the_tunnel_whatever_the_trusted_environment_says(
    serve, transport, bare_environment, name
):
    proxy = serve(hangs_up_after_the_request)
    bare_environment.setenv(name, f"http://127.0.0.1:{free_port()}")
    made = transport("https://127.0.0.1:9", proxy_url=proxy.url, trust_env=True)
    fails(made, NotSent)
    assert proxy.connections == 1


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_certificates_of_the_environment_count_when_it_is_trusted_and_ours_outrank_them(
    serve, transport, certificate, bare_environment, tmp_path, name
):
    server = serve(says(whole()), certificate[0])
    bare_environment.setenv(name, str(certificate[1]))
    fails(transport(server.url), NotSent)
    assert transport(server.url, trust_env=True).send(CALL, SIGNED, time_left_s=5).body == BODY
    bare_environment.setenv(name, str(tmp_path / "none.pem"))
    made = transport(server.url, trust_env=True, ca_bundle=str(certificate[1]))
    assert made.send(CALL, SIGNED, time_left_s=5).body == BODY
    with pytest.raises(UnusableEnvironment, match="names no file"):
        transport(server.url, trust_env=True)


@pytest.mark.parametrize("url", [":::", "http://", "socks5://u:hush@127.0.0.1:1", "ftp://u:hush@x"])
def test_a_proxy_of_the_environment_that_cannot_work_is_refused_without_its_password(
    transport, bare_environment, url
):
    bare_environment.setenv("ALL_PROXY", url)
    with pytest.raises(UnusableEnvironment, match="ALL_PROXY") as told:
        transport("https://127.0.0.1:9", trust_env=True)
    assert "hush" not in str(told.value)
    transport("https://127.0.0.1:9")


def test_a_configured_proxy_is_used_and_gets_the_whole_url(serve, transport, bare_environment):
    proxy, server = serve(says(whole(b"proxy"))), serve(says(whole()))
    made = transport(server.url, proxy_url=proxy.url)
    assert [made.send(CALL, SIGNED, time_left_s=5).body for _ in range(2)] == [b"proxy"] * 2
    assert proxy.heard[0].startswith(f"DELETE {server.url}{CALL.target} HTTP/1.1\r\n".encode())
    assert (proxy.connections, server.connections) == (1, 0)


def test_a_proxy_that_is_away_is_not_sent(serve, transport, bare_environment):
    server = serve(says(whole()))
    fails(transport(server.url, proxy_url="http://127.0.0.1:9"), NotSent)
    assert server.connections == 0


@pytest.mark.parametrize(
    "talk", [says(whole(b"", "407 Proxy Authentication Required")), hangs_up_after_the_request, silent]
)
def test_a_tunnel_that_a_proxy_does_not_open_is_not_sent(serve, transport, bare_environment, talk):
    proxy = serve(talk)
    made = transport("https://127.0.0.1:9", proxy_url=proxy.url)
    fails(made, NotSent, time_left_s=0.5, within_s=0.5)
    assert proxy.connections == 1


def test_an_https_call_goes_through_a_proxys_tunnel(serve, transport, certificate, bare_environment):
    server = serve(says(whole()), certificate[0])

    def tunnel(proxy, connection, _number):
        proxy.hear(connection)
        with socket.create_connection(("127.0.0.1", server.port)) as behind:
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            threading.Thread(target=pump, args=(behind, connection), daemon=True).start()
            pump(connection, behind)

    proxy = serve(tunnel)
    made = transport(server.url, proxy_url=proxy.url, ca_bundle=str(certificate[1]))
    assert [made.send(CALL, SIGNED, time_left_s=5).body for _ in range(2)] == [BODY] * 2
    assert proxy.connections == 1
    assert proxy.heard[0].startswith(f"CONNECT 127.0.0.1:{server.port} HTTP/1.".encode())
    assert SECRET.encode() not in proxy.heard[0]


def pump(source, target):
    with contextlib.suppress(OSError):
        while some := source.recv(65536):
            target.sendall(some)
        target.shutdown(socket.SHUT_WR)


def test_a_netrc_file_adds_nothing_to_a_call(serve, transport, bare_environment, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password hunter2\n")
    bare_environment.setenv("NETRC", str(netrc))
    server = serve(says(whole()))
    transport(server.url).send(CALL, SIGNED, time_left_s=5)
    transport(server.url, trust_env=True).send(CALL, SIGNED, time_left_s=5)
    assert not any(b"authorization" in head.lower() for head in server.heard)


def test_cookies_are_not_kept(serve, transport):
    server = serve(says(whole(BODY, "200 OK", "Set-Cookie: a=b; Path=/")))
    made = transport(server.url)
    for _ in range(2):
        made.send(CALL, SIGNED, time_left_s=5)
    assert not any(b"cookie" in head.lower() for head in server.heard)


# -- threads


def test_a_slow_call_of_one_thread_does_not_touch_another_threads_deadline(serve, transport):
    slow, quick = serve(silent), serve(says(whole()))
    made = transport(slow.url)
    other = transport(quick.url)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(fails, made, NoReply, time_left_s=0.6, within_s=0.6)
        replies = [other.send(CALL, SIGNED, time_left_s=5) for _ in range(20)]
        waiting.result()
    assert {json.loads(reply.body)["order_id"] for reply in replies} == {"abc-1"}


def test_after_an_answered_call_a_call_that_cannot_connect_is_not_sent(serve, transport):
    server = serve(says(whole(BODY, "200 OK", "Connection: close")))
    made = transport(server.url)
    made.send(CALL, SIGNED, time_left_s=5)
    server.__exit__()
    fails(made, NotSent)


def test_standard_library_bounds_on_headers_are_still_there():
    # The flood of headers is stopped by http.client; a change there should be noticed here.
    assert http.client._MAXHEADERS == 100
    assert http.client._MAXLINE == 65_536
