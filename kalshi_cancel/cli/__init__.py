"""Runs `cancelctl`: asks for cancels, shows what is known of them, and finds what is wrong.

One file for each group of commands; `exits` has what their exit codes mean.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence

import redis

from kalshi_cancel.cli import audit, cancels, dead, doctor, health, mass, sandbox, top
from kalshi_cancel.cli.exits import CODES_IN_HELP, Exit, UsageError, complain, words_of
from kalshi_cancel.cli.line import Subparsers
from kalshi_cancel.model.fields import BadRequest
from kalshi_cancel.settings.reader import SettingsError
from kalshi_cancel.store.redis_errors import words
from kalshi_cancel.store.scripts import StoreError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code. Errors that can be expected are one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name in another alphabet must not end a table
    logging.basicConfig(format="cancelctl: %(message)s", level=logging.WARNING)
    command_line = parser()
    arguments, beyond = command_line.parse_known_args(argv)
    if beyond and arguments.run is not sandbox.run:
        command_line.error(f"unrecognized arguments: {' '.join(beyond)}")
    arguments.beyond = beyond
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except (SettingsError, UsageError) as error:
        return complain(str(error), Exit.USAGE)
    except BadRequest as bad:
        return complain(words_of(bad), Exit.USAGE)
    except StoreError as error:
        return complain(str(error), Exit.REDIS)
    except redis.RedisError as error:
        return complain(words(error), Exit.REDIS)
    except KeyboardInterrupt:
        return complain(
            "interrupted: this ends only the waiting; accepted cancels stay accepted", Exit.INTERRUPTED
        )
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.READER_GONE
    return code


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    whole = argparse.ArgumentParser(
        prog="cancelctl",
        description="Cancels orders through the workers, and shows their outcomes. Needs REDIS_URL only;"
        " `doctor` also needs the workers' environment.",
        epilog=CODES_IN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action=_Version, nargs=0, help="show the installed version and exit")
    commands = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    return whole


class _Version(argparse.Action):
    """Shows the version of the installation; it is looked up only when somebody asks."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Prints the version and ends the command."""
        from importlib import metadata  # noqa: PLC0415 - takes longer than most commands' imports

        try:
            version = metadata.version("kalshi-cancel")
        except metadata.PackageNotFoundError:
            version = "(not installed)"
        print(parser.prog, version)
        parser.exit()


# In the order of the help text.
COMMANDS: tuple[Callable[[Subparsers], None], ...] = (
    cancels.add_cancel,
    cancels.add_status,
    cancels.add_open,
    top.add_top,
    dead.add_dead,
    dead.add_retry,
    mass.add_mass,
    audit.add_history,
    audit.add_audit,
    doctor.add_doctor,
    health.add_health,
    sandbox.add_sandbox,
)
