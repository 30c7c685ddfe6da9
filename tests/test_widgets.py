"""Widgets made on a host: live in the notebook, in both directions; the front end is played by the test."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING

import pytest
from support.kernel import Kernel, working_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("ipykernel")


@pytest.fixture(scope="module")
def kernel(own_folders: Path) -> Iterator[Kernel]:
    with working_kernel() as kernel:
        needs = f"-r tqdm=={importlib.metadata.version('tqdm')}"
        first = kernel.run(f"%%fal {needs}\nimport ipywidgets as w", timeout=300)
        assert first.status == "ok", first.outputs
        yield kernel


def test_a_slider_changes_a_value_on_the_host_while_no_cell_runs(kernel: Kernel) -> None:
    cell = kernel.run(
        "%%fal --no-return\nslider = w.IntSlider(value=3)\nseen = []\n"
        "slider.observe(lambda change: (seen.append(change.new), print('now', change.new)), 'value')\nslider"
    )
    slider = kernel.view(cell)
    assert kernel.widgets[slider]["value"] == 3
    assert kernel.set(slider, value=42).text == "now 42\n"
    assert kernel.run("%%fal\nslider.value, seen").result == "(42, [42])"
    kernel.run("%%fal\nslider.value = 7")
    assert kernel.widgets[slider]["value"] == 7


def test_interact_runs_the_function_at_each_change(kernel: Kernel) -> None:
    code = "%%fal --no-return\n@w.interact(x=(0, 10), y=['a', 'b'])\ndef show(x, y): print(x * y)"
    box = kernel.view(kernel.run(code))
    children = [child.removeprefix("IPY_MODEL_") for child in kernel.widgets[box]["children"]]
    slider, choice, output = children
    assert kernel.taken[output].text == "aaaaa\n"
    kernel.set(slider, value=2)
    assert kernel.taken[output].text == "aa\n"
    kernel.set(choice, index=1)
    assert kernel.taken[output].text == "bb\n"


def test_an_output_widget_takes_what_is_shown_in_it(kernel: Kernel) -> None:
    cell = kernel.run(
        "%%fal --no-return\nout = w.Output()\ndisplay(out)\nprint('outside')\n"
        "with out:\n    print('inside')\n    display(5)\n    1 / 0\nprint('after')"
    )
    output = kernel.view(cell)
    assert cell.text == "outside\nafter\n"
    taken = kernel.taken[output]
    assert taken.text == "inside\n"
    assert taken.error == "ZeroDivisionError: division by zero"


def test_a_button_calls_back_and_shows_what_goes_wrong(kernel: Kernel) -> None:
    cell = kernel.run(
        "%%fal --no-return\nb = w.Button(description='Go')\ncount = 0\n"
        "def go(button):\n    global count\n    count += 1\n    display(count)\n    if count == 2: 1 / 0\n"
        "b.on_click(go)\nb"
    )
    click = {"method": "custom", "content": {"event": "click"}}
    first = kernel.say(kernel.view(cell), click)
    assert [o["data"]["text/plain"] for o in first.outputs] == ["1"]
    assert kernel.say(kernel.view(cell), click).error == "ZeroDivisionError: division by zero"
    assert kernel.run("%%fal\ncount").result == "2"


def test_buffers_travel_both_ways(kernel: Kernel) -> None:
    cell = kernel.run(
        "%%fal --no-return\nimage = w.Image(value=bytes(range(256)) * 2000)\n"
        "upload = w.Widget()\ngot = []\n"
        "image.on_msg(lambda _, content, buffers: got.append((content, bytes(buffers[0]))))\nimage"
    )
    image = kernel.view(cell)
    assert kernel.buffers[image] == [bytes(range(256)) * 2000]
    kernel.say(image, {"method": "custom", "content": {"n": 1}}, [b"\x00\xff" * 300_000])
    assert (
        kernel.run("%%fal\n[(c, len(b), b[:2]) for c, b in got]").result
        == r"[({'n': 1}, 600000, b'\x00\xff')]"
    )


def test_progress_bars_are_those_of_a_notebook(kernel: Kernel) -> None:
    cell = kernel.run(
        "%%fal --no-return\nfrom tqdm.auto import tqdm\nfor _ in tqdm(range(5), desc='work'): pass"
    )
    _, bar, label = kernel.widgets[kernel.view(cell)]["children"]
    assert kernel.widgets[bar.removeprefix("IPY_MODEL_")]["value"] == 5
    assert "5/5" in kernel.widgets[label.removeprefix("IPY_MODEL_")]["value"]
    assert cell.errors == ""


def test_jslink_is_between_two_widgets_of_the_front_end(kernel: Kernel) -> None:
    kernel.run(
        "%%fal --no-return\na, b = w.IntText(), w.IntText()\nlink = w.jslink((a, 'value'), (b, 'value'))"
    )
    links = [state for state in kernel.widgets.values() if state.get("_model_name") == "LinkModel"]
    assert len(links) == 1
    assert all(
        end[0].removeprefix("IPY_MODEL_") in kernel.widgets
        for end in (links[0]["source"], links[0]["target"])
    )


def test_a_task_that_waits_for_a_widget_goes_on(kernel: Kernel) -> None:
    """The pattern of ipywidgets' own documentation."""
    cell = kernel.run(
        "%%fal --no-return\nimport asyncio\n"
        "def changed(widget):\n    future = asyncio.Future()\n"
        "    def take(change):\n        future.set_result(change.new)\n"
        "        widget.unobserve(take, 'value')\n"
        "    widget.observe(take, 'value')\n    return future\n"
        "s, found = w.IntSlider(), []\n"
        "async def follow():\n    for _ in range(2): found.append(await changed(s))\n"
        "task = asyncio.ensure_future(follow())\ns"
    )
    kernel.set(kernel.view(cell), value=1)
    kernel.set(kernel.view(cell), value=2)
    assert kernel.run("%%fal\nfound, task.done()").result == "([1, 2], True)"


