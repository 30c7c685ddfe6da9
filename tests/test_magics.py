"""The magics as a person meets them: in a real kernel, on this machine as the host."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

import pytest
from support.kernel import PATH, Kernel, working_kernel
from support.wheels import make_wheel

from fal_notebook.magics.completion import complete_line
from fal_notebook.magics.line import COMMANDS
from fal_notebook.magics.options import CellOptionsError, cell_parser, parse_cell_line
from fal_notebook.session import session_on

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("ipykernel")


@pytest.fixture(scope="module")
def kernel(own_folders: Path) -> Iterator[Kernel]:
    with working_kernel() as kernel:
        yield kernel


@pytest.fixture
def fresh(kernel: Kernel) -> Kernel:
    """The kernel, with nothing of earlier tests in its session."""
    kernel.run("%%fal --fresh\npass")
    return kernel


# ---------------------------------------------------------------- reading the line


def test_every_option_of_the_cell_is_read() -> None:
    options = parse_cell_line(
        "--host box -r numpy --require 'torch>=2' --requirements-file r.txt --python 3.11 --machine-type GPU "
        "--gpu 2 --timeout 1.5 --session s --fresh --again --no-return -o run --background "
        "--secret HF_TOKEN --secret OTHER"
    )
    assert vars(options) == {
        "help": False,
        "host": "box", "require": ["numpy", "torch>=2"], "requirements_file": "r.txt", "python": "3.11",
        "machine_type": "GPU", "gpu": 2, "timeout": 1.5, "session": "s", "fresh": True, "again": True,
        "no_return": True,
        "output": "run", "background": True, "secret": ["HF_TOKEN", "OTHER"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--hots box", "unrecognized arguments: --hots box. `%%fal?` shows"),
        ("box --fresh", "a host is named by `--host box`, a package by `-r box`"),
        ("--gpu many", "invalid int value: 'many'"),
        ("--gpu -1", "not a number of devices"),
        ("--timeout 0", "not a time"),
        ("-o a.b", "not a name"),
        ("-r 'numpy", "cannot be read"),
    ],
)
def test_a_mistake_in_the_line_is_told_with_where_help_is(line: str, message: str) -> None:
    with pytest.raises(CellOptionsError, match=re.escape(message)):
        parse_cell_line(line)


def test_every_option_has_a_help_text() -> None:
    assert all(action.help for action in cell_parser()._actions)


@pytest.mark.parametrize(
    ("line", "offered", "not_offered"),
    [
        ("%%fal --", {"--host", "--fresh", "--background", "--no-return"}, {"connect"}),
        ("%%fal --host ", {"local"}, {"--host"}),
        ("%%fal --host lo", {"local"}, {"inline"}),
        ("%fal ", set(COMMANDS), {"--host"}),
        ("%fal co", {"connect"}, {"hosts"}),
        ("%fal connect ", {"local"}, {"connect"}),
        ("%fal hosts ", set(), {"local", "hosts"}),
        ("%fal pu", {"push", "pull"}, {"vars"}),
        ("%fal push ", {"mine", "--host", "--session"}, {"_hidden", "push"}),
        ("%fal push mine --host lo", {"local"}, {"mine"}),
        ("%fal reset --", {"--restart", "--host"}, {"mine"}),
        ("%fal vars --session ", {"shared"}, {"local"}),
    ],
)
def test_tab_offers_what_may_stand_there(line: str, offered: set[str], not_offered: set[str]) -> None:
    session_on("local", "shared")
    found = set(complete_line(line, {"mine": 1, "_hidden": 2}))
    assert offered <= found
    assert not not_offered & found


# ---------------------------------------------------------------- in a kernel


def test_names_go_and_come_and_output_stands_below_the_cell(fresh: Kernel) -> None:
    fresh.run("x = 20")
    cell = fresh.run("%%fal\nimport sys\nprint('out')\nprint('err', file=sys.stderr)\ny = x + 1\ny * 2")
    assert (cell.text, cell.errors, cell.result) == ("out\n", "err\n", "42")
    assert fresh.run("y").result == "21"


def test_cells_share_their_session(fresh: Kernel) -> None:
    fresh.run("%%fal\nkept = (i for i in range(3))\nimport os\nhere = os.getpid()")
    assert fresh.run("%%fal\nnext(kept), os.getpid() == here").result == "(0, True)"
    assert "generator" in str(fresh.run("kept").result)
    assert fresh.run("import os; os.getpid() == here").result == "False"


def test_outputs_keep_their_order_and_their_kinds(fresh: Kernel) -> None:
    code = (
        "%%fal\nclass Shown:\n    def _repr_html_(self): return '<b>shown</b>'\n"
        "print(1)\ndisplay(Shown())\nprint(2)\nShown()"
    )
    cell = fresh.run(code)
    assert cell.kinds == ["stream", "display_data", "stream", "execute_result"]
    assert cell.outputs[1]["data"]["text/html"] == cell.outputs[3]["data"]["text/html"] == "<b>shown</b>"


def test_displays_are_updated_and_cleared(fresh: Kernel) -> None:
    cell = fresh.run("%%fal\nh = display('first', display_id=True)\nh.update('second')")
    assert [o["data"]["text/plain"] for o in cell.outputs] == ["'second'"]
    cell = fresh.run(
        "%%fal\nfrom IPython.display import clear_output\nprint('gone')\nclear_output()\nprint('here')"
    )
    assert cell.text == "here\n"


def test_shell_lines_magics_and_await_work_there(fresh: Kernel) -> None:
    cell = fresh.run(
        "%%fal\nfiles = !echo a; echo b\n%time z = 3\nimport asyncio\nawait asyncio.sleep(0, [*files, z])"
    )
    assert cell.result == "['a', 'b', 3]"
    assert "Wall time" in cell.text


def test_cell_magics_stack_in_both_orders(fresh: Kernel) -> None:
    assert "Wall time" in fresh.run("%%fal\n%%time\nq = 5").text
    assert fresh.run("%%fal\n%%bash\necho from $0").text == "from bash\n"
    assert "Wall time" in fresh.run("%%time\n%%fal\nw = 6").text
    assert fresh.run("q, w").result == "(5, 6)"


def test_requirements_with_braces_are_not_replaced_by_variables(fresh: Kernel) -> None:
    """IPython replaces {name} in the line of a magic unless it is told not to."""
    cell = fresh.run("extra = 'numpy'\nget_ipython().run_cell_magic('fal', '-r \"{extra}\"', 'pass')")
    assert "{extra}" in cell.error


def test_an_error_shows_the_cells_own_lines(fresh: Kernel) -> None:
    fresh.run("%%fal\ndef divide(a, b):\n    return a / b")
    cell = fresh.run("%%fal\n\nbefore = 1\ndivide(before, 0)\nafter = 2")
    assert cell.error == "ZeroDivisionError: division by zero"
    trace = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(cell.outputs[-1]["traceback"]))
    assert re.search(r"--> 4 divide\(before, 0\)", trace)
    assert re.search(r"--> 3 +return a / b", trace)
    assert "fal_agent" not in trace
    assert "interactiveshell" not in trace
    assert fresh.run("%%fal\nbefore").result == "1"
    assert fresh.run("before").result == "1"


def test_a_syntax_error_is_found_without_the_host(fresh: Kernel) -> None:
    cell = fresh.run("%%fal --host nowhere.invalid\nx = 1\ny = = 2")
    assert cell.error.startswith("SyntaxError")
    assert "line 3" in cell.error


def test_a_value_that_cannot_travel_is_named(fresh: Kernel) -> None:
    fresh.run("rows = (i for i in [1])")
    cell = fresh.run("%%fal\nsum(rows)")
    assert "FalSerializationError: 'rows'" in cell.error


def test_a_mistake_in_the_line_is_one_short_message(fresh: Kernel) -> None:
    fresh.run("%%fal\nkept = 1")
    cell = fresh.run("%%fal --nonsense\nkept = 2")
    assert cell.error == ""
    assert re.fullmatch(r"UsageError: unrecognized arguments: --nonsense.*\n", cell.errors)
    assert fresh.run("%%fal\nkept").result == "1"


def test_large_values_stay_and_are_fetched_on_demand(fresh: Kernel) -> None:
    fresh.run("%%fal\nbig = bytes(3_000_000)")
    shown = fresh.run("big")
    assert "bytes, 3,000,000 long, 3 MB; big.get() brings it here" in str(shown.result)
    assert fresh.run("len(big.get())").result == "3000000"
    assert fresh.run("%%fal\nlen(big)").result == "3000000"
    fresh.run("%%fal --fresh\npass")
    assert "run the cell that makes it again" in fresh.run("%%fal\nlen(big)").error
    assert "run the cell that makes it again" in fresh.run("big.get()").error


def test_names_are_pushed_listed_pulled_and_forgotten(fresh: Kernel) -> None:
    fresh.run("rows = [1, 2]")
    assert "rows  20 B" in str(fresh.run("%fal push rows").result)
    fresh.run("%%fal\nmany = list(range(300_000))\nlabel = 'x'")
    listed = str(fresh.run("%fal vars").result)
    assert re.search(r"many +list +300,000 +2.[45] MB +handle", listed)
    assert re.search(r"rows +list +2 .*value", listed)
    assert "<table>" in fresh.run("%fal vars").outputs[0]["data"]["text/html"]
    fresh.run("%fal pull many")
    assert fresh.run("len(many)").result == "300000"
    assert "did you mean many?" in fresh.run("%fal pull nany").errors
    assert "there is no 'nothing' in the notebook" in fresh.run("%fal push nothing").errors
    assert "the following arguments are required: NAME" in fresh.run("%fal push").errors
    assert str(fresh.run("%fal reset").result).startswith("3 names forgotten")
    assert "(none)" in str(fresh.run("%fal vars").result)
    assert str(fresh.run("%fal reset --restart").result).startswith("the session will start anew")


def test_sessions_by_name_are_apart(fresh: Kernel) -> None:
    fresh.run("%%fal --session one --no-return\nplace = 'one'")
    fresh.run("%%fal --session two --no-return\nplace = 'two'")
    assert fresh.run("%%fal --session one\nplace").result == "'one'"
    assert fresh.run("'place' in globals()").result == "False"


def test_a_session_that_died_gets_what_it_had_from_the_notebook(fresh: Kernel) -> None:
    fresh.run("mine = [1, 2]")
    fresh.run("%%fal\nsum(mine)")
    assert "WorkerLostError" in fresh.run("%%fal\nimport os\nos._exit(3)").error
    assert fresh.run("%%fal\nsum(mine)").result == "3"


def test_an_interrupt_stops_the_cell_and_keeps_the_session(fresh: Kernel) -> None:
    fresh.run("%%fal\nkept = (i for i in range(3))")
    cell = fresh.start("%%fal\nimport time\nprint('asleep', flush=True)\ntime.sleep(60)")
    fresh.wait_for(cell, "asleep")
    fresh.interrupt()
    fresh.wait(cell, timeout=20)
    assert cell.error.startswith("KeyboardInterrupt")
    assert fresh.run("%%fal\nnext(kept)").result == "0"


def test_a_cell_in_the_background_keeps_its_output_and_gives_its_names(fresh: Kernel) -> None:
    fresh.run("import tempfile, os; flag = os.path.join(tempfile.mkdtemp(), 'go')")
    begun = fresh.run(
        "%%fal -o run --background\nimport os, time\nwhile not os.path.exists(flag): time.sleep(0.02)\n"
        "print('late')\nv = 7"
    )
    assert fresh.run("run.done(), 'v' in globals()").result == "(False, False)"
    waiting = fresh.run("open(flag, 'w').close()\nrun.result()['v'], v")
    assert waiting.result == "(7, 7)"
    fresh.wait_for(begun, "late")
    assert "late" not in str(waiting.outputs)


def test_two_cells_in_the_background_take_their_turns(fresh: Kernel) -> None:
    fresh.run("%%fal -o one --background\na = 1")
    fresh.run("%%fal -o two --background\nb = a + 1")
    assert fresh.run("one.result(); two.result(); a, b").result == "(1, 2)"


def test_a_timeout_ends_the_cell_and_says_so(fresh: Kernel) -> None:
    cell = fresh.run("%%fal --timeout 0.5\nimport time\ntime.sleep(60)")
    assert "CallTimeoutError" in cell.error


def test_a_host_that_does_not_exist_is_told(fresh: Kernel) -> None:
    cell = fresh.run("%%fal --host nowhere.invalid\n1")
    assert "nowhere.invalid" in cell.error
    assert "HostUnreachableError" in cell.error


def test_a_requirement_that_is_wrong_leaves_the_session_as_it_was(fresh: Kernel) -> None:
    fresh.run("%%fal\nkept = (i for i in range(3))")
    assert "RequirementError" in fresh.run("%%fal -r 'not a requirement!'\npass").error
    assert fresh.run("%%fal\nnext(kept)").result == "0"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Requirement lines of packages that are not on any index."""
    folder = tmp_path_factory.mktemp("wheels")
    return {name: f"{name} @ {make_wheel(folder, name).as_uri()}" for name in ("probe_a", "probe_b")}


