"""Faults: what goes wrong, for which calls, how often, and what the client gets to see of it.

A fault is armed with `Control.fault(kind, **fields)` and strikes every call that matches until it is
used up or cleared. Of several call faults that match, the one armed first for the order itself strikes,
else the one armed first for any order.

Fields of every fault: `order_id` (None = any), `operation` (None = any that the kind knows; else cancel,
batch, cancel_all, read, list, create, create_batch, amend, decrease, group_create, group_read, group_list,
group_trigger, group_reset, group_limit, group_delete, status, limits, costs, other), `times` (strikes
until it is used up; None = always), `skip` (that many matching calls pass untouched first), `probability`
(drawn from the seed, the order id and how often that order was drawn for: other orders' calls do not
change it), `effect`:
"before" = the call takes effect, then the fault spoils the answer; "none" = it never takes effect;
"after" = it takes effect only once the fault has passed. The first effect named below is the default.

kind               effect              fields of its own, and what happens
status             none|before         `status`, `body` (text, JSON value or bytes) or `code`, `message`,
                                       `details`, `shape`; `headers`, `content_type`: any answer
http_500           none|before         500 internal_server_error; `shape`
http_502_html      none|before         502 with an HTML page
http_503           none|before         503 service_unavailable; `shape`, `retry_after`
http_429           none                429 of the rate limiter; `retry_after` (text of the header)
hang               none|before         no answer until clear_faults(), reset() or the end; then a close
drop_before        none                connection closed; `how` = "close" | "reset"
drop_after         before              the same, after the effect
drop_after_fill    fill                the order is filled completely instead; then as drop_after
slow               before|after        `seconds` pass after (or before) the effect, then the answer
drip               before|none         the answer comes one byte per `interval_s`
truncated          before|none         half of the body, then the connection closes
wrong_body         before              the answer describes another order (`body_order_id`)
garbage            before|none         200 with `body`, which need not be JSON (text or bytes)
redirect           none|before         `status` (302) to `location`
headers_flood      before|none         `count` (5,000) headers too many
gzip_bomb          before|none         Content-Encoding gzip, `megabytes` (64) once unpacked
endless            before|none         a chunked body without end, a chunk per `interval_s`
oversize           none                a batch refused as too large (setting oversize_status)
shuffled           before              a batch's entries in another order
entry_error        none|before         an entry of a batch: `code`, `message`, `details`
entry_missing      before|none         an entry of a batch is not in the answer
entry_foreign      before              an entry of a batch carries another order's id (`body_order_id`)
not_found          -                   reads do not see the order (read: 404; list: left out)
stale_read         -                   reads show the order's state before its last change; `seconds` after
                                       that change (None = for good)
skew               -                   both clocks are `seconds` ahead (Date, window, every time)
"""

from __future__ import annotations

import functools
import gzip
import json
import random
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from sandbox.refusal import SHAPES, Refusal, html, refuse, too_many_requests
from sandbox.wire import JSON, Manner, Reply

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Effect = Literal["none", "before", "after", "fill"]
STRANGER = "00000000-0000-4000-8000-00000000dead"
_READS = frozenset({"read", "list"})
_BATCH = frozenset({"batch"})


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong and where; see the module's table."""

    kind: str
    order_id: str | None = None
    operation: str | None = None
    times: int | None = None
    skip: int = 0
    probability: float = 1.0
    effect: Effect | None = None
    status: int | None = None
    code: str | None = None
    message: str | None = None
    details: str | None = None
    shape: str | None = None
    body: Any = None
    body_hex: str | None = None
    content_type: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    retry_after: str | None = None
    location: str = "/elsewhere"
    how: Literal["close", "reset"] = "close"
    seconds: float | None = None
    interval_s: float = 0.1
    count: int = 5000
    megabytes: int = 64
    body_order_id: str = STRANGER

    def __post_init__(self) -> None:
        kind = KINDS.get(self.kind)
        if kind is None:
            raise ValueError(f"no fault {self.kind!r}; there are {', '.join(KINDS)}")
        if self.effect is not None and self.effect not in kind.effects:
            raise ValueError(f"{self.kind}: effect must be one of {kind.effects}, not {self.effect!r}")
        if self.shape is not None and self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {SHAPES}, not {self.shape!r}")
        if kind.operations and self.operation and self.operation not in kind.operations:
            raise ValueError(f"{self.kind} strikes {', '.join(sorted(kind.operations))} only")
        if self.kind in {"slow", "skew"} and self.seconds is None:
            raise ValueError(f"{self.kind} needs seconds")

    @property
    def effect_or_default(self) -> Effect:
        """The effect asked for, else the kind's first."""
        return self.effect or KINDS[self.kind].effects[0]

    def strikes(self, operation: str) -> bool:
        """Whether calls of this operation are concerned at all."""
        if self.operation is not None:
            return self.operation == operation
        return operation in (KINDS[self.kind].operations or (operation,))

    @property
    def raw_body(self) -> bytes:
        """The bytes given as `body`."""
        if self.body_hex is not None:
            return bytes.fromhex(self.body_hex)
        if self.body is None:
            return b""
        return (self.body if isinstance(self.body, str) else json.dumps(self.body)).encode()


