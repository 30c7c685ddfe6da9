"""Resolve a spec and make its environment, with uv.

Runs in the agent. An environment is made where it stays, because its scripts name their interpreter
by path; it counts only once its marker is there. Who makes one holds the lock of its name, and uv
inherits that lock: should the agent be killed, nobody else touches the folder until uv has ended.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from fal_agent.requirements import distribution_name, local_path
from fal_agent.server.environments.command import Supervision
from fal_agent.server.environments.compiled import hand_on
from fal_agent.server.environments.disk import remove_folder, write_whole
from fal_agent.server.environments.explain import explained, is_build_failure, is_no_room, is_offline
from fal_agent.server.environments.locking import held
from fal_agent.server.environments.locks import Lock, difference, marks_of, read_lock, spec_key, write_lock
from fal_agent.server.environments.pythons import Interpreter, find_interpreter, is_still_there
from fal_agent.server.environments.uv import UvError

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    from fal_agent.server.environments.uv import Uv

__all__ = ["WAITING", "Builder", "Environment", "Folders", "Job", "open_environment"]

_log = logging.getLogger(__name__)
_MARKER = ".complete"
_DONORS = 8  # environments that are asked for compiled modules
_NAMED = 3  # distributions whose names are shown
WAITING = "waiting for another build of the same environment"


@dataclass(frozen=True)
class Environment:
    """A virtual environment that is there as a whole.

    Attributes:
        name: 16 hex digits.
        path: its folder.
        python: its interpreter.
        packages: what it holds, as "name==version" or "name @ address".
    """

    name: str
    path: Path
    python: Path
    packages: list[str]


@dataclass(frozen=True)
class Folders:
    """Where environments and locks lie."""

    root: Path

    @property
    def environments(self) -> Path:
        """One folder for each environment."""
        return self.root / "environments"

    @property
    def locks(self) -> Path:
        """What specs resolved to, and the files that builders lock."""
        return self.root / "locks"

    def environment(self, name: str) -> Path:
        """The folder of an environment."""
        return self.environments / name

    def marker(self, name: str) -> Path:
        """The file that says that an environment is whole; its time is that of the last use."""
        return self.environments / name / _MARKER

    def latest_used(self) -> list[Path]:
        """The folders of the environments that are whole, those used last first."""
        used = []
        for marker in self.environments.glob(f"*/{_MARKER}"):
            with contextlib.suppress(FileNotFoundError):  # it is being removed
                used.append((marker.stat().st_mtime, marker.parent))
        return [folder for _, folder in sorted(used, reverse=True)]

    def lock(self, key: str) -> Path:
        """What a spec resolved to."""
        return self.locks / f"{key}.json"

    def mutex(self, name: str) -> Path:
        """The file to lock while a spec is resolved or an environment is made or removed."""
        return self.locks / f"{name}.lock"


@dataclass(frozen=True)
class Job:
    """What is to be built, and who is told.

    Attributes:
        python: "X.Y".
        layers: the install steps' lines, as `locks.layers_of` gives them.
        compile_bytecode: compile every module while installing.
        force: resolve anew and build under a fresh name.
        stage: gets a phase and a text for people.
        log: gets uv's lines.
        cancelled: ends it.
    """

    python: str
    layers: list[list[str]]
    compile_bytecode: bool
    force: bool
    stage: Callable[[str, str], None]
    log: Callable[[str], None]
    cancelled: threading.Event


def open_environment(folders: Folders, lock: Lock, *, compile_bytecode: bool) -> Optional[Environment]:
    """The environment of a lock, if it is there as a whole and its interpreter still is."""
    name = lock.name(compile_bytecode=compile_bytecode)
    path = folders.environment(name)
    python = path / "bin" / "python"
    if not folders.marker(name).exists() or not python.exists():
        return None
    return Environment(name, path, python, lock.packages)


class Builder:
    """One build of one spec; the caller holds the lock of the spec's key.

    Args:
        folders: where things lie.
        uv: the program.
        job: what is to be built.
    """

    def __init__(self, folders: Folders, uv: Uv, job: Job) -> None:
        self._folders, self._uv, self._job = folders, uv, job
        self._key = spec_key(job.python, job.layers)
        self._interpreter: Optional[Interpreter] = None

    def build(self) -> Environment:
        """Resolve what was not resolved before and make the environment.

        Raises:
            EnvironmentBuildError: uv failed; nothing half-made is left.
            RequirementError: uv cannot read a line.
            CallCancelledError: it was cancelled.
            OSError: something cannot be written.
        """
        known = read_lock(self._folders.lock(self._key))
        if known is not None and not self._job.force:
            environment = self._rebuild(known)
            if environment is not None:
                return environment
        locks = self._resolve()
        lock = locks[-1] if locks else self._lock([])
        if self._job.force:
            lock = replace(lock, build=f"{time.time_ns():x}")
        if known is not None:
            changed = difference(known.packages, lock.packages)
            self._job.log(f"Resolved anew: {changed or 'the same packages'}")
        environment, lock = self._make(lock)
        for count, prefix in enumerate(locks[:-1], 1):
            self._keep(spec_key(self._job.python, self._job.layers[:count]), prefix)
        self._keep(self._key, lock)
        return environment

    def _rebuild(self, known: Lock) -> Optional[Environment]:
        """Make the environment of a lock without resolving; None if that cannot be done any more."""
        if not is_still_there(known.python, known.version):
            python = self._python()
            known = replace(known, python=str(python.path), version=python.version)
        try:
            environment, lock = self._make(known, last_word=False)
        except UvError as error:
            self._job.log("What it resolved to before cannot be installed any more; resolving anew")
            _log.info("a lock cannot be installed: %s", error.words)
            return None
        self._keep(self._key, lock)
        return environment

    def _keep(self, key: str, lock: Lock) -> None:
        path = self._folders.lock(key)
        known = read_lock(path)
        if known is None or replace(known, build="") != lock:  # a lock of a forced build stays as it is
            write_lock(path, lock)

    # ------------------------------------------------------------ resolving

    def _resolve(self) -> list[Lock]:
        """A lock for each install step, the last being the environment's; steps known before keep theirs."""
        job = self._job
        locks = [] if job.force else self._known_steps()
        pins = {distribution_name(pin): pin for pin in (locks[-1].packages if locks else [])}
        for count in range(len(locks) + 1, len(job.layers) + 1):
            layer = job.layers[count - 1]
            job.stage("resolve", f"{_some(layer)} for Python {job.python}")
            before = locks[-1] if locks else None
            found, isolated = self._compile(layer, before)
            pins.update((distribution_name(pin), pin) for pin in found)
            cumulative = [*(before.layers if before else []), sorted(pins.values())]
            isolated = isolated and (before is None or before.isolated)
            marks = marks_of(job.layers[:count])
            locks.append(replace(self._lock(cumulative), isolated=isolated, marks=marks))
        return locks

    def _lock(self, layers: list[list[str]]) -> Lock:
        python = self._python()
        return Lock(str(python.path), python.version, layers)

    def _known_steps(self) -> list[Lock]:
        """What the most of the first install steps resolved to when they were asked for alone or before."""
        layers = self._job.layers
        for count in range(len(layers) - 1, 0, -1):
            lock = read_lock(self._folders.lock(spec_key(self._job.python, layers[:count])))
            if lock is None or len(lock.layers) != count or not is_still_there(lock.python, lock.version):
                continue
            self._interpreter = Interpreter(Path(lock.python), lock.version)
            lock = replace(lock, build="")
            return [replace(lock, layers=lock.layers[:step]) for step in range(1, count + 1)]
        return []

    def _compile(self, layer: Sequence[str], before: Optional[Lock]) -> tuple[list[str], bool]:
        """Pins of one install step, and whether its builds can do without seeing the steps before it."""
        python = self._python().path
        try:
            return self._compile_for(python, layer, before, isolated=True), True
        except UvError as error:
            if before is None or not is_build_failure(error):
                raise self._explained(error, "resolve") from None
        self._job.log("A package cannot be built on its own; trying with the earlier layers installed")
        environment, _ = self._make(before)
        try:
            return self._compile_for(environment.python, layer, before, isolated=False), False
        except UvError as error:
            raise self._explained(error, "resolve") from None

    def _compile_for(
        self, python: Path, layer: Sequence[str], before: Optional[Lock], *, isolated: bool
    ) -> list[str]:
        supervision = self._supervision()
        with tempfile.TemporaryDirectory(prefix="fal-notebook-") as folder:
            preferences = None
            if before is not None:
                preferences = Path(folder) / "earlier.txt"
                preferences.write_text("\n".join(before.packages) + "\n", "utf-8")
            return self._uv.compile(
                layer,
                python=python,
                supervision=supervision,
                preferences=preferences,
                isolated=isolated,
                refresh=self._job.force,
            )

    def _python(self) -> Interpreter:
        if self._interpreter is None:
            self._interpreter = find_interpreter(
                self._job.python,
                brought=self._folders.root / "pythons",
                uv=self._uv,
                stage=self._job.stage,
                supervision=self._supervision(),
            )
        return self._interpreter

    # ------------------------------------------------------------ making

    def _make(self, lock: Lock, *, last_word: bool = True) -> tuple[Environment, Lock]:
        """Make the environment of a lock; give the lock too, which may have had to change.

        With `last_word=False`, failures of uv that resolving again may cure come out as they are.
        """
        try:
            return self._make_once(lock), lock
        except UvError as error:
            failed = error
        if lock.isolated and len(lock.layers) > 1 and is_build_failure(failed):
            self._job.log("A package cannot be built on its own; trying with the earlier layers installed")
            lock = replace(lock, isolated=False)
            try:
                return self._make_once(lock), lock
            except UvError as error:
                failed = error
        if last_word or is_no_room(failed):
            raise self._explained(failed, "build")
        raise failed

    def _make_once(self, lock: Lock) -> Environment:
        job, name = self._job, lock.name(compile_bytecode=self._job.compile_bytecode)
        mutex = self._folders.mutex(name)
        with held(mutex, cancelled=job.cancelled, waiting=lambda: job.stage("build", WAITING)) as descriptor:
            found = open_environment(self._folders, lock, compile_bytecode=job.compile_bytecode)
            if found is not None:
                return found
            job.stage("build", f"{len(lock.packages)} {'package' if len(lock.packages) == 1 else 'packages'}")
            folder = self._folders.environment(name)
            remove_folder(folder)
            try:
                self._fill(folder, lock, self._supervision(descriptor))
            except BaseException:
                try:
                    remove_folder(folder)
                except OSError:  # the next build removes it; what failed is more important to tell
                    _log.warning("cannot remove %s", folder, exc_info=True)
                raise
            found = open_environment(self._folders, lock, compile_bytecode=job.compile_bytecode)
        if found is None:
            raise UvError(f"the environment {folder} is not what was built there", "")
        return found

    def _fill(self, folder: Path, lock: Lock, supervision: Supervision) -> None:
        self._uv.venv(folder, python=Path(lock.python), supervision=supervision)
        steps = lock.layers[-1:] if lock.isolated else lock.layers
        for count, pins in enumerate(steps, 1):
            if pins:
                self._install(pins, folder / "bin" / "python", supervision, isolated=count == 1)
        if not self._job.compile_bytecode:
            self._hand_on_compiled(folder)
        about = {"python": lock.version, "packages": len(lock.packages), "made_at": time.time()}
        write_whole(folder / _MARKER, json.dumps(about))

    def _hand_on_compiled(self, folder: Path) -> None:
        try:
            count = hand_on(folder, self._folders.latest_used()[:_DONORS])
        except OSError as error:  # the environment does without, as the first one did
            _log.warning("no compiled modules for %s: %s", folder, error)
        else:
            _log.info("%d compiled modules for %s", count, folder)

    def _install(self, pins: list[str], python: Path, supervision: Supervision, *, isolated: bool) -> None:
        """Install from uv's cache if everything is there, which is quicker and needs no network."""

        def install(offline: bool, hearing: Supervision) -> None:
            self._uv.install(
                pins,
                python=python,
                supervision=hearing,
                compile_bytecode=self._job.compile_bytecode,
                isolated=isolated,
                offline=offline,
                refresh=local if self._job.force else (),
            )

        local = [distribution_name(pin) for pin in pins if local_path(pin) is not None]
        if not (local and self._job.force):
            try:
                install(True, _until_error(supervision))
            except UvError as error:
                if not is_offline(error):
                    raise
            else:
                return
        install(False, supervision)

    def _supervision(self, *keep_open: int) -> Supervision:
        return Supervision(self._job.log, self._job.cancelled, keep_open)

    def _explained(self, error: UvError, verb: str) -> Exception:
        folders = [self._folders.root, Path(tempfile.gettempdir())]
        with contextlib.suppress(UvError):  # then its cache is not what is full
            folders.append(self._uv.cache_folder())
        what = "resolve the requirements" if verb == "resolve" else "install the packages"
        doing = f"{what} for Python {self._job.python}"
        return explained(error, doing=doing, layers=self._job.layers, folders=folders)


def _until_error(supervision: Supervision) -> Supervision:
    """Hand on lines until the first that speaks of an error: the next try may have none."""
    failed = False

    def hear(line: str) -> None:
        nonlocal failed
        failed = failed or re.match(r"error\b", line) is not None
        if not failed:
            supervision.on_line(line)

    return replace(supervision, on_line=hear)


def _some(lines: Sequence[str]) -> str:
    """The names of the first distributions, and how many more there are."""
    names = [distribution_name(line) for line in lines[:_NAMED]]
    more = len(lines) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
