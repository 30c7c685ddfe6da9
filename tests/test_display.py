"""What a call's events look like: as text, and below a cell of a real kernel."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any

import pytest

from fal_agent.wire import Display, Log, Stage
from fal_notebook.display.phases import Phases
from fal_notebook.display.plain import TextFace
from fal_notebook.display.tables import Table
from fal_notebook.hosts.base import Received

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.kernel import Cell, Kernel


def log(text: str | bytes, stream: str = "stdout", source: str = "user") -> Received:
    data = text if isinstance(text, bytes) else text.encode()
    return Received(Log("r", stream, source, sent_at=time.time()), [data])


def shown(data: dict[str, Any], kind: str = "display", **transient: str) -> Received:
    content = {"data": data, "metadata": {}, "transient": transient}
    return Received(Display("r", kind, sent_at=time.time()), [json.dumps(content).encode()])


def stage(phase: str, text: str = "", ago: float = 0.0) -> Received:
    return Received(Stage("r", phase, text, sent_at=time.time() - ago))


# ---------------------------------------------------------------- as text


def test_printed_text_goes_to_the_same_stream(capsys: pytest.CaptureFixture[str]) -> None:
    face = TextFace()
    face.draw(log("out\r"))
    face.draw(log("err\n", "stderr"))
    assert capsys.readouterr() == ("out\r", "err\n")


def test_a_character_divided_between_two_events_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Events are cut at sizes, not at characters; the streams do not disturb each other."""
    face = TextFace()
    face.draw(log("é".encode()[:1]))
    face.draw(log("ü".encode()[:1], "stderr"))
    face.draw(log("é".encode()[1:]))
    face.draw(log("ü".encode()[1:], "stderr"))
    assert capsys.readouterr() == ("é", "ü")


def test_displays_are_shown_as_their_text(capsys: pytest.CaptureFixture[str]) -> None:
    face = TextFace()
    face.draw(shown({"text/plain": "a table", "text/html": "<table>"}))
    face.draw(shown({"text/plain": "newer"}, "update", display_id="d"))
    face.draw(shown({"image/png": "aGk="}))
    assert capsys.readouterr().out == "a table\n"


def test_quick_phases_are_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    face = TextFace()
    for event in (
        stage("resolve"),
        log("Resolved 3 packages\n", "stderr", "builder"),
        stage("start"),
        stage("run"),
    ):
        face.draw(event)
    face.draw(log("hello\n"))
    assert capsys.readouterr() == ("hello\n", "")


def test_slow_phases_are_told_with_what_uv_says(capsys: pytest.CaptureFixture[str]) -> None:
    face = TextFace()
    face.draw(stage("build", "3 packages", ago=5))
    face.draw(log("Downloading torch\n", "stderr", "builder"))
    face.draw(log("Installed torch\n", "stderr", "builder"))
    err = capsys.readouterr().err
    assert re.match(r"building the environment · 3 packages · 5\.\d s\n", err)
    assert err.count("building") == 1
    assert err.endswith("  Downloading torch\n  Installed torch\n")


# ---------------------------------------------------------------- phases


def test_phases_are_worth_telling_after_a_second() -> None:
    phases = Phases()
    phases.enter(Stage("r", "queue", "2 calls ahead", sent_at=100.0))
    assert not phases.is_worth_telling(100.9)
    assert phases.is_worth_telling(101.1)
    assert phases.headline(103.0) == "waiting · 2 calls ahead · 3.0 s"


def test_phases_fold_to_what_they_took() -> None:
    phases = Phases()
    phases.enter(Stage("r", "resolve", sent_at=100.0))
    phases.enter(Stage("r", "build", "3 packages", sent_at=101.0))
    phases.enter(Stage("r", "start", sent_at=107.0))
    phases.end(108.5)
    phases.end(200.0)
    assert phases.headline(300.0) == "resolve 1.0 s, build 6.0 s (3 packages), start 1.5 s"


# ---------------------------------------------------------------- tables


def test_a_table_reads_well_as_text_and_is_safe_as_html() -> None:
    table = Table(["host", "address"], [["local", "this machine"], ["<b>", "x"]])
    assert repr(table) == "host   address\nlocal  this machine\n<b>    x"
    assert "&lt;b&gt;" in table._repr_html_()
    assert "(none)" in repr(Table(["host"], []))


# ---------------------------------------------------------------- in a kernel

