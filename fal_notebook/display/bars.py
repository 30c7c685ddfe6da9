"""The bars of `fal.progress`: how far loops have come, as text and as HTML, in place.

Runs in the notebook.
"""

from __future__ import annotations

import html
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fal_agent.wire import Progress
from fal_notebook.display.phases import duration
from fal_notebook.display.publishing import MUTED, UpdatedDisplay, running
from fal_notebook.display.watching import unwatch, watch

if TYPE_CHECKING:
    from fal_agent.runtime.progress import Step

__all__ = ["BarDisplay", "Bars", "TextBars", "draw_here"]

_WIDTH = 10  # characters of a bar
_REDRAW_SECONDS = 0.2  # between two updates of a display
_FULL, _EMPTY = "█", "░"


@dataclass
class _Row:
    """One line: the bars of one name, at one depth.

    Attributes:
        ended: steps done and in all of bars that are over and still count.
        bars: those that are shown, by run and number: steps done, and in all (None: not known).
    """

    name: str
    depth: int
    began_at: float
    heard_at: float = 0.0
    ended: tuple[float, float] = (0.0, 0.0)
    bars: dict[tuple[str, int], tuple[float, float | None]] = field(default_factory=dict)
    over: bool = False

    @property
    def done(self) -> float:
        return self.ended[0] + sum(done for done, _ in self.bars.values())

    @property
    def total(self) -> float | None:
        totals = [total for _, total in self.bars.values()]
        return None if None in totals else self.ended[1] + sum(total or 0 for total in totals)

    @property
    def share(self) -> float | None:
        """How much is done, 0 to 1; None if that cannot be known."""
        total = self.total
        if total is None:
            return None
        return min(1.0, self.done / total) if total else 1.0

    def numbers(self) -> str:
        """Everything but the bar."""
        seconds = max(0.0, self.heard_at - self.began_at)
        total, done = self.total, self.done
        said = [_count(done) if total is None else f"{_count(done)}/{_count(total)}"]
        said += [duration(seconds)] if seconds >= 0.05 else []  # noqa: PLR2004 - it would be shown as 0.0 s
        if done and seconds and not self.over:
            rate = done / seconds
            if total is not None and total > done:
                said.append(f"{duration((total - done) / rate)} left")
            said.append(f"{rate:.3g}/s")
        return " · ".join(said)


class Bars:
    """The bars that one call shows, or many of `.map`, whose bars add up.

    Args:
        adds_up: bars of one name add up; else a new one takes the place of the one before.
    """

    def __init__(self, *, adds_up: bool = False) -> None:
        self._adds_up = adds_up
        self._rows: dict[tuple[int, str], _Row] = {}

    def begins_anew(self, event: Progress) -> bool:
        """Whether this is the first word of a loop after those that are shown."""
        row = self._rows.get((0, event.name))
        outer = [row for row in self._rows.values() if row.depth == 0]
        is_new = row is None or (event.run_id, event.bar) not in row.bars
        return not self._adds_up and event.depth == 0 and is_new and all(row.over for row in outer)

    def take(self, event: Progress) -> None:
        """Take a word on a bar."""
        key = (event.depth, event.name)
        row = self._rows.get(key)
        bar = (event.run_id, event.bar)
        if row is None or (not self._adds_up and bar not in row.bars):
            row = self._rows[key] = _Row(event.name, event.depth, event.sent_at)
        row.bars[bar] = (event.done, event.total)
        row.heard_at, row.over = max(row.heard_at, event.sent_at), event.over
        if event.over and self._adds_up:
            done, total = row.bars.pop(bar)
            row.ended = (row.ended[0] + done, row.ended[1] + (done if total is None else total))

    def end(self) -> None:
        """Loops that go on have been left."""
        for row in self._rows.values():
            row.over = True

    def __bool__(self) -> bool:
        return bool(self._rows)

    @property
    def are_over(self) -> bool:
        """Whether no loop goes on."""
        return all(row.over for row in self._rows.values())

    def lines(self) -> list[str]:
        """The bars as text."""
        said = []
        for row in self._shown():
            head = f"{'  ' * row.depth}{row.name}: " if row.name else "  " * row.depth
            if row.share is None:
                said.append(f"{head}{row.numbers()}")
            else:
                full = int(row.share * _WIDTH)
                bar = _FULL * full + _EMPTY * (_WIDTH - full)
                said.append(f"{head}{row.share:4.0%} {bar} {row.numbers()}")
        return said

    def html(self) -> str:
        """The bars as HTML."""
        rows = []
        for row in self._shown():
            share = row.share
            bar = "" if share is None else _BAR.format(colour=_colour(row), share=f"{share:.1%}")
            percent = "" if share is None else f"{share:.0%}"
            name = f'<span style="min-width:6em">{html.escape(row.name)}</span>' if row.name else ""
            rows.append(
                f'<div style="display:flex; align-items:center; gap:8px; padding-left:{row.depth * 1.5}em">'
                f'{name}{bar}<span style="min-width:3em">{percent}</span>'
                f'<span style="{MUTED}">{html.escape(row.numbers())}</span></div>'
            )
        return f'<div class="fal-progress">{"".join(rows)}</div>'

    def _shown(self) -> list[_Row]:
        return sorted(self._rows.values(), key=lambda row: row.depth)


