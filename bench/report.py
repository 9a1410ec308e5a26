"""Keeps what the benchmarks found as JSON, and writes the document from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def keep(folder: Path, part: str, *, command: str, facts: dict[str, Any], found: Any) -> None:
    """Puts one benchmark's findings beside the other's, and writes the document anew."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "performance.json").write_text(
        json.dumps({part: {"command": command, "facts": facts, "found": found}}, indent=1)
    )
