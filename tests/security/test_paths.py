"""Names that somebody else chose lead nowhere else, and are no commands."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fal_agent.errors import AppFileUploadException, HostUnreachableError
from fal_agent.server.appfiles import lay_out_files
from fal_notebook.config import HostSettings
from fal_notebook.hosts import ssh

PATHS = {
    "traversal": "../outside",
    "traversal further in": "a/../../outside",
    "absolute": "/tmp/fal-test-outside",
    "nothing": "",
    "a NUL": "a\0b",
    "too long a name": "n" * 300,
    "two names for one file": "./a",
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_app_files_stay_in_their_folder_or_are_refused(path: str, tmp_path: Path) -> None:
    content = tmp_path / "content"
    content.write_bytes(b"x")
    root = tmp_path / "files"
    root.mkdir()
    before = {item for item in tmp_path.rglob("*") if root not in item.parents}

    try:
        lay_out_files(root, [["a", "blob", 0o644], [path, "blob", 0o4755]], lambda _: content)
    except (AppFileUploadException, OSError):
        assert list(root.iterdir()) == []  # whole or not at all

    assert {item for item in tmp_path.rglob("*") if root not in item.parents} == before
    assert not Path("/tmp/fal-test-outside").exists()
    assert all(item.stat().st_mode & 0o6000 == 0 for item in root.rglob("*"))


ROOTS = [
    "~/a b",
    "/tmp/$(touch {mark})",
    "/tmp/`touch {mark}`",
    "/tmp/'; touch {mark}; '",
    "/tmp/\ntouch {mark}",
]


@pytest.mark.parametrize("root", ROOTS)
def test_a_folder_is_no_command_for_the_hosts_shell(root: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    class Link:
        forwarding_is_forbidden = False

        def run(self, command: str, **_: Any) -> Any:
            return Done(subprocess.run(["/bin/sh", "-c", command], capture_output=True, check=False))

    host = ssh.SSHHost(f"evil; touch {mark}")
    with contextlib.suppress(HostUnreachableError):  # "could not be looked at" is a fair answer too
        host._probe(Link(), HostSettings("evil", root=root.format(mark=mark)), "0" * 64)  # type: ignore[arg-type]

    assert not mark.exists()


class Done:
    """What a command of a link gives."""

    def __init__(self, done: subprocess.CompletedProcess[bytes]) -> None:
        self.status, self.stdout, self.stderr = done.returncode, done.stdout, done.stderr
