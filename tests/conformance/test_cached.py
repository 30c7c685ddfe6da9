"""`cached` keeps a value for as long as its worker lives, keyed by what the function does."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

import fal_notebook as fal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fal_notebook.hosts.base import Host

NAME = "first"


@pytest.fixture(autouse=True)
def nothing_cached(request: pytest.FixtureRequest) -> Iterator[None]:
    """The inline host shares its store with everything in this process."""
    yield
    fal.cached.clear()


def marking(folder: Path) -> Callable[[str], None]:
    """A function that writes down that something was made."""

    def mark(what: str) -> None:
        with (folder / "made").open("a") as file:
            file.write(f"{what}\n")

    return mark


def made(folder: Path) -> list[str]:
    path = folder / "made"
    return path.read_text().split() if path.exists() else []


def test_a_value_is_made_once_and_serves_the_next_calls(host: Host, public_folder: Path) -> None:
    mark = marking(public_folder)

    @fal.cached
    def model(name: str) -> Any:
        mark(name)
        return {"name": name, "pid": os.getpid()}

    @fal.function(host=host)
    def use(name: str) -> Any:
        return model(name), model(name)

    first, second = use("a")
    use("a")
    use("b")

    assert first == second
    assert made(public_folder) == ["a", "b"]


def test_two_functions_share_what_is_cached(host: Host, public_folder: Path) -> None:
    mark = marking(public_folder)

    @fal.cached
    def model() -> int:
        mark("made")
        return 1

    @fal.function(host=host)
    def one() -> int:
        return model()

    @fal.function(host=host)
    def other() -> int:
        return model() + 1

    assert (one(), other(), one()) == (1, 2, 1)
    assert made(public_folder) == ["made"]


def test_the_same_definition_made_again_finds_the_old_values(host: Host, public_folder: Path) -> None:
    """That is what running a cell again does."""

    def cell() -> Any:
        mark = marking(public_folder)

        @fal.cached
        def model() -> int:
            mark("made")
            return 1

        @fal.function(host=host)
        def use() -> int:
            return model()

        return use

    cell()()
    cell()()

    assert made(public_folder) == ["made"]


def test_equal_text_with_other_captured_values_is_another_function(host: Host) -> None:
    def make(name: str) -> Any:
        @fal.cached
        def model() -> str:
            return name

        @fal.function(host=host)
        def use() -> str:
            return model()

        return use

    one, two = make("one"), make("two")

    assert (one(), two(), one()) == ("one", "two", "one")


def test_a_changed_global_makes_a_new_value(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    @fal.cached
    def model() -> str:
        return NAME

    @fal.function(host=host)
    def use() -> str:
        return model()

    first = use()
    monkeypatch.setitem(globals(), "NAME", "second")

    assert (first, use()) == ("first", "second")


def test_clear_forgets(host: Host, public_folder: Path) -> None:
    mark = marking(public_folder)

    @fal.cached
    def model(name: str) -> str:
        mark(name)
        return name

    @fal.function(host=host)
    def use(name: str) -> str:
        return model(name)

    @fal.function(host=host)
    def forget() -> int:
        return model.clear()

    use("a")
    use("b")
    assert forget() == 2
    use("a")

    assert made(public_folder) == ["a", "b", "a"]


def test_an_exception_is_not_kept(host: Host, public_folder: Path) -> None:
    ready = public_folder / "ready"

    @fal.cached
    def model() -> int:
        if not ready.exists():
            raise LookupError("not yet")
        return 1

    @fal.function(host=host)
    def use() -> int:
        return model()

    with pytest.raises(LookupError, match="not yet"):
        use()
    ready.touch()
    assert use() == 1


def test_two_first_calls_at_once_make_one_value(agent_host: Host, public_folder: Path) -> None:
    mark = marking(public_folder)

    @fal.cached
    def model() -> int:
        import time

        mark("made")
        time.sleep(0.1)
        return 1

    @fal.function(host=agent_host, max_multiplexing=3, max_concurrency=1)
    def use() -> int:
        return model()

    runs = [use.submit() for _ in range(3)]

    assert [run.result(timeout=20) for run in runs] == [1, 1, 1]
    assert made(public_folder) == ["made"]


def test_methods_can_be_cached(host: Host, public_folder: Path) -> None:
    mark = marking(public_folder)

    class Loader:
        def __init__(self, name: str) -> None:
            self.name = name

        @fal.cached
        def model(self, size: int) -> Any:
            mark(self.name)
            return self.name, size

    @fal.function(host=host)
    def use() -> Any:
        loader = Loader("a")
        return loader.model(1), loader.model(1), Loader("b").model(1)

    assert use() == (("a", 1), ("a", 1), ("b", 1))
    assert made(public_folder) == ["a", "b"]


def test_changing_what_came_home_leaves_the_cached_value_alone(host: Host) -> None:
    @fal.cached
    def table() -> list[int]:
        return [1]

    @fal.function(host=host)
    def look() -> list[int]:
        return table()

    look().append(2)

    assert look() == [1]
