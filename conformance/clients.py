"""Two clients that others have written, unmodified, each asked for everything that the sandbox has."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import kalshi
import kalshi.models
import kalshi_python_sync
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from conformance.watching import Answered, watch
from kalshi_cancel.sandbox.control import Control
from kalshi_cancel.sandbox.routes import PREFIX
from kalshi_cancel.sandbox.server import SandboxServer

KEY_ID = "conformance"
TICKER = "KXTEST-26NOV22-A"
_V2, _V1 = "/portfolio/events/orders", "/portfolio/orders"
_GROUPS = "/portfolio/order_groups"

Ask = Callable[[], object]

# Each play: the endpoint that it is about, and what the client has to read in the answer.
PLAYS: dict[str, tuple[str, object]] = {
    "create": (f"POST {_V2}", "10.00"),
    "create a batch": (f"POST {_V2}/batched", ["10.00", "invalid_parameters"]),
    "amend": (f"POST {_V2}/:order_id/amend", "8.00"),
    "amend the price alone": (f"POST {_V2}/:order_id/amend", None),
    "decrease": (f"POST {_V2}/:order_id/decrease", "7.00"),
    "read": (f"GET {_V1}/:order_id", ["resting", "7.50"]),
    "list": (f"GET {_V1}", ["crypto", "combo"]),
    "list in pages": (f"GET {_V1}", [1, True]),
    "queue position": (f"GET {_V1}/:order_id/queue_position", "10.00"),
    "queue positions": (f"GET {_V1}/queue_positions", {"ahead": "0.00", "behind": "10.00"}),
    "cancel": (f"DELETE {_V2}/:order_id", "10.00"),
    "cancel on its shard": (f"DELETE {_V2}/:order_id", "10.00"),
    "cancel by its market": (f"DELETE {_V2}/:order_id", "10.00"),
    "cancel a batch": (f"DELETE {_V2}/batched", [["b1", "10.00", None], ["unknown", "0.00", "not_found"]]),
    "create a group": (f"POST {_GROUPS}/create", True),
    "list groups": (f"GET {_GROUPS}", ["g"]),
    "read a group": (f"GET {_GROUPS}/:group_id", ["grouped"]),
    "limit a group": (f"PUT {_GROUPS}/:group_id/limit", "50.00"),
    "trigger a group": (f"PUT {_GROUPS}/:group_id/trigger", False),
    "reset a group": (f"PUT {_GROUPS}/:group_id/reset", True),
    "delete a group": (f"DELETE {_GROUPS}/:group_id", []),
    "fills": ("GET /portfolio/fills", [["partly", "2.50", 0]]),
    "balance": ("GET /portfolio/balance", "10000.0000"),
    "positions": ("GET /portfolio/positions", []),
    "historical orders": ("GET /historical/orders", ["old"]),
    "historical cutoff": ("GET /historical/cutoff", True),
    "exchange status": ("GET /exchange/status", [True, [True, False, True, True]]),
    "limits": ("GET /account/limits", [600, 1200]),
    "endpoint costs": ("GET /account/endpoint_costs", 10),
    "API keys": ("GET /api_keys", [[KEY_ID, ["read", "write"]]]),
    "cancel all": (f"DELETE {_V2}", 0),
}

# Each refusal: its status, and what brings it about when the order "refused" is canceled.
REFUSALS: dict[str, tuple[int, Callable[[Control, str], object]]] = {
    "an order that is not there": (404, lambda control, _pem: control.cancel_elsewhere("refused")),
    "a pause": (409, lambda control, _pem: control.configure(exchange_paused=True)),
    "a request that makes no sense": (
        400,
        lambda control, _pem: control.fault("status", status=400, code="invalid_parameters"),
    ),
    "too many requests": (429, lambda control, _pem: control.configure(buckets={"write": [1, 1]})),
    "a key that may only read": (
        403,
        lambda control, pem: control.register_key(KEY_ID, pem, scope="read_only"),
    ),
    "an unknown key": (401, lambda control, _pem: control.revoke_key(KEY_ID)),
}


@dataclass(frozen=True, slots=True)
class Tried:
    """What became of a play (`about` its endpoint) or of a refusal; no `failure` means that it went well."""

    about: str
    play: str
    failure: str | None
    answers: tuple[Answered, ...] = ()

    @property
    def words(self) -> str:
        """Both, and the failure."""
        return f"{self.about}, {self.play}: {self.failure}"


@dataclass(frozen=True, slots=True)
class Client:
    """One of the two: what it asks in each play, and the status that its own error for a refusal tells."""

    package: str
    about: str
    asks: Callable[[Control, str, str], Mapping[str, Ask]]
    status_of: Callable[[Exception], int | None]

    @property
    def version(self) -> str:
        """Of the package that is installed."""
        return importlib.metadata.version(self.package)


def try_client(client: Client) -> Iterator[Tried]:
    """Has the client play all plays and meet all refusals."""
    with _arranged() as (control, url, pem, _):
        asks = client.asks(control, url + PREFIX, pem)
        missing = PLAYS.keys() - asks.keys()
        assert not missing, f"{client.package}: {missing}"
        for play, (endpoint, wanted) in PLAYS.items():
            answers: list[Answered] = []
            end = watch(answers.append)
            try:
                got = asks[play]()
                failure = None if got == wanted else f"read {got!r}, not {wanted!r}"
            except Exception as error:  # noqa: BLE001  # whatever a client raises is the finding
                failure = _first_line(error)
            finally:
                end()
            if failure is None and endpoint not in {each.endpoint for each in answers}:
                failure = "did not ask this endpoint"
            yield Tried(endpoint, play, failure, tuple(answers))
    for shape in (None, "flat"):
        for refusal in REFUSALS:
            yield _refused(client, refusal, shape)


def _refused(client: Client, refusal: str, shape: str | None) -> Tried:
    """What the client makes of a refusal in the exchange's own `shape` (None) or another one."""
    status, bring_about = REFUSALS[refusal]
    with _arranged() as (control, url, pem, public_pem):
        control.configure(error_shape=shape)
        asks = client.asks(control, url + PREFIX, pem)
        bring_about(control, public_pem)
        try:
            failure = f"no error, but {asks['be refused']()!r}"
        except Exception as error:  # noqa: BLE001  # see above
            told = client.status_of(error)
            failure = None if told == status else f"told {told}: {_first_line(error)}"
    return Tried(refusal, shape or "nested", failure)


