"""Functions in a real Jupyter kernel, where everything belongs to `__main__`; and cells with packages."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import IPython
import pytest
from support.kernel import Kernel, working_kernel
from support.waiting import is_alive

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.kernel import Cell

pytest.importorskip("ipykernel")


@pytest.fixture(scope="module")
def kernel(own_folders: Path) -> Iterator[Kernel]:
    with working_kernel() as kernel:
        kernel.run("import fal_notebook as fal")
        yield kernel


@pytest.fixture
def fresh(kernel: Kernel) -> Kernel:
    """The kernel, with a session that has nothing but what every session has."""
    kernel.run("%%fal --fresh\npass")
    return kernel


def traceback(cell: Cell) -> str:
    """What stands below a cell that failed, without colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", "\n".join(cell.outputs[-1]["traceback"]))


# ---------------------------------------------------------------- what travels with a function


def test_an_instance_of_a_cells_class_comes_back_as_one(kernel: Kernel) -> None:
    """Not as one of a class of the same name: `isinstance`, `super()` and attributes of the class work."""
    kernel.run(
        "class Base:\n    made = 0\n    def __init__(self, n): self.n = n\n"
        "class Point(Base):\n    def __init__(self, n): super().__init__(n)\n"
        "    def twice(self): return 2 * self.n"
    )
    kernel.run("@fal.function\ndef move(p):\n    return Point(p.twice() + 1)\nmoved = move(Point(4))")
    assert kernel.run("type(moved) is Point, isinstance(moved, Base), moved.n").result == "(True, True, 9)"


def test_a_class_that_was_edited_is_the_one_that_comes_back(kernel: Kernel) -> None:
    kernel.run("class Box:\n    def __init__(self): self.kind = 'old'")
    kernel.run("@fal.function\ndef make():\n    return Box()\nmake()")
    kernel.run("class Box:\n    def __init__(self): self.kind = 'new'")
    assert kernel.run("b = make(); b.kind, type(b) is Box").result == "('new', True)"


def test_globals_have_the_values_of_the_time_of_the_call(kernel: Kernel) -> None:
    kernel.run("step = 1\ndef helper(a):\n    return a + step")
    kernel.run("@fal.function\ndef go(a):\n    return helper(a)")
    assert kernel.run("go(0)").result == "1"
    kernel.run("step = 10")
    assert kernel.run("go(0)").result == "10"
    kernel.run("def helper(a):\n    return ('edited', a)")
    assert kernel.run("go(0)").result == "('edited', 0)"


def test_names_that_a_function_does_not_use_do_not_matter(kernel: Kernel) -> None:
    kernel.run("import threading\nlock, rows = threading.Lock(), (i for i in [1])")
    assert kernel.run("@fal.function\ndef alone(): return 5\nalone()").result == "5"


def test_a_name_that_it_uses_and_that_cannot_travel_is_named(kernel: Kernel) -> None:
    kernel.run("stream = (i for i in [1])\n@fal.function\ndef uses(): return next(stream)")
    assert re.search(r"FalSerializationError: .*'?stream'?", kernel.run("uses()").error)


def test_modules_that_the_notebook_imported_are_imported_there(kernel: Kernel) -> None:
    kernel.run("import json as j\nfrom collections import Counter")
    cell = kernel.run("@fal.function\ndef count(t): return j.dumps(Counter(t))\ncount('aab')")
    assert cell.result == """'{"a": 2, "b": 1}'"""


def test_it_runs_in_another_process_and_prints_here(kernel: Kernel) -> None:
    cell = kernel.run(
        "import os, sys\n@fal.function\ndef where():\n    print('out'); print('err', file=sys.stderr)\n"
        "    return os.getpid()\nwhere() == os.getpid()"
    )
    assert (cell.text, cell.errors, cell.result) == ("out\n", "err\n", "False")


def test_a_cached_value_outlives_the_cell_that_defines_it(kernel: Kernel) -> None:
    """Running the same cells again is what people do all day; the model must not be loaded again."""
    define = (
        "@fal.cached\ndef model(name):\n    print('loading', name)\n    return {'name': name}\n"
        "@fal.function\ndef ask(): return model('m')['name']"
    )
    kernel.run(define)
    assert kernel.run("ask()").text == "loading m\n"
    kernel.run(define)
    assert (again := kernel.run("ask()")).text == ""
    assert again.result == "'m'"


# ---------------------------------------------------------------- errors


