"""Each key in Redis is in the table, of the type that stands there, and has a life or an owner."""

from __future__ import annotations

import re
import time
import uuid

import pytest
from celery import Celery
from crew import PATIENCE_S, ids

from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store.cancels import DEAD_LIFE_DAYS, CancelStore
from kalshi_cancel.store.keys import KEYS, PENDING, SCRIPTS_HEADING, Keys, page
from kalshi_cancel.store.scripts import connect
from trials.stack import ROOT, wait_until

PREFIX = "kalshi-cancel"
CELERYS = ("cancels", "risk", "_kombu.")
PAGE = ROOT / "docs/reference/redis-keys.md"
LUA_KEY = re.compile(r"prefix \.\. '((?::[a-z_]+)+)")
SPELLED_IN_PYTHON = re.compile(r"prefix\}:[a-z{]")
# A command of Lua that names fields of a hash: gather('HSET', entry, 'field', ...), fields(entry, 'field',
# ...).
LUA_FIELDS = re.compile(r"(?:'(?:HSET|HDEL)', entry|fields\(entry)((?:, [^,()]*)+)")
# What a row of the last table says that a script writes to a pending cancel.
WRITES = re.compile(r"`(?:HSET|HDEL) P:pending:\{order_id\} ([\w,]+)`")


def fits(row, key):
    """Whether a key with this prefix, P or R, is one of these."""
    parts = re.split(r"\{[^}]*\}", row.name)
    return re.fullmatch(".+".join(map(re.escape, parts)), key, re.DOTALL) is not None


def letters(row):
    """How much of its name is the same for all."""
    return len(re.sub(r"\{[^}]*\}", "", row.name))


def has_life(row):
    """Whether it ends by itself; in italics, it has an owner."""
    return not re.fullmatch(r"\*.+\*", row.ends)


def named(key, results="celery-task-meta-"):
    """The row that a key of Redis belongs to, the most special one; None: the table does not name it."""
    for long, short in ((f"{PREFIX}:", "P:"), (results, "R:")):
        if key.startswith(long):
            fitting = [row for row in KEYS if fits(row, short + key.removeprefix(long))]
            return max(fitting, key=letters, default=None)
    return None


def lua_files():
    return sorted((ROOT / "kalshi_cancel/store/lua").glob("*.lua"))


def test_every_key_that_lua_spells_is_in_the_table():
    spelled = {found for path in lua_files() for found in LUA_KEY.findall(path.read_text("utf-8"))}
    named = {re.sub(r"\{[^}]*\}", "*", row.name) for row in KEYS}
    known = {name.removeprefix("P").partition("*")[0].rstrip(":") for name in named}
    assert ":pending" in spelled
    assert spelled <= known


def test_python_spells_keys_in_one_module_only():
    packages = (ROOT / "kalshi_cancel", ROOT / "worker")
    sources = [path for folder in packages for path in folder.rglob("*.py") if path.name != "keys.py"]
    assert [path for path in sources if SPELLED_IN_PYTHON.search(path.read_text("utf-8"))] == []


def test_every_key_that_python_spells_is_in_the_table():
    keys, named = Keys("P"), {re.sub(r"\{[^}]*\}", "x", row.name) for row in KEYS}
    plain = {getattr(keys, name) for name in Keys.__slots__ if name != "prefix"}
    of_one = {
        *(key_of("x") for key_of in (keys.pending, keys.dead_letter, keys.set_aside, keys.bucket)),
        *(key_of("x") for key_of in (keys.wake_up, keys.listeners, keys.intake)),
        *(key_of("x") for key_of in (keys.result_list, keys.mass_cancel)),
        *(key_of("x", "x") for key_of in (keys.due, keys.wake_up_with)),
    }
    assert plain | of_one <= named


