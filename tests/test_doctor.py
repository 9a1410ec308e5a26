"""The doctor, examining a real Redis and a real exchange that are given one ailment at a time."""

from __future__ import annotations

import signal

import pytest
import redis

from kalshi_cancel import doctor
from kalshi_cancel.doctor import Finding, Health, examine
from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.sandbox.control import Control
from kalshi_cancel.sandbox.server import SandboxServer
from kalshi_cancel.settings.worker import WorkerSettings
from trials.stack import KEY_ID, Keys, RedisServer, free_port

OK, WARNING, FAILED = Health.OK, Health.WARNING, Health.FAILED
REDIS_CHECKS = ["redis", "redis version", "redis role", "persistence", "eviction", "memory"]
ACCOUNT_CHECKS = ["key", "key file", "exchange", "clock", "signed read", "key rights", "limits"]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def sandbox(keys):
    with SandboxServer(keys={KEY_ID: keys.public_path.read_text()}, tier="basic") as server:
        yield server


@pytest.fixture
def exchange(sandbox):
    """Control of the private exchange."""
    with Control(sandbox.url) as control:
        yield control
        control.reset()


@pytest.fixture
def env(own_redis, sandbox, keys):
    return {
        "REDIS_URL": own_redis.url,
        "KALSHI_BASE_URL": sandbox.url,
        "KALSHI_API_KEY_ID": KEY_ID,
        "KALSHI_PRIVATE_KEY_PATH": str(keys.private_path),
    }


@pytest.fixture
def configured(own_redis):
    """Sets options of the private Redis for the time of one test."""
    client = own_redis.client()
    before = {}

    def configure(**options):
        for name, value in options.items():
            option = name.replace("_", "-")
            before.setdefault(option, client.config_get(option)[option])
            client.config_set(option, value)

    yield configure
    for option, value in before.items():
        client.config_set(option, value)
    client.close()


def report(env, **options) -> dict[str, Finding]:
    findings = list(examine(env, **options))
    for finding in findings:
        assert finding.found
        assert bool(finding.advice) == (finding.health is not OK), (
            f"advice is for what is not well: {finding}"
        )
    found = {finding.check: finding for finding in findings}
    assert len(found) == len(findings) or found["settings"].health is not OK
    return found


def health(env, **options) -> dict[str, Health]:
    return {check: finding.health for check, finding in report(env, **options).items()}


def only_ailing(env, **options) -> Finding:
    """The one finding that is not ok."""
    [finding] = [each for each in report(env, **options).values() if each.health is not OK]
    return finding


# --- as it should be --------------------------------------------------------------------------------------


def test_a_fit_installation_is_found_fit_in_every_part(env, exchange):
    found = report(env)
    assert list(found) == ["settings", *REDIS_CHECKS, *ACCOUNT_CHECKS]
    assert {finding.health for finding in found.values()} == {OK}
    assert "appendfsync always" in found["persistence"].found
    assert "Valkey" in found["redis version"].found
    assert "RSA-PSS-SHA256" in found["key"].found
    assert KEY_ID in found["signed read"].found
    assert found["key rights"].found == "this key may cancel, and it sees all subaccounts"


def test_the_account_s_limits_and_the_cost_of_a_cancel_are_told(env, exchange):
    told = report(env)["limits"].found
    assert "tier basic: read 200 tokens/s (bucket 200), write 100 tokens/s (bucket 100)" in told
    assert "a cancel costs 2: 50 cancels/s" in told


@pytest.mark.parametrize(("tier", "advised"), [("basic", False), ("advanced", False), ("prestige", True)])
def test_where_single_calls_are_the_limit_an_ed25519_key_is_advised(env, exchange, tier, advised):
    exchange.configure(tier=tier)
    found = report(env)
    assert ("signatures" in found) == advised
    if advised:
        assert "3 shards pay for 12000 single cancels a second" in found["signatures"].found
        assert "Ed25519" in found["signatures"].advice


def test_an_ed25519_key_needs_no_such_advice(env, tmp_path):
    keys = Keys(tmp_path, algorithm="ed25519")
    with SandboxServer(keys={KEY_ID: keys.public_path.read_text()}, tier="prestige") as server:
        mine = {"KALSHI_BASE_URL": server.url, "KALSHI_PRIVATE_KEY_PATH": str(keys.private_path)}
        assert "signatures" not in report(env | mine)


