"""Know which modules are the user's own, and follow edits to their files.

Runs in the notebook. A module is local when its file lies under the notebook's folder and belongs
neither to an installed library nor to Python: hosts do not have it, so it travels by value. When
such a file has changed since it was imported, the module is reloaded before it travels, and
functions and classes that were imported from it change in place.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import sysconfig
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

__all__ = [
    "are_as_loaded",
    "check_names",
    "files_of",
    "find_own",
    "follow_edits",
    "import_named",
    "is_own_file",
    "local_names",
    "own_package",
    "reload_edited",
]

_OURS = ("fal_notebook", "fal_agent")
_NEVER = (*_OURS, "__main__", "__mp_main__")

_Stamp = tuple[int, int]  # modification time in ns, size in bytes
_stamps: dict[str, _Stamp] = {}  # file -> as it was when its module was loaded
_names_for: tuple[object, tuple[str, ...], tuple[str, ...]] | None = None  # state, names, files


def check_names(value: object) -> None:
    """Check the value of `local_python_modules`.

    Raises:
        ValueError: it is not a list of strings; the message names the value or the index.
    """
    if not isinstance(value, list):
        raise ValueError(f"local_python_modules must be a list of module names, not {value!r}")
    for index, name in enumerate(value):
        if not isinstance(name, str):
            raise ValueError(
                f"local_python_modules must be a list of module names, but item {index} is {name!r}"
            )


def import_named(names: Iterable[str]) -> None:
    """Import the modules of `local_python_modules` that are not loaded yet.

    Raises:
        ValueError: one of them cannot be found.
    """
    for name in names:
        if name in sys.modules:
            continue
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
                raise
            raise ValueError(
                f"local_python_modules names {name!r}, but there is no such module here; "
                "names are those of an import statement"
            ) from None


def local_names() -> tuple[str, ...]:
    """Give the top-level names of the local modules that are loaded, sorted."""
    global _names_for  # noqa: PLW0603 - a cache, valid until a module is loaded or the folder changes
    last = next(reversed(sys.modules), None)
    state = (len(sys.modules), last, os.getcwd())  # noqa: PTH109 - quicker, and this runs on every call
    if _names_for is None or _names_for[0] != state:
        folder = str(Path(state[2]).resolve())
        names = {
            name.partition(".")[0] for name, file in _files() if _is_under(file, folder) and is_own_file(file)
        }
        names.difference_update(_NEVER)
        _names_for = state, tuple(sorted(names)), files_of(names)
    return _names_for[1]


def follow_edits() -> tuple[str, ...]:
    """Reload local modules whose files have changed; give the names of all local ones.

    Raises:
        Exception: as `reload_edited`.
    """
    names = local_names()
    if _names_for is not None and not are_as_loaded(_names_for[2]):
        reload_edited(names)
    return names


def own_package(function: Any) -> str | None:
    """Give the top-level name of the module a function was defined in, if that is no library's."""
    name = getattr(function, "__module__", None)
    if not isinstance(name, str) or name.partition(".")[0] in _NEVER:
        return None
    file = _file_of(sys.modules.get(name))
    return name.partition(".")[0] if file is not None and is_own_file(file) else None


def find_own(name: str) -> bool:
    """Whether an import of a module that is not loaded would find one of the user's own."""
    top = name.partition(".")[0]
    if top in _NEVER or top in sys.stdlib_module_names:
        return False
    try:
        spec = importlib.util.find_spec(top)
    except (
        ImportError,
        ValueError,
        AttributeError,
    ):  # a finder's or a loaded module's oddity: not ours to judge
        return False
    origin = spec.origin if spec is not None else None
    return origin is not None and is_own_file(origin) and _is_under(origin, str(Path.cwd().resolve()))


