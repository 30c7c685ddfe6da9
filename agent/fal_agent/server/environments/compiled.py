"""Hand on what Python has compiled, from environments to a new one that holds the same packages.

Runs in the agent. uv takes the sources of a package from its cache, the same files for each environment;
compiled modules it leaves to the first import, which takes seconds for a large package. What was compiled
from the very same file, a link to the same bytes, is as good in the next environment: Python puts the
module's new place into its code when it loads it.
"""

from __future__ import annotations

import csv
import logging
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["hand_on"]

_log = logging.getLogger(__name__)
_CACHE = "__pycache__"


def hand_on(environment: Path, others: Iterable[Path]) -> int:
    """Give a new environment the compiled modules that others have of the packages it holds.

    Args:
        environment: its folder; no code of it has run yet.
        others: folders of environments that are there, the most promising first.

    Returns:
        How many modules; each is a link to the other environment's file.
    """
    packages = _packages(environment)
    count = 0
    for other in others:
        if not packages:
            break
        theirs = _packages(other)
        for name in sorted(packages.keys() & theirs.keys()):
            given = _hand_on_package(packages[name], theirs[name])
            if given:
                del packages[name]
            count += given
    return count


def _packages(environment: Path) -> dict[str, Path]:
    """The records of what an environment holds, by a name in which Python's and the package's version is."""
    return {f"{path.parts[-3]}/{path.name}": path for path in environment.glob("lib/python*/*/*.dist-info")}


def _hand_on_package(mine: Path, theirs: Path) -> int:
    """Link the compiled modules of one package; both are its records. Gives how many there were."""
    count = 0
    for folder in _folders_of(mine):
        target, source = mine.parent / folder, theirs.parent / folder
        try:
            compiled = [entry.name for entry in os.scandir(source / _CACHE) if entry.name.endswith(".pyc")]
        except FileNotFoundError:  # nothing of it was ever imported there
            continue
        for name in compiled:
            module = name.partition(".")[0] + ".py"
            if _is_one_file(target / module, source / module):
                count += _link(source / _CACHE / name, target / _CACHE / name)
    return count


def _folders_of(record: Path) -> list[PurePosixPath]:
    """The folders of a package's modules, below the one that it is installed in."""
    with (record / "RECORD").open(encoding="utf-8", newline="") as file:
        paths = [PurePosixPath(row[0]) for row in csv.reader(file) if row and row[0].endswith(".py")]
    inside = (path.parent for path in paths if not path.is_absolute() and ".." not in path.parts)
    return sorted(set(inside))


def _is_one_file(first: Path, second: Path) -> bool:
    try:
        return os.path.samestat(first.lstat(), second.lstat())
    except FileNotFoundError:  # a compiled module outlives its source
        return False


def _link(compiled: Path, target: Path) -> int:
    try:
        target.parent.mkdir(exist_ok=True)
        os.link(compiled, target)
    except (FileExistsError, FileNotFoundError):  # it came with the package; it has just been made anew
        return 0
    return 1
