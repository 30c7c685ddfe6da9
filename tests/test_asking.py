"""What code on a host asks of the person: `input`, `getpass`, debuggers; in a kernel with a stdin channel."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest
from support.kernel import Kernel, start_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("ipykernel")

PATH = os.pathsep.join(filter(None, sys.path))


@pytest.fixture(scope="module")
def kernel(own_folders: Path) -> Iterator[Kernel]:
    with start_kernel(PYTHONPATH=PATH) as kernel:
        kernel.run("import fal_notebook as fal")
        yield kernel
        kernel.run("%fal stop --all")


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
    cell = kernel.start(
        "%%fal --no-return\nimport getpass\nlong = len(getpass.getpass('Key: '))\nlong", stdin=True
    )
    assert kernel.asked() == ("Key: ", True)
    kernel.answer(secret)
    kernel.wait(cell)
    assert cell.result == str(len(secret))
    kernel.run("fal.runs()")  # the journal is up to date
    files = [
        path
        for path in (own_folders / "root").rglob("*")
        if path.is_file() and "environments" not in path.parts
    ]
    assert any(path.name.startswith("journal") for path in files)
    assert [path for path in files if secret.encode() in path.read_bytes()] == []


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