@contextmanager
def _arranged() -> Iterator[tuple[Control, str, str, str]]:
    """A sandbox with the orders of the plays: its control, address, private key and public key."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    public_pem = (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )
    with SandboxServer(keys={KEY_ID: public_pem}, tier="expert") as server, Control(server.url) as control:
        control.configure(trading_paused=[1])
        for order_id in ("c1", "refused", "b1", "amended", "repriced", "decreased"):
            control.place(order_id)
        control.place("combo", ticker="KXCOMBO-1-A", exchange_index=2)
        control.place("crypto", ticker="KXCOMBO-1-A", exchange_index=2)
        control.place("grouped", order_group_id="g")
        control.place("partly", ticker="KXPARTLY-1-A")
        control.fill("partly", "2.5")
        control.place("ahead", ticker="KXQUEUE-1-A")
        control.place("behind", ticker="KXQUEUE-1-A")
        control.place("old", ago_s=10**7)
        control.cancel_elsewhere("old", ago_s=10**7)
        yield control, server.url, pem, public_pem


def _official(control: Control, base_url: str, pem: str) -> Mapping[str, Ask]:
    """The exchange's own client, generated from its document."""
    configuration = kalshi_python_sync.Configuration(host=base_url)
    configuration.api_key_id, configuration.private_key_pem = KEY_ID, pem
    api = kalshi_python_sync.KalshiClient(configuration)
    orders, groups = kalshi_python_sync.OrdersApi(api), kalshi_python_sync.OrderGroupsApi(api)
    portfolio, history = kalshi_python_sync.PortfolioApi(api), kalshi_python_sync.HistoricalApi(api)
    exchange, account = kalshi_python_sync.ExchangeApi(api), kalshi_python_sync.AccountApi(api)
    keys = kalshi_python_sync.ApiKeysApi(api)

    def made_group() -> object:
        return bool(groups.create_order_group(contracts_limit_fp="100.00").order_group_id)

    def group(change: Ask) -> Any:
        change()
        return groups.get_order_group("g")

    def status() -> object:
        said = exchange.get_exchange_status()
        return [said.exchange_active, [each.trading_active for each in said.exchange_index_statuses]]

    def limits() -> object:
        said = account.get_account_api_limits()
        return [said.read.refill_rate, said.write.bucket_capacity]

    return {
        "create": lambda: orders.create_order_v2(**_order("new")).remaining_count,
        "create a batch": lambda: [
            each.remaining_count or each.error.code
            for each in orders.batch_create_orders_v2(orders=_batch_of_two()).orders
        ],
        "amend": lambda: orders.amend_order_v2("amended", **_amendment("8.00", "0.5000")).remaining_count,
        "amend the price alone": lambda: (
            orders.amend_order_v2("repriced", **_amendment("10.00", "0.4000")).remaining_count
        ),
        "decrease": lambda: orders.decrease_order_v2("decreased", reduce_by="3.00").remaining_count,
        "read": lambda: _of(orders.get_order("partly").order, "status", "remaining_count_fp"),
        "list": lambda: [
            each.order_id for each in orders.get_orders(status="resting", ticker="KXCOMBO-1-A").orders
        ],
        "list in pages": lambda: (
            (page := orders.get_orders(limit=1)) and [len(page.orders), bool(page.cursor)]
        ),
        "queue position": lambda: orders.get_order_queue_position("behind").queue_position_fp,
        "queue positions": lambda: {
            each.order_id: each.queue_position_fp
            for each in orders.get_order_queue_positions(market_tickers="KXQUEUE-1-A").queue_positions
        },
        "cancel": lambda: orders.cancel_order_v2("c1").reduced_by,
        "be refused": lambda: orders.cancel_order_v2("refused").reduced_by,
        "cancel on its shard": lambda: orders.cancel_order_v2("combo", exchange_index=2).reduced_by,
        "cancel by its market": lambda: (
            orders.cancel_order_v2("crypto", exchange_index=-1, market_ticker="KXCOMBO-1-A").reduced_by
        ),
        "cancel a batch": lambda: [
            [each.order_id, each.reduced_by, each.error and each.error.code]
            for each in orders.batch_cancel_orders_v2(
                orders=[{"order_id": "b1"}, {"order_id": "unknown"}]
            ).orders
        ],
        "create a group": made_group,
        "list groups": lambda: [each.id for each in groups.get_order_groups().order_groups if each.id == "g"],
        "read a group": lambda: groups.get_order_group("g").orders,
        "limit a group": lambda: (
            group(lambda: groups.update_order_group_limit("g", contracts_limit_fp="50.00")).contracts_limit_fp
        ),
        "trigger a group": lambda: group(lambda: groups.trigger_order_group("g")).is_auto_cancel_enabled,
        "reset a group": lambda: group(lambda: groups.reset_order_group("g")).is_auto_cancel_enabled,
        "delete a group": lambda: [
            each.id
            for each in [groups.delete_order_group("g"), *groups.get_order_groups().order_groups][1:]
            if each.id == "g"
        ],
        "fills": lambda: [
            _of(each, "order_id", "count_fp", "exchange_index") for each in portfolio.get_fills().fills
        ],
        "balance": lambda: portfolio.get_balance().balance_dollars,
        "positions": lambda: portfolio.get_positions().market_positions,
        "historical orders": lambda: [each.order_id for each in history.get_historical_orders().orders],
        "historical cutoff": lambda: history.get_historical_cutoff().orders_updated_ts.tzinfo is not None,
        "exchange status": status,
        "limits": limits,
        "endpoint costs": lambda: account.get_account_endpoint_costs().default_cost,
        "API keys": lambda: [
            [each.api_key_id, [scope.value for scope in each.scopes]] for each in keys.get_api_keys().api_keys
        ],
        "cancel all": lambda: [orders.cancel_all_orders(), _resting(control)][1],
    }


