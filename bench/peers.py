"""Our service and other queues at the same work in the same run, one after the other, round after round.

    python -m bench.peers [--quick] [--rounds N] [--only MEASURE ...] [--idle-s 300] [--out FOLDER]

What a round measures, for each contender in turn with two worker processes (see `MEASURES`): how fast a
backlog of single requests is drained at 0 and 20 ms of exchange latency, how fast producers and workers are
together, how long from publishing to the wire and to the stored result, and what it costs; the backlog
again with an Ed25519 key; and once, what a worker costs that has nothing to do. Then what only our service
has or must show by itself. Writes performance.json and performance.md.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench import report
from bench.crews import (
    BY_NAME,
    OURS,
    OURS_SAFE,
    OURS_UNWATCHED,
    OURS_WATCHED,
    Contender,
    Producing,
    Session,
    StubExchange,
    available,
)
from bench.stub import ceiling
from trials.stack import ROOT, wait_until

Figures = dict[str, Any]
FULL_ROUNDS = 3
IDLE_SERVICES = 3
SETTLED_AFTER_S = 5.0
IDLE_CLOSE_S = 60  # load balancers close connections after about a minute of silence


@dataclass(frozen=True, slots=True)
class Size:
    """How much is done: orders in a backlog, seconds of paced load, and so on."""

    backlog: int = 10_000
    paced_s: float = 10.0
    lengths: tuple[int, ...] = (1_000, 10_000, 100_000)
    processes: tuple[int, ...] = (1, 2, 4)
    memory_orders: int = 200_000
    idle_s: float = 300.0
    resting_s: float = 60.0


QUICK = Size(
    backlog=2_000, paced_s=3.0, lengths=(1_000, 10_000), memory_orders=20_000, idle_s=5.0, resting_s=5.0
)


class Bench:
    """One run: the stubs that all share, and what was found, by measure and contender, a figure a round."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder = folder
        self.size = size
        self.stub = StubExchange(folder / "stub")
        self.ed25519_stub = StubExchange(folder / "stub-ed25519", key="ed25519")
        self.found: dict[str, dict[str, list[Figures]]] = {}

    def session(
        self,
        contender: Contender,
        *,
        processes: int = 2,
        latency_ms: int = 0,
        stub: StubExchange | None = None,
    ) -> Session:
        """A contender with a Redis of its own."""
        return Session(contender, stub or self.stub, self.folder, processes=processes, latency_ms=latency_ms)

    def stop(self) -> None:
        """Ends the stubs."""
        self.stub.stop()
        self.ed25519_stub.stop()

    def note(self, measure: str, contender: str, **figures: Any) -> None:
        """Keeps and tells what was found."""
        self.found.setdefault(measure, {}).setdefault(contender, []).append(figures)
        shown = "  ".join(f"{name} {_shown(value)}" for name, value in figures.items())
        print(f"  {measure:<10} {contender:<15} {shown}", flush=True)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"  # noqa: PLR2004 - four digits are enough
    return str(value)


# -- one contender after the other


def drain(bench: Bench, session: Session, *, count: int, measure: str, name: str = "") -> None:
    """A backlog of single requests, accepted while the workers are held; then they are let go."""
    session.fresh()
    session.pause()
    with session.producer("single", count, name=name) as producing:
        produced = producing.run()
    cpu_s, redis_s = session.cpu_s(), session.redis_cpu_s()
    resumed = session.resume()
    done = session.await_stored(producing.ids)
    state = session.stub.state()
    bench.note(
        measure,
        session.contender.name,
        rate=len(producing.ids) / (done - resumed),
        cpu_s_per_1000=(session.cpu_s() - cpu_s) / len(producing.ids) * 1000,
        redis_s_per_1000=(session.redis_cpu_s() - redis_s) / len(producing.ids) * 1000,
        first_s=state["first"] - resumed,
        calls=state["calls"],
        repeated=state["cancels"] - state["orders"],
        accepted_per_s=len(producing.ids) / (produced.ended - produced.began),
        producer_cpu_s_per_1000=produced.cpu_s / len(producing.ids) * 1000,
        orders=len(producing.ids),
        pss_mb=session.pss_mb(),
        record_bytes=session.record_bytes(producing.ids[0]),
    )


