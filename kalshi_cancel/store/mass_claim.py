"""A mass cancel claimed by one runner: what a runner reads and writes while it has it.

A claim is a lease with a fencing token. Only the latest claim may write, and nobody may once there is a
report: a runner that was stopped or cut off for longer than its lease changes nothing when it wakes up.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

import redis

from kalshi_cancel.model.counts import count_text, parse_count
from kalshi_cancel.model.results import CancelResult
from kalshi_cancel.model.times import utc_text
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store import results, scripts
from kalshi_cancel.store.audit import AuditLog
from kalshi_cancel.store.cancels import Fenced
from kalshi_cancel.store.keys import Keys
from kalshi_cancel.store.mass_cancels import json_object, number
from kalshi_cancel.store.pending import Fence, Progress
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import say

log = logging.getLogger(__name__)

LEASE_MS = 3_000
# In one step of Redis, which serves nobody else meanwhile; settled ones cost next to nothing.
LOOK_AT_MOST = 5_000
MEET_AT_MOST = 300
NOTE_AT_ONCE = 250
# What waits for the step that puts it in place.
DRAFT_LIFE_S = 60
BROUGHT_AT_ONCE = 1_000_000  # characters
PUBLISHED_IN_A_SCRIPT = 1_000_000  # characters; more is published after it
WITHDRAW_AT_ONCE = 200


@dataclass(slots=True)  # thousands are made at once: frozen, each would take three times as long
class Planned:
    """What an order had when it was found, contracts.

    ``settled``: its outcome was final before. ``swept``: a command of the exchange's own may have canceled
    it. ``late``: it was not there when the plan was made.
    """

    remaining_count: Decimal | None
    fill_count: Decimal | None
    settled: bool = False
    swept: bool = False
    late: bool = False

    def to_json(self) -> str:
        """The stored form."""
        had = [count_text(self.remaining_count), count_text(self.fill_count)]
        return json.dumps([*had, self.settled, self.swept, self.late])

    @classmethod
    def from_json(cls, text: str) -> Planned:
        """What :meth:`to_json` wrote; nothing is known where another version has noted other words."""
        try:
            remaining, filled, *flags = json.loads(text)
            settled, swept, late, *_ = (*map(bool, flags), False, False, False)
            return cls(parse_count(remaining), parse_count(filled), settled, swept, late)
        except (ValueError, TypeError, RecursionError):
            return cls(None, None)


class MassClaims:
    """Where runners take mass cancels from; safe to share between threads. Everything raises StoreError."""

    def __init__(self, server: redis.Redis, settings: RedisSettings, *, name: str) -> None:
        self.server = server
        self.settings = settings
        self.name = name
        self.audit_log = AuditLog(server, settings)
        self._claim = scripts.load(server, "gather", "mass_claim")
        self.scripts = _Scripts(
            keep=scripts.load(server, "gather", "fenced", "mass_keep"),
            note=scripts.load(server, "gather", "fenced", "mass_note"),
            note_orders=scripts.load(server, "gather", "fenced", "note_orders"),
            still_open=scripts.load(server, "gather", "fenced", "still_open"),
            withdraw=scripts.load(server, "gather", "fenced", "reply", "mass_withdraw"),
            without_entry=scripts.load(server, "not_pending"),
            finish=scripts.load(server, "gather", "audit", "mass_finish"),
            put_back=scripts.load(server, "gather", "mass_put_back"),
        )

    def take(self, request_id: str) -> MassClaim | None:
        """The mass cancel for this process to run; None when another runs it, or it is done."""
        asked_of = {"id": request_id, "name": self.name, "life_ms": LEASE_MS}
        args = scripts.asking(self.settings.key_prefix, **asked_of)
        asked = time.monotonic()
        claimed = scripts.surely(self.server, self._claim, args)
        if not claimed:
            return None
        token, meant, spent, waiters = claimed
        key = Keys(self.settings.key_prefix).mass_cancel(request_id)
        request = scripts.call(lambda: self.server.hget(key, "request")) or ""
        kept = _Kept(waiters, {"request": request, "meant": meant}, number(spent) or 0.0)
        return MassClaim(self, Fence(request_id, token), kept, held_until=asked + LEASE_MS / 1000)


@dataclass(frozen=True, slots=True)
class _Scripts:
    keep: Any
    note: Any
    note_orders: Any
    still_open: Any
    withdraw: Any
    without_entry: Any
    finish: Any
    put_back: Any


@dataclass(slots=True)
class _Kept:
    """What a runner has read and written of a mass cancel, to be put back should Redis lose it."""

    waiters: Sequence[str]
    fields: dict[str, str]
    spent: float
    orders: dict[str, Planned] = field(default_factory=dict)


class MassClaim:
    """One mass cancel that this process runs; safe to share between threads.

    ``request`` is its JSON as it was accepted. Everything raises StoreError, and what writes raises Fenced
    once the mass cancel is another's or done.
    """

    def __init__(self, claims: MassClaims, fence: Fence, kept: _Kept, *, held_until: float) -> None:
        self.fence = fence
        self.request = kept.fields["request"]
        self.has_lost = False  # Redis has lost something of it, which is put back
        self._kept = kept
        self.name = claims.name
        self._server = claims.server
        self._settings = claims.settings
        self._scripts = claims.scripts
        self._audit_log = claims.audit_log
        self._key = Keys(self._settings.key_prefix).mass_cancel(fence.request_id)
        self._held_until = held_until  # of its lease, as far as it is sure (monotonic)

    # -- the lease

    def keep(self) -> None:
        """Runs the lease anew."""
        asked = time.monotonic()
        self._write(self._scripts.keep, name=self.name, life_ms=LEASE_MS)
        self._held_until = asked + LEASE_MS / 1000

    @property
    def is_surely_held(self) -> bool:
        """Whether the lease has not run out by this process' own clock: it may have been stopped."""
        return time.monotonic() < self._held_until

    def leave(self) -> None:
        """Lets another runner go on at once."""
        self._write(self._scripts.keep, name=self.name, life_ms=0)

    def now_s(self) -> float:
        """The server's clock, epoch seconds: a mass cancel may pass between hosts whose own differ."""
        seconds, micros = scripts.call(self._server.time)
        return float(seconds) + float(micros) / 1e6

    # -- facts about it

    def begin(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """What was noted when the first runner began: these facts, unless there were some before."""
        self._kept.fields.setdefault("begun", json.dumps(facts))
        self._write(self._scripts.note, [("once", "begun", json.dumps(facts))])
        begun = self.read("begun")
        if begun is None:  # what is there cannot be read
            self.note(begun=facts)
            return dict(facts)
        return begun

    def note(self, **fields: Mapping[str, Any]) -> None:
        """Keeps ``begun``, ``plan``, ``command``, ``refused`` or ``progress``."""
        for name, value in fields.items():
            self._kept.fields[name] = json.dumps(value)
            self._write(self._scripts.note, [("set", name, json.dumps(value))])

    def read(self, name: str) -> dict[str, Any] | None:
        """What :meth:`note` or :meth:`begin` has kept; None for what cannot be read, too."""
        text = scripts.call(lambda: self._server.hget(self._key, name))
        value = json_object(text)
        if value is not None:
            self._kept.fields[name] = text
        return value

    def spend(self, tokens: float) -> None:
        """Notes tokens that were spent."""
        self._kept.spent += tokens
        self._write(self._scripts.note, [("add", "spent", tokens)])

    def spent(self) -> float:
        """The tokens that were spent for it, as far as that was noted."""
        return number(scripts.call(lambda: self._server.hget(self._key, "spent"))) or 0.0

    def note_audit(self, step: str, **details: Any) -> None:
        """Notes a step in the audit log; never raises, as what only observes decides nothing."""
        said = {"request_id": self.fence.request_id, "step": step, "worker": self.name, **details}
        self._audit_log.append("mass", said)

    # -- its orders

    def add_orders(self, orders: Mapping[str, Planned], *, anew: bool = False) -> None:
        """Notes orders that are about to be canceled, before they are entered into the store.

        ``anew``: also those that were noted before.
        """
        for order_id, had in orders.items():
            if anew or order_id not in self._kept.orders:
                self._kept.orders[order_id] = had
        noted = [(order_id, had.to_json()) for order_id, had in orders.items()]
        portions = [noted[start : start + NOTE_AT_ONCE] for start in range(0, len(noted), NOTE_AT_ONCE)]
        self._write_each(self._scripts.note_orders, portions, anew=anew)

    def open_again(self, order_ids: Iterable[str]) -> None:
        """Has orders that are noted counted among those that are left, before they are entered once more."""
        self.add_orders({each: self._kept.orders[each] for each in order_ids})

    @property
    def noted(self) -> Collection[str]:
        """The orders that this runner has noted, or read."""
        return self._kept.orders.keys()

    def orders(self) -> dict[str, Planned]:
        """The orders noted so far, with what they had."""
        key, kept = f"{self._key}:orders", self._kept.orders
        if scripts.call(lambda: self._server.hlen(key)) > len(kept):  # those of a runner before
            cursor = None
            while cursor != 0:
                scan = functools.partial(self._server.hscan, key, cursor or 0, count=NOTE_AT_ONCE)
                cursor, some = scripts.call(scan)
                kept |= {order_id: Planned.from_json(text) for order_id, text in some.items()}
        return dict(kept)

    def count_orders(self) -> int:
        """How many orders are noted so far; those that Redis has lost are noted anew."""
        if scripts.call(lambda: self._server.hlen(f"{self._key}:orders")) < len(self._kept.orders):
            self.has_lost = True
            self.add_orders(self._kept.orders)
        return len(self._kept.orders)

    def still_open(self) -> tuple[int, int]:
        """How many of its orders are not settled, and how many of those are overdue."""
        still, overdue = self._write(
            self._scripts.still_open, look_at_most=LOOK_AT_MOST, meet_at_most=MEET_AT_MOST
        )
        return int(still), int(overdue)

    def without_entry(self, order_ids: Sequence[str]) -> Iterator[str]:
        """Which of these orders have no entry in the store."""
        for start in range(0, len(order_ids), NOTE_AT_ONCE):
            rows = zip(order_ids[start : start + NOTE_AT_ONCE])
            args = scripts.asking(self._settings.key_prefix, rows)
            yield from scripts.run(self._server, self._scripts.without_entry, args)

    def withdraw(self, told: Sequence[CancelResult]) -> int:
        """Ends those of these cancels that nobody is at with these results; how many that were."""
        prefix, done = results.record_key("", self._settings.celery_prefix), 0
        now = utc_text(self.now_s())
        for start in range(0, len(told), WITHDRAW_AT_ONCE):
            rows = []
            for result, progress in self._with_progress(told[start : start + WITHDRAW_AT_ONCE]):
                parts = results.record_parts(result, date_done=now, requested_at=now, settled_at=now)
                rows.append((result.order_id, progress, *parts))
            asked = {"record_prefix": prefix, "life_s": self._settings.result_expires_s}
            done += int(self._write(self._scripts.withdraw, rows, **asked)[1])
        return done

    def _with_progress(self, told: Sequence[CancelResult]) -> Iterator[tuple[CancelResult, str]]:
        """These results with the attempts made so far, and the progress that tells them.

        Leaves out what one of these attempts may have canceled.
        """
        pipeline = self._server.pipeline(transaction=False)
        for result in told:
            pipeline.hget(Keys(self._settings.key_prefix).pending(result.order_id or ""), "progress")
        for result, text in zip(told, scripts.call(pipeline.execute), strict=True):
            progress = Progress.parse(text or "")
            if not progress.in_doubt:
                yield replace(result, attempts=progress.attempts), text or ""

    # -- its end

    def finish(self, report: Mapping[str, Any], in_short: Mapping[str, Any]) -> None:
        """Stores the report, tells whoever waits, and lets the mass cancel go.

        That is one step. What it puts in place, which may be megabytes, is written before.
        """
        is_done_at = report.get("completed_at") or utc_text(self.now_s())
        record = results.task_record("", report, date_done=is_done_at).removesuffix('""}')
        said = {"request_id": self.fence.request_id, "step": "finished", **in_short}
        key_prefix = results.task_key("", self._settings.celery_prefix)
        is_small = len(record) <= PUBLISHED_IN_A_SCRIPT
        asked = {
            "report": json.dumps(in_short),
            "ended": _how_ended(in_short),
            "key_prefix": key_prefix,
            "life_s": self._settings.result_expires_s,
            "audit": json.dumps(said, separators=(",", ":"))[1:] if self._settings.audit else "",
            "is_published_here": is_small,
        }
        drafts: dict[str, str] = {}  # where the record for each task waits
        fence, is_done = scripts.call(lambda: self._server.hmget(self._key, ["fence", "report"]))
        wanted: list[str] = []
        if fence == self.fence.token and not is_done:
            reserved = results.RESERVED
            wanted = [each for each in self._kept.waiters if not each.startswith(reserved)]
            wanted.append(f"mass:{self.fence.request_id}")
        while True:
            for task_id in wanted:
                drafts[task_id] = f"{self._key}:draft:{task_id}"
                self._bring(drafts[task_id], f"{record}{json.dumps(task_id)}}}")
            is_done, *others = self._write(self._scripts.finish, drafts.items(), **asked)
            if is_done:
                break
            wanted = others[0]  # those who came meanwhile
        if not is_small:
            for task_id in drafts:
                text = f"{record}{json.dumps(task_id)}}}"
                scripts.call(functools.partial(self._server.publish, key_prefix + task_id, text))

    def _bring(self, key: str, text: str) -> None:
        """Stores a text for a while, in portions."""
        first, *others = (text[at : at + BROUGHT_AT_ONCE] for at in range(0, len(text), BROUGHT_AT_ONCE))
        scripts.call(functools.partial(self._server.set, key, first, ex=DRAFT_LIFE_S))
        for each in others:
            scripts.call(functools.partial(self._server.append, key, each))

    def _write(self, script: Any, rows: Iterable[Sequence[Any]] = (), **asked: Any) -> Any:
        [answer] = self._write_each(script, [rows], **asked)
        return answer

    def _write_each(
        self, script: Any, portions: Sequence[Iterable[Sequence[Any]]], **asked: Any
    ) -> list[Any]:
        mine = {"id": self.fence.request_id, "token": self.fence.token}
        args = [scripts.asking(self._settings.key_prefix, rows, **mine, **asked) for rows in portions]
        answers = scripts.surely_each(self._server, script, args)
        if not all(answers):
            self._put_back()
            answers = scripts.surely_each(self._server, script, args)
        if not all(answers):
            raise Fenced(self.fence)
        return answers

    def _put_back(self) -> None:
        """Puts it back if Redis has lost it: nobody else's report can have been there and be forgotten."""
        if time.monotonic() > self._held_until + self._settings.result_expires_s:
            return
        kept = self._kept
        fields = {**kept.fields, "spent": f"{kept.spent:g}"}
        request = ("HSETNX", self._key, "request", fields.pop("request"))
        args = scripts.asking(
            self._settings.key_prefix,
            fields.items(),
            id=self.fence.request_id,
            token=self.fence.token,
            name=self.name,
            life_ms=LEASE_MS,
            waiters=list(kept.waiters),
        )
        if not scripts.surely(self._server, self._scripts.put_back, args, then=[request]):
            return
        self.has_lost = True
        say(log, LogEvent.MASS_CANCEL_RESTORED, request_id=self.fence.request_id)
        self.add_orders(kept.orders)


def _how_ended(report: Mapping[str, Any]) -> str:
    return "planned" if report.get("dry_run") else "flat" if report.get("flat") else "not_flat"