@dataclass(frozen=True, slots=True)
class Kind:
    """What a kind of fault allows, and how it spoils a reply (None: it works in another place)."""

    effects: tuple[Effect, ...]
    spoil: Callable[[Fault, Reply], Reply] | None = None
    operations: frozenset[str] | None = None


@dataclass(slots=True, eq=False)
class Armed:
    """A fault that waits for its calls, and what it has seen of them."""

    number: int
    fault: Fault
    seen: int = 0
    struck: int = 0
    draws: Counter[str] = field(default_factory=Counter)

    @property
    def used_up(self) -> bool:
        """Whether it will never strike again."""
        return self.fault.times is not None and self.struck >= self.fault.times


class Faults:
    """The armed faults. Not thread-safe: its owner locks."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._count = 0
        self._armed: defaultdict[str | None, list[Armed]] = defaultdict(list)
        self._kinds: Counter[str] = Counter()

    def arm(self, fault: Fault) -> int:
        """Arms `fault` and returns its number."""
        self._count += 1
        self._armed[fault.order_id].append(Armed(self._count, fault))
        self._kinds[fault.kind] += 1
        return self._count

    def armed(self) -> list[dict[str, Any]]:
        """All armed faults, how often they were met and how often they struck."""
        return [
            {"id": armed.number, "seen": armed.seen, "struck": armed.struck, **asdict(armed.fault)}
            for armed in sorted((a for many in self._armed.values() for a in many), key=lambda a: a.number)
        ]

    def has(self, kind: str) -> bool:
        """Whether a fault of this kind is armed at all (cheap)."""
        return self._kinds[kind] > 0

    def call_fault(self, operation: str, order_ids: Sequence[str]) -> Fault | None:
        """The fault that strikes this call as a whole, if one does."""
        return self._strike(_CALL_KINDS, operation, order_ids)

    def strike(self, kind: str, operation: str, order_ids: Sequence[str]) -> Fault | None:
        """The fault of `kind` that strikes these orders within a call, if one does."""
        return self._strike({kind}, operation, order_ids) if self.has(kind) else None

    def random(self, salt: str) -> random.Random:
        """Randomness for this seed and `salt`."""
        return random.Random(f"{self.seed}/{salt}")

    def _strike(
        self, kinds: frozenset[str] | set[str], operation: str, order_ids: Sequence[str]
    ) -> Fault | None:
        if not self._armed:
            return None
        for key in (*order_ids, None):
            for armed in self._armed.get(key, ()):
                fault = armed.fault
                if (
                    fault.kind in kinds
                    and fault.strikes(operation)
                    and self._fires(armed, operation, order_ids)
                ):
                    if armed.used_up:
                        self._disarm(key, armed)
                    return fault
        return None

    def _fires(self, armed: Armed, operation: str, order_ids: Sequence[str]) -> bool:
        armed.seen += 1
        if armed.seen <= armed.fault.skip:
            return False
        if armed.fault.probability < 1:
            about = order_ids[0] if len(order_ids) == 1 else operation
            armed.draws[about] += 1
            draw = self.random(f"{armed.number}/{about}/{armed.draws[about]}").random()
            if draw >= armed.fault.probability:
                return False
        armed.struck += 1
        return True

    def _disarm(self, key: str | None, armed: Armed) -> None:
        self._armed[key].remove(armed)
        self._kinds[armed.fault.kind] -= 1
        if not self._armed[key]:
            del self._armed[key]


def spoil(fault: Fault, reply: Reply | None) -> Reply:
    """What the client gets instead of `reply` (None when the call took no effect)."""
    spoiler = KINDS[fault.kind].spoil
    assert spoiler is not None
    return spoiler(fault, reply or Reply(200))


def _status(fault: Fault, _reply: Reply) -> Reply:
    headers = tuple(fault.headers.items())
    if fault.retry_after is not None:
        headers = (*headers, ("Retry-After", fault.retry_after))
    status = fault.status or 500
    if fault.body is not None or fault.body_hex is not None:
        return Reply(status, fault.raw_body, headers, fault.content_type or JSON)
    code = fault.code or {500: "internal_server_error", 503: "service_unavailable"}.get(status, "error")
    return replace(refuse(Refusal(status, code, fault.message, fault.details), fault.shape), headers=headers)


def _page(fault: Fault, _reply: Reply) -> Reply:
    return Reply(502, html(502, "Bad Gateway"), tuple(fault.headers.items()), content_type="text/html")


def _too_many(fault: Fault, _reply: Reply) -> Reply:
    headers = tuple(fault.headers.items())
    if fault.retry_after is not None:
        headers = (*headers, ("Retry-After", fault.retry_after))
    return replace(refuse(too_many_requests(), fault.shape), headers=headers)


def _with_status(status: int) -> Callable[[Fault, Reply], Reply]:
    return lambda fault, reply: _status(replace(fault, status=status), reply)


def _by_manner(manner: Manner) -> Callable[[Fault, Reply], Reply]:
    return lambda fault, reply: replace(
        reply, manner=manner, interval_s=fault.interval_s, body=reply.body or b'{"order_id":'
    )


def _drop(fault: Fault, reply: Reply) -> Reply:
    return replace(reply, manner=fault.how)


def _wrong_body(fault: Fault, reply: Reply) -> Reply:
    if reply.status >= 300 or not reply.body:
        return reply
    body = json.loads(reply.body)
    for part in (body, body.get("order")):
        if isinstance(part, dict) and "order_id" in part:
            part["order_id"] = fault.body_order_id
            part.pop("client_order_id", None)
    return replace(reply, body=json.dumps(body, separators=(",", ":")).encode())


def _garbage(fault: Fault, _reply: Reply) -> Reply:
    status = fault.status or 200
    body = fault.raw_body or b"\x00\xff{not json"
    return Reply(status, body, tuple(fault.headers.items()), fault.content_type or JSON)


def _redirect(fault: Fault, _reply: Reply) -> Reply:
    return Reply(fault.status or 302, headers=(("Location", fault.location),))


def _flood(fault: Fault, reply: Reply) -> Reply:
    return replace(reply, headers=tuple((f"X-Flood-{n}", "drop" * 8) for n in range(fault.count)))


def _bomb(fault: Fault, reply: Reply) -> Reply:
    return replace(reply, body=_zeros(fault.megabytes), headers=(("Content-Encoding", "gzip"),))


@functools.lru_cache(maxsize=4)
def _zeros(megabytes: int) -> bytes:
    return gzip.compress(bytes(megabytes << 20), compresslevel=9, mtime=0)


def _same(_fault: Fault, reply: Reply) -> Reply:
    return reply


KINDS: dict[str, Kind] = {
    "status": Kind(("none", "before"), _status),
    "http_500": Kind(("none", "before"), _with_status(500)),
    "http_502_html": Kind(("none", "before"), _page),
    "http_503": Kind(("none", "before"), _with_status(503)),
    "http_429": Kind(("none",), _too_many),
    "hang": Kind(("none", "before"), _by_manner("hang")),
    "drop_before": Kind(("none",), _drop),
    "drop_after": Kind(("before",), _drop),
    "drop_after_fill": Kind(("fill",), _drop),
    "slow": Kind(("before", "after"), _same),
    "drip": Kind(("before", "none"), _by_manner("drip")),
    "truncated": Kind(("before", "none"), _by_manner("truncated")),
    "wrong_body": Kind(("before",), _wrong_body),
    "garbage": Kind(("before", "none"), _garbage),
    "redirect": Kind(("none", "before"), _redirect),
    "headers_flood": Kind(("before", "none"), _flood),
    "gzip_bomb": Kind(("before", "none"), _bomb),
    "endless": Kind(("before", "none"), _by_manner("endless")),
    "oversize": Kind(("none",), _same, _BATCH),
    "shuffled": Kind(("before",), None, _BATCH),
    "entry_error": Kind(("none", "before"), None, _BATCH),
    "entry_missing": Kind(("before", "none"), None, _BATCH),
    "entry_foreign": Kind(("before",), None, _BATCH),
    "not_found": Kind(("none",), None, _READS),
    "stale_read": Kind(("none",), None, _READS),
    "skew": Kind(("none",), None),
}
_CALL_KINDS = frozenset(name for name, kind in KINDS.items() if kind.spoil is not None)
