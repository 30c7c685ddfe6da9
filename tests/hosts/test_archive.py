"""The archive of our own source: complete, runnable, and named by what is in it."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fal_agent
import fal_notebook
from fal_agent.errors import FalServerlessError
from fal_notebook.hosts import archive
from fal_notebook.hosts.archive import source_archive

SNIPPET = "from fal_notebook.hosts.archive import source_archive as s; print(s().digest, hash(s().data))"


def archive_in(folder: Path, *, seed: str = "0") -> str:
    """Digest and hash of the data that a fresh process with these sources gives."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONHASHSEED": seed}
    command = [sys.executable, "-c", SNIPPET]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The archive, unpacked."""
    with zipfile.ZipFile(io.BytesIO(source_archive().data)) as opened:
        opened.extractall(tmp_path / "copy")
    return tmp_path / "copy"


def test_it_holds_the_source_of_both_packages_and_nothing_else() -> None:
    expected = {}
    for package in (fal_agent, fal_notebook):
        for folder in map(Path, package.__path__):
            for path in [*folder.rglob("*.py"), *folder.rglob("py.typed")]:
                expected[path.relative_to(folder.parent).as_posix()] = path.read_bytes()

    with zipfile.ZipFile(io.BytesIO(source_archive().data)) as opened:
        packed = {name: opened.read(name) for name in opened.namelist()}

    assert packed == expected
    assert list(packed) == sorted(packed)
    assert "fal_agent/wire.py" in packed
    assert "fal_notebook/hosts/archive.py" in packed


def test_unpacked_it_gives_the_same_archive_again(copy: Path) -> None:
    """A host's code folder is named by the digest; other times, places and hash seeds must not count."""
    os.utime(copy / "fal_agent" / "wire.py", (1, 1))

    assert archive_in(copy).split()[0] == source_archive().digest
    assert archive_in(copy) == archive_in(copy.rename(copy.with_name("elsewhere")))


def test_any_change_of_the_source_changes_the_digest(copy: Path) -> None:
    before = archive_in(copy).split()[0]

    with (copy / "fal_agent" / "wire.py").open("a") as file:
        file.write("\n")
    changed = archive_in(copy).split()[0]
    (copy / "fal_agent" / "wire.py").rename(copy / "fal_agent" / "wirf.py")
    renamed = archive_in(copy).split()[0]

    assert len({before, changed, renamed}) == 3


def test_what_is_not_source_does_not_count(copy: Path) -> None:
    before = archive_in(copy).split()[0]

    (copy / "fal_agent" / "notes.txt").write_text("x")
    (copy / "fal_agent" / ".#wire.py").symlink_to("nowhere")  # what an editor leaves behind
    (copy / "fal_agent" / "__pycache__" / "old.py").parent.mkdir(exist_ok=True)
    (copy / "fal_agent" / "__pycache__" / "old.py").write_text("x")

    assert archive_in(copy).split()[0] == before


def test_entries_have_fixed_times_and_modes() -> None:
    with zipfile.ZipFile(io.BytesIO(source_archive().data)) as opened:
        entries = opened.infolist()

    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {entry.external_attr >> 16 for entry in entries} == {0o100644}


def test_one_process_makes_one_archive() -> None:
    assert source_archive() is source_archive()
    assert source_archive().data is source_archive().data


def test_the_digest_can_name_a_folder() -> None:
    digest = source_archive().digest

    assert len(digest) == 64
    assert set(digest) <= set("0123456789abcdef")


def test_a_package_without_a_folder_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As when someone imports from a zip."""
    package = tmp_path / "gone_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("gone_package")
    shutil.rmtree(package)
    monkeypatch.setattr(archive, "PACKAGES", ("gone_package",))

    with pytest.raises(FalServerlessError, match="source of gone_package cannot be read"):
        archive.source_archive.__wrapped__()