def _count(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.4g}"


_BAR = (
    '<span style="display:inline-block; width:240px; height:10px; border-radius:3px; overflow:hidden; '
    'background:rgba(128,128,128,.25)"><span style="display:block; height:100%; width:{share}; {colour}">'
    "</span></span>"
)


def _colour(row: _Row) -> str:
    if row.over and row.share is not None and row.share < 1:  # it was left before its end
        return "background:#d9534f; background:var(--jp-error-color1, #d9534f)"
    if row.over:
        return "background:#2e9447; background:var(--jp-success-color1, #2e9447)"
    return "background:#1976d2; background:var(--jp-brand-color1, #1976d2)"


class BarDisplay:
    """Bars below a cell of a notebook."""

    def __init__(self, *, adds_up: bool = False) -> None:
        self._adds_up = adds_up
        self._bars = Bars(adds_up=adds_up)
        self._display: UpdatedDisplay | None = None
        self._lock = threading.Lock()
        self._is_drawn, self._drawn_at = True, 0.0

    def take(self, event: Progress) -> None:
        """Take a word on a bar, and draw soon."""
        if self._bars and self._bars.begins_anew(event):
            self.close()
        with self._lock:
            self._bars.take(event)
            self._is_drawn = False
            if self._display is None:
                self._display = UpdatedDisplay()
                self._display.show(self._bundle(), parent=running.parent)
                watch(self)
            elif event.over or time.monotonic() - self._drawn_at >= _REDRAW_SECONDS:
                self._draw()

    def tick(self) -> None:
        """Draw what has not been drawn yet; called by the watching thread."""
        with self._lock:
            if not self._is_drawn:
                self._draw()

    def close(self) -> None:
        """What is shown now stays; other bars come below."""
        unwatch(self)
        with self._lock:
            if self._display is not None:
                self._bars.end()
                self._draw()
                self._display.close()
            self._display, self._bars = None, Bars(adds_up=self._adds_up)

    def _draw(self) -> None:
        self._is_drawn, self._drawn_at = True, time.monotonic()
        if self._display is not None:
            self._display.update(self._bundle())

    def _bundle(self) -> dict[str, Any]:
        return {"text/plain": "\n".join(self._bars.lines()), "text/html": self._bars.html()}


class TextBars:
    """Bars on stderr: one line that is written over and over in a terminal; elsewhere what they came to."""

    def __init__(self, *, adds_up: bool = False) -> None:
        self._adds_up = adds_up
        self._bars = Bars(adds_up=adds_up)
        self._length = 0

    def take(self, event: Progress) -> None:
        """Take a word on a bar, and write."""
        if self._bars and self._bars.begins_anew(event):
            self.close()
        self._bars.take(event)
        if sys.stderr.isatty():
            self._write("\r", "")
        if event.over and event.depth == 0 and not self._adds_up:
            self.close()

    def close(self) -> None:
        """What is shown now stays."""
        if self._bars:
            self._write("\r" if sys.stderr.isatty() else "", "\n")
        self._bars, self._length = Bars(adds_up=self._adds_up), 0

    def _write(self, before: str, after: str) -> None:
        text = " | ".join(line.strip() for line in self._bars.lines())
        sys.stderr.write(f"{before}{text.ljust(self._length) if before else text}{after}")
        sys.stderr.flush()
        self._length = len(text)


_here: list[tuple[Any, BarDisplay | TextBars]] = []  # of this process's own loops: the cell, and its bars
_turn = threading.Lock()


def draw_here(step: Step) -> None:
    """Show a bar of a loop in this process."""
    from fal_notebook.display import in_kernel

    event = Progress(
        "", step.name, step.done, step.total, bar=step.bar, depth=step.depth, over=step.is_over,
        sent_at=time.time(),
    )  # fmt: skip
    with _turn:
        if in_kernel():
            running.watch()
        if not _here or _here[0][0] is not running.parent:
            _here[:] = [(running.parent, BarDisplay() if in_kernel() else TextBars())]
        _here[0][1].take(event)
        if step.is_over and step.depth == 0:
            _here.pop()[1].close()
