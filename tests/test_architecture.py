"""The direction of imports: who may know whom, and that nobody else does."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from functools import cache

import pytest

import kalshi_cancel
from trials.stack import ROOT

# Who may import whom. A room is a folder, or a file beside the folders. Arrows point one way: values at the
# bottom, Redis and the exchange side by side and strangers to each other, the work above both, Celery on top.
VALUES = {"kalshi_cancel.model", "kalshi_cancel.settings"}
TELEMETRY = {"kalshi_cancel.telemetry"}
BESIDE = TELEMETRY | {"kalshi_cancel.wake_ups", "kalshi_cancel.heartbeat"}
BOTH_SIDES = {"kalshi_cancel.store", "kalshi_cancel.exchange"}
WORK = VALUES | BOTH_SIDES | TELEMETRY | {"kalshi_cancel.wake_ups", "worker.dispatch"}
MAY_IMPORT = {
    # What is installed.
    "kalshi_cancel.model": set(),
    "kalshi_cancel.settings": set(),
    "kalshi_cancel.telemetry": VALUES,
    "kalshi_cancel.wake_ups": VALUES | TELEMETRY,
    "kalshi_cancel.heartbeat": VALUES | TELEMETRY,
    "kalshi_cancel.store": VALUES | TELEMETRY,
    "kalshi_cancel.exchange": VALUES | TELEMETRY,
    "kalshi_cancel.client": VALUES | BESIDE | {"kalshi_cancel.store"},
    "kalshi_cancel": VALUES | {"kalshi_cancel.client", "kalshi_cancel.store"},
    "kalshi_cancel.sandbox": set(),
    "kalshi_cancel.doctor": VALUES | BOTH_SIDES,
    "kalshi_cancel.cli": VALUES | BESIDE | BOTH_SIDES | {"kalshi_cancel.client", "kalshi_cancel.doctor"},
    # The service.
    "worker": set(),
    "worker.dispatch": VALUES | BOTH_SIDES | TELEMETRY,
    "worker.mass": WORK,
    "worker.broker": WORK,
    "worker.telemetry": WORK | {"kalshi_cancel.heartbeat"},
    "worker.runtime": WORK | BESIDE | {"worker.mass", "worker.broker", "worker.telemetry"},
    "worker.app": {"worker.runtime"},
    "worker.tasks": WORK | {"worker.broker", "worker.runtime", "worker.app"},
}
PACKAGES = ("kalshi_cancel", "worker")
MODULES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
SANDBOX = "kalshi_cancel.sandbox"
PRODUCERS = ("kalshi_cancel", "kalshi_cancel.client")
NEVER_ON_THE_PRODUCERS_SIDE = {"kalshi_cancel.exchange", SANDBOX}


def name_of(path):
    """The dotted name of a module; a package's own is that of its folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path): path for path in MODULES}


def room_of(name):
    """The room that a module is in."""
    return ".".join(name.split(".")[:2])


@cache
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
    """The modules of ours that a module imports."""
    return {_module(name) for name in imported(path) if name.split(".")[0] in PACKAGES}


def _module(name):
    """The module that a dotted name is, or is in."""
    while name not in NAMES:
        name = name.rpartition(".")[0]
    return name


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_what_its_room_allows(path):
    room = room_of(name_of(path))
    assert room in MAY_IMPORT, "a new room: give it its place in the table"
    assert {room_of(name) for name in ours(path)} - {room} - MAY_IMPORT[room] == set()


def test_every_room_of_the_table_is_there():
    assert set(MAY_IMPORT) == {room_of(name) for name in NAMES}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_what_is_installed_does_not_know_the_service(path):
    if name_of(path).startswith("kalshi_cancel"):
        assert not any(name.startswith("worker") for name in ours(path))


@pytest.mark.parametrize(
    "arrows",
    [lambda: MAY_IMPORT, lambda: {name: ours(path) for name, path in NAMES.items()}],
    ids=["rooms", "modules"],
)
def test_nothing_imports_in_a_circle(arrows):
    arrows = arrows()
    placed = set()
    while left := {name for name in arrows if name not in placed}:
        free = {name for name in left if arrows[name] <= placed}
        assert free, f"these import each other in a circle: {sorted(left)}"
        placed |= free


@pytest.mark.parametrize("path", [each for each in MODULES if each.name == "__init__.py"], ids=name_of)
def test_a_folder_hands_nothing_on_but_the_public_face(path):
    if name_of(path) not in ("kalshi_cancel", "kalshi_cancel.cli"):  # the latter is the command itself
        assert imported(path) == set()


@pytest.mark.parametrize("name", PRODUCERS)
def test_the_producers_side_reaches_nothing_that_signs_or_talks_to_the_exchange(name):
    reached, todo = set(), {name}
    while todo:
        reached |= todo
        todo = {each for one in todo for each in ours(NAMES[one])} - reached
    assert {room_of(each) for each in reached} & NEVER_ON_THE_PRODUCERS_SIDE == set()


@pytest.mark.parametrize("path", [*MODULES, ROOT / "celeryconfig.py"], ids=lambda path: path.stem)
def test_the_sandbox_and_the_tests_are_not_known_to_what_runs_in_production(path):
    known = imported(path)
    assert {name for name in known if name.split(".")[0] in ("tests", "trials")} == set()
    if room_of(name_of(path)) != SANDBOX:
        assert {name for name in known if name.startswith(SANDBOX)} == set()


def test_the_queues_policy_knows_its_door_orders_and_settings_only():
    rooms = {room_of(name) for name in ours(ROOT / "celeryconfig.py")}
    assert rooms == {"worker.broker", "kalshi_cancel.store", *VALUES}


def test_only_the_settings_read_the_environment():
    readers = {
        room_of(name_of(path))
        for path in MODULES
        if {"os.environ", "os.getenv"} & imported(path)
        or any(
            isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
        )
    }
    assert readers == {"kalshi_cancel.settings"}


def test_importing_the_package_loads_nothing_else():
    assert "kalshi_cancel" in loaded_by("import kalshi_cancel")
    assert (
        loaded_by("import kalshi_cancel") & {"celery", "redis", "requests", "kalshi_cancel.client"} == set()
    )


def test_every_public_name_is_there_and_no_other():
    script = "import kalshi_cancel as k; [getattr(k, name) for name in k.__all__]"
    assert "kalshi_cancel.client" in loaded_by(script)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = kalshi_cancel.Nothing


def test_a_producers_process_loads_no_http_client_and_no_cryptography():
    loaded = loaded_by("from kalshi_cancel import CancelClient")
    assert "kalshi_cancel.client" in loaded
    assert loaded & {"requests", "urllib3"} == set()
    # redis-py looks whether the package is there; that loads none of its code.
    assert {name for name in loaded if name.startswith("cryptography.hazmat")} == set()


def loaded_by(script):
    """The modules that a process has loaded after this script."""
    environment = {"PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", f"import sys; {script}; print(*sys.modules)"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return set(ran.stdout.split())