def test_a_producer_is_examined_without_key_and_exchange(own_redis):
    found = report({"REDIS_URL": own_redis.url}, producer=True)
    assert list(found) == ["settings", *REDIS_CHECKS]
    assert {finding.health for finding in found.values()} == {OK}


def test_no_order_is_touched_and_every_call_is_a_read(env, exchange):
    order_id = exchange.place()["order_id"]
    report(env)
    assert {call["method"] for call in exchange.calls()} == {"GET"}
    assert exchange.order(order_id)["status"] == "resting"


def test_the_process_environment_is_examined_when_none_is_given(env, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert {finding.health for finding in examine()} == {OK}


def test_a_finding_is_plain_json():
    finding = Finding("clock", WARNING, "off", "set it")
    assert finding.to_json() == {"check": "clock", "health": "warning", "found": "off", "advice": "set it"}


# --- settings ---------------------------------------------------------------------------------------------


def test_what_looks_like_a_setting_and_is_none_is_named(own_redis):
    env = {"REDIS_URL": own_redis.url, "KALSHI_STRATEGY": "mm", "KALSHI_AUDITS": "off"}
    failed, *_ = examine(env, producer=True)
    assert (failed.health, failed.found) == (
        FAILED,
        "KALSHI_AUDITS is no setting: did you mean KALSHI_AUDIT?",
    )
    del env["KALSHI_AUDITS"]
    _, foreign, *_ = examine(env, producer=True)
    assert (foreign.check, foreign.health) == ("settings", WARNING)
    assert "KALSHI_STRATEGY is no setting of this service" in foreign.found


def test_a_trusted_environment_that_cannot_be_used_is_a_finding(env, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "ftp://x")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    *_, last = examine({**env, "KALSHI_TRUST_ENV": "true"})
    assert (last.check, last.health) == ("settings", FAILED)
    assert "ALL_PROXY" in last.found


def test_every_problem_of_the_settings_is_a_finding_and_redis_is_examined_all_the_same(own_redis):
    findings = list(examine({"REDIS_URL": own_redis.url, "KALSHI_ORDERS_API": "v7"}))
    problems = [finding for finding in findings if finding.check == "settings"]
    assert {finding.health for finding in problems} == {FAILED}
    words = " ".join(finding.found for finding in problems)
    for name in (
        "KALSHI_BASE_URL",
        "KALSHI_API_KEY_ID",
        "KALSHI_PRIVATE_KEY_PATH",
        "KALSHI_ORDERS_API",
    ):
        assert name in words
    assert [finding.check for finding in findings if finding.check != "settings"] == REDIS_CHECKS


@pytest.mark.parametrize("producer", [True, False])
def test_without_a_redis_url_nothing_else_can_be_examined(producer):
    findings = list(examine({}, producer=producer))
    assert {finding.check for finding in findings} == {"settings"}
    assert "REDIS_URL is not set" in findings[0].found


def test_the_retired_dialect_is_a_warning(env, exchange):
    finding = only_ailing({**env, "KALSHI_ORDERS_API": "v1"})
    assert (finding.check, finding.health) == ("settings", WARNING)
    assert "KALSHI_ORDERS_API=v2" in finding.advice


# --- Redis ------------------------------------------------------------------------------------------------


def test_a_redis_that_is_not_there_fails_and_the_account_is_examined_all_the_same(env, exchange):
    found = health({**env, "REDIS_URL": f"redis://127.0.0.1:{free_port()}/0"})
    assert found == {"settings": OK, "redis": FAILED, **dict.fromkeys(ACCOUNT_CHECKS, OK)}


def test_a_silent_redis_fails_within_seconds(tmp_path):
    server = RedisServer(tmp_path).start()
    try:
        server.part.signal(signal.SIGSTOP)
        finding = only_ailing({"REDIS_URL": server.url}, producer=True)
        assert (finding.check, finding.health) == ("redis", FAILED)
        assert "overloaded" in finding.advice
    finally:
        server.stop()


def test_a_wrong_password_is_told_as_such_and_no_password_is_shown(own_redis):
    with own_redis.client() as client:
        client.execute_command("ACL", "SETUSER", "somebody", "on", ">right-password", "+@all")
    url = f"redis://somebody:wrong-password@127.0.0.1:{own_redis.port}/0"
    finding = only_ailing({"REDIS_URL": url}, producer=True)
    assert (finding.check, finding.health) == ("redis", FAILED)
    assert "user and password" in finding.advice
    right = report({"REDIS_URL": url.replace("wrong", "right")}, producer=True)
    assert right["redis"].health is OK
    shown = repr(finding) + repr(right)
    assert "wrong-password" not in shown
    assert "right-password" not in shown


def test_a_user_who_may_not_even_ping_is_told_that_permissions_are_missing(own_redis):
    with own_redis.client() as client:
        client.execute_command("ACL", "SETUSER", "nobody", "on", ">pw", "-@all")
    url = f"redis://nobody:pw@127.0.0.1:{own_redis.port}/0"
    finding = only_ailing({"REDIS_URL": url}, producer=True)
    assert (finding.check, finding.health) == ("redis", FAILED)
    assert "permissions" in finding.advice


def test_a_user_who_may_not_call_info_gets_a_warning(own_redis):
    with own_redis.client() as client:
        client.execute_command("ACL", "SETUSER", "blind", "on", ">pw", "-@all", "+ping")
    found = report({"REDIS_URL": f"redis://blind:pw@127.0.0.1:{own_redis.port}/0"}, producer=True)
    assert {check: finding.health for check, finding in found.items()} == {
        "settings": OK,
        "redis": OK,
        "redis state": WARNING,
    }


def test_where_config_may_not_be_read_the_rest_is_still_examined(own_redis):
    with own_redis.client() as client:
        client.execute_command("ACL", "SETUSER", "half", "on", ">pw", "-@all", "+ping", "+info")
    found = report({"REDIS_URL": f"redis://half:pw@127.0.0.1:{own_redis.port}/0"}, producer=True)
    assert found["persistence"].health is OK
    assert "appendfsync cannot be seen" in found["persistence"].found


def test_a_replica_fails_because_it_refuses_writes(own_redis, tmp_path):
    replica = RedisServer(tmp_path, options=["--replicaof", "127.0.0.1", str(own_redis.port)]).start()
    try:
        finding = only_ailing({"REDIS_URL": replica.url}, producer=True)
        assert (finding.check, finding.health) == ("redis role", FAILED)
    finally:
        replica.stop()


@pytest.mark.parametrize(
    ("options", "check", "expected"),
    [
        ({"appendonly": "no"}, "persistence", FAILED),
        ({"appendfsync": "no"}, "persistence", WARNING),
        ({"appendfsync": "everysec"}, "persistence", WARNING),
        ({"maxmemory_policy": "allkeys-lru"}, "eviction", WARNING),
        ({"maxmemory_policy": "volatile-ttl", "maxmemory": "1gb"}, "eviction", FAILED),
        ({"maxmemory": "500kb"}, "memory", WARNING),
    ],
)
def test_a_redis_that_may_lose_or_refuse_cancels_is_found_out(
    own_redis, configured, options, check, expected
):
    configured(**options)
    finding = only_ailing({"REDIS_URL": own_redis.url}, producer=True)
    assert (finding.check, finding.health) == (check, expected)


def test_enough_memory_is_fine(own_redis, configured):
    configured(maxmemory="1gb")
    finding = report({"REDIS_URL": own_redis.url}, producer=True)["memory"]
    assert finding.health is OK
    assert "of 1073.7 MB" in finding.found


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"redis_version": "6.2.14"}, FAILED),
        ({"redis_version": "7.0.0"}, OK),
        ({"redis_version": "8.4.0"}, OK),
        ({"redis_version": "7.2.4", "valkey_version": "7.2.11"}, FAILED),
        ({"redis_version": "7.2.4", "valkey_version": "8.0.1"}, OK),
        ({"redis_version": "unstable"}, WARNING),
        ({}, WARNING),
    ],
)
def test_versions_that_are_too_old_fail(facts, expected):
    assert doctor._examine_version(facts).health is expected


