"""Every script fails at each of its commands: nothing is half done, and the answer is true.

A case fills the database and runs one script, as each user of ``deploy/redis/users.acl`` who runs it. MONITOR
tells which commands it ran, on which keys. Then each of them is taken away in turn, each key is of another
kind, each value is spoilt, and the server takes no writes. A script without a case fails the test.
"""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import pytest
import redis
from claims import claim_request
from crew import PATIENCE_S

from kalshi_cancel.client import CancelClient
from kalshi_cancel.model.mass_request import MassRequest
from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.model.results import CancelResult, Outcome, Problem
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store import scripts
from kalshi_cancel.store.audit import AuditLog
from kalshi_cancel.store.cancels import CancelStore, NothingClaimed
from kalshi_cancel.store.keys import KEYS
from kalshi_cancel.store.lists import Lists
from kalshi_cancel.store.mass_cancels import MassCancels
from kalshi_cancel.store.mass_claim import MassClaim, MassClaims, Planned
from kalshi_cancel.store.pending import (
    ClaimRequest,
    Completed,
    Conclusion,
    Entry,
    Known,
    MakeDeadLetter,
    RetryLater,
    Settle,
)
from kalshi_cancel.store.rate_limits import Limits, Pacer
from kalshi_cancel.store.scripts import StoreError, connect
from kalshi_cancel.store.stats import Stats
from kalshi_cancel.store.steps import Filled, Line, Snapshot
from trials.stack import ROOT, RedisServer
from worker.broker.channel import Taken

PREFIX = "kalshi-cancel"
RECORD = "celery-task-meta-cancel:"
PATHS = f"{PREFIX}:paths"
LONG_S = 600.0
BY_WAKE_UP = "(whoever took the wake-up)"
BOTH = (Lane.RISK, Lane.STRATEGY)
QUEUES = ["risk", "cancels"]
ANY_PATH = Snapshot(
    0,
    tuple(Line(lane, path, 0, 9) for lane in BOTH for path in ("write", "write:2", "read", "reads")),
    tuple((name, Filled(1e6, 1e6, 1.0)) for name in ("read", "write", "write:2")),
)
MASS = "a-mass"
# What only observes, wakes somebody up, or strikes off a list: it may fail, and changes nothing else.
OBSERVERS = re.compile(rf"{PREFIX}:(audit|audit:head|counts|idle|wake_up:\w+|lists|list:\w+:left)")


# -- the users, and what is taken away from them


@dataclass(frozen=True)
class Rights:
    """A user's root permissions, or one of its selectors: commands on keys."""

    commands: tuple[str, ...]
    keys: tuple[str, ...]
    channels: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        return [*self.commands, *(f"~{each}" for each in self.keys), *(f"&{each}" for each in self.channels)]

    def allows(self, command: str, key: str) -> bool:
        return f"+{command}" in self.commands and any(fnmatch.fnmatchcase(key, each) for each in self.keys)

    def without(self, key: str) -> Rights:
        """The same, for every key but this one."""
        kept: list[str] = []
        for pattern in self.keys:
            kept += all_but(key, pattern) if fnmatch.fnmatchcase(key, pattern) else [pattern]
        return replace(self, keys=tuple(kept))


def all_but(key: str, pattern: str) -> Iterator[str]:
    """Patterns for what this one stands for, but for one key."""
    start = pattern.removesuffix("*")
    if start == pattern:
        return
    for at in range(len(start), len(key)):
        yield key[:at]
        yield f"{key[:at]}[^{key[at]}]*"
    yield f"{key}?*"


def users() -> dict[str, tuple[Rights, ...]]:
    """The users of the file: the root permissions first."""
    found = {}
    for line in (ROOT / "deploy/redis/users.acl").read_text().splitlines():
        name, *words = re.findall(r"\([^)]*\)|\S+", line.removeprefix("user "))
        selectors = [each.strip("()").split() for each in words if each.startswith("(")]
        root = [each for each in words if not each.startswith("(")]
        found[name] = tuple(
            Rights(
                tuple(each for each in some if each.startswith("+")),
                tuple(each[1:] for each in some if each.startswith("~")),
                tuple(each[1:] for each in some if each.startswith("&")),
            )
            for some in (root, *selectors)
        )
    return found


USERS = users()


def denials(user: str, ran: list[tuple[str, str]]) -> Iterator[tuple[str, tuple[Rights, ...]]]:
    """The user's rights without each that the script has used: what is missing, and what is left."""
    rights = USERS[user]
    keys = {key for _, key in ran if key}
    for at, part in enumerate(rights):
        for pattern in part.keys:
            if any(fnmatch.fnmatchcase(key, pattern) for key in keys):
                left = replace(part, keys=tuple(each for each in part.keys if each != pattern))
                yield f"~{pattern}", (*rights[:at], left, *rights[at + 1 :])
        for channel in part.channels:
            if "publish" in dict(ran):
                left = replace(part, channels=tuple(each for each in part.channels if each != channel))
                yield f"&{channel}", (*rights[:at], left, *rights[at + 1 :])
    for key in sorted(keys):
        left = tuple(part.without(key) for part in rights)
        yield f"all of {key}", left
        nameless = tuple(replace(part, keys=(*part.keys, ""), channels=(*part.channels, "")) for part in left)
        yield f"all of {key}, but not what has no name", nameless
    for command, key in ran:
        if not key:
            left = tuple(
                replace(part, commands=tuple(set(part.commands) - {f"+{command}"})) for part in rights
            )
            yield command, left
            continue
        kept: list[Rights] = []
        for part in rights:
            if part.allows(command, key):
                kept.append(replace(part, commands=tuple(c for c in part.commands if c != f"+{command}")))
                kept.append(replace(part.without(key), commands=(f"+{command}",)))
            else:
                kept.append(part)
        first, *others = kept
        yield f"{command} {key}", (first, *others)


def let(admin: redis.Redis, user: str, rights: Sequence[Rights]) -> None:
    """Gives a user these rights; its password is pw."""
    root, *selectors = rights
    words = [*root.words, *(f"({' '.join(each.words)})" for each in selectors)]
    admin.execute_command("ACL", "SETUSER", user, "reset", "on", ">pw", "resetchannels", *words)


# -- the cases


