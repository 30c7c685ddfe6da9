"""A slider that lives on a host, moved by the mouse in JupyterLab."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from support.jupyterlab import NEEDS_CHROMIUM

if TYPE_CHECKING:
    from support.jupyterlab import Lab

pytestmark = NEEDS_CHROMIUM

SLIDER = """%%fal --no-return
import ipywidgets as widgets

@widgets.interact(size=(1, 40))
def draw(size=3):
    print('■' * size, size)"""
SHOW = "%%fal\nsizes = widgets.IntSlider(description='stays', max=40)\nsizes"
READ = "%%fal\nprint('the host has', sizes.value)"


def test_a_slider_moved_by_the_mouse_changes_a_value_on_the_host(lab: Lab) -> None:
    path = lab.write("slider.ipynb", ["%load_ext fal_notebook", SLIDER, SHOW, READ])
    lab.open("slider.ipynb")
    lab.run_all()
    lab.output(3).get_by_text("the host has 0").wait_for()

    drag(lab, 1, 0.75)
    lab.output(1).get_by_text("■ 30").wait_for()
    drag(lab, 2, 0.5)
    lab.page.locator(".jp-CodeCell .jp-InputArea").nth(3).click()
    lab.command("notebook:run-cell")
    lab.output(3).get_by_text("the host has 20").wait_for()
    lab.save()
    assert "IntSlider(value=0" in json.dumps(json.loads(path.read_text())["cells"][2]["outputs"])

    lab.open("slider.ipynb")  # the kernel goes on, and the new page asks it for the widgets
    assert lab.output(2).locator(".widget-readout").inner_text() == "20"
    drag(lab, 1, 0.25)
    lab.output(1).get_by_text("■ 11").wait_for()
    assert lab.problems == []


def drag(lab: Lab, cell: int, to: float) -> None:
    """Move the slider below a cell to a place between its ends, 0 to 1."""
    handle = lab.output(cell).get_by_role("slider").bounding_box()
    rail = lab.output(cell).locator(".noUi-base").bounding_box()
    mouse = lab.page.mouse
    mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    mouse.down()
    mouse.move(rail["x"] + rail["width"] * to, rail["y"] + rail["height"] / 2, steps=12)
    mouse.up()
