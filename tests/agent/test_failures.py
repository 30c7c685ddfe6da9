"""An error is described so that it can be raised again elsewhere, and describing it never fails."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import linecache
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fal_agent import pickling
from fal_agent.errors import FalSerializationError
from fal_agent.failures import OpeningError, describe
from fal_agent.framing import MAX_HEADER

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = str(Path(__file__).parent)


def raised_by(source: str, filename: str = "<cell 7>", **names: object) -> BaseException:
    """Run source as a cell whose text is known, and give what it raised."""
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    module = types.ModuleType("cell_module")
    vars(module).update(names)
    try:
        exec(compile(source, filename, "exec"), vars(module))
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def opened(parts: object) -> list[object]:
    return [None if item is None else pickling.load(item) for item in pickling.load(parts)]


class NeedsTwo(Exception):
    """Its constructor asks for other arguments than it keeps."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.fixture
def unpicklable() -> Iterator[type[Exception]]:
    """A class that travels by value and cannot."""
    main = sys.modules["__main__"]
    exec("class Stuck(Exception):\n    stream = (i for i in ())", vars(main))
    yield main.Stuck
    del main.Stuck


# ---------------------------------------------------------------- kinds and messages


def test_the_message_is_type_and_text() -> None:
    kind, message, detail, _ = describe(raised_by("{}['price']"))

    assert (kind, message) == ("user", "KeyError: 'price'")
    assert (detail["type"], detail["module"], detail["text"]) == ("KeyError", "builtins", "'price'")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(3), "user"),
        (FalSerializationError("the result of f() cannot be pickled"), "serialization"),
        (OpeningError("missing", "No module named 'torch'", {"module": "torch"}), "missing"),
    ],
)
def test_each_error_has_its_kind(error: BaseException, kind: str) -> None:
    assert describe(error)[0] == kind


def test_an_error_while_opening_the_arguments_is_not_the_users() -> None:
    """The function was never called; its traceback would be all ours."""
    data = b"cno_such_module_here\nname\n."

    try:
        pickling.load([data])
    except ModuleNotFoundError as error:
        kind, _, detail, parts = describe(error, hide=[HERE])

    assert (kind, detail["module"], parts) == ("missing", "no_such_module_here", [])


def test_other_errors_while_opening_say_so() -> None:
    try:
        pickling.load([b"cjson\nno_such_name\n."])
    except AttributeError as error:
        kind, message, _, _ = describe(error, hide=[HERE])

    assert kind == "deserialization"
    assert "no_such_name" in message


def test_unpickling_in_the_users_own_code_is_the_users() -> None:
    error = raised_by("load([b'cno_such_module_here\\nname\\n.'])", load=pickling.load)

    assert describe(error)[0] == "user"


# ---------------------------------------------------------------- frames


def test_only_the_users_frames_are_shown() -> None:
    """The machinery that led to the user's code says nothing to the user."""
    source = "def inner(x):\n    return 1 / x\n\ndef outer():\n    return inner(0)\n"
    module = types.ModuleType("cell_module")
    linecache.cache["<cell 1>"] = (len(source), None, source.splitlines(keepends=True), "<cell 1>")
    exec(compile(source, "<cell 1>", "exec"), vars(module))

    async def main() -> None:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            await asyncio.get_running_loop().run_in_executor(pool, module.outer)

    with pytest.raises(ZeroDivisionError) as caught:
        asyncio.run(main())
    frames = describe(caught.value, hide=[HERE])[2]["frames"]

    assert [(frame["name"], frame["lineno"], frame["line"]) for frame in frames] == [
        ("outer", 5, "    return inner(0)"),
        ("inner", 2, "    return 1 / x"),
    ]


def test_frames_of_libraries_below_the_users_stay() -> None:
    """An error in json.loads is understood only with where json met it."""
    frames = describe(raised_by("import json\njson.loads('{')"))[2]["frames"]

    assert [frame["name"] for frame in frames][1:3] == ["<module>", "loads"]
    assert "around" in frames[-1]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.11 knows the columns")
def test_frames_know_their_columns() -> None:
    frame = describe(raised_by("x = 1\ny = x + (x / 0)"))[2]["frames"][-1]

    assert (frame["colno"], frame["end_colno"]) == (9, 14)


def test_the_source_of_a_cell_travels_once() -> None:
    detail = describe(raised_by("def f():\n    raise ValueError\nf()", "<cell 9>"))[2]

    assert detail["sources"]["<cell 9>"] == "def f():\n    raise ValueError\nf()"


def test_the_source_of_a_library_does_not_travel() -> None:
    detail = describe(raised_by("import json\njson.loads('{')"))[2]

    assert all("json" not in name for name in detail["sources"])


def test_endless_recursion_is_cut_in_the_middle() -> None:
    detail = describe(raised_by("def f():\n    return f()\nf()"))[2]

    assert len(detail["frames"]) == 64
    assert sum(frame.get("skipped", 0) for frame in detail["frames"]) > 100
    assert "more frames" in detail["traceback"]


