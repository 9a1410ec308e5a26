"""Keeps what the benchmarks found as JSON, and writes bench/results/performance.md from it.

Nothing in the document is written by hand but bench/results/profiles.md, which stands at its end.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from trials.stack import valkey_server

Found = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]

TITLES = {
    "ours": "**this service**",
    "ours_safe": "**this service**, `appendfsync always`",
    "celery_shipped": "celery as shipped (prefork, 2)",
    "celery_best": "celery, best set-up (2 x threads)",
    "taskiq": "taskiq (list)",
    "huey": "huey (processes)",
    "bullmq": "bullmq (Python port)",
    "ardiq": "ardiq",
}
PACKAGES = (
    "celery",
    "kombu",
    "redis",
    "hiredis",
    "requests",
    "cryptography",
    "taskiq",
    "taskiq-redis",
    "huey",
    "bullmq",
    "ardiq",
)
WHAT_THIS_IS = """\
Written by `make bench` and `make bench-flat`; the figures themselves are in `performance.json`. Absolute
numbers move with the machine: compare within one table."""
THE_WORK = """\
Each request is signed with RSA-2048-PSS, sent as a DELETE over keep-alive to a stub exchange on the same
machine, and its outcome stored per order in Redis: with the append-only file on for everybody, and
`appendfsync everysec`, as Redis has it by itself. Our documentation asks for `always`, which has a row of
its own: an accepted cancel is on disk before the producer is told so. Peers send one DELETE for each order
with the leanest client that suits them (`bench/work.py`); ours runs as the `Procfile` has it. Two worker
processes each, and for each latency the best number of threads, coroutines or processes. The stub verifies
every 50th signature; unsigned load brings it to {stub_singles_per_s:,} single calls/s, or
{stub_batched_per_s:,} orders/s in batches of 100. {rounds} rounds, interleaved, medians; in brackets, times
celery as shipped."""
THE_COLUMNS = """\
`drain`: {backlog:,} single requests accepted while the workers were held (celery as shipped at 20 ms: 2,000),
from letting go to the last stored result. `live`: four producers flat out and the workers together.
`producers`: how fast four processes publish while the workers are held. CPU is the workers', while
draining at 0 ms. `Ed25519`: the drain at 0 ms, with such a key in place of RSA."""
WHAT_PEERS_LACK = """\
What the peers do not do, as they are set up here: none knows the token budget, sends many orders in one call,
or asks again until the outcome of a call is known. Only bullmq and ardiq keep the orders that a worker held
when it was killed, and hand them to another one later. celery, taskiq's list broker and huey take an order
off the queue before they work on it: what a killed worker was at is lost. Only bullmq and ardiq publish many
orders in one round trip. Only celery as shipped and ardiq store the outcome by themselves; for the others the
task does. ardiq needs Python 3.12. chasquimq 1.3 (Rust, on Redis streams) is missing: it needs Redis 8.6
(`XADD` with `IDMP`), and the Valkey server that all share refuses its messages. It also needs redis-py below
7; this service needs 8."""
THE_REST = """\
A worker with nothing to do, after it has worked: one process, or what its command starts for one,
{resting_s:.0f} s long. Redis wakes up by itself, which is in its figure."""
THE_TIMES = """\
`bound`: the least time in which the token buckets, full at first, let so many cancels through by the best
mix of paths. `predicted`: what the plan said. `actual`: from acceptance to the last cancel that took
effect at the sandbox, listing and planning included; `proof`: until the listing that shows nothing is
left, two seconds of read lag included. `CPU s`: the workers'; `busy`: how much of the processors' time was
taken, by all parts together, until the last cancel. `kept`: actual is at most 1.05 x bound, or, where that
is below 10 s, bound + 0.5 s. {kept} of {rows} rows are kept; own 429s: {refused}; rows in which the budget
was overspent: {overspent}; prediction within 10 % of actual, or 0.5 s: {predicted}."""
THE_OVERTAKING = """\
A risk cancel every 50 ms while two workers are busy with 10,000 waiting strategy cancels; milliseconds
from the client's return to the arrival at the sandbox (at most 50 at p99 are wanted, tokens permitting)."""
THE_BARE = """\
Single cancels by processes that only sign, send and read the answer (`bench/bare.py`), beside the same
sandbox: what these processors allow at most where a row's bound counts on single calls."""
THE_ED25519_KEY = """\
All of these sign with an RSA key of 2,048 bits. With an Ed25519 key, whose signature costs a tenth:"""
THE_FOREIGN_CLIENT = """\
With a foreign client that spends half of every refill, unseen (the bound counts on the other half):"""
_MARGIN, _MARGIN_S, _LONG_S = 1.05, 0.5, 10.0  # see THE_TIMES


