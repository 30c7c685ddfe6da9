"""What requirements resolved to, and the names that follow from it.

Runs in the agent. A spec has a key, made of what was asked for; a lock has a name, made of what that
resolved to. So two specs that resolve to the same packages share an environment.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import sysconfig
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from fal_agent.requirements import distribution_name, local_path, normalised
from fal_agent.server.environments.disk import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fal_agent.wire import EnvironmentSpec

__all__ = ["Lock", "difference", "layers_of", "read_lock", "spec_key", "this_platform", "write_lock"]

_FORMAT = 1
_PROJECT_FILES = ("pyproject.toml", "setup.py", "setup.cfg")


@dataclass(frozen=True)
class Lock:
    """What a spec resolved to on this host.

    Attributes:
        python: the interpreter that environments are made of.
        version: its version, "X.Y.Z".
        layers: the pins that hold after each install step; the last are the environment's.
        isolated: false if a later step's builds need to see the steps before it.
        marks: tell the contents of local files among the requirements.
        build: tells a forced build from those before it; "" without force.
    """

    python: str
    version: str
    layers: list[list[str]]
    isolated: bool = True
    marks: str = ""
    build: str = ""

    @property
    def packages(self) -> list[str]:
        """The environment's packages, as "name==version" or "name @ address"."""
        return self.layers[-1] if self.layers else []

    def name(self, *, compile_bytecode: bool) -> str:
        """The name of the environment: 16 hex digits."""
        content = [_FORMAT, this_platform(), self.python, self.version, sorted(self.packages)]
        return _digest([*content, self.isolated, self.marks, self.build, compile_bytecode])


def layers_of(spec: EnvironmentSpec) -> list[list[str]]:
    """The spec's install steps with one spelling, in one order and without empty ones."""
    layers = [sorted({normalised(line) for line in layer}) for layer in spec.layers]
    return [layer for layer in layers if layer]


def spec_key(python: str, layers: Sequence[Sequence[str]]) -> str:
    """The name of the lock of what was asked for: 32 hex digits.

    Args:
        python: "X.Y".
        layers: as `layers_of` gives them.
    """
    return _digest([_FORMAT, this_platform(), python, layers, marks_of(layers)], 32)


def marks_of(layers: Sequence[Sequence[str]]) -> str:
    """What tells the contents of local files and folders among the requirements; "" if there are none."""
    paths = [Path(path) for layer in layers for path in map(local_path, layer) if path]
    marks = [_mark(file) for path in paths for file in _decisive(path)]
    return _digest(marks) if marks else ""


def _decisive(path: Path) -> list[Path]:
    """The files whose change means a new build: of a folder, those that describe the project."""
    return [path / name for name in _PROJECT_FILES] if path.is_dir() else [path]


def _mark(path: Path) -> Optional[list[int]]:
    try:
        about = path.stat()
    except OSError:  # not there: uv will say so
        return None
    return [about.st_mtime_ns, about.st_size]


@functools.lru_cache(maxsize=1)
def this_platform() -> str:
    """What of the machine decides which packages run on it."""
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError, OSError):  # not glibc
        libc = None
    return f"{sysconfig.get_platform()} {platform.machine()} {libc or 'another libc'}"


def read_lock(path: Path) -> Optional[Lock]:
    """Read a lock; None if there is none or if it is not one."""
    try:
        content = json.loads(path.read_bytes())
        if content.pop("format") != _FORMAT:
            return None
        lock = Lock(**content)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):  # not ours: it is made anew
        return None
    return lock


def write_lock(path: Path, lock: Lock) -> None:
    """Keep a lock; it appears whole or not at all.

    Raises:
        OSError: there is no room, for instance.
    """
    write_whole(path, json.dumps({"format": _FORMAT, **asdict(lock)}, indent=1))


def difference(before: Sequence[str], after: Sequence[str]) -> str:
    """Say how two lists of pins differ: "numpy 2.4.5 -> 2.4.6, + scipy 1.17.1, - six 1.17.0"."""
    old = {distribution_name(pin): _version(pin) for pin in before}
    new = {distribution_name(pin): _version(pin) for pin in after}
    changed = [f"{name} {old[name]} -> {new[name]}" for name in new if name in old and old[name] != new[name]]
    added = [f"+ {name} {new[name]}" for name in new if name not in old]
    return ", ".join([*changed, *added, *(f"- {name} {old[name]}" for name in old if name not in new)])


def _version(pin: str) -> str:
    return pin.partition("==")[2] or pin.partition(" @ ")[2]


def _digest(content: object, length: int = 16) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:length]
