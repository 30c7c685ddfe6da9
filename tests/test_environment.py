"""What an environment is to hold is said exactly, and every mistake is told where it was made."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest

from fal_agent.errors import FalServerlessError, RequirementError
from fal_agent.wire import EnvironmentSpec
from fal_notebook.environment import (
    Pep723,
    check_python,
    environment_spec,
    pep723_block,
    read_requirements_file,
)

if TYPE_CHECKING:
    from pathlib import Path

OWN = f"{sys.version_info[0]}.{sys.version_info[1]}"
OTHER = f"{sys.version_info[0]}.{sys.version_info[1] + 1}"
CLOUDPICKLE = f"cloudpickle=={version('cloudpickle')}"


# ---------------------------------------------------------------- specs


def test_nothing_asked_for_is_what_we_need_ourselves() -> None:
    """What the notebook pickles is opened by cloudpickle of the same version."""
    assert environment_spec(None) == EnvironmentSpec(OWN, [[CLOUDPICKLE]])
    assert environment_spec([]) == environment_spec([[]]) == environment_spec(None)


def test_our_needs_go_into_the_first_layer_and_layers_stay_apart() -> None:
    spec = environment_spec([["numpy"], ["torch>=2", "x @ https://example.org/x.whl"]], extra=["ipython"])

    assert sorted(spec.layers[0]) == sorted([CLOUDPICKLE, "ipython", "numpy"])
    assert spec.layers[1:] == [["torch>=2", "x @ https://example.org/x.whl"]]


@pytest.mark.parametrize(
    "line",
    [
        "cloudpickle==2.2.1",
        "CloudPickle<3",
        "cloudpickle @ https://e.org/cloudpickle.whl",
        "cloudpickle>1; python_version>'3'",
    ],
)
def test_what_the_user_pins_is_not_overruled(line: str) -> None:
    assert environment_spec([line]).layers == [[line]]
    assert environment_spec([["numpy"], [line]]).layers == [["numpy"], [line]]


@pytest.mark.parametrize(
    "line", ["cloudpickle", "cloudpickle; python_version>'3'", "cloudpickle<3; python_version<'3'"]
)
def test_our_version_holds_where_the_user_says_none(line: str) -> None:
    """Asked for without a version, another one than the notebook's could be installed."""
    (layer,) = environment_spec([line]).layers

    assert CLOUDPICKLE in layer


def test_flags_are_passed_on() -> None:
    spec = environment_spec(["numpy"], compile_bytecode=True, force=True)

    assert (spec.compile_bytecode, spec.force) == (True, True)


@pytest.mark.parametrize(
    "value", ["numpy", ("numpy",), ["numpy", ["six"]], [["numpy"], "six"], [1], {"numpy"}, 3]
)
def test_requirements_of_another_shape_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="requirements must be") as caught:
        environment_spec(value)

    assert str(caught.value) == "requirements must be a list of strings or a list of lists of strings."


@pytest.mark.parametrize(
    "line",
    [
        "",
        "-r x.txt",
        "--index-url https://evil.example",
        "numpy\n-r x",
        "numpy; import os",
        "numpy>=2,",
        "a b",
        "./x",
        "x; $(id)",
    ],
)
def test_a_line_that_is_no_requirement_is_refused_here_already(line: str) -> None:
    with pytest.raises(RequirementError) as caught:
        environment_spec([["numpy"], [line]])

    assert repr(line) in str(caught.value)


def test_a_password_in_a_refused_line_is_not_shown() -> None:
    with pytest.raises(RequirementError) as caught:
        environment_spec(["x @ https://me:hunter2@example.org/x.whl ; nonsense"])

    assert "example.org" in str(caught.value)
    assert "hunter2" not in str(caught.value)


# ---------------------------------------------------------------- the Python


@pytest.mark.parametrize("value", [None, OWN, f"{OWN}.1"])
def test_the_notebooks_own_minor_version_is_fine(value: str | None) -> None:
    assert check_python(value) == OWN


def test_another_minor_version_is_refused_with_both_versions_and_both_remedies() -> None:
    with pytest.raises(FalServerlessError) as caught:
        check_python(OTHER)

    text = str(caught.value)
    assert f"'{OTHER}'" in text
    assert f"this notebook runs Python {OWN};" in text
    assert "Leave python_version out" in text
    assert f"start the notebook with Python {OTHER}" in text


def test_a_spec_is_not_made_for_another_minor_version() -> None:
    with pytest.raises(FalServerlessError, match="this notebook runs"):
        environment_spec(["numpy"], python_version=OTHER)


