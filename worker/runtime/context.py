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
from kalshi_cancel.exchange.protocol import Trouble
from kalshi_cancel.model.orders import Lane
from kalshi_cancel.settings.worker import WorkerSettings
from kalshi_cancel.store import scripts
from kalshi_cancel.store.audit import Trail
from kalshi_cancel.store.cancels import Book
from kalshi_cancel.store.lists import Lists
from kalshi_cancel.store.mass_cancels import Masses
from kalshi_cancel.store.mass_claim import MassClaims
from kalshi_cancel.store.rate_limits import Limits, Pacer
from kalshi_cancel.store.scripts import BookError
from kalshi_cancel.store.stats import Fleet
from kalshi_cancel.store.workers import KEY_LIFE_S, Colleagues, Identity, Roster, WorkerShown
from kalshi_cancel.tracing import open_tracer
from worker.broker.intake import Intake
from worker.dispatch.completions import Outbox
from worker.dispatch.dispatcher import Desk
from worker.dispatch.events import BucketCorrected, Notice, Tell, tell_all
from worker.dispatch.leases import EXTEND_EVERY_S
from worker.dispatch.senders import Hands
from worker.dispatch.services import Service, Services
from worker.mass.means import Means
from worker.mass.runner import MassRunner
from worker.runtime import upkeep
from worker.telemetry.readiness import Readiness
from worker.telemetry.watch import watch

log = logging.getLogger(__name__)


LEAVE_WITHIN_S = 0.5
LEASES = "leases"  # kept until everything in hand is put down


@dataclass(frozen=True, slots=True)
class Office:
    """What one process works with; ``services`` are what it does beside its work."""

    desk: Desk
    hands: Hands
    intake: Intake
    lists: Lists
    mass_runner: MassRunner
    rotation: Rotation
    readiness: Readiness
    services: Services
    leave: Callable[[], None]
    tell: Tell
    shutdown_s: float

    def begin(self, app: Celery) -> None:
        """Has the main process of a worker sweep the book."""
        self.services.start(*upkeep.sweep(app, self.desk, self.hands, self.lists, self.tell))

    def stop(self) -> None:
        """What is in hand goes back into the book, what is under way to other workers."""
        self.desk.stop()
        self.mass_runner.stop()
        self.services.stop(but={LEASES})

    def join(self) -> None:
        """Waits until nothing is in hand any more, or the time for that is over."""
        self.services.join(self.hands.names, self.shutdown_s)
        self.services.stop()
        # (In a thread: a Redis that is silent must not keep the process.)
        leaving = threading.Thread(target=self._leave, name="leaving", daemon=True)
        leaving.start()
        leaving.join(LEAVE_WITHIN_S)

    def _leave(self) -> None:
        with suppress(BookError):  # then it is forgotten by and by
            self.leave()


_offices: dict[int, Office] = {}
_offices_lock = threading.Lock()


def desk() -> Desk:
    """This process' desk."""
    return office().desk


def hands() -> Hands:
    """This process' hands."""
    return office().hands


def intake() -> Intake:
    """This process' intake of raw messages."""
    return office().intake


def lists() -> Lists:
    """This process' lists of results."""
    return office().lists


def mass_runner() -> MassRunner:
    """This process' runner of mass cancels."""
    return office().mass_runner


def tell(notice: Notice) -> None:
    """Tells whoever listens to this process."""
    office().tell(notice)


def office() -> Office:
    """Made at its first use in a process: what is opened before a fork must not be used after it."""
    with _offices_lock:
        mine = _offices.get(os.getpid())
        if mine is None:
            mine = _offices[os.getpid()] = _open(WorkerSettings.from_env(), app_or_default())
        return mine


def opened_office() -> Office | None:
    """This process' office, if it has one by now; for the end of a process, which opens nothing any more."""
    return _offices.get(os.getpid())


