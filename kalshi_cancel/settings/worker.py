"""What a worker needs, whole or refused: Redis, the exchange, the key, and the limits of its work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from kalshi_cancel.settings.exchange import (
    read_api_key_id,
    read_base_url,
    read_ca_bundle,
    read_http_proxy,
    read_orders_api,
    read_private_key,
)
from kalshi_cancel.settings.reader import INTEGER, Reader, shown
from kalshi_cancel.settings.redis import RedisSettings, redis_fields
from kalshi_cancel.settings.urls import is_host
from kalshi_cancel.settings.variables import DAY_S, LogFormat, OrdersApi

# Redis serves nobody else while it puts down what was claimed together.
BATCH_LIMIT: Final = 200


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
        reader = Reader(os.environ if env is None else env)
        redis = RedisSettings(**redis_fields(reader))
        base_url = read_base_url(reader)
        api_key_id = read_api_key_id(reader)
        private_key_path, private_key = read_private_key(reader)
        passphrase = reader.raw("KALSHI_PRIVATE_KEY_PASSPHRASE")
        settings = cls(
            redis=redis,
            base_url=base_url,
            api_key_id=api_key_id,
            private_key=private_key,
            private_key_path=private_key_path,
            private_key_passphrase=passphrase.encode("utf-8", "surrogateescape") or None,
            orders_api=read_orders_api(reader),
            connect_timeout_s=reader.number("KALSHI_CONNECT_TIMEOUT_S", low=0.01, high=60),
            read_timeout_s=reader.number("KALSHI_READ_TIMEOUT_S", low=0.01, high=60),
            call_deadline_s=reader.number("KALSHI_CALL_DEADLINE_S", low=0.01, high=120),
            cancel_deadline_s=reader.number("KALSHI_CANCEL_DEADLINE_S", low=0.1, high=DAY_S),
            cancel_max_age_s=reader.number("KALSHI_CANCEL_MAX_AGE_S", low=1, high=365 * DAY_S),
            audit_max_age_s=reader.number("KALSHI_AUDIT_MAX_AGE_S", low=1, high=3650 * DAY_S),
            audit_max_entries=reader.integer("KALSHI_AUDIT_MAX_ENTRIES", low=1, high=10**9, unit="entries"),
            shutdown_s=reader.number("KALSHI_SHUTDOWN_S", low=0.5, high=3600),
            read_tokens_per_s=reader.number("KALSHI_READ_TOKENS_PER_S", low=1, high=1e9),
            read_tokens_capacity=reader.number("KALSHI_READ_TOKENS_CAPACITY", low=20, high=1e9),
            write_tokens_per_s=reader.number("KALSHI_WRITE_TOKENS_PER_S", low=1, high=1e9),
            write_tokens_capacity=reader.number("KALSHI_WRITE_TOKENS_CAPACITY", low=10, high=1e9),
            risk_reserve=reader.number("KALSHI_RISK_RESERVE", low=0, high=0.95),
            batch_most=reader.integer("KALSHI_BATCH_MOST", low=1, high=BATCH_LIMIT, unit="orders"),
            read_lag_s=reader.number("KALSHI_READ_LAG_S", low=0, high=60),
            max_body_bytes=reader.integer("KALSHI_MAX_BODY_BYTES", low=1024, high=2**30, unit="bytes"),
            pool_size=reader.integer("KALSHI_POOL_SIZE", low=1, high=1024, unit="connections"),
            http_proxy=read_http_proxy(reader),
            trust_env=reader.flag("KALSHI_TRUST_ENV"),
            ca_bundle=read_ca_bundle(reader),
            metrics_port=_port(reader),
            metrics_host=_metrics_host(reader),
            heartbeat_file=_heartbeat_file(reader),
            log_format=_log_format(reader),
        )
        reader.refuse_near_misses("producers", "workers")
        reader.finish()
        return settings


def read_heartbeat_file(env: Mapping[str, str] | None = None) -> Path | None:
    """The heartbeat file alone, for a health check that needs nothing else; None: there is none."""
    return _heartbeat_file(Reader(os.environ if env is None else env))


def read_log_format(env: Mapping[str, str] | None = None) -> LogFormat:
    """The format of the log alone: it is needed before the rest is read; raises SettingsError."""
    reader = Reader(os.environ if env is None else env)
    log_format = _log_format(reader)
    reader.finish()
    return log_format


def _port(reader: Reader) -> int:
    value = reader.text("KALSHI_METRICS_PORT")
    if INTEGER.fullmatch(value) and int(value) <= 65_535:  # noqa: PLR2004 - the highest port there is
        return int(value)
    if value:
        reader.problem(f"KALSHI_METRICS_PORT must be a port, or 0 for none (got: {shown(value)})")
    return 0


def _metrics_host(reader: Reader) -> str:
    value = reader.text("KALSHI_METRICS_HOST")
    if value and not is_host(value.lower()):
        reader.problem(f"KALSHI_METRICS_HOST must be an address or a host's name (got: {shown(value)})")
    return value


def _heartbeat_file(reader: Reader) -> Path | None:
    value = reader.text("KALSHI_HEARTBEAT_FILE")
    return Path(value) if value else None


def _log_format(reader: Reader) -> LogFormat:
    value = reader.text("KALSHI_LOG_FORMAT").lower()
    if value == "text":
        return "text"
    if value == "json":
        return "json"
    if value not in {"auto", ""}:
        reader.problem(f"KALSHI_LOG_FORMAT must be text, json or auto (got: {shown(value)})")
    return "auto"
