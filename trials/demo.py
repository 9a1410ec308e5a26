"""The demonstration: real cancels through Redis, a Celery worker and the sandbox, held against the truth.

    python -m trials.demo        (or: make demo)

Starts everything it needs on loopback in a temporary folder, asks for a mixed store of orders to be canceled
(by the client, and by a process that knows nothing but Celery), prints what became of each, and compares
every line with the exchange's own state. Exit codes: 0 all the same, 1 something differs or did not start,
130 Ctrl-C.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from kalshi_cancel.client import CancelClient
from kalshi_cancel.model.results import CancelResult, ConfirmedBy, Outcome
from kalshi_cancel.sandbox.control import Control, ControlError, Json
from kalshi_cancel.store.scripts import StoreError
from trials.stack import NotReady, Part, Stack

RESULTS_WITHIN_S = 20.0
LOG_LINES_SHOWN = 25

# A producer as a stranger would write it, in a process of its own: it knows Celery and the task's name.
STRANGER = """
import json, sys
from celery import Celery

redis_url, one, many = sys.argv[1], sys.argv[2].split(), sys.argv[3].split()
app = Celery(broker=redis_url, backend=redis_url)
waiting = [app.send_task("cancel_order", kwargs={"order_id": i}, queue="cancels") for i in one]
orders = [{"order_id": i} for i in many]
waiting.append(app.send_task("cancel_orders", kwargs={"orders": orders}, queue="cancels"))
*singles, bulk = [each.get(timeout=20) for each in waiting]
print(json.dumps(singles + bulk))
"""


@dataclass(frozen=True, slots=True)
class Scene:
    """One order of the demonstration: how it stands, what goes wrong, and who asks for its cancel how.

    ``order`` are the parameters of ``Control.place`` (None: the exchange never had it).
    """

    order_id: str
    asked: Sequence[str]
    order: Mapping[str, Any] | None = field(default_factory=dict)
    fault: str | None = None
    canceled_elsewhere: bool = False

    @property
    def asked_by(self) -> str:
        """Who asked, as the table says it."""
        if len(self.asked) == 1:
            return self.asked[0]
        raw = sum(how.startswith("raw") for how in self.asked)
        return f"client {len(self.asked) - raw}x, raw {raw}x"


ONE, MANY, RAW_ONE, RAW_MANY = "cancel()", "cancel_many()", "raw cancel_order", "raw cancel_orders"

SCENES = (
    Scene("resting", [ONE]),
    Scene("partly-filled", [MANY], {"count": "10.00", "filled": "3.00"}),
    Scene("fractional", [MANY], {"count": "2.75", "ticker": "KXTEST-26NOV22-C"}),
    Scene("executed-before", [MANY], {"status": "executed"}),
    Scene("canceled-before", [MANY], canceled_elsewhere=True),
    Scene("on-shard-2", [ONE], {"ticker": "KXBTC-26NOV22-T100000", "exchange_index": 2}),
    Scene("answer-lost", [ONE], fault="drop_after"),
    Scene("lost-and-filled", [ONE], fault="drop_after_fill"),
    Scene("behind-a-429", [ONE], fault="http_429"),
    Scene("asked-3-times", [ONE, ONE, RAW_ONE]),
    Scene("unknown", [ONE], None),
    Scene("raw", [RAW_ONE], {"filled": "0.50"}),
    Scene("raw-bulk-1", [RAW_MANY]),
    Scene("raw-bulk-2", [RAW_MANY], {"status": "executed"}),
)

LEGEND = (
    "canceled-before  by somebody else, before we asked",
    "on-shard-2       asked for without saying where it rests",
    "answer-lost      the connection broke after the cancel took effect; what it removed is not proven",
    "lost-and-filled  the connection broke, and the order was filled instead of canceled",
    "behind-a-429     the first attempt was over the account's token budget",
)


def main() -> int:
    """Runs the demonstration; the exit code."""
    started_s = time.monotonic()
    interrupts = _Interrupts()
    code = 1
    try:
        with interrupts.caught(), tempfile.TemporaryDirectory(prefix="cancel-demo-") as folder:
            stack = Stack(Path(folder))
            try:
                code = _show(stack, interrupts)
            except NotReady as part:  # says itself what the part printed last
                print(f"\nThe demo could not start: {part}", file=sys.stderr)
            except (StoreError, ControlError, OSError, subprocess.SubprocessError) as error:
                print(f"\nThe demo could not finish: {error}", file=sys.stderr)
                _show_logs(stack.workers)
            finally:
                interrupts.hold()
                stack.stop()
    except KeyboardInterrupt:
        print("\nInterrupted; everything is stopped.", file=sys.stderr)
        return 130
    print(f"Everything is stopped. {time.monotonic() - started_s:.1f} s in all.")
    return code


def _show(stack: Stack, interrupts: _Interrupts) -> int:
    _start(stack, interrupts)
    _arrange(stack.control)
    with _step(f"Asking for {len(SCENES)} orders to be canceled, by the client and by raw Celery messages"):
        client = CancelClient(stack.redis.url, requested_by="demo")
        _ask(client)
        raw_values = _ask_as_a_stranger(stack)
    with _step("Waiting for the last outcome (an unknown order is believed after 2 s, reads lag writes)"):
        found = {
            str(result.order_id): result
            for result in client.results([scene.order_id for scene in SCENES], timeout=RESULTS_WITHIN_S)
        }
        client.close()
    print()
    for line in [*table(found), "", *LEGEND, ""]:
        print(line)
    differences = _differences(found, raw_values, stack.control)
    if differences:
        print("DIFFERENT from the exchange's own state:", *differences, sep="\n  ", file=sys.stderr)
        _show_logs(stack.workers)
        return 1
    print(f"All {len(SCENES)} outcomes are what the exchange's own state says.")
    return 0


def _start(stack: Stack, interrupts: _Interrupts) -> None:
    with _step("Starting a Redis server (embedded Valkey)"), interrupts.held():
        stack.redis.start()
    with _step("Starting the sandbox exchange"), interrupts.held():
        stack.start_exchange()
    with _step("Starting a Celery worker"):
        with interrupts.held():
            worker = stack.spawn_worker()
        worker.wait_ready(lambda: " ready." in worker.log_text(), "the worker")


def _arrange(control: Control) -> None:
    """Puts the orders where they rest, and arms what goes wrong with them."""
    for scene in SCENES:
        if scene.order is not None:
            control.place(scene.order_id, **scene.order)
        if scene.canceled_elsewhere:
            control.cancel_elsewhere(scene.order_id)
        if scene.fault:
            control.fault(scene.fault, order_id=scene.order_id, operation="cancel", times=1)


def _ask(client: CancelClient) -> None:
    """Asks for many at once, then for one after the other: what waits together is canceled together."""
    client.cancel_many(_asked(MANY)).results(timeout=RESULTS_WITHIN_S)
    unknown = {scene.order_id for scene in SCENES if scene.order is None}
    for order_id, times in Counter(_asked(ONE)).items():
        pending = [client.cancel(order_id) for _ in range(times)]
        if order_id not in unknown:
            pending[-1].result(timeout=RESULTS_WITHIN_S)


def _ask_as_a_stranger(stack: Stack) -> list[Json]:
    """Publishes the raw messages; the values that their own task ids got."""
    script = [sys.executable, "-I", "-c", STRANGER]
    done = subprocess.run(  # noqa: S603 - the text above
        [*script, stack.redis.url, " ".join(_asked(RAW_ONE)), " ".join(_asked(RAW_MANY))],
        cwd=stack.folder,
        env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        capture_output=True,
        text=True,
        timeout=2 * RESULTS_WITHIN_S,
        check=False,
    )
    if done.returncode:
        raise NotReady(f"the raw producer failed:\n{done.stderr[-2000:]}")
    values: list[Json] = json.loads(done.stdout)
    return values


def _asked(how: str) -> list[str]:
    return [scene.order_id for scene in SCENES for asked in scene.asked if asked == how]


# -- the table


_COLUMNS = ("order", "asked by", "outcome", "status", "reduced_by", "known by", "attempts", "ms")
_NUMBERS = ("reduced_by", "attempts", "ms")


def table(found: Mapping[str, CancelResult]) -> list[str]:
    """The lines of the table, one for each scene; ``found``: the results by order id."""
    rows = [_COLUMNS, *(_row(scene, found.get(scene.order_id)) for scene in SCENES)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(_COLUMNS))]
    lines = [
        "  ".join(
            text.rjust(width) if name in _NUMBERS else text.ljust(width)
            for name, text, width in zip(_COLUMNS, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _row(scene: Scene, result: CancelResult | None) -> tuple[str, ...]:
    if result is None:
        return (scene.order_id, scene.asked_by, "not settled", "-", "-", "-", "-", "-")
    value = result.to_json()
    return (
        scene.order_id,
        scene.asked_by,
        *(str(value[name] or "-") for name in ("outcome", "status", "reduced_by", "confirmed_by")),
        str(result.attempts),
        _milliseconds(result),
    )


def _milliseconds(result: CancelResult) -> str:
    """From the moment the cancel was accepted to the moment its outcome was known."""
    if result.requested_at is None or result.settled_at is None:
        return "-"
    took = datetime.fromisoformat(result.settled_at) - datetime.fromisoformat(result.requested_at)
    return f"{max(took.total_seconds(), 0) * 1000:.0f}"


# -- the comparison

_CANCELS = ("cancel", "batch")  # a worker's two ways to cancel, in the sandbox' words


def _differences(
    found: Mapping[str, CancelResult], raw_values: Sequence[Json], control: Control
) -> list[str]:
    differences = [
        f"{scene.order_id}: {difference}"
        for scene in SCENES
        for difference in differences_from_truth(
            found.get(scene.order_id),
            _truth(control, scene.order_id),
            _cancels_received(control, scene.order_id),
        )
    ]
    for value in raw_values:
        record = found.get(value["order_id"])
        if record is not None and CancelResult.from_json(value) != record:
            differences.append(f"{value['order_id']}: the raw message got another value: {value}")
    return differences


def _truth(control: Control, order_id: str) -> Json | None:
    try:
        return control.order(order_id)
    except ControlError:
        return None


def _cancels_received(control: Control, order_id: str) -> list[Json]:
    return [call for call in control.calls(order_id=order_id) if call["operation"] in _CANCELS]


def differences_from_truth(
    result: CancelResult | None, truth: Json | None, calls: Sequence[Json]
) -> list[str]:
    """What a result says that the exchange's own state does not.

    ``truth`` is ``Control.order``'s answer (None: there is no such order), ``calls`` the cancels received.
    A ``reduced_by`` that is not known is no difference where the cancel's own answer was lost.
    """
    if result is None:
        return ["no outcome in time"]
    outcome, status, reduced_by = _should_be(truth)
    said = {
        "outcome": (result.outcome.value, outcome),
        "status": (result.status and result.status.value, status),
        "reduced_by": (result.reduced_by, reduced_by),
    }
    if result.reduced_by is None and result.confirmed_by is ConfirmedBy.READ_BACK:
        del said["reduced_by"]
    if truth is not None and result.fill_count is not None:
        said["fill_count"] = (result.fill_count, Decimal(truth["fill_count_fp"]))
    differences = [
        f"{name} was reported as {reported}, the exchange's books say {true}"
        for name, (reported, true) in said.items()
        if reported != true
    ]
    if result.attempts < len(calls):
        differences.append(f"{result.attempts} attempts were reported, the exchange received {len(calls)}")
    return differences


def _should_be(truth: Json | None) -> tuple[str, str | None, Decimal | None]:
    """The only outcome, status and reduced_by that an order's true state allows."""
    if truth is None:
        return Outcome.UNKNOWN_ORDER.value, None, None
    if truth["status"] == "resting":
        return "nothing settled yet", "resting", None
    by_us = any(line["event"] == "canceled" and line.get("by") in _CANCELS for line in truth["history"])
    if truth["status"] == "canceled" and by_us:
        return Outcome.CANCELED.value, "canceled", Decimal(truth["canceled_count_fp"])
    return Outcome.TOO_LATE.value, truth["status"], Decimal(0)