def _open(settings: WorkerSettings, app: Celery) -> Office:
    outbox = Outbox()
    exchange = Exchange.from_settings(settings, on_sent=outbox.sent)
    greeting = exchange.warm_up()
    if isinstance(greeting, Trouble):
        log.warning("the exchange does not answer yet: %s", greeting.problem.message)
    server = scripts.connect(settings.redis)
    tell = tell_all(_listeners(exchange))

    def corrected(bucket: str) -> None:
        tell(BucketCorrected(bucket))
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
    # Who listens to one queue only works that lane only: a risk worker keeps its hands free for risk.
    lanes = [lane for lane in Lane if lane in consumed]
    me = Identity.of_this_process()
    the_book = Book(server, settings.redis, name=me.name)
    roster = Roster(server, settings.redis)
    colleagues = Colleagues(roster, me.worker_id)

    def shown() -> WorkerShown:
        return WorkerShown(
            me.name,
            tuple(lane.value for lane in lanes),
            app.conf.worker_concurrency,
            worker_id=me.worker_id,
            key_id=exchange.signs_with[0],
            gate=the_desk.gate_state.value,
        )

    registry = Service("registry", lambda: roster.show(shown()), every_s=upkeep.SHOW_EVERY_S)
    the_desk = Desk(
        the_book,
        exchange,
        pacer,
        cancel_deadline_s=settings.cancel_deadline_s,
        cancel_max_age_s=settings.cancel_max_age_s,
        read_lag_s=settings.read_lag_s,
        record_life_s=settings.redis.result_expires_s,
        risk_reserve=settings.risk_reserve,
        batch_most=settings.batch_most,
        lanes=lanes,
        outbox=outbox,
        hands=app.conf.worker_concurrency,
        call_hand=lambda lane: upkeep.ring(wake_ups.wake_up, app, lane),
        gate_moved=registry.wake,
        others_serve=colleagues.serve,
        another_key=colleagues.another_key,
        tell=tell,
    )
    runner = MassRunner(
        Means(
            book=the_book,
            masses=Masses(server, settings.redis),
            exchange=exchange,
            pacer=pacer,
            call_hands=lambda lane, waiting: upkeep.ring(wake_ups.wake_up_all, app, lane, waiting=waiting),
            read_lag_s=settings.read_lag_s,
            stopping=threading.Event(),
            tell=tell,
            others=lambda key_ids: any(
                each.key_id and each.key_id not in key_ids for each in roster.workers(within_s=KEY_LIFE_S)
            ),
        ),
        MassClaims(server, settings.redis, name=me.full),
    )
    metrics = watch.metrics
    if metrics is not None:
        metrics.watch_fleet(Fleet(server, settings.redis))
    rotation = Rotation(exchange, settings)

    services = Services(tell)
    services.start(
        Service(LEASES, the_desk.extend_leases, every_s=EXTEND_EVERY_S),
        registry,
        limits,
        upkeep.trimmed_trail(
            Trail(server, settings.redis),
            max_age_s=settings.audit_max_age_s,
            max_entries=settings.audit_max_entries,
        ),
        runner.service,
        *([Service("key rotation", rotation.watch)] if settings.private_key_path is not None else []),
    )
    return Office(
        the_desk,
        Hands(
            the_desk,
            the_book,
            lanes,
            number=app.conf.worker_concurrency,
            key_id=lambda: exchange.signs_with[0],
        ),
        Intake(scripts.connect(settings.redis, in_bytes=True), settings.redis, the_desk),
        Lists(server, settings.redis),
        runner,
        rotation,
        Readiness(
            the_book,
            exchange,
            metrics.gate_states if metrics else list,
            services.state,
            metrics.services_down if metrics else list,
        ),
        services,
        lambda: roster.leave(me.worker_id),
        tell,
        settings.shutdown_s,
    )


def _listeners(exchange: Exchange) -> list[Tell]:
    """Who is told what this process does."""
    listeners: list[Tell] = []
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
