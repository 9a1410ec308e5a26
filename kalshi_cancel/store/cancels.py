"""The cancel store in Redis: what was accepted and is not settled yet, and who has claimed it.

A cancel is accepted by one atomic entry and leaves only in the step that stores its record. In between it
is due at a moment: now, when a pause ends, or when the lease of the sender that claimed it runs out; so what
a vanished worker held comes back by itself. Time is the server's: workers' clocks may differ.

Each operation is one Lua script, under ``lua`` with its contract above it; its cost does not depend
on how long the store is. Their keys and fields, and in which order they are written:
docs/reference/redis-keys.md.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import redis

from kalshi_cancel.log_events import LogEvent
from kalshi_cancel.logs import Seldom, say
from kalshi_cancel.model.orders import (
    CancelRequest,
    CancelResult,
    Lane,
    Outcome,
    Problem,
    count_text,
    utc_text,
    write_path,
)
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store import results, scripts
from kalshi_cancel.store.keys import Keys
from kalshi_cancel.store.redis_errors import words
from kalshi_cancel.store.scripts import StoreError, connect
from kalshi_cancel.store.server_clock import ServerClock

__all__ = [
    "Accepted",
    "CancelStore",
    "Claim",
    "ClaimRequest",
    "Conclusion",
    "DeadLetter",
    "Entry",
    "Fence",
    "Fenced",
    "MakeDeadLetter",
    "NothingClaimed",
    "OpenCancel",
    "Overdue",
    "Progress",
    "RetryLater",
    "Settle",
    "Standing",
    "StoreError",
    "connect",
]

log = logging.getLogger(__name__)

# Orders entered by one script (2 ms; 20 where many have joined). One call claims them: fewer take more calls.
ACCEPT_AT_ONCE = 100
LIST_AT_ONCE = 500
LOOK_AT_ONCE = 200  # orders, of four looks each
UNREADABLE_MOST = 100
DEAD_LIFE_DAYS = 30  # by then somebody has looked at what was given up, or set aside
FORGET_AT_ONCE = 200
RETRY_AT_ONCE = 100
KEYS_WAKE_UP_LIFE_S = 5  # nobody may listen any more
MEND_AT_ONCE = 200  # keys to scan
SPOILT_ENTRY = Problem("spoilt_entry", "what is stored of it cannot be read: it is set aside")
# What reading a stored text raises that somebody has spoilt, or a newer version has written.
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)
_GLOB = re.compile(r"[*?\[\]\\]")
_LISTENER_WOKEN = 2  # what lanes_to_wake.lua answers when a sender listens


@dataclass(frozen=True, slots=True)
class Accepted:
    """What accepting some requests came to; ``settled`` are answered from the record already.

    ``listener_woken``: a listening sender got a wake-up; otherwise a message must wake a worker,
    unless enough of them wait.
    ``joined``: the orders that had an entry already.
    """

    settled: dict[str, CancelResult]
    listener_woken: bool
    waiting_messages: int
    joined: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Known:
    """What new entries begin with: what is known about them, which path they are due on, and when."""

    progress: str
    path: str
    due_in_s: float


@dataclass(frozen=True, slots=True)
class Fence:
    """A mass cancel's runner may enter orders with it, until there is a report or another runner."""

    request_id: str
    token: str


class Fenced(Exception):  # noqa: N818 - named after what has happened
    """The mass cancel has a report or another runner by now: nothing was entered."""

    def __init__(self, fence: Fence) -> None:
        super().__init__(f"mass cancel {fence.request_id} has a report or another runner")


@dataclass(slots=True)  # thousands are made a second: frozen, each would take three times as long
class Entry:
    """A claimed entry; only ``token``'s holder can conclude it, and only until a newer claim.

    ``interrupted``: an earlier sender vanished while it may have been sending. ``deadline_left_s`` counts
    from the claim; ``reported``: the waiters were told ``unresolved`` already.
    """

    order_id: str
    token: str
    request: CancelRequest
    progress: str
    interrupted: bool
    first_sent_ms: str | None
    first_sent_age_ms: int
    lane: Lane
    requested_at: str
    age_s: float
    deadline_left_s: float
    reported: bool


@dataclass(frozen=True, slots=True)
class Claim:
    """What is to go out in one call, which is paid for: ``tokens`` from ``bucket``; and what else is due.

    ``is_more``: more can be claimed now; else ``next_due_s`` is when (0: once there are tokens; None: nothing
    is in the store), and ``tokens_in_s`` when the tokens for it may be there (0: nothing waits for tokens).
    ``coming`` senders were told or have a message on its way.
    """

    entries: tuple[Entry, ...]
    is_more: bool
    next_due_s: float | None
    tokens_in_s: float
    coming: int
    bucket: str = ""
    tokens: float = 0.0


