"""Cancels as the exchange serves them: one order, a batch, everything; in today's dialect and the old one."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from kalshi_cancel.sandbox.forms import counted, fixed_point, integers
from kalshi_cancel.sandbox.market import Tail
from kalshi_cancel.sandbox.refusal import Refusal
from kalshi_cancel.sandbox.visit import Answer, Visit, as_integer, as_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from kalshi_cancel.sandbox.market import Order


def cancel(visit: Visit) -> Answer:
    """V2: the rest of one order, on the shard that the query leads to."""
    order = visit.locate_by_query()
    removed = visit.cancel(order, by="cancel")
    return 200, visit.odd(order.order_id, visit.acknowledged(order, reduced_by=counted(removed)))


def cancel_v1(visit: Visit) -> Answer:
    """V1: the rest of one order wherever it is; the whole order comes back."""
    _only_while_v1_lives(visit)
    subaccount = visit.write_subaccount(visit.integer("subaccount"))
    order = visit.locate(visit.path_parameters["order_id"], exchange_index=-1, subaccount=subaccount)
    return 200, _whole_order_v1(visit, order, visit.cancel(order, by="cancel"))


def cancel_all(visit: Visit) -> Answer:
    """Every resting order of a subaccount or of all, on every shard; and the new ones of the next minute."""
    settings = visit.settings
    visit.refuse_while_all_paused()
    subaccount = visit.read_subaccount(visit.integer("subaccount"))
    resting = visit.market.resting(subaccount)
    orders = [order for order in resting if settings.exchange_active(order.new.exchange_index)]
    for order in orders[: settings.cancel_all_cap]:
        visit.cancel(order, by="cancel_all")
    scope = subaccount if settings.tail_honours_subaccount else None
    tail = Tail(visit.moment.mono_s + settings.tail_s, visit.record.seq)
    visit.market.start_tail(scope, tail)
    visit.record.tail = tail
    return 204, None


def cancel_batch(visit: Visit) -> Answer:
    """V2: many orders, each with its own outcome inside one 200."""
    return _batch(visit, EntryForm(_entry, _entry_error))


def cancel_batch_v1(visit: Visit) -> Answer:
    """V1: many orders, each whole and with its own outcome inside one 200."""
    _only_while_v1_lives(visit)
    return _batch(visit, EntryForm(_entry_v1, _entry_error_v1))


def gone(_visit: Visit) -> Answer:
    """What became of the V1 endpoints that place orders."""
    raise _retired()


@dataclass(frozen=True, slots=True)
class EntryForm:
    """How a dialect writes one entry of a batch: an order that was canceled, and one that was not."""

    canceled: Callable[[Visit, Order, Decimal], dict[str, Any]]
    failed: Callable[[str, Refusal], dict[str, Any]]


def _batch(visit: Visit, form: EntryForm) -> Answer:
    entries = visit.entries()
    visit.refuse_while_all_paused()
    # A key that may not name one of the subaccounts loses the whole batch, before anything is done.
    subaccounts = [
        visit.write_subaccount(as_integer(each.get("subaccount"), "subaccount")) for each in entries
    ]
    answers = [
        answer
        for wanted, subaccount in zip(entries, subaccounts, strict=True)
        if (answer := _cancel_entry(visit, wanted, subaccount, form)) is not None
    ]
    faults = visit.floor.faults
    if faults.strike("shuffled", "batch", visit.record.order_ids):
        visit.record.fault = "shuffled"
        faults.random(f"shuffle/{len(answers)}").shuffle(answers)
    return 200, {"orders": answers}


def _cancel_entry(
    visit: Visit, wanted: dict[str, Any], subaccount: int | None, form: EntryForm
) -> dict[str, Any] | None:
    """One entry of a batch: canceled or not, and what the answer says of it (None: nothing)."""
    order_id = str(wanted.get("order_id", ""))
    error, missing, foreign = (
        visit.floor.faults.strike(kind, "batch", [order_id])
        for kind in ("entry_error", "entry_missing", "entry_foreign")
    )
    faults = [fault for fault in (error, missing, foreign) if fault]
    for fault in faults:
        visit.record.fault = fault.kind
    if "none" in {fault.effect_or_default for fault in faults}:
        answer = form.failed(order_id, Refusal(500, "spared"))
    else:
        answer = _try_entry(visit, wanted, subaccount, form)
    if error:
        answer = form.failed(
            order_id, Refusal(500, error.code or "internal_error", error.message, error.details)
        )
        if error.body is not None:
            answer["error"] = error.body
    if foreign:
        answer["order_id"] = foreign.body_order_id
    return None if missing else visit.odd(order_id, answer)


def _try_entry(
    visit: Visit, wanted: dict[str, Any], subaccount: int | None, form: EntryForm
) -> dict[str, Any]:
    order_id = str(wanted.get("order_id", ""))
    try:
        order = visit.locate(
            order_id,
            exchange_index=as_integer(wanted.get("exchange_index"), "exchange_index", least=-1),
            market_ticker=as_text(wanted.get("market_ticker"), "market_ticker"),
            subaccount=subaccount,
        )
    except Refusal as refusal:
        return form.failed(order_id, refusal)
    return form.canceled(visit, order, visit.cancel(order, by="batch"))


def _entry(visit: Visit, order: Order, removed: Decimal) -> dict[str, Any]:
    return visit.acknowledged(order, reduced_by=counted(removed))


def _entry_error(order_id: str, refusal: Refusal) -> dict[str, Any]:
    return {"order_id": order_id, "reduced_by": "0.00", "ts_ms": None, "error": refusal.fields()}


def _entry_v1(visit: Visit, order: Order, removed: Decimal) -> dict[str, Any]:
    return {"order_id": order.order_id, **_whole_order_v1(visit, order, removed), "error": None}


def _entry_error_v1(order_id: str, refusal: Refusal) -> dict[str, Any]:
    nothing = {"order": None, "reduced_by": 0, "reduced_by_fp": "0.00"}
    return {"order_id": order_id, **nothing, "error": refusal.fields()}


def _whole_order_v1(visit: Visit, order: Order, removed: Decimal) -> dict[str, Any]:
    if visit.settings.v1 == "alive_int":
        return {"order": integers(order, order.state), "reduced_by": int(removed)}
    return {"order": fixed_point(order, order.state), "reduced_by_fp": counted(removed)}


def _only_while_v1_lives(visit: Visit) -> None:
    if visit.settings.v1 == "retired":
        raise _retired()


def _retired() -> Refusal:
    details = "https://docs.kalshi.com/api-reference/orders"
    return Refusal(410, "deprecated_v1_order_endpoint", "Please switch to the V2 endpoints", details)
