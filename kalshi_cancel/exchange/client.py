"""The exchange, as something one can ask to cancel an order, to show it, and for a few facts.

Hides signing, the clocks' difference, the dialects and the transport. Every method returns what the
exchange said, or a :class:`~.protocol.Failure`; nothing is asked twice and nothing is raised: what
a failure means for an order is decided by the resolution, when to ask again by the dispatcher.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kalshi_cancel.exchange.calls import (
    ACCOUNT_LIMITS,
    EXCHANGE_STATUS,
    Call,
    Dialect,
    Routing,
    compose_archive,
    compose_batch,
    compose_cancel,
    compose_list,
    compose_read,
)
from kalshi_cancel.exchange.clock import AnswerTimes, BoundedClock, Span
from kalshi_cancel.exchange.protocol import (
    GATEWAY_CODE,
    CancelAnswer,
    Canceled,
    Failure,
    Meaning,
    Page,
    ReadAnswer,
    Reply,
    decipher_batch,
    decipher_cancel,
    decipher_command,
    decipher_list,
    decipher_object,
    decipher_read,
    server_time_s,
)
from kalshi_cancel.exchange.signing import RequestSigner, load_private_key
from kalshi_cancel.exchange.transport import NotSent, Transport, TransportError, UnusableEnvironment
from kalshi_cancel.model.results import Problem
from kalshi_cancel.settings.reader import SettingsError
from kalshi_cancel.settings.worker import WorkerSettings
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import Seldom, say

log = logging.getLogger(__name__)

# The exchange accepts +-10 s; a difference this large is worth an operator's look long before.
SKEW_WORTH_A_WARNING_MS = 2_000
SKEW_TO_CORRECT_MS = 5_000  # long before it is refused
TIMESTAMP_AHEAD_MOST_MS = 2_000
# The exchange's two clocks may disagree. By more than this they do not: it would refuse its own timestamps.
ENGINE_OFF_FRONT_MS = 15_000


def signer_from(settings: WorkerSettings) -> RequestSigner:
    """The account's key as the settings have it; raises KeyProblem."""
    key = load_private_key(settings.private_key, passphrase=settings.private_key_passphrase)
    return RequestSigner(settings.api_key_id, key)


