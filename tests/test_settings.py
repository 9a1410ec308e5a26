"""What the environment may say, what is made of it, and that no problem ever quotes a secret."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import ssl
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path

import pytest
import redis
from celery import Celery
from hypothesis import given
from hypothesis import strategies as st

from kalshi_cancel.settings.reader import SettingsError
from kalshi_cancel.settings.redis import RedisSettings, Sentinels, refuse_celery_overrides
from kalshi_cancel.settings.values import shown
from kalshi_cancel.settings.variables import VARIABLES
from kalshi_cancel.settings.worker import WorkerSettings

PEM = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIsecretsecretsecret\n-----END PRIVATE KEY-----"
PASSWORD = "hunter2hunter2"
BASE_URL_RULE = "KALSHI_BASE_URL must be scheme and host only, like https://external-api.kalshi.com"
MINIMAL = {
    "REDIS_URL": "redis://localhost:6379/0",
    "KALSHI_BASE_URL": "https://external-api.kalshi.com",
    "KALSHI_API_KEY_ID": "a952bcbe-ec3b-4b5b-b8f9-11dae589608c",
    "KALSHI_PRIVATE_KEY": PEM,
}


def problems(env, settings=WorkerSettings):
    with pytest.raises(SettingsError) as caught:
        settings.from_env(env)
    assert str(caught.value) == "; ".join(caught.value.problems)
    assert "\n" not in str(caught.value)
    return caught.value.problems


def everything_shown_of(error):
    return "".join(traceback.format_exception(error)) + str(error) + repr(error)


def only_problem(**changed):
    found = problems({**MINIMAL, **changed})
    assert len(found) == 1, found
    return found[0]


def redis_settings(url):
    return RedisSettings.from_env({"REDIS_URL": url})


class Recording(Mapping):
    """An environment that notes whose values are asked for."""

    def __init__(self, values):
        self.values_by_name = values
        self.asked = set()

    def __getitem__(self, name):
        self.asked.add(name)
        return self.values_by_name[name]

    def __iter__(self):
        return iter(self.values_by_name)  # the names alone

    def __len__(self):
        return len(self.values_by_name)


# --- The whole --------------------------------------------------------------------------------------------


def test_the_least_environment_gives_the_documented_defaults():
    settings = WorkerSettings.from_env(MINIMAL)

    assert dataclasses.asdict(settings) == {
        "redis": {
            "redis_url": "redis://localhost:6379/0",
            "key_prefix": "kalshi-cancel",
            "result_expires_s": 7 * 24 * 3600,
            "audit": True,
            "wait_replicas": 0,
        },
        "base_url": "https://external-api.kalshi.com",
        "api_key_id": "a952bcbe-ec3b-4b5b-b8f9-11dae589608c",
        "private_key": PEM.encode(),
        "private_key_path": None,
        "private_key_passphrase": None,
        "orders_api": "v2",
        "connect_timeout_s": 2.0,
        "read_timeout_s": 3.0,
        "call_deadline_s": 5.0,
        "cancel_deadline_s": 10.0,
        "cancel_max_age_s": 86400.0,
        "audit_max_age_s": 7 * 86400.0,
        "audit_max_entries": 1_000_000,
        "shutdown_s": 8.0,
        "read_tokens_per_s": 200.0,
        "read_tokens_capacity": 200.0,
        "write_tokens_per_s": 100.0,
        "write_tokens_capacity": 100.0,
        "risk_reserve": 0.2,
        "batch_most": 100,
        "read_lag_s": 2.0,
        "max_body_bytes": 4 * 1024 * 1024,
        "pool_size": 32,
        "http_proxy": None,
        "trust_env": False,
        "ca_bundle": None,
        "metrics_port": 0,
        "metrics_host": "127.0.0.1",
        "heartbeat_file": None,
        "log_format": "auto",
    }


def test_every_variable_changes_its_setting(tmp_path):
    bundle = tmp_path / "ca.pem"
    bundle.write_text("-----BEGIN CERTIFICATE-----")
    settings = WorkerSettings.from_env(
        {
            **MINIMAL,
            "KALSHI_KEY_PREFIX": "prod:cancel_1.x",
            "KALSHI_RESULT_EXPIRES_S": "3600",
            "KALSHI_AUDIT": "off",
            "KALSHI_AUDIT_MAX_AGE_S": "3600",
            "KALSHI_AUDIT_MAX_ENTRIES": "5000",
            "KALSHI_PRIVATE_KEY_PASSPHRASE": " with blanks ",
            "KALSHI_ORDERS_API": "V1",
            "KALSHI_CONNECT_TIMEOUT_S": "0.5",
            "KALSHI_READ_TIMEOUT_S": "1.25",
            "KALSHI_CALL_DEADLINE_S": "4",
            "KALSHI_CANCEL_DEADLINE_S": "30",
            "KALSHI_READ_LAG_S": "0",
            "KALSHI_MAX_BODY_BYTES": "65536",
            "KALSHI_POOL_SIZE": "4",
            "KALSHI_HTTP_PROXY": "http://proxy.example:3128",
            "KALSHI_TRUST_ENV": "Yes",
            "KALSHI_CA_BUNDLE": str(bundle),
            "KALSHI_METRICS_PORT": "9100",
            "KALSHI_METRICS_HOST": "0.0.0.0",
            "KALSHI_HEARTBEAT_FILE": "/run/worker.alive",
            "KALSHI_LOG_FORMAT": "JSON",
        }
    )

    assert settings.redis.key_prefix == "prod:cancel_1.x"
    assert settings.redis.result_expires_s == 3600
    assert settings.redis.audit is False
    assert (settings.audit_max_age_s, settings.audit_max_entries) == (3600.0, 5000)
    assert settings.private_key_passphrase == b" with blanks "
    assert settings.orders_api == "v1"
    assert (settings.connect_timeout_s, settings.read_timeout_s) == (0.5, 1.25)
    assert (settings.call_deadline_s, settings.cancel_deadline_s, settings.read_lag_s) == (4.0, 30.0, 0.0)
    assert (settings.max_body_bytes, settings.pool_size) == (65536, 4)
    assert settings.http_proxy == "http://proxy.example:3128"
    assert settings.trust_env is True
    assert settings.ca_bundle == str(bundle)
    assert (settings.metrics_port, settings.metrics_host) == (9100, "0.0.0.0")
    assert settings.heartbeat_file == Path("/run/worker.alive")
    assert settings.log_format == "json"


def test_all_problems_are_reported_at_once_in_one_line():
    found = problems(
        {
            "REDIS_URL": "localhost:6379",
            "KALSHI_BASE_URL": "https://external-api.kalshi.com/trade-api/v2",
            "KALSHI_PRIVATE_KEY_PATH": "/nowhere/key.pem",
            "KALSHI_ORDERS_API": "v3",
            "KALSHI_READ_TIMEOUT_S": "3s",
            "KALSHI_POOL_SIZE": "many",
        }
    )

    assert found == (
        "REDIS_URL must start with redis://, rediss://, unix:// or sentinel:// (got no scheme)",
        f"{BASE_URL_RULE} (got a path: /trade-api/v2)",
        "neither KALSHI_API_KEY_ID_PATH nor KALSHI_API_KEY_ID is set: set one of them",
        "KALSHI_PRIVATE_KEY_PATH: the file /nowhere/key.pem does not exist",
        "KALSHI_ORDERS_API must be v2 or v1 (got: v3)",
        "KALSHI_READ_TIMEOUT_S must be a number of seconds from 0.01 to 60 (got: 3s)",
        "KALSHI_POOL_SIZE must be a whole number of connections from 1 to 1024 (got: many)",
    )


def test_an_empty_environment_names_everything_that_is_required():
    assert [problem.split(" is ")[0] for problem in problems({})] == [
        "REDIS_URL",
        "KALSHI_BASE_URL",
        "neither KALSHI_API_KEY_ID_PATH nor KALSHI_API_KEY_ID",
        "neither KALSHI_PRIVATE_KEY_PATH nor KALSHI_PRIVATE_KEY",
    ]


def test_without_an_argument_the_process_environment_is_read(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    for name, value in MINIMAL.items():
        monkeypatch.setenv(name, value)

    assert WorkerSettings.from_env() == WorkerSettings.from_env(MINIMAL)
    assert RedisSettings.from_env() == WorkerSettings.from_env(MINIMAL).redis


def test_surrounding_blanks_and_line_ends_of_env_files_are_dropped():
    assert WorkerSettings.from_env({name: f" {value}\r\n" for name, value in MINIMAL.items()}) == (
        WorkerSettings.from_env(MINIMAL)
    )


def test_an_empty_value_counts_as_not_set():
    empty = {variable.name: "" for variable in VARIABLES}
    assert WorkerSettings.from_env({**empty, **MINIMAL}) == WorkerSettings.from_env(MINIMAL)
    assert problems(empty) == problems({}) == problems({variable.name: "  " for variable in VARIABLES})


@pytest.mark.parametrize("quote", ["'", '"'])
@pytest.mark.parametrize("name", sorted(MINIMAL))
def test_quotes_that_an_env_file_kept_are_named_as_such(name, quote):
    found = only_problem(**{name: f"{quote}{MINIMAL[name]}{quote}"})
    assert found == f"{name} is wrapped in quotes, which were taken literally: remove them"


def test_a_number_in_quotes_is_one_problem_and_not_two():
    assert only_problem(KALSHI_POOL_SIZE="'8'").startswith("KALSHI_POOL_SIZE is wrapped in quotes")
    assert only_problem(KALSHI_READ_LAG_S='"1"').startswith("KALSHI_READ_LAG_S is wrapped in quotes")


# --- The table of variables -------------------------------------------------------------------------------


def test_every_variable_of_the_table_is_read_and_no_other():
    env = Recording(MINIMAL)
    WorkerSettings.from_env(env)
    assert env.asked == {variable.name for variable in VARIABLES}


def test_producers_read_their_own_variables_only_and_never_the_key():
    env = Recording({"REDIS_URL": "redis://localhost"})
    RedisSettings.from_env(env)
    assert env.asked == {variable.name for variable in VARIABLES if variable.who == "producers"}
    assert not [name for name in env.asked if "PRIVATE" in name or "API_KEY" in name]


def test_the_table_names_each_variable_once_and_says_what_it_means():
    assert len({variable.name for variable in VARIABLES}) == len(VARIABLES)
    for variable in VARIABLES:
        assert variable.meaning[0].isupper()
        assert variable.meaning.endswith(".")
        assert not (variable.required and variable.default)


def test_each_field_of_the_settings_is_set_by_one_row_of_its_readers():
    for kind, who, besides in ((RedisSettings, "producers", set()), (WorkerSettings, "workers", {"redis"})):
        rows = [variable.field for variable in VARIABLES if variable.who == who and variable.field]
        assert len(rows) == len(set(rows))
        assert set(rows) | besides == {field.name for field in dataclasses.fields(kind)}


def test_a_row_without_a_field_of_its_own_is_the_file_of_another_row():
    files = {variable.file for variable in VARIABLES if variable.file}
    assert {variable.name for variable in VARIABLES if variable.field is None} <= files


def test_the_defaults_of_the_table_are_valid_and_are_those_that_apply():
    written_out = {variable.name: variable.default for variable in VARIABLES if variable.default}
    assert WorkerSettings.from_env({**written_out, **MINIMAL}) == WorkerSettings.from_env(MINIMAL)


def test_the_required_variables_of_the_table_are_those_without_which_nothing_starts():
    required = {variable.name for variable in VARIABLES if variable.required}
    for name in MINIMAL:
        without = {other: value for other, value in MINIMAL.items() if other != name}
        assert len(problems(without)) == 1
    assert required | {"KALSHI_API_KEY_ID", "KALSHI_PRIVATE_KEY"} == set(MINIMAL)


# --- Redis ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_url", "url"),
    [
        ("redis://localhost", "redis://localhost/0"),
        ("redis://localhost/", "redis://localhost/0"),
        ("redis://localhost:6380/3", "redis://localhost:6380/3"),
        ("REDIS://localhost", "redis://localhost/0"),
        ("redis://user:p%40ss@10.0.0.1:6379/1", "redis://user:p%40ss@10.0.0.1:6379/1"),
        ("redis://:p;q@cache.internal", "redis://:p%3Bq@cache.internal/0"),
        ("redis://[::1]:6379", "redis://[::1]:6379/0"),
        ("rediss://h", "rediss://h/0?ssl_cert_reqs=required"),
        ("rediss://h/2?ssl_cert_reqs=CERT_NONE", "rediss://h/2?ssl_cert_reqs=none"),
        ("rediss://h?ssl_cert_reqs=optional", "rediss://h/0?ssl_cert_reqs=optional"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock?db=0"),
        ("unix://:pw@/run/a%20b.sock?db=4", "unix://:pw@/run/a%20b.sock?db=4"),
        ("sentinel://h1/main", "sentinel://h1:26379/main/0"),
        ("Sentinel://u:p;q@h1:1,[::1],h3/main/3/", "sentinel://u:p%3Bq@h1:1,[::1]:26379,h3:26379/main/3"),
        ("sentinel://h/m?sentinel_password=a%26b", "sentinel://h:26379/m/0?sentinel_password=a%26b"),
    ],
)
def test_a_redis_url_is_completed_with_database_and_tls_verification(given_url, url):
    settings = redis_settings(given_url)
    assert settings.redis_url == url
    assert redis_settings(url) == settings


def test_sentinels_are_told_apart_from_the_primary_that_they_know():
    settings = redis_settings("sentinel://worker:p%40ss@h1,[::1]:7/main/3?sentinel_password=a%26b")
    assert settings.sentinels == Sentinels(
        addresses=(("h1", 26379), ("::1", 7)),
        primary="main",
        database=3,
        login={"username": "worker", "password": "p@ss"},
        sentinel_login={"password": "a&b"},
    )
    assert settings.celery_url == "sentinel://worker:p%40ss@h1:26379/3;sentinel://worker:p%40ss@[::1]:7/3"
    assert settings.masked_url == "sentinel://worker:***@h1:26379,[::1]:7/main/3"
    assert not any(secret in repr(settings.sentinels) for secret in ("p@ss", "a&b"))
    assert redis_settings("redis://localhost").sentinels is None


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://localhost", "must start with redis://, rediss://, unix:// or sentinel:// (got http://)"),
        ("sentinel://localhost", "must be like sentinel://"),
        ("sentinel://h1,/main", "must be like sentinel://"),
        ("sentinel://h1:0/main", "must be like sentinel://"),
        ("sentinel://h1 ,h2/main", "must be like sentinel://"),
        ("sentinel://h1/main/zero", "must be like sentinel://"),
        ("sentinel://h1/main?ssl_cert_reqs=none", "only sentinel_password, sentinel_username can be given"),
        ("redis+socket:///run/redis.sock", "(got redis+socket://)"),
        ("localhost:6379", "(got no scheme)"),
        ("redis:/localhost", "(got no scheme)"),
        ("redis://", "names no host"),
        ("redis://:6379/0", "names no host"),
        ("redis://ho$t", "has a host that cannot be one"),
        ("redis://[::g]", "cannot be understood"),
        ("redis://host name", "cannot be understood"),
        ("redis://host:port", "cannot be understood"),
        ("redis://host:99999", "cannot be understood"),
        ("redis://host:", "cannot be understood"),
        ("redis://host:0", "cannot be understood"),
        ("redis://host/zero", "must end in a database number"),
        ("redis://host/0/1", "must end in a database number"),
        ("redis://host/0#1", "cannot be understood"),
        ("redis://host/0#", "cannot be understood"),
        ("redis://host?db=1", "none can be given with redis://"),
        ("redis://host?ssl_cert_reqs=none", "TLS needs rediss://"),
        (
            "rediss://host?ssl_check_hostname=false",
            "has parameters that are not supported: only ssl_ca_certs",
        ),
        ("rediss://host?ssl_cert_reqs=maybe", "ssl_cert_reqs=required, optional or none"),
        ("rediss://host?ssl_cert_reqs=", "ssl_cert_reqs=required, optional or none"),
        ("rediss://host?ssl_cert_reqs=required&ssl_cert_reqs=none", "has a parameter twice"),
        ("rediss://host?ssl_ca_certs=/nowhere/ca.pem", "ssl_ca_certs that names no file: /nowhere/ca.pem"),
        ("rediss://host?ssl_certfile=/" + "x" * 300, "ssl_certfile that names no file: /xxx"),
        ("unix://", "must name the socket by its full path"),
        ("unix:///", "must name the socket by its full path"),
        ("unix://run/redis.sock", "must name the socket by its full path"),
        ("unix:///run/redis.sock?db=x", "must have a database number as its db"),
        ("unix:///run/redis.sock?virtual_host=1", "only db can be given with unix://"),
    ],
)
def test_a_redis_url_that_cannot_work_is_refused_with_the_reason(url, problem):
    (found,) = problems({"REDIS_URL": url}, RedisSettings)
    assert found.startswith("REDIS_URL ")
    assert problem in found


@pytest.mark.parametrize(
    "url",
    [
        f"redis://user:{PASSWORD}@localhost:x/0",
        f"redis://user:{PASSWORD}@localhost/nine",
        f"redis://user:{PASSWORD}#{PASSWORD}@localhost/0",
        f"redis://user:{PASSWORD}/{PASSWORD}@localhost/0",
        f"redis://user:{PASSWORD}?{PASSWORD}@localhost/0",
        f"redis://user:1/{PASSWORD}@localhost/0",
        f"redis://user:1?{PASSWORD}@localhost/0",
        f"redis://:{PASSWORD} @localhost",
        f"redis://:[{PASSWORD}@localhost",
        f"redis://:{PASSWORD}",
        f"redis://{PASSWORD}!",
        f":{PASSWORD}@localhost",
        f"rediss://:{PASSWORD}@localhost?password={PASSWORD}&ssl_cert_reqs={PASSWORD}",
        f"unix://:{PASSWORD}@run/redis.sock",
        f"sentinel://:{PASSWORD}@h1",
        f"sentinel://:{PASSWORD}/{PASSWORD}@h1/main",
        f"sentinel://:{PASSWORD}@h1/main?sentinel_password={PASSWORD}&password={PASSWORD}",
    ],
)
def test_a_refused_redis_url_never_shows_its_password(url):
    with pytest.raises(SettingsError) as caught:
        RedisSettings.from_env({"REDIS_URL": url})
    assert caught.value.__context__ is None
    assert PASSWORD not in everything_shown_of(caught.value)


def test_a_redis_url_is_shown_with_its_password_masked():
    settings = redis_settings(f"rediss://user:{PASSWORD}@h:6379/1?ssl_cert_reqs=none")
    assert settings.masked_url == "rediss://user:***@h:6379/1"
    assert redis_settings("redis://h").masked_url == "redis://h/0"
    assert redis_settings(f"unix://:{PASSWORD}@/run/redis.sock").masked_url == "unix://:***@/run/redis.sock"
    assert PASSWORD not in repr(settings)


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://user:p%40s%2Fs%23;%25@10.0.0.1:7000/3",
        "redis://[::1]:7000/1",
        "rediss://:pw@h:7000/2",
        "rediss://h?ssl_cert_reqs=none",
        "unix://user:p%40ss@/run/a%20b.sock?db=4",
    ],
)
def test_redis_py_the_broker_and_the_result_backend_read_the_same_server_out_of_a_url(url):
    settings = redis_settings(url)
    client = redis.Redis.from_url(settings.redis_url).connection_pool.connection_kwargs
    app = Celery(broker=settings.celery_url, backend=settings.celery_url)
    backend = app.backend.connparams
    broker = broker_params(app)

    for reader in (client, backend, broker):
        assert {name: reader.get(name) for name in ("path", "username", "password")} == {
            name: client.get(name) for name in ("path", "username", "password")
        }
        assert int(reader["db"]) == client["db"]
        if "path" not in client:
            assert (reader["host"], int(reader.get("port", 6379))) == (
                client["host"],
                client.get("port", 6379),
            )
        if "ssl_cert_reqs" in client:
            wanted = {"required": ssl.CERT_REQUIRED, "none": ssl.CERT_NONE}
            reqs = reader["ssl_cert_reqs"]
            assert wanted.get(reqs, reqs) == wanted[client["ssl_cert_reqs"]]


def broker_params(app):
    """What the broker's channel would connect with, asked of the channel without connecting."""
    connection = app.connection()
    channel_class = connection.transport.Channel
    channel = channel_class.__new__(channel_class)
    channel.connection = connection.transport
    channel.connection.client = connection
    return channel._connparams()


