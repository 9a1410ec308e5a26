"""Finds what is wrong with an installation: examines its parts, and says for each what to do about it.

Nothing is changed anywhere and no order is touched: Redis is asked for its state, the exchange for reads.
Where one part's failure makes the next question pointless, that question is left out of the report.
"""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import redis

from kalshi_cancel.exchange.calls import ACCOUNT_LIMITS, API_KEYS, ENDPOINT_COSTS, LIST_ONE_ORDER
from kalshi_cancel.exchange.client import SKEW_WORTH_A_WARNING_MS, Exchange
from kalshi_cancel.exchange.key_rights import rights_of
from kalshi_cancel.exchange.protocol import RETIRED_CODE, Failure, Meaning
from kalshi_cancel.exchange.signing import KeyProblem, RequestSigner, load_private_key, permission_warning
from kalshi_cancel.settings.foreign import foreign_variables
from kalshi_cancel.settings.reader import SettingsError
from kalshi_cancel.settings.redis import RedisSettings, refuse_celery_overrides
from kalshi_cancel.settings.worker import WorkerSettings
from kalshi_cancel.store.rate_limits import Limits
from kalshi_cancel.store.redis_errors import words
from kalshi_cancel.store.scripts import connect

# What this service is made for and tested with.
REDIS_AT_LEAST = 7
VALKEY_AT_LEAST = 8
# RSA signatures of so many calls take a third of a core, and more calls take more.
RSA_SIGNATURE_S = 0.0003
RSA_SINGLES_MOST_PER_S = 1_000
UNLIMITED_PER_S = 1_000_000  # no account's: a sandbox without limits
MEMORY_WORTH_A_WARNING = 0.8  # of maxmemory; beyond it Redis refuses to accept cancels
# The exchange accepts +-10 s; what we measure is exact to half a second, and calls take time too.
SKEW_TOO_LARGE_MS = 9_000


class Health(StrEnum):
    """How a part is: fit, fit with reservations, or not fit for the work."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found about one part; ``advice`` says what to do and is never empty unless all is well."""

    check: str
    health: Health
    found: str
    advice: str = ""

    def to_json(self) -> dict[str, str]:
        """The finding as plain JSON."""
        return asdict(self)


def examine(env: Mapping[str, str] | None = None, *, producer: bool = False) -> Iterator[Finding]:
    """The findings, as they are made; ``env`` None is the process environment.

    ``producer``: only what a producer needs, which is Redis.
    """
    try:
        worker = None if producer else WorkerSettings.from_env(env)
        settings = worker.redis if worker else RedisSettings.from_env(env)
        refuse_celery_overrides(env)
    except SettingsError as error:
        for problem in error.problems:
            yield _failed(
                "settings", problem, "correct the environment; docs/reference/configuration.md lists all"
            )
        try:
            settings = RedisSettings.from_env(env)
        except SettingsError:
            return
        yield from _examine_redis(settings)
        return
    yield _examine_settings(worker)
    yield from _examine_foreign(env)
    redis_ahead_ms = yield from _examine_redis(settings)
    if worker is not None:
        yield from _examine_account(worker, redis_ahead_ms)


def _examine_settings(worker: WorkerSettings | None) -> Finding:
    if worker is None:
        return _ok("settings", "REDIS_URL is valid, which is all that a producer needs")
    if worker.orders_api == "v1":
        return _warning(
            "settings",
            "KALSHI_ORDERS_API is v1, which the exchange itself has retired",
            "set KALSHI_ORDERS_API=v2, unless the base URL is a gateway that speaks V1 only",
        )
    return _ok("settings", f"complete, for {worker.base_url}")


def _examine_foreign(env: Mapping[str, str] | None) -> Iterator[Finding]:
    for name, meant in foreign_variables(env).items():
        yield _warning(
            "settings",
            f"{name} is no setting of this service: nothing reads it",
            f"set {meant} instead" if meant else "remove it, unless something else reads it",
        )


# --- Redis ------------------------------------------------------------------------------------------------


