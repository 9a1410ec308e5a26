"""`cancelctl top`: its frame as a function, its snapshot of a real Redis, the command in a real terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import replace

import pyte
import pytest
from claims import claim_from
from hypothesis import given
from hypothesis import strategies as st

from kalshi_cancel.cli.exits import Exit
from kalshi_cancel.cli.frame import frame
from kalshi_cancel.cli.snapshot import MassShown, Rates, Snapshot, Watcher
from kalshi_cancel.model.mass_request import MassRequest
from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.model.results import CancelResult, Outcome
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store.audit import AuditLog
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.mass_cancels import MassCancels
from kalshi_cancel.store.mass_claim import MassClaims
from kalshi_cancel.store.pending import Known, MakeDeadLetter, RetryLater
from kalshi_cancel.store.rate_limits import Level, Limits, Pacer
from kalshi_cancel.store.scripts import connect
from kalshi_cancel.store.stats import ENDS, LaneState
from kalshi_cancel.store.workers import WorkerRegistry, WorkerShown
from trials.stack import ROOT, RedisServer, wait_until

COLUMNS, LINES = 80, 24
WITHIN_S = 30.0

BUSY = Snapshot(
    now_s=1795365444.7,
    where="kalshi-cancel at 127.0.0.1:6379/0",
    lanes=(
        LaneState(Lane.RISK, 12, 12, 8, 0, 0.42, 0.2, 0, 12),
        LaneState(Lane.STRATEGY, 10432, 500, 96, 3, 72.0, 31.2, 4, 20000),
    ),
    dead_letters=2,
    rates=Rates(
        {"risk": 1.0, "strategy": 800.3},
        {"canceled": 120.2, "too_late": 3.0},
        {"200": 12.3, "not_found": 0.3, "429": 0.2, "a": 0.2, "b": 0.1, "c": 0.1},
        13.2,
        11.8,
        203.0,
    ),
    buckets=(Level("read", 190, 200, 200, 1, 0), Level("write", 64, 200, 200, 0.8, 3)),
    workers=(
        WorkerShown("trade-host-1:4711", ("risk", "strategy"), 8),
        WorkerShown("trade-host-2:4711", ("risk", "strategy"), 8),
    ),
    held_back={"trade-host-2:4711": "unreachable"},
    mass_cancels=(
        MassShown("0b7c6a9e-1", "ann", "limit", {"settled": 512, "orders": 1000, "unresolved": 3}),
        MassShown("1b7c6a9e-2", None, None, None),
    ),
)
SHOWN = """\
cancelctl top  kalshi-cancel at 127.0.0.1:6379/0         2026-11-22 16:37:24 UTC

LANE        OPEN  CLAIMED       OLDEST       MEDIAN  UNRESOLVED  MESSAGES
risk          12        8        0.4 s        0.2 s           0         0
strategy   10432      96+   1 min 12 s       31.2 s          3+         4
DEAD LETTERS 2: cancelctl dead

ACCEPTED 801.3/s: strategy 800.3, risk 1.0
SETTLED  123.2/s: canceled 120.2, too_late 3.0
CALLS    13.2/s, median 12 ms, slowest 203 ms
ANSWERS  200 12.3, not_found 0.3, 429 0.2, a 0.2, others 0.2