@contextlib.contextmanager
def tls_server(context):
    """A TLS server's address, and per connection whether the handshake went through; complete at the end."""
    handshakes = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            client.settimeout(10)
            with client:
                try:
                    with context.wrap_socket(client, server_side=True) as secured:
                        handshakes.append(bool(secured.recv(1)))  # a client that trusts us says something
                except OSError:
                    handshakes.append(False)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"rediss://127.0.0.1:{listener.getsockname()[1]}", handshakes
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(timeout=30)


def reach(settings, reader):
    """One attempt of each library to connect; what becomes of the handshake is the server's to say."""
    app = Celery(broker=settings.celery_url, backend=settings.celery_url)
    with contextlib.suppress(Exception):
        if reader == "redis-py":
            redis.Redis.from_url(settings.redis_url).ping()
        elif reader == "broker":
            app.connection().ensure_connection(max_retries=1, interval_start=0.01, timeout=5)
        else:
            app.backend.client.ping()


@pytest.mark.parametrize("reader", ["redis-py", "broker", "backend"])
@pytest.mark.parametrize(
    ("options", "connects"), [("", False), ("?ssl_cert_reqs=none", True), ("?ssl_ca_certs={}", True)]
)
def test_tls_to_an_untrusted_redis_fails_unless_the_url_says_otherwise(
    reader, options, connects, certificate
):
    context, trusted = certificate
    with tls_server(context) as (url, handshakes):
        reach(redis_settings(url + options.format(trusted)), reader)
    assert handshakes
    assert any(handshakes) is connects


