"""How a worker starts and ends, as an operator sees it: the documented command, last words, exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from contextlib import closing
from pathlib import Path

import pytest
from celery import Celery
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from kalshi_cancel.client import CancelClient
from trials.stack import ROOT, Part, free_port, wait_until

PATIENCE_S = 20.0
DOCUMENTED = ("celery", "-A", "worker.app", "worker")


def own_database(stack):
    """A database of its own: the session's worker must not serve what these workers are asked to."""
    return stack.redis.url.removesuffix("/0") + "/15"


def start(stack, log_path, *options, **changes):
    """The documented command from the repository's root; ``changes`` to a fit environment, None: not set."""
    env = {**stack.environment, "REDIS_URL": own_database(stack), **changes}
    env["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), env["PATH"]))
    env = {name: value for name, value in env.items() if value is not None}
    return Part([*DOCUMENTED, *options], log_path=log_path, env=env)


@pytest.fixture
def run(stack, tmp_path):
    """Starts a worker that is gone after the test."""
    parts = []

    def run(*options, **changes):
        parts.append(start(stack, tmp_path / f"worker{len(parts)}.log", *options, **changes))
        return parts[-1]

    yield run
    for part in parts:
        part.kill()


@pytest.fixture
def ready(run):
    """Starts a worker and waits until it says that it is ready (which it does on the level "info")."""

    def ready(*options, **changes):
        part = run("-l", "info", *options, **changes)
        part.wait_ready(lambda: " ready." in part.log_text(), "the worker")
        return part

    return ready


# -- it refuses


REQUIRED = ("REDIS_URL", "KALSHI_BASE_URL", "KALSHI_API_KEY_ID", "KALSHI_PRIVATE_KEY_PATH")
PASSWORD = "hush"


def pem(key, passphrase=None):
    encryption = (
        serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    )
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
PUBLIC = RSA_KEY.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)
ENCRYPTED = {"KALSHI_PRIVATE_KEY": pem(RSA_KEY, b"secret"), "KALSHI_PRIVATE_KEY_PATH": None}
# What is wrong with the environment, and what the reason must name.
UNFIT = {
    "nothing is set": (dict.fromkeys(REQUIRED), REQUIRED),
    "only Redis is set": (dict.fromkeys(REQUIRED[1:]), REQUIRED[1:]),
    "many mistakes": (
        {
            "REDIS_URL": "localhost:6379",
            "KALSHI_BASE_URL": "ftp://x",
            "KALSHI_ORDERS_API": "v3",
            "KALSHI_POOL_SIZE": "many",
            "KALSHI_API_KEY_ID": None,
        },
        ("REDIS_URL", "KALSHI_BASE_URL", "KALSHI_ORDERS_API", "KALSHI_POOL_SIZE", "KALSHI_API_KEY_ID"),
    ),
    "a path": ({"KALSHI_BASE_URL": "https://external-api.kalshi.com/trade-api/v2"}, ("KALSHI_BASE_URL",)),
    "no TLS": ({"KALSHI_BASE_URL": "http://external-api.kalshi.com"}, ("KALSHI_BASE_URL",)),
    "no key file": ({"KALSHI_PRIVATE_KEY_PATH": "/no/such/key.pem"}, ("/no/such/key.pem", "not exist")),
    "an encrypted key": (ENCRYPTED, ("encrypted and no passphrase",)),
    "a wrong passphrase": (
        {**ENCRYPTED, "KALSHI_PRIVATE_KEY_PASSPHRASE": PASSWORD},
        ("passphrase is wrong",),
    ),
    "a public key": ({**ENCRYPTED, "KALSHI_PRIVATE_KEY": PUBLIC}, ("a public key",)),
    "a variable that is nearly one of ours": (
        {"KALSHI_CANCEL_DEADLINE": "5", "KALSHI_METRIC_PORT": "9", "KALSHI_WAIT_REPLICA": "1"},
        ("did you mean KALSHI_CANCEL_DEADLINE_S?", "KALSHI_METRICS_PORT?", "KALSHI_WAIT_REPLICAS?"),
    ),
    "a trusted proxy that is none": (
        {"KALSHI_TRUST_ENV": "true", "HTTP_PROXY": f"socks5://u:{PASSWORD}@x:1"},
        ("HTTPS_PROXY or ALL_PROXY is no http:// or https://", "KALSHI_TRUST_ENV"),
    ),
    "Redis down": ({"REDIS_URL": f"redis://:{PASSWORD}@127.0.0.1:1/0"}, ("no Redis at", "127.0.0.1:1")),
    "Redis with another password": ({"REDIS_URL": "?"}, ("no Redis at", "somebody")),
}


@pytest.fixture(scope="module")
def unfit(stack, tmp_path_factory):
    """A worker for each unfit environment, started together."""
    folder, parts = tmp_path_factory.mktemp("unfit"), {}
    wrong_user = stack.redis.url.replace("redis://", f"redis://somebody:{PASSWORD}@")
    for number, (name, (changes, _)) in enumerate(UNFIT.items()):
        texts = {key: value.decode() if isinstance(value, bytes) else value for key, value in changes.items()}
        if texts.get("REDIS_URL") == "?":
            texts["REDIS_URL"] = wrong_user
        parts[name] = start(stack, folder / f"worker{number}.log", **texts)
    yield parts
    for part in parts.values():
        part.kill()


@pytest.mark.parametrize("name", UNFIT)
def test_a_worker_that_is_not_fit_refuses_to_start_and_says_why_in_one_line(unfit, name):
    part, (_, named) = unfit[name], UNFIT[name]
    assert part.process.wait(60) != 0
    text = part.log_text()
    assert "Traceback" not in text, text
    [reason] = [line for line in text.splitlines() if "cannot start: " in line]
    assert [words for words in named if words not in reason] == [], reason
    assert PASSWORD not in text


