"""A failure on a host becomes an exception that looks as if it had happened here."""

from __future__ import annotations

import inspect
import json
import linecache
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from fal_agent import errors, failures, pickling
from fal_agent.wire import Failure
from fal_notebook.rebuild import exception_from, make_traceback, reraise


def run_cell(source: str, filename: str = "<cell 3>", **names: Any) -> BaseException:
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    try:
        exec(compile(source, filename, "exec"), {"__name__": "cell_module", **names})
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def travelled(error: BaseException, host: str = "gpu-box") -> BaseException:
    """The error after the way over the wire."""
    kind, message, detail, parts = failures.describe(error, hide=[str(Path(__file__).parent)])
    failure = Failure("r1", kind, message, detail=json.loads(json.dumps(detail)))
    return exception_from(failure, [bytes(part) for part in parts], host)


def failure(kind: str, message: str = "it went wrong", **detail: Any) -> BaseException:
    return exception_from(Failure("r1", kind, message, detail=detail), [], "gpu-box")


class Custom(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"code {code}")
        self.code, self.reason = code, reason


# ---------------------------------------------------------------- the user's errors


def test_type_arguments_and_attributes_come_back() -> None:
    error = travelled(Custom(7, "full"))

    assert type(error) is Custom
    assert (error.args, error.code, error.reason) == (("code 7",), 7, "full")


def test_causes_contexts_and_notes_come_back() -> None:
    original = run_cell(
        "try:\n    {}['a']\nexcept KeyError as key:\n"
        "    error = ValueError('v')\n    error.__notes__ = ['row 7']\n"
        "    raise error from key"
    )

    error = travelled(original)

    assert (type(error), type(error.__cause__), error.__suppress_context__) == (ValueError, KeyError, True)
    assert error.__notes__ == ["row 7"]  # type: ignore[attr-defined]
    assert error.__cause__ is not None
    assert error.__cause__.__traceback__ is not None


def test_the_traceback_shows_the_remote_frames_with_their_lines() -> None:
    error = travelled(run_cell("def outer():\n    return inner()\n\ndef inner():\n    return 1 / 0\nouter()"))

    shown = traceback.extract_tb(error.__traceback__)

    assert [(frame.name, frame.lineno, frame.line) for frame in shown] == [
        ("<module>", 6, "outer()"),
        ("outer", 2, "return inner()"),
        ("inner", 5, "return 1 / 0"),
    ]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.11 marks the place in the line")
def test_the_traceback_marks_the_place_in_the_line() -> None:
    original = run_cell("x = 0\ny = 1 + (1 / x) + 2")
    expected = "".join(traceback.format_exception(original)).splitlines()[-3:]

    shown = "".join(traceback.format_exception(travelled(original))).splitlines()[-3:]

    assert "~~^~~" in expected[1]
    assert shown == expected


def test_the_source_of_a_cell_that_only_the_host_has_is_shown() -> None:
    kind, message, detail, parts = failures.describe(run_cell("raise ValueError('x')", "<session cell 12>"))
    del linecache.cache["<session cell 12>"]

    error = exception_from(Failure("r", kind, message, detail=detail), parts, "gpu-box")

    assert "raise ValueError('x')" in "".join(traceback.format_exception(error))


def test_the_lines_stay_when_python_checks_its_cache() -> None:
    """`traceback` drops lines of files that it does not find on disk."""
    frame = {
        "filename": "/nowhere/on/this/machine.py",
        "lineno": 2,
        "name": "f",
        "line": "b",
        "around": [1, "a\nb\n"],
    }
    made = make_traceback([frame], {}, "gpu-box")

    linecache.checkcache()

    assert traceback.extract_tb(made)[0].line == "b"


def test_a_file_that_is_another_here_is_shown_under_the_hosts_name(tmp_path: Path) -> None:
    """Else the wrong line would be shown as the one that failed."""
    path = tmp_path / "train.py"
    path.write_text("here = 1\nhere = 2\n")
    frame = {"filename": str(path), "lineno": 2, "name": "f", "line": "there = 2"}

    made = make_traceback([frame], {str(path): "there = 1\nthere = 2\n"}, "gpu-box")
    shown = traceback.extract_tb(made)[0]

    assert (shown.filename, shown.line) == (f"gpu-box:{path}", "there = 2")
    assert linecache.getline(str(path), 2) == "here = 2\n"


