"""Where Redis is, and how our keys are called there: what producers and workers share."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self, TypedDict
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from kalshi_cancel.settings.reader import Reader, SettingsError, shown
from kalshi_cancel.settings.urls import ENCODE_HINT, SCHEME, is_host, split
from kalshi_cancel.settings.variables import BY_NAME, DAY_S

_KEY_PREFIX: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9:._-]{0,63}")
_REDIS_SCHEMES: Final = ("redis", "rediss", "unix", "sentinel")

# urlsplit cannot read a list of hosts. The name of the primary, as sentinel.conf allows it, and a database.
_SENTINEL_URL: Final = re.compile(
    r"sentinel://(?:(?P<login>[^@/\s]*)@)?(?P<hosts>[^@/?#]+)/(?P<name>[A-Za-z0-9._-]+)(?:/(?P<db>[0-9]{1,5}))?/?"
    r"(?:\?(?P<query>[^#\s]*))?",
    re.IGNORECASE,
)

_SENTINEL_RULE: Final = "must be like sentinel://user:password@host1:26379,host2:26379/name-of-primary/0"
SENTINEL_PORT: Final = 26379

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
        reader = Reader(os.environ if env is None else env)
        settings = cls(**redis_fields(reader))
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
        is_default = self.key_prefix == BY_NAME["KALSHI_KEY_PREFIX"].default
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


# Celery prefers these to any configuration: they would tear messages and store apart, and past the TLS rule.
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


class _RedisFields(TypedDict):
    redis_url: str
    key_prefix: str
    result_expires_s: int
    audit: bool
    wait_replicas: int


def redis_fields(reader: Reader) -> _RedisFields:
    """The fields of RedisSettings as the variables have them."""
    url = _redis_url(reader)
    prefix = reader.text("KALSHI_KEY_PREFIX")
    if prefix and not _KEY_PREFIX.fullmatch(prefix):
        reader.problem(
            "KALSHI_KEY_PREFIX must be at most 64 letters, digits and : . _ -, the first a letter or a digit"
            f" (got: {shown(prefix)})"
        )
    expires_s = reader.integer("KALSHI_RESULT_EXPIRES_S", low=60, high=365 * DAY_S, unit="seconds")
    return {
        "redis_url": url,
        "key_prefix": prefix,
        "result_expires_s": expires_s,
        "audit": reader.flag("KALSHI_AUDIT"),
        "wait_replicas": reader.integer("KALSHI_WAIT_REPLICAS", low=0, high=9, unit="replicas"),
    }


def _redis_url(reader: Reader) -> str:
    """The URL, database and TLS verification spelled out; never quoted in a problem for its password."""
    value = reader.text("REDIS_URL")
    if not value:
        return ""
    scheme = SCHEME.match(value)
    if scheme is None or scheme[1].lower() not in _REDIS_SCHEMES:
        found = f"{scheme[1]}://" if scheme else "no scheme"
        reader.problem(f"REDIS_URL must start with redis://, rediss://, unix:// or sentinel:// (got {found})")
        return ""
    if scheme[1].lower() == "sentinel":
        return _sentinel_url(reader, value)
    parts = split(value)
    if parts is None or parts.fragment or "#" in value:
        reader.problem(f"REDIS_URL cannot be understood: {ENCODE_HINT}")
        return ""
    problems = [*_redis_address_problems(parts), *_redis_parameter_problems(parts)]
    for problem in problems:
        reader.problem(f"REDIS_URL {problem}")
    return "" if problems else _spelled_out(parts)


def _sentinel_url(reader: Reader, value: str) -> str:
    """The URL with every port and the database in it."""
    found = _SENTINEL_URL.fullmatch(value)
    hosts = [split(f"sentinel://{host}") for host in found["hosts"].split(",")] if found else []
    if found is None or not all(host and is_host(host.hostname or "") and not host.path for host in hosts):
        reader.problem(f"REDIS_URL {_SENTINEL_RULE}, and {ENCODE_HINT}")
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
        problems.append(f"names no host, or {ENCODE_HINT}")
    elif not is_host(parts.hostname):
        problems.append(f"has a host that cannot be one, or {ENCODE_HINT}")
    if not re.fullmatch(r"/?|/[0-9]{1,5}", parts.path):
        problems.append(f"must end in a database number, like /0, or {ENCODE_HINT}")
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
            problems.append(f"has a {name} that names no file: {shown(value)}")
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
