"""A call means what it means at home: arguments, classes, what the function captures, and when."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
import threading
from typing import TYPE_CHECKING, Any

import fal_notebook as fal

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from fal_notebook.hosts.base import Host

FACTOR = 2
SEEN: list[int] = []
COUNT = 0
UNRELATED_LOCK = threading.local()  # cannot be pickled, and no function here uses it
UNRELATED_FILE = sys.stdout


@dataclasses.dataclass
class Point:
    """A class of the test module, which no host has."""

    x: int
    y: int = 0

    def moved(self, by: int) -> Point:
        return Point(self.x + by, self.y)


def helper(value: int) -> int:
    return value * FACTOR


def test_positional_default_and_named_arguments_arrive(host: Host) -> None:
    @fal.function(host=host)
    def join(a: int, b: int = 2, *rest: int, c: int = 3, **named: int) -> Any:
        return a, b, rest, c, named

    assert join(1) == (1, 2, (), 3, {})
    assert join(1, 5, 6, 7, c=8, d=9) == (1, 5, (6, 7), 8, {"d": 9})


def test_a_call_without_a_value_gives_none(host: Host) -> None:
    @fal.function(host=host)
    def nothing() -> None:
        return

    assert nothing() is None


def test_a_bare_decorator_works_on_the_current_host(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    from fal_notebook.hosts import registry

    monkeypatch.setattr(registry, "_current", host)

    @fal.function
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    assert add(2, 3) == 5
    assert (add.__name__, add.__doc__) == ("add", "Add two numbers.")


def test_a_returned_instance_is_of_the_callers_own_class(host: Host) -> None:
    @fal.function(host=host)
    def move(point: Point) -> Any:
        return point.moved(1), Point(7), {"inside": [Point(8)]}

    moved, made, nested = move(Point(1, 2))

    assert type(moved) is Point
    assert type(made) is Point
    assert type(nested["inside"][0]) is Point
    assert (moved, made) == (Point(2, 2), Point(7))


def test_a_class_of_main_comes_back_as_itself(host: Host, tmp_path: Path) -> None:
    """What a notebook defines belongs to `__main__`; the host has a `__main__` of its own."""
    script = tmp_path / "notebook.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            import fal_notebook as fal

            class Model:
                made = 0
                def __init__(self, name): self.name = name
                def __eq__(self, other): return isinstance(other, Model) and self.name == other.name
                __hash__ = None

            class Broken(Exception):
                pass

            @fal.function(host={host.name!r})
            def make(name):
                if name == "bad":
                    raise Broken(name, 7)
                return Model(name)

            model = make("a")
            assert type(model) is Model and isinstance(model, Model), type(model)
            assert model == Model("a")
            before = Model.__init__
            make("b")
            assert Model.__init__ is before
            try:
                make("bad")
            except Broken as error:
                assert type(error) is Broken and error.args == ("bad", 7)
            else:
                sys.exit("no error")
            print("well")
            """
        )
    )

    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)

    assert (done.stdout, done.returncode) == ("well\n", 0), done.stderr


