"""A way to Redis that breaks at a certain word."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Cutter:
    """Forwards connections to a server, and closes one once its client has sent a certain word.

    ``after``: the server still gets that, and its answer is lost.
    """

    def __init__(self, port, word, *, after):
        self._target, self._word, self._after = ("127.0.0.1", port), word, after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._listener.close()

    def _accept(self):
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._forward, args=(near,), daemon=True).start()

    def _forward(self, near):
        with suppress(OSError), near, socket.create_connection(self._target) as far:
            while data := near.recv(1 << 16):
                if self._word in data and not self._after:
                    return
                far.sendall(data)
                answer = far.recv(1 << 16)
                if self._word in data:
                    return
                near.sendall(answer)
