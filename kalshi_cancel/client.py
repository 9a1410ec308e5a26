"""For producers: asks for cancels and reads what became of them. Needs Redis only, never the key.

    client = CancelClient.from_env()
    pending = client.cancel("3f2c...", requested_by="mm-btc")
    print(pending.result(timeout=10).outcome)

A cancel is accepted when its entry is in the store; from then on it survives whatever happens to this
process. The message published after that only wakes a worker up.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import redis

from kalshi_cancel import wake_ups
from kalshi_cancel.model.fields import BadRequest
from kalshi_cancel.model.mass_request import MassRequest
from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.model.results import CancelResult
from kalshi_cancel.settings.redis import RedisSettings, refuse_celery_overrides
from kalshi_cancel.store.audit import AuditLog
from kalshi_cancel.store.cancels import ACCEPT_AT_ONCE, CancelStore
from kalshi_cancel.store.mass_cancels import MassCancels
from kalshi_cancel.store.pending import DeadLetter, OpenCancel, Standing
from kalshi_cancel.store.redis_errors import words
from kalshi_cancel.store.scripts import (
    CONNECT_TIMEOUT_S,
    SOCKET_TIMEOUT_S,
    StoreError,
    celery_options,
    connect,
)
from kalshi_cancel.store.workers import WorkerRegistry, WorkerShown
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import say
from kalshi_cancel.telemetry.tracing import asking, open_tracer

if TYPE_CHECKING:
    from celery import Celery

log = logging.getLogger(__name__)

# For requests that name no deadline_s: how long we try before a waiter is told "unresolved".
DEFAULT_DEADLINE_S = 10.0
MASS_LOOK_EVERY_S = 0.1
# Who waits looks now and then whether Redis still has what it accepted.
LOST_LOOK_EVERY_S = 3.0
LOOK_AGAIN_S = 0.2  # when Redis was away
NAMED_MOST = 5  # a line's worth


class NotSettled(TimeoutError):  # noqa: N818 - reads as what it says
    """No outcome within the time that the caller was ready to wait; Redis still has the cancels.

    They are worked on, except for those ``given_up``, which are dead letters.
    """

    def __init__(self, order_ids: Sequence[str], given_up: Sequence[str] = ()) -> None:
        self.order_ids = tuple(order_ids)
        self.given_up = tuple(given_up)
        open_ids = [order_id for order_id in order_ids if order_id not in set(given_up)]
        words = [f"no outcome yet for {_some(open_ids)}; still being worked on"] if open_ids else []
        words += [f"given up, ask again: {_some(given_up)}"] if given_up else []
        super().__init__("; ".join(words))


class Lost(StoreError):  # noqa: N818 - named after what has happened
    """Of cancels that were accepted Redis has no result, no entry and no dead letter: nobody works on them.

    Ask again for ``order_ids``, which is always safe. (A result whose life is over looks the same.)
    """

    def __init__(self, order_ids: Sequence[str]) -> None:
        self.order_ids = tuple(order_ids)
        super().__init__(f"Redis has lost it: ask again for {_some(order_ids)}", may_be_accepted=False)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED_MOST]) + (", ..." if len(names) > NAMED_MOST else "")


@dataclass(frozen=True, slots=True)
class Status:
    """An order's record, where there is one, and its entry in the store while it is being worked on.

    ``dead``: it was given up, and nobody works on it until somebody asks again.
    """

    order_id: str
    result: CancelResult | None
    open: OpenCancel | None
    dead: DeadLetter | None = None


@dataclass(frozen=True, slots=True)
class PendingCancel:
    """An accepted cancel of one order."""

    order_id: str
    _client: CancelClient

    def result(self, timeout: float | None = None) -> CancelResult:
        """The outcome, waited for up to ``timeout`` seconds (None: for ever).

        Raises NotSettled, and Lost when Redis has lost it: ask again.
        """
        [result] = PendingCancels((self.order_id,), self._client).results(timeout)
        return result


@dataclass(frozen=True, slots=True)
class PendingCancels:
    """Accepted cancels of several orders, each once, in the order they were asked for."""

    order_ids: tuple[str, ...]
    _client: CancelClient

    def results(self, timeout: float | None = None) -> list[CancelResult]:
        """All outcomes, in the order asked for; raises NotSettled naming those still open, and Lost."""
        found: dict[str | None, CancelResult] = {}
        try:
            for result in self._each(timeout):
                found[result.order_id] = result
        except _Over as over:
            missing = [order_id for order_id in self.order_ids if order_id not in found]
            raise NotSettled(missing, over.dead) from None
        return [found[order_id] for order_id in self.order_ids]

    def as_settled(self, timeout: float | None = None) -> Iterator[CancelResult]:
        """The outcomes as they come; ends when all are there, or silently when the time is over.

        Raises Lost as soon as Redis is seen to have lost some; once asked for again, they can be waited for
        here as before.
        """
        with suppress(_Over):
            yield from self._each(timeout)

    def _each(self, timeout: float | None) -> Iterator[CancelResult]:
        """The outcomes as they come; raises _Over when the time is over first."""
        give_up = math.inf if timeout is None else time.monotonic() + timeout
        missing = dict.fromkeys(self.order_ids)
        while missing:
            wait_s = max(min(LOST_LOOK_EVERY_S, give_up - time.monotonic()), 0.0)
            try:
                for result in self._client.results(tuple(missing), timeout=wait_s):
                    missing.pop(str(result.order_id), None)
                    yield result
                standing = self._client.standing(tuple(missing))
            except StoreError as error:
                if not error.can_pass or time.monotonic() >= give_up:
                    raise
                time.sleep(LOOK_AGAIN_S)
                continue
            for order_id, result in standing.results.items():
                del missing[order_id]
                yield result
            if standing.lost:
                raise Lost(standing.lost)
            if missing and time.monotonic() >= give_up:
                raise _Over(standing.dead)


class _Over(Exception):  # noqa: N818 - named after what has happened
    """The time to wait is over; ``dead``: what nobody works on any more."""

    def __init__(self, dead: Sequence[str]) -> None:
        super().__init__()
        self.dead = dead


@dataclass(frozen=True, slots=True)
class PendingMass:
    """An accepted mass cancel."""

    request_id: str
    _client: CancelClient

    def result(self, timeout: float | None = None) -> dict[str, Any]:
        """The report, waited for up to ``timeout`` seconds (None: for ever); raises NotSettled, and Lost."""
        for shown in self.progress(timeout):
            if "flat" in shown:
                return shown
        raise NotSettled([f"mass cancel {self.request_id}"])

    def progress(
        self, timeout: float | None = None, *, silence: float | None = None
    ) -> Iterator[dict[str, Any]]:
        """How far it has got, whenever that changes (``orders``, ``settled``, ``open``), the report last.

        Ends early when the time is over, or when nothing has changed for ``silence`` seconds. An outage of
        Redis is waited out while there is time; raises StoreError when there is none left, and Lost when
        Redis has lost it.
        """
        give_up = math.inf if timeout is None else time.monotonic() + timeout
        last: dict[str, Any] | None = None
        changed = seen = time.monotonic()
        while True:
            over = time.monotonic() >= min(give_up, changed + (math.inf if silence is None else silence))
            shown = None
            try:
                shown = self._client.mass_status(self.request_id)
                is_there = shown is not None or self._client.knows_mass_cancel(self.request_id)
            except StoreError:
                if over:
                    raise
                is_there = True  # or not: nobody can tell
            if is_there:
                seen = time.monotonic()
            elif over or time.monotonic() - seen >= LOST_LOOK_EVERY_S:
                raise Lost([f"mass cancel {self.request_id}"])
            if shown is not None and shown != last:
                last, changed = shown, time.monotonic()
                yield shown
            if over or (shown is not None and "flat" in shown):
                return
            time.sleep(MASS_LOOK_EVERY_S)


class CancelClient:
    """Asks for cancels; safe to share between threads, not across a fork.

    ``requested_by`` is who asks, unless a call says otherwise; it is listed in the results. Given a URL, the
    rest (KALSHI_KEY_PREFIX, say) is as the environment has it; raises SettingsError. ``preload``: Celery is
    loaded now (0.15 s), not with the first message that wakes a worker up.
    """

    def __init__(
        self, redis_url: str | RedisSettings, *, requested_by: str | None = None, preload: bool = True
    ) -> None:
        if isinstance(redis_url, str):
            redis_url = RedisSettings.at(redis_url)
        refuse_celery_overrides()
        self._requested_by = requested_by
        self._tracer = open_tracer("kalshi-cancel-producer")
        self._server: redis.Redis = connect(redis_url)
        self._store = CancelStore(self._server, redis_url)
        self._registry = WorkerRegistry(self._server, redis_url)
        self._mass_cancels = MassCancels(self._server, redis_url)
        self._audit_log = AuditLog(self._server, redis_url)
        self._settings = redis_url
        if preload:
            _ = self._app

    @classmethod
    def from_env(cls, *, requested_by: str | None = None, preload: bool = True) -> Self:
        """A client for the Redis that the environment names (REDIS_URL); raises SettingsError."""
        return cls(RedisSettings.from_env(), requested_by=requested_by, preload=preload)

    def cancel(
        self,
        order_id: str,
        *,
        market_ticker: str | None = None,
        exchange_index: int | None = None,
        subaccount: int | None = None,
        requested_by: str | None = None,
        reason: str | None = None,
        deadline_s: float | None = None,
        lane: Lane = Lane.STRATEGY,
        again: bool = False,
    ) -> PendingCancel:
        """Asks for one order's cancel; fields as in :class:`~kalshi_cancel.model.requests.CancelRequest`.

        ``again``: the exchange is asked even if a result is stored that is final. You have seen the order
        rest after that.

        Raises BadRequest for fields that cannot be meant, and StoreError when it was not accepted (or when
        it may have been: asking again is always safe).
        """
        fields = {
            "order_id": order_id,
            "market_ticker": market_ticker,
            "exchange_index": exchange_index,
            "subaccount": subaccount,
            "requested_by": requested_by,
            "reason": reason,
            "deadline_s": deadline_s,
        }
        self.cancel_many([fields], lane=lane, again=again)
        return PendingCancel(order_id, self)

    def cancel_many(
        self,
        orders: Sequence[str | Mapping[str, Any]],
        *,
        lane: Lane = Lane.STRATEGY,
        again: bool = False,
    ) -> PendingCancels:
        """Asks for many: order ids, or mappings of the fields that :meth:`cancel` takes.

        Nothing is asked for unless every one of them is well-formed. An order named twice is canceled
        once. Raises as :meth:`cancel` does.
        """
        if isinstance(orders, str | bytes | Mapping):
            raise BadRequest(
                {"orders": f"expected a list, got one {type(orders).__name__}: cancel() takes one"}
            )
        if lane not in tuple(Lane):
            raise BadRequest({"lane": f"expected {' or '.join(Lane)}, got {ascii(lane)[:60]}"})
        lane = Lane(lane)
        requests = _parse_all([self._fields(order) for order in orders])
        with asking(self._tracer, "cancel", orders=len(requests), lane=lane.value) as traceparent:
            if traceparent is not None:
                requests = [
                    request if request.traceparent else replace(request, traceparent=traceparent)
                    for request in requests
                ]
            self._accept(requests, lane, again=again)
        return PendingCancels(tuple(request.order_id for request in requests), self)

    def _accept(self, requests: Sequence[CancelRequest], lane: Lane, *, again: bool) -> None:
        for start in range(0, len(requests), ACCEPT_AT_ONCE):
            portion = requests[start : start + ACCEPT_AT_ONCE]
            try:
                accepted = self._store.accept(
                    portion,
                    lane=lane,
                    default_deadline_s=DEFAULT_DEADLINE_S,
                    records_older_than_s=0.0 if again else None,
                )
            except StoreError as error:
                error.may_be_accepted = error.may_be_accepted or start > 0  # those before it are
                raise
            fresh = [request for request in portion if request.order_id not in accepted.settled]
            # The first portion calls the senders, the others see to it that one is there: all at the end
            # would leave the work lying until the last is accepted.
            if not accepted.listener_woken:
                self._ring(lane, fresh[:1] if start else fresh, waiting=accepted.waiting_messages)

    def mass_cancel(
        self,
        scope: Mapping[str, Any],
        *,
        requested_by: str | None = None,
        reason: str | None = None,
        automated: bool = True,
        dry_run: bool = False,
        deadline_s: float = 60.0,
        allow_side_effects: bool = False,
    ) -> PendingMass:
        """Asks for the cancel of everything in a scope (fields of :class:`~.model.scope.Scope`), risk first.

        ``dry_run`` only plans; ``deadline_s`` counts beyond the predicted time to flat; with
        ``allow_side_effects`` the exchange's own cancel-all or an order group's trigger may be used (see
        :class:`~.model.mass_request.MassRequest`). Raises BadRequest naming the bad fields, and StoreError as
        :meth:`cancel` does.
        """
        request = MassRequest.parse(
            {
                "scope": scope,
                "requested_by": requested_by or self._requested_by,
                "reason": reason,
                "automated": automated,
                "dry_run": dry_run,
                "deadline_s": deadline_s,
                "allow_side_effects": allow_side_effects,
            },
            now_s=self._mass_cancels.now_s(),
        )
        with asking(self._tracer, "mass cancel", request_id=request.request_id) as traceparent:
            self._mass_cancels.enter(replace(request, traceparent=traceparent))
            self._publish(lambda: wake_ups.start_mass_cancel(self._app, request.request_id))
        return PendingMass(request.request_id, self)

    def mass_status(self, request_id: str) -> dict[str, Any] | None:
        """The report of a mass cancel, or how far it has got; None when there is none of that id."""
        return self._mass_cancels.report(request_id) or self._mass_cancels.progress(request_id)

    def knows_mass_cancel(self, request_id: str) -> bool:
        """Whether a mass cancel of that id was accepted, and is not forgotten."""
        return self._mass_cancels.is_known(request_id)

    def mass_plan(self, request_id: str) -> dict[str, Any] | None:
        """The plan of a mass cancel, once it is made."""
        return self._mass_cancels.plan(request_id)

    def mass_cancels(self, *, at_most: int = 100) -> list[tuple[str, str, dict[str, Any] | None]]:
        """The latest mass cancels: id, when accepted, and the report or progress there is."""
        return list(self._mass_cancels.listed(at_most=at_most))

    def results(self, order_ids: Sequence[str], *, timeout: float | None = None) -> Iterator[CancelResult]:
        """The results of these orders as they come; ends early when ``timeout`` seconds are over."""
        return self._store.await_records(order_ids, timeout_s=timeout)

    def standing(self, order_ids: Sequence[str]) -> Standing:
        """Where each of these orders is: its result, whether it is open, given up, or not there at all."""
        return self._store.standing(order_ids)

    def status(self, order_id: str) -> Status:
        """What is known about an order's cancel now; all parts are None when nobody ever asked."""
        result, entry = self._store.record(order_id), self._store.open_cancel(order_id)
        may_be_dead = entry is None and (result is None or not result.outcome.final)
        dead = self._store.dead_letter(order_id) if may_be_dead else None
        return Status(order_id, result, entry, dead)

    def open_cancels(self) -> Iterator[OpenCancel]:
        """Everything that is accepted and not settled, risk first, in the order it is due."""
        return self._store.open_cancels()

    def held_back(self) -> dict[str, str]:
        """The workers that hold cancels back at this moment, and why."""
        return self._registry.held_back()

    def workers(self) -> list[WorkerShown]:
        """The workers that run at this moment, as far as they have said so within the last seconds."""
        return self._registry.workers()

    def dead_letters(self) -> Iterator[DeadLetter]:
        """What was given up unresolved, oldest first."""
        return self._store.dead_letters()

    def retry(self, order_ids: Sequence[str], *, by: str | None = None, why: str | None = None) -> list[str]:
        """Has dead letters worked on again; the ids of those that were dead. The audit log says by whom."""
        deed = {"action": "retry", "who": by or self._requested_by, "why": why, "orders": list(order_ids)}
        self._audit_log.append("operator", deed)
        revived = self._store.retry(order_ids, deadline_s=DEFAULT_DEADLINE_S)
        self._ring(Lane.STRATEGY, [CancelRequest(order_id) for order_id in revived], waiting=0)
        return revived

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections to Redis; the end of a ``with`` block does so, too."""
        self._server.close()
        if "_app" in self.__dict__:
            self._app.close()

    @cached_property
    def _app(self) -> Celery:
        """Loaded when it is needed: Celery takes longer to load than all the rest."""
        from celery import Celery  # noqa: PLC0415 - see above

        app = Celery("cancel-client", set_as_current=False)
        app.conf.update(
            broker_url=self._settings.celery_url,
            task_serializer="json",
            accept_content=["json"],
            task_create_missing_queues=True,
            # An answer within two seconds, whatever Redis does: the stock values wait for ever.
            broker_pool_acquire_timeout=1,
            broker_transport_options={
                **celery_options(self._settings),
                "socket_timeout": SOCKET_TIMEOUT_S,
                "socket_connect_timeout": CONNECT_TIMEOUT_S,
            },
            task_publish_retry=False,
        )
        return app

    def _ring(self, lane: Lane, requests: Sequence[CancelRequest], *, waiting: int) -> None:
        if requests:
            self._publish(lambda: wake_ups.wake_up_for(self._app, lane, requests, waiting=waiting))

    def _publish(self, wake_up: Callable[[], None]) -> None:
        """Wakes workers up; that it fails loses nothing, because they look by themselves, too."""
        from kombu.exceptions import OperationalError  # noqa: PLC0415 - loaded with Celery

        try:
            wake_up()
        except (OperationalError, redis.RedisError, OSError) as error:
            say(log, LogEvent.WAKE_UP_FAILED, why=words(error))

    def _fields(self, order: str | Mapping[str, Any]) -> object:
        fields = {"order_id": order} if isinstance(order, str) else order
        if self._requested_by is None or not isinstance(fields, Mapping) or fields.get("requested_by"):
            return fields
        return {**fields, "requested_by": self._requested_by}


def _parse_all(messages: Sequence[object]) -> list[CancelRequest]:
    """The requests, each order once; raises one BadRequest for all that is wrong with them."""
    requests: dict[str, CancelRequest] = {}
    problems: dict[str, str] = {}
    for at, message in enumerate(messages):
        try:
            request = CancelRequest.parse(message)
        except BadRequest as bad:
            place = f"orders[{at}]." if len(messages) > 1 else ""
            problems.update({place + field: problem for field, problem in bad.problems.items()})
        else:
            requests.setdefault(request.order_id, request)
    if problems:
        raise BadRequest(problems)
    return list(requests.values())