BUCKET                           TOKENS      OF    REFILL  COUNTS   429S
read     [###################.]     190     200     200/s    100%      0
write    [######..............]      64     200     200/s     80%      3

MASS CANCELS  2 running
0b7c6a9e  [##########..........]  512/1000 settled, 3 unresolved  ann: limit
1b7c6a9e  planning                -

WORKERS  2 with 16 senders; 1 HOLD CANCELS BACK
trade-host-2:4711        risk+strategy   8 senders  HOLDS BACK: unreachable
trade-host-1:4711        risk+strategy   8 senders  sends"""

# -- the frame


def test_a_busy_service_is_readable_in_80_columns_and_24_lines():
    assert frame(BUSY, COLUMNS, LINES) == SHOWN


def test_an_idle_service_says_what_there_is_not():
    idle = Snapshot(0.0, "x", (LaneState(Lane.RISK, 0, 0, 0, 0, None, None, 0, 0),), 0, None, (), (), {}, ())
    shown = frame(idle, COLUMNS, LINES)
    assert re.search(r"^risk +0 +0 +- +- +0 +0$", shown, re.MULTILINE)
    for words in ("there is no audit log", "MASS CANCELS  none runs", "WORKERS  NONE RUNS"):
        assert words in shown
    assert "DEAD LETTERS" not in shown


def test_a_bucket_with_a_little_less_than_nothing_has_nothing():
    empty = replace(BUSY, buckets=(Level("write", -0.4, 200, 200, 1, 0),))
    assert re.search(r"^write    \[\.{20}\]       0     200 ", frame(empty, COLUMNS, LINES), re.MULTILINE)


def test_an_old_snapshot_says_so_and_why():
    assert frame(BUSY, COLUMNS, LINES, failure="Redis: gone").splitlines()[1] == "OLD: Redis: gone"


def test_what_is_too_much_is_left_out_from_the_longest_list_and_counted():
    many = replace(BUSY, workers=tuple(WorkerShown(f"h:{n}", ("risk",), 2) for n in range(100)))
    lines = frame(many, COLUMNS, LINES).splitlines()
    assert len(lines) <= LINES
    left_out = int(re.fullmatch(r"\.\.\. and (\d+) more", lines[-1])[1])
    workers = [line for line in lines if line.startswith(("h:", "trade-host-2"))]
    assert left_out == 101 - len(workers)
    assert "1b7c6a9e  planning" in "\n".join(lines)
    assert lines[lines.index("WORKERS  100 with 200 senders; 1 HOLD CANCELS BACK") + 1].endswith(
        "HOLDS BACK: unreachable"
    ), "those first"
    assert len(frame(many, COLUMNS).splitlines()) > 100


TEXTS = st.text(max_size=30) | st.sampled_from(
    ["日本語のデスク" * 5, "\x1b[2J\r\n", "e\u0301" * 20, "\ua9b30", "\u2630" * 30, "\u1160" * 20]
)


@given(
    width=st.integers(1, 200),
    height=st.integers(1, 60),
    who=TEXTS,
    why=TEXTS,
    names=st.lists(TEXTS, max_size=40),
    failure=TEXTS,
)
def test_whatever_is_shown_a_frame_never_leaves_its_screen(width, height, who, why, names, failure):
    mass = MassShown(who, who, why, {"settled": 1, "orders": 0, "unresolved": 2})
    workers = tuple(WorkerShown(name, ("risk",), 1) for name in names)
    snapshot = replace(
        BUSY,
        where=who,
        mass_cancels=(mass,) * len(names),
        workers=workers,
        held_back=dict.fromkeys(names, why),
    )
    text = frame(snapshot, width, height, failure=failure)
    screen = pyte.Screen(width + 1, height + 1)  # one more, in which nothing may ever stand
    pyte.Stream(screen).feed(text.replace("\n", "\r\n"))
    # (By cells: a cell may hold several characters, of which only one has a width.)
    assert all(screen.buffer[line][width].data == " " for line in range(height))
    assert screen.display[height].strip() == ""
    assert len(text.split("\n")) <= height


# -- the snapshot


@pytest.fixture
def env(own_redis):
    return {"REDIS_URL": own_redis.url, "KALSHI_KEY_PREFIX": f"t{uuid.uuid4().hex[:8]}"}


@pytest.fixture
def settings(env):
    return RedisSettings.from_env(env)


@pytest.fixture
def redis_client(settings):
    with connect(settings) as client:
        yield client


@pytest.fixture
def store(redis_client, settings):
    return CancelStore(redis_client, settings)


def accept(store, number, lane=Lane.STRATEGY, deadline_s=60.0, **fields):
    requests = [CancelRequest(str(uuid.uuid4()), **fields) for _ in range(number)]
    store.accept(requests, lane=lane, default_deadline_s=deadline_s)
    return [request.order_id for request in requests]


def wait_for_age(store, order_id):
    """Waits until the order is older than what comes next, by an age to be told apart."""
    wait_until(lambda: store.open_cancel(order_id).age_s >= 0.3, what="its age")


def test_lanes_have_what_is_open_claimed_unresolved_and_how_old(store, settings):
    [late] = accept(store, 1, deadline_s=0.001)
    wait_for_age(store, late)
    accept(store, 2, exchange_index=1)
    accept(store, 3, lane=Lane.RISK)
    held = claim_from(store, (Lane.RISK,), at_most=2, lease_s=60, exchange_ms=None).entries
    unresolved = CancelResult(late, Outcome.UNRESOLVED, settled_at="2026-11-22T10:00:00.000Z")
    wait_until(lambda: store.report([unresolved]), what="its deadline to pass")
    snapshot = Watcher(settings).snapshot()
    risk, strategy = snapshot.lanes
    assert (risk.lane, risk.open, risk.claimed, risk.unresolved) == (Lane.RISK, 3, len(held), 0)
    assert (strategy.lane, strategy.open, strategy.claimed, strategy.unresolved) == (Lane.STRATEGY, 3, 0, 1)
    assert 0.3 <= strategy.oldest_s < 10
    assert strategy.median_s < strategy.oldest_s
    assert abs(snapshot.now_s - time.time()) < 1
    store.conclude([MakeDeadLetter(entry, "") for entry in held])
    assert Watcher(settings).snapshot().dead_letters == len(held)


def test_a_long_lane_is_counted_whole_and_looked_at_where_it_is_next_due_and_where_it_waits_longest(
    store, settings
):
    accept(store, 1)
    [entry] = claim_from(store, (Lane.STRATEGY,), at_most=1, lease_s=60, exchange_ms=None).entries
    store.conclude([RetryLater(entry, "", pause_s=3600)])  # at the very end of the line
    wait_for_age(store, entry.order_id)
    accept(store, 3 * ENDS)
    [_, lane] = Watcher(settings).snapshot().lanes
    assert (lane.open, lane.looked_at) == (3 * ENDS + 1, 2 * ENDS)
    assert lane.oldest_s >= 0.3


def test_the_buckets_are_as_the_scripts_spend_from_them(redis_client, settings, store):
    pacer = Pacer(redis_client, settings.key_prefix, Limits(100, 1000, 50, 500))
    pacer.set_limits(pacer.limits)
    accept(store, 1, exchange_index=2)
    store.accept(  # its path is paid for from the bucket of reads, and has none of its own
        [CancelRequest("swept")],
        lane=Lane.RISK,
        default_deadline_s=60,
        known=Known("", "reads", 60),
    )
    for bucket, tokens in (("read", 300), ("write", 200), ("write:2", 100)):
        pacer.take(bucket, tokens)
    pacer.correct("write:2", 2, taken_at=time.monotonic())
    told = {level.bucket: level for level in Watcher(settings).snapshot().buckets}
    assert set(told) == {"read", "write", "write:2"}
    for bucket, level in pacer.levels(list(told)).items():
        assert told[bucket].tokens == pytest.approx(level.tokens, abs=5)
    assert told["write"].tokens == pytest.approx(500 - 10 - 200, abs=5), (
        "what is on its way is not counted on"
    )
    assert (told["write:2"].share, told["write:2"].refused) == (pytest.approx(0.5, abs=0.05), 1)
    assert (told["read"].capacity, told["read"].refill, told["read"].refused) == (980, 100, 0)
    assert told["read"].tokens < 800


def test_what_nobody_has_done_yet_has_no_levels_and_stops_nothing(settings):
    snapshot = Watcher(settings).snapshot()
    assert snapshot.buckets == ()
    assert frame(snapshot, COLUMNS, LINES)


CALL = {
    "operation": "cancel",
    "orders": 1,
    "status": 200,
    "code": None,
    "ms": 10,
    "tokens": 2,
    "bucket": "write",
}


def test_rates_are_those_of_the_last_ten_seconds_of_the_audit_log(redis_client, settings):
    audit_log, watcher = AuditLog(redis_client, settings), Watcher(settings)
    audit_log.append("request", {"lane": "risk", "orders": [{"order_id": "a"}, {"order_id": "b"}]})
    calls = [CALL, {**CALL, "status": 404, "code": "not_found", "ms": 30}, {**CALL, "status": None, "ms": 20}]
    conclusions = {"a": ["settled", "canceled", "1.00", 1], "b": ["open", 100, None]}
    audit_log.append("work", {"calls": calls, "orders": conclusions})
    audit_log.append("work", {"spoilt": 1})
    redis_client.xadd(f"{settings.key_prefix}:audit", {"kind": "work", "body": "no JSON"})
    rates = watcher.snapshot().rates
    assert rates == Rates(
        {"risk": 0.2}, {"canceled": 0.1}, {"200": 0.1, "not_found": 0.1, "None": 0.1}, 0.3, 20.0, 30.0
    )
    audit_log.append("request", {"lane": "risk", "orders": [{"order_id": "c"}]})
    assert watcher.snapshot().rates.accepted == {"risk": pytest.approx(0.3)}
    assert (
        Watcher(RedisSettings.from_env({**env_of(settings), "KALSHI_AUDIT": "off"})).snapshot().rates is None
    )


def env_of(settings):
    return {"REDIS_URL": settings.redis_url, "KALSHI_KEY_PREFIX": settings.key_prefix}


def test_what_is_older_than_the_window_counts_no_more(redis_client, settings):
    audit_log = AuditLog(redis_client, settings)
    audit_log.append("request", {"lane": "risk", "orders": [{"order_id": "a"}]})
    [(entry_id, fields)] = redis_client.xrange(f"{settings.key_prefix}:audit")
    redis_client.delete(f"{settings.key_prefix}:audit")
    redis_client.xadd(
        f"{settings.key_prefix}:audit", fields, id=f"{int(entry_id.partition('-')[0]) - 9_000}-0"
    )
    watcher = Watcher(settings)
    assert watcher.snapshot().rates.accepted == {"risk": 0.1}
    wait_until(lambda: watcher.snapshot().rates.accepted == {}, within_s=5, what="it is old")


def test_running_mass_cancels_workers_and_breakers_are_listed(redis_client, settings):
    mass_cancels = MassCancels(redis_client, settings)
    first = MassRequest.parse({"scope": {"everything": True}, "requested_by": "ann", "reason": "limit"})
    done = MassRequest.parse({"scope": {"everything": True}})
    for request in (first, done):
        mass_cancels.enter(request)
    claims = MassClaims(redis_client, settings, name="host:1")
    claims.take(first.request_id).note(progress={"settled": 1, "orders": 2})
    claims.take(done.request_id).finish({"flat": True}, {})
    redis_client.sadd(f"{settings.key_prefix}:mass_cancels:open", "spoilt")
    registry = WorkerRegistry(redis_client, settings)
    registry.show(WorkerShown("host:1", ("risk",), 2, "a"))
    held = WorkerShown("host:1", ("risk",), 2, "a", breaker="paused")
    registry.show(held)
    snapshot = Watcher(settings).snapshot()
    assert snapshot.mass_cancels == (
        MassShown(first.request_id, "ann", "limit", {"settled": 1, "orders": 2}),
    )
    assert snapshot.workers == (held,)
    assert snapshot.held_back == {"host:1": "paused"}


def test_a_worker_that_says_nothing_any_more_is_forgotten(redis_client, settings):
    registry = WorkerRegistry(redis_client, settings)
    registry.show(WorkerShown("gone:1", ("risk",), 2))
    [(member, at_ms)] = redis_client.zrange(f"{settings.key_prefix}:workers", 0, -1, withscores=True)
    redis_client.zadd(f"{settings.key_prefix}:workers", {member: at_ms - 6_000})
    assert Watcher(settings).snapshot().workers == ()
    redis_client.zadd(f"{settings.key_prefix}:workers", {member: at_ms - 61_000})
    registry.show(WorkerShown("here:1", ("risk",), 2))
    assert redis_client.zcard(f"{settings.key_prefix}:workers") == 1


# -- the command


def run(env, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "kalshi_cancel.cli", "top", *arguments],
        env={"PATH": os.environ["PATH"], **env},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("arguments", [(), ("--once",)])
def test_in_a_pipe_it_is_one_plain_frame(env, store, arguments):
    accept(store, 7)
    done = run(env, *arguments)
    assert (done.returncode, done.stderr) == (Exit.SETTLED, "")
    assert "\x1b" not in done.stdout
    assert done.stdout.startswith("cancelctl top  ")
    assert done.stdout.count("cancelctl top") == 1
    assert re.search(r"^strategy +7 ", done.stdout, re.MULTILINE)


def test_as_json_it_is_the_snapshot(env, store):
    accept(store, 7)
    value = json.loads(run(env, "--json").stdout)
    assert [(lane["lane"], lane["open"]) for lane in value["lanes"]] == [("risk", 0), ("strategy", 7)]
    assert set(value) == set(Snapshot.__dataclass_fields__)


def test_without_redis_it_says_so_in_one_line_and_takes_no_screen(tmp_path, env):
    terminal = Terminal({**env, "REDIS_URL": "redis://127.0.0.1:1/0"})
    assert terminal.process.wait(WITHIN_S) == Exit.REDIS
    terminal.close()
    assert b"\x1b" not in terminal.raw
    assert re.fullmatch(rb"cancelctl: Redis cannot be reached .*refused\r\n", bytes(terminal.raw))


# Its standard input is made the terminal that controls it, so that Ctrl-C is an interrupt as at a real one.
AT_ITS_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from kalshi_cancel.cli import main
sys.exit(main())
"""


class Terminal:
    """A terminal of its own, in which the command runs."""

    def __init__(self, env, *arguments, columns=COLUMNS, lines=LINES):
        self.screen = pyte.Screen(columns, lines)
        self.raw = bytearray()
        self.torn = []  # what was seen of frames that were being drawn
        self._stream = pyte.ByteStream(self.screen)
        self._lock = threading.Lock()
        self._leader, self._follower = pty.openpty()
        self._set_size(columns, lines)
        self.before = termios.tcgetattr(self._follower)
        self.process = subprocess.Popen(
            [sys.executable, "-c", AT_ITS_TERMINAL, "top", *arguments],
            env={"PATH": os.environ["PATH"], "TERM": "xterm", **env},
            cwd=ROOT,
            stdin=self._follower,
            stdout=self._follower,
            stderr=self._follower,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _set_size(self, columns, lines):
        fcntl.ioctl(self._leader, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def _read(self):
        with suppress(OSError):  # Linux says so when the other end is closed
            while portion := os.read(self._leader, 65536):
                with self._lock:
                    self.raw += portion
                    for at in range(len(portion)):
                        self._stream.feed(portion[at : at + 1])
                        self.torn.append(self._row(0, 13))

    def _row(self, line, columns):
        """What stands in a line; pyte's own `display` measures every character, which takes a core."""
        return "".join(self.screen.buffer[line][column].data for column in range(columns))

    @property
    def text(self):
        with self._lock:
            rows = [self._row(line, self.screen.columns) for line in range(self.screen.lines)]
        return "\n".join(row.rstrip() for row in rows)

    def wait_for(self, pattern):
        wait_until(
            lambda: re.search(pattern, self.text, re.MULTILINE),
            within_s=WITHIN_S,
            what=f"{pattern}:\n{self.text}",
        )

    def wait_for_frames(self, number):
        """Waits for so many more frames."""
        wanted = self.raw.count(b"\x1b[H") + number
        wait_until(lambda: self.raw.count(b"\x1b[H") >= wanted, within_s=WITHIN_S, what="frames")

    def resize(self, columns, lines):
        with self._lock:
            self.screen.resize(lines, columns)
        self._set_size(columns, lines)

    def type(self, text):
        os.write(self._leader, text)

    def attributes(self):
        return termios.tcgetattr(self._follower)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._follower)
        self._reader.join(WITHIN_S)
        os.close(self._leader)


@pytest.fixture
def terminal(env, store):
    terminal = Terminal(env)
    terminal.wait_for("^cancelctl top ")
    yield terminal
    terminal.close()


def test_it_shows_what_changes(terminal, store):
    terminal.wait_for(r"^strategy +0 ")
    accept(store, 7)
    terminal.wait_for(r"^strategy +7 ")
    terminal.wait_for(r"^ACCEPTED 0\.7/s: strategy 0\.7$")
    claim_from(store, (Lane.STRATEGY,), at_most=4, lease_s=60, exchange_ms=None)
    terminal.wait_for(r"^strategy +7 +4 ")


def test_it_draws_over_what_is_there_without_flicker(terminal, store):
    terminal.wait_for("^WORKERS ")
    seen = len(terminal.torn)
    accept(store, 1)
    terminal.wait_for(r"^strategy +1 ")
    terminal.wait_for_frames(2)
    assert len(terminal.torn) > seen
    assert set(terminal.torn[seen:]) == {"cancelctl top"}, "the first line is never gone"
    assert b"\x1b[2J" not in terminal.raw
    store_line = [line for line in terminal.text.splitlines() if line.startswith("cancelctl top")]
    assert len(store_line) == 1


@pytest.mark.parametrize("key", [b"q", b"Q", b"xq", b"\x03"], ids=["q", "Q", "others first", "Ctrl-C"])
def test_a_key_ends_it_and_the_terminal_is_as_it_was(terminal, key):
    assert terminal.attributes() != terminal.before, "what is typed is not echoed"
    terminal.type(key)
    assert terminal.process.wait(5) == Exit.SETTLED
    is_as_it_was(terminal)


def is_as_it_was(terminal):
    assert terminal.attributes() == terminal.before
    wait_until(lambda: bytes(terminal.raw).endswith(b"\x1b[?25h\x1b[?1049l"), what="the screen is given back")
    assert bytes(terminal.raw).startswith(b"\x1b[?1049h\x1b[?25l")
    assert b"Traceback" not in terminal.raw


def test_other_keys_do_not_end_it(terminal):
    terminal.type(b"x\x1b[A ")
    terminal.wait_for_frames(2)
    assert terminal.process.poll() is None


def test_a_supervisor_s_word_ends_it_and_the_terminal_is_as_it_was(terminal):
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.process.wait(5) == 128 + signal.SIGTERM
    is_as_it_was(terminal)


def test_a_terminal_of_another_size_is_used_as_it_is(terminal, redis_client, settings):
    mass_cancels = MassCancels(redis_client, settings)
    for _ in range(30):
        mass_cancels.enter(MassRequest.parse({"scope": {"everything": True}}))
    terminal.wait_for(r"MASS CANCELS  30 running\n(.*\n)*\.\.\. and \d+ more$")
    terminal.resize(120, 60)
    terminal.wait_for(r"MASS CANCELS  30 running\n(.* planning .*\n){30}\nWORKERS")
    terminal.resize(50, 18)
    terminal.wait_for(r"\Acancelctl top .* UTC\n(.*\n)*strategy +0 (.*\n)*MASS CANCELS  30 running$")


def test_once_at_a_terminal_it_leaves_the_frame_there(env, store):
    terminal = Terminal(env, "--once")
    assert terminal.process.wait(WITHIN_S) == Exit.SETTLED
    terminal.wait_for("^WORKERS ")
    terminal.close()
    assert b"\x1b" not in terminal.raw


def test_an_outage_of_redis_is_shown_and_waited_out(tmp_path, env):
    server = RedisServer(tmp_path).start()
    terminal = Terminal({**env, "REDIS_URL": server.url})
    try:
        terminal.wait_for("^WORKERS ")
        server.kill()
        terminal.wait_for("^OLD: Redis ")
        assert "LANE" in terminal.text
        server.start()
        wait_until(lambda: "OLD:" not in terminal.text, within_s=WITHIN_S, what="it goes on")
        terminal.type(b"q")
        assert terminal.process.wait(5) == Exit.SETTLED
    finally:
        terminal.close()
        server.stop()


def test_a_real_service_is_seen_at_work_in_80_columns(stack, control):
    control.configure(latency_s=0.3)
    order_ids = [str(uuid.uuid4()) for _ in range(300)]
    control.place_many([{"order_id": order_id} for order_id in order_ids])
    env = {name: value for name, value in stack.environment.items() if not name.startswith("KALSHI_")}
    terminal = Terminal(env)
    try:
        terminal.wait_for(r"^WORKERS  1 with \d+ senders; every breaker is closed$")
        terminal.wait_for(r"risk\+strategy +\d+ senders  sends$")
        terminal.wait_for(r"^write +\[#+\.*\] ")
        started = subprocess.run(
            [sys.executable, "-m", "kalshi_cancel.cli", "mass", "--everything", "--yes", "--json"],
            env=env,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert json.loads(started.stdout)["orders_affected"] == 300
        terminal.wait_for(r"^SETTLED  \d+\.\d/s: .*canceled \d+\.\d")
        terminal.wait_for(r"^CALLS    \d+\.\d/s, median \d+ ms, slowest \d+ ms$")
        print(terminal.text)
    finally:
        terminal.close()
