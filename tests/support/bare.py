"""A host with nothing on it: sshd shuts its user into a folder that has busybox and the C library alone.

There is no Python and no uv, no /usr, no certificates and no name server, so no package index is reached.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.sshd import USER, SSHServer, provide_user, require_sshd, start_sshd

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["bare_server"]

LIBRARIES = re.compile(r"(/\S+)")
DEVICES = ("null", "zero", "urandom", "random")
C_LIBRARY = (
    "libc.so.6",
    "libm.so.6",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
    "libutil.so.1",
    "libresolv.so.2",
)


@contextmanager
def bare_server(folder: Path, *, name: str = "bare") -> Iterator[tuple[SSHServer, Path]]:
    """Run the server; gives it and the user's home as this machine sees it."""
    require_sshd()
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("no busybox on this machine: `make setup-system` installs it")
    provide_user(USER)
    root = Path(tempfile.mkdtemp(prefix="fal-bare-", dir="/srv"))  # sshd wants none of it writable by others
    try:
        try:
            _fill(root, busybox)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine may not make devices or mount /proc for a bare host: {error}")
        config = f"ChrootDirectory {root}\nSetEnv LANG=C\n"
        with start_sshd(folder, name=name, extra_config=config) as server:
            yield server, root / server.home.relative_to("/")
    finally:
        _end_processes(root)
        subprocess.run(["umount", "--lazy", root / "proc"], check=False, capture_output=True)
        if not (root / "proc").is_mount():
            shutil.rmtree(root, ignore_errors=True)


def _fill(root: Path, busybox: str) -> None:
    root.chmod(0o755)
    for place in ("bin", "dev", "etc", "proc", "tmp", "lib", "home"):
        (root / place).mkdir(mode=0o755)
    (root / "tmp").chmod(0o1777)
    said = subprocess.run(["ldd", busybox], capture_output=True, text=True, check=True).stdout
    wanted = [Path(path) for path in LIBRARIES.findall(said)]
    wanted += [path.parent / name for path in wanted if path.name == "libc.so.6" for name in C_LIBRARY]
    for path in wanted:
        target = root / path.relative_to("/")
        if path.exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path.resolve(), target)
    shutil.copy(busybox, root / "bin" / "busybox")
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in applets:
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    login = root / "bin" / "bash"  # the account's shell
    login.write_text('#!/bin/sh\nexec /bin/sh "$@"\n')
    login.chmod(0o755)
    for name in DEVICES:
        subprocess.run(["cp", "-a", f"/dev/{name}", root / "dev" / name], check=True)
    subprocess.run(["mount", "-t", "proc", "proc", root / "proc"], check=True)
    account = next(
        line for line in Path("/etc/passwd").read_text().splitlines() if line.startswith(f"{USER}:")
    )
    (root / "etc" / "passwd").write_text(account + "\n")
    home = root / "home" / USER
    home.mkdir(mode=0o700)
    shutil.chown(home, USER, USER)


def _end_processes(root: Path) -> None:
    """End what runs in there, and what that starts meanwhile."""
    found = True
    while found:
        found = False
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if process.joinpath("root").readlink() == root:
                    os.kill(int(process.name), 9)
                    found = True
            except OSError:  # it has ended
                continue
