"""Who may do what in Redis, TLS on the way there, and what nobody may do: proved against live servers."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from contextlib import closing, contextmanager, suppress

import here
import pytest
import redis
from celery import Celery
from claims import claim_from
from redis.backoff import NoBackoff
from redis.retry import Retry
from test_top import Terminal

from kalshi_cancel.cli.exits import Exit
from kalshi_cancel.client import CancelClient, NotSettled
from kalshi_cancel.model.requests import Lane
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store.audit import AuditLog
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.pending import MakeDeadLetter
from kalshi_cancel.store.scripts import StoreError, connect
from kalshi_cancel.store.stats import Stats
from trials.stack import ROOT, Part, RedisServer, Stack, free_port, valkey_server, wait_until

PATIENCE_S = 20.0
USERS_FILE = ROOT / "deploy" / "redis" / "users.acl"
USERS = ("admin", "worker", "producer", "raw-producer", "monitor", "auditor")
PASSWORDS = {user: f"{user}-{uuid.uuid4()}" for user in USERS}
DENIED = "(?i)permission|can't (run|access)"  # as Valkey and Redis 7.0 say it
DEBIAN = shutil.which("redis-server")


def users_file(folder, program=None):
    """The file as an operator fills it in."""
    text = USERS_FILE.read_text()
    if (
        program
        and "v=7.0."
        in subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    ):
        text = text.replace(" +client|setinfo", "")  # unknown before 7.2, which the file's README says
    for user, password in PASSWORDS.items():
        placeholder = f"#SHA256-OF-{user.upper()}S-PASSWORD"
        assert text.count(placeholder) == 1
        text = text.replace(placeholder, "#" + hashlib.sha256(password.encode()).hexdigest())
    filled = folder / "users.acl"
    filled.write_text(text)
    return filled


def url_of(server, user):
    return server.url.replace("redis://", f"redis://{user}:{PASSWORDS[user]}@")


def as_user(server, user):
    """A connection of this user's."""
    return redis.Redis.from_url(url_of(server, user), decode_responses=True)


def programs():
    yield pytest.param(None, id="valkey")
    if DEBIAN:  # a second implementation, where the machine has one
        yield pytest.param(DEBIAN, id="redis-server")


class Guarded(Stack):
    """A stack whose Redis lets in the users of the file only."""

    def __init__(self, folder, program):
        super().__init__(folder, redis_program=program, environment={"KALSHI_READ_LAG_S": "0.2"})
        options = ["--aclfile", str(users_file(folder, program)), "--acllog-max-len", "1000"]
        self.redis = RedisServer(folder / "redis", program=program, options=options)

    @property
    def environment(self):
        return {**super().environment, "REDIS_URL": url_of(self.redis, "worker")}

    def denials(self):
        """What was denied since the last look, as (user, what)."""
        with as_user(self.redis, "admin") as admin:
            found = {(each["username"], each["object"], each["context"]) for each in admin.acl_log(1000)}
            admin.acl_log_reset()
        return found


@pytest.fixture(scope="module", params=programs())
def guarded(request, tmp_path_factory):
    """Redis with the file's users, the sandbox, and a worker that is its user "worker"."""
    with Guarded(tmp_path_factory.mktemp("guarded"), request.param) as stack:
        yield stack.start(workers=1)


@pytest.fixture
def as_producer(guarded):
    guarded.control.reset()
    with closing(CancelClient(url_of(guarded.redis, "producer"), requested_by="test")) as client:
        yield client


def place(stack, number=1, **fields):
    order_ids = [str(uuid.uuid4()) for _ in range(number)]
    stack.control.place_many([{"order_id": order_id, **fields} for order_id in order_ids])
    return order_ids


def cancelctl(stack, user, *arguments, folder=ROOT):
    """The command line as this user, run in a folder."""
    environment = {**stack.environment, "REDIS_URL": url_of(stack.redis, user)}
    ran = here.cancelctl(*arguments, env=environment, folder=folder)
    assert "NOPERM" not in ran.stderr + ran.stdout
    return ran


# -- normal work is never denied


