"""Asks for single cancels and shows what becomes of them: `cancelctl cancel`, `status` and `open`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from kalshi_cancel.cli.dead import dead_json
from kalshi_cancel.cli.exits import EXIT_OF, Exit, complain, worst
from kalshi_cancel.cli.line import (
    DEFAULT_REQUESTER,
    Subparsers,
    add_command,
    add_json,
    add_order_ids,
    ids_given,
    parse_seconds,
)
from kalshi_cancel.cli.nobody import notice_when_nobody_works, say_when_nobody_works
from kalshi_cancel.cli.printing import (
    clean,
    duration,
    names_text,
    print_json,
    print_line,
    print_table,
    problem_text,
    progress_json,
)
from kalshi_cancel.client import DEFAULT_DEADLINE_S, CancelClient, Lost, Status
from kalshi_cancel.model.counts import count_text
from kalshi_cancel.model.requests import Lane
from kalshi_cancel.model.results import CancelResult
from kalshi_cancel.store.pending import OpenCancel
from kalshi_cancel.store.scripts import StoreError

WAIT_BEYOND_DEADLINE_S = 5.0  # a worker says "unresolved" at the deadline; its answer needs a moment


def add_cancel(commands: Subparsers) -> None:
    """Adds `cancel`."""
    command = add_command(
        commands,
        "cancel",
        _cancel,
        about="ask for cancels and wait for their outcomes",
        examples="  cancelctl cancel 3f2c1e0a-...\n"
        "  cancelctl cancel --risk --reason 'limit breached' 3f2c1e0a-... 77b0c5d2-...\n"
        "  cancelctl cancel --shard 2 --ticker KXBTC-26NOV22-T100000 3f2c1e0a-...\n"
        "  cancelctl cancel --json - < order-ids.txt | jq -r .outcome",
    )
    add_order_ids(command)
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
        type=parse_seconds,
        help=f"report unresolved after so many seconds without proof ({DEFAULT_DEADLINE_S:g})",
    )
    command.add_argument("--risk", action="store_true", help="use the risk lane, which is served first")
    command.add_argument(
        "--again",
        action="store_true",
        help="ask the exchange even if a final outcome is stored: if you see that the order still rests",
    )
    waiting = command.add_mutually_exclusive_group()
    waiting.add_argument(
        "--timeout",
        metavar="S",
        type=parse_seconds,
        help=f"wait so many seconds for outcomes (the deadline and {WAIT_BEYOND_DEADLINE_S:g} more)",
    )
    waiting.add_argument("--no-wait", action="store_true", help="return once the cancels are accepted")
    add_json(command)


def _cancel(arguments: argparse.Namespace) -> int:
    order_ids = ids_given(arguments)
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
    client = CancelClient.from_env(preload=False)
    try:
        pending = client.cancel_many(orders, lane=lane, again=arguments.again)
    except StoreError as error:
        if not error.may_be_accepted:
            return complain(f"not accepted: {error}", Exit.REDIS)
        which = "the cancel" if len(orders) == 1 else "some cancels"
        return complain(f"{which} may not be accepted; asking again is always safe: {error}", Exit.REDIS)
    try:
        with notice_when_nobody_works(client):
            return _show_outcomes(client, pending.as_settled(_wait_s(arguments)), order_ids, arguments)
    except StoreError as error:
        return complain(f"accepted, but the outcomes cannot be read: {error}", Exit.REDIS)


def _wait_s(arguments: argparse.Namespace) -> float:
    if arguments.no_wait:
        return 0.0  # what is settled already is shown
    if arguments.timeout is not None:
        return float(arguments.timeout)
    deadline_s = DEFAULT_DEADLINE_S if arguments.deadline is None else float(arguments.deadline)
    return deadline_s + WAIT_BEYOND_DEADLINE_S


def _show_outcomes(
    client: CancelClient,
    results: Iterator[CancelResult],
    order_ids: Sequence[str],
    arguments: argparse.Namespace,
) -> int:
    """Shows each outcome as it comes, then those that have none; the exit code."""
    widths = [max(map(len, order_ids)), *map(len, _OUTCOME_WIDEST)]
    widths = [max(width, len(title)) for width, title in zip(widths, _OUTCOME_TITLES, strict=True)]
    if not arguments.json:
        print_line(_OUTCOME_TITLES, widths)
    missing = dict.fromkeys(order_ids, "accepted" if arguments.no_wait else "not settled")
    codes = set()
    try:
        for result in results:
            missing.pop(str(result.order_id), None)
            codes.add(EXIT_OF[result.outcome])
            if arguments.json:
                print_json(result.to_json())
            else:
                print_line(_outcome_cells(result), widths)
    except Lost as lost:
        missing.update(dict.fromkeys(lost.order_ids, "lost"))
        codes.add(complain(str(lost), Exit.REDIS))
    for order_id, state in missing.items():
        if arguments.json:
            print_json({"order_id": order_id, "outcome": None})
        else:
            print_line([order_id, state], widths)
    unsettled = [order_id for order_id, state in missing.items() if state == "not settled"]
    if unsettled:
        codes.add(
            complain(f"{len(unsettled)} not settled in time: {_where(client, unsettled)}", Exit.NOT_SETTLED)
        )
    return worst(codes)


def _where(client: CancelClient, order_ids: Sequence[str]) -> str:
    """What Redis has of them now."""
    standing = client.standing(order_ids)
    found = {
        "still being worked on": standing.open,
        "given up (cancelctl dead)": standing.dead,
        "lost by Redis (ask again)": standing.lost,
        "settled a moment ago": standing.results,
    }
    return ", ".join(f"{len(some)} {words}" for words, some in found.items() if some)


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
        problem_text(result.error),
    ]


def add_status(commands: Subparsers) -> None:
    """Adds `status`."""
    command = add_command(
        commands,
        "status",
        _status,
        about="show the outcome of each order's cancel, and whether workers are still trying",
        examples="  cancelctl status 3f2c1e0a-...\n"
        "  cancelctl status --json 3f2c1e0a-... | jq .result.outcome",
    )
    add_order_ids(command)
    add_json(command)


def _status(arguments: argparse.Namespace) -> int:
    client = CancelClient.from_env(preload=False)
    statuses = [client.status(order_id) for order_id in ids_given(arguments)]
    if arguments.json:
        for status in statuses:
            print_json(
                {
                    "order_id": status.order_id,
                    "result": status.result and status.result.to_json(),
                    "open": status.open and _open_json(status.open),
                    "dead": status.dead and dead_json(status.dead),
                }
            )
    else:
        print_table(
            (*_OUTCOME_TITLES[:-1], "AGE", "NEXT TRY", "STATE", "LAST ANSWER"), map(_status_cells, statuses)
        )
    return worst({_exit_of_status(status) for status in statuses})


def _exit_of_status(status: Status) -> Exit:
    if status.dead is not None:
        return Exit.REFUSED  # nobody tries again, which is worse than unresolved
    if status.result is not None:
        return EXIT_OF[status.result.outcome]
    return Exit.NOT_KNOWN_HERE if status.open is None else Exit.NOT_SETTLED


def _status_cells(status: Status) -> list[str]:
    result, entry = status.result, status.open
    cells = [status.order_id, *"-----"] if result is None else _outcome_cells(result)[:-1]
    if entry is not None:
        cells[-1] = str(entry.progress.attempts)
        return [
            *cells,
            duration(entry.age_s),
            _next_try(entry),
            _state(entry),
            problem_text(entry.progress.last_problem),
        ]
    if status.dead is not None:
        progress = status.dead.progress
        cells[-1] = str(progress.attempts)
        return [*cells, "-", "never", "given up", problem_text(progress.last_problem)]
    state = "nobody asked, or forgotten" if result is None else "not open"
    return [*cells, "-", "-", state, problem_text(result.error if result else None)]


def add_open(commands: Subparsers) -> None:
    """Adds `open`."""
    command = add_command(
        commands,
        "open",
        _open,
        about="list the cancels that are accepted and not settled, risk first, in the order they are due",
        examples="  cancelctl open\n  cancelctl open --json | jq -r 'select(.unresolved) | .order_id'",
    )
    add_json(command)


def _open(arguments: argparse.Namespace) -> int:
    client = CancelClient.from_env(preload=False)
    entries = client.open_cancels()
    first = next(entries, None)
    if first is not None:
        say_when_nobody_works(client)
        entries = chain([first], entries)
    if arguments.json:
        for entry in entries:
            print_json(_open_json(entry))
    else:
        titles = ("ORDER", "LANE", "AGE", "ATTEMPTS", "NEXT TRY", "STATE", "WHO", "LAST ANSWER")
        print_table(titles, map(_open_cells, entries), nothing="nothing is open")
    for worker, why in client.held_back().items():
        print(f"cancelctl: {clean(worker)} holds cancels back: {clean(why)}", file=sys.stderr)
    return Exit.SETTLED


def _open_cells(entry: OpenCancel) -> list[str]:
    return [
        entry.order_id,
        entry.lane,
        duration(entry.age_s),
        str(entry.progress.attempts),
        _next_try(entry),
        _state(entry),
        names_text(entry.requested_by),
        problem_text(entry.progress.last_problem),
    ]


def _open_json(entry: OpenCancel) -> dict[str, Any]:
    return {
        "order_id": entry.order_id,
        "lane": entry.lane,
        "requested_by": entry.requested_by,
        "requested_by_left_out": entry.left_out,
        "requested_at": entry.requested_at,
        "age_s": entry.age_s,
        "next_try_s": None if entry.claimed else max(entry.next_due_s, 0.0),
        "claimed": entry.claimed,
        "unresolved": entry.unresolved,
        **progress_json(entry),
        "request": entry.request.fields(),
    }


def _next_try(entry: OpenCancel) -> str:
    if entry.claimed:
        return "now"
    return f"in {duration(entry.next_due_s)}" if entry.next_due_s > 0 else "due"


def _state(entry: OpenCancel) -> str:
    state = "claimed" if entry.claimed else "waiting"
    return f"{state}, unresolved" if entry.unresolved else state
