"""Shows the service live in a terminal, and restores the terminal at the end: `cancelctl top`."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from kalshi_cancel.cli.exits import Exit
from kalshi_cancel.cli.frame import frame
from kalshi_cancel.cli.line import Subparsers, add_command, add_json
from kalshi_cancel.cli.printing import print_json
from kalshi_cancel.cli.snapshot import Snapshot, Watcher
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store.scripts import StoreError

REFRESH_S = 1.0
COLUMNS, LINES = 80, 24  # where nobody says
# Alternate screen and hidden cursor, and back.
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
# Each frame is written over the one before, line by line, in one write: nothing is blank in between.
_HOME, _END_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


def add_top(commands: Subparsers) -> None:
    """Adds `top`."""
    command = add_command(
        commands,
        "top",
        _top,
        about="watch the service live: lanes, rates, ages, buckets, mass cancels, workers; q ends it",
        examples="  cancelctl top\n  cancelctl top --once\n  cancelctl top --json | jq .lanes",
    )
    command.add_argument("--once", action="store_true", help="print one snapshot (as without a terminal)")
    add_json(command)


def _top(arguments: argparse.Namespace) -> int:
    watcher = Watcher(RedisSettings.from_env())
    if arguments.json:
        print_json(asdict(watcher.snapshot()))
    elif arguments.once or not sys.stdout.isatty():
        print(frame(watcher.snapshot(), _size()[0]))
    else:
        _watch(watcher)
    return Exit.SETTLED


def _watch(watcher: Watcher) -> None:
    """Shows frame after frame until q or an interrupt; an outage of Redis is shown and waited out."""
    snapshot: Snapshot = watcher.snapshot()  # what is wrong from the start is said outside of the screen
    failure = ""
    with _screen():
        while True:
            _draw(frame(snapshot, *_size(), failure=failure))
            if _asked_to_end(REFRESH_S):
                return
            try:
                snapshot, failure = watcher.snapshot(), ""
            except StoreError as error:
                failure = str(error)


def _size() -> tuple[int, int]:
    try:
        columns, lines = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        columns, lines = 0, 0
    # (Behind a full line the cursor stands on its last column, which erasing the rest would take along.)
    return (columns or COLUMNS) - 1, lines or LINES


def _draw(text: str) -> None:
    lines = (line + _END_OF_LINE for line in text.split("\n"))
    sys.stdout.write(_HOME + "\r\n".join(lines) + _REST_OF_SCREEN)
    sys.stdout.flush()


def _asked_to_end(within_s: float) -> bool:
    """Whether q is typed or an interrupt comes within the time."""
    give_up = time.monotonic() + within_s
    try:
        while (left_s := give_up - time.monotonic()) > 0:
            if not sys.stdin.isatty():
                time.sleep(left_s)
            elif select.select([sys.stdin], [], [], left_s)[0]:
                typed = os.read(sys.stdin.fileno(), 64)
                if not typed or b"q" in typed.lower():
                    return True
    except KeyboardInterrupt:
        return True
    return False


@contextmanager
def _screen() -> Iterator[None]:
    """A screen of its own, without an echo of what is typed; the terminal is as it was, however it ends."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    before = termios.tcgetattr(sys.stdin) if sys.stdin.isatty() else None
    try:
        if before is not None:
            tty.setcbreak(sys.stdin)
        sys.stdout.write(_ENTER)
        yield
    except KeyboardInterrupt:
        pass  # as good as q
    finally:
        if before is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()
