"""Asks for a mass cancel and follows it: `cancelctl mass`."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from kalshi_cancel.cli.exits import Exit, UsageError, complain
from kalshi_cancel.cli.line import DEFAULT_REQUESTER, Subparsers, add_command, add_json, parse_seconds
from kalshi_cancel.cli.nobody import notice_when_nobody_works
from kalshi_cancel.cli.printing import duration, print_json, print_lines, print_table
from kalshi_cancel.cli.reports import exit_of_mass, mass_state, show_report
from kalshi_cancel.client import CancelClient, Lost, PendingMass
from kalshi_cancel.store.scripts import StoreError

MASS_DEADLINE_S = 60.0  # beyond the predicted time to flat
MASS_SILENCE_S = 30.0  # a runner tells its progress ten times a second; only long listings take longer
MASS_LINE_EVERY_S = 1.0  # where there is no terminal
MASS_BAR_CHARS = 30


def add_mass(commands: Subparsers) -> None:
    """Adds `mass`."""
    command = add_command(
        commands,
        "mass",
        _mass,
        about="cancel all orders in a scope, prove that none is left, and report",
        examples="  cancelctl mass --everything\n"
        "  cancelctl mass --subaccount 3 --dry-run\n"
        "  cancelctl mass --event KXBTC-26NOV22 --side bid --yes --reason 'limit breached'\n"
        "  cancelctl mass --client-order-id-prefix mm-btc- --yes --json | jq .flat\n"
        "  cancelctl mass list\n"
        "  cancelctl mass show 0b7c6a9e-...",
    )
    scope = command.add_argument_group("scope", "orders that match every filter that you give")
    for option, meta, about, how in SCOPE_OPTIONS:
        scope.add_argument(option, metavar=meta, help=about, default=None, **how)
    doing = command.add_argument_group("what to do")
    doing.add_argument("--dry-run", action="store_true", help="only show what would be done")
    doing.add_argument(
        "--allow-side-effects",
        action="store_true",
        help="allow the exchange's own cancel-all, or an order group's trigger; the plan says what else"
        " they do",
    )
    doing.add_argument("--yes", action="store_true", help="do not ask first; required without a terminal")
    doing.add_argument("--requested-by", metavar="WHO", default=DEFAULT_REQUESTER, help="who asks")
    doing.add_argument("--reason", metavar="WHY", help="why, for the record")
    doing.add_argument(
        "--deadline",
        metavar="S",
        type=parse_seconds,
        default=MASS_DEADLINE_S,
        help=f"end at most so many seconds after the predicted end, flat or not ({MASS_DEADLINE_S:g})",
    )
    doing.add_argument(
        "--timeout", metavar="S", type=parse_seconds, help="wait at most so many seconds (until it ends)"
    )
    add_json(command)
    looks = command.add_subparsers(title="looking back", metavar="list | show", required=False)
    listing = add_command(
        looks,
        "list",
        _mass_list,
        about="list the latest mass cancels, the latest first",
        examples="  cancelctl mass list\n"
        "  cancelctl mass list --json | jq -r 'select(.flat == false) | .request_id'",
    )
    show = add_command(
        looks,
        "show",
        _mass_show,
        about="show a mass cancel's report, or how far it has got",
        examples="  cancelctl mass show 0b7c6a9e-...\n"
        "  cancelctl mass show --json 0b7c6a9e-... | jq .not_affected",
    )
    show.add_argument("request_id", metavar="ID", help="its request id")
    for look in (listing, show):
        add_json(look, default=argparse.SUPPRESS)  # else it would overrule a --json before the word


# The scope's fields by option; what the values have to look like is the scope's own business.
SCOPE_OPTIONS: tuple[tuple[str, str | None, str, dict[str, Any]], ...] = (
    (
        "--everything",
        None,
        "the whole account: every market, subaccount and shard",
        {"action": "store_const", "const": True},
    ),
    ("--ticker", "T", "in these markets", {"dest": "tickers", "nargs": "+", "action": "extend"}),
    ("--event", "E", "of these events", {"dest": "event_tickers", "nargs": "+", "action": "extend"}),
    ("--series", "S", "of this series", {}),
    ("--ticker-prefix", "P", "in markets whose ticker starts with P", {}),
    ("--subaccount", "N", "of this subaccount; 0 is the primary one", {"type": int}),
    ("--order-id", "ID", "these orders", {"dest": "order_ids", "nargs": "+", "action": "extend"}),
    ("--side", "SIDE", "on this side: yes, no, bid or ask", {}),
    ("--client-order-id-prefix", "P", "with a client_order_id that starts with P", {}),
    ("--order-group", "G", "in this order group", {"dest": "order_group_id"}),
    ("--shard", "N", "on this shard", {"dest": "exchange_index", "type": int}),
    ("--created-after", "T", "created at or after this time: ISO 8601 with an offset, or epoch seconds", {}),
    ("--created-before", "T", "created before this time", {}),
    ("--min-price", "P", "with a yes price of at least P dollars", {}),
    ("--max-price", "P", "with a yes price of at most P dollars", {}),
)
_SCOPE_FIELDS = tuple(
    how.get("dest", option.removeprefix("--").replace("-", "_")) for option, _, _, how in SCOPE_OPTIONS
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
        raise UsageError("no scope: give a filter, or --everything for the whole account")
    asks = not (arguments.dry_run or arguments.yes)
    if asks and not sys.stdin.isatty():
        raise UsageError("cannot ask for confirmation without a terminal: use --yes or --dry-run")
    client = CancelClient.from_env(preload=False)
    with notice_when_nobody_works(client):
        if arguments.dry_run or not arguments.yes:
            try:
                planned = _planned(client, scope, arguments)
                if planned is None:
                    return complain("no plan yet: is a worker running?", Exit.NOT_SETTLED)
                if arguments.dry_run or not arguments.json:
                    show_report(planned, as_json=arguments.json)
                if arguments.dry_run:
                    return exit_of_mass(planned)
                confirmed = _confirmed(planned["plan"])
            except KeyboardInterrupt:
                confirmed = False
            if not confirmed:
                return complain("not confirmed: nothing was canceled", Exit.INTERRUPTED)
        pending = _start_mass(client, scope, arguments, dry_run=False)
        return _see_through(client, pending, arguments)


def _planned(
    client: CancelClient, scope: Mapping[str, Any], arguments: argparse.Namespace
) -> dict[str, Any] | None:
    """The report of a dry run; None when there is none in time."""
    pending = _start_mass(client, scope, arguments, dry_run=True)
    shown = list(pending.progress(arguments.timeout, silence=MASS_SILENCE_S))[-1:]
    return next((report for report in shown if "flat" in report), None)


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
        allow_side_effects=arguments.allow_side_effects,
    )


def _confirmed(plan: Mapping[str, Any]) -> bool:
    found = f"{plan['orders']} orders" if plan["orders"] else "0 orders (nothing rests in this scope now)"
    question = f"Cancel {found}, and new ones that enter this scope meanwhile? [y/N] "
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _see_through(client: CancelClient, pending: PendingMass, arguments: argparse.Namespace) -> int:
    """Shows the progress, then the report; the exit code."""
    request_id = pending.request_id
    bar = _Bar(client.mass_plan, request_id)
    look = f"cancelctl mass show {request_id}"
    try:
        print(f"cancelctl: mass cancel {request_id} is accepted", file=sys.stderr, flush=True)
        for shown in pending.progress(arguments.timeout, silence=MASS_SILENCE_S):
            if "flat" in shown:
                bar.end()
                show_report(shown, as_json=arguments.json)
                nothing = shown["flat"] and not shown["orders_affected"] and not shown["plan"]["orders"]
                if nothing and not shown["canceled_by_command"]:
                    complain("no order rested in this scope: is it the scope that you meant?", Exit.SETTLED)
                return exit_of_mass(shown)
            bar.show(shown)
    except KeyboardInterrupt:
        bar.end()
        with suppress(StoreError):
            if client.knows_mass_cancel(request_id):
                return complain(f"interrupted; mass cancel {request_id} goes on; {look}", Exit.INTERRUPTED)
        return complain(f"interrupted: this ends only the waiting; {look}", Exit.INTERRUPTED)
    except Lost as lost:
        bar.end()
        return complain(str(lost), Exit.REDIS)
    except StoreError as error:
        bar.end()
        return complain(f"cannot follow the mass cancel: {error}; {look}", Exit.REDIS)
    bar.end()
    return complain(f"no report yet, mass cancel {request_id} goes on; {look}", Exit.NOT_SETTLED)


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
        return f", {rate:.0f}/s, {duration(progress['open'] / rate)} left{tokens}"


def _mass_list(arguments: argparse.Namespace) -> int:
    _refuse_scope(arguments)
    rows = []
    for request_id, accepted_at, shown in CancelClient.from_env(preload=False).mass_cancels():
        if arguments.json:
            known = {name: value for name, value in (shown or {}).items() if name not in _LONG_FIELDS}
            print_json({"request_id": request_id, "accepted_at": accepted_at, "flat": None, **known})
        else:
            rows.append([request_id, accepted_at, *_mass_cells(shown or {})])
    if not arguments.json:
        titles = ("REQUEST", "ACCEPTED", "STATE", "ORDERS", "CONTRACTS", "WHO", "REASON")
        print_table(titles, rows, nothing="no mass cancels")
    return Exit.SETTLED


_LONG_FIELDS = ("affected", "not_affected", "canceled_by_command")


def _mass_cells(shown: Mapping[str, Any]) -> list[str]:
    if "flat" not in shown:
        state = f"{shown['settled']} of {shown['orders']} settled" if shown else "waiting"
        return [state, "-", "-", "-", "-"]
    if "error" in shown:
        return [mass_state(shown), "-", "-", "-", "-"]
    orders, contracts = shown["orders_affected"], shown["contracts_canceled"]
    if shown["dry_run"]:
        orders, contracts = shown["plan"]["orders"], shown["plan"]["contracts"]
    return [
        mass_state(shown),
        str(orders),
        contracts,
        shown["requested_by"] or "-",
        shown["reason"] or "-",
    ]


def _mass_show(arguments: argparse.Namespace) -> int:
    _refuse_scope(arguments)
    client, request_id = CancelClient.from_env(preload=False), arguments.request_id
    shown = client.mass_status(request_id)
    if shown is None:
        waits = any(known == request_id for known, _, _ in client.mass_cancels())
        words = "waits for a worker" if waits else "not known: nobody asked for it, or its report has expired"
        return complain(f"{request_id}: {words}", Exit.NOT_SETTLED if waits else Exit.NOT_KNOWN_HERE)
    if "flat" not in shown:
        if arguments.json:
            print_json(shown)
        else:
            print_lines({name: str(value) for name, value in shown.items()})
        return Exit.NOT_SETTLED
    show_report(shown, as_json=arguments.json)
    return exit_of_mass(shown)


def _refuse_scope(arguments: argparse.Namespace) -> None:
    if _scope(arguments):
        raise UsageError("list and show take no scope")