HELPERS = """
import json, time, threading
from fal_agent.wire import Clear, Display, Failure, Log, Result, Stage
from fal_notebook.display.board import BackgroundFace
from fal_notebook.display.notebook import CellFace
from fal_notebook.hosts.base import Received

def log(text, stream="stdout", source="user"):
    return Received(Log("r", stream, source, sent_at=time.time()), [text.encode()])

def shown(data, kind="display", **transient):
    content = json.dumps({"data": data, "metadata": {}, "transient": transient}).encode()
    return Received(Display("r", kind, sent_at=time.time()), [content])

def stage(phase, text="", ago=0.0):
    return Received(Stage("r", phase, text, sent_at=time.time() - ago))

def result():
    return Received(Result("r", sent_at=time.time()))
"""


@pytest.fixture(scope="module")
def kernel(own_folders: Path) -> Iterator[Kernel]:
    pytest.importorskip("ipykernel")
    from support.kernel import PATH, start_kernel

    with start_kernel(PYTHONPATH=PATH) as kernel:
        assert kernel.run(HELPERS).status == "ok"
        yield kernel


def texts(cell: Cell) -> list[str]:
    return [output["data"]["text/plain"] for output in cell.outputs if "data" in output]


def test_quick_phases_leave_nothing_in_the_cell(kernel: Kernel) -> None:
    cell = kernel.run(
        "draw = CellFace().draw\ndraw(stage('start'))\ndraw(stage('run'))\ndraw(log('hello'))\ndraw(result())"
    )
    assert (cell.kinds, cell.text) == (["stream"], "hello")


def test_a_slow_phase_is_one_line_that_folds(kernel: Kernel) -> None:
    cell = kernel.run(
        "draw = CellFace().draw\ndraw(stage('build', '3 packages', ago=9))\ntime.sleep(0.3)\n"
        "draw(log('Installed torch', 'stderr', 'builder'))"
    )
    assert re.fullmatch(r"building the environment · 3 packages · 9\.\d s\n  Installed torch", texts(cell)[0])
    kernel.run("draw(stage('run'))\ndraw(log('hello'))\ndraw(result())")
    kernel.wait_for(cell, "build 9.")
    assert len(cell.outputs) == 1
    assert "Installed" not in str(cell.outputs)


def test_a_phase_of_which_nothing_is_heard_is_told_all_the_same(kernel: Kernel) -> None:
    cell = kernel.run(
        "face = CellFace()\nface.draw(stage('queue', 'the GPU is taken', ago=0.5))\ntime.sleep(1.5)"
    )
    assert re.fullmatch(r"waiting · the GPU is taken · \d\.\d s", texts(cell)[0])
    kernel.run("face.draw(result())")


def test_markup_in_uvs_lines_stays_text(kernel: Kernel) -> None:
    cell = kernel.run("draw = CellFace().draw\ndraw(stage('build', '<b>', ago=9))\ndraw(result())")
    assert "<b>" not in cell.outputs[0]["data"]["text/html"]


def test_every_kind_of_display_finds_its_place(kernel: Kernel) -> None:
    cell = kernel.run(
        "draw = CellFace().draw\ndraw(shown({'text/plain': 'one'}, display_id='d1'))\n"
        "draw(shown({'text/plain': 'two'}, 'update', display_id='d1'))\n"
        "draw(shown({'text/plain': 'three', 'text/html': '<i>3</i>'}, 'result'))\ndraw(result())"
    )
    assert cell.kinds == ["display_data", "execute_result"]
    assert texts(cell) == ["two", "three"]
    assert cell.outputs[1]["data"]["text/html"] == "<i>3</i>"


def test_output_is_cleared_when_asked(kernel: Kernel) -> None:
    cell = kernel.run(
        "draw = CellFace().draw\ndraw(log('gone'))\ndraw(Received(Clear('r', wait=False)))\ndraw(log('here'))"
    )
    assert cell.text == "here"


def test_what_runs_in_the_background_stays_below_its_cell(kernel: Kernel) -> None:
    """From any thread, while other cells run and print."""
    first = kernel.run("one = BackgroundFace('first()').draw")
    second = kernel.run("two = BackgroundFace('second()').draw")
    other = kernel.run(
        "def speak(draw, word):\n    for i in range(3):\n        draw(log(f'{word} {i}\\n'))\n"
        "        time.sleep(0.05)\n    draw(result())\n"
        "threads = [threading.Thread(target=speak, args=a) for a in ((one, 'uno'), (two, 'due'))]\n"
        "[t.start() for t in threads]\nprint('other')\n[t.join() for t in threads];\ntime.sleep(0.5)"
    )
    kernel.wait_for(first, "uno 2")
    kernel.wait_for(second, "due 2")
    assert other.text == "other\n"
    assert texts(first) == ["first() in the background: done\nuno 0\nuno 1\nuno 2"]
    assert "due" not in str(first.outputs)
    assert "uno" not in str(second.outputs)


