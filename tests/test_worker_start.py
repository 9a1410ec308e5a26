"""How a worker starts and ends, as an operator sees it: the documented command, last words, exit codes."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from sandbox.stack import ROOT, Part, free_port, wait_until
from worker.client import CancelClient

PATIENCE_S = 20.0
DOCUMENTED = ("celery", "-A", "worker.app", "worker")


def own_database(stack):
    """A database of its own: the session's worker must not serve what these workers are asked to."""
    return stack.redis.url.removesuffix("/0") + "/15"


@pytest.fixture
def run(stack, tmp_path):
    """Starts the documented command from the repository's root with changes to a fit environment."""
    parts = []

    def run(*options, command=DOCUMENTED, **changes):
        env = {**stack.environment, "REDIS_URL": own_database(stack), **changes}
        env = {name: value for name, value in env.items() if value is not None}
        path = os.pathsep.join((str(Path(sys.executable).parent), env["PATH"]))
        part = Part(
            [*command, *options],
            log_path=tmp_path / f"worker{len(parts)}.log",
            env={**env, "PATH": path},
        )
        parts.append(part)
        return part

    yield run
    for part in parts:
        part.kill()


def last_words(part, *, within_s=PATIENCE_S):
    """The lines of a worker that ends by itself, unsuccessfully and without a traceback."""
    code = part.process.wait(within_s)
    text = part.log_text()
    assert code != 0, text
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.strip()]


def the_reason(part):
    """The one line in which a worker says why it does not start."""
    lines = last_words(part)
    reasons = [line for line in lines if "cannot start: " in line]
    assert len(reasons) == 1, lines
    return reasons[0].partition("cannot start: ")[2]


@pytest.fixture
def ready(run):
    """Starts a worker and waits until it says that it is ready (which it does on the level "info")."""

    def ready(*options, **changes):
        part = run("-l", "info", *options, **changes)
        part.wait_ready(lambda: " ready." in part.log_text(), "the worker")
        return part

    return ready


REQUIRED = ("REDIS_URL", "KALSHI_BASE_URL", "KALSHI_API_KEY_ID", "KALSHI_PRIVATE_KEY_PATH")


# -- it refuses


def test_with_nothing_set_the_worker_names_everything_that_is_missing_at_once(run):
    reason = the_reason(run(**dict.fromkeys(REQUIRED)))
    for name in REQUIRED:
        assert name in reason


def test_with_several_mistakes_the_worker_names_them_all_at_once(run):
    reason = the_reason(
        run(
            KALSHI_BASE_URL="ftp://x", KALSHI_ORDERS_API="v3", KALSHI_POOL_SIZE="many", KALSHI_API_KEY_ID=None
        )
    )
    for name in ("KALSHI_BASE_URL", "KALSHI_ORDERS_API", "KALSHI_POOL_SIZE", "KALSHI_API_KEY_ID"):
        assert name in reason


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KALSHI_BASE_URL", "external-api.kalshi.com"),
        ("KALSHI_BASE_URL", "https://external-api.kalshi.com/trade-api/v2"),
        ("KALSHI_BASE_URL", "http://external-api.kalshi.com"),
        ("REDIS_URL", "localhost:6379"),
    ],
)
def test_a_url_that_will_not_do_is_refused_by_name(run, name, value):
    assert name in the_reason(run(**{name: value}))


def test_a_key_file_that_is_not_there_is_refused_by_its_path(run):
    assert "/no/such/key.pem" in the_reason(run(KALSHI_PRIVATE_KEY_PATH="/no/such/key.pem"))


def pem(key, passphrase=None):
    encryption = (
        serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    )
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("encrypted", "encrypted and no passphrase"),
        ("wrong passphrase", "passphrase is wrong"),
        ("public", "a public key"),
        ("elliptic curve", "EC"),
        ("text", "not PEM text"),
        ("empty", "empty"),
    ],
)
def test_a_key_that_cannot_sign_is_refused_and_the_worker_says_why(run, stack, tmp_path, kind, words):
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    contents = {
        "encrypted": pem(rsa_key, b"secret"),
        "wrong passphrase": pem(rsa_key, b"secret"),
        "public": stack.keys.public_path.read_bytes(),
        "elliptic curve": pem(ec.generate_private_key(ec.SECP256R1())),
        "text": b"my key\n",
        "empty": b"",
    }
    path = tmp_path / "key.pem"
    path.write_bytes(contents[kind])
    passphrase = {"KALSHI_PRIVATE_KEY_PASSPHRASE": "guess"} if kind == "wrong passphrase" else {}
    reason = the_reason(run(KALSHI_PRIVATE_KEY_PATH=str(path), **passphrase))
    assert words in reason


def test_without_redis_the_worker_refuses_to_start_and_names_the_server(run):
    port = free_port()
    reason = the_reason(run(REDIS_URL=f"redis://:hush@127.0.0.1:{port}/0"))
    assert f"127.0.0.1:{port}" in reason
    assert "hush" not in reason


def test_a_redis_that_wants_another_password_is_refused_in_one_line(run, stack):
    url = stack.redis.url.replace("redis://", "redis://somebody:hush@")
    reason = the_reason(run(REDIS_URL=url))
    assert "hush" not in reason


# -- it starts, serves and ends


@pytest.fixture
def serves(stack, control):
    """Whether the worker sees a cancel through."""

    def serves():
        order_id = str(uuid.uuid4())
        control.place(order_id)
        with closing(CancelClient(own_database(stack))) as client:
            result = client.cancel(order_id, deadline_s=PATIENCE_S).result(timeout=PATIENCE_S)
        return result.outcome == "canceled" and control.order(order_id)["status"] == "canceled"

    return serves


def test_the_documented_command_serves_from_the_repositorys_root_and_ends_with_zero(run, serves):
    assert (ROOT / "celeryconfig.py").exists()
    worker = run()
    assert serves()
    worker.signal(signal.SIGTERM)
    assert worker.process.wait(PATIENCE_S) == 0
    assert "Traceback" not in worker.log_text()


def test_a_key_in_the_environment_serves_also_with_its_newlines_written_out(ready, serves, stack):
    key = stack.keys.private_path.read_text().replace("\n", "\\n")
    worker = ready(KALSHI_PRIVATE_KEY=key, KALSHI_PRIVATE_KEY_PATH=None)
    assert serves()
    assert worker.stop() == 0


def test_a_key_file_that_others_can_read_is_warned_of(ready, stack, tmp_path):
    path = tmp_path / "key.pem"
    path.write_bytes(stack.keys.private_path.read_bytes())
    path.chmod(0o644)
    worker = ready(KALSHI_PRIVATE_KEY_PATH=str(path))
    assert f"private key file {path} can be read or changed by others" in worker.log_text()


def test_a_worker_starts_without_the_exchange_says_so_and_ends_when_it_is_told_to(ready):
    worker = ready(KALSHI_BASE_URL=f"http://127.0.0.1:{free_port()}")
    wait_until(lambda: "the exchange does not answer yet" in worker.log_text(), what="the warning")
    assert worker.stop() == 0
