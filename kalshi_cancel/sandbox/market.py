"""The orders of the exchange and everything that changes them: pure state, no clock, no I/O, no wire.

Not thread-safe: the caller holds one lock around whatever belongs together. Time is passed in as a
`Moment`. Every order keeps its history, so that a test can compare a report with the truth.
"""

from __future__ import annotations

import heapq
import itertools
import random
import uuid
from collections import defaultdict
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Status = Literal["resting", "canceled", "executed"]
Side = Literal["bid", "ask"]
ZERO = Decimal(0)


@dataclass(frozen=True, slots=True)
class Moment:
    """One instant: microseconds on the engine's clock, and seconds that only ever go forward."""

    us: int
    mono_s: float

    @property
    def ms(self) -> int:
        """Milliseconds on the engine's clock."""
        return self.us // 1000


@dataclass(frozen=True, slots=True)
class State:
    """What can change about an order.

    `initial` stays as it was placed. It is `filled + remaining + canceled` until somebody decreases or
    amends the order: what that takes away (or adds) is in none of them.
    """

    status: Status
    initial: Decimal
    filled: Decimal
    remaining: Decimal
    canceled: Decimal
    price: Decimal
    updated_us: int


@dataclass(frozen=True, slots=True)
class NewOrder:
    """An order as it is submitted."""

    ticker: str = "KXTEST-26NOV22-A"
    count: Decimal = Decimal(10)
    filled: Decimal = ZERO
    status: Status = "resting"
    side: Side = "bid"
    price: Decimal = Decimal("0.50")
    exchange_index: int = 0
    subaccount: int = 0
    order_id: str | None = None
    client_order_id: str | None = None
    order_group_id: str | None = None
    time_in_force: str = "good_till_canceled"
    self_trade_prevention_type: str = "taker_at_cross"
    expiration_time: str | None = None
    cancel_order_on_pause: bool = False
    read_lag_s: float | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """One line of an order's history; `call` is the number of the call that did it, if one did."""

    event: str
    at_ms: int
    count: Decimal
    call: int | None = None
    by: str | None = None


@dataclass(slots=True, eq=False)
class Order:
    """One order: what it is, how it stands, how it stood before, and how it got there."""

    number: int
    order_id: str
    client_order_id: str
    event_ticker: str
    new: NewOrder
    created_us: int
    state: State
    previous: State | None = None
    # Older states that reads still show: (until when, on the forward-going clock; what they show).
    hidden: list[tuple[float, State | None]] = field(default_factory=list)
    history: list[Event] = field(default_factory=list)
    put_away: bool = False  # in the archive, whatever the cutoff

    def is_archived(self, state: State, cutoff_us: int) -> bool:
        """Whether the order, standing at `state`, is in the archive and nowhere else."""
        return state.status != "resting" and (self.put_away or state.updated_us < cutoff_us)