def test_each_user_does_its_own_work_without_one_denial(guarded, as_producer):
    guarded.denials()
    # The producer, and the worker with it: one, many, again, in both lanes, refused, unresolved, read back.
    [one] = place(guarded)
    many = place(guarded, 50)
    elsewhere = place(guarded, 3, exchange_index=2)
    [lost] = place(guarded)
    guarded.control.fault("drop_after", order_id=lost, times=1)
    guarded.control.fault("http_429", order_id=many[0], times=1)
    assert as_producer.cancel(one).result(timeout=PATIENCE_S).outcome == "canceled"
    assert as_producer.cancel(one, requested_by="again").result(timeout=PATIENCE_S).outcome == "canceled"
    scattered = [{"order_id": order_id, "exchange_index": 2} for order_id in elsewhere]
    pending = as_producer.cancel_many([*many, *scattered, lost], lane=Lane.RISK)
    results = pending.results(timeout=PATIENCE_S)
    assert {result.outcome for result in results} == {"canceled"}
    [late] = place(guarded)
    guarded.control.configure(exchange_paused=True)
    assert as_producer.cancel(late, deadline_s=0.2).result(timeout=PATIENCE_S).outcome == "unresolved"
    assert [each.order_id for each in as_producer.open_cancels()] == [late]
    as_producer.cancel(late, lane=Lane.RISK, reason="joined")
    wait_until(as_producer.held_back, within_s=PATIENCE_S, what="it is seen that cancels are held back")
    with pytest.raises(NotSettled):
        as_producer.cancel(late, deadline_s=5).result(timeout=0.1)
    monitor = {
        "open": cancelctl(guarded, "monitor", "open", "--json"),
        "status": cancelctl(guarded, "monitor", "status", "--json", one, late),
        "dead": cancelctl(guarded, "monitor", "dead", "--json"),
        "top": cancelctl(guarded, "monitor", "top", "--json"),
    }
    assert json.loads(monitor["top"].stdout)["workers"]
    assert late in monitor["open"].stdout
    assert "canceled" in monitor["status"].stdout
    guarded.control.configure(exchange_paused=False)
    assert as_producer.status(one).result is not None
    wait_until(
        lambda: as_producer.status(late).open is None, within_s=PATIENCE_S, what="the late one is settled"
    )
    # Mass cancels, planned only and for real.
    place(guarded, 20, ticker="KXMASS-26NOV22-A")
    scope = {"tickers": ["KXMASS-26NOV22-A"]}
    assert as_producer.mass_cancel(scope, dry_run=True).result(timeout=PATIENCE_S)["plan"]["orders"] == 20
    assert as_producer.mass_cancel(scope).result(timeout=PATIENCE_S)["flat"] is True
    assert as_producer.mass_cancels()
    # A producer that has none of our code.
    for user in ("producer", "raw-producer"):
        url = url_of(guarded.redis, user)
        with Celery("raw", broker=url, backend=url, set_as_current=False) as raw:
            [order_id, *others] = place(guarded, 4)
            sent = raw.send_task("cancel_order", kwargs={"order_id": order_id}, queue="cancels")
            assert sent.get(timeout=PATIENCE_S)["outcome"] == "canceled"
            sent = raw.send_task("cancel_orders", args=[[*others, "?"]], queue="cancels", priority=9)
            assert len(sent.get(timeout=PATIENCE_S)) == 4
            assert raw.AsyncResult(f"cancel:{others[0]}").get(timeout=PATIENCE_S)["outcome"] == "canceled"
    # What nobody understands is kept, which the monitor sees.
    with as_user(guarded.redis, "producer") as producer, as_user(guarded.redis, "monitor") as monitor:
        producer.lpush("cancels", "not a message")
        kept = wait_until(lambda: monitor.lrange("kalshi-cancel:unreadable", 0, 0), what="it is kept")
        assert "not a message" in kept[0]
        assert monitor.llen("cancels") == 0
    assert guarded.denials() == set()