@pytest.mark.parametrize("prefix", ["-x", ":x", "a b", "a{b}", "a*", "é", "x" * 65, "a\nb"])
def test_a_key_prefix_that_is_not_simple_text_is_refused(prefix):
    assert only_problem(KALSHI_KEY_PREFIX=prefix).startswith("KALSHI_KEY_PREFIX must be at most 64 letters")


# --- The exchange -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_url", "url"),
    [
        ("https://external-api.kalshi.com/", "https://external-api.kalshi.com"),
        ("HTTPS://External-API.Kalshi.com", "https://external-api.kalshi.com"),
        ("https://external-api.demo.kalshi.co:8443", "https://external-api.demo.kalshi.co:8443"),
        ("https://10.0.0.1", "https://10.0.0.1"),
        ("https://[2001:db8::1]:443", "https://[2001:db8::1]:443"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("http://127.9.8.7/", "http://127.9.8.7"),
        ("http://[::1]:8080", "http://[::1]:8080"),
        ("http://localhost:8080", "http://localhost:8080"),
    ],
)
def test_a_base_url_is_kept_as_scheme_and_host(given_url, url):
    assert WorkerSettings.from_env({**MINIMAL, "KALSHI_BASE_URL": given_url}).base_url == url


@pytest.mark.parametrize(
    ("url", "got"),
    [
        ("external-api.kalshi.com", "(got no scheme)"),
        ("ftp://external-api.kalshi.com", "(got the scheme ftp)"),
        ("https://h/trade-api/v2", "(got a path: /trade-api/v2)"),
        ("https://h//", "(got a path: //)"),
        ("https://h?x=1", "(got a query)"),
        ("https://h?", "(got a query)"),
        ("https://h/#", "(got a fragment)"),
        ("https://h/a?b#c", "(got a path: /a, and a query, and a fragment)"),
        (f"https://user:{PASSWORD}@h", "(got a user name or password)"),
        ("https://@h", "(got a user name or password)"),
        ("https://", "(got no host)"),
        ("https://:443", "(got no host)"),
        ("https://ex ample", "(got something that is no URL)"),
        ("https://exa\tmple", "(got something that is no URL)"),
        ("https://h\\@evil", "(got something that is no URL)"),
        ("https://h:0", "(got something that is no URL)"),
        ("https://h:x", "(got something that is no URL)"),
        ("https://[::1", "(got something that is no URL)"),
        ("https://exämple.com", "(got a host that cannot be one)"),
        ("https://-a.com", "(got a host that cannot be one)"),
        ("https://[v1.a:b]", "(got a host that cannot be one)"),
        ("https://a..b", "(got a host that cannot be one)"),
    ],
)
def test_a_base_url_that_is_more_or_less_than_scheme_and_host_is_refused(url, got):
    found = only_problem(KALSHI_BASE_URL=url)
    assert found == f"{BASE_URL_RULE} {got}"


