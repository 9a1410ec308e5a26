"""The background jobs of a process: each guarded by itself, replaced when it dies or hangs, and stopped."""

from __future__ import annotations

import logging
import sys
import threading

import pytest

from kalshi_cancel.store.scripts import StoreError
from trials.stack import wait_until
from worker.dispatch.events import ServiceFailed, ServiceMoved, ServiceRestarted, emit_to_all
from worker.dispatch.services import Service, Services
from worker.telemetry.event_log import EventLog

WITHIN_S = 20.0


@pytest.fixture
def told():
    return []


@pytest.fixture
def services(told):
    made = Services(emit_to_all([told.append, EventLog()]))
    yield made
    made.stop()


class Job:
    """Counts its rounds; the first ones do what the test says."""

    def __init__(self, *first, then=lambda: None):
        self.rounds = 0
        self._first = first
        self._then = then

    def __call__(self):
        self.rounds += 1
        do = self._first[self.rounds - 1] if self.rounds <= len(self._first) else self._then
        return do()


def raising(error):
    def fail():
        raise error

    return fail


def wait_for(what, condition):
    wait_until(condition, within_s=WITHIN_S, what=what)


def told_of(told, kind):
    return [event.service for event in told if isinstance(event, kind)]


def failure(services):
    return {state.name: state.failure for state in services.state() if state.failure}


def test_a_round_that_fails_is_said_counted_and_shown_and_the_next_one_comes_and_heals_it(
    services, told, caplog
):
    going_on = threading.Event()
    job = Job(raising(KeyError("spoilt")), then=going_on.wait)
    services.start(Service("worker registry", job, every_s=0.01))
    wait_for(
        "the failure shown", lambda: failure(services) == {"worker registry": "failed: KeyError('spoilt')"}
    )
    wait_for("the next round", lambda: job.rounds == 2)
    going_on.set()
    wait_for("it is well again", lambda: failure(services) == {} and job.rounds > 2)
    [failed] = [line for line in caplog.records if "event=service_failed" in line.message]
    assert 'service="worker registry"' in failed.message
    assert failed.levelno == logging.ERROR
    assert failed.exc_info
    assert told_of(told, ServiceFailed) == ["worker registry"]
    assert [each.well for each in told if isinstance(each, ServiceMoved)] == [True, False, True]


def test_one_failing_job_never_keeps_another_from_running(services):
    bad, good = Job(then=raising(ValueError("always"))), Job()
    services.start(Service("bad", bad, every_s=0.01), Service("good", good, every_s=0.01))
    wait_for("both again and again", lambda: good.rounds > 50 and bad.rounds > 1)
    assert failure(services).keys() == {"bad"}
    [well] = [state for state in services.state() if state.name == "good"]
    assert well.good_s < WITHIN_S


