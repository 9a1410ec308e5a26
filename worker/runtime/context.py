"""What one process of a worker works with: made at its first use, one of each, and stopped together."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import redis
from celery import Celery
from celery.app import app_or_default

from kalshi_cancel import wake_ups
from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.exchange.key_rotation import Rotation
from kalshi_cancel.exchange.protocol import Failure
from kalshi_cancel.model.requests import Lane
from kalshi_cancel.settings.worker import WorkerSettings
from kalshi_cancel.store import scripts
from kalshi_cancel.store.audit import AuditLog
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.lists import Lists
from kalshi_cancel.store.mass_cancels import MassCancels
from kalshi_cancel.store.mass_claim import MassClaims
from kalshi_cancel.store.rate_limits import Limits, Pacer
from kalshi_cancel.store.scripts import StoreError
from kalshi_cancel.store.stats import Stats
from kalshi_cancel.store.workers import KEY_LIFE_S, Colleagues, Identity, WorkerRegistry, WorkerShown
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import say
from worker.broker.entrance import Entrance
from worker.broker.intake import Intake
from worker.dispatch.completions import Completions
from worker.dispatch.dispatcher import Dispatcher
from worker.dispatch.events import BucketCorrected, Emit, Event, emit_to_all
from worker.dispatch.senders import Senders
from worker.dispatch.services import Services
from worker.dispatch.settings import DispatchSettings, Neighbors
from worker.dispatch.sweeper import Sweeper
from worker.mass.means import Means
from worker.mass.runner import MassRunner
from worker.runtime.services import (
    LIMITS,
    MASS_CANCELS,
    REGISTRY,
    Doers,
    KnownLimits,
    Periodic,
    Start,
    Stop,
    periodic,
    publish_wake_up,
    trim,
    wake_lanes,
)
from worker.telemetry.listeners import listeners
from worker.telemetry.readiness import Readiness
from worker.telemetry.watch import watch

log = logging.getLogger(__name__)


LEAVE_WITHIN_S = 0.5


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What one process works with; ``services`` runs what it does beside that, which ``periodic`` lists."""

    doers: Doers
    entrance: Entrance
    intake: Intake
    readiness: Readiness
    services: Services
    periodic: Sequence[Periodic]
    leave: Callable[[], None]
    emit: Emit
    shutdown_s: float

    def begin(self, where: Start = Start.MAIN) -> None:
        """Starts what runs there."""
        mine = [each for each in self.periodic if each.start is where]
        self.services.start(*(each.service() for each in mine if not each.in_turn))
        self.services.start(*(each.service() for each in mine if each.in_turn), in_turn=True)

    def stop(self) -> None:
        """What is claimed goes back into the store, what is under way to other workers."""
        self.doers.dispatcher.stop()
        self.doers.mass_runner.stop()
        self.services.stop(but={each.name for each in self.periodic if each.stop is Stop.LAST})

    def join(self) -> None:
        """Waits until nothing is claimed any more, or the time for that is over."""
        self.services.join(self.doers.senders.names, self.shutdown_s)
        self.doers.senders.finish()
        self.services.stop()
        # (In a thread: a Redis that is silent must not keep the process.)
        leaving = threading.Thread(target=self._leave, name="leaving", daemon=True)
        leaving.start()
        leaving.join(LEAVE_WITHIN_S)

    def _leave(self) -> None:
        with suppress(StoreError):  # then it is forgotten by and by
            self.leave()


_contexts: dict[int, WorkerContext] = {}
_contexts_lock = threading.Lock()


def dispatcher() -> Dispatcher:
    """This process' dispatcher."""
    return context().doers.dispatcher


def entrance() -> Entrance:
    """This process' entrance for what messages ask for."""
    return context().entrance


def intake() -> Intake:
    """This process' intake of raw messages."""
    return context().intake


def lists() -> Lists:
    """This process' lists of results."""
    return context().doers.lists


def mass_runner() -> MassRunner:
    """This process' runner of mass cancels."""
    return context().doers.mass_runner


def emit(event: Event) -> None:
    """Emits an event to whoever listens to this process."""
    context().emit(event)


def context() -> WorkerContext:
    """Made at its first use in a process: what is opened before a fork must not be used after it."""
    with _contexts_lock:
        mine = _contexts.get(os.getpid())
        if mine is None:
            mine = _contexts[os.getpid()] = _open(WorkerSettings.from_env(), app_or_default())
        return mine


def opened_context() -> WorkerContext | None:
    """This process' context, if it has one by now; for the end of a process, which opens nothing any more."""
    return _contexts.get(os.getpid())


