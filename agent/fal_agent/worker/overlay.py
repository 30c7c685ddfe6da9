"""A folder for what `%pip install` installs: of this worker alone, before its environment's packages.

Runs in a worker that has sessions. Environments are shared and never changed; see `fal_agent.installing`
for what stands behind the `pip` and `uv` that cells find here. The folder goes with the worker.
"""

from __future__ import annotations

import atexit
import importlib
import os
import shutil
import site
import sys
from pathlib import Path
from typing import Optional

import fal_agent
from fal_agent.paths import default_root

__all__ = ["installed_lines", "make_overlay", "take_up"]

_PROGRAM = """#!/bin/sh
PYTHONPATH={code!r} exec {python!r} -m fal_agent.installing {name} "$@"
"""
_MODULE = """import sys


def main(arguments=None):
    if {code!r} not in sys.path:
        sys.path.append({code!r})
    from fal_agent.installing import main

    return main([{name!r}, *(sys.argv[1:] if arguments is None else arguments)])
"""
_MAIN = "import sys\n\nfrom {name} import main\n\nsys.exit(main())\n"

_folder: Optional[Path] = None  # of this process
_taken_up = 0  # bytes of the list of what was installed


def make_overlay() -> None:
    """Give this worker's cells a `pip` and a `uv` that leave the environment alone; done once."""
    global _folder  # noqa: PLW0603 - a process has one
    if _folder is not None or "FAL_NOTEBOOK_WORKER" not in os.environ:  # not a process of the agent's
        return
    overlays = default_root() / "overlays"
    _sweep(overlays)
    _folder = overlays / str(os.getpid())
    shutil.rmtree(_folder, ignore_errors=True)  # of a process that had this number before
    for name in ("lib", "bin", "modules"):
        (_folder / name).mkdir(parents=True, exist_ok=True)
    code = str(Path(fal_agent.__file__).parent.parent)
    for name in ("pip", "uv"):
        _write_tool(_folder, name, code)
    atexit.register(_remove, _folder, os.getpid())
    library, modules = str(_folder / "lib"), str(_folder / "modules")
    os.environ["FAL_NOTEBOOK_OVERLAY"] = str(_folder)
    programs = [str(_folder / "bin"), str(_folder / "lib" / "bin")]
    os.environ["PATH"] = os.pathsep.join([*programs, os.environ.get("PATH", os.defpath)])
    given = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*([given] if given else []), library, modules])
    packages = (index for index, path in enumerate(sys.path) if path.endswith("-packages"))
    sys.path.insert(next(packages, len(sys.path)), library)
    sys.path.append(modules)


def take_up() -> None:
    """Let what was installed since the last time be imported."""
    global _taken_up  # noqa: PLW0603
    importlib.invalidate_caches()
    if _folder is not None and (size := _size_of(_folder / "requirements.txt")) != _taken_up:
        _taken_up = size
        if any((_folder / "lib").glob("*.pth")):  # projects that were installed as they lie there
            site.addsitedir(str(_folder / "lib"))


def installed_lines() -> list[str]:
    """The requirement lines that cells have installed in this process, in their order."""
    if _folder is None or not _size_of(_folder / "requirements.txt"):
        return []
    return (_folder / "requirements.txt").read_text(encoding="utf-8").splitlines()


def _write_tool(folder: Path, name: str, code: str) -> None:
    program, module = folder / "bin" / name, folder / "modules" / name
    program.write_text(_PROGRAM.format(code=code, python=sys.executable, name=name))
    program.chmod(0o755)
    if name == "pip":
        (folder / "bin" / "pip3").symlink_to(program)
    module.mkdir()
    (module / "__init__.py").write_text(_MODULE.format(code=code, name=name))
    (module / "__main__.py").write_text(_MAIN.format(name=name))


def _sweep(overlays: Path) -> None:
    """Remove what workers left that were killed."""
    if overlays.is_dir():
        for folder in overlays.iterdir():
            if folder.name.isdecimal() and not _is_alive(int(folder.name)):
                shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # not a forked child
        shutil.rmtree(folder, ignore_errors=True)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
