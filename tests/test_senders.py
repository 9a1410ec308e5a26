"""The pool of senders: one listens, the free ones are given claims or called, and one of them stays."""

from __future__ import annotations

import threading
import uuid

import pytest

from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store.cancels import NOTHING, CancelStore
from kalshi_cancel.store.keys import Keys
from kalshi_cancel.store.pending import WakeUp
from kalshi_cancel.store.scripts import connect
from trials.stack import wait_until
from worker.dispatch.breaker import CircuitBreaker
from worker.dispatch.completions import Completions
from worker.dispatch.senders import Senders
from worker.dispatch.services import Services

BOTH = (Lane.RISK, Lane.STRATEGY)
PATIENCE_S = 20.0
SENDERS = 4


class Work:
    """What senders are at: as a dispatcher is asked, it notes each call and holds it until it may end."""

    breaker = CircuitBreaker(lambda _state: {})
    lanes_with_room = BOTH

    def __init__(self):
        self.pool = None
        self.at_it = []
        self.listened = []  # at each call, whether its pool did
        self.finished = None
        self.may_end = threading.Event()

    def serve(self, *, wake_up, beat):
        beat()
        self.listened.append(self.pool.listens)
        self.at_it.append(wake_up)
        assert self.may_end.wait(PATIENCE_S)
        return 0.0

    def finish(self, claims):
        self.finished = claims


class Crew:
    """A started pool over a store of its own."""

    def __init__(self, server):
        settings = RedisSettings.from_env(
            {"REDIS_URL": server.url, "KALSHI_KEY_PREFIX": f"t-{uuid.uuid4().hex}"}
        )
        self.server = connect(settings)
        self.keys = Keys(settings.key_prefix)
        self.store = CancelStore(self.server, settings)
        self.store.show_listeners(BOTH, life_s=600)
        self.work, self.completions, self.services = Work(), Completions(), Services()
        self.senders = Senders(
            self.work, self.store, BOTH, self.completions, number=SENDERS, key_id=lambda: ""
        )

    def start(self):
        """Has them look once, as they do, and settle down."""
        self.work.may_end.set()
        self.senders.start(self.services)
        wait_until(lambda: len(self.work.at_it) == SENDERS, within_s=PATIENCE_S, what="each has looked once")
        self.settled()
        self.work.may_end.clear()
        self.work.at_it.clear()
        return self

    def end(self):
        self.work.may_end.set()
        self.services.stop()
        self.services.join(self.senders.names, PATIENCE_S)
        self.server.close()

    def settled(self, free=SENDERS - 1):
        wait_until(
            lambda: len(self.senders._free) == free and self.listening() == 1,
            within_s=PATIENCE_S,
            what="one listens, the others are free",
        )

    def listening(self):
        """How many connections wait for a wake-up of this store."""
        return sum("b" in each["flags"] for each in self.server.client_list())

    def accept(self):
        request = CancelRequest(str(uuid.uuid4()))
        self.store.accept([request], lane=Lane.STRATEGY, default_deadline_s=600)

    def wait_at_it(self, number):
        wait_until(lambda: len(self.work.at_it) == number, within_s=PATIENCE_S, what=f"{number} at work")


@pytest.fixture
def crew(own_redis):
    crew = Crew(own_redis)
    yield crew.start()
    crew.end()


def test_one_listens_and_while_it_works_another_does(crew):
    for at_work in (1, 2, 3):
        crew.accept()
        crew.wait_at_it(at_work)
        crew.settled(free=SENDERS - 1 - at_work)
    crew.accept()
    crew.wait_at_it(SENDERS)
    assert crew.listening() == 0
    crew.work.may_end.set()
    crew.settled()


def test_who_is_free_is_given_claims_all_at_once_and_one_always_stays(crew):
    drafted = crew.senders.draft()
    assert len(drafted) == SENDERS - 2, "one listens, and one stays"
    assert crew.senders.draft() == []
    given = WakeUp(NOTHING, 1.0)
    crew.senders.dismiss(drafted, [given])
    crew.wait_at_it(1)
    assert crew.work.at_it == [given]
    crew.settled(free=SENDERS - 2)


def test_who_is_drafted_does_nothing_else_until_it_is_told(crew):
    drafted = crew.senders.draft()
    for sender in drafted:
        sender.looks_again = True
        sender.service.wake()
    crew.accept()
    crew.wait_at_it(1)
    assert crew.work.at_it == [WakeUp()], "the listener"
    crew.senders.dismiss(drafted, [])
    crew.wait_at_it(1 + len(drafted))


def test_the_pool_listens_before_its_senders_look_for_the_first_time_or_none_of_them_would_be_idle(own_redis):
    class Slow(Services):
        def start(self, *services, **how):
            super().start(*services, **how)
            wait_until(lambda: len(crew.work.at_it) == SENDERS, within_s=PATIENCE_S, what="each has looked")

    crew = Crew(own_redis)
    crew.services = Slow()
    crew.start()
    crew.end()
    assert crew.work.listened == [True] * SENDERS


def test_one_that_is_free_is_called_and_where_none_is_nobody_is(crew):
    for at_work in range(1, SENDERS):
        crew.completions.call_next()
        crew.wait_at_it(at_work)
    crew.completions.call_next()
    assert crew.senders._free == []


def test_what_was_given_to_senders_that_have_ended_goes_back(crew):
    drafted = crew.senders.draft()
    crew.services.stop()
    crew.services.join(crew.senders.names, PATIENCE_S)
    crew.senders.dismiss(drafted, [WakeUp(NOTHING, 1.0)])
    crew.senders.finish()
    assert crew.work.finished == [NOTHING]
    crew.senders.finish()
    assert crew.work.finished == []


def test_once_they_have_ended_it_is_said_that_nobody_listens(crew):
    crew.services.stop()
    crew.services.join(crew.senders.names, PATIENCE_S)
    crew.accept()
    crew.senders.finish()
    crew.senders.show_listeners()
    assert crew.server.exists(*map(crew.keys.listeners, BOTH)) == 0
    assert crew.work.finished == []
    assert crew.server.lrange(crew.keys.wake_up(Lane.STRATEGY), 0, -1) == ["1"], "another worker is to look"


def test_where_the_listener_hangs_another_takes_its_place(crew, monkeypatch):
    monkeypatch.setattr("worker.dispatch.senders.LISTENER_GONE_S", 0.05)
    hanging = crew.senders._listener
    for sender in crew.senders._senders:
        sender.service.wake()
    wait_until(lambda: crew.senders._listener is not hanging, within_s=PATIENCE_S, what="another listens")
