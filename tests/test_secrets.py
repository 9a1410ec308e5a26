"""Nothing that a run writes, stores or shows holds a secret: key, passphrase, signature, Redis password."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import re
import traceback
import uuid
from pathlib import Path

import pytest
import redis
import requests
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from kalshi_cancel.client import CancelClient
from kalshi_cancel.exchange.calls import Routing
from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.exchange.signing import KeyProblem, RequestSigner, load_private_key
from kalshi_cancel.model.fields import BadRequest
from kalshi_cancel.settings.reader import SettingsError
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.settings.worker import WorkerSettings
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.rate_limits import Limits, Pacer
from kalshi_cancel.store.scripts import StoreError, connect
from trials.stack import RedisServer, Stack, free_port, wait_until
from worker.dispatch.dispatcher import Dispatcher
from worker.dispatch.settings import DispatchSettings

PASSPHRASE = "Zx9-passphrase-that-nobody-else-uses"
PASSWORD = "Zx9-redis-password-that-nobody-else-uses"
RUN_CHARS = 40  # of base64: shorter pieces occur by chance, none as long as this
PATIENCE_S = 20.0


def body_of(pem):
    """The base64 of a PEM without its armour and newlines."""
    return "".join(line for line in pem.decode().splitlines() if line and "-" not in line and ":" not in line)


class GuardedRedis(RedisServer):
    """A Redis that wants a password."""

    def __init__(self, folder):
        super().__init__(folder, options=("--requirepass", PASSWORD))

    @property
    def url(self):
        return super().url.replace("redis://", f"redis://:{PASSWORD}@")

    def client(self):
        return redis.Redis.from_url(self.url, decode_responses=True)


class Secrets:
    """What must not be seen, and where it was seen anyway."""

    def __init__(self, key, encrypted_pem):
        plain = [
            key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
            for form in (serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL)
        ]
        self.words = [PASSPHRASE, PASSWORD]
        self.words += [base64.b64encode(word.encode()).decode() for word in (PASSPHRASE, PASSWORD)]
        self.words += [str(key.private_numbers().d), f"{key.private_numbers().d:x}"]
        self.signatures = set()
        self._key_runs = {
            body[at : at + RUN_CHARS]
            for body in map(body_of, [*plain, encrypted_pem])
            for at in range(len(body) - RUN_CHARS + 1)
        }

    def seen_in(self, text):
        """The secrets in a text, each by its first characters; base64 also where lines break it."""
        joined = re.sub(r"\\n|\s", "", text)
        found = [word[:12] for word in self.words if word in text]
        for run in re.findall(rf"[A-Za-z0-9+/=]{{{RUN_CHARS},}}", joined):
            pieces = {run[at : at + RUN_CHARS] for at in range(len(run) - RUN_CHARS + 1)}
            found += [f"key: {piece[:8]}..." for piece in pieces & self._key_runs]
        found += [f"signature: {each[:8]}..." for each in self.signatures if each[:RUN_CHARS] in joined]
        return found + ["a header"] * ("kalshi-access-signature" in text.lower())


@pytest.fixture(scope="module")
def key():
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture(scope="module")
def encrypted_pem(key):
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(PASSPHRASE.encode()),
    )


@pytest.fixture
def secrets(key, encrypted_pem):
    return Secrets(key, encrypted_pem)


@pytest.fixture
def guarded(tmp_path, key, encrypted_pem):
    """A stack with a password on Redis and a passphrase on the key; its worker logs all it can."""
    with Stack(tmp_path / "stack") as stack:
        stack.redis = GuardedRedis(tmp_path / "guarded").start()
        stack.keys.public_path.write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
        stack.keys.private_path.write_bytes(encrypted_pem)
        stack.start_exchange()
        stack.start_worker(
            *("-l", "debug"),
            KALSHI_PRIVATE_KEY_PASSPHRASE=PASSPHRASE,
            KALSHI_LOG_FORMAT="json",
            KALSHI_METRICS_PORT=str(free_port()),
        )
        yield stack


def pages_of(worker):
    """What a worker's own port shows at this moment."""
    environment = Path(f"/proc/{worker.pid}/environ").read_text("utf-8")
    port = re.search(r"KALSHI_METRICS_PORT=(\d+)", environment)[1]
    return "".join(
        requests.get(f"http://127.0.0.1:{port}/{page}", timeout=PATIENCE_S).text
        for page in ("metrics", "ready", "healthz")
    )


