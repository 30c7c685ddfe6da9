"""Run uv: find interpreters, resolve requirements, make environments, install into them.

Runs in the agent; the only file that runs uv. uv gets lists of arguments and requirement lines on
its stdin, never a shell and never a line that was not checked (`fal_agent.requirements`). Its own
settings on the host (indexes, proxies, credentials) hold; those that would aim it at another
environment do not.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from fal_agent.errors import EnvironmentBuildError
from fal_agent.server.environments.command import Completed, Supervision, run_command
from fal_agent.server.environments.disk import existing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Uv", "UvError"]

_QUICK, _RESOLVE, _INSTALL = 60.0, 900.0, 3600.0  # seconds that a command may take
_DROPPED = re.compile(
    r"VIRTUAL_ENV|CONDA_(?!PKGS)\w*|PYTHON(?:PATH|HOME|STARTUP)|__PYVENV_LAUNCHER__|FAL_NOTEBOOK_\w*|"
    r"UV_(?:PYTHON|SYSTEM_PYTHON|BREAK_SYSTEM_PACKAGES|PROJECT\w*|WORKING_DIR\w*|VENV_\w+|ISOLATED|"
    r"COMPILE_BYTECODE|REQUIRE_HASHES|NO_DEPS|CUSTOM_COMPILE_COMMAND|NO_BUILD_ISOLATION|REINSTALL\w*)|"
    r"FORCE_COLOR|CLICOLOR_FORCE"
)
_NOISE = re.compile(  # says nothing to who asked for packages
    r"Using (?:C?Python|.*interpreter)|Creating virtual environment|Activate with:|"
    r"warning: Failed to (?:hard)?link files; falling back to full copy"
)
_RESOLVED = re.compile(r"Resolved \d+ packages? in ")  # of pins
_ANYTHING = re.compile("")
_ERROR = re.compile(r"error\b|\s+\u00d7")
_CERTIFICATE = re.compile(r"invalid peer certificate|UnknownIssuer|certificate verify failed", re.IGNORECASE)


class UvError(Exception):
    """A command of uv failed.

    Attributes:
        words: its own explanation, without progress and warnings before it.
        log: everything it wrote, at most the last 256 KiB.
    """

    def __init__(self, words: str, log: str) -> None:
        super().__init__(words, log)
        self.words, self.log = words, log

    def __str__(self) -> str:
        return self.words


class Uv:
    """One uv program.

    Args:
        program: its path.
        cache_dir: where it keeps packages; None leaves that to it.
        retries: how often it asks again for what it could not fetch; None leaves that to it, and
            $UV_HTTP_RETRIES goes first.
    """

    def __init__(
        self, program: Path, cache_dir: Optional[Path] = None, *, retries: Optional[int] = None
    ) -> None:
        self.program, self.cache_dir, self._retries = program, cache_dir, retries
        self._wheels: Optional[Path] = None
        self._system_certificates = False
        self._default_cache: Optional[Path] = None

    @classmethod
    def find(cls, root: Path, *, retries: Optional[int] = None) -> Uv:
        """Find uv on this host: in `root`/bin, as $UV, on PATH, where its installer puts it, in this Python.

        Args:
            root: the agent's folder.
            retries: see `Uv`.

        Raises:
            EnvironmentBuildError: there is none.
        """
        for candidate in _candidates(root):
            if candidate.is_file() and os.access(candidate, os.X_OK):
                return cls(candidate, retries=retries)
        raise EnvironmentBuildError(
            "uv is not on this host: it is not on PATH, not in ~/.local/bin or ~/.cargo/bin, and not in "
            f"{root / 'bin'}. Install it there (`pip install --user uv`, or see "
            "https://docs.astral.sh/uv/), or set UV to its path"
        )

    def with_wheels(self, folder: Path) -> Uv:
        """Give the same program, for which the wheels in a folder are all that there is."""
        other = Uv(self.program, self.cache_dir)
        other._wheels = folder
        return other

    # ------------------------------------------------------------ what it does

    def compile(
        self,
        lines: Sequence[str],
        *,
        python: Path,
        supervision: Supervision,
        preferences: Optional[Path] = None,
        isolated: bool = True,
        refresh: bool = False,
    ) -> list[str]:
        """Resolve requirement lines for an interpreter.

        Args:
            lines: requirement lines.
            python: the interpreter.
            supervision: who listens and may end it.
            preferences: a file of pins that are taken where nothing speaks against it; it is overwritten.
            isolated: False lets builds import what is installed for `python`.
            refresh: look again for what is cached.

        Returns:
            One pin each, such as "numpy==2.4.6" or "mylib @ file:///opt/mylib.whl".

        Raises:
            UvError: they cannot be resolved.
        """
        arguments = ["pip", "compile", "-", "--python", str(python), "--no-header", "--no-annotate"]
        if preferences is not None:
            arguments += ["--output-file", str(preferences)]
        arguments += [] if isolated else ["--no-build-isolation"]
        arguments += ["--refresh"] if refresh else []
        arguments += self._index_options
        done = self._run(arguments, supervision, stdin="\n".join(lines) + "\n", timeout=_RESOLVE)
        return [line.strip() for line in done.output.splitlines() if re.match(r"[A-Za-z0-9]", line)]

    def venv(self, folder: Path, *, python: Path, supervision: Supervision) -> None:
        """Make an empty virtual environment.

        Raises:
            UvError: it cannot be made.
        """
        self._run(["venv", "--python", str(python), str(folder)], supervision, timeout=_QUICK)

    def install(
        self,
        pins: Sequence[str],
        *,
        python: Path,
        supervision: Supervision,
        compile_bytecode: bool = False,
        isolated: bool = True,
        offline: bool = False,
        refresh: Sequence[str] = (),
    ) -> None:
        """Install exactly these packages, and nothing that they depend on, into an environment.

        Args:
            pins: as `compile` gives them.
            python: the environment's interpreter.
            supervision: who listens and may end it.
            compile_bytecode: compile every module now rather than at its first import.
            isolated: False lets builds import what is installed there already.
            offline: use only what is cached.
            refresh: distributions that are taken anew even if they are cached.

        Raises:
            UvError: one of them cannot be had or built, or there is no room.
        """
        arguments = ["pip", "install", "--python", str(python), "--no-deps", "--requirement", "-"]
        if "UV_LINK_MODE" not in os.environ:
            arguments += ["--link-mode", "hardlink" if self._shares_files_with(python.parent) else "copy"]
        for chosen, option in (
            (compile_bytecode, "--compile-bytecode"),
            (not isolated, "--no-build-isolation"),
            (offline, "--offline"),
        ):
            arguments += [option] if chosen else []
        for name in refresh:
            arguments += ["--refresh-package", name]
        arguments += self._index_options
        heard = _without(_RESOLVED, supervision)
        self._run(arguments, heard, stdin="\n".join(pins) + "\n", timeout=_INSTALL)

    def pip(self, arguments: Sequence[str], *, supervision: Supervision) -> Completed:
        """Run `uv pip` for a person who asked for it in a cell.

        Raises:
            UvError: it failed.
        """
        return self._run(["pip", *arguments], supervision, timeout=_INSTALL)

    def python_find(self, version: str, *, supervision: Supervision) -> Optional[Path]:
        """Find an interpreter of a minor version on this host; None if there is none.

        Args:
            version: "X.Y".
            supervision: who listens and may end it.
        """
        arguments = ["python", "find", f"cpython@{version}"]
        silent = _without(_ANYTHING, supervision)
        try:
            done = self._run(arguments, silent, timeout=_QUICK, path=_path_of_pythons(version))
        except UvError:  # that is how it says that there is none
            return None
        return Path(done.output.strip())

    def python_install(self, version: str, *, supervision: Supervision) -> None:
        """Download an interpreter of a minor version.

        Raises:
            UvError: downloads are forbidden here, or failed.
        """
        self._run(["python", "install", f"cpython@{version}"], supervision, timeout=_RESOLVE)

    def python_list(self, *, supervision: Supervision) -> list[str]:
        """The interpreters on this host, as "VERSION (PATH)", the newest first.

        Raises:
            UvError: it cannot tell.
        """
        arguments = ["python", "list", "--only-installed", "--offline"]
        silent = _without(_ANYTHING, supervision)
        done = self._run(arguments, silent, timeout=_QUICK, path=_path_of_pythons(""))
        found: dict[str, str] = {}
        for line in done.output.splitlines():
            match = re.match(r"cpython-(\d+\.\d+\.\d+)\S*\s+(\S+)", line)
            if match:
                found.setdefault(match[1], match[2])
        return [f"{version} ({path})" for version, path in found.items()]

    # ------------------------------------------------------------ where it keeps packages

    def cache_folder(self) -> Path:
        """The folder where uv keeps packages. It may not be there yet.

        Raises:
            UvError: it cannot tell.
        """
        if self.cache_dir is not None:
            return self.cache_dir
        if self._default_cache is None:
            nobody = Supervision(lambda _line: None, threading.Event())
            done = self._run(["cache", "dir"], nobody, timeout=_QUICK)
            self._default_cache = Path(done.output.strip())
        return self._default_cache

    def keep_cache_near(self, root: Path) -> None:
        """Keep packages in `root`/uv-cache if uv's own folder cannot share files with `root`.

        A folder that was chosen by $UV_CACHE_DIR is left as it is.
        """
        if self.cache_dir is None and "UV_CACHE_DIR" not in os.environ and not self._shares_files_with(root):
            self.cache_dir = root / "uv-cache"

    def _shares_files_with(self, folder: Path) -> bool:
        """Whether hard links between the cache and a folder can be expected to work."""
        cache = existing(self.cache_folder())
        return cache.stat().st_dev == existing(folder).stat().st_dev and os.access(cache, os.W_OK)

    @property
    def _index_options(self) -> list[str]:
        return [] if self._wheels is None else ["--no-index"]

    # ------------------------------------------------------------ running it

    def _run(
        self,
        arguments: Sequence[str],
        supervision: Supervision,
        *,
        timeout: float,
        stdin: str = "",
        path: Optional[str] = None,
    ) -> Completed:
        heard = _without(_NOISE, supervision)
        complaints: list[str] = []
        first = _with_complaints_in(complaints, heard)
        done = self._once(arguments, first, timeout=timeout, stdin=stdin, path=path)
        if done.status != 0 and not self._system_certificates and _CERTIFICATE.search(done.log):
            self._system_certificates = True  # the network's own authority, which only the system knows
            done = self._once(arguments, heard, timeout=timeout, stdin=stdin, path=path)
        else:
            for line in complaints:
                heard.on_line(line)
        if done.timed_out:
            raise UvError(f"uv {arguments[0]} did not end within {timeout:g} s and was stopped", done.log)
        if done.status != 0:
            raise UvError(_words(done), done.log)
        return done

    def _once(
        self,
        arguments: Sequence[str],
        supervision: Supervision,
        *,
        timeout: float,
        stdin: str,
        path: Optional[str],
    ) -> Completed:
        try:
            return run_command(
                [str(self.program), *arguments],
                variables=self._variables(path),
                stdin=stdin,
                supervision=supervision,
                timeout=timeout,
            )
        except (FileNotFoundError, PermissionError) as error:
            raise UvError(f"{self.program} cannot be started: {error.strerror}", "") from None

    def _variables(self, path: Optional[str]) -> dict[str, str]:
        variables = {name: value for name, value in os.environ.items() if not _DROPPED.fullmatch(name)}
        variables.update(NO_COLOR="1", UV_NO_PROGRESS="1", UV_PYTHON_INSTALL_BIN="0")
        if path is not None:
            variables["PATH"] = path
        if self.cache_dir is not None:
            variables["UV_CACHE_DIR"] = str(self.cache_dir)
        if self._retries is not None:
            variables.setdefault("UV_HTTP_RETRIES", str(self._retries))
        if self._wheels is not None:
            variables.update(UV_FIND_LINKS=str(self._wheels), UV_PYTHON_DOWNLOADS="never")
        if self._system_certificates:
            variables.update(UV_SYSTEM_CERTS="1", UV_NATIVE_TLS="1")
        return variables


def _candidates(root: Path) -> Iterator[Path]:
    yield root / "bin" / "uv"
    if os.environ.get("UV"):
        yield Path(os.environ["UV"]).expanduser()
    shims = []
    for folder in os.get_exec_path():
        if Path(folder).name == "shims":  # of pyenv: a slow script that may not lead to a uv
            shims.append(Path(folder) / "uv")
        elif folder:
            yield Path(folder) / "uv"
    for folder in ("~/.local/bin", "~/.cargo/bin"):
        yield Path(folder).expanduser() / "uv"
    try:
        from uv import find_uv_bin
    except ImportError:
        pass
    else:
        with contextlib.suppress(FileNotFoundError):  # the module is there without its program
            yield Path(find_uv_bin())
    yield from shims


def _path_of_pythons(version: str) -> str:
    """PATH for finding interpreters: without pyenv's shims, which fail, but with the Pythons behind them."""
    folders = [folder for folder in os.get_exec_path() if Path(folder).name != "shims"]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = [path for path in pyenv.glob(f"{version}*/bin") if _numbers(path.parent.name)]
    found.sort(key=lambda path: _numbers(path.parent.name), reverse=True)
    return os.pathsep.join([*folders, *map(str, found)])


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".")] if re.fullmatch(r"\d+(\.\d+)*", name) else []


def _without(noise: re.Pattern[str], supervision: Supervision) -> Supervision:
    """Leave out the lines that match, with the indented lines that follow them."""
    in_noise = False

    def hear(line: str) -> None:
        nonlocal in_noise
        in_noise = bool(noise.match(line)) or (in_noise and line.startswith("  "))
        if not in_noise:
            supervision.on_line(line)

    return replace(supervision, on_line=hear)


def _with_complaints_in(complaints: list[str], supervision: Supervision) -> Supervision:
    """Keep the lines from the first error on in a list: the next try may make them void."""

    def hear(line: str) -> None:
        if complaints or _ERROR.match(line):
            complaints.append(line)
        else:
            supervision.on_line(line)

    return replace(supervision, on_line=hear)


def _words(done: Completed) -> str:
    """What uv gives as the reason: from its first "error" on."""
    lines = done.log.splitlines()
    for index, line in enumerate(lines):
        if _ERROR.match(line):
            return "\n".join(lines[index:])
    if done.status < 0:
        return f"uv was killed by signal {-done.status}"
    return done.log or f"uv ended with status {done.status}"
