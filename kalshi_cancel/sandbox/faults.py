"""Faults: what goes wrong, for which calls, how often, and what the client gets to see of it.

A fault is armed with `Control.fault(kind, **fields)` and strikes every call that matches until it is
used up, over or cleared. Of several call faults that match, the one armed first for the order itself
strikes, else the one armed first for any order.

Fields of every fault: `order_id` (None = any), `operation` (one of OPERATIONS or a list of them; None = any
that the kind knows), `times` (strikes until it is used up; None = always), `for_s` (it is over that many
seconds after it was armed), `skip` (that many matching calls pass untouched first), `probability` (drawn
from the seed, the order id and how often that order was drawn for: other orders' calls do not change it),
`effect`:
"before" = the call takes effect, then the fault spoils the answer; "none" = it never takes effect;
"after" = it takes effect only once the fault has passed. The first effect named below is the default.

kind               effect              fields of its own, and what happens
status             none|before         `status`, `body` (text, JSON value or bytes) or `code`, `message`,
                                       `details`, `shape`; `headers`, `content_type`: any answer
http_500           none|before         500 internal_server_error; `shape`
http_502_html      none|before         502 with an HTML page
http_503           none|before         503 service_unavailable; `shape`, `retry_after`
http_429           none                429 of the rate limiter; `retry_after` (text of the header), or
                                       `retry_date_s`: a date so many seconds ahead on the front's clock
cdn                none|before         a page of the CDN: `status` (403), `shape` ("html", "message" for
                                       JSON, "empty"), `message`; or any `body` and `content_type`
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

These strike whatever else strikes the call:
interim            -                   `count` (1) interim responses of `status` (103), each `seconds` (0)
                                       before what follows it
cached             -                   an `Age` header of `seconds`, and a `Date` as old
skew               -                   both clocks are `seconds` ahead (Date, window, every time)

These concern single orders and pages within an answer:
shuffled           before              a batch's entries in another order
entry_error        none|before         an entry of a batch: `code`, `message`, `details`, or `body`: the
                                       error's very value (object, text, {}); reduced_by "0.00", ts_ms null
entry_missing      before|none         an entry of a batch is not in the answer
entry_foreign      before              an entry of a batch carries another order's id (`body_order_id`)
odd_fields         -                   an order in a read, list or history, or its answer in a cancel or
                                       batch: `fields` have these values, those named in `without` are absent,
                                       and a status in `words` becomes another: {"canceled": "Cancelled"}
odd_page           -                   the same for a page as a whole: `fields={"orders": None}`
endless_cursor     -                   after the last page come empty ones, each with a new cursor
not_found          -                   reads do not see the order (read: 404; list: left out)
stale_read         -                   reads show the order's state before its last change; `seconds` after
                                       that change (None = for good)

Together they make what the exchange does on bad days:

    # every cancel answers 500, the first has taken effect, and reads work
    control.fault("http_500", operation=["cancel", "batch"], times=1, effect="before")
    control.fault("http_500", operation=["cancel", "batch"])
    control.fault("odd_fields", operation="read", fields={"status": "expired"})
    control.fault("odd_fields", without=["yes_price_dollars", "no_price_dollars"], order_id="order-1")
    control.fault("http_503", operation="list", for_s=5.0)

A pause of one shard is a setting: `control.configure(exchange_paused=[1])`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from kalshi_cancel.sandbox.refusal import SHAPES

if TYPE_CHECKING:
    from collections.abc import Sequence

Effect = Literal["none", "before", "after", "fill"]
STRANGER = "00000000-0000-4000-8000-00000000dead"
OPERATIONS = frozenset(
    {
        *("cancel", "batch", "cancel_all", "create", "create_batch", "amend", "decrease"),
        *("read", "list", "history", "cutoff"),
        *("group_create", "group_read", "group_list", "group_trigger", "group_reset", "group_limit"),
        *("group_delete", "status", "limits", "costs", "api_keys", "other"),
    }
)
_READS = frozenset({"read", "list"})
_PAGES = frozenset({"list", "history"})
_BATCH = frozenset({"batch"})


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong and where; see the module's table."""

    kind: str
    order_id: str | None = None
    operation: str | Sequence[str] | None = None
    times: int | None = None
    for_s: float | None = None
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
    retry_date_s: float | None = None
    location: str = "/elsewhere"
    how: Literal["close", "reset"] = "close"
    seconds: float | None = None
    interval_s: float = 0.1
    count: int | None = None
    megabytes: int = 64
    body_order_id: str = STRANGER
    fields: dict[str, Any] = field(default_factory=dict)
    without: Sequence[str] = ()
    words: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kind = KINDS.get(self.kind)
        if kind is None:
            raise ValueError(f"no fault {self.kind!r}; there are {', '.join(KINDS)}")
        if self.effect is not None and self.effect not in kind.effects:
            raise ValueError(f"{self.kind}: effect must be one of {kind.effects}, not {self.effect!r}")
        if self.shape is not None and self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {SHAPES}, not {self.shape!r}")
        known = kind.operations or OPERATIONS
        if self.operation is not None and not self._operations <= known:
            raise ValueError(f"{self.kind} strikes {', '.join(sorted(known))} only, not {self.operation}")
        if self.kind in {"slow", "skew", "cached"} and self.seconds is None:
            raise ValueError(f"{self.kind} needs seconds")
        if self.kind == "interim" and self.status is not None and not 100 <= self.status < 200:
            raise ValueError(f"interim needs a status from 100 to 199, not {self.status}")

    @property
    def effect_or_default(self) -> Effect:
        """The effect asked for, else the kind's first."""
        return self.effect or KINDS[self.kind].effects[0]

    def strikes(self, operation: str) -> bool:
        """Whether calls of this operation are concerned at all."""
        if self.operation is not None:
            return operation in self._operations
        return operation in (KINDS[self.kind].operations or (operation,))

    @property
    def _operations(self) -> set[str]:
        return {self.operation} if isinstance(self.operation, str) else set(self.operation or ())

    def changed(self, body: dict[str, Any]) -> dict[str, Any]:
        """`body` with `fields`, its status in other `words`, and without what `without` names."""
        said = body.get("status")
        status = {"status": self.words[said]} if said in self.words else {}
        changed = {**body, **status, **self.fields}
        return {name: value for name, value in changed.items() if name not in self.without}

    @property
    def has_body(self) -> bool:
        """Whether a `body` was given."""
        return self.body is not None or self.body_hex is not None

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
    """What a kind of fault allows; operations None: it strikes any."""

    effects: tuple[Effect, ...]
    operations: frozenset[str] | None = None


