"""The channel takes messages off the queues, and loses none: each is in Redis until it is done.

Kombu's Redis transport pops a message, and then notes that it has it: whoever vanishes in between loses it.
Here one step does both (``lua/message_take.lua``). The note is a lease. A worker extends its leases while it
lives; when one is over, another worker puts the message back.

Kombu waits in that pop (BRPOP). Here Redis tells when a list has changed (CLIENT TRACKING), and then the next
message is taken. What kombu names after BRPOP keeps its name.
"""

from __future__ import annotations

import uuid
from contextlib import suppress
from queue import Empty
from time import monotonic
from typing import Any

import redis
from kombu.transport import TRANSPORT_ALIASES, virtual
from kombu.transport.redis import (
    Channel,
    MultiChannelPoller,
    QoS,
    SentinelChannel,
    SentinelTransport,
    Transport,
)
from kombu.utils.json import loads

from kalshi_cancel.store import scripts
from kalshi_cancel.store.keys import Keys
from worker.broker.guard import checked, noticed

LEASE_MS = 5_000
PUT_BACK_AT_ONCE = 100


class Taken:
    """The messages that workers have taken and not acknowledged; it raises what redis-py raises."""

    def __init__(self, server: redis.Redis, prefix: str) -> None:
        self._server = server
        self._keys = Keys(prefix)
        self._take = scripts.load(server, "gather", "message_take")
        self._renew = scripts.load(server, "gather", "message_renew")
        self._return = scripts.load(server, "gather", "message_return")

    def load(self) -> None:
        """Makes the command of :meth:`taking` known to the server."""
        self._server.script_load(self._take.script)

    def taking(self, tag: str, lists: list[str]) -> list[Any]:
        """The command that takes the next message: answers (list, message), or None."""
        return ["EVALSHA", self._take.sha, len(lists), *lists, *self._taking(tag)]

    def take(self, tag: str, lists: list[str]) -> Any:
        """The same, done."""
        return self._take(keys=lists, args=self._taking(tag))

    def _taking(self, tag: str) -> list[Any]:
        return scripts.asking(self._keys.prefix, tag=tag, lease_ms=LEASE_MS)

    def renew(self, tags: list[str]) -> None:
        """Extends the leases of these, and puts back what vanished workers had."""
        asked = {"lease_ms": LEASE_MS, "at_most": PUT_BACK_AT_ONCE}
        self._renew(args=scripts.asking(self._keys.prefix, zip(tags), **asked))

    def put_back(self, tag: str, *, first: bool) -> None:
        """Puts it back into its list, to be served first or last."""
        self._return(args=scripts.asking(self._keys.prefix, tag=tag, is_first=first))

    def done(self, tag: str) -> None:
        """Forgets it."""
        pipeline = self._server.pipeline(transaction=False)
        pipeline.hdel(self._keys.taken, tag)
        pipeline.zrem(self._keys.taken_until, tag)
        pipeline.execute()


