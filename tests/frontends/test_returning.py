"""A kernel dies under a long cell: the next one shows its output, in a browser as a person sees it.

`FAL_TEST_CELL_SECONDS=600` has the cell run for ten minutes.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from support.jupyterlab import NEEDS_CHROMIUM
from support.waiting import is_alive, until

if TYPE_CHECKING:
    from pathlib import Path

    from support.jupyterlab import Lab

SECONDS = float(os.environ.get("FAL_TEST_CELL_SECONDS") or 1)  # that the cell runs, more or less
LINES = 20 if SECONDS < 60 else 200  # that it prints in that time

pytestmark = [NEEDS_CHROMIUM, pytest.mark.timeout(120 + 3 * SECONDS)]

LOAD = "%load_ext fal_notebook\nimport os\nprint('kernel', os.getpid())"
LONG = """%%fal
import pathlib, time
from IPython.display import HTML, display
folder = pathlib.Path('FOLDER')
with (folder / 'runs').open('a') as file: _ = file.write('x')
bar = display(HTML('<b>step 0</b>'), display_id=True)
number = 0
while not (folder / 'go').exists():
    number += 1
    print('line', number, flush=True)
    bar.update(HTML(f'<b>step {number}</b>'))
    (folder / 'said').write_text(str(number))
    time.sleep(STEP)
print('the end')"""


def test_a_killed_kernels_cell_is_shown_and_goes_on(lab: Lab, tmp_path: Path) -> None:
    def said() -> int:
        text = (tmp_path / "said").read_text() if (tmp_path / "said").exists() else ""
        return int(text or 0)

    cell = LONG.replace("FOLDER", str(tmp_path)).replace("STEP", str(SECONDS / LINES))
    lab.write("long.ipynb", [LOAD, cell])
    lab.open("long.ipynb")
    lab.run_all()
    lab.output(1).get_by_text("line 3").wait_for()
    until(lambda: said() > LINES / 2, seconds=60 + SECONDS)
    pid = int(lab.output(0).inner_text().split("kernel")[-1].split()[0])
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_alive(pid))
    killed_at = until(said)
    until(lambda: said() > killed_at + LINES / 4, seconds=60 + SECONDS)

    lab.open("long.ipynb")
    lab.run_all()
    lab.output(1).get_by_text("has been running on local since").wait_for()
    lab.output(1).get_by_text(f"line {killed_at}").first.wait_for()
    shown_at = said()
    until(lambda: said() > shown_at + LINES / 4, seconds=60 + SECONDS)
    lab.output(1).get_by_text(f"line {shown_at + 5}").first.wait_for()  # it goes on
    (tmp_path / "go").touch()
    lab.output(1).get_by_text("the end").wait_for()

    text = lab.output(1).inner_text()
    lines = [line for line in text.splitlines() if line.startswith("line ")]
    assert lines == [f"line {number}" for number in range(1, said() + 1)]
    assert f"step {said()}" in text
    assert (tmp_path / "runs").read_text() == "x"
    assert lab.problems == []
