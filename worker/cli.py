"""Hides the service behind one command, `cancelctl`: ask for cancels, see what is known, find what is wrong.

Exit codes, the worst first; of several that apply, the first of this list is given:

    130  interrupted, or not confirmed; what was accepted is still being worked on
    141  whoever read the output went away
      2  wrong usage: the command line, a field of a request, or the settings
      5  Redis could not be reached, or did not accept the cancels
      7  not flat: a mass cancel has ended without the proof that nothing in its scope rests any more
      1  refused: the exchange will not cancel it and nobody tries again (doctor: something failed)
      6  nothing is known of it here: nobody asked for its cancel, or it is no dead letter
      4  unresolved, or not settled in time: it may still rest, and is being worked on
      3  unknown order: the exchange has no such order
      0  settled: canceled, or too late (with --no-wait: accepted)
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import logging
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeAlias

import redis

from worker.book import DeadLetter, OpenCancel
from worker.client import (
    DEFAULT_DEADLINE_S,
    BadRequest,
    BookError,
    CancelClient,
    NotSettled,
    PendingMass,
    Status,
)
from worker.orders import CancelResult, Lane, Outcome, Problem, count_text
from worker.settings import SettingsError

WAIT_BEYOND_DEADLINE_S = 5.0  # a worker says "unresolved" at the deadline; its answer needs a moment
DEFAULT_REQUESTER = "cancelctl"
PROBLEMS_SHOWN = 3  # in one line on stderr
NAMES_SHOWN = 3  # of those who asked for one cancel, in a table
MASS_DEADLINE_S = 60.0  # beyond the predicted time to flat
MASS_SILENCE_S = 30.0  # a runner tells its progress ten times a second; only long listings take longer
MASS_LOOK_EVERY_S = 0.1
MASS_LINE_EVERY_S = 1.0  # where there is no terminal
MASS_BAR_CHARS = 30
ORDERS_SHOWN = 20  # of those that a mass cancel did not cancel


class Exit(IntEnum):
    """Exit codes; their meanings stand in the module's docstring, which is part of the help."""

    SETTLED = 0
    REFUSED = 1
    USAGE = 2
    UNKNOWN_ORDER = 3
    NOT_SETTLED = 4
    REDIS = 5
    NOT_KNOWN_HERE = 6
    NOT_FLAT = 7
    INTERRUPTED = 130  # as shells have it: 128 + SIGINT
    READER_GONE = 141  # 128 + SIGPIPE


# By exposure: an order that may rest while nobody works on it is worse than one that is worked on.
_WORST_FIRST = (
    Exit.REDIS,
    Exit.NOT_FLAT,
    Exit.REFUSED,
    Exit.NOT_KNOWN_HERE,
    Exit.NOT_SETTLED,
    Exit.UNKNOWN_ORDER,
    Exit.SETTLED,
)
_EXIT_OF = {
    Outcome.CANCELED: Exit.SETTLED,
    Outcome.TOO_LATE: Exit.SETTLED,
    Outcome.REFUSED: Exit.REFUSED,
    Outcome.UNKNOWN_ORDER: Exit.UNKNOWN_ORDER,
    Outcome.UNRESOLVED: Exit.NOT_SETTLED,
}
_CODES_IN_HELP = "Exit codes" + (__doc__ or "").partition("Exit codes")[2]  # -OO drops docstrings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code. Errors that can be expected are one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name in another alphabet must not end a table
    logging.basicConfig(format="cancelctl: %(message)s", level=logging.WARNING)
    parser = _parser()
    arguments, beyond = parser.parse_known_args(argv)
    if beyond and arguments.run is not _sandbox:
        parser.error(f"unrecognized arguments: {' '.join(beyond)}")
    arguments.beyond = beyond
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except (SettingsError, _UsageError) as error:
        return _complain(str(error), Exit.USAGE)
    except BadRequest as bad:
        return _complain(_words_of(bad), Exit.USAGE)
    except BookError as error:
        return _complain(str(error), Exit.REDIS)
    except redis.RedisError as error:
        return _complain(f"Redis: {error}", Exit.REDIS)
    except KeyboardInterrupt:
        return _complain("interrupted; what was accepted is still being worked on", Exit.INTERRUPTED)
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.READER_GONE
    return code


class _UsageError(ValueError):
    """Arguments that do not go together."""


def _complain(message: str, code: Exit) -> Exit:
    print(f"cancelctl: {_clean(message)}", file=sys.stderr)
    return code


def _words_of(bad: BadRequest) -> str:
    problems = [f"{field}: {problem}" for field, problem in bad.problems.items()]
    more = len(problems) - PROBLEMS_SHOWN
    return "; ".join(problems[:PROBLEMS_SHOWN]) + (f"; and {more} more" if more > 0 else "")


# --- The command line -------------------------------------------------------------------------------------

_Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 - it has no other name
_Command: TypeAlias = Callable[[argparse.Namespace], int]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cancelctl",
        description="Cancels orders through the workers, and shows what became of them. Needs REDIS_URL only;"
        " the doctor needs the workers' environment.",
        epilog=_CODES_IN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in _COMMANDS:
        add(commands)
    return parser


def _add(
    commands: _Subparsers, name: str, run: _Command, *, about: str, examples: str, **options: Any
) -> argparse.ArgumentParser:
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


def _add_json(command: argparse.ArgumentParser, **options: Any) -> None:
    command.add_argument("--json", action="store_true", help="one JSON object per line", **options)


def _add_order_ids(command: argparse.ArgumentParser, *, nargs: str = "+") -> None:
    command.add_argument(
        "order_ids", metavar="ORDER_ID", nargs=nargs, help="the exchange's order id; - reads ids from stdin"
    )


def _order_ids(arguments: argparse.Namespace) -> list[str]:
    """The ids given, each once; raises _UsageError when there are none."""
    ids: list[str] = []
    for order_id in arguments.order_ids:
        ids += sys.stdin.read().split() if order_id == "-" else [order_id]
    if not ids:
        raise _UsageError("no order ids were given")
    return list(dict.fromkeys(ids))


def _seconds(text: str) -> float:
    """A waiting time for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, got {text!r}")
    return value


# --- cancel -----------------------------------------------------------------------------------------------


def _add_cancel(commands: _Subparsers) -> None:
    command = _add(
        commands,
        "cancel",
        _cancel,
        about="ask for cancels and wait for their outcomes",
        examples="  cancelctl cancel 3f2c1e0a-...\n"
        "  cancelctl cancel --risk --reason 'limit breached' 3f2c1e0a-... 77b0c5d2-...\n"
        "  cancelctl cancel --shard 2 --ticker KXBTC-26NOV22-T100000 3f2c1e0a-...\n"
        "  cancelctl cancel --json - < order-ids.txt | jq -r .outcome",
    )
    _add_order_ids(command)
    command.add_argument("--ticker", metavar="T", help="the market of these orders, for routing")
    command.add_argument(
        "--shard", metavar="N", type=int, help="the shard (exchange_index) of these orders; -1: by ticker"
    )
    command.add_argument("--subaccount", metavar="N", type=int, help="the subaccount of these orders")
    command.add_argument("--requested-by", metavar="WHO", default=DEFAULT_REQUESTER, help="who asks")
    command.add_argument("--reason", metavar="WHY", help="why, for the record")
    command.add_argument(
        "--deadline",
        metavar="S",
        type=_seconds,
        help=f"seconds until an outcome without proof is reported as unresolved ({DEFAULT_DEADLINE_S:g})",
    )
    command.add_argument("--risk", action="store_true", help="in the risk lane, which is served first")
    waiting = command.add_mutually_exclusive_group()
    waiting.add_argument(
        "--timeout",
        metavar="S",
        type=_seconds,
        help=f"seconds to wait here (the deadline and {WAIT_BEYOND_DEADLINE_S:g} more)",
    )
    waiting.add_argument("--no-wait", action="store_true", help="return once the cancels are accepted")
    _add_json(command)


def _cancel(arguments: argparse.Namespace) -> int:
    order_ids = _order_ids(arguments)
    fields = {
        "market_ticker": arguments.ticker,
        "exchange_index": arguments.shard,
        "subaccount": arguments.subaccount,
        "requested_by": arguments.requested_by,
        "reason": arguments.reason,
        "deadline_s": arguments.deadline,
    }
    orders = [{"order_id": order_id, **fields} for order_id in order_ids]
    lane = Lane.RISK if arguments.risk else Lane.STRATEGY
    client = CancelClient.from_env()
    try:
        pending = client.cancel_many(orders, lane=lane)
    except BookError as error:
        # Many are accepted in portions: that the last one failed says nothing about the first.
        known = "not accepted" if len(orders) == 1 else "not all accepted"
        happened = "whether it was accepted is not known" if error.may_be_accepted else known
        return _complain(f"{happened} (asking again is always safe): {error}", Exit.REDIS)
    try:
        return _show_outcomes(pending.as_settled(_wait_s(arguments)), order_ids, arguments)
    except BookError as error:
        return _complain(f"accepted, but the outcomes cannot be read: {error}", Exit.REDIS)


def _wait_s(arguments: argparse.Namespace) -> float:
    if arguments.no_wait:
        return 0.0  # what is settled already is shown
    if arguments.timeout is not None:
        return float(arguments.timeout)
    deadline_s = DEFAULT_DEADLINE_S if arguments.deadline is None else float(arguments.deadline)
    return deadline_s + WAIT_BEYOND_DEADLINE_S


def _show_outcomes(
    results: Iterator[CancelResult], order_ids: Sequence[str], arguments: argparse.Namespace
) -> int:
    """Shows each outcome as it comes, then those that have none; the exit code."""
    widths = [max(map(len, order_ids)), *map(len, _OUTCOME_WIDEST)]
    widths = [max(width, len(title)) for width, title in zip(widths, _OUTCOME_TITLES, strict=True)]
    if not arguments.json:
        _print_line(_OUTCOME_TITLES, widths)
    missing = dict.fromkeys(order_ids)
    codes = set()
    for result in results:
        missing.pop(str(result.order_id), None)
        codes.add(_EXIT_OF[result.outcome])
        if arguments.json:
            _print_json(result.to_json())
        else:
            _print_line(_outcome_cells(result), widths)
    for order_id in missing:
        if arguments.json:
            _print_json({"order_id": order_id, "outcome": None})
        else:
            _print_line([order_id, "accepted" if arguments.no_wait else "not settled"], widths)
    if missing and not arguments.no_wait:
        codes.add(Exit.NOT_SETTLED)
        _complain(f"{len(missing)} not settled in time; still being worked on", Exit.NOT_SETTLED)
    return _worst(codes)


_OUTCOME_TITLES = ("ORDER", "OUTCOME", "STATUS", "REDUCED BY", "KNOWN BY", "ATTEMPTS", "ERROR")
_OUTCOME_WIDEST = ("unknown_order", "canceled", "", "read_back", "", "")  # after the order ids


def _outcome_cells(result: CancelResult) -> list[str]:
    return [
        str(result.order_id),
        result.outcome,
        result.status or "-",
        count_text(result.reduced_by) or "-",
        result.confirmed_by or "-",
        str(result.attempts),
        _problem_text(result.error),
    ]


def _worst(codes: Collection[Exit]) -> Exit:
    return next((code for code in _WORST_FIRST if code in codes), Exit.SETTLED)


# --- status, open -----------------------------------------------------------------------------------------


def _add_status(commands: _Subparsers) -> None:
    command = _add(
        commands,
        "status",
        _status,
        about="show what became of orders' cancels, and what is still being done about them",
        examples="  cancelctl status 3f2c1e0a-...\n"
        "  cancelctl status --json 3f2c1e0a-... | jq .result.outcome",
    )
    _add_order_ids(command)
    _add_json(command)


def _status(arguments: argparse.Namespace) -> int:
    client = CancelClient.from_env()
    statuses = [client.status(order_id) for order_id in _order_ids(arguments)]
    if arguments.json:
        for status in statuses:
            _print_json(
                {
                    "order_id": status.order_id,
                    "result": status.result and status.result.to_json(),
                    "open": status.open and _open_json(status.open),
                }
            )
    else:
        _print_table(
            (*_OUTCOME_TITLES[:-1], "AGE", "NEXT TRY", "STATE", "LAST ANSWER"), map(_status_cells, statuses)
        )
    return _worst({_exit_of_status(status) for status in statuses})


def _exit_of_status(status: Status) -> Exit:
    if status.result is not None:
        return _EXIT_OF[status.result.outcome]
    return Exit.NOT_KNOWN_HERE if status.open is None else Exit.NOT_SETTLED


def _status_cells(status: Status) -> list[str]:
    result, entry = status.result, status.open
    cells = [status.order_id, *"-----"] if result is None else _outcome_cells(result)[:-1]
    if entry is not None:
        cells[-1] = str(entry.progress.attempts)
        return [
            *cells,
            _duration(entry.age_s),
            _next_try(entry),
            _state(entry),
            _problem_text(entry.progress.last_problem),
        ]
    state = "nobody asked" if result is None else "not open"
    return [*cells, "-", "-", state, _problem_text(result.error if result else None)]


def _add_open(commands: _Subparsers) -> None:
    command = _add(
        commands,
        "open",
        _open,
        about="list the cancels that are accepted and not settled, risk first, in the order they are due",
        examples="  cancelctl open\n  cancelctl open --json | jq -r 'select(.unresolved) | .order_id'",
    )
    _add_json(command)


def _open(arguments: argparse.Namespace) -> int:
    client = CancelClient.from_env()
    if arguments.json:
        for entry in client.open_cancels():
            _print_json(_open_json(entry))
    else:
        titles = ("ORDER", "LANE", "AGE", "ATTEMPTS", "NEXT TRY", "STATE", "WHO", "LAST ANSWER")
        rows = map(_open_cells, client.open_cancels())
        _print_table(titles, rows, nothing="nothing is open")
    for worker, why in client.held_back().items():
        print(f"cancelctl: {_clean(worker)} holds cancels back: {_clean(why)}", file=sys.stderr)
    return Exit.SETTLED


def _open_cells(entry: OpenCancel) -> list[str]:
    return [
        entry.order_id,
        entry.lane,
        _duration(entry.age_s),
        str(entry.progress.attempts),
        _next_try(entry),
        _state(entry),
        _names(entry.requested_by),
        _problem_text(entry.progress.last_problem),
    ]


def _open_json(entry: OpenCancel) -> dict[str, Any]:
    return {
        "order_id": entry.order_id,
        "lane": entry.lane,
        "requested_by": entry.requested_by,
        "requested_at": entry.requested_at,
        "age_s": entry.age_s,
        "next_try_s": None if entry.in_hand else max(entry.next_due_s, 0.0),
        "in_hand": entry.in_hand,
        "unresolved": entry.unresolved,
        **_progress_json(entry),
        "request": entry.request.fields(),
    }


def _next_try(entry: OpenCancel) -> str:
    if entry.in_hand:
        return "now"
    return f"in {_duration(entry.next_due_s)}" if entry.next_due_s > 0 else "due"


def _state(entry: OpenCancel) -> str:
    state = "in hand" if entry.in_hand else "waiting"
    return f"{state}, unresolved" if entry.unresolved else state


# --- dead, retry ------------------------------------------------------------------------------------------


def _add_dead(commands: _Subparsers) -> None:
    command = _add(
        commands,
        "dead",
        _dead,
        about="list the cancels that were given up unresolved, oldest first",
        examples="  cancelctl dead\n  cancelctl dead --json | jq -r .order_id | cancelctl retry -",
    )
    _add_json(command)


def _dead(arguments: argparse.Namespace) -> int:
    letters = CancelClient.from_env().dead_letters()
    if arguments.json:
        for letter in letters:
            _print_json(_dead_json(letter))
    else:
        titles = ("ORDER", "REQUESTED", "GIVEN UP", "ATTEMPTS", "WHO", "LAST ANSWER")
        _print_table(titles, map(_dead_cells, letters), nothing="nothing was given up")
    return Exit.SETTLED


def _dead_cells(letter: DeadLetter) -> list[str]:
    return [
        letter.order_id,
        letter.requested_at,
        letter.died_at,
        str(letter.progress.attempts),
        _names(letter.requested_by),
        _problem_text(letter.progress.last_problem),
    ]


def _dead_json(letter: DeadLetter) -> dict[str, Any]:
    return {
        "order_id": letter.order_id,
        "requested_by": letter.requested_by,
        "requested_at": letter.requested_at,
        "died_at": letter.died_at,
        **_progress_json(letter),
        "request": letter.request.fields(),
    }


def _add_retry(commands: _Subparsers) -> None:
    command = _add(
        commands,
        "retry",
        _retry,
        about="have cancels that were given up worked on again",
        examples="  cancelctl retry 3f2c1e0a-...\n  cancelctl retry --all",
    )
    _add_order_ids(command, nargs="*")
    command.add_argument("--all", action="store_true", help="every one that was given up")
    _add_json(command)


def _retry(arguments: argparse.Namespace) -> int:
    if arguments.all and arguments.order_ids:
        raise _UsageError("give order ids or --all, not both")
    client = CancelClient.from_env()
    if arguments.all:
        order_ids = [letter.order_id for letter in client.dead_letters()]
    else:
        order_ids = _order_ids(arguments)
    revived = set(client.retry(order_ids)) if order_ids else set()
    if arguments.json:
        for order_id in order_ids:
            _print_json({"order_id": order_id, "retried": order_id in revived})
    else:
        rows = [[each, "worked on again" if each in revived else "no dead letter"] for each in order_ids]
        _print_table(("ORDER", "NOW"), rows, nothing="nothing was given up")
    # With --all, what is gone from the list meanwhile was retried by somebody else.
    return Exit.SETTLED if arguments.all or len(revived) == len(order_ids) else Exit.NOT_KNOWN_HERE


# --- mass -------------------------------------------------------------------------------------------------


def _add_mass(commands: _Subparsers) -> None:
    command = _add(
        commands,
        "mass",
        _mass,
        about="cancel everything in a scope, prove that it is flat, and report",
        examples="  cancelctl mass --everything\n"
        "  cancelctl mass --subaccount 3 --dry-run\n"
        "  cancelctl mass --event KXBTC-26NOV22 --side bid --yes --reason 'limit breached'\n"
        "  cancelctl mass --client-order-id-prefix mm-btc- --yes --json | jq .flat\n"
        "  cancelctl mass list\n"
        "  cancelctl mass show 0b7c6a9e-...",
    )
    scope = command.add_argument_group("scope", "an order is meant when every filter given lets it through")
    for option, meta, about, how in _SCOPE_OPTIONS:
        scope.add_argument(option, metavar=meta, help=about, default=None, **how)
    doing = command.add_argument_group("what to do")
    doing.add_argument("--dry-run", action="store_true", help="only show what would be done")
    doing.add_argument("--yes", action="store_true", help="do it without asking; needed without a terminal")
    doing.add_argument("--requested-by", metavar="WHO", default=DEFAULT_REQUESTER, help="who asks")
    doing.add_argument("--reason", metavar="WHY", help="why, for the record")
    doing.add_argument(
        "--deadline",
        metavar="S",
        type=_seconds,
        default=MASS_DEADLINE_S,
        help=f"seconds beyond the predicted ones after which it ends, flat or not ({MASS_DEADLINE_S:g})",
    )
    doing.add_argument("--timeout", metavar="S", type=_seconds, help="seconds to wait here (until it ends)")
    _add_json(command)
    looks = command.add_subparsers(title="looking back", metavar="list | show", required=False)
    listing = _add(
        looks,
        "list",
        _mass_list,
        about="list the latest mass cancels, the latest first",
        examples="  cancelctl mass list\n"
        "  cancelctl mass list --json | jq -r 'select(.flat == false) | .request_id'",
    )
    show = _add(
        looks,
        "show",
        _mass_show,
        about="show a mass cancel's report, or how far it has got",
        examples="  cancelctl mass show 0b7c6a9e-...\n"
        "  cancelctl mass show --json 0b7c6a9e-... | jq .not_affected",
    )
    show.add_argument("request_id", metavar="ID", help="its request id")
    for look in (listing, show):
        _add_json(look, default=argparse.SUPPRESS)  # else it would overrule a --json before the word


# The scope's fields by option; what the values have to look like is the scope's own business.
_SCOPE_OPTIONS: tuple[tuple[str, str | None, str, dict[str, Any]], ...] = (
    (
        "--everything",
        None,
        "the whole account: every market, subaccount and shard",
        {"action": "store_const", "const": True},
    ),
    ("--ticker", "T", "in these markets", {"dest": "tickers", "nargs": "+", "action": "extend"}),
    ("--event", "E", "of these events", {"dest": "event_tickers", "nargs": "+", "action": "extend"}),
    ("--series", "S", "of this series", {}),
    ("--ticker-prefix", "P", "in markets whose ticker starts so", {}),
    ("--subaccount", "N", "of this subaccount; 0 is the primary one", {"type": int}),
    ("--order-id", "ID", "these orders", {"dest": "order_ids", "nargs": "+", "action": "extend"}),
    ("--side", "SIDE", "on this side: yes, no, bid or ask", {}),
    ("--client-order-id-prefix", "P", "whose client_order_id starts so", {}),
    ("--order-group", "G", "in this order group", {"dest": "order_group_id"}),
    ("--shard", "N", "on this shard", {"dest": "exchange_index", "type": int}),
    ("--created-after", "T", "created at or after this time: ISO 8601 with an offset, or epoch seconds", {}),
    ("--created-before", "T", "created before this time", {}),
    ("--min-price", "P", "with a yes price of at least so many dollars", {}),
    ("--max-price", "P", "with a yes price of at most so many dollars", {}),
)
_SCOPE_FIELDS = tuple(
    how.get("dest", option.removeprefix("--").replace("-", "_")) for option, _, _, how in _SCOPE_OPTIONS
)


def _scope(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of the scope that are given."""
    given = {name: getattr(arguments, name) for name in _SCOPE_FIELDS}
    for name in ("created_after", "created_before"):
        given[name] = _number_or_text(given[name])
    return {name: value for name, value in given.items() if value is not None}


