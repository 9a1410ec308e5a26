"""Lists of results: counted down as their orders settle, whatever happens to those meanwhile."""

from __future__ import annotations

import json
import uuid
from contextlib import contextmanager

import pytest
from claims import claim_from
from crew import ids

from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.model.results import CancelResult, Outcome
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store import results
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.lists import Lists
from kalshi_cancel.store.pending import Settle
from kalshi_cancel.store.scripts import connect


class Dispatcher:
    """Lists and a store, as a worker uses them."""

    def __init__(self, url):
        self.settings = RedisSettings.from_env(
            {"REDIS_URL": url, "KALSHI_KEY_PREFIX": f"t-{uuid.uuid4().hex}"}
        )
        self.server = connect(self.settings)
        self.store = CancelStore(self.server, self.settings)
        self.lists = Lists(self.server, self.settings)

    def wanted(self, order_ids):
        """The id of a task that wants the results of these orders."""
        task_id = str(uuid.uuid4())
        name = self.lists.note(task_id, order_ids)
        self.accept(order_ids, name)
        self.lists.close(task_id, order_ids, [], not_entered=())
        return task_id

    def accept(self, order_ids, name="", **how):
        requests = [CancelRequest(each) for each in order_ids]
        reply_to = [name] * len(requests)
        self.store.accept(requests, lane=Lane.RISK, default_deadline_s=60, reply_to=reply_to, **how)

    def settle(self, *order_ids):
        """Cancels these, if they are open."""
        claim = claim_from(self.store, [Lane.RISK], at_most=100_000, lease_s=0.001, exchange_ms=None)
        done = [
            Settle(each, CancelResult(each.order_id, Outcome.CANCELED))
            for each in claim.entries
            if each.order_id in order_ids
        ]
        assert all(self.store.conclude(done))

    def results(self, task_id):
        """What the task is answered by now; None: nothing."""
        self.lists.answer()
        text = self.server.get(results.task_key(task_id, self.settings.celery_prefix))
        return (
            None
            if text is None
            else [(each["order_id"], each["outcome"]) for each in json.loads(text)["result"]]
        )

    def kept(self):
        """The keys of lists."""
        return list(self.server.scan_iter(f"{self.settings.key_prefix}:list*"))

    @contextmanager
    def commands(self):
        """Counts the commands that Redis is asked in the body."""
        counted = []
        self.server.config_resetstat()
        yield counted
        counted += self.server.info("commandstats").keys() - {"cmdstat_config|resetstat", "cmdstat_info"}


@pytest.fixture
def dispatcher(own_redis):
    dispatcher = Dispatcher(own_redis.url)
    yield dispatcher
    dispatcher.server.close()


def test_a_list_is_answered_in_its_order_once_all_of_it_is_settled(dispatcher):
    first, second, third = order_ids = ids(3)
    task_id = dispatcher.wanted(order_ids)
    assert dispatcher.results(task_id) is None
    dispatcher.settle(third, first)
    assert dispatcher.results(task_id) is None
    dispatcher.settle(second)
    assert dispatcher.results(task_id) == [(each, "canceled") for each in order_ids]
    assert dispatcher.kept() == []


def test_open_lists_cost_a_look_nothing_until_something_of_them_is_settled(dispatcher):
    order_ids = ids(300)
    task_ids = [dispatcher.wanted(order_ids[start : start + 100]) for start in (0, 100, 200)]
    dispatcher.results(task_ids[0])
    with dispatcher.commands() as asked:
        for _ in range(5):
            dispatcher.lists.answer()
    assert asked == ["cmdstat_srandmember"]
    dispatcher.settle(*order_ids[:150])
    assert [dispatcher.results(each) is not None for each in task_ids] == [True, False, False]


def test_what_is_settled_already_is_no_longer_waited_for(dispatcher):
    order_ids = ids(2)
    dispatcher.accept(order_ids)
    dispatcher.settle(*order_ids)
    assert dispatcher.results(dispatcher.wanted(order_ids)) == [(each, "canceled") for each in order_ids]