def test_a_file_that_is_the_same_here_is_shown_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "same.py"
    path.write_text("a = 1\n")

    made = make_traceback(
        [{"filename": str(path), "lineno": 1, "name": "f", "line": "a = 1"}],
        {str(path): "a = 1\n"},
        "gpu-box",
    )

    assert traceback.extract_tb(made)[0].filename == str(path)


def test_frames_left_out_are_mentioned() -> None:
    error = travelled(run_cell("def f():\n    return f()\nf()"))

    assert type(error) is RecursionError
    assert "frames in the middle" in error.__notes__[-1]  # type: ignore[attr-defined]


def test_a_class_that_is_missing_here_gets_a_stand_in() -> None:
    source = (
        "import pickle, sys, types\nfrom fal_agent import failures\n"
        "module = types.ModuleType('only_there'); sys.modules['only_there'] = module\n"
        "exec('class Overheated(Exception): pass', vars(module))\n"
        "try: raise module.Overheated('90 degrees')\n"
        "except Exception as error: kind, message, detail, parts = failures.describe(error)\n"
        "sys.stdout.buffer.write(pickle.dumps((kind, message, detail, [bytes(p) for p in parts])))"
    )
    agent = Path(failures.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        timeout=60,
        check=True,
        env={"PYTHONPATH": str(agent)},
    )
    kind, message, detail, parts = pickling.load([done.stdout])

    error = exception_from(Failure("r", kind, message, detail=detail), parts, "gpu-box")

    assert type(error) is errors.UserFunctionException
    assert "Overheated: 90 degrees" in str(error)
    assert "'gpu-box'" in str(error)
    assert type(error.__cause__).__name__ == "Overheated"
    assert type(error.__cause__).__module__ == "only_there"
    assert str(error.__cause__) == "90 degrees"


def test_an_interrupt_comes_back_as_one() -> None:
    assert type(travelled(KeyboardInterrupt())) is KeyboardInterrupt


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.11 has exception groups")
def test_a_group_comes_back_with_the_tracebacks_of_its_members() -> None:
    original = run_cell(
        "found = []\nfor step in (lambda: 1 / 0, lambda: {}['a']):\n    try:\n        step()\n"
        "    except Exception as error:\n        found.append(error)\nraise ExceptionGroup('steps', found)"
    )

    error = travelled(original)

    assert [type(member) for member in error.exceptions] == [ZeroDivisionError, KeyError]  # type: ignore[attr-defined]
    assert all(member.__traceback__ is not None for member in error.exceptions)  # type: ignore[attr-defined]


def test_a_missing_module_in_the_users_code_comes_with_the_fix() -> None:
    error = travelled(run_cell("import no_such_package.sub"))

    assert type(error) is ModuleNotFoundError
    assert 'requirements=["no-such-package"]' in error.__notes__[-1]  # type: ignore[attr-defined]


def test_raising_again_does_not_lengthen_the_traceback() -> None:
    """A future's result may be asked for many times."""
    error = travelled(run_cell("1 / 0"))
    pristine = error.__traceback__
    lengths = []
    for _ in range(3):
        try:
            reraise(error, pristine)
        except ZeroDivisionError as caught:
            lengths.append(len(traceback.extract_tb(caught.__traceback__)))

    assert len(set(lengths)) == 1


LONG_CELL = """import math
import json
from pathlib import Path

K = 2
class Point:
    def __init__(self, x): self.x = x

def ratio(p):
    # a comment
    return K / p.x

def score(p):
    values = [1, 2]
    return [ratio(p) for value in values]

score(Point(0))
"""


@pytest.mark.parametrize("name", ["<session cell 4>", "/tmp/ipykernel_1/1234.py", "/srv/app/scoring.py"])
def test_ipython_shows_the_remote_lines(name: str) -> None:
    """Its traceback reads bytecode and sources more closely than Python's own."""
    original = run_cell(LONG_CELL, name)
    expected = [line for line in in_ipython(original) if "def run_cell" not in line and "exec(" not in line]

    shown = in_ipython(travelled(original))

    assert "---> 17 score(Point(0))" in shown
    assert "---> 11     return K / p.x" in shown
    assert source_lines(shown) == source_lines(expected)[-len(source_lines(shown)) :]


