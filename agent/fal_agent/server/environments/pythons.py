"""Find the interpreter that an environment is made of.

Runs in the agent. A CPython of exactly the asked minor version, or none: code that is pickled on one
minor version crashes another.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from fal_agent.errors import EnvironmentBuildError
from fal_agent.server.environments.unreachable import UnreachablePythonError
from fal_agent.server.environments.uv import Uv, UvError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fal_agent.server.environments.command import Supervision

__all__ = ["Interpreter", "find_interpreter", "is_still_there"]

_ASK = "import sys; print(sys.implementation.name, '%d.%d.%d' % sys.version_info[:3])"
_TIMEOUT = 20.0  # seconds for an interpreter to say its version


@dataclass(frozen=True)
class Interpreter:
    """A Python on this host: the path of its program and its version, "X.Y.Z"."""

    path: Path
    version: str


def find_interpreter(
    wanted: str, *, brought: Path, uv: Uv, stage: Callable[[str, str], None], supervision: Supervision
) -> Interpreter:
    """Find an interpreter of a minor version, or let uv download one.

    First comes the one named by $FAL_NOTEBOOK_PYTHON, then the agent's own, then those that notebooks
    brought, then what uv knows.

    Args:
        wanted: "X.Y".
        brought: the folder of those that notebooks brought.
        uv: looks for interpreters.
        stage: is told of a download.
        supervision: who listens to uv and who may end it.

    Raises:
        EnvironmentBuildError: there is none and none could be downloaded.
        CallCancelledError: it was cancelled.
    """
    for path in (*_preferred(), *sorted(brought.glob(f"*/bin/python{wanted}"))):
        version = _version_of(path)
        if version is not None and _is(version, wanted):
            return Interpreter(path, version)
    found = uv.python_find(wanted, supervision=supervision)
    if found is None:
        stage("build", f"downloading Python {wanted}")
        found = _download(wanted, uv, supervision)
    version = _version_of(found)
    if version is None or not _is(version, wanted):
        raise EnvironmentBuildError(f"the interpreter {found} that uv found is not a working Python {wanted}")
    return Interpreter(found, version)


def is_still_there(path: str, version: str) -> bool:
    """Whether an interpreter is still the one it was: an upgrade of the system may replace it."""
    return Path(path).exists() and _version_of(Path(path)) == version


def _preferred() -> Iterator[Path]:
    for name in (os.environ.get("FAL_NOTEBOOK_PYTHON"), _own()):
        if name and Path(name).is_file():
            yield Path(name)


def _own() -> Optional[str]:
    return getattr(sys, "_base_executable", None) or sys.executable


def _is(version: str, wanted: str) -> bool:
    return version.startswith(f"{wanted}.")


def _version_of(path: Path) -> Optional[str]:
    own = _own()
    if own and Path(own).exists() and path.samefile(own):
        return platform.python_version() if platform.python_implementation() == "CPython" else None
    return _ask(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _ask(path: Path, _modified: int) -> Optional[str]:
    """The version of a CPython; None if it is something else or does not start."""
    try:
        done = subprocess.run(
            [str(path), "-I", "-S", "-c", _ASK],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):  # the next candidate may work
        return None
    name, _, version = done.stdout.decode("ascii", "replace").strip().partition(" ")
    return version if name == "cpython" else None


def _download(wanted: str, uv: Uv, supervision: Supervision) -> Path:
    reason = "uv installed none"
    try:
        uv.python_install(wanted, supervision=supervision)
        found = uv.python_find(wanted, supervision=supervision)
        if found is not None:
            return found
    except UvError as error:
        reason, log = error.words, error.log
    else:
        log = ""
    try:
        here = ", ".join(uv.python_list(supervision=supervision))
    except UvError as error:
        here = f"uv cannot list it: {error.words}"
    raise UnreachablePythonError(
        f"there is no Python {wanted} on this host and it could not be downloaded.\n"
        f"Python that is there: {here or 'none'}.\n"
        f"Install Python {wanted} there (for instance `uv python install {wanted}`), or use a notebook "
        f"whose Python is one of those.\nuv says: {reason}",
        log[-4096:],
    )