@pytest.mark.parametrize("fact", ["redis_mode", "server_mode"])
def test_a_cluster_fails_because_celery_cannot_use_it(fact):
    finding = doctor._examine_role({"role": "master", fact: "cluster"})
    assert finding.health is FAILED


def test_a_full_disk_under_redis_fails():
    facts = {"aof_enabled": 1, "aof_last_write_status": "err"}
    assert doctor._examine_persistence(facts, "always").health is FAILED


def test_a_service_that_hides_its_persistence_gets_a_warning():
    assert doctor._examine_persistence({}, None).health is WARNING


def test_an_error_that_is_not_foreseen_still_gets_advice():
    assert doctor._redis_advice(redis.ResponseError("MISCONF ..."))
    assert "loading" in doctor._redis_advice(redis.BusyLoadingError("LOADING"))


# --- key --------------------------------------------------------------------------------------------------


def test_a_key_that_cannot_be_used_fails_and_the_exchange_is_not_asked(env, exchange, tmp_path):
    path = tmp_path / "key.pem"
    path.write_text("-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n")
    path.chmod(0o600)
    found = report({**env, "KALSHI_PRIVATE_KEY_PATH": str(path)})
    assert list(found)[-1] == "key"
    assert found["key"].health is FAILED
    assert "certificate" in found["key"].found
    assert exchange.calls() == []


