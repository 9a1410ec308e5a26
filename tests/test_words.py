"""One word per idea: retired words are not in code, Lua, tests or deploy files."""

from __future__ import annotations

import re
import subprocess
from functools import cache

import pytest

from trials.stack import ROOT

# Where the glossary is in force; the sandbox has words of its own.
SEARCHED = re.compile(r"^(?:kalshi_cancel|worker|tests|deploy|bench|trials|conformance)/|^celeryconfig\.py$")
NOT_SEARCHED = re.compile(
    r"^kalshi_cancel/sandbox/|^tests/sandbox/|^tests/test_(?:words|glossary)\.py$|^bench/results/|\.lock$"
)
# Texts that another change rewrites: those of log lines.
LOG_CALL = re.compile(r"\blog\.(?:debug|info|warning|error|critical|exception)\((?:[^()]|\([^()]*\))*\)")

# A retired word, the word to say, and where it may stand all the same.
RETIRED = [
    (r"\bgates?\b|\bgate_|_gate\b", "circuit breaker", ""),
    (r"\bbells?\b|\bears\b|\brung\b|\bring_|\bBellRung\b", "wake-up, listener", ""),
    (
        r"\bhands?\b|\bin_hand\b|\bHANDS\b",
        "sender, claimed",
        r"by hand|at hand|hands? (?:on|out|over|them|events)\b|hand-over|another hand has taken over",
    ),
    (r"\b[Bb]rought\b", "completed", ""),
    (r"\b[Ww]ish\b|\b_wish\b|\ba_wish\b", "ClaimRequest, wanted", r"the same wish"),
    (r"\b_?fates?\b", "conclusion", ""),
    (r"\blearned\b", "progress", r"was learned|has learned|had learned"),
    (r"\bfleets?\b|\bOF_THE_FLEET\b", "all workers, stats", ""),
    (r"\b_trouble\b|\.trouble\b|\btroubled\b", "failure, problem", ""),
    (r"\broster\b|\boffice\b|\boutbox\b", "worker registry, worker context, completions", ""),
    (r"\bmasses\b|\bMASSES_", "mass_cancels", ""),
    (r"\btell_(?:overdue|progress|rest|put|end)\b|\buntold\b", "report, reply", ""),
    (r"\btrails?\b", "audit log", r"audit trail (?:holds|is not|\w+ entries)|the audit trail|audit trail:"),
    (
        r"\b(?:in|of|into|the) (?:the )?book\b|\bbook's\b",
        "cancel store",
        r"order book|without the book|in the book\"",
    ),
    (r"\bpursuits?\b|\bpursue\b", "executor", ""),
    (r"\bstory\b|\b_story\b", "history", ""),
    (r"\bGiveBack\b|\bgive_back\b|\bgives? back\b|\bGiveUp\b|given_up_total", "retry later, dead letter", ""),
    (r"\bthe sweep\b|\bfleet\.lua|\bsweep\.lua|\bbells\.lua|\btell\.lua|\blearn\.lua", "sweeper", ""),
    (r"kalshi-cancel:(?:entry|bell|ears|masses|rung|untold)\b", "see kalshi_cancel/store/keys.py", ""),
]


@cache
def texts():
    """What is searched, by name, without the texts of log lines."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = [name for name in names.splitlines() if SEARCHED.search(name) and not NOT_SEARCHED.search(name)]
    found = {name: (ROOT / name).read_text("utf-8", "replace") for name in wanted}
    return {name: _without_logs(text) if name.endswith(".py") else text for name, text in found.items()}


def _without_logs(text):
    return LOG_CALL.sub(lambda call: "\n" * call[0].count("\n"), text)


def retired_in(text, word, allowed):
    """Lines of the text, by number, with the word where it is not allowed."""
    for number, line in enumerate(text.splitlines(), 1):
        left = re.sub(allowed, "", line) if allowed else line
        if re.search(word, left):
            yield number, line.strip()[:80]


@pytest.mark.parametrize(("word", "say", "allowed"), RETIRED, ids=[say for _, say, _ in RETIRED])
def test_a_retired_word_is_in_no_file(word, say, allowed):
    found = [
        f"{name}:{number}: {line}"
        for name, text in texts().items()
        if re.search(word, text)
        for number, line in retired_in(text, word, allowed)
    ]
    assert found == [], f"say {say}"


@pytest.mark.parametrize(
    ("line", "is_found"), [("the last hand is idle", True), ("written by hand", False), ("beforehand", False)]
)
def test_a_word_is_found_as_a_word_and_not_where_it_is_allowed(line, is_found):
    [(word, _, allowed)] = [row for row in RETIRED if row[1] == "sender, claimed"]
    assert bool(list(retired_in(line, word, allowed))) == is_found
