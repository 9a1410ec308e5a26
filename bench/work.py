"""The work that every peer does for one order: a fresh signature, a DELETE over keep-alive, a record.

Each queue is given the leanest way that suits it: `requests` only where the peer is what most people would
write, urllib3 with a pool for threads and processes, a bare asyncio client for the async queues.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa

PATH = "/trade-api/v2/portfolio/events/orders/"
RECORD_KEY = "celery-task-meta-cancel:"  # where our own records are, too
_PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=padding.PSS.DIGEST_LENGTH)
_TIMEOUT_S = 10


@functools.cache
def _key() -> rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey:
    key = serialization.load_pem_private_key(Path(os.environ["KALSHI_PRIVATE_KEY_PATH"]).read_bytes(), None)
    assert isinstance(key, rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey)
    return key


def _signature(message: bytes) -> bytes:
    key = _key()
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(message, _PSS, hashes.SHA256())
    return key.sign(message)


def _signed(path: str) -> dict[str, str]:
    timestamp = str(time.time_ns() // 1_000_000)
    signature = _signature(f"{timestamp}DELETE{path}".encode())
    return {
        "KALSHI-ACCESS-KEY": os.environ["KALSHI_API_KEY_ID"],
        "KALSHI-ACCESS-SIGNATURE": base64.b64encode(signature).decode(),
        "KALSHI-ACCESS-TIMESTAMP": timestamp,
    }


def _record(order_id: str, requested_at: float, answer: dict[str, Any]) -> dict[str, Any]:
    """The outcome as our own service stores it, padded by the order to the length of ours."""
    return {
        "order_id": order_id,
        "outcome": "canceled",
        "status": "canceled",
        "reduced_by": answer["reduced_by"],
        "confirmed_by": "cancel",
        "attempts": 1,
        "requested_at": requested_at,
        "settled_at": time.time(),
        "exchange_ts_ms": answer["ts_ms"],
        "requested_by": ["bench"],
        "error": None,
        "order": {"order_id": order_id, "ticker": "KXBENCH-26NOV22-A", "note": "x" * 90},
    }


@functools.cache
def _session(_pid: int) -> requests.Session:
    return requests.Session()


def cancel_plainly(order_id: str, requested_at: float) -> dict[str, Any]:
    """With `requests`, as most people would."""
    path = PATH + order_id
    url = os.environ["KALSHI_BASE_URL"] + path
    answer = _session(os.getpid()).delete(url, headers=_signed(path), timeout=_TIMEOUT_S)
    answer.raise_for_status()
    return _record(order_id, requested_at, answer.json())


@functools.cache
def _pool(_pid: int) -> urllib3.HTTPConnectionPool:
    parts = urlsplit(os.environ["KALSHI_BASE_URL"])
    return urllib3.HTTPConnectionPool(str(parts.hostname), parts.port, maxsize=64, retries=False)


def cancel(order_id: str, requested_at: float) -> str:
    """With urllib3; the record as JSON."""
    path = PATH + order_id
    answer = _pool(os.getpid()).request("DELETE", path, headers=_signed(path), timeout=_TIMEOUT_S)
    if answer.status != 200:  # noqa: PLR2004 - HTTP's OK
        raise RuntimeError(answer.data)
    return json.dumps(_record(order_id, requested_at, json.loads(answer.data)))


_connections: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []


async def cancel_async(order_id: str, requested_at: float) -> str:
    """With nothing but asyncio's streams; the record as JSON."""
    parts = urlsplit(os.environ["KALSHI_BASE_URL"])
    path = PATH + order_id
    if _connections:
        reader, writer = _connections.pop()
    else:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    lines = [
        f"DELETE {path} HTTP/1.1",
        f"Host: {parts.netloc}",
        *(f"{name}: {value}" for name, value in _signed(path).items()),
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    start = head.index(b"content-length:") + len(b"content-length:")
    body = await reader.readexactly(int(head[start : head.index(b"\r\n", start)]))
    _connections.append((reader, writer))
    if not head.startswith(b"http/1.1 200"):
        raise RuntimeError(body)
    return json.dumps(_record(order_id, requested_at, json.loads(body)))
