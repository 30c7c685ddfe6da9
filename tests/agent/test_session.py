"""Sessions, run as a worker runs them: requests in, replies and events out."""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fal_agent import pickling
from fal_agent.failures import OpeningError
from fal_agent.wire import Clear, Display, Execute, Message, Task
from fal_agent.worker.context import CURRENT_CALL, CallContext
from fal_agent.worker.session import Sessions

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("IPython")


class Notebook:
    """Speaks to one session as a notebook would, and keeps what it shows."""

    def __init__(self, tmp_path: Path) -> None:
        self.sessions = Sessions()
        self.shown: list[Any] = []
        self._outbox = str(tmp_path)

    def run(self, code: str, *, values: dict[str, Any] | None = None, session: str = "s", fresh: bool = False,
            **request: Any) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
        """Run a cell; give the reply, and the values that came back."""
        parts: list[Any] = [b""]
        names = {}
        for name, value in (values or {}).items():
            dumped = pickling.dump(value)
            names[name] = [len(parts), len(parts) + len(dumped), f"sent-{name}-{value!r:.50}"]
            parts += dumped
        message: dict[str, Any] = {
            "code": code, "filename": "<cell 1>", "first_line": 1, "source": code, "names": names, "held": {},
            "aliases": {}, "handles": [], "sharing": [], "shared": [], "farewells": {}, "deleted": [],
            "binds": [], "may_bind": [], "returns": True, "wanted": [],
            "lists": False, "resets": False, "exports": [], "reads": [], "unwatched": [],
            "installed": [], "limit": 1 << 20, "number": 1,
        }  # fmt: skip
        call = self._call()
        token = CURRENT_CALL.set(call)
        try:
            reply, buffers = self.sessions.run(session, {**message, **request}, parts, call, fresh=fresh)
        finally:
            CURRENT_CALL.reset(token)
            call.is_over = True
        reply = pickling.load(pickling.dump(reply))
        return reply, {name: pickling.load(buffers[slice(*place)]) for name, place in reply["names"].items()}

    def _call(self) -> CallContext:
        def send(message: Message, buffers: Any) -> None:
            if isinstance(message, Display):
                self.shown.append((message.kind, json.loads(bytes(buffers[0]))))
            elif isinstance(message, Clear):
                self.shown.append(("clear", message.wait))

        task = Task("cell", "cell", session="s", outbox=self._outbox)
        return CallContext(Execute("run", "template", [], task), task, send)

    def texts(self, kind: str) -> list[str]:
        """The plain texts that were shown as displays of one kind."""
        return [bundle["data"].get("text/plain", "") for found, bundle in self.shown if found == kind]


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Notebook]:
    """Put back what a session changes in its process: this one runs other tests too."""
    from IPython.core.interactiveshell import InteractiveShell

    main, folder = sys.modules["__main__"], str(Path.cwd())
    monkeypatch.setenv("MPLBACKEND", os.environ.get("MPLBACKEND", ""))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    kept = {cls: cls._instance for cls in InteractiveShell._walk_mro()}
    yield Notebook(tmp_path)
    for cls, instance in kept.items():
        cls._instance = instance
    sys.modules["__main__"] = main
    os.chdir(folder)


# ---------------------------------------------------------------- names


def test_names_go_in_are_used_and_come_back(notebook: Notebook) -> None:
    _, values = notebook.run("y = x + 1\nz = [y]", values={"x": 41})
    assert values == {"y": 42, "z": [42]}


def test_names_stay_for_the_next_cell(notebook: Notebook) -> None:
    notebook.run("x = 1\ndef f(): return x")
    notebook.run("x = 5")
    assert notebook.run("y = f()")[1] == {"y": 5}


def test_sessions_share_nothing_and_each_has_its_shell(notebook: Notebook) -> None:
    notebook.run("x = 1", session="a")
    notebook.run("x = 2", session="b")
    _, values = notebook.run("y = x, get_ipython().user_ns['x'], __import__('__main__').x", session="a")
    assert values == {"y": (1, 1, 1)}
    with pytest.raises(NameError):
        notebook.run("x", session="c")


