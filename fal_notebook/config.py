"""The user's settings: `hosts.toml`, the environment variables, and the names that ssh knows.

Runs in the notebook. The file is only ever replaced whole, keeps its comments, and is readable by
its owner alone. A host need not be in it: every name that ssh understands is one.

    default = "gpu-box"            # used when nothing else is said; FAL_HOST overrules it

    [hosts.gpu-box]
    ssh = "me@gpu.example.org:22"  # or an alias of ~/.ssh/config; default: the table's name
    labels = ["lab", "h100"]       # matched against machine_type= and regions=
    link = "openssh"               # connect by the ssh program; default: by paramiko, if it can
    keep_alive = 600               # seconds that an idle worker lives
    files_gb = 20                  # of files that apps gave away are kept, and one that nobody
    files_days = 30                # fetches for so long; both hold for the agent that starts next
"""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fal_agent.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "LOCAL_NAMES",
    "HostSettings",
    "Settings",
    "config_folder",
    "exclusive",
    "known_host_names",
    "load",
    "remember_host",
    "replace_whole",
    "ssh_aliases",
]

LOCAL_NAMES = ("local", "inline")  # hosts that need no connection
LINKS = ("paramiko", "openssh")

_LOCK_TIMEOUT = 5.0  # seconds to wait for another process that writes the file
_INCLUDE_DEPTH = 16  # as OpenSSH
_NAME = re.compile(r"[^\s\x00-\x1f\x7f-][^\s\x00-\x1f\x7f]*")  # a leading "-" would be an option of ssh


@dataclass(frozen=True)
class HostSettings:
    """What the user's file says about one host; None: nothing.

    Attributes:
        name: how the notebook calls the host.
        ssh: what ssh is told: an alias or "user@host:port"; None for `local` and `inline`.
        labels: what the host carries, for `machine_type=` and `regions=`.
        link: what carries the connection: "paramiko" or "openssh"; None: paramiko if it can.
        python: path of the Python on the host that runs the agent.
        root: folder on the host for everything that fal_notebook keeps there.
        lease: seconds that a run may go on without any client.
        keep_alive: seconds that an idle worker lives.
        reconnect: seconds for which calls wait for a host whose connection broke; 0: not at all.
        files_gb: 10**9 bytes that the files take that apps gave away.
        files_days: days that one of them is kept since it was made or fetched last.
    """

    name: str
    ssh: str | None = None
    labels: tuple[str, ...] = ()
    link: str | None = None
    python: str | None = None
    root: str | None = None
    lease: float | None = None
    keep_alive: float | None = None
    reconnect: float | None = None
    files_gb: float | None = None
    files_days: float | None = None


@dataclass(frozen=True)
class Settings:
    """The settings as read at one moment.

    Attributes:
        path: the file, whether it exists or not.
        default: name of the host to use when nothing else is said, or None: this machine.
        hosts: the hosts of the file by name, in its order.
    """

    path: Path
    default: str | None = None
    hosts: dict[str, HostSettings] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the hosts in the file, in its order."""
        return list(self.hosts)

    def host(self, name: str) -> HostSettings:
        """Give a host's settings; one that is not in the file is known to ssh by that name.

        Raises:
            ConfigurationError: no host can have that name.
        """
        if name in self.hosts:
            return self.hosts[name]
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigurationError(f"{name!r} cannot be the name of a host; use one that `ssh NAME` takes")
        return HostSettings(name, ssh=None if name in LOCAL_NAMES else name)


def config_folder() -> Path:
    """Folder of the user's settings: $FAL_NOTEBOOK_CONFIG, else the platform's own place."""
    chosen = os.environ.get("FAL_NOTEBOOK_CONFIG")
    if chosen:
        return Path(chosen).expanduser()
    return _usual_folder(os.environ.get("XDG_CONFIG_HOME"), os.environ.get("HOME"))


@cache
def _usual_folder(*_variables: str | None) -> Path:
    """The platform's own place, which depends on these variables; worked out once, since every call asks."""
    import platformdirs

    return Path(platformdirs.user_config_dir("fal_notebook"))


