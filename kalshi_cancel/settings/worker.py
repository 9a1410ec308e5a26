"""Hides the process environment: only this module reads it, and settings are either whole or refused.

Every problem found is reported in one SettingsError. Surrounding blanks of a value are dropped and an empty
value counts as not set; a passphrase is taken as it is.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self, TypeAlias, TypedDict
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from kalshi_cancel.settings.near_misses import nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

Who: TypeAlias = Literal["producers", "workers"]
OrdersApi: TypeAlias = Literal["v2", "v1"]
LogFormat: TypeAlias = Literal["auto", "text", "json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One environment variable, as docs/configuration.md has it; what producers read, workers read too."""

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

_BY_NAME: Final = {variable.name: variable for variable in VARIABLES}
_PREFIX: Final = "KALSHI_"
_OURS: Final = {name.removeprefix(_PREFIX): name for name in _BY_NAME if name.startswith(_PREFIX)}

MAX_KEY_BYTES: Final = (
    64 * 1024
)  # many times the largest key; keeps a wrong path (a log, a device) out of memory
DAY_S: Final = 86_400
# Redis serves nobody else while it puts down what was claimed together.
BATCH_LIMIT: Final = 200

_INTEGER: Final = re.compile(r"[0-9]{1,15}")
_NUMBER: Final = re.compile(r"[0-9]{1,15}(?:\.[0-9]{1,9})?")
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,20})://")
_HOST: Final = re.compile(
    r"(?=.{1,253}$)[a-z0-9_](?:[a-z0-9_-]{0,62})(?:\.[a-z0-9_](?:[a-z0-9_-]{0,62}))*\.?"
)
_KEY_PREFIX: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9:._-]{0,63}")
_KEY_ID: Final = re.compile(r"[\x21-\x7e]{1,256}")
_LOOKS_LIKE_A_KEY: Final = re.compile(r"-----|\n|^M[A-Za-z0-9+/=\s\\]{60,}$")
_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})

_BASE_URL_RULE: Final = "KALSHI_BASE_URL must be scheme and host only, like https://external-api.kalshi.com"
_REDIS_SCHEMES: Final = ("redis", "rediss", "unix", "sentinel")
# urlsplit cannot read a list of hosts. The name of the primary, as sentinel.conf allows it, and a database.
_SENTINEL_URL: Final = re.compile(
    r"sentinel://(?:(?P<login>[^@/\s]*)@)?(?P<hosts>[^@/?#]+)/(?P<name>[A-Za-z0-9._-]+)(?:/(?P<db>[0-9]{1,5}))?/?"
    r"(?:\?(?P<query>[^#\s]*))?",
    re.IGNORECASE,
)
_SENTINEL_RULE: Final = "must be like sentinel://user:password@host1:26379,host2:26379/name-of-primary/0"
SENTINEL_PORT: Final = 26379
_ENCODE_HINT: Final = "special characters in its user name or password must be percent-encoded"
# The parameters that redis-py, Celery's broker and Celery's result backend all read, and read alike. What
# only some of them know would hold for the queue and not for the results, or the other way round.
_TLS_FILES: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_REDIS_PARAMETERS: Final = {
    "redis": frozenset[str](),
    "rediss": frozenset({"ssl_cert_reqs", *_TLS_FILES}),
    "unix": frozenset({"db"}),
    "sentinel": frozenset({"sentinel_username", "sentinel_password"}),
}
_CERT_REQS: Final = {
    "required": "required",
    "optional": "optional",
    "none": "none",
    "cert_required": "required",
    "cert_optional": "optional",
    "cert_none": "none",
}


