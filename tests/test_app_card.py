"""The card of a spawned app: what it says, that it stays text, and how it lives in a kernel."""

from __future__ import annotations

import itertools
import time
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from support.waiting import until

from fal_agent.wire import Failure, Log, Result, Serving, Stage
from fal_notebook.display.app_face import AppFace
from fal_notebook.display.apps import AppCard
from fal_notebook.display.logtail import LogTail
from fal_notebook.hosts.base import Received

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.kernel import Cell, Kernel

GONE = '<span class="fal-nothing">'
VIEW = "application/vnd.jupyter.widget-view+json"


def log(text: str | bytes, stream: str = "stdout", source: str = "user") -> Received:
    data = text if isinstance(text, bytes) else text.encode()
    return Received(Log("r", stream, source, sent_at=time.time()), [data])


def tail(*texts: str | bytes, count: int = 5) -> list[str]:
    lines = LogTail(count)
    for text in texts:
        received = log(text)
        lines.add(received.event, received)
    return lines.lines


# ---------------------------------------------------------------- the end of a log


def test_the_last_lines_are_kept_however_the_text_is_divided() -> None:
    assert tail("one\ntwo\nthr", "ee\nfour\n", "five", count=3) == ["three", "four", "five"]
    assert tail("é".encode()[:1], "é".encode()[1:]) == ["é"]
    assert tail("".join(f"{number}\n" for number in range(1000)), count=2) == ["998", "999"]
    assert tail("a", *["b\n"] * 9, "c", count=2) == ["b", "c"]


def test_streams_do_not_continue_each_others_lines() -> None:
    lines = LogTail(5)
    for received in (log("out "), log("err\n", "stderr"), log("put\n")):
        lines.add(received.event, received)
    assert lines.lines == ["out put", "err"]


def test_a_progress_bar_is_what_it_shows_last() -> None:
    assert tail("10%\r20%\r", "30%\r", "100%\r\n", "done\r\n") == ["100%", "done"]
    assert tail("x" * 5000 + "\r", "short\n") == ["short"]


def test_control_sequences_leave_no_trace() -> None:
    assert tail("\x1b[1;31mred\x1b[0m \x1b]0;title\x07a\x1b]8;;http://x\x1b\\b\x1b(B\x00\x9b\u202ec\x1b") == [
        "red abc"
    ]


def test_long_lines_are_cut() -> None:
    (line,) = tail("x" * 5000)
    assert line == "x" * 300 + "…"


# ---------------------------------------------------------------- the card's text and HTML