def live(bench: Bench, session: Session, *, count: int, measure: str = "live", mode: str = "single") -> None:
    """Producers flat out and the workers, all on the same machine."""
    session.fresh()
    cpu_s = session.cpu_s()
    producers = 1 if mode == "bulk" else 4
    with session.producer(mode, count, producers=producers) as producing:
        produced = producing.run()
        done = session.await_stored(producing.ids)
    state = bench.stub.state()
    bench.note(
        measure,
        session.contender.name,
        rate=len(producing.ids) / (done - produced.began),
        published_per_s=len(producing.ids) / (produced.ended - produced.began),
        cpu_s_per_1000=(session.cpu_s() - cpu_s) / len(producing.ids) * 1000,
        orders_per_call=state["cancels"] / state["calls"],
    )


def latency(bench: Bench, session: Session, *, rate: float) -> None:
    """From publishing one request to its arrival at the exchange, and to its record."""
    session.fresh()
    count = max(int(rate * bench.size.paced_s * (0.5 if rate > 100 else 1)), 20)  # noqa: PLR2004 - samples enough
    with session.noting_records() as noted:
        with session.producer("paced", count, producers=1, rate=rate) as producing:
            published = producing.run().published
        session.await_stored(producing.ids)
        wait_until(lambda: len(noted.keys() & published.keys()) == len(published), what="notices of records")
    arrived = bench.stub.arrivals()
    wire_ms = [(arrived[order_id] - at) * 1000 for order_id, at in published.items()]
    result_ms = [(noted[order_id] - at) * 1000 for order_id, at in published.items()]
    bench.note(
        f"at {rate:g}/s",
        session.contender.name,
        wire_p50_ms=_share(wire_ms, 0.5),
        wire_p99_ms=_share(wire_ms, 0.99),
        result_p50_ms=_share(result_ms, 0.5),
        result_p99_ms=_share(result_ms, 0.99),
    )


def rest(bench: Bench, contender: Contender) -> None:
    """What one worker process costs that has nothing to do, after it has worked; figures are per minute."""
    with bench.session(contender, processes=1) as session:
        time.sleep(SETTLED_AFTER_S)
        began, cpu_s, redis_s = time.monotonic(), session.cpu_s(), session.redis_cpu_s()
        time.sleep(bench.size.resting_s)
        minutes = (time.monotonic() - began) / 60
        bench.note(
            "rest",
            contender.name,
            cpu_s_per_min=(session.cpu_s() - cpu_s) / minutes,
            redis_s_per_min=(session.redis_cpu_s() - redis_s) / minutes,
            threads=session.threads(),
            pss_mb=session.pss_mb(),
        )


