"""Single cancels and nothing else: signed, sent, and their answers understood, without a store and results.

    python -m bench.bare FILE

FILE holds order ids of shard 1, a line each; the exchange is the environment's, as for a worker. What the
processors allow for a single call at most: nothing that keeps a promise about it can be faster.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kalshi_cancel.exchange.calls import Routing
from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.exchange.protocol import Canceled
from kalshi_cancel.settings.worker import WorkerSettings

THREADS = 8


def main(path: str) -> int:
    """Cancels each by a call of its own; 1: not all were canceled."""
    exchange = Exchange.from_settings(WorkerSettings.from_env())
    exchange.warm_up()

    def is_canceled(order_id: str) -> bool:
        return isinstance(exchange.cancel(order_id, Routing(exchange_index=1), time_left_s=5.0), Canceled)

    with ThreadPoolExecutor(THREADS) as pool:
        return 0 if all(pool.map(is_canceled, Path(path).read_text().split())) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