def test_a_session_keeps_its_requirements_and_what_is_added_starts_it_anew(
    fresh: Kernel, wheels: dict[str, str]
) -> None:
    fresh.run("mine = [1]")
    cell = fresh.run(
        f"%%fal -r '{wheels['probe_a']}'\nimport probe_a\nn = len(mine)\ngone = (i for i in mine)"
    )
    assert (cell.error, fresh.run("%%fal\nprobe_a.VERSION").result) == ("", "'1.0'")
    assert fresh.run(f"%%fal -r '{wheels['probe_a']}'\nnext(gone)").result == "1"
    cell = fresh.run(f"%%fal -r '{wheels['probe_b']}'\nimport probe_a, probe_b\nmine, 'gone' in globals()")
    assert cell.result == "([1], False)"
    assert cell.errors.startswith(
        "The session on local starts anew: its requirements have changed: + probe_b @ file://"
    )
    assert "No module named 'probe_b'" in fresh.run("%%fal --fresh\nimport probe_b").error


def test_requirements_come_from_files_and_script_blocks_too(
    fresh: Kernel, wheels: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "needs.txt").write_text(wheels["probe_a"] + "\n# a comment\n")
    block = f'# /// script\n# dependencies = ["{wheels["probe_b"]}"]\n# ///\n'
    cell = fresh.run(f"%%fal --requirements-file {tmp_path}/needs.txt\n{block}import probe_a, probe_b\n1")
    assert (cell.error, cell.result) == ("", "1")


