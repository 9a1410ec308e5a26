"""The sandbox as a process of its own: `python -m kalshi_cancel.sandbox --key-id ID --public-key PATH`."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from kalshi_cancel.sandbox.buckets import TIERS, UNLIMITED
from kalshi_cancel.sandbox.control import Control
from kalshi_cancel.sandbox.server import SandboxServer

SAMPLES: tuple[dict[str, object], ...] = (
    {"order_id": "sample-resting", "ticker": "KXTEST-26NOV22-A"},
    {"order_id": "sample-partly-filled", "ticker": "KXTEST-26NOV22-A", "filled": "3.00"},
    {"order_id": "sample-executed", "ticker": "KXTEST-26NOV22-B", "status": "executed"},
    {"order_id": "sample-canceled", "ticker": "KXTEST-26NOV22-B", "status": "canceled", "filled": "4.00"},
    {"order_id": "sample-crypto", "ticker": "KXBTC-26NOV22-T100000", "exchange_index": 2},
    {"order_id": "sample-subaccount", "ticker": "KXTEST-26NOV22-C", "subaccount": 1},
    {"order_id": "sample-fractional", "ticker": "KXTEST-26NOV22-C", "count": "2.75"},
)


def main(argv: list[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m kalshi_cancel.sandbox", description="A local Kalshi-like exchange for tests."
    )
    parser.add_argument("--port", type=int, default=0, help="the port; 0: a free one (0)")
    parser.add_argument("--host", default="127.0.0.1", help="the address, loopback only (127.0.0.1)")
    parser.add_argument("--key-id", help="the id of a key that may sign")
    parser.add_argument(
        "--public-key", type=Path, metavar="PATH", help="its public key (PEM; RSA or Ed25519)"
    )
    parser.add_argument(
        "--tier", default=UNLIMITED, choices=[UNLIMITED, *TIERS], help="the account's rate limits"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for ids and fault probabilities (0)")
    parser.add_argument("--sample", action="store_true", help="place sample orders and list them")
    parser.add_argument("--no-record", action="store_true", help="keep no record of calls (benchmarks)")
    arguments = parser.parse_args(argv)
    if (arguments.key_id is None) != (arguments.public_key is None):
        parser.error("--key-id and --public-key belong together")

    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    try:
        keys = {arguments.key_id: arguments.public_key.read_text()} if arguments.key_id else {}
        server = SandboxServer(
            host=arguments.host,
            port=arguments.port,
            keys=keys,
            tier=arguments.tier,
            seed=arguments.seed,
            record=not arguments.no_record,
        ).start()
    except (OSError, ValueError) as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return 2
    try:
        print(f"sandbox exchange on {server.url}", flush=True)
        if arguments.sample:
            _place_samples(server.url)
        stop.wait()
    finally:
        server.stop()
    return 0


def _place_samples(url: str) -> None:
    with Control(url) as control:
        for order in control.place_many(SAMPLES):
            print(
                f"  {order['order_id']:<22}{order['ticker']:<24}{order['status']:<10}"
                f"filled {order['fill_count_fp']:>6}  remaining {order['remaining_count_fp']:>6}  "
                f"shard {order['exchange_index']}  subaccount {order['subaccount_number']}",
                flush=True,
            )


if __name__ == "__main__":
    raise SystemExit(main())
