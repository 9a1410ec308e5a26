"""What is common to all URLs that are read: their parts, and what a host may be."""

from __future__ import annotations

import ipaddress
import re
from typing import Final
from urllib.parse import SplitResult, urlsplit

SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,20})://")
_HOST: Final = re.compile(
    r"(?=.{1,253}$)[a-z0-9_](?:[a-z0-9_-]{0,62})(?:\.[a-z0-9_](?:[a-z0-9_-]{0,62}))*\.?"
)

ENCODE_HINT: Final = "special characters in its user name or password must be percent-encoded"


def split(value: str) -> SplitResult | None:
    """The parts of a URL, or None when it is none; urlsplit's own errors would quote parts of a password."""
    if any(char.isspace() or not char.isprintable() or char == "\\" for char in value):
        return None
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        return None
    return None if port == 0 or parts.netloc.endswith(":") else parts


def is_host(host: str) -> bool:
    """Whether this can be a host: a name or an address; IPv6 without brackets."""
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            return False
        return True
    return _HOST.fullmatch(host) is not None


def is_loopback(host: str) -> bool:
    """Whether a host can only be this machine; what is merely *resolved* to it is not."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