def test_requirements_are_found_from_imports_when_asked(fresh: Kernel) -> None:
    """At the notebook's own versions; for a module that the notebook imported too."""
    fresh.run("import packaging.version as pv\nmine = pv.Version")
    cell = fresh.run(
        "%%fal -r auto\nimport tomlkit\npv.Version('1.0') < pv.Version('2.0'), tomlkit.__version__"
    )
    here = fresh.run("import tomlkit\n(True, tomlkit.__version__)")
    assert (cell.error, cell.result) == ("", here.result)


def test_a_requirement_that_cannot_be_had_leaves_the_session_as_it_was(fresh: Kernel, tmp_path: Path) -> None:
    fresh.run("%%fal\nkept = (i for i in range(3))")
    missing = (tmp_path / "missing-1.0-py3-none-any.whl").as_uri()
    cell = fresh.run(f"%%fal -r 'missing @ {missing}'\npass")
    assert cell.error.startswith("EnvironmentBuildError")
    assert fresh.run("%%fal\nnext(kept)").result == "0"


def test_another_python_is_refused_with_the_remedy(fresh: Kernel) -> None:
    other = "3.9" if sys.version_info[:2] != (3, 9) else "3.10"
    assert f"python_version='{other}'" in fresh.run(f"%%fal --python {other}\n1").error


