"""The audit log in Redis: each request, attempt, outcome, step and operator's action, chained by hashes.

A stream that is only appended to. Each entry's hash covers the hash before it, so that an edit or a gap
shows. What the store does is appended by its scripts in the step that does it (``lua/audit.lua``);
mass cancels and operators append here. Its keys: docs/reference/redis-keys.md.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store import scripts
from kalshi_cancel.store.keys import Keys
from kalshi_cancel.store.scripts import StoreError
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import Seldom, say

log = logging.getLogger(__name__)

READ_AT_ONCE = 500
TRIM_AT_ONCE = 100  # in one step of Redis, which serves nobody else meanwhile
# The audit log's oldest tenth is about to be trimmed: time enough to export it.
SOON = 0.1
WARN_EVERY_S = 3600

_ID = re.compile(r"([0-9]{1,20})-([0-9]{1,20})")


@dataclass(frozen=True, slots=True)
class Noted:
    """An entry of the audit log; ``body`` is the JSON text that the hash covers."""

    entry_id: str
    kind: str
    body: str
    hash: str

    @property
    def at_ms(self) -> int:
        """When it was appended, by the server's clock."""
        return place(self.entry_id)[0]

    def fields(self) -> dict[str, Any]:
        """The body's fields; none when somebody has spoilt it."""
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def missed(self) -> int:
        """Of an entry of the kind "gap": how many could not be written."""
        missed = self.fields().get("missed")
        return missed if isinstance(missed, int) else 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a walk through the whole audit log found; ``problem`` None: every entry fits.

    ``trimmed``: older entries are gone by the rules. ``head`` is the hash of the last entry that fits.
    ``gaps``: how often entries could not be written, as far as the audit log tells; ``missing``: how many
    entries that were, with those that it cannot tell of yet.
    """

    entries: int
    trimmed: bool
    head: str
    problem: str | None
    gaps: int = 0
    missing: int = 0


def place(entry_id: str) -> tuple[int, int]:
    """Where an entry stands: its moment in ms, and its number within that; raises ValueError for no id."""
    found = _ID.fullmatch(entry_id)
    if found is None:
        raise ValueError(f"not the id of an entry: {entry_id!r}")
    return int(found[1]), int(found[2])


def chained(before: str, kind: str, body: str) -> str:
    """The hash of an entry."""
    text = (before + kind + body).encode("utf-8", "surrogateescape")
    return hashlib.sha1(text, usedforsecurity=False).hexdigest()  # all that Redis offers


class AuditLog:
    """The audit log under one prefix; safe to share between threads. Reads and trims raise StoreError."""

    def __init__(self, server: redis.Redis, settings: RedisSettings) -> None:
        self._server = server
        self._prefix = settings.key_prefix
        self._key = Keys(settings.key_prefix).audit
        self._on = settings.audit
        self._uncounted = 0  # entries that are missing, which Redis does not know yet
        self._gap = Seldom()
        self._note = scripts.load(server, "audit", "note")
        self._trim = scripts.load(server, "gather", "trim")

    def append(self, kind: str, body: Mapping[str, Any]) -> None:
        """Appends an entry, if there is to be an audit log; the body gets ``at``, the server's time in ms.

        Never raises: what only observes decides nothing. An entry that cannot be written is counted as a gap.
        """
        if not self._on:
            return
        uncounted, self._uncounted = self._uncounted, 0
        try:
            text = json.dumps(body, separators=(",", ":"))
            args = scripts.asking(self._prefix, kind=kind, body=text, uncounted=uncounted)
            failure = "" if scripts.run(self._server, self._note, args) else "it is counted as missing"
        except StoreError as error:
            self._uncounted += uncounted + 1
            failure = str(error)
        if failure:
            say(log, LogEvent.AUDIT_LOG_WRITE_FAILED, seldom=self._gap, why=failure)

    def read(
        self, *, since_ms: int | None = None, until_ms: int | None = None, after_id: str = ""
    ) -> Iterator[Noted]:
        """The entries, oldest first, up to the one that is the last now.

        Those after ``after_id``, or else from ``since_ms`` on, and before ``until_ms``.
        """
        last = self._newest()
        if last is None:
            return
        end = last if until_ms is None or place(last)[0] < until_ms else str(until_ms - 1)
        start = f"({after_id}" if after_id else "-" if since_ms is None else str(since_ms)
        while page := self._page(start, end):
            yield from page
            start = f"({page[-1].entry_id}"

    def verify(self) -> Verdict:
        """Walks through all; names the first entry that does not fit, or says that the end is missing."""
        base: str = self._get("base")
        before, count, start = base, 0, "-"
        gaps, missing = 0, 0
        while True:
            page, head, base_now = self._snapshot(start)
            ends = {before}  # where the chain was when the head was read, or came by after that
            if base_now != base and page and _fits(page[0], base_now):
                base, before = base_now, base_now  # what was to come next has been trimmed meanwhile
            for noted in page:
                if not _fits(noted, before):
                    found = "does not fit: it, or what was before it, has been changed or removed"
                    return Verdict(count, bool(base), before, f"{noted.entry_id} {found}", gaps, missing)
                if noted.kind == "gap":
                    gaps, missing = gaps + 1, missing + noted.missed
                before = noted.hash
                ends.add(before)
                count += 1
            if len(page) < READ_AT_ONCE:
                # (Without a page, the last entries may have been trimmed meanwhile.)
                whole = head in ends or (not page and head == base_now)
                problem = None if whole else "the end is missing: what was appended last is not there"
                return Verdict(count, bool(base_now), before, problem, gaps, missing + self._unmarked())
            start = f"({page[-1].entry_id}"

    def _unmarked(self) -> int:
        """How many entries are missing that the audit log does not tell of, because it cannot be written."""
        noted = scripts.call(
            lambda: self._server.hmget(Keys(self._prefix).counts, ["audit_missed", "audit_marked"])
        )
        missed, marked = (int(each or 0) for each in noted)
        return max(missed - marked, 0)

    def exported(self) -> str:
        """The id of the last entry that exports have got to; empty: none."""
        return self._get("exported")

    def note_exported(self, first_id: str, last_id: str) -> bool:
        """Notes an export of everything between two entries; False when it left out others before them."""
        known = self.exported()
        left_out = self._page(f"({known}" if known else "-", f"({first_id}", at_most=1)
        if left_out:
            return False
        if not known or place(known) < place(last_id):
            scripts.call(lambda: self._server.set(f"{self._key}:exported", last_id))
        return True

    def trim(self, *, max_age_s: float, max_entries: int) -> int:
        """Drops what is too old or too many; how many those were. Warns before anything unexported goes."""
        self._warn(max_age_s * 1000, max_entries)
        most = {"max_age_ms": round(max_age_s * 1000), "max_entries": max_entries, "at_most": TRIM_AT_ONCE}
        args = scripts.asking(self._prefix, **most)
        all_dropped, all_unexported = 0, 0
        while True:
            dropped, unexported = scripts.run(self._server, self._trim, args)
            all_dropped += int(dropped)
            all_unexported += int(unexported)
            if dropped < TRIM_AT_ONCE:
                break
        if all_dropped:
            say(log, LogEvent.AUDIT_LOG_TRIMMED, count=all_dropped, not_exported=all_unexported)
        return all_dropped

    def _warn(self, max_age_ms: float, max_entries: int) -> None:
        """Says, once in a while for all workers, that what is not exported is about to be trimmed."""
        known = self.exported()
        waiting = self._page(f"({known}" if known else "-", "+", at_most=1)
        if not waiting:
            return
        pipeline = self._server.pipeline(transaction=False)
        pipeline.time()
        pipeline.xlen(self._key)
        pipeline.xrange(self._key, count=1)
        pipeline.xrevrange(self._key, count=1)
        (seconds, micros), length, oldest, newest = scripts.call(pipeline.execute)
        if not oldest:
            return
        first_ms, last_ms, waiting_ms = place(oldest[0][0])[0], place(newest[0][0])[0], waiting[0].at_ms
        too_old = seconds * 1000 + micros // 1000 - waiting_ms >= (1 - SOON) * max_age_ms
        # Where it stands among the others is told by its time: nobody counts them.
        in_front = waiting_ms - first_ms <= SOON * (last_ms - first_ms)
        if too_old or (in_front and length >= (1 - SOON) * max_entries):
            warned = f"{self._key}:warned"
            if scripts.call(lambda: self._server.set(warned, 1, nx=True, ex=WARN_EVERY_S)):
                say(log, LogEvent.AUDIT_LOG_NOT_EXPORTED, from_id=waiting[0].entry_id)

    def _newest(self) -> str | None:
        newest = scripts.call(lambda: self._server.xrevrange(self._key, count=1))
        return str(newest[0][0]) if newest else None

    def _page(self, start: str, end: str, *, at_most: int = READ_AT_ONCE) -> list[Noted]:
        return _parse(scripts.call(lambda: self._server.xrange(self._key, start, end, at_most)))

    def _snapshot(self, start: str) -> tuple[list[Noted], str, str]:
        """A page, the head just before it was read, and the base while it was."""
        while True:
            pipeline = self._server.pipeline(transaction=False)  # who only reads may not MULTI
            pipeline.get(f"{self._key}:base")
            pipeline.get(f"{self._key}:head")
            pipeline.xrange(self._key, start, "+", READ_AT_ONCE)
            pipeline.get(f"{self._key}:base")
            base, head, entries, base_after = scripts.call(pipeline.execute)
            if base == base_after:
                return _parse(entries), head or "", base or ""

    def _get(self, name: str) -> str:
        return str(scripts.call(lambda: self._server.get(f"{self._key}:{name}")) or "")


def _fits(noted: Noted, before: str) -> bool:
    return noted.hash == chained(before, noted.kind, noted.body)


def _parse(entries: Sequence[tuple[str, Mapping[str, str]]]) -> list[Noted]:
    return [
        Noted(entry_id, fields.get("kind", ""), fields.get("body", ""), fields.get("hash", ""))
        for entry_id, fields in entries
    ]