KINDS: dict[str, Kind] = {
    "status": Kind(("none", "before")),
    "http_500": Kind(("none", "before")),
    "http_502_html": Kind(("none", "before")),
    "http_503": Kind(("none", "before")),
    "http_429": Kind(("none",)),
    "cdn": Kind(("none", "before")),
    "hang": Kind(("none", "before")),
    "drop_before": Kind(("none",)),
    "drop_after": Kind(("before",)),
    "drop_after_fill": Kind(("fill",)),
    "slow": Kind(("before", "after")),
    "drip": Kind(("before", "none")),
    "truncated": Kind(("before", "none")),
    "wrong_body": Kind(("before",)),
    "garbage": Kind(("before", "none")),
    "redirect": Kind(("none", "before")),
    "headers_flood": Kind(("before", "none")),
    "gzip_bomb": Kind(("before", "none")),
    "endless": Kind(("before", "none")),
    "oversize": Kind(("none",), _BATCH),
    "interim": Kind(("none",)),
    "cached": Kind(("none",)),
    "skew": Kind(("none",)),
    "shuffled": Kind(("before",), _BATCH),
    "entry_error": Kind(("none", "before"), _BATCH),
    "entry_missing": Kind(("before", "none"), _BATCH),
    "entry_foreign": Kind(("before",), _BATCH),
    "odd_fields": Kind(("none",), frozenset({"read", "list", "history", "cancel", "batch"})),
    "odd_page": Kind(("none",), _PAGES),
    "endless_cursor": Kind(("none",), _PAGES),
    "not_found": Kind(("none",), _READS),
    "stale_read": Kind(("none",), _READS),
}
