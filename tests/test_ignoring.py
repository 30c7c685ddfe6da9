"""Ignore rules, compared with git's own."""

from __future__ import annotations

import os
import re
import subprocess
import warnings
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fal_notebook.ignoring import DEFAULT_PATTERNS, expressions, is_ignored

if TYPE_CHECKING:
    from pathlib import Path

FILES = [
    *("a", "b.txt", "c.pyc", "ab", ".env", "#hash", "!bang", "sp ace", "br[1]"),
    *("d/a", "d/b.txt", "d/e/a", "d/e/b.txt", "d/e/f/c.pyc", "e/d/a", "e/ab", "build/x", "sub/build/y.txt"),
    *("e/f/g/h.txt", "a.d/a", "a.d/e/b.pyc", "x/[/z", "x/-", "x/^", "x/\\y"),
]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    subprocess.run(["git", "init", "-q", str(folder)], check=True, timeout=60)
    (folder / ".git" / "info" / "exclude").unlink(missing_ok=True)
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def ignored_by_git(repository: Path, patterns: list[str]) -> set[str]:
    (repository / ".gitignore").write_text("".join(f"{pattern}\n" for pattern in patterns), encoding="utf-8")
    done = subprocess.run(
        ["git", "-c", "core.ignoreCase=false", "check-ignore", "--no-index", "--stdin", "-z"],
        cwd=repository,
        input="\0".join(FILES).encode(),
        env={
            **os.environ,
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_SYSTEM": os.devnull,
            "HOME": str(repository),
        },
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return {name.decode() for name in done.stdout.split(b"\0") if name}


def ignored_by_us(patterns: list[str]) -> set[str]:
    return {name for name in FILES if is_ignored(name, patterns)}


# ---------------------------------------------------------------- like git


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "a",
            "*.txt",
            "build",
            "build/",
            "/a",
            "/d",
            "d/a",
            "d/e",
            "d/",
            "*/a",
            "**/a",
            "d/**",
            "**/e/**",
            "*",
        ),
        *(
            "d/**/a",
            "d/*",
            "?",
            "a?",
            "[ab]",
            "[!a]",
            "[^a]*",
            "[a-c].*",
            "**",
            "*/",
            "/*",
            "d/*/",
            "a.d",
            "/a/",
        ),
        *(
            r"\#hash",
            r"\!bang",
            "sp ace",
            "br[[]1]",
            "br[[]*",
            "a*",
            "*b*",
            "**.txt",
            "d**",
            "e/*/g",
            "",
            "/",
            "//",
        ),
        *(
            "[z-a]",
            "[",
            "a[",
            "a\\",
            "[]a]",
            "[]-]",
            "[!]]",
            "x/[!a]",
            "d[!x]a",
            "d[.-0]a",
            "x/[[]",
            "x/\\\\y",
        ),
        *(
            "x/[a-",
            "[[&&]",
            "[a--]",
            "[--a]",
            "x/[-^]",
            "x/[]^-]",
            ".*",
            "***",
            "d/***/a",
            "**/",
            "e/**/h.txt",
        ),
    ],
)
def test_a_pattern_means_what_it_means_to_git(pattern: str, repository: Path) -> None:
    assert ignored_by_us([pattern]) == ignored_by_git(repository, [pattern])


PIECES = st.sampled_from(
    ["a", "b", "d", "e", "f", "*", "**", "?", "/", ".", "txt", "pyc", "build", "[ab]", "[!a]"]
)
PATTERNS = st.lists(PIECES, min_size=1, max_size=7).map("".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(patterns=st.lists(PATTERNS, max_size=4))
def test_any_patterns_mean_what_they_mean_to_git(patterns: list[str], repository: Path) -> None:
    assert ignored_by_us(patterns) == ignored_by_git(repository, patterns)


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        (["*.txt", "!b.txt"], "b.txt"),
        (["*.txt", "!/b.txt"], "b.txt"),
        (["*.txt", "!d/e/*.txt"], "d/e/b.txt"),
        (["d/*", "!d/b.txt"], "d/b.txt"),
        (["/*", "!/d"], "d/e/f/c.pyc"),
        (["*", "!*/", "!*.txt"], "e/f/g/h.txt"),
    ],
)
def test_a_later_exclamation_mark_brings_back_what_git_brings_back(
    patterns: list[str], kept: str, repository: Path
) -> None:
    assert kept not in ignored_by_us(patterns)
    assert kept not in ignored_by_git(repository, patterns)


@pytest.mark.parametrize("nothing", ["!", "!/", "!//", "/", "//", "!#", "!!", "!["])
def test_a_pattern_that_names_nothing_changes_nothing(nothing: str, repository: Path) -> None:
    patterns = ["*.txt", "d/", nothing]

    assert ignored_by_us(patterns) == ignored_by_git(repository, patterns) == ignored_by_us(patterns[:2])


FILE_PATTERNS = st.sampled_from(
    ["*.txt", "b.*", "c.pyc", "/b.txt", "d/**/*.txt", "h.txt", "d/e/b.txt", "*.p?c"]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(patterns=st.lists(FILE_PATTERNS | FILE_PATTERNS.map("!".__add__), max_size=6))
def test_the_last_rule_about_a_file_decides_as_in_git(patterns: list[str], repository: Path) -> None:
    assert ignored_by_us(patterns) == ignored_by_git(repository, patterns)


# ---------------------------------------------------------------- unlike git


def test_a_file_comes_back_from_a_folder_that_is_left_out() -> None:
    """Git, which does not look into such a folder, would not bring it back."""
    patterns = ["build/", "!build/x"]

    assert not is_ignored("build/x", patterns)
    assert is_ignored("build/y", patterns)


def test_a_folder_comes_back_with_all_that_is_in_it() -> None:
    patterns = ["*", "!src", "src/*.pyc"]

    assert [name for name in ("a", "src/a", "src/b/c", "src/x.pyc") if is_ignored(name, patterns)] == [
        "a",
        "src/x.pyc",
    ]


# ---------------------------------------------------------------- as expressions


@given(patterns=st.lists(PATTERNS | PATTERNS.map("!".__add__), max_size=6))
def test_the_last_matching_rule_decides(patterns: list[str]) -> None:
    """Joined into expressions that know nothing of each other, the rules keep their order."""
    for name in FILES:
        verdicts = [
            not pattern.startswith("!")
            for pattern in patterns
            if is_ignored(name, [pattern.removeprefix("!")])
        ]

        assert is_ignored(name, patterns) == (verdicts[-1] if verdicts else False)


@given(st.lists(st.text(max_size=12), max_size=5))
def test_every_list_of_patterns_gives_expressions_that_compile(patterns: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for expression in expressions(tuple(patterns)):
            re.compile(expression)


def test_a_folder_is_pruned_unless_something_in_it_may_come_back() -> None:
    assert is_ignored("build/", ["build/"])
    assert not is_ignored("build/", ["build/", "!build/x"])
    assert not is_ignored("build", ["build/"])


def test_without_patterns_nothing_is_ignored() -> None:
    assert expressions(()) == ()


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        *(
            (f"{prefix}{name}", True)
            for prefix in ("", "a/b/")
            for name in (".git/HEAD", ".env", "x.md", "x.pyc")
        ),
        *(("Dockerfile.gpu", True), ("node_modules/a/b.js", True), ("venv/bin/python", True)),
        *(("a.py", False), ("environment", False), ("Dockerfiles", False), ("md", False)),
    ],
)
def test_the_default_patterns_leave_out_what_is_seldom_wanted(path: str, ignored: bool) -> None:
    assert is_ignored(path, DEFAULT_PATTERNS) is ignored
