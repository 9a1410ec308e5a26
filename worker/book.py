"""The book of open cancels in Redis: what was accepted and is not settled yet, and whose hands it is in.

A cancel is accepted by one atomic entry and leaves only in the step that stores its record. In between it
is due at a moment: now, when a pause ends, or when the lease of the hand that claimed it runs out; so what
a vanished worker held comes back by itself. Time is the server's: workers' clocks may differ.

Each operation is one Lua script, under ``worker/lua`` with its contract above it; its cost does not depend
on how long the book is. Keys, under the configured prefix P:

- ``P:entry:{order_id}``    hash: request, who asked, what was learned, the claim's token
- ``P:due:{lane}``          sorted set: order ids by the moment they are due, ms
- ``P:fence``               the last token given out
- ``P:claimed_ms:{lane}``, ``P:rung:{lane}``    when the lane was last claimed from, and last swept
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker import records
from worker.orders import CancelRequest, CancelResult, Lane, utc_text
from worker.settings import RedisSettings

# Silence from Redis that is longer than this is an outage; producers are promised an answer within 2 s.
SOCKET_TIMEOUT_S = 1.0
CONNECT_TIMEOUT_S = 0.5
# Orders entered by one script: it runs for about 5 ms, and Redis serves nobody else meanwhile.
ACCEPT_AT_ONCE = 200
LIST_AT_ONCE = 500


class BookError(Exception):
    """Redis did not do what was asked; ``may_be_accepted``: it may have, and only the answer was lost."""

    def __init__(self, message: str, *, may_be_accepted: bool) -> None:
        super().__init__(message)
        self.may_be_accepted = may_be_accepted


@dataclass(frozen=True, slots=True)
class Accepted:
    """What accepting some requests came to; ``settled`` are answered from the record already."""

    settled: dict[str, CancelResult]
    waiting_messages: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A claimed entry; only ``token``'s holder can conclude it, and only until a newer claim.

    ``interrupted``: an earlier hand vanished while it may have been sending. ``deadline_left_s`` counts
    from the claim; ``reported``: the waiters were told ``unresolved`` already.
    """

    order_id: str
    token: str
    request: CancelRequest
    learned: str
    interrupted: bool
    first_sent_ms: int | None
    lane: Lane
    requested_at: str
    deadline_left_s: float
    reported: bool


