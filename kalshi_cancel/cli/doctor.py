"""Prints the doctor's findings: `cancelctl doctor`."""

from __future__ import annotations

import argparse
import logging

from kalshi_cancel.cli.exits import Exit
from kalshi_cancel.cli.line import Subparsers, add_command, add_json
from kalshi_cancel.cli.printing import print_json, print_line


def add_doctor(commands: Subparsers) -> None:
    """Adds `doctor`."""
    command = add_command(
        commands,
        "doctor",
        _run,
        about="check settings, Redis, the key and the account, and say how to fix each problem",
        examples="  cancelctl doctor\n"
        "  cancelctl doctor --producer\n"
        "  cancelctl doctor --json | jq -r 'select(.health != \"ok\") | .advice'",
    )
    command.add_argument("--producer", action="store_true", help="only what a producer needs: Redis")
    add_json(command)


def _run(arguments: argparse.Namespace) -> int:
    from kalshi_cancel.doctor import Health, examine  # noqa: PLC0415 - HTTP and keys are no part of the producers' side

    logging.getLogger("kalshi_cancel").setLevel(logging.CRITICAL)  # the findings say it all
    code = Exit.SETTLED
    for finding in examine(producer=arguments.producer):
        if finding.health is Health.FAILED:
            code = Exit.REFUSED
        if arguments.json:
            print_json(finding.to_json())
            continue
        print_line([finding.health, finding.check, finding.found], _DOCTOR_WIDTHS)
        if finding.advice:
            print_line(["", "", f"-> {finding.advice}"], _DOCTOR_WIDTHS)
    return code


_DOCTOR_WIDTHS = (len("warning"), len("redis version"), 0)
