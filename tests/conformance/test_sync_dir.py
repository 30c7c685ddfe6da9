"""A local folder in the host's data folder, and `/data` in calls."""

from __future__ import annotations

import os
import socket
import threading
import uuid
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import fal_notebook as fal
from fal_agent.mirror import manifests

if TYPE_CHECKING:
    from fal_notebook.hosts.base import Host


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A folder with a few files."""
    folder = tmp_path / "local"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "deep" / "er" / "b.bin").write_bytes(bytes(range(256)) * 40)
    return folder


@pytest.fixture
def remote() -> str:
    """A folder of a test's own on the host."""
    return f"/data/tests-{uuid.uuid4().hex}"


def look(host: Host, path: str) -> dict[str, Any]:
    """What is there, as code that runs there sees it: text, or the target of a link."""

    @fal.function(host=host)
    def seen(top: str) -> dict[str, Any]:
        import os

        found = {}
        for folder, folders, files in os.walk(top):
            for name in [*files, *(name for name in folders if os.path.islink(os.path.join(folder, name)))]:
                path = os.path.join(folder, name)
                relative = os.path.relpath(path, top)
                if os.path.islink(path):
                    found[relative] = "-> " + os.readlink(path)
                else:
                    with open(path, "rb") as file:
                        found[relative] = file.read().decode("latin-1")
        return found

    seen_there: dict[str, Any] = seen(path)
    return seen_there


def do(host: Host, path: str, code: str) -> Any:
    """Run code there, with `path` in it."""

    @fal.function(host=host)
    def run(path: str, code: str) -> Any:
        import os
        import pathlib

        names = {"path": path, "os": os, "pathlib": pathlib, "out": None}
        exec(code, names)
        return names["out"]

    return run(path, code)


def test_what_is_here_is_there_afterwards(host: Host, local: Path, remote: str) -> None:
    path = fal.sync_dir(local, remote, host=host)

    assert look(host, path) == {
        "a.txt": "a",
        "deep/er/b.bin": (bytes(range(256)) * 40).decode("latin-1"),
    }


def test_the_path_opens_in_a_call(host: Host, local: Path, remote: str) -> None:
    path = fal.sync_dir(str(local), remote, host=host)

    @fal.function(host=host)
    def read() -> str:
        with open(path + "/a.txt") as file:
            return file.read()

    assert isinstance(path, str)
    assert read() == "a"


def test_data_paths_open_in_calls(agent_host: Host, local: Path, remote: str) -> None:
    fal.sync_dir(local, remote, host=agent_host)

    seen = do(
        agent_host,
        remote,
        "out = [open(f'{path}/a.txt').read(), sorted(os.listdir(path)), pathlib.Path(path, 'deep').is_dir()]",
    )

    assert seen == ["a", ["a.txt", "deep"], True]


def test_what_a_call_writes_below_data_is_there_for_the_next(agent_host: Host, remote: str) -> None:
    do(agent_host, remote, "os.makedirs(path); pathlib.Path(path, 'made').write_text('there')")

    assert do(agent_host, remote, "out = open(os.path.join(path, 'made')).read()") == "there"


def test_other_programs_find_the_data_folder_in_their_environment(
    agent_host: Host, local: Path, remote: str
) -> None:
    fal.sync_dir(local, remote, host=agent_host)
    name = remote.removeprefix("/data/")

    out = do(
        agent_host,
        name,
        "import subprocess; out = subprocess.check_output(['sh', '-c', "
        "'cat \"$FAL_PERSISTENT_DIR/$1/a.txt\"', 'sh', path], text=True)",
    )

    assert out == "a"