def _examine_redis(settings: RedisSettings) -> Generator[Finding, None, float | None]:
    """Gives back by how much Redis' clock is ahead of this host's, ms; None when it cannot be seen."""
    with connect(settings) as server:
        try:
            asked = time.perf_counter()
            server.ping()
            took_ms = (time.perf_counter() - asked) * 1000
        except redis.RedisError as error:
            yield _failed("redis", f"{settings.masked_url}: {words(error)}", _redis_advice(error))
            return None
        yield _ok("redis", f"{settings.masked_url} answers in {took_ms:.1f} ms")
        ahead_ms = _ahead_ms(server)
        if ahead_ms is not None and abs(ahead_ms) >= SKEW_WORTH_A_WARNING_MS:
            yield _warning(
                "redis clock",
                f"Redis' clock differs from this host's by {ahead_ms / 1000:+.1f} s; the times of requests,"
                " results and reports are by Redis' clock",
                "set the clocks of both hosts right and keep them so with NTP",
            )
        try:
            facts = server.info()
        except redis.RedisError as error:
            yield _warning(
                "redis state",
                f"version, persistence and memory cannot be seen: {words(error)}",
                "run the doctor with a Redis user that may call INFO",
            )
            return ahead_ms
        yield _examine_version(facts)
        yield _examine_role(facts)
        yield _examine_persistence(facts, _append_fsync(server))
        yield _examine_eviction(facts)
        yield _examine_memory(facts)
        return ahead_ms


def _ahead_ms(server: redis.Redis) -> float | None:
    before_s = time.time()
    try:
        seconds, micros = server.time()
    except redis.RedisError:
        return None
    return (float(seconds) + float(micros) / 1e6 - (before_s + time.time()) / 2) * 1000


# The first kind that fits counts.
_REDIS_ADVICE: tuple[tuple[type[redis.RedisError], str], ...] = (
    (redis.AuthenticationError, "check user and password in REDIS_URL (special characters percent-encoded)"),
    (redis.exceptions.NoPermissionError, "give this Redis user the permissions of a producer or a worker"),
    (redis.BusyLoadingError, "wait: Redis is loading its data"),
    (redis.TimeoutError, "check the address, the firewall between, and whether Redis is overloaded"),
    (redis.ConnectionError, "check that Redis runs there, the address, and that TLS (rediss://) is right"),
)


def _redis_advice(error: redis.RedisError) -> str:
    return next(
        (advice for kind, advice in _REDIS_ADVICE if isinstance(error, kind)),
        "see what Redis itself says in its log",
    )


def _examine_version(facts: Mapping[str, Any]) -> Finding:
    valkey = facts.get("valkey_version")
    name, version = ("Valkey", valkey) if valkey else ("Redis", facts.get("redis_version"))
    least = VALKEY_AT_LEAST if valkey else REDIS_AT_LEAST
    found = f"{name} {version}"
    major = re.match(r"\d+", str(version))
    if major is None:
        return _warning("redis version", f"{found}: no version that can be understood", _VERSION_ADVICE)
    if int(major[0]) < least:
        return _failed("redis version", f"{found} is older than {least}", _VERSION_ADVICE)
    return _ok("redis version", found)


_VERSION_ADVICE = f"use Redis {REDIS_AT_LEAST} or later, or Valkey {VALKEY_AT_LEAST} or later"


def _examine_role(facts: Mapping[str, Any]) -> Finding:
    if facts.get("role") != "master":
        return _failed(
            "redis role",
            f"this server is a {facts.get('role')}: it refuses writes",
            "point REDIS_URL at the primary",
        )
    if facts.get("redis_mode", facts.get("server_mode")) == "cluster":
        return _failed(
            "redis role", "this server is part of a cluster", "use one that is not: Celery cannot use it"
        )
    return _ok("redis role", "a primary, which takes writes")


def _append_fsync(server: redis.Redis) -> str | None:
    """When Redis brings its file to the disk; None when this user, or this service, does not let us see."""
    try:
        configured: Any = server.config_get("appendfsync")
    except redis.RedisError:
        return None
    fsync: str | None = configured.get("appendfsync")
    return fsync


