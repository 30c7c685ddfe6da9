"""The rules of docs/names.md, on every host that has processes of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fal_notebook import variables
from fal_notebook.handles import Handle

if TYPE_CHECKING:
    from support.cells import CellNotebook


def test_changes_in_place_are_seen_on_both_sides(notebook: CellNotebook) -> None:
    notebook.run_here("rows = [1]\nheld = {'rows': rows}\nkept = rows")
    notebook.run("rows.append(2)\nheld['more'] = rows")
    notebook.run_here("rows.append(3)\nok = kept is rows is held['rows'] is held['more']")
    notebook.run("seen = len(rows), held['rows'] is rows")
    assert notebook.here["ok"] is True
    assert notebook.here["seen"] == (3, True)


def test_a_large_value_that_is_changed_there_becomes_a_handle(notebook: CellNotebook) -> None:
    notebook.run_here("big = bytearray(3_000_000)")
    notebook.run("n = len(big)")
    assert isinstance(notebook.here["big"], bytearray)
    notebook.run("big[0] = 7")
    assert notebook.here["big"].size == 3_000_057
    assert notebook.here["big"].get()[0] == 7


def test_a_handle_shows_what_became_of_its_value(notebook: CellNotebook) -> None:
    notebook.run("data = list(range(400_000))")
    handle = notebook.here["data"]
    before = handle.preview
    notebook.run("data.insert(0, 'first')")
    assert notebook.here["data"] is handle
    assert handle.preview != before
    assert handle.get()[0] == "first"


def test_functions_and_classes_use_the_names_of_where_they_run(notebook: CellNotebook) -> None:
    notebook.run_here("step = 1\ndef add(n): return n + step\nclass Count:\n    made = 0")
    notebook.run("def twice(n): return add(add(n))\nCount.made += 1\none = Count()\nresult = twice(0)")
    notebook.run_here("step = 10\nresult_here = twice(0), Count.made, isinstance(one, Count)")
    notebook.run("result_there = twice(0), Count.made, isinstance(one, Count)")
    assert notebook.here["result"] == 2
    assert notebook.here["result_here"] == notebook.here["result_there"] == (20, 1, True)


def test_a_cell_that_fails_leaves_what_it_did(notebook: CellNotebook) -> None:
    notebook.run_here("rows = [1]\ngone = 1")
    notebook.run("gone")
    with pytest.raises(ZeroDivisionError):
        notebook.run("rows.append(2)\nfound = len(rows)\ndel gone\n1/0")
    assert (notebook.here["rows"], notebook.here["found"]) == ([1, 2], 2)
    assert "gone" not in notebook.here


def test_names_are_pushed_listed_pulled_and_reset(notebook: CellNotebook) -> None:
    where = notebook.host.name
    assert variables.variables(notebook.here, host=where) == []
    notebook.run_here("a = [1, 2]\nb = bytes(2_000_000)")
    assert variables.push(notebook.here, ["a", "b"], host=where) == {"a": "20 B", "b": "2 MB"}
    assert variables.push(notebook.here, ["a"], host=where) == {"a": "was there"}
    notebook.run("c = a + [3]\nbig = b + b'!'")
    listed = {item.name: item for item in variables.variables(notebook.here, host=where)}
    assert [(item.type, item.here) for item in listed.values()] == [
        ("list", "value"), ("bytes", "value"), ("bytes", "handle"), ("list", "value"),
    ]  # fmt: skip
    assert len(variables.pull(notebook.here, ["big"], host=where)["big"]) == 2_000_001
    assert len(notebook.here["big"]) == 2_000_001
    with pytest.raises(variables.NameNotFoundError, match=r"no 'bigg'.*did you mean big"):
        variables.pull(notebook.here, ["bigg"], host=where)
    assert variables.reset(notebook.here, host=where) == (4, [])
    assert variables.variables(notebook.here, host=where) == []
    notebook.run("d = a")
    assert notebook.here["d"] == [1, 2]


def test_a_handle_is_gone_with_its_session(notebook: CellNotebook) -> None:
    notebook.run("big = bytes(2_000_000)")
    handle = notebook.here["big"]
    assert isinstance(handle, Handle)
    count, gone = variables.reset(notebook.here, host=notebook.host.name, restart=True)
    assert (count, gone) == (None, ["big"])
    with pytest.raises(Exception, match=r"'big' stayed on .* run the cell that makes it again"):
        handle.get()
