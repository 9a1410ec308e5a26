"""Where the exchange is, how it is reached, and the key that calls are signed with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from kalshi_cancel.settings.reader import Reader, shown
from kalshi_cancel.settings.urls import ENCODE_HINT, SCHEME, is_host, is_loopback, split
from kalshi_cancel.settings.variables import OrdersApi

# Many times the largest key; keeps a wrong path (a log, a device) out of memory.
MAX_KEY_BYTES: Final = 64 * 1024

_KEY_ID: Final = re.compile(r"[\x21-\x7e]{1,256}")
_LOOKS_LIKE_A_KEY: Final = re.compile(r"-----|\n|^M[A-Za-z0-9+/=\s\\]{60,}$")
_BASE_URL_RULE: Final = "KALSHI_BASE_URL must be scheme and host only, like https://external-api.kalshi.com"


def read_base_url(reader: Reader) -> str:
    """Scheme and host of the exchange, without a slash at the end."""
    value = reader.text("KALSHI_BASE_URL")
    if not value:
        return ""
    scheme = SCHEME.match(value)
    if scheme is None or scheme[1].lower() not in {"https", "http"}:
        reader.problem(f"{_BASE_URL_RULE} (got {f'the scheme {scheme[1]}' if scheme else 'no scheme'})")
        return ""
    parts = split(value)
    if parts is None:
        reader.problem(f"{_BASE_URL_RULE} (got something that is no URL)")
        return ""
    extras = [
        (parts.username is not None or parts.password is not None, "a user name or password"),
        (parts.path not in {"", "/"}, f"a path: {shown(parts.path)}"),
        ("?" in value, "a query"),
        ("#" in value, "a fragment"),
        (not parts.hostname, "no host"),
        (bool(parts.hostname) and not is_host(parts.hostname or ""), "a host that cannot be one"),
    ]
    found = [what for is_so, what in extras if is_so]
    if found:
        reader.problem(f"{_BASE_URL_RULE} (got {', and '.join(found)})")
        return ""
    host = parts.hostname or ""
    if parts.scheme == "http" and not is_loopback(host):
        reader.problem(
            "KALSHI_BASE_URL must begin with https:// (http:// is for an exchange on this machine only:"
            f" localhost, 127.0.0.1 or [::1]; got the host {shown(host)})"
        )
        return ""
    address = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{address}{'' if parts.port is None else f':{parts.port}'}"


def read_api_key_id(reader: Reader) -> str:
    """The id of the API key, from its variable or its file."""
    path, content = _text_or_file(reader, "KALSHI_API_KEY_ID")
    value = content.decode("utf-8", "replace").strip()
    if value and not _KEY_ID.fullmatch(value):
        source = "KALSHI_API_KEY_ID" if path is None else f"KALSHI_API_KEY_ID_PATH: what is in {shown(path)}"
        # Not shown: what lands here by mistake is likely the private key.
        reader.problem(
            f"{source} must be at most 256 printable ASCII characters without spaces"
            f" (got {len(value)} characters)"
        )
    return value


def read_private_key(reader: Reader) -> tuple[str | None, bytes]:
    """The key file's path, where there is one, and the key's text."""
    return _text_or_file(reader, "KALSHI_PRIVATE_KEY")


def _text_or_file(reader: Reader, name: str) -> tuple[str | None, bytes]:
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


def _small_file(reader: Reader, name: str, path: str) -> bytes:
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
        reader.problem(f"{name}: the file {shown(path)} {problem}")
    return content


def read_orders_api(reader: Reader) -> OrdersApi:
    """The dialect of the cancel endpoint."""
    value = reader.text("KALSHI_ORDERS_API").lower()
    if value == "v1":
        return "v1"
    if value not in {"v2", ""}:
        reader.problem(f"KALSHI_ORDERS_API must be v2 or v1 (got: {shown(value)})")
    return "v2"


def read_http_proxy(reader: Reader) -> str | None:
    """The proxy's URL; never quoted in a problem: it may hold a password."""
    value = reader.text("KALSHI_HTTP_PROXY")
    if not value:
        return None
    parts = split(value)
    if (
        parts is None
        or parts.scheme not in {"http", "https"}
        or not is_host(parts.hostname or "")
        or parts.path not in {"", "/"}
        or "?" in value
        or "#" in value
    ):
        reader.problem(
            "KALSHI_HTTP_PROXY must be http:// or https://, a host and a port, like"
            f" http://proxy.example:3128, and {ENCODE_HINT}"
        )
    return value


def read_ca_bundle(reader: Reader) -> str | None:
    """The file or folder of certificates to trust; None: the built-in ones."""
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
            f" (got: {shown(value)})"
        )
    return value
