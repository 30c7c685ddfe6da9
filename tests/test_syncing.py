"""`sync_dir` from the notebook's side: files that change, hosts that lose things, Ctrl-C, what is printed."""

from __future__ import annotations

import errno
import os
import signal
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import fal_notebook as fal
from fal_notebook import syncing
from fal_notebook.hosts.inline import InlineHost

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def local(tmp_path: Path) -> Path:
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "b.txt").write_text("b")
    (folder / "new.txt").write_text(uuid.uuid4().hex)  # no test before has brought this
    return folder


@pytest.fixture
def remote() -> str:
    return f"/data/tests-{uuid.uuid4().hex}"


class Watched(InlineHost):
    """A host that calls something before each piece that it is brought."""

    def __init__(self, before: Callable[[str, threading.Event], None]) -> None:
        super().__init__("watched")
        self._before = before

    def upload(self, name: str, data: Any, stop: threading.Event) -> None:
        if not name.startswith("sync-manifest-"):
            self._before(name, stop)
        super().upload(name, data, stop)


def test_a_file_that_changes_before_it_is_sent_is_listed_again(
    local: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, changed = syncing.read_piece, []

    def change(root: str, relative: str, index: int) -> bytes:
        if relative == "b.txt" and not changed:
            changed.append(relative)
            (local / "b.txt").write_text("edited")
        return read(root, relative, index)

    monkeypatch.setattr(syncing, "read_piece", change)

    path = fal.sync_dir(local, remote, host="inline")

    assert Path(path, "b.txt").read_text() == "edited"


@pytest.mark.parametrize("gone", [True, False])
def test_a_file_that_changes_each_time_is_named_and_the_rest_arrives(
    local: Path, remote: str, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    path = fal.sync_dir(local, remote, host="inline")
    (local / "a.txt").write_text("new")
    (local / "b.txt").write_text("new b")
    read, count = syncing.read_piece, iter(range(100))

    def change(root: str, relative: str, index: int) -> bytes:
        if relative == "b.txt":
            (local / "b.txt").write_text(f"edited {next(count)}")
            if gone:
                raise FileNotFoundError(relative)
        return read(root, relative, index)

    monkeypatch.setattr(syncing, "read_piece", change)

    with pytest.warns(UserWarning, match=r"change while they are read.*'b\.txt'"):
        fal.sync_dir(local, remote, host="inline")

    assert Path(path, "a.txt").read_text() == "new"
    assert Path(path, "b.txt").read_text() == "b"


def test_ctrl_c_ends_it_and_the_next_try_goes_on(local: Path, remote: str) -> None:
    struck: list[str] = []
    told = threading.Event()

    def strike(name: str, stop: threading.Event) -> None:
        if not struck:
            struck.append(name)
            os.kill(os.getpid(), signal.SIGINT)
            if stop.wait(60):
                told.set()

    host = Watched(strike)
    with pytest.raises(KeyboardInterrupt):
        fal.sync_dir(local, remote, host=host)

    assert Path(fal.sync_dir(local, remote, host=host), "b.txt").read_text() == "b"
    assert told.wait(60)


def test_a_host_that_keeps_losing_what_is_sent_is_an_error(local: Path, remote: str) -> None:
    class Forgetful(InlineHost):
        def upload(self, name: str, data: Any, stop: threading.Event) -> None:
            if name.startswith("sync-manifest-"):
                super().upload(name, data, stop)

    with pytest.raises(fal.exceptions.FalServerlessError, match="lost what was sent"):
        fal.sync_dir(local, remote, host=Forgetful())


def test_a_full_disk_is_an_error_that_says_so(local: Path, remote: str) -> None:
    def fill(_name: str, _stop: threading.Event) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(fal.exceptions.ResourceError, match=r"No space left.*a second try sends the rest"):
        fal.sync_dir(local, remote, host=Watched(fill))


def test_it_waits_while_another_is_at_work(local: Path, remote: str) -> None:
    class Busy(InlineHost):
        answers = 0

        def ask(self, question: str, *, timeout: float = 30.0, **arguments: Any) -> Any:
            self.answers += 1
            if self.answers < 3:
                return {"state": "busy", "path": ""}
            return super().ask(question, timeout=timeout, **arguments)

    host = Busy()

    assert Path(fal.sync_dir(local, remote, host=host), "a.txt").read_text() == "a"
    assert host.answers > 3


def test_a_host_without_a_data_folder_is_refused(local: Path, remote: str) -> None:
    class Bare:
        name = "bare"

    with pytest.raises(fal.exceptions.FalServerlessError, match="'bare' has no data folder"):
        fal.sync_dir(local, remote, host=Bare())  # type: ignore[arg-type]


def test_in_a_terminal_one_line_is_written_anew(
    local: Path, remote: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = threading.Event()
    draw = syncing._Line.draw

    def note(self: Any, text: str) -> None:
        draw(self, text)
        if "of 34 bytes" in text:
            drawn.set()

    monkeypatch.setattr(syncing, "_is_live", lambda: True)
    monkeypatch.setattr(syncing._Line, "draw", note)
    fal.sync_dir(local, remote, host=Watched(lambda *_: drawn.wait(60) or None))

    lines = capsys.readouterr().out.split("\n")

    assert lines[0] == "Syncing..."
    assert "\rSyncing... 0 bytes of 34 bytes sent" in lines[1]
    assert lines[1].rpartition("\r")[2].startswith("Done: /data/tests-")
    assert lines[2:] == [""]


def test_without_a_terminal_nothing_is_written_over(
    local: Path, remote: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fal.sync_dir(local, remote, host="inline")

    assert "\r" not in capsys.readouterr().out


def test_many_paths_are_named_by_the_first(local: Path, remote: str) -> None:
    for number in range(30):
        os.mkfifo(local / f"pipe-{number:02}")

    with pytest.warns(UserWarning, match=r"'pipe-19' and 10 more"):
        fal.sync_dir(local, remote, host="inline")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e12, "3 TB")],
)
def test_sizes_are_written_for_people(size: float, text: str) -> None:
    assert syncing._size(size) == text
