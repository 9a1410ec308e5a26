"""Has a function called aside, in a thread of its own, while the caller goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

_T = TypeVar("_T")


class Aside(Generic[_T]):
    """Calls a function in a thread of its own with what has come since its last call, in order.

    What it raises is raised at the end.
    """

    def __init__(self, function: Callable[[list[_T]], None]) -> None:
        self._function = function
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="aside")
        self._come: deque[_T] = deque()
        self._calls: list[Future[None]] = []

    def __call__(self, value: _T) -> None:
        """Has the function called with this, after what came before."""
        self._come.append(value)
        self._calls.append(self._thread.submit(self._work))

    def _work(self) -> None:
        some: list[_T] = []
        while self._come:
            some.append(self._come.popleft())
        if some:
            self._function(some)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=True)
        if kind is None:
            for call in self._calls:
                call.result()
