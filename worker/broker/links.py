"""Finds what a message wants to follow it (chain, chord, callbacks), and who waits for that.

It would be published with a worker's permissions, to whatever key it names. So it is taken out at the door,
and the message is refused: what is to follow would otherwise be waited for in vain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

LINKS_HEADER = "links"  # of a message, set at the door: what was taken out, by name
FOLLOWERS_MOST = 1000
ID_MAX_CHARS = 1000
_NAMES = ("callbacks", "errbacks", "chain", "chord")
# Where a signature (Celery's word for a call that is yet to be made) has further ones.
_IN_KWARGS = ("tasks", "header", "body")
_IN_OPTIONS = ("link", "link_error", "chord", "chain")


@dataclass(frozen=True, slots=True)
class Follower:
    """A call that was to follow; somebody may wait for the result of ``task_id``."""

    task: str
    task_id: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def take_out(embed: Any) -> dict[str, Any]:
    """What is to follow a message, by name; none of it is in ``embed`` any more."""
    taken = {name: embed[name] for name in _NAMES if embed and embed.get(name)}
    for name in taken:
        embed[name] = None
    return taken


def why_refused(links: dict[str, Any]) -> str:
    """What to tell whoever waits."""
    return f"{', '.join(links)}: nothing can follow this task: publish that yourself, once there is a result"


def followers(links: Any) -> Iterator[Follower]:
    """The calls in what was taken out that have an id, in whatever way they hang together."""
    left, found = [links], 0
    while left and found < FOLLOWERS_MOST:
        each = left.pop()
        if isinstance(each, list):
            left += each
        elif isinstance(each, dict) and "task" not in each:
            left += each.values()
        elif isinstance(each, dict):
            args, kwargs, options = each.get("args"), each.get("kwargs"), each.get("options")
            kwargs = kwargs if isinstance(kwargs, dict) else {}
            options = options if isinstance(options, dict) else {}
            left += [kwargs.get(name) for name in _IN_KWARGS] + [options.get(name) for name in _IN_OPTIONS]
            task_id = options.get("task_id")
            if isinstance(task_id, str) and 0 < len(task_id) <= ID_MAX_CHARS and task_id.isprintable():
                found += 1
                yield Follower(
                    str(each["task"]), task_id, tuple(args) if isinstance(args, list) else (), kwargs
                )
