"""What Redis does not take: it is answered and set aside at once, and keeps nothing else from being done."""

from __future__ import annotations

import json
import uuid
from contextlib import closing

import pytest
import redis
from celery import Celery
from crew import PATIENCE_S, wait_ready

from kalshi_cancel.client import CancelClient
from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.settings.worker import WorkerSettings
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.rate_limits import Limits, Pacer
from kalshi_cancel.store.redis_errors import can_pass
from kalshi_cancel.store.scripts import StoreError, connect
from trials.stack import wait_until
from worker.broker.entrance import Entrance
from worker.dispatch.dispatcher import Dispatcher
from worker.dispatch.settings import DispatchSettings

SENDERS = 4
MORE_THAN_THREADS = 40
# Refused each time: to accept orders whose id begins with `z`, and to store results of those with `y`.
ALLOWED = (
    *("~cancels*", "~risk*", "~_kombu*"),
    *("~celery-task-meta-????????-*", "~celery-task-meta-cancel:[^y]*"),
    *("~kalshi-cancel:[^p]*", "~kalshi-cancel:paths", "~kalshi-cancel:pending:[^z]*"),
)


@pytest.fixture(scope="module")
def crew_environment():
    return {"KALSHI_BATCH_MOST": ""}


class Scene:
    """A worker whose Redis user may not touch some entries; a stranger who knows nothing of that."""

    def __init__(self, crew, url, stranger):
        self.crew, self.stranger = crew, stranger
        self.client = CancelClient(url)
        self.server = self.client._server

    def send(self, task, *args, queue="cancels", **kwargs):
        return self.stranger.send_task(task, args=args, kwargs=kwargs, queue=queue)

    def set_aside(self):
        return [json.loads(text) for text in self.server.lrange("kalshi-cancel:unreadable", 0, -1)]


@pytest.fixture
def scene(crew):
    with crew.apart() as apart, crew.redis.client() as server:
        server.acl_setuser("limited", enabled=True, passwords=["+pw"], commands=["+@all"], channels=["*"])
        server.execute_command("ACL", "SETUSER", "limited", *ALLOWED)
        address = apart.url.removeprefix("redis://")
        worker = crew.stack.spawn_worker("-c", str(SENDERS), REDIS_URL=f"redis://limited:pw@{address}")
        with Celery(broker=apart.url, backend=apart.url, set_as_current=False) as stranger:
            scene = Scene(crew, apart.url, stranger)
            with closing(scene.client):
                try:
                    wait_ready(worker)
                    scene.worker = worker
                    yield scene
                finally:
                    worker.kill()


def bad_ids(number):
    return [f"z-{uuid.uuid4()}" for _ in range(number)]


def test_many_messages_that_are_never_taken_keep_no_good_one_waiting_and_each_is_answered(scene):
    good = scene.crew.place(3)
    sent = {each: scene.send("cancel_order", order_id=each) for each in bad_ids(MORE_THAN_THREADS)}
    for order_id in good:
        assert scene.send("cancel_order", order_id=order_id).get(timeout=PATIENCE_S)["outcome"] == "canceled"
    for order_id, task in sent.items():
        value = task.get(timeout=PATIENCE_S)
        assert (value["order_id"], value["outcome"]) == (order_id, "refused")
        assert value["error"]["code"] == "not_entered"
        assert "ask again" in value["error"]["message"]
    kept = {each["kwargs"]["order_id"]: each for each in scene.set_aside()}
    assert kept.keys() == sent.keys()
    assert all("permissions" in each["why"] for each in kept.values())
    assert {each["task_id"] for each in kept.values()} == {task.id for task in sent.values()}


def test_one_of_a_list_that_is_never_taken_harms_no_other(scene):
    [bad, other], good = bad_ids(2), scene.crew.place(5)
    task = scene.send("cancel_orders", orders=[*good[:2], bad, *good[2:], other])
    values = task.get(timeout=PATIENCE_S)
    assert [(each["order_id"], each["outcome"]) for each in values] == [
        *((each, "canceled") for each in good),
        *((each, "refused") for each in (bad, other)),
    ]
    assert {each["error"]["code"] for each in values[len(good) :]} == {"not_entered"}


def test_a_flood_with_some_that_are_never_taken_is_still_taken_in_together(scene):
    good, bad = scene.crew.place(150), bad_ids(10)
    with scene.crew.frozen(scene.worker):
        tasks = {
            each: scene.send("cancel_order", order_id=each)
            for each in [*good[:50], *bad[:5], *good[50:], *bad[5:]]
        }
    outcomes = {each: task.get(timeout=PATIENCE_S)["outcome"] for each, task in tasks.items()}
    assert outcomes == dict.fromkeys(good, "canceled") | dict.fromkeys(bad, "refused")
    taken_by_celery = scene.worker.log_text().count("cancel_order[")
    assert taken_by_celery < 2 * len(good), "most never went through Celery's loop"


