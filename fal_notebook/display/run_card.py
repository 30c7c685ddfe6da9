"""The card of a run in the notebook: a line for each slow phase, a live strip, and one line in the end.

Runs in the notebook's kernel. What is slow appears, what is quick does not; what is saved is HTML and text.
The strip, with its buttons, is for runs that take long, and only where somebody looks: a front end that
can ask its user something.
"""

from __future__ import annotations

import html
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from fal_agent.errors import FalServerlessException
from fal_notebook.display.phases import Phases, duration, size
from fal_notebook.display.publishing import MUTED, STYLE, UpdatedDisplay, running
from fal_notebook.display.watching import unwatch, watch

if TYPE_CHECKING:
    from fal_agent.framing import Buffer
    from fal_agent.wire import Stage

__all__ = ["RunCard", "Stoppable"]

_REDRAW_SECONDS = 0.2  # between two updates of the display
_EVERY, _MOST = 1.0, 5.0  # seconds between two looks at the worker, growing with what the run has taken
_PATIENCE = 5.0  # seconds for the host's answer


class Stoppable(Protocol):
    """A run, as the card needs it."""

    host: Any
    label: str
    run_id: str

    def done(self) -> bool:
        """Whether it has ended."""

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in it."""

    def kill(self) -> None:
        """End its worker."""


class RunCard:
    """The card of one call that the notebook waits for.

    Args:
        host_name: where it runs, or will run.

    Attributes:
        reason: how the call's requirements have changed, should an environment be built.
    """

    def __init__(self, host_name: str = "") -> None:
        self.reason = ""
        self.parent = running.parent
        self.phases = Phases()
        self._host_name = host_name
        self._run: Stoppable | None = None
        self._lock = threading.RLock()
        self._display: UpdatedDisplay | None = None
        self._buttons: Any = None
        self._usage = _Usage()
        self._began = self._looked_at = self._drawn_at = time.monotonic()
        self._has_strip = self._is_over = False
        self._drawn_at = 0.0

    # ------------------------------------------------------------ what happens

    def enter(self, stage: Stage) -> None:
        """The call entered a phase."""
        with self._lock:
            self.phases.enter(stage)
            self._show()
            self._watch()

    def begin(self, phase: str, text: str = "") -> None:
        """A phase on this side began."""
        with self._lock:
            self.phases.begin(phase, text, time.time())
            self._watch()

    def sent(self, done: float, total: float) -> None:
        """So many bytes of the call's data have been sent."""
        with self._lock:
            self.phases.sent(done, total, time.time())
            self._show()
            self._watch()

    def add_lines(self, data: Buffer) -> None:
        """Take what uv said."""
        with self._lock:
            self.phases.add_lines(data)
            self._show()

    def end_phases(self, at: float) -> None:
        """The user's code runs."""
        with self._lock:
            if self.phases.ended_at is None:
                self.phases.end(at)
                if not self._has_strip:
                    unwatch(self)
                if self.phases.is_worth_telling(at):
                    self._publish()

    def look(self, run: Stoppable, began: float) -> None:
        """The call takes long: show from now on what its worker does; called by the watching thread.

        Args:
            run: the call's.
            began: when it did, by `time.monotonic`.
        """
        with self._lock:
            if self._is_over:
                return
            if not self._has_strip:
                self._run, self._has_strip, self._host_name = run, True, run.host.name
                self._began = began
                if self.phases.began_at is None:
                    self.phases.end(time.time())
                self._publish()
                self._show_buttons(run)
                self._watch()

    def finish(self) -> None:
        """The call is over: fold."""
        unwatch(self)
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            self.phases.end(time.time())
            if self._display is not None or self.phases.is_worth_telling(time.time()):
                self._publish()
            if self._display is not None:
                self._display.close()
            if self._buttons is not None:
                self._buttons.close()

    def tick(self) -> None:
        """Look at it; called by the watching thread."""
        if self._has_strip:
            self._sample()
        with self._lock:
            if not self._is_over:
                self._show()

    def _watch(self) -> None:
        unwatch(self)
        if not self._is_over:
            watch(self)

    # ------------------------------------------------------------ the worker

    def _sample(self) -> None:
        """Ask the host what the worker uses, seldom enough to cost little."""
        now = time.monotonic()
        run = self._run
        if run is None or now - self._looked_at < min(_MOST, max(_EVERY, (now - self._began) / 60)):
            return
        self._looked_at = now
        if not self._is_reached():  # whoever brings the call back connects, and asks what has to be asked
            self._usage.forget()
            return
        try:
            self._usage.take(run.host.ask("usage", timeout=_PATIENCE, run_id=run.run_id))
        except (FalServerlessException, OSError):  # the connection is told of where it breaks
            self._usage.forget()

    def _is_reached(self) -> bool:
        """Whether there is a connection to where the call runs."""
        return self._run is None or getattr(self._run.host, "is_connected", True)

    def _show_buttons(self, run: Stoppable) -> None:
        from fal_notebook.display.run_buttons import RunButtons, has_widgets

        if has_widgets():
            self._buttons = RunButtons(run.interrupt, run.kill, parent=self.parent)

    # ------------------------------------------------------------ what is shown

    def _show(self) -> None:
        """Draw what has changed, if it takes long, not more often than the eye can follow."""
        now = time.monotonic()
        is_told = self._has_strip or (
            self.phases.ended_at is None and self.phases.is_worth_telling(time.time())
        )
        if is_told and now - self._drawn_at >= _REDRAW_SECONDS:
            self._publish()

    def _publish(self) -> None:
        self._drawn_at = time.monotonic()
        lines = self._lines()
        text = "\n".join([lines[0], *(f"  {line}" for line in lines[1:])])
        rows = "".join(_row(line) for line in lines[1:])
        shown = f'{STYLE}<div class="fal-run" style="{MUTED}">fal · {html.escape(lines[0])}{rows}</div>'
        data = {"text/plain": text, "text/html": shown}
        if self._display is None:
            self._display = UpdatedDisplay()
            self._display.show(data, parent=self.parent)
        else:
            self._display.update(data)

    def _lines(self) -> list[str]:
        """What is shown now, line by line."""
        now = time.time()
        if self._is_over or self.phases.ended_at is not None:
            said = [self.phases.headline(now)] if self.phases.is_worth_telling(now) else []
            if self._has_strip:
                state = "running" if self._is_reached() else f"waiting for {self._host_name}"
                took = duration(time.monotonic() - self._began)
                said.append(f"{'ran' if self._is_over else state} {took}{self._usage.text(self._is_over)}")
            return [", ".join(said)]
        told = [phase for phase in self.phases.passed if phase.seconds(now) >= 0.1 or phase.ended_at is None]  # noqa: PLR2004 - seconds
        marks = ("✓" if phase.ended_at is not None else "▸" for phase in told)
        if len(told) == 1:
            lines = [told[0].line(now)]
        else:
            lines = [f"{mark} {phase.line(now)}" for mark, phase in zip(marks, told, strict=True)]
            lines.insert(0, f"on {self._host_name}" if self._host_name else "on its way")
        building = told and told[-1].name in ("build", "resolve")
        if building and self.reason:
            lines.append(f"because its requirements have changed: {self.reason}")
        return [*lines, *(self.phases.lines if building else ())]


