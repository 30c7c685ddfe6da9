"""The card of an app as a person sees it: JupyterLab in a browser."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from support.jupyterlab import NEEDS_CHROMIUM, NEEDS_SUBSHELLS

if TYPE_CHECKING:
    from support.jupyterlab import Lab

pytestmark = [NEEDS_CHROMIUM, NEEDS_SUBSHELLS]

EVIL = "<script>window.evil = 1</script><img src=x onerror='window.evil = 2'>"
SPAWN = f'''%load_ext fal_notebook
import time
import fal_notebook as fal

class Echo(fal.App, name="NAME"):
    def setup(self):
        print("\\x1b[31mloading\\x1b[0m", flush=True)
        print("""{EVIL}""", flush=True)

    @fal.endpoint("/")
    def echo(self, text: str) -> str:
        return text

app = Echo.spawn()
app'''
WAIT = "while not app.future.done():\n    time.sleep(0.1)\nprint('seen to end')"


def test_the_card_is_live_and_stays_readable(lab: Lab) -> None:
    path = lab.write("app.ipynb", [SPAWN.replace("NAME", "echo"), "app.wait()\napp", WAIT])
    lab.open("app.ipynb")
    lab.run_all()
    for cell in (0, 1):
        lab.output(cell).get_by_text("● ready").wait_for()
        lab.output(cell).get_by_text(f"loading\n{EVIL}").wait_for()
    assert lab.output(0).get_by_role("link").get_attribute("href").startswith("http://127.0.0.1:")
    lab.output(0).get_by_role("button", name="Stop").wait_for()
    lab.save()
    alive = path.read_text()
    stop_while_a_cell_runs(lab)
    lab.save()
    outputs = json.loads(path.read_text())["cells"][0]["outputs"]
    assert "echo on local: stopped" in "".join(outputs[0]["data"]["text/plain"])
    assert "widget" not in json.dumps([output["data"] for output in outputs[1:]])
    assert lab.problems == []

    assert "widget-view" in alive
    lab.page.goto("about:blank")
    lab.shut_down_kernels()
    path.write_text(alive)
    read_without_its_kernel(lab)
    stranger = path.with_name("stranger.ipynb")  # somebody else's file: JupyterLab does not trust it
    stranger.write_text(alive.replace("app.wait()", "app.wait( )"))
    read_untrusted(lab)


def stop_while_a_cell_runs(lab: Lab) -> None:
    """The last cell waits for the end of the app."""
    lab.output(1).get_by_role("button", name="Stop").click()
    lab.output(2).get_by_text("seen to end").wait_for()
    for cell in (0, 1):
        lab.output(cell).get_by_text("● stopped").wait_for()
        lab.output(cell).get_by_role("button").wait_for(state="hidden")
        assert not lab.output(cell).get_by_text(EVIL).is_visible()  # folded
    lab.output(0).locator("summary").click()
    lab.output(0).get_by_text(EVIL).wait_for()
    assert lab.page.evaluate("window.evil") is None


def read_without_its_kernel(lab: Lab) -> None:
    """It was saved while the app lived, so there is the view of a button in it that is no more."""
    lab.open("app.ipynb", kernel=False)
    view = lab.output(0).get_by_text("Error displaying widget")
    view.wait_for(state="attached")
    assert not view.is_visible()
    lab.output(0).get_by_text("● ready").wait_for()
    assert lab.output(0).inner_text().rstrip().endswith(EVIL)


def read_untrusted(lab: Lab) -> None:
    """Without styles and widgets."""
    lab.open("stranger.ipynb", kernel=False)
    lab.output(0).get_by_text("● ready").wait_for()
    assert lab.output(0).inner_text().rstrip().endswith("stop it with app.stop()")
    assert lab.page.evaluate("window.evil") is None
