"""Asking a person, in a terminal and in a kernel."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
from jupyter_client.manager import start_new_kernel

from fal_notebook.app_ports import _Runners
from fal_notebook.exceptions import HostUnreachableError
from fal_notebook.prompting import ConsolePrompt, SilentPrompt, default_prompt

QUESTIONS = """
from fal_notebook.prompting import default_prompt
person = default_prompt()
print([person.confirm("Sure?"), person.ask("Name: ", secret=False), person.ask("Word: ", secret=True)])
"""


def in_terminal(*answers: str) -> str:
    """Run the questions in a terminal and give everything it showed."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", QUESTIONS])
    shown = b""
    waiting = list(answers)
    try:
        while data := os.read(terminal, 1024):
            shown += data
            if waiting and shown.rstrip().endswith((b")", b":")):
                os.write(terminal, waiting.pop(0).encode() + b"\n")
    except OSError:
        pass  # how the end of a terminal shows
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0, shown
    return shown.decode()


def test_in_a_terminal_answers_are_read_and_secrets_are_not_echoed() -> None:
    """Only a full yes counts, as for ssh."""
    shown = in_terminal("y", "yes", "Ada", "hush")

    assert "[True, 'Ada', 'hush']" in shown
    assert "Please type yes or no" in shown
    assert shown.count("hush") == 1, "the secret was echoed"


def test_a_no_is_a_no() -> None:
    assert "[False, 'Ada', 'hush']" in in_terminal("no", "Ada", "hush")


def test_where_nobody_can_answer_every_answer_is_no() -> None:
    words = [sys.executable, "-c", QUESTIONS]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)

    assert done.stdout == "[False, None, None]\n"


def test_the_end_of_input_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as nothing:  # noqa: PTH123 - a device
        monkeypatch.setattr(sys, "stdin", nothing)

        assert isinstance(default_prompt(), SilentPrompt)
        assert ConsolePrompt().ask("", secret=False) is None


@pytest.fixture(scope="module")
def kernel() -> object:
    manager, client = start_new_kernel()
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def in_kernel(client: object, *, answers: list[str], allowed: bool) -> str:
    asked: list[tuple[str, bool]] = []
    shown: list[str] = []

    def answer(message: dict[str, dict[str, object]]) -> None:
        content = message["content"]
        asked.append((str(content["prompt"]), bool(content["password"])))
        client.input(answers.pop(0))  # type: ignore[attr-defined]

    def show(message: dict[str, dict[str, object]]) -> None:
        shown.append(str(message["content"].get("text", "")))

    client.execute_interactive(  # type: ignore[attr-defined]
        QUESTIONS, allow_stdin=allowed, stdin_hook=answer if allowed else None, output_hook=show, timeout=60
    )
    return f"{asked}\n{''.join(shown)}"


def test_in_a_kernel_the_front_end_asks(kernel: object) -> None:
    seen = in_kernel(kernel, answers=["yes", "Ada", "hush"], allowed=True)

    assert "[True, 'Ada', 'hush']" in seen
    assert "[('Sure? (yes/no) ', False), ('Name: ', False), ('Word: ', True)]" in seen


def test_in_a_notebook_that_runs_without_its_owner_every_answer_is_no(kernel: object) -> None:
    assert "[False, None, None]" in in_kernel(kernel, answers=[], allowed=False)


def test_a_request_to_an_app_whose_host_is_away_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come from a browser, at any time; a cell that happens to run must not get a field for it."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    prompts: list[object] = []

    class Host:
        name = "away"

        def connect(self) -> None:
            prompts.append(default_prompt())
            raise HostUnreachableError("it is away")

    runners = _Runners(cast("Any", Host()), "app", 1.0)
    with pytest.raises(HostUnreachableError):
        runners.dial()

    assert [type(prompt) for prompt in prompts] == [SilentPrompt]
    assert isinstance(default_prompt(), ConsolePrompt)
