"""The reader takes variables out of an environment and keeps what is wrong with them.

Every problem found is reported in one SettingsError. Surrounding blanks of a value are dropped and an empty
value counts as not set; a passphrase is taken as it is.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from kalshi_cancel.settings.exchange import small_file
from kalshi_cancel.settings.foreign import foreign_variables
from kalshi_cancel.settings.values import BadValueError, shown
from kalshi_cancel.settings.variables import BY_NAME, VARIABLES, Variable, Who


class SettingsError(ValueError):
    """The environment does not make valid settings; ``problems`` are all of them, without any secret."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "; ".join(self.problems)


def read(env: Mapping[str, str] | None, *readers: Who) -> dict[Who, dict[str, Any]]:
    """The fields that the variables of these readers set, by reader; raises SettingsError.

    ``env``: the process environment when None. A variable that is nearly one of theirs is a problem too.
    """
    reader = _Reader(os.environ if env is None else env)
    found = {who: reader.fields(who) for who in readers}
    reader.refuse_near_misses(readers)
    reader.finish()
    return found


def read_one(env: Mapping[str, str] | None, name: str) -> Any:
    """The value of one variable, None for none; raises SettingsError."""
    reader = _Reader(os.environ if env is None else env)
    value = reader.value(BY_NAME[name])
    reader.finish()
    return value


class _Reader:
    """Reads variables of the table and keeps what is wrong with them; a bad one reads as None."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env
        self._problems: dict[str, None] = {}  # in order; a file's variable may be read twice

    def fields(self, who: Who) -> dict[str, Any]:
        """The fields that this reader's variables set."""
        rows = [variable for variable in VARIABLES if variable.who == who]
        return {variable.field: self.value(variable) for variable in rows if variable.field is not None}

    def value(self, variable: Variable) -> Any:
        """The parsed value; None for none, or for a problem."""
        source, text = variable.name, self._text(variable)
        if variable.file is not None:
            source, text = self._text_or_file(variable, BY_NAME[variable.file])
        if not text:
            return None
        try:
            return variable.parse(text)
        except BadValueError as bad:
            self._keep(*(f"{source} {problem}" for problem in bad.args))
            return None

    def refuse_near_misses(self, readers: Collection[Who]) -> None:
        """Has the variables be problems that are nearly those that these read."""
        for name, meant in foreign_variables(self._env).items():
            if meant is not None and BY_NAME[meant].who in readers:
                self._keep(f"{shown(name)} is no setting: did you mean {meant}?")

    def finish(self) -> None:
        """Raise SettingsError if there was any problem."""
        if self._problems:
            raise SettingsError(tuple(self._problems))

    def _text(self, variable: Variable) -> str:
        """The value without surrounding blanks, else the default; empty for neither or a problem."""
        name, raw = variable.name, self._raw(variable)
        value = raw if variable.verbatim else raw.strip()
        if not value:
            if variable.required:
                self._keep(f"{name} is not set: {variable.meaning[0].lower()}{variable.meaning[1:-1]}")
            return variable.default
        if not variable.verbatim and value[0] in "\"'" and value[0] == value[-1]:
            self._keep(f"{name} is wrapped in quotes, which were taken literally: remove them")
            return ""
        return value

    def _text_or_file(self, variable: Variable, file: Variable) -> tuple[str, str]:
        """What a variable holds, or the file that its other one names, with the words for where it was."""
        name, text = variable.name, self._text(variable)
        name_is_set, file_is_set = (bool(self._raw(each).strip()) for each in (variable, file))
        if name_is_set and file_is_set:
            self._keep(f"{file.name} and {name} are both set: set one of them")
        elif not name_is_set and not file_is_set:
            self._keep(f"neither {file.name} nor {name} is set: set one of them")
        elif (path := self.value(file)) is not None:
            try:
                content = small_file(path).decode("utf-8", "surrogateescape")
            except BadValueError as bad:
                self._keep(f"{file.name}: {bad}")
            else:
                return f"{file.name}: what is in {shown(path)}", content
            return name, ""
        return name, text

    def _raw(self, variable: Variable) -> str:
        return self._env.get(variable.name) or ""

    def _keep(self, *problems: str) -> None:
        self._problems |= dict.fromkeys(problems)