def _row(line: str) -> str:
    """HTML of a line below the first; what uv says stands a little to the right."""
    indent = "" if line.startswith(("✓", "▸")) else ' style="padding-left:1.5em"'
    return f"<div{indent}>{html.escape(line)}</div>"


class _Usage:
    """What a worker uses, from what the host tells of it at two moments."""

    def __init__(self) -> None:
        self._last: dict[str, Any] = {}
        self._cpu: float | None = None  # of one core
        self._most = 0  # bytes of memory

    def take(self, told: dict[str, Any]) -> None:
        """Take what `fal_agent.server.questions` says; nothing while the call waits for a worker."""
        last, self._last = self._last, told
        if told and last and told["pid"] == last["pid"] and told["at"] > last["at"]:
            self._cpu = max(0.0, told["cpu_seconds"] - last["cpu_seconds"]) / (told["at"] - last["at"])
        self._most = max(self._most, told.get("memory", 0))

    def forget(self) -> None:
        """Nothing is known at present."""
        self._last, self._cpu = {}, None

    def text(self, is_over: bool) -> str:
        """What is known, to stand behind the time."""
        if is_over:
            return f" (at most {size(self._most)} of memory)" if self._most else ""
        said = [f"CPU {self._cpu:.0%}"] if self._cpu is not None else []
        if self._last:
            said.append(size(self._last["memory"]))
            said += [
                f"GPU {gpu['index']} {size(gpu['used'])} of {size(gpu['total'])}"
                for gpu in self._last["gpus"]
            ]
        return "".join(f" · {part}" for part in said)
