"""A folder made to hold what a manifest says: step by step, and when things go wrong on the way."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from blake3 import blake3

from fal_agent.errors import ProtocolError, ResourceError
from fal_agent.mirror import apply, stage
from fal_agent.mirror.folder import OWN_FOLDER, Mirror
from fal_agent.mirror.manifests import FileEntry, Manifest, piece_blob

if TYPE_CHECKING:
    from collections.abc import Mapping

Usage = namedtuple("Usage", ["total", "used", "free"])


class Host:
    """A data root, and the blobs that have arrived."""

    def __init__(self, folder: Path) -> None:
        self.data, self.blobs = folder / "data", folder / "blobs"
        self.blobs.mkdir(parents=True)
        self.sent: list[str] = []

    def take(self, name: str) -> Path | None:
        path = self.blobs / name
        return path if path.exists() else None

    def step(self, name: str, directory: str = "x", *, force: bool = False) -> dict[str, Any]:
        return Mirror(self.data, directory, self.take).step(name, force=force)

    def put(self, name: str, content: bytes) -> None:
        (self.blobs / name).write_bytes(content)

    def sync(
        self, files: Mapping[str, bytes], directory: str = "x", *, force: bool = False, **more: Any
    ) -> dict[str, Any]:
        """Do as the notebook does; notes in `sent` whatever was asked for."""
        manifest = manifest_of(files, **more)
        name = self.offer(manifest)
        contents = {blake3(content).hexdigest(): content for content in files.values()}
        self.sent = []
        while True:
            answer = self.step(name, directory, force=force)
            force = False
            if answer["state"] != "missing":
                return answer
            for piece in answer["pieces"]:
                self.sent.append(contents[piece].decode())
                self.put(piece_blob(piece), contents[piece])

    def offer(self, manifest: Manifest) -> str:
        content = manifest.to_bytes()
        name = f"sync-manifest-{blake3(content).hexdigest()}"
        self.put(name, content)
        return name

    def seen(self, directory: str = "x") -> dict[str, str]:
        top = self.data / directory
        return {
            str(path.relative_to(top)): path.read_text()
            for path in sorted(top.rglob("*"))
            if path.is_file() and OWN_FOLDER not in str(path)
        }


def manifest_of(
    files: Mapping[str, bytes], *, mode: int = 0o644, links: Mapping[str, str] | None = None, keep: Any = ()
) -> Manifest:
    entries = {
        path: FileEntry(mode, len(content), (blake3(content).hexdigest(),) if content else ())
        for path, content in files.items()
    }
    return Manifest(entries, dict(links or {}), list(keep))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


# ---------------------------------------------------------------- the steps


def test_each_step_says_what_is_due(host: Host) -> None:
    manifest = manifest_of({"a": b"aa", "b/c": b"c"})
    name = host.offer(manifest)
    (host.blobs / name).rename(host.blobs / "later")
    answers = [host.step(name)]
    (host.blobs / "later").rename(host.blobs / name)
    answers.append(host.step(name))
    for piece, content in zip(answers[1]["pieces"], (b"aa", b"c"), strict=True):
        host.put(piece_blob(piece), content)
    answers += [host.step(name), host.step(name)]

    assert [answer["state"] for answer in answers] == ["manifest", "missing", "done", "same"]
    assert answers[1]["bytes"] == 3
    assert answers[3]["path"] == str(host.data / "x")
    assert host.seen() == {"a": "aa", "b/c": "c"}


def test_blobs_are_used_up(host: Host) -> None:
    host.sync({"a": b"a", "b": b"a", "c": b"c"})

    assert [path.name[:13] for path in host.blobs.iterdir()] == ["sync-manifest"]
    assert [path.name for path in (host.data / OWN_FOLDER / "staged").iterdir()] == [".boot"]


def test_pieces_are_asked_for_page_by_page(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fal_agent.mirror.folder._PAGE_PIECES", 2)
    files = {str(number): str(number).encode() for number in range(5)}
    name = host.offer(manifest_of(files))

    first = host.step(name)

    assert (len(first["pieces"]), first["bytes"]) == (2, 5)
    assert host.sync(files)["state"] == "done"
    assert len(host.seen()) == 5


def test_a_piece_of_the_wrong_size_has_not_arrived(host: Host) -> None:
    name = host.offer(manifest_of({"a": b"aa"}))
    [piece] = host.step(name)["pieces"]
    host.put(piece_blob(piece), b"a")

    assert host.step(name)["pieces"] == [piece]


def test_while_somebody_else_is_at_work_the_answer_is_busy(host: Host) -> None:
    host.sync({"a": b"a"})
    with (host.data / OWN_FOLDER / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        assert host.step("whatever")["state"] == "busy"
    assert host.step("whatever")["state"] == "manifest"


def test_the_data_root_itself_may_be_the_folder(host: Host) -> None:
    host.sync({"x/a": b"inner"}, "")
    host.sync({"b": b"b"}, "")

    assert host.seen("") == {"b": "b"}
    assert host.sync({"b": b"b"}, "")["state"] == "same"


def test_folders_within_each_other_do_not_know_of_each_other(host: Host) -> None:
    host.sync({"a": b"a"}, "x")
    host.sync({"b": b"b"}, "x/y")
    host.sync({}, "x")

    assert host.seen("") == {"x/y/b": "b"}


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("path", ["/a", "../a", "a/../b", "a//b", "", ".", "a/.", "a\0b", "a/", 3])
def test_paths_that_leave_the_folder_are_refused(host: Host, path: Any) -> None:
    content = json.dumps({"files": [[path, 0o644, 0, []]], "links": [], "keep": []}).encode()
    host.put("sync-manifest-x", content)

    with pytest.raises(ProtocolError):
        host.step("sync-manifest-x")


@pytest.mark.parametrize(
    ("path", "target"), [("a", "/etc"), ("a", "../b"), ("a/b", "../../c"), ("a", "b/../.."), ("a", "")]
)
def test_links_that_leave_the_folder_are_refused(host: Host, path: str, target: str) -> None:
    with pytest.raises(ProtocolError, match="link"):
        host.step(host.offer(Manifest(links={path: target})))


@pytest.mark.parametrize(
    "manifest",
    [
        Manifest({"a": FileEntry(0o644, 5, ())}),
        Manifest({"a": FileEntry(0o644, 5, ("../../etc/passwd",))}),
        Manifest({"a": FileEntry(0o644, 0, ()), "a/b": FileEntry(0o644, 0, ())}),
        Manifest({"a/b": FileEntry(0o644, 0, ())}, links={"a": "c"}),
    ],
)
def test_what_no_folder_can_hold_is_refused(host: Host, manifest: Manifest) -> None:
    with pytest.raises(ProtocolError):
        host.step(host.offer(manifest))


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"files": [[1]], "links": [], "keep": []}'])
def test_what_is_no_manifest_is_refused(host: Host, content: bytes) -> None:
    host.put("sync-manifest-x", content)

    with pytest.raises(ProtocolError, match="manifest"):
        host.step("sync-manifest-x")


@pytest.mark.parametrize("directory", ["../x", "/x", "x/../..", OWN_FOLDER, f"{OWN_FOLDER}/staged"])
def test_a_folder_that_is_not_ours_to_fill_is_refused(host: Host, directory: str) -> None:
    with pytest.raises(ValueError, match="/data"):
        host.step("x", directory)


@pytest.mark.parametrize(
    ("directory", "path"), [("", ".fal/sync/lock"), (".fal", "sync/x"), ("", ".fal"), (".fal", "sync")]
)
def test_a_file_among_our_records_is_refused(host: Host, directory: str, path: str) -> None:
    with pytest.raises(ValueError, match="records"):
        host.sync({path: b"x"}, directory)


def test_a_file_where_the_folder_is_to_be_is_an_error(host: Host) -> None:
    host.data.mkdir()
    (host.data / "x").write_text("mine")

    with pytest.raises(ValueError, match="is a file"):
        host.step("x")


def test_a_link_to_another_folder_below_the_data_root_is_followed(host: Host) -> None:
    (host.data / "real").mkdir(parents=True)
    (host.data / "x").symlink_to("real")

    host.sync({"a": b"a"})

    assert (host.data / "x").is_symlink()
    assert host.seen("real") == {"a": "a"}


def test_nothing_is_removed_through_a_link(host: Host, tmp_path: Path) -> None:
    host.sync({"d/a": b"a", "b": b"b"})
    (host.data / "x" / "d").rename(tmp_path / "outside")
    (host.data / "x" / "d").symlink_to(tmp_path / "outside")

    answer = host.sync({"b": b"b"})

    assert answer["changed_there"] == ["d/a"]
    assert (tmp_path / "outside" / "a").read_text() == "a"


# ---------------------------------------------------------------- what stays


def test_paths_that_could_not_be_looked_at_stay(host: Host) -> None:
    host.sync({"d/a": b"a", "d/b": b"b", "e": b"e", "dd": b"d"})

    host.sync({"f": b"f"}, keep=["d", "e"])

    assert host.seen() == {"d/a": "a", "d/b": "b", "e": "e", "f": "f"}
    host.sync({})
    assert host.seen() == {}


def test_content_that_stays_is_copied_and_not_shared(host: Host) -> None:
    host.sync({"a": b"same"})
    host.sync({"a": b"same", "b": b"same"})

    assert host.sent == []
    (host.data / "x" / "a").write_text("else")
    assert host.seen()["b"] == "same"


def test_a_renamed_file_keeps_its_inode(host: Host) -> None:
    """So nothing was copied."""
    host.sync({"a": b"content"})
    inode = (host.data / "x" / "a").stat().st_ino

    host.sync({"b": b"content"})

    assert (host.data / "x" / "b").stat().st_ino == inode
    assert host.sync({"b": b"content"})["state"] == "same"


def test_without_hard_links_a_rename_is_a_copy(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    host.sync({"a": b"content"})
    monkeypatch.setattr(stage.os, "link", refuse)

    host.sync({"b": b"content"})

    assert (host.sent, host.seen()) == ([], {"b": "content"})


def test_blobs_on_another_file_system_are_copied(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def across(self: Path, target: Path) -> Path:
        if self.parent == host.blobs:
            raise OSError(errno.EXDEV, "another device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", across)

    host.sync({"a": b"a"})

    assert host.seen() == {"a": "a"}
    assert not list(host.blobs.glob("sync-[0-9a-f]*"))


def test_a_link_and_a_file_may_take_each_others_place(host: Host) -> None:
    host.sync({"a": b"a", "b": b"b"}, links={"l": "a"})
    host.sync({"a": b"a", "l": b"l"}, links={"b": "a"})

    assert not (host.data / "x" / "l").is_symlink()
    assert (host.data / "x" / "b").readlink() == Path("a")
    host.sync({"a": b"a"})
    assert host.seen() == {"a": "a"}
    assert not (host.data / "x" / "b").is_symlink()


def test_a_link_that_was_turned_elsewhere_there_stays(host: Host) -> None:
    host.sync({"a": b"a", "b": b"b"}, links={"l": "a"})
    (host.data / "x" / "l").unlink()
    (host.data / "x" / "l").symlink_to("b")

    answer = host.sync({"a": b"a", "b": b"b"})

    assert answer["changed_there"] == ["l"]
    assert (host.data / "x" / "l").readlink() == Path("b")


def test_empty_folders_that_remote_code_made_give_way_to_a_file(host: Host) -> None:
    (host.data / "x" / "a" / "b" / "c").mkdir(parents=True)

    host.sync({"a": b"a"})

    assert host.seen() == {"a": "a"}


def test_what_was_put_there_and_changed_there_is_in_the_way_too(host: Host) -> None:
    host.sync({"a/b": b"b"})
    (host.data / "x" / "a" / "b").write_text("worked on")

    with pytest.raises(ResourceError, match="in the way"):
        host.sync({"a": b"a"})

    assert host.seen() == {"a/b": "worked on"}


def test_forced_everything_is_asked_for_again(host: Host) -> None:
    host.sync({"a": b"a", "b": b"b"})

    host.sync({"a": b"a", "b": b"b"}, force=True)

    assert host.sent == ["a", "b"]
    host.sync({"b": b"b"})
    assert host.seen() == {"b": "b"}


# ---------------------------------------------------------------- when it goes wrong


def test_without_room_nothing_is_asked_for(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.sync({"a": b"a"})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 0, (100 << 20) + 5))

    with pytest.raises(ResourceError, match=r"needs 6 bytes more and the disk has room for 5"):
        host.sync({"a": b"changed"[:6]})

    assert host.seen() == {"a": "a"}
    assert host.sync({"a": b"less"})["state"] == "done"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_leaves_every_file_as_it_was(
    host: Host, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    host.sync({"a": b"a", "b": b"b"})
    before = host.seen()
    full = [True]
    copy = stage._copy

    def fail(*args: Any) -> None:
        if full:
            raise OSError(code, os.strerror(code))
        copy(*args)

    monkeypatch.setattr(stage, "_copy", fail)
    with pytest.raises(ResourceError, match="is full"):
        host.sync({"a": b"new", "b": b"new"})

    assert host.seen() == before
    full.clear()
    host.sync({"a": b"new", "b": b"new"})
    assert host.sent == []
    assert host.seen() == {"a": "new", "b": "new"}


def test_after_a_crash_half_way_the_rest_is_done_and_all_is_known_to_be_ours(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.sync({"a": b"a", "gone": b"gone"})
    replace, done = os.replace, []

    def crash(source: Any, target: Any) -> None:
        if (host.data / "x") in Path(target).parents:
            if len(done) == 2:
                raise RuntimeError("killed")
            done.append(target)
        replace(source, target)

    files = {name: name.encode() * 2 for name in "abcd"}
    with monkeypatch.context() as patch:
        patch.setattr(apply.os, "replace", crash)
        with pytest.raises(RuntimeError):
            host.sync(files)
    half = host.seen()
    answer = host.sync(files)

    assert half == {"a": "aa", "b": "bb", "gone": "gone"}
    assert answer["state"] == "done"
    assert host.seen() == {name: name * 2 for name in "abcd"}
    host.sync({})
    assert host.seen() == {}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("manifests", "stage"):
        monkeypatch.setattr(f"fal_agent.mirror.{module}.PIECE_SIZE", 4)


def large(content: bytes) -> tuple[Manifest, dict[str, bytes]]:
    """A manifest of one file in pieces of four bytes, and those by their names."""
    parts = [content[at : at + 4] for at in range(0, len(content), 4)]
    pieces = tuple(blake3(part).hexdigest() for part in parts)
    return Manifest({"large": FileEntry(0o600, len(content), pieces)}), dict(zip(pieces, parts, strict=True))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("content", [b"aaaabbbbcc", b"aaaaaaaaaaaa", b"aaaabbbbaaaabbbb", b"aaaab"])
def test_large_files_are_put_together_from_pieces_in_any_order(host: Host, content: bytes) -> None:
    manifest, parts = large(content)
    name = host.offer(manifest)
    asked: list[str] = []
    while (answer := host.step(name))["state"] == "missing":
        piece = answer["pieces"][-1]  # the last comes first
        asked.append(piece)
        host.put(piece_blob(piece), parts[piece])

    assert sorted(asked) == sorted(parts)
    assert host.seen() == {"large": content.decode()}


@pytest.mark.usefixtures("small_pieces")
def test_half_a_piece_in_a_large_file_is_none(host: Host) -> None:
    manifest, parts = large(b"aaaabbbbcccc")
    name = host.offer(manifest)
    first, second, third = manifest.files["large"].pieces
    host.put(piece_blob(first), parts[first])
    host.step(name)
    [part] = (host.data / OWN_FOLDER / "staged").glob("*.part")
    with part.open("ab") as file:
        file.write(b"xx")

    assert host.step(name)["pieces"] == [second, third]
    for piece in (second, third):
        host.put(piece_blob(piece), parts[piece])
    host.step(name)
    assert host.seen() == {"large": "aaaabbbbcccc"}


@pytest.mark.usefixtures("small_pieces")
def test_a_large_file_takes_what_it_can_from_the_one_that_is_there(host: Host) -> None:
    manifest, parts = large(b"aaaabbbbcc")
    name = host.offer(manifest)
    for piece, part in parts.items():
        host.put(piece_blob(piece), part)
    host.step(name)

    manifest, parts = large(b"bbbbxxxxaaaa")
    answer = host.step(host.offer(manifest))

    assert [parts[piece] for piece in answer["pieces"]] == [b"xxxx"]


def test_what_was_gathered_before_the_machine_started_anew_is_not_trusted(host: Host) -> None:
    name = host.offer(manifest_of({"a": b"a", "b": b"b"}))
    pieces = host.step(name)["pieces"]
    host.put(piece_blob(pieces[0]), b"a")
    assert host.step(name)["pieces"] == pieces[1:]
    (host.data / OWN_FOLDER / "staged" / ".boot").write_bytes(b"another time")

    assert host.step(name)["pieces"] == pieces


def test_what_nobody_asked_for_in_a_week_is_removed(host: Host) -> None:
    host.sync({"a": b"a"})
    staged = host.data / OWN_FOLDER / "staged"
    (staged / "old").touch()
    os.utime(staged / "old", (1, 1))
    (staged / "new").touch()

    host.sync({"a": b"b"})

    assert sorted(path.name for path in staged.iterdir()) == [".boot", "new"]


def test_a_copy_works_where_the_file_system_cannot_do_it(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any) -> None:
        raise OSError(errno.EXDEV, "not here")

    monkeypatch.setattr(stage.os, "copy_file_range", refuse)

    host.sync({"a": b"content", "b": b"content"})

    assert host.seen() == {"a": "content", "b": "content"}
