"""What watches and runs it in production: each query finds data, each alert fires on its trouble."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import requests
import yaml
from crew import PATIENCE_S, Crew

from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.scripts import connect
from trials.stack import KEY_ID, ROOT, Part, RedisServer, free_port, wait_until

DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
DASHBOARD = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
COMPARISON = re.compile(r"(.+) [<>] ([0-9.]+)")


def program(name: str) -> str:
    """The path of a program of Debian's package `prometheus`."""
    path = shutil.which(name)
    if path is None:
        assert os.environ.get("CI") != "true", f"{name} is missing: CI must have Prometheus"
        pytest.skip(f"no {name} here")
    return path


# -- the metrics, in a real Prometheus


class Watched:
    """Two workers in every kind of trouble, and a Prometheus that watches them."""

    def __init__(self, folder: Path) -> None:
        self.crew = Crew(
            folder / "crew",
            KALSHI_CANCEL_MAX_AGE_S="2",  # so that there are dead letters
            KALSHI_CANCEL_DEADLINE_S="1",
        )
        ports = [free_port(), free_port()]
        for port in ports:
            self.crew.stack.start_worker(KALSHI_METRICS_PORT=str(port))
        self.url = f"http://127.0.0.1:{free_port()}"
        self.part = Part(
            [
                program("prometheus"),
                f"--config.file={_configured(folder, [f'127.0.0.1:{port}' for port in ports])}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={self.url.removeprefix('http://')}",
                "--log.level=warn",
            ],
            log_path=folder / "prometheus.log",
        )
        self.part.wait_ready(self._answers, "Prometheus")

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/-/ready", timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    def close(self) -> None:
        """Ends everything."""
        self.part.stop()
        self.crew.close()

    def ask(self, path: str, **parameters: str) -> dict:
        """The data of an answer of Prometheus' API."""
        answer = requests.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def values(self, query: str) -> list[float]:
        """The numbers that a query gives at this moment."""
        found = [float(each["value"][1]) for each in self.ask("query", query=query)["result"]]
        return [value for value in found if not math.isnan(value)]

    def failure(self) -> None:
        """Cancels of both lanes, and everything that can happen to one."""
        crew, control = self.crew, self.crew.control
        refused, limited, lost, dead, stuck = crew.place(5)
        control.fault("status", order_id=refused, operation="cancel", status=403, code="forbidden")
        control.fault("http_429", order_id=limited, operation="cancel", times=2)
        control.fault("drop_after", order_id=lost, operation="cancel", times=1)
        control.fault("http_503", order_id=dead)
        control.fault("http_503", order_id=stuck)
        for order_id in (refused, limited, lost, dead):
            crew.client.cancel(order_id, deadline_s=1)
            crew.wait_sent(order_id)  # alone: what waits together goes out in a batch, past these faults
        crew.client.cancel(str(uuid.uuid4()))  # which the exchange does not know
        control.place(client_order_id="mm-1")
        for scope in ({"client_order_id_prefix": "mm-"}, {"order_ids": [stuck]}):
            crew.client.mass_cancel(scope, deadline_s=1)
        settings = RedisSettings.from_env({"REDIS_URL": crew.redis.url})
        with connect(settings) as server:  # accepted, but nobody is told
            [order_id] = crew.place()
            CancelStore(server, settings).accept(
                [CancelRequest(order_id)], lane=Lane.STRATEGY, default_deadline_s=10
            )

    def work(self) -> None:
        """Some cancels of either lane."""
        for lane in Lane:
            self.crew.client.cancel_many(self.crew.place(5), lane=lane).results(PATIENCE_S)
            self.crew.client.cancel(*self.crew.place(), lane=lane).result(PATIENCE_S)


def _configured(folder: Path, targets: list[str]) -> Path:
    """The configuration that is shipped, but for what is to be watched, and how often."""
    shutil.copy(DEPLOY / "prometheus/alerts.yml", folder)
    configuration = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    configuration["global"] = dict.fromkeys(
        ("scrape_interval", "scrape_timeout", "evaluation_interval"), "1s"
    )
    [job] = configuration["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": targets}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(configuration))
    return path


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Iterator[Watched]:
    program("prometheus")
    watched = Watched(tmp_path_factory.mktemp("watched"))
    try:
        wait_until(lambda: watched.values('sum(up{job="kalshi-cancel"})') == [2], what="both workers scraped")
        watched.failure()
        yield watched
    finally:
        watched.close()


