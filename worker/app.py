"""The Celery application: ``celery -A worker.app worker``."""

import sys
from importlib.util import find_spec
from typing import Any

from celery import Celery
from celery.app.control import Control

import worker.runtime.lifecycle  # noqa: F401 - it takes part in a worker's life through Celery's signals
from worker.runtime.consumer import Beat


class NoRemoteControl(Control):  # type: ignore[misc]  # Celery ships no types
    """Calls nobody: no worker of ours listens, and who only looks (Flower) may not publish anything."""

    def broadcast(self, *_args: Any, **_options: Any) -> list[Any]:
        """No answers."""
        return []


if find_spec("celeryconfig") is None:
    sys.exit("cannot start: no celeryconfig.py in this folder; run Celery where that file is")
app = Celery("worker", control=NoRemoteControl)
app.config_from_object("celeryconfig")
app.steps["consumer"].add(Beat)