def test_in_the_background_widgets_are_live_too(kernel: Kernel) -> None:
    cell = kernel.run(
        "%%fal --background --no-return -o run\nbar = w.IntProgress(max=3)\ndisplay(bar)\n"
        "for _ in range(3): bar.value += 1"
    )
    kernel.run("run.result(60)")
    kernel.until(lambda: any("model_id" in str(o) for o in cell.outputs))
    kernel.until(lambda: kernel.widgets[kernel.view(cell)]["value"] == 3)


def test_a_message_waits_while_a_cell_runs(kernel: Kernel) -> None:
    cell = kernel.run(
        "%%fal --no-return\nt = w.IntText()\norder = []\nt.observe(lambda c: order.append(c.new), 'value')\nt"
    )
    code = (
        "%%fal --background --no-return -o run\nimport time\n"
        "print('be' + 'gun')\ntime.sleep(1)\norder.append('cell')"
    )
    kernel.wait_for(kernel.run(code), "begun")
    kernel.set(kernel.view(cell), value=1)
    assert kernel.run("%%fal\norder").result == "['cell', 1]"


def test_a_thread_moves_a_widget_while_no_cell_runs(kernel: Kernel) -> None:
    cell = kernel.run(
        "%%fal --no-return\nimport threading, time\np = w.IntProgress(max=4)\n"
        "def work():\n    for _ in range(4):\n        time.sleep(0.1)\n        p.value += 1\n"
        "threading.Thread(target=work).start()\np"
    )
    kernel.until(lambda: kernel.widgets[kernel.view(cell)]["value"] == 4)


def test_a_task_moves_a_widget_while_no_cell_runs(kernel: Kernel) -> None:
    cell = kernel.run(
        "%%fal --no-return\nimport asyncio\np = w.IntProgress(max=4)\n"
        "async def work():\n    for _ in range(4):\n        await asyncio.sleep(0.02)\n        p.value += 1\n"
        "    print('worked')\ntask = asyncio.ensure_future(work())\np"
    )
    kernel.until(lambda: kernel.widgets[kernel.view(cell)]["value"] == 4)
    kernel.wait_for(cell, "worked")


def test_the_end_of_the_session_closes_its_widgets(kernel: Kernel) -> None:
    cell = kernel.run("%%fal --session other --no-return\nimport ipywidgets as w\nw.Text()")
    view = kernel.view(cell)
    assert view in kernel.widgets
    kernel.run("%%fal --session other\nimport os\nos._exit(3)")
    kernel.until(lambda: view not in kernel.widgets)
    cell = kernel.run("%%fal --session other --no-return\nimport ipywidgets as w\nw.Text()")
    view = kernel.view(cell)
    kernel.run("%%fal --session other --fresh\npass")
    assert view not in kernel.widgets


def test_a_view_whose_widget_is_not_here_is_shown_as_text(kernel: Kernel) -> None:
    cell = kernel.run("%%fal --no-return -o run\nw.IntSlider(value=11)")
    assert "value=11" in cell.result
    kernel.run("%%fal\nw.Widget.close_all()")
    attached = kernel.run(
        "fal_run = __import__('fal_notebook').attach(run.run_id)\nfal_run.result(60) is not None"
    )
    kernel.wait_for(attached, "value=11")
    assert "model_id" not in str(attached.outputs)
