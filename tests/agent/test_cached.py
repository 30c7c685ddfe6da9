"""`fal.cached` keeps what was made for as long as the process lives, and knows a definition again."""

from __future__ import annotations

import sys
import threading
import types
from typing import TYPE_CHECKING, Any

import pytest

from fal_agent import pickling
from fal_agent.runtime.cached import Cached, cached, cached_entries
from fal_agent.runtime.fingerprints import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def empty_store() -> Iterator[None]:
    cached.clear()
    yield
    cached.clear()


def cell(source: str, **names: Any) -> dict[str, Any]:
    """Run source as a notebook's cell would."""
    space: dict[str, Any] = {"__name__": "__main__", "cached": cached, "made": [], **names}
    exec(compile(source, f"<cell {len(source)}>", "exec"), space)
    return space


# ---------------------------------------------------------------- memoization


def test_a_value_is_made_once() -> None:
    made = []

    @cached
    def load(name: str) -> str:
        made.append(name)
        return name.upper()

    assert (load("a"), load("a"), load("b"), made) == ("A", "A", "B", ["a", "b"])


def test_the_same_object_is_given_each_time() -> None:
    @cached
    def load() -> list[int]:
        return []

    assert load() is load()


def test_keyword_and_positional_arguments_are_different_keys() -> None:
    """As for functools.lru_cache, whose users this is for."""
    made = []

    @cached
    def load(x: int = 0, y: int = 0) -> None:
        made.append((x, y))

    for arguments, named in (((1,), {}), ((), {"x": 1}), ((), {"x": 1, "y": 2}), ((), {"y": 2, "x": 1})):
        load(*arguments, **named)

    assert len(made) == 4


def test_an_exception_is_not_kept() -> None:
    outcomes: list[Any] = [ValueError("first"), 5]

    @cached
    def load() -> int:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match="first"):
        load()
    assert load() == 5


def test_an_interrupt_while_making_leaves_nothing_locked() -> None:
    interrupts = [KeyboardInterrupt()]

    @cached
    def load() -> int:
        if interrupts:
            raise interrupts.pop()
        return 1

    with pytest.raises(KeyboardInterrupt):
        load()
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(load()), daemon=True)
    thread.start()
    thread.join(10)

    assert results == [1]


def test_an_argument_that_cannot_be_hashed_is_a_type_error() -> None:
    @cached
    def load(_names: list[str]) -> None: ...

    with pytest.raises(TypeError, match="unhashable"):
        load(["a"])


def test_two_first_calls_at_once_make_it_once() -> None:
    """It loads models; there may be memory for one."""
    started, go_on = threading.Event(), threading.Event()
    made = []

    @cached
    def load() -> object:
        started.set()
        assert go_on.wait(10)
        made.append(1)
        return object()

    values: list[object] = []
    threads = [threading.Thread(target=lambda: values.append(load()), daemon=True) for _ in range(2)]
    threads[0].start()
    assert started.wait(10)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(10)

    assert (len(made), len(values), len(set(map(id, values)))) == (1, 2, 1)


def test_a_waiting_call_tries_itself_when_the_first_fails() -> None:
    started, go_on = threading.Event(), threading.Event()
    attempts: list[int] = []

    @cached
    def load() -> str:
        attempts.append(1)
        if len(attempts) == 1:
            started.set()
            assert go_on.wait(10)
            raise ValueError
        return "second"

    outcomes: list[Any] = []

    def call() -> None:
        try:
            outcomes.append(load())
        except ValueError:
            outcomes.append("failed")

    threads = [threading.Thread(target=call, daemon=True) for _ in range(2)]
    threads[0].start()
    assert started.wait(10)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(10)

    assert sorted(outcomes) == ["failed", "second"]


def test_different_keys_do_not_wait_for_each_other() -> None:
    inside, go_on = threading.Event(), threading.Event()

    @cached
    def load(name: str) -> str:
        if name == "slow":
            inside.set()
            assert go_on.wait(10)
        return name

    thread = threading.Thread(target=load, args=("slow",), daemon=True)
    thread.start()
    assert inside.wait(10)

    assert load("quick") == "quick"
    go_on.set()
    thread.join(10)


# ---------------------------------------------------------------- which definitions are the same

TWICE = "@cached\ndef load():\n    made.append(1)\n    return object()\n"


def test_a_cell_run_again_finds_what_is_there() -> None:
    assert cell(TWICE)["load"]() is cell(TWICE)["load"]()


@pytest.mark.parametrize(
    "source",
    [
        "# a comment\n\n\n" + TWICE,
        TWICE.replace("    return", "    # a comment\n    return"),
        "if True:\n" + "".join(f"    {line}\n" for line in TWICE.splitlines()),
    ],
)
def test_comments_lines_and_indentation_do_not_count(source: str) -> None:
    assert cell(TWICE)["load"]() is cell(source)["load"]()