def test_a_fresh_session_has_forgotten_everything(notebook: Notebook) -> None:
    notebook.run("x = 1")
    notebook.run("'x' in globals()", fresh=True)
    assert notebook.texts("result") == ["False"]


def test_names_bound_by_magics_and_exec_come_back_too(notebook: Notebook) -> None:
    _, values = notebook.run("%time a = 1\nexec('b = 2')\nc = !echo 3\n_hidden = 4")
    assert (values["a"], values["b"], list(values["c"])) == (1, 2, ["3"])
    assert "_hidden" not in values


def test_a_private_name_comes_back_if_the_cell_surely_binds_it(notebook: Notebook) -> None:
    assert notebook.run("_x = 4", binds=["_x"])[1] == {"_x": 4}


def test_a_name_bound_to_what_it_was_comes_back(notebook: Notebook) -> None:
    """The notebook may hold something else by now."""
    notebook.run("x = 5")
    assert notebook.run("x = 5", binds=["x"])[1] == {"x": 5}


def test_a_name_that_a_cell_did_not_bind_stays_away(notebook: Notebook) -> None:
    notebook.run("x = 5")
    assert notebook.run("if False:\n    x = 6")[1] == {}


def test_nothing_comes_back_when_not_asked(notebook: Notebook) -> None:
    reply, values = notebook.run("x = 5", returns=False, binds=["x"])
    assert values == {}
    assert "x" in reply["versions"]


def test_deletions_are_told_and_followed(notebook: Notebook) -> None:
    notebook.run("x = y = 1")
    assert notebook.run("del x")[0]["deleted"] == ["x"]
    notebook.run("", deleted=["y", "get_ipython"])
    with pytest.raises(NameError):
        notebook.run("y")
    notebook.run("get_ipython")


def test_functions_and_classes_of_a_cell_come_back_by_value(notebook: Notebook) -> None:
    _, values = notebook.run("class P:\n    n = 3\ndef f(a): return a + P.n\np = P()")
    values["f"].__globals__.update(values)  # it uses the names of where it arrives
    assert values["f"](1) == 4
    assert type(values["p"]).__module__ == "__main__"
    assert values["p"].n == 3


def test_an_instance_of_the_notebooks_class_comes_back_as_one(notebook: Notebook) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec("class Mine:\n    pass", namespace)
    _, values = notebook.run("m = Mine()", values={"Mine": namespace["Mine"]})
    assert type(values["m"]) is namespace["Mine"]


def test_dataclasses_and_plain_pickle_find_the_cells_module(notebook: Notebook) -> None:
    code = (
        "from dataclasses import dataclass\nimport pickle, typing\n@dataclass\nclass D:\n    n: 'int'\n"
        "ok = pickle.loads(pickle.dumps(D(1))) == D(1) and typing.get_type_hints(D) == {'n': int}\n"
    )
    assert notebook.run(code)[1]["ok"] is True


def test_modules_come_back_by_their_names(notebook: Notebook) -> None:
    reply, _ = notebook.run("import json as j, os.path\nimport xml.dom")
    assert reply["modules"] == {"j": "json", "os": "os", "xml": "xml"}


def test_what_cannot_be_pickled_or_is_large_stays_and_is_described(notebook: Notebook) -> None:
    reply, values = notebook.run(
        "import numpy as np\nbig = np.zeros((1000, 300))\ngen = (i for i in [])\n"
        "text = 'a' * 3_000_000\nsmall = 1"
    )
    assert values == {"small": 1}
    big = reply["handles"]["big"]
    assert (big["type"], big["size"], big["shape"], big["dtype"]) == (
        "numpy.ndarray",
        2_400_000,
        [1000, 300],
        "float64",
    )
    assert reply["handles"]["gen"]["type"] == "generator"
    assert len(reply["handles"]["text"]["repr"]) <= 2000


