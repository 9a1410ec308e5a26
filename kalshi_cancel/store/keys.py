"""Names every key in Redis: its fields, the states of a pending cancel, and who writes what.

Python spells keys with :class:`Keys`. Lua spells them as literals; tests/test_keys.py compares both with
the tables here. To write the tables into the page:
``python -m kalshi_cancel.store.keys docs/reference/redis-keys.md``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["hash", "zset", "set", "list", "string", "stream", "any"]


class Keys:
    """The keys under one prefix."""

    __slots__ = (
        "aside",
        "audit",
        "counts",
        "dead",
        "idle",
        "limits",
        "lists",
        "mass_cancels",
        "mass_cancels_open",
        "mass_cancels_pace",
        "paths",
        "prefix",
        "taken",
        "taken_until",
        "unreadable",
        "workers",
    )

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.aside = f"{prefix}:aside"
        self.audit = f"{prefix}:audit"
        self.counts = f"{prefix}:counts"
        self.dead = f"{prefix}:dead"
        self.idle = f"{prefix}:idle"
        self.limits = f"{prefix}:limits"
        self.lists = f"{prefix}:lists"
        self.mass_cancels = f"{prefix}:mass_cancels"
        self.mass_cancels_open = f"{prefix}:mass_cancels:open"
        self.mass_cancels_pace = f"{prefix}:mass_cancels:pace"
        self.paths = f"{prefix}:paths"
        self.taken = f"{prefix}:taken"
        self.taken_until = f"{prefix}:taken:until"
        self.unreadable = f"{prefix}:unreadable"
        self.workers = f"{prefix}:workers"

    def pending(self, order_id: str) -> str:
        """A pending cancel."""
        return f"{self.prefix}:pending:{order_id}"

    def dead_letter(self, order_id: str) -> str:
        """A dead letter."""
        return f"{self.prefix}:dead:{order_id}"

    def set_aside(self, order_id: str) -> str:
        """A pending cancel that could not be read."""
        return f"{self.prefix}:aside:{order_id}"

    def due(self, lane: str, path: str) -> str:
        """The pending cancels of a lane whose next call one bucket pays for."""
        return f"{self.prefix}:due:{lane}:{path}"

    def wake_up(self, lane: str) -> str:
        """Where senders of a lane wait for a wake-up."""
        return f"{self.prefix}:wake_up:{lane}"

    def wake_up_with(self, lane: str, key_id: str) -> str:
        """The same, for workers that have this API key."""
        return f"{self.prefix}:wake_up:{lane}:{key_id}"

    def listeners(self, lane: str) -> str:
        """Exists while a sender of a lane listens."""
        return f"{self.prefix}:listeners:{lane}"

    def intake(self, lane: str) -> str:
        """Held by the worker that takes in raw messages."""
        return f"{self.prefix}:intake:{lane}"

    def bucket(self, bucket: str) -> str:
        """A token bucket."""
        return f"{self.prefix}:bucket:{bucket}"

    def result_list(self, task_id: str) -> str:
        """A list of results that a task waits for."""
        return f"{self.prefix}:list:{task_id}"

    def mass_cancel(self, request_id: str) -> str:
        """A mass cancel."""
        return f"{self.prefix}:mass:{request_id}"


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a hash; ``scripts``: those that write it, with blanks between them."""

    name: str
    meaning: str = ""
    scripts: str = ""


