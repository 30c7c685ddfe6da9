"""Cells on a host as a person meets them in Notebook 7: output, the stop button, an error, the saved file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import nbformat
from support.jupyterlab import NEEDS_CHROMIUM

if TYPE_CHECKING:
    from support.jupyterlab import Lab

pytestmark = NEEDS_CHROMIUM

SHOW = """%%fal
import time
from IPython.display import HTML, display
far_away_value = 1
print('from there')
display(HTML('<b class="theirs">bold</b>'))
far_away_value + 41"""
CELLS = [
    "%load_ext fal_notebook",
    SHOW,
    "%%fal\nprint('begun')\ntime.sleep(600)",
    "%%fal\nprint('goes on', far_away_value)\n1 / 0",
]


def test_cells_on_a_host_in_notebook_7(lab: Lab) -> None:
    path = lab.write("seven.ipynb", CELLS)
    lab.open("seven.ipynb", application="notebooks")
    assert lab.page.locator("#jp-NotebookLogo").is_visible()
    lab.run_all()
    lab.output(1).get_by_text("from there").wait_for()
    assert lab.output(1).locator("b.theirs").inner_text() == "bold"
    lab.output(1).get_by_text("42", exact=True).wait_for()

    lab.output(2).get_by_text("begun").wait_for()
    lab.page.locator("[data-jp-item-name='interrupt']").click()
    lab.output(2).get_by_text("KeyboardInterrupt").first.wait_for()
    lab.wait_idle()
    run_cell(lab, 3)
    lab.output(3).get_by_text("goes on 1").wait_for()
    lab.output(3).get_by_text("ZeroDivisionError").first.wait_for()

    lab.save()
    outputs = nbformat.read(path, as_version=4).cells[1].outputs
    assert [output.output_type for output in outputs if "fal" not in str(output)] == [
        "stream", "display_data", "execute_result",
    ]  # fmt: skip
    assert lab.problems == []


def run_cell(lab: Lab, number: int) -> None:
    """Run one cell as Shift-Enter does."""
    lab.page.locator(".jp-CodeCell .cm-content").nth(number).click()
    lab.page.keyboard.press("Shift+Enter")
