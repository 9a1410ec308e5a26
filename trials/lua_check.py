"""The Lua checker: every script compiles in a real server, uses what it declares, and declares what it uses.

    python -m trials.lua_check        (a part of `make lint`)

It reads which files make up each script from the calls of ``scripts.load``. A name that is not declared would
stop a script halfway, and only when it gets there. No linter for Lua comes as a wheel, so this one is ours.
"""

from __future__ import annotations

import ast
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import redis

from kalshi_cancel.store import scripts
from trials.stack import ROOT, RedisServer

LINE_MOST = 160
_KEYWORDS = frozenset((
    "and", "break", "do", "else", "elseif", "end", "false", "for", "function", "if", "in", "local",
    "nil", "not", "or", "repeat", "return", "then", "true", "until", "while",
))  # fmt: skip
# What a script finds there, of Lua and of the server.
_GLOBALS = frozenset((
    "ARGV", "KEYS", "redis", "server", "cjson", "cmsgpack", "bit", "struct", "string", "table", "math",
    "os", "assert", "error", "getmetatable", "ipairs", "next", "pairs", "pcall", "rawequal", "rawget",
    "rawset", "select", "setmetatable", "tonumber", "tostring", "type", "unpack", "xpcall",
))  # fmt: skip
_TOKEN = re.compile(
    r"(?P<skip>--\[\[.*?\]\]|--[^\n]*|\s+)"
    r"|(?P<text>'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|\[\[.*?\]\])"
    r"|(?P<name>[A-Za-z_]\w*)|(?P<number>\d[\w.]*)|(?P<sign>\.\.\.|\.\.|[=~<>]=|.)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of a script, and the line that it is on, from 0."""

    kind: str
    text: str
    line: int


@dataclass(slots=True)
class Local:
    """A declared name."""

    name: str
    line: int
    is_used: bool = False


@dataclass(slots=True)
class Found:
    """What a script declares and never uses, and what it uses and nobody declares: name and line."""

    unused: list[tuple[str, int]] = field(default_factory=list)
    undeclared: list[tuple[str, int]] = field(default_factory=list)


def tokens(text: str) -> Iterator[Token]:
    """The pieces of a script without blanks and comments."""
    line = 0
    for match in _TOKEN.finditer(text):
        if match.lastgroup != "skip":
            yield Token(str(match.lastgroup), match[0], line)
        line += match[0].count("\n")


def names_in(text: str) -> Found:
    """Follows each name of a script to the block that declares it."""
    return _Reader(list(tokens(text))).read()


class _Reader:
    def __init__(self, pieces: list[Token]) -> None:
        self._pieces = pieces
        self._at = 0
        self._blocks: list[list[Local]] = [[]]
        self._brackets: list[str] = []
        self._loop: list[Token] = []  # the names of a `for`, until its `do`
        self._found = Found()

    def read(self) -> Found:
        while self._at < len(self._pieces):
            token = self._pieces[self._at]
            self._at += 1
            if token.kind == "sign":
                self._bracket(token.text)
            elif token.kind == "name" and token.text in _KEYWORDS:
                self._keyword(token.text)
            elif token.kind == "name" and not self._is_field():
                self._use(token)
        while self._blocks:
            self._close()
        return self._found

    def _bracket(self, sign: str) -> None:
        if sign in "({[":
            self._brackets.append(sign)
        elif sign in ")}]":
            self._brackets.pop()

    def _keyword(self, word: str) -> None:
        if word == "local":
            if self._text() == "function":
                self._at += 1
                self._declare([self._pieces[self._at]])
                self._function()
            else:
                self._declare(self._list_of_names())
        elif word == "function":
            self._function()
        elif word == "for":
            self._loop = self._list_of_names()
        elif word == "do":
            self._blocks.append([])
            self._declare(self._loop)
            self._loop = []
        elif word in ("then", "repeat"):
            self._blocks.append([])
        elif word == "else":
            self._close()
            self._blocks.append([])
        elif word in ("elseif", "end", "until"):
            self._close()

    def _function(self) -> None:
        while self._text() != "(":
            self._at += 1
        self._at += 1
        self._blocks.append([])
        self._declare(self._list_of_names())
        self._brackets.append("(")  # closed by its `)`, which is read next

    def _list_of_names(self) -> list[Token]:
        names = []
        while self._pieces[self._at].kind == "name" or self._text() in (",", "..."):
            if self._pieces[self._at].kind == "name":
                if self._text() in _KEYWORDS:
                    break
                names.append(self._pieces[self._at])
                if self._text(1) != ",":
                    self._at += 1
                    break
            self._at += 1
        return names

    def _text(self, ahead: int = 0) -> str:
        at = self._at + ahead
        return self._pieces[at].text if at < len(self._pieces) else ""

    def _is_field(self) -> bool:
        before = self._pieces[self._at - 2].text if self._at > 1 else ""
        in_table = bool(self._brackets) and self._brackets[-1] == "{"
        return before in (".", ":") or (in_table and self._text() == "=" and before in ("{", ",", ";"))

    def _declare(self, names: Iterable[Token]) -> None:
        self._blocks[-1] += [Local(each.text, each.line) for each in names]

    def _use(self, token: Token) -> None:
        for block in reversed(self._blocks):
            for local in reversed(block):
                if local.name == token.text:
                    local.is_used = True
                    return
        if token.text not in _GLOBALS:
            self._found.undeclared.append((token.text, token.line))

    def _close(self) -> None:
        for local in self._blocks.pop():
            if not local.is_used and not local.name.startswith("_"):
                self._found.unused.append((local.name, local.line))


def composed() -> set[tuple[str, ...]]:
    """The files of each script, in order, as the code loads them."""
    found = set()
    for package in ("kalshi_cancel", "worker"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("scripts.load", "load"):
                    names = [each.value for each in node.args[1:] if isinstance(each, ast.Constant)]
                    if names:
                        found.add(tuple(str(name) for name in names))
    return found


def problems(folder: Path, scripts_of: Iterable[tuple[str, ...]], server: redis.Redis) -> list[str]:
    """What is wrong, as `file:line: what`; a name has to be used by one of the scripts that a file is in."""
    texts = {path.stem: path.read_text("utf-8") for path in folder.glob("*.lua")}
    wrong = {
        f"{name}.lua:{number}: the line has {len(line)} characters, {LINE_MOST} at most"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > LINE_MOST
    }
    before = scripts.whole("\n--\n").split("\n--\n")[0].count("\n")  # lines that stand before each script
    loaded: set[str] = set()
    unused_in: list[
        tuple[set[str], set[tuple[str, str]]]
    ] = []  # for each script: its lines, and what it leaves
    for names in scripts_of:
        loaded |= set(names)
        whole = scripts.whole("\n".join(texts[name] for name in names))
        lines = [f"{name}.lua:{at}" for name in names for at in range(1, texts[name].count("\n") + 2)]
        places = dict(enumerate(lines, before))
        try:
            server.script_load(whole)
        except redis.ResponseError as error:
            wrong.add(f"{'+'.join(names)}: {error}")
            continue
        found = names_in(whole)
        unused = {(places[line], name) for name, line in found.unused if line in places}
        unused_in.append((set(lines), unused))
        wrong |= {
            f"{places[line]}: `{name}` is not declared" for name, line in found.undeclared if line in places
        }
    for place, name in {each for _, unused in unused_in for each in unused}:
        if all((place, name) in unused for lines, unused in unused_in if place in lines):
            wrong.add(f"{place}: `{name}` is not used")
    return sorted(wrong | {f"{name}.lua: no script has it" for name in set(texts) - loaded})


def main() -> int:
    """Checks every script; 1 when something is wrong."""
    folder = ROOT / "kalshi_cancel/store/lua"
    with tempfile.TemporaryDirectory() as place:
        server = RedisServer(Path(place))
        server.start()
        try:
            wrong = problems(folder, composed(), server.client())
        finally:
            server.kill()
    for each in wrong:
        print(f"{folder.relative_to(ROOT)}/{each}")
    print(f"{len(wrong)} problems in Lua" if wrong else "All Lua checks passed!")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