def keep(folder: Path, part: str, *, command: str, facts: Mapping[str, Any], found: Any) -> None:
    """Puts one benchmark's findings beside the other's, and writes the document anew."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "performance.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    kept[part] = {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": _machine(),
        "versions": _versions(),
        "facts": facts,
        "found": found,
    }
    path.write_text(json.dumps(kept, indent=1) + "\n")
    (folder / "performance.md").write_text(_document(kept, folder / "profiles.md"))


def command_line(module: str, arguments: Sequence[str]) -> str:
    """The command as it stands in the document: without the folder that it is written to."""
    words = list(arguments)
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    return " ".join(["python", "-m", module, *words])


def _machine() -> str:
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    model = "unknown processor"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model
        )
    system = f"{platform.system()} {platform.release()}"
    return f"{os.cpu_count()} cores ({model}), {memory_gb:.0f} GB, {system}, load {os.getloadavg()[0]:.1f}"


def _versions() -> str:
    words = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            words.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    shown = subprocess.run([valkey_server(), "--version"], capture_output=True, text=True, check=False).stdout
    words += [f"Valkey {word[2:]}" for word in shown.split() if word.startswith("v=")]
    return ", ".join(words)


def _document(kept: Mapping[str, Any], profiles: Path) -> str:
    parts = [
        "# Performance",
        WHAT_THIS_IS,
    ]
    if "peers" in kept:
        parts += _peers(kept["peers"])
    if "flat" in kept:
        parts += _flat(kept["flat"])
    if profiles.exists():
        parts.append(profiles.read_text().strip())
    return "\n\n".join(parts) + "\n"


def _source(part: Mapping[str, Any]) -> str:
    return f"`{part['command']}`, {part['date']}. {part['machine']}. {part['versions']}."


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


# -- the queues


def _mid(found: Found, measure: str, name: str, figure: str) -> float | None:
    """The median over the rounds; None when it was not measured."""
    rounds = found.get(measure, {}).get(name, [])
    return median(each[figure] for each in rounds) if rounds else None


def _text(value: float | None, form: str = "{:,.0f}") -> str:
    return "" if value is None else form.format(value)


def _times(value: float | None, base: float | None) -> str:
    return "" if value is None or not base else f" ({value / base:.1f} x)"


def _peers(part: Mapping[str, Any]) -> list[str]:
    found: Found = part["found"]
    facts = part["facts"]
    names = [name for name in TITLES if any(name in by_name for by_name in found.values())]
    return [
        "## The same work through other queues",
        _source(part),
        THE_WORK.format(**facts),
        _table(
            [
                "",
                "drain, 0 ms",
                "Ed25519",
                "drain, 20 ms",
                "live",
                "producers (4)",
                "CPU s per 1,000",
                "memory (PSS)",
            ],
            [
                [
                    TITLES[name],
                    *(
                        _text(_mid(found, measure, name, "rate"), "{:,.0f}/s")
                        + _times(
                            _mid(found, measure, name, "rate"), _mid(found, measure, "celery_shipped", "rate")
                        )
                        for measure in ("drain0", "ed25519", "drain20", "live")
                    ),
                    _text(_mid(found, "drain0", name, "accepted_per_s"), "{:,.0f}/s"),
                    _text(_mid(found, "drain0", name, "cpu_s_per_1000"), "{:.2f}"),
                    _text(_mid(found, "drain0", name, "pss_mb"), "{:.0f} MB"),
                ]
                for name in names
            ],
        ),
        THE_COLUMNS.format(**facts),
        WHAT_PEERS_LACK,
        _table(
            [
                "ms",
                "wire p50, 20/s",
                "p99",
                "wire p50, 200/s",
                "p99",
                "result p50, 20/s",
                "result p50, 200/s",
            ],
            [
                [
                    TITLES[name],
                    *(
                        _text(_mid(found, f"at {rate}/s", name, f"wire_{share}_ms"), "{:.1f}")
                        for rate in (20, 200)
                        for share in ("p50", "p99")
                    ),
                    *(
                        _text(_mid(found, f"at {rate}/s", name, "result_p50_ms"), "{:.1f}")
                        for rate in (20, 200)
                    ),
                ]
                for name in names
            ],
        ),
        *_rest(found, facts),
        "### What was to be shown",
        _table(["", "must", "found", "", "with `always`"], _promises(found)),
        "### Growth",
        _table(
            ["worker processes", "this service", "celery, best set-up"],
            [
                [
                    measure.removeprefix("growth "),
                    *(
                        _text(_mid(found, measure, name, "rate"), "{:,.0f}/s")
                        for name in ("ours", "celery_best")
                    ),
                ]
                for measure in found
                if measure.startswith("growth ")
            ],
        ),
        _table(
            ["orders queued", "drain", "its first third", "its last third"],
            [
                [
                    f"{int(measure.removeprefix('length ')):,}",
                    *(
                        _text(_mid(found, measure, "ours", figure), "{:,.0f}/s")
                        for figure in ("rate", "first_third", "last_third")
                    ),
                ]
                for measure in found
                if measure.startswith("length ")
            ],
        ),
        *_memory(found),
    ]


def _rest(found: Found, facts: Mapping[str, Any]) -> list[str]:
    if "rest" not in found:
        return []
    figures = [
        ("worker's CPU s a minute", "cpu_s_per_min", "{:.2f}"),
        ("Redis' CPU s a minute", "redis_s_per_min", "{:.2f}"),
        ("threads", "threads", "{:.0f}"),
        ("memory (PSS)", "pss_mb", "{:.0f} MB"),
    ]
    return [
        THE_REST.format(**facts),
        _table(
            ["", *(title for title, _, _ in figures)],
            [
                [TITLES[name], *(_text(_mid(found, "rest", name, each), form) for _, each, form in figures)]
                for name in TITLES
                if name in found["rest"]
            ],
        ),
    ]


def _memory(found: Found) -> list[str]:
    rounds = found.get("memory", {}).get("ours", [])
    if not rounds:
        return []
    points = rounds[0]["points"]
    shown = ", ".join(f"{orders:,}: {mb:.0f}" for orders, mb in points)
    slope = f"{rounds[0]['kb_per_1000']:.1f} kB per 1,000 cancels"
    return [
        f"Memory of both workers (PSS, MB) after so many cancels: {shown}. Slope of the second half: {slope}."
    ]


def _promises(found: Found) -> list[list[str]]:
    """The table of what must be shown, with what was found; what was not measured is left out."""
    safe = {what: value for what, value, _, _ in _wanted(found, "ours_safe")}
    rows = []
    for what, value, wanted, form in _wanted(found, "ours"):
        if value is None or wanted is None:
            continue
        kept = value >= wanted if form == _RATE else value <= wanted
        word = "at least" if form == _RATE else "at most"
        rows.append([what, f"{word} {form.format(wanted)}", form.format(value), _yes(kept=kept)])
        rows[-1].append(_text(safe[what], form))
    return rows


_RATE = "{:,.0f}/s"  # of a rate, at least so much is wanted; of anything else, at most


def _wanted(found: Found, name: str) -> list[tuple[str, float | None, float | None, str]]:
    """What must be shown: in words, what was found, what is wanted, and how figures of it are written."""

    def ours(measure: str, figure: str = "rate") -> float | None:
        return _mid(found, measure, name, figure)

    def best_celery(measure: str, figure: str = "rate") -> float | None:
        return _mid(found, measure, "celery_best", figure)

    def best_peer(measure: str) -> float | None:
        rates = [_mid(found, measure, peer, "rate") for peer in TITLES if not peer.startswith("ours")]
        return max((rate for rate in rates if rate is not None), default=None)

    lengths = [ours(measure) for measure in found if measure.startswith("length ")] or [None]
    wanted: list[tuple[str, float | None, float | None, str]] = [
        ("singles, 10,000 accepted before, 0 ms", ours("drain0"), 10_000, _RATE),
        ("the same: 4 x the best peer", ours("drain0"), _scaled(best_peer("drain0"), 4), _RATE),
        ("singles, 10,000 accepted before, 20 ms", ours("drain20"), 5_000, _RATE),
        ("the same, 20 ms: 4 x the best peer", ours("drain20"), _scaled(best_peer("drain20"), 4), _RATE),
        ("singles, live: the best peer's rate", ours("live"), best_peer("live"), _RATE),
        ("raw Celery messages: 1.5 x celery's best", ours("raw"), _scaled(best_celery("drain0"), 1.5), _RATE),
        ("bulk, `cancel_many` of 10,000", ours("bulk0"), 10_000, _RATE),
        ("bulk: 4 x the best peer's drain", ours("bulk0"), _scaled(best_peer("drain0"), 4), _RATE),
        ("the longest queue's drain: 0.9 x the shortest's", lengths[-1], _scaled(lengths[0], 0.9), _RATE),
        ("drain with metrics and audit log: 0.95 x without", *_watched(found, name), _RATE),
        ("producers, single `cancel()`, 4 processes", ours("publish single"), 5_000, _RATE),
        ("producers, bulk, 4 processes", ours("publish bulk"), 50_000, _RATE),
        ("CPU per 1,000 singles, drained", ours("drain0", "cpu_s_per_1000"), 1.2, "{:.2f} s"),
        ("CPU per 1,000 singles, live", ours("live", "cpu_s_per_1000"), 1.2, "{:.2f} s"),
        ("CPU per 1,000 bulk orders", ours("bulk0", "cpu_s_per_1000"), 0.15, "{:.2f} s"),
        ("memory of two worker processes", ours("drain0", "pss_mb"), 200, "{:.0f} MB"),
    ]
    for measure in ("at 20/s", "at 200/s"):
        p50, p99 = ours(measure, "wire_p50_ms"), ours(measure, "wire_p99_ms")
        celery = best_celery(measure, "wire_p50_ms")
        wanted.append((f"publish to wire, {measure}, p50: celery's best", p50, celery, "{:.1f} ms"))
        wanted.append((f"publish to wire, {measure}, p99: 3 x p50", p99, _scaled(p50, 3), "{:.1f} ms"))
    warm = _scaled(ours("idle", "warm_p50_ms"), 2)
    first = ours("idle", "first_p50_ms")
    return [*wanted, ("first cancel after silence: 2 x warm p50", first, warm, "{:.1f} ms")]


def _watched(found: Found, name: str) -> tuple[float | None, float | None]:
    if name != "ours":
        return None, None
    watched, unwatched = (_mid(found, "watching", each, "rate") for each in ("watched", "unwatched"))
    return watched, _scaled(unwatched, 0.95)


def _yes(*, kept: bool) -> str:
    return "yes" if kept else "**no**"


def _scaled(value: float | None, by: float) -> float | None:
    return None if value is None else value * by


# -- time to flat


def _flat(part: Mapping[str, Any]) -> list[str]:
    rows = part["found"]["flat"]
    alone = [row for row in rows if not row["foreign_share"] and _key(row) == "rsa"]
    ed25519 = [row for row in rows if _key(row) == "ed25519"]
    foreign = [row for row in rows if row["foreign_share"]]
    figures = {
        "kept": sum(map(_is_kept, alone)),
        "rows": len(alone),
        "refused": sum(row["refused_calls"] for row in alone),
        "overspent": sum(row["overspent"] for row in rows),
        "predicted": sum(map(_is_foreseen, alone)),
    }
    shown = ["## Time to flat", _source(part), THE_TIMES.format(**figures), _flat_table(alone)]
    if ed25519:
        shown += [THE_ED25519_KEY, _flat_table(ed25519)]
    if part["found"].get("bare"):
        shown += [THE_BARE, _bare(part["found"]["bare"])]
    if foreign:
        shown += [THE_FOREIGN_CLIENT, _flat_table(foreign)]
    if part["found"]["overtake"]:
        shown += ["### Overtaking", THE_OVERTAKING, _overtaking(part["found"]["overtake"])]
    return shown


def _key(row: Mapping[str, Any]) -> str:
    """What a row's calls were signed with; before it was noted, RSA."""
    return str(row.get("key", "rsa"))


