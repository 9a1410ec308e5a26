"""The HTTP server through which a worker is watched: /metrics, /healthz and /ready."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, TypeAlias

SILENCE_MOST_S = 5.0  # of a client: then its connection, and the thread that serves it, go

# Of an Accept header: status, content type, body.
Page: TypeAlias = Callable[[str], tuple[HTTPStatus, str, bytes]]


class Monitor:
    """Listens from its making on, and answers with its ``pages`` while it serves."""

    def __init__(self, host: str, port: int) -> None:
        """Raises OSError when the port is taken or the address is not this host's."""
        self._server = _Server((host, port), _Handler)

    @property
    def pages(self) -> dict[str, Page]:
        """What it answers with, by path."""
        return self._server.pages

    @pages.setter
    def pages(self, pages: dict[str, Page]) -> None:
        self._server.pages = pages

    def serve(self) -> None:
        """Answers, for the rest of the process."""
        self._server.serve_forever()

    def close(self) -> None:
        """Lets go of the port; in a child that inherited it, without touching the parent's."""
        self._server.socket.close()


def json_page(value: dict[str, Any], *, ok: bool) -> tuple[HTTPStatus, str, bytes]:
    """An answer that says 200 or 503, with a JSON object."""
    status = HTTPStatus.OK if ok else HTTPStatus.SERVICE_UNAVAILABLE
    return status, "application/json", json.dumps(value).encode() + b"\n"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    pages: dict[str, Page]

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.pages = {}
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Binds only: http.server's own looks the host's name up too, which may take seconds."""
        TCPServer.server_bind(self)

    def handle_error(self, *_args: object) -> None:
        """Nothing: a client that goes away is no event."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = SILENCE_MOST_S
    server_version = "kalshi-cancel"
    sys_version = ""

    def do_GET(self) -> None:
        """Answers with the page of the path."""
        page = self.server.pages.get(self.path.partition("?")[0])
        if page is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        status, content_type, body = page(self.headers.get("Accept", ""))
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - http.server's names

    def log_message(self, *_args: object) -> None:
        """Nothing: a scrape every few seconds is no event."""
