"""The URL of a Redis: what it may say, and how it is completed so that all libraries read it alike."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode

from kalshi_cancel.settings.urls import ENCODE_HINT, SCHEME, is_host, split
from kalshi_cancel.settings.values import BadValueError, shown

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


def redis_url(text: str) -> str:
    """The URL, database and TLS verification spelled out; never quoted in a problem for its password."""
    scheme = SCHEME.match(text)
    if scheme is None or scheme[1].lower() not in _REDIS_SCHEMES:
        found = f"{scheme[1]}://" if scheme else "no scheme"
        raise BadValueError(f"must start with redis://, rediss://, unix:// or sentinel:// (got {found})")
    if scheme[1].lower() == "sentinel":
        return _sentinel_url(text)
    parts = split(text)
    if parts is None or parts.fragment or "#" in text:
        raise BadValueError(f"cannot be understood: {ENCODE_HINT}")
    if problems := [*_redis_address_problems(parts), *_redis_parameter_problems(parts)]:
        raise BadValueError(*problems)
    return _spelled_out(parts)


def _sentinel_url(text: str) -> str:
    """The URL with every port and the database in it."""
    found = _SENTINEL_URL.fullmatch(text)
    hosts = [split(f"sentinel://{host}") for host in found["hosts"].split(",")] if found else []
    if found is None or not all(host and is_host(host.hostname or "") and not host.path for host in hosts):
        raise BadValueError(f"{_SENTINEL_RULE}, and {ENCODE_HINT}")
    parts = SplitResult("sentinel", "", "", found["query"] or "", "")
    if problems := _redis_parameter_problems(parts):
        raise BadValueError(*problems)
    login = f"{found['login'].replace(';', '%3B')}@" if found["login"] else ""
    addresses = ",".join(_address(host.hostname or "", host.port or SENTINEL_PORT) for host in hosts if host)
    query = urlencode(parse_qsl(parts.query), quote_via=quote)
    path = f"{found['name']}/{found['db'] or 0}"
    return f"sentinel://{login}{addresses}/{path}{'?' if query else ''}{query}"


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