@pytest.mark.parametrize(
    "host",
    [
        "external-api.kalshi.com",
        "127.0.0.1.example.com",
        "localhost.example.com",
        "128.0.0.1",
        "0.0.0.0",
        "[2001:db8::1]",
        "2130706433",
        "127.1",
        "10.0.0.1",
    ],
)
def test_plain_http_is_refused_for_every_host_but_this_machine(host):
    assert "must begin with https://" in only_problem(KALSHI_BASE_URL=f"http://{host}:8080")


def url_texts(*schemes):
    """Any text, and text that looks more like a URL of these schemes."""
    after = st.text(max_size=40) | st.text("ab01.:@/?#[]%;&=\\ ", max_size=30)
    return st.text(max_size=60) | st.builds("{}://{}".format, st.sampled_from(schemes), after)


@given(url=url_texts("https", "http"))
def test_no_text_as_base_url_does_anything_but_fail_clearly_or_become_a_safe_url(url):
    try:
        base_url = WorkerSettings.from_env({**MINIMAL, "KALSHI_BASE_URL": url}).base_url
    except SettingsError as refused:
        problem = str(refused)
        assert problem.startswith("KALSHI_BASE_URL ")
        assert problem.isprintable()
    else:
        assert base_url.startswith(("https://", "http://localhost", "http://127.", "http://["))
        assert base_url.isascii()
        assert not set(base_url.split("://", 1)[1]) & set("/?#@\\ ")


