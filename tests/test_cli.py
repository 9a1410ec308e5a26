"""The command line, run as a process of its own against real parts."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
import uuid
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import pytest
from claims import claim_from
from cutter import Cutter
from here import cancelctl

from kalshi_cancel import cli
from kalshi_cancel.cli import exits
from kalshi_cancel.cli.exits import Exit
from kalshi_cancel.cli.printing import duration
from kalshi_cancel.doctor import Health, examine
from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.model.results import CancelResult, Outcome
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.pending import MakeDeadLetter, RetryLater
from kalshi_cancel.store.scripts import connect
from kalshi_cancel.store.workers import WorkerRegistry, WorkerShown
from trials.stack import ROOT, Keys, RedisServer, free_port, wait_until

COMMAND = [sys.executable, "-m", "kalshi_cancel.cli"]
WITHIN_S = 60


class CommandLine:
    """Runs `cancelctl` in one environment."""

    def __init__(self, env):
        self.env = dict(env)

    def start(self, *arguments, **options):
        return subprocess.Popen(
            [*COMMAND, *arguments],
            env=self.env,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )

    def __call__(self, *arguments):
        """Runs a command in this process, which is quicker."""
        return cancelctl(*arguments, env=self.env)

    def as_process(self, *arguments, stdin=""):
        done = subprocess.run(
            [*COMMAND, *arguments],
            env=self.env,
            cwd=ROOT,
            text=True,
            input=stdin,
            capture_output=True,
            timeout=WITHIN_S,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return done


def objects(done) -> list[dict]:
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def ctl(stack, control):
    """The command line beside a working service."""
    return CommandLine(stack.environment)


@pytest.fixture
def idle_env(own_redis, stack):
    environment = {name: value for name, value in stack.environment.items() if not name.startswith("KALSHI_")}
    return {
        **environment,
        "REDIS_URL": own_redis.url,
        "KALSHI_KEY_PREFIX": f"test-{uuid.uuid4().hex[:8]}",
    }


@pytest.fixture
def idle(idle_env):
    """The command line without any worker."""
    return CommandLine(idle_env)


@pytest.fixture
def store(idle_env):
    """The store that `idle` writes into."""
    settings = RedisSettings.from_env(idle_env)
    return CancelStore(connect(settings), settings)


@pytest.fixture
def here(idle_env, monkeypatch, capsys):
    """Runs a command in this process, which is quicker; what it printed and its exit code."""
    for name in ("REDIS_URL", "KALSHI_KEY_PREFIX"):
        monkeypatch.setenv(name, idle_env[name])

    def run(*arguments):
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def claim_one(store):
    [entry] = claim_from(store, tuple(Lane), at_most=1, lease_s=60, exchange_ms=None).entries
    return entry


PROGRESS = json.dumps(
    {
        "attempts": 4,
        "last_problem": {"code": "http_502", "message": "Bad \x1b[31mGateway", "http_status": 502},
        "history": [[1_700_000_000_000, "http_502"]],
    }
)


# --- cancel -----------------------------------------------------------------------------------------------


def test_orders_that_are_canceled_or_too_late_are_printed_as_they_settle_and_exit_0(ctl, control, order_id):
    executed = str(uuid.uuid4())
    control.place(order_id, count="7.00")
    control.place(executed, status="executed", filled="10.00")
    done = ctl.as_process("cancel", order_id, executed)
    titles, *lines = done.stdout.splitlines()
    assert titles.split() == [
        *("ORDER", "OUTCOME", "STATUS", "REDUCED", "BY", "KNOWN", "BY", "ATTEMPTS", "ERROR"),
    ]
    assert {tuple(line.split()) for line in lines} == {
        (order_id, "canceled", "canceled", "7.00", "cancel", "1"),
        (executed, "too_late", "executed", "0.00", "read_back", "1"),
    }
    outcomes = {line[titles.index("OUTCOME") :].split()[0] for line in lines}
    assert outcomes == {"canceled", "too_late"}, "columns stand under their titles"
    assert done.stderr == ""
    assert done.returncode == Exit.SETTLED


def test_an_order_that_rests_after_its_outcome_is_canceled_again_when_asked_to(ctl, control, order_id):
    control.place(order_id, count="7.00")
    ctl("cancel", order_id)
    control.restore(order_id)
    assert "canceled" in ctl("cancel", order_id).stdout
    assert control.order(order_id)["status"] == "resting", "the stored result has answered"
    done = ctl("cancel", "--again", order_id)
    assert (done.returncode, done.stderr) == (Exit.SETTLED, "")
    assert done.stdout.splitlines()[1].split() == [order_id, "canceled", "canceled", "7.00", "cancel", "1"]
    assert control.order(order_id)["status"] == "canceled"
    done = ctl("cancel", "--again", order_id)
    assert done.stdout.splitlines()[1].split()[:4] == [order_id, "too_late", "canceled", "-"]


def test_json_lines_are_the_results_by_the_fields_that_everybody_reads(ctl, control, client, order_id):
    control.place(order_id)
    done = ctl("cancel", "--json", order_id)
    [value] = objects(done)
    assert CancelResult.from_json(value) == client.status(order_id).result
    assert value["requested_by"] == ["cancelctl"]
    assert done.returncode == Exit.SETTLED


def test_the_worst_of_several_outcomes_makes_the_exit_code(ctl, control, order_id):
    unknown, refused = str(uuid.uuid4()), str(uuid.uuid4())
    control.place(order_id)
    control.place(refused)
    control.fault("status", order_id=refused, status=400, code="invalid_parameters")  # alone or in a batch
    only_unknown = ctl("cancel", "--json", order_id, unknown)
    assert {value["outcome"] for value in objects(only_unknown)} == {"canceled", "unknown_order"}
    assert only_unknown.returncode == Exit.UNKNOWN_ORDER
    all_three = ctl("cancel", order_id, unknown, refused)
    assert re.search(rf"{refused} +refused .*invalid_parameters", all_three.stdout)
    assert all_three.returncode == Exit.REFUSED


def test_an_order_without_proof_at_the_deadline_is_unresolved_and_status_sees_it_settle(
    ctl, control, client, order_id
):
    control.place(order_id)
    control.fault("http_429", order_id=order_id, retry_after="1")
    done = ctl("cancel", "--json", "--deadline", "0.3", order_id)
    [value] = objects(done)
    assert value["outcome"] == "unresolved"
    assert done.returncode == Exit.NOT_SETTLED

    status = ctl("status", "--json", order_id)
    [value] = objects(status)
    assert value["result"]["outcome"] == "unresolved"
    assert value["open"]["unresolved"]
    assert value["open"]["attempts"] >= 1
    assert value["open"]["last_problem"]["http_status"] == 429
    assert status.returncode == Exit.NOT_SETTLED

    control.clear_faults()
    wait_until(lambda: client.status(order_id).open is None, what="the order to settle")
    status = ctl("status", order_id)
    assert re.search(rf"{order_id} +canceled +canceled +10\.00", status.stdout)
    assert status.returncode == Exit.SETTLED


def test_every_option_reaches_the_request(ctl, control, client, order_id):
    ticker = "KXBTC-26NOV22-T100000"
    control.place(order_id, ticker=ticker, exchange_index=2, subaccount=1)
    options = ["--ticker", ticker, "--shard", "2", "--subaccount", "1", "--deadline", "5", "--timeout", "20"]
    done = ctl("cancel", "--json", *options, "--requested-by", "desk 7", "--reason", "limit", order_id)
    [value] = objects(done)
    assert value["outcome"] == "canceled"
    assert value["requested_by"] == ["desk 7"]
    [call] = control.calls("cancel", order_id)
    for part in ("exchange_index=2", f"market_ticker={ticker}", "subaccount=1"):
        assert part in call["query"]


def test_the_risk_lane_deadline_and_reason_are_in_the_store(idle, store, order_id):
    idle("cancel", "--no-wait", "--risk", "--reason", "limit", "--deadline", "7", order_id)
    entry = store.open_cancel(order_id)
    assert entry.lane is Lane.RISK
    assert entry.request.reason == "limit"
    [claimed] = claim_from(store, [Lane.RISK], at_most=1, lease_s=1, exchange_ms=None).entries
    assert 0 < claimed.deadline_left_s <= 7


def test_ids_are_read_from_stdin_and_each_is_asked_for_once(ctl, control):
    ids = [str(uuid.uuid4()) for _ in range(3)]
    control.place_many([{"order_id": each} for each in ids])
    done = ctl.as_process("cancel", "--json", ids[0], "-", stdin=f"{ids[1]}\n{ids[2]} {ids[0]}\n\n")
    assert sorted(value["order_id"] for value in objects(done)) == sorted(ids)
    assert done.returncode == Exit.SETTLED


def test_without_waiting_accepted_is_enough_and_what_is_settled_already_is_shown(ctl, control, order_id):
    control.place(order_id)
    assert ctl("cancel", order_id).returncode == Exit.SETTLED
    done = ctl("cancel", "--no-wait", order_id)
    assert re.search(rf"{order_id} +canceled", done.stdout)
    assert done.returncode == Exit.SETTLED


def test_without_a_worker_no_wait_says_accepted(idle, order_id):
    done = idle("cancel", "--no-wait", order_id)
    assert re.search(rf"{order_id} +accepted", done.stdout)
    assert (done.stderr, done.returncode) == ("", Exit.SETTLED)


def test_what_is_not_settled_in_time_is_named_and_still_worked_on(here, order_id):
    code, out, err = here("cancel", "--timeout", "0.1", order_id)
    assert re.search(rf"{order_id} +not settled", out)
    assert err == "cancelctl: 1 not settled in time: 1 still being worked on\n"
    assert code == Exit.NOT_SETTLED
    code, out, _ = here("cancel", "--timeout", "0.1", "--json", order_id)
    assert json.loads(out) == {"order_id": order_id, "outcome": None}
    assert code == Exit.NOT_SETTLED


def test_interrupted_while_waiting_it_ends_in_one_line_and_the_cancel_stays_accepted(idle, store, order_id):
    running = idle.start("cancel", order_id)
    assert running.stdout.readline().startswith("ORDER")  # accepted, and waiting now
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=WITHIN_S)
    assert err == "cancelctl: interrupted: this ends only the waiting; accepted cancels stay accepted\n"
    assert running.returncode == Exit.INTERRUPTED
    assert store.open_cancel(order_id) is not None


# --- what is wrong, in one line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cancel", "a/b"], "order_id: expected 1 to 128 letters"),
        (["cancel", "ok", "a/b"], "orders[1].order_id: expected"),
        (["cancel", *[f"a/{n}" for n in range(5)]], "; and 2 more"),
        (["cancel", "--shard", "-2", "ok"], "exchange_index: expected a shard number"),
        (["cancel", "--deadline", "0", "ok"], "deadline_s: expected seconds, above 0"),
        (["cancel", "--timeout", "soon", "ok"], "argument --timeout: expected seconds, got 'soon'"),
        (["cancel", "--timeout", "nan", "ok"], "expected seconds, got 'nan'"),
        (["cancel", "--timeout", "1", "--no-wait", "ok"], "not allowed with"),
        (["cancel", "ok", "--wait"], "unrecognized arguments: --wait"),
        (["cancel"], "the following arguments are required: ORDER_ID"),
        (["retry"], "no order ids were given"),
        (["retry", "--all", "ok"], "not both"),
        ([], "the following arguments are required: COMMAND"),
        (["massacre"], "invalid choice: 'massacre'"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_was_expected(here, store, arguments, words):
    code, out, err = here(*arguments)
    assert (code, out) == (Exit.USAGE, "")
    assert words in err.splitlines()[-1]
    assert list(store.open_cancels()) == [], "nothing is asked for unless all of it is right"


def test_missing_settings_exit_2_in_one_line(idle):
    del idle.env["REDIS_URL"]
    done = idle.as_process("open")
    assert done.stderr.startswith("cancelctl: REDIS_URL is not set")
    assert done.stderr.count("\n") == 1
    assert done.returncode == Exit.USAGE


@pytest.mark.parametrize(
    "arguments", [["cancel", "x"], ["status", "x"], ["open"], ["dead"], ["retry", "x"], ["retry", "--all"]]
)
def test_a_redis_that_is_not_there_exits_5_in_one_line(here, monkeypatch, arguments):
    monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")
    code, out, err = here(*arguments)
    assert (code, out) == (Exit.REDIS, "")
    assert re.fullmatch(r"cancelctl: .*refused\.?\n", err)
    assert ("not accepted" in err) == (arguments[0] == "cancel")


def test_a_redis_that_may_have_accepted_is_told_from_one_that_was_never_asked(tmp_path, here, monkeypatch):
    server = RedisServer(tmp_path).start()
    told = []
    try:
        for word in (b"EVALSHA", b"HELLO"):  # the answer to this is what Redis is silent about
            with closing(Cutter(server.port, word, after=True)) as cutter:
                monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{cutter.port}/0")
                told.append(here("cancel", "x", "y"))
    finally:
        server.stop()
    assert {told_one[:2] for told_one in told} == {(Exit.REDIS, "")}
    [perhaps, never] = [err for _, _, err in told]
    assert perhaps.startswith("cancelctl: some cancels may not be accepted; asking again is always safe: ")
    assert never.startswith("cancelctl: not accepted: ")


def test_a_redis_that_goes_away_while_waiting_leaves_no_doubt_that_the_cancel_was_accepted(
    tmp_path, idle, order_id
):
    server = RedisServer(tmp_path).start()
    idle.env["REDIS_URL"] = server.url
    running = idle.start("cancel", "--timeout", "1", order_id)
    assert running.stdout.readline().startswith("ORDER")
    server.kill()
    _, err = running.communicate(timeout=WITHIN_S)
    assert err.startswith("cancelctl: accepted, but the outcomes cannot be read: ")
    assert running.returncode == Exit.REDIS


NOBODY_WORKS = "cancelctl: no worker runs: accepted cancels wait for one (celery -A worker.app worker)\n"


def test_who_waits_while_no_worker_runs_is_told_so(idle, order_id):
    done = idle("cancel", "--timeout", "4", order_id)
    assert done.returncode == Exit.NOT_SETTLED
    assert done.stderr.startswith(NOBODY_WORKS)


def test_with_a_worker_nobody_is_told_that_there_is_none(here, idle_env, store):
    settings = RedisSettings.from_env(idle_env)
    WorkerRegistry(connect(settings), settings).show(WorkerShown("worker1@host", ("risk", "strategy"), 16))
    here("cancel", "--no-wait", "waits")
    assert here("open")[2] == ""


def test_what_was_given_up_is_not_said_to_be_worked_on(here, store, order_id):
    here("cancel", "--no-wait", order_id)
    store.conclude([MakeDeadLetter(claim_one(store), PROGRESS)])
    code, out, _ = here("status", order_id)
    assert re.search(r" 4 +- +never +given up +http_502", out)
    assert code == Exit.REFUSED
    code, out, _ = here("status", "--json", order_id)
    assert json.loads(out)["dead"]["attempts"] == 4
    assert code == Exit.REFUSED


# --- status, open, dead, retry ----------------------------------------------------------------------------


def test_an_order_that_nobody_asked_for_has_an_exit_code_of_its_own(here, order_id):
    code, out, _ = here("status", order_id)
    assert "nobody asked" in out
    assert code == Exit.NOT_KNOWN_HERE
    code, out, _ = here("status", "--json", order_id)
    assert json.loads(out) == {"order_id": order_id, "result": None, "open": None, "dead": None}
    assert code == Exit.NOT_KNOWN_HERE


def test_open_lists_what_is_waiting_claimed_and_unresolved(here, store):
    assert here("open") == (0, "nothing is open\n", "")
    assert here("open", "--json") == (0, "", "")
    for order_id, *options in (["waits"], ["tried", "--deadline", "0.001"], ["held", "--risk"]):
        here("cancel", "--no-wait", order_id, *options, "--requested-by", f"desk of {order_id}")
    held = claim_one(store)
    assert held.order_id == "held"
    for entry in claim_from(store, [Lane.STRATEGY], at_most=2, lease_s=60, exchange_ms=None).entries:
        progress, pause_s = (PROGRESS, 90) if entry.order_id == "tried" else ("", 0)
        store.conclude([RetryLater(entry, progress, pause_s)])
    unresolved = CancelResult("tried", Outcome.UNRESOLVED, settled_at="2026-11-22T10:00:00.000Z")
    wait_until(lambda: store.report([unresolved]), what="its deadline to pass")

    code, out, err = here("open")
    titles, *lines = out.splitlines()
    assert titles.split() == [
        "ORDER",
        "LANE",
        "AGE",
        "ATTEMPTS",
        "NEXT",
        "TRY",
        "STATE",
        "WHO",
        "LAST",
        "ANSWER",
    ]
    times = r"\b\d+\.\d s\b|\b1 min \d+ s\b"
    assert [re.sub(times, "T", re.sub(" {2,}", "|", line)) for line in lines] == [
        "held|risk|T|0|now|claimed|desk of held",
        "waits|strategy|T|0|due|waiting|desk of waits",
        "tried|strategy|T|4|in T|waiting, unresolved|desk of tried|http_502: Bad ?[31mGateway",
    ]
    assert (code, err) == (0, NOBODY_WORKS)

    code, out, _ = here("open", "--json")
    held, waits, tried = map(json.loads, out.splitlines())
    assert held["claimed"]
    assert held["next_try_s"] is None
    assert waits["next_try_s"] == 0
    assert 0 < tried["next_try_s"] <= 90
    assert tried["last_problem"] == {"code": "http_502", "message": "Bad \x1b[31mGateway", "http_status": 502}
    assert tried["history"] == [{"ts_ms": 1_700_000_000_000, "code": "http_502"}]
    assert tried["request"] == {"order_id": "tried"}
    assert tried["requested_by"] == ["desk of tried"]

    code, out, _ = here("status", "waits", "tried")
    _, waits, tried = out.splitlines()
    assert re.search(r"waits  - .* due +waiting$", waits)
    assert re.search(r"tried  unresolved .* 4 .* in 1 min 30 s +waiting, unresolved +http_502", tried)
    assert code == Exit.NOT_SETTLED


def test_open_says_which_workers_hold_cancels_back(here, idle_env):
    settings = RedisSettings.from_env(idle_env)
    held = WorkerShown("worker1@host", ("risk",), 2, breaker="paused")
    WorkerRegistry(connect(settings), settings).show(held)
    assert here("open") == (
        0,
        "nothing is open\n",
        "cancelctl: worker1@host holds cancels back: paused\n",
    )


def test_dead_letters_are_listed_and_put_back(here, store):
    assert here("dead") == (0, "nothing was given up\n", "")
    assert here("retry", "--all") == (0, "nothing was given up\n", "")
    store.accept([CancelRequest("gone", requested_by="desk 7")], lane=Lane.RISK, default_deadline_s=1)
    store.conclude([MakeDeadLetter(claim_one(store), PROGRESS)])

    code, out, _ = here("dead")
    titles, line = out.splitlines()
    assert titles.split() == ["ORDER", "REQUESTED", "GIVEN", "UP", "ATTEMPTS", "WHO", "LAST", "ANSWER"]
    assert re.search(r"gone .*Z .*Z +4 +desk 7 +http_502: Bad \?\[31mGateway", line)
    assert code == 0
    letter = json.loads(here("dead", "--json")[1])
    assert (letter["order_id"], letter["requested_by"], letter["attempts"]) == ("gone", ["desk 7"], 4)
    assert letter["last_problem"]["code"] == "http_502"
    assert letter["request"] == {"order_id": "gone"}

    code, out, _ = here("retry", "gone", "other")
    assert re.findall(r"^(\w+) +(.*)$", out, re.MULTILINE) == [
        ("ORDER", "NOW"),
        ("gone", "worked on again"),
        ("other", "no dead letter"),
    ]
    assert code == Exit.NOT_KNOWN_HERE
    assert store.open_cancel("gone").lane is Lane.RISK

    store.conclude([MakeDeadLetter(claim_one(store), "")])
    code, out, _ = here("retry", "--all", "--json")
    assert json.loads(out) == {"order_id": "gone", "retried": True}
    assert code == 0
    assert here("dead")[1] == "nothing was given up\n"


def test_many_who_asked_are_shortened_in_tables_only(here, order_id):
    for name in ("a", "b", "c", "d", "e"):
        here("cancel", "--no-wait", "--requested-by", name, order_id)
    assert "a, b, c and 2 more" in here("open")[1]
    assert json.loads(here("open", "--json")[1])["requested_by"] == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0.0 s"), (2.04, "2.0 s"), (59.9, "59.9 s"), (61, "1 min 01 s"), (3725, "1 h 02 min")],
)
def test_durations_are_written_for_eyes(seconds, text):
    assert duration(seconds) == text


# --- as a good citizen of a shell -------------------------------------------------------------------------


def test_a_reader_that_goes_away_ends_it_without_a_word(idle, store):
    requests = [CancelRequest(f"order-{n}", reason="x" * 500) for n in range(600)]
    store.accept(requests, lane=Lane.STRATEGY, default_deadline_s=600)
    running = idle.start("open", "--json")
    assert running.stdout.readline().startswith("{")
    running.stdout.close()
    assert running.stderr.read() == NOBODY_WORKS
    assert running.wait(WITHIN_S) == Exit.READER_GONE
    running.stderr.close()


def test_a_terminal_of_another_alphabet_does_not_end_a_table(idle, order_id):
    idle.env |= {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    idle("cancel", "--no-wait", "--requested-by", "Zoë", order_id)
    done = idle.as_process("open")
    assert "Zo\\xeb" in done.stdout
    assert done.returncode == 0


def test_what_strangers_wrote_cannot_steer_the_terminal(here):
    _, out, _ = here("status", "\x1b[2Jorder\r")
    assert "\x1b" not in out
    assert "?[2Jorder?" in out


# --- exit codes and help ----------------------------------------------------------------------------------


def test_the_help_lists_every_exit_code_in_the_order_in_which_they_win(here):
    code, out, _ = here("--help")
    assert code == 0
    listed = [int(number) for number in re.findall(r"^ +(\d+)  \w", out, re.MULTILINE)]
    assert set(listed) == set(Exit)
    assert [number for number in listed if number in exits.WORST_FIRST] == list(exits.WORST_FIRST)


def test_the_version_is_that_of_the_installation(here):
    assert here("--version") == (0, f"cancelctl {version('kalshi-cancel')}\n", "")


def test_every_outcome_has_an_exit_code_and_the_worst_wins():
    assert set(exits.EXIT_OF) == set(Outcome)
    for worse, better in itertools.combinations(exits.WORST_FIRST, 2):
        assert exits.worst({better, worse}) == worse
    assert exits.worst(set()) == Exit.SETTLED


@pytest.mark.parametrize("command", ["cancel", "status", "open", "dead", "retry", "doctor"])
def test_the_help_of_every_command_has_examples_and_offers_json(here, command):
    code, out, _ = here(command, "--help")
    assert code == 0
    assert f"examples:\n  cancelctl {command}" in out
    assert "--json" in out


# --- doctor -----------------------------------------------------------------------------------------------


def test_the_doctor_finds_a_working_service_fit(ctl):
    done = ctl("doctor", "--json")
    findings = objects(done)
    assert {finding["health"] for finding in findings} == {"ok"}
    assert set(findings[0]) == {"check", "health", "found", "advice"}
    assert (done.stderr, done.returncode) == ("", 0)


def test_the_doctor_says_what_to_do_and_exits_1_when_something_failed(ctl):
    ctl.env["REDIS_URL"] = f"redis://127.0.0.1:{free_port()}/0"
    done = ctl("doctor", "--producer")
    settings, failed, advice = done.stdout.splitlines()
    assert re.match(r"ok +settings ", settings)
    assert re.match(r"failed +redis .*refused", failed)
    assert advice.strip().startswith("-> check that Redis runs there")
    assert done.returncode == 1


def test_a_warning_of_the_doctor_is_no_failure_and_is_told_once(ctl, tmp_path):
    ctl.env["KALSHI_ORDERS_API"] = "v1"
    done = ctl.as_process("doctor")
    assert re.search(r"^warning +settings ", done.stdout, re.MULTILINE)
    assert (done.stderr, done.returncode) == ("", 0)


# --- sandbox ----------------------------------------------------------------------------------------------


def read_until(stream, pattern):
    """The lines up to the one that matches."""
    lines = []
    while not lines or not re.search(pattern, lines[-1]):
        line = stream.readline()
        assert line, f"ended before {pattern}: {lines}"
        lines.append(line)
    return lines


def test_the_sandbox_prints_the_environment_with_which_a_worker_is_fit(idle):
    running = idle.start("sandbox", "--sample", "--tier", "basic")
    try:
        lines = read_until(running.stdout, "sample-fractional")
        exports = [shlex.split(line)[1].split("=", 1) for line in lines if line.startswith("export ")]
        env = {**dict(exports), "REDIS_URL": idle.env["REDIS_URL"]}
        assert {finding.health for finding in examine(env)} == {Health.OK}
    finally:
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=WITHIN_S)
    assert (err, running.returncode) == ("", 0)
    assert not Path(env["KALSHI_PRIVATE_KEY_PATH"]).exists(), "the key was made for this run"


def test_the_sandbox_takes_a_key_of_the_caller_s_own(idle, tmp_path):
    keys = Keys(tmp_path)
    running = idle.start("sandbox", "--key-id", "mine", "--public-key", str(keys.public_path))
    try:
        *_, last = read_until(running.stdout, "^export ")
        env = {
            "REDIS_URL": idle.env["REDIS_URL"],
            "KALSHI_BASE_URL": shlex.split(last)[1].partition("=")[2],
            "KALSHI_API_KEY_ID": "mine",
            "KALSHI_PRIVATE_KEY_PATH": str(keys.private_path),
        }
        assert {finding.health for finding in examine(env)} == {Health.OK}
    finally:
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=WITHIN_S)
    assert "export" not in out
    assert (err, running.returncode) == ("", 0)


def test_the_sandbox_s_own_errors_and_help_are_passed_on(idle):
    wrong = idle.as_process("sandbox", "--tier", "golden")
    assert "invalid choice: 'golden'" in wrong.stderr
    assert wrong.returncode == Exit.USAGE
    shown = idle.as_process("sandbox", "--help")
    assert "--public-key" in shown.stdout
    assert shown.returncode == 0


def test_a_sandbox_whose_output_nobody_reads_any_more_ends(idle):
    running = idle.start("sandbox", "--sample")
    running.stdout.close()
    assert running.stderr.read() == ""
    assert running.wait(WITHIN_S) == Exit.READER_GONE
    running.stderr.close()