class Exchange:
    """One account at one exchange; shared by all threads of a process."""

    def __init__(
        self,
        transport: Transport,
        signer: RequestSigner,
        *,
        dialect: Dialect = Dialect.V2,
        call_deadline_s: float = 5.0,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._signer = signer
        self._call_deadline_s = call_deadline_s
        self._clock = clock
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self.dialect = dialect
        self._front = BoundedClock()
        self._engine = BoundedClock()
        self._cancel_times = AnswerTimes()
        self._follows_front = False  # our own clock is not good enough to sign with
        self._last_timestamp_ms = 0
        self._warned_skew_ms = 0
        self._gateway_told = Seldom()
        self._refusals_told: set[str] = set()

    @classmethod
    def from_settings(
        cls, settings: WorkerSettings, *, on_sent: Callable[[], None] = lambda: None
    ) -> Exchange:
        """The exchange that the environment describes.

        Raises KeyProblem for a key that cannot sign, and SettingsError for what ``trust_env`` brings in and
        cannot be used. ``on_sent`` is called in a call's own thread once its request is on its way.
        """
        try:
            transport = Transport(
                settings.base_url,
                connect_timeout_s=settings.connect_timeout_s,
                read_timeout_s=settings.read_timeout_s,
                max_body_bytes=settings.max_body_bytes,
                pool_size=settings.pool_size,
                proxy_url=settings.http_proxy,
                trust_env=settings.trust_env,
                ca_bundle=settings.ca_bundle,
                on_sent=on_sent,
            )
        except UnusableEnvironment as problem:
            raise SettingsError((f"{problem}, and KALSHI_TRUST_ENV trusts it",)) from None
        return cls(
            transport,
            signer_from(settings),
            dialect=Dialect(settings.orders_api),
            call_deadline_s=settings.call_deadline_s,
        )

    def cancel(self, order_id: str, routing: Routing, *, time_left_s: float) -> CancelAnswer:
        """What the exchange says to one cancel of one order."""
        dialect, sent_s = self.dialect, self._monotonic()
        reply = self._ask(compose_cancel(dialect, order_id, routing), time_left_s)
        answer = reply if isinstance(reply, Failure) else decipher_cancel(order_id, reply)
        self._learn_engine([answer], sent_s)
        if isinstance(answer, Failure):
            self._notice(answer, dialect)
        return answer

    def cancel_batch(
        self, orders: Sequence[tuple[str, Routing]], *, time_left_s: float
    ) -> dict[str, CancelAnswer] | Failure:
        """What the exchange says to one cancel of several orders, each; or a failure of the whole call."""
        dialect, sent_s = self.dialect, self._monotonic()
        reply = self._ask(compose_batch(dialect, orders), time_left_s)
        if isinstance(reply, Failure):
            return reply
        answers = decipher_batch([order_id for order_id, _ in orders], reply)
        if isinstance(answers, Failure):
            self._notice(answers, dialect)
        else:
            self._learn_engine(answers.values(), sent_s)
        return answers

    def read_order(self, order_id: str, *, time_left_s: float) -> ReadAnswer:
        """The order as the exchange shows it now; reads lag writes."""
        reply = self._ask(compose_read(order_id), time_left_s)
        answer = reply if isinstance(reply, Failure) else decipher_read(order_id, reply)
        if isinstance(answer, Failure):
            self._notice(answer, Dialect.V2)
        return answer

    def list_orders(self, query: Mapping[str, str | int], cursor: str) -> Page | Failure:
        """One page of the orders that the query lets through, resting ones unless it names a status."""
        reply = self._ask(compose_list(query, cursor), self._call_deadline_s)
        page = reply if isinstance(reply, Failure) else decipher_list(reply)
        if isinstance(page, Failure):
            self._notice(page, Dialect.V2)
        return page

    def list_archive(self, query: Mapping[str, str | int], cursor: str) -> Page | Failure:
        """One page of the archive, to which the exchange moves orders some time after their end."""
        reply = self._ask(compose_archive(query, cursor), self._call_deadline_s)
        page = reply if isinstance(reply, Failure) else decipher_list(reply)
        if isinstance(page, Failure):
            self._notice(page, Dialect.V2)
        return page

    def command(self, call: Call) -> Failure | None:
        """Has the exchange carry out a mass command of its own; None: it has."""
        reply = self._ask(call, self._call_deadline_s)
        failure = reply if isinstance(reply, Failure) else decipher_command(reply)
        if failure is not None:
            self._notice(failure, Dialect.V2)
        return failure

    def fetch(self, call: Call) -> Mapping[str, Any] | Failure:
        """The JSON object that answers ``call``: exchange status, the account's limits, endpoint costs."""
        reply = self._ask(call, self._call_deadline_s)
        return reply if isinstance(reply, Failure) else decipher_object(reply)

    def warm_up(self) -> Mapping[str, Any] | Failure:
        """Opens a connection and measures the clocks' difference before the first cancel needs either."""
        return self.fetch(ACCOUNT_LIMITS)

    def status(self) -> Mapping[str, Any] | Failure:
        """Whether the exchange takes orders and cancels, as it says itself."""
        return self.fetch(EXCHANGE_STATUS)

    def look(self) -> Mapping[str, Any] | Failure:
        """The status; where that page gives no usable answer, a signed read: is the exchange there?"""
        shown = self.status()
        return self.warm_up() if isinstance(shown, Failure) and shown.no_usable_answer else shown

    def sign_with(self, signer: RequestSigner) -> Failure | None:
        """Signs with another key from the next call on, if a read that it signs is answered; else why not.

        What is under way ends with the key that it began with.
        """
        reply = self._ask(ACCOUNT_LIMITS, self._call_deadline_s, signer)
        answer = reply if isinstance(reply, Failure) else decipher_object(reply)
        if isinstance(answer, Failure):
            return answer
        with self._lock:
            self._signer = signer
            self._refusals_told.clear()
        return None

    @property
    def skew_ms(self) -> int | None:
        """The front's clock minus ours: within half a second at first, milliseconds later; or None."""
        front = self._front.at(self._monotonic())
        return None if front is None else round(front.middle_ms - self._clock() * 1000)

    @property
    def signs_with(self) -> tuple[str, str]:
        """The key's id and its algorithm."""
        return self._signer.key_id, self._signer.algorithm

    def now_ms(self) -> int:
        """This moment on the front's clock, as well as it is known (``skew_ms`` None: on ours)."""
        return round(self._clock() * 1000) + (self.skew_ms or 0)

    def engine_now(self) -> Span | None:
        """This moment on the clock that stamps orders; None while nothing sure is known of it.

        Until a cancel of ours was answered, the front's clock tells it roughly.
        """
        now_s = self._monotonic()
        front = self._front.surely_at(now_s)
        roughly = None if front is None else front.moved(0.0, unsure_ms=ENGINE_OFF_FRONT_MS)
        return self._engine.surely_at(now_s) or roughly

    @property
    def effect_within_s(self) -> float:
        """Within this a cancel usually takes effect, as the last ones tell; perhaps infinite."""
        return self._cancel_times.usual_s

    def close(self) -> None:
        """Closes the connections."""
        self._transport.close()

    def _ask(self, call: Call, time_left_s: float, signer: RequestSigner | None = None) -> Reply | Failure:
        """One signed HTTP exchange; timestamp and signature are made afresh for each."""
        sent_s = self._monotonic()
        timestamp_ms = self._next_timestamp_ms()
        headers = (signer or self._signer).headers(call.method, call.path, timestamp_ms=timestamp_ms)
        try:
            reply = self._transport.send(call, headers, time_left_s=min(time_left_s, self._call_deadline_s))
        except TransportError as error:
            meaning = Meaning.NOT_SENT if isinstance(error, NotSent) else Meaning.UNANSWERED
            return Failure(meaning, Problem(meaning.name.lower(), str(error)))
        self._learn_front(call, reply, sent_s)
        if "retry-after" in reply.headers and (front := self._front.at(self._monotonic())) is not None:
            reply = replace(reply, clock_s=front.low_ms / 1000)
        return reply

    def _next_timestamp_ms(self) -> int:
        """This moment as the exchange will accept it; no two calls in a row share one."""
        now_ms = round(self._clock() * 1000)
        if self._follows_front and (front := self._front.at(self._monotonic())) is not None:
            now_ms = round(front.middle_ms)
        with self._lock:
            # In a flood the timestamps run ahead; far from the +-10 s that would matter they are reused.
            ahead = self._last_timestamp_ms + 1 - now_ms
            self._last_timestamp_ms = now_ms + ahead if 0 < ahead < TIMESTAMP_AHEAD_MOST_MS else now_ms
            return self._last_timestamp_ms

    def _notice(self, failure: Failure, dialect: Dialect) -> None:
        if failure.meaning is Meaning.RETIRED and dialect is Dialect.V1:
            self._move_to_v2()
        if failure.problem.code == GATEWAY_CODE:
            say(log, LogEvent.GATEWAY_ANSWERED, seldom=self._gateway_told, why=failure.problem.message)
        if failure.meaning in (Meaning.REFUSED, Meaning.KEY_REFUSED):
            self._log_refusal(failure.problem)

    def _learn_front(self, call: Call, reply: Reply, sent_s: float) -> None:
        """Learns the front's clock from a `Date`, and whether to sign by it instead of by ours."""
        server_s = server_time_s(call, reply)
        if server_s is None:
            return
        expired = reply.status == 401 and b"header_timestamp_expired" in reply.body[:1000]  # noqa: PLR2004 - HTTP's Unauthorized
        shown = Span(server_s * 1000, server_s * 1000 + 1000)
        if not self._front.learn(shown, sent_s=sent_s, received_s=self._monotonic(), is_sure=expired):
            self._engine.forget()  # whoever sets one clock may have set the other
        skew_ms = self.skew_ms or 0
        if not self._follows_front and (expired or abs(skew_ms) >= SKEW_TO_CORRECT_MS):
            self._follows_front, self._warned_skew_ms = True, skew_ms
            say(log, LogEvent.CLOCK_CORRECTED, skew_ms=round(skew_ms))
        elif abs(skew_ms - self._warned_skew_ms) >= SKEW_WORTH_A_WARNING_MS:
            self._warned_skew_ms = skew_ms
            say(log, LogEvent.CLOCK_OFF, skew_ms=round(skew_ms))

    def _learn_engine(self, answers: Iterable[CancelAnswer], sent_s: float) -> None:
        """Learns the engine's clock from the moments at which it canceled what we have just asked for."""
        received_s = self._monotonic()
        stamped = [each for each in answers if isinstance(each, Canceled) and each.ts_ms is not None]
        if stamped:
            first = min(each.ts_ms or 0 for each in stamped)
            last = max(each.ts_ms or 0 for each in stamped)
            # All lie between sending and answer: the first bounds the clock from above, the last from below.
            within_ms = max(each.ts_within_ms for each in stamped)
            self._engine.learn(Span(last, first + within_ms), sent_s=sent_s, received_s=received_s)
            self._cancel_times.learn(received_s - sent_s)

    def _move_to_v2(self) -> None:
        with self._lock:
            if self.dialect is Dialect.V2:
                return
            self.dialect = Dialect.V2
        say(log, LogEvent.V1_RETIRED)

    def _log_refusal(self, problem: Problem) -> None:
        """Says a permanent refusal of key or scope once, loudly; the orders' own results tell it each."""
        if problem.http_status not in (401, 403):
            return
        words = f"{problem.http_status} {problem.code}: {problem.message}"
        with self._lock:
            if words in self._refusals_told or len(self._refusals_told) >= 100:  # noqa: PLR2004 - bounded memory
                return
            self._refusals_told.add(words)
        say(
            log,
            LogEvent.KEY_REFUSED,
            status=problem.http_status,
            code=problem.code,
            why=problem.message,
            key_id=self._signer.key_id,
        )