class Parts:
    """All that runs scripts, on one connection."""

    def __init__(self, url: str) -> None:
        settings = RedisSettings.from_env({"REDIS_URL": url})
        self.server = server = connect(settings)
        self.store = CancelStore(server, settings, name="a worker")
        self.audit_log = AuditLog(server, settings)
        self.lists = Lists(server, settings)
        self.mass_cancels = MassCancels(server, settings)
        self.claims = MassClaims(server, settings, name="a runner")
        self.pacer = Pacer(server, PREFIX, Limits(100, 100, 100, 100))
        self.stats = Stats(server, settings)
        self.taken = Taken(server, PREFIX)

    def accept(self, *order_ids: str, lane: Lane = Lane.STRATEGY, reply_to: str = "", **how: Any) -> None:
        known = {name: how.pop(name) for name in ("known", "fence", "records_older_than_s") if name in how}
        self.store.accept(
            [CancelRequest(order_id, **how) for order_id in order_ids],
            lane=lane,
            default_deadline_s=LONG_S,
            reply_to=[reply_to] * len(order_ids),
            **known,
        )

    def claim(self, **wanted: Any) -> list[Entry]:
        claims = self.store.turn((), a_claim_request(**wanted)).claims
        return [entry for claim in claims for entry in claim.entries]

    def put_down(self, conclusions: Sequence[Conclusion], wanted: ClaimRequest | None = None) -> None:
        self.store.turn([Completed(conclusions)], wanted)

    def report_overdue(self) -> None:
        self.store.report(
            [
                a_result(each, Outcome.UNRESOLVED) for each in sorted(self._overdue())
            ]  # (some are due together)
        )

    def _overdue(self) -> list[str]:
        return [each.order_id for each in self.store.overdue(at_most=10)]

    def mass(self, *, task_id: str = "") -> None:
        request = MassRequest.parse({"request_id": MASS, "scope": {"order_ids": ["a", "b"]}})
        self.mass_cancels.enter(request, reply_to=task_id)

    def limit(self, tokens: float) -> None:
        self.pacer.set_limits(Limits(tokens, tokens, tokens, tokens))

    def correct(self) -> None:
        self.pacer.correct("write", 2.0, taken_at=time.monotonic())

    def in_line(self, order_id: str, *, at_ms: int, path: str = "write", lane: Lane = Lane.STRATEGY) -> None:
        self.server.zadd(f"{PREFIX}:due:{lane}:{path}", {order_id: at_ms})

    def spoil(self, key: str, field: str) -> None:
        self.server.hset(f"{PREFIX}:{key}", field, "{oops")


def a_claim_request(**wanted: Any) -> ClaimRequest:
    """Of whatever is due on any path: a look before it would fail where the claim is to fail."""
    usual = {"snapshot": ANY_PATH, "at_most": 5, "lease_s": LONG_S, "exchange_ms": "1:2"}
    return claim_request(BOTH, **{**usual, **wanted})


def a_result(order_id: str, outcome: Outcome = Outcome.CANCELED) -> CancelResult:
    return CancelResult(order_id, outcome, error=Problem("c", "m"), settled_at="2026-11-29T00:00:00.000Z")


READ = Known("{}", "read", 0.0)
HAD = Planned(None, None)
NOW_S = 1e-9  # a deadline that has passed


def nothing(_parts: Parts) -> None:
    """An empty database."""


def a_listener(parts: Parts) -> None:
    parts.store.show_listeners(BOTH, life_s=LONG_S)


def an_idle_worker(parts: Parts) -> None:
    a_listener(parts)
    parts.limit(100)
    parts.claim(idle_s=LONG_S)


def an_entry(parts: Parts) -> None:
    parts.accept("a", requested_by="ann", reply_to="task")


def two_tasks(parts: Parts) -> None:
    an_entry(parts)
    parts.accept("a", reply_to="another-task")


def without_a_place(parts: Parts) -> None:
    an_entry(parts)
    parts.server.zrem(f"{PREFIX}:due:strategy:write", "a")


def in_an_unknown_lane(parts: Parts) -> None:
    a_listener(parts)
    parts.accept("a")
    parts.server.delete(f"{PREFIX}:due:strategy:write", f"{PREFIX}:paths")
    parts.server.hset(f"{PREFIX}:pending:a", "lane", "of-2030")


def without_its_path(parts: Parts) -> None:
    parts.accept("a", exchange_index=2)
    parts.server.srem(f"{PREFIX}:paths", "write:2")


def claimed(parts: Parts) -> list[Entry]:
    parts.accept("a", "b", requested_by="ann", reply_to="task")
    parts.accept("a", reply_to="another-task")
    return parts.claim()


def a_list(parts: Parts, *order_ids: str) -> None:
    name = parts.lists.note("bulk", order_ids)
    parts.accept(*order_ids, reply_to=name)
    parts.lists.close("bulk", order_ids, [], not_entered=())


def claimed_for_a_list(parts: Parts) -> list[Entry]:
    a_list(parts, "a", "b")
    return parts.claim()


def two_lists(parts: Parts) -> None:
    """One that has all its results, and one that has none."""
    parts.put_down([Settle(entry, a_result(entry.order_id)) for entry in claimed_for_a_list(parts)])
    parts.lists.close("another", ["c"], [], not_entered=())
    parts.server.sadd(f"{PREFIX}:list:another:left", "c")


def an_order_asked_for_again(parts: Parts) -> None:
    """A list that has all its results, of which one is gone, and one is worked on again."""
    two_lists(parts)
    parts.server.delete(f"{RECORD}a", f"{RECORD}b")
    parts.accept("a")


def one_taken_over(parts: Parts) -> list[Entry]:
    held = claimed(parts)
    parts.server.hset(f"{PREFIX}:pending:b", "token", "999")
    return held


def with_waiters(parts: Parts) -> None:
    parts.accept("a", "b", requested_by="ann", reply_to="task", deadline_s=NOW_S)
    parts.accept("a", reply_to="another-task", deadline_s=NOW_S)


def unresolved(parts: Parts) -> list[Entry]:
    with_waiters(parts)
    held = parts.claim(at_most=1)
    parts.report_overdue()
    return held


def asked_again(parts: Parts) -> list[Entry]:
    held = unresolved(parts)
    parts.accept("a", requested_by="bob")
    return held


def a_dead_letter(parts: Parts) -> None:
    parts.put_down([MakeDeadLetter(entry, "{}") for entry in unresolved(parts)])


def a_dead_letter_of_a_shard(parts: Parts) -> None:
    parts.accept("a", exchange_index=2)
    parts.put_down([MakeDeadLetter(entry, "{}") for entry in parts.claim()])
    parts.server.delete(f"{PREFIX}:paths")


def a_record(parts: Parts) -> None:
    an_entry(parts)
    parts.put_down([Settle(entry, a_result("a")) for entry in parts.claim()])


def a_spoilt_entry(parts: Parts) -> None:
    two_tasks(parts)
    parts.spoil("pending:a", "request")


def a_spoilt_letter(parts: Parts) -> None:
    a_dead_letter(parts)
    parts.spoil("dead:a", "request")


def set_aside(parts: Parts) -> None:
    two_tasks(parts)
    parts.spoil("pending:a", "progress")
    parts.claim()


