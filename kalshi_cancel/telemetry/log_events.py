"""Names every line that the service and its clients log: its level, text, fields, meaning, and what to do.

A line has a stable slug, a text that never changes, and facts as fields. This table is the only place that
says so. ``python -m kalshi_cancel.telemetry.log_events FILE`` writes the page docs/reference/log-events.md.
"""

from __future__ import annotations

import json
import logging
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, TypedDict, get_args, get_type_hints

_INFO, _WARNING, _ERROR, _CRITICAL = logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL
_TELL_US = "Report it with its traceback."
_STALLS = "If it repeats, find out why the host stalls."
_WRITER = "Find out who writes to Redis."


class RequestFields(TypedDict, total=False):
    """The facts that tell whose line it is."""

    request_id: Annotated[str, "The mass cancel, or the producer's own id of a cancel."]
    lane: Annotated[str, "The lane: `risk` or `strategy`."]
    trace_id: Annotated[str, "The trace of the request, if it was traced."]


class LogFields(RequestFields, total=False):
    """The facts that a line may have; never a key, a header or a signature."""

    order_id: Annotated[str | None, "The order."]
    outcome: Annotated[str, "The outcome of a cancel."]
    attempts: Annotated[int, "How many cancels were sent for the order."]
    code: Annotated[str | None, "The error code of what stood in the way."]
    age_s: Annotated[float, "Seconds since the cancel was accepted."]
    key_id: Annotated[str, "The id of the API key; never the key."]
    why: Annotated[str | None, "The cause, in the words of Redis, the exchange or the system."]
    doing: Annotated[str, "What the worker was doing when it failed."]
    count: Annotated[int, "How many orders, entries or results the line is about."]
    state: Annotated[str, "The state of the circuit breaker."]
    status: Annotated[int | None, "The HTTP status."]
    skew_ms: Annotated[int, "How far the exchange's clock is ahead of this host's, in ms."]
    bucket: Annotated[str, "The token bucket."]
    service: Annotated[str, "The background job."]
    task_id: Annotated[str | None, "The message's task id."]
    message_text: Annotated[str, "The message as it came, shortened."]
    from_id: Annotated[str, "The first entry of the audit log that is not exported."]
    not_exported: Annotated[int, "How many of the trimmed entries were never exported."]
    requested_by: Annotated[str | None, "Who asked for it."]
    keys: Annotated[str, "The keys in Redis."]
    repeats: Annotated[int, "How many such lines were left out since the last one."]