def test_a_key_file_that_others_can_read_is_a_warning(env, exchange, keys, tmp_path):
    path = tmp_path / "key.pem"
    path.write_bytes(keys.private_path.read_bytes())
    path.chmod(0o644)
    finding = only_ailing({**env, "KALSHI_PRIVATE_KEY_PATH": str(path)})
    assert (finding.check, finding.health) == ("key file", WARNING)
    assert finding.advice == f"chmod 600 {path}"


def test_a_key_from_the_environment_has_no_file_to_examine_and_is_never_shown(env, exchange, keys):
    pem = keys.private_path.read_text()
    del env["KALSHI_PRIVATE_KEY_PATH"]
    found = report({**env, "KALSHI_PRIVATE_KEY": pem})
    assert "key file" not in found
    assert found["signed read"].health is OK
    assert not any(line in repr(found) for line in pem.splitlines())


# --- the exchange -----------------------------------------------------------------------------------------


def test_an_exchange_that_cannot_be_reached_fails_and_is_asked_no_more(env):
    found = report({**env, "KALSHI_BASE_URL": f"http://127.0.0.1:{free_port()}"})
    assert list(found)[-1] == "exchange"
    assert found["exchange"].health is FAILED
    assert "KALSHI_BASE_URL" in found["exchange"].advice


def test_an_exchange_that_answers_badly_fails_and_the_rest_is_still_examined(env, exchange):
    exchange.fault("http_502_html", operation="status")
    finding = only_ailing(env)
    assert (finding.check, finding.health) == ("exchange", FAILED)
    assert "HTTP 502" in finding.found


def test_something_that_is_no_exchange_gets_a_warning(env, exchange):
    exchange.fault("status", operation="status", status=200, body={"hello": "world"})
    finding = only_ailing(env)
    assert (finding.check, finding.health) == ("exchange", WARNING)
    assert "not with its status" in finding.found


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            {"exchange_paused": True, "resume_time": "2026-11-23T10:00:00Z"},
            "paused everywhere (expected back",
        ),
        ({"exchange_paused": [1, 2]}, "the exchange is paused on shard 1, 2"),
        ({"trading_paused": True}, "trading is paused everywhere"),
        ({"trading_paused": [3]}, "trading is paused on shard 3"),
    ],
)
def test_a_pause_is_a_warning_that_says_where(env, exchange, setting, words):
    exchange.configure(**setting)
    finding = only_ailing(env)
    assert (finding.check, finding.health) == ("exchange", WARNING)
    assert words in finding.found


@pytest.mark.parametrize(("skew_s", "expected"), [(4, WARNING), (-4, WARNING), (30, FAILED), (-30, FAILED)])
def test_a_clock_that_is_off_is_found_and_the_key_can_be_judged_all_the_same(env, exchange, skew_s, expected):
    exchange.configure(skew_s=skew_s)
    finding = only_ailing(env)
    assert (finding.check, finding.health) == ("clock", expected)
    assert "NTP" in finding.advice


