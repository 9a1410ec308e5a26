"""A client that signs and is otherwise plain HTTP, and waiting for conditions."""

from __future__ import annotations

import base64
import http.client
import json
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding

PREFIX = "/trade-api/v2"
LIMIT_S = 20


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict
    body: bytes
    json: object = field(default=None)


def pem_of(key):
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


def sign(key, message, salt_length=32):
    if isinstance(key, ed25519.Ed25519PrivateKey):
        raw = key.sign(message)
    else:
        raw = key.sign(message, padding.PSS(padding.MGF1(hashes.SHA256()), salt_length), hashes.SHA256())
    return base64.b64encode(raw).decode()


class Client:
    """Signs and sends over one keep-alive connection; every part of the signature can be spoilt."""

    def __init__(self, url, key, key_id="key-rsa"):
        self.url, self.key, self.key_id = url, key, key_id
        self.connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=LIMIT_S)

    def headers(self, method, path, *, offset_ms=0, signed=None, salt_length=32):
        timestamp = str(int(time.time() * 1000) + offset_ms)
        message = f"{timestamp}{method}{signed or path}".encode()
        return {
            "KALSHI-ACCESS-KEY": self.key_id,
            "KALSHI-ACCESS-SIGNATURE": sign(self.key, message, salt_length),
            "KALSHI-ACCESS-TIMESTAMP": timestamp,
        }

    def ask(self, method, path, query="", body=None, *, headers=None, **spoil):
        path = PREFIX + path
        headers = self.headers(method, path, **spoil) if headers is None else headers
        data = json.dumps(body).encode() if body is not None and not isinstance(body, bytes) else body
        try:
            self.connection.request(method, path + (query and f"?{query}"), body=data, headers=headers)
            answer = self.connection.getresponse()
            raw = answer.read()
        except (OSError, http.client.HTTPException):
            self.connection.close()
            raise
        try:
            parsed = json.loads(raw) if raw else None
        except ValueError:
            parsed = None
        return Answer(answer.status, dict(answer.getheaders()), raw, parsed)

    def get(self, path, query="", **spoil):
        return self.ask("GET", path, query, **spoil)

    def cancel(self, order_id, query="", **spoil):
        return self.ask("DELETE", f"/portfolio/events/orders/{order_id}", query, **spoil)

    def batch(self, *entries, path="/portfolio/events/orders/batched"):
        orders = [entry if isinstance(entry, dict) else {"order_id": entry} for entry in entries]
        return self.ask("DELETE", path, body={"orders": orders})

    def create(self, **fields):
        order = {
            "ticker": "KXTEST-26NOV22-A",
            "side": "bid",
            "count": "10.00",
            "price": "0.4500",
            "time_in_force": "good_till_canceled",
            "self_trade_prevention_type": "taker_at_cross",
        }
        return self.ask("POST", "/portfolio/events/orders", body=order | fields)
