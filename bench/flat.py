"""Time to flat: mass cancels through real workers at the sandbox, against what the token budget allows.

    python -m bench.flat [--quick] [--only TIER ... | ed25519 | bare | foreign | overtake] [--out FOLDER]

Each row has a Redis, a sandbox with full buckets and workers of its own. `bound`: the least time in which
bucket arithmetic lets so many cancels through, by the best mix of paths (the unscoped bucket serves every
shard; each shard from 1 has a bucket of its own for single cancels), calls and processors being infinitely
fast. `actual`: from the mass cancel's acceptance to the last cancel that took effect at the sandbox.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import psutil

from bench import report
from kalshi_cancel.client import CancelClient
from kalshi_cancel.model.requests import Lane
from kalshi_cancel.sandbox.buckets import SECONDS_OF_WRITES, TIERS
from kalshi_cancel.sandbox.control import Json
from trials.stack import ROOT, Part, Stack, wait_until

CANCEL_COST = 2.0
FOREIGN_EVERY_S = 0.02
LOOK_EVERY_S = 0.02
RISK_EVERY_S = 0.05
BACKLOG = 10_000
BARE_EACH = 3_000
PREFIX = "kalshi-cancel"
BENCHED_TIERS = ("basic", "advanced", "premier", "prime", "prestige")
PARTS = (*BENCHED_TIERS, "ed25519", "bare", "foreign", "overtake")


@dataclass(frozen=True, slots=True)
class Row:
    """One situation; ``foreign_share`` is what another client of the account spends of every refill.

    ``key``: what calls are signed with, ``rsa`` or ``ed25519``.
    """

    tier: str
    orders: int
    workers: int
    shards: int
    latency_ms: int
    foreign_share: float = 0.0
    key: str = "rsa"


# So many that the tokens saved up at first hardly count: 4,000 cancels a second, as long as it takes.
SUSTAINED = [Row("prestige", 40_000, workers, 1, 0) for workers in (1, 3)]


@dataclass(frozen=True, slots=True)
class Flat:
    """What became of it; seconds. ``proof_s`` includes the listing that proves it, after the reads' lag.

    ``busy``: the share of all processors' time that was taken, by whatever it was, until the last cancel.
    """

    bound_s: float
    predicted_s: float
    actual_s: float
    reported_s: float | None
    proof_s: float
    flat: bool
    refused_calls: int
    calls: dict[str, int]
    overspent: bool
    cpu_s: float
    busy: float


def capacity(tier: str) -> float:
    """A full write bucket's tokens."""
    return TIERS[tier].write * (1 if tier == "basic" else SECONDS_OF_WRITES)


