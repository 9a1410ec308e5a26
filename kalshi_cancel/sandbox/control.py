"""The sandbox's remote control: what the unsigned routes under /sandbox/ do, as typed calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, cast
from urllib.parse import quote

import requests

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import TracebackType

TIMEOUT_S = 30
Json = dict[str, Any]


class ControlError(ValueError):
    """The sandbox would not do what was asked; the text says why."""


class Control:
    """Arranges a running sandbox and looks behind it; it never signs and never touches a budget.

    Orders come back as the exchange writes them (`remaining_count_fp`, ...). The truth about one has
    two fields more: `canceled_count_fp`, and `history`, a list of `{event, at_ms, count, call?, by?}`.
    Counts and prices are decimal strings.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._session = requests.Session()
        self._session.trust_env = False

    def close(self) -> None:
        """Closes its connections."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def reset(self) -> None:
        """No orders, groups, faults or calls, and the settings it started with; keys stay."""
        self._ask("POST", "reset")

    def configure(self, **settings: Any) -> None:
        """Changes settings while it runs; `sandbox.settings.Settings` lists them with their meaning."""
        self._ask("POST", "configure", settings)

    # -- orders

    def place(  # the parameters are the order
        self,
        order_id: str | None = None,
        *,
        ticker: str = "KXTEST-26NOV22-A",
        count: str = "10.00",
        filled: str = "0.00",
        status: str = "resting",
        exchange_index: int | None = None,
        subaccount: int = 0,
        client_order_id: str | None = None,
        side: str = "bid",
        price: str = "0.50",
        order_group_id: str | None = None,
        expiration_time: str | None = None,
        cancel_order_on_pause: bool = False,
        read_lag_s: float | None = None,
        ago_s: float = 0.0,
        meets_tail: bool = False,
    ) -> Json:
        """Puts an order there, past all rules (pauses, budget, cancel-all's tail), seen by reads at once.

        `exchange_index` None = the shard of its ticker. An unknown order group is created with it.
        `read_lag_s` overrules the setting for this order. `ago_s`: its times are so many seconds back.
        `meets_tail`: cancel-all's minute strikes it, as any order that somebody places (calls("cancel_all")
        then name it in `tail`).
        """
        return self.place_many(
            [
                {
                    "order_id": order_id,
                    "ticker": ticker,
                    "count": count,
                    "filled": filled,
                    "status": status,
                    "exchange_index": exchange_index,
                    "subaccount": subaccount,
                    "client_order_id": client_order_id,
                    "side": side,
                    "price": price,
                    "order_group_id": order_group_id,
                    "expiration_time": expiration_time,
                    "cancel_order_on_pause": cancel_order_on_pause,
                    "read_lag_s": read_lag_s,
                    "ago_s": ago_s,
                    "meets_tail": meets_tail,
                }
            ]
        )[0]

    def place_many(self, orders: Iterable[Mapping[str, Any]]) -> list[Json]:
        """Puts many orders there; each is an object with the parameters of `place`."""
        return cast("list[Json]", self._ask("POST", "orders", {"orders": [dict(each) for each in orders]}))

    def order(self, order_id: str) -> Json:
        """The truth about one order."""
        return cast("Json", self._ask("GET", f"orders/{_segment(order_id)}"))

    def orders(self) -> list[Json]:
        """The truth about all orders, oldest first."""
        return cast("list[Json]", self._ask("GET", "orders"))

    # What happens to a resting order. With `ago_s` it is stamped so many seconds before now.

    def fill(self, order_id: str, count: str | None = None, *, ago_s: float = 0.0) -> Json:
        """Fills `count` contracts of a resting order, or all that remain."""
        return self._change(order_id, "fill", count=count, ago_s=ago_s)

    def cancel_elsewhere(self, order_id: str, *, ago_s: float = 0.0) -> Json:
        """Cancels an order as somebody else would: a market that closes, the user on the web site."""
        return self._change(order_id, "cancel", ago_s=ago_s)

    def decrease(
        self, order_id: str, *, by: str | None = None, to: str | None = None, ago_s: float = 0.0
    ) -> Json:
        """Takes `by` contracts off, or all but `to`: not a fill, not a cancel; `initial_count_fp` stays."""
        return self._change(order_id, "decrease", by=by, to=to, ago_s=ago_s)

    def amend(
        self, order_id: str, *, count: str | None = None, price: str | None = None, ago_s: float = 0.0
    ) -> Json:
        """Another total count (filled contracts included) or price; `initial_count_fp` stays."""
        return self._change(order_id, "amend", count=count, price=price, ago_s=ago_s)

    def restore(self, order_id: str, *, ago_s: float = 0.0) -> Json:
        """Makes a canceled order rest again, as the exchange does after an incident."""
        return self._change(order_id, "restore", ago_s=ago_s)

    def archive(self, order_id: str) -> Json:
        """Puts an order that has ended into the archive now: GET /historical/orders alone shows it."""
        return self._change(order_id, "archive")

    def _change(self, order_id: str, deed: str, **fields: Any) -> Json:
        return cast("Json", self._ask("POST", f"orders/{_segment(order_id)}/{deed}", fields))

    # -- faults

    def fault(self, kind: str, **fields: Any) -> int:
        """Arms a fault and returns its number; `sandbox.faults` has the table. `body` may be bytes."""
        if isinstance(fields.get("body"), bytes):
            fields["body_hex"] = fields.pop("body").hex()
        return int(self._ask("POST", "faults", {"kind": kind, **fields})["id"])

    def faults(self) -> list[Json]:
        """The faults that are armed, how often they were met (`seen`) and how often they `struck`."""
        return cast("list[Json]", self._ask("GET", "faults"))

    def clear_faults(self) -> None:
        """Disarms all faults and lets go of calls that hang."""
        self._ask("DELETE", "faults")

    # -- the record and the budget

    def calls(self, operation: str | None = None, order_id: str | None = None, since: int = 0) -> list[Json]:
        """The calls after number `since`, oldest first; `sandbox.calls.Call` names the fields."""
        query = {"operation": operation, "order_id": order_id, "since": str(since)}
        return cast("list[Json]", self._ask("GET", "calls", query=query))

    def drain(self, bucket: str = "write", tokens: float = 1e12) -> Json:
        """Spends tokens of a bucket (`read`, `write`, `write:<shard>`) as a foreign client would."""
        return cast("Json", self._ask("POST", "drain", {"bucket": bucket, "tokens": tokens}))

    def buckets(self) -> Json:
        """Refill rate, capacity and level of each bucket in use."""
        return cast("Json", self._ask("GET", "buckets"))

    def register_key(
        self,
        key_id: str,
        public_key_pem: str,
        scope: str = "full",
        subaccount: int | None = None,
        name: str | None = None,
    ) -> None:
        """Lets a key in: `scope` is "full", "trade" or "read_only"; `subaccount` confines it to one."""
        fields = {
            "key_id": key_id,
            "public_key_pem": public_key_pem,
            "scope": scope,
            "subaccount": subaccount,
            "name": name,
        }
        self._ask("POST", "keys", fields)

    def revoke_key(self, key_id: str) -> None:
        """Lets a key in no more."""
        self._ask("DELETE", f"keys/{_segment(key_id)}")

    def _ask(
        self,
        method: str,
        path: str,
        fields: Json | None = None,
        query: Mapping[str, str | None] | None = None,
    ) -> Any:
        answer = self._session.request(
            method, f"{self.url}/sandbox/{path}", json=fields, params=query, timeout=TIMEOUT_S
        )
        if answer.status_code != 200:
            raise ControlError(answer.json()["error"])
        return answer.json()


def _segment(order_id: str) -> str:
    return quote(order_id, safe="")
