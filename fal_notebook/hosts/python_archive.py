"""A Python to bring to a machine that has none: what uv downloads here, else this notebook's own.

Runs in the notebook. The archive holds `bin/python3`, the standard library without its tests, and the shared
libraries that a bare machine may lack. It is made once for each version and kept in the cache folder.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fal_agent.errors import HostUnreachableError
from fal_agent.folders import appearing_whole
from fal_notebook.digests import cache_folder
from fal_notebook.hosts.elf import glibc_needed, is_elf, with_origin_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fal_notebook.hosts.platforms import Platform

__all__ = ["COMPILERS_LIBRARIES", "PythonArchive", "python_for"]

COMPILERS_LIBRARIES = ("libstdc++.so.6", "libgcc_s.so.1")

_FORMAT = 1  # of the archives
_TIMEOUT = 600.0  # seconds for a download by uv
_LEFT_OUT = re.compile(
    r"lib/python3\.\d+/(?:site-packages|dist-packages|test|idlelib|turtledemo|tkinter|lib2to3/tests|ensurepip/_bundled|"
    r"config-[^/]*|\w+/tests?)(?:/|$)|.*(?:__pycache__|\.pyc$|\.a$|/_tkinter\.)|lib/(?:tcl|tk|itcl|thread|pkgconfig)"
)
_GLIBC_LIBRARY = re.compile(
    r"(?:linux-vdso|ld-linux\S*|lib(?:c|m|pthread|dl|rt|util|resolv|nsl|mvec|anl|nss_\w+))\.so"
)
_LDD_LINE = re.compile(r"^\s*(\S+) => (/\S+)", re.MULTILINE)


@dataclass(frozen=True)
class PythonArchive:
    """An interpreter, packed.

    Attributes:
        name: of its folder on the host: "cpython-3.11.7-linux-x86_64-gnu".
        data: a compressed tar file.
        source: where it is from, for people.
    """

    name: str
    data: bytes
    source: str


def python_for(host_name: str, target: Platform) -> PythonArchive:
    """Give a Python of the notebook's minor version that runs on a platform.

    Raises:
        HostUnreachableError: there is none: uv cannot download it here, and the notebook's own does not fit.
    """
    version = ".".join(platform.python_version_tuple()[:2])
    packed, refusal = _kept(target), ""
    if packed is None:
        packed, refusal = _downloaded(version, target)
    if packed is None:
        packed, reason = _own(target)
        if packed is None:
            raise HostUnreachableError(
                f"{host_name!r} ({target}) has no Python and cannot download one, and none could be brought: "
                f"{refusal}; {reason}. Install Python {version} there"
            )
    _keep(packed, target)
    return packed


def _place(target: Platform) -> Path:
    """Where what was packed for a platform is kept; another interpreter here has another place."""
    facts = f"{_FORMAT} {platform.python_version()} {sys.base_prefix} {target}"
    return cache_folder() / "pythons" / hashlib.sha256(facts.encode()).hexdigest()[:24]


def _kept(target: Platform) -> PythonArchive | None:
    try:
        name, _, source = (_place(target) / "about").read_text("utf-8").partition("\n")
        return PythonArchive(name, (_place(target) / "python.tar.gz").read_bytes(), source)
    except FileNotFoundError:
        return None


def _keep(packed: PythonArchive, target: Platform) -> None:
    with suppress(OSError), appearing_whole(_place(target)) as folder:  # a full disk: packed anew next time
        (folder / "python.tar.gz").write_bytes(packed.data)
        (folder / "about").write_text(f"{packed.name}\n{packed.source}", "utf-8")


# ---------------------------------------------------------------- a build that uv knows


def _downloaded(version: str, target: Platform) -> tuple[PythonArchive | None, str]:
    import uv

    with tempfile.TemporaryDirectory(prefix="fal-notebook-") as folder:
        command = [uv.find_uv_bin(), "python", "install", "--install-dir", folder, "--no-bin",
                   f"cpython-{version}-{target.python_request}"]  # fmt: skip
        variables = {**os.environ, "UV_HTTP_RETRIES": "1"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT, check=False, env=variables
            )
        except subprocess.TimeoutExpired:
            return None, f"uv did not download it within {_TIMEOUT:g} s"
        found = [path for path in Path(folder).glob("cpython-*") if not path.is_symlink()]
        if done.returncode != 0 or not found:
            words = done.stderr.strip().splitlines()
            return (
                None,
                f"uv cannot download it here ({words[-1].strip() if words else 'it does not say why'})",
            )
        files = {**dict(_files_of(found[0])), **_compilers_libraries(found[0], target)}
        return PythonArchive(found[0].name, _packed(files), "downloaded by uv"), ""


# ---------------------------------------------------------------- the notebook's own


def _own(target: Platform) -> tuple[PythonArchive | None, str]:
    """Pack the interpreter that runs this process, if it can run there; else say why not."""
    own = f"this notebook's own is for {platform.machine()} with {' '.join(platform.libc_ver())}"
    if platform.machine() != target.machine or platform.libc_ver()[0] != target.libc:
        return None, own
    prefix, program = Path(sys.base_prefix), Path(os.path.realpath(sys._base_executable))  # type: ignore[attr-defined] # noqa: SLF001
    minor = f"python3.{sys.version_info[1]}"
    libraries = {name: path.read_bytes() for name, path in _libraries(prefix, program).items()}
    modules = {name: data for name, data in _files_of(prefix) if name.startswith(f"lib/{minor}/")}
    content = program.read_bytes()
    if libraries:
        moved = with_origin_path(content, "$ORIGIN/../lib")
        if moved is None:
            return (
                None,
                "this notebook's own Python cannot be moved: it does not look for libraries beside it",
            )
        content = moved
        modules.update({
            name: with_origin_path(data, "$ORIGIN/../..") or data
            for name, data in modules.items()
            if "/lib-dynload/" in name and is_elf(data)
        })  # fmt: skip
    wanted = {**modules, **libraries, **_compilers_libraries(prefix, target), f"bin/{minor}": content}
    needed = max(glibc_needed(data) for data in wanted.values() if is_elf(data))
    if needed > target.libc_version[:2]:
        return None, f"this notebook's own needs glibc {needed[0]}.{needed[1]}"
    name = f"cpython-{platform.python_version()}-{target.python_request}-own"
    return PythonArchive(name, _packed(wanted), "this notebook's own"), ""


def _libraries(prefix: Path, program: Path) -> dict[str, Path]:
    """Shared libraries, other than the C library's, of the program and its modules, by their new place."""
    modules = (prefix / "lib" / f"python3.{sys.version_info[1]}" / "lib-dynload").glob("*.so")
    files = [str(program), *(str(path) for path in modules if "_tkinter" not in path.name)]
    said = subprocess.run(
        [shutil.which("ldd") or "ldd", *files], capture_output=True, text=True, check=False, timeout=60
    ).stdout
    found = {name: Path(path) for name, path in _LDD_LINE.findall(said)}
    return {f"lib/{name}": path for name, path in found.items() if not _GLIBC_LIBRARY.match(name)}


