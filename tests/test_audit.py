"""The audit log: what is appended fits together, what is changed shows, and all of it can be taken out."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import pwd
import re
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from contextlib import contextmanager, suppress
from decimal import Decimal

import pytest
import redis
from claims import claim_from
from crew import PATIENCE_S
from here import cancelctl
from pyarrow import parquet

from kalshi_cancel.cli import exports
from kalshi_cancel.cli.exits import Exit
from kalshi_cancel.client import CancelClient
from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store import audit
from kalshi_cancel.store.audit import AuditLog, place
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.pending import MakeDeadLetter
from kalshi_cancel.store.scripts import connect
from trials.stack import ROOT, wait_until

FORMATS = ("jsonl", "csv", "parquet")
DAY_S = 86_400
MANY = 1_000_000


@pytest.fixture
def env(server_of_each_make):
    return {"REDIS_URL": server_of_each_make.url, "KALSHI_KEY_PREFIX": f"t{uuid.uuid4().hex[:8]}"}


@pytest.fixture
def client(server_of_each_make):
    with server_of_each_make.client() as client:
        yield client


@pytest.fixture
def key(env):
    return env["KALSHI_KEY_PREFIX"] + ":audit"


@pytest.fixture
def audit_log(env):
    return open_audit_log(env)


def open_audit_log(env):
    settings = RedisSettings.from_env(env)
    return AuditLog(connect(settings), settings)


def fill(audit_log, number, **fields):
    """So many entries, of which each says which one it is."""
    for n in range(number):
        audit_log.append("operator", {"n": n, **fields})


def backdate(client, key, age_s):
    """The same audit log, as if it had been written that much earlier."""
    entries = client.xrange(key)
    client.delete(key)
    for entry_id, fields in entries:
        ms, seq = place(entry_id)
        client.xadd(key, fields, id=f"{ms - int(age_s * 1000)}-{seq}")


@pytest.fixture
def here(env):
    """Runs a command in this process; its exit code, and what it printed."""

    def run(*arguments):
        ran = cancelctl(*arguments, env=env)
        return ran.returncode, ran.stdout, ran.stderr

    return run


# -- appending


def test_an_entry_is_hashed_over_the_one_before_it_and_says_when_it_was(audit_log, client, key):
    before_ms = time.time() * 1000
    audit_log.append("operator", {"action": "retry", "who": "Zoë"})
    audit_log.append("mass", {})
    (first_id, first), (_, second) = client.xrange(key)
    assert first["hash"] == hashlib.sha1(b"operator" + first["body"].encode()).hexdigest()
    assert second["hash"] == hashlib.sha1((first["hash"] + "mass" + second["body"]).encode()).hexdigest()
    assert client.get(f"{key}:head") == second["hash"]
    body = json.loads(first["body"])
    assert {**body, "at": 0} == {"at": 0, "action": "retry", "who": "Zoë"}
    assert before_ms - 5 <= body["at"] <= place(first_id)[0] + 5
    assert list(json.loads(second["body"])) == ["at"]


def test_entries_of_many_at_once_make_one_chain(audit_log, env):
    writers = [threading.Thread(target=fill, args=(open_audit_log(env), 200)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    verdict = audit_log.verify()
    assert (verdict.entries, verdict.problem, verdict.trimmed) == (800, None, False)


def test_without_an_audit_log_nothing_is_written(env, client, key):
    fill(open_audit_log({**env, "KALSHI_AUDIT": "off"}), 3)
    assert client.keys(f"{key}*") == []


# -- verifying


def test_an_empty_audit_log_and_a_long_one_fit(audit_log, client, key, monkeypatch):
    monkeypatch.setattr(audit, "READ_AT_ONCE", 7)  # a whole number of pages, and one more
    for entries in (0, 7, 14, 15):
        fill(audit_log, entries - client.xlen(key))
        verdict = audit_log.verify()
        assert (verdict.entries, verdict.problem) == (entries, None)
        assert verdict.head == (client.get(f"{key}:head") or "")


def rewritten(client, key, change):
    """The audit log after its list of (id, fields) was changed by somebody who knows no better."""
    entries = client.xrange(key)
    changed = change(entries) or entries
    client.delete(key)
    for entry_id, fields in changed:
        client.xadd(key, fields, id=entry_id)


def swapped(entries):
    (first_id, first), (second_id, second) = entries[4:6]
    entries[4:6] = [(first_id, second), (second_id, first)]


@pytest.mark.parametrize(
    ("change", "fitting"),
    [
        (lambda entries: entries[5][1].update(body=entries[5][1]["body"].replace("5}", "6}")), 5),
        (lambda entries: entries[5][1].update(kind="mass"), 5),
        (lambda entries: entries[5][1].update(hash="0" * 40), 5),
        (lambda entries: entries[5][1].pop("body") and None, 5),
        (lambda entries: entries[:5] + entries[6:], 5),
        (lambda entries: entries[1:], 0),
        (swapped, 4),
        (lambda entries: [*entries[:3], (entries[3][0], entries[2][1]), *entries[4:]], 3),
    ],
    ids=["body", "kind", "hash", "field", "gap", "beginning", "order", "repetition"],
)
def test_an_edit_or_a_gap_is_found_where_it_is(audit_log, client, key, here, change, fitting):
    fill(audit_log, 10)
    rewritten(client, key, change)
    ids = [entry_id for entry_id, _ in client.xrange(key)]
    verdict = audit_log.verify()
    assert verdict.entries == fitting
    assert verdict.problem.startswith(f"{ids[fitting]} does not fit")
    code, out, err = here("audit", "verify")
    assert (code, out) == (Exit.REFUSED, "")
    assert err.startswith(f"cancelctl: after {fitting} intact entries, {ids[fitting]} does not fit")


@pytest.mark.parametrize("gone", [1, 3, 10])
def test_an_end_that_is_missing_is_found(audit_log, client, key, gone):
    fill(audit_log, 10)
    client.xdel(key, *[entry_id for entry_id, _ in client.xrange(key)[-gone:]])
    verdict = audit_log.verify()
    assert (verdict.entries, verdict.problem) == (
        10 - gone,
        "the end is missing: what was appended last is not there",
    )


def test_what_is_trimmed_by_hand_shows(audit_log, client, key):
    fill(audit_log, 10)
    client.xtrim(key, maxlen=4, approximate=False)
    assert audit_log.verify().entries == 0
    assert "does not fit" in audit_log.verify().problem


def test_the_verdict_is_told_for_eyes_and_for_machines(audit_log, client, key, here):
    fill(audit_log, 3)
    head = client.get(f"{key}:head")
    assert here("audit", "verify") == (0, f"intact entries: 3; the last hash is {head}\n", "")
    audit_log.trim(max_age_s=DAY_S, max_entries=2)
    _, out, _ = here("audit", "verify", "--json")
    told = {"entries": 2, "trimmed": True, "head": head, "problem": None, "gaps": 0, "missing": 0}
    assert json.loads(out) == told
    assert "2, after older ones that were trimmed;" in here("audit", "verify")[1]


# -- trimming


def test_what_is_too_many_or_too_old_goes_and_the_rest_fits(audit_log, client, key, monkeypatch):
    monkeypatch.setattr(audit, "TRIM_AT_ONCE", 4)
    fill(audit_log, 30)
    backdate(client, key, 3600)
    fill(audit_log, 20)
    assert audit_log.trim(max_age_s=7200, max_entries=50) == 0
    assert audit_log.trim(max_age_s=7200, max_entries=41) == 9
    assert (client.xlen(key), audit_log.verify().problem) == (41, None)
    assert audit_log.trim(max_age_s=1800, max_entries=41) == 21
    assert (client.xlen(key), audit_log.verify().problem, audit_log.verify().trimmed) == (20, None, True)
    assert json.loads(client.xrange(key)[0][1]["body"])["n"] == 0
    backdate(client, key, 3600)
    assert audit_log.trim(max_age_s=1800, max_entries=41) == 20
    assert audit_log.verify() == audit.Verdict(0, trimmed=True, head=client.get(f"{key}:head"), problem=None)
    fill(audit_log, 1)
    assert (audit_log.verify().entries, audit_log.verify().problem) == (1, None)


def test_a_walk_among_writers_and_trimmers_finds_nothing_wrong(audit_log, env, monkeypatch):
    monkeypatch.setattr(audit, "READ_AT_ONCE", 5)
    over = threading.Event()

    def write():
        mine = open_audit_log(env)
        while not over.is_set():
            fill(mine, 5)

    def trim():
        mine = open_audit_log(env)
        for keep in itertools.cycle((40, 3, 0, 20)):
            if over.is_set():
                return
            mine.trim(max_age_s=DAY_S, max_entries=keep)

    others = [threading.Thread(target=each) for each in (write, write, trim)]
    for other in others:
        other.start()
    try:
        verdicts = [audit_log.verify() for _ in range(300)]
    finally:
        over.set()
        for other in others:
            other.join()
    assert {verdict.problem for verdict in verdicts} == {None}
    assert sum(verdict.entries for verdict in verdicts) > 0
    assert audit_log.verify().problem is None


def warnings_of(caplog):
    found = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    caplog.clear()
    return found


def test_it_is_warned_before_anything_unexported_is_trimmed_and_not_again_and_again(
    audit_log, client, key, caplog
):
    fill(audit_log, 80)
    assert audit_log.trim(max_age_s=DAY_S, max_entries=100) == 0
    assert warnings_of(caplog) == []
    fill(audit_log, 10)
    [first_id, *_] = [entry_id for entry_id, _ in client.xrange(key)]
    assert audit_log.trim(max_age_s=DAY_S, max_entries=100) == 0
    [warning] = warnings_of(caplog)
    assert (
        warning
        == f"event=audit_log_not_exported audit log not exported, about to be trimmed from_id={first_id}"
    )
    audit_log.trim(max_age_s=DAY_S, max_entries=100)
    assert warnings_of(caplog) == []


def test_what_is_old_is_warned_of_too(audit_log, client, key, caplog):
    fill(audit_log, 3)
    backdate(client, key, 3000)
    audit_log.trim(max_age_s=3600, max_entries=MANY)
    assert warnings_of(caplog) == []
    backdate(client, key, 300)
    assert audit_log.trim(max_age_s=3600, max_entries=MANY) == 0
    assert len(warnings_of(caplog)) == 1


def test_limits_that_were_lowered_are_warned_of_before_they_trim(audit_log, client, key, caplog):
    fill(audit_log, 10)
    assert audit_log.trim(max_age_s=DAY_S, max_entries=4) == 6
    assert len(warnings_of(caplog)) == 1


def test_what_is_exported_goes_without_a_word(audit_log, client, key, caplog, here, tmp_path):
    fill(audit_log, 95)
    assert here("audit", "export", "--out", str(tmp_path / "x"))[0] == 0
    assert audit_log.trim(max_age_s=DAY_S, max_entries=50) == 45
    assert warnings_of(caplog) == []
    fill(audit_log, 1)
    audit_log.trim(max_age_s=DAY_S, max_entries=51)
    assert warnings_of(caplog) == [], "the oldest are exported: there is time"


# -- reading


def numbers(entries):
    return [each.fields()["n"] for each in entries]


def test_reading_is_from_a_time_before_a_time_after_an_entry_in_order_and_ends(
    audit_log, client, key, monkeypatch
):
    monkeypatch.setattr(audit, "READ_AT_ONCE", 3)
    assert list(audit_log.read()) == []
    fill(audit_log, 4)
    ids = ("999700-0", "999800-0", "999900-0", "1000000-1")
    rewritten(
        client, key, lambda entries: [(new, fields) for new, (_, fields) in zip(ids, entries, strict=True)]
    )
    assert numbers(audit_log.read()) == [0, 1, 2, 3]
    assert numbers(audit_log.read(since_ms=999_800)) == [1, 2, 3]
    assert numbers(audit_log.read(since_ms=999_800, until_ms=999_900)) == [1]
    assert numbers(audit_log.read(until_ms=1_000_000)) == [0, 1, 2]
    assert numbers(audit_log.read(until_ms=1_000_001)) == [0, 1, 2, 3]
    assert numbers(audit_log.read(after_id="999900-0")) == [3]
    assert numbers(audit_log.read(after_id="1000000-1")) == []


def test_reading_ends_at_what_was_last_when_it_began(audit_log, monkeypatch):
    monkeypatch.setattr(audit, "READ_AT_ONCE", 2)
    fill(audit_log, 5)
    seen = 0
    for _ in audit_log.read():
        fill(audit_log, 1)
        seen += 1
    assert seen == 5


# -- exporting


def rows(path, kind):
    """What somebody who has none of our code reads."""
    if kind == "parquet":
        return parquet.read_table(path).to_pylist()
    with path.open(encoding="utf-8", newline="") as file:
        if kind == "csv":
            return list(csv.DictReader(file))
        return [{**row, "body": json.dumps(row["body"])} for row in map(json.loads, file)]


def expected(client, key):
    return [
        (entry_id, fields["kind"], fields["hash"], json.loads(fields["body"]))
        for entry_id, fields in client.xrange(key)
    ]


def exported(path, kind):
    return [(row["id"], row["kind"], row["hash"], json.loads(row["body"])) for row in rows(path, kind)]


NASTY = {"why": 'said "no", \n then\r\n=1+1 \x00 Zoë', "who": "\\"}


@pytest.mark.parametrize("kind", FORMATS)
def test_an_export_holds_every_entry_and_is_gone_on_with_where_it_ends(
    audit_log, client, key, here, tmp_path, kind
):
    path = tmp_path / "audit"
    command = ("audit", "export", "--format", kind, "--out", str(path), "--resume")
    assert here(*command) == (0, "", "cancelctl: there was nothing to export\n")
    for _ in range(3):
        fill(audit_log, 700, **NASTY)
        code, out, err = here(*command)
        last_id = client.xrevrange(key, count=1)[0][0]
        assert (code, out, err) == (0, "", f"cancelctl: exported up to {last_id}\n")
        assert exported(path, kind) == expected(client, key)
        assert audit_log.exported() == last_id
        here(*command)  # again, with nothing new
        assert exported(path, kind) == expected(client, key)
    assert [each.name for each in tmp_path.iterdir()] == ["audit"]
    [first, *_] = rows(path, kind)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["at"])


@pytest.mark.parametrize("kind", FORMATS)
def test_an_export_to_stdout_is_the_same(audit_log, client, key, env, tmp_path, kind):
    fill(audit_log, 1200, **NASTY)
    done = subprocess.run(
        [sys.executable, "-m", "kalshi_cancel.cli", "audit", "export", "--format", kind],
        env={"PATH": os.environ["PATH"], **env},
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=True,
    )
    (tmp_path / "piped").write_bytes(done.stdout)
    assert exported(tmp_path / "piped", kind) == expected(client, key)


def test_the_hashes_of_an_export_can_be_checked_by_anybody(audit_log, here, tmp_path):
    fill(audit_log, 20, **NASTY)
    for kind in FORMATS:
        path = tmp_path / kind
        here("audit", "export", "--format", kind, "--out", str(path))
        before = ""
        if kind == "jsonl":
            lines = path.read_text("utf-8").splitlines()
            found = [{**json.loads(line), "body": line.partition(',"body":')[2][:-1]} for line in lines]
        else:
            found = rows(path, kind)
        for row in found:
            assert row["hash"] == hashlib.sha1((before + row["kind"] + row["body"]).encode()).hexdigest()
            before = row["hash"]
        assert len(found) == 20


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("kept", [0, 1, 40, -1, -30])
def test_a_file_that_was_cut_off_anywhere_is_completed(
    audit_log, client, key, here, tmp_path, kind, kept, monkeypatch
):
    monkeypatch.setattr(exports, "_TAIL_BYTES", 16)
    fill(audit_log, 30)
    path = tmp_path / "audit"
    here("audit", "export", "--format", kind, "--out", str(path))
    path.write_bytes(path.read_bytes()[:kept])
    assert here("audit", "export", "--format", kind, "--out", str(path), "--resume")[0] == 0
    assert exported(path, kind) == expected(client, key)


@pytest.mark.parametrize("kind", FORMATS)
def test_an_export_that_is_killed_is_gone_on_with(audit_log, client, key, env, here, tmp_path, kind):
    fill(
        audit_log, 6000, filler="x" * 1000
    )  # three groups of rows: the first is written long before the last
    path = tmp_path / "audit"
    command = ("audit", "export", "--format", kind, "--out", str(path), "--resume")
    growing = path if kind != "parquet" else path.with_name("audit.partial")
    running = subprocess.Popen(
        [sys.executable, "-m", "kalshi_cancel.cli", *command],
        env={"PATH": os.environ["PATH"], **env},
        cwd=ROOT,
    )

    def has_grown():
        with suppress(FileNotFoundError):  # by now it may be in its place
            return growing.stat().st_size > 1000
        return path.exists()

    wait_until(has_grown, what="the file to grow")
    running.kill()
    running.wait()
    assert here(*command)[0] == 0
    assert exported(path, kind) == expected(client, key)
    assert audit_log.exported() == client.xrevrange(key, count=1)[0][0]


def test_a_part_that_leaves_a_gap_does_not_count_as_exported(audit_log, client, key, here, tmp_path):
    fill(audit_log, 4)
    rewritten(
        client, key, lambda entries: [(f"{1000 * n}-1", fields) for n, (_, fields) in enumerate(entries, 1)]
    )

    def export(name, *arguments):
        return here("audit", "export", "--out", str(tmp_path / name), *arguments)

    code, _, err = export("late", "--since", "1970-01-01T00:00:02")
    assert (code, audit_log.exported()) == (0, "")
    assert "older entries that are not exported yet are left out" in err
    assert numbers_in(tmp_path / "late") == [1, 2, 3]
    assert (export("early", "--until", "1970-01-01T00:00:02.500Z")[0], audit_log.exported()) == (0, "2000-1")
    assert (export("more", "--since", "1970-01-01T01:00:03+01:00")[0], audit_log.exported()) == (0, "4000-1")
    assert numbers_in(tmp_path / "more") == [2, 3]
    export("again", "--until", "1970-01-01T00:00:02")
    assert audit_log.exported() == "4000-1", "it does not go back"


def numbers_in(path):
    return [json.loads(line)["body"]["n"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_no_export_in_this_format_is_left_alone(audit_log, here, tmp_path, kind):
    fill(audit_log, 1)
    path = tmp_path / "notes"
    for text in ("my notes\n", "id,notes\n1-1,x\n", '{"id":1}\n'):
        path.write_text(text)
        code, _, err = here("audit", "export", "--format", kind, "--out", str(path), "--resume")
        assert (code, err) == (Exit.USAGE, f"cancelctl: {path} is no export in this format\n")
        assert path.read_text() == text
    code, _, err = here("audit", "export", "--format", kind, "--out", str(path))
    assert code == Exit.USAGE
    assert "exists already: use --resume to continue it" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "--resume"], "--resume needs --out"),
        (["export", "--since", "yesterday"], "expected a time like 2026-11-22T10:00:00Z, got 'yesterday'"),
        (["export", "--out", "/nowhere/x"], "/nowhere/x: No such file or directory"),
        (["export", "--format", "parquet", "--out", "/nowhere/x"], "/nowhere/x: No such file or directory"),
        (["export", "--format", "xls"], "invalid choice: 'xls'"),
        ([], "required: verify | export"),
    ],
)
def test_wrong_usage_says_what_was_expected(here, audit_log, arguments, words):
    fill(audit_log, 1)
    code, out, err = here("audit", *arguments)
    assert (code, out) == (Exit.USAGE, "")
    assert words in err.splitlines()[-1]


def test_without_pyarrow_it_says_what_to_install(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = here("audit", "export", "--format", "parquet", "--out", "x")
    assert (code, err) == (
        Exit.USAGE,
        "cancelctl: parquet needs pyarrow: pip install 'kalshi-cancel[parquet]'\n",
    )


def test_a_reader_that_goes_away_ends_an_export_which_then_does_not_count(audit_log, env):
    fill(audit_log, 1000, filler="x" * 3000)
    running = subprocess.Popen(
        [sys.executable, "-m", "kalshi_cancel.cli", "audit", "export"],
        env={"PATH": os.environ["PATH"], **env},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    running.stdout.readline()
    running.stdout.close()
    assert running.stderr.read() == b""
    assert running.wait(60) == Exit.READER_GONE
    running.stderr.close()
    assert audit_log.exported() == ""


@pytest.mark.parametrize("kind", FORMATS)
def test_what_somebody_has_spoilt_is_exported_too(audit_log, client, key, here, tmp_path, kind):
    fill(audit_log, 1)
    client.xadd(key, {"kind": "x\n", "body": "no\nJSON"})
    client.xadd(key, {b"kind": b"x", b"body": b"\xff", b"hash": b"y"})
    client.xadd(key, {"other": "field"})
    path = tmp_path / "audit"
    assert here("audit", "export", "--format", kind, "--out", str(path))[0] == 0
    assert [row["kind"].strip() for row in rows(path, kind)] == ["operator", "x", "x", ""]
    fill(audit_log, 1)
    assert here("audit", "export", "--format", kind, "--out", str(path), "--resume")[0] == 0
    assert len(rows(path, kind)) == 5


# -- the history of one order

CALL = {
    "operation": "batch",
    "orders": 12,
    "status": 200,
    "code": None,
    "ms": 12.34,
    "tokens": 24,
    "bucket": "write",
}


def test_the_history_of_an_order_is_told_line_by_line_and_nothing_of_others(audit_log, here):
    def request(*orders, lane="strategy"):
        audit_log.append("request", {"lane": lane, "orders": list(orders)})

    request(
        {"order_id": "o-1", "requested_by": "mm-btc", "reason": "quote \x1b[2Jpulled"}, {"order_id": "o-2"}
    )
    request({"order_id": "o-11", "requested_by": "another"})
    request({"order_id": "o-1", "request_id": "m-1", "reason": "limit"}, lane="risk")
    lost = {
        **CALL,
        "operation": "cancel",
        "orders": ["o-1"],
        "status": None,
        "code": "timeout",
        "tokens": 2.0,
    }
    other = {**CALL, "operation": "cancel", "orders": ["o-2"]}
    audit_log.append(
        "work", {"worker": "h:1", "calls": [lost, other], "orders": {"o-1": ["open", 1500, "timeout"]}}
    )
    audit_log.append("lost", {"orders": ["o-1"]})
    audit_log.append("unresolved", {"orders": ["o-1", "o-2"]})
    audit_log.append("work", {"worker": "h:2", "calls": [CALL], "orders": {"o-1": ["dead", "timeout"]}})
    audit_log.append("operator", {"action": "retry", "who": "ann", "why": "back", "orders": ["o-1"]})
    audit_log.append("mass", {"request_id": "m-1", "step": "accepted", "scope": {"order_ids": ["o-1"]}})
    audit_log.append("mass", {"request_id": "m-1", "step": "planned", "orders": 1})
    read = {**CALL, "operation": "read_back", "orders": 1, "tokens": 2, "bucket": "read"}
    audit_log.append(
        "work",
        {"calls": [read], "orders": {"o-1": ["settled", "canceled", "7.00", 3], "o-2": ["open", 0, None]}},
    )
    audit_log.append("work", {"calls": [], "orders": {"o-1": "spoilt"}})
    code, out, err = here("history", "o-1")
    stamps, told = zip(*(line.split("  ", 1) for line in out.splitlines()), strict=True)
    assert list(told) == [
        "asked for by mm-btc, strategy lane: quote ?[2Jpulled",
        "asked for by somebody without a name, risk lane (request m-1): limit",
        "cancel by h:1: no answer (timeout) in 12.3 ms, 2 tokens of write",
        "not settled yet (timeout): due again in 1.5 s",
        "this sender had lost the cancel (to another, or to an earlier try): ignore the line before",
        "its deadline passed without proof: waiters are told unresolved, and workers keep trying",
        "batch of 12 by h:2: 200 in 12.3 ms, 24 tokens of write",
        "given up (timeout): a dead letter",
        "retry by ann: back",
        "mass cancel m-1, which names it: accepted",
        "read back: 200 in 12.3 ms, 2 tokens of read",
        "settled: canceled, 7.00 contracts removed, attempts: 3",
        "an entry of kind work that cannot be read",
    ]
    assert list(stamps) == sorted(stamps)
    assert (code, err) == (0, "")
    first, *_ = map(json.loads, here("history", "--json", "o-1")[1].splitlines())
    assert set(first) == {"id", "at", "kind", "lines"}
    assert (first["kind"], first["lines"][0][:11]) == ("request", "asked for b")


def test_an_order_that_the_audit_log_does_not_know_has_an_exit_code_of_its_own(here):
    assert here("history", "o") == (
        Exit.NOT_KNOWN_HERE,
        "",
        "cancelctl: the audit log has no entry about o\n",
    )


# -- what operators do


def test_a_retry_is_noted_with_who_and_why(audit_log, env, here):
    settings = RedisSettings.from_env(env)
    store = CancelStore(connect(settings), settings)
    for order_id in ("a", "b"):
        store.accept([CancelRequest(order_id)], lane=Lane.RISK, default_deadline_s=1)
    claimed = claim_from(store, tuple(Lane), at_most=2, lease_s=60, exchange_ms=None)
    store.conclude([MakeDeadLetter(entry, "") for entry in claimed.entries])
    assert (
        here("retry", "a", "nobody", "--by", "ann", "--why", "the exchange is back")[0] == Exit.NOT_KNOWN_HERE
    )
    assert here("retry", "--all")[0] == 0
    first, second = [each.fields() for each in audit_log.read() if each.kind == "operator"]
    assert {**first, "at": 0} == {
        "at": 0,
        "action": "retry",
        "who": "ann",
        "why": "the exchange is back",
        "orders": ["a", "nobody"],
    }
    login = pwd.getpwuid(os.getuid()).pw_name
    assert (second["who"], second["why"], second["orders"]) == (login, None, ["b"])
    assert "retry by ann: the exchange is back" in here("history", "a")[1]


# -- through real workers


def audit_log_of(client: CancelClient):
    return client._audit_log


def steps(client, request_id):
    bodies = [each.fields() for each in audit_log_of(client).read() if each.kind == "mass"]
    return [body for body in bodies if body["request_id"] == request_id]


def test_every_step_of_a_mass_cancel_is_noted_with_who_and_why(crew):
    with crew.apart() as apart:
        crew.place(5)
        apart.start()
        pending = apart.client.mass_cancel({"everything": True}, requested_by="ann", reason="limit breached")
        report = pending.result(timeout=PATIENCE_S)
        noted = steps(apart.client, pending.request_id)
        assert [body["step"] for body in noted] == ["accepted", "entered", "planned", "finished"]
        accepted, entered, planned, finished = noted
        assert (accepted["requested_by"], accepted["reason"]) == ("ann", "limit breached")
        assert accepted["scope"]["everything"] is True
        assert (planned["orders"], entered["orders"], finished["orders_affected"]) == (5, 5, 5)
        assert (finished["flat"], finished["contracts_canceled"]) == (True, report["contracts_canceled"])
        assert finished["flat_listing"] == report["flat_listing"]
        assert all(each["at"] for each in noted)
        dry = apart.client.mass_cancel({"everything": True}, dry_run=True)
        dry.result(timeout=PATIENCE_S)
        assert [body["step"] for body in steps(apart.client, dry.request_id)] == [
            "accepted",
            "planned",
            "finished",
        ]
        assert audit_log_of(apart.client).verify().problem is None


def test_orders_that_come_meanwhile_are_a_step_of_their_own(crew):
    with crew.apart() as apart:
        crew.place(1)
        apart.start()
        crew.control.configure(latency_s=0.2)
        pending = apart.client.mass_cancel({"everything": True})
        wait_until(lambda: apart.client.mass_plan(pending.request_id), what="the plan")
        crew.place(2)
        assert pending.result(timeout=PATIENCE_S)["orders_affected"] == 3
        noted = steps(apart.client, pending.request_id)
        assert [body["step"] for body in noted][1:3] == ["entered", "planned"]
        late = [body for body in noted[3:] if body["step"] == "entered"]
        assert [body["orders"] for body in late] == [2]
        assert noted[-1]["step"] == "finished"


def test_a_worker_trims_the_audit_log(crew):
    with crew.apart(KALSHI_AUDIT_MAX_ENTRIES="10") as apart:
        audit_log = audit_log_of(apart.client)
        fill(audit_log, 50)
        [worker] = apart.start()
        wait_until(lambda: audit_log.verify().entries == 10, what="the audit log is trimmed")
        assert "event=audit_log_not_exported" in worker.log_text()


def run(crew, apart, *arguments):
    """What a command prints, on the database of these workers."""
    database = apart.client._server.connection_pool.connection_kwargs["db"]
    url = crew.redis.url.removesuffix("/0") + f"/{database}"
    ran = cancelctl(*arguments, env={"REDIS_URL": url})
    assert ran.returncode == Exit.SETTLED, ran.stderr
    return ran.stdout


def test_the_history_of_a_real_cancel_has_who_why_each_call_and_the_outcome(crew):
    with crew.apart() as apart:
        apart.start()
        [order_id] = crew.place(1, count="7.00")
        crew.control.fault("drop_after", order_id=order_id, times=1)
        result = apart.client.cancel(order_id, requested_by="ann", reason="drill").result(timeout=PATIENCE_S)
        assert result.confirmed_by == "read_back"
        wait_until(lambda: apart.client.status(order_id).open is None, what="it is settled")
        told = [line.split("  ", 1)[1] for line in run(crew, apart, "history", order_id).splitlines()]
    print(*told, sep="\n")
    assert told[0] == "asked for by ann, strategy lane: drill"
    assert re.match(r"cancel( by \S+)?: no answer in \d+\.\d ms, 2 tokens of write$", told[1])
    assert any(re.match(r"read back( by \S+)?: 200 in \d+\.\d ms, 2 tokens of read$", line) for line in told)
    assert result.reduced_by in {None, Decimal("7.00")}
    removed = "" if result.reduced_by is None else "7.00 contracts removed, "
    assert told[-1] == f"settled: canceled, {removed}attempts: {result.attempts}"


def test_the_audit_log_of_a_mass_cancel_adds_up_to_its_report_in_every_format(crew, tmp_path):
    with crew.apart(workers=2, KALSHI_BATCH_MOST="50") as apart:
        placed = crew.place(1000)
        for order_id in placed[:10]:
            crew.control.fill(order_id, "3.00")
        crew.control.fault("drop_after", order_id=placed[20], times=1)
        apart.start()
        pending = apart.client.mass_cancel({"everything": True}, requested_by="ann", reason="drill")
        report = pending.result(timeout=PATIENCE_S)
        assert report["flat"]
        assert audit_log_of(apart.client).verify().problem is None
        for kind in FORMATS:
            path = tmp_path / kind
            run(crew, apart, "audit", "export", "--format", kind, "--out", str(path))
            adds_up(rows(path, kind), report, set(placed))


def adds_up(entries, report, placed):
    """What the audit log's rows say of each order, against the report."""
    asked, conclusions, lost = Counter(), {}, set()
    for entry in entries:
        body = json.loads(entry["body"])
        if entry["kind"] == "request":
            for order in body["orders"]:
                assert (order["requested_by"], order["reason"]) == ("ann", "drill")
                asked[order["order_id"]] += 1
        elif entry["kind"] == "work":
            conclusions |= {each: end for each, end in body["orders"].items() if end[0] == "settled"}
        elif entry["kind"] == "lost":
            lost |= set(body["orders"])
    assert set(asked) == placed
    assert set(conclusions) == placed
    assert lost == set()
    canceled = {
        each: conclusion[2] for each, conclusion in conclusions.items() if conclusion[1] == "canceled"
    }
    assert canceled == {each["order_id"]: each["reduced_by"] for each in report["affected"]}
    proven = [Decimal(count) for count in canceled.values() if count is not None]
    assert sum(proven) == Decimal(report["contracts_canceled"])
    assert len(placed) - len(canceled) == len(report["not_affected"])