def old_dead_letters(parts: Parts) -> None:
    dead_and_aside(parts)
    for kind in ("dead", "aside"):
        for order_id in parts.server.zrange(f"{PREFIX}:{kind}", 0, -1):
            parts.server.zadd(f"{PREFIX}:{kind}", {order_id: 1})


def dead_and_aside(parts: Parts) -> None:
    a_dead_letter(parts)
    parts.accept("c", requested_by="ann")
    parts.spoil("pending:c", "progress")
    parts.claim(at_most=10)


def spoilt_and_text(parts: Parts) -> None:
    with_waiters(parts)
    parts.spoil("pending:a", "progress")
    parts.accept("c")
    parts.server.delete(f"{PREFIX}:pending:c")
    parts.server.set(f"{PREFIX}:pending:c", "what is this?")


def many_paths(parts: Parts) -> None:
    a_listener(parts)
    parts.accept("c", "d", lane=Lane.RISK)
    parts.accept("e", "f", exchange_index=2)
    parts.accept("g", "h", known=READ)
    parts.in_line("without-entry", at_ms=1)
    parts.limit(1000)


def claimed_and_more(parts: Parts) -> list[Entry]:
    held = claimed(parts)
    many_paths(parts)
    return held


def overdue(parts: Parts) -> None:
    claimed(parts)
    parts.accept("c", "d", deadline_s=NOW_S)
    parts.server.zrem(f"{PREFIX}:due:strategy:write", "d")
    parts.server.zadd(f"{PREFIX}:deadline", {"without-entry": 1})


def owed(parts: Parts) -> None:
    """One that is unresolved, one that is over, one without a record, and one that was asked for again."""
    with_waiters(parts)
    parts.report_overdue()
    parts.server.hdel(f"{PREFIX}:pending:a", "replied")
    for order_id in ("c", "e"):
        parts.accept(order_id, reply_to="task", requested_by="ann")
        parts.accept(order_id, reply_to="another-task")
    parts.put_down([Settle(each, a_result("c")) for each in parts.claim() if each.order_id == "c"])
    parts.server.zadd(f"{PREFIX}:waiters:c", {"a-third-task": 1})
    parts.server.sadd(f"{PREFIX}:replies_left", "a", "c", "d", "e")


def nobody_comes(parts: Parts) -> None:
    parts.accept("a")
    parts.in_line("a", at_ms=1)
    parts.accept("b", lane=Lane.RISK)
    parts.in_line("b", at_ms=1, lane=Lane.RISK)
    parts.store.show_listeners([Lane.RISK], life_s=LONG_S)


def a_message(parts: Parts) -> None:
    parts.server.lpush("cancels", "a message", "another")


def a_taken_message(parts: Parts) -> None:
    a_message(parts)
    parts.taken.take("tag", QUEUES)


def messages_of_vanished_workers(parts: Parts) -> None:
    """Two, of different lists; one that this worker has still, and a tag without a message."""
    parts.server.lpush("risk", "urgent")
    for tag in ("urgent", "old", "own"):
        a_message(parts)
        parts.taken.take(tag, QUEUES)
    parts.server.zadd(f"{PREFIX}:taken:until", {"urgent": 1, "old": 2, "own": 3, "gone": 4})


def limited(parts: Parts) -> None:
    parts.limit(100)
    parts.accept("a", exchange_index=2)
    parts.pacer.take("write", 1.0)


def corrected(parts: Parts) -> None:
    limited(parts)
    parts.correct()


def an_audit_log(parts: Parts) -> None:
    for number in range(5):
        parts.audit_log.append("mass", {"number": number})


def a_runner(parts: Parts) -> MassClaim:
    parts.mass(task_id="task")
    claim = parts.claims.take(MASS)
    assert claim is not None
    return claim


def entries_of_risk(parts: Parts) -> MassClaim:
    a_listener(parts)
    parts.accept("a", "b", exchange_index=2, lane=Lane.RISK)
    return a_runner(parts)


def note_facts(claim: MassClaim) -> None:
    facts = [("once", "begun", "{}"), ("set", "plan", "{}"), ("add", "spent", 2.5)]
    claim._write(claim._scripts.note, facts)


def with_facts(parts: Parts) -> MassClaim:
    claim = a_runner(parts)
    note_facts(claim)
    return claim


def with_orders(parts: Parts) -> MassClaim:
    """A mass cancel with an order that is open, one that is over, and one that somebody else wants too."""
    claim = a_runner(parts)
    claim.add_orders({"a": HAD, "b": HAD, "c": HAD})
    parts.accept("a", "c", lane=Lane.RISK, request_id=MASS, requested_by="ann", fence=claim.fence)
    parts.accept("c", requested_by="bob")
    return claim


def lost(parts: Parts) -> MassClaim:
    """A mass cancel that a runner has and Redis knows nothing of."""
    claim = a_runner(parts)
    parts.server.flushdb()
    return claim


def finished(parts: Parts) -> MassClaim:
    claim = a_runner(parts)
    claim.finish({"flat": True}, {})
    return claim


def finished_but_listed(parts: Parts) -> None:
    finished(parts)
    parts.server.sadd(f"{PREFIX}:mass_cancels:open", MASS)


@dataclass(frozen=True)
class Case:
    """A script in one situation: ``run`` calls it, and makes use of what ``seed`` has returned.

    ``users`` run the script like this for their own work. Who may not do all that it does with ``if_it_may``
    there does what it does without that key, which is enough as well.
    """

    script: str
    what: str
    seed: Callable[[Parts], Any]
    run: Callable[[Parts, Any], Any]
    users: tuple[str, ...] = ("worker",)
    if_it_may: str = ""