def _examine_persistence(facts: Mapping[str, Any], fsync: str | None) -> Finding:
    enabled = facts.get("aof_enabled")
    if enabled is None:
        return _warning(
            "persistence",
            "whether Redis keeps what it was told cannot be seen",
            "make sure that what is written survives a restart of Redis",
        )
    if not enabled:
        return _failed(
            "persistence",
            "appendonly is off: accepted cancels are lost when Redis restarts",
            "set `appendonly yes` in redis.conf, or CONFIG SET appendonly yes and CONFIG REWRITE",
        )
    if facts.get("aof_last_write_status") == "err":
        return _failed("persistence", "Redis could not write its append-only file", "free its disk")
    if fsync == "no":
        return _warning(
            "persistence",
            "appendonly is on, but appendfsync is no: a power cut loses what the system had not written",
            "set `appendfsync always`",
        )
    if fsync == "everysec":
        return _warning(
            "persistence",
            "appendonly is on, but appendfsync is everysec: a Redis that dies may lose a second or two of"
            " what it has acknowledged, accepted cancels among it",
            "set `appendfsync always` (0.2 ms a write on a quiet disk)",
        )
    return _ok("persistence", f"appendonly is on, appendfsync {fsync or 'cannot be seen'}")


def _examine_eviction(facts: Mapping[str, Any]) -> Finding:
    policy = facts.get("maxmemory_policy")
    if policy == "noeviction":
        return _ok("eviction", "noeviction")
    advice = "set `maxmemory-policy noeviction`: any other lets Redis drop accepted cancels"
    if facts.get("maxmemory"):
        return _failed("eviction", f"the policy is {policy}, and maxmemory is set", advice)
    return _warning("eviction", f"the policy is {policy}, harmless only as long as maxmemory is 0", advice)


def _examine_memory(facts: Mapping[str, Any]) -> Finding:
    most, used = facts.get("maxmemory") or 0, facts.get("used_memory", 0)
    if not most:
        return _ok("memory", f"{_megabytes(used)} used, no maxmemory")
    found = f"{_megabytes(used)} of {_megabytes(most)} used"
    if used < MEMORY_WORTH_A_WARNING * most:
        return _ok("memory", found)
    return _warning("memory", found, "raise maxmemory: once it is full, no cancel is accepted")


def _megabytes(count: int) -> str:
    return f"{count / 1_000_000:.1f} MB"


# --- The account at the exchange --------------------------------------------------------------------------


def _examine_account(settings: WorkerSettings, redis_ahead_ms: float | None) -> Iterator[Finding]:
    try:
        key = load_private_key(settings.private_key, passphrase=settings.private_key_passphrase)
    except KeyProblem as problem:
        yield _failed(
            "key",
            str(problem),
            "mend what it names, or download or export the key again; then run this again",
        )
        return
    algorithm = RequestSigner(settings.api_key_id, key).algorithm
    yield _ok("key", f"signs with {algorithm}")
    if settings.private_key_path is not None:
        warning = permission_warning(settings.private_key_path)
        if warning:
            yield _warning("key file", warning, f"chmod 600 {settings.private_key_path}")
        else:
            yield _ok("key file", f"{settings.private_key_path} is its owner's alone")
    try:
        exchange = Exchange.from_settings(settings)
    except SettingsError as problem:
        yield _failed("settings", str(problem), "correct it, or set KALSHI_HTTP_PROXY and KALSHI_CA_BUNDLE")
        return
    try:
        yield from _examine_exchange(exchange, settings, redis_ahead_ms)
    finally:
        exchange.close()


