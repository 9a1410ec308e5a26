"""The producers of one run: they ask for cancels and wait for the answers; others meddle with the orders."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing

import redis
from celery import Celery

from kalshi_cancel.client import CancelClient
from kalshi_cancel.model.results import CancelResult
from kalshi_cancel.sandbox.control import Control, ControlError
from kalshi_cancel.store.scripts import StoreError
from trials.campaign.judge import Promise
from trials.campaign.plan import Ask, Deed, Meddling, Plan

PRODUCER_WITHIN_S = 2.0
ASK_AGAIN_AFTER_S = 0.1
WAIT_S = 1.0  # at a time: then whoever waits looks for what else was accepted meanwhile
LOOK_EVERY_S = 0.1
ANSWERED_WITHIN_S = 10.0  # raw messages get their answers a moment after the order is settled
EXPIRED = "expired"  # what the exchange says of orders that somebody let expire


class Producers:
    """What the producers of one run ask, what they were told, and who of them never got an answer."""

    def __init__(self, redis_url: str, plan: Plan, *, started: float) -> None:
        self._redis_url = redis_url
        self._plan = plan
        self._started = started
        self._lock = threading.Lock()
        # Set when the fault is over: from then on nobody asks again for what was not accepted.
        self.patience = threading.Event()
        # Set when all is settled, or time is over: nobody waits any longer.
        self.over = threading.Event()
        self.promises = {str(order["order_id"]): Promise() for ask in plan.asks for order in ask.orders}
        self.problems: list[str] = []
        self.slowest_s = 0.0
        self._waited_for: dict[int, dict[str, None]] = {}
        self._messages: list[tuple[str, Ask]] = []

    def ask(self, number: int) -> None:
        """Asks for what this producer has to ask for, in time, again when it was not accepted."""
        with (
            closing(CancelClient(self._redis_url, requested_by=f"producer-{number}")) as client,
            Celery(broker=self._redis_url, set_as_current=False) as celery,
        ):
            for ask in self._plan.asks:
                if ask.producer == number:
                    time.sleep(max(0.0, self._started + ask.at_s - time.time()))
                    call = self._raw(celery, ask) if ask.raw else _by_client(client, ask)
                    while not self._is_answered(ask, call) and not ask.once and not self.patience.is_set():
                        time.sleep(ASK_AGAIN_AFTER_S)

    def wait(self, number: int) -> None:
        """Waits for the results of what this producer was told is accepted, until all is over."""
        with closing(CancelClient(self._redis_url)) as client:
            while not self.over.is_set():
                if not self._wait_once(client, number):
                    time.sleep(ASK_AGAIN_AFTER_S)
            self._wait_once(client, number)

    def _wait_once(self, client: CancelClient, number: int) -> bool:
        with self._lock:
            order_ids = list(self._waited_for.setdefault(number, {}))
        try:
            for result in client.results(order_ids, timeout=WAIT_S) if order_ids else ():
                with self._lock:
                    self._waited_for[number].pop(str(result.order_id), None)
        except StoreError:
            return False  # a fault is playing
        return bool(order_ids)

    def unanswered(self) -> list[str]:
        """The orders whose producers were told of the acceptance and of no outcome."""
        return sorted({order_id for waited in self._waited_for.values() for order_id in waited})

    def answers(self, server: redis.Redis) -> tuple[list[CancelResult], list[str]]:
        """What raw messages got under their own task ids, and the orders whose messages got nothing."""
        waiting, found, missing = dict(self._messages), list[CancelResult](), set[str]()
        give_up = time.monotonic() + ANSWERED_WITHIN_S
        while waiting and time.monotonic() < give_up:
            texts = server.mget([f"celery-task-meta-{task_id}" for task_id in waiting])
            for (task_id, ask), text in zip(list(waiting.items()), texts, strict=True):
                if text is not None:
                    values = _values(str(text))
                    found += values
                    missing |= _ids(ask) - {value.order_id for value in values}
                    del waiting[task_id]
            time.sleep(LOOK_EVERY_S)
        return found, sorted(missing.union(*(_ids(ask) for ask in waiting.values())))

    def _is_answered(self, ask: Ask, call: Callable[[], object]) -> bool:
        """Asks once; False when it is worth asking again."""
        promises = [self.promises[order_id] for order_id in _ids(ask)]
        asked = time.monotonic()
        error: StoreError | None = None
        try:
            call()
        except StoreError as refusal:
            error = refusal
        except Exception as unexpected:  # noqa: BLE001 - producers are promised StoreError and nothing else
            if not ask.raw:  # (what Celery itself raises of a cut connection is not ours)
                self.problems.append(f"a producer got {unexpected!r}")
                return True
            error = StoreError(f"Celery raised {unexpected!r}", may_be_accepted=True)
        took_s = time.monotonic() - asked
        with self._lock:
            self.slowest_s = max(self.slowest_s, took_s)
            for promise in promises:
                if error is None:
                    promise.accepted_at = promise.accepted_at or time.time()
                elif error.may_be_accepted:
                    promise.maybe = True
                else:
                    promise.refused = True
            if error is None and not ask.raw:
                self._waited_for.setdefault(ask.producer, {}).update(dict.fromkeys(_ids(ask)))
        if took_s > PRODUCER_WITHIN_S and not ask.raw:
            self.problems.append(f"a producer waited {took_s:.2f} s ({'error' if error else 'accepted'})")
        return error is None

    def _raw(self, celery: Celery, ask: Ask) -> Callable[[], object]:
        def send() -> None:
            orders = [dict(order) for order in ask.orders]
            name, fields = ("cancel_order", orders[0]) if len(orders) == 1 else ("cancel_orders", None)
            sent = celery.send_task(name, kwargs=fields or {"orders": orders}, queue=ask.lane.queue)
            self._messages.append((str(sent.id), ask))

        return send


def _by_client(client: CancelClient, ask: Ask) -> Callable[[], object]:
    if len(ask.orders) == 1:
        return lambda: client.cancel(**ask.orders[0], lane=ask.lane)
    return lambda: client.cancel_many(ask.orders, lane=ask.lane)


def _ids(ask: Ask) -> set[str]:
    return {str(order["order_id"]) for order in ask.orders}


def _values(text: str) -> list[CancelResult]:
    value = json.loads(text)["result"]
    return [CancelResult.from_json(each) for each in (value if isinstance(value, list) else [value])]


def play_meddling(url: str, meddling: Sequence[Meddling], started: float) -> None:
    """Plays what others do during the run; orders that do not rest any longer are left alone."""
    with Control(url) as control:
        for each in sorted(meddling, key=lambda each: each.at_s):
            time.sleep(max(0.0, started + each.at_s - time.time()))
            with contextlib.suppress(ControlError):  # our cancel was there first
                meddle(control, each.order_id, each.deed)


def meddle(control: Control, order_id: str, deed: Deed, *, ago_s: float = 0.0) -> None:
    """Does to an order what others do, ``ago_s`` before now."""
    match deed:
        case "fill":
            control.fill(order_id, ago_s=ago_s)
        case "fill_some":
            control.fill(order_id, "4.00", ago_s=ago_s)
        case "cancel":
            control.cancel_elsewhere(order_id, ago_s=ago_s)
        case "decrease":
            control.decrease(order_id, to="6.00", ago_s=ago_s)
        case "amend":
            control.amend(order_id, count="8.00", price="0.40", ago_s=ago_s)
        case "grow":
            control.amend(order_id, count="13.00", ago_s=ago_s)
        case "expire":
            control.cancel_elsewhere(order_id, ago_s=ago_s)
            reads = ["read", "list"]
            control.fault("odd_fields", operation=reads, order_id=order_id, fields={"status": EXPIRED})
