"""What a call's environment is to hold: requirements, Python, and what our own side needs.

Runs in the notebook. Everything is checked here first, so that a mistake is told at once and where
it was made; the agent checks again.
"""

from __future__ import annotations

import functools
import re
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fal_agent.errors import FalServerlessError, RequirementError
from fal_agent.requirements import check_line, distribution_name, masked
from fal_agent.wire import EnvironmentSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "Pep723",
    "check_python",
    "environment_spec",
    "is_requirement",
    "pep723_block",
    "pydantic_version",
    "read_requirements_file",
    "serving_needs",
    "worker_needs",
]

_INCLUDE = re.compile(r"(?:-r\s*|--requirement(?:\s+|=))['\"]?(\S.*?)['\"]?")
_OLDEST_WIDGETS = 8  # major version of ipywidgets from which on its comms can be led elsewhere
_COMMENT = re.compile(r"(?:^|\s)\s*#.*")
_NEEDS = (
    *("fastapi>=0.115", "uvicorn>=0.32", "websockets>=15", "msgpack>=1.0"),
    *("httptools>=0.6", "uvloop>=0.21"),  # a third less time for a small request
)
_GATEWAY_NEEDS = ("httpx>=0.27",)
_SHAPE = "requirements must be a list of strings or a list of lists of strings."


@dataclass(frozen=True)
class Pep723:
    """The metadata block of a script, or of a cell.

    Attributes:
        dependencies: requirement lines.
        requires_python: a version specifier such as ">=3.11"; None if it says nothing.
    """

    dependencies: tuple[str, ...] = ()
    requires_python: str | None = None


def environment_spec(
    requirements: list[str] | list[list[str]] | None,
    *,
    python_version: str | None = None,
    extra: Sequence[str] = (),
    compile_bytecode: bool = False,
    force: bool = False,
) -> EnvironmentSpec:
    """Say what an environment is to hold.

    Args:
        requirements: PEP 508 lines, or lists of them that are installed one after the other.
        python_version: "X.Y"; None is the notebook's.
        extra: what our own side needs besides cloudpickle, which is always asked for at the notebook's
            version. A version or address that the user gives for either goes before.
        compile_bytecode: compile packages when they are installed.
        force: build anew even if it is known.

    Raises:
        ValueError: `requirements` is of another shape.
        RequirementError: a line is not a requirement.
        FalServerlessError: the Python differs from the notebook's, see `check_python`.
    """
    layers = _layers(requirements)
    chosen = {distribution_name(line) for layer in layers for line in layer if _check(line)}
    ours = [line for line in (_cloudpickle(), *extra) if distribution_name(line) not in chosen]
    first, *others = layers or [[]]
    return EnvironmentSpec(
        python=check_python(python_version),
        layers=[[*ours, *first], *others],
        compile_bytecode=compile_bytecode,
        force=force,
    )


def check_python(python_version: str | None) -> str:
    """Give the Python that a call's environment must have: "X.Y".

    Raises:
        FalServerlessError: `python_version` is of another minor version than the notebook's. Code is
            pickled, and pickled code cannot be opened by another minor version.
        ValueError: it is no version.
    """
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    if python_version is None:
        return own
    parts = str(python_version).split(".")
    if len(parts) not in (2, 3) or not all(part.isdigit() for part in parts):
        raise ValueError(f"python_version must look like {own!r}, not {python_version!r}.")
    if parts[:2] != own.split("."):
        raise FalServerlessError(
            f"python_version={python_version!r} was asked for, but this notebook runs Python {own}; "
            "functions travel as code, which only the same minor version can open. Leave python_version out, "
            f"or start the notebook with Python {'.'.join(parts[:2])}"
        )
    return own


def is_requirement(line: str) -> bool:
    """Whether a line is one requirement; what people write for pip may be an option or a comment too."""
    try:
        _check(line)
    except RequirementError:
        return False
    return True


