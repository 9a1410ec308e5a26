"""The environment variables of this service, one row each; docs/reference/configuration.md has the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Who: TypeAlias = Literal["producers", "workers"]

OrdersApi: TypeAlias = Literal["v2", "v1"]

LogFormat: TypeAlias = Literal["auto", "text", "json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One environment variable, as docs/reference/configuration.md has it; workers read all of them."""

    name: str
    meaning: str
    default: str = ""  # as text; empty: none
    required: bool = False
    secret: bool = False
    who: Who = "workers"


VARIABLES: Final = (
    Variable(
        name="REDIS_URL",
        required=True,
        secret=True,
        who="producers",
        meaning="The Redis that holds queue and results: redis://, rediss:// (TLS, verified), unix://"
        " or sentinel://.",
    ),
    Variable(
        name="KALSHI_KEY_PREFIX",
        default="kalshi-cancel",
        who="producers",
        meaning="What this service's Redis keys begin with; Celery's own too, if it is not the default.",
    ),
    Variable(
        name="KALSHI_RESULT_EXPIRES_S",
        default="604800",
        who="producers",
        meaning="How many seconds a result is kept.",
    ),
    Variable(
        name="KALSHI_AUDIT",
        default="on",
        who="producers",
        meaning="Whether all that is asked for and done goes into the audit trail.",
    ),
    Variable(
        name="KALSHI_WAIT_REPLICAS",
        default="0",
        who="producers",
        meaning="How many replicas of Redis must have a cancel before it counts as accepted.",
    ),
    Variable(
        name="KALSHI_BASE_URL",
        required=True,
        meaning="The exchange, scheme and host only, like https://external-api.kalshi.com.",
    ),
    Variable(
        name="KALSHI_API_KEY_ID",
        meaning="The id of the API key; this or KALSHI_API_KEY_ID_PATH is required.",
    ),
    Variable(
        name="KALSHI_API_KEY_ID_PATH",
        meaning="A file with the id, which may be replaced with the key's while workers run.",
    ),
    Variable(
        name="KALSHI_PRIVATE_KEY_PATH",
        meaning="The file with the private key (PEM); this or KALSHI_PRIVATE_KEY is required.",
    ),
    Variable(
        name="KALSHI_PRIVATE_KEY",
        secret=True,
        meaning="The private key itself (PEM text), instead of a file.",
    ),
    Variable(
        name="KALSHI_PRIVATE_KEY_PASSPHRASE",
        secret=True,
        meaning="The passphrase of an encrypted private key.",
    ),
    Variable(
        name="KALSHI_ORDERS_API",
        default="v2",
        meaning="The dialect of the cancel endpoint: v2, or v1 (retired at the exchange itself).",
    ),
    Variable(
        name="KALSHI_CONNECT_TIMEOUT_S",
        default="2",
        meaning="How many seconds connecting to the exchange may take.",
    ),
    Variable(
        name="KALSHI_READ_TIMEOUT_S",
        default="3",
        meaning="How many seconds the exchange may stay silent within one answer.",
    ),
    Variable(
        name="KALSHI_CALL_DEADLINE_S",
        default="5",
        meaning="How many seconds one HTTP call may take in total.",
    ),
    Variable(
        name="KALSHI_CANCEL_DEADLINE_S",
        default="10",
        meaning="After how many seconds without proof a raw message's cancel is unresolved, if it sets no"
        " deadline_s (CancelClient and cancelctl: 10).",
    ),
    Variable(
        name="KALSHI_CANCEL_MAX_AGE_S",
        default="86400",
        meaning="After how many seconds an unresolved cancel is given up and kept as a dead letter.",
    ),
    Variable(
        name="KALSHI_AUDIT_MAX_AGE_S",
        default="604800",
        meaning="How many seconds an entry stays in the audit trail.",
    ),
    Variable(
        name="KALSHI_AUDIT_MAX_ENTRIES",
        default="1000000",
        meaning="How many entries the audit trail holds; the oldest go first.",
    ),
    Variable(
        name="KALSHI_SHUTDOWN_S",
        default="8",
        meaning="How many seconds after SIGTERM a worker has ended, whatever it was doing.",
    ),
    Variable(
        name="KALSHI_READ_TOKENS_PER_S",
        default="200",
        meaning="Read tokens a second that the account has, while the exchange cannot be asked.",
    ),
    Variable(
        name="KALSHI_READ_TOKENS_CAPACITY",
        default="200",
        meaning="Read tokens that the account can save up, while the exchange cannot be asked.",
    ),
    Variable(
        name="KALSHI_WRITE_TOKENS_PER_S",
        default="100",
        meaning="Write tokens a second that the account has, while the exchange cannot be asked.",
    ),
    Variable(
        name="KALSHI_WRITE_TOKENS_CAPACITY",
        default="100",
        meaning="Write tokens that the account can save up, while the exchange cannot be asked.",
    ),
    Variable(
        name="KALSHI_RISK_RESERVE",
        default="0.2",
        meaning="Share of each write bucket that strategy cancels leave to the risk lane.",
    ),
    Variable(
        name="KALSHI_BATCH_MOST",
        default="100",
        meaning="How many orders one call cancels, 200 at most; less where the exchange refuses so many.",
    ),
    Variable(
        name="KALSHI_READ_LAG_S",
        default="2",
        meaning="For how many seconds after a cancel a read may still show the order's older state.",
    ),
    Variable(
        name="KALSHI_MAX_BODY_BYTES",
        default="4194304",
        meaning="The longest answer, in bytes, that is read.",
    ),
    Variable(
        name="KALSHI_POOL_SIZE",
        default="32",
        meaning="How many HTTP connections to the exchange are kept open.",
    ),
    Variable(
        name="KALSHI_HTTP_PROXY",
        secret=True,
        meaning="A proxy for calls to the exchange, like http://user:password@proxy.example:3128.",
    ),
    Variable(
        name="KALSHI_TRUST_ENV",
        default="false",
        meaning="Whether what KALSHI_HTTP_PROXY and KALSHI_CA_BUNDLE do not say is taken from HTTP_PROXY,"
        " HTTPS_PROXY, ALL_PROXY, NO_PROXY, REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE: true or false.",
    ),
    Variable(
        name="KALSHI_CA_BUNDLE",
        meaning="Certificates to trust (PEM file, or folder made by c_rehash) instead of the built-in ones.",
    ),
    Variable(
        name="KALSHI_METRICS_PORT",
        default="0",
        meaning="The port of /metrics, /healthz and /ready, each worker's own; 0: none is opened.",
    ),
    Variable(
        name="KALSHI_METRICS_HOST",
        default="127.0.0.1",
        meaning="The address that the metrics port is opened on; 0.0.0.0 or :: for all.",
    ),
    Variable(
        name="KALSHI_HEARTBEAT_FILE",
        meaning="A file that a worker touches every second as long as it lives; none: no file.",
    ),
    Variable(
        name="KALSHI_LOG_FORMAT",
        default="auto",
        meaning="How a worker logs: text, json, or auto, which is text at a terminal and else json.",
    ),
)

BY_NAME: Final = {variable.name: variable for variable in VARIABLES}
_PREFIX: Final = "KALSHI_"
OURS: Final = {name.removeprefix(_PREFIX): name for name in BY_NAME if name.startswith(_PREFIX)}
DAY_S: Final = 86_400
