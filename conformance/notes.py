"""What is noted of an answer, as a line of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from conformance.watching import Answered


@dataclass(frozen=True, slots=True)
class Noted:
    """One answer in one test. `odd`: what made the sandbox answer oddly; `taken`: as good, by our code.

    `made_up`: by the test itself; then `endpoint` may be the name of a part of answers, too.
    """

    test: str
    made_up: bool
    endpoint: str
    status: int
    body: str
    odd: str | None = None
    taken: bool = False

    @classmethod
    def of(cls, test: str, answered: Answered) -> Noted:
        """A sandbox's answer in a test."""
        body = answered.body.decode()
        return cls(test, False, answered.endpoint, answered.status, body, answered.odd)  # noqa: FBT003  # a field

    def to_line(self) -> str:
        """A line of JSON."""
        return json.dumps(asdict(self)) + "\n"


def read_notes(path: Path) -> list[Noted]:
    """The notes in a file."""
    return [Noted(**json.loads(line)) for line in path.read_text().splitlines()]