def _number_or_text(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _mass(arguments: argparse.Namespace) -> int:
    scope = _scope(arguments)
    if not scope:
        raise _UsageError("no scope: give a filter, or --everything for the whole account")
    asks = not (arguments.dry_run or arguments.yes)
    if asks and not sys.stdin.isatty():
        raise _UsageError("nobody can be asked without a terminal: --yes does it, --dry-run only plans")
    client = CancelClient.from_env()
    try:
        if not arguments.yes:
            timeout_s = MASS_SILENCE_S if arguments.timeout is None else arguments.timeout
            planned = _start_mass(client, scope, arguments, dry_run=True).result(timeout_s)
            if arguments.dry_run or not arguments.json:
                _show_report(planned, as_json=arguments.json)
            if arguments.dry_run:
                return _exit_of_mass(planned)
            if not _confirmed(planned["plan"]):
                return _complain("not confirmed: nothing was canceled", Exit.INTERRUPTED)
    except NotSettled:
        return _complain("no plan yet: is a worker running?", Exit.NOT_SETTLED)
    pending = _start_mass(client, scope, arguments, dry_run=False)
    return _see_through(client, pending.request_id, arguments)


def _start_mass(
    client: CancelClient, scope: Mapping[str, Any], arguments: argparse.Namespace, *, dry_run: bool
) -> PendingMass:
    return client.mass_cancel(
        scope,
        requested_by=arguments.requested_by,
        reason=arguments.reason,
        automated=not sys.stdin.isatty(),
        dry_run=dry_run,
        deadline_s=arguments.deadline,
    )


def _confirmed(plan: Mapping[str, Any]) -> bool:
    question = f"Cancel {plan['orders']} orders, and what else comes into this scope meanwhile? [y/N] "
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _see_through(client: CancelClient, request_id: str, arguments: argparse.Namespace) -> int:
    """Shows the progress, then the report; the exit code."""
    bar = _Bar(client.mass_plan, request_id)
    told = f"mass cancel {request_id} goes on; cancelctl mass show {request_id}"
    try:
        for shown in _follow(client, request_id, arguments.timeout):
            if "flat" in shown:
                bar.end()
                _show_report(shown, as_json=arguments.json)
                return _exit_of_mass(shown)
            bar.show(shown)
    except KeyboardInterrupt:
        bar.end()
        return _complain(f"interrupted; {told}", Exit.INTERRUPTED)
    except BookError as error:
        bar.end()
        return _complain(f"it cannot be followed: {error}; {told}", Exit.REDIS)
    bar.end()
    return _complain(f"no report yet; {told}", Exit.NOT_SETTLED)


def _follow(client: CancelClient, request_id: str, timeout_s: float | None) -> Iterator[dict[str, Any]]:
    """Its states as they change, the report last; ends early when the time is over or nobody is at it.

    An outage of Redis is waited out like silence; raises BookError when it lasts as long.
    """
    last, heard = None, time.monotonic()
    give_up = math.inf if timeout_s is None else heard + timeout_s
    while True:
        over = time.monotonic() >= min(give_up, heard + MASS_SILENCE_S)
        shown = None
        try:
            shown = client.mass_status(request_id)
        except BookError:
            if over:
                raise
        if shown is not None and shown != last:
            last, heard = shown, time.monotonic()
            yield shown
        elif over:
            return
        time.sleep(MASS_LOOK_EVERY_S)


class _Bar:
    """Progress on stderr: a bar at a terminal, else a line now and then."""

    def __init__(self, plan_of: Callable[[str], Mapping[str, Any] | None], request_id: str) -> None:
        self._plan_of = plan_of
        self._request_id = request_id
        self._tokens_each: float | None = None
        self._first: tuple[float, int] | None = None
        self._told_at = -math.inf
        self._drawn = False

    def show(self, progress: Mapping[str, Any]) -> None:
        """Shows how far it has got."""
        now, settled, orders = time.monotonic(), progress["settled"], progress["orders"]
        self._first = self._first or (now, settled)
        at_terminal = sys.stderr.isatty()
        if not at_terminal and now - self._told_at < MASS_LINE_EVERY_S:
            return
        self._told_at = now
        line = f"{settled} of {orders} settled{self._pace(now, progress)}"
        if progress["unresolved"]:
            line += f", {progress['unresolved']} unresolved"
        if at_terminal:
            done = MASS_BAR_CHARS * settled // max(orders, 1)
            line = f"\r\x1b[K[{'#' * done}{'.' * (MASS_BAR_CHARS - done)}] {line}"
        print(line, end="" if at_terminal else "\n", file=sys.stderr, flush=True)
        self._drawn = at_terminal

    def end(self) -> None:
        """Leaves the bar's line."""
        if self._drawn:
            print(file=sys.stderr, flush=True)
            self._drawn = False

    def _pace(self, now: float, progress: Mapping[str, Any]) -> str:
        """Rate, time left and tokens, as far as they can be told."""
        if self._tokens_each is None:
            plan = self._plan_of(self._request_id)
            self._tokens_each = plan["tokens"] / plan["orders"] if plan and plan["orders"] else 0.0
        tokens = f", about {progress['settled'] * self._tokens_each:.0f} tokens"
        assert self._first is not None
        seconds, settled = now - self._first[0], progress["settled"] - self._first[1]
        if seconds <= 0 or settled <= 0:
            return tokens
        rate = settled / seconds
        return f", {rate:.0f}/s, {_duration(progress['open'] / rate)} left{tokens}"


def _mass_list(arguments: argparse.Namespace) -> int:
    _refuse_scope(arguments)
    rows = []
    for request_id, accepted_at, shown in CancelClient.from_env().mass_cancels():
        if arguments.json:
            known = {name: value for name, value in (shown or {}).items() if name not in _LONG_FIELDS}
            _print_json({"request_id": request_id, "accepted_at": accepted_at, "flat": None, **known})
        else:
            rows.append([request_id, accepted_at, *_mass_cells(shown or {})])
    if not arguments.json:
        titles = ("REQUEST", "ACCEPTED", "STATE", "ORDERS", "CONTRACTS", "WHO", "REASON")
        _print_table(titles, rows, nothing="no mass cancels")
    return Exit.SETTLED


_LONG_FIELDS = ("affected", "not_affected")


def _mass_cells(shown: Mapping[str, Any]) -> list[str]:
    if "flat" not in shown:
        state = f"{shown['settled']} of {shown['orders']} settled" if shown else "waiting"
        return [state, "-", "-", "-", "-"]
    orders, contracts = shown["orders_affected"], shown["contracts_canceled"]
    if shown["dry_run"]:
        orders, contracts = shown["plan"]["orders"], shown["plan"]["contracts"]
    return [
        _mass_state(shown),
        str(orders),
        contracts,
        shown["requested_by"] or "-",
        shown["reason"] or "-",
    ]


def _mass_state(report: Mapping[str, Any]) -> str:
    if report["dry_run"]:
        return "planned only"
    return "flat" if report["flat"] else "NOT FLAT"


def _mass_show(arguments: argparse.Namespace) -> int:
    _refuse_scope(arguments)
    client, request_id = CancelClient.from_env(), arguments.request_id
    shown = client.mass_status(request_id)
    if shown is None:
        waits = any(known == request_id for known, _, _ in client.mass_cancels())
        words = "waits for a worker" if waits else "nobody asked for such a mass cancel, or it is forgotten"
        return _complain(f"{request_id}: {words}", Exit.NOT_SETTLED if waits else Exit.NOT_KNOWN_HERE)
    if "flat" not in shown:
        if arguments.json:
            _print_json(shown)
        else:
            _print_lines({name: str(value) for name, value in shown.items()})
        return Exit.NOT_SETTLED
    _show_report(shown, as_json=arguments.json)
    return _exit_of_mass(shown)


def _refuse_scope(arguments: argparse.Namespace) -> None:
    if _scope(arguments):
        raise _UsageError("list and show take no scope")


def _exit_of_mass(report: Mapping[str, Any]) -> Exit:
    if report["dry_run"]:
        return Exit.SETTLED if report["plan"]["listed_at"] else Exit.NOT_FLAT
    return Exit.SETTLED if report["flat"] else Exit.NOT_FLAT


def _show_report(report: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        _print_json(report)
        return
    _print_lines(_plan_lines(report) if report["dry_run"] else _report_lines(report))
    exposed = [each for each in report["not_affected"] if not each["reason"].startswith("too_late")]
    rows = [[each["order_id"], each["reason"], each["error"] or ""] for each in exposed[:ORDERS_SHOWN]]
    if rows:
        print()
        _print_table(("ORDER", "NOT CANCELED", "ERROR"), rows)
    if len(exposed) > len(rows):
        print(f"and {len(exposed) - len(rows)} more; --json has all")


def _plan_lines(report: Mapping[str, Any]) -> dict[str, str]:
    plan = report["plan"]
    return {
        "request": report["request_id"],
        "scope": json.dumps(report["scope"]),
        "orders": str(plan["orders"]),
        "contracts": plan["contracts"],
        "tokens": f"{plan['tokens']:.0f}",
        "predicted": f"flat in {_duration(plan['predicted_s'])}",
        **{
            f"shard {shard}": f"{orders} orders: {plan['paths'][shard]}"
            for shard, orders in plan["shards"].items()
        },
        "listed": plan["listed_at"] or f"no: {report['why_not_flat']}",
    }


def _report_lines(report: Mapping[str, Any]) -> dict[str, str]:
    proof, actual_s = report["flat_listing"], report["actual_s"]
    reasons = Counter(each["reason"] for each in report["not_affected"])
    others = "".join(f", {number} {reason}" for reason, number in reasons.most_common())
    return {
        "request": report["request_id"],
        "scope": json.dumps(report["scope"]),
        "flat": f"yes, by the listing of {proof['at']} (sha256 {proof['sha256'][:12]}...)"
        if report["flat"]
        else f"NO: {report['why_not_flat']}",
        "orders": f"{report['orders_affected']} canceled{others}",
        "contracts": f"{report['contracts_canceled']} canceled,"
        f" {report['contracts_filled_meanwhile']} filled meanwhile",
        "tokens": f"{report['tokens_spent']:.0f}, {report['rate_limited']} calls over the budget",
        "time": f"{'-' if actual_s is None else _duration(actual_s)},"
        f" predicted {_duration(report['predicted_s'])}",
    }


def _print_lines(lines: Mapping[str, str]) -> None:
    width = max(map(len, lines))
    for name, value in lines.items():
        _print_line([name, value], [width, 0])


# --- doctor -----------------------------------------------------------------------------------------------


def _add_doctor(commands: _Subparsers) -> None:
    command = _add(
        commands,
        "doctor",
        _doctor,
        about="examine settings, Redis, the key and the account, and say what to do about what is wrong",
        examples="  cancelctl doctor\n"
        "  cancelctl doctor --producer\n"
        "  cancelctl doctor --json | jq -r 'select(.health != \"ok\") | .advice'",
    )
    command.add_argument("--producer", action="store_true", help="only what a producer needs: Redis")
    _add_json(command)


def _doctor(arguments: argparse.Namespace) -> int:
    from worker.doctor import Health, examine  # noqa: PLC0415 - HTTP and keys are no part of the producers' side

    logging.getLogger("worker").setLevel(logging.CRITICAL)  # the findings say it all
    code = Exit.SETTLED
    for finding in examine(producer=arguments.producer):
        if finding.health is Health.FAILED:
            code = Exit.REFUSED
        if arguments.json:
            _print_json(finding.to_json())
            continue
        _print_line([finding.health, finding.check, finding.found], _DOCTOR_WIDTHS)
        if finding.advice:
            _print_line(["", "", f"-> {finding.advice}"], _DOCTOR_WIDTHS)
    return code


_DOCTOR_WIDTHS = (len("warning"), len("redis version"), 0)


# --- sandbox ----------------------------------------------------------------------------------------------


def _add_sandbox(commands: _Subparsers) -> None:
    _add(
        commands,
        "sandbox",
        _sandbox,
        about="run a local exchange to try things on; takes the arguments of `python -m sandbox`",
        examples="  cancelctl sandbox --sample\n"
        "  cancelctl sandbox --port 8765 --tier basic\n"
        "  cancelctl sandbox --help",
        add_help=False,  # --help is the sandbox's own
    )


def _sandbox(arguments: argparse.Namespace) -> int:
    """Runs the sandbox as a child; without a key of the caller's own, with one made for this run."""
    if importlib.util.find_spec("sandbox") is None:
        raise _UsageError("the sandbox is not installed here: it comes with the project's repository")
    with tempfile.TemporaryDirectory(prefix="cancelctl-sandbox-") as folder:
        options, exports = list(arguments.beyond), {}
        if not any(option.startswith(("--key-id", "--public-key")) for option in options):
            key_id, private_path, public_path = _make_key(Path(folder))
            options += ["--key-id", key_id, "--public-key", str(public_path)]
            exports = {"KALSHI_API_KEY_ID": key_id, "KALSHI_PRIVATE_KEY_PATH": str(private_path)}
        return _run_sandbox(options, exports)


def _run_sandbox(options: Sequence[str], exports: dict[str, str]) -> int:
    """Passes the sandbox's output on, with the environment it asks for; its exit code."""
    sandbox = subprocess.Popen(  # noqa: S603 - our own program, with the caller's own arguments
        [sys.executable, "-m", "sandbox", *options], stdout=subprocess.PIPE, text=True
    )
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: sandbox.terminate())
    assert sandbox.stdout is not None
    try:
        for line in sandbox.stdout:
            print(line, end="", flush=True)
            _, found, url = line.strip().partition("sandbox exchange on ")
            if found:
                print("# for a worker and for cancelctl doctor, besides REDIS_URL:")
                for name, value in {"KALSHI_BASE_URL": url, **exports}.items():
                    print(f"export {name}={shlex.quote(value)}", flush=True)
    except BrokenPipeError:
        sandbox.terminate()
        sandbox.wait()
        raise
    return sandbox.wait()


def _make_key(folder: Path) -> tuple[str, Path, Path]:
    """A key id, and the files of a new private key and its public one."""
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 - see _doctor
    from cryptography.hazmat.primitives.asymmetric import rsa  # noqa: PLC0415 - see _doctor

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private_path, public_path = folder / "key.pem", folder / "key.pub.pem"
    private_path.touch(mode=0o600)
    private_path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
    )
    public_path.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return str(uuid.uuid4()), private_path, public_path