def test_the_run_of_a_cell_can_be_kept(fresh: Kernel) -> None:
    fresh.run("%%fal -o run\nx = 5")
    assert fresh.run("run.done(), run.result()").result == "(True, {'x': 5})"


def test_the_run_of_a_cell_is_attached_with_the_values_of_its_names(fresh: Kernel) -> None:
    fresh.run("import fal_notebook as fal\nown = ['here']")
    fresh.run("%%fal\nbase = [1]")
    cell = (
        "text, base2 = 'a' * 50, base\nbase.append(2)\nown.append('there')\nboth = {'base': base, 'own': own}"
    )
    fresh.run(f"%%fal -o run\n{cell}")

    wanted = {
        "base": [1, 2],
        "base2": [1, 2],
        "both": {"base": [1, 2], "own": ["here", "there"]},
        "own": ["here", "there"],
        "text": "a" * 50,
    }
    fresh.run("found = fal.attach(run.run_id).result(timeout=30)")
    assert fresh.run(f"found == {wanted!r}").result == "True", fresh.run("found").result


def test_a_run_that_is_attached_has_handles_for_what_stayed_or_cannot_be_opened(fresh: Kernel) -> None:
    fresh.run("import fal_notebook as fal")
    cell = (
        "class Odd:\n    def __reduce__(self): return int, ('not a number',)\n"
        "odd, stays, number = Odd(), (i for i in range(3)), 5"
    )
    fresh.run(f"%%fal -o run\n{cell}")

    fresh.run("found = fal.attach(run.run_id).result(timeout=30)")

    assert fresh.run("found['number']").result == "5"
    assert fresh.run("found['stays']").result.startswith("<stays on local: generator")
    assert "cannot be opened here: ValueError" in fresh.run("found['odd'].preview").result
    assert fresh.run("%%fal\nlist(stays)").result == "[0, 1, 2]"