def test_the_worker_sees_how_all_workers_stand_without_one_denial(guarded, as_producer):
    guarded.denials()
    [open_still] = place(guarded)
    guarded.control.fault("http_429", order_id=open_still)
    as_producer.cancel(open_still, exchange_index=1)
    assert as_producer.mass_cancel({"order_ids": place(guarded)}).result(timeout=PATIENCE_S)["flat"] is True
    settings = RedisSettings.from_env({"REDIS_URL": url_of(guarded.redis, "worker")})
    with closing(connect(settings)) as server:
        state = Stats(server, settings).look()
    assert state.lanes[Lane.STRATEGY].open == 1
    assert state.mass_cancels["flat"] >= 1
    assert {"read", "write"} < set(state.buckets)
    assert guarded.denials() == set()
    guarded.control.clear_faults()
    assert next(as_producer.results([open_still], timeout=PATIENCE_S)).order_id == open_still


def test_a_dead_letter_is_kept_seen_and_revived_without_one_denial(guarded, as_producer):
    guarded.denials()
    [order_id] = place(guarded)
    [worker] = guarded.workers
    settings = RedisSettings.from_env({"REDIS_URL": url_of(guarded.redis, "worker")})
    with frozen(worker), as_user(guarded.redis, "worker") as server:
        server.delete("kalshi-cancel:idle")  # or it would be claimed for the worker
        as_producer.cancel(order_id)
        store = CancelStore(server, settings)  # in a worker's senders, and with its permissions
        claim = claim_from(store, list(Lane), at_most=1, lease_s=1, exchange_ms=None)
        assert store.conclude([MakeDeadLetter(entry, "") for entry in claim.entries]) == [True]
        assert [each.order_id for each in as_producer.dead_letters()] == [order_id]
        assert order_id in cancelctl(guarded, "monitor", "dead", "--json").stdout
    assert as_producer.retry([order_id]) == [order_id]
    wait_until(lambda: as_producer.status(order_id).result, within_s=PATIENCE_S, what="it is settled")
    assert guarded.control.order(order_id)["status"] == "canceled"
    assert guarded.denials() == set()


def test_the_audit_log_is_appended_to_read_exported_and_trimmed_without_one_denial(
    guarded, as_producer, tmp_path
):
    guarded.denials()
    as_producer.retry(["nobody"], why="drill")
    as_producer.mass_cancel({"order_ids": ["nobody"]}, dry_run=True).result(timeout=PATIENCE_S)
    settings = RedisSettings.from_env({"REDIS_URL": url_of(guarded.redis, "worker")})
    with as_user(guarded.redis, "worker") as server:
        AuditLog(server, settings).trim(max_age_s=3600, max_entries=1_000_000)
    for user in ("monitor", "auditor"):
        assert "intact entries" in cancelctl(guarded, user, "audit", "verify").stdout
        assert "retry by test: drill" in cancelctl(guarded, user, "history", "nobody").stdout
    exported = tmp_path / "audit.jsonl"
    done = cancelctl(guarded, "auditor", "audit", "export", "--out", str(exported))
    assert (done.returncode, exported.stat().st_size > 0) == (0, True)
    with as_user(guarded.redis, "admin") as admin:
        assert admin.get(f"{AUDIT_LOG}:exported")
    assert guarded.denials() == set()


# What the commands take that the documentation names without it.
ARGUMENTS = {
    "cancelctl status": "ORDER",
    "open": "",
    "dead": "",
    "top": "--once",
    "mass list": "",
    "mass show": "REQUEST",
    "cancelctl history": "ORDER",
    "history": "ORDER",
    "audit verify": "",
    "audit export": "--out audit.jsonl",
    "doctor --producer": "",
}


@pytest.mark.parametrize("user", ["monitor", "auditor"])
def test_a_user_may_run_every_command_that_it_is_documented_for(guarded, as_producer, user, tmp_path):
    [documented] = re.findall(
        rf"^\| `{user}` \| (.*?) \|", (USERS_FILE.parent / "README.md").read_text(), re.MULTILINE
    )
    [order_id] = place(guarded)
    pending = as_producer.mass_cancel({"order_ids": [order_id]})
    assert pending.result(timeout=PATIENCE_S)["flat"]
    guarded.denials()
    for command in re.findall(r"`([^`]+)`", documented):
        words = f"{command.removeprefix('cancelctl ')} {ARGUMENTS[command]}".split()
        words = [{"ORDER": order_id, "REQUEST": pending.request_id}.get(word, word) for word in words]
        ran = cancelctl(guarded, user, *words, folder=tmp_path)
        assert ran.returncode == Exit.SETTLED, (command, ran.stdout, ran.stderr)
        assert ran.stdout or command in {"open", "dead", "audit export"}, command
    assert {what for _, what, _ in guarded.denials()} <= {"config|get"}, "the doctor's, which it says"


