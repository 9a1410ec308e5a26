"""What a worker needs, whole or refused: Redis, the exchange, the key, and the limits of its work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, cast

from kalshi_cancel.settings.reader import read, read_one
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.settings.values import LogFormat, OrdersApi


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What a worker needs besides: the exchange, the key and the limits of a call; built by from_env."""

    redis: RedisSettings
    base_url: str  # scheme and host, no trailing slash
    api_key_id: str
    private_key: bytes = field(repr=False)  # the PEM, not parsed
    private_key_path: str | None
    private_key_passphrase: bytes | None = field(repr=False)
    orders_api: OrdersApi
    connect_timeout_s: float
    read_timeout_s: float
    call_deadline_s: float
    cancel_deadline_s: float
    cancel_max_age_s: float
    audit_max_age_s: float
    audit_max_entries: int
    shutdown_s: float
    read_tokens_per_s: float
    read_tokens_capacity: float
    write_tokens_per_s: float
    write_tokens_capacity: float
    risk_reserve: float
    batch_most: int
    read_lag_s: float
    max_body_bytes: int
    pool_size: int
    http_proxy: str | None = field(repr=False)  # may hold a password
    trust_env: bool
    ca_bundle: str | None
    metrics_port: int  # 0: none
    metrics_host: str
    heartbeat_file: Path | None
    log_format: LogFormat

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Self:
        """The settings in ``env`` (the process environment when None); raises SettingsError.

        Reads the key file's bytes; whether they are a key is for kalshi_cancel.exchange.signing to say.
        """
        found = read(env, "producers", "workers")
        return cls(redis=RedisSettings(**found["producers"]), **found["workers"])


def read_heartbeat_file(env: Mapping[str, str] | None = None) -> Path | None:
    """The heartbeat file alone, for a health check that needs nothing else; None: there is none."""
    return cast("Path | None", read_one(env, "KALSHI_HEARTBEAT_FILE"))


def read_log_format(env: Mapping[str, str] | None = None) -> LogFormat:
    """The format of the log alone: it is needed before the rest is read; raises SettingsError."""
    return cast("LogFormat", read_one(env, "KALSHI_LOG_FORMAT"))