# ---------------------------------------------------------------- chains and notes


def test_causes_and_contexts_are_told_apart() -> None:
    error = raised_by(
        "try:\n    try:\n        {}['a']\n    except KeyError as key:\n"
        "        raise ValueError('v') from key\n"
        "except ValueError:\n    raise TypeError('t')"
    )
    detail = describe(error)[2]
    chain = detail["chain"]

    assert (detail["cause"], chain[detail["context"]]["type"]) == (None, "ValueError")
    assert chain[chain[detail["context"]]["cause"]]["type"] == "KeyError"


def test_a_chain_that_bites_its_tail_ends() -> None:
    first, second = ValueError("1"), ValueError("2")
    first.__cause__, second.__cause__ = second, first

    assert len(describe(first)[2]["chain"]) == 1


def test_notes_travel() -> None:
    error = ValueError("x")
    error.__notes__ = ["look at row 7"]  # type: ignore[attr-defined]

    _, _, detail, parts = describe(error)

    assert detail["notes"] == ["look at row 7"]
    assert opened(parts)[0].__notes__ == ["look at row 7"]  # type: ignore[attr-defined]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.11 has exception groups")
def test_the_members_of_a_group_are_described() -> None:
    error = raised_by("raise ExceptionGroup('all', [ValueError('a'), KeyError('b')])")

    detail = describe(error)[2]

    assert [detail["chain"][index]["type"] for index in detail["group"]] == ["ValueError", "KeyError"]


# ---------------------------------------------------------------- pickles


def test_an_error_opens_as_itself() -> None:
    parts = describe(OSError(2, "No such file", "data.csv"))[3]

    loaded = opened(parts)[0]

    assert (type(loaded), loaded.errno, loaded.filename) == (FileNotFoundError, 2, "data.csv")  # type: ignore[attr-defined]


def test_a_constructor_with_other_arguments_is_no_obstacle() -> None:
    """Plain pickle makes such an error, and then cannot open it."""
    loaded = opened(describe(NeedsTwo(7, "seven"))[3])[0]

    assert (type(loaded), str(loaded), loaded.code) == (NeedsTwo, "7: seven", 7)  # type: ignore[attr-defined]


def test_what_cannot_be_pickled_is_left_behind_alone() -> None:
    error = ValueError("bad row", (i for i in ()))
    error.row, error.cursor = 7, (i for i in ())  # type: ignore[attr-defined]

    loaded = opened(describe(error)[3])[0]

    assert loaded.args[0] == "bad row"  # type: ignore[attr-defined]
    assert "generator" in loaded.args[1]  # type: ignore[attr-defined]
    assert loaded.row == 7  # type: ignore[attr-defined]
    assert not hasattr(loaded, "cursor")


def test_a_class_that_refuses_to_travel_is_described_all_the_same(unpicklable: type[Exception]) -> None:
    _, message, detail, parts = describe(unpicklable("text"))

    assert message == "Stuck: text"
    assert (detail["stand_in"], parts) == (True, [])


def test_one_link_that_cannot_travel_spoils_no_other(unpicklable: type[Exception]) -> None:
    error = ValueError("v")
    error.__cause__ = unpicklable("u")

    assert [type(link) for link in opened(describe(error)[3])] == [ValueError, type(None)]


def test_an_error_without_a_text_is_described() -> None:
    _, message, detail, _ = describe(Unprintable())

    assert "RuntimeError" in detail["text"]
    assert message.startswith("Unprintable")


def test_an_error_class_of_main_travels() -> None:
    module = sys.modules["__main__"]
    exec("class MainError(Exception):\n    pass", vars(module))
    try:
        loaded = opened(describe(module.MainError("x", 1))[3])[0]

        assert (type(loaded), loaded.args) == (module.MainError, ("x", 1))  # type: ignore[attr-defined]
    finally:
        del module.MainError


# ---------------------------------------------------------------- limits


def test_the_detail_always_fits_a_frame() -> None:
    """A failure that cannot be sent would leave the caller waiting."""
    error: BaseException = ValueError("é" * 100_000)
    for number in range(40):
        following = raised_by(
            f"def f():\n    # {'ü' * 50_000}\n    raise ValueError('ß' * 90000)\nf()", f"<cell {number}>"
        )
        following.__cause__ = error
        error = following

    _, message, detail, _ = describe(error)

    assert len(json.dumps(detail)) < MAX_HEADER * 3 // 4 + 1
    assert len(message) <= 4096


class Composed(ValueError):
    """Its constructor changes what pickle will call it with."""

    def __init__(self, number: int) -> None:
        super().__init__(f"over {number}")


def test_an_error_whose_constructor_makes_its_text_comes_back_with_that_text() -> None:
    """Pickle calls the class with `args`: "over over 3" is not what the user raised."""
    _, _, _, parts = describe(Composed(3))

    [error] = opened(parts)
    assert str(error) == "over 3"
    assert isinstance(error, Composed)