def test_several_calls_of_one_cell_share_one_place(kernel: Kernel) -> None:
    cell = kernel.run(
        "faces = [BackgroundFace(f'f({i})') for i in range(3)]\n"
        "for i, face in enumerate(faces):\n    face.draw(log(f'from {i}\\n'))\n"
        "faces[0].draw(result())\ntime.sleep(0.6)"
    )
    kernel.wait_for(cell, "1 of 3 done")
    assert texts(cell) == ["3 calls in the background: 1 of 3 done\nfrom 0\nfrom 1\nfrom 2"]


def test_progress_bars_in_the_background_show_their_last_state(kernel: Kernel) -> None:
    cell = kernel.run("face = BackgroundFace('f()')\nface.draw(log('10%\\r50%\\r100%'))\ntime.sleep(0.5)")
    kernel.wait_for(cell, "100%")
    assert "50%" not in texts(cell)[0]


def test_a_flood_in_the_background_keeps_its_head_and_tail(kernel: Kernel) -> None:
    cell = kernel.run(
        "face = BackgroundFace('f()')\nface.draw(log('begin '))\n"
        "for i in range(30):\n    face.draw(log('x' * 50_000))\nface.draw(log(' end'))\ntime.sleep(0.5)"
    )
    kernel.wait_for(cell, " end")
    text = texts(cell)[0]
    assert "begin" in text
    assert "1.3 MB) are not shown here; all of it: " in text
    assert len(text) < 200_000


def test_a_build_says_how_much_it_has_fetched() -> None:
    phases = Phases()
    phases.enter(Stage("r", "build", "12 packages", sent_at=100.0))
    phases.add_lines(b"Downloading torch (800.0MiB)\nDownloading numpy (16.5MiB)\n Downloaded numpy\n")

    assert phases.headline(103.0) == "building the environment · 12 packages · 17 MB of 856 MB · 3.0 s"
    phases.add_lines(b" Downloaded torch\n + torch==2.9\n")
    phases.end(110.0)
    assert phases.headline(200.0) == "build 10 s (12 packages · 856 MB)"


def test_data_on_its_way_is_a_bar_with_its_rate() -> None:
    phases = Phases()
    phases.sent(0, 256e6, 100.0)
    phases.sent(64e6, 256e6, 102.0)

    assert phases.headline(102.0) == "sending data · ███░░░░░░░░░ 64 MB of 256 MB · 32 MB/s · 2.0 s"


def test_a_strip_says_what_the_worker_uses() -> None:
    from fal_notebook.display.run_card import _Usage

    gpu = {"index": 0, "used": 3_100_000_000, "total": 24 * 10**9}
    usage = _Usage()
    usage.take({"pid": 7, "at": 10.0, "cpu_seconds": 5.0, "memory": 2_000_000_000, "gpus": [gpu]})
    usage.take({"pid": 7, "at": 12.0, "cpu_seconds": 8.0, "memory": 1_200_000_000, "gpus": [gpu]})

    assert usage.text(is_over=False) == " · CPU 150% · 1.2 GB · GPU 0 3.1 GB of 24 GB"
    assert usage.text(is_over=True) == " (at most 2.0 GB of memory)"
    usage.forget()
    assert usage.text(is_over=False) == ""


def test_a_build_says_how_a_function_s_requirements_have_changed(kernel: Kernel) -> None:
    cell = kernel.run(
        "draw = CellFace(reason='+ six, numpy==1.26 → numpy==2.4').draw\n"
        "draw(stage('build', '3 packages', ago=9))"
    )
    assert texts(cell)[0].endswith("because its requirements have changed: + six, numpy==1.26 → numpy==2.4")
    kernel.run("draw(result())")


def test_a_function_knows_how_its_requirements_have_changed() -> None:
    import fal_notebook as fal

    def declare(*lines: str) -> str:
        @fal.function(requirements=list(lines))
        def changing() -> None: ...

        return changing._change

    changes = [declare("six", "pandas"), declare("six", "pandas"), declare("six==1.16", "scipy")]

    assert changes == ["", "", "+ scipy, six → six==1.16, - pandas"]