def _open(settings: WorkerSettings, app: Celery) -> WorkerContext:
    completions = Completions()
    exchange = Exchange.from_settings(settings, on_sent=completions.sent)
    greeting = exchange.warm_up()
    if isinstance(greeting, Failure):
        say(log, LogEvent.EXCHANGE_UNAVAILABLE, why=greeting.problem.message)
    server = scripts.connect(settings.redis)
    emit = emit_to_all(listeners(exchange))
    services = Services(emit)
    pacer = _pacer(settings, server, services, emit)
    limits = KnownLimits(exchange, pacer)
    limits.share_configured()
    lanes = _lanes(app)
    me = Identity.of_this_process()
    store = CancelStore(server, settings.redis, name=me.name)
    registry = WorkerRegistry(server, settings.redis)
    colleagues = Colleagues(registry, me.worker_id)
    dispatcher = Dispatcher(
        store,
        exchange,
        pacer,
        DispatchSettings.of(settings, lanes=lanes, senders=app.conf.worker_concurrency),
        neighbors=Neighbors(
            call_sender=lambda lane: publish_wake_up(wake_ups.wake_up, app, lane),
            breaker_moved=lambda: services.wake(REGISTRY),
            another_key=colleagues.another_key,
            emit=emit,
        ),
        completions=completions,
    )
    entrance = Entrance(store, cancel_deadline_s=settings.cancel_deadline_s, stopping=dispatcher.stopping)
    sweeper = Sweeper(store, dispatcher.breaker, others_serve=colleagues.serve)

    def show_worker() -> None:
        registry.show(
            WorkerShown(
                me.name,
                tuple(lane.value for lane in lanes),
                app.conf.worker_concurrency,
                worker_id=me.worker_id,
                key_id=exchange.signs_with[0],
                breaker=dispatcher.breaker.state.value,
            )
        )

    means = Means(
        store=store,
        mass_cancels=MassCancels(server, settings.redis),
        exchange=exchange,
        pacer=pacer,
        call_senders=lambda lane, waiting: publish_wake_up(wake_ups.wake_up_all, app, lane, waiting=waiting),
        read_lag_s=settings.read_lag_s,
        stopping=threading.Event(),
        emit=emit,
        others=lambda key_ids: any(
            each.key_id and each.key_id not in key_ids for each in registry.workers(within_s=KEY_LIFE_S)
        ),
    )
    claims = MassClaims(server, settings.redis, name=me.full)
    runner = MassRunner(means, claims, wake=lambda: services.wake(MASS_CANCELS))
    metrics = watch.metrics
    if metrics is not None:
        metrics.watch_stats(Stats(server, settings.redis))
    doers = Doers(
        dispatcher=dispatcher,
        sweeper=sweeper,
        senders=Senders(
            dispatcher,
            store,
            lanes,
            completions,
            number=app.conf.worker_concurrency,
            key_id=lambda: exchange.signs_with[0],
        ),
        lists=Lists(server, settings.redis),
        mass_runner=runner,
        rotation=Rotation(exchange, settings),
        key_in_file=settings.private_key_path is not None,
        limits=limits,
        trim_audit_log=partial(trim, AuditLog(server, settings.redis), settings),
        show_worker=show_worker,
        wake_lanes=partial(wake_lanes, app, sweeper, emit),
    )
    opened = WorkerContext(
        doers=doers,
        entrance=entrance,
        intake=Intake(scripts.connect(settings.redis, in_bytes=True), settings.redis, entrance),
        readiness=Readiness(
            store,
            exchange,
            metrics.breaker_states if metrics else list,
            services.state,
            metrics.services_down if metrics else list,
        ),
        services=services,
        periodic=periodic(doers),
        leave=partial(registry.leave, me.worker_id),
        emit=emit,
        shutdown_s=settings.shutdown_s,
    )
    opened.begin(Start.EVERYWHERE)
    return opened


def _pacer(settings: WorkerSettings, server: redis.Redis, services: Services, emit: Emit) -> Pacer:
    """The account's buckets; after a 429 the limits are asked for at once."""

    def corrected(bucket: str) -> None:
        emit(BucketCorrected(bucket))
        services.wake(LIMITS)

    limits = Limits(
        settings.read_tokens_per_s,
        settings.read_tokens_capacity,
        settings.write_tokens_per_s,
        settings.write_tokens_capacity,
    )
    return Pacer(server, settings.redis.key_prefix, limits, corrected=corrected)


def _lanes(app: Celery) -> tuple[Lane, ...]:
    """The lanes of the queues that are consumed: a risk worker keeps its senders free for risk."""
    consumed = {Lane.of_queue(name) for name in app.amqp.queues.consume_from}
    return tuple(lane for lane in Lane if lane in consumed)