class NothingClaimed(StoreError):  # noqa: N818 - named after what has happened
    """What was to be stored is stored, as ``done`` says; nothing could be claimed."""

    def __init__(self, message: str, done: list[bool]) -> None:
        super().__init__(message, may_be_accepted=False)
        self.done = done


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """What senders are ready to claim: one call's worth of what is due, the first lane first.

    Up to ``at_most`` cancels, or one read-back, for ``lease_s``; where calls are for one order each, up to
    ``calls`` of them. ``exchange_ms``, this moment on the engine's clock (its bounds), is recorded with the
    first claim of each; ``risk_reserve`` is the share of each write bucket that only the risk lane may touch.
    At most ``reads`` of the calls are read-backs, and each counts as due ``reads_after_s`` later than it is.
    """

    lanes: tuple[Lane, ...]
    at_most: int
    lease_s: float
    exchange_ms: str | int | None
    calls: int = 1
    risk_reserve: float = 0.0
    reads: int = 1_000
    reads_after_s: float = 0.0
    cancel_cost: float = 2.0
    read_cost: float = 2.0
    list_cost: float = 10.0


@dataclass(frozen=True, slots=True)
class Settle:
    """The outcome is known: the record is stored and the entry goes."""

    entry: Entry
    result: CancelResult


@dataclass(frozen=True, slots=True)
class RetryLater:
    """Not known yet: due again after ``pause_s``; without a pause, at its old place in the line.

    ``path`` names the bucket that pays for the next call (empty: the same as before).
    ``for_key``: the id of a key that may do more than this worker's (empty: any worker may go on).
    """

    entry: Entry
    progress: str
    pause_s: float = 0.0
    path: str = ""
    for_key: str = ""


@dataclass(frozen=True, slots=True)
class MakeDeadLetter:
    """Too old to be worked on: kept as a dead letter."""

    entry: Entry
    progress: str


Conclusion = Settle | RetryLater | MakeDeadLetter


@dataclass(frozen=True, slots=True)
class Completed:
    """What one sender completed; ``done`` are the calls made for it, as the audit log is to show them."""

    conclusions: Sequence[Conclusion]
    done: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class Overdue:
    """An open entry whose deadline has passed without its waiters being told."""

    order_id: str
    progress: str
    requested_at: str


