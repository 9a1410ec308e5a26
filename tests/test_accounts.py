"""Two accounts on one Redis do not mix: two exchanges, two groups of workers, the same order ids."""

from __future__ import annotations

import hashlib
import re
import subprocess
import threading
import uuid
from collections import Counter
from dataclasses import dataclass

import pytest
import redis
from celery import Celery
from test_readme import blocks, run_python, section

from kalshi_cancel.client import CancelClient, NotSettled
from kalshi_cancel.model.requests import Lane
from kalshi_cancel.settings.redis import RedisSettings
from trials.stack import ROOT, RedisServer, Stack, wait_until

PATIENCE_S = 30.0
ACL = ROOT / "deploy" / "redis"
OTHER = "acct-b"  # as in the README of the ACL file, and in docs/how-to/operating.md
OPERATING = (ROOT / "docs/how-to/operating.md").read_text()


def users(folder):
    """The users of both accounts, made as the README says; each one's password is its name."""
    commands = re.findall(r"```\n(.*?)```", (ACL / "README.md").read_text(), re.DOTALL)
    [command] = [each for each in commands if OTHER in each]
    command = command.replace("users.acl >", f"{ACL / 'users.acl'} >")
    subprocess.run(["sh", "-c", command], cwd=folder, check=True)
    lines = ((ACL / "users.acl").read_text() + (folder / "users-b.acl").read_text()).splitlines()
    path = folder / "both.acl"
    path.write_text("".join(re.sub(r"#SHA256\S+", "#" + password_of(line), line) + "\n" for line in lines))
    return path


def password_of(line):
    return hashlib.sha256(line.split()[1].encode()).hexdigest()


class Account(Stack):
    """An exchange with a key and workers of its own, on a Redis that is shared."""

    def __init__(self, folder, server, *, suffix, prefix=None):
        super().__init__(folder, environment={"KALSHI_READ_LAG_S": "0.2"})
        self.redis = server
        self._suffix = suffix
        self._prefix = {"KALSHI_KEY_PREFIX": prefix} if prefix else {}

    def url(self, user):
        name = user + self._suffix
        return self.redis.url.replace("redis://", f"redis://{name}:{name}@")

    @property
    def environment(self):
        return {**super().environment, "REDIS_URL": self.url("worker"), **self._prefix}

    def client(self, name):
        settings = RedisSettings.from_env({"REDIS_URL": self.url("producer"), **self._prefix})
        return CancelClient(settings, requested_by=name)

    def start(self, *, workers):
        self.start_exchange()
        for _ in range(workers):
            self.start_worker()
        return self


@dataclass
class Both:
    """The two accounts and a producer of each."""

    server: RedisServer
    a: Account
    b: Account
    ask_a: CancelClient
    ask_b: CancelClient

    def admin(self):
        return redis.Redis(port=self.server.port, username="admin", password="admin", decode_responses=True)

    def place(self, number, *, in_a=True, in_b=True):
        """The same orders at both exchanges; theirs have 10 contracts in A and 7 in B."""
        order_ids = [str(uuid.uuid4()) for _ in range(number)]
        for account, count, wanted in ((self.a, "10.00", in_a), (self.b, "7.00", in_b)):
            if wanted:
                account.control.place_many([{"order_id": each, "count": count} for each in order_ids])
        return order_ids


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accounts")
    options = ["--aclfile", str(users(folder)), "--acllog-max-len", "1000"]
    server = RedisServer(folder / "redis", options=options).start()
    a = Account(folder / "a", server, suffix="")
    b = Account(folder / "b", server, suffix="-b", prefix=OTHER)
    try:
        a.start(workers=2)
        b.start(workers=2)
        yield Both(server, a, b, a.client("a"), b.client("b"))
    finally:
        a.stop()
        b.stop()
        server.stop()


@pytest.fixture
def both(shared):
    """Both accounts at rest; at the end nothing was denied to anybody."""
    shared.a.control.reset()
    shared.b.control.reset()
    with shared.admin() as admin:
        admin.acl_log_reset()
        yield shared
        assert [(each["username"], each["context"], each["object"]) for each in admin.acl_log()] == []


def removed(results):
    return Counter((result.outcome, str(result.reduced_by), result.requested_by) for result in results)


def test_the_same_orders_of_two_accounts_are_each_canceled_at_their_own_exchange(both):
    order_ids = both.place(200)
    pending_a = both.ask_a.cancel_many(order_ids)
    pending_b = both.ask_b.cancel_many(order_ids, lane=Lane.RISK)
    assert removed(pending_a.results(PATIENCE_S)) == {("canceled", "10.00", ("a",)): 200}
    assert removed(pending_b.results(PATIENCE_S)) == {("canceled", "7.00", ("b",)): 200}
    for account in (both.a, both.b):
        calls = [call for call in account.control.calls() if call["operation"] in {"cancel", "batch"}]
        assert Counter(each for call in calls for each in call["order_ids"]) == Counter(order_ids)


