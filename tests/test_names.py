"""Names between a notebook and a session, with both ends real and nothing in between."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from fal_agent import pickling
from fal_agent.errors import FalSerializationError, FalServerlessError
from fal_agent.wire import Execute, Task
from fal_agent.worker.context import CallContext
from fal_agent.worker.session import Sessions
from fal_notebook.cells import analyse
from fal_notebook.handles import Handle
from fal_notebook.names import SessionNames

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fal_notebook.exchange import Request


_MAKES_MODULE = """
import sys as _sys, types as _types
only_there = _sys.modules['only_there'] = _types.ModuleType('only_there')
exec('class C: pass', only_there.__dict__)
"""


HOST: Any = SimpleNamespace(name="box")


class Brings:
    """Stands for what brings values."""

    def get(self, handle: Handle) -> str:
        return handle.name


class Pair:
    """A notebook and its session.

    Attributes:
        here: the notebook's namespace.
        travelled: names whose values went along with the last cell.
        came: what came back from it.
    """

    def __init__(self) -> None:
        self.here: dict[str, Any] = {}
        self.sessions = Sessions()
        self.names = SessionNames(HOST, "s", None)
        self.travelled: set[str] = set()
        self.came: dict[str, Any] = {}

    def run(
        self,
        code: str,
        *,
        returns: bool = True,
        in_background: bool = False,
        limit: int = 1 << 20,
        only_there: str = "",
    ) -> None:
        """Run a cell; `only_there` names a module that it makes and that the notebook lacks."""
        cell = analyse(code)
        for _ in range(2):
            request = self.names.request(cell, self.here, returns=returns, in_background=in_background)
            self.travelled = set(request.content["names"])
            try:
                reply, buffers = self._send(request, code, limit)
            except BaseException:
                self.names.note_failure(cell, request, self.here)
                raise
            if not reply["stale"]:
                module = sys.modules.pop(only_there, None)
                self.came = self.names.apply(reply, buffers, request, self.here)
                sys.modules.update({only_there: module} if module else {})
                return
            self.names.forget(reply["stale"])
        raise AssertionError(f"stale: {reply['stale']}")

    def there(self, expression: str) -> Any:
        """Look at the session without touching a name."""
        return eval(expression, self.sessions._sessions["s"]._namespace)

    def restart(self) -> None:
        self.sessions = Sessions()

    def _send(self, request: Request, code: str, limit: int) -> tuple[dict[str, Any], Any]:
        place = {"code": code, "filename": "<cell>", "first_line": 1, "source": code, "number": 1}
        place["limit"] = limit
        parts = [bytes(part) for part in (b"", *request.parts)]
        content = pickling.load(pickling.dump({**request.content, **place}))
        task = Task("cell", "cell", session="s")
        call = CallContext(Execute("run", "t", [], task), task, lambda _message, _buffers: None)
        reply, buffers = self.sessions.run("s", content, parts, call, fresh=False)
        return pickling.load(pickling.dump(reply)), [bytes(part) for part in buffers]


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "agg")
    main = sys.modules["__main__"]
    monkeypatch.delitem(sys.modules, "only_there", raising=False)
    kept = {cls: cls._instance for cls in InteractiveShell._walk_mro()}
    yield Pair()
    for cls, instance in kept.items():
        cls._instance = instance
    sys.modules["__main__"] = main


def test_only_names_that_the_cell_reads_travel(pair: Pair) -> None:
    pair.here.update(x=1, y=2, unpicklable=(i for i in []))
    pair.run("z = x")
    assert pair.travelled == {"x"}
    assert pair.here["z"] == 1


def test_an_unchanged_value_travels_once(pair: Pair) -> None:
    pair.here["x"] = [1, 2]
    pair.run("a = x")
    pair.run("b = x")
    assert pair.travelled == set()
    assert pair.there("b is a")


@pytest.mark.parametrize("code", ["x.append(3)", "x[0] = 7", "x = [9]", "x = x + [5]"])
def test_a_value_changed_here_travels_again(pair: Pair, code: str) -> None:
    """Also when it was changed in place, where nothing tells."""
    pair.here["x"] = [1, 2]
    pair.run("y = x")
    exec(code, {}, pair.here)
    pair.run("y = x")
    assert pair.there("x") == pair.here["x"] == pair.here["y"]


def test_a_value_that_came_back_does_not_travel_again(pair: Pair) -> None:
    pair.run("x = {'a': [1]}")
    pair.run("y = x")
    assert pair.travelled == set()
    pair.here["x"]["b"] = 2
    pair.run("z = x")
    assert "x" in pair.travelled
    assert pair.here["z"] == {"a": [1], "b": 2}
    assert pair.here["x"] is pair.here["y"] is pair.here["z"]


def test_a_value_changed_in_place_there_is_changed_here(pair: Pair) -> None:
    """It is the same list before and after, whatever other names or objects it is known under."""
    pair.here["x"] = x = [1]
    pair.here["holder"] = {"x": x}
    pair.run("x.append(2)")
    assert pair.here["x"] is x
    assert pair.here["holder"] == {"x": [1, 2]}


def test_functions_travel_again_when_what_they_use_changed(pair: Pair) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__", "step": 1}
    exec("def f(a):\n    return a + step", namespace)
    pair.here["f"] = namespace["f"]
    pair.run("y = f(1)")
    namespace["step"] = 10
    pair.run("y = f(1)")
    assert pair.here["y"] == 11


def test_a_session_that_was_started_anew_gets_what_it_lacks(pair: Pair) -> None:
    pair.here["x"] = [1]
    pair.run("y = x")
    pair.restart()
    pair.run("z = x + y")
    assert pair.here["z"] == [1, 1]
    assert pair.travelled == {"x", "y"}


def test_a_background_cell_takes_everything_along(pair: Pair) -> None:
    """Nobody would be there to send it again; what the session holds already is not opened, though."""
    pair.here["x"] = [1]
    pair.run("x.append(2)")
    pair.run("y = list(x)", in_background=True)
    assert (pair.travelled, pair.here["y"]) == ({"x"}, [1, 2])
    pair.restart()
    pair.run("y = list(x)", in_background=True)
    assert pair.here["y"] == [1, 2]


def test_what_a_background_cell_takes_along_may_change_meanwhile(pair: Pair) -> None:
    numpy = pytest.importorskip("numpy")
    pair.here["x"] = numpy.zeros(100_000)
    request = pair.names.request(analyse("x"), pair.here, returns=True, in_background=True)
    pair.here["x"][:] = 1
    assert pickling.load(request.parts).sum() == 0


# ---------------------------------------------------------------- errors


def test_names_bound_before_an_error_are_there_for_the_next_cell_and_come_back(pair: Pair) -> None:
    pair.here["x"] = 1
    with pytest.raises(ZeroDivisionError):
        pair.run("x = x + 1\nn = 5\n1/0\nm = 6")
    assert pair.here == {"x": 1}
    pair.run("y = x")
    assert pair.here == {"x": 2, "n": 5, "y": 2}


def test_a_name_changed_here_after_an_error_goes_before(pair: Pair) -> None:
    pair.here["x"] = 1
    with pytest.raises(ZeroDivisionError):
        pair.run("x = 2\n1/0")
    pair.here["x"] = 3
    pair.run("y = x")
    assert (pair.here["x"], pair.here["y"]) == (3, 3)


def test_what_travelled_with_a_failing_cell_does_not_travel_again(pair: Pair) -> None:
    pair.here["x"] = [1]
    with pytest.raises(ZeroDivisionError):
        pair.run("x\n1/0")
    pair.run("y = x")
    assert pair.travelled == set()


def test_an_error_and_a_restart_lose_nothing_of_the_notebook(pair: Pair) -> None:
    pair.here["x"] = 1
    with pytest.raises(ZeroDivisionError):
        pair.run("x = 2\n1/0")
    pair.restart()
    pair.run("y = x")
    assert (pair.here["x"], pair.here["y"]) == (1, 1)


def test_a_name_that_cannot_be_pickled_is_named(pair: Pair) -> None:
    pair.here["items"] = (i for i in [])
    with pytest.raises(FalSerializationError, match=r"'items'.*generator"):
        pair.run("list(items)")


def test_an_open_file_stays_where_it_is(pair: Pair) -> None:
    with Path("/dev/null").open() as file:
        pair.here["logs"] = {"file": file}
        with pytest.raises(FalSerializationError, match=r"'logs' cannot be pickled.*'/dev/null' is open"):
            pair.run("logs")
    pair.run("mine = open('/dev/null')")
    assert isinstance(pair.here["mine"], Handle)


def test_a_name_that_is_not_surely_needed_may_stay(pair: Pair) -> None:
    pair.here["items"] = (i for i in [])
    pair.run("def f():\n    return items\nitems = [1]\ny = f()")
    assert pair.here["y"] == [1]


def test_the_shells_own_names_stay(pair: Pair) -> None:
    pair.here.update(_=1, _12=2, In=[], Out={}, get_ipython=None, _i=3, exit=4)
    pair.run("a = _, get_ipython() is not None")
    assert pair.travelled == set()


# ---------------------------------------------------------------- what stays there


def test_a_large_value_stays_and_its_handle_means_the_value(pair: Pair) -> None:
    pair.run("x = list(range(1000))", limit=100)
    handle = pair.here["x"]
    assert isinstance(handle, Handle)
    assert handle.type == "list"
    pair.run("n = len(x)")
    assert pair.here["n"] == 1000
    assert pair.travelled == set()


def test_a_handle_under_another_name_is_the_same_value(pair: Pair) -> None:
    pair.run("x = list(range(1000))", limit=100)
    pair.here["y"] = pair.here["x"]
    pair.run("same = y is x")
    assert pair.here["same"] is True


def test_a_handle_on_something_that_is_gone_is_told(pair: Pair) -> None:
    pair.run("x = list(range(1000))", limit=100)
    old = pair.here["x"]
    pair.run("x = list(range(2000))", limit=100)
    pair.here["old"] = old
    with pytest.raises(AssertionError, match=r"stale: \['old'\]"):
        pair.run("old")


def test_another_name_of_a_handle_keeps_its_value(pair: Pair) -> None:
    pair.run("x = list(range(1000))", limit=100)
    pair.here["old"] = pair.here["x"]
    pair.run("x = list(range(2000))", limit=100)
    pair.run("sizes = len(old), len(x)")
    assert pair.here["sizes"] == (1000, 2000)


def test_a_handle_of_another_kernel_is_refused_with_what_to_do(pair: Pair) -> None:
    pair.here["x"] = Handle("other", "s", "x", version="v", described={"type": "list"}, keeper=None)
    with pytest.raises(FalServerlessError, match=r"'x' is a handle of another kernel.*on 'other'"):
        pair.run("x")


def test_a_handle_deleted_here_is_deleted_there(pair: Pair) -> None:
    """It is how memory over there is given back."""
    pair.run("x = list(range(1000))", limit=100)
    del pair.here["x"]
    pair.run("y = 'x' in globals()")
    assert pair.here["y"] is False


def test_a_name_deleted_there_is_deleted_here(pair: Pair) -> None:
    pair.here["x"] = 1
    pair.run("del x")
    assert "x" not in pair.here


def test_without_return_the_sessions_value_counts_until_the_notebook_changes_it(pair: Pair) -> None:
    pair.here["x"] = 1
    pair.run("x = 2\nz = 3", returns=False)
    assert pair.here == {"x": 1}
    pair.run("y = x, z")
    assert pair.here["y"] == (2, 3)
    pair.here["x"] = 5
    pair.run("y = x")
    assert pair.here["y"] == 5


def test_modules_are_imported_here_or_told_about(pair: Pair) -> None:
    pair.run("import json as j")
    assert pair.here["j"].__name__ == "json"
    pair.run(_MAKES_MODULE + "import only_there", only_there="only_there")
    handle = pair.here["only_there"]
    assert isinstance(handle, Handle)
    assert "cannot be imported here" in handle.preview
    with pytest.raises(AttributeError, match="stayed on 'box'"):
        _ = handle.something
    pair.run("t = only_there.__name__")
    assert pair.here["t"] == "only_there"


def test_a_value_whose_class_is_missing_here_becomes_a_handle(pair: Pair) -> None:
    pair.run(_MAKES_MODULE + "x = only_there.C()\ndel only_there", only_there="only_there")
    handle = pair.here["x"]
    assert isinstance(handle, Handle)
    assert handle.type == "only_there.C"
    assert "No module named 'only_there'" in handle.preview
    pair.run("t = type(x).__name__")
    assert pair.here["t"] == "C"


def test_a_handle_shows_what_it_stands_for() -> None:
    described = {
        "type": "numpy.ndarray", "size": 8_000_000, "shape": [1000, 1000], "dtype": "float64", "device": None,
        "repr": "array([[0., <b>", "html": None,
    }  # fmt: skip
    handle = Handle("box", "s", "x", version="v", described=described, keeper=Brings())
    assert repr(handle) == "<x on box: numpy.ndarray, 1000 x 1000, float64, 8 MB; x.get() brings it here>"
    assert "array([[0., &lt;b&gt;" in handle._repr_html_()
    assert handle.get() == "x"
    assert repr(pickling.load(pickling.dump(handle))) == repr(handle)