def test_the_audit_commands_that_are_shown_run_as_the_auditor(guarded, as_producer, tmp_path):
    [shown] = re.findall(
        r"^```sh\n(cancelctl history .*?)^```",
        (ROOT / "docs/how-to/operating.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    [order_id] = place(guarded)
    assert as_producer.cancel(order_id).result(timeout=PATIENCE_S).outcome == "canceled"
    guarded.denials()
    for line in shown.splitlines():
        command, _, file = line.partition(" > ")
        words = [order_id if word.endswith("...") else word for word in shlex.split(command, comments=True)]
        ran = cancelctl(guarded, "auditor", *words[1:], folder=tmp_path)
        assert ran.returncode == Exit.SETTLED, (line, ran.stderr)
        if file:
            (tmp_path / file).write_text(ran.stdout)
    assert guarded.denials() == set()
    written = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(written) == {"audit.jsonl", "day.csv", "audit.parquet"}
    assert min(written.values()) > 0


def test_the_live_view_runs_at_a_terminal_as_the_user_that_may_only_look(guarded):
    guarded.denials()
    terminal = Terminal({"REDIS_URL": url_of(guarded.redis, "monitor")})
    try:
        terminal.wait_for(r"^WORKERS  1 with \d+ senders; every breaker is closed$")
        terminal.wait_for_frames(2)  # which go on where the first look at the audit log has ended
        assert "\nOLD: " not in terminal.text
        assert terminal.text.startswith(f"cancelctl top  kalshi-cancel at 127.0.0.1:{guarded.redis.port}/0  ")
        terminal.type(b"q")
        assert terminal.process.wait(PATIENCE_S) == Exit.SETTLED
    finally:
        terminal.close()
    assert guarded.denials() == set()


@contextmanager
def frozen(part):
    part.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        part.signal(signal.SIGCONT)


def test_a_message_of_a_worker_that_vanished_comes_back_without_one_denial(guarded, as_producer):
    guarded.denials()
    [order_id] = place(guarded)
    message = uuid.uuid4().hex
    with as_user(guarded.redis, "worker") as server:
        # As a worker leaves it that took it long ago and was killed.
        server.hset("kalshi-cancel:taken", message, "cancels\n" + json.dumps(raw_message(order_id)))
        server.zadd("kalshi-cancel:taken:until", {message: 1})
    wait_until(lambda: as_producer.status(order_id).result, within_s=PATIENCE_S, what="it is settled")
    assert guarded.denials() == set()


def raw_message(order_id):
    task_id = str(uuid.uuid4())
    return {
        "body": json.dumps([[], {"order_id": order_id}, {}]),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": "cancel_order", "id": task_id},
        "properties": {
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": {"exchange": "", "routing_key": "cancels"},
        },
    }


def test_the_doctor_works_for_every_user_and_what_it_may_not_see_it_says(guarded):
    guarded.denials()
    for user in ("producer", "monitor"):
        ran = here.cancelctl("doctor", "--producer", env={"REDIS_URL": url_of(guarded.redis, user)})
        assert ran.returncode in (0, 1), ran.stderr
        assert "redis" in ran.stdout
    assert {(user, what) for user, what, _ in guarded.denials()} <= {
        ("producer", "info"),
        ("monitor", "config|get"),
    }


# -- nobody does another's


ENTRY = "kalshi-cancel:pending:x"
RECORD = "celery-task-meta-cancel:x"
AUDIT_LOG = "kalshi-cancel:audit"
DENIED_TO_ALL = (
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("KEYS", "*"),
    ("CONFIG", "SET", "appendonly", "no"),
    ("CONFIG", "GET", "requirepass"),
    ("ACL", "LIST"),
    ("ACL", "SETUSER", "worker", "allkeys"),
    ("SHUTDOWN", "NOSAVE"),
    ("MONITOR",),
    ("CLIENT", "LIST"),
    ("CLIENT", "KILL", "TYPE", "normal"),
    ("SCRIPT", "FLUSH"),
    ("FUNCTION", "LIST"),
    ("EVAL", "return 1", "0"),
    ("REPLICAOF", "127.0.0.1", "1"),
    ("SAVE",),
    ("MIGRATE", "127.0.0.1", "1", "x", "0", "1"),
    ("SWAPDB", "0", "1"),
    ("DUMP", ENTRY),
    ("RESTORE", ENTRY, "0", "x"),
    ("SORT", "cancels"),
    ("GET", "somebody-elses"),
    ("SET", "somebody-elses", "x"),
    ("LPUSH", "/0.celery.pidbox", "x"),
    ("PUBLISH", "/0.celery.pidbox", "x"),
    ("SUBSCRIBE", "/0.celery.pidbox"),
    ("PSUBSCRIBE", "*"),
)
DENIED_TO = {
    "worker": (("SUBSCRIBE", "celery-task-meta-x"), ("XDEL", AUDIT_LOG, "1-1")),
    "producer": (
        ("BRPOP", "cancels", "1"),
        ("RPOP", "cancels"),
        ("LRANGE", "cancels", "0", "-1"),
        ("DEL", "cancels"),
        ("LTRIM", "cancels", "1", "0"),
        ("HGETALL", "kalshi-cancel:taken"),
        ("DEL", "kalshi-cancel:taken"),
        ("SET", RECORD, "x"),
        ("SETEX", RECORD, "9", "x"),
        ("HSET", RECORD, "x", "y"),
        ("LPUSH", RECORD, "x"),
        ("RENAME", "kalshi-cancel:dead:x", RECORD),
        ("PUBLISH", RECORD, "x"),
        ("DEL", "celery-task-meta-mass:x"),
        ("DEL", "kalshi-cancel:due:strategy:write"),
        ("DEL", "kalshi-cancel:mass_cancels:open"),
        ("SREM", "kalshi-cancel:mass_cancels:open", "x"),
        ("HSET", "kalshi-cancel:mass:x", "report", "{}"),
        ("HSET", "kalshi-cancel:limits", "write_refill", "1e9"),
        ("HSET", "kalshi-cancel:bucket:read", "tokens", "1e9"),
        ("DEL", "kalshi-cancel:bucket:write"),
        ("HSET", "kalshi-cancel:idle", "a-worker", "of my own"),
        ("INCR", "kalshi-cancel:fence"),
        ("LPUSH", "kalshi-cancel:unreadable", "x"),
        ("LRANGE", "kalshi-cancel:unreadable", "0", "-1"),
        ("INFO",),
        ("SCAN", "0"),
        ("XRANGE", AUDIT_LOG, "-", "+"),
        ("XDEL", AUDIT_LOG, "1-1"),
        ("XTRIM", AUDIT_LOG, "MAXLEN", "0"),
        ("DEL", AUDIT_LOG),
        ("SET", f"{AUDIT_LOG}:base", "x"),
        ("SET", f"{AUDIT_LOG}:exported", "1-1"),
    ),
    "auditor": (
        ("XADD", AUDIT_LOG, "*", "kind", "x"),
        ("XDEL", AUDIT_LOG, "1-1"),
        ("XTRIM", AUDIT_LOG, "MAXLEN", "0"),
        ("DEL", AUDIT_LOG),
        ("SET", f"{AUDIT_LOG}:head", "x"),
        ("SET", f"{AUDIT_LOG}:base", "x"),
        ("GET", RECORD),
        ("HGETALL", ENTRY),
        ("LPUSH", "cancels", "x"),
        ("SCRIPT", "LOAD", "return 1"),
        ("MULTI",),
    ),
    "raw-producer": (
        ("BRPOP", "cancels", "1"),
        ("LPUSH", "risk", "x"),
        ("LLEN", "risk"),
        ("HGETALL", "kalshi-cancel:taken"),
        ("SET", RECORD, "x"),
        ("DEL", RECORD),
        ("PUBLISH", RECORD, "x"),
        ("HGET", ENTRY, "request"),
        ("HSET", ENTRY, "request", "{}"),
        ("ZREM", "kalshi-cancel:due:strategy:write", "x"),
        ("SMEMBERS", "kalshi-cancel:paths"),
        ("SCRIPT", "LOAD", "return 1"),
        ("EVALSHA", "0" * 40, "0"),
        ("INFO",),
        ("SCAN", "0"),
    ),
    "monitor": (
        ("LPUSH", "cancels", "x"),
        ("BRPOP", "cancels", "1"),
        ("LRANGE", "cancels", "0", "-1"),
        ("HDEL", "kalshi-cancel:taken", "x"),
        ("SET", RECORD, "x"),
        ("DEL", RECORD),
        ("HSET", ENTRY, "request", "{}"),
        ("ZADD", "kalshi-cancel:due:strategy:write", "0", "x"),
        ("DEL", "kalshi-cancel:unreadable"),
        ("PUBLISH", RECORD, "x"),
        ("EVAL", "return 1", "0"),
        ("EVALSHA", "0" * 40, "1", RECORD),
        ("SADD", "_kombu.binding.cancels", "x"),
        ("SREM", "_kombu.binding.risk", "x"),
        ("LPUSH", "celeryev.x", "x"),
        ("PUBLISH", "/0.celeryev/worker.heartbeat", "x"),
        ("XADD", AUDIT_LOG, "*", "kind", "x"),
        ("SET", f"{AUDIT_LOG}:exported", "1-1"),
    ),
}


@pytest.mark.parametrize("user", DENIED_TO)
def test_no_user_may_do_what_is_not_its_own(guarded, user):
    allowed = []
    with as_user(guarded.redis, user) as server:
        for command in (*DENIED_TO_ALL, *DENIED_TO[user]):
            with suppress(redis.exceptions.NoPermissionError):
                server.execute_command(*command)
                allowed.append(command)
    guarded.denials()
    assert allowed == []


def test_scripts_have_no_more_permissions_than_their_user(guarded):
    script = "return redis.call('SET', 'celery-task-meta-cancel:x', 'canceled')"
    with as_user(guarded.redis, "producer") as producer:
        sha = producer.script_load(script)
        with pytest.raises(redis.ResponseError, match=DENIED):
            producer.evalsha(sha, 0)
    guarded.denials()


def test_a_store_in_a_producers_hands_claims_and_settles_nothing(guarded, as_producer):
    guarded.control.configure(exchange_paused=True)
    [order_id] = place(guarded)
    as_producer.cancel(order_id)
    settings = RedisSettings.from_env({"REDIS_URL": url_of(guarded.redis, "producer")})
    with as_user(guarded.redis, "producer") as server:
        store = CancelStore(server, settings)
        with pytest.raises(StoreError, match=DENIED):
            claim_from(store, [Lane.STRATEGY], at_most=1, lease_s=1, exchange_ms=None)
        with pytest.raises(StoreError, match=DENIED):
            store.keep_unreadable("x")
    guarded.control.configure(exchange_paused=False)
    wait_until(lambda: as_producer.status(order_id).result, within_s=PATIENCE_S, what="it is settled")
    guarded.denials()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("requested_by", '[],"outcome":"canceled","status":"canceled","reduced_by":"99.00"'),
        ("requested_by", '{"x": [1]}'),
        ("requested_by", "no list"),
        ("reply_to", '["cancel:{other}", 7, "mass:{other}"]'),
        ("reply_to", "no list"),
    ],
)
def test_what_a_producer_writes_into_an_entry_forges_no_result(guarded, as_producer, field, value):
    order_id, other = place(guarded, 2)
    guarded.control.fill(order_id)
    [worker] = guarded.workers
    with frozen(worker), as_user(guarded.redis, "producer") as producer:
        as_producer.cancel(order_id)
        producer.hset(f"kalshi-cancel:pending:{order_id}", field, value.replace("{other}", other))
    result = as_producer.results([order_id], timeout=PATIENCE_S)
    assert [(each.outcome, each.status, str(each.reduced_by)) for each in result] == [
        ("too_late", "executed", "0.00")
    ]
    assert as_producer.status(other).result is None
    with as_user(guarded.redis, "admin") as admin:
        assert admin.exists(f"celery-task-meta-cancel:{other}", f"celery-task-meta-mass:{other}") == 0