def test_an_error_shows_the_lines_of_the_cells_it_went_through(kernel: Kernel) -> None:
    kernel.run("# a remark above\n\ndef divide(a):\n    return a / 0  # here")
    kernel.run("@fal.function\ndef outer(a):\n    return divide(a)")
    cell = kernel.run("outer(3)")
    assert cell.error == "ZeroDivisionError: division by zero"
    trace = traceback(cell)
    assert re.search(r"--> 3 +return divide\(a\)", trace)
    remark = (
        "  # here" if IPython.version_info >= (9,) else ""
    )  # an older one leaves it out of plain cells, too
    assert re.search(rf"--> 4 +return a / 0{remark}\n", trace)
    assert "fal_agent" not in trace
    assert "fal_notebook/" not in trace


def test_an_error_of_a_cells_own_class_is_caught_as_such(kernel: Kernel) -> None:
    kernel.run(
        "class TooBigError(ValueError):\n"
        "    def __init__(self, limit):\n        super().__init__(limit)\n        self.limit = limit"
    )
    kernel.run("@fal.function\ndef check():\n    raise TooBigError(7) from KeyError('k')")
    caught = kernel.run("try: check()\nexcept TooBigError as e: print(e.args, e.limit, repr(e.__cause__))")
    assert caught.text == "(7,) 7 KeyError('k')\n"


def test_the_debugger_stands_in_the_frame_that_failed_there(kernel: Kernel) -> None:
    """`%debug` needs frames with code; variables of another process it cannot have."""
    kernel.run("@fal.function\ndef fails():\n    inner = 1\n    raise LookupError('x')")
    kernel.run("fails()")
    shown = kernel.run(
        "import sys, traceback as tb\nprint(tb.extract_tb(sys.last_value.__traceback__)[-1].name)"
    )
    assert shown.text == "fails\n"


# ---------------------------------------------------------------- a running loop


def test_coroutines_work_while_the_kernels_loop_runs(kernel: Kernel) -> None:
    kernel.run(
        "import asyncio, os\n@fal.function\nasync def pid(n):\n"
        "    await asyncio.sleep(0.01)\n    return n, os.getpid()"
    )
    assert kernel.run("a = pid(1); a[0], a[1] == os.getpid()").result == "(1, False)"
    assert kernel.run("b = pid.run_local(2); b == (2, os.getpid())").result == "True"
    assert kernel.run("c = await pid.aio(3); c == (3, a[1])").result == "True"
    assert kernel.run("d = await pid.submit(4); d == (4, a[1])").result == "True"
    assert (
        kernel.run("[n for n, _ in await asyncio.gather(*(pid.aio(n) for n in range(3)))]").result
        == "[0, 1, 2]"
    )


def test_the_kernels_loop_goes_on_while_a_call_is_awaited(kernel: Kernel) -> None:
    """The call ends only when the loop has written a file, so a loop that stands still would hang."""
    kernel.run(
        "import tempfile\nflag = os.path.join(tempfile.mkdtemp(), 'go')\n@fal.function\ndef until():\n"
        "    import os, time\n    while not os.path.exists(flag): time.sleep(0.01)\n    return 'seen'"
    )
    cell = kernel.run(
        "async def write():\n    await asyncio.sleep(0.1)\n    open(flag, 'w').close()\n"
        "(await asyncio.gather(until.aio(), write()))[0]"
    )
    assert cell.result == "'seen'"


def test_map_and_generators_draw_in_the_cell_that_reads_them(kernel: Kernel) -> None:
    kernel.run("@fal.function\ndef square(n):\n    print('at', n)\n    return n * n")
    cell = kernel.run("list(square.map(range(3)))")
    assert cell.result == "[0, 1, 4]"
    assert sorted(cell.text.splitlines()) == ["at 0", "at 1", "at 2"]
    kernel.run("@fal.function\ndef upto(n):\n    for i in range(n):\n        yield i\n    print('end')")
    cell = kernel.run("list(upto(3))")
    assert (cell.text, cell.result) == ("end\n", "[0, 1, 2]")


def test_a_submitted_call_prints_below_its_own_cell(kernel: Kernel) -> None:
    kernel.run(
        "wait = os.path.join(tempfile.mkdtemp(), 'go')\n@fal.function\ndef late():\n    import os, time\n"
        "    while not os.path.exists(wait): time.sleep(0.01)\n    print('late words')\n    return 3"
    )
    begun = kernel.run("run = late.submit()")
    other = kernel.run("open(wait, 'w').close(); run.result()")
    kernel.wait_for(begun, "late words")
    assert other.result == "3"
    assert "late words" not in str(other.outputs)


# ---------------------------------------------------------------- interrupts