def test_a_waiter_of_one_account_is_not_told_of_the_others_order_of_the_same_id(both):
    """Also one that waits by Celery's own means: channels are the same for all databases of a server."""
    [order_id] = both.place(1, in_b=False)
    both.b.control.configure(exchange_paused=True)
    waiting = both.ask_b.cancel(order_id, deadline_s=60)
    url = both.b.url("raw-producer")
    heard = []
    with Celery("raw", broker=url, backend=url, set_as_current=False) as raw:
        raw.conf.result_backend_transport_options = {"global_keyprefix": f"{OTHER}:"}
        listening = threading.Thread(
            target=lambda: heard.append(
                raw.AsyncResult(f"cancel:{order_id}").get(timeout=PATIENCE_S)["outcome"]
            )
        )
        listening.start()
        channel = f"{OTHER}:celery-task-meta-cancel:{order_id}"
        with both.admin() as admin:
            wait_until(lambda: admin.pubsub_numsub(channel)[0][1], what="somebody listens")
        assert both.ask_a.cancel(order_id).result(PATIENCE_S).outcome == "canceled"
        with pytest.raises(NotSettled):
            waiting.result(timeout=1.0)
        assert heard == []
        both.b.control.configure(exchange_paused=False)
        assert waiting.result(timeout=PATIENCE_S).outcome == "unknown_order"
        listening.join()
    assert heard == ["unknown_order"]


def test_a_mass_cancel_makes_one_account_flat_and_leaves_the_other_alone(both):
    order_ids = both.place(30)
    report = both.ask_b.mass_cancel({"everything": True}).result(timeout=PATIENCE_S)
    assert (report["flat"], report["orders_affected"], report["contracts_canceled"]) == (True, 30, "210.00")
    assert {both.a.control.order(each)["status"] for each in order_ids} == {"resting"}
    assert both.ask_a.mass_status(report["request_id"]) is None
    assert report["request_id"] not in [request_id for request_id, _, _ in both.ask_a.mass_cancels()]


def test_a_raw_producer_reaches_the_account_whose_prefix_it_names(both, tmp_path):
    [code] = blocks(section("Several accounts", OPERATING), "python")
    [order_id] = both.place(1)
    code = code.replace("redis://localhost:6379/0", both.b.url("raw-producer")).replace("5b1f...", order_id)
    assert run_python(code, tmp_path).split() == ["canceled"]
    assert both.b.control.order(order_id)["status"] == "canceled"
    assert both.a.control.order(order_id)["status"] == "resting"


def test_a_raw_message_on_the_second_accounts_risk_queue_is_in_its_risk_lane(both):
    order_ids = both.place(2)
    both.b.control.configure(exchange_paused=True)
    url = both.b.url("producer")
    with Celery("raw", broker=url, backend=url, set_as_current=False) as raw:
        raw.conf.broker_transport_options = {"global_keyprefix": f"{OTHER}:"}
        for order_id, lane in zip(order_ids, Lane, strict=True):
            raw.send_task(
                "cancel_order",
                kwargs={"order_id": order_id, "deadline_s": 60},
                queue=lane.queue,
                ignore_result=True,
            )
    wait_until(lambda: len(list(both.ask_b.open_cancels())) == 2, what="both are in the cancel store")
    lanes = {each.order_id: each.lane for each in both.ask_b.open_cancels()}
    assert lanes == dict(zip(order_ids, Lane, strict=True))
    assert list(both.ask_a.open_cancels()) == []
    both.b.control.configure(exchange_paused=False)
    assert [each.outcome for each in both.ask_b.results(order_ids, timeout=PATIENCE_S)] == ["canceled"] * 2


def test_messages_of_a_killed_worker_come_back_to_their_own_account(both):
    with both.admin() as admin:
        for worker in both.b.workers:
            worker.kill()
        [order_id] = both.place(1)
        url = both.b.url("raw-producer")
        with Celery("raw", broker=url, backend=url, set_as_current=False) as raw:
            raw.conf.broker_transport_options = {"global_keyprefix": f"{OTHER}:"}
            raw.send_task("cancel_order", kwargs={"order_id": order_id}, queue="cancels", ignore_result=True)
        [message] = admin.lrange(f"{OTHER}:cancels", 0, -1)
        # As a worker leaves it that has taken it and dies.
        admin.delete(f"{OTHER}:cancels")
        admin.hset(f"{OTHER}:taken", "tag", f"{OTHER}:cancels\n{message}")
        admin.zadd(f"{OTHER}:taken:until", {"tag": 1})
        both.b.start_worker()
        result = both.ask_b.results([order_id], timeout=PATIENCE_S)
        assert [each.outcome for each in result] == ["canceled"]
        assert both.a.control.order(order_id)["status"] == "resting"
        assert both.ask_a.status(order_id).result is None


def test_every_key_of_the_second_account_begins_with_its_prefix(both):
    names = ("kalshi-cancel:", "celery-task-meta-", "cancels", "risk", "_kombu.", f"{OTHER}:")
    [order_id] = both.place(1)
    both.ask_b.cancel(order_id).result(PATIENCE_S)
    request_id = both.ask_b.mass_cancel({"everything": True}).result(PATIENCE_S)["request_id"]
    with both.admin() as admin:
        keys = set(admin.scan_iter(count=1000))
    assert {key for key in keys if not key.startswith(names)} == set()
    theirs = {key for key in keys if order_id in key or request_id in key}
    assert len(theirs) >= 3
    assert {key for key in theirs if not key.startswith(f"{OTHER}:")} == set()


@pytest.mark.parametrize("user", ["worker", "producer", "raw-producer", "monitor"])
def test_the_users_of_one_account_may_not_touch_the_other(shared, user):
    for account, theirs in ((shared.a, f"{OTHER}:"), (shared.b, "")):
        with redis.Redis.from_url(account.url(user)) as server:
            for ask in (
                lambda server=server, theirs=theirs: server.lpush(f"{theirs}cancels", "x"),
                lambda server=server, theirs=theirs: server.get(f"{theirs}celery-task-meta-x"),
                lambda server=server, theirs=theirs: server.publish(f"{theirs}celery-task-meta-x", "x"),
            ):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    ask()
