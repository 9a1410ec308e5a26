"""Tells an orchestrator whether the worker beside it lives: `cancelctl health`."""

from __future__ import annotations

import argparse

from kalshi_cancel.cli.exits import Exit, UsageError, complain
from kalshi_cancel.cli.line import Subparsers, add_command, add_json
from kalshi_cancel.cli.printing import print_json
from kalshi_cancel.heartbeat import age_of, is_young
from kalshi_cancel.settings.worker import read_heartbeat_file


def add_health(commands: Subparsers) -> None:
    """Adds `health`."""
    command = add_command(
        commands,
        "health",
        _run,
        about="check whether the worker that touches KALSHI_HEARTBEAT_FILE is alive: exit code 0 or 1",
        examples="  cancelctl health || echo restart it",
    )
    add_json(command)


def _run(arguments: argparse.Namespace) -> int:
    file = read_heartbeat_file()
    if file is None:
        raise UsageError("KALSHI_HEARTBEAT_FILE is not set: there is no heartbeat to check")
    age_s = age_of(file)
    alive = is_young(age_s)
    if arguments.json:
        print_json({"alive": alive, "heartbeat_age_s": age_s})
    elif not alive:
        found = "there is none" if age_s is None else f"the last one was {age_s:.0f} s ago"
        return complain(f"no heartbeat: {found} ({file})", Exit.REFUSED)
    return Exit.SETTLED if alive else Exit.REFUSED