def _is_foreseen(row: Mapping[str, Any]) -> bool:
    return bool(abs(row["predicted_s"] - row["actual_s"]) <= max(0.1 * row["actual_s"], _MARGIN_S))


def _is_kept(row: Mapping[str, Any]) -> bool:
    bound: float = row["bound_s"]
    return bool(
        row["actual_s"] <= (bound * _MARGIN if bound >= _LONG_S else bound + _MARGIN_S) and row["flat"]
    )


def _flat_table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("tier", lambda row: str(row["tier"])),
        ("orders", lambda row: f"{row['orders']:,}"),
        ("workers", lambda row: str(row["workers"])),
        ("shards", lambda row: str(row["shards"])),
        ("latency", lambda row: f"{row['latency_ms']} ms"),
        ("bound s", lambda row: f"{row['bound_s']:.2f}"),
        ("predicted s", lambda row: f"{row['predicted_s']:.2f}"),
        ("actual s", lambda row: f"{row['actual_s']:.2f}"),
        (
            "ratio",
            lambda row: f"{row['actual_s'] / row['bound_s']:.2f}" if row["bound_s"] > _MARGIN_S else "",
        ),
        ("proof s", lambda row: f"{row['proof_s']:.2f}"),
        ("429s", lambda row: str(row["refused_calls"])),
        (
            "singles / batches",
            lambda row: f"{row['calls'].get('cancel', 0):,} / {row['calls'].get('batch', 0):,}",
        ),
        ("CPU s", lambda row: f"{row['cpu_s']:.2f}"),
        ("busy", lambda row: f"{row['busy']:.0%}"),
        ("kept", lambda row: "yes" if _is_kept(row) else "**no**"),
    ]
    return _table([name for name, _ in columns], [[show(row) for _, show in columns] for row in rows])


def _bare(rows: Sequence[Mapping[str, Any]]) -> str:
    return _table(
        ["key", "processes", "single cancels a second", "busy"],
        [[_key(row), str(row["processes"]), f"{row['rate']:,.0f}", f"{row['busy']:.0%}"] for row in rows],
    )


def _overtaking(rows: Sequence[Mapping[str, Any]]) -> str:
    return _table(
        [
            "tier",
            "latency",
            "a worker for risk only",
            "risk cancels",
            "p50",
            "p99",
            "worst",
            "strategy left at the end",
        ],
        [
            [
                row["tier"],
                f"{row['latency_ms']} ms",
                "yes" if row["risk_worker"] else "no",
                str(row["risk_cancels"]),
                *(f"{row[name]:.0f}" for name in ("p50_ms", "p99_ms", "worst_ms")),
                f"{row['backlog_left']:,}",
            ]
            for row in rows
        ],
    )
