"""Variables that are not ours: mistyped ones, and those that other libraries read."""

from __future__ import annotations

import os
from collections.abc import Mapping

from kalshi_cancel.settings.near_misses import nearest
from kalshi_cancel.settings.variables import BY_NAME, OURS


def foreign_variables(env: Mapping[str, str] | None = None) -> dict[str, str | None]:
    """The variables that look like ours and are not, each with the one that was meant, None for none."""
    env = os.environ if env is None else env
    found: dict[str, str | None] = {}
    known = OURS | {name: name for name in BY_NAME if name not in OURS.values()}
    for name in env:
        prefix, _, rest = name.partition("_")
        is_prefix = prefix.upper() == "KALSHI" or nearest(prefix, ["KALSHI"]) is not None
        if name in BY_NAME or not is_prefix or not env[name].strip():
            continue
        meant = rest if rest in known else nearest(rest, known)
        if meant is not None or prefix == "KALSHI":
            found[name] = known.get(meant or "")
    return found


def read_traces_exporter(env: Mapping[str, str] | None = None) -> str | None:
    """``otlp`` or ``console`` where OpenTelemetry's own variables ask for traces, else None."""
    env = os.environ if env is None else env
    if (env.get("OTEL_SDK_DISABLED") or "").strip().lower() == "true":
        return None
    named = (env.get("OTEL_TRACES_EXPORTER") or "").strip().lower()
    addressed = env.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or env.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if named in {"otlp", "console"}:
        return named
    return "otlp" if addressed and not named else None


def count_in_files(folder: str | None) -> None:
    """Has prometheus_client count in files of this folder, or in memory; it reads that nowhere else.

    Whatever the environment says of it is overruled: two workers that count in one folder count wrong.
    """
    for name in ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"):
        os.environ.pop(name, None)
    if folder is not None:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
