"""`ContainerImage`: what it accepts and refuses, what travels, what it says about its files."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import fal_notebook as fal
from fal_notebook.container import ContainerImage
from fal_notebook.ignoring import DEFAULT_PATTERNS

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "FROM python:3.11\nCOPY a b /x/\nADD c /y\n"
LOGIN = {"registry.example.org": {"username": "me", "password": "hush-login"}}
SECRETS = {"TOKEN": "hush-secret"}


def ignored(image: ContainerImage, *names: str) -> list[str]:
    """Those of the names that the expressions of `to_dict` find."""
    found = [re.compile(expression) for expression in image.to_dict()["docker_ignore"]]
    return [name for name in names if any(expression.search(name) for expression in found)]


# ---------------------------------------------------------------- making one


def test_everything_but_the_text_has_a_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    values = dataclasses.asdict(ContainerImage(TEXT))

    assert values == {
        "dockerfile_str": TEXT,
        "build_args": {},
        "registries": {},
        "builder": None,
        "compression": "gzip",
        "force_compression": False,
        "secrets": {},
        "context_dir": tmp_path,
        "dockerignore": None,
        "dockerignore_path": None,
    }
    assert next(iter(values)) == "dockerfile_str"


def test_the_context_is_the_working_folder_of_the_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one of the import: a notebook changes folders."""
    (tmp_path / "later").mkdir()
    monkeypatch.chdir(tmp_path)
    first = ContainerImage(TEXT)
    monkeypatch.chdir("later")

    assert (first.context_dir, ContainerImage(TEXT).context_dir) == (tmp_path, tmp_path / "later")


def test_the_context_is_not_looked_at() -> None:
    image = ContainerImage(TEXT, context_dir="/nowhere/at/all")

    assert image.to_dict()["docker_context_dir"] == "/nowhere/at/all"


def test_a_text_and_a_file_make_the_same_image(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "Dockerfile"
    path.write_text(TEXT)

    made = [
        ContainerImage(TEXT, build_args={"A": "1"}),
        ContainerImage.from_dockerfile_str(TEXT, build_args={"A": "1"}),
        ContainerImage.from_dockerfile(str(path), build_args={"A": "1"}),
        ContainerImage.from_dockerfile(path, build_args={"A": "1"}),
    ]

    assert all(image == made[0] for image in made)
    assert made[3].context_dir != path.parent


def test_a_missing_dockerfile_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ContainerImage.from_dockerfile(tmp_path / "Dockerfile")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("text", ["", " \n\t", None])
def test_a_blank_dockerfile_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=r"^Invalid dockerfile"):
        ContainerImage(text)


@pytest.mark.parametrize("login", [{}, {"username": "me"}, {"password": "x"}, None, "me:x"])
def test_a_registry_needs_both_username_and_password(login: Any) -> None:
    with pytest.raises(ValueError, match=r"^Username and password are required for each registry"):
        ContainerImage(TEXT, registries={**LOGIN, "other": login})


@pytest.mark.parametrize("builder", ["docker", "", 3])
def test_an_unknown_builder_is_refused(builder: Any) -> None:
    with pytest.raises(ValueError, match=r"^Invalid builder: "):
        ContainerImage(TEXT, builder=builder)


@pytest.mark.parametrize(
    ("builder", "deprecated"), [("depot", False), ("service", True), ("worker", True), (None, False)]
)
def test_old_builders_are_accepted_with_a_warning(
    builder: str | None, deprecated: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ContainerImage(TEXT, builder=builder).builder == builder

    assert ("deprecated" in capsys.readouterr().err) is deprecated


def test_mistakes_are_told_in_a_fixed_order(tmp_path: Path) -> None:
    wrong: dict[str, Any] = {
        "dockerignore_path": tmp_path / "none",
        "registries": {"r": {}},
        "builder": "docker",
    }

    with pytest.raises(ValueError, match="Invalid dockerfile"):
        ContainerImage("", **wrong)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        ContainerImage(TEXT, **wrong)
    del wrong["dockerignore_path"]
    with pytest.raises(ValueError, match="Username and password"):
        ContainerImage(TEXT, **wrong)


@pytest.mark.parametrize("patterns", ["*.md", [1], [None]])
def test_patterns_are_a_list_of_strings(patterns: Any) -> None:
    with pytest.raises(ValueError, match="a list of strings"):
        ContainerImage(TEXT, dockerignore=patterns)


# ---------------------------------------------------------------- secrets


def test_pickling_drops_logins_and_secrets() -> None:
    """So that they never reach a worker."""
    image = ContainerImage(
        TEXT, registries=LOGIN, secrets=SECRETS, build_args={"A": "1"}, dockerignore=["*.md"]
    )

    data = pickle.dumps(image)
    again = pickle.loads(data)

    assert b"hush" not in data
    assert (again.registries, again.secrets) == ({}, {})
    assert (again.build_args, ignored(again, "a.md", "a")) == ({"A": "1"}, ["a.md"])
    assert (image.registries, image.secrets) == (LOGIN, SECRETS)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, dataclasses.replace])
def test_a_copy_keeps_logins_and_secrets(make: Any) -> None:
    image = ContainerImage(TEXT, registries=LOGIN, secrets=SECRETS, dockerignore=["*.md"])

    again = make(image)

    assert again == image
    assert (again.registries, again.secrets) == (LOGIN, SECRETS)
    assert ignored(again, "a.md") == ["a.md"]
    assert (again.registries is image.registries) == (make is not copy.deepcopy)


def test_the_repr_hides_logins_and_secrets() -> None:
    assert "hush" not in repr(ContainerImage(TEXT, registries=LOGIN, secrets=SECRETS))


