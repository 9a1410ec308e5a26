"""What one run of the fault campaign is about: which orders there are, and who asks for which of them when.

Pure and drawn from a seed alone, so that a run can be played again.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from worker.orders import Lane

PRODUCERS = 3
MANY_AT_MOST = 25
# Of a hundred orders, so many are asked for by a second producer, asked for only once whatever happens,
# and, where the fault leaves Celery's own messages alone, asked for by a raw message.
ASKED_TWICE = 0.2
ASKED_ONCE_ONLY = 0.1
RAW = 0.08

Deed = Literal["fill", "fill_some", "cancel"]


@dataclass(frozen=True, slots=True)
class Sort:
    """A sort of order: its share of the mix, and how it is placed (None: the exchange never has it).

    ``routing`` are the fields that producers name. ``meanwhile`` is what others do to it during the run;
    ``before``: it came to its end a minute before the run.
    """

    share: int
    order: Mapping[str, Any] | None
    routing: Sequence[str] = ()
    meanwhile: Deed | None = None
    before: bool = False


SORTS = {
    "resting": Sort(48, {}),
    "partly": Sort(12, {"filled": "3.00"}),
    "fractional": Sort(5, {"count": "2.75", "filled": "0.50"}),
    "elsewhere": Sort(7, {"exchange_index": 2, "ticker": "KXBTC-26NOV22-T100000"}),
    "routed": Sort(
        5, {"exchange_index": 1, "ticker": "KXCOMBO-26NOV22-A"}, ("exchange_index", "market_ticker")
    ),
    "account": Sort(3, {"subaccount": 1}),
    "executed": Sort(5, {"status": "executed"}, before=True),
    "gone": Sort(4, {"status": "canceled", "filled": "1.00"}, before=True),
    "unknown": Sort(3, None),
    "filling": Sort(3, {}, meanwhile="fill"),
    "thinning": Sort(3, {}, meanwhile="fill_some"),
    "vanishing": Sort(2, {}, meanwhile="cancel"),
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
    """What somebody else does to an order, ``at_s`` after the run's start."""

    at_s: float
    order_id: str
    deed: Deed


@dataclass(frozen=True, slots=True)
class Plan:
    """One run; ``placed`` and ``placed_before`` are the parameters of ``Control.place_many``."""

    placed: tuple[Mapping[str, Any], ...]
    placed_before: tuple[Mapping[str, Any], ...]
    asks: tuple[Ask, ...]
    meddling: tuple[Meddling, ...]


def draw(name: str, seed: int, *, cancels: int, load_s: float, raw: bool) -> Plan:
    """The plan of ``cancels`` orders, asked for over ``load_s``; ids tell run, number and sort."""
    chance = random.Random(f"{name}/{seed}/plan")
    shares = [sort.share for sort in SORTS.values()]
    drawn = chance.choices(list(SORTS), shares, k=cancels)
    orders = [(f"{name}-{seed}-{number:04d}-{sort}", SORTS[sort]) for number, sort in enumerate(drawn)]
    placed = {
        order_id: {**sort.order, "order_id": order_id} for order_id, sort in orders if sort.order is not None
    }
    before = {order_id for order_id, sort in orders if sort.before}
    return Plan(
        tuple(order for order_id, order in placed.items() if order_id not in before),
        tuple(order for order_id, order in placed.items() if order_id in before),
        tuple(sorted(_asks(chance, orders, load_s=load_s, raw=raw), key=lambda ask: ask.at_s)),
        tuple(
            Meddling(chance.uniform(0, load_s), order_id, sort.meanwhile)
            for order_id, sort in orders
            if sort.meanwhile is not None
        ),
    )


def _asks(
    chance: random.Random, orders: Sequence[tuple[str, Sort]], *, load_s: float, raw: bool
) -> list[Ask]:
    """Each order asked for at least once: alone, with others, or raw; some of them twice."""
    fields = [_fields(order_id, sort) for order_id, sort in orders]
    fields += chance.sample(fields, round(len(fields) * ASKED_TWICE))
    chance.shuffle(fields)
    asks: list[Ask] = []
    while fields:
        sent_raw = raw and chance.random() < RAW
        # Half of the orders come in lists.
        many = not sent_raw and chance.random() < 2 / MANY_AT_MOST
        size = chance.randint(2, MANY_AT_MOST) if many else 1
        together, fields = fields[:size], fields[size:]
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
