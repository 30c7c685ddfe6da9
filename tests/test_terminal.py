"""IPython in a terminal, typed into as a person does."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATH = os.pathsep.join(filter(None, sys.path))
_NOISE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")


class Terminal:
    """IPython behind a terminal of its own."""

    def __init__(self, folder: Path) -> None:
        self._master, slave = pty.openpty()
        environment = {
            **os.environ,
            "PYTHONPATH": PATH,
            "IPYTHONDIR": str(folder),
            "TERM": "xterm",
            "PAGER": "cat",
        }
        command = ["-m", "IPython", "--simple-prompt", "--no-banner", "--colors=NoColor", "--no-confirm-exit"]
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=slave, stdout=slave, stderr=slave, env=environment, cwd=folder,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(slave)
        self._seen = ""
        self.wait_for("In [1]: ")

    def run(self, *lines: str) -> str:
        """Type lines and give what is printed until the next prompt."""
        number = self.type(*lines)
        return self.wait_for(f"In [{number + 1}]: ")

    def type(self, *lines: str) -> int:
        """Type lines, and empty ones where more could follow; give the number of the input."""
        number = int(re.findall(r"In \[(\d+)\]: ", self._seen)[-1])
        self._seen = ""
        is_block = len(lines) > 1 or lines[0].startswith("%%")
        for line in lines:
            self._write(f"{line}\n")
            if is_block:
                self.wait_for("...: ", keep=True)
        if is_block:
            self._write("\n\n" if lines[0].startswith("%%") else "\n")
        return number

    def press_control_c(self) -> None:
        """The terminal sends SIGINT to the process in its foreground."""
        self._write("\x03")

    def wait_for(self, text: str, *, timeout: float = 60.0, keep: bool = False) -> str:
        """Wait until `text` was printed and give all before it."""
        end = time.monotonic() + timeout
        start = len(self._seen) if keep else 0
        while text not in self._seen[start:]:
            assert time.monotonic() < end, f"no {text!r} in:\n{self._seen}"
            if select.select([self._master], [], [], 0.5)[0]:
                self._seen += _NOISE.sub("", os.read(self._master, 1 << 16).decode("utf-8", "replace"))
        return self._seen[: self._seen.rindex(text)]

    def close(self) -> None:
        self._write("exit()\n")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(timeout=10)
        os.close(self._master)

    def _write(self, text: str) -> None:
        os.write(self._master, text.encode())


def _take_terminal() -> None:
    """Make the terminal that stdin is the controlling one, in the child before it becomes IPython."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture(scope="module")
def terminal(own_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path_factory.mktemp("ipython"))
    terminal.run("%load_ext fal_notebook")
    yield terminal
    terminal.run("%fal stop --all")
    terminal.close()


def test_a_cell_prints_and_shows_its_value(terminal: Terminal) -> None:
    terminal.run("x = 20")
    said = terminal.run("%%fal", "print('from', 'there')", "y = x + 1", "y * 2")
    assert "from there\n" in said
    assert re.search(r"Out\[\d+\]: 42\n", said)
    assert re.search(r"Out\[\d+\]: 21\n", terminal.run("y"))


def test_a_function_prints_and_gives_its_value(terminal: Terminal) -> None:
    terminal.run("import fal_notebook as fal")
    terminal.run("@fal.function", "def double(n):", "    print('doub' + 'ling')", "    return 2 * n")
    said = terminal.run("double(21)")
    assert "doubling\n" in said
    assert re.search(r"Out\[\d+\]: 42\n", said)


def test_an_error_shows_the_lines_of_the_cell(terminal: Terminal) -> None:
    said = terminal.run("%%fal", "zero = 0", "1 / zero")
    assert "ZeroDivisionError: division by zero" in said
    assert re.search(r"--> 3 1 / zero", said)
    assert "fal_agent" not in said


def test_a_mistake_in_the_line_is_one_line(terminal: Terminal) -> None:
    said = terminal.run("%%fal --nonsense", "1")
    assert "UsageError: unrecognized arguments: --nonsense" in said
    assert "Traceback" not in said


def test_questions_are_answered_as_text(terminal: Terminal) -> None:
    assert re.search(r"→ +local", terminal.run("%fal hosts"))
    assert "--requirements-file FILE" in terminal.run("%%fal?")


def test_a_cell_asks_in_the_terminal_and_is_debugged_there(terminal: Terminal) -> None:
    number = terminal.type("%%fal", "name = input('who' + '? ')", "print('hello', name)", "1 / len(name[5:])")
    terminal.wait_for("who? ")
    terminal._write("Ada\n")
    assert "hello Ada\n" in terminal.wait_for(f"In [{number + 1}]: ")
    terminal._write("%debug\n")
    terminal.wait_for("ipdb> ")
    terminal._write("p 'it is ' + name\n")
    terminal.wait_for("'it is Ada'\n")
    terminal._write("q\n")
    terminal.wait_for(f"In [{number + 2}]: ")


def test_control_c_stops_the_cell_and_keeps_its_session(terminal: Terminal) -> None:
    terminal.run("%%fal", "kept = (i for i in range(3))")
    number = terminal.type("%%fal", "import time", "print('as' + 'leep', flush=True)", "time.sleep(300)")
    terminal.wait_for("asleep\n")
    terminal.press_control_c()
    said = terminal.wait_for(f"In [{number + 1}]: ", timeout=20)
    assert "KeyboardInterrupt" in said
    assert re.search(r"--> 4 time.sleep\(300\)", said)
    assert re.search(r"Out\[\d+\]: 0\n", terminal.run("%%fal", "next(kept)"))