def test_a_table_that_stays_shows_its_first_rows(notebook: Notebook) -> None:
    reply, _ = notebook.run("import pandas as pd\nt = pd.DataFrame({'a': range(1000)})", limit=100)
    assert "<table" in reply["handles"]["t"]["html"]
    assert reply["handles"]["t"]["html"].count("<tr") == 6


def test_a_picture_that_stays_shows_a_small_copy(notebook: Notebook) -> None:
    pytest.importorskip("PIL")
    code = "from PIL import Image\npicture = Image.effect_noise((1200, 900), 90)"
    described = notebook.run(code, limit=1000)[0]["handles"]["picture"]
    assert described["html"].startswith('<img src="data:image/png;base64,')


def test_values_with_hostile_methods_are_described_all_the_same(notebook: Notebook) -> None:
    code = (
        "class Bad:\n"
        "    def __repr__(self): raise ValueError\n"
        "    def __reduce__(self): raise ValueError\n"
        "    def __getattr__(self, name): raise ValueError(name)\n"
        "b = Bad()"
    )
    described = notebook.run(code)[0]["handles"]["b"]
    assert described["repr"] == "<Bad whose repr raised ValueError>"


def test_values_are_fetched_without_running_anything(notebook: Notebook) -> None:
    notebook.run("big = list(range(1000))", limit=10)
    reply, values = notebook.run("", wanted=["big", "nothing"], limit=1 << 30)
    assert values == {"big": list(range(1000))}
    assert reply["missing"] == ["nothing"]


def test_tensors_stay_on_their_device_unless_fetched(notebook: Notebook) -> None:
    """The notebook's machine may have no such device, or not the library."""
    code = (
        "class Tensor:\n    device = 'cuda:0'\n    def cpu(self):\n        self = Tensor()\n"
        "        self.device = 'cpu'\n        return self\nt = Tensor()"
    )
    reply, _ = notebook.run(code)
    assert reply["handles"]["t"]["device"] == "cuda:0"
    assert notebook.run("", wanted=["t"])[1]["t"].device == "cpu"


def test_a_value_that_cannot_be_opened_is_named(notebook: Notebook) -> None:
    class Closed:
        def __reduce__(self) -> Any:
            return _refuse, ()

    with pytest.raises(OpeningError, match="'x' cannot be opened there: RuntimeError: no entry"):
        notebook.run("y = 1", values={"a": 1, "x": Closed()})
    with pytest.raises(NameError):
        notebook.run("a")


def _refuse() -> None:
    raise RuntimeError("no entry")


# ---------------------------------------------------------------- versions


def test_what_the_session_holds_need_not_travel(notebook: Notebook) -> None:
    first, _ = notebook.run("x.append(1)", values={"x": []})
    version = first["versions"]["x"]
    _, values = notebook.run("y = x", held={"x": version})
    assert values == {"y": [1]}


@pytest.mark.parametrize("change", ["x = 3", "del x"])
def test_a_cell_does_not_run_on_names_that_changed_meanwhile(notebook: Notebook, change: str) -> None:
    """Another notebook may share the session."""
    first, _ = notebook.run("", values={"x": 1})
    notebook.run(change)
    reply, values = notebook.run("ran = x", held={"x": first["versions"]["x"]})
    assert reply["stale"] == ["x"]
    assert values == {}
    assert notebook.run("'ran' in globals()")[0]["stale"] == []
    assert notebook.texts("result") == ["False"]


def test_a_session_that_was_started_anew_says_so(notebook: Notebook) -> None:
    first, _ = notebook.run("x = 1")
    held = {"x": first["versions"]["x"]}
    assert notebook.run("x", held=held, fresh=True)[0]["stale"] == ["x"]
    notebook.run("x = 1")
    assert notebook.run("x", held=held)[0]["stale"] == ["x"]


