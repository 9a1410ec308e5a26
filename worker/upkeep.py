"""What each process of a worker does again and again beside its work, each chore in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from worker.audit import Trail
from worker.dialects import ACCOUNT_LIMITS, ENDPOINT_COSTS, Trouble
from worker.exchange import Exchange
from worker.pacing import Limits, Pacer
from worker.roster import Roster, WorkerShown
from worker.scripts import BookError

log = logging.getLogger(__name__)

LIMITS_EVERY_S = 15.0  # which keeps a connection warm as well
LIMITS_AGAIN_S = 5.0  # when they could not be read, or not be shared
TRIM_EVERY_S = 60.0
SHOW_EVERY_S = 1.0
CHORE_AGAIN_S = 5.0


def keep_limits(exchange: Exchange, pacer: Pacer) -> None:
    """Has the configured limits count at once, then asks the exchange for true ones again and again."""
    # Hands begin while the exchange is still being asked: without any limits, the first flood is not paced.
    _share(pacer.set_limits_unless_known)

    def ask() -> float:
        limits, costs = exchange.fetch(ACCOUNT_LIMITS), exchange.fetch(ENDPOINT_COSTS)
        known = (
            None if isinstance(limits, Trouble) or isinstance(costs, Trouble) else Limits.parse(limits, costs)
        )
        if known is None:
            trouble = next((each for each in (limits, costs) if isinstance(each, Trouble)), None)
            why = trouble.problem.message if trouble else "their answer cannot be understood"
            log.warning("the account's limits cannot be read: what was last known counts (%s)", why)
            _share(pacer.set_limits_unless_known)
            return LIMITS_AGAIN_S
        return LIMITS_EVERY_S if _share(lambda: pacer.set_limits(known)) else LIMITS_AGAIN_S

    _begin("limits", ask)


def _share(set_limits: Callable[[], None]) -> bool:
    try:
        set_limits()
    except BookError as error:
        log.warning("limits cannot be shared: %s", error)
        return False
    return True


def keep_shown(roster: Roster, worker: WorkerShown) -> None:
    """Says again and again that this process runs, for `cancelctl top`."""

    def show() -> float:
        try:
            roster.show(worker)
        except BookError as error:
            log.info("this worker cannot be shown: %s", error)
        return SHOW_EVERY_S

    _begin("shown", show)


def keep_trimmed(trail: Trail, *, max_age_s: float, max_entries: int) -> None:
    """Trims the audit trail now and again; that several workers do so costs next to nothing."""

    def trim() -> float:
        try:
            trail.trim(max_age_s=max_age_s, max_entries=max_entries)
        except BookError as error:
            log.warning("the audit trail cannot be trimmed: %s", error)
        return TRIM_EVERY_S

    _begin("trail", trim)


def _begin(name: str, chore: Callable[[], float]) -> None:
    """Does the chore for the rest of the process; it answers after how many seconds it is due again."""

    def repeat() -> None:
        while True:
            try:
                pause_s = chore()
            except Exception:  # a defect of ours must not end what keeps the others right
                log.exception("what is done again and again failed: %s", name)
                pause_s = CHORE_AGAIN_S
            time.sleep(pause_s)

    threading.Thread(target=repeat, name=name, daemon=True).start()
