"""What is shipped is complete and starts: locks, wheel, Procfile, image, CI script, licence."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import requests
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from kalshi_cancel.client import CancelClient
from kalshi_cancel.model.requests import Lane
from trials.stack import ROOT, Part

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = ("requirements.lock", "requirements-dev.lock")
BIN = Path(sys.executable).parent


# -- the locks


def locked(name: str) -> dict[str, list[tuple[Version, int]]]:
    """The versions of each package in a lock, one for each platform, and how many hashes each has."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    found: dict[str, list[tuple[Version, int]]] = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            requirement, *hashes = re.split(r"\s+--hash=", line.strip())
            pinned = Requirement(requirement)
            [pin] = pinned.specifier
            assert pin.operator == "==", f"{name}: {requirement} is not pinned"
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), (
                f"{name}: {requirement}"
            )
            found.setdefault(canonicalize_name(pinned.name), []).append((Version(pin.version), len(hashes)))
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_hashes(name):
    assert [package for package, pins in locked(name).items() if not all(hashes for _, hashes in pins)] == []


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_no_place_to_download_from(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if "://" in line or line.startswith("-") or " @ " in line] == []


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("requirements.lock", PROJECT["project"]["dependencies"]),
        ("requirements-dev.lock", PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["dev"]),
    ],
)
def test_a_lock_holds_what_the_project_asks_for(name, wanted):
    pins = locked(name)
    for requirement in map(Requirement, wanted):
        versions = [version for version, _ in pins.get(canonicalize_name(requirement.name), [])]
        assert versions, f"{requirement} is not in {name}: run make lock"
        assert all(requirement.specifier.contains(version) for version in versions), str(requirement)


def test_development_runs_on_the_very_versions_that_production_gets():
    production, development = locked("requirements.lock"), locked("requirements-dev.lock")
    assert {name: development.get(name) for name in production} == production


