"""A producer in another language: Node.js runs the program in docs/how-to/producers.md as it stands there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid

import pytest
from jsonschema import Draft202012Validator
from test_readme import DOCS, blocks

from trials.stack import ROOT

[PROGRAM] = blocks(DOCS["docs/how-to/producers.md"], "js")
CLIENT = "redis@5.9.0"
RESULT = Draft202012Validator(json.loads((ROOT / "docs" / "schemas" / "result.json").read_text()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the program is, with the client that it imports."""
    npm = shutil.which("npm")
    if not (npm and shutil.which("node")):
        if os.environ.get("CI") == "true":
            pytest.fail("Node.js and npm are needed for the example in docs/how-to/producers.md")
        pytest.skip("Node.js and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    (folder / "producer.mjs").write_text(PROGRAM)
    install = [npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), CLIENT]
    subprocess.run(install, cwd=folder, check=True, timeout=100)
    return folder


@pytest.fixture
def ask(folder, stack):
    """Runs the program."""

    def ask(*arguments, url=stack.redis.url):
        return subprocess.run(
            ["node", "producer.mjs", *arguments],
            cwd=folder,
            env={"PATH": os.environ["PATH"], "REDIS_URL": url},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return ask


@pytest.mark.parametrize("queue", ["cancels", "risk"])
def test_a_node_program_cancels_an_order_and_prints_its_result(control, ask, client, queue):
    order_id = str(uuid.uuid4())
    control.place(order_id)
    done = ask(order_id, queue)
    assert (done.returncode, done.stderr) == (0, "")
    value = json.loads(done.stdout)
    RESULT.validate(value)
    assert (value["outcome"], value["reduced_by"], value["requested_by"]) == ("canceled", "10.00", ["node"])
    assert control.order(order_id)["status"] == "canceled"
    assert client.status(order_id).result.to_json() == value
    assert json.loads(ask(order_id).stdout) == value, "asked for again, it is answered from the record"


def test_a_node_program_is_told_what_is_wrong_with_its_order_id(control, ask):
    value = json.loads(ask("no such id!").stdout)
    assert (value["outcome"], value["error"]["code"]) == ("refused", "invalid_request")
    assert "order_id" in value["error"]["message"]
