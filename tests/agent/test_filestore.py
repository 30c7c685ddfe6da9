"""The store of files that apps give away is kept within bounds, and nothing else is touched."""

from __future__ import annotations

import io
import os
import shutil
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from fal_agent.runtime.toolkit.files import find_kept, keep
from fal_agent.server.filestore import FRESH_SECONDS, FileLimits, prune_files

if TYPE_CHECKING:
    from pathlib import Path

ANY = FileLimits(budget_bytes=float("inf"), age_seconds=float("inf"))
NONE = FileLimits(budget_bytes=0, age_seconds=0)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAL_PERSISTENT_DIR", str(tmp_path))
    return tmp_path / ".fal" / "files"


def put(content: bytes, name: str = "a.bin", *, age: float = 0.0) -> Path:
    """Keep a file that was used `age` seconds ago."""
    path = keep(io.BytesIO(content), name).path
    if age:
        os.utime(path, (time.time() - age,) * 2)
    return path


def test_what_nobody_has_fetched_for_long_goes(store: Path) -> None:
    old, young = put(b"old", age=50_000), put(b"young", age=30_000)

    assert prune_files(store, FileLimits(age_seconds=40_000)) == [old]

    assert not old.parent.exists()
    assert young.read_bytes() == b"young"


def test_beyond_the_budget_those_go_that_were_used_longest_ago(store: Path) -> None:
    first, second, third = (
        put(letter * 100, age=age) for letter, age in ((b"a", 9e4), (b"b", 8e4), (b"c", 7e4))
    )

    assert prune_files(store, FileLimits(budget_bytes=200)) == [first]
    assert prune_files(store, FileLimits(budget_bytes=199)) == [second]
    assert third.exists()


def test_what_was_made_recently_stays_whatever_the_limits(store: Path) -> None:
    fresh = put(b"fresh", age=FRESH_SECONDS - 60)

    assert prune_files(store, NONE) == []
    assert fresh.exists()


def test_a_fetch_is_a_use(store: Path) -> None:
    path = put(b"fetched", age=90_000)

    assert find_kept(path.parent.name, path.name) == path

    assert prune_files(store, NONE) == []


def test_making_it_again_is_a_use(store: Path) -> None:
    put(b"same", age=90_000)
    path = put(b"same")

    assert prune_files(store, NONE) == []
    assert path.exists()


def test_one_content_by_two_names_goes_name_by_name(store: Path) -> None:
    old, young = put(b"same", "old.txt", age=90_000), put(b"same", "young.txt")

    assert prune_files(store, NONE) == [old]
    assert young.exists()


def test_what_a_killed_process_had_begun_goes_after_a_day(store: Path) -> None:
    put(b"something")
    begun, long_begun = store / ".incoming-1", store / ".incoming-2"
    for path in (begun, long_begun):
        path.write_bytes(b"half")
    os.utime(long_begun, (time.time() - 90_000,) * 2)

    prune_files(store, ANY)

    assert (begun.exists(), long_begun.exists()) == (True, False)


def test_nothing_else_is_touched(store: Path, tmp_path: Path) -> None:
    put(b"something")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    mine = [store / "notes.txt", store / "more" / "notes.txt", elsewhere / "data"]
    mine[1].parent.mkdir()
    for path in mine:
        path.write_text("the user's")
        os.utime(path, (0, 0))
    (store / ("a" * 64)).symlink_to(elsewhere)
    folder = store / ("b" * 64)
    folder.mkdir()
    (folder / "link").symlink_to(elsewhere / "data")

    assert prune_files(store, NONE) == []
    assert all(path.exists() for path in mine)


def test_a_store_that_is_not_there_is_no_error(store: Path) -> None:
    assert prune_files(store, NONE) == []
    assert not store.exists()


def test_a_file_that_is_made_while_old_ones_go_is_there_afterwards(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has put a file there may give its URL away: it must not go with the old one of that name."""
    monkeypatch.setattr("fal_agent.server.filestore.FRESH_SECONDS", 50.0)
    stop = threading.Event()

    def prune() -> None:
        while not stop.is_set():
            prune_files(store, FileLimits(budget_bytes=0))

    pruner = threading.Thread(target=prune)
    pruner.start()
    try:
        for number in range(300):
            path = put(b"%d" % (number % 3), age=100)  # ripe for removal at once
            path = put(b"%d" % (number % 3))
            assert path.read_bytes() == b"%d" % (number % 3)
    finally:
        stop.set()
        pruner.join()


def test_the_agent_prunes_by_what_the_user_has_chosen(tmp_path: Path) -> None:
    from fal_agent.server.daemon import AgentSettings, _Agent

    agent: Any = _Agent(tmp_path, "digest", AgentSettings(files=NONE))
    agent._service = SimpleNamespace(active_runs=list)
    (tmp_path / "data").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAL_PERSISTENT_DIR", str(tmp_path / "data"))
        old, fresh = put(b"old", age=90_000), put(b"fresh")

    agent._clean()
    agent._journal.close()

    assert (old.exists(), fresh.exists()) == (False, True)


def test_a_disk_that_refuses_to_be_cleaned_does_not_end_the_agent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from fal_agent.server.daemon import AgentSettings, _Agent

    agent: Any = _Agent(tmp_path, "digest", AgentSettings(files=NONE))
    agent._service = SimpleNamespace(active_runs=list)
    shutil.rmtree(tmp_path / "blobs")  # as somebody does who wants room at once
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAL_PERSISTENT_DIR", str(tmp_path / "data"))
        old = put(b"old", age=90_000)

    agent._clean()
    agent._journal.close()

    assert not old.exists()  # the rest is done
    assert "could not clean" in caplog.text
