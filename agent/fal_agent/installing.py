"""`pip` and `uv pip` of a session: they install beside its environment, which other sessions share.

Runs on the host, in a process that a cell starts (`%pip`, `!pip`, `!uv pip`, `python -m pip`), with the
environment's interpreter. uv finds out what the environment lacks; that alone is put into the folder of
the session's worker; see `fal_agent.worker.overlay`, which makes the folder and names it in
$FAL_NOTEBOOK_OVERLAY.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING

from fal_agent.errors import EnvironmentBuildError
from fal_agent.paths import default_root
from fal_agent.requirements import canonical_name
from fal_agent.server.environments.command import Supervision
from fal_agent.server.environments.uv import Uv, UvError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["main"]

# What uv calls pip's options; those that mean nothing to it are left out of what it is told.
_FLAGS = {
    "-U": "--upgrade", "--upgrade": "--upgrade", "--pre": "--prerelease=allow", "--no-deps": "--no-deps",
    "--no-cache-dir": "--no-cache", "--no-cache": "--no-cache", "--no-index": "--no-index",
    "-I": "--reinstall", "--ignore-installed": "--reinstall", "--force-reinstall": "--reinstall",
    "--reinstall": "--reinstall", "--no-build-isolation": "--no-build-isolation",
}  # fmt: skip
_IDLE_FLAGS = (
    "--user", "--system", "--prefer-binary", "--disable-pip-version-check", "--no-input", "--no-color",
    "--no-warn-script-location", "--no-warn-conflicts", "--break-system-packages",
    "-y", "--yes", "-v", "--verbose",
)  # fmt: skip
_VALUES = {
    "-i": "--index-url", "--index-url": "--index-url", "--extra-index-url": "--extra-index-url",
    "-f": "--find-links", "--find-links": "--find-links", "--index": "--index",
    "-c": "--constraints", "--constraint": "--constraints", "--default-index": "--default-index",
    "--only-binary": "--only-binary", "--no-binary": "--no-binary", "--prerelease": "--prerelease",
    "--trusted-host": "--allow-insecure-host", "--index-strategy": "--index-strategy",
    "--torch-backend": "--torch-backend", "--exclude-newer": "--exclude-newer",
}  # fmt: skip
_IDLE_VALUES = (
    "--progress-bar", "--root-user-action", "--upgrade-strategy", "--timeout", "--default-timeout",
    "--retries", "--exists-action",
)  # fmt: skip


class _Request:
    """What a person asked to install.

    Attributes:
        lines: requirements.
        files: requirement files.
        editable: folders of projects.
        options: uv's, for everything else.
        is_quiet: say nothing.
    """

    def __init__(self, arguments: list[str]) -> None:
        parser = argparse.ArgumentParser(prog="pip install", add_help=False, allow_abbrev=False)
        for flag in (*_FLAGS, *_IDLE_FLAGS):
            parser.add_argument(flag, dest=flag, action="store_true")
        for option in (*_VALUES, *_IDLE_VALUES):
            parser.add_argument(option, dest=option, action="append", default=[])
        parser.add_argument("-q", "--quiet", action="count", default=0)
        parser.add_argument(
            "-r", "--requirement", "--requirements", dest="files", action="append", default=[]
        )
        parser.add_argument("-e", "--editable", dest="editable", action="append", default=[])
        parser.add_argument("lines", nargs="*")
        found = vars(parser.parse_intermixed_args(arguments))
        self.lines = [_absolute(line) for line in found["lines"]]
        self.files = [_absolute(file, is_path=True) for file in found["files"]]
        self.editable = [_absolute(folder, is_path=True) for folder in found["editable"]]
        self.is_quiet = bool(found["quiet"])
        self.options = [ours for flag, ours in _FLAGS.items() if found[flag]]
        for option, ours in _VALUES.items():
            is_path = ours == "--constraints"
            values = [_absolute(value, is_path=True) if is_path else value for value in found[option]]
            self.options += [part for value in values for part in (ours, value)]

    @property
    def asked(self) -> list[str]:
        """What is to be installed, as uv's arguments."""
        files = [part for file in self.files for part in ("--requirements", file)]
        editable = [part for folder in self.editable for part in ("--editable", folder)]
        return [*self.lines, *files, *editable]


