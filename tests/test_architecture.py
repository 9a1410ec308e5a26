"""The direction of imports: who may know whom, and that nobody else does."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from sandbox.stack import ROOT

# What each module of worker/ may import of ours; a new module is given its place here. Arrows point one
# way: values at the bottom, the exchange and the book side by side, the desk above both, the queue on top.
COMMAND = {"cli.exits", "cli.line", "cli.printing"}  # what each of cancelctl's commands is made with
MAY_IMPORT = {
    "__init__": set(),
    # Values.
    "orders": set(),
    "near_misses": set(),
    "settings": {"near_misses"},
    "signing": set(),
    "scope": {"orders"},
    # Redis: one way to it, and what is kept there.
    "redis_errors": set(),
    "server_clock": {"orders", "scripts"},
    "primary": {"redis_errors"},
    "scripts": {"primary", "redis_errors", "settings"},
    "records": {"orders"},
    "audit": {"logs", "scripts", "settings"},
    "book": {"logs", "orders", "records", "redis_errors", "scripts", "server_clock", "settings"},
    "leases": {"book"},
    "lists": {"orders", "records", "scripts", "server_clock", "settings"},
    "roster": {"orders", "scripts", "settings"},
    "pacing": {"orders", "scripts"},
    "mass_request": {"orders", "scope"},
    "masses": {"audit", "mass_request", "orders", "records", "scripts", "server_clock", "settings"},
    "mass_claim": {"audit", "book", "orders", "records", "scripts", "settings"},
    # The exchange: its language and the rules without any I/O, then the wire.
    "clock": set(),
    "dialects": {"orders"},
    "judging": {"dialects", "orders", "scope"},
    "outcomes": {"clock", "dialects", "orders"},
    "transport": {"dialects"},
    "exchange": {"clock", "dialects", "logs", "orders", "settings", "signing", "transport"},
    "gate": {"dialects", "orders"},
    "rotation": {"exchange", "settings", "signing"},
    # What a worker tells about its work, and who listens and looks.
    "notices": {"book", "dialects", "gate", "orders"},
    "fleet": {"orders", "scripts", "settings"},
    "metrics": {"book", "dialects", "fleet", "gate", "notices", "orders", "scripts", "settings"},
    "health": set(),
    "logs": {"orders", "settings"},
    "tracing": {"settings"},
    "spans": {"book", "notices"},
    "services": {"logs", "notices", "scripts"},
    "readiness": {"book", "dialects", "exchange", "scripts", "services"},
    "monitor": set(),
    # Both together: what is asked for is seen through.
    "archive": {"dialects", "exchange", "notices", "orders", "pacing"},
    "pursuit": {
        *("archive", "book", "leases", "pacing", "scripts"),
        *("clock", "dialects", "exchange", "gate", "orders", "outcomes"),
        "notices",
    },
    "outbox": set(),
    "desk": {
        *("book", "leases", "outbox", "pacing", "pursuit", "scripts"),
        *("exchange", "gate", "logs", "notices", "orders"),
    },
    "hands": {"book", "desk", "logs", "orders", "scripts", "services"},
    # Mass cancels: what is pure, the steps of one, then one from start to report, and all of them.
    "mass_planning": {"mass_request", "orders", "pacing"},
    "mass_report": {"mass_claim", "mass_request", "orders", "scope"},
    "key_rights": {"dialects", "exchange", "notices", "pacing", "scope", "scripts"},
    "aside": set(),
    "mass_means": {"book", "exchange", "masses", "notices", "orders", "pacing"},
    "mass_listing": {
        *("mass_claim", "mass_means", "mass_request"),
        *("dialects", "judging", "notices", "orders"),
    },
    "mass_entering": {"book", "mass_claim", "mass_means", "mass_request", "orders"},
    "mass_sending": {"book", "dialects", "mass_claim", "mass_means", "mass_planning", "notices", "orders"},
    "mass_command": {
        *("mass_claim", "mass_entering", "mass_listing", "mass_means", "mass_planning", "mass_request"),
        *("book", "mass_sending", "scripts"),
        *("clock", "dialects", "orders", "outcomes", "scope"),
    },
    "mass_account": {
        *("mass_claim", "mass_listing", "mass_means", "mass_planning", "mass_report", "mass_request"),
        "orders",
    },
    "mass_run": {
        *("key_rights", "mass_account", "mass_claim", "mass_command", "mass_entering", "mass_listing"),
        *("mass_means", "mass_planning", "mass_report", "mass_request"),
        *("aside", "orders"),
    },
    "mass": {
        *("mass_claim", "mass_means", "mass_report", "mass_request", "mass_run"),
        *("book", "logs", "notices", "orders", "scripts", "services"),
    },
    # The worker's process and the queue's surface.
    "bells": {"orders"},
    "links": set(),
    "broker": {"links"},
    "options": {"near_misses", "orders"},
    "intake": {"bells", "broker", "desk", "orders", "scripts", "settings"},
    "watch": {"health", "metrics", "monitor", "readiness", "services", "settings"},
    "upkeep": {
        *("audit", "bells", "desk", "dialects", "exchange", "hands", "lists", "notices", "orders"),
        *("pacing", "redis_errors", "scripts", "services"),
    },
    "office": {
        *(
            "bells",
            "desk",
            "hands",
            "intake",
            "mass",
            "mass_claim",
            "mass_means",
            "outbox",
            "upkeep",
            "watch",
        ),
        *("audit", "book", "leases", "lists", "masses", "pacing", "roster", "scripts", "services"),
        *("dialects", "exchange", "rotation"),
        *("orders", "settings"),
        *("fleet", "notices", "readiness", "spans", "tracing"),
    },
    "lifecycle": {
        *("office", "options", "watch"),
        *("book", "exchange", "logs", "scripts", "settings", "signing", "tracing"),
    },
    "consumer": {"broker", "health", "office", "redis_errors", "scripts", "watch"},
    "app": {"consumer", "lifecycle"},
    "tasks": {
        *("app", "bells", "book", "broker", "links", "logs", "mass_request", "office", "orders"),
        "scripts",
    },
    # The producers' side: no key, no HTTP to the exchange.
    "client": {
        *("audit", "bells", "book", "mass_request", "masses", "redis_errors", "roster", "scripts"),
        *("orders", "records", "settings", "tracing"),
    },
    # For whoever writes a producer: the forms of messages and values.
    "schemas": {"mass_planning", "mass_request", "orders", "scope"},
    # The operator's side; `doctor` looks at everything a worker needs.
    "cli.printing": {"book", "orders"},
    "cli.exits": {"cli.printing", "client", "orders"},
    "cli.line": {"cli.exits"},
    "cli.nobody": {"client"},
    "cli.cancels": {"book", "cli.dead", "cli.nobody", "client", "orders", *COMMAND},
    "cli.dead": {"book", "client", *COMMAND},
    "cli.reports": {"cli.exits", "cli.printing"},
    "cli.masses": {"client", "cli.nobody", "cli.reports", *COMMAND},
    "cli.exports": {"audit", "cli.exits", "orders"},
    "cli.trail": {"audit", "book", "cli.exports", "orders", "settings", *COMMAND},
    "cli.glance": {"orders", "scripts", "settings"},
    "cli.snapshot": {"audit", "book", "cli.glance", "masses", "pacing", "roster", "settings"},
    "cli.frame": {"cli.glance", "cli.printing", "cli.snapshot", "orders", "pacing", "roster"},
    "cli.top": {"book", "cli.frame", "cli.snapshot", "settings", *COMMAND},
    "cli.doctor": {"doctor", *COMMAND},
    "cli.health": {"health", "settings", *COMMAND},
    "cli.sandbox": COMMAND,
    "cli.__init__": {
        *("cli.cancels", "cli.dead", "cli.masses", "cli.trail", "cli.top", "cli.doctor", "cli.health"),
        "cli.sandbox",
        *("cli.exits", "cli.line", "client", "redis_errors", "settings"),
    },
    "cli.__main__": {"cli.__init__"},
    "doctor": {
        *("book", "dialects", "exchange", "key_rights", "orders", "redis_errors", "scripts"),
        *("settings", "signing"),
    },
}
MODULES = sorted((ROOT / "worker").rglob("*.py"))
PRODUCERS = ("client",)
NEVER_ON_THE_PRODUCERS_SIDE = {
    *("dialects", "exchange", "outcomes", "signing", "transport"),
    *("desk", "lifecycle", "mass", "office", "pursuit"),
}


def name_of(path):
    return ".".join(path.relative_to(ROOT / "worker").with_suffix("").parts)


def imported(path):
    """The dotted names that a module imports, wherever in it, with what it takes from them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide where an arrow goes"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path):
    """The modules of worker/ that a module imports."""
    return {_module(name) for name in imported(path) if name.split(".")[0] == "worker"}