def test_every_field_of_a_pending_cancel_that_lua_spells_is_in_the_table():
    text = "\n".join(re.sub("--.*", "", path.read_text("utf-8")) for path in lua_files())
    spelled = {name for args in LUA_FIELDS.findall(text) for name in re.findall(r"'(\w+)'", args)}
    assert {"progress", "claimed_by", "asked_again", "replied"} <= spelled
    assert spelled == {each.name for each in PENDING}


def test_the_page_is_what_the_tables_say():
    shown = PAGE.read_text("utf-8")
    assert shown == page(shown), "python -m kalshi_cancel.store.keys docs/reference/redis-keys.md"


def test_who_writes_a_field_of_a_pending_cancel_is_what_the_scripts_do():
    said = {each.name: set(each.scripts.split()) for each in PENDING}
    for line in PAGE.read_text("utf-8").partition(SCRIPTS_HEADING)[2].splitlines():
        for fields in WRITES.findall(line):
            for name in fields.split(","):
                assert line.split("`")[1] in said[name], f"{name}: {line[:60]}"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("kalshi-cancel:mass:a:b", "P:mass:{id}"),
        ("kalshi-cancel:mass:a:left", "P:mass:{id}:left"),
        ("kalshi-cancel:list:t", "P:list:{task_id}"),
        ("kalshi-cancel:list:t:left", "P:list:{task_id}:left"),
        ("kalshi-cancel:wake_up:risk", "P:wake_up:{lane}"),
        ("kalshi-cancel:wake_up:risk:key", "P:wake_up:{lane}:{key_id}"),
        ("celery-task-meta-cancel:a", "R:cancel:{order_id}"),
        ("celery-task-meta-a", "R:{task_id}"),
    ],
)
def test_a_key_is_known_by_the_most_special_row(key, name):
    assert named(key).name == name


@pytest.mark.parametrize(
    "key", ["kalshi-cancel:new", "kalshi-cancel", "other:pending:a", "kalshi-cancel:pending:"]
)
def test_what_the_table_does_not_name_is_not_known(key):
    assert named(key) is None


def look(server):
    """What is wrong with the keys that there are, and the rows that they belong to."""
    wrong, found = [], set()
    for key in server.scan_iter(count=1000):
        if key.startswith(CELERYS):
            continue
        row = named(key)
        if row is None:
            wrong.append(f"{key}: not in the table")
            continue
        found.add(row.name)
        kind, life = server.type(key), server.ttl(key)
        if row.kind not in ("any", kind) and kind != "none":
            wrong.append(f"{key}: a {kind}")
        is_open = row.name.startswith("P:mass:") and server.sismember(
            f"{PREFIX}:mass_cancels:open", key.split(":")[2]
        )
        if has_life(row) and life == -1 and not is_open:
            wrong.append(f"{key}: no life")
    return wrong, found


def test_after_all_kinds_of_work_each_key_is_named_and_has_a_life_or_an_owner(crew):
    with crew.apart("-c", "4", KALSHI_CANCEL_MAX_AGE_S="1", KALSHI_READ_LAG_S="0.1") as apart:
        settings = RedisSettings.from_env({"REDIS_URL": apart.url})
        with connect(settings) as server, Celery("raw", broker=apart.url, backend=apart.url) as raw:
            apart.start()
            send(crew, apart, raw, server)
            wrong, open_found = look(server)
            assert wrong == []
            wait_until(lambda: list(apart.client.dead_letters())[1:], within_s=PATIENCE_S, what="given up")
            crew.control.clear_faults()
            wait_until(
                lambda: not list(apart.client.open_cancels()), within_s=PATIENCE_S, what="all is settled"
            )
            wait_until(
                lambda: not server.smembers(f"{PREFIX}:mass_cancels:open"), what="no mass cancel is open"
            )
            wait_until(lambda: not server.keys(f"{PREFIX}:list:*"), what="the lists are answered")
            wrong, found = look(server)
            assert wrong == []
            assert {"P:pending:{order_id}", "P:due:{lane}:{path}", "P:list:{task_id}:left"} <= open_found
            assert {"P:dead:{order_id}", "P:aside:{order_id}", "P:mass:{id}:orders", "P:unreadable"} <= found
            assert not {
                row for row in found if row.startswith(("P:pending", "P:due", "P:deadline", "P:list:"))
            }


