"""What code on a host asks of the person: `input`, `getpass`, debuggers; in a kernel with a stdin channel."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from support.kernel import Kernel, working_kernel

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


# ---------------------------------------------------------------- input and getpass


def test_a_cell_asks_below_itself(kernel: Kernel) -> None:
    cell = kernel.start("%%fal\nprint('before')\nname = input('Who? ')\nprint('hello', name)", stdin=True)
    assert kernel.asked() == ("Who? ", False)
    kernel.answer("Ada é")
    kernel.wait(cell)
    assert cell.text == "before\nhello Ada é\n"
    assert kernel.run("name").result == "'Ada é'"


def test_a_password_is_not_seen_and_is_written_nowhere(kernel: Kernel, own_folders: Path) -> None:
    secret = "correct-horse-" + "battery"
    cell = kernel.start("%%fal\nimport getpass\nkey = getpass.getpass('Key: ')\nlen(key)", stdin=True)
    assert kernel.asked() == ("Key: ", True)
    kernel.answer(secret)
    kernel.wait(cell)
    assert cell.result == str(len(secret))
    assert kernel.run("key == 'correct-horse-' + 'battery'").result == "True"  # past the journal
    assert secret.encode() not in journal(kernel, own_folders)


def journal(kernel: Kernel, own_folders: Path) -> bytes:
    """All that the agent has written down, whatever the file."""
    kernel.run("fal.runs()")  # it is up to date then
    files = [path for path in (own_folders / "root").rglob("*") if path.is_file()]
    written = [path.read_bytes() for path in files if "environments" not in path.parts]
    assert any(path.name.startswith("journal") for path in files)
    return b"".join(written)


def test_a_function_in_the_foreground_asks_too(kernel: Kernel) -> None:
    kernel.run("@fal.function\ndef add():\n    return int(input('a ')) + int(input('b '))")
    assert kernel.talk("add()", "2", "40").result == "42"


def test_where_nobody_is_asked_it_fails_as_in_a_plain_kernel(kernel: Kernel) -> None:
    plain = kernel.run("input()")
    cell = kernel.run("%%fal\ninput()")
    assert cell.error == plain.error
    assert "StdinNotImplementedError" in cell.error


def test_in_the_background_nobody_is_asked(kernel: Kernel) -> None:
    cell = kernel.talk("%%fal --background -o run\nanswer = input('?')")
    assert cell.status == "ok"
    assert "a run in the background has nobody to ask" in kernel.run("run.result()").error
    kernel.run("@fal.function\ndef ask():\n    return input()")
    assert "has nobody to ask" in kernel.run("ask.submit().result()").error


def test_an_interrupt_ends_the_asking_and_nothing_else(kernel: Kernel) -> None:
    kernel.run("%%fal\nkept = object()\nmark = id(kept)")
    cell = kernel.start("%%fal\nasked = input('forever? ')", stdin=True)
    kernel.asked()
    kernel.interrupt()
    kernel.wait(cell)
    assert cell.error == "KeyboardInterrupt: Interrupted by user"
    assert kernel.run("%%fal\nid(kept) == mark").result == "True"


def test_a_second_interrupt_ends_the_worker_and_says_so(kernel: Kernel) -> None:
    cell = kernel.start(
        "%%fal\nwhile True:\n    try:\n        input('again? ')\n    except KeyboardInterrupt:\n        pass",
        stdin=True,
    )
    for _ in range(2):
        assert kernel.asked()[0] == "again? "
        kernel.interrupt()
    kernel.wait(cell)
    assert "was killed, and its worker with it" in cell.error
    assert kernel.run("%%fal\n1 + 1").result == "2"


def test_end_of_input_is_an_error_of_the_code_that_asked(kernel: Kernel) -> None:
    cell = kernel.talk("%%fal\ntry:\n    input()\nexcept EOFError:\n    print('no more')", "\x04")
    assert cell.text == "no more\n"


def test_a_thread_asks_for_the_call_that_started_it(kernel: Kernel) -> None:
    code = (
        "%%fal\nimport threading\ngot = []\n"
        "t = threading.Thread(target=lambda: got.append(input('t? ')))\nt.start(); t.join()\ngot"
    )
    assert kernel.talk(code, "yes").result == "['yes']"


# ---------------------------------------------------------------- debuggers


def converse(kernel: Kernel, cell: Cell, *commands: str) -> list[str]:
    """Type commands into a debugger's field; give what had been printed at each of them."""
    for command in commands:
        assert kernel.asked()[0].rstrip().strip("()").lower() in ("ipdb>", "pdb")
        kernel.answer(command)
    kernel.wait(cell)
    return re.sub(r"\x1b\[[\d;]*m", "", cell.text).splitlines()


def test_a_breakpoint_stops_in_the_cell_and_takes_commands(kernel: Kernel) -> None:
    code = (
        "%%fal\ndef area(w, h):\n    breakpoint()\n    size = w * h\n    return size\n\n"
        "print('got', area(6, 7))"
    )
    cell = kernel.start(code, stdin=True)
    text = "\n".join(converse(kernel, cell, "p w, h", "n", "n", "p size", "u", "l", "d", "p w", "w", "c"))
    assert cell.status == "ok", cell.outputs
    assert "(6, 7)" in text
    assert "\n42\n" in text
    assert "print('got', area(6, 7))" in text
    assert text.endswith("got 42")


