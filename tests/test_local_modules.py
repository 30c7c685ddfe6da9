"""The user's own modules travel with what uses them, and edits to their files are used at the next call."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.notebook import Notebook, call_elsewhere

from fal_agent import pickling
from fal_notebook import local_modules
from fal_notebook.payload import pack_arguments, pack_function

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def notebook() -> Iterator[Notebook]:
    notebook = Notebook()
    yield notebook
    notebook.close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The notebook's folder, with its modules importable as in a kernel."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]
    importlib.invalidate_caches()


def write(path: Path, text: str) -> None:
    """Write a file with a modification time of its own."""
    moment = path.stat().st_mtime_ns + 2_000_000_000 if path.exists() else None
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text)
    if moment is not None:
        os.utime(path, ns=(moment, moment))


# ---------------------------------------------------------------- which modules are local


def test_modules_in_the_notebooks_folder_are_local(folder: Path) -> None:
    write(folder / "near.py", "")
    write(folder / "package" / "__init__.py", "")
    write(folder / "package" / "part.py", "")
    importlib.import_module("near")
    importlib.import_module("package.part")

    assert {"near", "package"} <= set(local_modules.local_names())
    assert "package.part" not in local_modules.local_names()


def test_our_own_packages_and_main_are_never_local(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever works on this very library runs it from its checkout."""
    monkeypatch.chdir("/")

    assert not {"fal_notebook", "fal_agent", "__main__"} & set(local_modules.local_names())


@pytest.mark.parametrize("inside", [".venv/lib/python3.11/site-packages", "env/lib/other"])
def test_virtual_environments_in_the_folder_are_not_local(folder: Path, inside: str) -> None:
    (folder / inside).mkdir(parents=True)
    write(folder / inside.partition("/")[0] / "pyvenv.cfg", "")

    assert not local_modules.is_own_file(str(folder / inside / "library.py"))
    assert local_modules.is_own_file(str(folder / "mine.py"))


@pytest.mark.parametrize("name", ["stdlib", "purelib"])
def test_libraries_are_not_local(name: str) -> None:
    assert not local_modules.is_own_file(str(Path(sysconfig.get_paths()[name]) / "library.py"))


def test_compiled_modules_are_not_local(folder: Path) -> None:
    assert not local_modules.is_own_file(str(folder / "quick.cpython-311-x86_64-linux-gnu.so"))