def send(crew, apart, raw, server):
    """All kinds of messages, some of which stay open while there are faults."""
    settled, swept = crew.place(30), crew.place(20, ticker="KXMASS-26NOV22-A")
    [stuck, spoilt, unknown] = [*crew.place(2), *ids(1)]
    apart.client.cancel_many(settled[:10]).results(timeout=PATIENCE_S)
    apart.client.mass_cancel({"series": "KXMASS"}).result(timeout=PATIENCE_S)
    apart.client.mass_cancel({"series": "KXMASS"}, dry_run=True).result(timeout=PATIENCE_S)
    assert swept
    raw.send_task("cancel_orders", args=[settled[10:20]], queue="cancels").get(timeout=PATIENCE_S)
    raw.send_task("cancel_order", args=[settled[20]], queue="risk", priority=9).get(timeout=PATIENCE_S)
    raw.send_task("mass_cancel", kwargs={"scope": {"series": "KXMASS"}}, queue="risk").get(timeout=PATIENCE_S)
    server.lpush("cancels", "{this is no message")
    crew.control.fault("http_429", operation="cancel", times=1)
    apart.client.cancel(settled[21], exchange_index=1).result(timeout=PATIENCE_S)
    apart.client.cancel(unknown, deadline_s=1)
    server.hset(f"{PREFIX}:pending:{spoilt}", mapping={"request": "no JSON", "lane": "risk", "path": "write"})
    server.zadd(f"{PREFIX}:due:risk:write", {spoilt: 1})
    wait_until(lambda: server.exists(f"{PREFIX}:aside:{spoilt}"), within_s=PATIENCE_S, what="set aside")
    for order_id in (stuck, settled[22]):
        crew.control.fault("http_500", order_id=order_id)  # never settled
    raw.send_task(
        "cancel_orders",
        args=[[{"order_id": each, "deadline_s": 1} for each in (stuck, settled[22])]],
        queue="cancels",
    )
    for _ in range(3):
        raw.send_task("cancel_order", kwargs={"order_id": stuck, "deadline_s": 1}, queue="cancels")
    apart.client.cancel(stuck, deadline_s=1)
    apart.client.mass_cancel({"series": "KXMASS"}, deadline_s=1)
    wait_until(lambda: apart.client.status(stuck).open, within_s=PATIENCE_S, what="it is open")
    wait_until(
        lambda: server.exists(f"{PREFIX}:list:{'*'}") or server.keys(f"{PREFIX}:list:*"), what="its list"
    )


def test_what_was_given_up_is_forgotten_when_it_is_old_and_nothing_else(own_redis):
    settings = RedisSettings.from_env(
        {"REDIS_URL": own_redis.url, "KALSHI_KEY_PREFIX": f"t-{uuid.uuid4().hex}"}
    )
    with connect(settings) as server:
        store, prefix = CancelStore(server, settings), settings.key_prefix
        now_ms = time.time() * 1000
        life_s = DEAD_LIFE_DAYS * 86_400
        for at, age_s in enumerate((life_s + 60, life_s - 60)):
            for kind in ("dead", "aside"):
                server.zadd(f"{prefix}:{kind}", {f"{kind}-{at}": now_ms - age_s * 1000})
                server.hset(f"{prefix}:{kind}:{kind}-{at}", "request", "{}")
        assert (store.forget_dead(), store.forget_dead()) == (2, 0)
        left = {key.removeprefix(f"{prefix}:") for key in server.scan_iter(f"{prefix}:*")}
        assert left == {"dead", "dead:dead-1", "aside", "aside:aside-1"}
        assert server.zrange(f"{prefix}:dead", 0, -1) == ["dead-1"]
        assert [each.order_id for each in store.dead_letters()] == ["dead-1", "aside-1"]
