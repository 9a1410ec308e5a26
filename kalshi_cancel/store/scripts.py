"""Redis as the store and the buckets use it: a client that fails soon, Lua scripts, and one kind of error."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from typing import Any, Unpack

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kalshi_cancel.settings.redis import RedisSettings, Sentinels
from kalshi_cancel.store import primary
from kalshi_cancel.store.redis_errors import HALF_DONE, can_pass, refused, words
from kalshi_cancel.telemetry.log_events import LogEvent, LogFields
from kalshi_cancel.telemetry.logs import Seldom, say

# Silence from Redis that is longer than this is an outage; producers are promised an answer within 2 s.
SOCKET_TIMEOUT_S = 1.0
CONNECT_TIMEOUT_S = 0.5
# Sentinels are asked one after the other at each new connection; one that is gone must not use up the time.
SENTINEL_TIMEOUT_S = 0.3
# A replica at hand has it within a millisecond or two; producers are promised an answer within 2 s.
REPLICATED_WITHIN_S = 0.5
LUA = resources.files("kalshi_cancel.store").joinpath("lua")


class StoreError(Exception):
    """Redis did not do what was asked; ``may_be_accepted``: it may have, and only the answer was lost.

    ``can_pass``: the same may work later, as it is; otherwise somebody has to mend something first.
    """

    def __init__(self, message: str, *, may_be_accepted: bool, can_pass: bool = True) -> None:
        super().__init__(message)
        self.may_be_accepted = may_be_accepted
        self.can_pass = can_pass


def say_failed(
    log: logging.Logger,
    error: StoreError,
    doing: str,
    /,
    *,
    seldom: Seldom | None = None,
    **fields: Unpack[LogFields],
) -> None:
    """Logs that Redis failed, and what it kept us from doing."""
    event = LogEvent.REDIS_UNAVAILABLE if error.can_pass else LogEvent.REDIS_REFUSED
    told: LogFields = {"doing": doing, "why": str(error), **fields}
    say(log, event, seldom=seldom, **told)


def connect(settings: RedisSettings, *, in_bytes: bool = False) -> redis.Redis:
    """A client that fails within about a second instead of hanging, and asks nothing twice by itself.

    It answers in text, or ``in_bytes``, as what others have put there is best looked at.
    """
    manner: dict[str, Any] = {
        "decode_responses": not in_bytes,
        "encoding_errors": "surrogateescape",
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": 0,
    }
    group = settings.sentinels
    if group is None:
        return redis.Redis.from_url(settings.redis_url, **manner)
    manner |= {**group.login, "db": group.database, "sentinel_kwargs": _sentinel_manner(group)}
    return primary.connect(list(group.addresses), group.primary, **manner)


def celery_options(settings: RedisSettings) -> dict[str, Any]:
    """What Celery's broker and result backend have to be told besides the URL."""
    options: dict[str, Any] = {"global_keyprefix": settings.celery_prefix}  # two accounts on one Redis
    group = settings.sentinels
    if group is not None:
        options |= {"master_name": group.primary, "sentinel_kwargs": _sentinel_manner(group)}
    return options


def _sentinel_manner(group: Sentinels) -> dict[str, Any]:
    # Left to itself, redis-py tries a Sentinel that is gone three times more, for seconds, before the next.
    return {
        **group.sentinel_login,
        "socket_timeout": SENTINEL_TIMEOUT_S,
        "socket_connect_timeout": SENTINEL_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
    }


def asking(prefix: str, rows: Iterable[Sequence[Any]] = (), /, **asked: Any) -> list[Any]:
    """The arguments of a script: the prefix of its keys, what is asked of it by name, and rows of values.

    Lua has them as ``prefix``, ``asked`` (a table) and ``rows(width)``, an iterator. What may be large or is
    no text of ours comes in rows, which nobody has to decode.
    """
    return [prefix, json.dumps(asked, ensure_ascii=False), *(value for row in rows for value in row)]


def call(ask: Callable[[], Any], *, may_be_accepted: bool = False) -> Any:
    """What ``ask`` gets from Redis; raises StoreError whatever is wrong with it.

    ``may_be_accepted``: what is asked would accept something; it may have, unless Redis says that it refuses.
    """
    try:
        return ask()
    except redis.RedisError as error:
        raise StoreError(
            words(error),
            may_be_accepted=may_be_accepted and not refused(error),
            can_pass=can_pass(error),
        ) from None


def surely(
    server: redis.Redis,
    script: Any,
    args: Sequence[Any],
    *,
    then: Sequence[Sequence[Any]] = (),
    replicas: int = 0,
) -> Any:
    """What a script answers, once so many replicas have what it wrote and no failover throws it away.

    The commands of ``then`` follow it: for values that are too large for a script.

    Raises StoreError. ``may_be_accepted`` is true only once the script was sent, unless Redis refused it;
    also when too few replicas have it in time, or a failover is under way.
    """
    [answer] = surely_each(server, script, [args], then=then, replicas=replicas)
    return answer