def worker_needs() -> tuple[str, ...]:
    """What our own side of a worker needs besides the user's requirements.

    In a notebook that is IPython too, of the notebook's generation, since what it shows differs between
    them; in a kernel that has ipywidgets, this too. Functions have them as well: cells and functions with the
    same requirements share an environment, and with it workers and the models cached there.
    """
    shell = _shell()
    if shell is None:
        return ()
    is_kernel = getattr(shell, "kernel", None) is not None
    ipython = f"ipython=={sys.modules['IPython'].version_info[0]}.*"
    return (ipython, "matplotlib-inline", *(_widgets() if is_kernel else ()))


@functools.cache
def _widgets() -> tuple[str, ...]:
    """The ipywidgets that speak to the front end as the notebook's do; none if the notebook has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        major = int(version("ipywidgets").partition(".")[0])
    except (PackageNotFoundError, ValueError):
        return ()
    return (f"ipywidgets>={major},<{major + 1}",) if major >= _OLDEST_WIDGETS else ()


def pydantic_version() -> str:
    """The version of pydantic, if this process has loaded it: its models may be in what travels."""
    return str(getattr(sys.modules.get("pydantic"), "__version__", ""))


def serving_needs(*, has_gateway: bool = False) -> tuple[str, ...]:
    """What serving needs in an environment; pydantic as in the notebook, since models travel."""
    version = pydantic_version()
    major = int(version.partition(".")[0]) if version else 2
    gateway = _GATEWAY_NEEDS if has_gateway else ()
    return (*_NEEDS, *gateway, f"pydantic>={major},<{major + 1}")


def _shell() -> Any:
    """The IPython shell of this process; None if it is no notebook."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None else None


def read_requirements_file(path: str | Path) -> list[str]:
    """Give the requirement lines of a requirements.txt.

    Comments and continued lines are understood, and `-r` files are read too.

    Raises:
        RequirementError: the file cannot be read, or a line is not a requirement.
    """
    return list(_file_lines(Path(path).expanduser(), ()))


def pep723_block(source: str) -> Pep723 | None:
    """Read the `# /// script` block of a cell; None if there is none.

    Raises:
        RequirementError: the block is not what PEP 723 says; the message names the line.
    """
    block = _script_block(source.splitlines())
    if block is None:
        return None
    start, text = block
    content = _toml(text, start)
    unknown = set(content) - {"dependencies", "requires-python", "tool"}
    dependencies, python = content.get("dependencies", []), content.get("requires-python")
    wrong = None
    if unknown:
        wrong = f"it may not hold {', '.join(sorted(unknown))}"
    elif not _is_list_of_str(dependencies):
        wrong = "dependencies must be a list of strings"
    elif not isinstance(python, str | None):
        wrong = f'requires-python must be a string such as ">=3.11", not {python!r}'
    if wrong is not None:
        raise RequirementError(f"the script block in line {start}: {wrong}")
    for line in dependencies:
        _check_dependency(line, start, text)
    if python is not None:
        _check_requires_python(python, start)
    return Pep723(tuple(dependencies), python)


# ---------------------------------------------------------------- checks


def _layers(requirements: Any) -> list[list[str]]:
    if requirements is None:
        return []
    if not isinstance(requirements, list):
        raise ValueError(_SHAPE)
    if _is_list_of_str(requirements):
        return [list(requirements)] if requirements else []
    if all(_is_list_of_str(layer) for layer in requirements):
        return [list(layer) for layer in requirements if layer]
    raise ValueError(_SHAPE)