def test_a_failed_cells_names_are_taken_in_whatever_version(notebook: Notebook) -> None:
    notebook.run("x = 1")
    with pytest.raises(ZeroDivisionError):
        notebook.run("x = 2; 1/0")
    _, values = notebook.run("y = x", held={"x": "*"}, wanted=["x"])
    assert values == {"y": 2, "x": 2}


def test_what_came_along_is_not_opened_again_where_it_is_held(notebook: Notebook) -> None:
    first, _ = notebook.run("x.append(1)", values={"x": []})
    version = first["versions"]["x"]
    _, values = notebook.run("y = x", values={"x": []}, held={"x": version})
    assert values == {"y": [1]}


def test_an_alias_is_the_same_object(notebook: Notebook) -> None:
    first, _ = notebook.run("x = [1]")
    _, values = notebook.run("same = y is x", aliases={"y": ["x", first["versions"]["x"]]})
    assert values == {"same": True}


# ---------------------------------------------------------------- what a cell shows


def test_the_last_expression_is_shown_with_all_its_kinds(notebook: Notebook) -> None:
    notebook.run("import pandas as pd\n1\npd.DataFrame({'a': [1]})")
    [(kind, bundle)] = notebook.shown
    assert kind == "result"
    assert "<table" in bundle["data"]["text/html"]
    assert "a" in bundle["data"]["text/plain"]


def test_a_semicolon_hides_the_result(notebook: Notebook) -> None:
    notebook.run("1;")
    assert notebook.shown == []


def test_underscore_is_the_last_result_of_the_session(notebook: Notebook) -> None:
    notebook.run("20")
    notebook.run("_ + 1")
    assert notebook.texts("result") == ["20", "21"]


def test_displays_can_be_updated_and_cleared(notebook: Notebook) -> None:
    notebook.run(
        "from IPython.display import clear_output\nh = display(1, display_id='d')\nh.update(2)\n"
        "clear_output(wait=True)"
    )
    kinds = [kind for kind, _ in notebook.shown]
    assert kinds == ["display", "update", "clear"]
    assert notebook.shown[0][1]["transient"] == notebook.shown[1][1]["transient"] == {"display_id": "d"}
    assert notebook.shown[2][1] is True


@pytest.mark.parametrize("first", ["", "import matplotlib.pyplot as plt"])
def test_figures_are_shown_at_the_end_and_closed(notebook: Notebook, first: str) -> None:
    """Without being asked for; also in a second session, when matplotlib is there already."""
    notebook.run(first + "\n1", session=first)
    notebook.shown.clear()
    notebook.run(
        "import matplotlib.pyplot as plt\nfig = plt.figure(); plt.plot([1, 2]); print('drawn')\n'value'",
        session=first,
    )
    assert [kind for kind, _ in notebook.shown] == ["result", "display"]
    assert base64.b64decode(notebook.shown[1][1]["data"]["image/png"]).startswith(b"\x89PNG")
    assert notebook.run("n = len(plt.get_fignums())", session=first)[1] == {"n": 0}


def test_help_is_shown(notebook: Notebook) -> None:
    notebook.run("len?")
    assert "Return the number of items" in notebook.texts("page")[0]


def test_shell_lines_print_to_the_present_stdout(
    notebook: Notebook, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook.run("name = 'world'\n!echo hello {name}\nprint('after')")
    assert capsys.readouterr().out.split() == ["hello", "world", "after"]


def test_cell_magics_run_under_the_cell(notebook: Notebook, capfd: pytest.CaptureFixture[str]) -> None:
    notebook.run("%%bash\necho from bash")
    notebook.run("%%time\nx = 1\nx + 1")
    notebook.run("%matplotlib inline\n%timeit -n1 -r1 pass")
    out = capfd.readouterr().out
    assert "from bash" in out
    assert "Wall time" in out
    assert notebook.texts("result") == ["2"]


def test_a_host_whose_home_cannot_be_written_to_is_not_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "not" / "there"))

    _, values = Notebook(tmp_path).run("x = 1")

    assert values == {"x": 1}
    assert [str(warning.message) for warning in recwarn if "writable" in str(warning.message)] == []


