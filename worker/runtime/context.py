"""What one process of a worker works with: made at its first use, one of each, and stopped together."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from celery import Celery
from celery.app import app_or_default

from kalshi_cancel import wake_ups
from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.exchange.key_rotation import Rotation
from kalshi_cancel.exchange.protocol import Failure
from kalshi_cancel.log_events import LogEvent
from kalshi_cancel.logs import say
from kalshi_cancel.model.orders import Lane
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
from kalshi_cancel.tracing import open_tracer
from worker.broker.intake import Intake
from worker.dispatch.completions import Completions
from worker.dispatch.dispatcher import Dispatcher
from worker.dispatch.events import BucketCorrected, Emit, Event, emit_to_all
from worker.dispatch.leases import EXTEND_EVERY_S
from worker.dispatch.senders import Senders
from worker.dispatch.services import Service, Services
from worker.mass.means import Means
from worker.mass.runner import MassRunner
from worker.runtime import upkeep
from worker.telemetry import outcome_log
from worker.telemetry.readiness import Readiness
from worker.telemetry.watch import watch

log = logging.getLogger(__name__)


LEAVE_WITHIN_S = 0.5
LEASES = "leases"  # kept until all that is claimed is put down


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What one process works with; ``services`` are what it does beside its work."""

    dispatcher: Dispatcher
    senders: Senders
    intake: Intake
    lists: Lists
    mass_runner: MassRunner
    rotation: Rotation
    readiness: Readiness
    services: Services
    leave: Callable[[], None]
    emit: Emit
    shutdown_s: float

    def begin(self, app: Celery) -> None:
        """Has the main process of a worker sweep the store."""
        self.services.start(*upkeep.sweep(app, self.dispatcher, self.senders, self.lists, self.emit))

    def stop(self) -> None:
        """What is claimed goes back into the store, what is under way to other workers."""
        self.dispatcher.stop()
        self.mass_runner.stop()
        self.services.stop(but={LEASES})

    def join(self) -> None:
        """Waits until nothing is claimed any more, or the time for that is over."""
        self.services.join(self.senders.names, self.shutdown_s)
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
    return context().dispatcher


def senders() -> Senders:
    """This process' senders."""
    return context().senders


def intake() -> Intake:
    """This process' intake of raw messages."""
    return context().intake


def lists() -> Lists:
    """This process' lists of results."""
    return context().lists


def mass_runner() -> MassRunner:
    """This process' runner of mass cancels."""
    return context().mass_runner


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
    emit = emit_to_all(_listeners(exchange))

    def corrected(bucket: str) -> None:
        emit(BucketCorrected(bucket))
        limits.wake()

    pacer = Pacer(
        server,
        settings.redis.key_prefix,
        Limits(
            settings.read_tokens_per_s,
            settings.read_tokens_capacity,
            settings.write_tokens_per_s,
            settings.write_tokens_capacity,
        ),
        corrected=corrected,
    )
    limits = upkeep.known_limits(exchange, pacer)
    consumed = {Lane.of_queue(name) for name in app.amqp.queues.consume_from}
    # Who listens to one queue only works that lane only: a risk worker keeps its senders free for risk.
    lanes = [lane for lane in Lane if lane in consumed]
    me = Identity.of_this_process()
    the_store = CancelStore(server, settings.redis, name=me.name)
    registry = WorkerRegistry(server, settings.redis)
    colleagues = Colleagues(registry, me.worker_id)

    def shown() -> WorkerShown:
        return WorkerShown(
            me.name,
            tuple(lane.value for lane in lanes),
            app.conf.worker_concurrency,
            worker_id=me.worker_id,
            key_id=exchange.signs_with[0],
            gate=the_dispatcher.breaker_state.value,
        )

    registration = Service("registry", lambda: registry.show(shown()), every_s=upkeep.SHOW_EVERY_S)
    the_dispatcher = Dispatcher(
        the_store,
        exchange,
        pacer,
        cancel_deadline_s=settings.cancel_deadline_s,
        cancel_max_age_s=settings.cancel_max_age_s,
        read_lag_s=settings.read_lag_s,
        record_life_s=settings.redis.result_expires_s,
        risk_reserve=settings.risk_reserve,
        batch_most=settings.batch_most,
        lanes=lanes,
        completions=completions,
        senders=app.conf.worker_concurrency,
        call_sender=lambda lane: upkeep.ring(wake_ups.wake_up, app, lane),
        breaker_moved=registration.wake,
        others_serve=colleagues.serve,
        another_key=colleagues.another_key,
        emit=emit,
    )
    runner = MassRunner(
        Means(
            store=the_store,
            mass_cancels=MassCancels(server, settings.redis),
            exchange=exchange,
            pacer=pacer,
            call_senders=lambda lane, waiting: upkeep.ring(wake_ups.wake_up_all, app, lane, waiting=waiting),
            read_lag_s=settings.read_lag_s,
            stopping=threading.Event(),
            emit=emit,
            others=lambda key_ids: any(
                each.key_id and each.key_id not in key_ids for each in registry.workers(within_s=KEY_LIFE_S)
            ),
        ),
        MassClaims(server, settings.redis, name=me.full),
    )
    metrics = watch.metrics
    if metrics is not None:
        metrics.watch_stats(Stats(server, settings.redis))
    rotation = Rotation(exchange, settings)

    services = Services(emit)
    services.start(
        Service(LEASES, the_dispatcher.extend_leases, every_s=EXTEND_EVERY_S),
        registration,
        limits,
        upkeep.trimmed_audit_log(
            AuditLog(server, settings.redis),
            max_age_s=settings.audit_max_age_s,
            max_entries=settings.audit_max_entries,
        ),
        runner.service,
        *([Service("key rotation", rotation.watch)] if settings.private_key_path is not None else []),
    )
    return WorkerContext(
        the_dispatcher,
        Senders(
            the_dispatcher,
            the_store,
            lanes,
            number=app.conf.worker_concurrency,
            key_id=lambda: exchange.signs_with[0],
        ),
        Intake(scripts.connect(settings.redis, in_bytes=True), settings.redis, the_dispatcher),
        Lists(server, settings.redis),
        runner,
        rotation,
        Readiness(
            the_store,
            exchange,
            metrics.breaker_states if metrics else list,
            services.state,
            metrics.services_down if metrics else list,
        ),
        services,
        lambda: registry.leave(me.worker_id),
        emit,
        settings.shutdown_s,
    )


def _listeners(exchange: Exchange) -> list[Emit]:
    """Who is told what this process does."""
    listeners: list[Emit] = [outcome_log.write]
    if watch.metrics is not None:
        watch.metrics.begin(
            signs_with=lambda: exchange.signs_with,
            skew_s=lambda: None if exchange.skew_ms is None else exchange.skew_ms / 1000,
        )
        listeners.append(watch.metrics)
    tracer = open_tracer("kalshi-cancel-worker")
    if tracer is not None:
        from worker.telemetry.spans import Spans  # noqa: PLC0415 - OpenTelemetry is an extra

        listeners.append(Spans(tracer))
    return listeners
