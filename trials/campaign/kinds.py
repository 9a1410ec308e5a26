"""The kinds of fault of the campaign, as a table: what each does, and how.

A kind plays while the producers ask (`Scene.until` counts in their time) and has ended its fault when it
returns. Of the sandbox's own faults it draws effect and operation from the run's seed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import redis

from kalshi_cancel.model.orders import Lane
from kalshi_cancel.sandbox.faults import KINDS as SANDBOX_FAULTS
from trials.campaign.judge import CANCELS
from trials.campaign.mass_plays import (
    Play,
    failing_list,
    placer_without_end,
    runner_cut_off,
    runner_frozen,
)
from trials.campaign.scene import Scene
from trials.stack import free_port
from worker.dispatch.leases import LEASE_S

Operations = tuple[str | None, ...]  # of the sandbox; None: all there are


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault, in one line for the table's reader.

    ``raw``: raw producers get through, so some messages are theirs. ``raw_only``: all, each for one order.
    ``per_s``: orders a second that are asked for; none: all within a fixed time. ``fresh``: the workers are
    replaced after each run, because it leaves them with a clock, or a key, that the next run has not.
    ``prepare`` is done before the producers begin; ``mix``: shares of sorts of orders that differ.
    """

    does: str
    play: Play
    raw: bool = False
    raw_only: bool = False
    per_s: float | None = None
    fresh: bool = False
    prepare: Play = lambda _scene: None
    mix: Mapping[str, int] = field(default_factory=dict)


# -- nothing, and workers


def _nothing(scene: Scene) -> None:
    scene.until_all_asked()
    scene.mark()


def _kill(scene: Scene) -> None:
    scene.until(scene.chance.uniform(0.1, 1.0))
    scene.kill([scene.any_worker()])


def _kill_again_and_again(scene: Scene) -> None:
    """Recovery counts from the last blow: the others fall while it recovers from the one before."""
    for share in (0.2, 0.9, 1.6, 2.3):
        scene.until(share)
        scene.marks.clear()
        scene.kill([scene.any_worker()])


ORDERS_A_BLOW = 250
ORDERS_A_SECOND = 167