# -- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The project's wheel, built from a copy: building leaves traces in the folder it builds from."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "celeryconfig.py"):
        shutil.copy(ROOT / name, source)
    for name in ("kalshi_cancel", "worker", "trials"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    done = subprocess.run(
        [*command, "-w", target, source], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    [path] = target.glob("*.whl")
    return path


def test_the_wheel_holds_every_file_of_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("**/*.py", "store/lua/*.lua", "py.typed")
        for path in (ROOT / "kalshi_cancel").glob(pattern)
    }
    assert any(name.endswith(".lua") for name in wanted)
    assert "kalshi_cancel/py.typed" in wanted
    assert wanted - names == set()


def test_the_wheel_holds_nothing_but_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    [package, info] = sorted({name.split("/")[0] for name in names})
    assert package == "kalshi_cancel"
    assert info.endswith(".dist-info")
    assert [name for name in names if re.search(r"\.pem$|\.env|secret", name)] == []


def test_the_wheel_brings_the_command_and_the_licence(wheel):
    archive = zipfile.ZipFile(wheel)
    [info] = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    assert "cancelctl = kalshi_cancel.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert "MIT License" in archive.read(f"{info}/licenses/LICENSE").decode()
    metadata = archive.read(f"{info}/METADATA").decode()
    for requirement in PROJECT["project"]["dependencies"]:
        assert re.search(
            rf"^Requires-Dist: {re.escape(Requirement(requirement).name)}\b", metadata, re.MULTILINE
        )


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with nothing but what the wheel holds."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_the_wheel_alone_is_enough_for_a_producer(installed, stack, control, order_id, tmp_path):
    control.place(order_id)
    script = (
        "import sys, kalshi_cancel as c; assert c.__file__.startswith(sys.argv[1]), c.__file__;"
        " print(c.CancelClient.from_env().cancel(sys.argv[2]).result(timeout=10).outcome)"
    )
    for name in ("worker", "sandbox"):  # a strategy's own modules stand in nobody's way
        (tmp_path / f"{name}.py").write_text("raise AssertionError('not ours')\n")
    done = subprocess.run(
        [sys.executable, "-c", script, installed, order_id],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "REDIS_URL": stack.redis.url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout.strip(), done.returncode) == ("canceled", 0), done.stderr


def test_the_version_is_the_projects_one(installed):
    done = subprocess.run(
        [sys.executable, "-m", "kalshi_cancel.cli", "--version"],
        cwd=installed,
        env={"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == f"cancelctl {PROJECT['project']['version']}\n", done.stderr
    latest = re.search(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert latest == PROJECT["project"]["version"]


# -- Procfile and Dockerfile


def procfile() -> dict[str, str]:
    lines = (ROOT / "Procfile").read_text().splitlines()
    return dict(re.fullmatch(r"([a-z]+): (.+)", line).groups() for line in lines)


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def last_stage() -> list[tuple[str, str]]:
    found = instructions()
    start = max(at for at, (word, _) in enumerate(found) if word == "FROM")
    return found[start:]


def command_of(word: str) -> list[str]:
    """The command of the image's CMD or HEALTHCHECK; fails for the shell form."""
    [arguments] = [arguments for each, arguments in last_stage() if each == word]
    command = json.loads(arguments[arguments.index("[") :])
    assert all(isinstance(each, str) for each in command)
    return command


@pytest.fixture
def start(stack, tmp_path) -> Iterator:
    """Starts a command as its platform would, with the stack's environment and the installed programs."""
    parts = []

    def start(command: list[str]) -> Part:
        env = stack.environment | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        parts.append(Part(command, log_path=tmp_path / f"{len(parts)}.log", env=env))
        return parts[-1]

    yield start
    for part in parts:
        part.stop()


@pytest.mark.parametrize("name", ["worker", "risk"])
def test_a_procfile_line_starts_a_worker_that_a_signal_ends_in_good_order(start, name):
    part = start(["sh", "-c", procfile()[name]])
    part.wait_ready(lambda: " ready." in part.log_text(), f"{name} of the Procfile")
    queues = re.findall(r"\.> (\w+) +exchange=", part.log_text())
    assert queues == {"worker": ["cancels", "risk"], "risk": ["risk"]}[name]
    assert part.stop() == 0


def test_the_procfiles_workers_have_names_of_their_own(start):
    parts = [start(["sh", "-c", command]) for command in [*procfile().values(), procfile()["worker"]]]
    names = set()
    for part in parts:
        part.wait_ready(lambda: " ready." in part.log_text(), "a worker")  # noqa: B023 - called at once
        names.add(re.search(r"(\S+@\S+) ready\.", part.log_text())[1])
    assert len(names) == len(parts)


def free_pair(apart):
    """A port that is free, and so is the one so far above it; connections out are given higher ones."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as first, socket.socket() as second, suppress(OSError):
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + apart))
            return port
    raise OSError("no pair of ports is free")


def test_honcho_runs_the_procfile_and_ends_it_in_good_order(start, stack, control):
    port = free_pair(100)  # honcho counts on from the first
    url = stack.redis.url.removesuffix("/0") + "/7"  # to which no other worker listens
    environment = {"REDIS_URL": url, "KALSHI_SHUTDOWN_S": "4"}
    settings = [f"{name}={value}" for name, value in environment.items()]
    honcho = start(["env", *settings, "honcho", "start", "-d", str(ROOT), "-p", str(port)])
    honcho.wait_ready(lambda: honcho.log_text().count(" ready.") == 2, "the Procfile's processes")
    names = dict(re.findall(r"(worker|risk)\.1 +\| .* (\S+@\S+) ready\.", honcho.log_text()))
    assert set(names) == {"worker", "risk"}
    with closing(CancelClient(url, requested_by="test")) as client:
        for lane in Lane:
            order_ids = [control.place()["order_id"] for _ in range(10)]
            results = client.cancel_many(order_ids, lane=lane).results(30)
            assert {result.outcome for result in results} == {"canceled"}
    for offset in (0, 100):
        assert (
            "kalshi_cancel_open" in requests.get(f"http://127.0.0.1:{port + offset}/metrics", timeout=10).text
        )
    honcho.signal(signal.SIGTERM)
    assert honcho.process.wait(15) == 128 + signal.SIGTERM
    assert honcho.log_text().count("stopped (rc=0)") == 2


def test_the_images_command_starts_a_worker_that_a_signal_ends_in_good_order(start, installed, tmp_path):
    # As in the image: the wheel, and beside it the service.
    shutil.copy(ROOT / "celeryconfig.py", tmp_path)
    shutil.copytree(ROOT / "worker", tmp_path / "worker", ignore=shutil.ignore_patterns("__pycache__"))
    in_app = ["env", "-C", str(tmp_path), f"PYTHONPATH={installed}"]
    part = start([*in_app, *command_of("CMD")])
    part.wait_ready(lambda: " ready." in part.log_text(), "the image's worker")
    part.signal(signal.SIGTERM)
    assert part.process.wait(15) == 0
    assert ("STOPSIGNAL", "SIGTERM") in last_stage()


def test_the_image_is_built_in_two_stages_from_pinned_bases():
    froms = [arguments for word, arguments in instructions() if word == "FROM"]
    assert len(froms) == 2
    assert all(re.match(r"python:3\.\d+\.\d+-slim-\w+( AS \w+)?$", each) for each in froms)
    copies = [arguments for word, arguments in last_stage() if word == "COPY"]
    assert copies == ["--from=build /opt/venv /opt/venv", "celeryconfig.py ./", "worker worker"]


def test_the_image_installs_only_what_the_lock_allows():
    installs = [
        command
        for word, arguments in instructions()
        if word == "RUN"
        for command in re.split(r"&&", arguments)
        if re.search(r"\bpip\b.* install ", command)
    ]
    assert len(installs) == 3
    assert all("--require-hashes" in each or "--no-deps --no-index" in each for each in installs)


def test_the_images_user_is_not_root():
    users = [arguments for word, arguments in last_stage() if word == "USER"]
    assert users
    assert int(users[-1]) > 0
    words = [word for word, _ in last_stage()]
    assert words.index("USER") < words.index("CMD")


def test_the_image_holds_no_secret():
    named = [arguments for word, arguments in instructions() if word in ("ENV", "ARG")]
    named = [each.replace("KALSHI_HEARTBEAT_FILE", "") for each in named]
    assert not any(re.search(r"KALSHI|REDIS|KEY|SECRET|TOKEN|PASS", each, re.IGNORECASE) for each in named)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert next(line for line in ignored if not line.startswith("#")) == "*"
    assert "**/*.pem" in ignored


def test_what_the_image_copies_is_there_and_is_not_ignored():
    let_through = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = {
        source
        for word, arguments in instructions()
        if word == "COPY" and not arguments.startswith("--from")
        for source in arguments.split()[:-1]
    }
    assert copied == let_through
    assert all((ROOT / source).exists() for source in copied)


def test_the_images_recipe_for_the_build_tool_finds_it_in_the_lock(tmp_path):
    [recipe] = [
        re.search(r"sed -n '([^']+)' requirements-dev\.lock", arguments)[1]
        for word, arguments in instructions()
        if word == "RUN" and "sed -n" in arguments
    ]
    done = subprocess.run(
        ["sed", "-n", recipe, ROOT / "requirements-dev.lock"], capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"setuptools==\S+ \\\n(    --hash=sha256:[0-9a-f]{64}( \\)?\n)+", done.stdout)


def test_hadolint_has_nothing_to_say():
    done = subprocess.run(
        [BIN / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


class Image:
    """What the Dockerfile's steps make, each done in order below a folder that stands for `/`.

    Not done: the base image (this Python stands for its own), a user of its own, layers.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.env = {
            name: value for name, value in os.environ.items() if not name.startswith(("KALSHI", "REDIS"))
        }
        self.env["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        self.env["PIP_NO_COMPILE"] = "1"  # Python compiles what is imported, a part of what is installed
        self.folder = root
        for word, arguments in instructions():
            getattr(self, f"_{word.lower()}", lambda _arguments: None)(arguments)

    def here(self, text: str) -> str:
        """A text with the image's paths as they are here."""
        return re.sub(r"(?<![\w/.])/(opt|build|app|dev)\b", rf"{self.root}/\1", text)

    def _env(self, arguments: str) -> None:
        for name, value in (each.split("=", 1) for each in shlex.split(arguments)):
            self.env[name] = self.here(value).replace("$PATH", self.env["PATH"])

    def _workdir(self, arguments: str) -> None:
        self.folder = Path(self.here(arguments))
        self.folder.mkdir()

    def _copy(self, arguments: str) -> None:
        *sources, target = arguments.split()
        if sources[0].startswith("--from"):
            assert sources[1] == target, "what is copied to the same place is there already"
            return
        for source in sources:
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, self.folder / target, ignore=ignored)
            else:
                shutil.copy(ROOT / source, self.folder / target)

    def _run(self, arguments: str) -> None:
        if arguments.startswith("useradd"):
            return
        done = subprocess.run(
            ["sh", "-ec", self.here(arguments)],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Image:
    return Image(tmp_path_factory.mktemp("image"))


@pytest.mark.timeout(300)
def test_the_images_steps_install_exactly_what_is_locked(image):
    opt = image.root / "opt"
    command = [opt / "tools/bin/pip", "--python", opt / "venv", "list", "--format=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {canonicalize_name(each["name"]): Version(each["version"]) for each in json.loads(done.stdout)}
    pins = locked("requirements.lock")
    assert {name: version for name, version in found.items() if name != "kalshi-cancel"} == {
        name: version for name, pinned in pins.items() for version, _ in pinned if found.get(name) == version
    }
    assert {Requirement(each).name for each in PROJECT["project"]["dependencies"]} <= set(found)
    assert found["kalshi-cancel"] == Version(PROJECT["project"]["version"])


@pytest.mark.timeout(300)
def test_the_images_worker_works_and_its_health_check_tells_that_it_lives(image, stack, control, tmp_path):
    (image.root / "dev/shm").mkdir(parents=True, exist_ok=True)
    url = stack.redis.url.removesuffix("/0") + "/8"  # to which no other worker listens
    own = {name: image.env[name] for name in ("PATH", "PYTHONUNBUFFERED", "KALSHI_HEARTBEAT_FILE")}
    env = stack.environment | own | {"REDIS_URL": url}

    def run(word: str) -> Part:
        program, *arguments = command_of(word)
        command = ["env", "-C", str(image.folder), str(image.root / "opt/venv/bin" / program), *arguments]
        return Part(command, log_path=tmp_path / f"{word}.log", env=env)

    assert run("HEALTHCHECK").process.wait(30) == 1
    worker = run("CMD")
    try:
        worker.wait_ready(lambda: " ready." in worker.log_text(), "the image's worker")
        assert run("HEALTHCHECK").process.wait(30) == 0
        with closing(CancelClient(url)) as client:
            assert client.cancel(control.place()["order_id"]).result(30).outcome == "canceled"
        worker.signal(signal.SIGSTOP)
        os.utime(env["KALSHI_HEARTBEAT_FILE"], (0, 0))  # as after some time
        assert run("HEALTHCHECK").process.wait(30) == 1
    finally:
        assert worker.stop() == 0


# -- habits: what runs before a commit


def test_the_hooks_before_a_commit_run_the_checks_of_make_lint():
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [shlex.split(hook["entry"]) for hook in repository["hooks"]]
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    commands = [shlex.split(line) for line in re.findall(r"^\t@\$\(BIN\)/(.+)$", lint, re.MULTILINE)]
    assert [hook[0] for hook in hooks] == [f".venv/bin/{command[0]}" for command in commands]
    assert [hook[1:2] for hook in hooks] == [command[1:2] for command in commands]


# -- CI


@pytest.mark.parametrize(
    ("printed", "code", "last_line"),
    [
        ("312 passed in 88.20s (0:01:28)", 0, "312 passed in 88.20s (0:01:28)"),
        ("=== 1 failed, 311 passed in 9.01s ===", 2, "=== 1 failed, 311 passed in 9.01s ==="),
        ("no pytest at all", 2, "0 passed, 1 failed: the tests did not run to their end"),
    ],
)
def test_the_ci_script_ends_with_the_count_and_fails_when_a_step_does(tmp_path, printed, code, last_line):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    tools = tmp_path / "bin"
    tools.mkdir()
    make = tools / "make"
    make.write_text(f"#!/bin/sh\necho $1 >> made\n[ $1 = test ] || exit 0\necho '{printed}'\nexit {code}\n")
    make.chmod(0o755)
    done = subprocess.run(
        [tmp_path / ".ci" / "run"],
        env={"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == last_line, done.stderr
    assert done.returncode == code
    assert (tmp_path / "made").read_text().split() == ["--version", "test", "lint"]


def test_the_licence_is_the_one_that_the_project_names():
    assert PROJECT["project"]["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n")
