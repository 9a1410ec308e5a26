"""Lists dead letters and retries them: `cancelctl dead` and `retry`."""

from __future__ import annotations

import argparse
import os
import pwd
from typing import Any

from kalshi_cancel.cli.exits import Exit, UsageError
from kalshi_cancel.cli.line import Subparsers, add_command, add_json, add_order_ids, ids_given
from kalshi_cancel.cli.printing import names_text, print_json, print_table, problem_text, progress_json
from kalshi_cancel.client import CancelClient
from kalshi_cancel.store.pending import DeadLetter


def add_dead(commands: Subparsers) -> None:
    """Adds `dead`."""
    command = add_command(
        commands,
        "dead",
        _dead,
        about="list the cancels that were given up unresolved, oldest first, and those that cannot be read",
        examples="  cancelctl dead\n  cancelctl dead --json | jq -r .order_id | cancelctl retry -",
    )
    add_json(command)


def _dead(arguments: argparse.Namespace) -> int:
    letters = CancelClient.from_env(preload=False).dead_letters()
    if arguments.json:
        for letter in letters:
            print_json(dead_json(letter))
    else:
        titles = ("ORDER", "REQUESTED", "GIVEN UP", "ATTEMPTS", "WHO", "LAST ANSWER")
        print_table(titles, map(_dead_cells, letters), nothing="nothing was given up")
    return Exit.SETTLED


def _dead_cells(letter: DeadLetter) -> list[str]:
    return [
        letter.order_id,
        letter.requested_at,
        letter.died_at,
        str(letter.progress.attempts),
        names_text(letter.requested_by),
        problem_text(letter.progress.last_problem),
    ]


def dead_json(letter: DeadLetter) -> dict[str, Any]:
    """A dead letter as commands show it."""
    return {
        "order_id": letter.order_id,
        "requested_by": letter.requested_by,
        "requested_at": letter.requested_at,
        "died_at": letter.died_at,
        **progress_json(letter),
        "request": letter.request.fields(),
        "stored": letter.stored and dict(letter.stored),
    }


def add_retry(commands: Subparsers) -> None:
    """Adds `retry`."""
    command = add_command(
        commands,
        "retry",
        _retry,
        about="start work again on cancels that were given up or set aside",
        examples="  cancelctl retry 3f2c1e0a-...\n  cancelctl retry --all --why 'the exchange is back'",
    )
    add_order_ids(command, nargs="*")
    command.add_argument("--all", action="store_true", help="all that `cancelctl dead` lists")
    command.add_argument("--by", metavar="WHO", help="your name, for the audit log (the user logged in)")
    command.add_argument("--why", metavar="WHY", help="why, for the audit log")
    add_json(command)


def _retry(arguments: argparse.Namespace) -> int:
    if arguments.all and arguments.order_ids:
        raise UsageError("give order ids or --all, not both")
    client = CancelClient.from_env(preload=False)
    if arguments.all:
        order_ids = [letter.order_id for letter in client.dead_letters()]
    else:
        order_ids = ids_given(arguments)
    who = arguments.by or _login_name()
    revived = set(client.retry(order_ids, by=who, why=arguments.why)) if order_ids else set()
    if arguments.json:
        for order_id in order_ids:
            print_json({"order_id": order_id, "retried": order_id in revived})
    else:
        rows = [[each, "worked on again" if each in revived else "no dead letter"] for each in order_ids]
        print_table(("ORDER", "NOW"), rows, nothing="nothing was given up")
    # With --all, what is gone from the list meanwhile was retried by somebody else.
    return Exit.SETTLED if arguments.all or len(revived) == len(order_ids) else Exit.NOT_KNOWN_HERE


def _login_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container, perhaps
        return f"user {os.getuid()}"