def everything_in(server):
    """Every key and value of a Redis."""
    readers = {
        "string": server.get,
        "list": lambda name: server.lrange(name, 0, -1),
        "set": server.smembers,
        "hash": server.hgetall,
        "zset": lambda name: server.zrange(name, 0, -1, withscores=True),
        "stream": server.xrange,
        "none": lambda _name: "expired",
    }
    return "\n".join(f"{name!r} {readers[server.type(name)](name)!r}" for name in server.keys("*"))


def test_a_run_with_errors_of_every_kind_leaves_no_secret_anywhere(guarded, secrets, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    control, url = guarded.control, guarded.redis.url
    faults = {
        "http_500": {},
        "status": {"status": 401, "code": "authentication_error", "details": "INCORRECT_API_KEY_SIGNATURE"},
        "garbage": {},
        "drop_after": {},
        "drop_before": {"how": "reset"},
        "headers_flood": {},
        "redirect": {},
    }
    client = CancelClient(url, requested_by="test")
    shown = [repr(client)]
    for kind, fields in faults.items():
        order_id = str(uuid.uuid4())
        control.place(order_id)
        control.fault(kind, order_id=order_id, operation="cancel", times=1, **fields)
        shown.append(repr(client.cancel(order_id).result(timeout=PATIENCE_S)))
        assert control.calls("cancel", order_id)[0]["fault"] == kind
    open_still = str(uuid.uuid4())
    control.place(open_still)
    control.fault("http_429", order_id=open_still)
    shown.append(repr(client.cancel(open_still, deadline_s=0.3).result(timeout=PATIENCE_S)))
    with contextlib.suppress(BadRequest):
        client.cancel("a/b")
    secrets.signatures = {call["signature"] for call in control.calls() if call["signature"]}
    assert len(secrets.signatures) > 2 * len(faults)
    # The exchange and Redis go away while the worker runs.
    guarded.exchange.kill()
    client.cancel(str(uuid.uuid4()))
    worker = guarded.workers[0]
    wait_until(lambda: "breaker_open" in worker.log_text(), what="the worker misses the exchange")
    calls_gone = len(worker.log_text())
    shown.append(pages_of(worker))
    guarded.redis.kill()
    shown.append(pages_of(worker))
    assert all('"exchange": "not_sent' in each for each in shown[-2:])
    with pytest.raises(StoreError) as raised:
        client.cancel(str(uuid.uuid4()))
    shown += traceback.format_exception(raised.value)
    wait_until(lambda: len(worker.log_text()) > calls_gone + 500, what="the worker misses Redis")
    guarded.redis.start()
    server = guarded.redis.client()
    wait_until(server.client_list, what="Redis is back")
    assert worker.stop() == 0
    stored = everything_in(server)
    assert open_still in stored
    for name, text in {
        "what Redis holds": stored,
        "Redis' own file": "".join(
            path.read_bytes().decode("latin-1") for path in guarded.redis.folder.rglob("*") if path.is_file()
        ),
        "the worker's log": worker.log_text(),
        "the sandbox' log": guarded.exchange.log_text(),
        "what the test process shows": "\n".join([*shown, caplog.text, *capfd.readouterr()]),
    }.items():
        assert secrets.seen_in(text) == [], name


@pytest.fixture
def environment(encrypted_pem, stack):
    return {
        "REDIS_URL": stack.redis.url.replace("redis://", f"redis://:{PASSWORD}@"),
        "KALSHI_BASE_URL": stack.control.url,
        "KALSHI_API_KEY_ID": "key-id",
        "KALSHI_PRIVATE_KEY": encrypted_pem.decode(),
        "KALSHI_PRIVATE_KEY_PASSPHRASE": PASSPHRASE,
        "KALSHI_HTTP_PROXY": f"http://user:{PASSWORD}@127.0.0.1:1",
    }


def test_no_object_shows_a_secret(environment, secrets, key):
    settings = WorkerSettings.from_env(environment)
    exchange = Exchange.from_settings(settings)
    server = connect(settings.redis)
    dispatcher_store = CancelStore(server, settings.redis)
    dispatcher = Dispatcher(
        dispatcher_store,
        exchange,
        Pacer(server, settings.redis.key_prefix, Limits(1, 1, 1, 1)),
        DispatchSettings(
            cancel_max_age_s=10,
            read_lag_s=1,
            record_life_s=60,
            risk_reserve=0,
            batch_most=1,
        ),
    )
    objects = [
        settings,
        settings.redis,
        settings.redis.masked_url,
        RedisSettings.from_env(environment),
        RequestSigner("key-id", key),
        exchange,
        dispatcher_store,
        dispatcher,
        exchange.cancel("order", Routing(), time_left_s=2),  # the proxy is not there
    ]
    for each in objects:
        for text in (repr(each), str(each), f"{each}", repr([each]), repr(getattr(each, "__dict__", ""))):
            assert secrets.seen_in(text) == [], type(each)
    with pytest.raises(TypeError):
        json.dumps(objects[4])


def test_no_error_and_no_traceback_shows_a_secret(environment, secrets, encrypted_pem, key):
    plain = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    damaged = plain.decode()[:400] + "%" + plain.decode()[401:]
    nowhere = RedisSettings.from_env({"REDIS_URL": f"redis://:{PASSWORD}@127.0.0.1:1/0"})
    attempts = [
        lambda: load_private_key(encrypted_pem, passphrase=PASSWORD.encode()),
        lambda: load_private_key(encrypted_pem),
        lambda: load_private_key(plain, passphrase=PASSPHRASE.encode()),
        lambda: load_private_key(damaged),
        lambda: load_private_key(plain.decode()[:900]),
        lambda: load_private_key(body_of(plain)),
        lambda: WorkerSettings.from_env({**environment, "REDIS_URL": f"redis://:{PASSWORD}@[::1/0"}),
        lambda: WorkerSettings.from_env({**environment, "REDIS_URL": f"mysql://:{PASSWORD}@h/0"}),
        lambda: WorkerSettings.from_env({**environment, "REDIS_URL": f"redis://:{PASSWORD}@h/0?x=1"}),
        lambda: WorkerSettings.from_env({**environment, "KALSHI_BASE_URL": f"https://u:{PASSWORD}@h"}),
        lambda: WorkerSettings.from_env({**environment, "KALSHI_HTTP_PROXY": f"ftp://u:{PASSWORD}@h"}),
        lambda: WorkerSettings.from_env({**environment, "KALSHI_PRIVATE_KEY_PATH": plain.decode()}),
        lambda: WorkerSettings.from_env({**environment, "KALSHI_API_KEY_ID": plain.decode()}),
        lambda: CancelStore(connect(nowhere), nowhere).ping(),
    ]
    for attempt in attempts:
        with pytest.raises((KeyProblem, SettingsError, StoreError)) as raised:
            attempt()
        told = io.StringIO()
        traceback.print_exception(raised.value, file=told)
        assert secrets.seen_in(told.getvalue() + repr(raised.value)) == []


def test_the_search_for_secrets_finds_them(secrets, encrypted_pem, key):
    plain = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for text in (
        plain.decode(),
        repr(plain),
        encrypted_pem.decode(),
        f"x{PASSWORD}x",
        json.dumps(PASSPHRASE),
    ):
        assert secrets.seen_in(text)
    assert (
        secrets.seen_in("nothing here but aGFybWxlc3MgdGV4dCBpbiBiYXNlNjQgdGhhdCBpcyBsb25nIGVub3VnaA==") == []
    )