def _module(name):
    """The module that a dotted name is, or is in."""
    parts = name.split(".")[1:3]
    while parts and not (ROOT / "worker" / "/".join(parts)).with_suffix(".py").exists():
        if (ROOT / "worker" / "/".join(parts)).is_dir():
            return ".".join([*parts, "__init__"])
        parts.pop()
    return ".".join(parts) or "__init__"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_what_its_place_allows(path):
    assert name_of(path) in MAY_IMPORT, "a new module: give it its place in the table"
    assert ours(path) - MAY_IMPORT[name_of(path)] == set()


def test_the_table_has_no_circle():
    placed = set()
    while left := {name for name in MAY_IMPORT if name not in placed}:
        free = {name for name in left if MAY_IMPORT[name] <= placed}
        assert free, f"these import each other in a circle: {sorted(left)}"
        placed |= free


@pytest.mark.parametrize("name", PRODUCERS)
def test_the_producers_side_reaches_nothing_that_signs_or_talks_to_the_exchange(name):
    reached, todo = set(), {name}
    while todo:
        reached |= todo
        todo = {each for one in todo for each in MAY_IMPORT[one]} - reached
    assert reached & NEVER_ON_THE_PRODUCERS_SIDE == set()


@pytest.mark.parametrize("path", [*MODULES, ROOT / "celeryconfig.py"], ids=lambda path: path.stem)
def test_the_sandbox_and_the_tests_are_not_known_to_what_runs_in_production(path):
    assert {name for name in imported(path) if name.split(".")[0] in ("sandbox", "tests")} == set()


def test_the_queues_policy_knows_its_door_orders_and_settings_only():
    assert ours(ROOT / "celeryconfig.py") == {"broker", "orders", "scripts", "settings"}


def test_only_the_settings_read_the_environment():
    readers = {
        name_of(path)
        for path in MODULES
        if {"os.environ", "os.getenv"} & imported(path)
        or any(
            isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
        )
    }
    assert readers == {"settings"}


def test_a_producers_process_loads_no_http_client_and_no_cryptography():
    script = "import sys, worker.client; print(*sys.modules)"
    environment = {"PATH": os.environ["PATH"]}
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    loaded = set(ran.stdout.split())
    assert "worker.client" in loaded
    assert loaded & {"requests", "urllib3"} == set()
    # redis-py looks whether the package is there; that loads none of its code.
    assert {name for name in loaded if name.startswith("cryptography.hazmat")} == set()
