"""Key rotation: id and key are replaced on disk while workers work, by the workers that are there."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
import uuid
from collections import Counter

import pytest
from crew import PATIENCE_S, Crew

from trials.stack import KEY_ID, Keys, wait_until

CALL_DEADLINE_S = 2.0
NOTICED_S = 2.0  # promised: a look every second, and a read at the exchange
TRY_AGAIN_S = 5.0
NOT_USED = "event=key_not_used"


class Mount:
    """A folder with an id and a key, swapped as a whole by a symbolic link, as Kubernetes mounts secrets."""

    def __init__(self, folder):
        self.folder = folder
        self.id_path = folder / "key-id"
        self.key_path = folder / "key.pem"
        folder.mkdir()
        for path in (self.id_path, self.key_path):
            path.symlink_to(f"..data/{path.name}")

    @property
    def environment(self):
        return {
            "KALSHI_API_KEY_ID": "",
            "KALSHI_API_KEY_ID_PATH": str(self.id_path),
            "KALSHI_PRIVATE_KEY_PATH": str(self.key_path),
        }

    def swap(self, key_id, private_path):
        """Both files are others from one moment to the next."""
        version = self.folder / f"..{uuid.uuid4()}"
        version.mkdir()
        (version / "key-id").write_text(f"{key_id}\n")
        shutil.copy(private_path, version / "key.pem")  # with its mode, which is its owner's alone
        link = self.folder / "..data_tmp"
        link.symlink_to(version.name)
        link.replace(self.folder / "..data")

    def write_in_place(self, path, content):
        """One file alone is another."""
        path.resolve().write_bytes(content)


class Keyed:
    """A crew whose workers take their key from a mount; ``old`` is in use at first, ``new`` is unknown."""

    def __init__(self, folder):
        self.mount = Mount(folder / "mount")
        self.crew = Crew(
            folder / "crew", KALSHI_CALL_DEADLINE_S=str(CALL_DEADLINE_S), **self.mount.environment
        )
        self.old, self.new = self.crew.stack.keys, Keys(folder / "new")
        self.new_id = ""

    def begin(self):
        """The old key on disk and at the exchange, the new one nowhere."""
        self.crew.control.reset()
        self.crew.workers(0)
        self.mount.swap(KEY_ID, self.old.private_path)
        self.crew.control.register_key(KEY_ID, self.old.public_path.read_text())
        self.new_id = f"new-{uuid.uuid4()}"

    def register_new(self):
        self.crew.control.register_key(self.new_id, self.new.public_path.read_text())

    def swap(self):
        self.mount.swap(self.new_id, self.new.private_path)

    def has_changed(self, worker):
        said = rf'event=key_rotated .*key_id={self.new_id}|"event":"key_rotated","key_id":"{self.new_id}"'
        return re.search(said, worker.log_text()) is not None

    def one_more(self):
        """The id of the key that a fresh cancel was signed with; it was not refused."""
        [order_id] = self.crew.place()
        assert self.crew.client.cancel(order_id).result(timeout=PATIENCE_S).outcome == "canceled"
        [call] = [call for call in self.crew.cancels() if order_id in call["order_ids"]]
        return call["key_id"]

    def lines(self, worker):
        """The lines of a worker's log as (process, text)."""
        return re.findall(r"^\[\S+ \S+ \w+/([\w-]+)\] (.*)$", worker.log_text(), re.MULTILINE)

    def who_worked(self, worker):
        """The process of a pool that has settled the only order so far."""
        [process] = wait_until(
            lambda: {who for who, text in self.lines(worker) if "event=cancel_settled " in text},
            within_s=PATIENCE_S,
            what="the line of the outcome",
        )
        return process

    def refused_trials(self):
        """How often the exchange has refused the new key."""
        calls = self.crew.control.calls()
        return sum(call["key_id"] == self.new_id and call["status"] == 401 for call in calls)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    keyed = Keyed(tmp_path_factory.mktemp("rotation"))
    yield keyed
    keyed.crew.close()


@pytest.fixture
def keyed(shared):
    shared.begin()
    yield shared
    shared.crew.leave()


@pytest.fixture
def crew(keyed):
    return keyed.crew


