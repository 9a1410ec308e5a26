"""Judges what was noted: which answers are as the document has them, and which are not, on purpose or not."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from conformance.answers import ANSWERS, ERROR
from conformance.document import Document
from conformance.left_out import DRAWN, NOT_TAKEN, TAKEN
from conformance.notes import Noted

SAID_MOST = 10  # departures of one answer: a listing may have thousands of orders


@dataclass(slots=True)
class Findings:
    """What was found.

    `wrong`: the departures that nobody means, in words. `undocumented`: statuses by endpoint. The others
    are sets of tests: by endpoint, by status, by what made an answer odd, by (taken, conforms) if made up.
    """

    wrong: list[str] = field(default_factory=list)
    answered: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    refused: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    odd: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    undocumented: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    made_up: defaultdict[tuple[bool, bool], set[str]] = field(default_factory=lambda: defaultdict(set))


def judge(document: Document, notes: Iterable[Noted]) -> Findings:
    """Holds all notes, and our own table of answers, against the document."""
    found = Findings()
    _table(document, found)
    departing: defaultdict[bool, set[str]] = defaultdict(set)
    for noted in notes:
        if noted.made_up:
            _made_up(document, noted, found, departing)
        elif noted.odd is not None:
            found.odd[noted.odd].add(noted.test)
        elif noted.status >= 400:
            _refused(document, noted, found)
        else:
            found.answered[noted.endpoint].add(noted.test)
            body = noted.body.encode()
            found.wrong += _said(noted, document.departures(noted.endpoint, noted.status, body))
    for taken, reasons in ((True, TAKEN), (False, NOT_TAKEN)):
        named = {test for tests in reasons.values() for test in tests}
        found.wrong += [
            f"{test}: named in conformance/left_out.py for nothing" for test in named - departing[taken]
        ]
    found.wrong = list(dict.fromkeys(found.wrong))
    return found


def _table(document: Document, found: Findings) -> None:
    forms = {
        endpoint: (form, document.form_of(endpoint, status)) for endpoint, (status, form) in ANSWERS.items()
    }
    forms["an error"] = (ERROR, document.form_named("ErrorResponse"))
    for name, (ours, theirs) in forms.items():
        if ours != theirs:
            found.wrong.append(f"{name}: conformance/answers.py has {ours}, the document {theirs}")


def _refused(document: Document, noted: Noted, found: Findings) -> None:
    """An error: its body stands in `error`; that of the rate limiter is a word there."""
    found.refused[str(noted.status)].add(noted.test)
    if not document.has(noted.endpoint, noted.status):
        found.undocumented[noted.endpoint].add(noted.status)
    error = json.loads(noted.body)["error"]
    if noted.status == 429 and isinstance(error, str):
        return
    found.wrong += _said(noted, document.differences_from("ErrorResponse", json.dumps(error).encode()))


def _made_up(
    document: Document, noted: Noted, found: Findings, departing: defaultdict[bool, set[str]]
) -> None:
    """An answer of a test's own; what is no success is judged by our tests alone."""
    test = noted.test.partition("::")[2].partition("[")[0]
    if noted.status >= 300 or test in DRAWN:
        return
    body = noted.body.encode()
    if noted.endpoint in ANSWERS:
        departures = document.departures(noted.endpoint, noted.status, body)
    else:
        departures = document.differences_from(noted.endpoint, body)
    found.made_up[noted.taken, not departures].add(noted.test)
    if noted.taken != bool(departures):
        return
    departing[noted.taken].add(test)
    reasons = TAKEN if noted.taken else NOT_TAKEN
    if not any(test in tests for tests in reasons.values()):
        found.wrong += _said(noted, departures or ["conforms, and is not taken"])


def _said(noted: Noted, departures: list[str]) -> list[str]:
    where = f"{noted.test}: {noted.endpoint} {noted.status}"
    more = len(departures) - SAID_MOST
    some = [f"{where}: {said}" for said in departures[:SAID_MOST]]
    return [*some, f"{where}: {more} more"] if more > 0 else some