class SettingsError(ValueError):
    """The environment does not make valid settings; ``problems`` are all of them, without any secret."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "; ".join(self.problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentinels:
    """Whom to ask where the primary is, and what it is called there.

    ``login`` at the primary and ``sentinel_login`` have ``username`` and ``password``, as far as set.
    """

    addresses: tuple[tuple[str, int], ...]
    primary: str
    database: int
    login: Mapping[str, str] = field(repr=False)
    sentinel_login: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisSettings:
    """What producers and workers share: where Redis is and how our keys are called there; built by from_env.

    ``redis_url`` is complete for redis-py: database and TLS verification are spelled out in it.
    """

    redis_url: str = field(repr=False)  # may hold a password; masked_url is for eyes
    key_prefix: str
    result_expires_s: int
    audit: bool
    wait_replicas: int

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Self:
        """The settings in ``env`` (the process environment when None); raises SettingsError.

        ``RedisSettings.from_env({"REDIS_URL": url})`` makes them of a URL alone.
        """
        reader = _Reader(os.environ if env is None else env)
        settings = cls(**_redis_fields(reader))
        reader.refuse_near_misses("producers")
        reader.finish()
        return settings

    @classmethod
    def at(cls, redis_url: str) -> Self:
        """The settings of the process environment, but for another Redis; raises SettingsError."""
        return cls.from_env({**os.environ, "REDIS_URL": redis_url})

    @property
    def celery_url(self) -> str:
        """The same Redis as Celery's broker and result backend want it written."""
        parts = urlsplit(self.redis_url)
        if parts.scheme == "sentinel":
            login, at, hosts = parts.netloc.rpartition("@")
            database = parts.path.split("/")[-1]
            return ";".join(f"sentinel://{login}{at}{host}/{database}" for host in hosts.split(","))
        if parts.scheme != "unix":
            return self.redis_url
        database = dict(parse_qsl(parts.query)).get("db", "0")
        return f"redis+socket://{parts.netloc}{parts.path}?virtual_host={database}"

    @property
    def celery_prefix(self) -> str:
        """What Celery's keys and channels begin with: by default nothing, as any Celery producer expects."""
        is_default = self.key_prefix == _BY_NAME["KALSHI_KEY_PREFIX"].default
        return "" if is_default else f"{self.key_prefix}:"

    @property
    def sentinels(self) -> Sentinels | None:
        """Who knows where the primary is; None when ``redis_url`` says it itself."""
        parts = urlsplit(self.redis_url)
        if parts.scheme != "sentinel":
            return None
        userinfo, _, hosts = parts.netloc.rpartition("@")
        username, _, password = userinfo.partition(":")
        login = {"username": unquote(username), "password": unquote(password)}
        _, primary, database = parts.path.split("/")
        addresses = (urlsplit(f"//{host}") for host in hosts.split(","))
        return Sentinels(
            addresses=tuple((each.hostname or "", each.port or SENTINEL_PORT) for each in addresses),
            primary=primary,
            database=int(database),
            login={name: value for name, value in login.items() if value},
            sentinel_login={name.removeprefix("sentinel_"): value for name, value in parse_qsl(parts.query)},
        )

    @property
    def masked_url(self) -> str:
        """The URL without its password and parameters, for logs and reports."""
        parts = urlsplit(self.redis_url)
        userinfo, at, address = parts.netloc.rpartition("@")
        user, colon, _ = userinfo.partition(":")
        return f"{parts.scheme}://{user}{colon and ':***'}{at}{address}{parts.path}"


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
        reader = _Reader(os.environ if env is None else env)
        redis = RedisSettings(**_redis_fields(reader))
        base_url = _base_url(reader)
        api_key_id = _api_key_id(reader)
        private_key_path, private_key = _private_key(reader)
        passphrase = reader.raw("KALSHI_PRIVATE_KEY_PASSPHRASE")
        settings = cls(
            redis=redis,
            base_url=base_url,
            api_key_id=api_key_id,
            private_key=private_key,
            private_key_path=private_key_path,
            private_key_passphrase=passphrase.encode("utf-8", "surrogateescape") or None,
            orders_api=_orders_api(reader),
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
            http_proxy=_http_proxy(reader),
            trust_env=reader.flag("KALSHI_TRUST_ENV"),
            ca_bundle=_ca_bundle(reader),
            metrics_port=_port(reader),
            metrics_host=_metrics_host(reader),
            heartbeat_file=_heartbeat_file(reader),
            log_format=_log_format(reader),
        )
        reader.refuse_near_misses("producers", "workers")
        reader.finish()
        return settings


# Celery prefers these to any configuration: they would tear messages and book apart, and past the TLS rule.
CELERY_OVERRIDES: Final = (
    "CELERY_BROKER_URL",
    "CELERY_BROKER_READ_URL",
    "CELERY_BROKER_WRITE_URL",
    "CELERY_RESULT_BACKEND",
)


def refuse_celery_overrides(env: Mapping[str, str] | None = None) -> None:
    """Raises SettingsError when Celery would read another broker or backend out of the environment."""
    set_ones = [name for name in CELERY_OVERRIDES if (os.environ if env is None else env).get(name)]
    if set_ones:
        raise SettingsError(
            tuple(f"{name} must not be set: REDIS_URL names the one Redis" for name in set_ones)
        )