@pytest.mark.parametrize(
    ("value", "message"),
    [("tools", "not 'tools'"), (("tools",), "tools"), (["tools", 3], "item 1 is 3"), (None, "None")],
)
def test_names_must_be_a_list_of_strings(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        local_modules.check_names(value)


def test_a_name_that_cannot_be_imported_is_refused(notebook: Notebook) -> None:
    notebook.run("def f(): ...")

    with pytest.raises(ValueError, match="names 'no_such_module_at_all'"):
        pack_function(notebook["f"], local_modules=["no_such_module_at_all"])


# ---------------------------------------------------------------- they travel


def test_a_function_of_a_local_module_travels(folder: Path) -> None:
    write(folder / "helpers.py", "BASE = 10\ndef inner(x): return x + BASE\ndef add(x): return inner(x)\n")

    assert call_elsewhere(pack_function(importlib.import_module("helpers").add), 1) == 11


def test_a_local_function_that_a_cell_imported_travels(folder: Path, notebook: Notebook) -> None:
    write(folder / "helpers.py", "BASE = 10\ndef add(x): return x + BASE\n")
    notebook.run("from helpers import add\ndef f(x): return add(x) * 2")

    assert call_elsewhere(pack_function(notebook["f"]), 1) == 22


def test_a_local_module_that_a_cell_imported_travels(folder: Path, notebook: Notebook) -> None:
    """With what is used of it, directly or by its own functions; the rest may be impossible to pickle."""
    write(
        folder / "helpers.py",
        "import sqlite3\nconnection = sqlite3.connect(':memory:')\nBASE = 10\n"
        "def inner(x): return x + BASE\ndef add(x): return inner(x)\n",
    )
    notebook.run("import helpers\ndef f(x): return helpers.add(x)")

    assert call_elsewhere(pack_function(notebook["f"]), 1) == 11


def test_a_local_module_imported_in_the_function_travels(folder: Path, notebook: Notebook) -> None:
    write(folder / "helpers.py", "def add(x): return x + 10\n")
    write(folder / "package" / "__init__.py", "")
    write(folder / "package" / "part.py", "def double(x): return x * 2\n")
    notebook.run(
        "def f(x):\n    import helpers\n    from package.part import double\n"
        "    return double(helpers.add(x))"
    )

    assert call_elsewhere(pack_function(notebook["f"]), 1) == 22


def test_an_instance_of_a_local_class_travels(folder: Path, notebook: Notebook) -> None:
    write(
        folder / "shapes.py",
        "class Square:\n    def __init__(self, a): self.a = a\n    def area(self): return self.a**2\n",
    )
    notebook.run("import shapes\ndef f(data):\n    import pickle\n    return pickle.loads(data)[0][0].area()")
    parts = pack_arguments((notebook["shapes"].Square(3),), {})

    assert call_elsewhere(pack_function(notebook["f"]), bytes(parts[0])) == 9


def test_a_module_elsewhere_travels_when_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notebook: Notebook
) -> None:
    write(tmp_path / "elsewhere" / "far_tools.py", "def add(x): return x + 100\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    notebook.run("import far_tools\ndef f(x): return far_tools.add(x)")
    try:
        assert call_elsewhere(pack_function(notebook["f"], local_modules=["far_tools"]), 1) == 101
    finally:
        del sys.modules["far_tools"]


def test_the_functions_own_module_travels_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script may be started from another folder."""
    write(tmp_path / "elsewhere" / "own_module.py", "K = 3\ndef f(x): return x * K\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    try:
        assert call_elsewhere(pack_function(importlib.import_module("own_module").f), 2) == 6
    finally:
        del sys.modules["own_module"]


def test_state_set_in_the_notebook_travels(folder: Path, notebook: Notebook) -> None:
    """What is in memory now counts, not what the file said."""
    write(folder / "settings.py", "LEVEL = 1\ndef level(): return LEVEL\n")
    notebook.run("import settings\ndef f(): return settings.level(), settings.LEVEL")
    assert call_elsewhere(pack_function(notebook["f"])) == (1, 1)

    notebook["settings"].LEVEL = 5

    assert call_elsewhere(pack_function(notebook["f"])) == (5, 5)


# ---------------------------------------------------------------- edits


@pytest.mark.parametrize(
    "cell",
    [
        "import helpers\ndef f(): return helpers.value()",
        "from helpers import value\ndef f(): return value()",
        "def f():\n    import helpers\n    return helpers.value()",
        "from helpers import Thing\ndef f(): return Thing().value()",
    ],
)
def test_an_edit_is_used_at_the_next_call(folder: Path, notebook: Notebook, cell: str) -> None:
    text = "def value(): return 1\nclass Thing:\n    def value(self): return 1\n"
    write(folder / "helpers.py", text)
    notebook.run(cell)
    assert call_elsewhere(pack_function(notebook["f"])) == 1

    write(folder / "helpers.py", text.replace("1", "2"))

    assert call_elsewhere(pack_function(notebook["f"])) == 2


def test_an_edit_to_what_a_local_module_imports_is_used(folder: Path, notebook: Notebook) -> None:
    write(folder / "deep.py", "def value(): return 1\n")
    write(folder / "helpers.py", "from deep import value\ndef outer(): return value()\n")
    notebook.run("from helpers import outer\ndef f(): return outer()")
    assert call_elsewhere(pack_function(notebook["f"])) == 1

    write(folder / "deep.py", "def value(): return 2\n")

    assert call_elsewhere(pack_function(notebook["f"])) == 2


def test_an_edit_before_the_first_call_is_used(
    folder: Path, notebook: Notebook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python notes beside the bytecode which source it compiled."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    write(folder / "helpers.py", "def value(): return 1\n")
    notebook.run("from helpers import value\ndef f(): return value()")

    write(folder / "helpers.py", "def value(): return 2\n")

    assert call_elsewhere(pack_function(notebook["f"])) == 2


def test_an_edit_that_cannot_be_compiled_is_shown_with_its_file(folder: Path, notebook: Notebook) -> None:
    write(folder / "helpers.py", "def value(): return 1\n")
    notebook.run("from helpers import value\ndef f(): return value()")
    pack_function(notebook["f"])
    write(folder / "helpers.py", "def value( return 2\n")

    for _ in range(2):  # as long as it is so
        with pytest.raises(SyntaxError) as caught:
            pack_function(notebook["f"])
        assert Path(str(caught.value.filename)).name == "helpers.py"

    write(folder / "helpers.py", "def value(): return 3\n")
    assert call_elsewhere(pack_function(notebook["f"])) == 3


def test_an_untouched_module_is_not_loaded_again(folder: Path, notebook: Notebook) -> None:
    write(folder / "counting.py", "import builtins\nloads = getattr(builtins, '_fal_loads', 0) + 1\n"
          "builtins._fal_loads = loads\ndef value(): return 1\n")  # fmt: skip
    notebook.run("from counting import value\ndef f(): return value()")
    try:
        for number in range(3):
            notebook.run(f"K = {number}\ndef g(): return value() + K")
            pack_function(notebook["f"])
            pack_function(notebook["g"])

        assert sys.modules["counting"].loads == 1
    finally:
        import builtins

        del builtins._fal_loads  # type: ignore[attr-defined]


def test_a_file_that_is_gone_leaves_its_module_as_it_is(folder: Path, notebook: Notebook) -> None:
    write(folder / "helpers.py", "def value(): return 1\n")
    notebook.run("from helpers import value\ndef f(): return value()")
    pack_function(notebook["f"])
    (folder / "helpers.py").unlink()

    assert pickling.load(pack_function(notebook["f"]).parts)[0]() == 1


def test_an_edit_to_the_class_of_an_argument_is_used(folder: Path, notebook: Notebook) -> None:
    """The function need not know the module at all."""
    write(folder / "shapes.py", "class Square:\n    def area(self): return 1\n")
    notebook.run("from shapes import Square\nsquare = Square()")
    pack_arguments((notebook["square"],), {})

    write(folder / "shapes.py", "class Square:\n    def area(self): return 2\n")
    parts = pack_arguments((notebook["square"],), {})

    assert notebook["square"].area() == 2
    assert pickling.load(parts)[0][0].area() == 2


def test_a_module_that_comes_home_does_not_replace_itself(folder: Path, notebook: Notebook) -> None:
    """A host in this very process opens what this process packed."""
    write(folder / "helpers.py", "K = 1\ndef value(): return K\n")
    notebook.run("import helpers\ndef f(): return helpers.value()")

    assert pickling.load(pack_function(notebook["f"]).parts)[0]() == 1
    assert sys.modules["helpers"] is notebook["helpers"]
    assert notebook["helpers"].K == 1
