"""Starts the sandbox with a key made for it: `cancelctl sandbox`."""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from kalshi_cancel.cli.line import Subparsers, add_command


def add_sandbox(commands: Subparsers) -> None:
    """Adds `sandbox`."""
    add_command(
        commands,
        "sandbox",
        run,
        about="run a local exchange for tests; `cancelctl sandbox --help` lists its arguments",
        examples="  cancelctl sandbox --sample\n"
        "  cancelctl sandbox --port 8765 --tier basic\n"
        "  cancelctl sandbox --help",
        add_help=False,  # --help is the sandbox's own
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the sandbox as a child; without a key of the caller's own, with one made for this run."""
    with tempfile.TemporaryDirectory(prefix="cancelctl-sandbox-") as folder:
        options, exports = list(arguments.beyond), {}
        if not any(option.startswith(("--key-id", "--public-key")) for option in options):
            key_id, private_path, public_path = _make_key(Path(folder))
            options += ["--key-id", key_id, "--public-key", str(public_path)]
            exports = {"KALSHI_API_KEY_ID": key_id, "KALSHI_PRIVATE_KEY_PATH": str(private_path)}
        return _run_child(options, exports)


def _run_child(options: Sequence[str], exports: dict[str, str]) -> int:
    """Passes the sandbox's output on, with the environment it asks for; its exit code."""
    sandbox = subprocess.Popen(  # noqa: S603 - our own program, with the caller's own arguments
        [sys.executable, "-m", "kalshi_cancel.sandbox", *options], stdout=subprocess.PIPE, text=True
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
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 - see cli.doctor
    from cryptography.hazmat.primitives.asymmetric import rsa  # noqa: PLC0415 - see cli.doctor

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