def _examine_exchange(
    exchange: Exchange, settings: WorkerSettings, redis_ahead_ms: float | None
) -> Iterator[Finding]:
    status = exchange.status()
    if not isinstance(status, Failure):
        yield _examine_status(settings.base_url, status)
    elif status.problem.http_status is None:
        yield _failed(
            "exchange",
            f"{settings.base_url}: {_words(status)}",
            "check KALSHI_BASE_URL, DNS, the firewall, and KALSHI_HTTP_PROXY or KALSHI_CA_BUNDLE if in use",
        )
        return
    else:
        yield _failed(
            "exchange",
            f"{settings.base_url}: {_words(status)}",
            "check that KALSHI_BASE_URL is the exchange's; if so, wait: it is not well",
        )
    read = exchange.fetch(LIST_ONE_ORDER)
    if isinstance(read, Failure) and read.meaning is Meaning.CLOCK:
        read = exchange.fetch(LIST_ONE_ORDER)  # signed by the exchange's clock this time, as workers do
    yield _examine_clock(exchange, redis_ahead_ms)  # (only an answer to a signed call tells the time)
    if isinstance(read, Failure):
        yield _failed("signed read", _words(read), _read_advice(read))
        return
    yield _ok("signed read", f"key {settings.api_key_id} and its signature are accepted")
    yield _examine_rights(exchange, settings.api_key_id)
    yield from _examine_limits(exchange, len(_shards(status)) - 1)


def _examine_status(base_url: str, status: Mapping[str, Any]) -> Finding:
    statuses = _shards(status)

    def paused(what: str) -> str | None:
        if status.get(what) is False:
            return "everywhere"
        where = [str(shard.get("exchange_index")) for shard in statuses if shard.get(what) is False]
        return f"on shard {', '.join(where)}" if where else None

    resume = status.get("exchange_estimated_resume_time")
    hint = f" (expected back {resume})" if resume else ""
    if where := paused("exchange_active"):
        return _warning(
            "exchange",
            f"{base_url} is reachable, but the exchange is paused {where}{hint}",
            "wait: cancels are accepted and held until it resumes",
        )
    if where := paused("trading_active"):
        return _warning(
            "exchange",
            f"{base_url} is reachable; trading is paused {where}{hint}",
            "nothing needs to be done: cancels work in a trading pause",
        )
    if status.get("exchange_active") is not True:
        return _warning(
            "exchange",
            f"{base_url} answers, but not with its status",
            "check that KALSHI_BASE_URL is the exchange's",
        )
    return _ok("exchange", f"{base_url} is reachable; exchange and trading are active")


def _shards(status: Mapping[str, Any] | Failure) -> list[Mapping[str, Any]]:
    """The states of the exchange's shards; empty where it does not tell."""
    shards = None if isinstance(status, Failure) else status.get("exchange_index_statuses")
    return [shard for shard in shards if isinstance(shard, Mapping)] if isinstance(shards, list) else []


def _examine_clock(exchange: Exchange, redis_ahead_ms: float | None = None) -> Finding:
    skew_ms = exchange.skew_ms
    if skew_ms is None:
        return _warning(
            "clock",
            "the exchange's answer has no usable Date, so the clocks cannot be compared",
            "keep this host's clock right with NTP",
        )
    of_redis = (
        "" if redis_ahead_ms is None else f", from Redis' by {(skew_ms - redis_ahead_ms) / 1000:+.1f} s"
    )
    differs = f"the exchange's clock differs from this host's by {skew_ms / 1000:+.1f} s{of_redis}"
    found = f"{differs} (to half a second)"
    advice = "set this host's clock right and keep it so with NTP"
    if abs(skew_ms) >= SKEW_TOO_LARGE_MS:
        return _failed("clock", f"{found}; it refuses what is signed 10 s off", advice)
    if abs(skew_ms) >= SKEW_WORTH_A_WARNING_MS:
        return _warning("clock", found, advice)
    return _ok("clock", found)


# What the refusal of a signed read says, and what to do: the first that fits counts.
_READ_ADVICE = (
    (
        "INCORRECT_API_KEY_SIGNATURE",
        "the private key does not belong to this key id: check KALSHI_API_KEY_ID and the key",
    ),
    (
        "NOT_FOUND",
        "the exchange does not know this key id (keys are per environment): check it and KALSHI_BASE_URL",
    ),
    ("header_timestamp_expired", "set this host's clock right and keep it so with NTP"),
    (RETIRED_CODE, "this version is too old for the exchange: update it"),
)


