"""Redis as the book and the buckets use it: a client that fails soon, Lua scripts, and one kind of error."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.settings import RedisSettings

# Silence from Redis that is longer than this is an outage; producers are promised an answer within 2 s.
SOCKET_TIMEOUT_S = 1.0
CONNECT_TIMEOUT_S = 0.5


class BookError(Exception):
    """Redis did not do what was asked; ``may_be_accepted``: it may have, and only the answer was lost."""

    def __init__(self, message: str, *, may_be_accepted: bool) -> None:
        super().__init__(message)
        self.may_be_accepted = may_be_accepted


def connect(settings: RedisSettings) -> redis.Redis:
    """A client that fails within about a second instead of hanging, and asks nothing twice by itself."""
    return redis.Redis.from_url(
        settings.redis_url,
        decode_responses=True,
        encoding_errors="surrogateescape",
        socket_timeout=SOCKET_TIMEOUT_S,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=0,
    )


def call(ask: Callable[[], Any], *, may_be_accepted: bool = False) -> Any:
    """What ``ask`` gets from Redis; raises BookError whatever is wrong with it."""
    try:
        return ask()
    except redis.ResponseError as error:  # READONLY, OOM, NOPERM ...: refused before anything was written
        raise BookError(f"Redis refuses: {error}", may_be_accepted=False) from None
    except redis.ConnectionError as error:
        refused = isinstance(error.__cause__ or error.__context__, ConnectionRefusedError)
        raise BookError(f"Redis: {error}", may_be_accepted=may_be_accepted and not refused) from None
    except redis.RedisError as error:
        raise BookError(f"Redis: {error}", may_be_accepted=may_be_accepted) from None


# Put before every script: the book's prefix is always the first argument, and time is the server's.
_PREAMBLE = """local prefix = ARGV[1]
local time = redis.call('TIME')
local now_us = time[1] * 1000000 + time[2]
local now_ms = math.floor(now_us / 1000)
"""


def load(server: redis.Redis, *names: str) -> Any:
    """The Lua files of these names, in this order, as one script."""
    texts = [resources.files("worker").joinpath("lua", f"{name}.lua").read_text("utf-8") for name in names]
    return server.register_script(_PREAMBLE + "\n".join(texts))
