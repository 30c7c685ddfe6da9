"""Listing a local folder: what goes along, what is left, what is read."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from blake3 import blake3

from fal_notebook import digests, manifest
from fal_notebook.digests import Digests
from fal_notebook.manifest import Listing, list_folder, read_piece

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user may look at."""
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        top.chmod(0o755)
        (top / "inner").mkdir()
        (top / "inner" / "file").write_text("x")
        (top / "b").write_text("bb")
        yield top


def listed(folder: Path, **more: Any) -> Listing:
    with Digests() as known:
        return list_folder(str(folder), known, **more)


@contextmanager
def without_rights(path: Path) -> Iterator[None]:
    """Take all rights from a path, and from us the power to ignore that."""
    mode = path.stat().st_mode
    path.chmod(0)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        path.chmod(mode)


def test_files_are_listed_in_order_with_mode_size_and_hash(folder: Path) -> None:
    (folder / "b").chmod(0o640)
    (folder / "empty").touch()

    found = listed(folder).manifest

    assert list(found.files) == ["b", "empty", "inner/file"]
    assert (found.files["b"].mode, found.files["b"].size) == (0o640, 2)
    assert found.files["b"].pieces == (blake3(b"bb").hexdigest(),)
    assert found.files["empty"].pieces == ()


def test_the_same_content_gives_the_same_bytes_and_names_count(folder: Path) -> None:
    first = listed(folder).manifest.to_bytes()
    second = listed(folder).manifest.to_bytes()
    (folder / "b").rename(folder / "c")

    assert first == second != listed(folder).manifest.to_bytes()


def test_large_files_are_hashed_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fal_agent.mirror.manifests", "fal_notebook.manifest"):
        monkeypatch.setattr(f"{module}.PIECE_SIZE", 1000)
    content = os.urandom(2500)
    (folder / "b").write_bytes(content)

    entry = listed(folder).manifest.files["b"]

    assert entry.pieces == tuple(blake3(content[at : at + 1000]).hexdigest() for at in (0, 1000, 2000))
    assert read_piece(str(folder), "b", 2) == content[2000:]


def test_an_unchanged_file_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_SETTLED", 0)
    read: list[int] = []
    first = listed(folder, tell=read.append).manifest
    again = listed(folder, tell=read.append).manifest
    (folder / "b").write_text("edited")
    third = listed(folder, tell=read.append).manifest

    assert first.files == again.files
    assert sorted(read) == [1, 2, 6]
    assert third.files["b"].pieces == (blake3(b"edited").hexdigest(),)


@pytest.mark.parametrize("name", ["b", "inner", "inner/.gitignore"])
def test_what_cannot_be_read_is_named_and_kept_on_the_host(folder: Path, name: str) -> None:
    (folder / "inner" / ".gitignore").write_text("x\n")
    known = Digests(folder.parent / f"{folder.name}.sqlite3")
    with known, without_rights(folder / name):
        listing = list_folder(str(folder), known)
    (folder.parent / f"{folder.name}.sqlite3").unlink()

    left = "inner" if name.startswith("inner") else name
    assert listing.manifest.keep == [left]
    assert not any(path.startswith(left) for path in listing.manifest.files)
    assert [paths for reason, paths in listing.notes.items() if "cannot be read" in reason] == [[left]]


def test_a_folder_that_cannot_be_read_at_all_is_an_error(folder: Path) -> None:
    with Digests() as known, without_rights(folder), pytest.raises(PermissionError):
        list_folder(str(folder), known)


def append_while_hashing(monkeypatch: pytest.MonkeyPatch, path: Path, times: int) -> None:
    """Let a file grow while it is read, so many times."""
    hashed, done = manifest._Walk._hashed, []

    def grow(self: Any, descriptor: int) -> Any:
        if len(done) < times and os.fstat(descriptor).st_ino == path.stat().st_ino:
            done.append(1)
            with path.open("a") as file:
                file.write("more")
        return hashed(self, descriptor)

    monkeypatch.setattr(manifest._Walk, "_hashed", grow)


def test_a_file_that_changes_while_it_is_read_is_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_while_hashing(monkeypatch, folder / "b", 1)

    assert listed(folder).manifest.files["b"].pieces == (blake3(b"bbmore").hexdigest(),)


def test_a_file_that_never_rests_is_named_and_kept_on_the_host(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_while_hashing(monkeypatch, folder / "b", 99)

    listing = listed(folder)

    assert listing.manifest.keep == ["b"]
    assert [paths for reason, paths in listing.notes.items() if "change while" in reason] == [["b"]]


def test_rights_beyond_reading_writing_and_executing_stay_here(folder: Path) -> None:
    (folder / "b").chmod(0o4755)

    assert listed(folder).manifest.files["b"].mode == 0o755
