"""Redis with replicas: three Sentinels that fail over, and what a failover loses, measured.

    python -m trials.failover                       # the table of docs/how-to/redis.md, about two minutes

What is lost is what the primary had acknowledged and the replica had not got. So producers accept cancels as
fast as they can while the primary is killed; then the replica is asked for each of them.
"""

from __future__ import annotations

import argparse
import queue
import socket
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import redis

from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.scripts import StoreError, connect
from trials.stack import NotReady, Part, RedisServer, free_port, valkey_server, wait_until

PRIMARY = "cancels"  # what the Sentinels call it
DOWN_AFTER_MS = 1000
MAX_LAG_S = 3
CUT_OFF_S = 10.0


class WatchedRedis:
    """A primary, two replicas, and three Sentinels that fail over from one to the other.

    ``options`` are the servers', ``lines`` go into each ``sentinel.conf``; ``login`` is ``user:password@``.
    """

    def __init__(
        self, folder: Path, *, options: Iterable[str] = (), lines: Iterable[str] = (), login: str = ""
    ) -> None:
        # A replica that has more than the new primary takes all anew; nothing is kept twice until it has.
        options = [*options, "--repl-diskless-sync-delay", "0"]
        first = RedisServer(folder / "first", options=options)
        following = [*options, "--replicaof", "127.0.0.1", str(first.port)]
        self.servers = [
            first,
            *(RedisServer(folder / name, options=following) for name in ("second", "third")),
        ]
        self._lines = list(lines)
        self._login = login
        self.sentinels: list[Part] = []
        self._ports = [free_port() for _ in range(3)]
        self._folder = folder

    @property
    def url(self) -> str:
        """What goes into REDIS_URL."""
        addresses = ",".join(f"127.0.0.1:{port}" for port in self._ports)
        return f"sentinel://{self._login}{addresses}/{PRIMARY}/0"

    def start(self) -> Self:
        """Starts everything and waits until a failover would succeed."""
        for server in self.servers:
            server.start()
        for port in self._ports:
            self.start_sentinel(port)
        wait_until(self.is_settled, what="Sentinels that know each other and the replicas")
        return self

    def start_sentinel(self, port: int) -> None:
        """Starts the Sentinel of this port."""
        folder = self._folder / f"sentinel-{port}"
        folder.mkdir(exist_ok=True)
        configuration = folder / "sentinel.conf"
        configuration.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor {PRIMARY} 127.0.0.1 {self.servers[0].port} 2\n"
            f"sentinel down-after-milliseconds {PRIMARY} {DOWN_AFTER_MS}\n"
            f"sentinel failover-timeout {PRIMARY} 5000\n" + "".join(f"{line}\n" for line in self._lines)
        )
        command = [valkey_server(), str(configuration), "--sentinel"]
        self.sentinels.append(Part(command, log_path=folder / "log"))

    def ask(self, at: int = 0) -> redis.Redis:
        """A client of a Sentinel."""
        return redis.Redis(port=self._ports[at], decode_responses=True)

    def primary(self) -> RedisServer:
        """Whom most of the Sentinels take for the primary."""
        ports = []
        for at in range(3):
            with self.ask(at) as sentinel:
                try:
                    ports.append(int(sentinel.sentinel_get_master_addr_by_name(PRIMARY)[1]))
                except redis.RedisError:
                    continue
        port = statistics.mode(ports)
        return next(server for server in self.servers if server.port == port)

    def is_settled(self) -> bool:
        """Whether all Sentinels know each other, the primary, and replicas that follow it."""
        try:
            return all(self._knows_all(at) for at in range(3))
        except redis.RedisError:
            return False

    def _knows_all(self, at: int) -> bool:
        with self.ask(at) as sentinel:
            state: dict[str, Any] = sentinel.sentinel_master(PRIMARY)
            replicas: list[dict[str, Any]] = sentinel.sentinel_slaves(PRIMARY)
        return (
            state["num-other-sentinels"] == len(self._ports) - 1
            and state["flags"] == "master"
            and [replica["flags"] for replica in replicas] == ["slave"] * (len(self.servers) - 1)
            and all(replica["master-link-status"] == "ok" for replica in replicas)
        )

    def stop(self) -> None:
        """Ends everything."""
        for sentinel in self.sentinels:
            sentinel.stop()
        for server in self.servers:
            server.stop()


