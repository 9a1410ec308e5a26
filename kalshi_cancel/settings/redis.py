"""Where Redis is, and how our keys are called there: what producers and workers share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from kalshi_cancel.settings.reader import SettingsError, read
from kalshi_cancel.settings.redis_url import SENTINEL_PORT
from kalshi_cancel.settings.variables import BY_NAME


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
        return cls(**read(env, "producers")["producers"])

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
