"""Let Python code say `/data/...` and mean this host's data folder.

Runs in workers; installed once, before any of the user's code. Python's own file functions are
wrapped, the ones that pathlib, shutil, glob, os.walk, numpy, pandas and Pillow call, too, and `import`
finds modules there. C libraries that open files themselves and other programs see no `/data`: they
take the path that `sync_dir` gives, or $FAL_PERSISTENT_DIR.

The rule: a path is `/data`, or `/data/NAME` and what is below it. On a host with no `/data` of its own
every such path means the data folder; so it does where the user may not enter that one. Else `/data/NAME`
means the data folder if NAME is in there, and the host's own otherwise, as `/data` itself does; but where
the user may not write, a NAME that is in neither means the data folder. If the host's `/data` leads to the
data folder, as a link or a mount, nothing is wrapped.
"""

from __future__ import annotations

import builtins
import functools
import glob  # noqa: F401 - as pathlib
import io
import os
import pathlib  # noqa: F401 - with glob, to be loaded before it is looked through
import posixpath
import sys
from importlib import machinery
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["DataPaths", "install"]

_PREFIX = "/data"

# Functions of `os` and how many of their first arguments are paths.
_FUNCTIONS = {
    "access": 1, "chdir": 1, "chmod": 1, "chown": 1, "getxattr": 1, "lchown": 1, "link": 2, "listdir": 1,
    "listxattr": 1, "lstat": 1, "mkdir": 1, "mkfifo": 1, "mknod": 1, "open": 1, "pathconf": 1,
    "readlink": 1, "remove": 1, "removexattr": 1, "rename": 2, "replace": 2, "rmdir": 1, "setxattr": 1,
    "stat": 1, "statvfs": 1, "symlink": 2, "truncate": 1, "unlink": 1, "utime": 1,
}  # fmt: skip
_KEYWORDS = ("path", "src", "dst", "file")  # what these arguments are called
_KEEPERS = ("glob", "pathlib")  # their classes keep functions of `os` as attributes
_SETS = ("supports_dir_fd", "supports_fd", "supports_follow_symlinks", "supports_effective_ids")


class DataPaths:
    """What `/data` means.

    Args:
        root: the data folder.
        prefix: what stands for it.
    """

    def __init__(self, root: str, prefix: str = _PREFIX) -> None:
        self.root, self._prefix = root, prefix
        self._bytes = os.fsencode(prefix)
        self._has_own = os.access(prefix, os.X_OK)
        self._may_write = os.access(prefix, os.W_OK)
        self._lstat = os.lstat  # as it is before it is wrapped

    @property
    def is_needed(self) -> bool:
        """Whether `/data` is not the data folder anyway."""
        return os.path.realpath(self._prefix) != os.path.realpath(self.root)

    def translate(self, path: Any) -> Any:
        """Give the path that is meant; what is not about `/data` comes back as it is."""
        kind = type(path)
        if kind is str:
            return self._meant(path) if path.startswith(self._prefix) else path
        if kind is int:
            return path
        if kind is bytes:
            return os.fsencode(self._meant(os.fsdecode(path))) if path.startswith(self._bytes) else path
        if not hasattr(kind, "__fspath__"):
            return path
        plain = os.fspath(path)
        meant = self.translate(plain) if type(plain) in (str, bytes) else plain
        return path if meant is plain else meant

    def _meant(self, path: str) -> str:
        rest = path[len(self._prefix) :]
        if rest and rest[0] != "/":
            return path  # "/database"
        if ".." in rest and not posixpath.normpath(path).startswith((self._prefix + "/", self._prefix)):
            return path  # "/data/../etc"
        if self._has_own and not self._is_ours(rest.lstrip("/").partition("/")[0]):
            return path
        return self.root + rest

    def _is_ours(self, name: str) -> bool:
        """Whether a name is meant for the data folder, on a host that has a folder of its own."""
        if not name:
            return False
        return self._is_there(self.root, name) or not (self._may_write or self._is_there(self._prefix, name))

    def _is_there(self, folder: str, name: str) -> bool:
        try:
            self._lstat(f"{folder}/{name}")
        except OSError:
            return False
        return True


def install(root: Optional[str] = None, prefix: str = _PREFIX) -> None:
    """Wrap the file functions of this process, if need be.

    Args:
        root: the data folder; default: $FAL_PERSISTENT_DIR; without it nothing is done.
        prefix: what stands for it.
    """
    root = root or os.environ.get("FAL_PERSISTENT_DIR")
    if not root:
        return
    os.makedirs(root, mode=0o700, exist_ok=True)  # noqa: PTH103 - before anything is wrapped
    paths = DataPaths(root.rstrip("/"), prefix)
    if paths.is_needed:
        _replace_everywhere(_wrappers(paths))
        sys.path_hooks.insert(0, _finder(paths))