def test_an_interrupt_stops_the_call_and_keeps_its_worker(kernel: Kernel) -> None:
    kernel.run(
        "@fal.cached\ndef whoami(): return os.getpid()\n@fal.function\ndef nap(seconds):\n    import time\n"
        "    pid = whoami(); print('asleep', flush=True); time.sleep(seconds); return pid\nbefore = nap(0)"
    )
    cell = kernel.start("nap(300)")
    kernel.wait_for(cell, "asleep")
    kernel.interrupt()
    kernel.wait(cell, timeout=20)
    assert cell.error.startswith("KeyboardInterrupt")
    assert "time.sleep(seconds)" in traceback(cell)
    assert kernel.run("nap(0) == before").result == "True"


def test_a_second_interrupt_kills_a_call_that_does_not_listen(kernel: Kernel) -> None:
    kernel.run(
        "@fal.function\ndef deaf():\n    import os, signal, time\n"
        "    print('deaf', os.getpid(), flush=True)\n    while True:\n        try: time.sleep(60)\n"
        "        except KeyboardInterrupt: print('ignored', flush=True)"
    )
    cell = kernel.start("deaf()")
    kernel.wait_for(cell, "deaf")
    kernel.interrupt()
    kernel.wait_for(cell, "ignored")
    kernel.interrupt()
    kernel.wait(cell, timeout=30)
    assert cell.status == "error"
    pid = re.findall(r"deaf (\d+)", cell.text)[0]
    assert not is_alive(int(pid))
    assert kernel.run("@fal.function\ndef next_one(): return 1\nnext_one()").result == "1"


# ---------------------------------------------------------------- cells with packages


def test_figures_and_tables_made_there_are_shown_here(fresh: Kernel) -> None:
    plotted = fresh.run(
        "%%fal -r pandas -r matplotlib\nimport pandas as pd, matplotlib.pyplot as plt\n"
        "table = pd.DataFrame({'a': [1, 2]})\nplt.plot(table.a);"
    )
    assert plotted.error == ""
    assert [set(o["data"]) for o in plotted.outputs if "image/png" in o.get("data", {})] == [
        {"image/png", "text/plain"}
    ]
    assert plotted.result is None
    shown = fresh.run("%%fal\ntable")
    assert "<table" in shown.outputs[-1]["data"]["text/html"]
    assert not any("image/png" in o.get("data", {}) for o in shown.outputs)
    assert fresh.run("type(table).__name__, list(table.a)").result == "('DataFrame', [1, 2])"
    refused = fresh.run("%%fal -r no-such-package-for-sure-0\n1")
    assert "no-such-package-for-sure-0" in refused.error
    assert fresh.run("%%fal\nlen(table)").result == "2"


def test_a_block_in_the_cell_adds_what_the_cell_needs(fresh: Kernel) -> None:
    block = '# /// script\n# dependencies = ["iniconfig==2.0.0"]\n# ///\n'
    code = "from importlib.metadata import version\nversion('iniconfig')"
    assert fresh.run(f"%%fal\n{block}{code}").result == "'2.0.0'"


def test_requirements_are_taken_from_imports_and_from_a_file(fresh: Kernel) -> None:
    here = "from importlib.metadata import version as v\nv('packaging')"
    version = fresh.run(here).result
    assert fresh.run("%%fal -r auto\nimport packaging\npackaging.__version__").result == version
    fresh.run("open('needs.txt', 'w').write('iniconfig==2.0.0  # small\\n')")
    code = "from importlib.metadata import version\nversion('iniconfig')"
    assert fresh.run(f"%%fal --fresh --requirements-file needs.txt\n{code}").result == "'2.0.0'"


def test_functions_and_classes_of_cells_there_and_here_are_the_same(fresh: Kernel) -> None:
    fresh.run("class Here:\n    def hello(self): return 'here'")
    fresh.run("%%fal\nclass There:\n    def hello(self): return 'there'\nmade, first = There(), Here()")
    assert (
        fresh.run("made.hello(), isinstance(made, There), isinstance(first, Here)").result
        == "('there', True, True)"
    )
    assert fresh.run("%%fal\nisinstance(made, There), isinstance(first, Here)").result == "(True, True)"


def test_a_function_can_be_called_from_a_cell_there(fresh: Kernel) -> None:
    """On a host the decorated function is the plain one, and what is cached is shared by name."""
    fresh.run(
        "@fal.cached\ndef weights():\n    print('loading')\n    return [1]\n"
        "@fal.function\ndef infer(): return weights()"
    )
    assert fresh.run("%%fal\ninfer()").text == "loading\n"
    assert fresh.run("%%fal\ninfer(), weights()").text == ""