# In the order of the help text.
_COMMANDS: tuple[Callable[[_Subparsers], None], ...] = (
    _add_cancel,
    _add_status,
    _add_open,
    _add_dead,
    _add_retry,
    _add_mass,
    _add_doctor,
    _add_sandbox,
)


# --- Output -----------------------------------------------------------------------------------------------


def _print_json(value: object) -> None:
    print(json.dumps(value), flush=True)


def _print_line(cells: Sequence[str], widths: Sequence[int]) -> None:
    padded = (f"{_clean(cell):<{width}}" for cell, width in zip(cells, widths, strict=False))
    print("  ".join(padded).rstrip(), flush=True)


def _print_table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, nothing: str = "") -> None:
    """The rows under their titles, or ``nothing`` where there are none."""
    all_rows = [titles, *rows]
    if len(all_rows) == 1:
        print(nothing)
        return
    widths = [max(len(row[column]) for row in all_rows) for column in range(len(titles))]
    for row in all_rows:
        _print_line(row, widths)


def _clean(text: str) -> str:
    """Text that cannot steer a terminal: the exchange's words and order ids are strangers'."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _problem_text(problem: Problem | None) -> str:
    return "" if problem is None else f"{problem.code}: {problem.message}"


def _progress_json(entry: OpenCancel | DeadLetter) -> dict[str, Any]:
    progress = entry.progress
    return {
        "attempts": progress.attempts,
        "last_problem": progress.last_problem and asdict(progress.last_problem),
        "history": [{"ts_ms": at_ms, "code": code} for at_ms, code in progress.history],
    }


def _names(who: Sequence[str]) -> str:
    more = len(who) - NAMES_SHOWN
    return (", ".join(who[:NAMES_SHOWN]) or "-") + (f" and {more} more" if more > 0 else "")


def _duration(seconds: float) -> str:
    if seconds < 60:  # noqa: PLR2004 - a minute
        return f"{max(seconds, 0):.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest_s:02} s"


if __name__ == "__main__":
    sys.exit(main())