class Link:
    """What is between a replica and its primary: hands on after ``delay_s``, or nothing when it is cut."""

    def __init__(self, to_port: int, delay_s: float) -> None:
        self.port = free_port()
        self.is_cut = threading.Event()
        self._to_port = to_port
        self._delay_s = delay_s
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Nothing that is still under way arrives."""
        self.is_cut.set()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to_port))
            except OSError:
                return
            for source, target in ((near, far), (far, near)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
                threading.Thread(target=self._take, args=(source, under_way), daemon=True).start()
                threading.Thread(target=self._give, args=(under_way, target), daemon=True).start()

    def _take(self, source: socket.socket, under_way: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        data = b"-"
        while data:
            try:
                data = source.recv(65_536)
            except OSError:
                data = b""
            under_way.put((time.monotonic() + self._delay_s, data))

    def _give(self, under_way: queue.SimpleQueue[tuple[float, bytes]], target: socket.socket) -> None:
        while True:
            due, data = under_way.get()
            time.sleep(max(due - time.monotonic(), 0))
            if self.is_cut.is_set():
                continue
            try:
                if not data:
                    target.close()
                    return
                target.sendall(data)
            except OSError:
                return


@dataclass(slots=True)
class Round:
    """What producers were told, and what the replica has of it."""

    accepted: list[str] = field(default_factory=list)
    refused: int = 0
    lost: int = 0
    took_s: list[float] = field(default_factory=list)

    def accept_until(self, stop: threading.Event, store: CancelStore, *, pause_s: float) -> None:
        """One producer: one cancel after the other, each noted with what was said of it."""
        while not stop.is_set():
            order_id = str(uuid.uuid4())
            asked = time.perf_counter()
            try:
                store.accept([CancelRequest(order_id)], lane=Lane.STRATEGY, default_deadline_s=600)
            except StoreError:
                self.refused += 1
                time.sleep(0.01)
            else:
                self.took_s.append(time.perf_counter() - asked)
                self.accepted.append(order_id)
            time.sleep(pause_s)


def measure(folder: Path, *, delay_s: float, wait: int, min_replicas: int, cut_off_s: float) -> Round:
    """One failover: the primary's host dies while producers accept, and the replica is made the primary."""
    options = ["--min-replicas-to-write", str(min_replicas), "--min-replicas-max-lag", str(MAX_LAG_S)]
    primary, replica = RedisServer(folder / "primary", options=options), RedisServer(folder / "replica")
    primary.start()
    replica.start()
    link = Link(primary.port, delay_s)
    with replica.client() as client:
        client.replicaof("127.0.0.1", link.port)
        wait_until(lambda: client.info("replication")["master_link_status"] == "up", what="a replica")
        with primary.client() as asked:
            wait_until(lambda: asked.wait(1, 100) == 1, what="a replica that acknowledges")
        settings = RedisSettings.from_env({"REDIS_URL": primary.url, "KALSHI_WAIT_REPLICAS": str(wait)})
        found, stop = Round(), threading.Event()
        pause_s = 0.01 if cut_off_s else 0.0
        producers = [
            threading.Thread(
                target=found.accept_until,
                args=(stop, CancelStore(connect(settings), settings)),
                kwargs={"pause_s": pause_s},
            )
            for _ in range(4)
        ]
        for producer in producers:
            producer.start()
        time.sleep(1.0)
        if cut_off_s:
            link.is_cut.set()
            time.sleep(cut_off_s)
        primary.kill()
        link.close()  # what was on its way dies with the host
        stop.set()
        for producer in producers:
            producer.join()
        client.replicaof("NO", "ONE")
        pipeline = client.pipeline(transaction=False)
        for order_id in found.accepted:
            pipeline.exists(f"{settings.key_prefix}:pending:{order_id}")
        found.lost = pipeline.execute().count(0)
    replica.stop()
    return found


SCENES = (
    ("the primary's host dies; link of 0 ms", {"delay_s": 0.0, "cut_off_s": 0.0}),
    ("the same; link of 1 ms", {"delay_s": 0.001, "cut_off_s": 0.0}),
    ("the same; link of 20 ms", {"delay_s": 0.02, "cut_off_s": 0.0}),
    (f"the replica is cut off for {CUT_OFF_S:g} s, then it dies", {"delay_s": 0.0, "cut_off_s": CUT_OFF_S}),
)
MANNERS = (
    ("nothing", {"wait": 0, "min_replicas": 0}),
    (f"`min-replicas-to-write 1`, max-lag {MAX_LAG_S}", {"wait": 0, "min_replicas": 1}),
    ("that and `KALSHI_WAIT_REPLICAS=1`", {"wait": 1, "min_replicas": 1}),
)


def rows(rounds: int) -> Iterable[str]:
    """The lines of the table."""
    yield "| what happens | settings | accepted | of these lost | refused or unknown | median ms to accept |"
    yield "|---|---|---|---|---|---|"
    for scene, how in SCENES:
        for manner, settings in MANNERS:
            found = []
            for _ in range(1 if how["cut_off_s"] else rounds):
                with tempfile.TemporaryDirectory() as folder:
                    found.append(measure(Path(folder), **how, **settings))  # type: ignore[arg-type]  # by name
            accepted = sum(len(each.accepted) for each in found)
            lost = sum(each.lost for each in found)
            refused = sum(each.refused for each in found)
            took_ms = statistics.median(took_s for each in found for took_s in each.took_s) * 1000
            yield f"| {scene} | {manner} | {accepted:,} | {lost:,} | {refused:,} | {took_ms:.1f} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=5, help="failovers of each kind (5)")
    try:
        for row in rows(parser.parse_args().rounds):
            print(row, flush=True)
    except NotReady as problem:
        sys.exit(str(problem))


if __name__ == "__main__":
    main()