def test_cd_lasts_but_leaves_other_sessions_alone(notebook: Notebook, tmp_path: Path) -> None:
    here = str(Path.cwd())
    notebook.run(f"%cd -q {tmp_path}", session="a")
    os.chdir(here)  # as the worker does before each call
    assert notebook.run("import os; d = os.getcwd()", session="a")[1]["d"] == str(tmp_path)
    os.chdir(here)
    assert notebook.run("import os; d = os.getcwd()", session="b")[1]["d"] == here


def test_modules_where_cd_led_can_be_imported(notebook: Notebook, tmp_path: Path) -> None:
    """Public notebooks clone a repository, `%cd` into it and import from it."""
    (tmp_path / "cloned_module.py").write_text("there = 5\n")
    notebook.run(f"%cd -q {tmp_path}")
    assert notebook.run("from cloned_module import there")[1] == {"there": 5}


def test_await_works_at_the_top_level(notebook: Notebook) -> None:
    _, values = notebook.run(
        "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 7\nx = await f()"
    )
    assert values["x"] == 7


def test_an_event_loop_runs_in_every_cell_as_in_a_kernel(notebook: Notebook) -> None:
    """Libraries make tasks in cells that do not await anything."""
    notebook.run("import asyncio\nasync def f(): return 7\ntask = asyncio.create_task(f())")
    assert notebook.run("y = await task")[1]["y"] == 7
    with pytest.raises(RuntimeError, match="running event loop"):
        notebook.run("c = f()\ntry: asyncio.run(c)\nfinally: c.close()")


def test_context_variables_outlive_their_cell(notebook: Notebook) -> None:
    """NumPy's print options and decimal's precision are such."""
    notebook.run("import decimal\ndecimal.getcontext().prec = 5")
    assert notebook.run("third = str(decimal.Decimal(1) / 3)")[1] == {"third": "0.33333"}
    notebook.run("await __import__('asyncio').sleep(0)\ndecimal.getcontext().prec = 3")
    assert notebook.run("third = str(decimal.Decimal(1) / 3)")[1] == {"third": "0.333"}


def test_what_a_cell_deletes_is_freed_while_it_runs(notebook: Notebook) -> None:
    """A model that is deleted must leave the GPU before the next one is loaded."""
    notebook.run("import weakref\nclass Model: pass\nmodel = Model()\nref = weakref.ref(model)")
    assert notebook.run("del model\nis_gone = ref() is None")[1] == {"is_gone": True}


def test_a_list_at_the_place_of_a_deleted_one_is_a_new_value(notebook: Notebook) -> None:
    notebook.run("items = [1]")
    assert notebook.run("del items\nitems = [2]")[1] == {"items": [2]}
    _, values = notebook.run("if len(items):\n    del items\n    items = [3]", may_bind=["items"])
    assert values == {"items": [3]}


def test_cells_have_the_numbers_of_the_notebook(notebook: Notebook) -> None:
    notebook.run("41", number=5)
    assert notebook.run("a = Out[5], In[5], _5, In[3]", number=7)[1] == {"a": (41, "41", 41, "")}


# ---------------------------------------------------------------- errors