@pytest.mark.parametrize("who", ["nobody", "the default user", "a wrong password", "the placeholder"])
def test_nobody_else_gets_in(guarded, who):
    credentials = {
        "nobody": {},
        "the default user": {"username": "default", "password": ""},
        "a wrong password": {"username": "worker", "password": "worker"},
        "the placeholder": {"username": "worker", "password": "SHA256-OF-WORKERS-PASSWORD"},
    }[who]
    once = Retry(NoBackoff(), 0)
    stranger = redis.Redis(port=guarded.redis.port, retry=once, **credentials)
    with stranger, pytest.raises(redis.AuthenticationError):
        stranger.get("x")
    guarded.denials()


@pytest.mark.parametrize("program", list(programs()))
def test_the_file_does_not_load_before_its_passwords_are_set(tmp_path, program):
    command = [program or valkey_server(), "--bind", "127.0.0.1", "--port", str(free_port())]
    command += ["--dir", tmp_path, "--aclfile", USERS_FILE]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ran.returncode != 0
    assert "ACL errors" in ran.stdout


def test_a_client_whose_user_may_not_do_it_says_so_and_what_it_wanted_was_not_accepted(guarded):
    with closing(CancelClient(url_of(guarded.redis, "monitor"))) as client:
        with pytest.raises(StoreError, match=DENIED) as refused:
            client.cancel(str(uuid.uuid4()))
        assert refused.value.may_be_accepted is False
    guarded.denials()


