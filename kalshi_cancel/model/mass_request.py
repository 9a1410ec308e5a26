"""The request for a mass cancel, as a value: parsed once, refused by field name, and kept as JSON."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from kalshi_cancel.model.orders import (
    DEADLINE_MAX_S,
    TEXT_MAX_CHARS,
    BadRequest,
    is_order_id,
    is_traceparent,
)
from kalshi_cancel.model.scope import Scope

# The exchange's own mass commands, as a plan and a report name them.
CANCEL_ALL = "cancel_all"
GROUP_TRIGGER = "order_group_trigger"


@dataclass(frozen=True, slots=True)
class MassRequest:
    """A mass cancel as it was asked for; ``deadline_s`` counts beyond the predicted time to flat.

    ``allow_side_effects``: the exchange's own mass commands may be used where they fit, with what they do
    besides: its cancel-all may also cancel orders that come during the next minute, and an order group's
    trigger closes the group for new orders until it is reset. ``traceparent``: the span that its traces, and
    those of its orders, hang on.
    """

    request_id: str
    scope: Scope
    requested_by: str | None = None
    reason: str | None = None
    automated: bool = True
    dry_run: bool = False
    deadline_s: float = 60.0
    allow_side_effects: bool = False
    traceparent: str | None = None
    accepted_at: str = ""

    @classmethod
    def parse(cls, message: Mapping[str, Any], *, now_s: float | None = None) -> MassRequest:
        """The mass cancel that a message asks for; raises BadRequest naming every bad field.

        ``now_s``: epoch seconds by Redis' clock (None: by this host's).
        """
        problems: dict[str, str] = {}
        values: dict[str, Any] = {}
        for name, given in message.items():
            check, expected = _CHECKS.get(name, (None, ""))
            if check is None:
                problems[ascii(name)] = f"unknown field; known are {', '.join(sorted(_CHECKS))}"
            elif given is not None and not check(given):
                problems[name] = f"expected {expected}, got {ascii(given)[:60]}"
            elif given is not None:
                values[name] = given
        try:
            scope = Scope.parse(message.get("scope"), now_s=time.time() if now_s is None else now_s)
        except BadRequest as bad:
            problems.update(
                {name if name == "scope" else f"scope.{name}": why for name, why in bad.problems.items()}
            )
        if problems:
            raise BadRequest(problems)
        return cls(
            **{
                "request_id": str(uuid.uuid4()),
                **values,
                "scope": scope,
            }
        )

    def to_json(self) -> dict[str, Any]:
        """The stored form."""
        return {
            "request_id": self.request_id,
            "scope": self.scope.to_json(),
            "requested_by": self.requested_by,
            "reason": self.reason,
            "automated": self.automated,
            "dry_run": self.dry_run,
            "deadline_s": self.deadline_s,
            "allow_side_effects": self.allow_side_effects,
            "traceparent": self.traceparent,
            "accepted_at": self.accepted_at,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MassRequest:
        """What :meth:`to_json` wrote, without fields that only newer versions of us know."""
        known = {field.name for field in fields(cls)}
        kept = {name: each for name, each in value.items() if name in known}
        return cls(**{**kept, "scope": Scope.from_json(value["scope"])})


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= TEXT_MAX_CHARS and value.isprintable()


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_deadline(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= DEADLINE_MAX_S


_TEXT = f"printable text of at most {TEXT_MAX_CHARS} characters"
_CHECKS: dict[str, tuple[Callable[[object], bool], str]] = {
    "request_id": (is_order_id, "1 to 128 letters, digits, '-' or '_'"),
    "scope": (lambda _value: True, ""),
    "requested_by": (_is_text, _TEXT),
    "reason": (_is_text, _TEXT),
    "automated": (_is_flag, "true or false"),
    "dry_run": (_is_flag, "true or false"),
    "allow_side_effects": (_is_flag, "true or false"),
    "deadline_s": (_is_deadline, f"seconds, above 0 and at most {DEADLINE_MAX_S:g}"),
    "traceparent": (is_traceparent, "a W3C traceparent like 00-{32 hex digits}-{16 hex digits}-01"),
}
