"""Archives from outside: what is unpacked, and what is refused."""

from __future__ import annotations

import io
import pickle
import stat
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fal_agent.errors import FileTooLargeError
from fal_agent.runtime.toolkit import archives, file
from fal_agent.runtime.toolkit.archives import unpack
from fal_notebook.toolkit import CompressedFile

CONTENT = {"a.txt": b"one", "d/b.txt": b"two", "d/e/c.bin": bytes(5000)}


def zipped(content: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(content: dict[str, bytes], mode: str = "w:gz", extra: tuple[tarfile.TarInfo, ...] = ()) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for member in extra:
            archive.addfile(member)
    return buffer.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def compressed(data: bytes) -> CompressedFile:
    return CompressedFile.from_bytes(data, "application/zip", repository="in_memory")


def unpacked(data: bytes, tmp_path: Path, **options: int) -> dict[str, bytes]:
    (tmp_path / "archive").write_bytes(data)
    (tmp_path / "to").mkdir(exist_ok=True)
    paths = unpack(tmp_path / "archive", tmp_path / "to", **options)
    return {path.relative_to(tmp_path / "to").as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    "data",
    [
        zipped(CONTENT),
        zipped(CONTENT, zipfile.ZIP_STORED),
        *(tarred(CONTENT, f"w:{c}") for c in ("", "gz", "bz2", "xz")),
    ],
)
def test_iterating_gives_the_files_unpacked(data: bytes) -> None:
    archive = compressed(data)

    paths = list(archive)

    assert [path.name for path in paths] == ["a.txt", "b.txt", "c.bin"]
    assert [path.read_bytes() for path in paths] == list(CONTENT.values())
    assert list(archive) == paths
    assert [path.name for path in archive.glob("**/*.txt")] == ["a.txt", "b.txt"]


def test_the_files_go_with_the_object() -> None:
    archive = compressed(zipped(CONTENT))
    path = next(iter(archive))
    assert path.exists()

    del archive

    assert not path.exists()


def test_an_archive_travels_without_what_is_unpacked_here() -> None:
    archive = compressed(zipped(CONTENT))
    first = list(archive)

    again = pickle.loads(pickle.dumps(archive))

    assert again.url == archive.url
    assert [path.read_bytes() for path in again] == list(CONTENT.values())
    assert not set(first) & set(again)


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil", ".."])
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_nothing_is_written_outside(pack: type, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="outside of its folder"):
        unpacked(pack({name: b"evil"}), tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "to"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_of_a_tar_are_left_out(kind: bytes, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")

    found = unpacked(tarred({"a": b"x"}, extra=(link("evil", "../secret", kind),)), tmp_path)

    assert found == {"a": b"x"}
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["a"]


def test_a_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(link("d", str(tmp_path / "outside")))
        member = tarfile.TarInfo("d/evil")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))

    assert unpacked(buffer.getvalue(), tmp_path) == {"d/evil": b"x"}
    assert list((tmp_path / "outside").iterdir()) == []


def test_links_of_a_zip_are_left_out(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        entry = zipfile.ZipInfo("evil")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
        regular = zipfile.ZipInfo("fine")
        regular.external_attr = (stat.S_IFREG | 0o644) << 16
        archive.writestr(regular, "x")

    assert unpacked(buffer.getvalue(), tmp_path) == {"fine": b"x"}


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_what_unpacks_to_too_much_is_refused(pack: type, tmp_path: Path) -> None:
    """A few kilobytes can hold gigabytes of zeros."""
    bomb = pack({"a": bytes(600_000), "b": bytes(600_000)})
    assert len(bomb) < 10_000

    with pytest.raises(FileTooLargeError, match="unpacks to more than 1000000 bytes"):
        unpacked(bomb, tmp_path, limit=1_000_000)
    assert len(unpacked(bomb, tmp_path, limit=1_200_000)) == 2


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_MEMBERS_LIMIT", 2)

    with pytest.raises(FileTooLargeError, match="more than 2 files"):
        unpacked(zipped(CONTENT), tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an archive",
        zipped(CONTENT)[:-30],
        tarred(CONTENT)[:-20],
        tarred(CONTENT)[:60],
        zipped({"a": b"", "a/b": b""}),
    ],
    ids=["empty", "text", "cut zip", "cut tar", "short tar", "file and folder"],
)
def test_what_is_damaged_is_a_value_error(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither a zip nor a tar|is damaged|a file and a folder"):
        unpacked(data, tmp_path)


def test_a_damaged_file_is_told_by_its_checksum(tmp_path: Path) -> None:
    data = zipped({"a": b"content"}, zipfile.ZIP_STORED).replace(b"content", b"CONTENT", 1)

    with pytest.raises(ValueError, match="is damaged"):
        unpacked(data, tmp_path)


PACKED = [zipped(CONTENT), *(tarred(CONTENT, f"w:{kind}") for kind in ("", "gz", "bz2", "xz"))]


@given(data=st.sampled_from(PACKED), place=st.integers(0, 100_000), byte=st.integers(0, 255))
def test_whatever_is_damaged_is_unpacked_or_refused(data: bytes, place: int, byte: int) -> None:
    place %= len(data)
    damaged = data[:place] + bytes([byte]) + data[place + 1 :]

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "archive").write_bytes(damaged)
        (Path(folder) / "to").mkdir()
        try:
            found = unpack(Path(folder) / "archive", Path(folder) / "to", limit=1 << 20)
        except (ValueError, FileTooLargeError):
            return
        assert all(path.is_file() and Path(folder) / "to" in path.parents for path in found)


def test_a_refused_archive_leaves_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(file.tempfile, "tempdir", str(tmp_path))

    with pytest.raises(ValueError, match="outside of its folder"):
        list(compressed(zipped({"../evil": b""})))

    assert list(tmp_path.iterdir()) == []