# -- TLS


class TlsDoor:
    """Ends TLS in front of a server that speaks none; counts the handshakes that came to pass."""

    def __init__(self, port, context):
        self._to = port
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.opened = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with suppress(OSError):
            while True:
                plain, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

    def _serve(self, plain):
        with suppress(OSError), self._context.wrap_socket(plain, server_side=True) as front:
            self.opened += 1
            with socket.create_connection(("127.0.0.1", self._to)) as back:
                threading.Thread(target=self._pump, args=(back, front), daemon=True).start()
                self._pump(front, back)

    @staticmethod
    def _pump(source, sink):
        with suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        for end in (source, sink):
            # The other direction's thread still reads: TLS that is ended beneath it is a ValueError there.
            with suppress(OSError):
                socket.socket.shutdown(end, socket.SHUT_RDWR)

    def close(self):
        self._listener.close()


@pytest.fixture
def door(stack, control, certificate):
    """TLS in front of the session's Redis."""
    with closing(TlsDoor(stack.redis.port, certificate[0])) as door:
        yield door


DATABASE = 14  # of its own: the session's worker must not serve what these workers are asked to


def test_a_worker_and_a_client_speak_tls_to_a_server_whose_certificate_they_are_told_to_trust(
    stack, control, door, certificate, order_id
):
    url = f"rediss://127.0.0.1:{door.port}/{DATABASE}?ssl_ca_certs={certificate[1]}"
    control.place(order_id)
    worker = stack.start_worker(REDIS_URL=url)
    try:
        with closing(CancelClient(url)) as client:
            assert client.cancel(order_id).result(timeout=PATIENCE_S).outcome == "canceled"
        assert door.opened >= 2
    finally:
        worker.stop()
        stack.workers.remove(worker)