def test_a_list_whose_results_cannot_be_noted_fails_for_its_waiter_and_its_orders_are_canceled(scene):
    good = scene.crew.place(3)
    scene.server.set("kalshi-cancel:lists", "of another type")
    task = scene.send("cancel_orders", orders=good)
    with pytest.raises(Exception, match="WRONGTYPE"):
        task.get(timeout=PATIENCE_S)
    scene.server.delete("kalshi-cancel:lists")
    assert {each.outcome for each in scene.client.results(good, timeout=PATIENCE_S)} == {"canceled"}


def test_a_mass_cancel_that_is_never_taken_is_answered(scene):
    request_id = str(uuid.uuid4())
    scene.server.set(f"kalshi-cancel:mass:{request_id}", "of another type")
    fields = {"request_id": request_id, "scope": {"tickers": ["KXNE-26NOV22-A"]}}
    value = scene.send("mass_cancel", queue="risk", **fields).get(timeout=PATIENCE_S)
    assert (value["request_id"], value["flat"]) == (request_id, False)
    assert "WRONGTYPE" in value["error"]
    assert [each["kwargs"]["request_id"] for each in scene.set_aside()] == [request_id]


def test_results_that_are_never_taken_keep_no_other_from_being_stored_and_are_kept_as_text(scene):
    good, bad = scene.crew.place(20), [f"y{uuid.uuid4()}" for _ in range(SENDERS + 1)]
    scene.crew.control.place_many([{"order_id": order_id} for order_id in bad])
    scene.client.cancel_many([*bad, *good])
    results = list(scene.client.results(good, timeout=PATIENCE_S))
    assert {each.outcome for each in results} == {"canceled"}
    wait_until(
        lambda: {each["order_id"] for each in scene.set_aside()} == set(bad),
        within_s=PATIENCE_S,
        what="each is kept as text",
    )
    assert {each["result"]["outcome"] for each in scene.set_aside()} == {"canceled"}
    more = scene.crew.place(10)
    results = scene.client.cancel_many(more).results(PATIENCE_S)
    assert {each.outcome for each in results} == {"canceled"}
    with closing(scene.crew.redis.client()) as server:  # once that is mended, they are settled like any other
        server.execute_command("ACL", "SETUSER", "limited", "~*")
    settled = list(scene.client.results(bad, timeout=PATIENCE_S))
    assert {each.outcome for each in settled} == {"canceled"}


# -- for how long


@pytest.fixture
def dispatcher(stack):
    """A dispatcher whose Redis is gone."""
    settings = WorkerSettings.from_env({**stack.environment, "REDIS_URL": "redis://127.0.0.1:1/0"})
    server = connect(settings.redis)
    return Dispatcher(
        CancelStore(server, settings.redis),
        Exchange.from_settings(settings),
        Pacer(server, settings.redis.key_prefix, Limits(1, 1, 1, 1)),
        DispatchSettings.of(settings, lanes=tuple(Lane), senders=1),
    )


@pytest.fixture
def entrance(dispatcher):
    """An entrance beside it."""
    return Entrance(dispatcher._store, cancel_deadline_s=1, stopping=dispatcher.stopping)


def counted(error):
    def ask():
        asked.append(1)
        raise error

    asked = []
    return ask, asked


def test_what_can_pass_is_tried_for_a_while_and_then_goes_back(entrance, monkeypatch):
    monkeypatch.setattr("worker.broker.entrance.PATIENT_S", 0.5)
    ask, asked = counted(StoreError("gone", may_be_accepted=False))
    with pytest.raises(StoreError, match="gone"):
        entrance.until_done(ask)
    assert len(asked) > 2
    request = CancelRequest("an-order")
    with pytest.raises(StoreError) as gone:
        entrance.until_done(lambda: entrance.enter([request], lane=Lane.RISK))
    assert gone.value.can_pass


def test_what_cannot_pass_is_tried_once(entrance):
    ask, asked = counted(StoreError("no", may_be_accepted=False, can_pass=False))
    with pytest.raises(StoreError, match="no"):
        entrance.until_done(ask)
    assert len(asked) == 1


def test_a_worker_that_ends_waits_for_nothing(dispatcher, entrance):
    ask, asked = counted(StoreError("gone", may_be_accepted=False))
    dispatcher.stop()
    with pytest.raises(StoreError, match="gone"):
        entrance.until_done(ask)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (redis.ConnectionError("gone"), True),
        (redis.TimeoutError("silent"), True),
        (redis.exceptions.BusyLoadingError("loading"), True),
        (redis.ReadOnlyError("You can't write against a read only replica."), True),
        (redis.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."), True),
        (redis.ResponseError("BUSY Redis is busy running a script."), True),
        (redis.ResponseError("NOREPLICAS Not enough good replicas to write."), True),
        (redis.ResponseError("MISCONF Errors writing to the AOF file: No space left on device"), True),
        (redis.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"), False),
        (redis.exceptions.NoPermissionError("this user has no permissions"), False),
        (redis.ResponseError("ERR user_script:7: attempt to index a nil value"), False),
        (redis.ResponseError("HALFDONE ERR what came up after the first write"), False),
        (redis.DataError("Invalid input of type"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_can_pass_is_told_from_what_somebody_has_to_mend(error, passes):
    assert can_pass(error) is passes
