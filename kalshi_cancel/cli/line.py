"""Adds the arguments that commands share, and parses them."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

from kalshi_cancel.cli.exits import UsageError

DEFAULT_REQUESTER = "cancelctl"

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 - it has no other name
Command: TypeAlias = Callable[[argparse.Namespace], int]


def add_command(
    commands: Subparsers, name: str, run: Command, *, about: str, examples: str, **options: Any
) -> argparse.ArgumentParser:
    """A command that ``run`` carries out, with its examples below its help."""
    command = commands.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    command.set_defaults(run=run)
    return command


def add_json(command: argparse.ArgumentParser, **options: Any) -> None:
    """The option that every command has."""
    command.add_argument("--json", action="store_true", help="one JSON object per line", **options)


def add_order_ids(command: argparse.ArgumentParser, *, nargs: str = "+") -> None:
    """Order ids as the command's arguments."""
    command.add_argument(
        "order_ids", metavar="ORDER_ID", nargs=nargs, help="the exchange's order id; - reads ids from stdin"
    )


def ids_given(arguments: argparse.Namespace) -> list[str]:
    """The ids given, each once; raises UsageError when there are none."""
    ids: list[str] = []
    for order_id in arguments.order_ids:
        ids += sys.stdin.read().split() if order_id == "-" else [order_id]
    if not ids:
        raise UsageError("no order ids were given")
    return list(dict.fromkeys(ids))


def parse_seconds(text: str) -> float:
    """A waiting time for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, got {text!r}")
    return value
