"""Redis behind Sentinels: a failover loses nothing that was replicated, and everybody goes on by himself."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections import Counter
from contextlib import closing
from typing import Self

import pytest
import redis
from celery import Celery
from crew import ENVIRONMENT, PATIENCE_S, ids, wait_ready
from here import cancelctl

from kalshi_cancel.client import CancelClient
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store.scripts import StoreError, celery_options
from trials.failover import DOWN_AFTER_MS, WatchedRedis
from trials.stack import ROOT, Stack, wait_until

# Measured: 2.5 to 5.5 s. Sentinels that get no time on a busy machine take the longer to agree.
FAILOVER_S = DOWN_AFTER_MS / 1000 + 14.0
NOTICED_S = 5.0  # measured: 0.1 to 0.2 s; with Celery's own patience 8
PRODUCER_S = 2.0  # promised to a producer, whatever Redis does


class Guarded:
    """Sentinels, their Redis, the exchange and workers."""

    def __init__(self, folder, **how) -> None:
        self.redis = WatchedRedis(folder / "redis", **how).start()
        self.settings = RedisSettings.from_env({"REDIS_URL": self.redis.url, "KALSHI_WAIT_REPLICAS": "1"})
        workers_url = self.redis.url.replace("producer:", "worker:")
        self.stack = Stack(folder, environment={**ENVIRONMENT, "REDIS_URL": workers_url})
        self.control = self.stack.control
        self.client = CancelClient(self.settings, requested_by="test")

    def start(self) -> Self:
        """Starts the exchange and two workers."""
        self.stack.start_exchange()
        self.workers = [self.stack.spawn_worker() for _ in range(2)]
        for worker in self.workers:
            wait_ready(worker)
        return self

    def place(self, number: int) -> list[str]:
        """The ids of so many resting orders."""
        order_ids = ids(number)
        self.control.place_many([{"order_id": order_id} for order_id in order_ids])
        return order_ids

    def sent(self) -> int:
        """How many cancels have reached the exchange."""
        return len(self.control.calls(operation="cancel")) + len(self.control.calls(operation="batch"))

    def accept(self, order_id: str):
        """The pending cancel, asked for again and again as a producer should."""
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self.client.cancel(order_id)
            except StoreError:
                assert time.monotonic() < give_up

    def close(self) -> None:
        """Ends everything."""
        self.client.close()
        for server in self.redis.servers:
            server.part.signal(signal.SIGCONT)
        self.stack.stop()
        self.redis.stop()


@pytest.fixture
def guarded(tmp_path):
    with closing(Guarded(tmp_path)) as guarded:
        yield guarded.start()
        for worker in guarded.workers:
            sys.stdout.write(f"--- {worker.log_path.name}\n{worker.log_text()[-5000:]}\n")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """For tests that leave Redis and its Sentinels in peace."""
    with closing(Guarded(tmp_path_factory.mktemp("undisturbed"))) as guarded:
        yield guarded.start()


def killed(guarded, old) -> None:
    old.kill()


def moved_on_purpose(guarded, old) -> None:
    with guarded.redis.ask() as sentinel:
        sentinel.execute_command("SENTINEL FAILOVER", "cancels", "COORDINATED")


def moved_at_once(guarded, old) -> None:
    with guarded.redis.ask() as sentinel:
        sentinel.execute_command("SENTINEL", "FAILOVER", "cancels")


def frozen(guarded, old) -> None:
    old.part.signal(signal.SIGSTOP)


@pytest.mark.parametrize("trouble", [killed, moved_on_purpose, moved_at_once, frozen])
def test_a_failover_under_load_loses_nothing_that_was_replicated_and_work_goes_on_by_itself(guarded, trouble):
    guarded.control.configure(latency_s=0.05)
    old = guarded.redis.primary()
    order_ids = guarded.place(150)
    pending = guarded.client.cancel_many(order_ids)
    wait_until(lambda: guarded.sent() >= 10, what="some cancels sent")
    trouble(guarded, old)
    began = time.monotonic()
    wait_until(lambda: guarded.redis.primary() is not old, what="another primary")
    [one_more] = guarded.place(1)
    result = guarded.accept(one_more).result(PATIENCE_S)
    took_s = time.monotonic() - began
    print(f"{trouble.__name__}: the next cancel is settled after {took_s:.1f} s")
    assert result.outcome == "canceled"
    assert took_s <= FAILOVER_S
    outcomes = Counter(result.outcome for result in pending.results(PATIENCE_S))
    assert outcomes == {"canceled": 150}
    assert {guarded.control.order(order_id)["status"] for order_id in order_ids} == {"canceled"}
    assert [worker.process.poll() for worker in guarded.workers] == [None, None]
    if trouble is killed:
        old.start()
    old.part.signal(signal.SIGCONT)
    # (On a busy machine the Sentinels may move it once more, back to the old one.)
    wait_until(guarded.redis.is_settled, what="one primary that all agree on, with its replicas")
    assert guarded.accept(*guarded.place(1)).result(PATIENCE_S).outcome == "canceled"


def test_raw_messages_do_not_wait_until_celerys_own_connection_notices_that_the_primary_is_frozen(guarded):
    before, after = guarded.place(2)
    publish(guarded, before)
    wait_until(lambda: guarded.control.order(before)["status"] == "canceled", what="messages are taken")
    old = guarded.redis.primary()
    old.part.signal(signal.SIGSTOP)
    wait_until(lambda: guarded.redis.primary() is not old, what="another primary")
    publish(guarded, after)
    began = time.monotonic()
    wait_until(lambda: guarded.control.order(after)["status"] == "canceled", what="the message is taken")
    assert time.monotonic() - began <= NOTICED_S


def publish(guarded, order_id) -> None:
    """As any Celery producer does, over a connection of its own."""
    app = Celery(broker=guarded.settings.celery_url)
    app.conf.broker_transport_options = celery_options(guarded.settings)
    with app.connection_for_write() as connection:
        app.send_task("cancel_order", kwargs={"order_id": order_id}, queue="cancels", connection=connection)


def test_a_failover_that_is_not_coordinated_loses_nothing_accepted_and_makes_no_outcome_false(guarded):
    guarded.control.configure(latency_s=0.02)
    singles, swept = [], ids(600)
    guarded.control.place_many([{"order_id": each, "ticker": "KXMASS-26NOV22-T1"} for each in swept])
    old = guarded.redis.primary()
    longest_s, first_refused = 0.0, None
    while len(singles) < 300 or guarded.redis.primary() is old:
        at, [order_id] = len(singles), guarded.place(1)
        singles.append(order_id)
        if at == 60:
            pending = guarded.client.mass_cancel({"series": "KXMASS"})
        if at == 70:
            moved_at_once(guarded, old)
        while True:
            try:
                guarded.client.cancel(order_id, deadline_s=PATIENCE_S)
                break
            except StoreError:
                first_refused = first_refused or time.monotonic()
        if first_refused is not None:
            longest_s, first_refused = max(longest_s, time.monotonic() - first_refused), None
    results = {each.order_id: each for each in guarded.client.results(singles, timeout=PATIENCE_S)}
    report = pending.result(timeout=PATIENCE_S)
    print(f"{len(singles)} singles, refused for {longest_s:.1f} s at most")
    assert Counter(each.outcome for each in results.values()) == {"canceled": len(singles)}
    assert {each["order_id"] for each in report["affected"]} == set(swept)
    assert report["flat"]
    assert longest_s <= FAILOVER_S


def test_a_raw_producer_and_a_hostile_one_are_served_as_by_a_single_redis(undisturbed):
    [order_id] = undisturbed.place(1)
    url, options = undisturbed.settings.celery_url, celery_options(undisturbed.settings)
    with Celery("raw", broker=url, backend=url, set_as_current=False) as app:
        app.conf.update(broker_transport_options=options, result_backend_transport_options=options)
        with undisturbed.redis.primary().client() as server:
            server.lpush("cancels", "{this is no message")
        sent = app.send_task("cancel_order", [order_id], queue="cancels")
        assert sent.get(timeout=PATIENCE_S)["outcome"] == "canceled"
        refused = app.send_task("cancel_order", ["no/id"], queue="cancels")
        assert refused.get(timeout=PATIENCE_S)["outcome"] == "refused"
    assert [worker.process.poll() for worker in undisturbed.workers] == [None, None]


def test_what_no_replica_has_is_not_called_accepted(guarded):
    old = guarded.redis.primary()
    replicas = [server for server in guarded.redis.servers if server is not old]
    [order_id, other] = guarded.place(2)
    for replica in replicas:
        replica.part.signal(signal.SIGSTOP)
    asked = time.monotonic()
    with pytest.raises(StoreError, match="only 0 of 1 replicas") as told:
        guarded.client.cancel(order_id)
    assert told.value.may_be_accepted
    assert time.monotonic() - asked <= PRODUCER_S
    with pytest.raises(StoreError, match="only 0 of 1 replicas"):
        guarded.client.mass_cancel({"order_ids": [other]})
    replicas[0].part.signal(signal.SIGCONT)
    assert guarded.accept(order_id).result(PATIENCE_S).outcome == "canceled"


def test_sentinels_that_are_gone_do_not_keep_anybody_from_the_primary(guarded):
    guarded.redis.sentinels[0].kill()
    guarded.redis.sentinels[1].signal(signal.SIGSTOP)
    asked = time.monotonic()
    with closing(CancelClient(guarded.settings)) as client:
        [order_id] = guarded.place(1)
        pending = client.cancel(order_id)
        assert time.monotonic() - asked <= PRODUCER_S
        assert pending.result(PATIENCE_S).outcome == "canceled"
    worker = guarded.stack.start_worker()
    assert worker.stop() == 0


def test_without_any_sentinel_everybody_says_so_in_time(guarded, tmp_path):
    for sentinel in guarded.redis.sentinels:
        sentinel.kill()
    with closing(CancelClient(guarded.settings)) as client:
        asked = time.monotonic()
        with pytest.raises(
            StoreError, match=r"^not all Sentinels answer, and none has a primary 'cancels'"
        ) as told:
            client.cancel(*ids(1))
        assert not told.value.may_be_accepted
        assert time.monotonic() - asked <= PRODUCER_S
    worker = guarded.stack.spawn_worker()
    assert worker.process.wait(PATIENCE_S) != 0
    assert "cannot start: no Redis at sentinel://127.0.0.1" in worker.log_text()


def test_with_users_of_their_own_replicas_and_sentinels_do_their_work_as_documented(tmp_path):
    page = (ROOT / "docs/how-to/redis.md").read_text()
    [replica, sentinel] = re.findall(r"`([^`]*\+p(?:sync|ing)[^`]*)`", page)
    users = (ROOT / "deploy/redis/users.acl").read_text()
    text = re.sub(r"#SHA256-OF-[A-Z-]+-PASSWORD", ">secret", users)
    for name, rules in (("replica", replica), ("sentinel", sentinel)):
        text += f"user {name} on >secret resetchannels -@all {rules.replace(chr(92), '')}\n"
    (tmp_path / "users.acl").write_text(text)
    options = ["--aclfile", str(tmp_path / "users.acl"), "--masteruser", "replica", "--masterauth", "secret"]
    lines = ["sentinel auth-user cancels sentinel", "sentinel auth-pass cancels secret"]
    with closing(Guarded(tmp_path, options=options, lines=lines, login="producer:secret@")) as guarded:
        guarded.start()
        old = guarded.redis.primary()
        assert guarded.accept(*guarded.place(1)).result(PATIENCE_S).outcome == "canceled"
        old.kill()
        wait_until(lambda: guarded.redis.primary() is not old, what="another primary")
        assert guarded.accept(*guarded.place(1)).result(PATIENCE_S).outcome == "canceled"
        admin = redis.Redis(port=guarded.redis.primary().port, username="admin", password="secret")
        with admin:
            assert [each[b"username"] for each in admin.execute_command("ACL LOG")] == []


def test_the_command_line_finds_its_way(undisturbed):
    [order_id] = undisturbed.place(1)
    for command, code in (
        (["cancel", order_id], 0),
        (["status", order_id], 0),
        (["doctor", "--producer"], 0),
    ):
        done = cancelctl(*command, env=undisturbed.stack.environment)
        assert done.returncode == code, done.stdout + done.stderr