BOTH_USERS = ("worker", "producer")
CASES = [
    # accept
    Case(
        *("accept", "new, and a sender listens", a_listener),
        lambda parts, _: parts.accept("a", "b", requested_by="ann", exchange_index=2),
        BOTH_USERS,
    ),
    Case(
        *("accept", "a lone new one, and a worker is idle", an_idle_worker),
        lambda parts, _: parts.accept("a", requested_by="ann", reply_to="task"),
        BOTH_USERS,
        f"{PREFIX}:idle",
    ),
    Case(
        *("accept", "new, twice in one call, for tasks", nothing),
        lambda parts, _: parts.accept("a", "a", requested_by="ann", reply_to="task"),
    ),
    Case(
        *("accept", "joined from the risk lane, with more known", an_entry),
        lambda parts, _: parts.accept(
            "a",
            lane=Lane.RISK,
            requested_by="bob",
            exchange_index=2,
            market_ticker="T",
            deadline_s=2 * LONG_S,
        ),
        BOTH_USERS,
    ),
    Case(
        *("accept", "joined by another task", an_entry),
        lambda parts, _: parts.accept("a", reply_to="another-task"),
        BOTH_USERS,
    ),
    Case(
        *("accept", "asked again for what is unresolved, claimed and not", unresolved),
        lambda parts, _: parts.accept("a", "b", requested_by="bob"),
        BOTH_USERS,
    ),
    Case(
        *("accept", "joined to one without a place in line", without_a_place),
        lambda parts, _: parts.accept("a", requested_by="bob"),
        BOTH_USERS,
    ),
    Case(
        *("accept", "a dead letter", a_dead_letter),
        lambda parts, _: parts.accept("a", requested_by="bob", exchange_index=2),
        BOTH_USERS,
    ),
    Case(
        *("accept", "answered from the record", a_record),
        lambda parts, _: parts.accept("a", requested_by="bob"),
        BOTH_USERS,
    ),
    Case(
        *("accept", "answered from the record, for a task", a_record),
        lambda parts, _: parts.accept("a", reply_to="another-task"),
    ),
    Case(
        *("accept", "a record that is not believed", a_record),
        lambda parts, _: parts.accept("a", "b", records_older_than_s=0.0),
        BOTH_USERS,
    ),
    Case(
        *("accept", "an entry that cannot be read", a_spoilt_entry),
        lambda parts, _: parts.accept("a", requested_by="bob"),
        BOTH_USERS,
    ),
    Case(
        *("accept", "a dead letter that cannot be read", a_spoilt_letter),
        lambda parts, _: parts.accept("a", requested_by="bob"),
        BOTH_USERS,
    ),
    Case(
        *("accept", "one that was set aside", set_aside),
        lambda parts, _: parts.accept("a", requested_by="bob"),
        BOTH_USERS,
    ),
    Case(
        *("accept", "for a mass cancel, with what is known", a_runner),
        lambda parts, held: parts.accept(
            "a", "b", lane=Lane.RISK, fence=held.fence, known=READ, request_id=MASS
        ),
    ),
    # The other scripts of the store.
    Case(
        *("set_progress", "never claimed", entries_of_risk),
        lambda parts, held: parts.store.set_progress(
            [CancelRequest("a"), CancelRequest("b")], READ, lane=Lane.RISK, fence=held.fence
        ),
    ),
    Case(
        *("extend", "of this sender, and of another", one_taken_over),
        lambda parts, held: parts.store.extend(held, lease_s=2 * LONG_S),
    ),
    Case("mend", "without a place", without_a_place, lambda parts, _: parts.store.mend()),
    Case("mend", "in an unknown lane", in_an_unknown_lane, lambda parts, _: parts.store.mend()),
    Case("mend", "on a path that nobody looks at", without_its_path, lambda parts, _: parts.store.mend()),
    Case(
        *("refuse", "what nobody knows", nothing),
        lambda parts, _: parts.store.refuse(a_result("a", Outcome.REFUSED)),
    ),
    Case("turn", "claims a batch", lambda parts: parts.accept("a", "b"), lambda parts, _: parts.claim()),
    Case("turn", "claims for several senders", many_paths, lambda parts, _: parts.claim(at_most=1, calls=3)),
    Case(
        *("turn", "claims from a shard", lambda parts: parts.accept("a", exchange_index=2)),
        lambda parts, _: parts.claim(),
    ),
    Case(
        *("turn", "claims what is to be read", lambda parts: parts.accept("a", known=READ)),
        lambda parts, _: parts.claim(),
    ),
    Case(
        *(
            "turn",
            "claims what vanished senders had",
            lambda parts: parts.accept("a") or parts.claim(lease_s=0),
        ),
        lambda parts, _: parts.claim(),
    ),
    Case("turn", "finds nothing, and is idle", nothing, lambda parts, _: parts.claim(idle_s=LONG_S)),
    Case(
        *("turn", "is idle no more", lambda parts: an_idle_worker(parts) or parts.accept("a", "b")),
        lambda parts, _: parts.claim(),
    ),
    Case(
        "turn",
        "claims nothing",
        lambda parts: parts.server.sadd(PATHS, "write"),
        lambda parts, _: parts.claim(),
    ),
    Case(
        *("turn", "settles, and one is another sender's", one_taken_over),
        lambda parts, held: parts.put_down([Settle(entry, a_result(entry.order_id)) for entry in held]),
    ),
    Case(
        *("turn", "settles what is on a list", claimed_for_a_list),
        lambda parts, held: parts.put_down([Settle(entry, a_result(entry.order_id)) for entry in held]),
    ),
    Case("lists_complete", "one of two", two_lists, lambda parts, _: parts.lists.answer()),
    Case("list_put_back", "one of two", an_order_asked_for_again, lambda parts, _: parts.lists.answer()),
    Case(
        *("turn", "retries later on another path", claimed),
        lambda parts, held: parts.put_down([RetryLater(entry, "{}", 60.0, "read") for entry in held]),
    ),
    Case(
        *("turn", "makes a dead letter", claimed),
        lambda parts, held: parts.put_down([MakeDeadLetter(entry, "{}") for entry in held]),
    ),
    Case(
        *("turn", "keeps what was asked for again", asked_again),
        lambda parts, held: parts.put_down([MakeDeadLetter(entry, "{}") for entry in held]),
    ),
    Case(
        *("turn", "settles and claims", claimed_and_more),
        lambda parts, held: parts.put_down(
            [Settle(held[0], a_result(held[0].order_id)), RetryLater(held[1], "{}", 60.0)],
            a_claim_request(at_most=1),
        ),
    ),
    Case(
        "overdue",
        "without a place, and without an entry",
        overdue,
        lambda parts, _: parts.store.overdue(at_most=9),
    ),
    Case(
        *("report", "with waiters", with_waiters),
        lambda parts, _: parts.store.report([a_result(each, Outcome.UNRESOLVED) for each in ("a", "b")]),
    ),
    Case(
        "reply_rest",
        "of each kind",
        owed,
        lambda parts, _: parts.store._reply_to_the_rest(["a", "c", "d", "e"]),
    ),
    Case("set_aside", "not claimed", spoilt_and_text, lambda parts, _: parts.store.overdue(at_most=9)),
    Case("set_aside", "claimed, and what is no entry", spoilt_and_text, lambda parts, _: parts.claim()),
    Case(
        *("retry", "a dead letter, one set aside, one that is open, and nothing", dead_and_aside),
        lambda parts, _: parts.store.retry(["a", "b", "c", "d"], deadline_s=LONG_S),
        BOTH_USERS,
    ),
    Case(
        *("retry", "the same twice", dead_and_aside),
        lambda parts, _: parts.store.retry(["a", "a", "c", "c"], deadline_s=LONG_S),
        BOTH_USERS,
    ),
    Case(
        *("retry", "on a path that nobody looks at", a_dead_letter_of_a_shard),
        lambda parts, _: parts.store.retry(["a"], deadline_s=LONG_S),
        BOTH_USERS,
    ),
    Case(
        "lanes_to_wake",
        "nobody comes",
        nobody_comes,
        lambda parts, _: parts.store.lanes_to_wake(BOTH, patience_s=60.0),
    ),
    # The buckets, and the stats.
    Case("take", "from a bucket that is known", limited, lambda parts, _: parts.pacer.take("write", 2.0)),
    Case("take", "from a full bucket", limited, lambda parts, _: parts.pacer.take("read", 2.0)),
    Case("correct", "a bucket", limited, lambda parts, _: parts.correct()),
    Case("correct", "a bucket again", corrected, lambda parts, _: parts.correct()),
    Case("limits", "as they were", limited, lambda parts, _: parts.limit(100)),
    Case("limits", "others, after a 429", corrected, lambda parts, _: parts.limit(50)),
    Case("levels", "of two buckets", limited, lambda parts, _: parts.pacer.levels(["write", "write:2"])),
    Case("stats", "as it stands", limited, lambda parts, _: parts.stats.look()),
    # Messages.
    Case("message_take", "one", a_message, lambda parts, _: parts.taken.take("tag", QUEUES)),
    Case("message_take", "none", nothing, lambda parts, _: parts.taken.take("tag", QUEUES)),
    Case(
        *("message_renew", "its own, and what vanished workers had", messages_of_vanished_workers),
        lambda parts, _: parts.taken.renew(["own", "done"]),
    ),
    Case(
        *("message_return", "to be served first", a_taken_message),
        lambda parts, _: parts.taken.put_back("tag", first=True),
    ),
    Case(
        *("message_return", "to be served last", a_taken_message),
        lambda parts, _: parts.taken.put_back("tag", first=False),
    ),
    Case("message_return", "that is done", nothing, lambda parts, _: parts.taken.put_back("tag", first=True)),
    # The audit log.
    Case(
        "note",
        "a step",
        an_audit_log,
        lambda parts, _: parts.audit_log.append("operator", {"what": "drill"}),
        BOTH_USERS,
    ),
    Case("forget", "what is old", old_dead_letters, lambda parts, _: parts.store.forget_dead()),
    Case(
        "trim",
        "all but two",
        an_audit_log,
        lambda parts, _: parts.audit_log.trim(max_age_s=LONG_S, max_entries=2),
    ),
    # Mass cancels.
    Case("enter", "new, for a task", nothing, lambda parts, _: parts.mass(task_id="task")),
    Case("enter", "new", nothing, lambda parts, _: parts.mass(), BOTH_USERS),
    Case("enter", "the same again", lambda parts: parts.mass(), lambda parts, _: parts.mass(), BOTH_USERS),
    Case("mass_claim", "a new one", lambda parts: parts.mass(), lambda parts, _: parts.claims.take(MASS)),
    Case("mass_claim", "one that is done", finished_but_listed, lambda parts, _: parts.claims.take(MASS)),
    Case("mass_keep", "its lease runs anew", a_runner, lambda _, held: held.keep()),
    Case("mass_keep", "its lease ends", a_runner, lambda _, held: held.leave()),
    Case("mass_note", "of each kind", a_runner, lambda _, held: note_facts(held)),
    Case("mass_note", "of each kind again", with_facts, lambda _, held: note_facts(held)),
    Case("note_orders", "new and known", with_orders, lambda _, held: held.add_orders({"a": HAD, "d": HAD})),
    Case(
        *("note_orders", "new and anew", with_orders),
        lambda _, held: held.add_orders({"a": HAD, "d": HAD}, anew=True),
    ),
    Case("mass_put_back", "with a waiter", lost, lambda _, held: held._put_back()),
    Case("mass_put_back", "of one that is there", a_runner, lambda _, held: held._put_back()),
    Case("still_open", "some are", with_orders, lambda _, held: held.still_open()),
    Case("not_pending", "one of two", with_orders, lambda _, held: list(held.without_entry(["a", "b"]))),
    Case(
        *("mass_withdraw", "its own, and one that others want", with_orders),
        lambda _, held: held.withdraw([a_result("a", Outcome.REFUSED), a_result("c", Outcome.REFUSED)]),
    ),
    Case(
        "mass_finish", "with orders", with_orders, lambda _, held: held.finish({"flat": True}, {"flat": True})
    ),
    Case("mass_finish", "again", finished, lambda _, held: held.finish({"flat": True}, {"flat": True})),
]
# The part of each answer that decides something; the rest is about who is woken up, the audit log, or tokens.
DECIDES: dict[str, Callable[[Any], Any]] = {
    "accept": lambda answer: answer[2:],
    "turn": lambda answer: [answer[0], [call[2] for call in answer[1][6:]] if len(answer) > 1 else None],
    "lanes_to_wake": lambda answer: [state > 0 for state in answer[2:]],
    "note": lambda _answer: None,
    "levels": lambda _answer: None,
    "stats": lambda answer: answer[:3],
}