# What the command line asks for, what more is in the environment, and what the reason must name.
IMPOSSIBLE = {
    "a pool of somebody else's": (
        ("-P", "custom"),
        {"CELERY_CUSTOM_WORKER_POOL": "celery.concurrency.base:BasePool"},
        "the pool base is not supported: use -P threads",
    ),
    "threads that grow": (("--autoscale", "8,2"), {}, "--autoscale works with -P processes only"),
    "one thread that grows": (
        ("-P", "solo", "--autoscale", "2"),
        {},
        "--autoscale works with -P processes only",
    ),
    "threads with an end": (
        ("--time-limit", "9", "--soft-time-limit", "5", "--max-tasks-per-child", "9"),
        {},
        "--soft-time-limit works with -P processes only: leave it out; --max-tasks-per-child works",
    ),
    "threads with so much memory": (("--max-memory-per-child", "9"), {}, "--max-memory-per-child works with"),
    "a queue that is nearly one of ours": (("-Q", "risk,cancel"), {}, "'cancel': did you mean 'cancels'?"),
    "another case": (("-Q", "Risk"), {}, "'Risk': did you mean 'risk'?"),
    "all but a queue that is nearly ours": (("-X", "riks"), {}, "'riks': did you mean 'risk'?"),
    "a lane": (("-Q", "risk,strategy"), {}, "'strategy': did you mean 'cancels'?"),
    "a task": (("-Q", "cancel_order"), {}, "'cancel_order': did you mean 'cancels'?"),
    "no queue": (("-X", "cancels,risk"), {}, "-X cancels,risk leaves no queue to work on"),
}


@pytest.fixture(scope="module")
def impossible(stack, tmp_path_factory):
    """A worker for each of them, started together."""
    folder, parts = tmp_path_factory.mktemp("impossible"), {}
    for number, (name, (options, changes, _)) in enumerate(IMPOSSIBLE.items()):
        parts[name] = start(stack, folder / f"worker{number}.log", *options, **changes)
    yield parts
    for part in parts.values():
        part.kill()


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_the_command_line_asks_for_and_cannot_work_is_refused_in_one_line(impossible, name):
    part, (_, _, words) = impossible[name], IMPOSSIBLE[name]
    assert part.process.wait(60) == 1
    [reason] = part.log_text().splitlines()
    assert reason.startswith("cannot start: ")
    assert words in reason


@pytest.mark.parametrize("metrics", [False, True], ids=["alone", "with metrics"])
def test_processes_without_a_temporary_folder_are_refused_in_one_line_that_names_tmpdir(stack, metrics):
    env = {**stack.environment, "REDIS_URL": own_database(stack)}
    env["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), env["PATH"]))
    if metrics:
        env["KALSHI_METRICS_PORT"] = str(free_port())
    # Whoever may not write a byte has no folder that can be written to, root or not.
    command = ["sh", "-c", 'ulimit -f 0 && exec "$@"', "sh", *DOCUMENTED, "-P", "processes", "-c", "2"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 1
    [reason] = [line for line in (done.stdout + done.stderr).splitlines() if "cannot start: " in line]
    assert "set TMPDIR" in reason
    assert "Traceback" not in done.stdout + done.stderr


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


@pytest.mark.parametrize(
    "options",
    [
        ("-P", "processes", "--autoscale", "3,1", "--time-limit", "60", "--max-tasks-per-child", "2"),
        ("-P", "solo"),
        ("-Q", "risk-eu,cancels"),
    ],
    ids=" ".join,
)
def test_what_the_pool_can_do_is_not_refused_and_raw_messages_are_served(ready, stack, control, options):
    ready(*options)
    order_ids = [str(uuid.uuid4()) for _ in range(12)]
    control.place_many([{"order_id": each} for each in order_ids])
    url = own_database(stack)
    with Celery(broker=url, backend=url, set_as_current=False) as stranger:
        tasks = [stranger.send_task("cancel_order", args=[each], queue="cancels") for each in order_ids]
        outcomes = [task.get(timeout=PATIENCE_S)["outcome"] for task in tasks]
    assert outcomes == ["canceled"] * len(order_ids)


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
    assert "event=key_file_exposed" in worker.log_text()
    assert f"{path} can be read or changed by others" in worker.log_text()


def test_a_worker_starts_without_the_exchange_says_so_and_ends_when_it_is_told_to(ready):
    worker = ready(KALSHI_BASE_URL=f"http://127.0.0.1:{free_port()}")
    wait_until(lambda: "event=exchange_unavailable" in worker.log_text(), what="the warning")
    assert worker.stop() == 0


def test_what_strangers_publish_to_celerys_own_channels_ends_no_worker(ready, stack):
    worker, url = ready(), own_database(stack)
    with (
        Celery(broker=url, backend=url, set_as_current=False) as stranger,
        stack.redis.client() as server,
    ):

        def serves_raw():
            order_id = str(uuid.uuid4())
            stack.control.place(order_id)
            task = stranger.send_task("cancel_order", args=[order_id], queue="cancels")
            return task.get(timeout=PATIENCE_S)["outcome"] == "canceled"

        assert serves_raw()
        for junk in ("[]", "7", "no JSON", '{"body": "e30=", "headers": 7, "properties": {}}'):
            for channel in ("celeryev/worker.heartbeat", "celeryev/worker.elect", "celery.pidbox"):
                server.publish(f"/15.{channel}", junk)
        assert serves_raw()
    assert worker.stop() == 0
    assert "Traceback" not in worker.log_text()
