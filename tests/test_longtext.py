"""Long output: what a cell shows of it, and the file that has all of it."""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fal_agent.wire import Log
from fal_notebook.display import logfiles
from fal_notebook.display.longtext import LongText, overwritten
from fal_notebook.hosts.base import Received

if TYPE_CHECKING:
    from collections.abc import Iterable


def log(data: bytes, stream: str = "stdout") -> Received:
    return Received(Log("r", stream, sent_at=time.time()), [data])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAL_NOTEBOOK_LOGS", str(tmp_path / "logs"))
    return tmp_path / "logs"


def shown(text: LongText, pieces: Iterable[bytes]) -> str:
    return "".join(text.take(log(piece)) for piece in pieces)


def file_of(text: LongText) -> Path:
    found = re.search(r"all of it: (\S+)", text.rest_text())
    assert found is not None, text.rest_text()
    return Path(found[1])


LINES = [f"line {number}\n".encode() for number in range(5000)]


def test_what_is_within_the_bound_is_shown_as_it_is(folder: Path) -> None:
    text = LongText("f", limit=100_000)
    pieces = [b"a\r\n", "é".encode()[:1], "é".encode()[1:], b"\x1b[31mred\x1b[0m\r", b"x" * 99_000]

    assert shown(text, pieces) == b"".join(pieces).decode()
    text.close()

    assert not text.is_long
    assert not list(folder.glob("*"))


@pytest.mark.parametrize("together", [1, 7, 5000])
def test_beyond_it_whole_lines_are_shown_and_the_file_has_all(folder: Path, together: int) -> None:
    text = LongText("for i in range(3):", limit=10_000)
    pieces = [b"".join(LINES[start : start + together]) for start in range(0, len(LINES), together)]

    head = shown(text, pieces)
    text.close()

    assert head == b"".join(LINES[:200]).decode()  # a line counts for 50 characters
    assert text.rest_text().endswith("line 4998\nline 4999")
    assert "… 3,800 lines (" in text.rest_text()
    path = file_of(text)
    assert path.read_bytes() == b"".join(LINES)
    assert path.parent == folder
    assert (path.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o600, 0o700)


def test_one_endless_line_is_bounded_too() -> None:
    text = LongText("f", limit=10_000)

    head = shown(text, [b"x" * 7000] * 100)

    assert head == "x" * 10_000
    assert len(text.rest_text()) < 70_000


def test_memory_does_not_grow_with_the_text() -> None:
    import tracemalloc

    text = LongText("f", limit=10_000)
    shown(text, [b"x" * 99 + b"\n"] * 1000)
    piece = b"y" * 64_000
    tracemalloc.start()
    for _ in range(200):
        text.take(log(piece + b"\n"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 2_000_000


def test_a_bar_goes_on_for_ever_and_shows_its_last_state() -> None:
    """Overwritten text does not count; once there is much of it, states that nobody sees are left out."""
    text = LongText("f", limit=10_000)
    states = b"".join(b"\r%4d of 9999 done" % number for number in range(100))

    head = shown(text, [states] * 50)
    text.close()

    assert not text.is_long
    assert head.endswith("\r  99 of 9999 done")
    assert len(head) < 20_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ab", (0, 5)),
        ("ab\ncd", (0, 2)),
        ("\rab", (4, 2)),
        ("x\ry\rz\n", (7, 0)),
        ("a\r\nb", (0, 1)),
    ],
)
def test_overwritten_characters_are_counted(text: str, expected: tuple[int, int]) -> None:
    """The line that it goes on has three characters."""
    assert overwritten(text, 3) == expected


def test_a_cleared_text_begins_anew() -> None:
    text = LongText("f", limit=1000)
    shown(text, LINES)
    text.clear()

    assert shown(text, [b"new\n"]) == "new\n"
    assert not text.is_long


def test_markup_stays_text_and_the_link_gives_the_file() -> None:
    text = LongText("f", limit=100)
    shown(text, [b"<script>x</script>\n"] * 50)
    page = text.rest_html()

    assert "<script>" not in page
    found = re.search(r'href="(http://127\.0\.0\.1:\d+/[^"]+)"', page)
    assert found is not None
    with urllib.request.urlopen(found[1], timeout=10) as answer:
        assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert answer.read() == b"<script>x</script>\n" * 50
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(found[1].rpartition("/")[0] + "/../other.log", timeout=10)


def test_where_no_file_can_be_written_the_run_goes_on_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FAL_NOTEBOOK_LOGS", str(tmp_path / "file" / "logs"))
    text = LongText("f", limit=1000)
    shown(text, LINES)

    assert "does not have all of it: " in text.rest_text()
    assert "Not a directory" in text.rest_text()
    assert "<a " not in text.rest_html()


def test_old_files_go_and_all_together_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    folder.mkdir()
    now = time.time()
    for name, size, days in (("old", 1, 31), ("older", 400, 3), ("recent", 400, 2), ("latest", 400, 1)):
        (folder / f"{name}.log").write_bytes(b"x" * size)
        os.utime(folder / f"{name}.log", (now, now - days * 86400))
    (folder / "notes.txt").touch()
    monkeypatch.setattr(logfiles, "KEPT_BYTES", 1000)

    file = logfiles.LogFile("f")

    left = {path.name for path in folder.iterdir()} - {file.path.name}
    assert left == {"recent.log", "latest.log", "notes.txt"}
    file.write(b"y" * 1001)
    assert "has reached" in file.problem
