"""A stub exchange that answers cancels faster than anything here can ask: one asyncio process, no framework.

    python -m bench.stub --port 9001 --public-key key.pub.pem

It answers V2 cancels, single and batch, and the few reads that a worker starts with; it verifies a sample of
the signatures, and notes for each order when its first cancel arrived and how many did. Unlike the sandbox
it knows no orders, no budget and no faults: what is measured against it is the asking side.

The unsigned routes under /stub/ are for the benchmark: `reset` (with `latency_ms` and `idle_close_s`),
`state`, `arrivals`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gc
import json
import signal
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa

PublicKey = rsa.RSAPublicKey | ed25519.Ed25519PublicKey

ONE = b"/trade-api/v2/portfolio/events/orders/"
BATCH = ONE + b"batched"
VERIFY_EVERY = 50
_PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=padding.PSS.DIGEST_LENGTH)
# So much budget that nobody waits for tokens.
_PLENTY = {"refill_rate": 10**9, "bucket_capacity": 10**9}
_FACTS: dict[bytes, Any] = {
    b"/trade-api/v2/exchange/status": {"exchange_active": True, "trading_active": True},
    b"/trade-api/v2/account/limits": {
        "usage_tier": "stub",
        "read": _PLENTY,
        "write": _PLENTY,
        "grants": [],
    },
    b"/trade-api/v2/account/endpoint_costs": {
        "default_cost": 10,
        "endpoint_costs": [
            {"method": "DELETE", "path": "/trade-api/v2/portfolio/events/orders/:order_id", "cost": 2},
            {"method": "DELETE", "path": "/trade-api/v2/portfolio/events/orders/batched", "cost": 2},
            {"method": "GET", "path": "/trade-api/v2/portfolio/orders/:order_id", "cost": 2},
            {"method": "GET", "path": "/trade-api/v2/portfolio/orders", "cost": 10},
        ],
    },
}


class Stub:
    """What the stub has seen; times are seconds of the monotonic clock, which all processes share."""

    def __init__(self, public_key: PublicKey | None) -> None:
        self._public_key = public_key
        self.reset({})

    def reset(self, wishes: dict[str, Any]) -> dict[str, Any]:
        """Forgets everything; the latency and the idle time from now on."""
        self.latency_s = wishes.get("latency_ms", 0) / 1000
        self.idle_close_s = wishes.get("idle_close_s", 0)
        self.arrivals: dict[str, float] = {}
        self.calls = self.cancels = self.verified = self.forged = 0
        self.first = self.last = 0.0
        return {}

    def state(self) -> dict[str, Any]:
        """The counts so far."""
        return {
            "orders": len(self.arrivals),
            "cancels": self.cancels,
            "calls": self.calls,
            "verified": self.verified,
            "forged": self.forged,
            "first": self.first,
            "last": self.last,
        }

    def cancel(self, order_id: str, now: float) -> None:
        """Notes one cancel."""
        self.cancels += 1
        self.last = now
        self.first = self.first or now
        self.arrivals.setdefault(order_id, now)

    def signed(self, method: bytes, path: bytes, head: bytes) -> bool:
        """Whether the call is signed; looked at closely for a sample."""
        self.calls += 1
        if self._public_key is None or self.calls % VERIFY_EVERY:
            return True
        message = _header(head, b"kalshi-access-timestamp") + method + path
        try:
            signature = base64.b64decode(_header(head, b"kalshi-access-signature"), validate=True)
            if isinstance(self._public_key, rsa.RSAPublicKey):
                self._public_key.verify(signature, message, _PSS, hashes.SHA256())
            else:
                self._public_key.verify(signature, message)
        except (InvalidSignature, ValueError):
            self.forged += 1
            return False
        self.verified += 1
        return True


class Connection(asyncio.Protocol):
    """One keep-alive connection; requests may come in pieces, and answers go out in their order."""

    def __init__(self, stub: Stub) -> None:
        self._stub = stub
        self._buffer = b""
        self._transport: asyncio.Transport
        self._idle: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's: connected."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """asyncio's: the client hung up."""
        if self._idle:
            self._idle.cancel()

    def data_received(self, data: bytes) -> None:
        """asyncio's: some bytes of a request, or of several."""
        self._buffer = self._buffer + data if self._buffer else data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            method, target, _ = head[: head.find(b"\r\n")].split(b" ", 2)
            length = int(_header(head, b"content-length") or 0) if method != b"GET" else 0
            total = end + 4 + length
            if len(self._buffer) < total:
                return
            body, self._buffer = self._buffer[end + 4 : total], self._buffer[total:]
            self._answer(method, target.partition(b"?")[0], head, body)

    def _answer(self, method: bytes, path: bytes, head: bytes, body: bytes) -> None:
        stub, now = self._stub, time.monotonic()
        if path.startswith(b"/stub/"):
            self._send(b"200 OK", json.dumps(_lever(stub, path, body)).encode())
            return
        if not stub.signed(method, path, head):
            self._later(b"401 Unauthorized", b'{"error":{"code":"authentication_error"}}')
        elif method == b"DELETE" and path == BATCH:
            ids = [entry["order_id"] for entry in json.loads(body)["orders"]]
            for order_id in ids:
                stub.cancel(order_id, now)
            entries = b",".join(_canceled(order_id.encode()) for order_id in ids)
            self._later(b"200 OK", b'{"orders":[' + entries + b"]}")
        elif method == b"DELETE" and path.startswith(ONE):
            order_id = path[len(ONE) :]
            stub.cancel(order_id.decode(), now)
            self._later(b"200 OK", _canceled(order_id))
        elif path in _FACTS:
            self._send(b"200 OK", json.dumps(_FACTS[path]).encode())
        else:
            self._send(b"404 Not Found", b'{"error":{"code":"not_found","message":"not found"}}')
        if stub.idle_close_s:
            if self._idle:
                self._idle.cancel()
            self._idle = asyncio.get_running_loop().call_later(stub.idle_close_s, self._transport.close)

    def _later(self, status: bytes, body: bytes) -> None:
        if self._stub.latency_s:
            asyncio.get_running_loop().call_later(self._stub.latency_s, self._send, status, body)
        else:
            self._send(status, body)

    def _send(self, status: bytes, body: bytes) -> None:
        self._transport.write(
            b"HTTP/1.1 %b\r\nDate: %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (status, _date(int(time.time())), len(body), body)
        )