@given(url=url_texts("redis", "rediss", "unix"))
def test_no_text_as_redis_url_does_anything_but_fail_clearly_or_become_a_url_that_redis_py_takes(url):
    try:
        settings = redis_settings(url)
    except SettingsError as refused:
        problem = str(refused)
        assert problem.isprintable()
    else:
        redis.ConnectionPool.from_url(settings.redis_url)
        assert redis_settings(settings.redis_url) == settings


@pytest.mark.parametrize("key_id", ["a b", "a\nb", "é", "x" * 257])
def test_a_key_id_that_could_not_travel_in_a_header_is_refused_without_beingshown(key_id):
    found = only_problem(KALSHI_API_KEY_ID=key_id)
    assert "printable ASCII" in found
    assert key_id not in found


def test_a_key_id_comes_out_of_a_file_without_its_line_end(tmp_path):
    file = tmp_path / "key-id"
    file.write_text("the-id\n")
    env = {**MINIMAL, "KALSHI_API_KEY_ID": "", "KALSHI_API_KEY_ID_PATH": str(file)}
    assert WorkerSettings.from_env(env).api_key_id == "the-id"
    assert problems({**env, "KALSHI_API_KEY_ID": "x"}) == (
        "KALSHI_API_KEY_ID_PATH and KALSHI_API_KEY_ID are both set: set one of them",
    )
    file.write_text(" \n")
    assert problems(env) == (f"KALSHI_API_KEY_ID_PATH: the file {shown(str(file))} is empty",)
    file.write_text(PEM)  # the wrong one of two files
    [found] = problems(env)
    assert "printable ASCII" in found
    assert "BEGIN" not in found


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (name, value, "a number of seconds from ")
        for name in (
            "KALSHI_CONNECT_TIMEOUT_S",
            "KALSHI_READ_TIMEOUT_S",
            "KALSHI_CALL_DEADLINE_S",
            "KALSHI_CANCEL_DEADLINE_S",
        )
        for value in ("0", "-1", "nan", "inf", "1e3", "1_0", "5s", "1,5", ".5", "99999999", "٣", "0x1", "1 2")
    ]
    + [("KALSHI_READ_LAG_S", value, "a number of seconds from 0 to 60") for value in ("-0.1", "61", "nan")]
    + [
        (name, value, f"a whole number of {unit} from ")
        for name, unit in (
            ("KALSHI_POOL_SIZE", "connections"),
            ("KALSHI_MAX_BODY_BYTES", "bytes"),
            ("KALSHI_RESULT_EXPIRES_S", "seconds"),
            ("KALSHI_AUDIT_MAX_ENTRIES", "entries"),
        )
        for value in ("0", "-5", "1.5", "1e6", "4 MiB", "999999999999")
    ],
)
def test_a_number_outside_its_bounds_or_no_number_at_all_is_refused(name, value, expected):
    found = only_problem(**{name: value})
    assert found.startswith(f"{name} must be {expected}")
    assert found.endswith(f"(got: {value})")


