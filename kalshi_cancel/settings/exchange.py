"""The values that say where the exchange is, how it is reached, and which key signs the calls."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from kalshi_cancel.settings.urls import ENCODE_HINT, SCHEME, is_host, is_loopback, split
from kalshi_cancel.settings.values import BadValueError, shown

# Many times the largest key; keeps a wrong path (a log, a device) out of memory.
MAX_KEY_BYTES: Final = 64 * 1024

_KEY_ID: Final = re.compile(r"[\x21-\x7e]{1,256}")
_LOOKS_LIKE_A_KEY: Final = re.compile(r"-----|\n|^M[A-Za-z0-9+/=\s\\]{60,}$")
_BASE_URL_RULE: Final = "must be scheme and host only, like https://external-api.kalshi.com"


def base_url(text: str) -> str:
    """Scheme and host of the exchange, without a slash at the end."""
    scheme = SCHEME.match(text)
    if scheme is None or scheme[1].lower() not in {"https", "http"}:
        raise BadValueError(f"{_BASE_URL_RULE} (got {f'the scheme {scheme[1]}' if scheme else 'no scheme'})")
    parts = split(text)
    if parts is None:
        raise BadValueError(f"{_BASE_URL_RULE} (got something that is no URL)")
    host = parts.hostname or ""
    extras = [
        (parts.username is not None or parts.password is not None, "a user name or password"),
        (parts.path not in {"", "/"}, f"a path: {shown(parts.path)}"),
        ("?" in text, "a query"),
        ("#" in text, "a fragment"),
        (not host, "no host"),
        (bool(host) and not is_host(host), "a host that cannot be one"),
    ]
    found = [what for is_so, what in extras if is_so]
    if found:
        raise BadValueError(f"{_BASE_URL_RULE} (got {', and '.join(found)})")
    if parts.scheme == "http" and not is_loopback(host):
        raise BadValueError(
            "must begin with https:// (http:// is for an exchange on this machine only:"
            f" localhost, 127.0.0.1 or [::1]; got the host {shown(host)})"
        )
    address = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{address}{'' if parts.port is None else f':{parts.port}'}"


def api_key_id(text: str) -> str:
    """The id of an API key; never quoted in a problem: what lands here by mistake is likely the key."""
    key_id = text.strip()
    if not _KEY_ID.fullmatch(key_id):
        raise BadValueError(
            f"must be at most 256 printable ASCII characters without spaces (got {len(key_id)} characters)"
        )
    return key_id


def key_path(text: str) -> str:
    """The path of a file with a key or its id; a key in its place is never quoted."""
    if _LOOKS_LIKE_A_KEY.search(text):
        raise BadValueError("holds a key, not a path: put it into KALSHI_PRIVATE_KEY")
    return text


def small_file(path: str) -> bytes:
    """What is in a file with a key or its id."""
    try:
        file = Path(path)
        if file.exists() and not file.is_file():
            problem = "is not a file"
        else:
            with file.open("rb") as opened:
                content = opened.read(MAX_KEY_BYTES + 1)
            if len(content) <= MAX_KEY_BYTES and content.strip():
                return content
            too_large = f"is larger than {MAX_KEY_BYTES // 1024} KiB, which no key is"
            problem = too_large if content.strip() else "is empty"
    except FileNotFoundError:
        problem = "does not exist"
    except PermissionError:
        problem = "may not be read by this user"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        problem = f"cannot be read ({getattr(error, 'strerror', None) or 'not a valid path'})"
    raise BadValueError(f"the file {shown(path)} {problem}")


def http_proxy(text: str) -> str:
    """The URL of a proxy; never quoted in a problem: it may hold a password."""
    parts = split(text)
    if (
        parts is None
        or parts.scheme not in {"http", "https"}
        or not is_host(parts.hostname or "")
        or parts.path not in {"", "/"}
        or "?" in text
        or "#" in text
    ):
        raise BadValueError(
            "must be http:// or https://, a host and a port, like http://proxy.example:3128,"
            f" and {ENCODE_HINT}"
        )
    return text


def ca_bundle(text: str) -> str:
    """The file or folder of certificates to trust."""
    try:
        path = Path(text)
        usable = path.is_dir() or b"-----BEGIN" in path.read_bytes()
    except (OSError, ValueError):
        usable = False
    if not usable:
        raise BadValueError(f"must name a readable PEM file or a folder of certificates (got: {shown(text)})")
    return text
