"""One HTTP exchange over a warm keep-alive pool, within a total deadline and a bounded size.

`requests` sets the pool up (proxies, TLS, what the environment says). Calls go straight to it: what they do
not need of the layer above it (cookies, redirects, hooks) would take as long as a signature. What `requests`
does not offer is added at the connection (urllib3's own seam):

- a deadline for the whole reply, status line and headers included: a socket timeout only bounds the
  silence between two bytes, so a dripping reply would never end;
- the phase in which a call failed, which decides whether asking again is safe::

    TransportError
    ├── NotSent    not a byte of the request has left us: it cannot have taken effect
    └── NoReply    sent, and no complete reply came back: it may have taken effect

Nothing here asks again: retries have one owner, and it is not the transport.
"""

from __future__ import annotations

import http.client
import io
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse
from urllib3.util import Retry, Timeout, parse_url

from kalshi_cancel.exchange.calls import Call
from kalshi_cancel.exchange.protocol import Reply

_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "kalshi-cancel"}
_JSON = {"Content-Type": "application/json"}
_PLAIN = re.compile(r"(/[A-Za-z0-9_-]+)+")  # no URL library changes anything about such a path
_NONE = Retry.from_int(False, redirect=False)  # noqa: FBT003 - urllib3's word for it
# A call that has less time than this cannot be answered: it is not sent at all.
MIN_TIME_S = 0.01
INTERIM_MOST = 100  # responses before the one that counts; the call's deadline ends them as well
LINE_MOST_BYTES = 65_536


class TransportError(Exception):
    """A call that got no complete reply."""


class NotSent(TransportError):  # noqa: N818 - named after the phase, see the tree above
    """Nothing of the request has left us."""


class NoReply(TransportError):  # noqa: N818 - named after the phase, see the tree above
    """The request was sent, wholly or in part, and no complete reply came back."""


class UnusableEnvironment(ValueError):  # noqa: N818 - named after what it is
    """A variable of the environment that is to be trusted cannot be used."""