def test_a_bound_is_named_in_full_and_a_share_is_no_number_of_seconds():
    assert (
        only_problem(KALSHI_RISK_RESERVE="1")
        == "KALSHI_RISK_RESERVE must be a number from 0 to 0.95 (got: 1)"
    )
    assert only_problem(KALSHI_READ_TOKENS_PER_S="0") == (
        "KALSHI_READ_TOKENS_PER_S must be a number of tokens from 1 to 1000000000 (got: 0)"
    )
    assert only_problem(KALSHI_CANCEL_MAX_AGE_S="0") == (
        "KALSHI_CANCEL_MAX_AGE_S must be a number of seconds from 1 to 31536000 (got: 0)"
    )


def test_a_flag_is_true_or_false_and_nothing_in_between():
    for value, meant in {"1": True, "TRUE": True, "on": True, "0": False, "No": False, "off": False}.items():
        assert WorkerSettings.from_env({**MINIMAL, "KALSHI_TRUST_ENV": value}).trust_env is meant
    assert only_problem(KALSHI_TRUST_ENV="maybe") == "KALSHI_TRUST_ENV must be true or false (got: maybe)"


def test_a_long_or_unprintable_value_is_shown_short_and_in_one_line():
    assert only_problem(KALSHI_ORDERS_API="v\n\x1b2" + "x" * 100) == (
        f"KALSHI_ORDERS_API must be v2 or v1 (got: v??2{'x' * 53}...)"
    )