def test_hosts_are_listed_and_chosen(kernel: Kernel) -> None:
    connected = kernel.run("%fal connect local")
    assert "connected to local" in str(connected.result)
    listed = kernel.run("%fal hosts")
    assert "local" in str(listed.result)
    assert "<table" in listed.outputs[0]["data"]["text/html"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("%fal status", "cores"),
        ("%fal envs", "Python"),
        ("%fal runs", "run"),
        ("%fal help", "%fal connect NAME"),
        ("%fal", "cores, "),
        ("%fal doctor local", "ok"),
    ],
)
def test_questions_are_answered(fresh: Kernel, line: str, text: str) -> None:
    cell = fresh.run(line)
    assert cell.status == "ok"
    assert text in str(cell.result)


@pytest.mark.parametrize(
    "line", ["%fal conect box", "%fal hosts --nonsense", "%fal connect", "%fal stop a b"]
)
def test_a_mistake_in_a_command_is_one_short_message(kernel: Kernel, line: str) -> None:
    cell = kernel.run(line)
    assert cell.outputs == [{"output_type": "stream", "name": "stderr", "text": cell.errors}]
    assert cell.errors.startswith("UsageError: %fal ")


def test_stop_ends_this_kernels_sessions(fresh: Kernel) -> None:
    fresh.run("%fal stop")
    fresh.run("%%fal\nkept = (i for i in range(3))")
    assert "ended 1 worker" in str(fresh.run("%fal stop").result)
    assert "NameError" in fresh.run("del kept\nget_ipython().run_cell_magic('fal', '', 'kept')").error


