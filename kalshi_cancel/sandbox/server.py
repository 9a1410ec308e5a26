"""The sockets of the sandbox: keep-alive connections on loopback, a thread each; replies that go wrong."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import select
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from kalshi_cancel.sandbox.auth import read_key
from kalshi_cancel.sandbox.exchange import Exchange
from kalshi_cancel.sandbox.floor import Floor
from kalshi_cancel.sandbox.settings import Settings
from kalshi_cancel.sandbox.wire import (
    BadRequestError,
    Head,
    Reply,
    Request,
    encode_head,
    encode_interim,
    parse_head,
)

if TYPE_CHECKING:
    from io import BufferedIOBase
    from types import TracebackType

MAX_BODY = 64 << 20
MAX_HEADERS = 200
MAX_LINE = 64 << 10
CHUNK = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
POLL_S = 0.05
_RESET = struct.pack("ii", 1, 0)  # linger for no time at all: close() sends RST


class SandboxServer:
    """One exchange on one loopback port, served by threads of this process.

    `keys`: public PEM by key id. `settings` are the initial ones, to which reset() returns.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        keys: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:
        if not ipaddress.ip_address(host).is_loopback:
            raise ValueError(f"the sandbox listens on loopback only, not on {host}")
        self.floor = Floor(Settings().changed(settings))
        self.floor.keys = {key_id: read_key(key_id, pem) for key_id, pem in (keys or {}).items()}
        self._exchange = Exchange(self.floor)
        self._address = (host, port)
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._open: dict[socket.socket, threading.Thread] = {}

    @property
    def port(self) -> int:
        """The port it listens on."""
        assert self._listener is not None, "not started"
        return int(self._listener.getsockname()[1])

    @property
    def url(self) -> str:
        """Scheme, host and port."""
        host = self._address[0]
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def start(self) -> Self:
        """Listens; from its return on, requests are answered. Started already, it goes on."""
        if self._listener is not None:
            return self
        family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        self._listener = socket.create_server(self._address, family=family, backlog=1024)
        self._acceptor = threading.Thread(target=self._accept, name="sandbox-accept", daemon=True)
        self._acceptor.start()
        return self

    def stop(self) -> None:
        """Closes the port and every connection, also those that hang, and waits for their threads."""
        if self._listener is None or self._acceptor is None or self.floor.ended.is_set():
            return
        self.floor.end()
        with contextlib.suppress(OSError), socket.create_connection(self._listener.getsockname()[:2]):
            pass  # wakes accept()
        self._acceptor.join()
        self._listener.close()
        with self._lock:
            connections = dict(self._open)
        for connection, thread in connections.items():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=5)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _accept(self) -> None:
        assert self._listener is not None
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # out of descriptors, or the client is gone already
                self.floor.wait(POLL_S)
                continue
            if self.floor.ended.is_set():
                connection.close()
                return
            number = next(self._numbers)
            thread = threading.Thread(
                target=self._converse, args=(connection, number), name=f"sandbox-{number}", daemon=True
            )
            with self._lock:
                self._open[connection] = thread
            thread.start()

    def _converse(self, connection: socket.socket, number: int) -> None:
        """Serves one connection until either side ends it."""
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection.makefile("rb") as stream:
                while not self.floor.ended.is_set() and self._serve_one(connection, stream, number):
                    pass
        except OSError:
            pass  # the client went away
        finally:
            with self._lock:
                self._open.pop(connection, None)
            connection.close()

    def _serve_one(self, connection: socket.socket, stream: BufferedIOBase, number: int) -> bool:
        """Reads one request and answers it; whether the connection lives on."""
        try:
            lines = _read_lines(stream)
            if not lines:
                return False
            head = parse_head(lines)
            body = _read_body(connection, stream, head)
        except BadRequestError as error:
            reply = Reply(400, str(error).encode(), content_type="text/plain")
            connection.sendall(encode_head(reply, now_s=time.time(), close=True) + reply.body)
            return False
        request = Request(head.method, head.path, head.query, head.headers, body, number)
        return self._send(connection, self._exchange.answer(request), head)

    def _send(self, connection: socket.socket, reply: Reply, head: Head) -> bool:
        """Puts a reply on the wire in its manner; whether the connection lives on."""
        lives = head.keeps_alive and reply.manner in {"whole", "drip"}
        first = encode_head(reply, now_s=time.time() + reply.offset_s, close=not head.keeps_alive)
        body = b"" if head.method == "HEAD" else reply.body
        for status in reply.interim:
            connection.sendall(encode_interim(status))
            if self._gone(connection, reply.interim_s):
                return False
        if reply.manner == "whole":
            connection.sendall(first + body)
        elif reply.manner == "truncated":
            connection.sendall(first + body[: len(body) // 2])
        elif reply.manner == "drip":
            for byte in first + body:
                connection.sendall(bytes([byte]))
                if self._gone(connection, reply.interval_s):
                    return False
        elif reply.manner == "endless":
            connection.sendall(first)
            while not self._gone(connection, reply.interval_s):
                connection.sendall(CHUNK)
        elif reply.manner == "hang":
            assert reply.released is not None
            while not reply.released.is_set() and not self._gone(connection, POLL_S):
                pass
        elif reply.manner == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        return lives

    def _gone(self, connection: socket.socket, seconds: float) -> bool:
        """Waits `seconds` at most; True as soon as the client hung up or the server stops."""
        watch = select.poll()  # select() knows no descriptor beyond 1,023
        watch.register(connection, select.POLLIN)
        if watch.poll(seconds * 1000):
            if connection.recv(1, socket.MSG_PEEK) == b"":
                return True
            self.floor.wait(seconds)  # the next request is here already; that does not end the delay
        return self.floor.ended.is_set()


def _read_lines(stream: BufferedIOBase) -> list[bytes]:
    lines: list[bytes] = []
    while len(lines) <= MAX_HEADERS:
        line = stream.readline(MAX_LINE)
        if not line.endswith(b"\n"):
            if line or lines:
                raise BadRequestError("head cut short")
            return []
        line = line.rstrip(b"\r\n")
        if line:
            lines.append(line)
        elif lines:
            return lines
    raise BadRequestError("too many headers")


def _read_body(connection: socket.socket, stream: BufferedIOBase, head: Head) -> bytes:
    length = head.length
    if length > MAX_BODY:
        raise BadRequestError("body too large")
    if length and head.headers.get("expect", "").lower() == "100-continue":
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = stream.read(length) if length else b""
    if len(body) < length:
        raise BadRequestError("body cut short")
    return body