@dataclass(frozen=True, slots=True)
class Progress:
    """What is known about an open cancel, as far as an operator wants to know it.

    ``history`` holds the latest failures: the moment (ms, the exchange's clock) and the code of each.
    """

    attempts: int = 0
    last_problem: Problem | None = None
    history: tuple[tuple[int, str], ...] = ()

    @classmethod
    def parse(cls, progress: str) -> Self:
        """Out of the JSON that the dispatcher keeps with an entry; empty: nothing yet.

        Raises one of ``_UNREADABLE`` for what is no JSON object. What a newer version has put into it in
        another way is left out.
        """
        if not progress:
            return cls()
        fields = _object(progress)
        attempts, told, history = (fields.get(name) for name in ("attempts", "last_problem", "history"))
        problem = None
        if isinstance(told, dict) and isinstance(told.get("code"), str):
            status = told.get("http_status")
            problem = Problem(
                told["code"], str(told.get("message", "")), status if isinstance(status, int) else None
            )
        return cls(
            attempts if isinstance(attempts, int) else 0,
            problem,
            tuple(_history(history)),
        )


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A cancel that was given up unresolved; times are ISO 8601 UTC.

    ``stored``: all that is stored of one that was set aside because it cannot be read; None for the others.
    """

    order_id: str
    requested_by: tuple[str, ...]
    requested_at: str
    died_at: str
    request: CancelRequest
    progress: Progress
    stored: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class OpenCancel:
    """An entry of the store as an operator sees it; times are ISO 8601 UTC.

    ``next_due_s`` from now: the next try, or for what is claimed, the end of its lease. ``claimed_by`` is the
    latest to have claimed it (host and process id), empty when none has. ``left_out``: requests joined whose
    names are not in the list.
    """

    order_id: str
    lane: Lane
    requested_by: tuple[str, ...]
    requested_at: str
    age_s: float
    next_due_s: float
    claimed: bool
    unresolved: bool
    request: CancelRequest
    progress: Progress
    claimed_by: str = ""
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Standing:
    """What there is of accepted cancels at one moment: results, open entries, dead letters, or nothing."""

    results: Mapping[str, CancelResult]
    open: tuple[str, ...]
    dead: tuple[str, ...]
    lost: tuple[str, ...]


class CancelStore:
    """The store under one prefix; safe to share between threads."""

    def __init__(self, server: redis.Redis, settings: RedisSettings, *, name: str = "") -> None:
        self._server = server
        self._name = name  # of the process, as the audit log and the entries that it has claimed show it
        self._prefix = settings.key_prefix
        self._keys = Keys(settings.key_prefix)
        self._celery_prefix = settings.celery_prefix
        self._record_prefix = results.record_key("", settings.celery_prefix)
        self._record_life_s = settings.result_expires_s
        self._audit = settings.audit
        self._accept = scripts.load(
            server, "gather", "audit", "wake_ups", "fenced", "reply", "aside", "accept"
        )
        self._turn = scripts.load(
            server, "gather", "audit", "wake_ups", "reply", "conclude", "buckets", "claim", "turn"
        )
        self._wait_replicas = settings.wait_replicas
        self.clock = ServerClock(server)
        self._gap = Seldom()
        self._extend = scripts.load(server, "gather", "extend")
        self._overdue = scripts.load(server, "gather", "place", "overdue")
        self._report = scripts.load(server, "gather", "audit", "reply", "report")
        self._retry = scripts.load(server, "gather", "place", "aside", "retry")
        self._lanes_to_wake = scripts.load(server, "gather", "audit", "wake_ups", "lanes_to_wake")
        self._refuse = scripts.load(server, "gather", "audit", "refuse")
        self._set_progress = scripts.load(server, "gather", "wake_ups", "fenced", "set_progress")
        self._set_aside = scripts.load(server, "gather", "audit", "reply", "aside", "set_aside")
        self._reply_rest = scripts.load(server, "gather", "reply", "reply_rest")
        self._forget = scripts.load(server, "gather", "forget")
        self._mend = scripts.load(server, "gather", "wake_ups", "place", "mend")

    def ping(self) -> None:
        """Asks Redis for a sign of life; raises StoreError."""
        scripts.call(self._server.ping)

    def accept(
        self,
        requests: Sequence[CancelRequest],
        *,
        lane: Lane,
        default_deadline_s: float,
        reply_to: Sequence[str] = (),
        known: Known | None = None,
        fence: Fence | None = None,
        records_older_than_s: float | None = None,
    ) -> Accepted:
        """Enters the requests, each atomically; safe to repeat.

        ``reply_to`` names for each request a task id that gets the result too (or ""); ``known`` goes for
        those that are new. A final record that is at least ``records_older_than_s`` old is not believed: the
        order is canceled again (None: every record is believed).

        Raises StoreError: those of earlier portions of a long list may have been accepted even when
        ``may_be_accepted`` is false for the last one. Raises Fenced when ``fence`` does not hold.
        """
        not_believed = "" if records_older_than_s is None else round(records_older_than_s * 1000)
        settled: dict[str, CancelResult] = {}
        joined: set[str] = set()
        spoilt: list[tuple[CancelRequest, str]] = []
        woken, waiting = 1, 0
        for start in range(0, len(requests), ACCEPT_AT_ONCE):
            portion = requests[start : start + ACCEPT_AT_ONCE]
            args: list[Any] = [
                self._prefix,
                self._record_prefix,
                lane.value,
                self._record_life_s,
                self._celery_prefix + lane.queue,
                int(self._audit),
                known.progress if known else "",
                round(known.due_in_s * 1000) if known else 0,
                *_fence_args(fence),
                not_believed,
            ]
            for at, request in enumerate(portion, start):
                fields = request.kept_fields()
                requested_by = fields.pop("requested_by", "")
                deadline_s = fields.pop("deadline_s", default_deadline_s)
                args += (
                    request.order_id,
                    json.dumps(fields),
                    known.path if known else write_path(request.exchange_index),
                    json.dumps(requested_by) if requested_by else "",
                    round(deadline_s * 1000),
                    reply_to[at] if reply_to else "",
                )
            answer = scripts.surely(self._server, self._accept, args, replicas=self._wait_replicas)
            woken, waiting, *answers = _unless_fenced(answer, fence)
            for at, (request, answer) in enumerate(zip(portion, answers, strict=True), start):
                if answer == "joined":
                    joined.add(request.order_id)
                elif answer:
                    try:
                        settled[request.order_id] = results.parse_record(answer)
                    except ValueError as error:
                        say(log, LogEvent.RESULT_UNREADABLE, order_id=request.order_id, why=str(error))
                        spoilt.append((request, reply_to[at] if reply_to else ""))
        if spoilt:  # by a stranger, or by a version that knows more: asked for again, the exchange tells
            anew = self.accept(
                [request for request, _ in spoilt],
                lane=lane,
                default_deadline_s=default_deadline_s,
                reply_to=[task_id for _, task_id in spoilt],
                known=known,
                fence=fence,
                records_older_than_s=0.0,
            )
            woken, waiting = anew.listener_woken, anew.waiting_messages
            settled |= anew.settled
            joined |= anew.joined
        return Accepted(settled, bool(woken), waiting, frozenset(joined))

    def set_progress(
        self,
        requests: Sequence[CancelRequest],
        known: Known | None,
        *,
        lane: Lane,
        fence: Fence | None = None,
    ) -> int:
        """Has other things known of entries that nobody has claimed yet; how many those were.

        ``known`` None: nothing but the request, and due at once. Raises StoreError, and Fenced when ``fence``
        does not hold.
        """
        changed = 0
        for start in range(0, len(requests), ACCEPT_AT_ONCE):
            args: list[Any] = [self._prefix, lane.value, known.progress if known else ""]
            args += (round(known.due_in_s * 1000) if known else 0, *_fence_args(fence))
            for request in requests[start : start + ACCEPT_AT_ONCE]:
                path = known.path if known else write_path(request.exchange_index)
                args += (request.order_id, path)
            changed += int(_unless_fenced(self._run(self._set_progress, args), fence))
        return changed

    def refuse(self, result: CancelResult) -> bool:
        """Stores the record of a request that never entered, unless the order has one or an entry."""
        head, tail = self._record_parts(result)
        record = (
            head
            + json.dumps(list(result.requested_by))
            + ',"requested_by_left_out":0'
            + tail
            + json.dumps(f"cancel:{result.order_id}")
            + "}"
        )
        told = {"order_id": result.order_id, "error": result.error and result.error.message}
        args = [self._prefix, self._record_prefix, self._record_life_s, result.order_id, record]
        args.append(json.dumps(told)[1:] if self._audit else "")
        return bool(self._run(self._refuse, args))

    def turn(
        self, completed: Sequence[Completed], wanted: ClaimRequest | None
    ) -> tuple[list[bool], list[Claim]]:
        """One step for senders: stores what they completed, and claims what they ask for, if anything.

        False for each conclusion whose entry was another's by now (nothing is done about it). With a
        request there is at least one claim; if nothing could be claimed, one without entries. Raises
        StoreError: nothing was done; or NothingClaimed: what was completed is stored.
        """
        conclusions = [each for sender in completed for each in sender.conclusions]
        audit_log = (
            [self._audit_entry_of(sender) for sender in completed if sender.conclusions]
            if self._audit
            else []
        )
        args: list[Any] = [self._prefix, self._record_prefix, self._record_life_s]
        args += (len(audit_log), *audit_log, 7 * len(conclusions))
        for each in conclusions:
            args += (each.entry.order_id, each.entry.token, *self._conclusion_args(each))
        if wanted is not None:
            args += (wanted.at_most, wanted.calls, round(wanted.lease_s * 1000))
            args += (
                "" if wanted.exchange_ms is None else wanted.exchange_ms,
                wanted.risk_reserve,
            )
            args += (wanted.cancel_cost, wanted.read_cost, wanted.list_cost, self._name)
            args += (wanted.reads, round(wanted.reads_after_s * 1000))
            for lane in wanted.lanes:
                args += (lane.value, self._celery_prefix + lane.queue)
        # Nobody would know of a claim that a failover throws away: what it sends would be somebody else's.
        concluded, *claimed = scripts.surely(self._server, self._turn, args)
        done = [bool(each) for each in concluded]
        if not claimed:
            return done, []
        if claimed[0] is None:
            raise NothingClaimed(words(redis.ResponseError(claimed[1])), done)
        return done, self._parse_claims(*claimed[0])

    def claim(self, lanes: Sequence[Lane], **wanted: Any) -> Claim:
        """Takes tokens and the due entries that they pay for, for one call; see :class:`ClaimRequest`."""
        _, [claim] = self.turn((), ClaimRequest(tuple(lanes), **wanted))
        return claim

    def conclude(self, conclusions: Sequence[Conclusion]) -> list[bool]:
        """Stores what a sender completed; see :meth:`turn`."""
        return self.turn([Completed(conclusions)], None)[0]

    def _audit_entry_of(self, completed: Completed) -> str:
        """What the audit log is to say of it, without its first brace."""
        orders = {each.entry.order_id: _for_audit(each) for each in completed.conclusions}
        said = {"worker": self._name, "calls": completed.done, "orders": orders}
        return json.dumps(said, separators=(",", ":"))[1:]

    def _parse_claims(
        self, now_ms: int, coming: int, more: int, next_due_ms: int, held_up_ms: int, *calls: Sequence[Any]
    ) -> list[Claim]:
        self.clock.heard(now_ms / 1000)
        next_due_s = max(next_due_ms - now_ms, 0) / 1000 if next_due_ms else None
        nothing = Claim((), bool(more), next_due_s, held_up_ms / 1000, coming)
        claims, spoilt = [], {}
        for bucket, tokens, claimed in calls:
            entries = []
            for fields in claimed:
                try:
                    entries.append(_parse_entry(fields, now_ms))
                except _UNREADABLE as error:
                    order_id, token = fields[0], fields[1] if len(fields) > 1 else ""
                    spoilt[order_id] = str(token), error
            if bucket:
                claims.append(replace(nothing, entries=tuple(entries), bucket=bucket, tokens=float(tokens)))
        self._set_aside_all(spoilt)
        return claims or [nothing]

    def _set_aside_all(self, spoilt: Mapping[str, tuple[str, Exception]]) -> None:
        """Sets entries aside that cannot be read: by order id, the token of the claim of each, and why.

        Never raises: they harm nobody else.
        """
        if not spoilt:
            return
        args: list[Any] = [self._prefix, self._record_prefix, self._record_life_s, int(self._audit)]
        for order_id, (token, _) in spoilt.items():
            told = CancelResult(order_id, Outcome.UNRESOLVED, error=SPOILT_ENTRY)
            args += (order_id, token, *self._record_parts(told))
        try:
            set_aside = self._run(self._set_aside, args)
        except StoreError as error:
            scripts.say_failed(log, error, "set unreadable cancels aside", count=len(spoilt))
            return
        for order_id in set_aside:
            say(log, LogEvent.CANCEL_UNREADABLE, order_id=order_id, why=str(spoilt[order_id][1]))

    def extend(self, entries: Sequence[Entry], *, lease_s: float) -> list[bool]:
        """Runs the leases anew; False for each entry that is another's by now."""
        args: list[Any] = [self._prefix, round(lease_s * 1000)]
        for entry in entries:
            args += (entry.order_id, entry.token)
        return [bool(held) for held in self._run(self._extend, args)]

    def listen(self, lanes: Sequence[Lane], *, within_s: float, key_id: str = "") -> bool:
        """Waits for a wake-up of one of these lanes; False when none came within the time.

        Includes wake-ups for workers with its key only (``key_id``).
        """
        lists = [self._keys.wake_up(lane) for lane in lanes]
        if key_id:
            lists += [self._keys.wake_up_with(lane, key_id) for lane in lanes]
        return scripts.call(lambda: self._server.blpop(lists, timeout=within_s)) is not None

    def wake_up_worker_with(self, key_id: str, lane: Lane) -> None:
        """Calls a sender of a worker that has this key: what there is, others may not cancel."""
        wake_up = self._keys.wake_up_with(lane, key_id)
        pipeline = self._server.pipeline()
        pipeline.delete(wake_up)  # one is enough
        pipeline.lpush(wake_up, 1)
        pipeline.expire(wake_up, KEYS_WAKE_UP_LIFE_S)
        scripts.call(pipeline.execute)

    def show_listeners(self, lanes: Sequence[Lane], *, life_s: float) -> None:
        """Says that senders of these lanes listen, for so long."""
        pipeline = self._server.pipeline(transaction=False)
        for lane in lanes:
            pipeline.set(self._keys.listeners(lane), 1, px=round(life_s * 1000))
        scripts.call(pipeline.execute)

    def keep_unreadable(self, message: str) -> None:
        """Keeps a message that nobody can understand, for inspection; the latest hundred are kept."""
        pipeline = self._server.pipeline()
        pipeline.lpush(self._keys.unreadable, message)
        pipeline.ltrim(self._keys.unreadable, 0, UNREADABLE_MOST - 1)
        scripts.call(pipeline.execute)

    def overdue(self, *, at_most: int) -> list[Overdue]:
        """Open entries whose waiters are to be told ``unresolved``.

        Tells waiters that are too many for one step as well, and sets aside what cannot be read.
        """
        owed, *entries = self._run(self._overdue, [self._prefix, at_most])
        found, spoilt = [], {}
        for order_id, progress, accepted_ms in entries:
            try:
                Progress.parse(progress)
                found.append(Overdue(order_id, progress, utc_text(int(accepted_ms) / 1000)))
            except _UNREADABLE as error:
                spoilt[order_id] = "", error
        self._set_aside_all(spoilt)
        if owed:
            self._reply_to_the_rest(owed)
        return found

    def _reply_to_the_rest(self, order_ids: Sequence[str]) -> None:
        """Tells further waiters of these orders, in portions."""
        args = [self._prefix, self._record_prefix, self._record_life_s, *order_ids]
        while self._run(self._reply_rest, args):
            pass

    def mend(self, cursor: int = 0) -> tuple[int, int]:
        """Gives entries a place in line that have none; looks at some from ``cursor`` on.

        What every cancel needs, and something else is in its place, begins anew. Where to go on (0: all
        were looked at), and how many had no place.
        """
        pattern = Keys(_GLOB.sub(_escaped, self._prefix)).pending("*")
        cursor, keys = scripts.call(lambda: self._server.scan(cursor, match=pattern, count=MEND_AT_ONCE))
        prefix = self._keys.pending("")
        mended, anew = self._run(self._mend, [self._prefix, *(key[len(prefix) :] for key in keys)])
        if anew:
            say(log, LogEvent.KEYS_REBUILT, keys=", ".join(sorted(anew)))
        if mended:
            say(log, LogEvent.CANCELS_REQUEUED, count=mended)
        return int(cursor), int(mended)

    def forget_dead(self) -> int:
        """Forgets some dead letters, and what was set aside, that nobody looks at any more; how many."""
        return int(self._run(self._forget, [self._prefix, DEAD_LIFE_DAYS * 86_400_000, FORGET_AT_ONCE]))

    def report(self, unresolved: Sequence[CancelResult]) -> int:
        """Stores ``unresolved`` results of entries that stay open; how many were still to be told."""
        args: list[Any] = [self._prefix, self._record_prefix, self._record_life_s, int(self._audit)]
        for result in unresolved:
            args += (result.order_id, *self._record_parts(result))
        return int(self._run(self._report, args))

    def retry(self, order_ids: Sequence[str], *, deadline_s: float) -> list[str]:
        """Puts dead letters back, and what was set aside; the ids of those that were."""
        revived: list[str] = []
        for start in range(0, len(order_ids), RETRY_AT_ONCE):
            portion = order_ids[start : start + RETRY_AT_ONCE]
            args = [self._prefix, self._record_prefix, round(deadline_s * 1000), *portion]
            revived += scripts.surely(self._server, self._retry, args, replicas=self._wait_replicas)
        return revived

    def dead_letters(self) -> Iterator[DeadLetter]:
        """What was given up, oldest first, and then what was set aside; read in portions."""
        start = 0
        while dead := self._range(self._keys.dead, start):
            start += len(dead)
            pipeline = self._server.pipeline(transaction=False)
            for order_id, _ in dead:
                pipeline.hmget(
                    self._keys.dead_letter(order_id), ["request", "requested_by", "accepted_ms", "progress"]
                )
            for (order_id, died_ms), fields in zip(dead, self._each(pipeline), strict=True):
                if fields is None or fields[0] is not None:
                    yield _parse_dead_letter(order_id, died_ms, fields)
        start = 0
        while aside := self._range(self._keys.aside, start):
            start += len(aside)
            for order_id, at_ms in aside:
                yield self._aside(order_id, at_ms)

    def dead_letter(self, order_id: str) -> DeadLetter | None:
        """What was given up or set aside about one order, None when nothing was."""
        names = ["request", "requested_by", "accepted_ms", "progress"]
        pipeline = self._server.pipeline(transaction=False)
        pipeline.zscore(self._keys.dead, order_id)
        pipeline.hmget(self._keys.dead_letter(order_id), names)
        pipeline.zscore(self._keys.aside, order_id)
        died_ms, fields, aside_ms = self._each(pipeline)
        if died_ms is not None and (fields is None or fields[0] is not None):
            return _parse_dead_letter(order_id, died_ms, fields)
        return None if aside_ms is None else self._aside(order_id, aside_ms)

    def _aside(self, order_id: str, at_ms: float) -> DeadLetter:
        """What was set aside: a hash as it was, or text; of anything else nothing is shown."""
        pipeline = self._server.pipeline(transaction=False)
        pipeline.hgetall(self._keys.set_aside(order_id))
        pipeline.get(self._keys.set_aside(order_id))
        stored, text = self._each(pipeline)
        at = utc_text(at_ms / 1000)
        stored = {"text": text} if text is not None else stored or {}
        request, progress = CancelRequest(order_id), Progress(0, SPOILT_ENTRY)
        return DeadLetter(order_id, (), at, at, request, progress, stored)

    def lanes_to_wake(self, lanes: Sequence[Lane], *, patience_s: float) -> dict[Lane, bool]:
        """The lanes where something can be claimed and nobody was coming, and whether a sender was told now.

        Where none was, a message is to be published. Each lane is told to one caller only.
        """
        args: list[Any] = [self._prefix, round(patience_s * 1000), int(self._audit)]
        for lane in lanes:
            args += (lane.value, self._celery_prefix + lane.queue)
        missing, why, *states = self._run(self._lanes_to_wake, args)
        if missing > 0:
            say(log, LogEvent.AUDIT_LOG_INCOMPLETE, seldom=self._gap, count=missing, why=why)
        found = zip(lanes, states, strict=True)
        return {lane: state == _LISTENER_WOKEN for lane, state in found if state}

    def await_records(self, order_ids: Sequence[str], *, timeout_s: float | None) -> Iterator[CancelResult]:
        """The records of these orders as they come; ends early when the time is over. Raises StoreError."""
        try:
            yield from results.await_each(
                self._server, order_ids, timeout_s=timeout_s, celery_prefix=self._celery_prefix
            )
        except redis.RedisError as error:
            raise StoreError(words(error), may_be_accepted=False) from None

    def standing(self, order_ids: Collection[str]) -> Standing:
        """Where each of these orders is, looked at in one step of Redis for a portion; raises StoreError."""
        settled: dict[str, CancelResult] = {}
        found: dict[str, list[str]] = {"open": [], "dead": [], "lost": []}
        ids = list(order_ids)
        for start in range(0, len(ids), LOOK_AT_ONCE):
            some = ids[start : start + LOOK_AT_ONCE]
            pipeline = self._server.pipeline(transaction=True)
            pipeline.mget([self._record_prefix + order_id for order_id in some])
            for order_id in some:
                for key_of in (self._keys.pending, self._keys.dead_letter, self._keys.set_aside):
                    pipeline.exists(key_of(order_id))
            texts, *there = scripts.call(pipeline.execute)
            for at, (order_id, text) in enumerate(zip(some, texts, strict=True)):
                entry, dead, aside = there[3 * at : 3 * at + 3]
                result = results.readable(order_id, text) if text else None
                if result is not None:
                    settled[order_id] = result
                else:
                    found["open" if entry else "dead" if dead or aside else "lost"].append(order_id)
        return Standing(settled, *(tuple(found[name]) for name in ("open", "dead", "lost")))

    def records(self, order_ids: Sequence[str]) -> dict[str, CancelResult]:
        """The records there are of these orders, by order id."""
        found: dict[str, CancelResult] = scripts.call(
            lambda: results.read(self._server, order_ids, self._celery_prefix)
        )
        return found

    def record(self, order_id: str) -> CancelResult | None:
        """The record of one order, if there is one."""
        return self.records([order_id]).get(order_id)

    def open_cancels(self) -> Iterator[OpenCancel]:
        """Every entry, risk first, in the order they are due; read in portions, without a lock."""
        for lane in Lane:
            for path in self._paths():
                start = 0
                while due := self._range(self._keys.due(lane, path), start):
                    start += len(due)
                    yield from self._listed(lane, due)

    def open_cancel(self, order_id: str) -> OpenCancel | None:
        """The entry of one order, or None when nothing is open for it."""
        pipeline = self._server.pipeline(transaction=False)
        pipeline.exists(self._keys.pending(order_id))
        pipeline.hmget(self._keys.pending(order_id), ["lane", "path"])
        is_there, home = self._each(pipeline)
        if not is_there:
            return None
        lane, path = home or ("", "")
        due = scripts.call(lambda: self._server.zscore(self._keys.due(lane, path), order_id))
        lane = lane if lane in tuple(Lane) else Lane.RISK
        return next(self._listed(Lane(lane), [(order_id, math.nan if due is None else due)]), None)

    @staticmethod
    def _each(pipeline: Any) -> list[Any]:
        """What each command got; None for a key that holds something else."""
        answers = scripts.call(lambda: pipeline.execute(raise_on_error=False))
        for answer in answers:
            if isinstance(answer, redis.RedisError) and "WRONGTYPE" not in str(answer):
                scripts.call(functools.partial(_raise, answer))
        return [None if isinstance(answer, redis.RedisError) else answer for answer in answers]

    def waiting(self, lane: Lane) -> dict[str, int]:
        """How many entries of a lane there are on each path."""
        paths = self._paths()
        pipeline = self._server.pipeline(transaction=False)
        for path in paths:
            pipeline.zcount(self._keys.due(lane, path), "-inf", "+inf")
        return dict(zip(paths, scripts.call(pipeline.execute), strict=True)) if paths else {}

    def _paths(self) -> list[str]:
        return sorted(scripts.call(lambda: self._server.smembers(self._keys.paths)))

    def _range(self, index: str, start: int) -> list[tuple[str, float]]:
        end = start + LIST_AT_ONCE - 1
        members = scripts.call(lambda: self._server.zrange(index, start, end, withscores=True))
        return [(str(order_id), float(score)) for order_id, score in members]

    def _listed(self, lane: Lane, due: Sequence[tuple[str, float]]) -> Iterator[OpenCancel]:
        pipeline = self._server.pipeline(transaction=False)
        pipeline.time()
        for order_id, _ in due:
            pipeline.hmget(
                self._keys.pending(order_id),
                [
                    *(
                        "request",
                        "requested_by",
                        "accepted_ms",
                        "token",
                        "reported",
                        "progress",
                        "claimed_by",
                    ),
                    "left_out",
                ],
            )
        (seconds, micros), *entries = self._each(pipeline)
        now_ms = seconds * 1000 + micros // 1000
        for (order_id, due_ms), fields in zip(due, entries, strict=True):
            if fields is not None and fields[0] is None and fields[2] is None:
                continue  # settled between the two looks
            next_due_s = 0.0 if math.isnan(due_ms) else (due_ms - now_ms) / 1000
            try:
                yield _parse_open(order_id, lane, fields or (), now_ms, next_due_s)
            except _UNREADABLE:  # whoever claims it sets it aside
                nothing, progress = CancelRequest(order_id), Progress(0, SPOILT_ENTRY)
                now = utc_text(now_ms / 1000)
                yield OpenCancel(
                    order_id,
                    lane,
                    (),
                    now,
                    0.0,
                    next_due_s,
                    claimed=False,
                    unresolved=False,
                    request=nothing,
                    progress=progress,
                )

    def _conclusion_args(self, conclusion: Conclusion) -> tuple[Any, ...]:
        """The conclusion as ``lua/conclude.lua`` takes it."""
        match conclusion:
            case Settle():
                return ("settled", "", "", *self._record_parts(conclusion.result))
            case RetryLater():
                return (round(conclusion.pause_s * 1000), conclusion.path, conclusion.progress, "", "")
            case MakeDeadLetter():
                return ("dead", "", conclusion.progress, "", "")

    def _record_parts(self, result: CancelResult) -> tuple[str, str]:
        """Its record; what is settled is settled now, by the server's clock, unless it says otherwise."""
        now, settled_at = self.clock.now(), result.settled_at
        if settled_at is None and result.outcome is not Outcome.UNRESOLVED:
            settled_at = now
        return results.record_parts(result, date_done=settled_at or now, settled_at=settled_at)

    def _run(self, script: Any, args: Sequence[Any], *, may_be_accepted: bool = False) -> Any:
        return scripts.call(lambda: script(args=args), may_be_accepted=may_be_accepted)


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise TypeError("it is no JSON object")
    return value