def test_a_changed_docstring_does_not_count() -> None:
    source = TWICE.replace("    made", '    """One."""\n    made')

    assert cell(source)["load"]() is cell(source.replace("One", "Two"))["load"]()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (TWICE, TWICE.replace("append(1)", "append(2)")),
        (TWICE, TWICE.replace("append(1)", "append(1.0)")),
        (TWICE, TWICE.replace("append", "insert").replace("(1)", "(0, 1)")),
        (TWICE, TWICE.replace("def load():", "def load(x=1):")),
        ("K = 1\n" + TWICE.replace("(1)", "(K)"), "K = 2\n" + TWICE.replace("(1)", "(K)")),
        (
            "def help(): return 1\n" + TWICE.replace("(1)", "(help())"),
            "def help(): return 2\n" + TWICE.replace("(1)", "(help())"),
        ),
        (
            "class Net:\n    def size(self): return 1\n" + TWICE.replace("object()", "Net()"),
            "class Net:\n    def size(self): return 2\n" + TWICE.replace("object()", "Net()"),
        ),
    ],
)
def test_what_changes_the_result_counts(first: str, second: str) -> None:
    assert cell(first)["load"]() is not cell(second)["load"]()


def test_functions_of_equal_text_with_different_closures_are_different() -> None:
    def make(number: int) -> Cached[int]:
        @cached
        def load() -> int:
            return number

        return load

    assert (make(1)(), make(2)(), make(1)()) == (1, 2, 1)


def test_closures_that_can_change_are_compared_by_content() -> None:
    def make(names: list[str]) -> Cached[list[str]]:
        @cached
        def load() -> list[str]:
            return list(names)

        return load

    assert make(["a"])() == ["a"]
    assert make(["b"])() == ["b"]
    assert make(["a"])() is make(["a"])()


def test_a_counter_that_the_function_keeps_does_not_count() -> None:
    """What a function sets itself is not its input."""
    space = cell("calls = 0\n@cached\ndef load():\n    global calls\n    calls += 1\n    return calls\n")

    assert (space["load"](), space["load"](), space["calls"]) == (1, 1, 1)


def test_functions_of_different_names_are_different() -> None:
    assert cell(TWICE)["load"]() is not cell(TWICE.replace("def load", "def read"))["read"]()


def test_functions_that_call_each_other_have_a_fingerprint() -> None:
    source = "def even(n): return n == 0 or odd(n - 1)\ndef odd(n): return n != 0 and even(n - 1)\n"

    assert fingerprint(cell(source)["even"]) == fingerprint(cell(source)["even"])
    assert fingerprint(cell(source)["even"]) != fingerprint(cell(source)["odd"])


def test_a_travelled_function_finds_what_is_there() -> None:
    """A worker opens the function anew for each call; the model must not be loaded anew."""
    main = sys.modules["__main__"]
    space = cell(TWICE)
    main.load, main.made = space["load"], space["made"]  # type: ignore[attr-defined]
    try:
        first, second = (pickling.load(pickling.dump(space["load"])) for _ in range(2))

        assert type(first) is Cached
        assert first is not second
        assert first() is second()
    finally:
        del main.load, main.made  # type: ignore[attr-defined]


def test_the_decorator_itself_travels_by_reference() -> None:
    assert pickling.load(pickling.dump(cached)) is cached


# ---------------------------------------------------------------- forms


def test_bare_and_called_decoration_both_work() -> None:
    @cached()
    def load(x: int) -> int:
        return x

    assert load(3) == 3


def test_the_name_and_text_of_the_function_stay() -> None:
    @cached
    def load() -> None:
        """Load it."""

    assert (load.__name__, load.__doc__, load.__module__) == ("load", "Load it.", __name__)
    assert isinstance(load.__wrapped__, types.FunctionType)


def test_methods_are_kept_apart_by_instance() -> None:
    class Loader:
        @cached
        def load(self, name: str) -> object:
            return (self, name, object())

    one, two = Loader(), Loader()

    assert one.load("a") is one.load("a")
    assert one.load("a") is not two.load("a")


def test_a_method_of_an_instance_that_cannot_be_hashed_works() -> None:
    class Loader:
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            return True

        @cached
        def load(self) -> object:
            return object()

    one, two = Loader(), Loader()

    assert one.load() is one.load()
    assert one.load() is not two.load()


def test_cached_functions_may_use_each_other() -> None:
    @cached
    def inner(x: int) -> int:
        return x + 1

    @cached
    def outer(x: int) -> int:
        return inner(x) * 10

    assert outer(1) == 20


@pytest.mark.parametrize(
    "source", ["async def f(): ...", "def f():\n    yield 1", "async def f():\n    yield"]
)
def test_what_can_be_used_only_once_is_refused(source: str) -> None:
    space = cell(source)

    with pytest.raises(TypeError, match=r"cannot memoize f\(\)"):
        cached(space["f"])


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="not int"):
        cached(3)  # type: ignore[call-overload]


# ---------------------------------------------------------------- forgetting and looking


def test_clear_forgets_one_function() -> None:
    @cached
    def load(x: int) -> object:
        return object()

    @cached
    def other() -> object:
        return object()

    before, kept = load(1), other()
    load(2)

    assert load.clear() == 2
    assert load(1) is not before
    assert other() is kept


def test_clear_on_the_decorator_forgets_everything() -> None:
    @cached
    def load() -> object:
        return object()

    before = load()

    assert cached.clear() == 1
    assert load() is not before


def test_entries_tell_what_is_cached() -> None:
    @cached
    def load_model(name: str, *, size: int = 1) -> None:
        assert name

    load_model("bert", size=2)
    (entry,) = cached_entries()

    assert entry.name.endswith("load_model")
    assert entry.arguments == "'bert', size=2"
    assert entry.seconds >= 0
    assert entry.age >= 0