class LogEvent(Enum):
    """A kind of line: level, text, fields, meaning, and what to do. Its slug is its name in small letters."""

    def __init__(self, level: int, text: str, fields: str, meaning: str, action: str) -> None:
        self.slug = self.name.lower()
        self.level = level
        self.text = text
        self.fields = tuple(fields.split())
        self.meaning = meaning
        self.action = action
        self.as_text = f"event={self.slug} {text}"
        self.as_json = f'{json.dumps(text)},"event":"{self.slug}"'

    # -- cancels
    CANCEL_SETTLED = (
        _INFO,
        "cancel settled",
        "order_id request_id lane outcome attempts code age_s trace_id",
        "The final outcome of one order: `canceled` or `too_late`.",
        "Nothing.",
    )
    CANCEL_FAILED = (
        _WARNING,
        "cancel failed",
        "order_id request_id lane outcome attempts code age_s trace_id",
        "The outcome of one order is `refused` or `unknown_order`.",
        "See `error` in its result: `cancelctl status ORDER_ID`.",
    )
    CANCEL_GIVEN_UP = (
        _ERROR,
        "cancel given up, its outcome is unknown",
        "order_id request_id lane outcome attempts code age_s trace_id",
        "The cancel was not settled within `KALSHI_CANCEL_MAX_AGE_S`. It is a dead letter now.",
        "Look at the order at the exchange, then at `cancelctl dead`.",
    )
    LEASE_LOST = (
        _WARNING,
        "lease lost, another sender has this cancel",
        "order_id request_id lane attempts trace_id",
        (
            "The worker was frozen, or without Redis, for longer than its lease. Or its result was stored "
            "twice. No harm was done."
        ),
        _STALLS,
    )
    CANCEL_UNREADABLE = (
        _ERROR,
        "pending cancel unreadable, set aside",
        "order_id why",
        (
            "Somebody else, or a newer version, wrote to a pending cancel. Nobody works on it. `cancelctl "
            "dead` shows it."
        ),
        "Find out who wrote to Redis, and ask for the cancel again.",
    )
    CANCELS_REQUEUED = (
        _WARNING,
        "pending cancels were in no queue, queued again",
        "count",
        "Keys in Redis were changed by hand, or lost.",
        "If it repeats, find out who changes keys.",
    )
    KEYS_REBUILT = (
        _ERROR,
        "keys of another kind replaced, cancels go on",
        "keys",
        "Somebody else wrote to keys that every cancel needs. They are made anew from the pending cancels.",
        "Find out who writes to Redis.",
    )
    RESULT_UNREADABLE = (
        _WARNING,
        "stored result unreadable",
        "order_id why",
        "Somebody else wrote to an order's result.",
        "Ask for the cancel again: a true result replaces it.",
    )
    LIST_UNREADABLE = (
        _WARNING,
        "list of results unreadable, dropped",
        "task_id why",
        "Somebody else wrote to the list of results of a message with several orders.",
        "Read each order's own result.",
    )
    DEAD_LETTERS_DELETED = (
        _ERROR,
        "dead letters deleted after 30 days",
        "count",
        "Nobody asked for these cancels again. Their orders may still rest.",
        "Look at `cancelctl dead` every day.",
    )
    MESSAGE_REFUSED = (
        _WARNING,
        "message refused",
        "order_id request_id lane outcome attempts code trace_id why",
        "A message has an invalid field. Its producer is told which one. Nothing was canceled.",
        "Tell whoever runs the producer.",
    )
    MESSAGE_UNREADABLE = (
        _CRITICAL,
        "message unreadable, kept",
        "message_text",
        "Somebody pushed something that is not a message of ours. Its text is kept in Redis.",
        (
            "See [the kept messages](../how-to/operating.md#messages-that-cannot-be-understood), "
            "and who may write to Redis."
        ),
    )
    WAKE_UP_FAILED = (
        _WARNING,
        "could not wake up workers",
        "why",
        "The wake-up could not be sent. Accepted cancels are safe: workers look for work every second.",
        "If it repeats, look at Redis.",
    )
    LANE_WOKEN = (
        _INFO,
        "waking up workers",
        "lane",
        "The sweeper found due cancels that no worker had claimed.",
        "Nothing.",
    )
    # -- Redis
    REDIS_UNAVAILABLE = (
        _ERROR,
        "Redis unavailable",
        "doing why order_id request_id lane task_id count code trace_id repeats",
        (
            "Redis does not answer, or cannot work at the moment. `doing` says what waits. The worker tries "
            "again by itself. Accepted cancels stay in Redis, and results are stored when it answers."
        ),
        "Bring Redis back before you stop workers.",
    )
    REDIS_REFUSED = (
        _ERROR,
        "Redis refused a command",
        "doing why order_id request_id lane task_id count code trace_id repeats",
        (
            "Redis refuses the step named in `doing`, and will refuse it again: a permission is missing, or "
            "a key has the wrong type. If Redis allows it, the result or message is kept with the unreadable "
            "messages."
        ),
        "Fix what `why` names.",
    )
    # -- the exchange
    EXCHANGE_UNAVAILABLE = (
        _WARNING,
        "exchange does not answer yet",
        "why",
        "The worker started while the exchange did not answer. It continues by itself when it does.",
        "Check the exchange, DNS and the proxy: `cancelctl doctor`.",
    )
    BREAKER_OPEN = (
        _ERROR,
        "circuit breaker open, cancels wait in Redis",
        "state",
        "The exchange is `unreachable` or `paused`. The worker asks every second and resumes by itself.",
        "See [circuit breaker states](../how-to/operating.md#circuit-breaker-states).",
    )
    BREAKER_CLOSED = (
        _WARNING,
        "circuit breaker closed, sending cancels again",
        "",
        "The exchange is back.",
        "Nothing.",
    )
    KEY_REFUSED = (
        _CRITICAL,
        "exchange refuses this key",
        "status code why key_id",
        (
            "The exchange answers 401 or 403 permanently. Workers with another key try. If no other key "
            "works, the cancels are `refused`. Logged once for each reason."
        ),
        "At once: check key, scope and environment with `cancelctl doctor`.",
    )
    WORKER_KEY_REFUSED = (
        _CRITICAL,
        "key refused, this worker claims no cancels",
        "why",
        (
            "401 for this worker's key. Workers with another key continue. It tests every three seconds "
            "whether its key works again."
        ),
        "At once: run `cancelctl doctor` on that host.",
    )
    KEY_ROTATED = (
        _INFO,
        "key rotated, calls are signed with the new key",
        "key_id",
        "The exchange accepted the new key.",
        "See [key rotation](../how-to/operating.md#key-rotation) before you revoke the old one.",
    )
    KEY_NOT_USED = (
        _ERROR,
        "new key not used, the old one stays",
        "why",
        "The key or its id was replaced, but does not load or is not accepted. The worker tries again.",
        "See [key rotation](../how-to/operating.md#key-rotation).",
    )
    KEY_FILE_EXPOSED = (
        _WARNING,
        "private key file is open to others",
        "why",
        "Other users than its owner can read or change the key file.",
        "Run `chmod 600` on it.",
    )
    GATEWAY_ANSWERED = (
        _ERROR,
        "a gateway answered instead of the exchange",
        "why repeats",
        "A CDN, proxy or firewall answered. That says nothing about an order, so cancels are tried again.",
        "If it repeats, find out what blocks these calls.",
    )
    V1_RETIRED = (
        _CRITICAL,
        "exchange retired the V1 orders API, using V2 now: set KALSHI_ORDERS_API=v2",
        "",
        "The cancel was sent again in V2.",
        "Set `KALSHI_ORDERS_API=v2`, so that a worker wastes no call after its start.",
    )
    CLOCK_OFF = (
        _WARNING,
        "this host's clock differs from the exchange's",
        "skew_ms",
        "By more than two seconds. The exchange accepts timestamps that are up to ten seconds off.",
        "Set the clock right (NTP).",
    )
    CLOCK_CORRECTED = (
        _WARNING,
        "signing with the exchange's clock",
        "skew_ms",
        "This host's clock is five seconds off or more, or the exchange refused its timestamp.",
        "Set the clock right (NTP).",
    )
    RATE_LIMITED = (
        _WARNING,
        "429 from the exchange, bucket corrected",
        "bucket",
        "Another client spends tokens, or the limits changed. The worker asks for the limits at once.",
        "If it repeats, find the other client.",
    )
    LIMITS_UNAVAILABLE = (
        _WARNING,
        "could not read the account's rate limits",
        "why",
        "The limits read last are used, or else the configured ones.",
        "If it repeats: `cancelctl doctor`.",
    )
    BATCH_REFUSED = (
        _WARNING,
        "batch refused, trying smaller ones",
        "count",
        "The exchange accepts fewer orders at a time, or it refuses the whole batch because of one order.",
        "If it repeats, lower `KALSHI_BATCH_MOST`.",
    )
    # -- mass cancels
    MASS_CANCEL_STARTED = (
        _WARNING,
        "mass cancel started",
        "request_id lane trace_id requested_by",
        "Somebody cancels everything in a scope.",
        "Make sure that you know why.",
    )
    MASS_CANCEL_DONE = (
        _WARNING,
        "mass cancel done, no orders left",
        "request_id lane trace_id",
        "A listing proves that no order in the scope rests.",
        "Nothing.",
    )
    MASS_CANCEL_INCOMPLETE = (
        _ERROR,
        "mass cancel ended, orders may be left",
        "request_id lane trace_id why",
        "It ended without the proof that no orders are left.",
        "`cancelctl mass show ID`, then ask for it again.",
    )
    MASS_PLAN_STARTED = (
        _INFO,
        "mass cancel dry run started",
        "request_id lane trace_id requested_by",
        "Only a plan is made. Nothing is canceled.",
        "Nothing.",
    )
    MASS_PLAN_DONE = (
        _INFO,
        "mass cancel dry run done",
        "request_id lane trace_id",
        "The plan is stored as the report.",
        "Nothing.",
    )
    MASS_CANCEL_HANDED_OVER = (
        _WARNING,
        "mass cancel left to another worker",
        "request_id",
        "This worker stops, or its key is refused.",
        "Nothing, if another worker runs.",
    )
    MASS_CANCEL_TAKEN_OVER = (
        _WARNING,
        "mass cancel taken over by another worker, or done",
        "request_id lane trace_id",
        "This worker was frozen, or without Redis, for longer than its lease. It can change nothing now.",
        _STALLS,
    )
    MASS_CANCEL_UNREADABLE = (
        _WARNING,
        "mass cancel unreadable",
        "request_id why",
        "Somebody else wrote to its keys, or Redis refuses a command. Other mass cancels continue.",
        _WRITER + " Ask for it again.",
    )
    MASS_CANCEL_SET_ASIDE = (
        _ERROR,
        "mass cancel unreadable, set aside",
        "request_id why",
        (
            "It stayed unreadable. Its producer is told; its text is kept with the messages that cannot be "
            "understood."
        ),
        _WRITER + " Ask for it again.",
    )
    MASS_CANCEL_RESTORED = (
        _ERROR,
        "Redis lost a mass cancel, stored again",
        "request_id",
        "Redis lost data (`FLUSHALL`, or a restart without its file). The worker stored its copy again.",
        "Find out why.",
    )
    MASS_ORDERS_RESTORED = (
        _ERROR,
        "Redis lost orders of a mass cancel, asked for again",
        "request_id count",
        "Redis lost data. If one of these orders was canceled before, the report shows it as `result_lost`.",
        "Find out why.",
    )
    MASS_KEY_REFUSED = (
        _ERROR,
        "mass cancel stopped sending: key refused",
        "request_id count code why",
        "The first cancels all got 401 or 403. The mass cancel does not send the others.",
        "Check the key: `cancelctl doctor`.",
    )
    MASS_COMMAND_FAILED = (
        _WARNING,
        "mass command failed, canceling order by order",
        "request_id code why",
        "The exchange did not carry out its own mass command.",
        "Nothing, unless listings fail too.",
    )
    LISTING_FAILED = (
        _WARNING,
        "could not list orders for a mass cancel",
        "request_id code why",
        "The worker could not read a page. It tries again until the deadline.",
        "Check the exchange.",
    )
    LISTING_UNREADABLE = (
        _ERROR,
        "listed orders unreadable",
        "request_id count",
        (
            "The listing has orders that this version cannot read. The others are canceled, but `flat` is "
            "false."
        ),
        "Check the account by hand, and report the problem to us.",
    )
    ORDERS_APPEARED = (
        _WARNING,
        "new orders in the scope of a mass cancel",
        "request_id count",
        "They were placed while the mass cancel ran. They are canceled too.",
        "If it repeats, stop the programs that place orders.",
    )
    # -- the audit log
    AUDIT_LOG_INCOMPLETE = (
        _ERROR,
        "audit log entries missing, cancels go on",
        "count why repeats",
        "Redis refuses to write the audit log. The gap is counted, and marked in the log later.",
        "Fix what `why` names.",
    )
    AUDIT_LOG_WRITE_FAILED = (
        _WARNING,
        "could not write an audit log entry",
        "why repeats",
        "Redis did not store the entry for a step of a mass cancel or for an operator's action.",
        "Fix what `why` names.",
    )
    AUDIT_LOG_TRIMMED = (
        _INFO,
        "audit log trimmed",
        "count not_exported",
        "Its oldest entries are gone.",
        "Nothing, if `not_exported` is 0.",
    )
    AUDIT_LOG_NOT_EXPORTED = (
        _WARNING,
        "audit log not exported, about to be trimmed",
        "from_id",
        "Its oldest entries will be trimmed soon, and they are not exported yet.",
        (
            "`cancelctl audit export --out FILE --resume` from cron; or raise `KALSHI_AUDIT_MAX_ENTRIES` or "
            "`KALSHI_AUDIT_MAX_AGE_S`."
        ),
    )
    # -- the process
    SERVICE_FAILED = (
        _ERROR,
        "background job failed",
        "service why repeats",
        (
            "It is tried again every second. Other jobs keep running. Until a round succeeds, the "
            "worker is [not ready](../how-to/monitoring.md#does-it-live-is-it-ready)."
        ),
        "Fix what `why` names; report a traceback.",
    )
    SERVICE_RESTARTED = (
        _CRITICAL,
        "background job restarted",
        "service why repeats",
        "Its thread died or hung. A new thread has replaced it.",
        "If it repeats, report it with the lines before.",
    )
    SERVICE_RECOVERED = (
        _WARNING,
        "background job works again",
        "service",
        "A round of it succeeded.",
        "Nothing.",
    )
    INTERNAL_ERROR = (
        _ERROR,
        "internal error",
        "doing request_id lane trace_id task_id count",
        (
            "A bug of ours, with its traceback. `doing` says where. Pending cancels stay in Redis and "
            "are tried again. A message that caused the error is kept with the unreadable messages."
        ),
        _TELL_US,
    )
    HEARTBEAT_FAILED = (
        _WARNING,
        "could not touch the heartbeat file",
        "why",
        "A health check of the file will call the worker dead. Logged once.",
        "Check the disk and the permissions.",
    )
    TRACING_NOT_INSTALLED = (
        _WARNING,
        "tracing is configured, but kalshi-cancel[tracing] is not installed",
        "",
        "`OTEL_*` variables are set, but the extra is missing.",
        "Install it, or unset them.",
    )


