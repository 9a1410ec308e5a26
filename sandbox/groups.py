"""Order groups as the exchange serves them: cancels for a whole group, and a closed door behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sandbox.forms import counted
from sandbox.visit import Answer, Visit, as_decimal, as_integer

if TYPE_CHECKING:
    from sandbox.market import Group


def create_group(visit: Visit) -> Answer:
    """A new group on one shard."""
    fields = visit.fields()
    limit = fields.get("contracts_limit_fp", fields.get("contracts_limit"))
    group = visit.market.add_group(
        contracts_limit=counted(as_decimal(limit, "contracts_limit_fp")),
        exchange_index=as_integer(fields.get("exchange_index"), "exchange_index") or 0,
        subaccount=visit.write_subaccount(as_integer(fields.get("subaccount"), "subaccount")) or 0,
    )
    return 201, {"order_group_id": group.group_id}


def list_groups(visit: Visit) -> Answer:
    """All groups, without their orders."""
    groups = visit.market.groups.values()
    return 200, {"order_groups": [{"id": group.group_id, **_fields(group)} for group in groups]}


def read_group(visit: Visit) -> Answer:
    """One group and the ids of its resting orders."""
    group = _named(visit)
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
    group.contracts_limit = counted(
        as_decimal(visit.fields().get("contracts_limit_fp"), "contracts_limit_fp")
    )
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
    return visit.group(visit.path_parameters["group_id"])


def _fields(group: Group) -> dict[str, Any]:
    return {"is_auto_cancel_enabled": not group.triggered, "contracts_limit_fp": group.contracts_limit}
