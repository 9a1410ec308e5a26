"""Verifies, exports and shows the audit log: `cancelctl audit` and `cancelctl history`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kalshi_cancel.cli.exits import Exit, UsageError, complain
from kalshi_cancel.cli.exports import FORMATS, opened
from kalshi_cancel.cli.line import Subparsers, add_command, add_json
from kalshi_cancel.cli.printing import duration, print_json, print_line
from kalshi_cancel.model.times import utc_text
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store.audit import AuditLog, Noted
from kalshi_cancel.store.scripts import StoreError, connect


def _audit_log() -> AuditLog:
    settings = RedisSettings.from_env()
    return AuditLog(connect(settings), settings)


# --- audit ------------------------------------------------------------------------------------------------


def add_audit(commands: Subparsers) -> None:
    """Adds `audit`."""
    command = add_command(
        commands,
        "audit",
        _verify,
        about="verify or export the audit log of everything that was asked for and done",
        examples="  cancelctl audit verify\n"
        "  cancelctl audit export --since 2026-11-22 --until 2026-11-23 > day.jsonl\n"
        "  cancelctl audit export --format parquet --out audit.parquet --resume",
    )
    deeds = command.add_subparsers(title="what to do", metavar="verify | export", required=True)
    verify = add_command(
        deeds,
        "verify",
        _verify,
        about="check whether anything in the audit log was changed or removed",
        examples="  cancelctl audit verify\n  cancelctl audit verify --json | jq -r .head",
    )
    add_json(verify)
    export = add_command(
        deeds,
        "export",
        _export,
        about="write the audit log's entries to a file or to stdout, oldest first",
        examples="  cancelctl audit export --out audit.jsonl --resume\n"
        "  cancelctl audit export --format csv --since 2026-11-22T09:30:00-05:00 | less\n"
        "  cancelctl audit export --format parquet --out audit.parquet",
    )
    export.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=f"({FORMATS[0]})")
    since = "from this time on (ISO 8601, UTC unless it has an offset), or from where the file ends"
    export.add_argument("--since", metavar="T", type=_moment_ms, help=since)
    export.add_argument("--until", metavar="T", type=_moment_ms, help="before this time")
    export.add_argument("--out", metavar="FILE", type=Path, help="the file to write (stdout)")
    export.add_argument("--resume", action="store_true", help="continue the file, if it exists")


def _moment_ms(text: str) -> int:
    """A time for argparse."""
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return max(round(moment.timestamp() * 1000), 0)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected a time like 2026-11-22T10:00:00Z, got {text!r}") from None


def _verify(arguments: argparse.Namespace) -> int:
    verdict = _audit_log().verify()
    if arguments.json:
        print_json(asdict(verdict))
    elif verdict.problem is None:
        begun = ", after older ones that were trimmed" if verdict.trimmed else ""
        print_line([f"intact entries: {verdict.entries}{begun}; the last hash is {verdict.head or '-'}"], [0])
    if verdict.missing and not arguments.json:
        print_line([f"missing: {verdict.missing}, which could not be written; gaps: {verdict.gaps}"], [0])
    if verdict.problem is None:
        return Exit.SETTLED
    return complain(f"after {verdict.entries} intact entries, {verdict.problem}", Exit.REFUSED)


def _export(arguments: argparse.Namespace) -> int:
    if arguments.resume and arguments.out is None:
        raise UsageError("--resume needs --out: only a file can be continued")
    audit_log = _audit_log()
    with opened(arguments.format, arguments.out, resume=arguments.resume) as export:
        export.write(
            audit_log.read(since_ms=arguments.since, until_ms=arguments.until, after_id=export.last_id)
        )
    if not export.last_id:
        print("cancelctl: there was nothing to export", file=sys.stderr)
        return Exit.SETTLED
    try:
        whole = audit_log.note_exported(export.first_id, export.last_id)
    except StoreError as error:
        return complain(f"exported, but could not record how far: {error}", Exit.REDIS)
    gap = "" if whole else "; older entries that are not exported yet are left out"
    print(f"cancelctl: exported up to {export.last_id}{gap}", file=sys.stderr)
    return Exit.SETTLED


# --- history ----------------------------------------------------------------------------------------------


def add_history(commands: Subparsers) -> None:
    """Adds `history`."""
    command = add_command(
        commands,
        "history",
        _history,
        about="show the history of one order: who asked and why, each call, the outcome",
        examples="  cancelctl history 3f2c1e0a-...\n  cancelctl history --json 3f2c1e0a-... | jq .kind",
    )
    command.add_argument("order_id", metavar="ORDER_ID", help="the exchange's order id")
    add_json(command)


def _history(arguments: argparse.Namespace) -> int:
    order_id, known = arguments.order_id, False
    for noted in _audit_log().read():
        if order_id not in noted.body:  # most are about others: only what may be meant is parsed
            continue
        lines = list(_for_audit(noted, order_id))
        known = known or bool(lines)
        if lines and arguments.json:
            at = utc_text(noted.at_ms / 1000)
            print_json({"id": noted.entry_id, "at": at, "kind": noted.kind, "lines": lines})
        elif lines:
            for line in lines:
                print_line([utc_text(noted.at_ms / 1000), line], [0, 0])
    if known:
        return Exit.SETTLED
    return complain(f"the audit log has no entry about {order_id}", Exit.NOT_KNOWN_HERE)


def _for_audit(noted: Noted, order_id: str) -> Iterator[str]:
    """What an entry tells of an order, in plain lines; nothing when it is about others, or spoilt."""
    lines_of = _LINES.get(noted.kind)
    if lines_of is None:
        return
    try:
        yield from lines_of(noted.fields(), order_id)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        yield f"an entry of kind {noted.kind} that cannot be read"


def _request(body: Mapping[str, Any], order_id: str) -> Iterator[str]:
    for order in body["orders"]:
        if order["order_id"] == order_id:
            who, reason = order.get("requested_by") or "somebody without a name", order.get("reason")
            known_by = f" (request {order['request_id']})" if order.get("request_id") else ""
            yield f"asked for by {who}, {body['lane']} lane{known_by}" + (f": {reason}" if reason else "")


def _refused(body: Mapping[str, Any], order_id: str) -> Iterator[str]:
    if body["order_id"] == order_id:
        yield f"a request was refused: {body['error']}"


def _work(body: Mapping[str, Any], order_id: str) -> Iterator[str]:
    if order_id not in body["orders"]:
        return
    worker = body.get("worker")
    for call in body["calls"]:
        orders = call["orders"]
        if isinstance(orders, list):
            if order_id not in orders:
                continue
            orders = len(orders)
        doing = f"batch of {orders}" if call["operation"] == "batch" else call["operation"].replace("_", " ")
        answer = "no answer" if call["status"] is None else call["status"]
        code = f" ({call['code']})" if call.get("code") not in {None, "unanswered"} else ""
        by = f" by {worker}" if worker else ""
        cost = f"{call['tokens']:g} tokens of {call['bucket']}"
        yield f"{doing}{by}: {answer}{code} in {call['ms']:.1f} ms, {cost}"
    yield _conclusion(body["orders"][order_id])


def _conclusion(conclusion: Sequence[Any]) -> str:
    match conclusion:
        case ["settled", outcome, reduced_by, attempts]:
            removed = "" if reduced_by is None else f", {reduced_by} contracts removed"
            return f"settled: {outcome}{removed}, attempts: {attempts}"
        case ["open", pause_ms, code]:
            return f"not settled yet ({code or 'no problem'}): due again in {duration(pause_ms / 1000)}"
        case ["dead", code]:
            return f"given up ({code or 'no problem'}): a dead letter"
    raise ValueError(conclusion)


def _unresolved(body: Mapping[str, Any], order_id: str) -> Iterator[str]:
    if order_id in body["orders"]:
        yield "its deadline passed without proof: waiters are told unresolved, and workers keep trying"


def _lost(body: Mapping[str, Any], order_id: str) -> Iterator[str]:
    if order_id in body["orders"]:
        yield "this sender had lost the cancel (to another, or to an earlier try): ignore the line before"


def _mass(body: Mapping[str, Any], order_id: str) -> Iterator[str]:
    if order_id in (body.get("scope") or {}).get("order_ids", ()):
        yield f"mass cancel {body['request_id']}, which names it: {body['step'].replace('_', ' ')}"


def _operator(body: Mapping[str, Any], order_id: str) -> Iterator[str]:
    if order_id in body["orders"]:
        yield f"{body['action']} by {body['who']}" + (f": {body['why']}" if body.get("why") else "")


_LINES = {
    "request": _request,
    "refused": _refused,
    "work": _work,
    "unresolved": _unresolved,
    "lost": _lost,
    "mass": _mass,
    "operator": _operator,
}