def _compilers_libraries(prefix: Path, target: Platform) -> dict[str, bytes]:
    """What wheels expect of every machine besides the C library; taken out again where a host has its own."""
    if (platform.machine(), platform.libc_ver()[0]) != (target.machine, target.libc):
        return {}
    places = [prefix / "lib", *map(Path, ("/usr/lib64", "/lib64", f"/usr/lib/{target.machine}-linux-gnu"))]
    found = {}
    for name in COMPILERS_LIBRARIES:
        path = next((place / name for place in places if (place / name).exists()), None)
        data = path.read_bytes() if path is not None else b""
        if data and glibc_needed(data) <= target.libc_version[:2]:
            found[f"lib/{name}"] = data
    return found


# ---------------------------------------------------------------- packing


def _files_of(prefix: Path) -> Iterator[tuple[str, bytes]]:
    """The files of an installation that a host needs, by their place in it; links by what they lead to."""
    for folder, below, names in os.walk(prefix):
        at = Path(folder).relative_to(prefix).as_posix()
        if at == ".":
            below[:] = [name for name in below if name in ("bin", "lib")]
            continue
        below[:] = [name for name in below if not _LEFT_OUT.match(f"{at}/{name}/")]
        for name in names:
            place, path = f"{at}/{name}", Path(folder, name)
            if _LEFT_OUT.match(place) or (at == "bin" and not re.fullmatch(r"python3\.\d+", name)):
                continue
            if path.is_file() and (not path.is_symlink() or at == "bin"):
                yield place, path.read_bytes()


def _packed(files: dict[str, bytes]) -> bytes:
    """A compressed tar of the files; the same bytes for the same files, so that a transfer can go on."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=4, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as archive,
    ):
        for name, data in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755 if name.startswith("bin/") else 0o644
            archive.addfile(entry, io.BytesIO(data))
        program = next(name for name in sorted(files) if name.startswith("bin/python3."))
        link = tarfile.TarInfo("bin/python3")
        link.type, link.linkname = tarfile.SYMTYPE, program.rpartition("/")[2]
        archive.addfile(link)
    return buffer.getvalue()
