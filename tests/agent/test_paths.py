"""Where things lie on a host."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import fal_agent
from fal_agent import paths
from fal_agent.paths import is_networked, run_folder, socket_path, state_folder
from fal_agent.server import daemon

DIGEST = "0123456789abcdef" * 4


def test_a_socket_lies_in_the_root() -> None:
    assert socket_path(Path("/home/me/.fal_notebook"), DIGEST).is_relative_to("/home/me/.fal_notebook")


def test_roots_with_paths_too_long_for_a_socket_do_not_share_one() -> None:
    roots = [Path("/") / ("deep" * 30) / name for name in ("one", "two")]

    paths = [socket_path(root, DIGEST) for root in roots]

    assert paths[0] != paths[1]
    assert max(len(os.fsencode(path)) for path in paths) < 108


MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
30 22 0:25 / /tmp rw - tmpfs tmpfs rw
40 22 0:40 / /home rw - autofs systemd-1 rw
41 40 0:41 / /home rw - nfs4 server:/export/home rw,vers=4.2
42 41 0:42 / /home/me/on\\040disk rw - ext4 /dev/vdb1 rw
43 22 0:43 / /home2 rw - fuse.sshfs box:/ rw
44 22 0:44 / /merged rw - fuse.mergerfs a:b rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/srv/x", "ext4"),
        ("/home/me/.fal_notebook", "nfs4"),
        ("/home/me/on disk/root", "ext4"),
        ("/homestead", "ext4"),
        ("/home2", "fuse.sshfs"),
        ("/tmp/a", "tmpfs"),
    ],
)
def test_a_path_is_on_the_file_system_that_was_mounted_last_above_it(path: str, kind: str) -> None:
    assert paths._file_system(MOUNTS, path) == kind


def test_this_machines_own_disks_are_not_networked(tmp_path: Path) -> None:
    assert not is_networked(tmp_path / "not" / "there")


def test_a_shared_root_leaves_sockets_locks_and_the_journal_to_each_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = Path("/home/me/.fal_notebook")
    monkeypatch.setattr(paths, "is_networked", lambda path: path == root)

    places = [state_folder(root), run_folder(root, DIGEST), socket_path(root, DIGEST)]

    assert not any(place.is_relative_to("/home") for place in places)
    assert all(place.is_relative_to(paths.local_folder()) for place in places)
    assert state_folder(Path("/srv/root")) == Path("/srv/root")


def test_an_agent_serves_a_root_on_a_network_file_system(tmp_path: Path) -> None:
    """A folder that is mounted through FUSE stands for it."""
    store, root = tmp_path / "store", tmp_path / "net"
    store.mkdir()
    root.mkdir()
    if (
        shutil.which("bindfs") is None
        or subprocess.run(
            ["bindfs", "-o", "subtype=shared", store, root], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting needs bindfs and FUSE")
    code = str(Path(fal_agent.__file__).parents[1])
    words = ["start", "--root", str(root), "--digest", DIGEST, "--idle", "0.1"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "fal_agent", *words],
            env={**os.environ, "PYTHONPATH": code},
            capture_output=True,
            check=False,
            timeout=60,
        )
        assert Path(json.loads(done.stdout)["socket"]).is_relative_to(paths.local_folder()), done.stderr
        assert not (store / "run").exists()
        assert not list(store.glob("journal*"))
    finally:
        subprocess.run(["umount", "-l", root], check=True)
        shutil.rmtree(paths.local_folder() / paths._name_of(root), ignore_errors=True)


def test_without_a_folder_for_temporary_files_there_is_one_of_the_agents_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [os.environ.get("TMPDIR", "/nowhere")])
    monkeypatch.setenv("TMPDIR", "/nowhere")  # so that it is put back as it was
    monkeypatch.delenv("TMPDIR")

    daemon._provide_temporary_folder(tmp_path / "tmp")

    assert tempfile.gettempdir() == str(tmp_path / "tmp")
    monkeypatch.delenv("TMPDIR")
