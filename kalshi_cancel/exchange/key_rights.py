"""What the account's key may do and see, read out of the exchange's list of keys (``GET /api_keys``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kalshi_cancel.model.scope import Scope

# Scopes that let a key cancel orders: the broad one, and the one for orders alone.
_CANCELING = frozenset({"write", "write::trade"})


@dataclass(frozen=True, slots=True)
class KeyRights:
    """One key: the subaccount that it is confined to (None: it sees all), and the scopes that it has."""

    subaccount: int | None
    scopes: tuple[str, ...]

    @property
    def may_cancel(self) -> bool:
        """Whether it may cancel orders."""
        return not _CANCELING.isdisjoint(self.scopes)

    def sees_all_of(self, scope: Scope) -> bool:
        """Whether no order of the scope is hidden from it."""
        return self.subaccount is None or self.subaccount == scope.subaccount

    def to_json(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"subaccount": self.subaccount, "scopes": list(self.scopes), "may_cancel": self.may_cancel}


def rights_of(key_id: str, answer: Mapping[str, Any]) -> KeyRights | None:
    """The rights of a key in the exchange's list of all; None when they cannot be read."""
    listed = answer.get("api_keys")
    for each in listed if isinstance(listed, list) else []:
        if isinstance(each, Mapping) and each.get("api_key_id") == key_id:
            scopes, subaccount = each.get("scopes"), each.get("subaccount")
            is_number = isinstance(subaccount, int | None) and not isinstance(subaccount, bool)
            if not is_number or not isinstance(scopes, list):
                return None
            return KeyRights(subaccount, tuple(scope for scope in scopes if isinstance(scope, str)))
    return None