def load() -> Settings:
    """Read the settings; without a file they are empty.

    Raises:
        ConfigurationError: the file cannot be read, or says something wrong.
    """
    settings = _current(config_folder() / "hosts.toml")
    chosen = os.environ.get("FAL_HOST", "").strip()
    if not chosen:
        return settings
    if not _NAME.fullmatch(chosen):
        raise ConfigurationError(f"FAL_HOST={chosen!r} is not the name of a host")
    return Settings(settings.path, chosen, settings.hosts)


def remember_host(name: str, *, default: bool = False, **settings: Any) -> HostSettings:
    """Write a host into the user's file; what else the file says stays as it is.

    Args:
        name: how the notebook calls the host.
        default: make it the host that is used when nothing else is said.
        settings: fields of `HostSettings`; None takes a setting out of the file.

    Returns:
        The host's settings as the file has them now.

    Raises:
        ConfigurationError: a setting is unknown or wrong, or the file cannot be read or written.
    """
    import tomlkit

    path = config_folder() / "hosts.toml"
    try:
        with exclusive(path.parent):
            text = _read(path)
            _parse(text, path)  # a file with a mistake in it is left alone
            document = tomlkit.parse(text)
            hosts = document.setdefault("hosts", tomlkit.table(is_super_table=True))
            table = hosts.setdefault(name, tomlkit.table())
            for key, value in settings.items():
                if value is not None:
                    table[key] = list(value) if isinstance(value, tuple) else value
                elif key in table:
                    del table[key]
            if default:
                document["default"] = name
            new = tomlkit.dumps(document)
            checked = _parse(new, path)
            if new != text:
                replace_whole(path, new)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror or error}") from error
    return checked.hosts[name]


def known_host_names() -> list[str]:
    """Names that a user may mean: this machine, the hosts of the file, the aliases of ssh."""
    return list(dict.fromkeys(["local", *load().names, *ssh_aliases()]))


def ssh_aliases() -> list[str]:
    """Names after `Host` in $FAL_SSH_CONFIG or ~/.ssh/config and the files they include; no patterns."""
    path = Path(os.environ.get("FAL_SSH_CONFIG") or "~/.ssh/config").expanduser()
    return list(dict.fromkeys(_aliases_in(path, depth=0)))


# ---------------------------------------------------------------- reading

_latest: tuple[object, Settings] | None = (
    None  # what a file said when it was last read, and which file it was
)


