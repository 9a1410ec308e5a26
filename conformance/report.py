"""Writes bench/results/conformance.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

from conformance.answers import ANSWERS
from conformance.clients import REFUSALS, Client, Tried
from conformance.document import Document
from conformance.judging import Findings
from conformance.left_out import DRAWN, NOT_SERVED, NOT_TAKEN, TAKEN

WIDTH = 120
_HEAD = """# Conformance

`make conformance` checks that the sandbox answers as the exchange's OpenAPI document says. It also runs two
clients that others wrote against the sandbox, unmodified.

| what | version | from |
|---|---|---|
| OpenAPI document | {version} | `openapi.yaml` in the folder `SPECS`, by default `../shared/exchange-specs` |
{clients}

The clients are the newest releases on the day of the run; `requirements-conformance.lock` pins what they
need. They need Python 3.12 or newer: the run finds it, or takes `PYTHON312=...`. The exchange's own client
asks for Python 3.13 and works on 3.12. There pip is told to ignore that, or it would install an old release.

The document is not part of this repository. Each sdist of `kalshi-sdk` has it; the run unpacks the newest
into `.venv-conformance/specs`, and says so if its version is not that of `SPECS`.

A body conforms when it has every required field, and no field that the document does not have. Each field has
the right type and format: contracts have two decimals, money has two to six.

The ordinary suite needs neither document nor network. It checks every answer that a test of the sandbox gets
against the table in `conformance/answers.py`. This run checks that table against the document.

"""


def write_report(document: Document, found: Findings, tried: Mapping[Client, list[Tried]], day: str) -> str:
    """The whole page."""
    clients = "\n".join(
        f"| `{client.package}`, {client.about} | {client.version} | the registry, on {day} |"
        for client in tried
    )
    return _HEAD.format(version=document.version, clients=clients) + "\n".join(
        chain(
            _verdict(found, tried),
            _endpoints(document, found, tried),
            _refusals(found, tried),
            _made_up(found),
            _left_out(found),
        )
    )


def _verdict(found: Findings, tried: Mapping[Client, list[Tried]]) -> Iterator[str]:
    troubles = [
        f"- `{client.package}`: {each.words}"
        for client, plays in tried.items()
        for each in plays
        if each.failure
    ]
    wrong = [*(f"- {said}" for said in found.wrong), *troubles]
    yield (
        "Everything conforms, except what is left out on purpose (below)."
        if not wrong
        else "Does not conform:"
    )
    yield from (["", *wrong] if wrong else [])
    yield ""


def _endpoints(document: Document, found: Findings, tried: Mapping[Client, list[Tried]]) -> Iterator[str]:
    yield "## Endpoints"
    yield ""
    yield from _text(
        "The third column counts the tests in which the sandbox answered there. The last two columns list "
        "what each client asked for and read correctly."
    )
    yield _row("endpoint", "in the document", "tests", *(f"`{client.package}`" for client in tried))
    yield _row("---", "---", "--:", *("---" for _ in tried))
    for endpoint in ANSWERS:
        cells = [_works(each for each in plays if each.about == endpoint) for plays in tried.values()]
        tests = len(found.answered[endpoint])
        yield _row(f"`{endpoint}`", document.name_of(endpoint) or "not there", str(tests), *cells)
    yield ""


def _works(plays: Iterable[Tried]) -> str:
    said = [each.play if each.failure is None else f"**{each.play} fails**" for each in plays]
    return ", ".join(said) or "not asked"


def _refusals(found: Findings, tried: Mapping[Client, list[Tried]]) -> Iterator[str]:
    yield "## Refusals"
    yield ""
    yield from _text(
        "The document shows an error's code and message without anything around them (flat). The exchange "
        "sends them inside `error` (nested), and so does the sandbox; its setting `error_shape` can play the "
        "other. Listed are the shapes in which a client raises its own error with the right status."
    )
    yield _row("refusal", "status", "tests", *(f"`{client.package}`" for client in tried))
    yield _row("---", "--:", "--:", *("---" for _ in tried))
    for refusal, (status, _) in REFUSALS.items():
        of_this = [[each for each in plays if each.about == refusal] for plays in tried.values()]
        tests = len(found.refused[str(status)])
        yield _row(refusal, str(status), str(tests), *(_works(each) for each in of_this))
    yield ""


def _made_up(found: Findings) -> Iterator[str]:
    yield "## Answers that tests make up"
    yield ""
    yield from _text(
        "Tests of the workers make up answers of status 200, good ones and bad ones. An answer that the "
        "workers accept must conform, and one that conforms must be accepted. The exceptions are named below."
    )
    yield _row("answer", "accepted: tests", "not accepted: tests")
    yield _row("---", "--:", "--:")
    for conforms in (True, False):
        counts = [str(len(found.made_up[accepted, conforms])) for accepted in (True, False)]
        yield _row("conforms" if conforms else "does not conform", *counts)
    yield ""


def _left_out(found: Findings) -> Iterator[str]:
    yield "## Left out on purpose"
    yield ""
    yield "The sandbox does not have these parts of the document:"
    yield ""
    yield from (f"- {each}" for each in NOT_SERVED)
    yield ""
    yield "The sandbox departs from the document here:"
    yield ""
    yield from _item("Errors are nested, and a 429's `error` is a text, as the exchange sends them.")
    yield "- The document does not list these statuses, for pauses, limits, keys and mistakes:"
    for endpoint in ANSWERS:
        if statuses := found.undocumented[endpoint]:
            yield f"  - `{endpoint}`: {', '.join(map(str, sorted(statuses)))}"
    yield from _item(
        "The V1 endpoints for orders, which the document no longer has: 410, or alive by a setting."
    )
    for kind, does in (
        ("fault", "Faults spoil an answer on purpose, or put another in its place. Met in these tests"),
        ("setting", "Settings play older dialects and other services"),
    ):
        names = sorted(name.removeprefix(f"{kind} ") for name in found.odd if name.startswith(kind))
        yield from _item(f"{does}: {', '.join(f'`{name}`' for name in names)}.")
    yield ""
    yield "The workers accept these made-up answers, which do not conform:"
    yield ""
    yield from _reasons(TAKEN)
    yield "The workers do not accept these, which do conform:"
    yield ""
    yield from _reasons(NOT_TAKEN)
    yield "Not judged, because each run draws other answers:"
    yield ""
    yield from (f"- `{test}`" for test in DRAWN)
    yield ""


def _reasons(reasons: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    for reason, tests in reasons.items():
        yield f"- {reason}:"
        yield from (f"  - `{test}`" for test in tests)
    yield ""


def _text(words: str) -> Iterator[str]:
    yield textwrap.fill(words, WIDTH, break_on_hyphens=False, break_long_words=False)
    yield ""


def _item(words: str) -> Iterator[str]:
    yield textwrap.fill(words, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