@pytest.mark.parametrize(
    ("magic", "words"), [("%%fal", ["--requirements-file", "-r", "PEP 723", ".get()"]), ("%fal", [*COMMANDS])]
)
def test_a_question_mark_shows_the_full_help(kernel: Kernel, magic: str, words: list[str]) -> None:
    shown = kernel.run(f"print(get_ipython().object_inspect_text({magic!r}))").text
    assert [word for word in words if word not in shown] == []


def test_tab_works_in_the_kernel(kernel: Kernel) -> None:
    assert "--requirements-file" in kernel.complete("%%fal --requ")
    assert "local" in kernel.complete("%%fal --host lo")
    assert "connect" in kernel.complete("%fal con")


def test_a_terminal_shell_gets_the_same_as_text(own_folders: Path, tmp_path: Path) -> None:
    """Without Jupyter: text, and results with their prompt."""
    import subprocess

    script = (
        "from IPython.terminal.interactiveshell import TerminalInteractiveShell as S\n"
        "ip = S.instance(simple_prompt=True)\n"
        "ip.run_cell('%load_ext fal_notebook')\nip.run_cell('x = 20', store_history=True)\n"
        "ip.run_cell('%%fal\\nprint(\"there\")\\ny = x + 1\\ny * 2', store_history=True)\n"
        "ip.run_cell('y', store_history=True)\nip.run_cell('%fal stop')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": PATH, "IPYTHONDIR": str(tmp_path)},
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = re.sub(r"\x1b\[[\d;]*m", "", done.stdout).split("\n")
    assert [line for line in lines if line][:3] == ["there", "Out[2]: 42", "Out[3]: 21"]


def test_loading_twice_and_unloading_is_fine(kernel: Kernel) -> None:
    assert kernel.run("%reload_ext fal_notebook\n%unload_ext fal_notebook").errors == ""
    assert "not found" in kernel.run("%fal hosts").errors
    assert kernel.run("%load_ext fal_notebook\n%fal hosts").status == "ok"


# ---------------------------------------------------------------- other magics above and below


def test_an_empty_cell_may_stand_below_the_line_alone(fresh: Kernel) -> None:
    assert fresh.run("%%fal").outputs == []
    assert fresh.run("%%fal --fresh\n\n").outputs == []
    assert "usage: %%fal" in fresh.run("%%fal --help").payload[0]["data"]["text/plain"]


def test_a_cell_magic_above_takes_what_the_cell_shows(fresh: Kernel) -> None:
    assert fresh.run("%%capture kept\n%%fal\nprint('said')\n6 * 7").outputs == []
    assert fresh.run("kept.stdout, kept.outputs[0].data['text/plain']").result == "('said\\n', '42')"
    timed = fresh.run("%%time\n%%fal\n6 * 7")
    assert (timed.result, "Wall time" in timed.text) == ("42", True)


def test_options_go_with_cell_magics_below(fresh: Kernel) -> None:
    cell = fresh.run("%%fal --no-return -o run\n%%time\nhidden = 6 * 7\nhidden")
    assert (cell.result, "Wall time" in cell.text) == ("42", True)
    assert fresh.run("'hidden' in globals(), type(run).__name__").result == "(False, 'Run')"
    late = fresh.run("%%fal --timeout 0.5\n%%time\nimport time; time.sleep(60)")
    assert "import time; time.sleep(60) ran longer than its timeout" in late.error


def test_the_notebooks_own_magics_in_a_cell_there_say_where_they_belong(fresh: Kernel) -> None:
    for code in ("%%fal\n%fal hosts", "%%fal\n%%fal\n1"):
        assert "this cell runs on a host already" in fresh.run(code).errors