def _of_others(control: Control, base_url: str, pem: str) -> Mapping[str, Ask]:
    """The most complete client of somebody else."""
    client = kalshi.KalshiClient(key_id=KEY_ID, private_key=pem, base_url=base_url, max_retries=0)
    orders, groups, models = client.orders, client.order_groups, kalshi.models

    def page() -> object:
        listed = orders.list(limit=1)
        return [len(listed.items), listed.has_next]

    def group(change: Ask) -> Any:
        change()
        return groups.get("g")

    def status() -> object:
        said = client.exchange.status()
        return [said.exchange_active, [each.trading_active for each in said.exchange_index_statuses or ()]]

    def limits() -> object:
        said = client.account.limits()
        return [said.read.refill_rate, said.write.bucket_capacity]

    def batch() -> object:
        named = [models.BatchCancelOrdersV2RequestOrder(order_id=order_id) for order_id in ("b1", "unknown")]
        said = orders.batch_cancel_v2(request=models.BatchCancelOrdersV2Request(orders=named))
        return [
            [each.order_id, str(each.reduced_by), each.error and each.error["code"]] for each in said.orders
        ]

    def created_batch() -> object:
        said = orders.batch_create_v2(request=models.BatchCreateOrdersV2Request(orders=_batch_of_two()))
        return [
            str(each.remaining_count) if each.error is None else each.error["code"] for each in said.orders
        ]

    def amended(order_id: str, count: str, price: str) -> object:
        request = models.AmendOrderV2Request(**_amendment(count, price))
        remaining = orders.amend_v2(order_id, request=request).remaining_count
        return remaining and str(remaining)

    return {
        "create": lambda: str(
            orders.create_v2(request=models.CreateOrderV2Request(**_order("new"))).remaining_count
        ),
        "create a batch": created_batch,
        "amend": lambda: amended("amended", "8.00", "0.5000"),
        "amend the price alone": lambda: amended("repriced", "10.00", "0.4000"),
        "decrease": lambda: str(
            orders.decrease_v2(
                "decreased", request=models.DecreaseOrderV2Request(reduce_by=Decimal(3))
            ).remaining_count
        ),
        "read": lambda: _of(orders.get("partly"), "status", "remaining_count"),
        "list": lambda: [each.order_id for each in orders.list(status="resting", ticker="KXCOMBO-1-A")],
        "list in pages": page,
        "queue position": lambda: str(orders.queue_position("behind")),
        "queue positions": lambda: {
            each.order_id: str(each.queue_position)
            for each in orders.queue_positions(market_tickers="KXQUEUE-1-A")
        },
        "cancel": lambda: str(orders.cancel_v2("c1").reduced_by),
        "be refused": lambda: str(orders.cancel_v2("refused").reduced_by),
        "cancel on its shard": lambda: str(orders.cancel_v2("combo", exchange_index=2).reduced_by),
        "cancel by its market": lambda: str(
            orders.cancel_v2("crypto", exchange_index=-1, market_ticker="KXCOMBO-1-A").reduced_by
        ),
        "cancel a batch": batch,
        "create a group": lambda: bool(groups.create(contracts_limit=100).order_group_id),
        "list groups": lambda: [each.id for each in groups.list() if each.id == "g"],
        "read a group": lambda: groups.get("g").orders,
        "limit a group": lambda: str(
            group(lambda: groups.update_limit("g", contracts_limit=50)).contracts_limit
        ),
        "trigger a group": lambda: group(lambda: groups.trigger("g")).is_auto_cancel_enabled,
        "reset a group": lambda: group(lambda: groups.reset("g")).is_auto_cancel_enabled,
        "delete a group": lambda: [
            each.id for each in [groups.delete("g"), *groups.list()][1:] if each.id == "g"
        ],
        "fills": lambda: [
            _of(each, "order_id", "count", "exchange_index") for each in client.portfolio.fills()
        ],
        "balance": lambda: str(client.portfolio.balance().balance_dollars),
        "positions": lambda: client.portfolio.positions().market_positions,
        "historical orders": lambda: [each.order_id for each in client.historical.orders()],
        "historical cutoff": lambda: client.historical.cutoff().orders_updated_ts.tzinfo is not None,
        "exchange status": status,
        "limits": limits,
        "endpoint costs": lambda: client.account.endpoint_costs().default_cost,
        "API keys": lambda: [[each.api_key_id, each.scopes] for each in client.api_keys.list().api_keys],
        "cancel all": lambda: [orders.cancel_all_v2(), _resting(control)][1],
    }


