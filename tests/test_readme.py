"""README and docs say what is true: their tests exist, their tables are the code's, their examples run."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import uuid
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from kalshi_cancel import cli
from kalshi_cancel.cli import exits, mass
from kalshi_cancel.exchange.protocol import MEANINGS
from kalshi_cancel.model.mass_request import MassRequest
from kalshi_cancel.model.requests import REQUEST_FIELDS
from kalshi_cancel.model.results import CancelResult, Outcome
from kalshi_cancel.model.scope import Scope
from kalshi_cancel.settings.variables import VARIABLES, Variable
from trials.stack import ROOT, free_port, wait_until

README = (ROOT / "README.md").read_text()
DOCS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for folder in (".", "docs", "bench/results", "deploy")
    for path in sorted((ROOT / folder).glob("*.md" if folder == "." else "**/*.md"))
}
CANCELCTL, CONFIGURATION, CONTRIBUTING, HOW_IT_WORKS, MASS_CANCEL, MESSAGES, OPERATING, PROMISES = (
    DOCS[name]
    for name in (
        *("docs/reference/cancelctl.md", "docs/reference/configuration.md", "CONTRIBUTING.md"),
        *("docs/explanation/how-it-works.md", "docs/how-to/mass-cancel.md", "docs/reference/messages.md"),
        *("docs/how-to/operating.md", "docs/explanation/promises.md"),
    )
)
QUICKSTART, STRATEGY = DOCS["docs/tutorial/quickstart.md"], DOCS["docs/tutorial/strategy.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FIRST_SCREEN = README[: README.index("\n## ")]


def section(title: str, text: str = README) -> str:
    """What stands under a heading, with the smaller headings in it."""
    level, rest = re.search(rf"^(##+) {re.escape(title)}\n(.*)", text, re.MULTILINE | re.DOTALL).groups()
    return re.split(rf"^#{{2,{len(level)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def first_words(rows: list[list[str]]) -> list[str]:
    """The name that each row of a table is about."""
    return [code_words(row[0])[0] for row in rows]


def tables(text: str) -> list[list[list[str]]]:
    """The tables in a text: rows of cells, without the heads."""
    found = re.findall(r"((?:^\|.*\|\n)+)", text, re.MULTILINE)
    return [
        [[cell.strip() for cell in row.strip("|").split(" |")] for row in table.splitlines()[2:]]
        for table in found
    ]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)


def code_words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def names_of_all_tests() -> Counter[str]:
    return Counter(
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


def run_python(text: str, folder: Path, **environment: str) -> str:
    """What a program prints, run where none of our code is beside it."""
    done = subprocess.run(
        [sys.executable, "-c", text],
        cwd=folder,
        env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- promises


def test_each_promise_names_a_test_that_exists_once():
    suite = names_of_all_tests()
    [promises] = tables(PROMISES)
    for condition, consequence, test in promises:
        if condition.startswith("**"):
            continue  # the heading of a group
        assert consequence, condition
        assert [suite[name] for name in code_words(test)] == [1], test


def test_what_the_readme_promises_is_promised_in_the_same_words():
    [promises], [chosen, _] = tables(PROMISES), tables(section("What it promises"))
    assert len(chosen) >= 5
    assert [row for row in chosen if row not in [[condition, then] for condition, then, _ in promises]] == []


def test_every_test_that_is_named_anywhere_exists_once():
    suite = names_of_all_tests()
    named = {name for text in DOCS.values() for name in re.findall(r"\btest_\w+\b(?!\.py)", text)}
    assert named
    assert {name: suite[name] for name in named if suite[name] != 1} == {}


def test_the_first_two_commands_are_made_by_the_makefile():
    commands = blocks(FIRST_SCREEN, "sh")[0].splitlines()
    assert [command.split("#")[0].split() for command in commands] == [["make", "demo"], ["make", "test"]]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {name for text in DOCS.values() for name in re.findall(r"`make ([a-z-]+)`", text)}
    assert named | {"demo", "test"} <= set(targets)


# -- examples


def test_a_whole_result_has_what_is_shown(stack, control, tmp_path):
    [code] = blocks(QUICKSTART, "python")
    shown = ast.literal_eval(blocks(QUICKSTART, "text")[0])
    order_id = str(uuid.uuid4())
    control.place(order_id)
    printed = run_python(
        code.replace(shown["order_id"], order_id), tmp_path, REDIS_URL=stack.redis.url, PYTHONPATH=str(ROOT)
    )
    result = ast.literal_eval(printed)
    moments = ("order_id", "requested_at", "settled_at", "exchange_ts_ms")
    assert list(result) == list(shown)
    assert {**result, **dict.fromkeys(moments)} == {**shown, **dict.fromkeys(moments)}


def test_the_raw_producer_gets_the_result_under_both_ids(stack, control, tmp_path):
    [code] = blocks(MESSAGES, "python")
    order_id = str(uuid.uuid4())
    control.place(order_id)
    code = code.replace("redis://localhost:6379/0", stack.redis.url).replace("5b1f...", order_id)
    assert run_python(code, tmp_path).split() == ["canceled", "canceled"]


def test_the_strategy_prints_what_is_shown(tmp_path):
    [code] = blocks(STRATEGY, "python")
    [shown] = blocks(STRATEGY, "text")
    assert run_python(code, tmp_path, PYTHONPATH=str(ROOT)) == shown


def test_the_strategys_table_has_every_outcome():
    [rows] = tables(STRATEGY)
    assert first_words(rows) == [outcome.value for outcome in Outcome]


@pytest.mark.parametrize("queue", ["cancels", "risk"])
def test_the_message_for_any_other_language_is_served_as_it_stands(stack, control, queue):
    [text] = blocks(MESSAGES, "json")
    order_id, message_id = str(uuid.uuid4()), str(uuid.uuid4())
    control.place(order_id)
    text = text.replace("5b1f...", order_id).replace(json.loads(text)["headers"]["id"], message_id)
    with stack.redis.client() as server:
        server.lpush(queue, text)
        for task_id in (f"cancel:{order_id}", message_id):
            record = wait_until(lambda key=f"celery-task-meta-{task_id}": server.get(key), what=task_id)
            assert json.loads(record)["result"]["outcome"] == "canceled"


def test_the_environment_of_the_walk_through_is_what_a_worker_requires():
    exported = re.findall(r"export (\w+)=", DOCS["docs/how-to/real-account.md"])
    required = {variable.name for variable in VARIABLES if variable.required}
    assert set(exported) == required | {"KALSHI_API_KEY_ID", "KALSHI_PRIVATE_KEY_PATH"}


def test_the_first_cancel_and_the_quick_start_do_what_they_say(tmp_path):
    first = section("Your first cancel")
    [start], [code], [shown] = (blocks(first, language) for language in ("sh", "python", "text"))
    assert len(code.splitlines()) == 3
    more, stop = blocks(QUICKSTART, "sh")
    # Here the programs are there, and the port may be taken.
    start = start.replace(". .venv/bin/activate", "set -m -e").replace("7379", str(free_port()))
    python = f"python - <<'END'\n{code}END\n"
    done = subprocess.run(
        ["bash", "-c", f"{start}{python}{more}{stop}wait || true\n"],
        cwd=tmp_path,
        env={"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(shown)
    words = [line.split() for line in done.stdout.splitlines() if line.strip()]
    assert [row[:2] for row in words if row[0].startswith("sample-")] == [
        ["sample-partly-filled", "canceled"],
        ["sample-executed", "too_late"],
    ]
    assert [row[1] for row in words if row[0] == "flat"] == ["yes,"]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 110


def test_the_figures_are_those_of_the_pages_that_they_are_from():
    [_, rows] = tables(section("What it promises"))
    for what, figure, source in rows:
        page = DOCS[re.search(r"\]\((.+?)\)", source)[1]]
        numbers = re.findall(r"\d[\d,.]*\b", f"{what} {figure}")
        assert numbers, what
        assert [number for number in numbers if not re.search(rf"\b{re.escape(number)}\b", page)] == []


# -- tables


def configuration_row(variable: Variable) -> str:
    default = f"`{variable.default}`" if variable.default else ""
    value = "**required**" if variable.required else default
    meaning = variable.meaning + (" Secret." if variable.secret else "")
    return f"| `{variable.name}` | {variable.who} | {value} | {meaning} |"


def test_the_configuration_table_is_the_one_of_the_settings():
    found = [line for line in CONFIGURATION.splitlines() if line.startswith("| `")]
    expected = [configuration_row(variable) for variable in VARIABLES]
    assert found == expected, "the table should be:\n" + "\n".join(expected)


def test_the_message_table_names_exactly_the_fields_of_a_request():
    [rows] = tables(section("Cancel one order, or several", MESSAGES))
    assert first_words(rows) == list(REQUEST_FIELDS)


def test_the_result_table_names_exactly_the_fields_of_a_result():
    [rows] = tables(section("The result of a cancel", MESSAGES))
    assert first_words(rows) == list(CancelResult("", Outcome.REFUSED).to_json())
    assert {outcome.value for outcome in Outcome} <= set(code_words(rows[1][1]))


def test_the_outcome_table_has_every_outcome_and_what_asking_again_does():
    [rows] = tables(section("What you get back"))
    assert [Outcome(name) for name in first_words(rows)] == sorted(Outcome, key=first_words(rows).index)
    assert {name: "stored result" in row[2] for name, row in zip(first_words(rows), rows, strict=True)} == {
        outcome.value: outcome.final for outcome in Outcome
    }


def test_the_mass_message_table_names_exactly_the_fields_of_a_mass_request():
    [rows, *_] = tables(section("Mass cancel", MESSAGES))
    assert first_words(rows) == [each.name for each in fields(MassRequest) if each.name != "accepted_at"]


def test_the_scope_table_names_exactly_the_fields_of_a_scope_and_the_options_that_set_them():
    [rows] = tables(section("The scope", MESSAGES))
    assert first_words(rows) == [each.name for each in fields(Scope)]
    options = {
        how.get("dest", option.removeprefix("--").replace("-", "_")): option
        for option, _, _, how in mass.SCOPE_OPTIONS
    }
    assert {name: code_words(row[2])[0] for name, row in zip(first_words(rows), rows, strict=True)} == options
    assert {name for name in options if f"`{name}`" not in MASS_CANCEL} == set()


def test_the_mass_cancels_lines_print_what_is_shown_and_its_report_has_the_fields_of_the_tables(
    stack, control, client, tmp_path
):
    [code] = blocks(MASS_CANCEL, "python")
    for _ in range(2):
        control.place(str(uuid.uuid4()), client_order_id=f"mm-btc-{uuid.uuid4()}")
    printed = run_python(code, tmp_path, REDIS_URL=stack.redis.url, PYTHONPATH=str(ROOT))
    assert printed == blocks(MASS_CANCEL, "text")[0]
    [(request_id, _, report), *_] = client.mass_cancels(at_most=1)
    report_rows, plan_rows, progress_rows = tables(section("The report of a mass cancel", MESSAGES))
    assert sorted(first_words(report_rows)) == sorted(report)
    assert sorted(first_words(plan_rows)) == sorted(report["plan"])
    assert sorted(first_words(progress_rows)) == sorted(client._mass_cancels.progress(request_id))


def test_every_mass_cancel_that_is_shown_can_be_typed():
    [examples] = blocks(MASS_CANCEL, "sh")
    for line in examples.splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "cancelctl"
        assert cli.parser().parse_args(words[1:]).run


def test_the_table_of_answers_has_every_row_that_the_dialects_tell_apart():
    rows, *_ = tables(section("What an answer means", HOW_IT_WORKS))
    named = Counter(word for row in rows for word in code_words(row[0]))
    assert named == Counter(f"{row.status} {row.code}".strip() for row in MEANINGS)


def test_the_table_of_redis_users_names_those_of_the_file():
    [rows] = tables(section("Users", OPERATING))
    users = re.findall(r"^user (\S+) on", (ROOT / "deploy/redis/users.acl").read_text(), re.MULTILINE)
    assert sorted(first_words(rows)) == sorted(users)


def test_the_exit_codes_are_those_of_the_command():
    [rows] = tables(CANCELCTL)
    in_help = re.findall(r"^ +(\d+)  (.+)$", exits.__doc__, re.MULTILINE)
    assert [(code, meaning) for code, meaning in rows] == in_help
    assert {int(code) for code, _ in rows} == {code.value for code in exits.Exit}


def test_the_commands_are_those_of_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "kalshi_cancel.cli", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    commands = re.findall(r"^    ([a-z]+)  ", done.stdout, re.MULTILINE)
    named = re.search(r"`cancelctl ([a-z |]+)`", CANCELCTL)[1].split(" | ")
    assert named == commands
    for text in DOCS.values():
        assert set(re.findall(r"`cancelctl ([a-z]+)", text)) <= set(commands)


def test_every_dependency_is_listed_with_its_reason():
    for text, wanted in (
        (section("Dependencies"), PROJECT["project"]["dependencies"]),
        (section("What it is developed with", CONTRIBUTING), PROJECT["dependency-groups"]["dev"]),
        (section("What it is measured with", CONTRIBUTING), PROJECT["dependency-groups"]["bench"]),
    ):
        [rows] = tables(text)
        listed = {name for cell, reason in rows for name in code_words(cell) if reason}
        assert listed == {Requirement(each).name for each in wanted}


def test_every_place_of_the_repository_is_listed():
    rows = tables(CONTRIBUTING)[0]
    listed = {name.rstrip("/") for row in rows for name in code_words(row[0])}
    assert {name for name in listed if not (ROOT / name).exists()} == set()
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()  # nothing where it is no clone
    assert {path.split("/")[0] for path in tracked if (ROOT / path).exists()} - listed == set()


@pytest.mark.parametrize("package", ["kalshi_cancel", "worker"])
def test_every_module_has_its_place(package):
    [rows] = tables(section(f"Inside `{package}/`", CONTRIBUTING))
    listed = {code_words(folder)[0].strip("./"): code_words(modules) for folder, _, modules in rows}
    there = {}
    for path in (ROOT / package).rglob("*.py"):
        if path.stem not in ("__init__", "__main__"):
            folder = path.parent.relative_to(ROOT / package).as_posix().strip(".")
            there.setdefault(folder, []).append(path.stem)
    assert listed == {folder: sorted(names) for folder, names in there.items()}


def headings(text: str) -> set[str]:
    """The anchors that a page has."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", DOCS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", DOCS[page]):
        if target.startswith("https://"):
            continue
        place, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / place).resolve() if place else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in headings(path.read_text()), target


@pytest.mark.parametrize("page", DOCS)
def test_files_that_are_named_exist(page):
    named = set(
        re.findall(r"`((?:kalshi_cancel|worker|trials|tests|docs|bench|deploy)/[\w./-]+)`", DOCS[page])
    )
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_every_page_of_the_docs_is_linked():
    linked = set(re.findall(r"\]\(([^)#]+\.md)", README))
    parts = {"README.md", "deploy/redis/README.md"}  # the one that links, and a part of deploy/README.md
    assert set(DOCS) - linked == parts