@dataclass(frozen=True, slots=True)
class Key:
    """A kind of key. P and R stand for the prefixes, ``{...}`` for what differs.

    ``ends``: its life; or its owner in italics, who removes or bounds it.
    """

    name: str
    kind: Kind
    what: str
    ends: str
    fields: tuple[Field, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class State:
    """A state of an accepted cancel: how Redis shows it, and what ends it."""

    name: str
    shown_by: str
    ends: str


STATES = (
    State(
        "waiting",
        "`P:pending:{order_id}` has no `token`, or an empty one; its score in `P:due:*` has passed",
        "A sender claims it (`turn`).",
    ),
    State(
        "claimed",
        "`P:pending:{order_id}` has a `token`; its score in `P:due:*` is the end of the lease",
        "Its sender settles it, retries later or makes it a dead letter (`turn`); or the lease runs out.",
    ),
    State(
        "retry later",
        "`P:pending:{order_id}` has `progress` and no `token`; its score in `P:due:*` is in the future",
        "The pause ends; or somebody asks again (`accept`).",
    ),
    State(
        "unresolved",
        "`reported` is 1; besides, it is waiting, claimed or to be retried",
        "It is settled; or somebody asks again.",
    ),
    State(
        "settled", "`R:cancel:{order_id}` has its result; there is no pending cancel", "The result expires."
    ),
    State(
        "dead letter",
        "`P:dead:{order_id}`, and its id in `P:dead`",
        "`cancelctl retry` (`retry`), a new request (`accept`), or 30 days (`forget`).",
    ),
    State(
        "set aside",
        "`P:aside:{order_id}`, and its id in `P:aside`",
        "`cancelctl retry` (`retry`), a new request (`accept`), or 30 days (`forget`).",
    ),
)


def _fields(names: str) -> tuple[Field, ...]:
    """Fields that the key's own text explains."""
    return tuple(map(Field, names.split()))


PENDING = (
    Field("request", "The request as JSON: `order_id`, routing, who asked and why.", "accept retry"),
    Field("lane", "`risk` or `strategy`.", "accept mend retry"),
    Field(
        "path",
        "The bucket that pays for the next call, which is the index it stands in.",
        "accept mend retry set_progress turn",
    ),
    Field("accepted_ms", "When it was accepted.", "accept retry"),
    Field("deadline_ms", "When its waiters get `unresolved`.", "accept retry"),
    Field("requested_by", "Who asked: names, JSON.", "accept"),
    Field("left_out", "Further requests whose names the list has no room for.", "accept"),
    Field("reply_to", "The first task that wants the result, JSON.", "accept"),
    Field("waiters", "1: further tasks are in `P:waiters:{order_id}`.", "accept list_put_back"),
    Field(
        "progress",
        "What is known so far, JSON: attempts, doubts, the last problem.",
        "accept set_progress turn",
    ),
    Field("token", "The fencing token of the latest claim; empty: not claimed.", "accept turn"),
    Field("claimed_by", "The worker that has it, or had it last: host and process id.", "accept extend turn"),
    Field("sent", "1: a cancel may have been sent under this claim.", "accept turn"),
    Field("first_sent_ms", "The exchange's clock at the first claim that may send.", "accept turn"),
    Field("first_sent_age", "Milliseconds from `accepted_ms` to that claim.", "accept turn"),
    Field("reported", "1: its waiters know that it is unresolved.", "accept report retry"),
    Field("replied", "How many of the further waiters know that.", "reply_rest report"),
    Field("asked_again", "1: somebody asked again while it was claimed.", "accept turn"),
)

KEYS = (
    Key(
        "P:pending:{order_id}",
        "hash",
        "A pending cancel: its fields are below.",
        "*the store: goes in the step that stores its record*",
        PENDING,
    ),
    Key(
        "P:due:{lane}:{path}",
        "zset",
        "Order ids by the moment they are due.",
        "*the store: an id goes with its pending cancel*",
    ),
    Key(
        "P:paths",
        "set",
        "The paths there are, named after the bucket that pays: `write`, `write:{shard}`, `read`, `reads`.",
        "*the store: as many as shards*",
    ),
    Key(
        "P:deadline",
        "zset",
        "Orders whose waiters have no answer yet, by deadline.",
        "*the store: an id goes when they get one, or with its pending cancel*",
    ),
    Key(
        "P:dead",
        "zset",
        "Dead letters by when they became dead letters.",
        "*the sweeper: 30 days, or until somebody asks again*",
    ),
    Key(
        "P:dead:{order_id}",
        "hash",
        "A dead letter: the pending cancel as it was.",
        "*the sweeper: 30 days, or until somebody asks again*",
        PENDING,
    ),
    Key(
        "P:aside",
        "zset",
        "Pending cancels that could not be read, by when they were set aside.",
        "*the sweeper: 30 days, or until somebody asks again*",
    ),
    Key(
        "P:aside:{order_id}",
        "any",
        "Such a pending cancel, of whatever kind it was.",
        "*the sweeper: 30 days, or until somebody asks again*",
    ),
    Key(
        "P:waiters:{order_id}",
        "zset",
        "Further tasks that want an order's result, by when they came.",
        "a week after the last came",
    ),
    Key(
        "P:replies_left",
        "set",
        "Orders with more waiters than one script replies to.",
        "*the sweeper: an id goes when all have a reply*",
    ),
    Key(
        "P:lists",
        "set",
        "Lists of results that may be complete.",
        "*the sweeper: an id goes when it was looked at*",
    ),
    Key(
        "P:list:{task_id}",
        "hash",
        "A list of results: `orders`, `refused` (JSON).",
        "a week; goes when it is answered",
        _fields("orders refused"),
    ),
    Key("P:list:{task_id}:left", "set", "Its orders without a result.", "a week; goes when it is answered"),
    Key("P:fence", "string", "The last fencing token given out.", "*all workers: there is one*"),
    Key(
        "P:claimed_ms",
        "hash",
        "By lane (`risk`, `strategy`): when it was last claimed from.",
        "*all workers: there is one*",
        _fields("risk strategy"),
    ),
    Key(
        "P:wake_up_sent:{lane}",
        "string",
        "There while a wake-up is on its way.",
        "the patience of a sweep, 1 s",
    ),
    Key(
        "P:wake_up:{lane}",
        "list",
        "Where idle senders wait. A wake-up may carry a claim, JSON.",
        "*the sender that takes it: it holds at most one*",
    ),
    Key("P:wake_up:{lane}:{key_id}", "list", "The same, for workers that have this key.", "5 s"),
    Key("P:listeners:{lane}", "string", "There while any sender listens.", "5 s"),
    Key(
        "P:idle",
        "hash",
        "Idle workers, and how a lone cancel is claimed for each: until when, lanes, lease, cost, share kept "
        "for risk, the exchange's clock.",
        "*each worker: its field goes when it has work; it counts for 3 s*",
    ),
    Key("P:intake:{lane}", "string", "There while a worker takes in raw messages.", "2 s"),
    Key(
        "P:counts",
        "hash",
        "`accepted:risk`, `accepted:strategy`, `audit_missed`, `audit_marked`, `audit_why`.",
        "*all workers: there is one*",
        _fields("accepted:risk accepted:strategy audit_missed audit_marked audit_why"),
    ),
    Key(
        "P:limits",
        "hash",
        "What the account may: `read_refill`, `read_capacity`, `write_refill`, `write_capacity`.",
        "*all workers: there is one*",
        _fields("read_refill read_capacity write_refill write_capacity"),
    ),
    Key(
        "P:bucket:{bucket}",
        "hash",
        "A token bucket: `tokens`, `at_us`, `spent`, `share`, `share_at_us`, and of its last 429: "
        "`since_us`, `spent_by`, `let`, `within_us`, `before`, `nothing_us`, `refused`.",
        "*all workers: as many as shards*",
        _fields(
            "tokens at_us spent share share_at_us since_us spent_by let within_us before nothing_us refused"
        ),
    ),
    Key(
        "P:workers",
        "zset",
        "Workers (JSON) by when they last said that they run.",
        "*each worker: who has said nothing for 60 s goes; after 5 s only its key counts*",
    ),
    Key(
        "P:taken",
        "hash",
        "Messages that workers have taken and not acknowledged: delivery tag to list and message.",
        "*the worker that has it; later, the others put it back*",
    ),
    Key(
        "P:taken:until",
        "zset",
        "Their delivery tags by when the lease ends.",
        "*the worker that has it; later, the others put it back*",
    ),
    Key(
        "P:unreadable",
        "list",
        "The latest hundred messages that could not be understood or entered.",
        "*who adds one: the latest hundred stay*",
    ),
    Key(
        "P:mass_cancels",
        "zset",
        "Mass cancels by when they were asked for.",
        "*who finishes one: what is older than results are kept goes*",
    ),
    Key("P:mass_cancels:open", "set", "Those without a report.", "*who finishes one: its id goes*"),
    Key(
        "P:mass_cancels:pace",
        "string",
        "Orders a second that were settled when nothing held them up.",
        "*all workers: there is one*",
    ),
    Key(
        "P:mass:{id}",
        "hash",
        "A mass cancel: `request`, `meant`, `entered_ms`, `begun`, `plan`, `command`, `refused`, `progress`, "
        "`report` (JSON), `ended` (flat, not_flat or planned), `spent` (tokens), `fence` (the latest "
        "runner's token)",
        "with its report: `KALSHI_RESULT_EXPIRES_S`",
        _fields("request meant entered_ms begun plan command refused progress report ended spent fence"),
    ),
    Key(
        "P:mass:{id}:waiters",
        "set",
        "Tasks that want the report.",
        "with its report: `KALSHI_RESULT_EXPIRES_S`",
    ),
    Key(
        "P:mass:{id}:orders",
        "hash",
        "By order id: what it had when it was planned (JSON).",
        "with its report: `KALSHI_RESULT_EXPIRES_S`",
    ),
    Key(
        "P:mass:{id}:left",
        "list",
        "Its orders that may not be settled yet.",
        "with its report: `KALSHI_RESULT_EXPIRES_S`",
    ),
    Key(
        "P:mass:{id}:draft:{task_id}",
        "string",
        "A record of its report until the step that puts it in place.",
        "a minute",
    ),
    Key("P:mass:{id}:lease", "string", "Who runs it.", "3 s, kept up by its runner"),
    Key(
        "P:audit",
        "stream",
        "The audit log: `kind`, `body` (JSON), `hash`.",
        "*the trimmer: `KALSHI_AUDIT_MAX_AGE_S`, `KALSHI_AUDIT_MAX_ENTRIES`*",
        _fields("kind body hash"),
    ),
    Key("P:audit:head", "string", "The last entry's hash.", "*the audit log: there is one*"),
    Key(
        "P:audit:base",
        "string",
        "The hash of the last entry that was trimmed.",
        "*the audit log: there is one*",
    ),
    Key(
        "P:audit:exported",
        "string",
        "The id of the last entry that was exported.",
        "*the audit log: there is one*",
    ),
    Key("P:audit:warned", "string", "There while nobody needs to be warned of trimming again.", "an hour"),
    Key(
        "R:cancel:{order_id}",
        "string",
        "An order's record: its result in Celery's form.",
        "`KALSHI_RESULT_EXPIRES_S`",
    ),
    Key("R:mass:{id}", "string", "The record of a mass cancel.", "`KALSHI_RESULT_EXPIRES_S`"),
    Key("R:{task_id}", "string", "The result of a task that wants it.", "`KALSHI_RESULT_EXPIRES_S`"),
)

SCRIPTS_HEADING = "## What each script writes, in order"


def page(before: str) -> str:
    """The page as the tables have it; from the scripts' heading on as it was ``before``."""
    _, heading, scripts = before.partition(SCRIPTS_HEADING)
    return "\n".join(_tables()) + "\n" + heading + scripts


def _tables() -> Iterator[str]:
    yield from (
        "# Keys in Redis",
        "",
        "<!-- `python -m kalshi_cancel.store.keys` (path of this file) writes all but the last table. -->",
        "",
        "`P` is `KALSHI_KEY_PREFIX` (default `kalshi-cancel`). `R` is `celery-task-meta-`, after the prefix",
        "of Celery's keys. Times are epoch milliseconds by Redis' clock unless the table says otherwise.",
        "",
        "A script writes all of its values or none. `kalshi_cancel/store/lua/gather.lua` collects",
        "the writes and checks permissions and types before the first one.",
        "",
        "## States of a cancel",
        "",
        "| state | in Redis | ends when |",
        "|---|---|---|",
        *(f"| {each.name} | {each.shown_by} | {each.ends} |" for each in STATES),
        "",
        "## Keys",
        "",
        "Each key has a life (a TTL) or, *in italics*, an owner that removes or bounds it.",
        "",
        "| key | type | what | ends |",
        "|---|---|---|---|",
        *(f"| `{each.name}` | {each.kind} | {each.what} | {each.ends} |" for each in KEYS),
        "",
        "Celery's own keys: the queues `cancels` and `risk`, `_kombu.binding*`.",
        "",
        "## Fields of a pending cancel",
        "",
        "| field | meaning | written by |",
        "|---|---|---|",
        *(f"| `{each.name}` | {each.meaning} | {_listed(each.scripts)} |" for each in PENDING),
        "",
    )


def _listed(scripts: str) -> str:
    return ", ".join(f"`{each}`" for each in scripts.split())


if __name__ == "__main__":
    shown = Path(sys.argv[1])
    shown.write_text(page(shown.read_text("utf-8")), "utf-8")
