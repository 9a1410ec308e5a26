"""What one run of the fault campaign is about: which orders there are, and who asks for which of them when.

Pure and drawn from a seed alone, so that a run can be played again.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kalshi_cancel.model.requests import Lane

PRODUCERS = 3
MANY_AT_MOST = 25
# Of a hundred orders, so many are asked for by a second producer, asked for only once whatever happens,
# and, where the fault lets raw producers get through, asked for by a raw message.
ASKED_TWICE = 0.2
ASKED_ONCE_ONLY = 0.1
RAW = 0.08
# Of a hundred asks, so many have a deadline that most faults outlast: who waits is told "unresolved" first.
IMPATIENT = 0.1
DEADLINE_S = 1.0
# What others did before the run, they did within its last seconds: our cancel comes as soon after it as that.
EARLIER_S = 3.0
LONG_AGO_S = 60.0  # when all orders were placed

Deed = Literal["fill", "fill_some", "cancel", "decrease", "amend", "grow", "expire"]


@dataclass(frozen=True, slots=True)
class Sort:
    """A sort of order: its share of the mix, and how it is placed (None: the exchange never has it).

    ``routing`` are the fields that producers name. ``meanwhile`` is what others do to it during the run,
    ``earlier`` what they did shortly before. Orders that are placed as executed or canceled came to their
    end a minute before the run.
    """

    share: int
    order: Mapping[str, Any] | None
    routing: Sequence[str] = ()
    meanwhile: Deed | None = None
    earlier: Deed | None = None


SORTS = {
    "resting": Sort(48, {}),
    "partly": Sort(12, {"filled": "3.00"}),
    "fractional": Sort(5, {"count": "2.75", "filled": "0.50"}),
    "elsewhere": Sort(7, {"exchange_index": 2, "ticker": "KXBTC-26NOV22-T100000"}),
    "routed": Sort(
        5, {"exchange_index": 1, "ticker": "KXCOMBO-26NOV22-A"}, ("exchange_index", "market_ticker")
    ),
    "account": Sort(3, {"subaccount": 1}),
    "executed": Sort(5, {"status": "executed"}),
    "gone": Sort(4, {"status": "canceled", "filled": "1.00"}),
    "unknown": Sort(3, None),
    "lately": Sort(3, {}, earlier="cancel"),
    "shrunk": Sort(3, {}, earlier="decrease"),
    "amended": Sort(2, {}, earlier="amend"),
    "filling": Sort(3, {}, meanwhile="fill"),
    "thinning": Sort(3, {}, meanwhile="fill_some"),
    "vanishing": Sort(2, {}, meanwhile="cancel"),
    "shrinking": Sort(2, {}, meanwhile="decrease"),
    "growing": Sort(2, {}, meanwhile="grow"),
    "expired": Sort(0, {}, earlier="expire"),
}


@dataclass(frozen=True, slots=True)
class Ask:
    """One call of a producer, ``at_s`` after the run's start; several orders make a ``cancel_many``.

    ``once``: not repeated when it was not accepted. ``raw``: a Celery message, not our client.
    """

    at_s: float
    producer: int
    orders: tuple[Mapping[str, Any], ...]
    lane: Lane
    once: bool = False
    raw: bool = False


@dataclass(frozen=True, slots=True)
class Meddling:
    """What somebody else does to an order, ``at_s`` after the run's start, or before it."""

    at_s: float
    order_id: str
    deed: Deed


@dataclass(frozen=True, slots=True)
class Plan:
    """One run; ``placed`` are the parameters of ``Control.place_many``."""

    placed: tuple[Mapping[str, Any], ...]
    earlier: tuple[Meddling, ...]
    asks: tuple[Ask, ...]
    meddling: tuple[Meddling, ...]


def draw(
    name: str,
    seed: int,
    *,
    cancels: int,
    load_s: float,
    raw: bool,
    raw_only: bool = False,
    mix: Mapping[str, int] | None = None,
) -> Plan:
    """The plan of ``cancels`` orders, asked for over ``load_s``; ids tell run, number and sort.

    ``raw_only``: each ask is a raw message for one order. ``mix``: shares of sorts that this run has more of,
    or fewer.
    """
    chance = random.Random(f"{name}/{seed}/plan")
    shares = {sort: each.share for sort, each in SORTS.items()} | dict(mix or {})
    drawn = chance.choices(list(shares), list(shares.values()), k=cancels)
    orders = [(f"{name}-{seed}-{number:04d}-{sort}", SORTS[sort]) for number, sort in enumerate(drawn)]
    return Plan(
        tuple(
            {**sort.order, "order_id": order_id, "ago_s": LONG_AGO_S}
            for order_id, sort in orders
            if sort.order is not None
        ),
        tuple(
            Meddling(-chance.uniform(0, EARLIER_S), order_id, sort.earlier)
            for order_id, sort in orders
            if sort.earlier is not None
        ),
        tuple(
            sorted(_asks(chance, orders, load_s=load_s, raw=raw, raw_only=raw_only), key=lambda ask: ask.at_s)
        ),
        tuple(
            Meddling(chance.uniform(0, load_s), order_id, sort.meanwhile)
            for order_id, sort in orders
            if sort.meanwhile is not None
        ),
    )


def _asks(
    chance: random.Random, orders: Sequence[tuple[str, Sort]], *, load_s: float, raw: bool, raw_only: bool
) -> list[Ask]:
    """Each order asked for at least once: alone or with others, by our client or raw; some of them twice."""
    fields = [_fields(order_id, sort) for order_id, sort in orders]
    fields += chance.sample(fields, round(len(fields) * ASKED_TWICE))
    chance.shuffle(fields)
    asks: list[Ask] = []
    while fields:
        sent_raw = raw_only or (raw and chance.random() < RAW)
        # Half of the orders come in lists.
        many = not raw_only and chance.random() < 2 / MANY_AT_MOST
        size = chance.randint(2, MANY_AT_MOST) if many else 1
        together, fields = fields[:size], fields[size:]
        if chance.random() < IMPATIENT:
            together = [{**order, "deadline_s": DEADLINE_S} for order in together]
        asks.append(
            Ask(
                chance.uniform(0, load_s),
                chance.randrange(PRODUCERS),
                tuple(together),
                Lane.RISK if chance.random() < 0.2 else Lane.STRATEGY,
                once=chance.random() < ASKED_ONCE_ONLY,
                raw=sent_raw,
            )
        )
    return asks


def _fields(order_id: str, sort: Sort) -> dict[str, Any]:
    known = {
        "exchange_index": (sort.order or {}).get("exchange_index"),
        "market_ticker": (sort.order or {}).get("ticker"),
    }
    return {"order_id": order_id, **{name: known[name] for name in sort.routing}}
