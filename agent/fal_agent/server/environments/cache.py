"""Know the environments of this host: find one at once, build it once, remove the unused.

Runs in the agent, in threads. A spec that was built before is found by reading two files. However
many threads and processes ask for the same spec, one builds it and the others wait for that.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.errors import EnvironmentBuildError, FalServerlessError, RequirementError
from fal_agent.requirements import check_line
from fal_agent.server import proc
from fal_agent.server.environments.builder import (
    WAITING,
    Builder,
    Environment,
    Folders,
    Job,
    open_environment,
)
from fal_agent.server.environments.disk import files_of, remove_folder
from fal_agent.server.environments.explain import explained, is_no_room, no_room
from fal_agent.server.environments.locking import held, held_now
from fal_agent.server.environments.locks import layers_of, read_lock, spec_key
from fal_agent.server.environments.unreachable import Lacking, UnreachableError, UnreachablePythonError
from fal_agent.server.environments.uv import UvError

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from fal_agent.server.environments.uv import Uv
    from fal_agent.wire import EnvironmentSpec

__all__ = ["Environment", "EnvironmentCache"]

_log = logging.getLogger(__name__)
_VERSION = re.compile(r"[0-9]\.[0-9]{1,2}")
_KEPT_FAILURES = 64
_SUPPLIES = 2  # a Python first, then packages
CUT_OFF = "wheels/.cut-off"  # below the root; was touched when no package index could be reached
_CUT_OFF_SECONDS = 3600.0  # after which the index is tried again
_OURS = re.compile(r"[0-9a-f]{16}")  # names of environments


class EnvironmentCache:
    """The environments below one folder. All methods may be called from several threads.

    Args:
        root: the agent's folder.
        uv: gives uv; called only when something must be built.

    Attributes:
        root: the agent's folder.
    """

    def __init__(self, root: Path, uv: Callable[[], Uv]) -> None:
        self.root = root
        self._folders = Folders(root)
        self._find_uv = uv
        self._uv: Optional[Uv] = None
        self._failures: dict[str, tuple[float, FalServerlessError]] = {}  # by key: when, and what
        self._sizes: dict[str, tuple[float, int]] = {}  # by name: last use when it was measured, bytes

    # ------------------------------------------------------------ finding and building

    def find(self, spec: EnvironmentSpec) -> Optional[Environment]:
        """The environment of a spec, if it was built before and is still there.

        Reads two small files; starts nothing and asks nobody. `spec.force` is not looked at.
        """
        lock = read_lock(self._folders.lock(spec_key(spec.python, layers_of(spec))))
        if lock is None:
            return None
        return open_environment(self._folders, lock, compile_bytecode=spec.compile_bytecode)

    def build(
        self,
        spec: EnvironmentSpec,
        *,
        stage: Callable[[str, str], None],
        log: Callable[[str], None],
        cancelled: threading.Event,
        supply: Optional[Callable[[Lacking, EnvironmentBuildError], None]] = None,
    ) -> Environment:
        """Give the environment of a spec, building it if need be.

        Args:
            spec: what it shall hold.
            stage: gets the phase ("resolve", "build") and a text for people.
            log: gets uv's own lines as they come.
            cancelled: ends the build, or the waiting for somebody else's.
            supply: called with what can neither be found nor downloaded, and with the error that says so;
                it has it brought, or raises.

        Raises:
            RequirementError: a line of the spec is not a requirement.
            EnvironmentBuildError: it cannot be resolved or built; nothing half-made is left.
            CallCancelledError: `cancelled` was set.
            OSError: the folder cannot be written to.
        """
        _check(spec)
        layers = layers_of(spec)
        key = spec_key(spec.python, layers)
        asked, before = time.monotonic(), read_lock(self._folders.lock(key))
        try:
            for folder in (self._folders.environments, self._folders.locks):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            mutex = self._folders.mutex(key)
            with held(mutex, cancelled=cancelled, waiting=lambda: stage("build", WAITING)):
                self._raise_failure(key, asked)
                # Somebody may have built it while we waited, a forced one too.
                force = spec.force and read_lock(self._folders.lock(key)) == before
                found = None if force else self.find(spec)
                if found is not None:
                    return found
                job = Job(spec.python, layers, spec.compile_bytecode, force, stage, log, cancelled)
                return self._build(job, key, supply)
        except OSError as error:
            if is_no_room(error):
                raise no_room([self.root, Path(tempfile.gettempdir())], str(error)) from error
            raise

    def _build(
        self, job: Job, key: str, supply: Optional[Callable[[Lacking, EnvironmentBuildError], None]]
    ) -> Environment:
        try:
            return self._build_somehow(job, supply)
        except UvError as error:
            failure: FalServerlessError = explained(
                error, doing="make the environment", layers=job.layers, folders=[self.root]
            )
        except (EnvironmentBuildError, RequirementError) as error:
            failure = error
        while len(self._failures) >= _KEPT_FAILURES:
            self._failures.pop(next(iter(self._failures)), None)
        self._failures[key] = (time.monotonic(), failure)
        raise failure

    def _build_somehow(
        self, job: Job, supply: Optional[Callable[[Lacking, EnvironmentBuildError], None]]
    ) -> Environment:
        """Build from the package index, and where none can be reached from what notebooks bring."""
        uv, wheels = self._get_uv(), self.root / "wheels"
        if supply is None:
            return Builder(self._folders, uv, job).build()
        is_cut_off = _age(self.root / CUT_OFF) < _CUT_OFF_SECONDS
        for count in range(_SUPPLIES):
            try:
                if not is_cut_off:
                    return Builder(self._folders, uv, job).build()
                # A first failure says only that something lacks.
                quiet = job if count else replace(job, log=_unheard)
                return Builder(self._folders, uv.with_wheels(wheels), quiet).build()
            except (EnvironmentBuildError, UvError) as error:
                if not is_cut_off and not isinstance(error, UnreachableError):
                    raise
                failed = _lacks_something(error) if is_cut_off else _as_error(error)
            wheels.mkdir(mode=0o700, exist_ok=True)
            wants_python = isinstance(failed, UnreachablePythonError)
            if not wants_python and not is_cut_off:  # where a Python is not to be had, an index may be
                (self.root / CUT_OFF).touch()
                is_cut_off = True
            supply(Lacking(job.python, job.layers, wants_python), failed)
        return Builder(self._folders, uv.with_wheels(wheels), job).build()

    def _raise_failure(self, key: str, asked: float) -> None:
        """Whoever waited for a build that failed gets its failure, not one more try each."""
        failed_at, error = self._failures.get(key, (0.0, None))
        if error is not None and failed_at >= asked:
            raise type(error)(*error.args)

    def _get_uv(self) -> Uv:
        if self._uv is None or not self._uv.program.exists():
            uv = self._find_uv()
            uv.keep_cache_near(self.root)
            self._uv = uv
        return self._uv

    # ------------------------------------------------------------ keeping house

    def touch(self, environment: Environment) -> None:
        """Note that an environment was used just now."""
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile: whoever starts it will notice
            os.utime(self._folders.marker(environment.name))

    def infos(self) -> list[dict[str, Any]]:
        """What is there, the latest used first.

        Returns:
            For each: `name`; `python`, "X.Y.Z"; `packages`, how many; `bytes` on disk, with those that are
            shared with uv's cache and other environments; `last_used`, seconds since the epoch;
            `complete`, false for one that is being built or whose builder died.
        """
        infos = [info for info in map(self._info, self._names()) if info is not None]
        return sorted(infos, key=lambda info: (-float(info["last_used"]), str(info["name"])))

    def prune(self, budget_bytes: int, in_use: set[str]) -> list[str]:
        """Remove what was not used for longest until the rest takes at most `budget_bytes`.

        Files that environments share count once. Environments that run a process stay, whoever started
        it. What dead builders left is removed in any case.

        Args:
            budget_bytes: bytes that all environments together may take.
            in_use: names of environments that must stay.

        Returns:
            The names of the removed environments, those of dead builders left out.
        """
        self._remove_leftovers()
        ages = {name: age for name in self._names() if (age := self._last_used(name)) is not None}
        files = {name: dict(files_of(self._folders.environment(name))) for name in ages}
        owners: dict[tuple[int, int], int] = {}
        for found in files.values():
            for file in found:
                owners[file] = owners.get(file, 0) + 1
        total = sum({file: size for found in files.values() for file, size in found.items()}.values())
        kept = in_use | self._running()
        removed = []
        for name in sorted(ages, key=lambda name: ages[name]):
            if total <= budget_bytes:
                break
            if name in kept or not self._remove(name, ages[name]):
                continue
            removed.append(name)
            for file, size in files[name].items():
                owners[file] -= 1
                total -= 0 if owners[file] else size
        return removed

    def remove(self, name: str) -> bool:
        """Remove one environment, unless somebody builds it or runs a process of it; whether it is gone."""
        last_used = self._last_used(name) if _OURS.fullmatch(name) else None
        return last_used is not None and name not in self._running() and self._remove(name, last_used)

    def _names(self) -> list[str]:
        try:
            found = [path.name for path in self._folders.environments.iterdir()]
        except FileNotFoundError:
            return []
        return [name for name in found if _OURS.fullmatch(name)]

    def _last_used(self, name: str) -> Optional[float]:
        """When an environment was last used; None if it is not whole."""
        try:
            return self._folders.marker(name).stat().st_mtime
        except FileNotFoundError:
            return None

    def _info(self, name: str) -> Optional[dict[str, Any]]:
        last_used = self._last_used(name)
        about: dict[str, Any] = {}
        if last_used is not None:
            with contextlib.suppress(FileNotFoundError, ValueError):  # removed meanwhile, or not ours
                about = json.loads(self._folders.marker(name).read_bytes())
        else:
            try:
                used = self._folders.environment(name).stat().st_mtime
            except FileNotFoundError:
                return None
        return {
            "name": name,
            "python": str(about.get("python", "")),
            "packages": int(about.get("packages", 0)),
            "bytes": self._size(name, last_used),
            "last_used": used if last_used is None else last_used,
            "complete": last_used is not None,
        }

    def _size(self, name: str, last_used: Optional[float]) -> int:
        """Bytes of an environment; measured anew after each use, which may have compiled modules in it."""
        measured = self._sizes.get(name)
        if measured is None or measured[0] != last_used:
            size = sum(dict(files_of(self._folders.environment(name))).values())
            if last_used is None:
                return size
            self._sizes[name] = measured = (last_used, size)
        return measured[1]

    def _running(self) -> set[str]:
        """The environments whose interpreter some process of this user runs."""
        prefix = f"{self._folders.environments}/"
        names = set()
        for process in proc.processes():
            try:
                program = Path(f"/proc/{process.pid}/cmdline").read_bytes().partition(b"\0")[0]
            except (FileNotFoundError, ProcessLookupError, PermissionError):  # ended, or not ours
                continue
            text = os.fsdecode(program)
            if text.startswith(prefix):
                names.add(text[len(prefix) :].partition("/")[0])
        return names

    def _remove(self, name: str, last_used: float) -> bool:
        """Remove an environment unless somebody builds or has just used it."""
        with held_now(self._folders.mutex(name)) as descriptor:
            if descriptor is None or self._last_used(name) != last_used:
                return False
            remove_folder(self._folders.environment(name))
        self._sizes.pop(name, None)
        return True

    def _remove_leftovers(self) -> None:
        """Remove what builders and removers that died have left."""
        for name in self._names():
            with held_now(self._folders.mutex(name)) as descriptor:
                if descriptor is not None and self._last_used(name) is None:
                    _log.info("removing the half-made environment %s", name)
                    remove_folder(self._folders.environment(name))
        for path in self._folders.environments.glob(".removing-*"):
            remove_folder(path)


def _age(path: Path) -> float:
    """Seconds since a file was touched; for ever if it is not there."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:
        return float("inf")


def _unheard(_line: str) -> None:
    """Take what uv says to nobody."""


def _lacks_something(error: Exception) -> EnvironmentBuildError:
    """What to say of a build from what notebooks brought: uv's words are about wheels nobody asked for."""
    if isinstance(error, UnreachablePythonError):
        return error
    text = "no package index can be reached from this host, and what notebooks brought before is not enough"
    return EnvironmentBuildError(text, str(error))


def _as_error(error: Exception) -> EnvironmentBuildError:
    return error if isinstance(error, EnvironmentBuildError) else EnvironmentBuildError(str(error), "")


def _check(spec: EnvironmentSpec) -> None:
    if not _VERSION.fullmatch(spec.python):
        raise RequirementError(f"{spec.python[:40]!r} is not a Python version; it must look like '3.11'")
    for layer in spec.layers:
        for line in layer:
            check_line(line)
