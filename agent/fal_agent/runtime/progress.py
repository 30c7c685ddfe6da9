"""Bars for the user's own loops, `for batch in fal.progress(batches)`.

Runs wherever user code runs. A bar only tells how far its loop has come; who shows it is set from outside: a
worker sends it to the notebook (`tell_by`), the notebook draws it.
"""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Optional, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from typing_extensions import Self

    Tell = Callable[["Step"], None]

__all__ = ["Step", "progress", "tell_by"]

_EVERY = 0.1  # seconds between two words on a bar
_T = TypeVar("_T")


@dataclass(frozen=True)
class Step:
    """How far one bar has come.

    Attributes:
        bar: its number in this process.
        depth: how many other bars of this thread it stands in.
        name: what is shown before it.
        done: steps that were made.
        total: steps that there are; None if that is not known.
        is_over: the loop has ended, or was left.
    """

    bar: int
    depth: int
    name: str
    done: float
    total: Optional[float]
    is_over: bool


class progress(Generic[_T]):  # noqa: N801 - it is used like a function, as `range` is
    """Show how far a loop has come, where the notebook shows the call's output.

        for batch in fal.progress(batches, desc="training"):
            ...

        with fal.progress(total=size, desc="download") as bar:
            bar.update(len(piece))

    It may be used in functions and cells on a host, in the calls of `.map` (which add up) and in the
    notebook itself, also nested. It speaks at most ten times a second.

    Args:
        iterable: what to go through; None for a bar that is moved by `update`.
        total: how many steps there are; by default the iterable's length, if it has one.
        desc: what is shown before the bar.
    """

    def __init__(
        self, iterable: Optional[Iterable[_T]] = None, total: Optional[float] = None, desc: str = ""
    ) -> None:
        self._iterable, self.desc = iterable, desc
        self.total = _length(iterable) if total is None else total
        self.done: float = 0
        self._number, self._depth = next(_numbers), 0
        self._told_at = 0.0
        self._is_open = False

    def __iter__(self) -> Iterator[_T]:
        if self._iterable is None:
            raise TypeError(
                "this fal.progress has nothing to go through: give it an iterable, or use update()"
            )
        self._begin()
        try:
            for item in self._iterable:
                yield item
                self.done += 1
                if time.monotonic() - self._told_at >= _EVERY:
                    self._tell()
        finally:
            self.close()

    def __len__(self) -> int:
        if self.total is None:
            raise TypeError("how many steps this fal.progress has is not known")
        return int(self.total)

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def update(self, count: float = 1) -> None:
        """So many more steps were made."""
        self._begin()
        self.done += count
        if time.monotonic() - self._told_at >= _EVERY:
            self._tell()

    def close(self) -> None:
        """There will be no more steps."""
        if self._is_open:
            self._is_open = False
            _nested.depth = self._depth
            self._tell(is_over=True)

    def _begin(self) -> None:
        if not self._is_open:
            self._is_open = True
            self._depth = getattr(_nested, "depth", 0)
            _nested.depth = self._depth + 1
            self._tell()

    def _tell(self, *, is_over: bool = False) -> None:
        now = self._told_at = time.monotonic()
        step = Step(self._number, self._depth, self.desc, self.done, self.total, is_over)
        waiting: dict[int, Step] = _nested.__dict__.setdefault("waiting", {})
        if self._depth and now - _nested.__dict__.get("told_at", 0.0) < _EVERY:
            waiting[self._depth] = step  # there may be thousands of short loops in a long one
            return
        _nested.told_at = now
        waiting[self._depth] = step
        for depth in sorted(waiting, reverse=True):
            for tell in _tellers:
                tell(waiting[depth])
        waiting.clear()


def tell_by(tell: Tell, *, by_default: bool = False) -> None:
    """Say who shows the bars of this process.

    Args:
        tell: gets each word on a bar.
        by_default: only if nobody was named yet.
    """
    if not (by_default and _tellers):
        _tellers[:] = [tell]


def _length(iterable: Any) -> Optional[int]:
    try:
        return len(iterable)
    except TypeError:  # a generator, or nothing
        return None


_numbers = itertools.count(1)
_nested = threading.local()
_tellers: list[Tell] = []