def _lever(stub: Stub, path: bytes, body: bytes) -> Any:
    if path == b"/stub/reset":
        return stub.reset(json.loads(body or b"{}"))
    return stub.arrivals if path == b"/stub/arrivals" else stub.state()


def _canceled(order_id: bytes) -> bytes:
    ts_ms = int(time.time() * 1000)
    return b'{"order_id":"%b","client_order_id":"c-%b","reduced_by":"10.00","ts_ms":%d}' % (
        order_id,
        order_id,
        ts_ms,
    )


def _header(head: bytes, name: bytes) -> bytes:
    at = head.lower().find(b"\r\n" + name + b":")
    if at < 0:
        return b""
    end = head.find(b"\r\n", at + 2)
    return head[at + len(name) + 3 : end if end >= 0 else None].strip()


_dates: dict[int, bytes] = {}


def _date(second: int) -> bytes:
    if second not in _dates:
        _dates.clear()
        _dates[second] = formatdate(second, usegmt=True).encode()
    return _dates[second]


async def _serve(stub: Stub, port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(stub), "127.0.0.1", port, backlog=1024)
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    print("ready", flush=True)
    await stop.wait()
    server.close()


async def ceiling(port: int, *, connections: int = 16, seconds: float = 2.0, batch: int = 0) -> float:
    """Orders a second that unsigned load brings the stub to; ``batch``: that many in each call."""
    ids = json.dumps({"orders": [{"order_id": f"load-{number}"} for number in range(batch)]}).encode()
    one = b"DELETE %bload HTTP/1.1\r\nHost: stub\r\n\r\n" % ONE
    many = b"DELETE %b HTTP/1.1\r\nHost: stub\r\nContent-Length: %d\r\n\r\n%b" % (BATCH, len(ids), ids)
    until = time.monotonic() + seconds

    async def ask() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        calls = 0
        while time.monotonic() < until:
            writer.write(many if batch else one)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(_header(head, b"content-length")))
            calls += 1
        writer.close()
        return calls

    calls = sum(await asyncio.gather(*(ask() for _ in range(connections))))
    return calls * (batch or 1) / seconds


def main() -> None:
    """Serves until it is told to stop."""
    parser = argparse.ArgumentParser(prog="python -m bench.stub", description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--public-key", type=Path, help="PEM; without it no signature is verified")
    arguments = parser.parse_args()
    key = None
    if arguments.public_key:
        key = serialization.load_pem_public_key(arguments.public_key.read_bytes())
        assert isinstance(key, PublicKey)
    gc.disable()  # nothing here makes cycles, and a pause would be measured as somebody's latency
    asyncio.run(_serve(Stub(key), arguments.port))


if __name__ == "__main__":
    main()