@dataclass(slots=True)
class Group:
    """An order group: its members, and whether it lets new ones in."""

    group_id: str
    contracts_limit: str
    exchange_index: int
    subaccount: int
    triggered: bool = False
    members: dict[int, Order] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tail:
    """The minute after a cancel-all: until when it lasts, whose it is, and what it has canceled so far."""

    until_s: float
    call: int
    victims: list[tuple[Order, Decimal]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Fill:
    """One trade of an order."""

    number: int
    order: Order
    count: Decimal
    at_us: int


@dataclass(frozen=True, slots=True)
class Filter:
    """Which orders a list is about; None = no matter."""

    status: str | None = None
    ticker: str | None = None
    event_tickers: tuple[str, ...] = ()
    min_s: int | None = None
    max_s: int | None = None
    subaccount: int | None = None
    exchange_index: int | None = None
    # The archive, or what is not in it: orders that ended before the cutoff are.
    archive: bool = False
    cutoff_us: int = 0

    def takes(self, order: Order, state: State) -> bool:
        """Whether `order`, standing at `state`, belongs on the list."""
        new = order.new
        return (
            (self.status is None or state.status == self.status)
            and (self.ticker is None or new.ticker == self.ticker)
            and (not self.event_tickers or order.event_ticker in self.event_tickers)
            and (self.subaccount is None or new.subaccount == self.subaccount)
            and (self.exchange_index is None or new.exchange_index == self.exchange_index)
            and (self.min_s is None or order.created_us >= self.min_s * 1_000_000)
            and (self.max_s is None or order.created_us <= self.max_s * 1_000_000)
            and order.is_archived(state, self.cutoff_us) == self.archive
        )


class DuplicateOrderError(ValueError):
    """An order with this `order_id` or `client_order_id` is already there."""


class Market:
    """All orders, found by id, client_order_id, ticker and event; groups, fills and cancel-all's tails."""

    def __init__(self, *, seed: int = 0, read_lag_s: float = 0.0) -> None:
        self.read_lag_s = read_lag_s
        self.groups: dict[str, Group] = {}
        self.fills: list[Fill] = []
        self._random = random.Random(seed)
        self._numbers = itertools.count(1)
        self._orders: dict[str, Order] = {}
        self._by_number: dict[int, Order] = {}
        self._by_client_id: dict[str, Order] = {}
        self._by_event: defaultdict[str, dict[int, Order]] = defaultdict(dict)
        self._resting: dict[int, Order] = {}
        self._lagging: dict[int, Order] = {}
        self._tails: dict[int | None, Tail] = {}

    # -- finding

    def find(self, order_id: str) -> Order | None:
        """The order with this id, as it truly is."""
        return self._orders.get(order_id)

    def orders(self) -> Iterable[Order]:
        """All orders, oldest first."""
        return self._by_number.values()

    def visible(self, order: Order, moment: Moment) -> State | None:
        """The state that a read shows at `moment`; None when the order cannot be seen yet."""
        if not order.hidden:
            return order.state
        order.hidden = [entry for entry in order.hidden if entry[0] > moment.mono_s]
        if not order.hidden:
            self._lagging.pop(order.number, None)
            return order.state
        return order.hidden[0][1]

    def page(
        self,
        wanted: Filter,
        *,
        moment: Moment,
        limit: int,
        before: int | None = None,
        skip: int = 0,
        view: Callable[[Order], State | None] | None = None,
    ) -> tuple[list[tuple[Order, State]], int | None]:
        """Up to `limit` orders, newest first, older than number `before`; and where the next page starts.

        `skip`: so many orders are passed over first.
        `view` overrules what is seen of an order (a fault may show it as it was, or hide it).
        """
        found: list[tuple[Order, State]] = []
        for order in self._candidates(wanted, all_orders=view is not None):
            if before is not None and order.number >= before:
                continue
            state = view(order) if view else self.visible(order, moment)
            if state is None or not wanted.takes(order, state):
                continue
            if skip:
                skip -= 1
                continue
            if len(found) == limit:
                return found, found[-1][0].number
            found.append((order, state))
        return found, None

    def _candidates(self, wanted: Filter, *, all_orders: bool) -> Iterator[Order]:
        """A superset of what `wanted` takes, newest first, from the smallest index that has them all."""
        events = wanted.event_tickers or ((event_of(wanted.ticker),) if wanted.ticker else ())
        if events:
            parts = [
                reversed(self._by_event[name].values()) for name in set(events) if name in self._by_event
            ]
            return heapq.merge(*parts, key=lambda order: -order.number)
        if wanted.status == "resting" and not all_orders:
            # An order that is no longer resting may still be seen so.
            resting = self._resting | self._lagging if self._lagging else self._resting
            numbers = sorted(resting, reverse=True) if self._lagging else reversed(resting)
            return (resting[number] for number in list(numbers))
        return iter(list(reversed(self._by_number.values())))

    # -- changing

    def place(self, new: NewOrder, moment: Moment, *, lag_s: float = 0.0, call: int | None = None) -> Order:
        """A new order; `filled` and `status` may already be anything consistent.

        `lag_s`: how long reads do not see it. ValueError when the numbers contradict each other,
        DuplicateOrderError when one of its ids is taken.
        """
        if new.status not in get_args(Status) or new.side not in get_args(Side):
            raise ValueError(f"status {new.status!r}, side {new.side!r}")
        remaining = new.count - new.filled if new.status == "resting" else ZERO
        filled = new.count if new.status == "executed" else new.filled
        if new.count <= 0 or not ZERO <= filled <= new.count or (new.status == "resting" and remaining <= 0):
            raise ValueError(f"count {new.count}, filled {new.filled}, status {new.status}")
        order_id = new.order_id or self.new_id()
        client_order_id = new.client_order_id or self.new_id()
        if order_id in self._orders or client_order_id in self._by_client_id:
            raise DuplicateOrderError(f"{order_id} or {client_order_id} is already there")
        canceled = new.count - filled - remaining
        state = State(new.status, new.count, filled, remaining, canceled, new.price, moment.us)
        order = Order(
            next(self._numbers), order_id, client_order_id, event_of(new.ticker), new, moment.us, state
        )
        self._orders[order_id] = self._by_number[order.number] = self._by_client_id[client_order_id] = order
        self._by_event[order.event_ticker][order.number] = order
        if new.order_group_id is not None:
            self.groups[new.order_group_id].members[order.number] = order
        if state.status == "resting":
            self._resting[order.number] = order
        if lag_s > 0:
            order.hidden.append((moment.mono_s + lag_s, None))
            self._lagging[order.number] = order
        order.history.append(Event("created", moment.ms, new.count, call))
        if filled:
            order.history.append(Event("filled", moment.ms, filled))
        if state.canceled:
            order.history.append(Event("canceled", moment.ms, state.canceled, by="elsewhere"))
        return order

    def cancel(self, order: Order, moment: Moment, *, by: str, call: int | None = None) -> Decimal:
        """Takes the rest of a resting order away and returns how much that was."""
        state = order.state
        assert state.status == "resting"
        canceled = state.canceled + state.remaining
        changed = replace(state, status="canceled", remaining=ZERO, canceled=canceled, updated_us=moment.us)
        self._write(order, changed, moment)
        order.history.append(Event("canceled", moment.ms, state.remaining, call, by))
        return state.remaining

    def restore(self, order: Order, moment: Moment) -> Decimal:
        """Makes a canceled order rest again, as the exchange does at times; how many contracts that is."""
        state = order.state
        if state.status != "canceled" or not state.canceled:
            raise ValueError(f"{order.order_id} is {state.status}; nothing to restore")
        restored = state.canceled
        changed = replace(state, status="resting", remaining=restored, canceled=ZERO, updated_us=moment.us)
        self._write(order, changed, moment)
        self._resting = dict(sorted({**self._resting, order.number: order}.items()))
        order.history.append(Event("restored", moment.ms, restored))
        return restored

    def fill(self, order: Order, moment: Moment, count: Decimal | None = None) -> Decimal:
        """Fills `count` contracts of a resting order (None = all); ValueError when that cannot be."""
        state = order.state
        count = state.remaining if count is None else count
        if state.status != "resting" or not ZERO < count <= state.remaining:
            raise ValueError(
                f"{order.order_id} is {state.status}, {state.remaining} remain; cannot fill {count}"
            )
        remaining = state.remaining - count
        status: Status = "resting" if remaining else "executed"
        filled = state.filled + count
        self._write(
            order,
            replace(state, status=status, filled=filled, remaining=remaining, updated_us=moment.us),
            moment,
        )
        order.history.append(Event("filled", moment.ms, count))
        self.fills.append(Fill(len(self.fills) + 1, order, count, moment.us))
        return count

    def resize(
        self,
        order: Order,
        moment: Moment,
        *,
        total: Decimal,
        price: Decimal | None = None,
        call: int | None = None,
    ) -> None:
        """Amends a resting order to `total` contracts (filled ones included) and perhaps a new price."""
        state = order.state
        assert state.status == "resting"
        remaining = max(ZERO, total - state.filled)
        status: Status = "resting" if remaining else ("executed" if state.filled else "canceled")
        changed = replace(
            state, status=status, remaining=remaining, price=price or state.price, updated_us=moment.us
        )
        self._write(order, changed, moment)
        order.history.append(Event("amended", moment.ms, total, call))

    def decrease(self, order: Order, moment: Moment, *, by: Decimal, call: int | None = None) -> Decimal:
        """Takes up to `by` contracts of a resting order away and returns how many that were."""
        state = order.state
        assert state.status == "resting"
        if by >= state.remaining:
            return self.cancel(order, moment, by="decrease", call=call)
        self._write(order, replace(state, remaining=state.remaining - by, updated_us=moment.us), moment)
        order.history.append(Event("decreased", moment.ms, by, call))
        return by

    def resting(self, subaccount: int | None = None) -> list[Order]:
        """The truly resting orders, oldest first, of one subaccount or of all."""
        return [o for o in self._resting.values() if subaccount is None or o.new.subaccount == subaccount]

    def queue(self) -> Iterator[tuple[Order, Decimal]]:
        """The truly resting orders, oldest first, each with the contracts of older ones at its price."""
        before: defaultdict[tuple[str, Side, Decimal], Decimal] = defaultdict(Decimal)
        for order in self._resting.values():
            level = (order.new.ticker, order.new.side, order.state.price)
            yield order, before[level]
            before[level] += order.state.remaining

    def start_tail(self, subaccount: int | None, tail: Tail) -> None:
        """New orders of `subaccount` (None = all) are canceled on arrival while `tail` lasts."""
        known = self._tails.get(subaccount)
        if known is None or known.until_s <= tail.until_s:
            self._tails[subaccount] = tail

    def meet_tail(self, order: Order, moment: Moment) -> None:
        """Cancels an order that has just arrived if it falls victim to an earlier cancel-all."""
        for scope in (order.new.subaccount, None):
            tail = self._tails.get(scope)
            if tail is not None and moment.mono_s < tail.until_s and order.state.status == "resting":
                tail.victims.append((order, self.cancel(order, moment, by="tail", call=tail.call)))

    def add_group(
        self,
        *,
        group_id: str | None = None,
        contracts_limit: str = "0.00",
        exchange_index: int = 0,
        subaccount: int = 0,
    ) -> Group:
        """A new, empty order group."""
        group_id = group_id or self.new_id()
        group = self.groups[group_id] = Group(group_id, contracts_limit, exchange_index, subaccount)
        return group

    def new_id(self) -> str:
        """A fresh id; the same seed gives the same ids."""
        return str(uuid.UUID(int=self._random.getrandbits(128), version=4))

    def _write(self, order: Order, state: State, moment: Moment) -> None:
        lag_s = self.read_lag_s if order.new.read_lag_s is None else order.new.read_lag_s
        if lag_s > 0:
            order.hidden.append((moment.mono_s + lag_s, order.state))
            self._lagging[order.number] = order
        order.previous = order.state
        order.state = state
        if state.status != "resting":
            self._resting.pop(order.number, None)


def event_of(ticker: str) -> str:
    """The event a market belongs to: its ticker without the last part."""
    return ticker.rpartition("-")[0] or ticker


def history_line(event: Event) -> dict[str, Any]:
    """One line of history as JSON."""
    line: dict[str, Any] = {"event": event.event, "at_ms": event.at_ms, "count": f"{event.count:.2f}"}
    if event.call is not None:
        line["call"] = event.call
    if event.by is not None:
        line["by"] = event.by
    return line
