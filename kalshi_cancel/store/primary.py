"""Finds the primary that Sentinels watch, follows it, and tells when a failover leaves doubt which that is.

For a while after a failover the old primary still takes writes, and a replica that has not heard of it yet
confirms them. All of that is thrown away. Only the Sentinel that leads the failover knows from its first
moment on. So all are asked: at each new connection, every second, and after what must not be lost.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, cast

import redis
from redis.sentinel import (
    MasterNotFoundError,
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
)

from kalshi_cancel.store.redis_errors import kind

Address = tuple[str, int]

LOOK_EVERY_S = 1.0
# A Sentinel that does not answer is left alone for so long: each question to it takes its whole timeout.
AWAY_S = 5.0
_NO_PRIMARY_ANY_MORE = {"READONLY", "NOREPLICAS"}


@dataclass(frozen=True, slots=True)
class View:
    """What one Sentinel says: where the primary is, as of which epoch, and whether it leads a failover.

    ``is_promoted``: that one has just been made the primary, and not all know it yet.
    """

    address: Address
    epoch: int
    is_up: bool
    is_failing_over: bool
    is_promoted: bool


class PrimarySentinels(Sentinel):
    """The Sentinels of one primary; safe to share between threads."""

    def __init__(self, addresses: list[Address], primary: str, *, sentinel_kwargs: dict[str, Any]) -> None:
        super().__init__(addresses, sentinel_kwargs=sentinel_kwargs)  # type: ignore[no-untyped-call]  # redis-py's
        self._primary = primary
        self._away_until: dict[redis.Redis, float] = {}

    def discover_master(self, service_name: str) -> Address:
        """Where the primary is by the latest that any Sentinel knows; raises MasterNotFoundError."""
        views, failed = self._views()
        if not views and not failed:  # all have been away lately
            self._away_until.clear()
            views, failed = self._views()
        usable = [view for view in views if view.is_up]
        if usable:
            return _latest(usable).address
        told = f" : {', '.join(failed)}" if failed else ""
        raise MasterNotFoundError(f"No master found for {service_name!r}{told}")

    def why_unsure(self, address: Address) -> str:
        """Why what that Redis has just written may be thrown away; empty: no Sentinel knows a reason."""
        views, _ = self._views()
        if not views or _latest(views).address == address:
            under_way = any(view.is_failing_over and view.address == address for view in views)
            is_new = any(view.is_promoted and view.address == address for view in views)
            return "a failover is under way" if under_way and not is_new else ""
        return "another Redis is the primary by now"

    def _views(self) -> tuple[list[View], list[str]]:
        """What those say that answer, and what went wrong with the others."""
        views, failed = [], []
        for sentinel in self.sentinels:
            if time.monotonic() < self._away_until.get(sentinel, 0.0):
                continue
            try:
                views.append(self._view(sentinel))
            except (redis.ConnectionError, redis.TimeoutError) as error:
                self._away_until[sentinel] = time.monotonic() + AWAY_S
                failed.append(f"{sentinel} - {error!r}")
            except redis.ResponseError as error:
                if "No such master" not in str(error):
                    raise
        return views, failed

    def _view(self, sentinel: redis.Redis) -> View:
        state: Any = sentinel.sentinel_master(self._primary)
        known: Address = (state["ip"], int(state["port"]))
        is_failing_over = "failover_in_progress" in state["flags"]
        address = known
        if is_failing_over:
            host, port = cast("tuple[Any, Any]", sentinel.sentinel_get_master_addr_by_name(self._primary))
            address = (host.decode() if isinstance(host, bytes) else host, int(port))
        is_promoted = address != known
        is_up = is_promoted or (state["is_master"] and not state["is_sdown"] and not state["is_odown"])
        return View(address, int(state["config-epoch"]), is_up, is_failing_over, is_promoted)


def _latest(views: list[View]) -> View:
    return max(views, key=lambda view: (view.is_promoted, view.epoch))


class FollowingPool(SentinelConnectionPool):
    """Connections to the primary; all are dropped when it is another by now, or says so itself."""

    def __init__(self, service_name: str, sentinel_manager: PrimarySentinels, **kwargs: Any) -> None:
        super().__init__(  # type: ignore[no-untyped-call]  # redis-py's
            service_name, sentinel_manager, connection_class=_Connection, **kwargs
        )
        self._look_at = 0.0

    def get_connection(self, *args: Any, **kwargs: Any) -> Any:
        """A connection to whoever is the primary, as of a second ago at the latest."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_EVERY_S
            self._follow()
        return super().get_connection(*args, **kwargs)

    def _follow(self) -> None:
        known = self.master_address
        if known is None:
            return
        try:
            moved = self.sentinel_manager.discover_master(self.service_name) != known
        except redis.RedisError:
            return  # nobody knows another
        if moved:
            self.disconnect()


class _Connection(SentinelManagedConnection):
    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_response(*args, **kwargs)
        except redis.RedisError as error:
            if kind(error) in _NO_PRIMARY_ANY_MORE and (pool := self.connection_pool.connection_pool_ref()):
                pool.disconnect()
            raise


def connect(
    addresses: list[Address], primary: str, *, sentinel_kwargs: dict[str, Any], **manner: Any
) -> redis.Redis:
    """A client of the primary."""
    sentinels = PrimarySentinels(addresses, primary, sentinel_kwargs=sentinel_kwargs)
    client: redis.Redis = sentinels.master_for(  # type: ignore[no-untyped-call]  # redis-py's
        primary, connection_pool_class=FollowingPool, **manner
    )
    return client


def why_unsure(pool: Any, connection: Any) -> str:
    """Why a failover may throw away what this connection has written; empty: nothing is known of one."""
    if not isinstance(pool, FollowingPool):
        return ""
    sentinels: PrimarySentinels = pool.sentinel_manager
    return sentinels.why_unsure((connection.host, int(connection.port)))
