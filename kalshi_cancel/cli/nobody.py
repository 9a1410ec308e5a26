"""Says that no worker runs, to somebody who waits for what only a worker does."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kalshi_cancel.client import CancelClient
from kalshi_cancel.store.scripts import StoreError

NOTICE_AFTER_S = 1.5  # most are answered before that


def say_when_nobody_works(client: CancelClient) -> None:
    """One line on stderr if no worker runs; none if that cannot be seen."""
    try:
        if client.workers():
            return
    except StoreError:
        return
    print(
        "cancelctl: no worker runs: accepted cancels wait for one (celery -A worker.app worker)",
        file=sys.stderr,
        flush=True,
    )


@contextmanager
def notice_when_nobody_works(client: CancelClient) -> Iterator[None]:
    """Who still waits in the body after a while is told if no worker runs."""
    later = threading.Timer(NOTICE_AFTER_S, say_when_nobody_works, [client])
    later.daemon = True
    later.start()
    try:
        yield
    finally:
        later.cancel()
