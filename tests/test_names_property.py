"""Whatever cells do to names, here and there by turns, leaves what plain execution would leave."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import fal_notebook
from fal_agent import pickling
from fal_notebook.cells import analyse
from fal_notebook.names import SessionNames

if TYPE_CHECKING:
    from collections.abc import Iterator

_THERE = """
import pickle, sys
from fal_agent import pickling
from fal_agent.wire import Execute, Task
from fal_agent.worker.context import CallContext
from fal_agent.worker.session import Sessions

sessions, answers = Sessions(), sys.stdout.buffer
sys.stdout = sys.stderr
task = Task("cell", "cell", session="s")
while True:
    session, content, parts = pickle.load(sys.stdin.buffer)
    call = CallContext(Execute("run", "t", [], task), task, lambda _message, _buffers: None)
    try:
        reply, buffers = sessions.run(session, content, parts, call, fresh=False)
        answer = reply, [bytes(part) for part in buffers], None
    except Exception as error:
        answer = None, [], f"{type(error).__name__}: {error}"
    pickle.dump(answer, answers)
    answers.flush()
"""


class There:
    """A process with sessions in it."""

    def __init__(self, folder: Path) -> None:
        packages = [str(Path(module.__file__ or "").parents[1]) for module in (pickling, fal_notebook)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _THERE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONPATH": ":".join(packages), "IPYTHONDIR": str(folder), "HOME": str(folder)},
        )
        self.sessions = 0

    def ask(self, session: str, content: dict[str, Any], parts: list[bytes]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((session, content, parts), self._process.stdin)
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[There]:
    process = There(tmp_path_factory.mktemp("there"))
    yield process
    process.close()


class Notebook:
    """Cells of a notebook that run here and in a session there."""

    def __init__(self, there: There) -> None:
        there.sessions += 1
        self.there, self.session = there, f"s{there.sessions}"
        self.names = SessionNames(SimpleNamespace(name="box"), self.session, None)
        self.here: dict[str, Any] = {"__name__": "__main__"}

    def run(self, code: str, *, remotely: bool) -> str | None:
        """Run a cell; give the error that it ended with."""
        if not remotely:
            return _run_plainly(code, self.here)
        cell = analyse(code)
        for _ in range(2):
            request = self.names.request(cell, self.here, returns=True)
            reply, buffers, error = self._send(request, code)
            if error is not None:
                self.names.note_failure(cell, request, self.here)
                owed = self.names.request_owed(self.here)
                reply, buffers, _ = self._send(owed, "")
                assert not reply["stale"]
                self.names.apply(reply, buffers, owed, self.here)
                return str(error)
            if not reply["stale"]:
                self.names.apply(reply, buffers, request, self.here)
                return None
            self.names.forget(reply["stale"])
        raise AssertionError(f"stale: {reply['stale']}")

    def _send(self, request: Any, code: str) -> Any:
        place = {"code": code, "filename": "<cell>", "first_line": 1, "source": code, "number": 1}
        content = {**request.content, **place, "limit": 1 << 20}
        return self.there.ask(self.session, content, [b"", *map(bytes, request.parts)])


def _run_plainly(code: str, namespace: dict[str, Any]) -> str | None:
    try:
        exec(compile(code, "<cell>", "exec"), namespace)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _seen(namespace: dict[str, Any]) -> str:
    """What a notebook shows of its names: values, and which of them that can change are the same object."""
    seen: dict[int, str] = {}
    kept: list[Any] = []  # or another object could get the place of one that was seen

    def show(value: Any) -> str:
        if isinstance(value, (int, str, type(None))):
            return repr(value)
        if isinstance(value, tuple):
            return f"({', '.join(map(show, value))})"
        if id(value) in seen:
            return seen[id(value)]
        seen[id(value)] = f"#{len(seen)}"
        kept.append(value)
        own = seen[id(value)]
        if isinstance(value, dict):
            return f"{own}{{{', '.join(f'{show(k)}: {show(v)}' for k, v in value.items())}}}"
        if isinstance(value, list):
            return f"{own}[{', '.join(map(show, value))}]"
        if isinstance(value, type):
            public = {k: v for k, v in vars(value).items() if not k.startswith("__") and not callable(v)}
            return f"{own}class {value.__name__} {show(public)}"
        if callable(value):
            return f"{own}function {value.__name__}"
        return f"{own}{show(type(value))} {show(vars(value))}"

    return "\n".join(f"{name} = {show(namespace[name])}" for name in sorted(namespace) if name[:1] != "_")


SCALE = int(os.environ.get("FAL_TEST_SCALE", "1"))
NAMES = st.sampled_from(["a", "b", "c"])
NUMBERS = st.integers(0, 9)
_CLASS = """
class P:
    n = {n}
    def __init__(self, v): self.v = v
    def up(self):
        P.n += 1
        self.v = [self.v, {y}]
        return self
"""
_CLOSURE = """
def make(n={n}):
    kept = [n]
    def add():
        nonlocal n
        n += 1
        kept.append(n)
        return kept
    return add
"""
_CELLS = [
    "{x} = {n}",
    "{x} = [{n}]",
    "{x} = [{n}, [{m}]]",
    "{x} = {{'k': {n}}}",
    "{x} = {y}",
    "{x} = [{y}, {y}]",
    "{x} = ({y}, {n})",
    "{x} = {{'y': {y}}}",
    "{x}.append({n})",
    "{x}.append({y})",
    "{x}[0] = {n}",
    "{x}['k'] = {y}",
    "{x}[-1].append({n})",
    "{x}[0].n += 1",
    "{x} += [{n}]",
    "{x}.clear()",
    "del {x}",
    "del {x}[0]",
    "def f(v=None): return ({x}, v)",
    "def f(v=None):\n    {x}.append({n})\n    return v",
    "def f(v=None):\n    global {x}\n    {x} = [{n}, v]",
    "{x} = f({y})",
    "f({n})",
    "g = f",
    "{x} = g()",
    _CLASS,
    "{x} = P({y})",
    "{x} = P([{n}])",
    "{x}.up()",
    "{x}.v = {y}",
    "P.n = {n}",
    "{x}.v.append({n})",
    "{x} = isinstance({y}, P) and P.n",
    "{x} = type({y}) is P",
    _CLOSURE,
    "add = make({n})",
    "{x} = add()",
    "{x} = {y}.append({n})\n1/0",
    "{x} = [{n}]; {y}.append({x}); raise ValueError({n})",
]


@st.composite
def cells(draw: st.DrawFn) -> tuple[str, bool]:
    template = draw(st.sampled_from(_CELLS))
    code = template.format(x=draw(NAMES), y=draw(NAMES), n=draw(NUMBERS), m=draw(NUMBERS))
    return code, draw(st.booleans())


@settings(max_examples=20 * SCALE, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(cells(), min_size=2, max_size=14))
def test_cells_here_and_there_leave_what_plain_cells_leave(
    there: There, steps: list[tuple[str, bool]]
) -> None:
    plain: dict[str, Any] = {"__name__": "__main__"}
    notebook = Notebook(there)
    for code, remotely in [("a, b, c = [1], [2], {}", False), *steps]:
        note(f"{'there' if remotely else 'here'}: {code}")
        expected = _run_plainly(code, plain)
        assert notebook.run(code, remotely=remotely) == expected, code
        assert _seen(notebook.here) == _seen(plain), code