@pytest.mark.parametrize("value", ["3", "three", "3.x", "", "3.11.1.2", "--help"])
def test_what_is_no_version_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="must look like"):
        check_python(value)


# ---------------------------------------------------------------- files


def test_comments_continued_lines_and_included_files_are_understood(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "base.txt").write_text("attrs\n-r deeper.txt\n")
    (tmp_path / "more" / "deeper.txt").write_text("six")
    (tmp_path / "all.txt").write_text(
        "\ufeffnumpy>=2  # why\n# a comment with a backslash \\\n\npandas \\\n  >=2, \\\n  <4\t# tab\n"
        "-r more/base.txt\n--requirement=more/deeper.txt\nx @ https://example.org/x.whl#sha256=00\n"
    )

    lines = read_requirements_file(tmp_path / "all.txt")

    assert [line.replace(" ", "") for line in lines] == [
        "numpy>=2",
        "pandas>=2,<4",
        "attrs",
        "six",
        "six",
        "x@https://example.org/x.whl#sha256=00",
    ]
    assert environment_spec(lines).layers


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("--index-url https://example.org", "uv.toml"),
        ("-i https://example.org", "uv.toml"),
        ("-e .", "local_python_modules"),
        ("-c constraints.txt", "write the versions into the lines"),
        ("numpy==1 --hash=sha256:00", "--no-hashes"),
        ("numpy>>1", "not a requirement"),
        ("x @ https://${TOKEN}@example.org/x.whl", "write the value itself"),
    ],
)
def test_other_lines_are_refused_with_file_line_and_remedy(tmp_path: Path, line: str, remedy: str) -> None:
    (tmp_path / "r.txt").write_text(f"numpy\n\n{line}\n")

    with pytest.raises(RequirementError) as caught:
        read_requirements_file(str(tmp_path / "r.txt"))

    assert f"{tmp_path / 'r.txt'}, line 3: " in str(caught.value)
    assert remedy in str(caught.value)


def test_files_that_include_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("-r b.txt")
    (tmp_path / "b.txt").write_text("-r a.txt")

    with pytest.raises(RequirementError, match="includes itself"):
        read_requirements_file(tmp_path / "a.txt")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FalServerlessError, match=r"none\.txt cannot be read"):
        read_requirements_file(tmp_path / "none.txt")


# ---------------------------------------------------------------- blocks in cells


def test_a_cell_without_block_has_none() -> None:
    assert pep723_block("x = 1  # /// script\n# /// other\n# ///\n") is None


def test_the_block_of_a_cell_is_read() -> None:
    source = (
        '%%fal\n# /// script\n# requires-python = ">=3.9"\n# dependencies = [\n#   "numpy>=2",\n#\n'
        '#   "six",\n# ]\n# [tool.uv]\n# x = 1\n# ///\nimport numpy\n'
    )

    assert pep723_block(source) == Pep723(("numpy>=2", "six"), ">=3.9")


def test_an_empty_block_asks_for_nothing() -> None:
    assert pep723_block("# /// script\n# ///\n") == Pep723()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("# dependencies = []", "line 2 has no end"),
        ("# dependencies = []\nimport x\n# ///", "line 4"),
        ("# dependencies = [\n# !\n# ///", "line 4"),
        ('# dependencies = [\n#  "six",\n#  "a b",\n# ]\n# ///', "line 5: requirement 'a b'"),
        ('# dependencies = "six"\n# ///', "line 2: dependencies must be a list of strings"),
        ("# dependencies = [1]\n# ///", "line 2: dependencies must be a list of strings"),
        ("# requires-python = 3\n# ///", "line 2: requires-python must be a string"),
        ('# requires-python = "new"\n# ///', "line 2: requires-python must be a version specifier"),
        ('# requires-python = "<3"\n# ///', f"this notebook runs {OWN}."),
        ("# dependencys = []\n# ///", "line 2: it may not hold dependencys"),
        ("# ///\n# /// script\n# ///", "second script block starts in line 4"),
    ],
)
def test_a_broken_block_is_told_with_its_line(content: str, problem: str) -> None:
    with pytest.raises(RequirementError) as caught:
        pep723_block(f"x = 1\n# /// script\n{content}\n")

    assert problem in str(caught.value)


def test_a_block_and_a_spec_go_together() -> None:
    block = pep723_block('# /// script\n# dependencies = ["six"]\n# ///')
    assert block is not None

    spec = environment_spec(list(block.dependencies))

    assert json.loads(json.dumps(spec.layers)) == [[CLOUDPICKLE, "six"]]
