"""The Lua checker finds what is wrong with a script, names its line, and has nothing to say of ours."""

from __future__ import annotations

import pytest

from trials import lua_check
from trials.stack import ROOT, RedisServer

OURS = ROOT / "kalshi_cancel/store/lua"
FIRST = "local function shared(x) return x end\nlocal spare = 1\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = RedisServer(tmp_path_factory.mktemp("lua-check"))
    running.start()
    yield running.client()
    running.kill()


def found(server, folder, text):
    (folder / "first.lua").write_text(FIRST)
    (folder / "second.lua").write_text("local spare_too = spare\nreturn shared(spare_too)\n")
    (folder / "third.lua").write_text(text)
    return lua_check.problems(folder, [("first", "second"), ("first", "third")], server)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("return shared(1)", None),
        ("return shared(", "first+third: "),
        ("local a, b = 1, 2\nreturn shared(a)", "third.lua:1: `b` is not used"),
        ("for i, each in ipairs(KEYS) do shared(each) end", "third.lua:1: `i` is not used"),
        (
            "local function f(a)\n  local b\n  return a\nend\nreturn shared(f(1))",
            "third.lua:2: `b` is not used",
        ),
        (
            "if KEYS[1] then\n  local a = 1\n  shared(a)\nelse\n  a = 2\nend\nreturn shared(1)",
            "third.lua:5: `a` is not declared",
        ),
        (
            "-- a comment with 'an odd quote\nreturn shared(misspelt)",
            "third.lua:2: `misspelt` is not declared",
        ),
        ("local t = { a = 1, ['b'] = 2 }\nt.c = t.a\nreturn shared(t)", None),
        ("for _, each in ipairs(KEYS) do shared(each) end", None),
        ("repeat local a = shared(1) until true", "third.lua:1: `a` is not used"),
        (f"return shared('{'x' * lua_check.LINE_MOST}')", "third.lua:1: the line has 177 characters"),
    ],
)
def test_what_is_wrong_is_found_with_its_line(server, tmp_path, text, problem):
    wrong = found(server, tmp_path, text)
    assert [each for each in wrong if not each.startswith(problem or "nothing")] == []
    assert bool(wrong) == (problem is not None)


def test_a_name_of_a_shared_file_must_be_used_by_one_script_and_each_file_be_in_one(server, tmp_path):
    found(server, tmp_path, "return shared(1)")
    assert lua_check.problems(tmp_path, [("first", "third")], server) == [
        "first.lua:2: `spare` is not used",
        "second.lua: no script has it",
    ]


def test_it_has_nothing_to_say_of_ours(server):
    assert len(lua_check.composed()) > 30
    assert lua_check.problems(OURS, lua_check.composed(), server) == []
