"""A requirement line is a requirement and nothing else."""

from __future__ import annotations

import pytest

from fal_agent.errors import RequirementError
from fal_agent.requirements import check_line, distribution_name, local_path, masked, normalised

GOOD = [
    "numpy",
    "numpy>=2,<3",
    "numpy (>=2)",
    "numpy == 2.*",
    "a===1.0+local",
    "torch[opt, cu12] ~= 2.1 ; python_version >= '3.10' and sys_platform == 'linux'",
    "my.lib_x-y",
    "x @ https://example.org/x-1.0-py3-none-any.whl#sha256=00",
    "x @ git+https://example.org/x@v1#subdirectory=y",
    "x @ git+ssh://git@example.org/x",
    "x @ file:///opt/x-1.0.whl",
    "x[all]@https://example.org/x.whl ; python_version > '3'",
    "x>=1;extra=='y'",
]
BAD = [
    ("", "blank"),
    ("   ", "blank"),
    ("-r /etc/passwd", "files are not included"),
    ("  --requirement=x", "files are not included"),
    ("-e ./x", "local_python_modules"),
    ("--index-url https://evil.example/simple", "uv.toml"),
    ("-c constraints.txt", "option -c"),
    ("numpy\n-r /etc/passwd", "line break"),
    ("numpy\r--index-url=x", "line break"),
    ("numpy\u2028-r x", "line break"),
    ("numpy\x85six", "line break"),
    ("numpy\x00", "control character"),
    ("numpy --hash=sha256:00", "option of an installer"),
    ("numpy --config-settings=x", "option of an installer"),
    ("numpy \\", "backslash"),
    ("x @ https://${SECRET}@example.org/x.whl", "variables"),
    ("x; $(touch /tmp/x)", "PEP 508"),
    ("numpy && ls", "PEP 508"),
    ("numpy | sh", "PEP 508"),
    ("numpy `id`", "PEP 508"),
    ("numpy six", "PEP 508"),
    ("numpy>>2", "PEP 508"),
    ("./local", "file:///absolute/path"),
    ("/opt/x", "file:///absolute/path"),
    ("x-1.0-py3-none-any.whl", "file:///absolute/path"),
    ("git+https://example.org/x", "NAME @ ADDRESS"),
    ("https://example.org/x.whl", "NAME @ ADDRESS"),
    ("x @ ./local", "PEP 508"),
    ("x @ ftp://example.org/x.whl", "addresses start with"),
    ("x @ git+ext://sh", "addresses start with"),
    ("x @ file://host/x.whl", "three slashes"),
    ("x @ git+ssh://-oProxyCommand=id/x", "dash"),
    ("x @ git+ssh://git@-oProxyCommand=id/x", "dash"),
    ("# numpy", "PEP 508"),
    ("x" * 5000, "longer than"),
]


@pytest.mark.parametrize("line", GOOD)
def test_requirements_pass(line: str) -> None:
    check_line(line)


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_everything_else_is_refused_with_the_reason(line: str, reason: str) -> None:
    with pytest.raises(RequirementError) as caught:
        check_line(line)

    assert reason in str(caught.value)


def test_a_refusal_names_the_line_but_not_its_password() -> None:
    with pytest.raises(RequirementError) as caught:
        check_line("x @ ftp://user:hunter2@example.org/x.whl")

    assert "example.org/x.whl" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_hostile_line_is_refused_at_once() -> None:
    """Patterns that go back and forth would take for ever here."""
    for line in ("a" + "-" * 4000, "a[" + "b," * 1999, "a" + ">=1," * 999 + "!", "a;" + "(" * 4000 + "$"):
        with pytest.raises(RequirementError):
            check_line(line)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Scikit_Learn", "scikit-learn"),
        ("numpy >= 2 , < 3", "numpy<3,>=2"),
        ("numpy (>=2)", "numpy>=2"),
        ("x[B,a]", "x[a, b]"),
        ("x ;  python_version>'3'", "x; python_version>'3'"),
        ("x@https://e.org/x.whl", "x  @  https://e.org/x.whl"),
    ],
)
def test_spellings_of_one_requirement_are_the_same(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize("line", GOOD)
def test_what_is_normalised_is_still_a_requirement_of_the_same_distribution(line: str) -> None:
    check_line(normalised(line))

    assert normalised(normalised(line)) == normalised(line)
    assert distribution_name(normalised(line)) == distribution_name(line)


def test_different_requirements_stay_different() -> None:
    lines = ["a", "a>1", "a>=1", "a[x]", "a @ https://e.org/a.whl", "a; python_version > '3'", "b"]

    assert len({normalised(line) for line in lines}) == len(lines)


def test_the_path_of_a_local_file_is_found() -> None:
    assert local_path("x @ file:///opt/my%20x.whl#sha256=0") == "/opt/my x.whl"
    assert local_path("x @ https://e.org/x.whl") is None
    assert local_path("x") is None


def test_passwords_in_addresses_are_masked() -> None:
    text = "failed: https://me:secret@e.org/a and git+ssh://git@e.org/b"

    assert masked(text) == "failed: https://***@e.org/a and git+ssh://***@e.org/b"
