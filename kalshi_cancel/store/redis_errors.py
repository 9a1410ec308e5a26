"""Words what is wrong with Redis, in one line, for everybody who raises, logs or shows it.

It also says what an error means: whether Redis has answered that it did nothing, and whether the same may
work later.
"""

from __future__ import annotations

import re
import socket

import redis
from redis.sentinel import MasterNotFoundError

WORDS_MOST = 200  # of a text that is not ours
# As redis-py words a failure to connect: the address, then the reason.
_CONNECTING = re.compile(r"Error -?\d+ (?:while )?connecting to (.+?)\. (.*)", re.DOTALL)
_IN_A_PIPELINE = re.compile(r"Command # \d+ \(.*?\) of pipeline caused error: ", re.DOTALL)
# The kind of an error that came up in a script of ours after it had written (store/scripts.py).
HALF_DONE = "HALFDONE"
# What Redis adds to an error that no script has caught: it may have written before that, too.
_OUT_OF_A_SCRIPT = re.compile(r"\bscript: .*\bon @user_script:\d+")
_TOO_MANY_CLIENTS = "max number of clients reached"

# What Redis refuses, by the first word of its answer. redis-py keeps that word apart for those that it knows.
_REFUSALS = {
    "NOAUTH": "Redis wants a password",
    "WRONGPASS": "Redis refuses this user or password",
    "LOADING": "Redis is loading its data",
    "BUSY": "Redis is busy with a script",
    "READONLY": "Redis refuses: it is a replica, which takes no writes",
    "MASTERDOWN": "Redis refuses: it is a replica that has lost its primary",
    "NOREPLICAS": "Redis refuses: too few of its replicas are in touch with it",
    "OOM": "Redis refuses: it is out of memory (maxmemory)",
    "MISCONF": "Redis refuses: it cannot write to its disk",
}
_BY_CLASS: dict[type[redis.RedisError], str] = {
    redis.BusyLoadingError: "LOADING",
    redis.ReadOnlyError: "READONLY",
    redis.OutOfMemoryError: "OOM",
    redis.exceptions.MasterDownError: "MASTERDOWN",
    redis.exceptions.TryAgainError: "TRYAGAIN",
    redis.exceptions.NoScriptError: "NOSCRIPT",
}
# What passes without anybody's doing, once it is no replica any more, or has memory, disk or replicas again.
_PASSING = frozenset(_REFUSALS.keys() - {"NOAUTH", "WRONGPASS"} | {"TRYAGAIN", "UNBLOCKED", "NOSCRIPT"})


def words(error: BaseException) -> str:
    """What is wrong, in one line that begins with what has the problem; also of what others made of it."""
    found = _innermost(error)
    if isinstance(found, MasterNotFoundError):
        return _no_primary(str(found))
    if isinstance(found, redis.RedisError):
        known = _REFUSALS.get(kind(found))
        return known or _other(found)
    return f"Redis cannot be used: {_short(str(found) or type(found).__name__)}"


def refused(error: redis.RedisError) -> bool:
    """Whether Redis has answered that it did nothing of what it was asked."""
    if isinstance(error, redis.ResponseError):
        return kind(error) != HALF_DONE and _OUT_OF_A_SCRIPT.search(str(error)) is None
    return kind(error) in _REFUSALS or _TOO_MANY_CLIENTS in str(error)


def can_pass(error: redis.RedisError) -> bool:
    """Whether the same may work later without anybody's doing."""
    if isinstance(error, redis.ResponseError):
        return kind(error) in _PASSING
    return not isinstance(error, redis.DataError)


def kind(error: redis.RedisError) -> str:
    """The first word of Redis' answer, like READONLY; empty for what is no refusal."""
    if isinstance(error.__context__, redis.ReadOnlyError):  # with Sentinels, as a lost connection
        return "READONLY"
    if isinstance(error, redis.AuthenticationError):
        return "NOAUTH" if error.status_code == "NOAUTH" else "WRONGPASS"
    return _BY_CLASS.get(type(error)) or _text(error).split(" ", 1)[0]


def _innermost(error: BaseException) -> BaseException:
    """The error of Redis in what kombu and Celery have made of it."""
    each: BaseException | None = error
    while each is not None and not isinstance(each, redis.RedisError):
        each = each.__cause__ or each.__context__
    return each or error


def _text(error: redis.RedisError) -> str:
    return _IN_A_PIPELINE.sub("", str(error), count=1)


def _other(error: redis.RedisError) -> str:
    text = _text(error)
    cause = error.__cause__ or error.__context__
    if _TOO_MANY_CLIENTS in text:
        return "Redis takes no more clients (maxclients)"
    if connecting := _CONNECTING.fullmatch(text):
        address, reason = connecting[1], _short(connecting[2].removesuffix("."))
        what = "found" if isinstance(cause, socket.gaierror) else "reached"
        return f"Redis cannot be {what} at {address}: {reason}"
    if isinstance(error, redis.TimeoutError):
        if "handshake" in str(cause):
            return "Redis does not answer in TLS in time: does this port speak TLS?"
        return f"Redis {'cannot be reached' if 'connecting' in text else 'does not answer'} in time"
    if kind(error) == HALF_DONE:
        return f"a script failed after it had written: {_short(text.removeprefix(HALF_DONE).strip())}"
    if isinstance(error, redis.InvalidResponse):
        return "what answers there is no Redis"
    if isinstance(error, redis.ResponseError):
        no_sentinel = "unknown command 'SENTINEL'" in text
        return "what answers there is no Sentinel" if no_sentinel else f"Redis refuses: {_short(text)}"
    if isinstance(error, redis.ConnectionError) and isinstance(cause, OSError):
        return f"Redis has closed the connection: {_short(cause.strerror or str(cause))}"
    return f"Redis: {_short(text or type(error).__name__)}"


def _no_primary(text: str) -> str:
    """Of Sentinels: redis-py names the primary, and then those that failed, by all that is known of them."""
    primary, _, failed = text.removeprefix("No master found for ").partition(" : ")
    if "AuthenticationError" in failed:
        return "a Sentinel refuses this user or password (sentinel_username, sentinel_password)"
    nobody = "not all Sentinels answer, and none" if failed else "no Sentinel"
    return f"{nobody} has a primary {primary} that is up"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WORDS_MOST else f"{line[: WORDS_MOST - 3]}..."
