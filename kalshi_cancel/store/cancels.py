"""The cancel store in Redis: what was accepted and is not settled yet, and who has claimed it.

A cancel is accepted by one atomic entry and leaves only in the step that stores its record. In between it
is due at a moment: now, when a pause ends, or when the lease of the sender that claimed it runs out; so what
a vanished worker held comes back by itself. Time is the server's: workers' clocks may differ.

Each operation is one Lua script, under ``lua`` with its contract above it; its cost does not depend
on how long the store is. Their keys and fields, and in which order they are written:
docs/reference/redis-keys.md.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import redis

from kalshi_cancel.model.counts import count_text
from kalshi_cancel.model.fields import is_order_id
from kalshi_cancel.model.requests import CancelRequest, Lane, write_path
from kalshi_cancel.model.results import CancelResult, Outcome
from kalshi_cancel.model.times import utc_text
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store import results, scripts
from kalshi_cancel.store.keys import Keys
from kalshi_cancel.store.pending import (
    SPOILT_ENTRY,
    UNREADABLE,
    Accepted,
    Claim,
    ClaimRequest,
    Completed,
    Conclusion,
    Entry,
    Fence,
    Known,
    MakeDeadLetter,
    Overdue,
    Progress,
    RetryLater,
    Settle,
    Turn,
    WakeUp,
    parse_entry,
)
from kalshi_cancel.store.reading import CancelReader
from kalshi_cancel.store.redis_errors import words
from kalshi_cancel.store.scripts import StoreError
from kalshi_cancel.store.server_clock import ServerClock
from kalshi_cancel.store.steps import Snapshot
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import Seldom, say

log = logging.getLogger(__name__)

# Orders entered by one script (2 ms; 20 where many have joined). One call claims them: fewer take more calls.
ACCEPT_AT_ONCE = 100
UNREADABLE_MOST = 100
KEPT_MOST_CHARS = 65_536
DEAD_LIFE_DAYS = 30  # by then somebody has looked at what was given up, or set aside
FORGET_AT_ONCE = 200
RETRY_AT_ONCE = 100
KEYS_WAKE_UP_LIFE_S = 5  # nobody may listen any more
MEND_AT_ONCE = 200  # keys to scan
_GLOB = re.compile(r"[*?\[\]\\]")
_LISTENER_WOKEN = 2  # what lanes_to_wake.lua answers when a sender listens


class Fenced(Exception):  # noqa: N818 - named after what has happened
    """The mass cancel has a report or another runner by now: nothing was entered."""

    def __init__(self, fence: Fence) -> None:
        super().__init__(f"mass cancel {fence.request_id} has a report or another runner")


class NothingClaimed(StoreError):  # noqa: N818 - named after what has happened
    """What was to be stored is stored, as ``done`` says; nothing could be claimed."""

    def __init__(self, message: str, done: list[bool]) -> None:
        super().__init__(message, may_be_accepted=False)
        self.done = done


NOTHING = Claim((), is_more=False, next_due_s=None, tokens_in_s=0.0, coming=0)


class CancelStore(CancelReader):
    """The store under one prefix; safe to share between threads."""

    def __init__(self, server: redis.Redis, settings: RedisSettings, *, name: str = "") -> None:
        super().__init__(server, settings)
        self._name = name  # of the process, as the audit log and the entries that it has claimed show it
        self._prefix = settings.key_prefix
        self._record_life_s = settings.result_expires_s
        self._audit = settings.audit
        self._results_at = {  # what scripts have to know to store results
            "record_prefix": self._record_prefix,
            "life_s": self._record_life_s,
            "has_audit_log": self._audit,
        }
        self._accept = scripts.load(
            server,
            "gather",
            "audit",
            "wake_ups",
            "fenced",
            "reply",
            "aside",
            "buckets",
            "grant",
            "entry_record",
            "entry_state",
            "entry_join",
            "entry_put",
            "accept",
        )
        self._turn = scripts.load(
            server,
            "gather",
            "audit",
            "wake_ups",
            "reply",
            "conclude",
            "buckets",
            "lines",
            "steps",
            "claim",
            "turn",
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

        Raises StoreError: of a long list, which is entered in portions, the others may have been accepted
        even when ``may_be_accepted`` is false for one. Raises Fenced when ``fence`` does not hold.
        """
        asked = {
            "lane": lane.value,
            "queue": self._celery_prefix + lane.queue,
            **self._results_at,
            **_as_known(known),
            **_fenced_by(fence),
        }
        if records_older_than_s is not None:
            asked["not_believed_ms"] = round(records_older_than_s * 1000)
        rows = []
        for at, request in enumerate(requests):
            fields = request.kept_fields()
            requested_by = fields.pop("requested_by", "")
            deadline_s = fields.pop("deadline_s", default_deadline_s)
            row = (
                request.order_id,
                json.dumps(fields),
                known.path if known else write_path(request.exchange_index),
                json.dumps(requested_by) if requested_by else "",
                round(deadline_s * 1000),
                reply_to[at] if reply_to else "",
            )
            rows.append(row)
        portions = [
            scripts.asking(self._prefix, rows[start : start + ACCEPT_AT_ONCE], **asked)
            for start in range(0, len(rows), ACCEPT_AT_ONCE)
        ]
        settled: dict[str, CancelResult] = {}
        joined: set[str] = set()
        spoilt: list[tuple[CancelRequest, str]] = []
        woken, waiting, answers = 1, 0, []
        for told in scripts.surely_each(self._server, self._accept, portions, replicas=self._wait_replicas):
            woken, waiting, *some = _unless_fenced(told, fence)
            answers += some
        for at, (request, answer) in enumerate(zip(requests, answers, strict=True)):
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
            rows = [
                (request.order_id, known.path if known else write_path(request.exchange_index))
                for request in requests[start : start + ACCEPT_AT_ONCE]
            ]
            args = scripts.asking(
                self._prefix, rows, lane=lane.value, **_as_known(known), **_fenced_by(fence)
            )
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
        said = json.dumps(told)[1:] if self._audit else ""
        asked = {"order_id": result.order_id, "record": record, "audit": said, **self._results_at}
        return bool(self._run(self._refuse, scripts.asking(self._prefix, **asked)))

    def turn(self, completed: Sequence[Completed], wanted: ClaimRequest | None) -> Turn:
        """One step for senders: stores what they completed, and claims what they ask for, if anything.

        Nothing is done about a conclusion whose entry was another's by now. Raises StoreError: nothing was
        done; or NothingClaimed: what was completed is stored.
        """
        conclusions = [each for sender in completed for each in sender.conclusions]
        audit_log = (
            [self._audit_entry_of(sender) for sender in completed if sender.conclusions]
            if self._audit
            else []
        )
        rows = [(each.entry.order_id, each.entry.token, *self._conclusion_row(each)) for each in conclusions]
        claim = {} if wanted is None else {"claim": self._claim_asked(wanted)}
        args = scripts.asking(self._prefix, rows, audit=audit_log, **self._results_at, **claim)
        asked_s = time.monotonic()
        # Nobody would know of a claim that a failover throws away: what it sends would be somebody else's.
        concluded, *claimed = scripts.surely(self._server, self._turn, args)
        done = [bool(each) for each in concluded]
        if wanted is None:
            return Turn(done, [])
        if claimed[0] is None:
            raise NothingClaimed(words(redis.ResponseError(claimed[1])), done)
        now_ms, coming, more, held_up_ms, lines, buckets, *calls = claimed[0]
        self.clock.heard(now_ms / 1000, asked_s=asked_s)
        snapshot = Snapshot.parse(now_ms, lines, buckets)
        nothing = Claim((), bool(more), snapshot.next_due_s(reads=wanted.reads), held_up_ms / 1000, coming)
        return Turn(done, self._parse_calls(calls, nothing, now_ms) or [nothing], snapshot)

    def _claim_asked(self, wanted: ClaimRequest) -> dict[str, Any]:
        """What is wanted as ``lua/claim.lua`` takes it."""
        return {
            "steps": [step.told() for step in wanted.steps],
            "calls": wanted.calls,
            "reads": wanted.reads,
            "lease_ms": round(wanted.lease_s * 1000),
            "exchange_ms": "" if wanted.exchange_ms is None else wanted.exchange_ms,
            "worker": self._name,
            **({"idle_ms": round(wanted.idle_s * 1000), "offer": wanted.offer} if wanted.idle_s else {}),
            "lanes": [lane.value for lane in wanted.lanes],
            "queues": [self._celery_prefix + lane.queue for lane in wanted.lanes],
        }

    def conclude(self, conclusions: Sequence[Conclusion]) -> list[bool]:
        """Stores what a sender completed; see :meth:`turn`."""
        return self.turn([Completed(conclusions)], None).done

    def _audit_entry_of(self, completed: Completed) -> str:
        """What the audit log is to say of it, without its first brace."""
        orders = {each.entry.order_id: _for_audit(each) for each in completed.conclusions}
        said = {"worker": self._name, "calls": completed.done, "orders": orders}
        return json.dumps(said, separators=(",", ":"))[1:]

    def _parse_calls(self, calls: Sequence[Sequence[Any]], nothing: Claim, now_ms: int) -> list[Claim]:
        """A claim for each call; sets aside what cannot be read."""
        claims, spoilt = [], {}
        for bucket, tokens, claimed in calls:
            entries = []
            for fields in claimed:
                try:
                    entries.append(parse_entry(fields, now_ms))
                except UNREADABLE as error:
                    order_id, token = fields[0], fields[1] if len(fields) > 1 else ""
                    spoilt[order_id] = str(token), error
            if bucket:
                claims.append(replace(nothing, entries=tuple(entries), bucket=bucket, tokens=float(tokens)))
        self._set_aside_all(spoilt)
        return claims

    def _set_aside_all(self, spoilt: Mapping[str, tuple[str, Exception]]) -> None:
        """Sets entries aside that cannot be read: by order id, the token of the claim of each, and why.

        Never raises: they harm nobody else.
        """
        if not spoilt:
            return
        rows = []
        for order_id, (token, _) in spoilt.items():
            told = CancelResult(order_id, Outcome.UNRESOLVED, error=SPOILT_ENTRY)
            rows.append((order_id, token, *self._record_parts(told)))
        args = scripts.asking(self._prefix, rows, **self._results_at)
        try:
            set_aside = self._run(self._set_aside, args)
        except StoreError as error:
            scripts.say_failed(log, error, "set unreadable cancels aside", count=len(spoilt))
            return
        for order_id in set_aside:
            say(log, LogEvent.CANCEL_UNREADABLE, order_id=order_id, why=str(spoilt[order_id][1]))

    def extend(self, entries: Sequence[Entry], *, lease_s: float) -> list[bool]:
        """Runs the leases anew; False for each entry that is another's by now."""
        rows = [(entry.order_id, entry.token) for entry in entries]
        args = scripts.asking(self._prefix, rows, lease_ms=round(lease_s * 1000), worker=self._name)
        return [bool(held) for held in self._run(self._extend, args)]

    def listen(self, lanes: Sequence[Lane], *, within_s: float, key_id: str = "") -> WakeUp | None:
        """Waits for a wake-up of one of these lanes; None when none came within the time.

        Includes wake-ups for workers with its key only (``key_id``). Raises StoreError.
        """
        lists = [self._keys.wake_up(lane) for lane in lanes]
        if key_id:
            lists += [self._keys.wake_up_with(lane, key_id) for lane in lanes]
        popped = scripts.ask(self._server, "BLPOP", *lists, within_s)
        return None if popped is None else self._wake_up(popped[1])

    def _wake_up(self, text: str) -> WakeUp:
        """A wake-up with the claim that it carries, if it does; see ``lua/grant.lua``.

        A producer writes it: of what is none, nothing but the wake-up counts.
        """
        if not text.startswith("["):
            return WakeUp()
        try:
            at_ms, call = json.loads(text)
            [claim] = self._parse_calls([call], NOTHING, int(at_ms))
        except UNREADABLE:
            return WakeUp()
        since = self.clock.earliest_s(int(at_ms) / 1000)
        is_one = [is_order_id(entry.order_id) for entry in claim.entries] == [True]
        return WakeUp(claim, since) if is_one else WakeUp()

    def wake_up_worker_with(self, key_id: str, lane: Lane) -> None:
        """Calls a sender of a worker that has this key: what there is, others may not cancel."""
        wake_up = self._keys.wake_up_with(lane, key_id)
        pipeline = self._server.pipeline()
        pipeline.delete(wake_up)  # one is enough
        pipeline.lpush(wake_up, 1)
        pipeline.expire(wake_up, KEYS_WAKE_UP_LIFE_S)
        scripts.call(pipeline.execute)

    def show_listeners(
        self, lanes: Sequence[Lane], *, life_s: float, idle: ClaimRequest | None = None
    ) -> None:
        """Says for so long that senders of these lanes listen, and what a worker that is idle offers."""
        pipeline = self._server.pipeline(transaction=False)
        if idle is not None:
            until_ms = round((self.clock.now_s() + idle.idle_s) * 1000)
            offer = {**idle.offer, "until_ms": until_ms}
            pipeline.hset(self._keys.idle, self._name, json.dumps(offer))
        for lane in lanes:
            pipeline.set(self._keys.listeners(lane), 1, px=round(life_s * 1000))
        scripts.call(pipeline.execute)

    def stop_listening(self, lanes: Sequence[Lane]) -> dict[Lane, WakeUp]:
        """Takes back what :meth:`show_listeners` said, as this worker ends; the wake-ups that nobody came to.

        What they carry is the caller's to return, who then has to :meth:`wake_up` another sender. Other
        workers that listen say so again within a second. Raises StoreError.
        """
        pipeline = self._server.pipeline()  # a transaction: no wake-up comes in between
        pipeline.hdel(self._keys.idle, self._name)
        pipeline.delete(*(self._keys.listeners(lane) for lane in lanes))
        for lane in lanes:
            pipeline.lpop(self._keys.wake_up(lane))
        _, _, *left = scripts.call(pipeline.execute)
        return {lane: self._wake_up(text) for lane, text in zip(lanes, left, strict=True) if text is not None}

    def wake_up(self, lane: Lane) -> None:
        """Has the next sender that listens to the lane look what is due; raises StoreError."""
        scripts.ask(self._server, "LPUSH", self._keys.wake_up(lane), 1)

    def keep_unreadable(self, message: str) -> None:
        """Keeps a message that nobody can understand, for inspection; the latest hundred are kept."""
        pipeline = self._server.pipeline()
        pipeline.lpush(self._keys.unreadable, message)
        pipeline.ltrim(self._keys.unreadable, 0, UNREADABLE_MOST - 1)
        scripts.call(pipeline.execute)

    def keep_not_stored(self, why: str, **what: Any) -> None:
        """Keeps the text of what could not be stored or entered, for inspection, if that can be done."""
        try:
            said = {"at": self.clock.now(), "why": why, **what}
            self.keep_unreadable(json.dumps(said, default=repr)[:KEPT_MOST_CHARS])
        except StoreError as error:
            scripts.say_failed(log, error, "keep a message that could not be stored")

    def overdue(self, *, at_most: int) -> list[Overdue]:
        """Open entries whose waiters are to be told ``unresolved``.

        Tells waiters that are too many for one step as well, and sets aside what cannot be read.
        """
        owed, *entries = self._run(self._overdue, scripts.asking(self._prefix, at_most=at_most))
        found, spoilt = [], {}
        for order_id, progress, accepted_ms in entries:
            try:
                Progress.parse(progress)
                found.append(Overdue(order_id, progress, utc_text(int(accepted_ms) / 1000)))
            except UNREADABLE as error:
                spoilt[order_id] = "", error
        self._set_aside_all(spoilt)
        if owed:
            self._reply_to_the_rest(owed)
        return found

    def _reply_to_the_rest(self, order_ids: Sequence[str]) -> None:
        """Tells further waiters of these orders, in portions."""
        args = scripts.asking(self._prefix, zip(order_ids), **self._results_at)
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
        rows = [(key.removeprefix(prefix),) for key in keys]
        mended, anew = self._run(self._mend, scripts.asking(self._prefix, rows))
        if anew:
            say(log, LogEvent.KEYS_REBUILT, keys=", ".join(sorted(anew)))
        if mended:
            say(log, LogEvent.CANCELS_REQUEUED, count=mended)
        return int(cursor), int(mended)

    def forget_dead(self) -> int:
        """Forgets some dead letters, and what was set aside, that nobody looks at any more; how many."""
        asked = scripts.asking(self._prefix, max_age_ms=DEAD_LIFE_DAYS * 86_400_000, at_most=FORGET_AT_ONCE)
        return int(self._run(self._forget, asked))

    def report(self, unresolved: Sequence[CancelResult]) -> int:
        """Stores ``unresolved`` results of entries that stay open; how many were still to be told."""
        rows = [(result.order_id, *self._record_parts(result)) for result in unresolved]
        return int(self._run(self._report, scripts.asking(self._prefix, rows, **self._results_at)))

    def retry(self, order_ids: Sequence[str], *, deadline_s: float) -> list[str]:
        """Puts dead letters back, and what was set aside; the ids of those that were."""
        asked = {"record_prefix": self._record_prefix, "deadline_ms": round(deadline_s * 1000)}
        portions = [
            scripts.asking(self._prefix, zip(order_ids[start : start + RETRY_AT_ONCE]), **asked)
            for start in range(0, len(order_ids), RETRY_AT_ONCE)
        ]
        answers = scripts.surely_each(self._server, self._retry, portions, replicas=self._wait_replicas)
        return [order_id for revived in answers for order_id in revived]

    def lanes_to_wake(self, lanes: Sequence[Lane], *, patience_s: float) -> dict[Lane, bool]:
        """The lanes where something can be claimed and nobody was coming, and whether a sender was told now.

        Where none was, a message is to be published. Each lane is told to one caller only.
        """
        rows = [(lane.value, self._celery_prefix + lane.queue) for lane in lanes]
        asked = {"patience_ms": round(patience_s * 1000), "has_audit_log": self._audit}
        args = scripts.asking(self._prefix, rows, **asked)
        missing, why, *states = self._run(self._lanes_to_wake, args)
        if missing > 0:
            say(log, LogEvent.AUDIT_LOG_INCOMPLETE, seldom=self._gap, count=missing, why=why)
        found = zip(lanes, states, strict=True)
        return {lane: state == _LISTENER_WOKEN for lane, state in found if state}

    def _conclusion_row(self, conclusion: Conclusion) -> tuple[Any, ...]:
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
            settled_at = max(now, result.requested_at or now)  # (this clock may be a millisecond behind)
        return results.record_parts(result, date_done=settled_at or now, settled_at=settled_at)

    def _run(self, script: Any, args: Sequence[Any], *, may_be_accepted: bool = False) -> Any:
        return scripts.run(self._server, script, args, may_be_accepted=may_be_accepted)


def _escaped(special: re.Match[str]) -> str:
    return f"\\{special[0]}"


def _fenced_by(fence: Fence | None) -> dict[str, str]:
    return {"id": fence.request_id, "token": fence.token} if fence else {"id": "", "token": ""}


def _as_known(known: Known | None) -> dict[str, Any]:
    if known is None:
        return {"progress": "", "due_in_ms": 0}
    return {"progress": known.progress, "due_in_ms": round(known.due_in_s * 1000)}


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