def foreign_variables(env: Mapping[str, str] | None = None) -> dict[str, str | None]:
    """The variables that look like ours and are not, each with the one that was meant, None for none."""
    return _foreign_variables(os.environ if env is None else env)


def _foreign_variables(env: Mapping[str, str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in env:
        prefix, _, rest = name.partition("_")
        is_prefix = prefix.upper() == "KALSHI" or nearest(prefix, ["KALSHI"]) is not None
        if name in _BY_NAME or not is_prefix or not env[name].strip():
            continue
        meant = rest if rest in _OURS else nearest(rest, _OURS)
        if meant is not None or prefix == "KALSHI":
            found[name] = _OURS.get(meant or "")
    return found


def read_heartbeat_file(env: Mapping[str, str] | None = None) -> Path | None:
    """The heartbeat file alone, for a health check that needs nothing else; None: there is none."""
    return _heartbeat_file(_Reader(os.environ if env is None else env))


def read_log_format(env: Mapping[str, str] | None = None) -> LogFormat:
    """The format of the log alone: it is needed before the rest is read; raises SettingsError."""
    reader = _Reader(os.environ if env is None else env)
    log_format = _log_format(reader)
    reader.finish()
    return log_format


def read_traces_exporter(env: Mapping[str, str] | None = None) -> str | None:
    """``otlp`` or ``console`` where OpenTelemetry's own variables ask for traces, else None."""
    env = os.environ if env is None else env
    if (env.get("OTEL_SDK_DISABLED") or "").strip().lower() == "true":
        return None
    named = (env.get("OTEL_TRACES_EXPORTER") or "").strip().lower()
    addressed = env.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or env.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if named in {"otlp", "console"}:
        return named
    return "otlp" if addressed and not named else None


def count_in_files(folder: str | None) -> None:
    """Has prometheus_client count in files of this folder, or in memory; it reads that nowhere else.

    Whatever the environment says of it is overruled: two workers that count in one folder count wrong.
    """
    for name in ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"):
        os.environ.pop(name, None)
    if folder is not None:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder


class _Reader:
    """Reads variables of the table and keeps what is wrong with them; a bad one reads as a harmless value."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env
        self._problems: list[str] = []

    def problem(self, text: str) -> None:
        self._problems.append(text)

    def finish(self) -> None:
        """Raise SettingsError if there was any problem."""
        if self._problems:
            raise SettingsError(tuple(self._problems))

    def refuse_near_misses(self, *readers: Who) -> None:
        """Has the variables be problems that are nearly those that these read."""
        for name, meant in _foreign_variables(self._env).items():
            if meant is not None and _BY_NAME[meant].who in readers:
                self.problem(f"{_shown(name)} is no setting: did you mean {meant}?")

    def raw(self, name: str) -> str:
        """The value as it is set, or empty."""
        return self._env.get(_BY_NAME[name].name) or ""

    def text(self, name: str) -> str:
        """The value without surrounding blanks, else the default; empty for neither or a problem."""
        variable = _BY_NAME[name]
        value = self.raw(name).strip()
        if not value:
            if variable.required:
                self.problem(f"{name} is not set: {variable.meaning[0].lower()}{variable.meaning[1:-1]}")
            return variable.default
        if value[0] in "\"'" and value[0] == value[-1]:
            self.problem(f"{name} is wrapped in quotes, which were taken literally: remove them")
            return ""
        return value

    def number(self, name: str, *, low: float, high: float) -> float:
        """A number of seconds within bounds."""
        value = self.text(name)
        if _NUMBER.fullmatch(value) and low <= float(value) <= high:
            return float(value)
        return float(self._bad_number(name, value, f"a number of seconds from {low:g} to {high:g}"))

    def integer(self, name: str, *, low: int, high: int, unit: str) -> int:
        """A whole number of ``unit`` within bounds."""
        value = self.text(name)
        if _INTEGER.fullmatch(value) and low <= int(value) <= high:
            return int(value)
        return int(self._bad_number(name, value, f"a whole number of {unit} from {low} to {high}"))

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.text(name).lower()
        if value and value not in _TRUE | _FALSE:
            self.problem(f"{name} must be true or false (got: {_shown(value)})")
        return value in _TRUE

    def _bad_number(self, name: str, value: str, expected: str) -> str:
        if value:  # else text() has said what is wrong
            self.problem(f"{name} must be {expected} (got: {_shown(value)})")
        return _BY_NAME[name].default


def _shown(value: str) -> str:
    """A value that is not secret, fit for one line."""
    text = "".join(char if char.isprintable() else "?" for char in value)
    return text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004  (what an eye takes in)


# --- Redis ------------------------------------------------------------------------------------------------


class _RedisFields(TypedDict):
    redis_url: str
    key_prefix: str
    result_expires_s: int
    audit: bool
    wait_replicas: int


def _redis_fields(reader: _Reader) -> _RedisFields:
    url = _redis_url(reader)
    prefix = reader.text("KALSHI_KEY_PREFIX")
    if prefix and not _KEY_PREFIX.fullmatch(prefix):
        reader.problem(
            "KALSHI_KEY_PREFIX must be at most 64 letters, digits and : . _ -, the first a letter or a digit"
            f" (got: {_shown(prefix)})"
        )
    expires_s = reader.integer("KALSHI_RESULT_EXPIRES_S", low=60, high=365 * DAY_S, unit="seconds")
    return {
        "redis_url": url,
        "key_prefix": prefix,
        "result_expires_s": expires_s,
        "audit": reader.flag("KALSHI_AUDIT"),
        "wait_replicas": reader.integer("KALSHI_WAIT_REPLICAS", low=0, high=9, unit="replicas"),
    }


def _redis_url(reader: _Reader) -> str:
    """The URL, database and TLS verification spelled out; never quoted in a problem for its password."""
    value = reader.text("REDIS_URL")
    if not value:
        return ""
    scheme = _SCHEME.match(value)
    if scheme is None or scheme[1].lower() not in _REDIS_SCHEMES:
        found = f"{scheme[1]}://" if scheme else "no scheme"
        reader.problem(f"REDIS_URL must start with redis://, rediss://, unix:// or sentinel:// (got {found})")
        return ""
    if scheme[1].lower() == "sentinel":
        return _sentinel_url(reader, value)
    parts = _split(value)
    if parts is None or parts.fragment or "#" in value:
        reader.problem(f"REDIS_URL cannot be understood: {_ENCODE_HINT}")
        return ""
    problems = [*_redis_address_problems(parts), *_redis_parameter_problems(parts)]
    for problem in problems:
        reader.problem(f"REDIS_URL {problem}")
    return "" if problems else _spelled_out(parts)


def _sentinel_url(reader: _Reader, value: str) -> str:
    """The URL with every port and the database in it."""
    found = _SENTINEL_URL.fullmatch(value)
    hosts = [_split(f"sentinel://{host}") for host in found["hosts"].split(",")] if found else []
    if found is None or not all(host and _is_host(host.hostname or "") and not host.path for host in hosts):
        reader.problem(f"REDIS_URL {_SENTINEL_RULE}, and {_ENCODE_HINT}")
        return ""
    parts = SplitResult("sentinel", "", "", found["query"] or "", "")
    problems = _redis_parameter_problems(parts)
    for problem in problems:
        reader.problem(f"REDIS_URL {problem}")
    login = f"{found['login'].replace(';', '%3B')}@" if found["login"] else ""
    addresses = ",".join(_address(host.hostname or "", host.port or SENTINEL_PORT) for host in hosts if host)
    query = urlencode(parse_qsl(parts.query), quote_via=quote)
    path = f"{found['name']}/{found['db'] or 0}"
    return "" if problems else f"sentinel://{login}{addresses}/{path}{'?' if query else ''}{query}"


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _redis_address_problems(parts: SplitResult) -> list[str]:
    if parts.scheme == "unix":
        if parts.hostname or len(parts.path) < 2:  # noqa: PLR2004  (a slash and a name)
            return ["must name the socket by its full path, like unix:///run/redis.sock"]
        return []
    problems = []
    if not parts.hostname:
        problems.append(f"names no host, or {_ENCODE_HINT}")
    elif not _is_host(parts.hostname):
        problems.append(f"has a host that cannot be one, or {_ENCODE_HINT}")
    if not re.fullmatch(r"/?|/[0-9]{1,5}", parts.path):
        problems.append(f"must end in a database number, like /0, or {_ENCODE_HINT}")
    return problems


def _redis_parameter_problems(parts: SplitResult) -> list[str]:
    given = parse_qsl(parts.query, keep_blank_values=True)
    allowed = _REDIS_PARAMETERS[parts.scheme]
    names = [name for name, _ in given]
    problems = []
    if foreign := sorted(set(names) - allowed):
        known = f"only {', '.join(sorted(allowed))} can be given" if allowed else "none can be given"
        hint = "; TLS needs rediss://" if any(name.startswith("ssl") for name in foreign) else ""
        problems.append(f"has parameters that are not supported: {known} with {parts.scheme}://{hint}")
    if len(names) != len(set(names)):
        problems.append("has a parameter twice")
    for name, value in given:
        if name not in allowed:
            continue
        if name == "ssl_cert_reqs" and value.lower() not in _CERT_REQS:
            problems.append("must have ssl_cert_reqs=required, optional or none")
        if name in _TLS_FILES and not _is_file(value):
            problems.append(f"has a {name} that names no file: {_shown(value)}")
        if name == "db" and not re.fullmatch(r"[0-9]{1,5}", value):
            problems.append("must have a database number as its db")
    return problems


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # a folder that may not be entered, a name that is too long
        return False


def _spelled_out(parts: SplitResult) -> str:
    """The URL with every default that the three readers would choose differently written into it."""
    parameters = dict(parse_qsl(parts.query))
    path = parts.path
    if parts.scheme == "unix":
        parameters.setdefault("db", "0")
        path = quote(unquote(path))
    else:
        path = path if len(path) > 1 else "/0"
    if parts.scheme == "rediss":
        # Celery's broker would verify nothing here, its result backend would refuse to start.
        parameters["ssl_cert_reqs"] = _CERT_REQS[parameters.get("ssl_cert_reqs", "required").lower()]
    query = urlencode(parameters, quote_via=quote, safe="/")
    netloc = parts.netloc.replace(";", "%3B")  # which Celery's broker would take for a list of URLs
    return f"{parts.scheme}://{netloc}{path}{'?' if query else ''}{query}"


# --- The exchange -----------------------------------------------------------------------------------------


def _base_url(reader: _Reader) -> str:
    value = reader.text("KALSHI_BASE_URL")
    if not value:
        return ""
    scheme = _SCHEME.match(value)
    if scheme is None or scheme[1].lower() not in {"https", "http"}:
        reader.problem(f"{_BASE_URL_RULE} (got {f'the scheme {scheme[1]}' if scheme else 'no scheme'})")
        return ""
    parts = _split(value)
    if parts is None:
        reader.problem(f"{_BASE_URL_RULE} (got something that is no URL)")
        return ""
    extras = [
        (parts.username is not None or parts.password is not None, "a user name or password"),
        (parts.path not in {"", "/"}, f"a path: {_shown(parts.path)}"),
        ("?" in value, "a query"),
        ("#" in value, "a fragment"),
        (not parts.hostname, "no host"),
        (bool(parts.hostname) and not _is_host(parts.hostname or ""), "a host that cannot be one"),
    ]
    found = [what for is_so, what in extras if is_so]
    if found:
        reader.problem(f"{_BASE_URL_RULE} (got {', and '.join(found)})")
        return ""
    host = parts.hostname or ""
    if parts.scheme == "http" and not _is_loopback(host):
        reader.problem(
            "KALSHI_BASE_URL must begin with https:// (http:// is for an exchange on this machine only:"
            f" localhost, 127.0.0.1 or [::1]; got the host {_shown(host)})"
        )
        return ""
    address = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{address}{'' if parts.port is None else f':{parts.port}'}"


def _api_key_id(reader: _Reader) -> str:
    path, content = _text_or_file(reader, "KALSHI_API_KEY_ID")
    value = content.decode("utf-8", "replace").strip()
    if value and not _KEY_ID.fullmatch(value):
        source = "KALSHI_API_KEY_ID" if path is None else f"KALSHI_API_KEY_ID_PATH: what is in {_shown(path)}"
        # Not shown: what lands here by mistake is likely the private key.
        reader.problem(
            f"{source} must be at most 256 printable ASCII characters without spaces"
            f" (got {len(value)} characters)"
        )
    return value


def _private_key(reader: _Reader) -> tuple[str | None, bytes]:
    """The key file's path, where there is one, and the key's text."""
    return _text_or_file(reader, "KALSHI_PRIVATE_KEY")


def _text_or_file(reader: _Reader, name: str) -> tuple[str | None, bytes]:
    """What a variable holds, or the file that NAME_PATH names, with its path; exactly one must be set."""
    path_name = f"{name}_PATH"
    path, text = reader.text(path_name), reader.text(name)
    path_is_set, text_is_set = bool(reader.raw(path_name).strip()), bool(reader.raw(name).strip())
    if path_is_set and text_is_set:
        reader.problem(f"{path_name} and {name} are both set: set one of them")
    elif not path_is_set and not text_is_set:
        reader.problem(f"neither {path_name} nor {name} is set: set one of them")
    elif _LOOKS_LIKE_A_KEY.search(path):  # before a problem with the file quotes its name
        reader.problem(f"{path_name} holds a key, not a path: put it into KALSHI_PRIVATE_KEY")
    elif path:
        return path, _small_file(reader, path_name, path)
    return None, text.encode("utf-8", "surrogateescape")


def _small_file(reader: _Reader, name: str, path: str) -> bytes:
    problem = ""
    content = b""
    try:
        file = Path(path)
        if file.exists() and not file.is_file():
            problem = "is not a file"
        else:
            with file.open("rb") as opened:
                content = opened.read(MAX_KEY_BYTES + 1)
            if len(content) > MAX_KEY_BYTES:
                problem = f"is larger than {MAX_KEY_BYTES // 1024} KiB, which no key is"
            elif not content.strip():
                problem = "is empty"
    except FileNotFoundError:
        problem = "does not exist"
    except PermissionError:
        problem = "may not be read by this user"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        problem = f"cannot be read ({getattr(error, 'strerror', None) or 'not a valid path'})"
    if problem:
        reader.problem(f"{name}: the file {_shown(path)} {problem}")
    return content


def _orders_api(reader: _Reader) -> OrdersApi:
    value = reader.text("KALSHI_ORDERS_API").lower()
    if value == "v1":
        return "v1"
    if value not in {"v2", ""}:
        reader.problem(f"KALSHI_ORDERS_API must be v2 or v1 (got: {_shown(value)})")
    return "v2"


def _http_proxy(reader: _Reader) -> str | None:
    """The proxy's URL; never quoted in a problem: it may hold a password."""
    value = reader.text("KALSHI_HTTP_PROXY")
    if not value:
        return None
    parts = _split(value)
    if (
        parts is None
        or parts.scheme not in {"http", "https"}
        or not _is_host(parts.hostname or "")
        or parts.path not in {"", "/"}
        or "?" in value
        or "#" in value
    ):
        reader.problem(
            "KALSHI_HTTP_PROXY must be http:// or https://, a host and a port, like"
            f" http://proxy.example:3128, and {_ENCODE_HINT}"
        )
    return value


def _ca_bundle(reader: _Reader) -> str | None:
    value = reader.text("KALSHI_CA_BUNDLE")
    if not value:
        return None
    try:
        path = Path(value)
        usable = path.is_dir() or b"-----BEGIN" in path.read_bytes()
    except (OSError, ValueError):
        usable = False
    if not usable:
        reader.problem(
            "KALSHI_CA_BUNDLE must name a readable PEM file or a folder of certificates"
            f" (got: {_shown(value)})"
        )
    return value


# --- Being watched ----------------------------------------------------------------------------------------


def _port(reader: _Reader) -> int:
    value = reader.text("KALSHI_METRICS_PORT")
    if _INTEGER.fullmatch(value) and int(value) <= 65_535:  # noqa: PLR2004 - the highest port there is
        return int(value)
    if value:
        reader.problem(f"KALSHI_METRICS_PORT must be a port, or 0 for none (got: {_shown(value)})")
    return 0


def _metrics_host(reader: _Reader) -> str:
    value = reader.text("KALSHI_METRICS_HOST")
    if value and not _is_host(value.lower()):
        reader.problem(f"KALSHI_METRICS_HOST must be an address or a host's name (got: {_shown(value)})")
    return value


def _heartbeat_file(reader: _Reader) -> Path | None:
    value = reader.text("KALSHI_HEARTBEAT_FILE")
    return Path(value) if value else None


def _log_format(reader: _Reader) -> LogFormat:
    value = reader.text("KALSHI_LOG_FORMAT").lower()
    if value == "text":
        return "text"
    if value == "json":
        return "json"
    if value not in {"auto", ""}:
        reader.problem(f"KALSHI_LOG_FORMAT must be text, json or auto (got: {_shown(value)})")
    return "auto"


# --- URLs -------------------------------------------------------------------------------------------------


def _split(value: str) -> SplitResult | None:
    """The parts of a URL, or None when it is none; urlsplit's own errors would quote parts of a password."""
    if any(char.isspace() or not char.isprintable() or char == "\\" for char in value):
        return None
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        return None
    return None if port == 0 or parts.netloc.endswith(":") else parts


def _is_host(host: str) -> bool:
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            return False
        return True
    return _HOST.fullmatch(host) is not None


def _is_loopback(host: str) -> bool:
    """Whether a host can only be this machine; what is merely *resolved* to it is not."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
