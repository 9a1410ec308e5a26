"""Hides the service behind one command, `cancelctl`: asks for cancels, shows what is known, finds what is wrong.

Exit codes, the worst first; of several that apply, the first of this list is given:

    130  interrupted; what was accepted is still being worked on
    141  whoever read the output went away
      2  wrong usage: the command line, a field of a request, or the settings
      5  Redis could not be reached, or did not accept the cancels
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
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeAlias

import redis

from worker.book import Book, connect
from worker.client import DEFAULT_DEADLINE_S, BadRequest, BookError, CancelClient, DeadLetter, Status
from worker.orders import CancelResult, Lane, Outcome, Problem, count_text
from worker.settings import RedisSettings, SettingsError

WAIT_BEYOND_DEADLINE_S = 5.0  # a worker says "unresolved" at the deadline; its answer needs a moment
DEFAULT_REQUESTER = "cancelctl"
PROBLEMS_SHOWN = 3  # in one line on stderr
NAMES_SHOWN = 3  # of those who asked for one cancel, in a table


class Exit(IntEnum):
    """Exit codes; their meanings stand in the module's docstring, which is part of the help."""

    SETTLED = 0
    REFUSED = 1
    USAGE = 2
    UNKNOWN_ORDER = 3
    NOT_SETTLED = 4
    REDIS = 5
    NOT_KNOWN_HERE = 6
    INTERRUPTED = 130  # as shells have it: 128 + SIGINT
    READER_GONE = 141  # 128 + SIGPIPE


# By exposure: an order that may rest while nobody works on it is worse than one that is worked on.
_WORST_FIRST = (
    Exit.REDIS,
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

_Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
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


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="one JSON object per line")


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
        happened = "may have been accepted" if error.may_be_accepted else "not accepted"
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
    widths = [max(map(len, order_ids)), *(len(widest) for widest in _OUTCOME_WIDEST)]
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
_OUTCOME_WIDEST = ("unknown_order", "canceled", "REDUCED BY", "read_back", "ATTEMPTS", "")


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
        examples="  cancelctl status 3f2c1e0a-...\n  cancelctl status --json 3f2c1e0a-... | jq .result.outcome",
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
    cells = (
        [status.order_id, "-", "-", "-", "-", "-"] if result is None else _outcome_cells(result)[:-1]
    )
    if entry is not None:
        attempts, problem = _learned(entry.learned)
        cells[5] = str(attempts)
        return [*cells, _duration(entry.age_s), _next_try(entry), _state(entry), _problem_text(problem)]
    state = "nobody asked" if result is None else "not open"
    return [*cells, "-", "-", state, _problem_text(result.error) if result else ""]


def _add_open(commands: _Subparsers) -> None:
    command = _add(
        commands,
        "open",
        _open,
        about="list the cancels that are accepted and not settled, in the order they are due",
        examples="  cancelctl open\n  cancelctl open --json | jq 'select(.unresolved) | .order_id'",
    )
    _add_json(command)


def _open(arguments: argparse.Namespace) -> int:
    settings = RedisSettings.from_env()
    entries = Book(connect(settings), settings).open_cancels()
    if arguments.json:
        for entry in entries:
            _print_json(_open_json(entry))
        return Exit.SETTLED
    rows = [
        [
            entry.order_id,
            entry.lane,
            _duration(entry.age_s),
            str(attempts),
            _next_try(entry),
            _state(entry),
            _names(entry.requested_by),
            _problem_text(problem),
        ]
        for entry in entries
        for attempts, problem in [_learned(entry.learned)]
    ]
    titles = ("ORDER", "LANE", "AGE", "ATTEMPTS", "NEXT TRY", "STATE", "WHO", "LAST ANSWER")
    _print_table(titles, rows, nothing="nothing is open")
    return Exit.SETTLED


def _open_json(entry: Any) -> dict[str, Any]:
    attempts, problem = _learned(entry.learned)
    return {
        "order_id": entry.order_id,
        "lane": entry.lane,
        "requested_by": entry.requested_by,
        "requested_at": entry.requested_at,
        "age_s": entry.age_s,
        "next_due_s": entry.next_due_s,
        "in_hand": entry.in_hand,
        "unresolved": entry.unresolved,
        "attempts": attempts,
        "last_problem": _problem_json(problem),
        "request": entry.request.fields(),
    }
