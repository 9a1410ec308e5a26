"""A plugin of pytest: notes what the sandbox answers in tests, and the answers that tests make up.

`pytest -p conformance.recording --notes FILE tests/...` writes a line of JSON for each. A made-up answer is
what a test gives to one of our functions that read answers. It is noted whether that took it for good.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conformance.notes import Noted
from conformance.watching import Answered, watch
from kalshi_cancel.exchange import protocol
from kalshi_cancel.store import rate_limits
from worker.dispatch import breaker

_V2 = "/portfolio/events/orders"
# The functions of exchange.protocol that decipher an answer, and of which endpoint; "Order" is a part of one.
DECIPHERING = {
    "decipher_cancel": f"DELETE {_V2}/:order_id",
    "decipher_batch": f"DELETE {_V2}/batched",
    "decipher_read": "GET /portfolio/orders/:order_id",
    "decipher_list": "GET /portfolio/orders",
    "decipher_command": "PUT /portfolio/order_groups/:group_id/trigger",
    "parse_order": "Order",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --notes."""
    parser.addoption("--notes", help="the file to write")


def pytest_configure(config: pytest.Config) -> None:
    """Starts noting, before any test is imported."""
    config.pluginmanager.register(_Notes(Path(config.getoption("--notes"))))


class _Notes:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w")
        self._lock = threading.Lock()
        self._test = ""
        self._within = False
        self._end = watch(self._sandbox_answered)
        for name, endpoint in DECIPHERING.items():
            setattr(protocol, name, self._noting(getattr(protocol, name), endpoint))
        self._note_limits()
        self._note_status()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._test = nodeid

    def pytest_unconfigure(self) -> None:
        self._end()
        self._file.close()

    def _sandbox_answered(self, answered: Answered) -> None:
        self._write(Noted.of(self._test, answered))

    def _noting(self, decipher: Callable[..., Any], endpoint: str) -> Callable[..., Any]:
        @functools.wraps(decipher)
        def noted(*given: Any) -> Any:
            if self._within:  # one that another one calls
                return decipher(*given)
            self._within = True
            try:
                meant = decipher(*given)
            finally:
                self._within = False
            self._made_up(endpoint, given[-1], taken=_taken(meant))
            return meant

        return noted

    def _note_limits(self) -> None:
        parse = rate_limits.Limits.parse

        def noted(limits: Any, costs: Any) -> rate_limits.Limits | None:
            meant = parse(limits, costs)
            self._made_up("GET /account/limits", limits, taken=meant is not None)
            self._made_up("GET /account/endpoint_costs", costs, taken=meant is not None)
            return meant

        rate_limits.Limits.parse = noted  # type: ignore[method-assign, assignment]

    def _note_status(self) -> None:
        init = breaker.CircuitBreaker.__init__

        def noted(own: breaker.CircuitBreaker, look: Callable[[Any], Any], *rest: Any) -> None:
            init(own, lambda state: self._seen(look(state)), *rest)

        breaker.CircuitBreaker.__init__ = noted  # type: ignore[method-assign, assignment]

    def _seen(self, status: Any) -> Any:
        if not isinstance(status, protocol.Failure):
            self._made_up("GET /exchange/status", status, taken=True)
        return status

    def _made_up(self, endpoint: str, answer: Any, *, taken: bool) -> None:
        if isinstance(answer, protocol.Reply):
            status, body = answer.status, answer.body.decode(errors="replace")
        else:
            status, body = 200, json.dumps(answer, default=repr)
        self._write(Noted(self._test, True, endpoint, status, body, taken=taken))  # noqa: FBT003  # a field

    def _write(self, noted: Noted) -> None:
        with self._lock:  # a sandbox answers in many threads
            self._file.write(noted.to_line())


def _taken(meant: Any) -> bool:
    if isinstance(meant, dict):
        return any(_taken(each) for each in meant.values())
    return isinstance(meant, protocol.Canceled | protocol.Page | protocol.Order)
