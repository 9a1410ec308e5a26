"""The environment variables of this service, one row each: what is read, checked, hinted at and documented.

A new variable is a row here, a field of RedisSettings or WorkerSettings, and a line of
docs/reference/configuration.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from kalshi_cancel.settings.exchange import api_key_id, base_url, ca_bundle, http_proxy, key_path
from kalshi_cancel.settings.redis_url import redis_url
from kalshi_cancel.settings.values import (
    LogFormat,
    OrdersApi,
    as_bytes,
    choice,
    flag,
    host,
    key_prefix,
    number,
    port,
    seconds,
    whole_number,
)

Who: TypeAlias = Literal["producers", "workers"]

DAY_S: Final = 86_400

# Redis serves nobody else while it puts down what was claimed together.
BATCH_LIMIT: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One environment variable; what producers read, workers read too.

    ``field``: of RedisSettings (producers) or WorkerSettings (workers) that it sets; None: it only helps
    another variable. ``parse`` makes its value of text, or raises BadValueError. ``file``: the variable that
    may name a file with the text instead; exactly one of the two must be set.
    """

    name: str
    meaning: str
    parse: Callable[[str], Any]
    field: str | None = None
    default: str = ""  # as text; empty: none
    required: bool = False
    secret: bool = False
    verbatim: bool = False  # blanks and quotes belong to it
    file: str | None = None
    who: Who = "workers"