class Elements(HTMLParser):
    """The elements of some HTML and the text in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.names.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.links += [value for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self.text += data


EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"' &amp;"


@pytest.mark.parametrize("state", ["starting", "ready", "stopping", "stopped", "failed"])
def test_whatever_it_is_told_stays_text(state: str) -> None:
    face = AppFace(
        EVIL, EVIL, state, EVIL, doing=EVIL, note=EVIL, url=EVIL, link=f"http://h/?{EVIL}",
        problem=EVIL, traceback=EVIL, lines=(EVIL,), hint=EVIL,
    )  # fmt: skip
    shown = Elements(face.html())
    assert set(shown.names) <= {"style", "div", "b", "span", "a", "pre", "details", "summary"}
    assert shown.links in ([], [f"http://h/?{EVIL}"])
    assert shown.text.count(EVIL) >= 3
    assert state in shown.text


def test_a_ready_app_has_a_link_and_its_log() -> None:
    face = AppFace(
        "a", "gpu-box", "ready", "12:30", url="http://127.0.0.1:1", link="http://127.0.0.1:1/docs",
        runners=3, note="12:31 a runner is gone", lines=("one", "two"), hint="stop it with app.stop()",
    )  # fmt: skip
    assert face.text() == (
        "a on gpu-box: ready since 12:30 · 3 runners\nhttp://127.0.0.1:1\n12:31 a runner is gone\n"
        "  one\n  two\nstop it with app.stop()"
    )
    shown = Elements(face.html())
    assert shown.links == ["http://127.0.0.1:1/docs"]
    assert "one\ntwo" in shown.text


def test_an_app_without_a_runner_says_when_there_will_be_one() -> None:
    assert "a request starts one" in AppFace("a", "h", "ready", runners=0).text()
    assert "runner" not in AppFace("a", "h", "ready", runners=1).text()


def test_a_stopped_app_folds_to_a_line_and_has_no_link() -> None:
    face = AppFace("a", "h", "stopped", "12:30", url="http://x", link="http://x", lines=("one",), hint="hint")
    assert face.text() == "a on h: stopped at 12:30\n  one"
    shown = Elements(face.html())
    assert "details" in shown.names
    assert shown.links == []
    assert "details" not in Elements(AppFace("a", "h", "stopped").html()).names


def test_a_failed_app_says_where() -> None:
    face = AppFace(
        "a", "h", "failed", problem="KeyError: 'x'", traceback='  File "f", line 1, in setup\n    d["x"]\n'
    )
    told = 'File "f", line 1, in setup\n  d["x"]\nKeyError: \'x\''
    assert told in Elements(face.html()).text
    assert "KeyError: 'x'" in face.text()


# ---------------------------------------------------------------- the card's life


class Board:
    """Takes what is drawn."""

    def __init__(self) -> None:
        self.drawn: list[tuple[float, str]] = []
        self.is_closed = False

    def update(self, data: dict[str, str]) -> None:
        self.drawn.append((time.monotonic(), data["text/plain"]))

    def close(self) -> None:
        self.is_closed = True

    @property
    def last(self) -> str:
        return self.drawn[-1][1] if self.drawn else ""


@pytest.fixture
def info() -> Any:
    return SimpleNamespace(
        name="a", host=SimpleNamespace(name="h"), state="starting", url="http://u", link="http://u"
    )


def drawn(info: Any) -> tuple[AppCard, Board]:
    """A card as if a cell showed it."""
    card, board = AppCard(info), Board()
    card._display = board
    return card, board


def stage(phase: str, text: str = "") -> Received:
    return Received(Stage("r", phase, text, sent_at=time.time()))


def test_a_flood_is_not_drawn_more_often_than_a_front_end_can(info: Any) -> None:
    card, board = drawn(info)
    deadline = time.monotonic() + 30
    while len(board.drawn) < 4 and time.monotonic() < deadline:
        card.take(log("line\n"))
    times = [at for at, _ in board.drawn]
    assert len(times) == 4
    assert min(after - before for before, after in itertools.pairwise(times)) > 0.2


def test_what_happened_is_drawn_in_the_end_and_then_nothing_more(info: Any) -> None:
    card, board = drawn(info)
    card.take(stage("build", "3 packages"))
    until(lambda: "building the environment · 3 packages" in board.last)
    card.take(log("Installed torch\n", "stderr", "builder"))
    card.take(log("loading\n"))
    until(lambda: "Installed torch\n  loading" in board.last)
    info.state = "ready"
    card.take(Received(Serving("r")))
    until(lambda: ": ready" in board.last)
    assert "building" not in board.last
    assert "torch" not in board.last
    card.take(stage("serve", "a runner is gone: exit status 3"))
    card.take(stage("runners", "2"))
    until(lambda: "2 runners" in board.last and "exit status 3" in board.last)
    info.state = "stopped"
    card.take(Received(Result("r")))
    until(lambda: board.is_closed)
    count = len(board.drawn)
    card.take(log("late\n"))
    assert card._timer is None
    assert len(board.drawn) == count
    assert ": stopped" in board.last


def test_an_end_is_not_shown_before_its_reason(info: Any) -> None:
    """The app knows its state a moment before its card hears why."""
    card, board = drawn(info)
    info.state = "failed"
    card.take(log("loading\n"))
    until(lambda: "loading" in board.last)
    assert ": starting" in board.last

    card.take(Received(Failure("r", "environment", "no such package")))
    until(lambda: ": failed" in board.last)
    assert "no such package" in board.last


def test_a_stop_that_fails_is_told(info: Any) -> None:
    card, board = drawn(info)
    card.stopping()
    until(lambda: ": stopping" in board.last)
    card._stop_failed(RuntimeError("the host sleeps"))
    until(lambda: "the host sleeps" in board.last)
    assert ": starting" in board.last


def test_where_uv_failed_its_words_are_shown(info: Any) -> None:
    card, board = drawn(info)
    info.state = "failed"
    card.take(Received(Failure("r", "environment", "no such package", {"log": "because x was not found"})))
    until(lambda: board.is_closed)
    assert "because x was not found\nno such package" in board.last


def test_in_a_script_the_log_is_printed(info: Any, capsys: pytest.CaptureFixture[str]) -> None:
    card = AppCard(info)
    card.take(log("é".encode()[:1]))
    card.take(log("é\n".encode()[1:]))
    card.take(log("err\n", "stderr"))
    assert capsys.readouterr() == ("é\n", "err\n")


# ---------------------------------------------------------------- in a kernel

APP = """
import os, time, threading, httpx
import fal_notebook as fal