def test_a_redis_that_is_away_is_no_failure_of_the_job(services, told):
    away = StoreError("Redis: gone", may_be_accepted=False)
    refuses = StoreError("Redis refuses: WRONGTYPE", may_be_accepted=False, can_pass=False)
    job, other = Job(raising(away)), Job(raising(refuses), then=threading.Event().wait)
    services.start(Service("waits", job, every_s=0.01), Service("refused", other))
    wait_for("what Redis refuses shown", lambda: "refused" in failure(services))
    wait_for("more rounds", lambda: job.rounds > 2)
    assert failure(services) == {"refused": "failed: Redis refuses: WRONGTYPE"}
    assert "waits" not in told_of(told, ServiceFailed)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_is_said_loudly_shown_and_replaced(services, told, caplog):
    going_on = threading.Event()
    job = Job(sys.exit, then=going_on.wait)
    services.start(Service("wake-ups", job, every_s=0.01))
    wait_for("it has died", lambda: "has died" in failure(services).get("wake-ups", ""))
    wait_for("another round", lambda: job.rounds == 2)
    assert failure(services) == {"wake-ups": "has died"}, "until a round is good"
    going_on.set()
    wait_for("it is well again", lambda: failure(services) == {})
    assert told_of(told, ServiceRestarted) == ["wake-ups"]
    assert [
        line.levelname for line in caplog.records if "job restarted service=wake-ups" in line.message
    ] == ["CRITICAL"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_of_a_job_whose_round_has_no_end_nobody_says_that_it_works_again(services, told, caplog):
    job = Job(sys.exit, then=threading.Event().wait)
    services.start(Service("monitor", job, hangs_after_s=None))
    wait_for("another round", lambda: job.rounds == 2)
    assert failure(services) == {}
    assert [each.well for each in told if isinstance(each, ServiceMoved)] == [True, True]
    assert "event=service_restarted" in caplog.text
    assert "event=service_recovered" not in caplog.text


def test_a_thread_that_hangs_is_replaced_and_is_not_the_one_that_counts_when_it_goes_on(services, told):
    hanging = threading.Event()
    job = Job(hanging.wait)
    services.start(Service("limits", job, every_s=0.01, hangs_after_s=0.3))
    wait_for("another at it", lambda: job.rounds > 2)
    assert told_of(told, ServiceRestarted) == ["limits"]
    [first] = [each for each in threading.enumerate() if each.name == "limits" and hanging_in(each, hanging)]
    hanging.set()
    first.join(WITHIN_S)
    assert not first.is_alive()
    assert failure(services) == {}


def hanging_in(thread, event):
    frame = sys._current_frames()[thread.ident]
    while frame is not None:
        if frame.f_locals.get("self") is event:
            return True
        frame = frame.f_back
    return False


def test_a_long_round_that_says_that_it_makes_progress_does_not_hang(services, told):
    done = threading.Event()

    def work():
        for _ in range(60):
            done.wait(0.01)
            service.beat()
        done.set()
        return 60.0

    service = Service("sender", work, hangs_after_s=0.3)
    services.start(service)
    assert done.wait(WITHIN_S)
    services.check()
    assert "sender" not in told_of(told, ServiceRestarted)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_watch_over_them_is_revived_by_whoever_checks(services, monkeypatch):
    services.start(Service("one", Job(), every_s=0.01))
    first = services._watcher
    monkeypatch.setattr(services, "check", sys.exit)
    first.join(WITHIN_S)
    assert not first.is_alive()
    monkeypatch.undo()
    services.check()
    assert services._watcher is not first
    assert services._watcher.is_alive()


def test_a_stop_ends_each_after_its_round_but_for_those_that_are_still_needed(services, told):
    needed, other, slow = Job(), Job(), Job(then=lambda: 3600.0)
    services.start(
        Service("leases", needed, every_s=0.01), Service("others", other, every_s=0.01), Service("slow", slow)
    )
    wait_for("all at work", lambda: needed.rounds and other.rounds and slow.rounds)
    services.stop(but={"leases"})
    services.join({"others", "slow"}, WITHIN_S)
    names = {each.name for each in threading.enumerate()}
    assert "leases" in names
    assert names & {"others", "slow"} == set()
    before = needed.rounds
    wait_for("the needed one goes on", lambda: needed.rounds > before + 5)
    assert failure(services) == {}, "what was stopped has not died"
    assert told_of(told, ServiceRestarted) == []
    services.stop()
    services.join({"leases"}, WITHIN_S)
    assert "leases" not in {each.name for each in threading.enumerate()}


def test_a_job_is_woken_by_its_name_and_no_other_is(services):
    services.wake("one")  # nobody of that name yet
    one, other = Job(), Job()
    services.start(Service("one", one, every_s=60), Service("other", other, every_s=60))
    wait_for("their first rounds", lambda: one.rounds == other.rounds == 1)
    services.wake("one")
    wait_for("its second round", lambda: one.rounds == 2)
    assert other.rounds == 1


def test_a_job_is_done_at_once_when_it_is_woken(services):
    job = Job()
    service = Service("mass cancels", job, every_s=3600.0)
    services.start(service)
    wait_for("its first round", lambda: job.rounds == 1)
    service.wake()
    wait_for("the next one", lambda: job.rounds == 2)
