"""Runs mass cancels in this process: takes those that nobody is at, each in a thread of its own.

Any worker can take one. Another goes on with it when the one that runs it vanishes; when that one comes back,
it may not write any more (``mass_claim``).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable

from kalshi_cancel.model.mass_request import MassRequest
from kalshi_cancel.model.requests import Lane
from kalshi_cancel.store.cancels import Fenced
from kalshi_cancel.store.mass_claim import MassClaim, MassClaims
from kalshi_cancel.store.scripts import StoreError, say_failed
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import Seldom, about, say
from worker.dispatch.events import MassStep
from worker.mass import report as mass_report
from worker.mass.means import Means
from worker.mass.run import STUMBLES_MOST, LeftToOthers, MassRun

log = logging.getLogger(__name__)

FIND_EVERY_S = 1.0  # mass cancels whose runner has vanished
REDIS_AGAIN_S = 0.1
AFTER_A_BUG_S = 1.0  # until it is tried again
LEFT_FOR_S = 2.0  # what was left to others is left to them for so long
UNREADABLE_FOR_S = 3.0  # until what nobody has taken is answered with that


class MassRunner:
    """Runs a process' mass cancels; :meth:`find` is called every ``FIND_EVERY_S``, and after ``wake``."""

    def __init__(self, means: Means, claims: MassClaims, wake: Callable[[], object]) -> None:
        self._means = means
        self._claims = claims
        self._running: dict[str, MassClaim] = {}
        self._not_before: dict[str, float] = {}  # (monotonic)
        self._unreadable_since: dict[str, float] = {}
        self._wake = wake

    def stop(self) -> None:
        """Leaves what is under way to others."""
        self._means.stopping.set()

    def enter(self, request: MassRequest, *, reply_to: str = "") -> None:
        """Accepts a mass cancel and looks at it at once; raises StoreError."""
        self._means.mass_cancels.enter(request, reply_to=reply_to)
        self._wake()

    def now_s(self) -> float:
        """The time by Redis' clock, epoch seconds."""
        return self._means.mass_cancels.now_s()

    def look(self) -> None:
        """Looks for mass cancels that nobody is at, now."""
        self._wake()

    def find(self) -> None:
        """Takes what nobody is at, and keeps what runs here: a step may take longer than the lease."""
        for request_id in self._means.mass_cancels.open_ids():
            if self._means.stopping.is_set():
                return  # what runs here gives its lease back
            try:
                if request_id in self._running:
                    self._running[request_id].keep()
                elif time.monotonic() >= self._not_before.get(request_id, 0.0):
                    self._take(request_id)
            except (Fenced, KeyError):
                continue  # it has ended just now, or its runner will notice
            except Exception as error:  # one that goes wrong keeps nobody from the others
                if isinstance(error, StoreError) and error.can_pass:
                    raise
                say(log, LogEvent.MASS_CANCEL_UNREADABLE, request_id=request_id, why=str(error))

    def _take(self, request_id: str) -> None:
        claim = self._claims.take(request_id)
        if claim is None:
            return
        try:
            request = MassRequest.from_json(json.loads(claim.request))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self._set_aside(claim, error)
            return
        self._running[request_id] = claim
        runner = threading.Thread(
            target=self._run, args=(request, claim), name=f"mass {request_id}", daemon=True
        )
        try:
            runner.start()
        except RuntimeError:  # no more threads: the next look tries again
            self._running.pop(request_id, None)
            raise

    def _set_aside(self, claim: MassClaim, error: Exception) -> None:
        """Answers what this version cannot read, unless another worker can: a newer one may know more."""
        request_id, now = claim.fence.request_id, time.monotonic()
        since = self._unreadable_since.setdefault(request_id, now)
        if now - since < UNREADABLE_FOR_S:
            claim.leave()
            return
        say(log, LogEvent.MASS_CANCEL_SET_ASIDE, request_id=request_id, why=str(error))
        self._means.store.keep_unreadable(json.dumps({"mass_cancel": request_id, "request": claim.request}))
        report = mass_report.refused(request_id, f"its request cannot be read: {error}")
        claim.finish(report, report)

    def _run(self, request: MassRequest, claim: MassClaim) -> None:
        try:
            self._see_through(request, claim)
        finally:
            self._running.pop(request.request_id, None)

    def _see_through(self, request: MassRequest, claim: MassClaim) -> None:
        said = about(Lane.RISK, request.request_id, request.traceparent)
        self._means.emit(
            MassStep(
                request.request_id,
                "started",
                request.traceparent,
                dry_run=request.dry_run,
                requested_by=request.requested_by,
            )
        )
        run, seldom, stumbles = None, Seldom(), 0
        while not self._means.stopping.is_set():
            try:
                run = run or MassRun(request, claim, self._means)
                report = run.to_the_end()
                claim.finish(report, mass_report.in_short(report))
            except StoreError as error:
                say_failed(log, error, "work on a mass cancel", seldom=seldom, **said)
                if error.can_pass:
                    self._means.stopping.wait(REDIS_AGAIN_S)
                    continue
                # What is stored of it is of another kind, perhaps: it is not tried for ever.
                stumbles, why = stumbles + 1, str(error)
                self._means.stopping.wait(AFTER_A_BUG_S)
                if stumbles > 2 * STUMBLES_MOST:
                    self._give_up(claim, why)
                    return
            except LeftToOthers:
                break
            except Fenced:
                if self._is_put_back(claim):
                    continue
                say(log, LogEvent.MASS_CANCEL_TAKEN_OVER, **said)
                self._means.emit(MassStep(request.request_id, "left"))
                return
            except Exception as error:  # noqa: BLE001 - see the next line
                # A defect of ours: not one mass cancel may stay without a report for ever.
                say(log, LogEvent.INTERNAL_ERROR, error=error, doing="work on a mass cancel", **said)
                stumbles += 1
                if run is not None:
                    run.stumbled()
                self._means.stopping.wait(AFTER_A_BUG_S)
                if stumbles > 2 * STUMBLES_MOST:
                    self._give_up(claim, "a step failed unexpectedly: see the worker's log")
                    return
            else:
                self._log_end(request, report)
                return
        self._leave(claim)

    def _is_put_back(self, claim: MassClaim) -> bool:
        """Whether it only looked as if somebody else had it: Redis had lost it."""
        try:
            claim.keep()
        except Fenced:
            return False
        except StoreError:
            pass  # the next step tells
        return True

    def _give_up(self, claim: MassClaim, why: str) -> None:
        """Answers one that cannot even be reported about."""
        try:
            report = mass_report.refused(claim.fence.request_id, why)
            claim.finish(report, report)
        except StoreError as error:
            say_failed(log, error, "end a mass cancel", request_id=claim.fence.request_id)
        except Fenced:
            say(log, LogEvent.MASS_CANCEL_TAKEN_OVER, request_id=claim.fence.request_id)

    def _log_end(self, request: MassRequest, report: dict[str, object]) -> None:
        step = "planned" if request.dry_run else "flat" if report["flat"] else "not_flat"
        why = str(report["why_not_flat"]) if step == "not_flat" else None
        self._means.emit(MassStep(request.request_id, step, request.traceparent, why=why))

    def _leave(self, claim: MassClaim) -> None:
        request_id = claim.fence.request_id
        self._not_before[request_id] = time.monotonic() + LEFT_FOR_S
        say(log, LogEvent.MASS_CANCEL_HANDED_OVER, request_id=request_id)
        self._means.emit(MassStep(request_id, "left"))
        try:
            claim.leave()
        except StoreError as error:  # its lease runs out by itself
            say_failed(log, error, "hand over a mass cancel", request_id=request_id)
        except Fenced:
            say(log, LogEvent.MASS_CANCEL_TAKEN_OVER, request_id=request_id)
