"""What is wrong with Redis, in one line, and what may have been accepted: with real servers and sockets."""

from __future__ import annotations

import re
import socket
import threading
import uuid
from contextlib import ExitStack, closing, contextmanager, suppress

import pytest
import redis
from cutter import Cutter
from kombu import Connection
from kombu.exceptions import OperationalError
from redis.backoff import NoBackoff
from redis.retry import Retry

from kalshi_cancel.client import CancelClient
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store import scripts
from kalshi_cancel.store.redis_errors import can_pass, words
from kalshi_cancel.store.scripts import StoreError
from trials.stack import Part, RedisServer, free_port, valkey_server, wait_until

PATIENCE_S = 20.0
LINE_MOST = 250


@contextmanager
def door(answer=b"", *, accepts=True, full=False):
    """A port where nobody speaks as Redis does: it answers anything with the same bytes, or never."""
    with socket.socket() as listener, ExitStack() as waiting:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0 if full else 50)
        for _ in range(3 if full else 0):  # who connects now, waits
            guest = waiting.enter_context(socket.socket())
            guest.settimeout(0)
            with suppress(BlockingIOError):
                guest.connect(listener.getsockname())

        def serve():
            with suppress(OSError):
                while True:
                    near, _ = listener.accept()
                    near.recv(1000)
                    near.sendall(answer)
                    near.close()

        if accepts and not full:
            threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A Redis with a password."""
    server = RedisServer(tmp_path_factory.mktemp("guarded"), options=["--requirepass", "pw"]).start()
    yield server
    server.stop()


def refusal(url, *, ask=lambda client: client.cancel(str(uuid.uuid4()))):
    with closing(CancelClient(url)) as client, pytest.raises(StoreError) as told:
        ask(client)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < LINE_MOST
    assert "object at" not in str(told.value)
    assert "<redis" not in str(told.value)
    return told.value


@contextmanager
def nowhere(*_):
    yield "redis://no-such-host.invalid:6379/0"


@contextmanager
def no_password(guarded):
    yield guarded.url


@contextmanager
def wrong_password(guarded):
    yield guarded.url.replace("//", "//:wrong@")


@contextmanager
def unknown_user(guarded):
    yield guarded.url.replace("//", "//nobody:pw@")


@contextmanager
def nothing_listens(*_):
    yield f"redis://127.0.0.1:{free_port()}/0"


@contextmanager
def no_socket(*_):
    yield "unix:///no/such/redis.sock"


@contextmanager
def connects_never(*_):
    with door(full=True) as port:
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def greets_never(*_):
    with door(accepts=False) as port:
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def hangs_up(*_):
    with door() as port:
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def speaks_http(*_):
    with door(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def no_tls(guarded):
    yield f"rediss://127.0.0.1:{guarded.port}/0"


@contextmanager
def no_database(guarded):
    yield guarded.url.replace("//", "//:pw@").removesuffix("/0") + "/99"


@contextmanager
def too_many_clients(guarded):
    with redis.Redis(port=guarded.port, password="pw") as holder:
        before = holder.config_get("maxclients")["maxclients"]
        holder.config_set("maxclients", 1)
        try:
            yield guarded.url.replace("//", "//:pw@")
        finally:
            holder.config_set("maxclients", before)


@contextmanager
def no_sentinel(*_):
    yield f"sentinel://127.0.0.1:{free_port()},127.0.0.1:{free_port()}/cancels/0"


@contextmanager
def no_sentinel_but_a_redis(guarded):
    port = f"127.0.0.1:{guarded.port}"
    yield f"sentinel://{port}/cancels/0?sentinel_password=pw"


@contextmanager
def a_sentinel_with_a_password(guarded):
    yield f"sentinel://127.0.0.1:{guarded.port}/cancels/0"


BEFORE_ANYTHING_IS_SENT = {
    no_password: "^Redis wants a password$",
    wrong_password: "^Redis refuses this user or password$",
    unknown_user: "^Redis refuses this user or password$",
    nowhere: "^Redis cannot be found at no-such-host.invalid:6379: ",
    nothing_listens: r"^Redis cannot be reached at 127.0.0.1:\d+: Connection refused$",
    no_socket: "^Redis cannot be reached at /no/such/redis.sock: No such file",
    connects_never: "^Redis cannot be reached in time$",
    greets_never: "^Redis does not answer in time$",
    hangs_up: "(?i)connection closed|closed the connection",
    speaks_http: "^what answers there is no Redis$",
    no_tls: "TLS",
    no_database: "^Redis refuses: DB index is out of range$",
    too_many_clients: "^Redis takes no more clients",
    no_sentinel: "^not all Sentinels answer, and none has a primary 'cancels' that is up$",
    no_sentinel_but_a_redis: "^what answers there is no Sentinel$",
    a_sentinel_with_a_password: "^a Sentinel refuses this user or password",
}


@pytest.mark.parametrize("what", BEFORE_ANYTHING_IS_SENT, ids=lambda what: what.__name__)
def test_before_the_script_is_sent_nothing_can_be_accepted_and_one_line_says_what_is_wrong(what, guarded):
    with what(guarded) as url:
        error = refusal(url)
        mass = refusal(url, ask=lambda client: client.mass_cancel({"everything": True}))
    assert re.search(BEFORE_ANYTHING_IS_SENT[what], str(error)), str(error)
    assert str(error).split("127.0.0.1")[0] == str(mass).split("127.0.0.1")[0]
    assert (error.may_be_accepted, mass.may_be_accepted) == (False, False)


def test_a_redis_that_loads_its_data_has_accepted_nothing(tmp_path):
    server = RedisServer(tmp_path).start()
    with server.client() as client:
        client.mset({f"key-{number}": "x" * 1000 for number in range(2000)})
        client.save()
    server.kill()
    command = [valkey_server(), "--port", str(server.port), "--bind", "127.0.0.1", "--dir", str(tmp_path)]
    command += ["--appendonly", "no", "--loading-process-events-interval-bytes", "1024"]
    command += ["--key-load-delay", "10000"]  # microseconds, of each
    loading = Part(command, log_path=tmp_path / "loading.log")

    def loads():
        try:
            with redis.Redis(port=server.port, retry=Retry(NoBackoff(), 0)) as client:
                client.ping()
        except redis.BusyLoadingError:
            return True
        except redis.ConnectionError:
            return False

    try:
        wait_until(loads, within_s=PATIENCE_S, what="it loads")
        error = refusal(server.url)
    finally:
        loading.kill()
    assert (str(error), error.may_be_accepted, error.can_pass) == ("Redis is loading its data", False, True)


@pytest.mark.parametrize(
    ("word", "after", "accepted"),
    [(b"HELLO", False, False), (b"HELLO", True, False), (b"EVALSHA", False, False), (b"EVALSHA", True, True)],
    ids=["greeting lost", "greeting unanswered", "script lost", "script unanswered"],
)
def test_a_connection_that_ends_once_the_script_is_on_its_way_leaves_it_open_and_no_other_does(
    own_redis, order_id, word, after, accepted
):
    with closing(CancelClient(own_redis.url)) as direct:
        direct.cancel(str(uuid.uuid4()))  # the script is known there
        with closing(Cutter(own_redis.port, word, after=after)) as cutter:
            error = refusal(f"redis://127.0.0.1:{cutter.port}/0", ask=lambda client: client.cancel(order_id))
        assert error.may_be_accepted == (word == b"EVALSHA")
        assert (direct.status(order_id).open is not None) == accepted


def test_a_script_that_cannot_be_loaded_was_not_carried_out(own_redis, order_id):
    with own_redis.client() as server:
        server.script_flush()
    with closing(Cutter(own_redis.port, b"SCRIPT", after=False)) as cutter:
        error = refusal(f"redis://127.0.0.1:{cutter.port}/0", ask=lambda client: client.cancel(order_id))
    assert not error.may_be_accepted


def test_of_a_long_list_what_came_before_the_failure_may_be_accepted(own_redis):
    first, last = ([f"{letter}-{uuid.uuid4()}" for _ in range(200)] for letter in "az")
    with own_redis.client() as server:
        server.acl_setuser("early", enabled=True, nopass=True, commands=["+@all"], channels=["*"])
        keys = (
            "pending:a-*",
            "dead:*",
            "aside:*",
            "due:*",
            "paths",
            "deadline",
            "wake_up:*",
            "listeners:*",
            "audit*",
            "counts",
        )
        allowed = ["~celery*", "~cancels*", "~_kombu*", *(f"~kalshi-cancel:{each}" for each in keys)]
        server.execute_command("ACL", "SETUSER", "early", *allowed)
    url = f"redis://early:any@127.0.0.1:{own_redis.port}/0"
    assert not refusal(url, ask=lambda client: client.cancel_many(last)).may_be_accepted
    assert refusal(url, ask=lambda client: client.cancel_many([*first, *last])).may_be_accepted
    with closing(CancelClient(own_redis.url)) as direct:
        assert direct.status(first[0]).open is not None
        assert direct.status(last[0]).open is None


def test_an_error_out_of_a_script_that_has_written_leaves_it_open(own_redis):
    server = scripts.connect(RedisSettings.at(own_redis.url))
    half = server.register_script("redis.call('SET', ARGV[1], 1) error({err = 'ERR halfway'})")
    with pytest.raises(StoreError, match="halfway") as told:
        scripts.surely(server, half, [f"half-{uuid.uuid4()}"])
    assert told.value.may_be_accepted


def test_of_portions_that_are_sent_together_one_that_fails_neither_stops_nor_mixes_up_the_others(own_redis):
    server = scripts.connect(RedisSettings.at(own_redis.url))
    key = f"portions-{uuid.uuid4()}"
    refuse = "if ARGV[2] == 'bad' then error({err = 'ERR a bad one'}) end"
    script = server.register_script(f"{refuse} redis.call('RPUSH', ARGV[1], ARGV[2]) return ARGV[2]")
    server.script_flush()
    assert scripts.surely_each(server, script, [[key, each] for each in "ab"]) == ["a", "b"]
    with pytest.raises(StoreError, match="a bad one"):
        scripts.surely_each(server, script, [[key, each] for each in ("c", "bad", "d")])
    assert scripts.surely_each(server, script, [[key, each] for each in "ef"]) == ["e", "f"]
    assert server.lrange(key, 0, -1) == list("abcdef")
    assert scripts.surely_each(server, script, []) == []


def test_a_wait_for_replicas_that_fails_comes_after_the_accept(own_redis, order_id, monkeypatch):
    with own_redis.client() as server:
        server.acl_setuser(
            "no-wait", enabled=True, nopass=True, keys=["*"], channels=["*"], commands=["+@all", "-wait"]
        )
    monkeypatch.setenv("KALSHI_WAIT_REPLICAS", "1")
    error = refusal(
        f"redis://no-wait:any@127.0.0.1:{own_redis.port}/0", ask=lambda client: client.cancel(order_id)
    )
    assert error.may_be_accepted
    assert "'wait'" in str(error)
    with closing(CancelClient(own_redis.url)) as client:
        assert client.status(order_id).open is not None


# -- words for what real servers are seldom seen to say


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (redis.ResponseError("MISCONF Errors writing to the AOF file: No space left on device"), "its disk"),
        (redis.ResponseError("NOREPLICAS Not enough good replicas to write."), "too few of its replicas"),
        (redis.ResponseError("BUSY Redis is busy running a script."), "busy with a script"),
        (redis.ReadOnlyError("You can't write against a read only replica."), "is a replica"),
        (redis.ResponseError("x" * 3000), "xxx..."),
        (redis.ConnectionError("one\nline\n of\tthree"), "one line of three"),
    ],
    ids=["disk", "replicas", "busy", "replica", "long", "lines"],
)
def test_each_answer_is_worded_in_one_short_line(error, expected):
    assert expected in words(error)
    assert len(words(error)) < LINE_MOST
    assert "\n" not in words(error)


def test_what_kombu_makes_of_an_error_is_worded_as_the_error_itself(guarded):
    broker = Connection(guarded.url.replace("//", "//:wrong@"))
    with broker, pytest.raises(OperationalError) as told:
        broker.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
    assert words(told.value) == "Redis refuses this user or password"


def test_what_a_pipeline_is_refused_is_understood_as_what_a_command_is(own_redis):
    with own_redis.client() as server:
        server.config_set("min-replicas-to-write", 1)
        try:
            with server.pipeline(transaction=False) as pipeline, pytest.raises(redis.ResponseError) as told:
                pipeline.set("x", 1).execute()
        finally:
            server.config_set("min-replicas-to-write", 0)
    assert can_pass(told.value)
    assert words(told.value) == "Redis refuses: too few of its replicas are in touch with it"
