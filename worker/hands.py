"""The hands of a process: threads that listen for a bell in Redis and then work until nothing is due.

A bell rings in the same step that brings work into the book, so a cancel is on its way within milliseconds;
Celery's messages wake workers up where no hand listens. One hand of several serves the risk lane only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from worker.book import Book
from worker.desk import Desk
from worker.logs import Seldom
from worker.orders import Lane
from worker.scripts import BookError

log = logging.getLogger(__name__)

# Between looks at whether to stop; below the time after which Redis' silence is an outage.
LISTEN_S = 0.5
LISTEN_AGAIN_S = 0.1  # without Redis
AFTER_A_BUG_S = 1.0
# That hands listen is said with each sweep, which comes late where a process has more to do than it can.
EARS_LIFE_S = 5.0


class Hands:
    """So many hands of one process at one desk."""

    def __init__(self, desk: Desk, book: Book, lanes: Sequence[Lane], *, number: int) -> None:
        self._desk = desk
        self._book = book
        self._lanes = tuple(lanes)
        self._stopping = threading.Event()
        self._no_bell = Seldom()
        kept_free = (Lane.RISK,) if Lane.RISK in self._lanes and number > 1 else self._lanes
        self._threads = [
            threading.Thread(
                target=self._serve,
                args=(kept_free if at == 0 else self._lanes,),
                name=f"hand-{at + 1}",
                daemon=True,
            )
            for at in range(number)
        ]

    def start(self) -> None:
        """Has them listen."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Has each end once it has put down what it holds."""
        self._stopping.set()

    def join(self, within_s: float) -> None:
        """Waits until all have ended."""
        give_up = time.monotonic() + within_s
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(give_up - time.monotonic(), 0.0))

    def show_ears(self) -> None:
        """Says in Redis that somebody listens; raises BookError."""
        if any(thread.is_alive() for thread in self._threads):
            self._book.show_ears(self._lanes, life_s=EARS_LIFE_S)

    def _serve(self, lanes: Sequence[Lane]) -> None:
        rung = True  # what is due may have come before anybody listened
        while not self._stopping.is_set():
            try:
                if rung:
                    self._desk.serve(lanes)
            except Exception:  # a defect of ours: the hand lives, and what it held is due by its lease
                log.exception("a hand could not work")
                self._stopping.wait(AFTER_A_BUG_S)
            try:
                rung = self._book.listen(lanes, within_s=LISTEN_S)
            except BookError as error:
                if (more := self._no_bell.now()) is not None:
                    log.info("no bell can be heard: %s", f"{error}{more}")
                self._stopping.wait(LISTEN_AGAIN_S)
                rung = True  # bells may have been lost with the connection