class _Pip:
    """The commands.

    Args:
        library: the folder that packages are installed into.
    """

    def __init__(self, library: Path) -> None:
        self.library = library
        self._uv = Uv.find(default_root())

    def install(self, arguments: list[str]) -> None:
        """Install what the environment lacks."""
        request = _Request(arguments)
        if not request.asked:
            raise UvError("You must give at least one requirement to install", "")
        pins = self._plan(request)
        if pins or request.editable:
            editable = [part for folder in request.editable for part in ("--editable", folder)]
            where = ["--python", sys.executable, "--target", str(self.library), "--no-deps"]
            hear = _ignore if request.is_quiet else _say
            self._run(["install", *where, *request.options, *editable, *pins], hear)
        elif not request.is_quiet:
            for line in (*request.lines, *request.files):
                _say(f"Requirement already satisfied: {line}")
        self._note(request)

    def _plan(self, request: _Request) -> list[str]:
        """Give the pins of what the environment lacks, and what was installed beside it too."""
        said: list[str] = []
        where = ["--python", sys.executable, "--dry-run"]
        self._run(["install", *where, *request.options, *request.asked], said.append)
        pins = [line.strip()[2:] for line in said if line.startswith(" + ")]
        editable = [f" @ {Path(folder).resolve().as_uri()}" for folder in request.editable]
        here = {} if "--reinstall" in request.options else self._installed()
        return [pin for pin in pins if not pin.endswith(tuple(editable)) and not _is_among(pin, here)]

    def _note(self, request: _Request) -> None:
        """Remember what was asked for, should the session start anew."""
        lines = [*request.lines, *(f"--editable {folder}" for folder in request.editable)]
        for file in request.files:
            lines += Path(file).read_text(encoding="utf-8").splitlines()
        with (self.library.parent / "requirements.txt").open("a", encoding="utf-8") as noted:
            noted.writelines(f"{line}\n" for line in lines)

    def uninstall(self, arguments: list[str]) -> None:
        """Remove what was installed beside the environment."""
        request = _Request(arguments)
        here = self._installed()
        ours = [line for line in request.lines if canonical_name(line) in here]
        if ours:
            self._run(["uninstall", "--target", str(self.library), *ours], _say)
        for line in request.lines:
            if line not in ours:
                _say(f"{line} is not of this session alone: its environment is shared, and stays as it is")

    def table(self, _arguments: list[str]) -> None:
        """List what can be imported, as a table."""
        found = {**self._installed(sys.path), **self._installed()}
        width = max(map(len, [*found, "Package"]))
        _say(f"{'Package':{width}} Version\n{'-' * width} -------")
        for name in sorted(found):
            _say(f"{name:{width}} {found[name]}")

    def freeze(self, _arguments: list[str]) -> None:
        """List what can be imported, as pins."""
        found = {**self._installed(sys.path), **self._installed()}
        for name in sorted(found):
            _say(f"{name}=={found[name]}")

    def show(self, arguments: list[str]) -> None:
        """Say what is known of a package."""
        is_here = any(canonical_name(name) in self._installed() for name in arguments)
        where = ["--target", str(self.library)] if is_here else ["--python", sys.executable]
        _say(self._run(["show", *where, *arguments], _complain).rstrip("\n"))

    def _installed(self, path: list[str] | None = None) -> dict[str, str]:
        """Canonical name -> version of what lies in the session's folder, or on a path."""
        found: dict[str, str] = {}
        for distribution in distributions(path=path or [str(self.library)]):
            name = distribution.metadata["Name"]
            if name:
                found.setdefault(canonical_name(name), distribution.version)
        return found

    def _run(self, arguments: list[str], hear: Callable[[str], None]) -> str:
        return self._uv.pip(arguments, supervision=Supervision(hear, threading.Event())).output


def main(arguments: list[str]) -> int:
    """Be `pip` or `uv`, as the first argument says; give the exit status."""
    program, *rest = arguments
    ours = (
        os.environ.get("FAL_NOTEBOOK_OVERLAY", "") + os.sep
    )  # this very program goes by the name of uv there
    folders = [folder for folder in os.get_exec_path() if not folder.startswith(ours)]
    os.environ["PATH"] = os.pathsep.join(folders)
    try:
        if program == "uv":
            if rest[:1] != ["pip"]:
                uv = str(Uv.find(default_root()).program)
                os.execv(uv, [uv, *rest])  # noqa: S606 - what was asked for, without a shell
            rest = rest[1:]
        return _pip(rest)
    except (UvError, EnvironmentBuildError, OSError) as error:
        _complain(str(error))
        return 1


def _pip(arguments: list[str]) -> int:
    command, *rest = arguments or ["help"]
    library = Path(os.environ["FAL_NOTEBOOK_OVERLAY"]) / "lib"
    if command in ("-V", "--version"):
        _say(
            f"pip of fal_notebook, by uv, into {library} (python {sys.version_info[0]}.{sys.version_info[1]})"
        )
        return 0
    if command not in _COMMANDS:
        _complain(
            f"pip {command}: in a session on a host there are pip {', '.join(_COMMANDS)}; "
            "what they install is of this session alone. `%%fal -r NAME` adds a package to its environment"
        )
        return 1
    _COMMANDS[command](_Pip(library), rest)
    return 0


_COMMANDS = {
    "install": _Pip.install,
    "uninstall": _Pip.uninstall,
    "list": _Pip.table,
    "freeze": _Pip.freeze,
    "show": _Pip.show,
}


def _is_among(pin: str, installed: dict[str, str]) -> bool:
    name, _, version = pin.partition("==")
    return bool(version) and installed.get(canonical_name(name)) == version


def _absolute(text: str, *, is_path: bool = False) -> str:
    """Name a file or folder that is meant by its whole path: uv runs in another folder."""
    path, bracket, extras = text.partition("[")
    if ":" in path:  # an address
        return text
    is_path = is_path or path.startswith((".", "~")) or os.sep in path or Path(path).is_file()
    return str(Path(path).expanduser().absolute()) + bracket + extras if is_path else text


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _complain(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _ignore(_line: str) -> None:
    """Hear nothing."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