UNTRUSTED = {
    "by default": ("127.0.0.1", ""),
    "when required": ("127.0.0.1", "?ssl_cert_reqs=required"),
    "of another name": ("localhost", "?ssl_ca_certs={trusted}"),
}


def test_a_worker_refuses_a_certificate_that_it_cannot_verify_and_says_so_in_one_line(
    stack, door, certificate, tmp_path
):
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker"]
    workers = []
    for number, (host, query) in enumerate(UNTRUSTED.values()):
        url = f"rediss://{host}:{door.port}/{DATABASE}" + query.format(trusted=certificate[1])
        environment = {**stack.environment, "REDIS_URL": url}
        workers.append(Part(command, log_path=tmp_path / f"worker{number}.log", env=environment))
    for worker in workers:
        assert worker.process.wait(PATIENCE_S) != 0
        [line] = [line for line in worker.log_text().splitlines() if "cannot start" in line]
        assert "certificate" in line.lower()
        assert "Traceback" not in worker.log_text()
    assert door.opened == 0


@pytest.mark.parametrize(("host", "query"), UNTRUSTED.values(), ids=UNTRUSTED)
def test_a_client_refuses_a_certificate_that_it_cannot_verify(door, certificate, order_id, host, query):
    url = f"rediss://{host}:{door.port}/{DATABASE}" + query.format(trusted=certificate[1])
    with closing(CancelClient(url)) as client, pytest.raises(StoreError, match=r"(?i)certificate"):
        client.cancel(order_id)
    assert door.opened == 0