_HEAD = """\
# Log events

<!-- Made by `python -m kalshi_cancel.telemetry.log_events docs/reference/log-events.md`; do not edit. -->

Each log line of this service has a slug and a fixed text; facts are in fields. Search by slug:

```sh
grep event=redis_unavailable worker.log             # text
grep '"event":"redis_unavailable"' worker.log       # JSON
grep 3f2c1e0a-... worker.log                        # what happened to an order or a mass cancel
```

As text, a line is `event=SLUG`, the text, then the fields as `name=value`. In JSON, `message` is the text,
and `event` and the fields are beside it. Celery's own lines have no `event`. A line that repeats is written
at most every ten seconds; `repeats` says how many were left out.

Each cancel that is settled or given up has one line with its outcome: `cancel_settled`, `cancel_failed` or
`cancel_given_up`. Several producers may ask for the same order. Then the line has the first `request_id` that
came before a worker claimed the cancel; `cancelctl history ORDER_ID` shows all. An order that was final
before a mass cancel reached it has no further line: the report lists it.
"""


def page() -> str:
    """The page of the table, in Markdown."""
    head = "| event | level | text | it means | do |\n|---|---|---|---|---|"
    rows = [_row(each) for each in sorted(LogEvent, key=lambda each: each.slug)]
    hints = get_type_hints(LogFields, include_extras=True)
    fields = [f"| `{name}` | {get_args(hint)[1]} |" for name, hint in hints.items()]
    named = "| field | meaning |\n|---|---|"
    return "\n".join([_HEAD, "## Events\n", head, *rows, "\n## Fields\n", named, *fields, ""])


def _row(event: LogEvent) -> str:
    level = logging.getLevelName(event.level)
    return f"| `{event.slug}` | {level} | {event.text} | {event.meaning} | {event.action} |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