def _again_and_again(strike: Play) -> Play:
    """Strikes at random moments while raw messages flow; nobody may be told two outcomes."""

    def play(scene: Scene) -> None:
        blows = max(3, scene.cancels // ORDERS_A_BLOW)
        for share in sorted(scene.chance.uniform(0.05, 1.0) for _ in range(blows)):
            scene.until(share)
            scene.marks.clear()
            strike(scene)
        scene.until_all_asked()

    return play


def _kill_any(scene: Scene) -> None:
    scene.kill([scene.any_worker()])


def _cut_all(scene: Scene) -> None:
    scene.redis.client_kill_filter(_type="normal", skipme=True)
    scene.mark()


def _kill_all(scene: Scene) -> None:
    scene.until(scene.chance.uniform(0.2, 0.9))
    scene.kill(list(scene.crew.workers))


def _kill_all_at(text: str) -> Play:
    def play(scene: Scene) -> None:
        scene.until(scene.chance.uniform(0.1, 0.7))
        with scene.watching() as until:
            for _ in range(scene.chance.randrange(1, 4)):
                until(text)
            scene.kill(list(scene.crew.workers))

    return play


def _kill_in_call(effect: str) -> Play:
    def play(scene: Scene) -> None:
        for operation in CANCELS:
            scene.fault("slow", operation=operation, probability=0.3, seconds=0.9, effect=effect)
        scene.until_slow_call()
        scene.pause(0.0, 0.5)
        scene.kill([scene.any_worker()])
        scene.until_all_asked()
        scene.control.clear_faults()

    return play


def _freeze_short(scene: Scene) -> None:
    for share in (0.2, 0.7):
        scene.until(share)
        scene.freeze(scene.any_worker(), LEASE_S / 4, LEASE_S * 0.75)
        scene.mark()


def _freeze_long(scene: Scene) -> None:
    scene.until(scene.chance.uniform(0.1, 0.6))
    scene.mark()  # the others take over while it sleeps
    scene.freeze(scene.any_worker(), LEASE_S + 0.5, LEASE_S + 2.0)


def _freeze_all(scene: Scene) -> None:
    scene.until(scene.chance.uniform(0.1, 0.6))
    first, *others = scene.crew.workers
    threads = [
        threading.Thread(target=scene.freeze, args=(other, LEASE_S + 1.0, LEASE_S + 1.5)) for other in others
    ]
    for thread in threads:
        thread.start()
    scene.freeze(first, LEASE_S + 0.5, LEASE_S + 1.5)
    for thread in threads:
        thread.join()
    scene.mark()


def _replace(scene: Scene) -> None:
    scene.until(scene.chance.uniform(0.1, 0.5))
    for victim in list(scene.crew.workers):
        scene.replace(victim)


# -- Redis


def _redis_restart(scene: Scene) -> None:
    scene.until(scene.chance.uniform(0.1, 0.9))
    scene.restart_redis(0.0, 1.5)


def _redis_restart_twice(scene: Scene) -> None:
    scene.until(scene.chance.uniform(0.1, 0.5))
    scene.restart_redis(0.0, 0.5)
    scene.pause(0.0, 1.0)
    scene.restart_redis(0.0, 0.5)


def _redis_freeze(scene: Scene) -> None:
    scene.until(scene.chance.uniform(0.1, 0.7))
    scene.freeze_part(scene.stack.redis.part, 0.5, 4.0)


def _client_pause(scene: Scene) -> None:
    scene.until(scene.chance.uniform(0.1, 0.7))
    pause_s = scene.chance.uniform(0.5, 3.0)
    scene.redis.client_pause(round(pause_s * 1000), all=scene.chance.random() < 0.5)
    time.sleep(pause_s)
    scene.mark()


def _client_kill(scene: Scene) -> None:
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        scene.until(share)
        for sort in ("normal", "pubsub"):
            scene.redis.client_kill_filter(_type=sort, skipme=True)
    scene.mark()


def _out_of_memory(scene: Scene) -> None:
    scene.until(scene.chance.uniform(0.1, 0.5))
    scene.redis.config_set("maxmemory", 1)
    scene.pause(0.5, 3.0)
    scene.redis.config_set("maxmemory", 0)
    scene.mark()


def _read_only(scene: Scene) -> None:
    scene.until(scene.chance.uniform(0.1, 0.5))
    scene.redis.replicaof("127.0.0.1", free_port())
    scene.pause(0.5, 3.0)
    scene.redis.replicaof("NO", "ONE")
    scene.mark()


def _lost_wake_ups(scene: Scene) -> None:
    wake_up_keys = [f"kalshi-cancel:wake_up:{lane}" for lane in Lane]
    taken = ["kalshi-cancel:taken", "kalshi-cancel:taken:until"]
    while not scene.asked.wait(0.02):
        scene.redis.delete(*(lane.queue for lane in Lane), *taken, *wake_up_keys)
    scene.redis.delete(*(lane.queue for lane in Lane), *wake_up_keys)
    scene.mark()


# -- the exchange


def _arm(kind: str, *, probability: float = 0.3, operations: tuple[Operations, ...], **fields: Any) -> Play:
    """Arms a fault of the sandbox and leaves it armed."""

    def play(scene: Scene) -> None:
        drawn = {
            name: scene.chance.choice(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        drawn.setdefault("effect", scene.chance.choice(SANDBOX_FAULTS[kind].effects))
        for operation in scene.chance.choice(operations):
            scene.fault(kind, probability=probability, operation=operation, **drawn)

    return play


def _during(*plays: Play) -> Play:
    """Plays one after the other, then waits until all is asked, and ends the sandbox's faults."""

    def play(scene: Scene) -> None:
        for each in plays:
            each(scene)
        scene.until_all_asked()
        scene.clear_faults()

    return play


_CANCEL: tuple[Operations, ...] = (CANCELS,)
_ANY: tuple[Operations, ...] = (CANCELS, CANCELS, (None,))
_DROP_AFTER = _arm("drop_after", operations=_CANCEL, how=["close", "reset"])
_STALE = _arm("stale_read", probability=0.7, operations=(("read",),), seconds=[0.4, 1.0, None])
_SLOW = _arm("slow", probability=0.2, operations=_ANY, seconds=[0.3, 0.8, 1.7])
_BUSY = _arm("http_429", probability=0.5, operations=_ANY, retry_after=[None, "0", "1"])


def _not_found(scene: Scene) -> None:
    """Two reads at most: three over the read lag are proof, by what is known of the exchange."""
    for order in scene.control.orders():
        if scene.chance.random() < 0.3:
            times = scene.chance.choice([1, 2])
            scene.fault("not_found", operation="read", order_id=order["order_id"], times=times)


_ENTRY_ERRORS: list[dict[str, Any]] = [
    {"code": "internal_error"},
    {"code": "ORDER_ALREADY_CANCELED"},
    {"code": "too_many_requests"},
    {"body": "not found"},
    {"body": {}},
]


def _entries(scene: Scene) -> None:
    """Batches whose answers have entries that fail, lack, or carry another order's id, in any order."""
    for kind in ("entry_missing", "entry_foreign", "shuffled"):
        effect = scene.chance.choice(SANDBOX_FAULTS[kind].effects)
        scene.fault(kind, operation="batch", probability=0.15, effect=effect)
    # What the exchange's document says of an errored entry is that it removed nothing.
    error = scene.chance.choice(_ENTRY_ERRORS)
    scene.fault("entry_error", operation="batch", probability=0.15, effect="none", **error)


def _interim(scene: Scene) -> None:
    """Interim responses before one answer in three, at once or some time before it."""
    for operation in scene.chance.choice(_ANY):
        scene.fault(
            "interim",
            operation=operation,
            probability=0.3,
            status=scene.chance.choice([100, 102, 103]),
            count=scene.chance.choice([1, 1, 2]),
            seconds=scene.chance.choice([0.0, 0.06, 0.3]),
        )


def _cdn(scene: Scene) -> None:
    """Pages of the CDN, of several statuses and forms, instead of one answer in three."""
    for status in scene.chance.sample([200, 403, 404, 429, 502, 503], 3):
        for operation in scene.chance.choice(_ANY):
            scene.fault(
                "cdn",
                operation=operation,
                probability=0.12,
                status=status,
                shape=scene.chance.choice(["html", "message", "empty"]),
                effect=scene.chance.choice(["none", "before"]),
            )


def _no_cancel_answered(scene: Scene) -> None:
    """Every cancel answers 500, whether it took effect or not; reads work."""
    cancels = list(CANCELS)
    scene.fault("http_500", operation=cancels, effect="before", probability=0.4)
    scene.fault("http_500", operation=cancels, effect="none")
    scene.until_all_asked()
    scene.pause(1.0, 3.0)
    scene.clear_faults()


def _other_words(scene: Scene) -> None:
    """Each order's first reads may have words for its status that nobody has promised."""
    strange = ["pending_settlement", "Archived", "", "unknown"]
    for order in scene.control.orders():
        if scene.chance.random() < 0.3:
            words = scene.chance.choice(
                [
                    {"canceled": "Cancelled", "executed": "EXECUTED", "resting": "Resting"},
                    {name: scene.chance.choice(strange) for name in ("canceled", "executed", "resting")},
                ]
            )
            times = scene.chance.choice([1, 2])
            scene.fault(
                "odd_fields", operation=["read", "list"], order_id=order["order_id"], times=times, words=words
            )
    _DROP_AFTER(scene)
    scene.until_all_asked()
    scene.mark()


def _lose_batches(scene: Scene) -> None:
    for operation in CANCELS:
        scene.fault("drop_after", operation=operation, probability=0.8)


def _revoke(scene: Scene) -> None:
    scene.until(scene.chance.uniform(0.1, 0.7))
    scene.mark()
    scene.revoke_second_key()


def _rollback(scene: Scene) -> None:
    """Calls fail, so that something is noted about each cancel; then fields come in that nobody knows."""
    for operation in CANCELS:
        scene.fault("http_503", operation=operation, probability=0.7)
    for share in (0.4, 0.7, 1.0):
        scene.until(share)
        scene.age_entries(0.4)
    scene.until_all_asked()
    scene.pause(0.5, 1.5)  # some are overdue by now
    scene.age_entries(0.4)
    scene.clear_faults()


def _spent(scene: Scene) -> None:
    """A small account, whose tokens somebody else spends too."""
    scene.control.configure(tier=scene.chance.choice(["advanced", "expert"]))
    while not scene.asked.wait(0.3):
        scene.control.drain("write", scene.chance.choice([50, 200, 1000]))
    scene.control.configure(tier="unlimited")
    scene.mark()


def _exchange_freeze(scene: Scene) -> None:
    scene.until(scene.chance.uniform(0.1, 0.7))
    scene.freeze_part(scene.stack.exchange, 0.5, 4.0)


def _exchange_paused(scene: Scene) -> None:
    scene.until(scene.chance.uniform(0.1, 0.6))
    shards = scene.chance.choice([True, True, [0], [1, 2]])
    scene.control.configure(exchange_paused=shards, pause_status=scene.chance.choice([409, 503]))
    scene.pause(0.5, 3.0)
    scene.control.configure(exchange_paused=False)
    scene.mark()


def _skew(scene: Scene) -> None:
    scene.until(scene.chance.uniform(0.0, 0.7))
    scene.control.configure(skew_s=scene.chance.choice([-120, -30, -8, 8, 30, 120]))
    scene.mark()


def _everything(scene: Scene) -> None:
    """Several faults of the exchange at once, and three blows to workers and Redis."""
    arms = [_DROP_AFTER, _SLOW, _BUSY, _STALE, _WRONG_BODY, _arm("http_500", operations=_ANY)]
    for arm in scene.chance.sample(arms, 3):
        arm(scene)
    for blow in scene.chance.sample([_kill, _freeze_short, _redis_restart, _client_kill, _client_pause], 3):
        with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
            blow(scene)


_WRONG_BODY = _arm("wrong_body", operations=_ANY)

KINDS = {
    "none": Kind("nothing goes wrong: what the others are to be compared with", _nothing, raw=True),
    # workers
    "worker-kill": Kind("SIGKILL of a worker at a random moment", _kill, raw=True),
    "worker-kill-again": Kind(
        "SIGKILL of a worker, four times within 3.5 s", _kill_again_and_again, raw=True
    ),
    "worker-kill-all": Kind("SIGKILL of all workers at once", _kill_all, raw=True),
    "kill-at-pop": Kind(
        "SIGKILL of all when one of them was woken up", _kill_all_at("LPUSH kalshi-cancel:wake_up"), raw=True
    ),
    "kill-at-claim": Kind("SIGKILL of all when one has claimed", _kill_all_at(":fence"), raw=True),
    "kill-before-effect": Kind(
        "SIGKILL of a worker whose call takes effect later", _kill_in_call("after"), raw=True
    ),
    "kill-after-effect": Kind(
        "SIGKILL of a worker between effect and reply", _kill_in_call("before"), raw=True
    ),
    "worker-freeze": Kind("SIGSTOP of a worker, shorter than its lease, twice", _freeze_short, raw=True),
    "worker-freeze-long": Kind("SIGSTOP of a worker, longer than its lease", _freeze_long, raw=True),
    "worker-freeze-all": Kind("SIGSTOP of all workers, longer than their leases", _freeze_all, raw=True),
    "worker-replace": Kind("SIGTERM of each worker in turn, a new one for each", _replace, raw=True),
    "raw-kill": Kind(
        "SIGKILL of a worker, again and again, while raw messages flow",
        _again_and_again(_kill_any),
        raw_only=True,
        per_s=ORDERS_A_SECOND,
        prepare=Scene.watch_answers,
    ),
    "raw-cut": Kind(
        "CLIENT KILL of every connection, again and again, while raw messages flow",
        _again_and_again(_cut_all),
        raw_only=True,
        per_s=ORDERS_A_SECOND,
        prepare=Scene.watch_answers,
    ),
    # Redis
    "redis-restart": Kind("SIGKILL of Redis, back within 1.5 s", _redis_restart),
    "redis-restart-twice": Kind("the same twice within 2 s", _redis_restart_twice),
    "redis-freeze": Kind("SIGSTOP of Redis for 0.5 to 4 s", _redis_freeze),
    "redis-pause": Kind("CLIENT PAUSE (all, or writes) for 0.5 to 3 s", _client_pause),
    "redis-kill-clients": Kind("CLIENT KILL of every connection, five times", _client_kill),
    "redis-oom": Kind("Redis out of memory for 0.5 to 3 s", _out_of_memory),
    "redis-read-only": Kind("Redis a read-only replica for 0.5 to 3 s", _read_only),
    "lost-messages": Kind("queues and wake-ups are deleted every 20 ms", _lost_wake_ups),
    # the exchange
    "http-500": Kind("500", _during(_arm("http_500", operations=_ANY)), raw=True),
    "http-502-html": Kind("502 with an HTML page", _during(_arm("http_502_html", operations=_ANY)), raw=True),
    "http-503": Kind(
        "503, some with Retry-After",
        _during(_arm("http_503", operations=_ANY, retry_after=[None, "1"])),
        raw=True,
    ),
    "http-429": Kind("429, half of all calls", _during(_BUSY), raw=True),
    "hang": Kind("no reply", _during(_arm("hang", probability=0.08, operations=_ANY)), raw=True),
    "drop-before": Kind(
        "connection closed before the effect",
        _during(_arm("drop_before", operations=_ANY, how=["close", "reset"])),
        raw=True,
    ),
    "drop-after": Kind("connection closed after the effect", _during(_DROP_AFTER), raw=True),
    "drop-after-fill": Kind(
        "filled instead, then closed", _during(_arm("drop_after_fill", operations=_CANCEL)), raw=True
    ),
    "slow": Kind("replies 0.3 to 1.7 s late", _during(_SLOW), raw=True),
    "drip": Kind(
        "a byte every 50 ms",
        _during(_arm("drip", probability=0.08, operations=_ANY, interval_s=0.05)),
        raw=True,
    ),
    "truncated": Kind("half a body", _during(_arm("truncated", operations=_ANY)), raw=True),
    "wrong-body": Kind("the reply describes another order", _during(_WRONG_BODY), raw=True),
    "garbage": Kind("200 with what is no JSON", _during(_arm("garbage", operations=_ANY)), raw=True),
    "redirect": Kind("302 to elsewhere", _during(_arm("redirect", operations=_ANY)), raw=True),
    "headers-flood": Kind(
        "5,000 headers", _during(_arm("headers_flood", probability=0.1, operations=_ANY)), raw=True
    ),
    "gzip-bomb": Kind(
        "a body of 64 MB, packed", _during(_arm("gzip_bomb", probability=0.05, operations=_ANY)), raw=True
    ),
    "endless": Kind(
        "a body without end",
        _during(_arm("endless", probability=0.05, operations=_ANY, interval_s=0.02)),
        raw=True,
    ),
    "stale-reads": Kind(
        "reads show the state before, and replies are lost", _during(_DROP_AFTER, _STALE), raw=True
    ),
    "not-found-reads": Kind(
        "the first reads do not see the order, and replies are lost",
        _during(_not_found, _DROP_AFTER),
        raw=True,
    ),
    "batch-entries": Kind(
        "batches answered with failed, missing, foreign and shuffled entries", _during(_entries), raw=True
    ),
    "batch-refused": Kind(
        "batches refused as too large",
        _during(_arm("oversize", probability=0.5, operations=(("batch",),))),
        raw=True,
    ),
    "tokens-spent": Kind("a small budget, and a foreign client that drains it", _spent, raw=True, fresh=True),
    "exchange-freeze": Kind("SIGSTOP of the exchange for 0.5 to 4 s", _exchange_freeze, raw=True),
    "exchange-paused": Kind("the exchange, or some shards, paused", _exchange_paused, raw=True),
    "clock-skew": Kind("the clocks differ by 8 to 120 s from one moment on", _skew, raw=True, fresh=True),
    "canceled-elsewhere-before": Kind(
        "somebody else canceled up to 3 s before, and replies are lost",
        _during(_lose_batches),
        raw=True,
        mix={"lately": 60, "vanishing": 15},
    ),
    "decreased-and-amended": Kind(
        "somebody decreases and amends orders, and replies are lost",
        _during(_lose_batches),
        raw=True,
        mix={"shrunk": 30, "amended": 20, "shrinking": 20, "growing": 10},
    ),
    "interim-responses": Kind("1xx responses before the answers", _during(_interim), raw=True),
    "cdn-pages": Kind("pages of the CDN: HTML, JSON, empty", _during(_cdn), raw=True),
    "cancels-fail": Kind("every cancel answers 500, reads work", _no_cancel_answered, raw=True),
    "unknown-statuses": Kind(
        "reads have other words for a status, and replies are lost",
        _other_words,
        raw=True,
        mix={"expired": 8},
    ),
    # one worker among others, and other versions
    "key-revoked": Kind(
        "the key of one of the workers is revoked", _revoke, raw=True, fresh=True, prepare=Scene.second_key
    ),
    "rollback": Kind("entries with fields that this version does not know", _rollback, raw=True),
    # mass cancels
    "mass-runner-frozen": Kind(
        "SIGSTOP of a mass cancel's runner; new orders come when another has finished",
        runner_frozen,
        raw=True,
    ),
    "mass-runner-cut-off": Kind(
        "the same, cut off from Redis", runner_cut_off, fresh=True, prepare=Scene.relayed_worker
    ),
    "mass-with-placer": Kind("a mass cancel while somebody places order after order", placer_without_end),
    "mass-list-fails": Kind("a mass cancel while listings fail for some seconds", failing_list, raw=True),
    # together
    "kill-with-drop-after": Kind(
        "SIGKILL of workers while replies are lost", _during(_DROP_AFTER, _kill), raw=True
    ),
    "kill-with-stale-reads": Kind(
        "SIGKILL of all workers, lost replies, stale reads", _during(_DROP_AFTER, _STALE, _kill_all), raw=True
    ),
    "freeze-long-with-drop-after": Kind(
        "a long SIGSTOP while replies are lost", _during(_DROP_AFTER, _freeze_long), raw=True
    ),
    "freeze-long-with-slow": Kind(
        "a long SIGSTOP while replies are slow", _during(_SLOW, _freeze_long), raw=True
    ),
    "redis-restart-with-stale-reads": Kind(
        "Redis restarts, lost replies, stale reads", _during(_DROP_AFTER, _STALE, _redis_restart)
    ),
    "redis-freeze-with-slow": Kind("SIGSTOP of Redis while replies are slow", _during(_SLOW, _redis_freeze)),
    "redis-kill-with-worker-kill": Kind(
        "SIGKILL of Redis, then of all workers", _during(_redis_restart, _kill_all)
    ),
    "skew-with-drop-after": Kind(
        "the clocks jump apart while replies are lost", _during(_DROP_AFTER, _skew), raw=True, fresh=True
    ),
    "everything": Kind("three faults of the exchange and three blows to the rest", _during(_everything)),
}