def _read_advice(failure: Failure) -> str:
    words = f"{failure.problem.code} {failure.problem.message}"
    permanent = "check the key's scope and state at the exchange"
    passing = "run this again; if it stays so, see whether the exchange is well"
    default = permanent if failure.meaning in (Meaning.REFUSED, Meaning.KEY_REFUSED) else passing
    return next((advice for sign, advice in _READ_ADVICE if sign in words), default)


def _examine_rights(exchange: Exchange, key_id: str) -> Finding:
    """What the key may do and see. The doctor cancels nothing, so it asks the exchange."""
    answer = exchange.fetch(API_KEYS)
    unknown = "run this again; while this is not known, no mass cancel is called flat"
    if isinstance(answer, Failure):
        return _warning("key rights", f"what this key may do cannot be read: {_words(answer)}", unknown)
    rights = rights_of(key_id, answer)
    if rights is None:
        return _warning("key rights", "the exchange does not tell what this key may do", unknown)
    if not rights.may_cancel:
        return _failed(
            "key rights",
            f"this key may not cancel: its scopes are {', '.join(rights.scopes) or 'none'}",
            "use a key with the scope write, or write::trade",
        )
    if rights.subaccount is not None:
        return _warning(
            "key rights",
            f"this key may cancel, but it sees subaccount {rights.subaccount} only",
            "use a key without a subaccount, or name this subaccount in the scope of mass cancels:"
            " no other is called flat",
        )
    return _ok("key rights", "this key may cancel, and it sees all subaccounts")


def _examine_limits(exchange: Exchange, shards: int) -> Iterator[Finding]:
    """What the account may do; ``shards``: how many have a bucket of their own."""
    limits, costs = exchange.fetch(ACCOUNT_LIMITS), exchange.fetch(ENDPOINT_COSTS)
    for answer in (limits, costs):
        if isinstance(answer, Failure):
            yield _warning("limits", _words(answer), "run this again; without them the budget is unknown")
            return
    assert not isinstance(limits, Failure)
    assert not isinstance(costs, Failure)
    known = Limits.parse(limits, costs)
    if known is None:
        yield _warning(
            "limits",
            "the account's limits or the costs of calls came in a form that is not known",
            "see the exchange's changelog, and whether there is a newer version of this service",
        )
        return
    singles = max(shards, 0) * known.write_refill / known.cancel_cost
    _, algorithm = exchange.signs_with
    if algorithm != "Ed25519" and RSA_SINGLES_MOST_PER_S < singles < UNLIMITED_PER_S:
        yield _warning(
            "signatures",
            f"the buckets of {shards} shards pay for {singles:g} single cancels a second, each of which is"
            f" signed; an RSA signature takes about {RSA_SIGNATURE_S * 1000:g} ms of a core",
            "use an Ed25519 key: it signs about seven times as fast",
        )
    yield _ok(
        "limits",
        f"tier {limits.get('usage_tier')}: read {known.read_refill:g} tokens/s (bucket"
        f" {known.read_capacity:g}), write {known.write_refill:g} tokens/s (bucket {known.write_capacity:g});"
        f" a cancel costs {known.cancel_cost:g}:"
        f" {known.write_refill / known.cancel_cost:g} cancels/s sustained",
    )


def _words(failure: Failure) -> str:
    problem = failure.problem
    status = "" if problem.http_status is None else f"HTTP {problem.http_status}, "
    return f"{status}{problem.code}: {problem.message}"


def _ok(check: str, found: str) -> Finding:
    return Finding(check, Health.OK, found)


def _warning(check: str, found: str, advice: str) -> Finding:
    return Finding(check, Health.WARNING, found, advice)


def _failed(check: str, found: str, advice: str) -> Finding:
    return Finding(check, Health.FAILED, found, advice)
