"""Faults that play around a mass cancel: runners that vanish and come back, placers, listings that fail."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from trials.campaign.scene import Scene

Play = Callable[[Scene], None]

NEW_ORDERS = 5
PLACED_PER_S = 50.0
PLACER_DEADLINE_S = 4.0
_FAILING: list[tuple[str, dict[str, Any]]] = [
    ("http_503", {}),
    ("cdn", {"status": 503}),
    ("drop_before", {}),
    ("odd_page", {"fields": {"orders": 7}}),
]
# When a runner that was gone comes back: until whatever it would do is done.
AFTERMATH_S = 3.0


def runner_frozen(scene: Scene) -> None:
    """The runner sleeps while another worker finishes and new orders come; then it wakes up."""
    *others, runner = scene.crew.workers
    _begin_with_one_runner(scene)
    scene.upsets.append(time.time())
    runner.signal(signal.SIGSTOP)
    for other in others:
        other.signal(signal.SIGCONT)
    scene.mark()
    _finish_and_place_anew(scene)
    scene.upsets.append(time.time())
    runner.signal(signal.SIGCONT)
    scene.pause(AFTERMATH_S, AFTERMATH_S + 1)


def runner_cut_off(scene: Scene) -> None:
    """The same with a runner that runs on, and hears nothing from Redis."""
    *others, _ = scene.crew.workers
    assert scene.relay is not None
    _begin_with_one_runner(scene)
    scene.upsets.append(time.time())
    scene.relay.cut()
    for other in others:
        other.signal(signal.SIGCONT)
    scene.mark()
    _finish_and_place_anew(scene)
    scene.upsets.append(time.time())
    scene.relay.mend()
    scene.pause(AFTERMATH_S, AFTERMATH_S + 1)


def _begin_with_one_runner(scene: Scene) -> None:
    """A mass cancel that the last worker runs, whose first cancels have been sent."""
    scene.until(scene.chance.uniform(0.1, 0.6))
    # Listings take their time: it is not over before the runner is gone.
    scene.fault("slow", operation="list", seconds=0.5)
    scene.place_mass(max(10, scene.cancels // 5))
    for other in scene.crew.workers[:-1]:
        scene.upsets.append(time.time())
        other.signal(signal.SIGSTOP)
    scene.sweep()
    scene.until_swept()
    scene.pause(0.0, 0.3)


def _finish_and_place_anew(scene: Scene) -> None:
    [sweep] = scene.sweeps
    scene.await_report(sweep)
    scene.place_mass(NEW_ORDERS)
    scene.control.clear_faults()


def placer_without_end(scene: Scene) -> None:
    """Somebody places orders in the scope until after the deadline."""
    ended = threading.Event()

    def place() -> None:
        while not ended.wait(1 / PLACED_PER_S):
            scene.place_mass(1)

    scene.until(scene.chance.uniform(0.1, 0.6))
    scene.place_mass(max(10, scene.cancels // 5))
    placer = threading.Thread(target=place, name="placer")
    placer.start()
    try:
        sweep = scene.sweep(deadline_s=PLACER_DEADLINE_S)
        scene.await_report(sweep)
        scene.pause(0.5, 1.0)
    finally:
        ended.set()
        placer.join()
    scene.mark()


def failing_list(scene: Scene) -> None:
    """Listings fail for some seconds; all that is in the scope must be gone when it is called flat."""
    scene.until(scene.chance.uniform(0.1, 0.6))
    kind, fields = scene.chance.choice(_FAILING)
    scene.fault(kind, operation="list", for_s=scene.chance.uniform(1.0, 4.0), **fields)
    scene.place_mass(max(10, scene.cancels // 5))
    scene.await_report(scene.sweep())
    scene.mark()
