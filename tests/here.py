"""The command line, run in this process: its start takes half a second, and is tested elsewhere."""

from __future__ import annotations

import io
import logging
import os
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import pytest

from kalshi_cancel import cli
from trials.stack import ROOT


@dataclass(frozen=True, slots=True)
class Ran:
    """The exit code of a command, and what it has printed."""

    returncode: int
    stdout: str
    stderr: str


def cancelctl(*arguments, env, folder=ROOT) -> Ran:
    """Runs a command with this environment and no other, in a folder, without a terminal."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name in list(os.environ):
            patch.delenv(name)
        for name, value in env.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        ours = logging.getLogger("kalshi_cancel")
        level = ours.level  # which a command may set for its process
        try:
            code = cli.main(arguments)
        except SystemExit as end:  # as argparse ends it
            code = end.code
        finally:
            ours.setLevel(level)
    return Ran(code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode())
