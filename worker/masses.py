"""Mass cancels in Redis: what was asked for, in whose hands it is, how far it has got, and its report.

Any worker can go on with one: everything a runner needs to know is here, and a lease tells whether one is
at it. The orders themselves are entries of the book like all others. Keys, under the configured prefix P:

- ``P:masses``               sorted set: the ids by when they were accepted, ms
- ``P:masses:open``          set: those without a report
- ``P:masses:pace``          orders a second that were settled when no tokens held them up
- ``P:mass:{id}``            hash: request, what it meant, begun, plan, progress, report (all JSON), spent
- ``P:mass:{id}:waiters``    set: the tasks that want the report
- ``P:mass:{id}:orders``     hash: what each order had left when it was planned
- ``P:mass:{id}:left``       list: the orders that may not be settled yet
- ``P:mass:{id}:lease``      the runner at it, for a few seconds
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any

import redis
from redis.client import Pipeline

from worker import records, scripts
from worker.audit import Trail
from worker.orders import (
    DEADLINE_MAX_S,
    TEXT_MAX_CHARS,
    BadRequest,
    count_text,
    is_order_id,
    is_traceparent,
    utc_text,
)
from worker.scope import Scope
from worker.settings import RedisSettings

LEASE_MS = 3_000
_RESERVED = ("cancel:", "mass:")  # a task's id is its producer's word; what is kept there is somebody else's
# In one step of Redis, which serves nobody else meanwhile; settled ones cost next to nothing.
LOOK_AT_MOST = 5_000
MEET_AT_MOST = 300


@dataclass(frozen=True, slots=True)
class MassRequest:
    """A mass cancel as it was asked for; ``deadline_s`` counts beyond the predicted time to flat.

    ``allow_side_effects``: the exchange's own mass commands may be used where they fit, with what they do
    besides: its cancel-all may also cancel orders that come during the next minute, and an order group's
    trigger closes the group for new orders until it is reset. ``traceparent``: the span that its traces, and
    those of its orders, hang on.
    """

    request_id: str
    scope: Scope
    requested_by: str | None = None
    reason: str | None = None
    automated: bool = True
    dry_run: bool = False
    deadline_s: float = 60.0
    allow_side_effects: bool = False
    traceparent: str | None = None
    accepted_at: str = ""

    @classmethod
    def parse(cls, message: Mapping[str, Any]) -> MassRequest:
        """The mass cancel that a message asks for, accepted now; raises BadRequest naming every bad field."""
        problems: dict[str, str] = {}
        values: dict[str, Any] = {}
        for name, given in message.items():
            check, expected = _CHECKS.get(name, (None, ""))
            if check is None:
                problems[ascii(name)] = f"unknown field; known are {', '.join(sorted(_CHECKS))}"
            elif given is not None and not check(given):
                problems[name] = f"expected {expected}, got {ascii(given)[:60]}"
            elif given is not None:
                values[name] = given
        try:
            scope = Scope.parse(message.get("scope"))
        except BadRequest as bad:
            problems.update(
                {name if name == "scope" else f"scope.{name}": why for name, why in bad.problems.items()}
            )
        if problems:
            raise BadRequest(problems)
        return cls(
            **{
                "request_id": str(uuid.uuid4()),
                **values,
                "scope": scope,
                "accepted_at": utc_text(time.time()),
            }
        )

    def to_json(self) -> dict[str, Any]:
        """The stored form."""
        return {
            "request_id": self.request_id,
            "scope": self.scope.to_json(),
            "requested_by": self.requested_by,
            "reason": self.reason,
            "automated": self.automated,
            "dry_run": self.dry_run,
            "deadline_s": self.deadline_s,
            "allow_side_effects": self.allow_side_effects,
            "traceparent": self.traceparent,
            "accepted_at": self.accepted_at,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MassRequest:
        """What :meth:`to_json` wrote, without fields that only newer versions of us know."""
        known = {field.name for field in fields(cls)}
        kept = {name: each for name, each in value.items() if name in known}
        return cls(**{**kept, "scope": Scope.parse(value["scope"])})


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= TEXT_MAX_CHARS and value.isprintable()


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_deadline(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= DEADLINE_MAX_S


_TEXT = f"printable text of at most {TEXT_MAX_CHARS} characters"
_CHECKS: dict[str, tuple[Callable[[object], bool], str]] = {
    "request_id": (is_order_id, "1 to 128 letters, digits, '-' or '_'"),
    "scope": (lambda _value: True, ""),
    "requested_by": (_is_text, _TEXT),
    "reason": (_is_text, _TEXT),
    "automated": (_is_flag, "true or false"),
    "dry_run": (_is_flag, "true or false"),
    "allow_side_effects": (_is_flag, "true or false"),
    "deadline_s": (_is_deadline, f"seconds, above 0 and at most {DEADLINE_MAX_S:g}"),
    "traceparent": (is_traceparent, "a W3C traceparent like 00-{32 hex digits}-{16 hex digits}-01"),
}


@dataclass(frozen=True, slots=True)
class Planned:
    """What an order had when it was planned to be canceled, contracts; ``settled``: its outcome was final."""

    remaining_count: Decimal | None
    fill_count: Decimal | None
    settled: bool = False


class Masses:
    """The mass cancels under one prefix; safe to share between threads. Everything raises BookError."""

    def __init__(self, server: redis.Redis, settings: RedisSettings) -> None:
        self._server = server
        self._prefix = settings.key_prefix
        self._celery_prefix = settings.celery_prefix
        self._life_s = settings.result_expires_s
        self._wait_replicas = settings.wait_replicas
        self._enter = scripts.load(server, "enter")
        self._trail = Trail(server, settings)
        self._keep_lease = scripts.load(server, "keep_lease")
        self._still_open = scripts.load(server, "still_open")
        self._note_orders = scripts.load(server, "gather", "note_orders")

    def enter(self, request: MassRequest, *, reply_to: str = "") -> None:
        """Accepts a mass cancel; entering the same one again only has its report told to one more task.

        Raises BadRequest when its ``request_id`` is that of another one.
        """
        if reply_to.startswith(_RESERVED):
            reply_to = ""
        asked = request.to_json()
        meant = json.dumps({name: asked[name] for name in ("scope", "dry_run", "allow_side_effects")})
        args = [self._prefix, request.request_id, json.dumps(asked), reply_to, time.time() * 1000, meant]
        became, *report = scripts.accept(self._server, self._enter, args, replicas=self._wait_replicas)
        if became == "other":
            raise BadRequest({"request_id": f"is taken by another mass cancel: {request.request_id}"})
        if became == "new":
            self.tell_trail(request.request_id, "accepted", **asked)
        elif reply_to and report[0]:
            pipeline = self._server.pipeline()
            self._answer(pipeline, reply_to, json.loads(report[0]))
            scripts.call(pipeline.execute)

    def tell_trail(self, request_id: str, step: str, /, **details: Any) -> None:
        """Notes a step in the audit trail."""
        self._trail.append("mass", {"request_id": request_id, "step": step, **details})

    def now_s(self) -> float:
        """The server's clock, epoch seconds: a mass cancel may pass between hosts whose own differ."""
        seconds, micros = scripts.call(self._server.time)
        return float(seconds) + float(micros) / 1e6

    def open_ids(self) -> list[str]:
        """Those without a report."""
        return sorted(scripts.call(lambda: self._server.smembers(f"{self._prefix}:masses:open")))

    def take(self, request_id: str, runner: str) -> MassRequest | None:
        """The mass cancel for this runner to go on with, None when another is at it or it is done."""
        lease = f"{self._key(request_id)}:lease"
        if not scripts.call(lambda: self._server.set(lease, runner, nx=True, px=LEASE_MS)):
            return None
        fields = scripts.call(lambda: self._server.hmget(self._key(request_id), ["request", "report"]))
        if fields[1]:
            scripts.call(lambda: self._server.srem(f"{self._prefix}:masses:open", request_id))
        return MassRequest.from_json(json.loads(fields[0])) if fields[0] and not fields[1] else None

    def keep(self, request_id: str, runner: str) -> bool:
        """Runs the lease anew; False when another runner has it."""
        args = [self._prefix, f"{self._key(request_id)}:lease", runner, LEASE_MS]
        return bool(scripts.call(lambda: self._keep_lease(args=args)))

    def leave(self, request_id: str, runner: str) -> None:
        """Lets another runner go on at once, if this one has the lease."""
        if self.keep(request_id, runner):
            scripts.call(lambda: self._server.delete(f"{self._key(request_id)}:lease"))

    def note(self, request_id: str, **fields: Mapping[str, Any]) -> None:
        """Keeps ``plan`` or ``progress``."""
        texts = {name: json.dumps(value) for name, value in fields.items()}
        scripts.call(lambda: self._server.hset(self._key(request_id), mapping=texts))  # type: ignore[arg-type]  # text to text

    def add_orders(self, request_id: str, orders: Mapping[str, Planned]) -> None:
        """Notes orders that are about to be canceled, before they are entered into the book."""
        if not orders:
            return
        args: list[Any] = [self._prefix, request_id]
        for order_id, each in orders.items():
            had = [count_text(each.remaining_count), count_text(each.fill_count), each.settled]
            args += (order_id, json.dumps(had))
        scripts.call(lambda: self._note_orders(args=args))

    def begin(self, request_id: str, **facts: Any) -> dict[str, Any]:
        """What was noted when the first runner began: these facts, unless there was one before."""
        pipeline = self._server.pipeline()
        pipeline.hsetnx(self._key(request_id), "begun", json.dumps(facts))
        pipeline.hget(self._key(request_id), "begun")
        begun: dict[str, Any] = json.loads(scripts.call(pipeline.execute)[1])
        return begun

    def spend(self, request_id: str, tokens: float) -> None:
        """Notes tokens that a runner has spent."""
        scripts.call(lambda: self._server.hincrbyfloat(self._key(request_id), "spent", tokens))

    def spent(self, request_id: str) -> float:
        """The tokens that its runners have spent, apart from the orders' own calls."""
        return float(scripts.call(lambda: self._server.hget(self._key(request_id), "spent")) or 0)

    def pace(self) -> float | None:
        """Orders a second that the fleet has settled when no tokens held it up, None while not measured."""
        text = scripts.call(lambda: self._server.get(f"{self._prefix}:masses:pace"))
        return float(text) if text else None

    def note_pace(self, orders_per_s: float) -> None:
        """Keeps what was measured, averaged with what was known."""
        known = self.pace() or orders_per_s
        text = f"{(known + orders_per_s) / 2:.0f}"
        scripts.call(lambda: self._server.set(f"{self._prefix}:masses:pace", text))

    def orders(self, request_id: str) -> dict[str, Planned]:
        """The orders noted so far, with what they had."""
        noted: dict[str, str] = scripts.call(lambda: self._server.hgetall(f"{self._key(request_id)}:orders"))
        planned: dict[str, Planned] = {}
        for order_id, text in noted.items():
            remaining, filled, settled = json.loads(text)
            planned[order_id] = Planned(
                None if remaining is None else Decimal(remaining),
                None if filled is None else Decimal(filled),
                settled,
            )
        return planned

    def count_orders(self, request_id: str) -> int:
        """How many orders are noted so far."""
        return int(scripts.call(lambda: self._server.hlen(f"{self._key(request_id)}:orders")))

    def still_open(self, request_id: str) -> tuple[int, int]:
        """How many of its orders are not settled, and how many of those are overdue."""
        args = [self._prefix, request_id, LOOK_AT_MOST, MEET_AT_MOST]
        still, overdue = scripts.call(lambda: self._still_open(args=args))
        return int(still), int(overdue)

    def plan(self, request_id: str) -> dict[str, Any] | None:
        """The plan, once it is made."""
        return self._field(request_id, "plan")

    def progress(self, request_id: str) -> dict[str, Any] | None:
        """How far it has got."""
        return self._field(request_id, "progress")

    def report(self, request_id: str) -> dict[str, Any] | None:
        """The report, once it is done."""
        return self._field(request_id, "report")

    def finish(self, request_id: str, report: Mapping[str, Any]) -> None:
        """Stores the report, tells the waiters, and lets the mass cancel go."""
        key = self._key(request_id)
        waiters = set(scripts.call(lambda: self._server.smembers(f"{key}:waiters")))
        earlier = scripts.call(lambda: self._server.hget(key, "reply_to"))  # as versions before that noted it
        if earlier and not earlier.startswith(_RESERVED):
            waiters.add(earlier)
        pipeline = self._server.pipeline()
        pipeline.hset(key, "report", json.dumps(report))
        pipeline.srem(f"{self._prefix}:masses:open", request_id)
        # The list forgets what the keys of finished mass cancels have forgotten.
        pipeline.zremrangebyscore(f"{self._prefix}:masses", "-inf", (time.time() - self._life_s) * 1000)
        pipeline.delete(f"{key}:lease")
        for name in (key, f"{key}:orders", f"{key}:left", f"{key}:waiters"):
            pipeline.expire(name, self._life_s)
        for task_id in {f"mass:{request_id}", *waiters}:
            self._answer(pipeline, task_id, report)
        scripts.call(pipeline.execute)

    def _answer(self, pipeline: Pipeline, task_id: str, report: Mapping[str, Any]) -> None:
        record = records.task_record(task_id, report, date_done=utc_text(time.time()))
        result_key = records.task_key(task_id, self._celery_prefix)
        pipeline.set(result_key, record, ex=self._life_s)
        pipeline.publish(result_key, record)

    def listed(self, *, at_most: int = 100) -> Iterator[tuple[str, str, dict[str, Any] | None]]:
        """The latest mass cancels: id, when accepted, and the report or progress there is."""
        found = scripts.call(
            lambda: self._server.zrange(f"{self._prefix}:masses", 0, at_most - 1, desc=True, withscores=True)
        )
        for request_id, accepted_ms in found:
            shown = self.report(request_id) or self.progress(request_id)
            yield request_id, utc_text(accepted_ms / 1000), shown

    def running(self, *, at_most: int = 100) -> list[tuple[MassRequest, dict[str, Any] | None]]:
        """Those without a report, the latest first, and how far each has got."""
        pipeline = self._server.pipeline(transaction=False)
        for request_id in self.open_ids()[:at_most]:
            pipeline.hmget(self._key(request_id), ["request", "progress"])
        found = []
        for request, progress in scripts.call(pipeline.execute):
            try:
                found.append((MassRequest.from_json(json.loads(request)), progress and json.loads(progress)))
            except (ValueError, TypeError, KeyError):
                continue  # spoilt, or just forgotten: who runs it says so
        return sorted(found, key=lambda each: each[0].accepted_at, reverse=True)

    def _field(self, request_id: str, name: str) -> dict[str, Any] | None:
        text = scripts.call(lambda: self._server.hget(self._key(request_id), name))
        value: dict[str, Any] | None = json.loads(text) if text else None
        return value

    def _key(self, request_id: str) -> str:
        return f"{self._prefix}:mass:{request_id}"
