"""The repository itself: what the wheel holds, what make promises, what must not be written anywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fal_agent
import fal_notebook

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = [Path(package.__file__ or "").parent for package in (fal_notebook, fal_agent)]
SOURCES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))

NEED_PACKAGES = {
    "worker/kernel_magics.py",
    "worker/shell.py",
    "runtime/toolkit/file.py",
    "runtime/toolkit/image.py",
    "runtime/toolkit/image_size.py",
    "runtime/toolkit/model.py",
}

LOAD_BARE = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in {{*sys.stdlib_module_names, "fal_agent"}}:
            raise ImportError(f"{{name}} is not of the standard library")

sys.meta_path.insert(0, Refuse())
sys.path.append({folder!r})
for name in {modules!r}:
    importlib.import_module(name)
"""


@pytest.mark.skipif(os.environ.get("FAL_TEST_WHEEL") != "1", reason="only `make test` tests the wheel")
def test_the_tests_run_against_the_wheel() -> None:
    """Otherwise a file that the wheel lacks would not be missed."""
    assert [package.parent.name for package in PACKAGES] == ["site-packages", "site-packages"]
    assert not (ROOT / "fal_notebook").exists()
    assert not (ROOT / "agent").exists()


def test_both_packages_say_that_they_are_typed() -> None:
    assert [package.name for package in PACKAGES if not (package / "py.typed").exists()] == []


def test_importing_loads_nothing_heavy() -> None:
    """Each of these costs more than everything of ours together."""
    heavy = [
        "paramiko",
        "IPython",
        "cloudpickle",
        "dill",
        "rich",
        "blake3",
        "platformdirs",
        "tomlkit",
        "typer",
        "numpy",
        "asyncio",
    ]
    code = f"import sys, fal_notebook; print(*[name for name in {heavy!r} if name in sys.modules])"

    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()

    assert loaded == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.parts[-3:]))
def test_a_module_says_what_it_is_for(path: Path) -> None:
    """The first statement is a docstring, and there is no work left for later in the text."""
    text = path.read_text(encoding="utf-8")

    assert text.startswith('"""')
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)


def test_what_runs_on_a_host_needs_only_the_standard_library() -> None:
    """Every module loads in a Python without site-packages, but for those that say what they need.

    The shell is IPython's, apps are served by Starlette, and their files and images are pydantic's.
    """
    package = PACKAGES[1]
    modules = [
        ".".join(("fal_agent", *path.relative_to(package).with_suffix("").parts))
        for path in sorted(package.rglob("*.py"))
        if package / "serving" not in path.parents
        and path.relative_to(package).as_posix() not in NEED_PACKAGES
    ]
    code = LOAD_BARE.format(folder=str(package.parent), modules=modules)

    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.stderr == ""
    assert done.returncode == 0


def test_the_package_and_the_project_have_one_version() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

    assert f'\nversion = "{fal_notebook.__version__}"\n' in text


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = set(re.findall(r"^\.PHONY: (.+)$", text, re.MULTILINE))

    shown = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    ).stdout

    assert phony == set(re.findall(r"^  make ([a-z-]+)", shown, re.MULTILINE))