def all_have_data(watched: Watched, queries: list[str]) -> None:
    """Waits, while work goes on, until every query has given a number; fails naming those that have not."""
    missing = list(queries)

    def look() -> bool:
        watched.work()
        missing[:] = [query for query in missing if not watched.values(query)]
        return not missing

    try:
        wait_until(look, what="data")
    except TimeoutError:
        pytest.fail("no data: " + "\n".join(missing))


def test_every_query_of_the_dashboard_finds_data_of_running_workers(watched):
    queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
    assert len(queries) > 30
    all_have_data(watched, [query.replace("$__rate_interval", "30s") for query in queries])


def test_every_alerts_query_finds_data_of_running_workers(watched):
    all_have_data(watched, [COMPARISON.fullmatch(rule["expr"])[1] for rule in RULES])


def test_prometheus_evaluates_every_rule_without_an_error(watched):
    def rules():
        [group] = watched.ask("rules")["groups"]
        return group["rules"]

    wait_until(lambda: all(rule["health"] != "unknown" for rule in rules()), what="all rules evaluated")
    assert {rule["name"]: rule.get("lastError", "") for rule in rules() if rule["health"] != "ok"} == {}
    assert [rule["name"] for rule in rules()] == [rule["alert"] for rule in RULES]


def test_alerts_fire_on_real_failure(watched):
    """Those that need not wait for long; the others' failures are in tests/alerts.yml."""

    def firing():
        return {
            each["labels"]["alertname"]
            for each in watched.ask("alerts")["alerts"]
            if each["state"] == "firing"
        }

    expected = {"DeadLetters", "CancelsRefused", "MassCancelNotFlat"}
    # A dead letter may take half a minute: the pauses between tries have grown.
    try:
        wait_until(lambda: firing() >= expected, within_s=90)
    except TimeoutError:
        pytest.fail(f"not firing: {expected - firing()}")
    assert not firing() & {"NoWorker", "WorkerDown", "RedisUnreachable", "KeysDiffer"}


def test_what_is_measured_names_the_key_by_its_id_only(watched):
    wait_until(lambda: watched.values("kalshi_cancel_key_info"), what="the key's id")
    series = watched.ask("query", query="kalshi_cancel_key_info")["result"]
    assert {each["metric"]["key_id"] for each in series} == {KEY_ID}


# -- rules, dashboard and runbooks as they are written