def _wrappers(paths: DataPaths) -> dict[int, tuple[Any, Any]]:
    """By identity: each function with what takes its place."""
    found: dict[int, tuple[Any, Any]] = {}
    for name, count in _FUNCTIONS.items():
        function = getattr(os, name, None)
        if function is not None:
            found[id(function)] = (function, _wrapped(function, count, paths.translate))
    found[id(os.scandir)] = (os.scandir, _scandir(os.scandir, paths.translate))
    found[id(io.open)] = (io.open, _wrapped(io.open, 1, paths.translate))
    found[id(io.open_code)] = (io.open_code, _wrapped(io.open_code, 1, paths.translate))
    return found


def _wrapped(function: Any, count: int, translate: Callable[[Any], Any]) -> Any:
    if count == 1:

        def call(*args: Any, **kwargs: Any) -> Any:
            if args:
                return function(translate(args[0]), *args[1:], **kwargs)
            return function(**_named(kwargs, translate))

    else:

        def call(*args: Any, **kwargs: Any) -> Any:
            paths = map(translate, args[:2])
            return function(*paths, *args[2:], **_named(kwargs, translate))

    return _dressed(call, function)


def _named(kwargs: dict[str, Any], translate: Callable[[Any], Any]) -> dict[str, Any]:
    return {name: translate(value) if name in _KEYWORDS else value for name, value in kwargs.items()}


def _dressed(call: Any, function: Any) -> Any:
    """Make a wrapper look as what it wraps, to `help`, `inspect` and pickle."""
    return functools.update_wrapper(call, function)


def _scandir(function: Any, translate: Callable[[Any], Any]) -> Any:
    def scandir(path: Any = ".") -> Any:
        meant = translate(path)
        return function(path) if meant is path else _Entries(function(meant), os.fspath(path))

    return _dressed(scandir, function)


class _Entries:
    """What `os.scandir` gives for a folder that was named by a path in `/data`."""

    def __init__(self, entries: Any, folder: Any) -> None:
        self._entries, self._folder = entries, folder

    def __iter__(self) -> Iterator[_Entry]:
        return self

    def __next__(self) -> _Entry:
        return _Entry(next(self._entries), self._folder)

    def __enter__(self) -> _Entries:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._entries.close()


class _Entry:
    """A directory entry whose path begins as the folder was named."""

    def __init__(self, entry: Any, folder: Any) -> None:
        self._entry = entry
        self.name, self.path = entry.name, os.path.join(folder, entry.name)  # noqa: PTH118

    def __getattr__(self, name: str) -> Any:
        return getattr(self._entry, name)

    def __fspath__(self) -> Any:
        return self.path

    def __repr__(self) -> str:
        return repr(self._entry)


def _replace_everywhere(wrappers: dict[int, tuple[Any, Any]]) -> None:
    """Put each wrapper wherever a loaded module, or Python's own shortcuts, holds the function."""
    for name in _SETS:
        supported = getattr(os, name)
        supported.update([new for old, new in wrappers.values() if old in supported])
    spaces = [vars(module) for module in list(sys.modules.values()) if hasattr(module, "__dict__")]
    for space in [*spaces, vars(builtins)]:
        for name, value in list(space.items()):
            new = wrappers.get(id(value))
            if new is not None and space is not globals():
                space[name] = new[1]
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] in _KEEPERS:
            for kept in [value for value in vars(module).values() if isinstance(value, type)]:
                _replace_in_class(kept, wrappers)


def _replace_in_class(cls: type, wrappers: dict[int, tuple[Any, Any]]) -> None:
    for name, value in list(vars(cls).items()):
        new = wrappers.get(id(getattr(value, "__func__", value)))
        if new is not None:
            setattr(cls, name, staticmethod(new[1]))


def _finder(paths: DataPaths) -> Callable[[str], Any]:
    """A hook by which `import` finds modules below `/data`."""
    usual = machinery.FileFinder.path_hook(
        (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES),
        (machinery.SourceFileLoader, machinery.SOURCE_SUFFIXES),
        (machinery.SourcelessFileLoader, machinery.BYTECODE_SUFFIXES),
    )

    def hook(path: str) -> Any:
        meant = paths.translate(path)
        if meant is path:
            raise ImportError
        return usual(meant)

    return hook
