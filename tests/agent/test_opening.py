"""A worker opens functions so that one call cannot see what another did to what it captured."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fal_agent import pickling
from fal_agent.failures import OpeningError, describe
from fal_agent.worker.opening import Shelf, UnknownFunctionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def main() -> Iterator[Any]:
    """A place for functions that travel by value."""
    module = sys.modules["__main__"]
    before = set(vars(module))
    yield module
    for name in set(vars(module)) - before:
        delattr(module, name)


def packed(main: Any, source: str, name: str = "f", setup: str | None = None) -> list[Any]:
    exec(source, vars(main))
    pair = getattr(main, name), None if setup is None else getattr(main, setup)
    return [part if isinstance(part, bytes) else bytes(part) for part in pickling.dump(pair)]


def test_what_a_function_does_to_what_it_captured_is_not_seen_by_the_next_call(main: Any) -> None:
    shelf = Shelf()
    parts = packed(main, "seen = []\ndef f(x):\n    seen.append(x)\n    return list(seen)")

    results = [shelf.function("d", parts if x == 1 else None, False)[0](x) for x in (1, 2)]

    assert results == [[1], [2]]


def test_a_captured_array_is_fresh_for_each_call(main: Any) -> None:
    """Its buffer may be a mapping of a file that is shared by all calls."""
    main.array = np.zeros(10_000)
    exec("def f():\n    array[0] += 1\n    return array[0]", vars(main))
    pickle_, buffer = pickling.dump((main.f, None))
    shelf = Shelf()
    parts = [pickle_, memoryview(bytearray(buffer))]

    assert [shelf.function("d", parts, False)[0]() for _ in range(2)] == [1, 1]


def test_a_reusable_function_is_opened_once(main: Any) -> None:
    shelf = Shelf()
    parts = packed(main, "def f(): return 1")

    assert shelf.function("d", parts, True)[0] is shelf.function("d", None, True)[0]


def test_data_that_was_never_sent_is_unknown() -> None:
    with pytest.raises(UnknownFunctionError) as caught:
        Shelf().function("0123456789abcdef", None, False)

    assert describe(caught.value)[0] == "agent"
    assert "0123456789ab" in str(caught.value)


def test_the_data_used_longest_ago_goes_first(main: Any) -> None:
    parts = packed(main, "def f(): return 1")
    size = sum(map(len, parts))
    shelf = Shelf(limit=2 * size + 1)
    for digest in ("a", "b"):
        shelf.function(digest, parts, False)
    shelf.function("a", None, False)

    shelf.function("c", parts, False)

    assert shelf.function("a", None, False)[0]() == 1
    with pytest.raises(UnknownFunctionError):
        shelf.function("b", None, False)


def test_a_missing_module_is_named_with_what_is_used_of_it(main: Any) -> None:
    module = type(sys)("not_on_the_host")
    exec("def pipeline(): ...\ndef tokenize(): ...", vars(module))
    sys.modules["not_on_the_host"] = module
    main.pipeline, main.tokenize = module.pipeline, module.tokenize
    parts = packed(main, "def f(): return pipeline(tokenize())")
    del sys.modules["not_on_the_host"]

    with pytest.raises(OpeningError) as caught:
        Shelf().function("d", parts, False)
    kind, _, detail, _ = describe(caught.value)

    assert (kind, detail["module"], detail["names"]) == (
        "missing",
        "not_on_the_host",
        ["pipeline", "tokenize"],
    )


def test_data_that_is_no_pickle_is_a_clear_error() -> None:
    with pytest.raises(OpeningError, match="the function cannot be opened there") as caught:
        Shelf().function("d", [b"nonsense"], False)

    assert caught.value.kind == "deserialization"


# ---------------------------------------------------------------- setup functions


def opened(shelf: Shelf, digest: str, parts: list[Any]) -> Callable[[], Any]:
    return lambda: shelf.setup_value(digest, shelf.function(digest, parts, False)[1])  # type: ignore[arg-type]


def test_a_setup_function_runs_once(main: Any) -> None:
    main.setups = []
    shelf = Shelf()
    source = (
        "import sys\ndef prepare():\n    sys.modules['__main__'].setups.append(1)\n"
        "    return object()\ndef f(m): ..."
    )
    parts = packed(main, source, setup="prepare")

    first, second = (opened(shelf, "d", parts)() for _ in range(2))

    assert first is second
    assert main.setups == [1]


def test_a_setup_function_does_not_run_again_for_an_edited_function(main: Any) -> None:
    """The model stays while the code around it is worked on."""
    shelf = Shelf()
    source = "def prepare(): return object()\ndef f(m): return 1"
    before = packed(main, source, setup="prepare")
    after = packed(main, source.replace("return 1", "return 2"), setup="prepare")

    assert opened(shelf, "before", before)() is opened(shelf, "after", after)()


def test_an_edited_setup_function_runs_again(main: Any) -> None:
    shelf = Shelf()
    before = packed(main, "def prepare(): return 1\ndef f(m): ...", setup="prepare")
    after = packed(main, "def prepare(): return 2\ndef f(m): ...", setup="prepare")

    assert (opened(shelf, "before", before)(), opened(shelf, "after", after)()) == (1, 2)


def test_a_setup_function_that_failed_runs_again(main: Any) -> None:
    outcomes: list[Any] = [ValueError("no weights"), 7]

    def prepare() -> int:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome  # type: ignore[no-any-return]

    shelf = Shelf()
    with pytest.raises(ValueError, match="no weights"):
        shelf.setup_value("d", prepare)

    assert shelf.setup_value("d", prepare) == 7


def test_calls_at_once_share_one_setup() -> None:
    started, go_on = threading.Event(), threading.Event()
    runs = []

    def prepare() -> int:
        runs.append(1)
        started.set()
        assert go_on.wait(10)
        return 5

    shelf, values = Shelf(), []
    threads = [
        threading.Thread(target=lambda: values.append(shelf.setup_value("d", prepare)), daemon=True)
        for _ in "ab"
    ]
    threads[0].start()
    assert started.wait(10)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(10)

    assert (values, runs) == ([5, 5], [1])
