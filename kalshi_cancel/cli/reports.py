"""Prints a mass cancel's plan and report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from kalshi_cancel.cli.exits import Exit
from kalshi_cancel.cli.printing import duration, print_json, print_lines, print_table

ORDERS_SHOWN = 20  # of those that a mass cancel did not cancel


def mass_state(report: Mapping[str, Any]) -> str:
    """A report in a word."""
    if "error" in report:
        return "NOT DONE"
    if report["dry_run"]:
        return "planned only"
    return "flat" if report["flat"] else "NOT FLAT"


def exit_of_mass(report: Mapping[str, Any]) -> Exit:
    """A report's exit code."""
    if "error" in report:
        return Exit.NOT_FLAT
    if report["dry_run"]:
        return Exit.SETTLED if report["plan"]["listed_at"] else Exit.NOT_FLAT
    return Exit.SETTLED if report["flat"] else Exit.NOT_FLAT


def show_report(report: Mapping[str, Any], *, as_json: bool) -> None:
    """Shows a report, or the plan of a dry run."""
    if as_json:
        print_json(report)
        return
    if "error" in report:
        print_lines({"request": str(report["request_id"]), "flat": f"NO: {report['error']}"})
        return
    print_lines(_plan_lines(report) if report["dry_run"] else _report_lines(report))
    exposed = [each for each in report["not_affected"] if not each["reason"].startswith("too_late")]
    rows = [[each["order_id"], each["reason"], each["error"] or ""] for each in exposed[:ORDERS_SHOWN]]
    if rows:
        print()
        print_table(("ORDER", "NOT CANCELED", "ERROR"), rows)
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
        "predicted": f"flat in {duration(plan['predicted_s'])}",
        **{
            f"shard {shard}": f"{orders} orders: {plan['paths'].get(shard) or plan['paths']['all']}"
            for shard, orders in plan["shards"].items()
        },
        "listed": plan["listed_at"] or f"no: {report['why_not_flat']}",
    }


def _report_lines(report: Mapping[str, Any]) -> dict[str, str]:
    proof, actual_s, proven_s = report["flat_listing"], report["actual_s"], report["proven_s"]
    command, hit = report["command"], report["canceled_by_command"]
    reasons = Counter(each["reason"] for each in report["not_affected"])
    others = "".join(f", {number} {reason}" for reason, number in reasons.most_common())
    return {
        "request": report["request_id"],
        "scope": json.dumps(report["scope"]),
        "flat": f"yes, proven by the listing of {proof['at']} (sha256 {proof['sha256'][:12]}...)"
        if report["flat"]
        else f"NO: {report['why_not_flat']}",
        "orders": f"{report['orders_affected']} canceled{others}",
        "contracts": f"{report['contracts_canceled']} canceled{_unknown(report['orders_count_unknown'])},"
        f" {report['contracts_filled_meanwhile']} filled meanwhile{_unknown(report['orders_fills_unknown'])}",
        **({"command": f"{command['what']}: {command['answer']}"} if command else {}),
        **({"also hit": f"{len(hit)} orders placed after the command; --json names them"} if hit else {}),
        **_key_line(report["key"]),
        "tokens": f"{report['tokens_spent']:.0f}, {report['rate_limited']} rate-limit errors (429)",
        "time": f"{'-' if actual_s is None else duration(actual_s)},"
        f" predicted {duration(report['predicted_s'])}"
        + ("" if proven_s is None else f", proven after {duration(proven_s)}"),
    }


def _unknown(orders: int) -> str:
    """What is said beside a sum of which so many orders' part is not proven."""
    return f" ({orders} orders: not known)" if orders else ""


def _key_line(key: Mapping[str, Any] | None) -> dict[str, str]:
    """What the key sees and may do, where that is less than all."""
    if key is None:
        return {"key": "could not read what it may see"}
    sees = [] if key["subaccount"] is None else [f"sees subaccount {key['subaccount']} only"]
    may = [] if key["may_cancel"] else ["may not cancel"]
    return {"key": ", ".join(sees + may)} if sees or may else {}