def _is_list_of_str(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


@functools.lru_cache(maxsize=4096)
def _check(line: str) -> bool:
    """Refuse what is not one requirement; give whether it says which version to take here.

    `packaging` knows markers and versions in full.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    check_line(line)
    try:
        found = Requirement(line)
    except InvalidRequirement as error:
        raise RequirementError(f"requirement {masked(line)!r}: {str(error).splitlines()[0]}") from None
    return bool(found.specifier or found.url) and (found.marker is None or found.marker.evaluate())


def _check_dependency(line: str, start: int, text: str) -> None:
    try:
        _check(line)
    except RequirementError as error:
        inside = next((at for at, row in enumerate(text.splitlines(), 1) if line in row), 0)
        raise RequirementError(f"the script block, line {start + inside}: {error.message}") from None


def _check_requires_python(specifier: str, start: int) -> None:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    own = ".".join(map(str, sys.version_info[:3]))
    try:
        fits = SpecifierSet(specifier).contains(own, prereleases=True)
    except InvalidSpecifier:
        raise RequirementError(
            f"the script block in line {start}: requires-python must be a version specifier such as "
            f'">=3.11", not {specifier!r}'
        ) from None
    if not fits:
        raise RequirementError(
            f"the script block in line {start} requires Python {specifier}, but this notebook runs {own}; "
            "code travels only between equal minor versions. Change the line, or start the notebook with "
            "such a Python"
        )


@functools.cache
def _cloudpickle() -> str:
    """Our own needs of every worker: what opens what the notebook pickles, at the notebook's version."""
    from importlib.metadata import version

    return f"cloudpickle=={version('cloudpickle')}"


# ---------------------------------------------------------------- files and blocks


def _file_lines(path: Path, within: tuple[Path, ...]) -> Iterator[str]:
    resolved = path.resolve()
    if resolved in within:
        raise RequirementError(f"{path} includes itself")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequirementError(f"the requirements file {path} cannot be read: {error}") from None
    for number, line in _logical_lines(text):
        included = _INCLUDE.fullmatch(line)
        if included:
            yield from _file_lines(path.parent / included[1], (*within, resolved))
            continue
        try:
            _check_file_line(line)
        except RequirementError as error:
            raise RequirementError(f"{path}, line {number}: {error.message}") from None
        yield line


def _check_file_line(line: str) -> None:
    """Refuse what is not one requirement, and say what to do about what files may hold besides."""
    if "--hash" in line:
        raise RequirementError(
            "hashes are not supported; write the file without them "
            "(`uv export --no-hashes`, `pip-compile` without --generate-hashes)"
        )
    if re.match(r"(-c|--constraint)\b", line):
        raise RequirementError("constraint files are not supported; write the versions into the lines")
    _check(line)


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines without comments, continued ones joined, with the number of their first."""
    joined, start = "", 0
    for number, raw in enumerate(text.splitlines(), start=1):
        line = _COMMENT.sub("", raw).rstrip()
        start = start or number
        if line.endswith("\\"):
            joined += line[:-1] + " "
            continue
        if (joined + line).strip():
            yield start, (joined + line).strip()
        joined, start = "", 0
    if joined.strip():
        yield start, joined.strip()


def _script_block(lines: list[str]) -> tuple[int, str] | None:
    """The line where the block starts, counted from 1, and its TOML."""
    starts = [index for index, line in enumerate(lines) if line.rstrip() == "# /// script"]
    if not starts:
        return None
    if len(starts) > 1:
        raise RequirementError(f"a second script block starts in line {starts[1] + 1}; a cell may have one")
    body: list[str] = []
    for index in range(starts[0] + 1, len(lines)):
        line = lines[index].rstrip()
        if line == "# ///":
            return starts[0] + 1, "\n".join(body)
        if line != "#" and not line.startswith("# "):
            raise RequirementError(
                f"the script block is broken in line {index + 1}: each line of it starts with '# '"
            )
        body.append(line[2:])
    raise RequirementError(f"the script block that starts in line {starts[0] + 1} has no end: '# ///'")


def _toml(text: str, start: int) -> dict[str, Any]:
    toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        return dict(toml.loads(text))
    except toml.TOMLDecodeError as error:
        place = re.fullmatch(r"(.*) \(at line (\d+), column \d+\)", str(error), re.DOTALL)
        line, problem = (start + int(place[2]), place[1]) if place else (start, str(error))
        raise RequirementError(f"the script block is not TOML in line {line}: {problem}") from None
