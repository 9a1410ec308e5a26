"""The request for a mass cancel, as a value: parsed once, refused by field name, and kept as JSON."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kalshi_cancel.model.fields import MASS_CANCEL, BadRequest
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
        try:
            values = MASS_CANCEL.parse(message)
        except BadRequest as bad:
            problems |= bad.problems
        if "scope" not in problems:
            try:
                values["scope"] = Scope.parse(message["scope"], now_s=time.time() if now_s is None else now_s)
            except BadRequest as bad:
                problems |= {
                    name if name == "scope" else f"scope.{name}": why for name, why in bad.problems.items()
                }
        if problems:
            raise BadRequest(problems)
        return cls(**{"request_id": str(uuid.uuid4()), **values})

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
        """What :meth:`to_json` wrote, without fields that only newer versions of us know.

        Raises BadRequest for what is no such request. Of the scope, each field counts: without one that only
        a newer version knows, more would be canceled than is meant.
        """
        kept = MASS_CANCEL.parse(value, may_have_more=True)
        accepted_at = value.get("accepted_at")
        kept["accepted_at"] = accepted_at if isinstance(accepted_at, str) else ""
        return cls(**{**kept, "scope": Scope.from_json(value["scope"])})