def surely_each(
    server: redis.Redis,
    script: Any,
    portions: Sequence[Sequence[Any]],
    *,
    then: Sequence[Sequence[Any]] = (),
    replicas: int = 0,
) -> list[Any]:
    """What a script answers to each of some portions, as :func:`surely` does.

    They are sent together: waiting for each answer would take longer than the portions themselves. Raises the
    first error; the other portions may have been done all the same.
    """
    if not portions:
        return []
    pool = server.connection_pool
    connection = call(pool.get_connection)
    try:
        answers = call(lambda: _run_each(connection, script, portions), may_be_accepted=True)
        for command in then:
            call(functools.partial(_ask, connection, *command), may_be_accepted=True)
        if replicas:  # WAIT is about what its own connection has written
            _await(connection, replicas)
        if why := call(lambda: primary.why_unsure(pool, connection), may_be_accepted=True):
            pool.disconnect()
            raise StoreError(f"Redis has it, but {why}: ask again", may_be_accepted=True)
        return list(answers)
    finally:
        pool.release(connection)


def ask(server: redis.Redis, *command: Any) -> Any:
    """What a command answers; raises StoreError. The client's own way adds 40 us, which some wait for."""
    return _on_a_connection(server, lambda connection: _ask(connection, *command))


def run(server: redis.Redis, script: Any, args: Sequence[Any], *, may_be_accepted: bool = False) -> Any:
    """What a script answers; raises StoreError. See :func:`ask`; :func:`surely` is for what must last."""
    [answer] = _on_a_connection(
        server, lambda connection: _run_each(connection, script, [args]), may_be_accepted=may_be_accepted
    )
    return answer


def _on_a_connection(server: redis.Redis, do: Callable[[Any], Any], *, may_be_accepted: bool = False) -> Any:
    pool = server.connection_pool
    connection = call(pool.get_connection)
    try:
        return call(lambda: do(connection), may_be_accepted=may_be_accepted)
    finally:
        pool.release(connection)


def _run_each(connection: Any, script: Any, portions: Sequence[Sequence[Any]]) -> list[Any]:
    commands = [("EVALSHA", script.sha, 0, *args) for args in portions]
    answers = _ask_each(connection, commands)
    unknown = [at for at, each in enumerate(answers) if isinstance(each, redis.exceptions.NoScriptError)]
    if unknown:
        call(lambda: _ask(connection, "SCRIPT LOAD", script.script))
        again = _ask_each(connection, [commands[at] for at in unknown])
        for at, answer in zip(unknown, again, strict=True):
            answers[at] = answer
    for each in answers:
        if isinstance(each, redis.ResponseError):
            raise each
    return answers


def _await(connection: Any, replicas: int) -> None:
    try:
        kept_by = _ask(connection, "WAIT", replicas, round(REPLICATED_WITHIN_S * 1000))
    except redis.RedisError as error:
        raise StoreError(
            f"Redis has it, but whether replicas have it is not known: {words(error)}",
            may_be_accepted=True,
            can_pass=can_pass(error),
        ) from None
    if kept_by < replicas:
        raise StoreError(
            f"Redis has it, but only {kept_by} of {replicas} replicas within {REPLICATED_WITHIN_S:g} s",
            may_be_accepted=True,
        )


def _ask(connection: Any, *command: Any) -> Any:
    [answer] = _ask_each(connection, [command])
    if isinstance(answer, redis.ResponseError):
        raise answer
    return answer


def _ask_each(connection: Any, commands: Sequence[Sequence[Any]]) -> list[Any]:
    """The answer to each command, which may be a ResponseError; all are sent before the first is read."""
    try:
        for command in commands:
            connection.send_command(*command)
        return [_answer(connection) for _ in commands]
    except BaseException:  # an interrupt too: an answer that still comes is not for whoever is next
        connection.disconnect()
        raise


def _answer(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error


# Around every script: what it is asked (see `asking`), and the server's time. What goes wrong before anything
# is written (lua/gather.lua) is answered as a refusal is: nothing was done. What goes wrong after that is a
# kind of its own, because it may have been accepted: asking again settles it.
_BEFORE = """local has_written = false
local function run()
local prefix = ARGV[1]
local asked = ARGV[2] and cjson.decode(ARGV[2]) or {}
local function rows(width)
  local at, last = 3 - width, #ARGV
  return function()
    at = at + width
    if at <= last then return unpack(ARGV, at, at + width - 1) end
  end
end
local time = redis.call('TIME')
local now_us = time[1] * 1000000 + time[2]
local now_ms = math.floor(now_us / 1000)
"""
_AFTER = f"""
end
local done, answer = pcall(run)
if done then return answer end
-- The kind of an error is its first word: where in the script it came up must not stand before that.
local words = type(answer) == 'table' and answer.err or tostring(answer)
words = string.gsub(words, '^user_script:%d+: ', '')
if has_written then return redis.error_reply('{HALF_DONE} ' .. words) end
return redis.error_reply(string.match(words, '^[A-Z]+ ') and words or 'ERR ' .. words)
"""


def load(server: redis.Redis, *names: str) -> Any:
    """The Lua files of these names, in this order, as one script.

    What writes by ``gather`` writes all or nothing, and says so (see above).
    """
    texts = [LUA.joinpath(f"{name}.lua").read_text("utf-8") for name in names]
    return server.register_script(whole("\n".join(texts)))


def whole(text: str) -> str:
    """A script of this text, which tells whether it had written by ``gather`` when it failed."""
    return _BEFORE + text + _AFTER
