"""A foreground run is followed to its end, whenever an interrupt comes."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fal_agent.wire import Log, Result
from fal_notebook import run as runs

if TYPE_CHECKING:
    from types import CodeType, FrameType

CODE = {runs.follow.__code__, runs._draw_until_outcome.__code__}


class Scripted:
    """A run with two lines of output and a value; an interrupt ends it early, as its worker would."""

    def __init__(self) -> None:
        self.events = [SimpleNamespace(event=Log(run_id="r", stream="stdout", seq=n)) for n in (1, 2)]
        self.interrupted = self.received_outcome = self.began = False

    def receive(self) -> Any:
        self.began = True
        if self.events and not self.interrupted:
            return self.events[0]
        self.received_outcome = True
        return SimpleNamespace(event=Result(run_id="r", seq=3, struck=self.interrupted))

    def dealt_with(self, received: Any) -> None:
        self.events.remove(received)

    def acknowledge(self, received: Any) -> None:
        pass

    def interrupt(self) -> None:
        self.interrupted = True

    def kill(self) -> None:
        raise AssertionError("one interrupt is not two")

    def settle(self, received: Any) -> str:
        return "value"


class Strike:
    """Raise KeyboardInterrupt at the n-th instruction of `follow` after it began to wait."""

    def __init__(self, run: Scripted, at: int) -> None:
        self.run, self.left, self.where = run, at, None

    def __call__(self, frame: FrameType, what: str, _argument: Any) -> Any:
        code: CodeType = frame.f_code
        if code not in CODE:
            return None
        frame.f_trace_opcodes = True
        if what == "opcode" and self.run.began and self.where is None:
            if self.left == 0:
                self.where = (code.co_name, frame.f_lineno, frame.f_lasti)
                raise KeyboardInterrupt
            self.left -= 1
        return self


def follow_struck(at: int) -> tuple[Scripted, Strike, bool]:
    run, before = Scripted(), sys.gettrace()
    strike = Strike(run, at)
    sys._getframe().f_trace_opcodes = True  # Python 3.12 looks at it only when tracing begins
    sys.settrace(strike)
    try:
        runs.follow(run, lambda _received: None)  # type: ignore[arg-type]
        raised = False
    except KeyboardInterrupt:
        raised = True
    finally:
        sys.settrace(before)
    return run, strike, raised


def test_an_interrupt_reaches_the_call_wherever_it_strikes() -> None:
    at = 0
    while True:
        run, strike, raised = follow_struck(at)
        if strike.where is None:
            break
        assert run.interrupted or (raised and run.received_outcome), strike.where
        at += 1

    assert at > 30  # else nothing was traced


def test_a_run_that_is_left_alone_gives_its_value() -> None:
    run = Scripted()
    drawn: list[Any] = []

    assert runs.follow(run, drawn.append) == "value"  # type: ignore[arg-type]

    assert [received.event.seq for received in drawn] == [1, 2, 3]
    assert not run.interrupted