def test_it_says_what_it_does(
    host: Host, local: Path, remote: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fal.sync_dir(local, remote, host=host)
    first = capsys.readouterr().out
    fal.sync_dir(local, remote, host=host)
    second = capsys.readouterr().out

    assert first.startswith("Syncing...\n")
    assert "Done" in first
    assert "10.2 kB sent" in first
    assert f"already uploaded and matches {remote}" in second


def sent(capsys: pytest.CaptureFixture[str]) -> str:
    """What the last lines say about the bytes that travelled."""
    out = capsys.readouterr().out
    return out.rpartition("Done")[2].split(", ")[1] if "Done" in out else "nothing"


def test_only_what_changed_travels(
    host: Host, local: Path, remote: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fal.sync_dir(local, remote, host=host)
    (local / "a.txt").write_text("changed")
    capsys.readouterr()

    fal.sync_dir(local, remote, host=host)

    assert sent(capsys) == "7 bytes sent"
    assert look(host, path)["a.txt"] == "changed"


def test_all_of_it_travels_again_if_forced(
    host: Host, local: Path, remote: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fal.sync_dir(local, remote, host=host)
    capsys.readouterr()

    fal.sync_dir(local, remote, True, host=host)

    assert sent(capsys) == "10.2 kB sent"


def test_a_rename_is_seen_and_nothing_travels(
    host: Host, local: Path, remote: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fal.sync_dir(local, remote, host=host)
    before = look(host, path)
    (local / "deep").rename(local / "shallow")
    capsys.readouterr()

    fal.sync_dir(local, remote, host=host)

    assert sent(capsys) == "0 bytes sent"
    assert look(host, path) == {"a.txt": "a", "shallow/er/b.bin": before["deep/er/b.bin"]}


def test_files_that_change_places_and_copies_need_no_transfer(
    host: Host, local: Path, remote: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (local / "b.txt").write_text("b")
    path = fal.sync_dir(local, remote, host=host)
    (local / "b.txt").write_text("a")
    (local / "a.txt").write_text("b")
    (local / "c.txt").write_text("a")
    (local / "d.txt").write_text("a")
    capsys.readouterr()

    fal.sync_dir(local, remote, host=host)

    seen = look(host, path)
    assert sent(capsys) == "0 bytes sent"
    assert [seen[name] for name in ("a.txt", "b.txt", "c.txt", "d.txt")] == ["b", "a", "a", "a"]
    do(host, path, "open(path + '/c.txt', 'r+').write('x')")
    assert [look(host, path)[name] for name in ("b.txt", "c.txt", "d.txt")] == ["a", "x", "a"]


def test_what_is_gone_here_goes_there_and_what_remote_code_made_stays(
    host: Host, local: Path, remote: str
) -> None:
    path = fal.sync_dir(local, remote, host=host)
    do(host, path, "open(path + '/deep/made.txt', 'w').write('made')")
    (local / "deep" / "er" / "b.bin").unlink()
    (local / "a.txt").unlink()

    fal.sync_dir(local, remote, host=host)

    assert look(host, path) == {"deep/made.txt": "made"}
    assert not do(host, path, "out = os.path.exists(path + '/deep/er')")


def test_what_is_gone_here_but_changed_there_stays(host: Host, local: Path, remote: str) -> None:
    path = fal.sync_dir(local, remote, host=host)
    do(host, path, "open(path + '/a.txt', 'w').write('worked on')")
    (local / "a.txt").unlink()

    with pytest.warns(UserWarning, match=r"changed on .*'a\.txt'"):
        fal.sync_dir(local, remote, host=host)

    assert look(host, path)["a.txt"] == "worked on"


def test_what_was_changed_there_becomes_as_it_is_here(host: Host, local: Path, remote: str) -> None:
    path = fal.sync_dir(local, remote, host=host)
    do(host, path, "open(path + '/a.txt', 'w').write('b'); os.unlink(path + '/deep/er/b.bin')")

    fal.sync_dir(local, remote, host=host)

    assert look(host, path)["a.txt"] == "a"
    assert len(look(host, path)["deep/er/b.bin"]) == 10240


def test_a_file_may_become_a_folder_and_the_other_way_around(host: Host, local: Path, remote: str) -> None:
    path = fal.sync_dir(local, remote, host=host)
    (local / "a.txt").unlink()
    (local / "a.txt").mkdir()
    (local / "a.txt" / "inner").write_text("inner")
    (local / "deep" / "er" / "b.bin").unlink()
    (local / "deep" / "er").rmdir()
    (local / "deep").rmdir()
    (local / "deep").write_text("a file now")

    fal.sync_dir(local, remote, host=host)

    assert look(host, path) == {"a.txt/inner": "inner", "deep": "a file now"}


def test_nothing_that_remote_code_made_is_replaced_by_a_folder_or_file(
    host: Host, local: Path, remote: str
) -> None:
    path = fal.sync_dir(local, remote, host=host)
    do(host, path, "os.mkdir(path + '/new'); open(path + '/new/made', 'w').write('made')")
    before = look(host, path)
    (local / "new").write_text("here")
    (local / "a.txt").write_text("changed as well")

    with pytest.raises(fal.exceptions.ResourceError, match=r"new/made' was made on the host"):
        fal.sync_dir(local, remote, host=host)

    assert look(host, path) == before


def test_modes_are_kept_and_followed(host: Host, local: Path, remote: str) -> None:
    (local / "tool.sh").write_text("#!/bin/sh\n")
    (local / "tool.sh").chmod(0o750)
    (local / "a.txt").chmod(0o640)
    path = fal.sync_dir(local, remote, host=host)
    code = "out = [oct(os.stat(f'{path}/{name}').st_mode & 0o777) for name in ('tool.sh', 'a.txt')]"
    first = do(host, path, code)
    (local / "tool.sh").chmod(0o644)

    fal.sync_dir(local, remote, host=host)

    assert first == ["0o750", "0o640"]
    assert do(host, path, code) == ["0o644", "0o640"]


def test_links_that_stay_inside_travel_as_links(host: Host, local: Path, remote: str) -> None:
    (local / "plain").symlink_to("deep/er/b.bin")
    (local / "deep" / "up").symlink_to("../a.txt")
    (local / "folder").symlink_to("deep")
    (local / "absolute").symlink_to(local / "a.txt")
    (local / "deep" / "around").symlink_to(f"../../{local.name}/a.txt")
    path = fal.sync_dir(local, remote, host=host)

    seen = look(host, path)

    assert {name: text for name, text in seen.items() if text.startswith("->")} == {
        "plain": "-> deep/er/b.bin",
        "deep/up": "-> ../a.txt",
        "folder": "-> deep",
        "absolute": "-> a.txt",
        "deep/around": "-> ../a.txt",
    }
    assert do(host, path, "out = open(path + '/deep/around').read()") == "a"
    (local / "folder").unlink()
    fal.sync_dir(local, remote, host=host)
    assert "folder" not in look(host, path)
    assert "deep/er/b.bin" in look(host, path)


def test_links_that_lead_out_and_special_files_are_named_and_skipped(
    host: Host, local: Path, remote: str, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    (local / "out").symlink_to("../secret")
    (local / "etc").symlink_to("/etc")
    os.mkfifo(local / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(local)
        listener.bind("socket")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            path = fal.sync_dir(local, remote, host=host)

    texts = [str(warning.message) for warning in caught]
    assert any("out of the folder" in text and "'etc', 'out'" in text for text in texts)
    assert any("no regular files" in text and "'pipe', 'socket'" in text for text in texts)
    assert set(look(host, path)) == {"a.txt", "deep/er/b.bin"}


@pytest.fixture(autouse=True)
def same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Come back to the working folder after each test."""
    monkeypatch.chdir(tmp_path)


def test_odd_names_are_named_when_they_stay(host: Host, local: Path, remote: str) -> None:
    name = os.fsdecode(b"\xff\n")
    (local / name).write_text("here")
    path = fal.sync_dir(local, remote, host=host)
    do(
        host,
        path,
        "[open(os.path.join(path, n), 'w').write('there') for n in os.listdir(path) if n != 'deep']",
    )
    (local / name).unlink()

    with pytest.warns(UserWarning, match="changed on") as caught:
        fal.sync_dir(local, remote, host=host)

    assert any(repr(name) in str(warning.message) for warning in caught)


def test_odd_names_arrive(host: Host, local: Path, remote: str) -> None:
    odd = [b"new\nline", b"\xff\xfe", "é".encode(), b" space ", b"-rf", b"*", b"..x", b"q'\"", b"tab\t"]
    for name in odd:
        with open(os.path.join(os.fsencode(local), name), "wb") as file:
            file.write(name)
    path = fal.sync_dir(local, remote, host=host)

    seen = do(
        host,
        path,
        "out = {name: open(os.path.join(os.fsencode(path), name), 'rb').read()"
        " for name in os.listdir(os.fsencode(path)) if name not in (b'a.txt', b'deep')}",
    )

    assert seen == {name: name for name in odd}


def test_ignored_files_stay_here(host: Host, local: Path, remote: str) -> None:
    (local / ".git").mkdir()
    (local / ".git" / "config").write_text("x")
    (local / ".gitignore").write_text("*.bin\n")
    (local / "deep" / ".gitignore").write_text("!*.bin\n/secret\n")
    (local / "deep" / "secret").write_text("secret")
    (local / "top.bin").write_text("x")
    path = fal.sync_dir(local, remote, host=host)

    assert set(look(host, path)) == {".gitignore", "a.txt", "deep/.gitignore", "deep/er/b.bin"}


def test_nothing_is_written_here(host: Host, local: Path, remote: str) -> None:
    def state() -> list[Any]:
        looks = [(str(path), path.lstat()) for path in sorted([local, *local.rglob("*")])]
        return [(path, look.st_mtime_ns, look.st_ctime_ns) for path, look in looks]

    before = state()
    fal.sync_dir(local, remote, host=host)
    fal.sync_dir(local, remote, host=host)

    assert state() == before


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """Files of more than a hundred thousand bytes travel in pieces (where both halves are this process)."""
    for module in ("fal_agent.mirror.manifests", "fal_agent.mirror.stage", "fal_notebook.manifest"):
        monkeypatch.setattr(f"{module}.PIECE_SIZE", 100_000)
    return 100_000


def test_a_large_file_travels_in_pieces_and_only_those_that_changed(
    local: Path, remote: str, small_pieces: int, capsys: pytest.CaptureFixture[str]
) -> None:
    content = os.urandom(small_pieces * 3 + 5)
    (local / "large").write_bytes(content)
    path = fal.sync_dir(local, remote, host="inline")
    capsys.readouterr()
    grown = content + os.urandom(small_pieces)
    (local / "large").write_bytes(grown)

    fal.sync_dir(local, remote, host="inline")

    assert Path(path, "large").read_bytes() == grown
    assert sent(capsys) == "100 kB sent"


def test_files_of_several_pieces_arrive_everywhere(host: Host, local: Path, remote: str) -> None:
    size = manifests.PIECE_SIZE + 70_001
    block = os.urandom(1 << 20)
    with (local / "large").open("wb") as file:
        while file.tell() < size:
            file.write(block[: size - file.tell()])
    path = fal.sync_dir(local, remote, host=host)

    code = "import hashlib; file = open(path + '/large', 'rb'); out = hashlib.sha256(file.read()).hexdigest()"
    import hashlib

    assert do(host, path, code) == hashlib.sha256((local / "large").read_bytes()).hexdigest()


class _Broken(Exception):
    pass


def test_a_transfer_that_broke_goes_on_where_it_was(
    local: Path, remote: str, small_pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fal_notebook.hosts import registry

    host: Any = registry.get_host("inline")
    (local / "large").write_bytes(os.urandom(small_pieces * 4))
    names: list[str] = []
    upload = type(host).upload

    def break_down(self: Any, name: str, data: Any, stop: Any) -> None:
        if len(names) == 4:
            raise _Broken
        names.append(name)
        upload(self, name, data, stop)

    monkeypatch.setattr(type(host), "upload", break_down)
    with pytest.raises(_Broken):
        fal.sync_dir(local, remote, host=host)
    first = set(names)
    second: list[str] = []
    monkeypatch.setattr(type(host), "upload", lambda *args: (second.append(args[1]), upload(*args))[1])

    path = fal.sync_dir(local, remote, host=host)

    pieces = {name for name in second if not name.startswith("sync-manifest")}
    assert len(first) == 4
    assert len(pieces) == 6 - 3
    assert not pieces & first
    assert Path(path, "large").read_bytes() == (local / "large").read_bytes()


def test_after_the_connection_broke_only_the_rest_is_sent(
    agent_host: Any, local: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        (local / f"{number}.txt").write_text(f"{remote} {number}")
    first: set[str] = set()
    second: set[str] = set()
    upload = type(agent_host).upload

    def break_down(self: Any, name: str, data: Any, stop: Any) -> None:
        if len(first) == 8:
            self.ask("status")  # so that what was sent has arrived
            self._client.close()
            raise fal.exceptions.LinkLostError("broken")
        first.add(name)
        upload(self, name, data, stop)

    monkeypatch.setattr(type(agent_host), "upload", break_down)
    with pytest.raises(fal.exceptions.LinkLostError):
        fal.sync_dir(local, remote, host=agent_host)
    monkeypatch.setattr(type(agent_host), "upload", lambda *args: (second.add(args[1]), upload(*args))[1])

    path = fal.sync_dir(local, remote, host=agent_host)

    assert len(look(agent_host, path)) == 22
    assert len(second - first) == 22 + 1 - 8
    assert not second & first


def test_two_at_once_leave_one_or_the_other(host: Host, tmp_path: Path, remote: str) -> None:
    folders = []
    for number in range(2):
        folder = tmp_path / f"local-{number}"
        folder.mkdir()
        for index in range(30):
            (folder / f"{index}.txt").write_text(f"{number} {index}")
        folders.append(folder)
    paths: list[str] = []
    threads = [
        threading.Thread(target=lambda folder=folder: paths.append(fal.sync_dir(folder, remote, host=host)))
        for folder in folders
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    seen = look(host, paths[0])

    assert len(seen) == 30
    assert len({text.split()[0] for text in seen.values()}) == 1


@pytest.mark.parametrize(
    "remote_dir",
    ["data/x", "/database", "/data/../etc", "/data/x/../../etc", "/datax/y", "/", "", "x", "/data/a\0b"],
)
def test_a_folder_that_is_not_in_data_is_refused_before_anything_is_touched(remote_dir: str) -> None:
    with pytest.raises(ValueError, match="/data"):
        fal.sync_dir("/nowhere/at/all", remote_dir, host="no-such-host")


def test_a_local_folder_that_is_none_is_refused(tmp_path: Path, local: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        fal.sync_dir(tmp_path / "absent", "/data/x", host="inline")
    with pytest.raises(NotADirectoryError, match=r"a\.txt"):
        fal.sync_dir(local / "a.txt", "/data/x", host="inline")


def test_the_home_folder_may_be_written_as_a_tilde(
    local: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(local.parent))

    path = fal.sync_dir("~/local", remote, host="inline")

    assert Path(path, "a.txt").read_text() == "a"


def test_without_a_host_the_current_one_is_meant(
    local: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fal_notebook.hosts.registry._current", None)
    monkeypatch.setenv("FAL_HOST", "inline")

    assert Path(fal.sync_dir(local, remote), "a.txt").read_text() == "a"


def test_a_link_that_leads_out_of_the_data_folder_is_not_followed(
    host: Host, local: Path, remote: str, public_folder: Path
) -> None:
    (local / "x").mkdir()
    (local / "x" / "file").write_text("x")
    path = fal.sync_dir(local, remote, host=host)
    do(host, path, f"os.symlink({str(public_folder)!r}, path + '/way')")

    with pytest.raises(ValueError, match="out of the data folder"):
        fal.sync_dir(local, remote + "/way", host=host)
    do(host, path, "import shutil; shutil.rmtree(path + '/x')")
    do(host, path, f"os.symlink({str(public_folder)!r}, path + '/x')")
    with pytest.raises(fal.exceptions.ResourceError, match="in the way"):
        fal.sync_dir(local, remote, host=host)

    assert list(public_folder.iterdir()) == []
