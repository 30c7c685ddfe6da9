"""Ignore rules, compared with git itself."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from fal_notebook.gitignore import IgnoreRules

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git to compare with")

NAMES = ["a", "b", "c.txt", "d.py", "build", "foo", "x y", "é", "new\nline", "B"]
PATTERNS = [
    "a", "b", "*.txt", "*.py", "build/", "/a", "/build", "foo/*", "!*.py", "!a", "!foo/bar", "*", "!*/",
    "**/a", "a/**", "a/**/b", "[ab]", "[!a]", "?", "\\!a", "#x", "foo/", "!foo/", "/foo/*", "!/foo/a",
    "*/b", "b/a", "!b", "  ", "a ", "a\\ ", "!", "/", "**", "!**/", "a//b", "\\a", "[", "x*y", "!build/a",
    "c.*", ".*", "!.gitignore", "***", "a**b", "**b", "*/", "new*", "é", "[[:alpha:]]", "??", "a\r", "\\",
    "[a-c]*", "new?line", "foo/**/", "!build/",
]  # fmt: skip


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of the user's."""
    (tmp_path / "home").mkdir()
    for name, value in {
        "HOME": str(tmp_path / "home"),
        "XDG_CONFIG_HOME": str(tmp_path / "home"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
    }.items():
        monkeypatch.setenv(name, value)


def ours(folder: Path) -> list[str]:
    """The files that the rules leave, as whoever walks a folder finds them."""
    found = []

    def walk(relative: str, path: str, rules: IgnoreRules) -> None:
        rules = rules.entering(relative, path)
        with os.scandir(path) as entries:
            for entry in entries:
                inner = f"{relative}/{entry.name}" if relative else entry.name
                is_folder = entry.is_dir(follow_symlinks=False)
                if rules.ignores(inner, is_folder=is_folder):
                    continue
                if is_folder:
                    walk(inner, entry.path, rules)
                else:
                    found.append(inner)

    walk("", str(folder), IgnoreRules())
    return sorted(found)


def gits(folder: Path) -> list[str]:
    """The files that git would add."""
    command = ["git", "-C", str(folder), "ls-files", "-coz", "--exclude-standard"]
    output = subprocess.run(command, capture_output=True, check=True).stdout
    return sorted(os.fsdecode(name) for name in output.split(b"\0") if name)


def fill(folder: Path, rng: random.Random, depth: int = 0) -> None:
    """Make files, folders and rules at random."""
    for name in rng.sample(NAMES, rng.randint(1, 5)):
        if depth < 3 and rng.random() < 0.55:
            (folder / name).mkdir()
            fill(folder / name, rng, depth + 1)
        else:
            (folder / name).touch()
    if rng.random() < (0.35 if depth else 0.9):
        lines = [rng.choice(PATTERNS) for _ in range(rng.randint(1, 4))]
        (folder / ".gitignore").write_bytes(rng.choice([b"", b"\xef\xbb\xbf"]) + "\n".join(lines).encode())


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("seed", range(120))
def test_git_would_say_the_same(tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    fill(folder, random.Random(seed))

    assert ours(folder) == gits(folder)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    "rules",
    [b"\xff*\n", b"a\r\nb\r\n", b"/*\n!/foo\n", b"*\n!*/\n!*.py\n", b"a/**\n!a/b\n", "é?\n".encode(), b"\\"],
)
def test_git_would_say_the_same_of_odd_rules(tmp_path: Path, rules: bytes) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for name in (b"\xff\xfe", b"a/b", b"a/c", b"foo/x", b"y.py", b"foo/z.py", "éé".encode(), "éx".encode()):
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT))
    (tmp_path / ".gitignore").write_bytes(rules)

    assert ours(tmp_path) == [name for name in gits(tmp_path) if not name.startswith("home/")]


def test_a_gitignore_that_is_a_link_or_a_folder_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "rules").write_text("*\n")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / ".gitignore").symlink_to("../rules")
    (tmp_path / "two" / ".gitignore").mkdir(parents=True)
    (tmp_path / "two" / "file").touch()

    assert ours(tmp_path) == ["one/.gitignore", "rules", "two/file"]


def test_git_folders_and_files_are_left_out_everywhere(tmp_path: Path) -> None:
    (tmp_path / "inner" / ".git").mkdir(parents=True)
    (tmp_path / "inner" / ".git" / "config").touch()
    (tmp_path / ".git").touch()
    (tmp_path / "file").touch()

    assert ours(tmp_path) == ["file"]