VARIABLES: Final = (
    Variable(
        name="REDIS_URL",
        field="redis_url",
        parse=redis_url,
        required=True,
        secret=True,
        who="producers",
        meaning="The Redis that holds the cancel store: redis://, rediss:// (TLS, verified), unix://"
        " or sentinel://.",
    ),
    Variable(
        name="KALSHI_KEY_PREFIX",
        field="key_prefix",
        parse=key_prefix,
        default="kalshi-cancel",
        who="producers",
        meaning="The prefix of our Redis keys. If it is not the default, Celery's own keys get it too.",
    ),
    Variable(
        name="KALSHI_RESULT_EXPIRES_S",
        field="result_expires_s",
        parse=whole_number(60, 365 * DAY_S, "seconds"),
        default="604800",
        who="producers",
        meaning="How many seconds a result is kept.",
    ),
    Variable(
        name="KALSHI_AUDIT",
        field="audit",
        parse=flag,
        default="on",
        who="producers",
        meaning="Whether everything that is asked for and done goes into the audit log.",
    ),
    Variable(
        name="KALSHI_WAIT_REPLICAS",
        field="wait_replicas",
        parse=whole_number(0, 9, "replicas"),
        default="0",
        who="producers",
        meaning="How many replicas of Redis must have a cancel before it counts as accepted.",
    ),
    Variable(
        name="KALSHI_BASE_URL",
        field="base_url",
        parse=base_url,
        required=True,
        meaning="The exchange, scheme and host only, like https://external-api.kalshi.com.",
    ),
    Variable(
        name="KALSHI_API_KEY_ID",
        field="api_key_id",
        parse=api_key_id,
        file="KALSHI_API_KEY_ID_PATH",
        meaning="The id of the API key; this or KALSHI_API_KEY_ID_PATH is required.",
    ),
    Variable(
        name="KALSHI_API_KEY_ID_PATH",
        parse=key_path,
        meaning="A file with the id. You may replace it, together with the key file, while workers run.",
    ),
    Variable(
        name="KALSHI_PRIVATE_KEY_PATH",
        field="private_key_path",
        parse=key_path,
        meaning="The file with the private key (PEM); this or KALSHI_PRIVATE_KEY is required.",
    ),
    Variable(
        name="KALSHI_PRIVATE_KEY",
        field="private_key",
        parse=as_bytes,
        file="KALSHI_PRIVATE_KEY_PATH",
        secret=True,
        meaning="The private key itself (PEM text), instead of a file.",
    ),
    Variable(
        name="KALSHI_PRIVATE_KEY_PASSPHRASE",
        field="private_key_passphrase",
        parse=as_bytes,
        verbatim=True,
        secret=True,
        meaning="The passphrase of an encrypted private key.",
    ),
    Variable(
        name="KALSHI_ORDERS_API",
        field="orders_api",
        parse=choice(*get_args(OrdersApi)),
        default="v2",
        meaning="The version of the exchange's cancel endpoint: v2, or v1 (which the exchange has retired).",
    ),
    Variable(
        name="KALSHI_CONNECT_TIMEOUT_S",
        field="connect_timeout_s",
        parse=seconds(0.01, 60),
        default="2",
        meaning="How many seconds connecting to the exchange may take.",
    ),
    Variable(
        name="KALSHI_READ_TIMEOUT_S",
        field="read_timeout_s",
        parse=seconds(0.01, 60),
        default="3",
        meaning="How many seconds the exchange may stay silent within one answer.",
    ),
    Variable(
        name="KALSHI_CALL_DEADLINE_S",
        field="call_deadline_s",
        parse=seconds(0.01, 120),
        default="5",
        meaning="How many seconds one HTTP call may take in total.",
    ),
    Variable(
        name="KALSHI_CANCEL_DEADLINE_S",
        field="cancel_deadline_s",
        parse=seconds(0.1, DAY_S),
        default="10",
        meaning="After how many seconds without proof a raw message's cancel is unresolved, if it has no"
        " deadline_s (CancelClient and cancelctl: 10).",
    ),
    Variable(
        name="KALSHI_CANCEL_MAX_AGE_S",
        field="cancel_max_age_s",
        parse=seconds(1, 365 * DAY_S),
        default="86400",
        meaning="After how many seconds an unresolved cancel is given up and kept as a dead letter.",
    ),
    Variable(
        name="KALSHI_AUDIT_MAX_AGE_S",
        field="audit_max_age_s",
        parse=seconds(1, 3650 * DAY_S),
        default="604800",
        meaning="How many seconds an entry stays in the audit log.",
    ),
    Variable(
        name="KALSHI_AUDIT_MAX_ENTRIES",
        field="audit_max_entries",
        parse=whole_number(1, 10**9, "entries"),
        default="1000000",
        meaning="How many entries the audit log holds; the oldest are removed first.",
    ),
    Variable(
        name="KALSHI_SHUTDOWN_S",
        field="shutdown_s",
        parse=seconds(0.5, 3600),
        default="8",
        meaning="A worker ends within this many seconds after SIGTERM, whatever it is doing.",
    ),
    Variable(
        name="KALSHI_READ_TOKENS_PER_S",
        field="read_tokens_per_s",
        parse=number(1, 1e9, "tokens"),
        default="200",
        meaning="Read tokens that the account gets a second; used only until the exchange tells its limits.",
    ),
    Variable(
        name="KALSHI_READ_TOKENS_CAPACITY",
        field="read_tokens_capacity",
        parse=number(20, 1e9, "tokens"),
        default="200",
        meaning="Capacity of the account's read bucket; used only until the exchange tells its limits.",
    ),
    Variable(
        name="KALSHI_WRITE_TOKENS_PER_S",
        field="write_tokens_per_s",
        parse=number(1, 1e9, "tokens"),
        default="100",
        meaning="Write tokens that the account gets a second; used only until the exchange tells its limits.",
    ),
    Variable(
        name="KALSHI_WRITE_TOKENS_CAPACITY",
        field="write_tokens_capacity",
        parse=number(10, 1e9, "tokens"),
        default="100",
        meaning="Capacity of the account's write bucket; used only until the exchange tells its limits.",
    ),
    Variable(
        name="KALSHI_RISK_RESERVE",
        field="risk_reserve",
        parse=number(0, 0.95),
        default="0.2",
        meaning="Share of each write bucket that strategy cancels leave to the risk lane.",
    ),
    Variable(
        name="KALSHI_BATCH_MOST",
        field="batch_most",
        parse=whole_number(1, BATCH_LIMIT, "orders"),
        default="100",
        meaning="The most orders in a batch, up to 200. It has fewer if the exchange refuses so many.",
    ),
    Variable(
        name="KALSHI_READ_LAG_S",
        field="read_lag_s",
        parse=seconds(0, 60),
        default="2",
        meaning="For how many seconds after a cancel a read may still show the order's older state.",
    ),
    Variable(
        name="KALSHI_MAX_BODY_BYTES",
        field="max_body_bytes",
        parse=whole_number(1024, 2**30, "bytes"),
        default="4194304",
        meaning="How many bytes of an answer a worker reads at most.",
    ),
    Variable(
        name="KALSHI_POOL_SIZE",
        field="pool_size",
        parse=whole_number(1, 1024, "connections"),
        default="32",
        meaning="How many HTTP connections to the exchange are kept open.",
    ),
    Variable(
        name="KALSHI_HTTP_PROXY",
        field="http_proxy",
        parse=http_proxy,
        secret=True,
        meaning="A proxy for calls to the exchange, like http://user:password@proxy.example:3128.",
    ),
    Variable(
        name="KALSHI_TRUST_ENV",
        field="trust_env",
        parse=flag,
        default="false",
        meaning="Whether, if KALSHI_HTTP_PROXY or KALSHI_CA_BUNDLE is not set, a worker reads HTTP_PROXY,"
        " HTTPS_PROXY, ALL_PROXY, NO_PROXY, REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE: true or false.",
    ),
    Variable(
        name="KALSHI_CA_BUNDLE",
        field="ca_bundle",
        parse=ca_bundle,
        meaning="Certificates to trust (PEM file, or folder made by c_rehash) instead of the built-in ones.",
    ),
    Variable(
        name="KALSHI_METRICS_PORT",
        field="metrics_port",
        parse=port,
        default="0",
        meaning="The port of /metrics, /healthz and /ready. Each worker on a host needs its own. 0: no port.",
    ),
    Variable(
        name="KALSHI_METRICS_HOST",
        field="metrics_host",
        parse=host,
        default="127.0.0.1",
        meaning="The address on which a worker opens the metrics port; 0.0.0.0 or :: for all.",
    ),
    Variable(
        name="KALSHI_HEARTBEAT_FILE",
        field="heartbeat_file",
        parse=Path,
        meaning="A file that a worker touches every second while it is alive; empty: no file.",
    ),
    Variable(
        name="KALSHI_LOG_FORMAT",
        field="log_format",
        parse=choice(*get_args(LogFormat)),
        default="auto",
        meaning="How a worker logs: text, json, or auto (text in a terminal, else json).",
    ),
)

BY_NAME: Final = {variable.name: variable for variable in VARIABLES}
_PREFIX: Final = "KALSHI_"
OURS: Final = {name.removeprefix(_PREFIX): name for name in BY_NAME if name.startswith(_PREFIX)}