@pytest.mark.parametrize(
    "url",
    [
        f"socks5://user:{PASSWORD}@proxy:1080",
        f"user:{PASSWORD}@proxy:3128",
        f"http://user:{PASSWORD}@",
        f"http://user:{PASSWORD}@proxy:x",
        f"http://user:{PASSWORD}#@proxy:3128",
        f"http://user:1?{PASSWORD}@proxy:3128",
        f"http://user:{PASSWORD}@proxy:3128/path",
    ],
)
def test_a_proxy_that_cannot_work_is_refused_without_its_password(url):
    found = only_problem(KALSHI_HTTP_PROXY=url)
    assert found.startswith("KALSHI_HTTP_PROXY must be http:// or https://")
    assert PASSWORD not in found


def test_a_ca_bundle_is_a_pem_file_or_a_folder(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("nothing to trust")
    assert WorkerSettings.from_env({**MINIMAL, "KALSHI_CA_BUNDLE": str(tmp_path)}).ca_bundle == str(tmp_path)
    for path in (str(text), str(tmp_path / "missing.pem"), "a\0b", "x" * 300):
        assert "KALSHI_CA_BUNDLE must name a readable PEM file" in only_problem(KALSHI_CA_BUNDLE=path)


# --- The private key --------------------------------------------------------------------------------------


def with_key_path(path):
    env = {**MINIMAL, "KALSHI_PRIVATE_KEY_PATH": str(path)}
    del env["KALSHI_PRIVATE_KEY"]
    return env


def test_a_private_key_is_read_from_its_file_as_it_is(tmp_path):
    file = tmp_path / "key.pem"
    file.write_bytes(b"\xff whatever it holds \n")
    settings = WorkerSettings.from_env(with_key_path(file))
    assert settings.private_key == b"\xff whatever it holds \n"
    assert settings.private_key_path == str(file)


def test_a_private_key_set_twice_or_not_at_all_is_refused():
    assert only_problem(KALSHI_PRIVATE_KEY_PATH="/key.pem") == (
        "KALSHI_PRIVATE_KEY_PATH and KALSHI_PRIVATE_KEY are both set: set one of them"
    )
    assert only_problem(KALSHI_PRIVATE_KEY="") == (
        "neither KALSHI_PRIVATE_KEY_PATH nor KALSHI_PRIVATE_KEY is set: set one of them"
    )


def test_a_key_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # short names, which are shown whole
    Path("big").write_bytes(b"x" * 100_000)
    Path("folder").mkdir()
    reasons = {
        "missing.pem": "does not exist",
        "folder": "is not a file",
        "/dev/null": "is not a file",
        "big": "is larger than 64 KiB, which no key is",
        "big/key": "cannot be read (Not a directory)",
        "a\0b": "cannot be read (not a valid path)",
    }
    for path, reason in reasons.items():
        shown = path.replace("\0", "?")
        assert problems(with_key_path(path)) == (f"KALSHI_PRIVATE_KEY_PATH: the file {shown} {reason}",)

    def forbidden(self, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", forbidden)  # root may read everything, and CI often is root
    assert problems(with_key_path("big")) == (
        "KALSHI_PRIVATE_KEY_PATH: the file big may not be read by this user",
    )


@pytest.mark.parametrize(
    "key",
    [
        PEM,
        PEM.replace("\n", "\\n"),
        PEM.splitlines()[1] + "x" * 40,
        "M" + "secret" * 300,
        "MIIE\n" + "secret" * 10,
    ],
)
def test_a_key_given_where_its_path_belongs_is_recognised_and_notshown(key):
    assert problems(with_key_path(key)) == (
        "KALSHI_PRIVATE_KEY_PATH holds a key, not a path: put it into KALSHI_PRIVATE_KEY",
    )


def test_bytes_that_are_no_text_survive_the_environment():
    settings = WorkerSettings.from_env(
        {**MINIMAL, "KALSHI_PRIVATE_KEY": "k\udcff", "KALSHI_PRIVATE_KEY_PASSPHRASE": "p\udcffü"}
    )
    assert settings.private_key == b"k\xff"
    assert settings.private_key_passphrase == b"p\xff\xc3\xbc"


# --- Secrets ----------------------------------------------------------------------------------------------


def test_no_secret_is_in_the_repr_of_settings():
    settings = WorkerSettings.from_env(
        {
            **MINIMAL,
            "REDIS_URL": f"redis://:{PASSWORD}@localhost",
            "KALSHI_PRIVATE_KEY_PASSPHRASE": PASSWORD,
            "KALSHI_HTTP_PROXY": f"http://u:{PASSWORD}@proxy:3128",
        }
    )
    for text in (repr(settings), str(settings), repr(settings.redis), f"{settings}"):
        assert PASSWORD not in text
        assert "secret" not in text
        assert "BEGIN" not in text
    assert MINIMAL["KALSHI_API_KEY_ID"] in repr(settings)


def test_no_secret_is_in_the_error_or_its_traceback_when_everything_is_wrong():
    secrets = {variable.name: f"{PASSWORD} \x00" for variable in VARIABLES if variable.secret}
    rest = {variable.name: "wrong value" for variable in VARIABLES if not variable.secret}
    with pytest.raises(SettingsError) as caught:
        WorkerSettings.from_env({**rest, **secrets})
    assert len(caught.value.problems) >= 14
    assert caught.value.__context__ is None
    assert PASSWORD not in everything_shown_of(caught.value)


def test_settings_cannot_be_changed():
    settings = WorkerSettings.from_env(MINIMAL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.base_url = "https://evil.example"
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.redis.redis_url = "redis://evil.example"
    assert not hasattr(settings, "__dict__")


def test_a_second_broker_in_the_environment_is_refused():
    refuse_celery_overrides({"CELERY_BROKER_URL": "", "PATH": "/bin"})
    with pytest.raises(SettingsError, match=r"CELERY_BROKER_URL must not be set.*CELERY_RESULT_BACKEND"):
        refuse_celery_overrides({"CELERY_BROKER_URL": "redis://a", "CELERY_RESULT_BACKEND": "redis://b"})
