"""What somebody else has put in the place of a key that every cancel needs stops no cancel for long."""

from __future__ import annotations

import pytest
import redis
import requests
from crew import PATIENCE_S

from kalshi_cancel.model.requests import Lane
from kalshi_cancel.store.scripts import StoreError
from trials.stack import free_port, wait_until

PREFIX = "kalshi-cancel"
NEEDED = (
    "due:strategy:write",
    "due:risk:write",
    "deadline",
    "paths",
    "fence",
    "claimed_ms",
    "limits",
    "bucket:write",
)


@pytest.fixture(scope="module")
def scene(shared_crew):
    """A database with one worker: its client, its Redis, and what is wrong with its services."""
    port = free_port()
    with shared_crew.apart(KALSHI_METRICS_PORT=str(port)) as apart:
        [worker] = apart.start()
        with redis.Redis.from_url(apart.url, decode_responses=True) as server:
            yield apart.client, server, worker, port


def accept(client, order_id, **fields):
    """Asks until it is accepted, as a producer does that is told that it was not."""

    def is_accepted():
        try:
            return client.cancel(order_id, **fields)
        except StoreError:
            return None

    return wait_until(is_accepted, within_s=PATIENCE_S, what="accepted")


def text(server, key):
    server.set(key, "what is this?")


def a_list(server, key):
    server.rpush(key, "what", "is", "this?")


@pytest.mark.parametrize("spoil", [text, a_list])
@pytest.mark.parametrize("name", NEEDED)
def test_what_is_in_the_place_of_a_key_that_every_cancel_needs_is_replaced(crew, scene, name, spoil):
    client, server, worker, port = scene
    strategys, risks, overdue, later, soon = crew.place(5)
    crew.control.fault("http_503", order_id=overdue)
    with crew.frozen(worker):  # so that there is something to lose
        waiting = [
            client.cancel(strategys, deadline_s=60),
            client.cancel(risks, lane=Lane.RISK, deadline_s=60),
        ]
        late = client.cancel(overdue, deadline_s=2)
        server.delete(f"{PREFIX}:{name}")
        spoil(server, f"{PREFIX}:{name}")
    waiting += [accept(client, later), accept(client, soon, lane=Lane.RISK)]
    assert {each.result(timeout=PATIENCE_S).outcome for each in waiting} == {"canceled"}
    assert late.result(timeout=PATIENCE_S).outcome == "unresolved"
    crew.control.clear_faults()
    wait_until(lambda: client.status(overdue).open is None, within_s=PATIENCE_S, what="settled")
    assert client.status(overdue).result.outcome == "canceled"
    ready = lambda: requests.get(f"http://127.0.0.1:{port}/ready", timeout=PATIENCE_S).json()["services"]  # noqa: E731
    wait_until(lambda: ready() == "ok", within_s=PATIENCE_S, what="all is well")
    assert server.zcard(f"{PREFIX}:deadline") == 0


def test_a_fencing_token_after_a_spoilt_one_is_no_earlier_one(crew, scene):
    client, server, worker, _ = scene
    [order_id] = crew.place()
    before = int(server.get(f"{PREFIX}:fence") or 0)
    server.set(f"{PREFIX}:fence", "1.5")
    assert client.cancel(order_id).result(timeout=PATIENCE_S).outcome == "canceled"
    wait_until(lambda: server.get(f"{PREFIX}:fence") != "1.5", within_s=PATIENCE_S, what="a fencing token")
    assert int(server.get(f"{PREFIX}:fence")) > before
    [line] = [each for each in worker.log_text().splitlines() if "event=keys_rebuilt" in each][-1:]
    assert line.endswith(f"keys={PREFIX}:fence")