def test_clocks_that_cannot_be_compared_are_a_warning(env):
    exchange = Exchange.from_settings(WorkerSettings.from_env(env))  # which has had no answer yet
    assert doctor._examine_clock(exchange).health is WARNING


def test_an_unknown_key_id_is_told_from_a_wrong_key(env, exchange, tmp_path):
    unknown = only_ailing({**env, "KALSHI_API_KEY_ID": "another-id"})
    assert (unknown.check, unknown.health) == ("signed read", FAILED)
    assert "does not know this key id" in unknown.advice

    other = Keys(tmp_path)
    wrong = only_ailing({**env, "KALSHI_PRIVATE_KEY_PATH": str(other.private_path)})
    assert (wrong.check, wrong.health) == ("signed read", FAILED)
    assert "does not belong to this key id" in wrong.advice


@pytest.mark.parametrize(
    ("rights", "health", "words"),
    [
        ({"scope": "read_only"}, FAILED, "this key may not cancel: its scopes are read"),
        ({"subaccount": 3}, WARNING, "it sees subaccount 3 only"),
        ({"scope": "trade"}, OK, "this key may cancel, and it sees all subaccounts"),
    ],
    ids=str,
)
def test_what_the_key_may_do_and_see_is_told(env, exchange, keys, rights, health, words):
    exchange.register_key(KEY_ID, keys.public_path.read_text(), **rights)
    try:
        found = report(env)["key rights"]
    finally:
        exchange.register_key(KEY_ID, keys.public_path.read_text())
    assert (found.health, words in found.found) == (health, True)


@pytest.mark.parametrize(
    "fault", [{"kind": "http_500"}, {"kind": "status", "status": 200, "body": {"api_keys": None}}], ids=str
)
def test_where_the_keys_rights_cannot_be_read_it_is_said_what_follows(env, exchange, fault):
    exchange.fault(operation="api_keys", **fault)
    finding = only_ailing(env)
    assert (finding.check, finding.health) == ("key rights", WARNING)
    assert "no mass cancel is called flat" in finding.advice


@pytest.mark.parametrize(("status", "words"), [(403, "scope"), (500, "run this again")])
def test_a_read_that_is_refused_or_fails_says_what_to_do(env, exchange, status, words):
    exchange.fault("status", operation="list", status=status, code="some_code", message="some words")
    finding = only_ailing(env)
    assert (finding.check, finding.health) == ("signed read", FAILED)
    assert f"HTTP {status}, some_code: some words" in finding.found
    assert words in finding.advice


@pytest.mark.parametrize(
    ("operation", "answer"),
    [
        ("limits", {"status": 500}),
        ("costs", {"status": 404}),
        ("limits", {"status": 200, "body": {}}),
        ("limits", {"status": 200, "body": {"read": {"refill_rate": "many"}, "write": []}}),
        ("costs", {"status": 200, "body": {"default_cost": 0}}),
        ("costs", {"status": 200, "body": {"endpoint_costs": "none"}}),
        ("costs", {"status": 200, "body": {"endpoint_costs": [7]}}),  # the workers would not use it either
    ],
)
def test_limits_that_cannot_be_read_or_understood_are_a_warning(env, exchange, operation, answer):
    exchange.fault("status", operation=operation, **answer)
    finding = only_ailing(env)
    assert (finding.check, finding.health) == ("limits", WARNING)


def test_without_a_cost_of_its_own_a_cancel_costs_the_default(env, exchange):
    body = {"default_cost": 10, "endpoint_costs": [{"method": "DELETE", "path": "/elsewhere", "cost": 1}]}
    exchange.fault("status", operation="costs", status=200, body=body)
    assert "a cancel costs 10: 10 cancels/s" in report(env)["limits"].found


def test_the_key_file_s_path_is_the_only_thing_shown_of_the_key(env, exchange, keys):
    found = repr(report(env))
    assert str(keys.private_path) in found
    assert not any(line in found for line in keys.private_path.read_text().splitlines())
