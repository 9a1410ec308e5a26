"""How a worker is watched: its heartbeat, what it counts, and the port that both are read from."""

from __future__ import annotations

import shutil
import tempfile
from http import HTTPStatus

from kalshi_cancel.heartbeat import Heartbeat, is_young
from kalshi_cancel.settings.worker import WorkerSettings
from worker.dispatch.services import Service, Services
from worker.telemetry.metrics import Metrics
from worker.telemetry.monitor import Monitor, json_page
from worker.telemetry.readiness import OK, Readiness


class CannotBeWatchedError(Exception):
    """Why a worker cannot be watched as its settings want it."""


class Watch:
    """Opened once, at the worker's start, and inherited by the processes of its pool.

    ``metrics`` is None where there is no port to read them from.
    """

    def __init__(self) -> None:
        self.heartbeat = Heartbeat(None)
        self.metrics: Metrics | None = None
        self._monitor: Monitor | None = None
        self._folder: str | None = None  # where the processes of a pool count

    def open(self, settings: WorkerSettings, *, forks: bool) -> None:
        """Opens what the settings name; raises CannotBeWatchedError."""
        self.heartbeat = Heartbeat(settings.heartbeat_file)
        try:
            self.heartbeat.start()
        except OSError as problem:
            raise CannotBeWatchedError(f"KALSHI_HEARTBEAT_FILE cannot be touched: {problem}") from None
        if not settings.metrics_port:
            return
        try:
            self._monitor = Monitor(settings.metrics_host, settings.metrics_port)
        except OSError as problem:
            address = f"{settings.metrics_host}:{settings.metrics_port}"
            raise CannotBeWatchedError(
                f"KALSHI_METRICS_PORT cannot be opened at {address}: {problem.strerror}"
            ) from None
        if forks:
            try:
                self._folder = tempfile.mkdtemp(prefix="kalshi-cancel-metrics-")
            except OSError as problem:
                raise CannotBeWatchedError(
                    "KALSHI_METRICS_PORT with -P processes needs a folder for temporary files that can be"
                    f" written to: set TMPDIR ({problem.strerror})"
                ) from None
        self.metrics = Metrics(self._folder)

    def leave_the_port(self) -> None:
        """For a process of the pool: the port is its parent's."""
        if self._monitor is not None:
            self._monitor.close()

    def serve(self, readiness: Readiness, services: Services) -> None:
        """Answers at the port, if there is one, for the rest of the process."""
        metrics = self.metrics
        if metrics is None or self._monitor is None:
            return

        def show_metrics(accept: str) -> tuple[HTTPStatus, str, bytes]:
            return HTTPStatus.OK, *metrics.exposition(accept)

        def show_life(_accept: str) -> tuple[HTTPStatus, str, bytes]:
            age_s = self.heartbeat.age_s
            return json_page({"heartbeat_age_s": round(age_s, 3)}, ok=is_young(age_s))

        def show_readiness(_accept: str) -> tuple[HTTPStatus, str, bytes]:
            found = readiness.look()
            return json_page(found, ok=all(each == OK for each in found.values()))

        self._monitor.pages = {"/metrics": show_metrics, "/healthz": show_life, "/ready": show_readiness}
        services.start(Service("monitor", self._monitor.serve, hangs_after_s=None))

    def close(self) -> None:
        """Lets go of what the worker has put down."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


watch = Watch()  # this worker's