class Load:
    """Cancels one order after the other, until it is told to end."""

    def __init__(self, crew):
        self.order_ids = []
        self._crew = crew
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        while not self._end.wait(0.01):
            order_ids = self._crew.place(3)
            self._crew.client.cancel_many(order_ids)
            self.order_ids += order_ids

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()

    def wait_more(self, number):
        wanted = len(self.order_ids) + number
        wait_until(lambda: len(self.order_ids) >= wanted, within_s=PATIENCE_S, what="more cancels")


def test_a_key_is_replaced_under_load_and_the_old_one_revoked_without_one_lost_or_refused_cancel(keyed, crew):
    workers = crew.workers(2)
    crew.control.configure(latency_s=0.05)
    keyed.register_new()
    with Load(crew) as load:
        load.wait_more(100)
        keyed.swap()
        swapped = time.monotonic()
        wait_until(lambda: all(map(keyed.has_changed, workers)), within_s=PATIENCE_S, what="the change")
        assert time.monotonic() - swapped < NOTICED_S
        load.wait_more(100)
        changed = time.monotonic()
        wait_until(lambda: time.monotonic() - changed > CALL_DEADLINE_S, what="the last calls' deadline")
        crew.control.revoke_key(KEY_ID)
        load.wait_more(100)
    results = crew.client.cancel_many(load.order_ids).results(PATIENCE_S)
    print(f"{len(results)} cancels, {Counter(call['key_id'] for call in crew.cancels())}")
    assert Counter((result.outcome, result.attempts) for result in results) == {
        ("canceled", 1): len(load.order_ids)
    }
    assert crew.sent() == Counter(load.order_ids)
    calls = crew.control.calls()
    assert {call["status"] for call in calls} == {200}
    assert {call["key_id"] for call in calls} == {KEY_ID, keyed.new_id}
    assert [worker.process.poll() for worker in workers] == [None, None]


def test_a_call_under_way_ends_with_the_old_key_while_the_next_is_signed_with_the_new(keyed, crew):
    [worker] = crew.workers(1)
    [slow] = crew.place()
    crew.control.fault("slow", order_id=slow, operation="cancel", effect="before", seconds=1.9)
    crew.client.cancel(slow)
    crew.wait_sent(slow)
    keyed.register_new()
    keyed.swap()
    worker.signal(signal.SIGHUP)
    wait_until(lambda: keyed.has_changed(worker), within_s=PATIENCE_S, what="the change")
    assert keyed.one_more() == keyed.new_id
    assert crew.client.status(slow).result is None, "it should still be under way"
    result = crew.client.cancel(slow).result(timeout=PATIENCE_S)
    assert (result.outcome, result.attempts) == ("canceled", 1)
    [call] = [call for call in crew.cancels() if slow in call["order_ids"]]
    assert call["key_id"] == KEY_ID


def test_an_id_and_a_key_that_are_replaced_one_after_the_other_are_used_when_they_fit_together(keyed, crew):
    [worker] = crew.workers(1)
    keyed.register_new()
    keyed.mount.write_in_place(keyed.mount.id_path, keyed.new_id.encode())
    wait_until(lambda: NOT_USED in worker.log_text(), within_s=PATIENCE_S, what="the refusal")
    assert "INCORRECT_API_KEY_SIGNATURE" in worker.log_text()
    assert keyed.one_more() == KEY_ID
    keyed.mount.write_in_place(keyed.mount.key_path, keyed.new.private_path.read_bytes())
    wait_until(lambda: keyed.has_changed(worker), within_s=PATIENCE_S, what="the change")
    assert keyed.one_more() == keyed.new_id
    assert worker.log_text().count(NOT_USED) == 1


def damage(path):
    path.write_bytes(b"-----BEGIN RSA PRIVATE KEY-----\nMIIE")