# -- the database


State = dict[str, tuple[bytes, int]]  # by key: what DUMP says, and when it ends (ms; -1: never)
SNAPSHOT = """local found = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  found[#found + 1] = { key, redis.call('DUMP', key), redis.call('PEXPIRETIME', key) }
end
return found"""


class Seen:
    """A script that notes its first call: with what, and what was in the database then."""

    def __init__(self, name: str, script: Any, look: Callable[[], State]) -> None:
        self.name = name
        self.script = script
        self._look = look
        self.before: State | None = None
        self.args: dict[str, list[Any]] = {}

    def __call__(self, args: list[Any], keys: Sequence[Any] = (), client: Any = None) -> Any:
        if self.before is None:
            self.args, self.before = {"keys": list(keys), "args": args}, self._look()
        return self.script(keys=list(keys), args=args, client=client)


class Scene:
    """A server with a user whose rights change, and a look at everything in it."""

    def __init__(self, server: RedisServer) -> None:
        self.admin = server.client()
        self.raw = redis.Redis(port=server.port)
        self.scripts: list[Seen] = []
        self.lua_files: set[str] = set()
        load = scripts.load

        def noted(of: redis.Redis, *files: str) -> Seen:
            self.scripts.append(Seen(files[-1], load(of, *files), self.state))
            self.lua_files.update(files)
            return self.scripts[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scripts, "load", noted)
            self.parts = Parts(server.url)
        self.let(USERS["worker"])
        self.limited = connect(
            RedisSettings.from_env({"REDIS_URL": server.url.replace("redis://", "redis://limited:pw@")})
        )

    def close(self) -> None:
        for each in (self.parts.server, self.limited, self.admin, self.raw):
            each.close()

    def let(self, rights: tuple[Rights, ...]) -> None:
        """Gives the user these rights."""
        let(self.admin, "limited", rights)

    def state(self) -> State:
        """All that is stored."""
        return {key.decode(): (dump, ends) for key, dump, ends in self.raw.eval(SNAPSHOT, 0)}

    def restore(self, state: State, at_ms: int) -> None:
        """Puts everything back as it was, with the lives that were left at that moment."""
        pipeline = self.raw.pipeline(transaction=False)
        pipeline.flushdb()
        for key, (dump, ends) in state.items():
            pipeline.restore(key, 0 if ends < 0 else max(ends - at_ms, 1), dump)
        pipeline.execute()

    def now_ms(self) -> int:
        seconds, micros = self.admin.time()
        return int(seconds * 1000 + micros // 1000)

    def watched(self, call: Callable[[], Any]) -> tuple[Any, list[list[str]]]:
        """What a call returns, and the commands that its script ran, in words."""
        with self.admin.monitor() as monitor:
            answer = call()
            self.admin.echo("the end")
            ran = []
            while True:
                line = str(monitor.connection.read_response())
                words = re.findall(r'"((?:[^"\\]|\\.)*)"', line)
                if words == ["ECHO", "the end"]:
                    return answer, ran
                if " lua]" in line:
                    ran.append(words)

    def keys(self, words: list[str]) -> list[str]:
        """The keys of a command."""
        try:
            return list(map(str, self.admin.command_getkeys(*words)))
        except redis.ResponseError:  # it has none
            return []


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"), options=["--appendonly", "no"]).start()
    with closing(Scene(server)) as scene:
        yield scene
    server.stop()


# -- what is whole


MOMENTS = {
    *(
        "tokens",
        "at_us",
        "share",
        "share_at_us",
        "since_us",
        "spent",
        "spent_by",
        "let",
        "within_us",
        "before",
        "nothing_us",
    ),
    *("first_sent_age", "fence", "token"),
}


def settled_text(field: str, value: str) -> str:
    """A value without what differs from one run to the next."""
    return "" if field in MOMENTS else re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z|\d{13,}", "T", value)


def content(server: redis.Redis, key: str) -> Any:
    match server.type(key):
        case "hash":
            return {field: settled_text(field, value) for field, value in server.hgetall(key).items()}
        case "string":
            return settled_text(key.rsplit(":", 1)[-1], server.get(key))
        case "list":
            return server.lrange(key, 0, -1)
        case "set":
            return sorted(server.smembers(key))
        case "zset":
            return sorted(server.zrange(key, 0, -1))
        case _:
            return server.xlen(key)


def shape(server: redis.Redis) -> dict[str, Any]:
    """All that decides anything."""
    keys = [key for key in server.keys("*") if not OBSERVERS.fullmatch(key)]
    return {key: (content(server, key), server.pttl(key) > 0) for key in sorted(keys)}


def breaches(server: redis.Redis) -> set[str]:
    """What is not whole."""
    found = set()

    def members(name: str) -> set[str]:
        key = f"{PREFIX}:{name}"
        kind = server.type(key)
        if kind == "zset":
            return set(server.zrange(key, 0, -1))
        return set(server.smembers(key)) if kind == "set" else set()

    def ids_of(name: str) -> set[str]:
        return {key.removeprefix(f"{PREFIX}:{name}:") for key in server.keys(f"{PREFIX}:{name}:*")}

    open_now, dead, aside = ids_of("pending"), ids_of("dead"), ids_of("aside")
    found |= {f"{each} is open and dead" for each in open_now & dead}
    found |= {f"{each}: letter and list of the dead differ" for each in dead ^ members("dead")}
    found |= {f"{each}: what is aside and its list differ" for each in aside ^ members("aside")}
    lines = server.keys(f"{PREFIX}:due:*")
    for order_id in open_now:
        key = f"{PREFIX}:pending:{order_id}"
        if server.type(key) != "hash":
            continue
        lane, path, reported, request = server.hmget(key, "lane", "path", "reported", "request")
        if request is None:  # no entry
            continue
        if not any(server.type(each) == "zset" and server.zscore(each, order_id) for each in lines):
            found.add(f"{order_id}: in no line")
        if f"{PREFIX}:due:{lane}:{path}" not in lines or path not in members("paths"):
            found.add(f"{order_id}: not in its own line")
        if reported != "1" and order_id not in members("deadline"):
            found.add(f"{order_id}: without a deadline")
        token, claimed_by, sent = server.hmget(key, "token", "claimed_by", "sent")
        if claimed_by == BY_WAKE_UP or (token or "").startswith("g"):
            wake_ups = f"{PREFIX}:wake_up:{lane}"
            carried = server.lrange(wake_ups, 0, -1) if server.type(wake_ups) == "list" else []
            if not any(f'"{order_id}","{token}"' in each for each in carried):
                found.add(f"{order_id}: claimed, and nobody has the claim")
            if sent != "1":
                found.add(f"{order_id}: it may be sent, and does not say so")
            if (server.hget(f"{PREFIX}:bucket:{path}", "spent") or "0.000") == "0.000":
                found.add(f"{order_id}: claimed, and not paid for")
    for key in server.keys(f"{PREFIX}:mass:*"):
        request_id = key.removeprefix(f"{PREFIX}:mass:")
        if ":" in request_id or server.type(key) != "hash":
            continue
        request, report = server.hmget(key, "request", "report")
        if (
            request is not None
            and report is None
            and request_id not in members("mass_cancels:open") & members("mass_cancels")
        ):
            found.add(f"{request_id}: nobody comes for it")
        if report is not None and server.exists(f"{key}:lease"):
            found.add(f"{request_id}: done, and claimed")
    return found


# -- the tests


def test_every_script_has_a_case(scene):
    assert {each.script for each in CASES} == {each.name for each in scene.scripts}
    files = {each.name.removesuffix(".lua") for each in scripts.LUA.iterdir()}
    assert files == scene.lua_files


KEYS_PAGE = (ROOT / "docs/reference/redis-keys.md").read_text("utf-8")
ROWS = {each.name: (each.kind, {one.name for one in each.fields}) for each in KEYS}
FAMILIES = (
    (r"P:(pending|dead|aside|waiters):.+", r"P:\1:{order_id}"),
    (r"P:due:.+", "P:due:{lane}:{path}"),
    (r"P:(wake_up_sent|listeners|wake_up):[a-z]+", r"P:\1:{lane}"),
    (r"P:bucket:.+", "P:bucket:{bucket}"),
    (rf"P:mass:{MASS}(:\w+)?", r"P:mass:{id}\1"),
    (rf"P:mass:{MASS}:draft:.+", "P:mass:{id}:draft:{task_id}"),
    (r"P:list:\w+(:left)?", r"P:list:{task_id}\1"),
    (r"R:cancel:.+", "R:cancel:{order_id}"),
    (r"R:mass:.+", "R:mass:{id}"),
    (r"R:(?!cancel:|mass:).+", "R:{task_id}"),
)


BY_ID = {"P:mass:{id}:orders", "P:taken", "P:idle"}  # hashes whose fields are ids, or names


def family(key: str) -> str:
    """The key as the page calls it."""
    key = key.replace(f"{PREFIX}:", "P:").replace("celery-task-meta-", "R:")
    for pattern, name in FAMILIES:
        if found := re.fullmatch(pattern, key):
            return found.expand(name)
    return key


WRITES = {
    *(
        "HSET",
        "HSETNX",
        "HDEL",
        "HINCRBY",
        "HINCRBYFLOAT",
        "INCRBY",
        "SET",
        "SETEX",
        "DEL",
        "EXPIRE",
        "RENAME",
    ),
    *("ZADD", "ZREM", "ZREMRANGEBYSCORE", "ZREMRANGEBYRANK", "SADD", "SREM", "LPUSH", "RPUSH", "LTRIM"),
    *("XADD", "XTRIM", "PUBLISH"),
}


def written(trial: Trial) -> list[str]:
    """What a script writes, in order."""
    found = []
    for words in trial.commands:
        if words[0] in WRITES:
            fields = {"HSET": words[2::2], "HSETNX": words[2::2], "HDEL": words[2:], "HINCRBY": words[2:3]}
            named = fields.get(words[0], []) if family(words[1]) not in BY_ID else []
            to = [family(words[2])] if words[0] == "RENAME" else []
            keys = words[1:] if words[0] == "DEL" else words[1:2]
            found += [" ".join([words[0], family(key), *to, ",".join(named)]).strip() for key in keys]
    return list(dict.fromkeys(found))


def test_the_page_of_keys_tells_every_key_with_its_fields_and_what_each_script_writes_in_order(scene):
    pending = ROWS["P:pending:{order_id}"][1]  # what is set aside has its fields
    table, seen = ["| script | when | writes |", "|---|---|---|"], set()
    for each in CASES:
        trial = Trial(scene, each, each.users[0])
        writes = written(trial)
        table.append(
            f"| `{each.script}` | {each.what} | {', '.join(f'`{one}`' for one in writes) or 'nothing'} |"
        )
        for key in {*trial.before, *scene.admin.keys("*"), *trial.keys} - set(QUEUES):
            name = family(key)
            assert name in ROWS, f"{each.what}: {key}"
            kind, fields = ROWS[name]
            seen.add(name)
            stored = scene.admin.type(key)
            assert stored in {kind, "none"} or kind == "any" or each.seed is spoilt_and_text, key
            if stored == "hash" and name not in BY_ID:
                assert set(scene.admin.hkeys(key)) <= (fields | pending if kind == "any" else fields), key
    elsewhere = {
        "intake:{lane}",
        "wake_up:{lane}:{key_id}",
        "workers",
        "unreadable",
        "mass_cancels:pace",
    }
    assert set(ROWS) - seen == {f"P:{each}" for each in elsewhere}, "what no script touches"
    shown = KEYS_PAGE.splitlines()
    assert shown[-len(table) :] == table


def without_sentinels(
    server: redis.Redis, script: Any, portions: Sequence[Sequence[Any]], **how: Any
) -> list[Any]:
    """A script that nothing is asked about but what it answers."""
    answers = [scripts.call(lambda args=args: script(args)) for args in portions]
    for command in how.get("then", ()):
        server.execute_command(*command)
    return answers


def run_by_client(_server: redis.Redis, script: Any, args: Sequence[Any], **_how: Any) -> Any:
    return scripts.call(lambda: script(args))


class Trial:
    """A case as one user: how it goes, and what comes of it in trouble."""

    def __init__(self, scene: Scene, case: Case, user: str) -> None:
        self.scene, self.case, self.user = scene, case, user
        scene.admin.flushdb()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scripts, "surely_each", without_sentinels)
            patch.setattr(scripts, "run", run_by_client)
            held = case.seed(scene.parts)
            for each in scene.scripts:
                each.before = None
            case.run(scene.parts, held)
        [seen] = [each for each in scene.scripts if each.name == case.script and each.before is not None]
        self.seen, self.before, self.at_ms = seen, seen.before or {}, scene.now_ms()
        scene.let(USERS[user])
        scene.restore(self.before, self.at_ms)
        self.kinds = {key: scene.admin.type(key) for key in self.before}
        (self.answer, _), self.commands = scene.watched(self.call)
        each = ((words[0].lower(), key) for words in self.commands for key in scene.keys(words) or [""])
        self.ran = list(dict.fromkeys(each))
        self.shape, self.broken = shape(scene.admin), breaches(scene.admin)
        self.enough = [(self.answer, self.shape)]
        if case.if_it_may:
            scene.restore(self.before, self.at_ms)
            scene.admin.delete(case.if_it_may)
            self.enough.append((self.call()[0], shape(scene.admin)))

    @property
    def keys(self) -> list[str]:
        return sorted({key for _, key in self.ran if key})

    def call(self) -> tuple[Any, StoreError | None]:
        """What the script answers, as far as it decides anything; or the error."""
        script = self.seen.script
        try:
            answer = scripts.call(
                lambda: script(**self.seen.args, client=self.scene.limited), may_be_accepted=True
            )
        except StoreError as error:
            return None, error
        if self.case.script == "turn" and len(answer) > 2:  # what was put down is done, and nothing else
            return None, NothingClaimed(answer[2], answer[0])
        decides = DECIDES.get(self.case.script, lambda whole: whole)
        return settled_text("", str(decides(answer))), None

    def wrong_with(
        self, begin: Callable[[], Any], end: Callable[[], Any] = lambda: None, *, as_ever: bool
    ) -> str:
        """What is wrong with what comes of it in this trouble; empty: nothing is.

        ``as_ever``: what it does, if anything, is what it does without the trouble, or is enough.
        """
        scene = self.scene
        scene.restore(self.before, self.at_ms)
        begin()
        before = scene.state()
        try:
            answer, error = self.call()
        finally:
            end()
        after = scene.state()
        changed = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
        if isinstance(error, NothingClaimed):
            claimed = [key for key in changed if re.search("fence|bucket|claimed_ms", key)]
            if claimed:
                return f"{error}, and has claimed: {claimed}"
        elif error is not None:
            if error.may_be_accepted:
                return f"{error}: this must not come up after the first write"
            return f"{error}, and has written {changed}" if changed else ""
        elif as_ever:
            now = shape(scene.admin)
            differs = sorted(key for key in {*now, *self.shape} if now.get(key) != self.shape.get(key))
            if (answer, now) not in self.enough:
                return f"{answer} instead of {self.answer}, and other {differs}"
        broken = breaches(scene.admin)
        if broken:  # by the script, or by the trouble before it
            scene.restore(self.before, self.at_ms)
            begin()
            broken -= breaches(scene.admin)
            end()
        return f"{error or answer}: {sorted(broken)}" if broken else ""