def _history(told: object) -> Iterator[tuple[int, str]]:
    """The moments and codes in a list of pairs; whatever else is in it is left out."""
    for each in told if isinstance(told, list) else ():
        match each:
            case [int() | float() as at_ms, str() as code]:
                yield int(at_ms), code


def _escaped(special: re.Match[str]) -> str:
    return f"\\{special[0]}"


def _fence_args(fence: Fence | None) -> tuple[str, str]:
    return (fence.request_id, fence.token) if fence else ("", "")


def _unless_fenced(answer: Any, fence: Fence | None) -> Any:
    if fence is not None and answer == "fenced":
        raise Fenced(fence)
    return answer


def _for_audit(conclusion: Conclusion) -> list[Any]:
    """The conclusion as the audit log tells it."""
    match conclusion:
        case Settle(result=result):
            return ["settled", result.outcome.value, count_text(result.reduced_by), result.attempts]
        case RetryLater(progress=progress):
            problem = Progress.parse(progress).last_problem
            return ["open", round(conclusion.pause_s * 1000), problem and problem.code]
        case MakeDeadLetter(progress=progress):
            problem = Progress.parse(progress).last_problem
            return ["dead", problem and problem.code]


def _raise(error: Exception) -> None:
    raise error


def _names(requested_by: str | None) -> tuple[str, ...]:
    """The names in an entry's list; what else a stranger has put there is left out."""
    names = json.loads(requested_by or "[]")
    return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()