@functools.lru_cache(maxsize=4096)
def is_own_file(file: str) -> bool:
    """Whether a source file is neither an installed library's nor Python's nor ours."""
    path = Path(file)
    if path.suffix != ".py" or not path.is_absolute():
        return False
    if "site-packages" in path.parts or "dist-packages" in path.parts:
        return False
    paths = sysconfig.get_paths()
    if any(_is_under(file, paths[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")):
        return False
    return not any((parent / "pyvenv.cfg").exists() for parent in path.parents)


def files_of(names: Collection[str]) -> tuple[str, ...]:
    """Give the files of the loaded modules with these top-level names; from now on edits to them are seen."""
    found = _files(names)
    for name, file in found:
        _observe(sys.modules[name], file)
    return tuple(file for _, file in found)


def are_as_loaded(files: Iterable[str]) -> bool:
    """Whether no file has changed since its module was loaded; quick, for every call."""
    return all(_stamp(file) == _stamps.get(file) for file in files)


def reload_edited(names: Collection[str] | None = None) -> bool:
    """Reload local modules whose files have changed since they were loaded.

    Args:
        names: top-level names to look at; None for all local ones.

    Returns:
        Whether there was any.

    Raises:
        SyntaxError: a file cannot be compiled; it names the file. The module stays as it was.
        Exception: what running the file raises.
    """
    wanted = frozenset(local_names() if names is None else names)
    if not wanted:
        return False
    changed = []
    for name, file in _files(wanted):
        module = sys.modules[name]
        now = _stamp(file)
        if now is not None and now != _observe(module, file):
            changed.append((module, file, now))
    for module, file, now in reversed(changed):  # what a module imports was loaded after it
        _reload(module)
        _stamps[file] = now
    return bool(changed)


def _reload(module: ModuleType) -> None:
    from IPython.extensions.autoreload import superreload

    superreload(module, importlib.reload, {})


def _observe(module: ModuleType, file: str) -> _Stamp | None:
    """Give the file's stamp from when its module was loaded, as far as can be known."""
    known = _stamps.get(file)
    if known is None:
        now = _stamp(file)
        if now is None:
            return None
        known = _stamps[file] = now if _is_as_compiled(module, now) else (0, 0)
    return known


def _is_as_compiled(module: ModuleType, now: _Stamp) -> bool:
    """Whether a file is still what was compiled at import, by what Python noted in the bytecode's file."""
    spec = getattr(module, "__spec__", None)
    if spec is None or type(spec.loader) is not SourceFileLoader or not spec.cached:
        return True  # nothing is known
    try:
        with Path(spec.cached).open("rb") as compiled:
            header = compiled.read(16)
    except OSError:
        return True
    if len(header) < 16 or header[4:8] != bytes(4) or header[:4] != importlib.util.MAGIC_NUMBER:  # noqa: PLR2004 - see PEP 552
        return True  # nothing is known
    seconds, size = int.from_bytes(header[8:12], "little"), int.from_bytes(header[12:16], "little")
    return seconds == (now[0] // 10**9) & 0xFFFFFFFF and size == now[1] & 0xFFFFFFFF


def _stamp(file: str) -> _Stamp | None:
    try:
        found = os.stat(file)  # noqa: PTH116 - quicker, and this runs on every call
    except OSError:  # gone: the module goes on as it is
        return None
    return found.st_mtime_ns, found.st_size


def _files(names: Collection[str] | None = None) -> list[tuple[str, str]]:
    """Give the loaded modules that have a file, oldest first; of these top-level names only, unless None."""
    if names is not None and not names:
        return []
    found = []
    for name, module in list(sys.modules.items()):  # thousands, in a notebook that imported much
        if names is not None and name.partition(".")[0] not in names:
            continue
        file = _file_of(module)
        if file is not None:
            found.append((name, file))
    return found


def _file_of(module: Any) -> str | None:
    if not isinstance(module, ModuleType):
        return None
    file = vars(module).get("__file__")  # a lazy module must not be woken
    return file if isinstance(file, str) else None


def _is_under(file: str, folder: str) -> bool:
    return file.startswith(folder.rstrip(os.sep) + os.sep)