def test_a_list_that_another_worker_has_just_answered_keeps_its_answer(dispatcher):
    [order_id] = ids(1)
    task_id = dispatcher.wanted([order_id])
    other = Lists(dispatcher.server, dispatcher.settings)
    noted = other._noted

    def while_the_other_answers(task_id):
        assert dispatcher.results(task_id) is not None
        return noted(task_id)

    other._noted = while_the_other_answers
    dispatcher.settle(order_id)
    other.answer()
    assert dispatcher.results(task_id) == [(order_id, "canceled")]


def test_an_empty_list_is_answered(dispatcher):
    assert dispatcher.results(dispatcher.wanted([])) == []


def test_one_order_may_be_on_many_lists(dispatcher):
    [order_id] = ids(1)
    task_ids = [dispatcher.wanted([order_id]) for _ in range(700)]  # more than one script tells
    dispatcher.settle(order_id)
    while dispatcher.store.overdue(at_most=100):
        pass
    answers = []
    for _ in range(10):
        answers = [dispatcher.results(each) for each in task_ids]
    assert answers == [[(order_id, "canceled")]] * 700


def test_what_is_unresolved_is_a_result_and_the_list_does_not_wait_for_the_end(dispatcher):
    [order_id] = ids(1)
    task_id = dispatcher.wanted([order_id])
    dispatcher.server.hset(f"{dispatcher.settings.key_prefix}:pending:{order_id}", "deadline_ms", 1)
    assert dispatcher.store.report([CancelResult(order_id, Outcome.UNRESOLVED)]) == 1
    assert dispatcher.results(task_id) == [(order_id, "unresolved")]


def test_an_order_that_is_asked_for_again_before_its_list_is_answered_is_waited_for(dispatcher):
    order_ids = ids(2)
    task_id = dispatcher.wanted(order_ids)
    dispatcher.settle(*order_ids)
    dispatcher.accept(order_ids[:1], records_older_than_s=0.0)
    assert dispatcher.results(task_id) is None
    dispatcher.settle(order_ids[0])
    assert dispatcher.results(task_id) == [(each, "canceled") for each in order_ids]


def test_an_order_whose_result_is_gone_does_not_keep_its_list_for_ever(dispatcher):
    kept, gone = order_ids = ids(2)
    task_id = dispatcher.wanted(order_ids)
    dispatcher.settle(*order_ids)
    dispatcher.server.delete(results.record_key(gone, dispatcher.settings.celery_prefix))
    assert dispatcher.results(task_id) == [(kept, "canceled"), (gone, "unresolved")]


def test_a_message_that_is_handled_twice_is_answered_once_all_is_settled(dispatcher):
    order_ids = ids(3)
    task_id = dispatcher.wanted(order_ids)
    dispatcher.settle(order_ids[0])
    name = dispatcher.lists.note(task_id, order_ids)
    dispatcher.accept(order_ids, name)
    dispatcher.lists.close(task_id, order_ids, [], not_entered=())
    assert dispatcher.results(task_id) is None
    dispatcher.settle(*order_ids)
    assert dispatcher.results(task_id) == [(each, "canceled") for each in order_ids]


def test_a_list_that_cannot_be_counted_down_keeps_no_result_from_being_stored(dispatcher):
    [order_id] = ids(1)
    task_id = dispatcher.wanted([order_id])
    dispatcher.server.set(f"{dispatcher.settings.key_prefix}:list:{task_id}:left", "of another type")
    dispatcher.settle(order_id)
    assert dispatcher.store.record(order_id).outcome is Outcome.CANCELED


def test_what_is_kept_of_a_list_has_an_end(dispatcher):
    dispatcher.wanted(ids(2))
    lasting = [key for key in dispatcher.kept() if dispatcher.server.ttl(key) < 0]
    assert lasting == [f"{dispatcher.settings.key_prefix}:lists"]
