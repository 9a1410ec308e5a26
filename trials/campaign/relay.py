"""The relay forwards connections to Redis until it is cut; then everything waits, as on a broken network."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from typing import Self

POLL_S = 0.1
CHUNK = 1 << 16


class Relay:
    """One loopback port in front of another. While it is cut nothing passes, and nothing is closed."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._listener.settimeout(POLL_S)
        self._passing = threading.Event()
        self._passing.set()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._accept, name="relay", daemon=True)]

    @property
    def port(self) -> int:
        """The port to connect to."""
        return int(self._listener.getsockname()[1])

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._passing.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def cut(self) -> None:
        """From now on nothing passes."""
        self._passing.clear()

    def mend(self) -> None:
        """What waited passes, and whatever comes."""
        self._passing.set()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                near, _ = self._listener.accept()
            except TimeoutError:
                continue
            thread = threading.Thread(target=self._forward, args=(near,), name="relayed", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _forward(self, near: socket.socket) -> None:
        """Carries bytes both ways until one side ends."""
        with near, contextlib.suppress(OSError), socket.create_connection(self._target) as far:
            near.settimeout(None)
            other = {near: far, far: near}
            while not self._ended.is_set():
                ready, _, _ = select.select([near, far], [], [], POLL_S)
                for side in ready:
                    self._passing.wait()
                    data = side.recv(CHUNK)
                    if not data:
                        return
                    other[side].sendall(data)
