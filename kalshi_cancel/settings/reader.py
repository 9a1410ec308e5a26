"""The reader takes variables out of an environment and keeps what is wrong with them.

Every problem found is reported in one SettingsError. Surrounding blanks of a value are dropped and an empty
value counts as not set; a passphrase is taken as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from kalshi_cancel.settings.foreign import foreign_variables
from kalshi_cancel.settings.variables import BY_NAME, Who

INTEGER: Final = re.compile(r"[0-9]{1,15}")
_NUMBER: Final = re.compile(r"[0-9]{1,15}(?:\.[0-9]{1,9})?")
_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})


class SettingsError(ValueError):
    """The environment does not make valid settings; ``problems`` are all of them, without any secret."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "; ".join(self.problems)


class Reader:
    """Reads variables of the table and keeps what is wrong with them; a bad one reads as a harmless value."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env
        self._problems: list[str] = []

    def problem(self, text: str) -> None:
        """Keeps what is wrong, in the operator's words."""
        self._problems.append(text)

    def finish(self) -> None:
        """Raise SettingsError if there was any problem."""
        if self._problems:
            raise SettingsError(tuple(self._problems))

    def refuse_near_misses(self, *readers: Who) -> None:
        """Has the variables be problems that are nearly those that these read."""
        for name, meant in foreign_variables(self._env).items():
            if meant is not None and BY_NAME[meant].who in readers:
                self.problem(f"{shown(name)} is no setting: did you mean {meant}?")

    def raw(self, name: str) -> str:
        """The value as it is set, or empty."""
        return self._env.get(BY_NAME[name].name) or ""

    def text(self, name: str) -> str:
        """The value without surrounding blanks, else the default; empty for neither or a problem."""
        variable = BY_NAME[name]
        value = self.raw(name).strip()
        if not value:
            if variable.required:
                self.problem(f"{name} is not set: {variable.meaning[0].lower()}{variable.meaning[1:-1]}")
            return variable.default
        if value[0] in "\"'" and value[0] == value[-1]:
            self.problem(f"{name} is wrapped in quotes, which were taken literally: remove them")
            return ""
        return value

    def number(self, name: str, *, low: float, high: float) -> float:
        """A number of seconds within bounds."""
        value = self.text(name)
        if _NUMBER.fullmatch(value) and low <= float(value) <= high:
            return float(value)
        return float(self._bad_number(name, value, f"a number of seconds from {low:g} to {high:g}"))

    def integer(self, name: str, *, low: int, high: int, unit: str) -> int:
        """A whole number of ``unit`` within bounds."""
        value = self.text(name)
        if INTEGER.fullmatch(value) and low <= int(value) <= high:
            return int(value)
        return int(self._bad_number(name, value, f"a whole number of {unit} from {low} to {high}"))

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.text(name).lower()
        if value and value not in _TRUE | _FALSE:
            self.problem(f"{name} must be true or false (got: {shown(value)})")
        return value in _TRUE

    def _bad_number(self, name: str, value: str, expected: str) -> str:
        if value:  # else text() has said what is wrong
            self.problem(f"{name} must be {expected} (got: {shown(value)})")
        return BY_NAME[name].default


def shown(value: str) -> str:
    """A value that is not secret, fit for one line."""
    text = "".join(char if char.isprintable() else "?" for char in value)
    return text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004  (what an eye takes in)
