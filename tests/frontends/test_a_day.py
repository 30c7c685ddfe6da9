"""A notebook from its first cell to reading it again, as a person sees it: JupyterLab in a browser."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
from support.jupyterlab import NEEDS_CHROMIUM, NEEDS_SUBSHELLS
from support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from support.jupyterlab import Lab

pytestmark = [NEEDS_CHROMIUM, NEEDS_SUBSHELLS]

LINES = 50_000 * int(os.environ.get("FAL_TEST_SCALE", "1"))
FIRST = "%%fal -r matplotlib -r tqdm -r 'slow @ file://{folder}'\nimport matplotlib\nprint('built')"
BACKEND = """
import time, zipfile

def build_wheel(folder, *_args):
    time.sleep(1.5)
    name = "slow-1.0-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        about = "slow-1.0.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\\nName: slow\\nVersion: 1.0\\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{about}/RECORD", "")
    return name
"""
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "slow"
version = "1.0"
"""
PLOT = "%%fal\nimport matplotlib.pyplot as plt\nplt.plot([1, 4, 2]);"
BARS = """%%fal
from tqdm import tqdm
for epoch in fal.progress(range(2), desc="epochs"):
    for batch in fal.progress(range(4), desc="batches"):
        pass
for _ in tqdm(range(300), mininterval=0):
    pass"""
SLEEP = "%%fal\nimport time\nprint('asleep')\ntime.sleep(300)"
ERROR = "%%fal\ndef broken(x):\n    return 1 / x\n\nbroken(0)"
MANY = f"%%fal\nfor number in range({LINES}):\n    print('line', number)"
CELLS = ["%load_ext fal_notebook\nimport fal_notebook as fal", "%fal connect local", FIRST, PLOT, BARS, SLEEP]
CELLS += [ERROR, MANY, "%fal"]


@pytest.mark.timeout(300)
def test_a_notebook_from_loading_to_reading_it_again(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "backend.py").write_text(BACKEND)
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    path = lab.write("day.ipynb", [cell.replace("{folder}", str(tmp_path)) for cell in CELLS])
    lab.open("day.ipynb")
    for cell in range(5):
        lab.run(cell)
    lab.output(1).get_by_text("connected to local").wait_for()
    first_build(lab)
    lab.output(3).locator("img").wait_for()
    bars(lab)
    lab.run(5)
    interrupt_by_the_button(lab)
    lab.wait_ended(5)
    lab.run(6)
    lab.output(6).get_by_text("ZeroDivisionError").first.wait_for()
    lab.wait_ended(6)
    long_output(lab)
    panel(lab)
    lab.save()
    alive = path.read_text()
    assert lab.problems == []

    lab.page.goto("about:blank")
    lab.shut_down_kernels()
    read_again(lab, path, alive)


def first_build(lab: Lab) -> None:
    """The card says what takes its time, and folds to a line."""
    lab.output(2).get_by_text("built", exact=True).wait_for()
    lab.output(2).get_by_text("build ").wait_for()
    assert lab.output(2).locator(".fal-run").count() == 1
    assert "packages)" in lab.output(2).locator(".fal-run").inner_text()


def bars(lab: Lab) -> None:
    shown = lab.output(4).locator(".fal-progress")
    shown.get_by_text("batches").wait_for()
    until(lambda: shown.inner_text().count("100%") == 2)
    lab.output(4).get_by_text("300/300").wait_for()
    bar = lab.output(4).locator(".jp-RenderedText").inner_text()
    assert bar.count("%|") == 1  # it was drawn in place


def interrupt_by_the_button(lab: Lab) -> None:
    """It appears when a call takes long, and is heard while the cell runs."""
    button = lab.output(5).get_by_role("button", name="Interrupt")
    button.wait_for()
    lab.output(5).get_by_text("running ").wait_for()
    until(lambda: "CPU" in lab.output(5).locator(".fal-run").inner_text())
    button.click()
    lab.output(5).get_by_text("KeyboardInterrupt").first.wait_for()
    button.wait_for(state="hidden")
    assert "ran " in lab.output(5).locator(".fal-run").inner_text()


def long_output(lab: Lab) -> None:
    """The beginning and the end are shown, with a link to all of it; the page stays quick."""
    lab.run(7)
    lab.output(7).get_by_text(f"line {LINES - 1}").wait_for()
    lab.wait_idle()
    shown = lab.output(7).inner_text()
    assert shown.startswith("line 0\nline 1\n")
    assert len(shown) < 1_000_000
    link = lab.output(7).get_by_role("link").get_attribute("href")
    page = lab.page.context.browser.new_page()
    with page.expect_response(link) as answered:
        page.goto(link)
    assert answered.value.text() == "".join(f"line {number}\n" for number in range(LINES))
    page.close()


def panel(lab: Lab) -> None:
    """It shows what is on the hosts, and keeps itself up to date."""
    lab.run(8)
    shown = lab.output(8).locator(".fal-small")
    shown.get_by_role("button", name="Close").wait_for()
    shown.get_by_text(" · cancelled · print('asleep')").wait_for()
    shown.get_by_text("environments").wait_for()


def read_again(lab: Lab, path: Path, alive: str) -> None:
    """It was saved while the panel lived; there is no kernel any more."""
    assert "widget-view" in alive
    path.write_text(alive)
    lab.open("day.ipynb", kernel=False)
    lab.output(2).get_by_text("build ").wait_for()
    lab.output(3).locator("img").wait_for()
    lab.output(4).get_by_text("batches").wait_for()
    lab.output(5).get_by_text("ran ").wait_for()
    lab.output(6).get_by_text("ZeroDivisionError").first.wait_for()
    lab.output(8).get_by_text(" · cancelled · print('asleep')").wait_for()
    for cell in range(len(CELLS)):
        assert lab.output(cell).get_by_text("Error displaying widget").locator("visible=true").count() == 0
    texts = [output.get("data", {}) for cell in json.loads(alive)["cells"] for output in cell["outputs"]]
    assert all("text/plain" in data for data in texts if data)