def _share(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def with_everybody(bench: Bench, names: Sequence[str], wanted: set[str]) -> None:
    """One round of what all contenders do."""
    for name in names:
        contender = BY_NAME[name]
        backlog = min(bench.size.backlog, contender.drained[0])
        if wanted & {"drain0", "live", "latency"}:
            with bench.session(contender) as session:
                if "drain0" in wanted:
                    drain(bench, session, count=backlog, measure="drain0")
                if "latency" in wanted:
                    latency(bench, session, rate=20)
                    latency(bench, session, rate=200)
                if "live" in wanted:
                    live(bench, session, count=backlog)
        if "ed25519" in wanted:
            with bench.session(contender, stub=bench.ed25519_stub) as session:
                drain(bench, session, count=backlog, measure="ed25519")
        if "drain20" in wanted:
            with bench.session(contender, latency_ms=20) as session:
                drain(bench, session, count=min(bench.size.backlog, contender.drained[1]), measure="drain20")
        if "rest" in wanted:
            rest(bench, contender)


# -- our service by itself


def raw(bench: Bench) -> None:
    """A backlog of plain Celery messages, published by somebody who has none of our code."""
    for contender in (OURS, OURS_SAFE):
        with bench.session(contender) as session:
            drain(bench, session, count=bench.size.backlog, measure="raw", name="raw")


def bulk(bench: Bench) -> None:
    """One `cancel_many`, each order with its own record."""
    for contender in (OURS, OURS_SAFE):
        for latency_ms in (0, 20):
            with bench.session(contender, latency_ms=latency_ms) as session:
                live(bench, session, count=bench.size.backlog, measure=f"bulk{latency_ms}", mode="bulk")


def producers(bench: Bench) -> None:
    """How fast four processes publish while the workers are held, one by one and in bulk."""
    for contender in (OURS, OURS_SAFE):
        with bench.session(contender) as session:
            _publish(bench, session)


def _publish(bench: Bench, session: Session) -> None:
    session.pause()
    try:
        for mode, count in (("single", bench.size.backlog), ("bulk", bench.size.backlog * 10)):
            with session.producer(mode, count) as producing:
                produced = producing.run()
            bench.note(
                f"publish {mode}",
                session.contender.name,
                rate=len(producing.ids) / (produced.ended - produced.began),
                cpu_s_per_1000=produced.cpu_s / len(producing.ids) * 1000,
            )
    finally:
        session.resume()


def watching(bench: Bench) -> None:
    """What the audit log and the metrics cost: the same backlog without and with both, in turn."""
    with bench.session(OURS_UNWATCHED) as without, bench.session(OURS_WATCHED) as both:
        for session in (without, both, both, without) * 2:
            drain(bench, session, count=bench.size.backlog, measure="watching")


def growth(bench: Bench) -> None:
    """The same backlog with more worker processes."""
    for name in ("ours", "celery_best"):
        for processes in bench.size.processes:
            with bench.session(BY_NAME[name], processes=processes) as session:
                count = bench.size.backlog if name == "ours" else bench.size.backlog // 2
                drain(bench, session, count=count, measure=f"growth {processes}")


def length(bench: Bench) -> None:
    """Whether a long queue is drained as fast as a short one, and its end as fast as its beginning."""
    for orders in bench.size.lengths:
        with bench.session(OURS) as session:
            rates = []
            for _ in range(max(10_000 // orders, 1)):
                session.fresh()
                session.pause()
                with session.producer("bulk", orders) as producing:
                    producing.run()
                resumed = session.resume()
                done = session.await_stored(producing.ids)
                rates.append(len(producing.ids) / (done - resumed))
            arrived = sorted(bench.stub.arrivals().values())
            third = len(arrived) // 3
            bench.note(
                f"length {orders}",
                "ours",
                rate=median(rates),
                first_third=third / (arrived[third - 1] - arrived[0]),
                last_third=third / (arrived[-1] - arrived[-third]),
            )


def memory(bench: Bench) -> None:
    """Memory of the worker processes while very many cancels go through them."""
    step = bench.size.memory_orders // 10
    with bench.session(OURS) as session:
        points = []
        for number in range(11):
            points.append((number * step, session.pss_mb()))
            if number < 10:  # noqa: PLR2004 - ten steps have eleven ends
                with session.producer("bulk", step, producers=1) as producing:
                    producing.run()
                    session.await_stored(producing.ids)
                session.redis.delete(*(session.contender.record_key + each for each in producing.ids))
                session.fresh()
        later = points[5:]  # the first half fills pools and caches
        bench.note(
            "memory",
            "ours",
            start_mb=points[0][1],
            end_mb=points[-1][1],
            kb_per_1000=_slope(later) * 1e6,
            points=[[orders, round(mb, 1)] for orders, mb in points],
        )


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def idle(bench: Bench) -> None:
    """One cancel after minutes of silence, the exchange having closed idle connections."""
    with ExitStack() as stack:
        sessions = [stack.enter_context(bench.session(OURS)) for _ in range(IDLE_SERVICES)]
        bench.stub.reset(idle_close_s=min(IDLE_CLOSE_S, bench.size.idle_s / 2))
        warm_ms: list[float] = []
        for session in sessions:
            with session.producer("paced", 40, producers=1, rate=20) as producing:
                warm_ms += _to_the_wire_ms(bench, producing)
        waiting = [
            stack.enter_context(session.producer("paced", 1, producers=1, rate=20)) for session in sessions
        ]
        time.sleep(bench.size.idle_s)
        first_ms = [ms for producing in waiting for ms in _to_the_wire_ms(bench, producing)]
    bench.note("idle", "ours", warm_p50_ms=median(warm_ms), first_p50_ms=median(first_ms), first_ms=first_ms)


def _to_the_wire_ms(bench: Bench, producing: Producing) -> list[float]:
    published = producing.run().published
    wait_until(lambda: published.keys() <= bench.stub.arrivals().keys(), what="arrivals at the exchange")
    arrived = bench.stub.arrivals()
    return [(arrived[order_id] - at) * 1000 for order_id, at in published.items()]


MEASURES: dict[str, Callable[[Bench], None] | None] = {
    "drain0": None,
    "drain20": None,
    "live": None,
    "latency": None,
    "ed25519": None,
    "rest": None,
    "raw": raw,
    "bulk": bulk,
    "producers": producers,
    "watching": watching,
    "growth": growth,
    "length": length,
    "memory": memory,
    "idle": idle,
}
ONCE = {"rest", "memory", "idle", "growth"}  # long, and steady enough: in the first round only


def _run(
    bench: Bench, rounds: int, wanted: set[str], names: Sequence[str], keep: Callable[[int], None]
) -> None:
    for number in range(1, rounds + 1):
        print(f"round {number} of {rounds}", flush=True)
        with_everybody(bench, names, wanted if number == 1 else wanted - ONCE)
        keep(number)
        for measure, function in MEASURES.items():
            if function is not None and measure in wanted and (number == 1 or measure not in ONCE):
                function(bench)
                keep(number)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes the documents."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round, small numbers")
    parser.add_argument("--rounds", type=int, default=0, help=f"default {FULL_ROUNDS}; medians are taken")
    parser.add_argument("--only", nargs="+", choices=MEASURES, metavar="MEASURE", help=", ".join(MEASURES))
    parser.add_argument("--contenders", nargs="+", choices=list(BY_NAME), help="default: all installed")
    parser.add_argument("--idle-s", type=float, help="seconds of silence before the first cancel (300)")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for the documents (bench/results; --quick: build)"
    )
    arguments = parser.parse_args(argv)
    size = QUICK if arguments.quick else Size()
    if arguments.idle_s is not None:
        size = replace(size, idle_s=arguments.idle_s)
    out = arguments.out or ROOT / ("build" if arguments.quick or arguments.only else "bench/results")
    rounds = arguments.rounds or (1 if arguments.quick else FULL_ROUNDS)
    names = arguments.contenders or available()
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), size)
        try:
            one, many = (asyncio.run(ceiling(bench.stub.port, batch=batch)) for batch in (0, 100))
            print(f"the stub's ceiling: {one:,.0f} single calls/s, {many:,.0f} orders/s in batches of 100")

            def keep(done: int) -> None:
                facts = {
                    "rounds": done,
                    "backlog": size.backlog,
                    "stub_singles_per_s": round(one),
                    "stub_batched_per_s": round(many),
                    "seconds": round(time.time() - started),
                    "idle_s": size.idle_s,
                    "resting_s": size.resting_s,
                }
                command = report.command_line("bench.peers", argv if argv is not None else sys.argv[1:])
                report.keep(out, "peers", command=command, facts=facts, found=bench.found)

            _run(bench, rounds, set(arguments.only or MEASURES), names, keep)
        finally:
            bench.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