def bound_s(row: Row) -> float:
    """The least time until the last of the row's cancels is paid for, from full buckets."""
    counts = Counter(number % row.shards for number in range(row.orders))
    refill, full = TIERS[row.tier].write * (1 - row.foreign_share), capacity(row.tier)
    low, high = 0.0, row.orders * CANCEL_COST / refill
    for _ in range(60):
        middle = (low + high) / 2
        tokens = full + refill * middle  # in every bucket
        wanted = sum(
            max(count - tokens // CANCEL_COST if shard else count, 0) for shard, count in counts.items()
        )
        low, high = (low, middle) if wanted * CANCEL_COST <= tokens else (middle, high)
    return high


def mass_cancel(row: Row, folder: Path) -> Flat:
    """One mass cancel of everything."""
    with Stack(folder, tier=row.tier, key=row.key) as stack:
        stack.start(workers=row.workers)
        _await_limits(stack, row.tier)
        stack.control.configure(latency_s=row.latency_ms / 1000)
        _place(stack, row.orders, row.shards)
        client = CancelClient(stack.redis.url, requested_by="bench")
        cpu_s = _cpu_s(stack.workers)
        with _foreign_client(stack, row), _processors() as looks:
            accepted = time.time()
            pending = client.mass_cancel({"everything": True}, deadline_s=120.0)
            shown = pending.result(timeout=600)
            proof_s = time.time() - accepted
        cpu_s = _cpu_s(stack.workers) - cpu_s
        calls = [call for name in ("cancel", "batch") for call in stack.control.calls(name)]
        client.close()
    if not shown["flat"]:
        print(f"not flat: {shown['not_affected'][:3]}", file=sys.stderr)
    effective = [call["received_ms"] + (call["duration_ms"] or 0) for call in calls if call["effects"]]
    ended = max(effective, default=0.0) / 1000
    return Flat(
        bound_s=bound_s(row),
        predicted_s=shown["predicted_s"],
        actual_s=ended - accepted,
        reported_s=shown["actual_s"],
        proof_s=proof_s,
        flat=shown["flat"],
        refused_calls=sum(call["status"] == 429 for call in calls),  # noqa: PLR2004 - HTTP's Too Many Requests
        calls=dict(Counter(call["operation"] for call in calls)),
        overspent=_overspent(calls, row.tier),
        cpu_s=cpu_s,
        busy=_busy(looks, accepted, ended),
    )


def _await_limits(stack: Stack, tier: str) -> None:
    with stack.redis.client() as server:
        wait_until(
            lambda: float(server.hget(f"{PREFIX}:limits", "write_refill") or 0) == TIERS[tier].write,
            what="the account's limits are known",
        )


def _place(stack: Stack, orders: int, shards: int) -> list[str]:
    news = [
        {
            "order_id": f"{number:08d}-5b1f-4c3e-9d0a-{shard:012d}",
            "exchange_index": shard,
            "ticker": f"KXBENCH{shard}-26NOV22-A",
        }
        for number in range(orders)
        for shard in [number % shards]
    ]
    for start in range(0, orders, 1000):
        stack.control.place_many(news[start : start + 1000])
    return [str(each["order_id"]) for each in news]


def _cpu_s(workers: Sequence[Part]) -> float:
    return sum(sum(psutil.Process(worker.pid).cpu_times()[:2]) for worker in workers)


def _overspent(calls: Sequence[Json], tier: str) -> bool:
    """Whether more was let through than a bucket can hold and refill: the sandbox' budget, checked."""
    for bucket in {call["bucket"] for call in calls}:
        paid = sorted(
            (call["received_ms"] + (call["duration_ms"] or 0), call["tokens"])
            for call in calls
            if call["bucket"] == bucket
        )
        spent = sum(tokens for _, tokens in paid)
        seconds = (paid[-1][0] - paid[0][0]) / 1000
        if spent > capacity(tier) + TIERS[tier].write * (seconds + 1):
            return True
    return False


@contextmanager
def _processors() -> Iterator[list[tuple[float, float]]]:
    """Looks, while the body runs, at how many seconds of the processors were taken: (moment, seconds)."""
    looks: list[tuple[float, float]] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(LOOK_EVERY_S):
            times = psutil.cpu_times()
            taken = sum(times[:8]) - times.idle - times.iowait  # (guests' time is in the users')
            looks.append((time.time(), taken))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield looks
    finally:
        stop.set()
        thread.join()


def _busy(looks: Sequence[tuple[float, float]], since: float, until: float) -> float:
    """The share that was taken between the two moments, as well as the looks tell."""
    within = [each for each in looks if since <= each[0] <= until] or list(looks[:2])
    (began, first), (ended, last) = within[0], within[-1]
    return (last - first) / max((ended - began) * (psutil.cpu_count() or 1), LOOK_EVERY_S)


@contextmanager
def _foreign_client(stack: Stack, row: Row) -> Iterator[None]:
    """Somebody else who spends the account's tokens all the time, unseen by the workers."""
    stop = threading.Event()

    def spend() -> None:
        last = time.monotonic()
        while not stop.wait(FOREIGN_EVERY_S):
            now = time.monotonic()
            stack.control.drain("write", TIERS[row.tier].write * row.foreign_share * (now - last))
            last = now

    thread = threading.Thread(target=spend, daemon=True)
    if row.foreign_share:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if row.foreign_share:
            thread.join()


@dataclass(frozen=True, slots=True)
class Bare:
    """Single cancels by processes that do nothing else; while all of them are at it."""

    processes: int
    key: str
    rate: float
    busy: float


def bare_singles(folder: Path, *, processes: int, key: str) -> Bare:
    """What the processors allow at most where only single calls can be paid for."""
    with Stack(folder, tier="unlimited", key=key) as stack:
        stack.start(workers=0)
        ids = _place(stack, BARE_EACH * processes * 2, 2)[1::2]  # those of shard 1
        parts = []
        with _processors() as looks:
            for number in range(processes):
                listed = folder / f"bare{number}.txt"
                listed.write_text("\n".join(ids[number::processes]))
                command = [sys.executable, "-m", "bench.bare", str(listed)]
                log_path = folder / f"bare{number}.log"
                parts.append((Part(command, log_path=log_path, env=stack.environment), listed))
            for part, _ in parts:
                if part.process.wait():
                    raise RuntimeError(f"not all were canceled:\n{part.log_text()}")
        at = {call["order_ids"][0]: call["received_ms"] / 1000 for call in stack.control.calls("cancel")}
    ran = [[at[order_id] for order_id in listed.read_text().split()] for _, listed in parts]
    since, until = max(map(min, ran)), min(map(max, ran))
    return Bare(
        processes,
        key,
        sum(since <= each <= until for each in at.values()) / (until - since),
        _busy(looks, since, until),
    )


@dataclass(frozen=True, slots=True)
class Overtaking:
    """Risk cancels while strategy cancels wait; milliseconds from acceptance to the wire."""

    tier: str
    latency_ms: int
    risk_worker: bool
    backlog: int
    risk_cancels: int
    p50_ms: float
    p99_ms: float
    worst_ms: float
    backlog_left: int


def overtake(folder: Path, *, tier: str, latency_ms: int, risk_worker: bool, seconds: float) -> Overtaking:
    """A backlog of strategy cancels that two workers are busy with, and a risk cancel every 50 ms."""
    with Stack(folder, tier=tier) as stack:
        stack.start(workers=2)
        if risk_worker:
            stack.start_worker("-Q", Lane.RISK.queue)
        if tier in TIERS:
            _await_limits(stack, tier)
        stack.control.configure(latency_s=latency_ms / 1000)
        ids = _place(stack, BACKLOG + int(seconds / RISK_EVERY_S), 1)
        client = CancelClient(stack.redis.url, requested_by="bench")
        client.cancel_many([{"order_id": order_id, "deadline_s": 600} for order_id in ids[:BACKLOG]])
        time.sleep(0.5)  # the saved-up tokens go first
        accepted: dict[str, float] = {}
        started = time.monotonic()
        for number, order_id in enumerate(ids[BACKLOG:]):
            time.sleep(max(started + number * RISK_EVERY_S - time.monotonic(), 0))
            client.cancel(order_id, lane=Lane.RISK, requested_by="risk")
            accepted[order_id] = time.time()
        for _ in client.results(ids[BACKLOG:], timeout=30):
            pass
        with stack.redis.client() as server:
            left = int(server.zcard(f"{PREFIX}:due:strategy:write"))
        received: dict[str, int] = {}
        for name in ("cancel", "batch"):
            for call in stack.control.calls(name):
                for order_id in call["order_ids"]:
                    received.setdefault(order_id, call["received_ms"])
        client.close()
    waits = sorted(max(received[order_id] - at * 1000, 0.0) for order_id, at in accepted.items())
    return Overtaking(
        tier,
        latency_ms,
        risk_worker,
        BACKLOG,
        len(waits),
        waits[len(waits) // 2],
        waits[min(int(len(waits) * 0.99), len(waits) - 1)],
        waits[-1],
        left,
    )


def rows(*, quick: bool) -> list[Row]:
    """The matrix; quick: one corner of each kind."""
    if quick:
        return [
            Row("advanced", 1_000, 1, 1, 0),
            Row("premier", 1_000, 3, 4, 20),
            Row("prime", 10_000, 3, 1, 20),
            Row("prestige", 10_000, 1, 4, 0),
            Row("prestige", 10_000, 3, 1, 0),
            *SUSTAINED,
        ]
    return [
        Row(tier, orders, workers, shards, latency_ms)
        for tier in BENCHED_TIERS
        for orders in ((1_000,) if tier == "basic" else (1_000, 10_000))
        for workers in (1, 3)
        for shards in (1, 4)
        for latency_ms in (0, 20)
    ] + SUSTAINED


def ed25519_rows(*, quick: bool) -> list[Row]:
    """Where many single calls are to be signed, with the key whose signature costs least."""
    return [
        Row(tier, orders, workers, 4, latency_ms, key="ed25519")
        for tier, orders in (("advanced", 1_000), ("advanced", 10_000), ("premier", 10_000))
        for workers in (1, 3)
        for latency_ms in (0, 20)
    ][:: 6 if quick else 1]


def foreign_rows(*, quick: bool) -> list[Row]:
    """Half of the budget is spent by somebody else."""
    some = [Row("premier", 2_000, 3, 1, 20, 0.5)]
    return (
        some if quick else [*some, Row("prime", 10_000, 3, 1, 20, 0.5), Row("prestige", 10_000, 3, 1, 0, 0.5)]
    )


def _line(row: Row, outcome: Flat) -> str:
    words = [
        f"{row.tier:<9}{row.orders:>7,} orders {row.workers} workers {row.shards} shards",
        f"{row.latency_ms:>2} ms",
        f"bound {outcome.bound_s:.2f} predicted {outcome.predicted_s:.2f} actual {outcome.actual_s:.2f}",
        f"proof {outcome.proof_s:.2f} cpu {outcome.cpu_s:.2f} busy {outcome.busy:.0%}",
        f"429s {outcome.refused_calls} {outcome.calls}",
        *(["foreign client"] if row.foreign_share else []),
        *([row.key] if row.key != "rsa" else []),
        *([] if outcome.flat else ["NOT FLAT"]),
        *(["OVERSPENT"] if outcome.overspent else []),
    ]
    return "  ".join(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes the documents."""
    parser = argparse.ArgumentParser(prog="python -m bench.flat", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="a few rows: three minutes instead of half an hour"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for the documents (bench/results; --quick: build)"
    )
    arguments = parser.parse_args(argv)
    out = arguments.out or ROOT / ("build" if arguments.quick or arguments.only else "bench/results")
    wanted = set(arguments.only or PARTS)
    command = report.command_line("bench.flat", argv if argv is not None else sys.argv[1:])
    found: dict[str, list[Any]] = {"flat": [], "bare": [], "overtake": []}
    started = time.time()

    def keep() -> None:
        report.keep(
            out, "flat", command=command, facts={"seconds": round(time.time() - started)}, found=found
        )

    with tempfile.TemporaryDirectory() as folder:
        chosen = [row for row in rows(quick=arguments.quick) if row.tier in wanted]
        chosen += ed25519_rows(quick=arguments.quick) if "ed25519" in wanted else []
        chosen += foreign_rows(quick=arguments.quick) if "foreign" in wanted else []
        for number, row in enumerate(chosen):
            outcome = mass_cancel(row, Path(folder) / f"flat{number}")
            found["flat"].append({**asdict(row), **asdict(outcome)})
            print(_line(row, outcome), flush=True)
            keep()
        for key, processes in product(("rsa", "ed25519"), (1, 2, 3)) if "bare" in wanted else ():
            bare = bare_singles(Path(folder) / f"bare-{key}{processes}", processes=processes, key=key)
            found["bare"].append(asdict(bare))
            print(bare, flush=True)
            keep()
        if "overtake" in wanted:
            seconds = 5.0 if arguments.quick else 15.0
            for tier, latency_ms, risk_worker in (
                [("premier", 20, False)]
                if arguments.quick
                else [
                    ("premier", 0, False),
                    ("premier", 20, False),
                    ("premier", 20, True),
                    ("prime", 20, False),
                ]
            ):
                name = f"overtake-{tier}-{latency_ms}-{risk_worker}"
                figures = overtake(
                    Path(folder) / name,
                    tier=tier,
                    latency_ms=latency_ms,
                    risk_worker=risk_worker,
                    seconds=seconds,
                )
                found["overtake"].append(asdict(figures))
                print(figures, flush=True)
                keep()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
