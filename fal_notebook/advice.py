"""Say which distribution is missing on a host and what line brings it there, and how requirements changed.

Runs in the notebook.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from fal_agent.requirements import distribution_name
from fal_notebook.inference import project_of

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "distribution_of",
    "line_with",
    "missing_advice",
    "missing_in",
    "requirement_advice",
    "requirements_change",
]

_ASKS_FOR = re.compile(  # what libraries say when they lack another one
    r"Missing optional dependency ['\"](?P<module>[\w.]+)['\"]"
    r"|`?(?:pip|conda|uv pip) install (?:-\S+ )*['\"]?(?P<project>[A-Za-z0-9][\w.-]*(?:\[[\w,.-]+\])?)"
)


def missing_in(error: BaseException) -> str | None:
    """Give the requirement whose absence an error tells of; None if it tells of something else."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return distribution_of(error.name.partition(".")[0])
    if not isinstance(error, ImportError):
        return None
    found = _ASKS_FOR.search(str(error))
    if found is None:
        return None
    return distribution_of(found["module"].partition(".")[0]) if found["module"] else found["project"]


def distribution_of(module: str) -> str:
    """Give the distribution that a module comes from: as installed here, else as is commonly known."""
    from importlib.metadata import packages_distributions

    found = packages_distributions().get(module)
    return found[0] if found else project_of(module) or module


def missing_advice(module: str, host_name: str) -> str:
    """Say how to get a module onto a host."""
    top = module.partition(".")[0]
    path = getattr(sys.modules.get(top), "__file__", None)
    if isinstance(path, str) and not any(part in path for part in ("site-packages", "dist-packages")):
        return (
            f"{top!r} is a module of yours that {host_name!r} does not have: "
            f'add local_python_modules=["{top}"] to send it along'
        )
    return requirement_advice(distribution_of(top), host_name, lacks=top)


def requirement_advice(requirement: str, host_name: str, *, lacks: str | None = None) -> str:
    """Say how to get a distribution onto a host; `lacks` is the module that was looked for."""
    return (
        f"the environment on {host_name!r} lacks {(lacks or requirement)!r}: "
        f'add requirements=["{requirement}"] to the function, or -r {requirement} to the cell'
    )


def line_with(line: str, requirement: str) -> str:
    """Give the first line of a cell, `%%fal ...`, with one more requirement."""
    words = f"'{requirement}'" if re.search(r"[^\w.=-]", requirement) else requirement
    return f"{line.rstrip()} -r {words}"


def requirements_change(before: Sequence[str], after: Sequence[str]) -> str:
    """Say how requirement lines differ: "+ scipy, numpy==1.26 → numpy==2.4, - six"; "" if they do not."""
    old = {distribution_name(line) or line: line for line in before}
    new = {distribution_name(line) or line: line for line in after}
    changed = [f"{old[name]} → {new[name]}" for name in new if name in old and old[name] != new[name]]
    added = [f"+ {line}" for name, line in new.items() if name not in old]
    return ", ".join([*added, *changed, *(f"- {line}" for name, line in old.items() if name not in new)])