def _order(client_order_id: str) -> dict[str, Any]:
    return {
        "ticker": TICKER,
        "client_order_id": client_order_id,
        "side": "bid",
        "count": "10.00",
        "price": "0.4500",
        "time_in_force": "good_till_canceled",
        "self_trade_prevention_type": "taker_at_cross",
    }


def _batch_of_two() -> list[dict[str, Any]]:
    """An order, and one whose price cannot be."""
    return [_order("fine"), {**_order("wrong"), "price": "5.0000"}]


def _amendment(count: str, price: str) -> dict[str, Any]:
    return {"ticker": TICKER, "side": "bid", "count": count, "price": price}


def _of(value: object, *names: str) -> list[object]:
    """Some attributes of a value; decimals as text, as one of the two clients reads them."""
    read = [getattr(value, name) for name in names]
    return [str(each) if isinstance(each, Decimal) else getattr(each, "value", each) for each in read]


def _resting(control: Control) -> int:
    return sum(order["status"] == "resting" for order in control.orders())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


OFFICIAL = Client(
    "kalshi_python_sync", "the exchange's own", _official, lambda error: getattr(error, "status", None)
)
OF_OTHERS = Client(
    "kalshi-sdk",
    "the most complete of a third party",
    _of_others,
    lambda error: getattr(error, "status_code", None),
)
