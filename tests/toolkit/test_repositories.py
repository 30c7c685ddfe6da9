"""Cloning real git repositories: reuse, commits, atomicity, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from fal_agent.errors import DownloadError
from fal_agent.runtime.toolkit import repositories
from fal_notebook.toolkit import clone_repository

if TYPE_CHECKING:
    from pathlib import Path


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=me", "-c", "user.email=me@example.org", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def commit(folder: Path, text: str) -> str:
    (folder / "file.txt").write_text(text)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", text)
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A repository with two commits, the file's text being their names."""
    folder = tmp_path / "origin" / "model.git"
    folder.mkdir(parents=True)
    git(folder, "init", "-q")
    commit(folder, "one")
    commit(folder, "two")
    return folder


def test_a_repository_is_cloned_into_the_folder_of_repositories(origin: Path, data: Path) -> None:
    path = clone_repository(origin.as_uri())

    assert path == data / ".fal" / "repos" / "model"
    assert (path / "file.txt").read_text() == "two"
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]


def test_a_commit_has_a_folder_of_its_own(origin: Path, data: Path) -> None:
    first = git(origin, "rev-parse", "HEAD~1")

    path = clone_repository(origin.as_uri(), commit_hash=first)

    assert path == data / ".fal" / "repos" / f"model-{first[:8]}"
    assert (path / "file.txt").read_text() == "one"
    assert clone_repository(origin.as_uri(), commit_hash=first[:8].upper()) == path


def test_name_and_folder_can_be_chosen(origin: Path, data: Path, tmp_path: Path) -> None:
    head = git(origin, "rev-parse", "HEAD")

    assert clone_repository(origin.as_uri(), target_dir="mine", repo_name="x") == data / "mine" / "x"
    assert (
        clone_repository(origin.as_uri(), target_dir=tmp_path / "to", repo_name="x", commit_hash=head)
        == tmp_path / "to" / f"x-{head[:8]}"
    )


def test_what_is_at_the_commit_is_used_again(origin: Path) -> None:
    head = git(origin, "rev-parse", "HEAD")
    path = clone_repository(origin.as_uri(), commit_hash=head)
    (path / "made-here").touch()
    plain = clone_repository(origin.as_uri())
    commit(origin, "three")

    assert (clone_repository(origin.as_uri(), commit_hash=head) / "made-here").exists()
    assert (clone_repository(origin.as_uri()) / "file.txt").read_text() == "two"
    assert (clone_repository(origin.as_uri(), force=True) / "file.txt").read_text() == "three"
    assert [entry.name for entry in plain.parent.iterdir() if entry.name.startswith(".")] == []


def test_what_is_at_another_commit_or_broken_is_cloned_anew(origin: Path) -> None:
    head = git(origin, "rev-parse", "HEAD")
    path = clone_repository(origin.as_uri(), commit_hash=head)
    git(path, "checkout", "-q", "HEAD~1")
    assert (clone_repository(origin.as_uri(), commit_hash=head) / "file.txt").read_text() == "two"

    (path / ".git" / "HEAD").unlink()
    assert (clone_repository(origin.as_uri(), commit_hash=head) / "file.txt").read_text() == "two"
    assert git(path, "rev-parse", "HEAD") == head


def test_submodules_come_along(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")  # git clones submodules from this machine only when told so
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "protocol.file.allow")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "always")
    outer = tmp_path / "outer"
    outer.mkdir()
    git(outer, "init", "-q")
    git(outer, "submodule", "--quiet", "add", origin.as_uri(), "inner")
    head = commit(outer, "outer")

    for path in (clone_repository(outer.as_uri()), clone_repository(outer.as_uri(), commit_hash=head)):
        assert (path / "inner" / "file.txt").read_text() == "two"


def test_the_path_is_added_once(origin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))

    path = clone_repository(origin.as_uri(), include_to_path=True)
    clone_repository(origin.as_uri(), include_to_path=True)

    assert sys.path[0] == str(path)
    assert sys.path.count(str(path)) == 1


def test_many_at_once_clone_it_once(origin: Path) -> None:
    def clone(_: int) -> int:
        return (clone_repository(origin.as_uri()) / ".git").stat().st_ino

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(clone, range(6)))) == 1


def test_a_repository_that_this_process_stands_in_is_not_meant(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook of git sets these for everything that it starts."""
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))

    assert (clone_repository(origin.as_uri()) / "file.txt").read_text() == "two"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("commit_hash", ["", "1234567", "main", "-1234567", "1234567g", "a" * 65])
def test_a_hash_that_may_name_several_commits_is_refused(origin: Path, commit_hash: str) -> None:
    with pytest.raises(ValueError, match="at least 8 hex digits"):
        clone_repository(origin.as_uri(), commit_hash=commit_hash)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "--upload-pack=touch x",
        "ext::sh -c id",
        "ext::http://x/y.git",
        "/tmp/repository",
        "ftp://x.org/a",
        "https:a",
        "https://x\n/a",
    ],
)
def test_what_is_no_address_never_reaches_git(url: str) -> None:
    with pytest.raises(ValueError, match="is not the address of a git repository"):
        clone_repository(url)


@pytest.mark.parametrize("name", ["", "..", "a/b", ".git", "a\nb"])
def test_a_name_is_one_folders(origin: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a folder's name"):
        clone_repository(origin.as_uri(), repo_name=name)


def test_a_failure_has_gits_words_and_leaves_nothing(origin: Path, data: Path) -> None:
    with pytest.raises(DownloadError, match=r"does not (exist|appear)"):
        clone_repository((origin / "none").as_uri())
    with pytest.raises(DownloadError, match="git could not do it"):
        clone_repository(origin.as_uri(), commit_hash="0123456789")

    assert list((data / ".fal" / "repos").iterdir()) == []


def test_a_branch_that_is_called_like_a_hash_is_not_the_commit(origin: Path) -> None:
    git(origin, "tag", "deadbeef")

    with pytest.raises(DownloadError, match="has no commit deadbeef"):
        clone_repository(origin.as_uri(), commit_hash="deadbeef")


def test_a_failed_clone_keeps_what_was_there(origin: Path) -> None:
    path = clone_repository(origin.as_uri())
    origin.rename(origin.with_name("gone"))

    with pytest.raises(DownloadError):
        clone_repository(origin.as_uri(), force=True)

    assert (path / "file.txt").read_text() == "two"


def test_without_git_the_remedy_is_told(origin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)

    with pytest.raises(DownloadError, match="git is not installed on this host; install it"):
        clone_repository(origin.as_uri())


def test_a_command_that_takes_too_long_is_ended(origin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repositories, "_TIMEOUT", 0.0)

    with pytest.raises(DownloadError, match="took longer than"):
        clone_repository(origin.as_uri())
