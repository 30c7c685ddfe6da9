"""Code on a host asks the person at the notebook; the answer goes the same way back."""

from __future__ import annotations

import getpass
from typing import TYPE_CHECKING, Any

import pytest

import fal_notebook as fal
from fal_notebook.environment import worker_needs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fal_notebook.hosts.base import Host


def test_a_function_gets_the_answers_in_turn(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    answers: Iterator[str] = iter(["6", "7 é\n", "hidden"])

    def answer(prompt: str = "") -> str:
        asked.append(prompt)
        return next(answers)

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("getpass.getpass", answer)

    @fal.function(host=host)
    def ask() -> Any:
        return input("a "), input(), getpass.getpass("secret ")

    assert ask() == ("6", "7 é\n", "hidden")
    assert asked == ["a ", "", "secret "]


def test_what_asking_raises_is_raised_where_it_was_asked(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(prompt: str = "") -> str:
        raise EOFError("nobody")

    monkeypatch.setattr("builtins.input", refuse)

    @fal.function(host=host)
    def ask() -> str:
        try:
            return input()
        except EOFError as error:
            return f"caught {error}"

    assert ask() == "caught nobody"


def test_each_of_many_calls_gets_its_own_answer(agent_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt="": f"to {prompt}")

    @fal.function(host=agent_host)
    def ask(number: int) -> str:
        return input(f"{number}")

    assert list(ask.map(range(6), chunk_size=1)) == [f"to {number}" for number in range(6)]


def test_a_generator_asks_between_its_items(agent_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt="": f"to {prompt}")

    @fal.function(host=agent_host)
    def ask() -> Iterator[str]:
        yield input("a")
        yield input("b")

    assert list(ask()) == ["to a", "to b"]


def test_a_run_in_the_background_has_nobody_to_ask(agent_host: Host) -> None:
    @fal.function(host=agent_host)
    def ask() -> str:
        return input()

    # Workers have IPython where this process has, as another test may have seen to, and then its error.
    error = NotImplementedError if worker_needs() else EOFError
    with pytest.raises(error, match="has nobody to ask"):
        ask.submit().result(60)
