"""Values travel: by value what the other side lacks, with large buffers beside the pickle."""

from __future__ import annotations

import pickle
import socket
import sqlite3
import subprocess
import sys
import threading
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from fal_agent import pickling
from fal_agent.errors import FalSerializationError

if TYPE_CHECKING:
    from collections.abc import Collection


def round_trip(value: object) -> object:
    return pickling.load([bytes(part) for part in pickling.dump(value)])


def in_another_process(value: object, expression: str, by_value: Collection[str] = ()) -> str:
    """What `expression` about `value`, loaded in a fresh interpreter, evaluates to."""
    parts = [bytes(part) for part in pickling.dump(value, by_value=by_value)]
    code = (
        "import pickle, sys; parts = pickle.load(sys.stdin.buffer)\n"
        f"from fal_agent import pickling; value = pickling.load(parts); print({expression})"
    )
    agent = Path(pickling.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(parts), capture_output=True, timeout=60,
        env={"PYTHONPATH": str(agent)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def main_namespace(source: str) -> dict[str, object]:
    """Run source as a notebook would: its functions and classes belong to `__main__`."""
    module = sys.modules["__main__"]
    namespace: dict[str, object] = {"__name__": "__main__"}
    exec(source, namespace)
    for name, value in namespace.items():
        if isinstance(value, (type, types.FunctionType)):
            setattr(module, name, value)
    return namespace


# ---------------------------------------------------------------- buffers


def test_a_large_array_travels_beside_the_pickle() -> None:
    array = np.arange(10_000)

    parts = pickling.dump({"x": array})

    assert [len(part) for part in parts[1:]] == [array.nbytes]
    assert len(parts[0]) < 1000


def test_buffers_are_views_on_the_values_own_memory() -> None:
    """Copying gigabytes is for the caller to decide."""
    array = np.zeros(10_000)

    view = pickling.dump(array)[1]
    array[0] = 1

    assert np.frombuffer(view)[0] == 1


def test_a_small_array_stays_in_the_pickle() -> None:
    assert len(pickling.dump(np.arange(10))) == 1


@pytest.mark.parametrize("size", [10, 10_000])
def test_a_loaded_array_can_be_written_to(size: int) -> None:
    loaded = round_trip(np.zeros(size))

    loaded[0] = 5  # type: ignore[index]

    assert loaded[0] == 5  # type: ignore[index]


def test_a_writable_buffer_is_used_in_place() -> None:
    """A private mapping of a file need not be copied."""
    array = np.zeros(10_000)
    parts = pickling.dump(array)
    mapped = bytearray(parts[1])

    loaded = pickling.load([parts[0], memoryview(mapped)])
    loaded[0] = 7

    assert np.frombuffer(mapped)[0] == 7


@pytest.mark.parametrize("array", [np.arange(40_000)[::2], np.asfortranarray(np.ones((200, 100)))])
def test_arrays_of_any_layout_travel(array: np.ndarray) -> None:
    np.testing.assert_array_equal(round_trip(array), array)


def test_data_frames_travel() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": range(5000), "b": ["x"] * 5000})

    pandas.testing.assert_frame_equal(round_trip(frame), frame)


# ---------------------------------------------------------------- what plain pickle refuses


@pytest.mark.parametrize("make", [threading.Lock, threading.RLock, threading.Event, threading.Condition])
def test_locks_are_made_anew(make: typing.Callable[[], object]) -> None:
    assert type(round_trip(make())) is type(make())


def test_a_held_lock_arrives_open() -> None:
    lock = threading.Lock()
    with lock:
        loaded = round_trip(lock)

    assert loaded.acquire(blocking=False)  # type: ignore[attr-defined]


def test_a_memoized_function_of_main_travels_with_its_settings() -> None:
    space = main_namespace("import functools\n@functools.lru_cache(maxsize=7)\ndef memoized(x): return x + 1")

    result = in_another_process(space["memoized"], "(value(1), value.cache_parameters()['maxsize'])")

    assert result == "(2, 7)"


def test_a_memoized_function_of_a_library_goes_by_reference() -> None:
    """Its cache belongs to the process."""
    from fal_agent import bytecode

    assert round_trip(bytecode.facts) is bytecode.facts


def test_forward_references_and_pydantic_models_travel() -> None:
    pytest.importorskip("pydantic")
    space = main_namespace(
        "import pydantic, typing\n"
        "class Point(pydantic.BaseModel):\n"
        "    x: int\n"
        "    tags: 'list[str]' = []\n"
        "    @pydantic.field_validator('x')\n"
        "    @classmethod\n"
        "    def doubled(cls, value): return value * 2\n"
    )
    point = space["Point"](x=2)  # type: ignore[operator]

    assert in_another_process((space["Point"], point), "(value[1].x, value[0](x=5).x)") == "(4, 10)"
    assert isinstance(round_trip(typing.ForwardRef("int")), typing.ForwardRef)


def test_a_traceback_does_not_keep_a_value_at_home() -> None:
    try:
        raise ValueError("x")
    except ValueError as error:
        value = {"traceback": error.__traceback__}

    assert round_trip(value) == {"traceback": None}


# ---------------------------------------------------------------- by value and by reference


def test_functions_and_classes_of_main_go_by_value() -> None:
    space = main_namespace(
        "K = 3\ndef triple(x): return x * K\nclass Box:\n    def __init__(self, x): self.x = triple(x)\n"
    )

    assert in_another_process(space["Box"], "value(2).x") == "6"


def test_an_instance_comes_home_as_the_class_it_was_made_of() -> None:
    """A notebook's isinstance checks must hold for results."""
    space = main_namespace("class Home: pass")
    home = space["Home"]()  # type: ignore[operator]

    assert type(round_trip(home)) is space["Home"]


@pytest.mark.parametrize(
    "source",
    [
        "import enum\nclass C(enum.Enum):\n    A = 1\n    def f(self): return 1\nx = C.A",
        "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass C:\n    a: int = 1\nx = C()",
        "from abc import *\nclass B(ABC):\n    @abstractmethod\n    def f(self): 0\nclass C(B): f=1\nx = C()",
        "import collections\nC = collections.namedtuple('C', 'a b')\nx = C(1, 2)",
        "class C:\n    __slots__ = ('a',)\nx = C(); x.a = 1",
        "class M(type): pass\nclass C(metaclass=M): pass\nx = C()",
        "import typing as t\nT = t.TypeVar('T')\nclass C(t.Generic[T]):\n    def f(self) -> T: ...\nx = C()",
    ],
)
def test_classes_of_every_make_come_home(source: str) -> None:
    value = main_namespace(source)["x"]
    before = dict(vars(type(value)))

    home = round_trip(value)

    after = dict(vars(type(value)))
    after.pop("__slotnames__", None)  # what Python's own pickling notes there
    assert type(home) is type(value)
    assert [name for name, item in after.items() if before.get(name) is not item] == []


def test_a_class_that_comes_home_keeps_its_methods() -> None:
    """A method replaced by a travelled copy would not see later changes of the notebook's globals."""
    space = main_namespace("factor = 2\nclass Scaled:\n    def value(self): return factor\n")
    method = space["Scaled"].value  # type: ignore[attr-defined]

    loaded = round_trip(space["Scaled"]())  # type: ignore[operator]
    space["factor"] = 3

    assert space["Scaled"].value is method  # type: ignore[attr-defined]
    assert loaded.value() == 3  # type: ignore[attr-defined]


def test_a_class_that_came_from_elsewhere_follows_its_changes() -> None:
    """A worker must use the class as the last call brought it."""
    source = (
        "import pickle, sys\nfrom fal_agent import pickling\n"
        "first, second = pickle.load(sys.stdin.buffer)\n"
        "a = pickling.load(first); b = pickling.load(second); print(a is b, a.level)"
    )
    space = main_namespace("class Leveled:\n    level = 1\n")
    first = [bytes(part) for part in pickling.dump(space["Leveled"])]
    space["Leveled"].level = 2  # type: ignore[attr-defined]
    second = [bytes(part) for part in pickling.dump(space["Leveled"])]

    done = subprocess.run(
        [sys.executable, "-c", source], input=pickle.dumps((first, second)), capture_output=True, timeout=60,
        env={"PYTHONPATH": str(Path(pickling.__file__).parent.parent)}, check=True,
    )  # fmt: skip

    assert done.stdout.decode().strip() == "True 2"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module that no other process can import."""
    (tmp_path / "my_helpers.py").write_text(
        "import sqlite3\nBASE = 10\nconnection = sqlite3.connect(':memory:')\n"
        "def add(x): return x + BASE\nclass Thing:\n    def __init__(self): self.x = add(1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_helpers  # type: ignore[import-not-found]

    yield my_helpers
    del sys.modules["my_helpers"]


def test_functions_of_named_modules_go_by_value(module: types.ModuleType) -> None:
    parts = pickling.dump((module.add, module.Thing()), by_value=["my_helpers"])
    del sys.modules["my_helpers"]
    try:
        add, thing = pickling.load(parts)
    finally:
        sys.modules["my_helpers"] = module

    assert (add(5), thing.x) == (15, 11)


def test_naming_a_module_lasts_for_one_dump(module: types.ModuleType) -> None:
    """The list of such modules belongs to the process; other users of cloudpickle must not notice."""
    import cloudpickle

    pickling.dump(module.add, by_value=["my_helpers"])

    assert "my_helpers" not in cloudpickle.list_registry_pickle_by_value()
    assert pickling.load(pickling.dump(module.add)) is module.add


def test_a_module_travels_with_the_attributes_that_are_used(module: types.ModuleType) -> None:
    """What nobody uses may be impossible to pickle, as the connection here."""
    parts = pickling.dump(module, by_value=["my_helpers"], attributes=frozenset({"add"}))
    try:
        loaded = pickling.load(parts)
    finally:
        sys.modules["my_helpers"] = module

    assert loaded.add(1) == 11
    assert not hasattr(loaded, "connection")
    assert not hasattr(loaded, "BASE")


def test_a_module_travels_without_what_cannot_be_pickled(module: types.ModuleType) -> None:
    loaded = pickling.load(pickling.dump(module, by_value=["my_helpers"]))

    assert (loaded.BASE, loaded.Thing().x) == (10, 11)
    assert not hasattr(loaded, "connection")


def test_import_finds_a_module_that_came_by_value(module: types.ModuleType) -> None:
    expression = (
        "(__import__('my_helpers') is value, value.add(1), pickling.load(pickling.dump(value.add))(2))"
    )

    assert in_another_process(module, expression, by_value=["my_helpers"]) == "(True, 11, 12)"


def test_a_module_that_comes_home_does_not_replace_itself(module: types.ModuleType) -> None:
    loaded = pickling.load(pickling.dump(module, by_value=["my_helpers"]))

    assert loaded is not module
    assert sys.modules["my_helpers"] is module


# ---------------------------------------------------------------- culprits


class Holder:
    def __init__(self) -> None:
        self.conn = sqlite3.connect(":memory:")


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"lock": Holder()}, "x['lock'].conn: cannot pickle 'sqlite3.Connection' object"),
        ([1, (2, Holder())], "x[1][1].conn: "),
        ({"a": {"b": [socket.socket]}, "c": (i for i in ())}, "x['c']: cannot pickle 'generator' object"),
    ],
)
def test_the_error_names_the_way_to_the_culprit(value: object, path: str) -> None:
    with pytest.raises(FalSerializationError) as caught:
        pickling.dump(value, what="argument 'x'", name="x")

    assert str(caught.value).startswith("argument 'x' cannot be pickled")
    assert path in str(caught.value)


def test_the_error_follows_functions_to_the_globals_they_use() -> None:
    space = main_namespace(
        "import sqlite3\nconn = sqlite3.connect(':memory:')\n"
        "def inner(): return conn\ndef outer(): return inner()\n"
    )

    with pytest.raises(FalSerializationError, match=r"outer -> inner -> conn: cannot pickle 'sqlite3"):
        pickling.dump(space["outer"], what="function outer()", name="outer")


def test_an_unrelated_global_of_the_same_name_as_an_attribute_is_not_blamed() -> None:
    space = main_namespace(
        "import sqlite3\nconn = sqlite3.connect(':memory:')\nother = (i for i in ())\n"
        "def reader(x): return x.conn, other\n"
    )

    with pytest.raises(FalSerializationError, match=r"reader -> other: cannot pickle 'generator'"):
        pickling.dump(space["reader"], name="reader")


def test_a_value_that_contains_itself_is_explained() -> None:
    value: dict[str, object] = {"conn": Holder()}
    value["self"] = value

    with pytest.raises(FalSerializationError, match=r"\['conn'\]\.conn: cannot pickle"):
        pickling.dump(value)


def test_a_value_whose_own_pickling_raises_is_explained() -> None:
    class Broken:
        def __reduce__(self) -> object:
            raise ZeroDivisionError("by design")

    with pytest.raises(FalSerializationError, match=r"\[0\]: ZeroDivisionError: by design") as caught:
        pickling.dump([Broken()])

    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_too_deep_a_value_is_an_error_and_not_a_crash() -> None:
    value: list[object] = []
    for _ in range(100_000):
        value = [value]

    with pytest.raises(FalSerializationError, match="recursion"):
        pickling.dump(value)


def test_explaining_a_huge_value_ends() -> None:
    """The search for the culprit is bounded by number and time."""
    value = [[[index] * 50 for index in range(300)] for _ in range(100)]
    value.append([Holder()])  # type: ignore[list-item]

    with pytest.raises(FalSerializationError):
        pickling.dump(value)


def test_a_dataclass_of_a_notebook_is_one_on_the_other_side() -> None:
    """It can be taken apart and built upon there: its fields know that they have no default."""
    sender = """
import dataclasses, sys
from fal_agent import pickling

@dataclasses.dataclass
class Point:
    x: int
    _: dataclasses.KW_ONLY
    tags: list = dataclasses.field(default_factory=list)
    y: int = 2

sys.stdout.buffer.write(pickling.dump(Point)[0])
"""
    receiver = """
import dataclasses, sys
from fal_agent import pickling

Point = pickling.load([sys.stdin.buffer.read()])
nothing = dataclasses.MISSING
fields = dataclasses.fields(Point)
found = {one.name: (one.default is nothing, one.default_factory is nothing) for one in fields}
assert found == {"x": (True, True), "tags": (True, False), "y": (False, True)}, found

@dataclasses.dataclass
class More(Point):
    z: int = 3

assert dataclasses.asdict(More(1)) == {"x": 1, "tags": [], "y": 2, "z": 3}
"""
    sent = subprocess.run([sys.executable, "-c", sender], capture_output=True, check=True).stdout

    done = subprocess.run([sys.executable, "-c", receiver], input=sent, capture_output=True)

    assert done.returncode == 0, done.stderr.decode()