def _current(path: Path) -> Settings:
    """The file's settings, read again only if it is another file than the last time."""
    global _latest  # noqa: PLW0603 - a cache
    try:
        status = path.stat()
    except FileNotFoundError:
        return Settings(path)
    except OSError:  # reading it tells what is wrong
        return _parse(_read(path), path)
    version = (path, status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
    latest = _latest
    if latest is None or latest[0] != version:
        latest = _latest = version, _parse(_read(path), path)
    return latest[1]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error


def _parse(text: str, path: Path) -> Settings:
    toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        content = toml.loads(text)
    except toml.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from None
    reader = _Reader(path, text)
    reader.check_keys(content, ("default", "hosts"), table=None)
    default = content.get("default")
    if default is not None and not (isinstance(default, str) and _NAME.fullmatch(default)):
        raise reader.wrong("default", "the name of a host", default, table=None)
    tables = content.get("hosts", {})
    if not isinstance(tables, dict):
        raise reader.wrong("hosts", "tables such as [hosts.gpu-box]", tables, table=None)
    return Settings(path, default, {name: reader.host(name, table) for name, table in tables.items()})


@dataclass(frozen=True)
class _Reader:
    """Turns tables into settings; knows the text, to say in which line a mistake is."""

    path: Path
    text: str

    def host(self, name: str, table: Any) -> HostSettings:
        if not isinstance(table, dict):
            raise self.wrong(name, f"a table: [hosts.{name}]", table, table="")
        if not _NAME.fullmatch(name):
            raise ConfigurationError(f"{self.path}: {name!r} cannot be the name of a host")
        known = [item.name for item in fields(HostSettings) if item.name != "name"]
        self.check_keys(table, known, table=name)
        for key, value in table.items():
            wanted, fits = _RULES[key]
            if not fits(value):
                raise self.wrong(key, wanted, value, table=name)
        if name in LOCAL_NAMES:
            if "ssh" in table:
                raise self.wrong("ssh", f"left out: {name!r} is this machine", table["ssh"], table=name)
            return HostSettings(name, **_plain(table))
        return HostSettings(name, **{"ssh": name, **_plain(table)})

    def check_keys(
        self, content: dict[str, Any], known: list[str] | tuple[str, ...], table: str | None
    ) -> None:
        for key in content:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
                raise ConfigurationError(f"{self._place(key, table)}: unknown setting {key!r}; {hint}")

    def wrong(self, key: str, wanted: str, value: Any, *, table: str | None) -> ConfigurationError:
        return ConfigurationError(f"{self._place(key, table)}: {key!r} must be {wanted}, not {value!r}")

    def _place(self, key: str, table: str | None) -> str:
        """The file and, if the key stands on a line of its own, the line."""
        header = None if table is None else re.escape(table)
        here = table is None
        for number, line in enumerate(self.text.splitlines(), start=1):
            if re.match(r"\s*\[", line):
                here = header is not None and bool(
                    re.match(rf"\s*\[\s*hosts\s*\.\s*[\"']?{header}[\"']?\s*\]", line)
                )
            elif here and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
                where = f"{self.path}, line {number}"
                return where if table is None else f"{where} ([hosts.{table}])"
        return f"{self.path}" if not table else f"{self.path} ([hosts.{table}])"


def _plain(table: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and bool(_NAME.fullmatch(value))


def _is_path(value: Any) -> bool:
    return _is_line(value) and value.startswith(("/", "~/"))


def _is_amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


_RULES = {
    "ssh": ('an alias of ~/.ssh/config or "user@host:port"', _is_address),
    "labels": ("a list of strings", lambda value: isinstance(value, list) and all(map(_is_line, value))),
    "link": (f"one of {', '.join(map(repr, LINKS))}", lambda value: value in LINKS),
    "python": ("the path of a Python on the host, from / or ~/", _is_path),
    "root": ("a folder on the host, from / or ~/", _is_path),
    "lease": ("a number of seconds, 0 or more", _is_amount),
    "keep_alive": ("a number of seconds, 0 or more", _is_amount),
    "files_gb": ("a number of gigabytes, 0 or more", _is_amount),
    "files_days": ("a number of days, 0 or more", _is_amount),
    "reconnect": ("a number of seconds, 0 or more", _is_amount),
}


# ---------------------------------------------------------------- writing


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other processes from changing the files in it meanwhile.

    Raises:
        ConfigurationError: another process holds it for more than 5 seconds.
    """
    import fcntl

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigurationError(f"another process holds {folder}; try again") from None
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def replace_whole(path: Path, text: str) -> None:
    """Write the file beside its place, then put it there, also where the place is a link to another."""
    path = path.resolve()
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.chmod(0o600)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------- ssh's own file


def _aliases_in(path: Path, *, depth: int) -> Iterator[str]:
    import shlex

    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # absent or unreadable: ssh, too, goes on without it
        return
    for line in lines:
        match = re.match(r"\s*(host|include)(?:\s+|\s*=\s*)(.*)", line, re.IGNORECASE)
        if not match:
            continue
        try:
            words = shlex.split(match[2], comments=True)
        except ValueError:  # an open quote: ssh itself will tell
            continue
        if match[1].lower() == "host":
            yield from (word for word in words if not set(word) & set("*?!"))
        elif depth < _INCLUDE_DEPTH:
            for included in _included(words):
                yield from _aliases_in(included, depth=depth + 1)


def _included(patterns: list[str]) -> Iterator[Path]:
    import glob

    for pattern in patterns:
        absolute = Path("~/.ssh").expanduser() / os.path.expanduser(pattern)  # noqa: PTH111 - of any user's
        yield from (Path(found) for found in sorted(glob.glob(str(absolute))))  # noqa: PTH207 - an absolute pattern