class _Leases(QoS):
    """The messages that a channel has taken; the step that took each has noted it."""

    def append(self, message: Any, delivery_tag: str) -> None:
        virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        self.channel.taken.done(delivery_tag)
        virtual.QoS.ack(self, delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:  # noqa: FBT001, FBT002 - kombu's
        if requeue:
            self.channel.taken.put_back(delivery_tag, first=False)
        else:
            self.channel.taken.done(delivery_tag)
        virtual.QoS.ack(self, delivery_tag)

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002 - kombu's
        self.channel.taken.put_back(tag, first=not leftmost)

    def restore_visible(self, *_limits: Any, **_more: Any) -> None:
        self.channel.taken.renew(list(self._delivered))


class LosslessChannel(Channel):
    """A channel to one Redis; it hands on only envelopes that can be opened."""

    QoS = _Leases
    from_transport_options: Any = (*Channel.from_transport_options, "store_prefix")
    store_prefix: str
    # Kombu's: the connection while nothing is to be sent on it; when something last was.
    _in_poll: Any
    _brpop_sent_at: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._asked = False  # for the next message, and there is no answer yet
        self._tag = ""
        self._without_ack: set[str] = set()
        super().__init__(*args, **kwargs)
        self.taken = Taken(redis.Redis(connection_pool=self.pool), self.store_prefix)

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:  # noqa: FBT001 - kombu's
        """Kombu's; of some queues nobody acknowledges the messages."""
        if no_ack:
            self._without_ack.add(queue)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def look_again(self) -> None:
        """Has the lists looked at once more when that was long ago: this also finds a dead connection."""
        if self._in_poll and not self._asked and monotonic() - self._brpop_sent_at >= self.brpop_timeout:
            self._in_poll = None

    def read_idle(self) -> bool:
        """Reads what Redis tells while no message is wanted; whether that is so."""
        if self._in_poll:
            return False
        with suppress(Empty, *self.connection_errors):
            self._brpop_read()
        return True

    def _brpop_start(self, timeout: float | None = None) -> None:  # noqa: ARG002 - kombu's
        """Asks for the next message."""
        queues = self._queue_cycle.consume(len(self.active_queues))
        lists = [
            self.global_keyprefix + self._q_for_pri(queue, step)
            for step in self.priority_steps
            for queue in queues
        ]
        if lists:
            self._in_poll = self.client.connection
            self._brpop_sent_at = monotonic()
            self._tag = str(uuid.uuid4())
            self._in_poll.be_told()
            self._asked = True
            self._in_poll.send_command(*self.taken.taking(self._tag, lists))

    def _brpop_read(self, **_options: Any) -> bool:
        """Hands on the message that was asked for, or notices that there may be one; raises Empty without."""
        connection = self.client.connection
        try:
            taken = self._answer(connection)
        except self.connection_errors:
            connection.disconnect()
            raise
        if not taken:
            raise Empty
        self._in_poll = None
        self._hand_on(*taken)
        return True

    def _answer(self, connection: Any) -> Any:
        taken, again = None, False
        if self._asked:
            self._asked, again = False, True
            try:
                taken = connection.read_response()  # (what Redis told before is in it)
                again = False
            except redis.exceptions.NoScriptError:
                self.taken.load()
        while connection.can_read(timeout=0):
            connection.read_response(push_request=True)
            again = True
        if again:
            self._in_poll = None
        return taken

    def _hand_on(self, key: bytes, item: bytes) -> None:
        queue = key.decode("utf-8", "replace").removeprefix(self.global_keyprefix).split(self.sep)[0]
        tag = self._tag
        self._queue_cycle.rotate(queue)
        envelope = loads(checked(item, queue).decode())
        envelope["properties"]["delivery_tag"] = tag
        self.connection._deliver(envelope, queue)  # noqa: SLF001 - as the class above does
        if queue in self._without_ack:
            self.taken.done(tag)

    def _on_connection_disconnect(self, connection: Any) -> None:
        if self._in_poll is connection:
            self._asked = False
        super()._on_connection_disconnect(connection)

    def _connparams(self, asynchronous: bool = False) -> Any:  # noqa: FBT001, FBT002 - kombu's
        options = super()._connparams(asynchronous)
        options["connection_class"] = noticed(options["connection_class"])
        if asynchronous:  # the one that waits for messages
            options["protocol"] = 3  # Redis can tell something in it that nobody has asked for
            options["connection_class"] = _tracking(options["connection_class"])
        return options


def _tracking(connection_class: Any) -> Any:
    class Connection(connection_class):  # type: ignore[misc]  # whichever the URL asks for
        _is_told = False

        def be_told(self) -> None:
            """From now on, Redis tells what changes of what was read."""
            if not self._is_told:
                self.send_command("CLIENT", "TRACKING", "ON", "NOLOOP")
                self.read_response()
                self._is_told = True

        def disconnect(self, *args: Any, **kwargs: Any) -> None:
            self._is_told = False
            super().disconnect(*args, **kwargs)

    return Connection


class _Poller(MultiChannelPoller):
    """Kombu's, for channels that Redis may tell something at any time."""

    def on_poll_start(self) -> None:
        for channel in self._channels:
            channel.look_again()
        super().on_poll_start()

    def on_readable(self, fileno: int) -> Any:
        channel, kind = self._fd_to_chan.get(fileno, (None, None))
        if kind == "BRPOP" and channel.read_idle():
            return None
        return super().on_readable(fileno)


class LosslessSentinelChannel(LosslessChannel, SentinelChannel):
    """A channel to whatever Redis the Sentinels name."""

    from_transport_options: Any = (*SentinelChannel.from_transport_options, "store_prefix")


class LosslessTransport(Transport):
    """The Redis transport of this project's workers."""

    Channel = LosslessChannel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle: Any = _Poller()


class LosslessSentinelTransport(SentinelTransport):
    """The same by way of Sentinels."""

    Channel = LosslessSentinelChannel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle: Any = _Poller()


def use_lossless_transport() -> None:
    """Has this process' connections to brokers go through the lossless transports."""
    for alias in ("redis", "rediss", "redis+socket"):
        if alias in TRANSPORT_ALIASES:
            TRANSPORT_ALIASES[alias] = f"{__name__}:{LosslessTransport.__name__}"
    TRANSPORT_ALIASES["sentinel"] = f"{__name__}:{LosslessSentinelTransport.__name__}"
