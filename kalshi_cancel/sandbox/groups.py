"""Order groups as the exchange serves them: cancels for a whole group, and a closed door behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kalshi_cancel.sandbox.forms import counted
from kalshi_cancel.sandbox.visit import Answer, Visit, as_decimal, as_integer

if TYPE_CHECKING:
    from kalshi_cancel.sandbox.market import Group


def create_group(visit: Visit) -> Answer:
    """A new group on one shard."""
    fields = visit.fields()
    group = visit.market.add_group(
        contracts_limit=_limit(fields),
        exchange_index=as_integer(fields.get("exchange_index"), "exchange_index") or 0,
        subaccount=visit.write_subaccount(as_integer(fields.get("subaccount"), "subaccount")) or 0,
    )
    address = {"subaccount": group.subaccount, "exchange_index": group.exchange_index}
    return 201, {"order_group_id": group.group_id, **address}


def list_groups(visit: Visit) -> Answer:
    """All groups of a subaccount or of all, without their orders."""
    subaccount = visit.read_subaccount(visit.integer("subaccount"))
    return 200, {
        "order_groups": [
            {"id": group.group_id, **_fields(group)}
            for group in visit.market.groups.values()
            if subaccount in {None, group.subaccount}
        ]
    }


def read_group(visit: Visit) -> Answer:
    """One group and the ids of its resting orders, wherever it is."""
    group = visit.group(
        visit.path_parameters["group_id"],
        exchange_index=visit.integer("exchange_index"),
        subaccount=visit.read_subaccount(visit.integer("subaccount")),
    )
    orders = [order.order_id for order in group.members.values() if order.state.status == "resting"]
    return 200, {**_fields(group), "orders": orders}


def trigger_group(visit: Visit) -> Answer:
    """Cancels the group's orders and lets no new ones in until it is reset."""
    _cancel_members(visit).triggered = True
    return 200, {}


def reset_group(visit: Visit) -> Answer:
    """Lets new orders in again."""
    _named(visit).triggered = False
    return 200, {}


def limit_group(visit: Visit) -> Answer:
    """Another contracts limit (kept and shown; the sandbox's fills do not count against it)."""
    group = _named(visit)
    group.contracts_limit = _limit(visit.fields())
    return 200, {}


def delete_group(visit: Visit) -> Answer:
    """Cancels the group's orders and forgets the group."""
    del visit.market.groups[_cancel_members(visit).group_id]
    return 200, {}


def _cancel_members(visit: Visit) -> Group:
    group = _named(visit)
    if not visit.settings.exchange_active(group.exchange_index):
        raise visit.paused("exchange_is_paused")
    for order in group.members.values():
        if order.state.status == "resting":
            visit.cancel(order, by="order_group")
    return group


def _named(visit: Visit) -> Group:
    """The group that a change is about: without an address it is sought on shard 0, subaccount 0."""
    return visit.group(
        visit.path_parameters["group_id"],
        exchange_index=visit.integer("exchange_index") or 0,
        subaccount=visit.write_subaccount(visit.integer("subaccount")),
    )


def _limit(fields: dict[str, Any]) -> str:
    limit = fields.get("contracts_limit_fp", fields.get("contracts_limit"))
    return counted(as_decimal(limit, "contracts_limit_fp"))


def _fields(group: Group) -> dict[str, Any]:
    return {
        "is_auto_cancel_enabled": not group.triggered,
        "contracts_limit_fp": group.contracts_limit,
        "exchange_index": group.exchange_index,
    }