def test_pdb_can_be_left_and_the_session_goes_on(kernel: Kernel) -> None:
    cell = kernel.start("%%fal\nkeep = 5\nimport pdb; pdb.set_trace()\nx = 1", stdin=True)
    converse(kernel, cell, "p keep + 1", "q")
    assert cell.status == "ok"  # the debugger had reached the end of the statement
    assert "6" in cell.text
    assert kernel.run("%%fal\nkeep").result == "5"


def test_an_interrupt_ends_a_debugger(kernel: Kernel) -> None:
    cell = kernel.start("%%fal\nbreakpoint()\nx = 1", stdin=True)
    kernel.asked()
    kernel.interrupt()
    kernel.wait(cell)
    assert "KeyboardInterrupt: Interrupted by user" in cell.text  # as in a plain kernel
    assert kernel.run("%%fal\nx").result == "1"


def test_a_function_stops_at_its_breakpoint(kernel: Kernel) -> None:
    kernel.run("@fal.function\ndef inner(n):\n    m = n * 2\n    breakpoint()\n    return m")
    cell = kernel.start("inner(4)", stdin=True)
    text = converse(kernel, cell, "p m", "c")
    assert "8" in text
    assert cell.result == "8"


def test_debug_in_a_plain_cell_stands_in_the_frames_on_the_host(kernel: Kernel) -> None:
    kernel.run(
        "%%fal\nclass Local:\n    def __repr__(self): return 'only there'\n"
        "def fail(n):\n    here = Local()\n    return n / 0\n"
        "def outer():\n    count = 3\n    return fail(count)\nouter()"
    )
    cell = kernel.start("%debug", stdin=True)
    text = "\n".join(converse(kernel, cell, "p here, n", "u", "p count", "q"))
    assert cell.status == "ok", cell.outputs
    assert "(only there, 3)" in text
    assert "\n3\n" in text + "\n"
    again = kernel.start("%%fal\n%debug", stdin=True)  # the same from within the session
    assert "(only there, 3)" in "\n".join(converse(kernel, again, "p here, n", "q"))
    assert "fail(count)" in str(kernel.run("%tb").outputs)


def test_what_only_failed_frames_hold_is_let_go_of(kernel: Kernel) -> None:
    """A model on the GPU, say, that a failed cell had loaded."""
    fail = "    try: 1 / 0\n    except ZeroDivisionError as error:\n        kept = error\n        raise\n"
    kernel.run(
        "%%fal\nimport weakref\nclass Model: pass\ndef load():\n    global seen\n    model = Model()\n"
        f"    seen = weakref.ref(model)\n{fail}load()"
    )
    assert kernel.run("%%fal\nseen() is None").result == "True"
    kernel.run(
        "@fal.function\ndef load():\n    import sys, weakref\n    class Model: pass\n    model = Model()\n"
        f"    sys.seen = weakref.ref(model)\n{fail}"
        "@fal.function\ndef look():\n    import sys\n    return sys.seen() is None"
    )
    kernel.run("load()")
    assert kernel.run("look()").result == "True"


def test_after_a_function_debug_knows_the_texts_of_its_variables(kernel: Kernel, own_folders: Path) -> None:
    """The values are let go of at once; what they were is told, and is in no journal."""
    kernel.run(
        "class Net:\n    def __repr__(self): return 'Net(' + 'deep' + '-layers)'\n"
        "@fal.function\ndef train(rate):\n    net, error = Net(), {'a': [1, 2]}\n    return rate / 0"
    )
    for _ in range(5):  # by the agent, and through a lane
        kernel.run("train(3)")
    cell = kernel.start("%debug", stdin=True)
    text = "\n".join(converse(kernel, cell, "p rate + 1", "p net", "p error", "l", "q"))
    assert "\n4\n" in text
    assert "Net(deep-layers)" in text
    assert "{'a': [1, 2]}" in text
    assert "return rate / 0" in text
    assert b"Net(deep-layers)" not in journal(kernel, own_folders)


def test_when_the_frames_are_gone_debug_shows_the_lines(kernel: Kernel) -> None:
    kernel.run("%%fal\ndef fail(n):\n    return n / 0\nfail(3)")
    kernel.run("%%fal\npass")
    cell = kernel.start("%debug", stdin=True)
    text = "\n".join(converse(kernel, cell, "l", "q"))
    assert cell.status == "ok", cell.outputs
    assert "return n / 0" in text


def test_pdb_on_debugs_every_error_where_it_happened(kernel: Kernel) -> None:
    kernel.run("%pdb on")
    cell = kernel.start("%%fal\ndef fail(n):\n    return n / 0\nfail(3)", stdin=True)
    text = "\n".join(converse(kernel, cell, "p n", "q"))
    kernel.run("%pdb off")
    assert "\n3\n" in text + "\n"
    assert cell.error.startswith("ZeroDivisionError")