def test_globals_have_the_values_of_the_time_of_the_call(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    @fal.function(host=host)
    def scaled(value: int) -> int:
        return helper(value)

    first = scaled(3)
    monkeypatch.setitem(globals(), "FACTOR", 5)

    assert (first, scaled(3)) == (6, 15)


def test_an_edited_helper_takes_effect_at_the_next_call(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running the helper's cell again binds a new function to the old name."""

    @fal.function(host=host)
    def scaled(value: int) -> int:
        return helper(value)

    first = scaled(3)
    monkeypatch.setitem(globals(), "helper", lambda value: value - 1)

    assert (first, scaled(3)) == (6, 2)


def test_a_captured_list_is_fresh_in_each_call_and_the_callers_own_stays(host: Host) -> None:
    here: list[int] = []

    @fal.function(host=host)
    def remember(value: int) -> Any:
        here.append(value)
        SEEN.append(value)
        return list(here), list(SEEN)

    assert remember(1) == ([1], [1])
    assert remember(2) == ([2], [2])
    assert (here, SEEN) == ([], [])


def test_a_changed_captured_list_arrives_as_changed(host: Host) -> None:
    here = [1]

    @fal.function(host=host)
    def look() -> list[int]:
        return here

    first = look()
    here.append(2)

    assert (first, look()) == ([1], [1, 2])


def test_a_global_statement_changes_nothing_for_the_next_call(host: Host) -> None:
    @fal.function(host=host)
    def count() -> int:
        global COUNT
        COUNT += 1
        return COUNT

    assert [count(), count()] == [1, 1]
    assert COUNT == 0


def test_what_a_function_does_not_use_need_not_travel(host: Host) -> None:
    @fal.function(host=host)
    def one() -> int:
        return 1

    assert one() == 1


def test_a_big_captured_value_travels(host: Host) -> None:
    table = bytes(range(256)) * 8192  # 2 MiB

    @fal.function(host=host)
    def look(at: int) -> tuple[int, int]:
        return table[at], len(table)

    assert look(1000) == (1000 % 256, 256 * 8192)
    assert look(1001) == (1001 % 256, 256 * 8192)


def test_an_argument_changed_by_the_call_stays_as_it_was_here(host: Host) -> None:
    mine = {"a": [1]}

    @fal.function(host=host)
    def change(value: dict[str, list[int]]) -> Any:
        value["a"].append(2)
        return value

    assert change(mine) == {"a": [1, 2]}
    assert mine == {"a": [1]}


def test_functions_call_each_other_there(host: Host) -> None:
    """Helpers that are decorated themselves, recursion, lambdas and closures."""

    def factorial(n: int) -> int:
        return 1 if n < 2 else n * factorial(n - 1)

    double = lambda value: value * 2  # noqa: E731

    @fal.function(host=host)
    def compute(n: int) -> int:
        return double(factorial(n))

    assert compute(5) == 240


def test_one_object_stays_one_object_on_its_way(host: Host) -> None:
    @fal.function(host=host)
    def same(a: list[int], b: dict[str, Any]) -> Any:
        return a is b["a"], (a, a)

    shared = [1]
    is_same, (first, second) = same(shared, {"a": shared})

    assert is_same
    assert first is second


def test_methods_and_callable_objects_run_too(host: Host) -> None:
    class Adder:
        def __init__(self, step: int) -> None:
            self.step = step

        def __call__(self, value: int) -> int:
            return value + self.step

        @fal.function(host=host)
        def times(self, value: int) -> int:
            return value * self.step

        @fal.function(host=host)
        def again(self, value: int) -> Any:
            return self.times(value)

    assert fal.function(host=host)(Adder(3))(4) == 7
    assert Adder(3).times(4) == 12
    assert Adder(3).again(5) == 15


def test_a_decorated_function_that_another_one_uses_runs_where_that_one_runs(host: Host) -> None:
    @fal.function(host=host, setup_function=lambda: 10)
    def inner(base: int, value: int) -> int:
        return base + value

    @fal.function(host=host)
    async def inner_async(value: int) -> int:
        return value * 2

    @fal.function(host=host)
    def outer(value: int) -> Any:
        return inner(value), inner.submit(value).result(), list(inner.map([1, 2])), inner_async(value)

    assert outer(1) == (11, 11, [11, 12], 2)


def test_the_package_can_be_imported_there(host: Host) -> None:
    @fal.function(host=host)
    def look() -> str:
        import fal_notebook

        return fal_notebook.__version__

    assert look() == fal.__version__


def test_calls_run_in_another_process_and_keep_it(agent_host: Host) -> None:
    import os

    @fal.function(host=agent_host)
    def pid() -> int:
        return os.getpid()

    first = pid()

    assert first != os.getpid()
    assert pid() == first


def test_ssh_calls_run_as_the_user_of_the_other_side(ssh_host: Host, ssh_server: Any) -> None:
    import getpass

    @fal.function(host=ssh_host)
    def who() -> str:
        return getpass.getuser()

    assert who() == ssh_server.user
