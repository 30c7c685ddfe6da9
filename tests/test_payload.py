"""What a call takes along is what the notebook holds at that moment, packed no more often than needed."""

from __future__ import annotations

import types
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.notebook import Notebook, call_elsewhere

from fal_agent import pickling
from fal_agent.errors import FalSerializationError
from fal_agent.runtime.cached import cached
from fal_agent.wire import INLINE_LIMIT, Call, EnvironmentSpec
from fal_notebook import payload
from fal_notebook.payload import Packed, make_parcel, pack_arguments, pack_function, pack_named

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def notebook() -> Iterator[Notebook]:
    notebook = Notebook()
    yield notebook
    notebook.close()


def call(packed: Packed, *args: Any) -> Any:
    function, _ = pickling.load(packed.parts)
    return function(*args)


# ---------------------------------------------------------------- packing again


def test_an_unchanged_function_is_packed_once(notebook: Notebook) -> None:
    notebook.run("def f(x): return x + 1")

    assert pack_function(notebook["f"]) is pack_function(notebook["f"])


CHANGES = {
    "a number": ("K = 1\ndef f(): return K", "K = 2"),
    "a helper": ("def g(): return 1\ndef f(): return g()", "def g(): return 2"),
    "a helper's global": ("K = 1\ndef g(): return K\ndef f(): return g()", "K = 2"),
    "a helper's code": ("def g(): return 1\ndef f(): return g()", "g.__code__ = (lambda: 2).__code__"),
    "its own code": ("def f(): return 1", "f.__code__ = (lambda: 2).__code__"),
    "a default": ("def f(x=1): return x", "f.__defaults__ = (2,)"),
    "a keyword default": ("def f(*, x=1): return x", "f.__kwdefaults__ = {'x': 2}"),
    "a keyword default in place": ("def f(*, x=1): return x", "f.__kwdefaults__['x'] = 2"),
    "a function's attribute": ("def f(): return f.level\nf.level = 1", "f.level = 2"),
    "a class": (
        "class A:\n    def v(self): return 1\ndef f(): return A().v()",
        "class A:\n    def v(self): return 2",
    ),
    "a method": (
        "class A:\n    def v(self): return 1\ndef f(): return A().v()",
        "A.v = lambda self: 2",
    ),
    "a class attribute": ("class A:\n    v = 1\ndef f(): return A.v", "A.v = 2"),
    "a base class's method": (
        "class A:\n    def v(self): return 1\nclass B(A): pass\ndef f(): return B().v()",
        "A.v = lambda self: 2",
    ),
    "a static method's global": (
        "K = 1\nclass A:\n    @staticmethod\n    def v(): return K\ndef f(): return A.v()",
        "K = 2",
    ),
    "a property's global": (
        "K = 1\nclass A:\n    @property\n    def v(self): return K\ndef f(): return A().v",
        "K = 2",
    ),
    "a callable's own attribute": (
        "class F:\n    def __call__(self): return self.v\nf = F(); f.v = 1",
        "f.v = 2",
    ),
    "a bound method's instance": (
        "class F:\n    def m(self): return self.v\nx = F(); x.v = 1; f = x.m",
        "x.v = 2",
    ),
    "a partial's argument": (
        "import functools\nL = [1]\ndef g(x): return x[0]\nf = functools.partial(g, L)",
        "L[0] = 2",
    ),
    "a partial's function": (
        "import functools\nK = 1\ndef g(): return K\nf = functools.partial(g)",
        "K = 2",
    ),
    "a memoized function's global": (
        "import functools\nK = 1\n@functools.lru_cache\ndef g(): return K\ndef f(): return g()",
        "K = 2",
    ),
    "a function's own memo": (
        "import functools\nK = 1\n@functools.cache\ndef f(): return K",
        "K = 2",
    ),
    "a decorated function's global": (
        "import functools\nK = 1\ndef g(): return K\n@functools.wraps(g)\ndef f(): return g()",
        "K = 2",
    ),
    "an item of a list": ("L = [1]\ndef f(): return L[0]", "L[0] = 2"),
    "a list in a tuple": ("T = ([1],)\ndef f(): return T[0][0]", "T[0][0] = 2"),
    "a list in a list": ("L = [[1]]\ndef f(): return L[0][0]", "L[0][0] = 2"),
    "an instance's attribute": (
        "class A: pass\na = A(); a.v = 1\ndef f(): return a.v",
        "a.v = 2",
    ),
    "a closure's variable": (
        (
            "def make():\n    v = 1\n    def f(): return v\n"
            "    def put(x):\n        nonlocal v\n        v = x\n    return f, put\nf, put = make()"
        ),
        "put(2)",
    ),
    "a builtin that is now shadowed": ("def f(): return len([5])", "def len(x): return 2"),
    "a function in a dictionary": ("D = {'g': lambda: 1}\ndef f(): return D['g']()", "D['g'] = lambda: 2"),
    "a number that becomes a list": ("K = 1\ndef f(): return K if K == 1 else K[0]", "K = [2]"),
    "a helper that becomes None": ("def g(): return 1\ndef f(): return g() if g else 2", "g = None"),
    "a nested function's global": (
        "K = 1\ndef f():\n    def inner(): return K\n    return inner()",
        "K = 2",
    ),
    "a cached function's code": (
        "@cached\ndef g(): return 1\ndef f(): return g.__wrapped__()",
        "@cached\ndef g(): return 2",
    ),
    "a cached function's global": (
        "K = 1\n@cached\ndef g(): return K\ndef f(): return g.__wrapped__()",
        "K = 2",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_at_the_next_call(notebook: Notebook, name: str) -> None:
    """Globals are captured at call time, whatever was kept from the call before."""
    before, change = CHANGES[name]
    notebook.run(before, cached=cached)
    first = call(pack_function(notebook["f"]))
    again = call(pack_function(notebook["f"]))

    notebook.run(change, cached=cached)

    assert (first, again) == (1, 1)
    assert call(pack_function(notebook["f"])) == 2


def test_an_unrelated_change_packs_nothing_anew(notebook: Notebook) -> None:
    notebook.run("K = 1\ndef f(): return K")
    packed = pack_function(notebook["f"])

    notebook.run("other = [object()]\ndef g(): return 1")

    assert pack_function(notebook["f"]) is packed


def test_captured_data_that_did_not_change_keeps_the_digest(notebook: Notebook) -> None:
    """It need not travel again."""
    notebook.run("L = list(range(1000))\ndef f(): return sum(L)")

    assert pack_function(notebook["f"]).digest == pack_function(notebook["f"]).digest


def test_what_was_packed_stays_as_it_was(notebook: Notebook) -> None:
    """A host may ask for it later, when the array has changed."""
    notebook.run("def f(): return array[0]", array=np.zeros(10_000))
    packed = pack_function(notebook["f"])

    notebook["array"][0] = 7

    assert call(packed) == 0
    assert call(pack_function(notebook["f"])) == 7


def test_packing_keeps_nothing_large_alive(notebook: Notebook) -> None:
    """`del df` must free the memory."""
    import gc
    import weakref

    notebook.run("class Big: pass\nbig = Big()\ndef helper(): return 1\ndef f(): return big, helper()")
    pack_function(notebook["f"])
    big, helper = weakref.ref(notebook["big"]), weakref.ref(notebook["helper"])

    notebook.run("del big, helper")
    gc.collect()

    assert (big(), helper()) == (None, None)


def test_a_function_that_is_gone_is_forgotten(notebook: Notebook) -> None:
    import gc

    notebook.run("def f(): return 1")
    pack_function(notebook["f"])
    before = len(payload._packings)

    notebook.run("del f")
    gc.collect()

    assert len(payload._packings) < before


# ---------------------------------------------------------------- reuse


@pytest.mark.parametrize(
    "source",
    [
        "def f(x): return x + 1",
        "K = 3\ndef f(x): return x * K",
        "import math\ndef g(x): return math.sqrt(x)\ndef f(x): return g(x)",
        "import logging\nlog = logging.getLogger('x')\ndef f(x): return log",
        "def f(x):\n    n = 0\n    def add():\n        nonlocal n\n        n += x\n    add()\n    return n",
        "T = (1, 'a', (2.0, None))\ndef f(x): return T",
        "def f(x):\n    values = []\n    values.append(x)\n    values[0] = 2\n    return values",
    ],
)
def test_a_function_without_state_may_be_reused(notebook: Notebook, source: str) -> None:
    notebook.run(source)

    assert pack_function(notebook["f"]).reusable


@pytest.mark.parametrize(
    "source",
    [
        "L = []\ndef f(x): L.append(x)",
        "n = 0\ndef f(x):\n    global n\n    n += 1",
        "def f(x, seen=[]): seen.append(x)",
        "def f(x): f.count = x",
        "def make():\n    n = 0\n    def f(x):\n        nonlocal n\n        n += 1\n    return f\nf = make()",
        "class A: n = 0\ndef f(x): A.n += 1",
        "class A: n = 0\ndef f(x): setattr(A, 'n', 1)",
        "n = 0\ndef f(x): globals()['n'] = 1",
        "n = 0\ndef f(x): exec('n = 1', globals())",
        "n = 0\ndef g():\n    global n\n    n = 1\ndef f(x): g()",
        "class A:\n    items = []\ndef f(x): A.items.append(x)",
        "it = iter([1, 2])\ndef f(x): return next(it)",
    ],
)
def test_a_function_with_state_is_opened_anew_for_each_call(notebook: Notebook, source: str) -> None:
    notebook.run(source)

    assert not pack_function(notebook["f"]).reusable


# ---------------------------------------------------------------- what travels


def test_only_what_is_used_travels(notebook: Notebook) -> None:
    notebook.run("lock_like = (i for i in ())\nunused = 'x' * 100_000\ndef f(): return 1")

    assert sum(map(len, pack_function(notebook["f"]).parts)) < 2000


def test_shared_values_stay_shared(notebook: Notebook) -> None:
    notebook.run("L = []\ndef add(x): L.append(x)\ndef f():\n    add(1)\n    return L")

    assert call(pack_function(notebook["f"])) == [1]


def test_a_setup_function_travels_with_the_function(notebook: Notebook) -> None:
    notebook.run("K = 2\ndef prepare(): return K\ndef f(value): return value")

    function, setup = pickling.load(pack_function(notebook["f"], notebook["prepare"]).parts)

    assert function(setup()) == 2


def test_a_changed_setup_function_is_packed_anew(notebook: Notebook) -> None:
    notebook.run("def prepare(): return 1\ndef f(value): return value")
    before = pack_function(notebook["f"], notebook["prepare"])
    notebook.run("def prepare(): return 2")

    after = pack_function(notebook["f"], notebook["prepare"])

    assert pickling.load(after.parts)[1]() == 2
    assert before.digest != after.digest


@pytest.mark.parametrize(
    "source",
    [
        "import functools\ndef g(x, y): return x + y\nf = functools.partial(g, 1)",
        "class F:\n    def __call__(self, x): return x + 1\nf = F()",
        "class F:\n    __hash__ = None\n    def __call__(self, x): return x + 1\nf = F()",
        "class F:\n    def m(self, x): return x + 1\nf = F().m",
        "f = lambda x: x + 1",
        "import functools\n@functools.lru_cache\ndef f(x): return x + 1",
    ],
)
def test_any_callable_can_be_packed(notebook: Notebook, source: str) -> None:
    notebook.run(source)

    assert call_elsewhere(pack_function(notebook["f"]), 1) == 2
    assert call(pack_function(notebook["f"]), 2) == 3


def test_dill_is_there_on_request(notebook: Notebook) -> None:
    pytest.importorskip("dill")
    notebook.run("K = 2\ndef f(x): return x * K")

    packed = pack_function(notebook["f"], serializer="dill")

    assert not packed.reusable
    assert call(packed, 3) == 6


def test_a_function_that_cannot_travel_names_the_way_to_the_culprit(notebook: Notebook) -> None:
    notebook.run(
        "import sqlite3\nclass Store: pass\nstore = Store(); store.conn = sqlite3.connect(':memory:')\n"
        "def read(): return store\ndef score(): return read()"
    )

    with pytest.raises(FalSerializationError) as caught:
        pack_function(notebook["score"])

    assert "function score() cannot be pickled" in str(caught.value)
    assert "score -> read -> store.conn: cannot pickle 'sqlite3.Connection' object" in str(caught.value)


def test_a_setup_function_that_cannot_travel_is_named(notebook: Notebook) -> None:
    notebook.run("it = (i for i in ())\ndef prepare(): return it\ndef f(v): ...")

    with pytest.raises(
        FalSerializationError, match=r"setup function prepare\(\) .*prepare -> it: cannot pickle"
    ):
        pack_function(notebook["f"], notebook["prepare"])


def test_a_huge_captured_value_is_named_with_its_size(notebook: Notebook) -> None:
    notebook.run("def score(): return table.sum()", table=np.zeros(payload.HUGE // 8 + 1))

    with pytest.warns(UserWarning, match=r"score\(\) captures 'table', 67 MB"):
        pack_function(notebook["score"])
    notebook["table"][0] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack_function(notebook["score"])  # said once


# ---------------------------------------------------------------- arguments


def opened(parts: Any) -> Any:
    return pickling.load([bytes(part) for part in parts])


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((1, "a", None, 2.5, True, b"x"), {}),
        (([1, {"a": (2,)}],), {}),
        ((1,), {"x": [2]}),
        ((), {"x": 1}),
    ],
)
def test_arguments_arrive_as_they_were(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert opened(pack_arguments(args, kwargs)) == (args, kwargs)


def test_instances_of_the_notebooks_classes_are_arguments(notebook: Notebook) -> None:
    notebook.run("class Point:\n    def __init__(self, x): self.x = x\ndef f(p): return p.x + 1")
    parts = pack_arguments((notebook["Point"](1),), {})
    name = "Point"
    assert name.encode() in bytes(parts[0])

    assert call(pack_function(notebook["f"]), opened(parts)[0][0]) == 2


def test_an_array_may_change_while_it_travels() -> None:
    array = np.zeros(10_000)

    parts = pack_arguments((array,), {})
    array[0] = 1

    assert opened(parts)[0][0][0] == 0


def test_a_caller_that_waits_need_not_copy() -> None:
    array = np.zeros(10_000)

    parts = pack_arguments((array,), {}, snapshot=False)

    assert isinstance(parts[1], memoryview)
    assert np.shares_memory(np.frombuffer(parts[1]), array)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((1, {"x": (i for i in ())}), {}, "argument 2 ('batch') of score() cannot be pickled"),
        ((1,), {"batch": (i for i in ())}, "argument 'batch' of score() cannot be pickled"),
    ],
)
def test_an_argument_that_cannot_travel_is_named(args: Any, kwargs: Any, message: str) -> None:
    def score(x: int, batch: Any) -> None: ...

    with pytest.raises(FalSerializationError) as caught:
        pack_arguments(args, kwargs, label="score", func=score)

    assert message in str(caught.value)
    assert "batch" in str(caught.value).partition("travel: ")[2]


def test_an_argument_is_named_by_its_position_when_its_name_is_not_known() -> None:
    with pytest.raises(FalSerializationError, match=r"argument 1 of score\(\)"):
        pack_arguments(((i for i in ()),), {}, label="score")


def test_a_named_value_that_cannot_travel_is_named() -> None:
    with pytest.raises(FalSerializationError, match=r"^'batch' cannot be pickled.*batch\[0\]: cannot pickle"):
        pack_named([(i for i in ())], name="batch", namespace={})


# ---------------------------------------------------------------- parcels

A_CALL = Call("function", "f", "d", EnvironmentSpec("3.11", []))


def test_small_data_travels_in_the_message() -> None:
    arguments = pack_arguments((np.zeros(2000),), {})

    parcel = make_parcel(A_CALL, Packed("d", [b"function"], True), arguments)

    assert (parcel.arguments, parcel.blobs) == ([0, 1], {})
    assert list(parcel.buffers) == list(arguments)
    assert list(parcel.function_data) == [b"function"]


def test_large_data_travels_as_blobs_named_by_content() -> None:
    one, other = np.zeros(INLINE_LIMIT // 8), np.ones(INLINE_LIMIT // 8)

    parcels = [make_parcel(A_CALL, None, pack_arguments((array,), {})) for array in (one, one.copy(), other)]

    names = [tuple(parcel.blobs) for parcel in parcels]
    assert names[0] == names[1] != names[2]
    assert all(len(name) == 1 and name[0].startswith("b3-") for name in names)
    assert parcels[0].arguments == [0, names[0][0]]
    assert sum(map(len, parcels[0].buffers)) < 1000


def test_the_same_array_twice_in_one_call_travels_once() -> None:
    array = np.zeros(INLINE_LIMIT // 8)

    parcel = make_parcel(A_CALL, None, pack_arguments((array, array.copy(), array), {}))

    assert sum(len(blob) for blob in parcel.blobs.values()) == array.nbytes


def test_data_in_very_many_parts_travels() -> None:
    """A frame holds a limited number of buffers."""
    arguments = pack_arguments(([np.full(1100, i) for i in range(1200)],), {})

    parcel = make_parcel(A_CALL, None, arguments)

    assert len(parcel.buffers) < 100
    parts = [parcel.buffers[ref] if isinstance(ref, int) else parcel.blobs[ref] for ref in parcel.arguments]
    np.testing.assert_array_equal(opened(parts)[0][0][7], np.full(1100, 7))


def test_blobs_of_the_callers_come_along() -> None:
    parcel = make_parcel(A_CALL, None, [b"x"], blobs={"file-1": b"content"})

    assert parcel.blobs == {"file-1": b"content"}


def test_a_library_function_goes_by_reference() -> None:
    import json

    assert sum(map(len, pack_function(json.dumps).parts)) < 100
    assert isinstance(json.dumps, types.FunctionType)