def test_an_error_is_raised_and_the_names_bound_before_it_stay(notebook: Notebook, capsys: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        notebook.run("x = 1\n1/0\ny = 2")
    assert notebook.run("z = x, 'y' in globals()")[1] == {"z": (1, False), "x": 1}
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("magic", "code", "line", "text"),
    [
        ("", "x = 1\n1/0", 2, "1/0"),
        ("%%fal -r a\n", "x = 1\n1/0", 3, "1/0"),
        ("%%fal\n", "\n\n1/0", 4, "1/0"),
        ("%%fal\n", "!true\nawait g()", 3, "await g()"),
    ],
)
def test_tracebacks_name_the_lines_of_the_notebook(
    notebook: Notebook, magic: str, code: str, line: int, text: str
) -> None:
    notebook.run("async def g():\n    raise ZeroDivisionError", filename="<before>")
    with pytest.raises(ZeroDivisionError) as caught:
        notebook.run(code, source=magic + code, first_line=1 + magic.count("\n"), filename="<cell 7>")
    [frame] = [f for f in traceback.extract_tb(caught.value.__traceback__) if f.filename == "<cell 7>"]
    assert (frame.lineno, frame.line) == (line, text)


def test_a_function_of_an_earlier_cell_is_found_in_that_cell(notebook: Notebook) -> None:
    notebook.run("def f():\n    return 1/0\n", filename="<cell 1>")
    with pytest.raises(ZeroDivisionError) as caught:
        notebook.run("f()", filename="<cell 2>")
    frames = traceback.extract_tb(caught.value.__traceback__)[-2:]
    assert [(f.filename, f.lineno, f.line) for f in frames] == [
        ("<cell 2>", 1, "f()"),
        ("<cell 1>", 2, "return 1/0"),
    ]


def test_a_syntax_error_is_raised_with_the_notebooks_line(notebook: Notebook, capsys: Any) -> None:
    with pytest.raises(SyntaxError) as caught:
        notebook.run("x = 1\ny = = 2", source="%%fal\nx = 1\ny = = 2", first_line=2)
    assert (caught.value.lineno, caught.value.filename) == (3, "<cell 1>")
    assert capsys.readouterr() == ("", "")


def test_the_error_of_a_script_is_shown_as_in_a_kernel(notebook: Notebook, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("1/0\n")
    notebook.run(f"%run {tmp_path}/script.py")
    notebook.run("get_ipython().run_cell('1/0');")
    shown = [bundle for kind, bundle in notebook.shown if kind == "error"]
    assert [(bundle["data"]["ename"], bundle["metadata"]) for bundle in shown] == [
        ("ZeroDivisionError", {"own": False})
    ] * 2


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "import sys; sys.exit(3)"])
def test_leaving_is_an_error_and_the_session_goes_on(
    notebook: Notebook, code: str, recwarn: pytest.WarningsRecorder
) -> None:
    notebook.run("x = 1")
    with pytest.raises(SystemExit):
        notebook.run(code)
    assert not recwarn.list  # the notebook's own IPython says how to leave
    assert notebook.run("y = x")[1] == {"y": 1}


def test_exit_says_how_a_session_ends(notebook: Notebook, capsys: Any) -> None:
    notebook.run("exit")
    notebook.run("quit()")
    assert capsys.readouterr().err.count("%fal stop") == 2


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("try:\n    for i in iter(int, 1): pass\nfinally:\n    seen = 1", "for i in iter(int, 1): pass"),
        (
            "import asyncio\ntry:\n    await asyncio.sleep(60)\nfinally:\n    seen = 1",
            "await asyncio.sleep(60)",
        ),
    ],
)
def test_an_interrupt_stops_the_cell_where_it_is_and_keeps_the_session(
    notebook: Notebook, code: str, line: str
) -> None:
    notebook.run("x = 1")
    started = notebook.sessions._sessions["s"]._namespace["started"] = threading.Event()

    def strike() -> None:
        started.wait(20)
        time.sleep(0.2)  # so that the cell is where it waits
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=strike)
    thread.start()
    with pytest.raises(KeyboardInterrupt) as caught:
        notebook.run("started.set()\n" + code, filename="<c>")
    thread.join()
    assert line in [f.line for f in traceback.extract_tb(caught.value.__traceback__) if f.filename == "<c>"]
    assert notebook.run("y = x, seen")[1]["y"] == (1, 1)