def source_lines(shown: list[str]) -> list[str]:
    return [line for line in shown if re.match(r"(-+> | +)\d+ ", line)]


def test_ipython_shows_lines_of_libraries_that_only_the_host_has() -> None:
    """There the file is known around the place alone."""
    source = "\n" * 300 + "def load(path):\n    size = 0\n    return 1 / size\n" + "\n" * 20
    name = "/opt/host/site-packages/library.py"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    space: dict[str, Any] = {}
    exec(compile(source, name, "exec"), space)
    kind, message, detail, parts = failures.describe(run_cell("load('x')", "<cell 99>", load=space["load"]))
    del linecache.cache[name]

    error = exception_from(Failure("r", kind, message, detail=detail), parts, "gpu-box")

    assert "--> 303     return 1 / size" in in_ipython(error)
    assert "    return 1 / size" in "".join(traceback.format_exception(error)).splitlines()


def in_ipython(error: BaseException) -> list[str]:
    """The lines of IPython's traceback, without colours."""
    ultratb = pytest.importorskip("IPython.core.ultratb")
    coloured = ultratb.VerboseTB().text(type(error), error, error.__traceback__)
    return re.sub(r"\x1b\[[0-9;]*m", "", coloured).splitlines()


# ---------------------------------------------------------------- other failures


@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        ("serialization", errors.FalSerializationError),
        ("deserialization", errors.FalServerlessError),
        ("missing", errors.FalMissingDependencyError),
        ("environment", errors.EnvironmentBuildError),
        ("requirement", errors.RequirementError),
        ("resources", errors.ResourceError),
        ("python", errors.FalServerlessError),
        ("timeout", errors.CallTimeoutError),
        ("cancelled", errors.CallCancelledError),
        ("lost", errors.WorkerLostError),
        ("link", errors.LinkLostError),
        ("agent", errors.FalServerlessError),
        ("a kind of a later version", errors.FalServerlessError),
    ],
)
def test_every_kind_has_its_error_which_names_the_host(kind: str, cls: type[BaseException]) -> None:
    error = failure(kind, module="torch")

    assert type(error) is cls
    assert "'gpu-box'" in str(error)


def test_every_kind_that_the_wire_knows_is_mapped() -> None:
    """A kind without an error of its own would lose its meaning."""
    from fal_notebook import rebuild

    known = {line.split()[0] for line in inspect.getdoc(Failure).splitlines() if line.startswith("    ")}  # type: ignore[union-attr]
    known -= {"user", "interrupted"}

    assert known
    assert known <= set(rebuild._KINDS)


def test_a_host_that_is_named_already_is_not_named_again() -> None:
    assert str(failure("link", "the connection to 'gpu-box' broke")) == "the connection to 'gpu-box' broke"


def test_a_missing_module_is_named_with_the_fix_and_its_uses() -> None:
    message = str(failure("missing", module="torch.nn", names=["Linear", "Module"]))

    assert "'torch.nn'" in message
    assert "Linear, Module" in message
    assert 'requirements=["torch"]' in message
    assert "-r torch" in message


def test_a_missing_module_gets_the_name_of_its_distribution() -> None:
    """`import PIL` is not installed by that name."""
    assert 'requirements=["PyYAML"]' in str(failure("missing", module="yaml")) or not _is_installed("yaml")
    assert 'requirements=["python-dateutil"]' in str(failure("missing", module="dateutil"))


def _is_installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def test_a_missing_module_of_the_users_own_gets_another_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_tools.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("my_tools")

    try:
        assert 'local_python_modules=["my_tools"]' in str(failure("missing", module="my_tools"))
    finally:
        del sys.modules["my_tools"]


def test_a_worker_killed_by_sigkill_suggests_memory() -> None:
    error = failure("lost", "the worker process was killed by SIGKILL", exit_status=-9)

    assert isinstance(error, errors.WorkerLostError)
    assert error.exit_status == -9
    assert "memory" in str(error)
    assert "machine_type" in str(error)


def test_the_log_of_a_failed_build_comes_along() -> None:
    error = failure("environment", "no solution found", log="uv says no")

    assert isinstance(error, errors.EnvironmentBuildError)
    assert error.log == "uv says no"