class Transport:
    """Sends calls to one exchange; shared by all threads of a process.

    Timeouts are seconds: ``connect_timeout_s`` to reach the exchange, ``read_timeout_s`` the longest
    silence. ``base_url`` is scheme and host. ``on_sent`` is called in a call's own thread once its request is
    on its way, and before a connection is made. ``trust_env``: what ``proxy_url`` and ``ca_bundle`` do not
    say, HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE do; raises
    UnusableEnvironment.
    """

    def __init__(
        self,
        base_url: str,
        *,
        connect_timeout_s: float,
        read_timeout_s: float,
        max_body_bytes: int,
        pool_size: int,
        proxy_url: str | None = None,
        trust_env: bool = False,
        ca_bundle: str | None = None,
        on_sent: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_sent = on_sent
        self._base_url = base_url
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._max_body_bytes = max_body_bytes
        with requests.Session() as session:
            # Off by default: a stray HTTP_PROXY must not see signed calls.
            session.trust_env = trust_env
            # Given here, and not to the session, it outranks a proxy of the environment.
            ours = {"http": proxy_url, "https": proxy_url} if proxy_url else {}
            settings = session.merge_environment_settings(base_url, ours, True, ca_bundle, None)  # noqa: FBT003 - stream
        verify = ca_bundle or settings["verify"]
        if isinstance(verify, str) and not Path(verify).exists():
            raise UnusableEnvironment("REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names no file or folder")
        self._adapter = _WatchedAdapter(pool_connections=1, pool_maxsize=pool_size, max_retries=0)
        anything = requests.Request("GET", base_url).prepare()
        try:
            pool = self._adapter.get_connection_with_tls_context(
                anything, verify, proxies=settings["proxies"]
            )
        except (requests.RequestException, HTTPError):  # (their words would show a password)
            raise UnusableEnvironment(
                "HTTP_PROXY, HTTPS_PROXY or ALL_PROXY is no http:// or https:// with a host and a port"
            ) from None
        assert isinstance(pool, HTTPConnectionPool)
        self._pool = pool
        # A proxy that is no tunnel is asked for whole addresses.
        self._asked_for = base_url if self._adapter.request_url(anything, settings["proxies"]) != "/" else ""

    def send(self, call: Call, headers: Mapping[str, str], *, time_left_s: float) -> Reply:
        """The complete reply to ``call``, within ``time_left_s``; raises NotSent or NoReply.

        ``headers`` hold the signature of ``call.path``; a path that would not go on the wire byte for
        byte as it was signed is NotSent.
        """
        if time_left_s < MIN_TIME_S:
            raise NotSent("no time left to send it")
        _call.sent = False
        _call.on_sent = self._on_sent
        _call.deadline = time.monotonic() + time_left_s
        try:
            is_plain = _PLAIN.fullmatch(call.target) is not None  # as nearly all are: a look would take long
            if not is_plain and parse_url(self._base_url + call.target).request_uri != call.target:
                raise NotSent("the path would be sent differently from how it was signed")
            response = self._pool.urlopen(
                call.method,
                self._asked_for + call.target,
                body=call.body or None,
                headers={**_HEADERS, **(_JSON if call.body else {}), **headers},
                timeout=Timeout(connect=min(self._connect_timeout_s, time_left_s), read=self._read_timeout_s),
                retries=_NONE,
                redirect=False,
                assert_same_host=False,
                preload_content=False,
                decode_content=False,
            )
            try:
                return self._read(response)
            finally:
                response.close()
                response.release_conn()
        except (HTTPError, http.client.HTTPException, OSError, ValueError) as error:
            kind = NoReply if _call.sent else NotSent
            raise kind(_reason(error)) from None  # the chain holds the request, and so the signature

    def _read(self, response: BaseHTTPResponse) -> Reply:
        # Not decoded: a compressed body was not asked for, and may be a bomb.
        body = response.read(self._max_body_bytes + 1, decode_content=False)
        if len(body) > self._max_body_bytes:
            raise NoReply(f"a body of more than {self._max_body_bytes} bytes")
        if response.length_remaining:  # urllib3 would tell the next reader
            raise NoReply("the body was cut short")
        return Reply(response.status, {name.lower(): value for name, value in response.headers.items()}, body)

    def close(self) -> None:
        """Closes every connection."""
        self._adapter.close()


def _reason(error: BaseException) -> str:
    """The innermost cause in a few words, without addresses of objects and without headers."""
    while True:
        inner = getattr(error, "reason", None) or next(
            (arg for arg in error.args if isinstance(arg, BaseException)), None
        )
        if not isinstance(inner, BaseException):
            break
        error = inner
    words = re.split(r"[>)]: ", str(error))[-1]  # urllib3 puts the connection object before its words
    return f"{type(error).__name__}: {words}"[:300] if words else type(error).__name__


class _CallOfThisThread(threading.local):
    deadline: float = math.inf  # time.monotonic() by which the whole reply must be here
    sent: bool = False
    on_sent: Callable[[], None] = staticmethod(lambda: None)


_call = _CallOfThisThread()


class _BoundedReader(io.RawIOBase):
    """The bytes of a reply, until the call's deadline."""

    def __init__(self, raw: Any, sock: socket.socket) -> None:
        self._raw = raw
        self._sock = sock
        self._silence_s = sock.gettimeout() or math.inf

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left_s = _call.deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the reply did not end in time")
        self._sock.settimeout(min(left_s, self._silence_s))
        got: int | None = self._raw.readinto(buffer)
        return got

    def close(self) -> None:
        super().close()
        self._raw.close()


class _BoundedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_BoundedReader(self.fp.detach(), sock))

    def _read_status(self) -> tuple[str, int, str]:
        """The status line of the answer itself, past interim ones (103 Early Hints, 102 Processing ...).

        http.client passes over 100 only. Any other would be taken for the answer, and the answer, which comes
        later on the same connection, for that to the next call.
        """
        for _ in range(INTERIM_MOST):
            version, status, reason = super()._read_status()  # type: ignore[misc]  # typeshed leaves it out
            if not _is_interim(status):
                return version, status, reason
            while self.fp.readline(LINE_MOST_BYTES + 1).strip():
                pass
        raise http.client.HTTPException(f"more than {INTERIM_MOST} interim responses")


def _is_interim(status: int) -> bool:
    # 101 Switching Protocols is final, and nothing that we ask for: what follows is no HTTP.
    if status == HTTPStatus.SWITCHING_PROTOCOLS:
        raise http.client.HTTPException("the exchange switches protocols")
    return HTTPStatus.CONTINUE <= status < HTTPStatus.OK


class _Watched:
    """Notes when the first byte of a request leaves; a proxy's CONNECT does not count."""

    response_class: Any = _BoundedResponse
    sock: socket.socket | None

    def connect(self) -> None:
        _call.on_sent()  # it may take long: nobody has to wait for it
        try:
            super().connect()  # type: ignore[misc]  # a mixin before urllib3's connections
        finally:
            _call.sent = False  # what a proxy was asked for a tunnel

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        _call.sent = True
        super().send(data)  # type: ignore[misc]  # see connect

    def getresponse(self) -> Any:
        _call.on_sent()
        return super().getresponse()  # type: ignore[misc]  # see connect


class _WatchedHTTPConnection(_Watched, HTTPConnection):
    pass


class _WatchedHTTPSConnection(_Watched, HTTPSConnection):
    pass


class _WatchedHTTPPool(HTTPConnectionPool):
    ConnectionCls = _WatchedHTTPConnection


class _WatchedHTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _WatchedHTTPSConnection


_POOLS = {"http": _WatchedHTTPPool, "https": _WatchedHTTPSPool}


class _WatchedAdapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        keep_alive = [
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        ]
        super().init_poolmanager(*args, socket_options=keep_alive, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = _POOLS
        return manager