@dataclass(frozen=True, slots=True)
class Claim:
    """What one claim brought; ``next_due_s`` is when there may be more (None: nothing is waiting)."""

    entries: tuple[Entry, ...]
    next_due_s: float | None


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What a hand does with an entry: settles it, or gives it back to be due again after ``due_s``.

    ``result`` is stored in either case where there is one: settled, or unresolved so far.
    """

    entry: Entry
    result: CancelResult | None
    due_s: float | None = None
    learned: str = ""


@dataclass(frozen=True, slots=True)
class OpenCancel:
    """An entry of the book as an operator sees it; times are ISO 8601 UTC."""

    order_id: str
    lane: Lane
    requested_by: tuple[str, ...]
    requested_at: str
    age_s: float
    next_due_s: float
    in_hand: bool
    unresolved: bool
    request: CancelRequest
    learned: str


def connect(settings: RedisSettings) -> redis.Redis:
    """A client that fails within about a second instead of hanging, and asks nothing twice by itself."""
    return redis.Redis.from_url(
        settings.redis_url,
        decode_responses=True,
        encoding_errors="surrogateescape",
        socket_timeout=SOCKET_TIMEOUT_S,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=0,
    )


class Book:
    """The book under one prefix; safe to share between threads."""

    def __init__(self, server: redis.Redis, settings: RedisSettings) -> None:
        self._server = server
        self._prefix = settings.key_prefix
        self._record_life_s = settings.result_expires_s
        self._accept = _script(server, "accept")
        self._claim = _script(server, "claim")
        self._extend = _script(server, "extend")
        self._conclude = _script(server, "conclude")
        self._sweep = _script(server, "sweep")
        self._refuse = _script(server, "refuse")

    @property
    def server(self) -> redis.Redis:
        """The Redis client, for reading records."""
        return self._server

    def ping(self) -> None:
        """Asks Redis for a sign of life; raises BookError."""
        try:
            self._server.ping()
        except redis.RedisError as error:
            raise BookError(str(error), may_be_accepted=False) from None

    def accept(
        self,
        requests: Sequence[CancelRequest],
        *,
        lane: Lane,
        default_deadline_s: float,
        reply_to: str = "",
    ) -> Accepted:
        """Enters the requests, each atomically; safe to repeat.

        ``reply_to`` is a task id that gets the result too. Raises BookError: those of earlier portions
        of a long list may have been accepted even when ``may_be_accepted`` is false for the last one.
        """
        settled: dict[str, CancelResult] = {}
        waiting = 0
        for start in range(0, len(requests), ACCEPT_AT_ONCE):
            portion = requests[start : start + ACCEPT_AT_ONCE]
            args: list[Any] = [
                self._prefix,
                records.RECORD_KEY_PREFIX,
                lane.value,
                self._record_life_s,
                lane.queue,
            ]
            for request in portion:
                fields = request.fields()
                requested_by = fields.pop("requested_by", "")
                deadline_s = fields.pop("deadline_s", default_deadline_s)
                args += (
                    request.order_id,
                    json.dumps(fields),
                    json.dumps(requested_by) if requested_by else "",
                    round(deadline_s * 1000),
                    reply_to,
                )
            waiting, *answers = self._run(self._accept, args, may_be_accepted=True)
            settled.update(
                {
                    request.order_id: records.parse_record(answer)
                    for request, answer in zip(portion, answers, strict=True)
                    if answer
                }
            )
        return Accepted(settled, waiting)

    def refuse(self, result: CancelResult) -> bool:
        """Stores the record of a request that never entered, unless the order has one or an entry."""
        head, tail = records.record_parts(result, date_done=result.settled_at or "")
        record = (
            head
            + json.dumps(list(result.requested_by))
            + tail
            + json.dumps(f"cancel:{result.order_id}")
            + "}"
        )
        args = [self._prefix, records.RECORD_KEY_PREFIX, self._record_life_s, result.order_id, record]
        return bool(self._run(self._refuse, args))

    def claim(self, lanes: Iterable[Lane], *, at_most: int, lease_s: float, exchange_ms: int | None) -> Claim:
        """Takes up to ``at_most`` due entries, the first lane first, oldest first, for ``lease_s``.

        ``exchange_ms``, this moment on the exchange's clock, is recorded with the first claim of each.
        """
        args = [
            self._prefix,
            at_most,
            round(lease_s * 1000),
            "" if exchange_ms is None else exchange_ms,
            *(lane.value for lane in lanes),
        ]
        now_ms, next_due_ms, claimed = self._run(self._claim, args)
        entries = tuple(_parse_entry(fields, now_ms) for fields in claimed)
        return Claim(entries, max(next_due_ms - now_ms, 0) / 1000 if next_due_ms else None)

    def extend(self, entries: Sequence[Entry], *, lease_s: float) -> list[bool]:
        """Runs the leases anew; False for each entry that is in another hand by now."""
        args: list[Any] = [self._prefix, round(lease_s * 1000)]
        for entry in entries:
            args += (entry.order_id, entry.token)
        return [bool(held) for held in self._run(self._extend, args)]

    def conclude(self, conclusions: Sequence[Conclusion]) -> list[bool]:
        """Puts entries out of the hand; False for each that was in another hand by now (nothing is done)."""
        args: list[Any] = [self._prefix, records.RECORD_KEY_PREFIX, self._record_life_s]
        for each in conclusions:
            head, tail = "", ""
            if each.result is not None:
                head, tail = records.record_parts(each.result, date_done=each.result.settled_at or "")
            due_ms = "" if each.due_s is None else round(each.due_s * 1000)
            args += (each.entry.order_id, each.entry.token, due_ms, each.learned, head, tail)
        return [bool(done) for done in self._run(self._conclude, args)]

    def lanes_to_wake(self, lanes: Sequence[Lane], *, patience_s: float) -> list[Lane]:
        """The lanes where something can be claimed and nobody is coming; each is told to one caller only."""
        args: list[Any] = [self._prefix, round(patience_s * 1000)]
        for lane in lanes:
            args += (lane.value, lane.queue)
        return [lane for lane, ring in zip(lanes, self._run(self._sweep, args), strict=True) if ring]

    def open_cancels(self) -> Iterator[OpenCancel]:
        """Every entry, risk first, in the order they are due; read in portions, without a lock."""
        for lane in Lane:
            start = 0
            while due := self._due(lane, start):
                start += len(due)
                yield from self._listed(lane, due)

    def open_cancel(self, order_id: str) -> OpenCancel | None:
        """The entry of one order, or None when nothing is open for it."""
        for lane in Lane:
            due = self._server.zscore(f"{self._prefix}:due:{lane}", order_id)
            if due is not None:
                return next(self._listed(lane, [(order_id, due)]), None)
        return None

    def _due(self, lane: Lane, start: int) -> list[tuple[str, float]]:
        end = start + LIST_AT_ONCE - 1
        due: Any = self._server.zrange(f"{self._prefix}:due:{lane}", start, end, withscores=True)
        return [(str(order_id), float(due_ms)) for order_id, due_ms in due]

    def _listed(self, lane: Lane, due: Sequence[tuple[str, float]]) -> Iterator[OpenCancel]:
        pipeline = self._server.pipeline(transaction=False)
        pipeline.time()
        for order_id, _ in due:
            pipeline.hmget(
                f"{self._prefix}:entry:{order_id}",
                ["request", "requested_by", "accepted_ms", "token", "reported", "case"],
            )
        (seconds, micros), *entries = pipeline.execute()
        now_ms = seconds * 1000 + micros // 1000
        for (order_id, due_ms), fields in zip(due, entries, strict=True):
            request, requested_by, accepted_ms, token, reported, learned = fields
            if request is None:
                continue  # settled between the two looks
            yield OpenCancel(
                order_id,
                lane,
                tuple(json.loads(requested_by)),
                utc_text(int(accepted_ms) / 1000),
                (now_ms - int(accepted_ms)) / 1000,
                (due_ms - now_ms) / 1000,
                bool(token),
                reported == "1",
                CancelRequest.parse(json.loads(request)),
                learned,
            )

    def _run(self, script: Any, args: Sequence[Any], *, may_be_accepted: bool = False) -> Any:
        try:
            return script(args=args)
        except redis.ResponseError as error:  # READONLY, OOM, NOPERM ...: refused before anything was written
            raise BookError(f"Redis refuses: {error}", may_be_accepted=False) from None
        except redis.ConnectionError as error:
            refused = isinstance(error.__cause__ or error.__context__, ConnectionRefusedError)
            raise BookError(f"Redis: {error}", may_be_accepted=may_be_accepted and not refused) from None
        except redis.RedisError as error:
            raise BookError(f"Redis: {error}", may_be_accepted=may_be_accepted) from None


def _script(server: redis.Redis, name: str) -> Any:
    return server.register_script(resources.files("worker").joinpath("lua", f"{name}.lua").read_text("utf-8"))


def _parse_entry(fields: Sequence[Any], now_ms: int) -> Entry:
    order_id, token, request, learned, sent, first_sent_ms, lane, accepted_ms, deadline_ms, reported = fields
    return Entry(
        order_id=order_id,
        token=str(token),
        request=CancelRequest.parse(json.loads(request)),
        learned=learned,
        interrupted=sent == "1",
        first_sent_ms=int(first_sent_ms) if first_sent_ms else None,
        lane=Lane(lane),
        requested_at=utc_text(int(accepted_ms) / 1000),
        deadline_left_s=(int(deadline_ms) - now_ms) / 1000,
        reported=reported == "1",
    )