def test_two_images_do_not_share_their_defaults() -> None:
    first, second = ContainerImage(TEXT), ContainerImage(TEXT)

    first.build_args["A"] = "1"

    assert second.build_args == {}


# ---------------------------------------------------------------- plain data


def test_an_image_is_plain_data(tmp_path: Path) -> None:
    image = ContainerImage(
        TEXT, {"A": "1"}, LOGIN, "depot", "zstd", True, SECRETS, tmp_path, dockerignore=["*.md"]
    )

    data = image.to_dict()
    expressions = data.pop("docker_ignore")

    assert data == {
        "dockerfile_str": TEXT,
        "build_args": {"A": "1"},
        "registries": LOGIN,
        "builder": "depot",
        "compression": "zstd",
        "force_compression": True,
        "secrets": SECRETS,
        "docker_context_dir": str(tmp_path),
        "docker_files_list": ["a", "b", "c"],
    }
    assert [type(expression) for expression in expressions] == [str]


def test_the_sources_come_from_the_text_alone() -> None:
    assert ContainerImage(TEXT, context_dir="/nowhere").get_copy_add_sources() == ["a", "b", "c"]


# ---------------------------------------------------------------- ignore rules


def test_a_list_comes_before_every_file(tmp_path: Path) -> None:
    (tmp_path / ".dockerignore").write_text("*.one\n")
    (tmp_path / "rules").write_text("*.two\n")
    names = ("a.one", "a.two", "a.three", "a.md")

    def of(**options: Any) -> list[str]:
        return ignored(ContainerImage(TEXT, context_dir=tmp_path, **options), *names)

    assert of(dockerignore=["*.three"], dockerignore_path=tmp_path / "rules") == ["a.three"]
    assert of(dockerignore_path=tmp_path / "rules") == ["a.two"]
    assert of() == ["a.one"]
    (tmp_path / ".dockerignore").unlink()
    assert of() == ["a.md"]


def test_an_empty_list_ignores_nothing(tmp_path: Path) -> None:
    (tmp_path / ".dockerignore").write_text("*\n")

    assert ContainerImage(TEXT, context_dir=tmp_path, dockerignore=[]).to_dict()["docker_ignore"] == []


def test_a_file_of_rules_has_blanks_and_comments(tmp_path: Path) -> None:
    (tmp_path / ".dockerignore").write_bytes(b"\xef\xbb\xbf# all\r\n\r\n  *.log  \r\n!keep.log\r\n")
    image = ContainerImage(TEXT, context_dir=tmp_path)

    assert ignored(image, "a.log", "b/a.log", "keep.log", "# all") == ["a.log", "b/a.log"]


@pytest.mark.parametrize(
    ("pattern", "found", "passed"),
    [
        ("name", ["name", "a/name", "name/x", "a/name/b/c"], ["names", "a/b"]),
        ("dir/", ["dir/a", "b/dir/a"], ["dir"]),
        ("/top", ["top", "top/a"], ["a/top"]),
        ("a/b", ["a/b", "a/b/c"], ["x/a/b"]),
        ("*.txt", ["x.txt", "a/x.txt"], ["x.txt2"]),
        ("a/*.txt", ["a/x.txt"], ["a/b/x.txt"]),
        ("a/**/x", ["a/x", "a/b/c/x"], ["x"]),
        ("?.c", ["a.c"], ["ab.c"]),
        ("[ab].c", ["a.c", "b.c"], ["c.c"]),
    ],
)
def test_patterns_are_those_of_gitignore(pattern: str, found: list[str], passed: list[str]) -> None:
    image = ContainerImage(TEXT, dockerignore=[pattern])

    assert ignored(image, *found, *passed) == found
    assert [name for name in [*found, *passed] if image.is_ignored(name)] == found


def test_adding_rules_replaces_the_ones_before(tmp_path: Path) -> None:
    image = ContainerImage(TEXT, dockerignore=["*.one"])

    image.add_dockerignore(["*.two"])
    assert ignored(image, "a.one", "a.two") == ["a.two"]

    (tmp_path / "rules").write_text("*.one\n# no more\n")
    image.add_dockerignore(path=tmp_path / "rules")
    assert ignored(image, "a.one", "a.two") == ["a.one"]

    image.add_dockerignore([])
    assert image.to_dict()["docker_ignore"] == []


def test_rules_are_added_as_one_or_the_other(tmp_path: Path) -> None:
    image = ContainerImage(TEXT)

    with pytest.raises(ValueError, match="either patterns or path"):
        image.add_dockerignore()
    with pytest.raises(ValueError, match="either patterns or path"):
        image.add_dockerignore(["a"], tmp_path)
    with pytest.raises(FileNotFoundError):
        image.add_dockerignore(path=tmp_path / "none")
    assert ignored(image, ".git/HEAD") == [".git/HEAD"]


def test_the_defaults_are_those_that_are_promised() -> None:
    promised = (
        ".git .gitignore .dockerignore Dockerfile Dockerfile.* *.md __pycache__ *.pyc .DS_Store "
        ".venv venv .env node_modules"
    )

    assert list(DEFAULT_PATTERNS) == promised.split()


# ---------------------------------------------------------------- travelling


def test_it_is_found_under_the_name_that_the_sdk_gives_it() -> None:
    assert fal.ContainerImage is ContainerImage
    assert fal.container.ContainerImage is ContainerImage


def test_a_worker_without_packages_can_hold_one() -> None:
    """A class that names an image travels, and the image with it."""
    code = (
        "import sys, pickle; sys.modules['pathspec'] = None\n"
        "from fal_notebook import ContainerImage\n"
        "image = ContainerImage('FROM x\\nCOPY a /b', dockerignore=['*.md'])\n"
        "print(pickle.loads(pickle.dumps(image)).get_copy_add_sources())"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout == "['a']\n"
