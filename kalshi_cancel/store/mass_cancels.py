"""Mass cancels in Redis: what was asked for, how far each has got, and its report.

Any worker can run one: everything that a runner needs to know is here. It claims the mass cancel, and writes
with its claim's token only (``mass_claim``). The orders themselves are entries of the store like all others.
Their keys: docs/reference/redis-keys.md.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import redis

from kalshi_cancel.model.fields import BadRequest
from kalshi_cancel.model.mass_request import MassRequest
from kalshi_cancel.model.times import utc_text
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store import results, scripts
from kalshi_cancel.store.audit import AuditLog
from kalshi_cancel.store.keys import Keys
from kalshi_cancel.store.scripts import StoreError
from kalshi_cancel.store.server_clock import ServerClock


class MassCancels:
    """The mass cancels under one prefix; safe to share between threads. Everything raises StoreError."""

    def __init__(self, server: redis.Redis, settings: RedisSettings) -> None:
        self._server = server
        self._prefix = settings.key_prefix
        self._celery_prefix = settings.celery_prefix
        self._life_s = settings.result_expires_s
        self._wait_replicas = settings.wait_replicas
        self._enter = scripts.load(server, "gather", "enter")
        self._audit_log = AuditLog(server, settings)
        self._clock = ServerClock(server)

    def enter(self, request: MassRequest, *, reply_to: str = "") -> None:
        """Accepts a mass cancel; entering the same one again only has its report told to one more task.

        Raises BadRequest when its ``request_id`` is that of another one.
        """
        if reply_to.startswith(results.RESERVED):
            reply_to = ""
        now_s = self._clock.now_s()
        asked = replace(request, accepted_at=utc_text(now_s)).to_json()
        meant = json.dumps({name: asked[name] for name in ("scope", "dry_run", "allow_side_effects")})
        digest = hashlib.sha256(meant.encode()).hexdigest()
        args = scripts.asking(
            self._prefix, id=request.request_id, reply_to=reply_to, asked_at_ms=now_s * 1000, meant=digest
        )
        stored = ("HSETNX", self._key(request.request_id), "request", json.dumps(asked))
        became, *is_done = scripts.surely(
            self._server, self._enter, args, then=[stored], replicas=self._wait_replicas
        )
        if became == "other":
            raise BadRequest({"request_id": f"is taken by another mass cancel: {request.request_id}"})
        if became == "new":
            self._audit_log.append("mass", {"step": "accepted", **asked, "scope": request.scope.in_short()})
        elif reply_to and is_done[0] and (report := self.report(request.request_id)) is not None:
            self._answer(reply_to, report)

    def _answer(self, task_id: str, report: Mapping[str, Any]) -> None:
        record = results.task_record(task_id, report, date_done=self._clock.now())
        result_key = results.task_key(task_id, self._celery_prefix)
        pipeline = self._server.pipeline()
        pipeline.set(result_key, record, ex=self._life_s)
        pipeline.publish(result_key, record)
        scripts.call(pipeline.execute)

    def open_ids(self) -> list[str]:
        """Those without a report."""
        return sorted(scripts.call(lambda: self._server.smembers(Keys(self._prefix).mass_cancels_open)))

    def pace(self) -> float | None:
        """Orders a second that all workers settled when no tokens held it up, None while not measured.

        Also None for what somebody else has put there: it only predicts.
        """
        try:
            text = scripts.call(lambda: self._server.get(Keys(self._prefix).mass_cancels_pace))
        except StoreError as error:
            if error.can_pass:
                raise
            return None
        pace = number(text)
        return pace if pace is not None and pace > 0 else None

    def note_pace(self, orders_per_s: float) -> None:
        """Keeps what was measured, averaged with what was known."""
        known = self.pace() or orders_per_s
        text = f"{(known + orders_per_s) / 2:.0f}"
        scripts.call(lambda: self._server.set(Keys(self._prefix).mass_cancels_pace, text))

    def now_s(self) -> float:
        """The time by Redis' clock, epoch seconds."""
        return self._clock.now_s()

    def is_known(self, request_id: str) -> bool:
        """Whether there is anything of it."""
        return scripts.call(lambda: self._server.hget(self._key(request_id), "meant")) is not None

    def plan(self, request_id: str) -> dict[str, Any] | None:
        """The plan, once it is made."""
        return self._field(request_id, "plan")

    def progress(self, request_id: str) -> dict[str, Any] | None:
        """How far it has got; None for what cannot be read, too."""
        return self._field(request_id, "progress")

    def report(self, request_id: str) -> dict[str, Any] | None:
        """The report, once it is done."""
        key = results.task_key(f"mass:{request_id}", self._celery_prefix)
        text = scripts.call(lambda: self._server.get(key))
        record = json_object(text)
        report = record and record.get("result")
        return report if isinstance(report, dict) else None

    def listed(self, *, at_most: int = 100) -> Iterator[tuple[str, str, dict[str, Any] | None]]:
        """The latest mass cancels: id, when accepted, and the report or progress there is."""
        found = scripts.call(
            lambda: self._server.zrange(
                Keys(self._prefix).mass_cancels, 0, at_most - 1, desc=True, withscores=True
            )
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
                found.append((MassRequest.from_json(json.loads(request)), json_object(progress)))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                continue  # spoilt, or just forgotten: who runs it says so
        return sorted(found, key=lambda each: each[0].accepted_at, reverse=True)

    def _field(self, request_id: str, name: str) -> dict[str, Any] | None:
        return json_object(scripts.call(lambda: self._server.hget(self._key(request_id), name)))

    def _key(self, request_id: str) -> str:
        return Keys(self._prefix).mass_cancel(request_id)


def json_object(text: str | None) -> dict[str, Any] | None:
    """The JSON object that a text is; None for anything else."""
    try:
        value = json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def number(text: str | None) -> float | None:
    """The finite number that a text is; None for anything else."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