def test_every_alert_fires_when_all_is_wrong_and_none_when_all_is_well():
    command = [program("promtool"), "test", "rules", ROOT / "tests/alerts.yml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_scenario_in_which_all_is_wrong_leaves_no_alert_out():
    *_, wrong = yaml.safe_load((ROOT / "tests/alerts.yml").read_text())["tests"]
    [expected] = wrong["promql_expr_test"]
    fire = [re.search(r'"(\w+)"', sample["labels"])[1] for sample in expected["exp_samples"]]
    assert fire == [rule["alert"] for rule in RULES]


@pytest.mark.parametrize(("kind", "file"), [("rules", "alerts.yml"), ("config", "prometheus.yml")])
def test_promtool_has_nothing_to_say_about(kind, file):
    command = [program("promtool"), "check", kind, DEPLOY / "prometheus" / file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_each_alert_has_its_runbook_with_its_severity():
    text = (ROOT / "docs/how-to/runbooks.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \((\w+)\) \| (.+) \|$", text, re.MULTILINE)
    assert [(name, severity) for name, severity, _ in rows] == [
        (rule["alert"], rule["labels"]["severity"]) for rule in RULES
    ]
    assert all(len(rest.split(" | ")) == 3 for _, _, rest in rows)


def test_each_panel_has_its_place_and_its_queries():
    taken = {}
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert x < 24
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    assert all(panel["targets"] for panel in PANELS)


def test_every_panel_asks_the_data_source_that_is_provisioned():
    folder = DEPLOY / "grafana/provisioning"
    [source] = yaml.safe_load((folder / "datasources/prometheus.yml").read_text())["datasources"]
    assert {target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]} == {source["uid"]}
    [provider] = yaml.safe_load((folder / "dashboards/kalshi-cancel.yml").read_text())["providers"]
    mounts = [volume.split(":")[1] for volume in compose()["services"]["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/dashboard.json" in mounts


# -- compose.yaml


def compose() -> dict:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_the_compose_file_follows_the_schema_of_compose():
    done = subprocess.run(
        [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_what_the_compose_file_mounts_and_builds_is_there():
    for name, service in compose()["services"].items():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), f"{name}: {source}"
        if "build" in service:
            assert (DEPLOY / service["build"] / "Dockerfile").exists()


def test_the_compose_file_names_fixed_versions_and_holds_no_secret():
    for name, service in compose()["services"].items():
        assert service["image"] == "kalshi-cancel" or re.search(r":v?\d+\.\d+", service["image"]), name
        for variable, value in service.get("environment", {}).items():
            assert not re.search(r"PASS|SECRET|TOKEN", variable) or value.startswith("${"), variable
    url = compose()["services"]["worker"]["environment"]["REDIS_URL"]
    assert url.startswith("redis://worker:${WORKER_PASSWORD:?")


def test_what_a_compose_worker_is_given_are_settings_that_there_are(stack, tmp_path):
    """A worker starts with them, but for what names other machines."""
    given = compose()["services"]["worker"]["environment"]
    here = {
        "REDIS_URL": stack.redis.url,
        "KALSHI_BASE_URL": stack.control.url,
        "KALSHI_API_KEY_ID": KEY_ID,
        "KALSHI_PRIVATE_KEY_PATH": str(stack.keys.private_path),
        "KALSHI_METRICS_HOST": "127.0.0.1",
        "KALSHI_METRICS_PORT": str(free_port()),
    }
    assert set(given) == set(here)
    [job] = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert str(job["dns_sd_configs"][0]["port"]) == given["KALSHI_METRICS_PORT"]
    command = compose()["services"]["risk"]["command"]
    worker = Part([BIN / command[0], *command[1:]], log_path=tmp_path / "log", env=stack.environment | here)
    worker.wait_ready(lambda: " ready." in worker.log_text(), "the risk worker")
    try:
        url = f"http://127.0.0.1:{here['KALSHI_METRICS_PORT']}/metrics"
        assert "kalshi_cancel_open" in requests.get(url, timeout=10).text
    finally:
        assert worker.stop() == 0


def test_valkey_starts_with_the_configuration_of_the_compose_file_and_lets_nobody_in_unasked(tmp_path):
    users = (DEPLOY / "redis/users.acl").read_text()
    (tmp_path / "users.acl").write_text(re.sub(r"#SHA256-OF-[A-Z-]+-PASSWORD", ">secret", users))
    text = (DEPLOY / "redis/valkey.conf").read_text()
    assert ("dir /data" in text, "aclfile /etc/valkey/users.acl" in text) == (True, True)
    configuration = tmp_path / "valkey.conf"
    configuration.write_text(
        text.replace("/data", str(tmp_path)).replace("/etc/valkey/users.acl", str(tmp_path / "users.acl"))
    )
    server = ConfiguredServer(tmp_path, configuration)
    server.start()
    try:
        with server.client() as client, pytest.raises(redis.AuthenticationError):
            client.ping()
        admin = redis.Redis(port=server.port, username="admin", password="secret", decode_responses=True)
        with admin:
            wanted = ("appendonly", "appendfsync", "maxmemory-policy")
            assert [admin.config_get(name)[name] for name in wanted] == ["yes", "always", "noeviction"]
    finally:
        server.stop()


class ConfiguredServer(RedisServer):
    """A server that is started with a file instead of our options."""

    def __init__(self, folder: Path, configuration: Path) -> None:
        super().__init__(folder)
        self._command = [self._program, str(configuration), "--port", str(self.port), "--bind", "127.0.0.1"]

    def start(self) -> ConfiguredServer:
        self._part = Part(self._command, log_path=self.folder / "server.log")
        self._part.wait_ready(self._answers, "the Redis server")
        return self