@pytest.fixture(
    params=[(case, user) for case in CASES for user in case.users],
    ids=lambda each: f"{each[0].script}: {each[0].what} ({each[1]})",
)
def trial(scene, request) -> Trial:
    return Trial(scene, *request.param)


REFUSES_WRITES = {
    "out of memory": (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
    "a replica": (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
    "too few replicas": (
        ("CONFIG", "SET", "min-replicas-to-write", "1"),
        ("CONFIG", "SET", "min-replicas-to-write", "0"),
    ),
}


def test_a_script_that_is_refused_any_of_its_commands_has_done_nothing_and_says_so(trial):
    scene, wrong = trial.scene, {}
    assert trial.broken == set()
    assert trial.enough[0] != trial.enough[-1] or not trial.case.if_it_may, "it may"
    for missing, left in denials(trial.user, trial.ran):
        wrong[f"without {missing}"] = trial.wrong_with(
            lambda left=left: scene.let(left), lambda: scene.let(USERS[trial.user]), as_ever=True
        )
    for what, (begin, end) in REFUSES_WRITES.items():
        wrong[what] = trial.wrong_with(
            lambda begin=begin: scene.admin.execute_command(*begin),
            lambda end=end: scene.admin.execute_command(*end),
            as_ever=True,
        )
    assert {what: how for what, how in wrong.items() if how} == {}


KINDS: dict[str, Callable[[redis.Redis, str], Any]] = {
    "string": lambda server, key: server.set(key, "of another kind"),
    "list": lambda server, key: server.rpush(key, "of", "another", "kind"),
    "hash": lambda server, key: server.hset(key, "of", "another kind"),
}
SPOILT = ("x", "nan", "1.5", "9223372036854775807", "")


def test_a_script_that_meets_something_spoilt_does_all_of_it_or_nothing(trial):
    scene, wrong = trial.scene, {}
    for key, what, spoil in spoilt(trial):
        wrong[f"{key}: {what}"] = trial.wrong_with(lambda spoil=spoil: spoil(scene.admin), as_ever=False)
    assert {what: how for what, how in wrong.items() if how} == {}


def spoilt(trial: Trial) -> Iterator[tuple[str, str, Callable[[redis.Redis], Any]]]:
    """Ways to spoil each key that the script looks at: which, how in words, and how."""
    for key in trial.keys:
        kind = trial.kinds.get(key)
        for other, make in KINDS.items():
            if other != kind:
                yield (
                    key,
                    f"a {other}",
                    lambda server, key=key, make=make: (server.delete(key), make(server, key)),
                )
        trial.scene.restore(trial.before, trial.at_ms)
        for text in SPOILT:
            if kind == "string":
                yield key, repr(text), lambda server, key=key, text=text: server.set(key, text, keepttl=True)
            for field in trial.scene.admin.hkeys(key) if kind == "hash" else ():
                yield (
                    key,
                    f"{field} {text!r}",
                    lambda server, key=key, field=field, text=text: server.hset(key, field, text),
                )


def test_what_comes_up_after_the_first_write_may_be_accepted(scene):
    text = "write('SET', prefix .. ':written', 1)\nflush()\nerror('ERR oops')"
    gather = scripts.LUA.joinpath("gather.lua").read_text("utf-8")
    script = scene.admin.register_script(scripts.whole(gather + text))
    with pytest.raises(StoreError, match=r"a script failed after it had written: .*oops") as raised:
        scripts.call(lambda: script(args=[PREFIX]), may_be_accepted=True)
    assert (raised.value.may_be_accepted, raised.value.can_pass) == (True, False)
    assert scene.admin.get(f"{PREFIX}:written") == "1"


# -- through real processes


def test_whatever_a_producer_lacks_what_it_is_told_is_true_and_what_it_asks_for_again_is_canceled(crew):
    rights = USERS["producer"]
    lacks = [(at, pattern) for at, part in enumerate(rights) for pattern in part.keys]
    with crew.apart() as apart, crew.redis.client() as admin:
        let(admin, "short", rights)
        address = apart.url.removeprefix("redis://")
        told: dict[str, set[str]] = {}
        unsure: list[StoreError] = []
        with closing(CancelClient(f"redis://short:pw@{address}", requested_by="short")) as short:
            for at, pattern in lacks:
                new, known = crew.place(2)
                apart.client.cancel(known)
                left = replace(rights[at], keys=tuple(each for each in rights[at].keys if each != pattern))
                let(admin, "short", (*rights[:at], left, *rights[at + 1 :]))
                for order_id in (new, known):
                    try:
                        short.cancel(order_id, lane=Lane.RISK, exchange_index=0)
                    except StoreError as error:
                        unsure += [error] * error.may_be_accepted
                        told.setdefault(pattern, set()).add(order_id)
                    entry = apart.client.status(order_id).open
                    names = entry.requested_by if entry else ()
                    assert ("short" in names) == (order_id not in told.get(pattern, ())), pattern
                let(admin, "short", rights)
                short.cancel_many([new, known], lane=Lane.RISK)
        assert unsure == []
        assert len(told) > 5, "it was refused for want of some"
        apart.start()
        orders = crew.control.orders()
        results = apart.client.results([each["order_id"] for each in orders], timeout=PATIENCE_S)
        assert {each.outcome for each in results} == {"canceled"}
        assert len(orders) == 2 * len(lacks)
        assert set(crew.effective().values()) == {1}


def test_keys_that_only_different_selectors_allow_are_deleted_all_the_same(scene):
    [case] = [each for each in CASES if each.script == "forget"]
    root, *others = USERS["worker"]
    each_kind = [
        replace(root, commands=("+del",), keys=(f"{PREFIX}:{kind}:*",)) for kind in ("dead", "aside")
    ]
    commands = tuple(command for command in root.commands if command != "+del")
    trial = Trial(scene, case, "worker")
    scene.let((replace(root, commands=commands), *others, *each_kind))
    scene.restore(trial.before, trial.at_ms)
    assert trial.call() == (trial.answer, None)
    assert shape(scene.admin) == trial.shape
