"""The memory of what files hold."""

from __future__ import annotations

import os
import sqlite3
import time
import warnings
from typing import TYPE_CHECKING

import pytest

from fal_notebook import digests
from fal_notebook.digests import Digests, cache_folder

if TYPE_CHECKING:
    from pathlib import Path

PIECES = ("ab" * 32, "cd" * 32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file; the memory takes any as settled."""
    path = tmp_path / "file"
    path.write_text("x")
    return path


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_SETTLED", 0)


def remember(database: Path, file: Path) -> None:
    with Digests(database) as memory:
        memory.put(str(file), file.stat(), PIECES)


def recall(database: Path, file: Path) -> tuple[str, ...] | None:
    with Digests(database) as memory:
        return memory.get(str(file), file.stat())


def test_what_was_remembered_is_known_later(tmp_path: Path, file: Path) -> None:
    remember(tmp_path / "db", file)

    assert recall(tmp_path / "db", file) == PIECES


@pytest.mark.parametrize("change", ["content", "mode", "time", "replaced", "path"])
def test_a_file_that_looks_different_is_not_known(tmp_path: Path, file: Path, change: str) -> None:
    remember(tmp_path / "db", file)
    if change == "content":
        file.write_text("longer")
    elif change == "mode":
        file.chmod(0o600)
    elif change == "time":
        os.utime(file, (1, 1))
    elif change == "replaced":
        (tmp_path / "other").write_text("x")
        (tmp_path / "other").replace(file)
    else:
        file = file.rename(tmp_path / "moved")

    assert recall(tmp_path / "db", file) is None


def test_a_file_that_was_touched_just_now_is_not_remembered(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_SETTLED", 10**18)
    remember(tmp_path / "db", file)

    assert recall(tmp_path / "db", file) is None


def test_an_empty_file_is_remembered(tmp_path: Path, file: Path) -> None:
    with Digests(tmp_path / "db") as memory:
        memory.put(str(file), file.stat(), ())

    assert recall(tmp_path / "db", file) == ()


def test_a_damaged_memory_is_made_anew(tmp_path: Path, file: Path) -> None:
    (tmp_path / "db").write_bytes(b"this is no database" * 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remember(tmp_path / "db", file)

    assert recall(tmp_path / "db", file) == PIECES


def test_without_a_place_for_it_everything_is_read_and_it_says_so(tmp_path: Path, file: Path) -> None:
    (tmp_path / "no-folder").touch()
    database = tmp_path / "no-folder" / "db"

    with pytest.warns(UserWarning, match="FAL_NOTEBOOK_CACHE"):
        remember(database, file)
    with pytest.warns(UserWarning, match="FAL_NOTEBOOK_CACHE"):
        known = recall(database, file)

    assert known is None


def test_what_was_not_used_for_long_is_forgotten(tmp_path: Path, file: Path) -> None:
    remember(tmp_path / "db", file)
    with sqlite3.connect(tmp_path / "db") as database:
        database.execute("UPDATE files SET used = ?", (int(time.time()) - digests._KEPT_SECONDS - 5,))
    database.close()
    other = tmp_path / "other"
    other.touch()

    remember(tmp_path / "db", other)

    assert recall(tmp_path / "db", file) is None
    assert recall(tmp_path / "db", other) == PIECES


def test_the_number_of_files_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_KEPT_FILES", 3)
    for name in "abcde":
        (tmp_path / name).touch()
        remember(tmp_path / "db", tmp_path / name)

    known = [name for name in "abcde" if recall(tmp_path / "db", tmp_path / name)]

    assert len(known) == 3


def test_the_cache_folder_is_the_platforms_own_unless_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAL_NOTEBOOK_CACHE", str(tmp_path))
    named = cache_folder()
    monkeypatch.delenv("FAL_NOTEBOOK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))

    assert named == tmp_path
    assert cache_folder() == tmp_path / "xdg" / "fal_notebook"