class {name}(fal.App, name="{name}"):
    def setup(self):
        print("loading", flush=True)
        {setup}

    @fal.endpoint("/say")
    def say(self, text: str) -> str:
        print(text, flush=True)
        return text

    @fal.endpoint("/die")
    def die(self) -> None:
        os._exit(3)
"""


@pytest.fixture(scope="module")
def kernel(own_folders: Path) -> Iterator[Kernel]:
    from support.kernel import PATH, start_kernel

    with start_kernel(PYTHONPATH=PATH) as kernel:
        yield kernel
        kernel.run("for info in fal.apps('local'): info.stop()")


def define(kernel: Kernel, name: str, setup: str = "pass") -> None:
    assert kernel.run(APP.format(name=name, setup=setup)).status == "ok"


def cards(cell: Cell) -> list[str]:
    """What a front end without widgets shows, which is what stays."""
    return [output["data"]["text/plain"] for output in cell.outputs]


def test_the_button_stops_the_app_and_every_cell_that_shows_it_says_so(kernel: Kernel) -> None:
    define(kernel, "Stopped")
    first = kernel.run("app = Stopped.spawn()\napp")
    kernel.wait_for(first, "ready since")
    second = kernel.run("app")
    assert first.kinds == second.kinds == ["display_data", "display_data"]
    assert "loading" in cards(second)[0]
    assert cards(second)[1] == "stop it with app.stop()"
    assert VIEW not in str(second.outputs[0])
    assert "stop it with app.stop()" in second.outputs[1]["data"]["text/html"]

    kernel.press(second)
    for cell in (first, second):
        kernel.wait_for(cell, ": stopped at")
        kernel.wait_for(cell, GONE)
        assert VIEW not in str(cell.outputs)
        assert len(cell.outputs) == 2
    # A page that was loaded anew hears of the button alone.
    until(
        lambda: (
            kernel.run("pass") and [w for w in kernel.widgets.values() if w.get("description") == "Stopped"]
        )
    )
    until(lambda: kernel.run("app.future.result(10)").status == "ok")
    later = kernel.run("app")
    assert later.kinds == ["display_data"]


def test_the_button_does_not_hold_up_the_kernel(kernel: Kernel) -> None:
    """The app takes its time to end; the cell after the press runs meanwhile."""
    define(kernel, "Slow")
    kernel.run("Slow.teardown = lambda self: time.sleep(2)")
    cell = kernel.run("slow = Slow.spawn()\nslow.wait()\nslow")
    kernel.press(cell)
    meanwhile = kernel.run("slow.future.done()")
    assert meanwhile.result == "False"
    kernel.wait_for(cell, ": stopping")
    kernel.wait_for(cell, ": stopped")


def test_what_it_says_later_stays_below_its_own_cells(kernel: Kernel) -> None:
    define(kernel, "Talking")
    cell = kernel.run("app = Talking.spawn()\napp.wait()\napp")
    other = kernel.run(
        "for i in range(20):\n    httpx.post(f'{app.url}/say', json={'text': f'said {i}'})\n"
        "    time.sleep(0.05)\n"
        "print('other')"
    )
    kernel.wait_for(cell, "said 19")
    assert other.text == "other\n"
    assert other.kinds == ["stream"]
    kernel.run("app.stop()")
    kernel.wait_for(cell, ": stopped")


def test_a_runner_that_dies_is_told_of(kernel: Kernel) -> None:
    define(kernel, "Mortal")
    cell = kernel.run("app = Mortal.spawn()\napp.wait()\napp")
    kernel.run("try: httpx.post(f'{app.url}/die', timeout=10)\nexcept httpx.HTTPError: pass")
    kernel.wait_for(cell, "a runner is gone")
    kernel.run("app.stop()")
    kernel.wait_for(cell, ": stopped")


def test_a_failing_setup_is_shown_with_the_users_lines_alone(kernel: Kernel) -> None:
    define(kernel, "Failing", setup="raise ValueError('no <b>weights</b>')")
    cell = kernel.run("Failing.spawn()")
    kernel.wait_for(cell, ": failed at")
    text = cards(cell)[0]
    assert "in setup\n" in text
    assert "raise ValueError('no <b>weights</b>')\nValueError: no <b>weights</b>" in text
    assert text.count("File ") == 1, text
    assert "<b>weights" not in cell.outputs[0]["data"]["text/html"]
    kernel.wait_for(cell, GONE)


def test_without_widgets_the_card_says_how_to_stop_the_app(kernel: Kernel) -> None:
    define(kernel, "Plain")
    kernel.run("import sys\nkept = sys.modules.get('ipywidgets')\nsys.modules['ipywidgets'] = None")
    cell = kernel.run("plain = Plain.spawn()\nplain")
    kernel.run("sys.modules['ipywidgets'] = kept")
    assert cell.kinds == ["display_data"]
    assert cards(cell)[0].endswith("stop it with plain.stop()")
    assert "stop it with plain.stop()" in cell.outputs[0]["data"]["text/html"]
    kernel.run("plain.stop()")
    kernel.wait_for(cell, ": stopped")


def test_where_no_variable_has_the_app_the_hint_says_how_to_find_it(kernel: Kernel) -> None:
    define(kernel, "Unnamed")
    cell = kernel.run("Unnamed.spawn()")
    hint = cards(cell)[1]
    assert hint == "stop it with fal.apps.find('Unnamed', 'local').stop()"
    kernel.wait_for(cell, "ready since")
    assert kernel.run(hint.removeprefix("stop it with ")).status == "ok"
    kernel.wait_for(cell, ": stopped")


def test_the_apps_of_a_host_are_a_table_with_links(kernel: Kernel) -> None:
    define(kernel, "Listed")
    kernel.run("app = Listed.spawn()\napp.wait()")
    url = (kernel.run("app.url").result or "").strip("'")
    for code in ("fal.apps()", "%fal apps"):
        (output,) = kernel.run(code).outputs
        assert f'<a href="{url}"' in output["data"]["text/html"]
        assert url in output["data"]["text/plain"]
    kernel.run("app.stop()")


def test_in_a_terminal_it_is_text() -> None:
    from IPython.core.formatters import DisplayFormatter

    from fal_agent.wire import AppSpec
    from fal_notebook.hosts.registry import get_host
    from fal_notebook.spawned import AppSpawnInfo

    info = AppSpawnInfo(get_host("local"), AppSpec(name="a"), headers={}, token="", startup_timeout=None)
    data, _ = DisplayFormatter().format(info)
    assert data["text/plain"].startswith("a on local: starting")
