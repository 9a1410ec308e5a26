"""Describes pending cancels: what the cancel store takes and gives, and how the stored texts are parsed.

A pending cancel is an :class:`Entry` for the sender that has claimed it, an :class:`OpenCancel` for an
operator, and a :class:`DeadLetter` once it was given up. Strangers and newer versions write into Redis, too:
each function says what it does with a text that it does not understand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.model.results import CancelResult, Problem
from kalshi_cancel.model.times import utc_text
from kalshi_cancel.store.steps import Snapshot, Step

SPOILT_ENTRY = Problem("spoilt_entry", "what is stored of it cannot be read: it is set aside")
# What reading a stored text raises that somebody has spoilt, or a newer version has written.
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)


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


@dataclass(frozen=True, slots=True)
class WakeUp:
    """A wake-up; ``claim``: of a lone cancel that was claimed in the step that accepted it.

    It was claimed at ``since`` (monotonic) at the earliest. ``is_counted``: its sender counts as busy.
    """

    claim: Claim | None = None
    since: float = 0.0
    is_counted: bool = False


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """What senders are ready to claim: one call's worth of what is due, by these steps.

    It is theirs for ``lease_s``. Where calls are for one order each, there are up to ``calls`` of them; at
    most ``reads`` of those are read-backs. ``exchange_ms``, this moment on the engine's clock (its bounds),
    is recorded with the first claim of each. If nothing is found, the worker counts as idle for ``idle_s``:
    a lone cancel may be claimed for it, which costs ``cancel_cost``. ``risk_reserve`` is the share of each
    write bucket that only the risk lane may touch.
    """

    lanes: tuple[Lane, ...]
    steps: tuple[Step, ...]
    lease_s: float
    exchange_ms: str | int | None
    calls: int = 1
    reads: int = 1_000
    risk_reserve: float = 0.0
    cancel_cost: float = 2.0
    idle_s: float = 0.0

    @property
    def offer(self) -> dict[str, Any]:
        """How a lone cancel is to be claimed for it, as ``lua/grant.lua`` reads it."""
        return {
            "lanes": {lane.value: True for lane in self.lanes},
            "lease_ms": round(self.lease_s * 1000),
            "cost": self.cancel_cost,
            "risk_share": self.risk_reserve,
            "exchange_ms": "" if self.exchange_ms is None else str(self.exchange_ms),
        }


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
class Turn:
    """What a turn came to; ``done`` tells of each conclusion whether its entry was still the sender's.

    If anything was asked for, there is at least one claim, without entries if nothing could be claimed, and a
    snapshot of what is left.
    """

    done: list[bool]
    claims: list[Claim]
    snapshot: Snapshot | None = None


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
    ``in_doubt``: an attempt may have taken effect.
    """

    attempts: int = 0
    last_problem: Problem | None = None
    history: tuple[tuple[int, str], ...] = ()
    in_doubt: bool = False

    @classmethod
    def parse(cls, progress: str) -> Self:
        """Out of the JSON that the dispatcher keeps with an entry; empty: nothing yet.

        Raises one of ``UNREADABLE`` for what is no JSON object. What a newer version has put into it in
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
            fields.get("first_doubt") is not None,
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


def _names(requested_by: str | None) -> tuple[str, ...]:
    """The names in an entry's list; what else a stranger has put there is left out."""
    names = json.loads(requested_by or "[]")
    return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()


def parse_open(
    order_id: str, lane: Lane, fields: Sequence[Any], now_ms: int, next_due_s: float
) -> OpenCancel:
    """An entry from its fields, in the order of the names below; raises one of ``UNREADABLE``."""
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


def parse_dead_letter(order_id: str, died_ms: float, fields: Sequence[Any] | None) -> DeadLetter:
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
    except UNREADABLE:
        return DeadLetter(order_id, (), died_at, died_at, CancelRequest(order_id), Progress(0, SPOILT_ENTRY))


def parse_entry(fields: Sequence[Any], now_ms: int) -> Entry:
    """What ``lua/steps.lua`` gives of a claimed entry; raises one of ``UNREADABLE``."""
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