# -- what only observes decides nothing


AUDIT_KEY = "kalshi-cancel:audit"
FULL = "18446744073709551615-18446744073709551615"
ALL_BUT_THE_AUDIT_LOG = ("resetkeys", "~kalshi-cancel:[^a]*", "~kalshi-cancel:a[^u]*", "~[^k]*")
# How the audit log cannot be written, and how an operator mends it.
BROKEN = {
    "no permission": (
        lambda server: server.execute_command("ACL", "SETUSER", "default", *ALL_BUT_THE_AUDIT_LOG),
        lambda server: server.execute_command("ACL", "SETUSER", "default", "allkeys"),
    ),
    "a stream at its highest id": (
        lambda server: server.xadd(AUDIT_KEY, {"kind": "x", "body": "{}", "hash": "x"}, id=FULL),
        lambda server: server.delete(AUDIT_KEY, f"{AUDIT_KEY}:head"),
    ),
    "a text instead": (
        lambda server: server.set(AUDIT_KEY, "what is this?"),
        lambda server: server.delete(AUDIT_KEY, f"{AUDIT_KEY}:head"),
    ),
    "a list instead of the last hash": (
        lambda server: (server.delete(f"{AUDIT_KEY}:head"), server.rpush(f"{AUDIT_KEY}:head", "a")),
        lambda server: server.delete(AUDIT_KEY, f"{AUDIT_KEY}:head"),
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_an_audit_log_that_cannot_be_written_keeps_nobody_from_anything_and_tells_of_its_gap(crew, what):
    spoil, mend = BROKEN[what]
    with crew.apart(KALSHI_CANCEL_MAX_AGE_S="1") as apart, connected(apart.url) as server:
        order_ids, swept, [late, given_up] = crew.place(20), crew.place(20), crew.place(2)
        spoil(server)
        try:
            [worker] = apart.start()
            results = apart.client.cancel_many(order_ids).results(timeout=PATIENCE_S)
            assert {result.outcome for result in results} == {"canceled"}
            report = apart.client.mass_cancel({"order_ids": swept}).result(timeout=PATIENCE_S)
            assert (report["flat"], report["orders_affected"]) == (True, 20)
            for order_id in (late, given_up):
                crew.control.fault("http_500", order_id=order_id)
                told = apart.client.cancel(order_id, deadline_s=0.3).result(timeout=PATIENCE_S)
                assert told.outcome == "unresolved"
            given = lambda: list(apart.client.dead_letters())  # noqa: E731 - a condition
            wait_until(lambda: len(given()) == 2, within_s=PATIENCE_S, what="given up")
            crew.control.clear_faults()
            assert apart.client.retry([given_up]) == [given_up]
            assert apart.client.cancel(late).result(timeout=PATIENCE_S).outcome == "canceled"
            said = lambda: "event=audit_log_incomplete" in worker.log_text()  # noqa: E731 - a condition
            wait_until(said, within_s=PATIENCE_S, what="the worker says so")
            assert "event=lease_lost" not in worker.log_text()
            wait_until(lambda: crew.effective().total() == 42, within_s=PATIENCE_S, what="each is done once")
        finally:
            mend(server)
        gap = lambda: [each for each in audit_log_of(apart.client).read() if each.kind == "gap"]  # noqa: E731
        [marked] = wait_until(gap, within_s=PATIENCE_S, what="the audit log tells of it")
        missed = int(server.hget("kalshi-cancel:counts", "audit_missed"))
        assert marked.missed == missed > 3
        assert marked.fields()["why"]
        [more] = crew.place()
        assert apart.client.cancel(more).result(timeout=PATIENCE_S).outcome == "canceled"
        verdict = audit_log_of(apart.client).verify()
        assert (verdict.problem, verdict.gaps, verdict.missing) == (None, 1, missed)
        told = run(crew, apart, "audit", "verify")
        assert told.endswith(f"missing: {missed}, which could not be written; gaps: 1\n")


@contextmanager
def connected(url):
    with redis.Redis.from_url(url, decode_responses=True) as server:
        yield server


def test_what_is_missing_is_told_before_the_audit_log_can_tell_of_it(audit_log, client, key, here):
    fill(audit_log, 2)
    client.rename(key, f"{key}-away")
    client.set(key, "what is this?")
    fill(audit_log, 3)
    client.delete(key)
    client.rename(f"{key}-away", key)
    verdict = audit_log.verify()
    assert (verdict.entries, verdict.problem, verdict.gaps, verdict.missing) == (2, None, 0, 3)
    fill(audit_log, 1)
    verdict = audit_log.verify()
    assert (verdict.entries, verdict.problem, verdict.gaps, verdict.missing) == (4, None, 1, 3)
    assert here("audit", "verify")[1].endswith("missing: 3, which could not be written; gaps: 1\n")
