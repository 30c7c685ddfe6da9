"""What only the host that is this process can do, and what it must not do to this process."""

from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.waiting import until

import fal_notebook as fal
from fal_notebook import exceptions
from fal_notebook.hosts.inline import InlineHost

if TYPE_CHECKING:
    from collections.abc import Iterator

HOST = InlineHost()


def test_a_call_has_ended_when_submit_returns() -> None:
    @fal.function(host=HOST)
    def thread() -> int:
        return threading.get_ident()

    run = thread.submit()

    assert run.done()
    assert run.result() == threading.get_ident()


def test_a_debugger_finds_the_frames_and_their_variables() -> None:
    @fal.function(host=HOST)
    def fail(value: int) -> None:
        secret = value * 2
        raise ValueError(secret)

    with pytest.raises(ValueError, match="42") as caught:
        fail(21)

    assert caught.traceback[-1].frame.f_locals["secret"] == 42


def test_run_gives_the_very_error_without_our_frames() -> None:
    raised: list[Exception] = []
    raised_here = raised.append

    @fal.function(host=HOST)
    def fail() -> None:
        error = ValueError("x")
        sys.modules["fal_tests_raised"] = error  # type: ignore[assignment] # how it gets out of here as it is
        raise error

    error = fail.submit().exception()
    raised_here(error)  # type: ignore[arg-type]
    same = sys.modules.pop("fal_tests_raised")

    assert error is same
    assert raised[0].__traceback__ is not None
    assert raised[0].__traceback__.tb_frame.f_code.co_name == "fail"


def test_modules_that_travel_do_not_replace_those_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fal_tests_inline_module.py").write_text("STATE = []\ndef size():\n    return len(STATE)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module: Any = importlib.import_module("fal_tests_inline_module")

    @fal.function(host=HOST, local_python_modules=["fal_tests_inline_module"])
    def use() -> int:
        module.STATE.append(1)
        return int(module.size())

    assert use() == 1
    assert sys.modules["fal_tests_inline_module"] is module
    assert module.STATE == []


def test_app_files_leave_the_working_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("hello")
    before, path = Path.cwd(), list(sys.path)

    @fal.function(host=HOST, app_files=["words.txt"], app_files_context_dir=str(tmp_path))
    def fail() -> None:
        raise ValueError(Path("words.txt").read_text())

    with pytest.raises(ValueError, match="hello"):
        fail()

    assert Path.cwd() == before
    assert sys.path == path


def test_a_generator_that_nobody_reads_ends_its_thread_when_dropped() -> None:
    @fal.function(host=HOST)
    def numbers() -> Iterator[int]:
        yield from range(10**9)

    items = numbers()
    name = f"fal-{numbers.__qualname__}"
    assert next(items) == 0
    assert any(thread.name == name for thread in threading.enumerate())
    del items

    until(lambda: not any(thread.name == name for thread in threading.enumerate()))


def test_it_answers_what_is_asked_of_hosts() -> None:
    assert HOST.ask("status")["workers"] == []
    assert HOST.ask("stop", everything=True) == {"workers": 0}
    assert HOST.ask("environments") == HOST.ask("runs") == []
    with pytest.raises(exceptions.FalServerlessError, match="has no agent"):
        HOST.ask("shutdown")


def test_a_stop_button_stops_the_call() -> None:
    import signal

    @fal.function(host=HOST)
    def stop() -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        stop()