# -- progress, and stopping in good order


@contextmanager
def _step(what: str) -> Iterator[None]:
    print(f"{what} ...", end="", flush=True)
    started_s = time.monotonic()
    try:
        yield
    except BaseException:
        print(flush=True)
        raise
    print(f" {time.monotonic() - started_s:.1f} s", flush=True)


def _show_logs(workers: Sequence[Part]) -> None:
    for worker in workers:
        lines = worker.log_text().splitlines()[-LOG_LINES_SHOWN:]
        print(f"\nThe end of {worker.log_path.name}:", *lines, sep="\n  ", file=sys.stderr)


class _Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP as KeyboardInterrupt, but never while a process is being started.

    A signal between a fork and the moment its process is known would leave that process behind.
    """

    def __init__(self) -> None:
        self._held = False
        self._waiting = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catches the signals for the body's time."""
        before = {number: signal.signal(number, self._take) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._waiting:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """Puts a signal off to the end of the body."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._waiting:
            raise KeyboardInterrupt

    def hold(self) -> None:
        """Puts signals off to the end of everything."""
        self._held = True

    def _take(self, _number: int, _frame: object) -> None:
        self._waiting = True
        if not self._held:
            raise KeyboardInterrupt


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


if __name__ == "__main__":
    raise SystemExit(main())
