"""Large files reach a machine whole, and go on where a broken connection left them."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from typing import TYPE_CHECKING, Any

import pytest

from fal_agent.errors import HostError, LinkLostError
from fal_notebook.hosts import bringing
from fal_notebook.hosts.base import CompletedCommand
from fal_notebook.hosts.bringing import bring, unpack

if TYPE_CHECKING:
    from pathlib import Path

DATA = os.urandom(100_000)


class ShellLink:
    """A machine that is a shell; it loses its connection after so many bytes of input, if told to."""

    def __init__(self, *, breaks_after: int | None = None, path: str = "/usr/bin:/bin") -> None:
        self.breaks_after, self.path = breaks_after, path
        self.sent = 0

    def run(self, command: str, *, stdin: bytes = b"", timeout: float = 60.0) -> Any:
        room = len(stdin) if self.breaks_after is None else self.breaks_after
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            input=stdin[:room],
            capture_output=True,
            env={"PATH": self.path},
            check=False,
        )
        self.sent += min(room, len(stdin))
        if room < len(stdin):
            self.breaks_after = None
            raise LinkLostError("it broke")
        if self.breaks_after is not None:
            self.breaks_after -= len(stdin)
        return CompletedCommand(done.returncode, done.stdout, done.stderr)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bringing, "_PIECE", 16 << 10)


def put(link: Any, path: Path) -> None:
    bring(link, str(path), DATA, what="it", mode=0o700)


def test_a_file_arrives_whole_with_its_permissions_in_a_closed_folder(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "it's"

    put(ShellLink(), path)

    assert path.read_bytes() == DATA
    assert path.stat().st_mode & 0o777 == 0o700
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_after_a_broken_connection_only_the_rest_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "it"
    first, second = ShellLink(breaks_after=70_000), ShellLink()
    with pytest.raises(LinkLostError):
        put(first, path)
    assert not path.exists()

    put(second, path)

    assert path.read_bytes() == DATA
    assert (first.sent, second.sent) == (70_000, 30_000)


@pytest.mark.parametrize("there", [b"something else", DATA[:50_000] + b"!", DATA + b"too much"])
def test_what_arrived_damaged_is_sent_anew(tmp_path: Path, there: bytes) -> None:
    path = tmp_path / "it"
    with pytest.raises(LinkLostError):
        put(ShellLink(breaks_after=10), path)
    (part,) = tmp_path.iterdir()
    part.write_bytes(there)

    put(ShellLink(), path)

    assert path.read_bytes() == DATA
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(HostError, match="file"):
        put(ShellLink(), tmp_path / "file" / "it")


def test_without_any_program_for_hashes_the_size_must_do(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("mkdir", "wc", "cat", "cut", "rm", "mv", "chmod"):
        (tools / name).symlink_to(f"/bin/{name}")

    put(ShellLink(path=str(tools)), tmp_path / "it")

    assert (tmp_path / "it").read_bytes() == DATA


@pytest.mark.parametrize("gunzip", [True, False])
def test_an_archive_appears_as_a_whole_folder(tmp_path: Path, gunzip: bool) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if gunzip else "w") as archive:
        entry = tarfile.TarInfo("bin/python3")
        entry.size, entry.mode = 3, 0o755
        archive.addfile(entry, io.BytesIO(b"abc"))
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())

    unpack(ShellLink(), str(tmp_path / "a.tar"), str(tmp_path / "a"), gunzip=gunzip)

    assert (tmp_path / "a" / "bin" / "python3").read_bytes() == b"abc"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_half_an_archive_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8bgarbage")

    with pytest.raises(HostError, match="could not be unpacked"):
        unpack(ShellLink(), str(tmp_path / "a.tar"), str(tmp_path / "a"), gunzip=True)

    assert [item.name for item in tmp_path.iterdir()] == ["a.tar"]
