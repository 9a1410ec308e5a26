"""The kinds of values: each parses the text of a variable, or says what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

from kalshi_cancel.settings.urls import is_host

OrdersApi: TypeAlias = Literal["v2", "v1"]
LogFormat: TypeAlias = Literal["text", "json", "auto"]

_INTEGER: Final = re.compile(r"[0-9]{1,15}")
_NUMBER: Final = re.compile(r"[0-9]{1,15}(?:\.[0-9]{1,9})?")
_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})
_KEY_PREFIX: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9:._-]{0,63}")
_PORT_MAX: Final = 65_535


class BadValueError(ValueError):
    """A text is no value of its kind; each of ``args`` goes on after the name of the variable."""


def number(low: float, high: float, of: str = "") -> Callable[[str], float]:
    """Parses a number of something within bounds."""
    expected = f"a number{of and f' of {of}'} from {low:.10g} to {high:.10g}"

    def parse(text: str) -> float:
        if _NUMBER.fullmatch(text) and low <= float(text) <= high:
            return float(text)
        raise BadValueError(f"must be {expected} (got: {shown(text)})")

    return parse


def seconds(low: float, high: float) -> Callable[[str], float]:
    """Parses a number of seconds within bounds."""
    return number(low, high, "seconds")


def whole_number(low: int, high: int, of: str) -> Callable[[str], int]:
    """Parses a whole number of something within bounds."""

    def parse(text: str) -> int:
        if _INTEGER.fullmatch(text) and low <= int(text) <= high:
            return int(text)
        raise BadValueError(f"must be a whole number of {of} from {low} to {high} (got: {shown(text)})")

    return parse


def choice(*words: str) -> Callable[[str], str]:
    """Parses one of these words, in any case."""
    expected = f"{', '.join(words[:-1])} or {words[-1]}"

    def parse(text: str) -> str:
        if text.lower() in words:
            return text.lower()
        raise BadValueError(f"must be {expected} (got: {shown(text)})")

    return parse


def flag(text: str) -> bool:
    """True or false."""
    if text.lower() not in _TRUE | _FALSE:
        raise BadValueError(f"must be true or false (got: {shown(text)})")
    return text.lower() in _TRUE


def key_prefix(text: str) -> str:
    """What keys in Redis begin with."""
    if not _KEY_PREFIX.fullmatch(text):
        raise BadValueError(
            "must be at most 64 letters, digits and : . _ -, the first a letter or a digit"
            f" (got: {shown(text)})"
        )
    return text


def port(text: str) -> int:
    """A port to listen on; 0: none."""
    if _INTEGER.fullmatch(text) and int(text) <= _PORT_MAX:
        return int(text)
    raise BadValueError(f"must be a port, or 0 for none (got: {shown(text)})")


def host(text: str) -> str:
    """An address or a name to listen on."""
    if not is_host(text.lower()):
        raise BadValueError(f"must be an address or a host's name (got: {shown(text)})")
    return text


def as_bytes(text: str) -> bytes:
    """The bytes that the environment or a file had."""
    return text.encode("utf-8", "surrogateescape")


def shown(value: str) -> str:
    """A value that is not secret, fit for one line."""
    text = "".join(char if char.isprintable() else "?" for char in value)
    return text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004  (what an eye takes in)
