"""One word for each idea: the glossary is this table, and no page has a word that was retired."""

from __future__ import annotations

import re

import pytest
from test_readme import DOCS, section, tables

# The word, and what it means. docs/glossary.md has the same rows.
GLOSSARY = {
    "accept": "Store a cancel request in Redis, in one atomic step. From then on it is as durable as Redis.",
    "attempt": "One cancel sent for an order. Reads are no attempts.",
    "audit log": "The record of everything that was asked for and done, chained by hashes.",
    "batch": "Several orders in one call to the exchange.",
    "bucket": "A token bucket of the account. Each one also names a part of the line of pending cancels.",
    "cancel store": "All pending cancels, in Redis.",
    "circuit breaker": "What stops a worker from calling an exchange that does not answer. Closed: calls"
    " pass. Open: they wait. Half-open: one call tries.",
    "claim": "Take a pending cancel to work on it, together with the tokens that pay for the call.",
    "completion": "What a sender brings back from a call.",
    "dead letter": "A cancel that was given up without proof. It is kept for 30 days at most.",
    "dispatcher": "The part of a worker that claims pending cancels and stores what became of them.",
    "event": "What a worker tells its log, metrics and traces about something that happened.",
    "executor": "The part of a worker that calls the exchange until a claimed cancel's outcome is known.",
    "fencing token": "The number of a claim. Only the latest claim of a cancel may settle it.",
    "final": "An outcome that is not worked on again by itself: `canceled` and `too_late`.",
    "lane": "Priority. `risk` is served before `strategy`.",
    "lease": "How long a claim holds, unless the worker extends it.",
    "listener": "What waits in Redis for wake-ups.",
    "mass cancel": "A cancel of everything in a scope, with a proof at its end.",
    "no orders left": "A listing has proven that no order rests in a scope. It says nothing about positions."
    " The JSON field is `flat`.",
    "outcome": "What became of a cancel: `canceled`, `too_late`, `unknown_order`, `refused` or `unresolved`.",
    "pending cancel": "A cancel that is accepted and not settled.",
    "planner": "The rules that decide what is claimed next.",
    "progress": "What is known so far about a pending cancel.",
    "protocol": "How a call to the exchange is written, and what its answers mean.",
    "read back": "Read an order from the exchange to find out what happened to it.",
    "resolution": "The rules that turn answers of the exchange into an outcome.",
    "result": "What is stored about a settled or unresolved cancel, under the order id.",
    "scope": "Which orders a mass cancel is about.",
    "sender": "A thread that sends calls to the exchange.",
    "service": "A job that a worker repeats beside its work.",
    "settle": "Store the result of a cancel and remove the pending cancel, in one step.",
    "shard": "A part of the exchange with its own write bucket. The field is `exchange_index`.",
    "stats": "How things stand: what `top`, `open` and the metrics show.",
    "sweeper": "The service that finds expired leases, lost wake-ups and passed deadlines.",
    "unanswered": "Without a usable reply. The call may have taken effect.",
    "wake-up": "A signal that there is work. If a worker is idle, it carries the claim of a lone cancel.",
    "worker context": "The parts of one worker process, put together at its start.",
    "worker registry": "Which workers run, in Redis.",
}


# Words that once stood for these. `Code` is left out; so are tables of code that still has the old words.
RETIRED = re.compile(
    r"\b(bells?|ears|outbox|office|roster|pursuit|audit trail|the book|book of|(?<!by )hands|in a hand)\b",
    re.IGNORECASE,
)
NOT_YET = {
    "docs/keys.md": "",
    "docs/how-to/operating.md": "What the log says",
    "docs/how-to/monitoring.md": "Metrics",
    "docs/reference/configuration.md": "",
}


def test_the_glossary_is_this_table_in_order():
    [rows] = tables(DOCS["docs/glossary.md"])
    assert rows == [[word, meaning] for word, meaning in GLOSSARY.items()], "\n".join(
        f"| {word} | {meaning} |" for word, meaning in GLOSSARY.items()
    )
    assert list(GLOSSARY) == sorted(GLOSSARY)


@pytest.mark.parametrize("page", [name for name in DOCS if NOT_YET.get(name) != "" and "bench" not in name])
def test_no_page_uses_a_retired_word(page):
    text = DOCS[page]
    if page in NOT_YET:
        text = text.replace(section(NOT_YET[page], text), "")
    prose = re.sub(r"```.*?^ *```|`[^`\n]+`|<!--.*?-->|\]\([^)]*\)", "", text, flags=re.DOTALL | re.MULTILINE)
    found = [f"{match[0]}: {line.strip()}" for line in prose.splitlines() for match in RETIRED.finditer(line)]
    assert found == [], "\n".join(found)