@pytest.mark.parametrize(("host", "query"), UNTRUSTED.values(), ids=UNTRUSTED)
def test_celery_itself_verifies_the_certificate_for_its_queues_and_for_its_results(
    door, certificate, host, query
):
    url = f"rediss://{host}:{door.port}/{DATABASE}" + query.format(trusted=certificate[1])
    celery_url = RedisSettings.from_env({"REDIS_URL": url}).celery_url
    with Celery("x", broker=celery_url, backend=celery_url, set_as_current=False) as app:
        with app.connection_for_write() as broker, pytest.raises(Exception, match=r"(?i)certificate"):
            broker.connect()
        with pytest.raises(redis.ConnectionError, match=r"(?i)certificate"):
            app.backend.client.ping()
    assert door.opened == 0


# -- what is never accepted, from anybody


CONFIGURED = """
import json
from worker.app import app
app.finalize()
names = ["broker_url", "result_backend", "accept_content", "result_accept_content", "task_serializer"]
names += ["result_serializer", "event_serializer", "worker_enable_remote_control"]
print(json.dumps({name: app.conf[name] for name in names}))
"""


def configuration(stack, **environment):
    """What the worker's application is set to, as a process of its own sees it."""
    ran = subprocess.run(
        [sys.executable, "-c", CONFIGURED],
        cwd=ROOT,
        env={**stack.environment, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(ran.stdout)


def test_nothing_but_json_is_sent_or_accepted_anywhere(stack, client):
    conf = configuration(stack)
    assert conf["accept_content"] == conf["result_accept_content"] == ["json"]
    assert {conf["task_serializer"], conf["result_serializer"], conf["event_serializer"]} == {"json"}
    assert client._app.conf.accept_content == ["json"]
    assert client._app.conf.task_serializer == "json"
    packages = (ROOT / "kalshi_cancel", ROOT / "worker")
    sources = [*(path for folder in packages for path in folder.rglob("*.py")), ROOT / "celeryconfig.py"]
    imported = [
        path.name
        for path in sources
        if re.search(r"^\s*(import|from) (pickle|marshal|shelve|yaml)\b", path.read_text(), re.MULTILINE)
    ]
    assert imported == []


def test_nobody_controls_a_worker_from_afar(stack, control, client, celery_producer, order_id):
    assert configuration(stack)["worker_enable_remote_control"] is False
    worker = stack.workers[0]
    assert not celery_producer.control.inspect(timeout=0.5).ping()
    asked = time.monotonic()
    celery_producer.control.broadcast("shutdown")
    celery_producer.control.broadcast("pool_shrink", arguments={"n": 8})
    celery_producer.control.broadcast("cancel_consumer", arguments={"queue": "cancels"})
    celery_producer.control.revoke(f"cancel:{order_id}", terminate=True)
    control.place(order_id)
    assert client.cancel(order_id).result(timeout=PATIENCE_S).outcome == "canceled"
    assert time.monotonic() - asked < PATIENCE_S
    assert worker.process.poll() is None