def _parse_open(
    order_id: str, lane: Lane, fields: Sequence[Any], now_ms: int, next_due_s: float
) -> OpenCancel:
    request, requested_by, accepted_ms, token, reported, progress, claimed_by, left_out = fields
    return OpenCancel(
        order_id,
        lane,
        _names(requested_by),
        utc_text(int(accepted_ms) / 1000),
        (now_ms - int(accepted_ms)) / 1000,
        next_due_s,
        bool(token),
        reported == "1",
        CancelRequest.from_json(request),
        Progress.parse(progress),
        claimed_by or "",
        int(left_out or 0),
    )


def _parse_dead_letter(order_id: str, died_ms: float, fields: Sequence[Any] | None) -> DeadLetter:
    """The dead letter; of one that somebody has spoilt (None: it is no hash), its id and when it died."""
    died_at = utc_text(died_ms / 1000)
    try:
        request, requested_by, accepted_ms, progress = fields or ()
        return DeadLetter(
            order_id,
            _names(requested_by),
            utc_text(int(accepted_ms) / 1000),
            died_at,
            CancelRequest.from_json(request),
            Progress.parse(progress),
        )
    except _UNREADABLE:
        return DeadLetter(order_id, (), died_at, died_at, CancelRequest(order_id), Progress(0, SPOILT_ENTRY))


def _parse_entry(fields: Sequence[Any], now_ms: int) -> Entry:
    order_id, token, request, progress, sent, first_sent_ms, lane, accepted_ms, *rest = fields
    deadline_ms, reported, first_sent_age = rest
    return Entry(
        order_id=order_id,
        token=str(token),
        request=CancelRequest.from_json(request),
        progress=json.dumps(_object(progress)) if progress else "",
        interrupted=sent == "1",
        first_sent_ms=first_sent_ms or None,
        first_sent_age_ms=int(first_sent_age or 0),
        lane=Lane(lane),
        requested_at=utc_text(int(accepted_ms) / 1000),
        age_s=(now_ms - int(accepted_ms)) / 1000,
        deadline_left_s=(int(deadline_ms) - now_ms) / 1000,
        reported=reported == "1",
    )