UNUSABLE = {
    "gone": (os.unlink, "does not exist"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "cut off": (damage, "is cut off"),
}


@pytest.mark.parametrize("how", UNUSABLE)
def test_a_key_that_does_not_load_is_told_once_and_the_one_before_stays(keyed, crew, how):
    spoil, why = UNUSABLE[how]
    [worker] = crew.workers(1)
    spoil(keyed.mount.key_path.resolve())
    wait_until(lambda: NOT_USED in worker.log_text(), within_s=PATIENCE_S, what="the refusal")
    told = time.monotonic()
    wait_until(lambda: time.monotonic() - told > 3.0, what="three more looks")
    [line] = [line for line in worker.log_text().splitlines() if NOT_USED in line]
    assert why in line
    assert keyed.one_more() == KEY_ID
    keyed.register_new()
    keyed.swap()
    wait_until(lambda: keyed.has_changed(worker), within_s=PATIENCE_S, what="the change")
    assert keyed.one_more() == keyed.new_id


def test_sighup_has_a_refused_key_tried_at_once_and_restarts_nothing(keyed, crew):
    [worker] = crew.workers(1)
    keyed.swap()
    wait_until(keyed.refused_trials, within_s=PATIENCE_S, what="a trial")
    refused = time.monotonic()
    keyed.register_new()  # it becomes active: without a signal it is tried again after some seconds
    worker.signal(signal.SIGHUP)
    wait_until(lambda: keyed.has_changed(worker), within_s=PATIENCE_S, what="the change")
    assert time.monotonic() - refused < TRY_AGAIN_S / 2
    assert keyed.refused_trials() == 1
    assert keyed.one_more() == keyed.new_id
    assert worker.log_text().count(" ready.") == 1
    assert "Restarting" not in worker.log_text()


def test_the_change_is_logged_with_the_keys_id_as_a_field(keyed, crew):
    worker = crew.stack.start_worker(KALSHI_LOG_FORMAT="json")
    keyed.register_new()
    keyed.swap()
    wait_until(lambda: keyed.has_changed(worker), what="the change")
    assert worker.stop() == 0
    lines = [json.loads(line) for line in worker.log_text().splitlines() if '"key_rotated"' in line]
    assert [(line["level"], line["key_id"]) for line in lines] == [("INFO", keyed.new_id)]


def test_a_refused_key_is_not_hammered_and_is_used_when_it_becomes_active(keyed, crew):
    [worker] = crew.workers(1)
    keyed.swap()
    wait_until(keyed.refused_trials, within_s=PATIENCE_S, what="a trial")
    refused = time.monotonic()
    wait_until(lambda: keyed.refused_trials() == 2, within_s=PATIENCE_S, what="one more")
    assert time.monotonic() - refused > TRY_AGAIN_S - 1.5
    keyed.register_new()
    wait_until(lambda: keyed.has_changed(worker), within_s=PATIENCE_S, what="the change")
    assert worker.log_text().count(NOT_USED) == 1


def test_the_key_changes_while_the_exchange_is_away_and_is_used_when_it_is_back(keyed, crew):
    [worker] = crew.workers(1)
    keyed.register_new()
    with crew.frozen(crew.stack.exchange):
        keyed.swap()
        wait_until(lambda: NOT_USED in worker.log_text(), within_s=PATIENCE_S, what="the trial's end")
    wait_until(lambda: keyed.has_changed(worker), within_s=PATIENCE_S, what="the change")
    assert keyed.one_more() == keyed.new_id


def test_processes_of_a_forking_pool_change_their_key_each_by_itself(keyed, crew):
    worker = crew.stack.start_worker("-P", "processes", "-c", "2")
    assert keyed.one_more() == KEY_ID
    at_work = keyed.who_worked(worker)
    # `-P prefork` would be the configured pool to Celery, and that is one of threads.
    assert at_work.startswith("ForkPoolWorker")
    keyed.register_new()
    keyed.swap()
    signed = f"event=key_rotated key rotated, calls are signed with the new key key_id={keyed.new_id}"
    wait_until(
        lambda: {who for who, text in keyed.lines(worker) if signed in text} >= {"MainProcess", at_work},
        within_s=PATIENCE_S,
        what="the change in the process that has worked",
    )
    crew.control.revoke_key(KEY_ID)
    order_ids = crew.place(20)
    results = [crew.client.cancel(order_id).result(timeout=PATIENCE_S) for order_id in order_ids]
    assert Counter((result.outcome, result.attempts) for result in results) == {("canceled", 1): 20}
