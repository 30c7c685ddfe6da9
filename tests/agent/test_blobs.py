"""A blob is there whole or not at all, whoever sends it, and the disk has the last word."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections import namedtuple
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from fal_agent.errors import ProtocolError, ResourceError
from fal_agent.server import blobs as blobs_module
from fal_agent.server.blobs import SPARE_BYTES, STALE_SECONDS, BlobStore
from fal_agent.server.proc import identity

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DEAD = identity().rsplit(".", 1)[0] + ".1"


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def put(store: BlobStore, name: str, data: bytes, part: int = 1000, writer: str = "") -> None:
    for offset in range(0, max(len(data), 1), part):
        whole = store.write(name, offset, len(data), data[offset : offset + part], writer=writer)
        assert whole is (offset + part >= len(data))


def content(store: BlobStore, name: str, part: int = 777) -> bytes:
    return b"".join(data for _, _, data in store.parts_with_size(name, part))


def incoming(store: BlobStore) -> list[Path]:
    return list(store.root.rglob("incoming/*"))


def age(store: BlobStore, name: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(store.root / name, (then, then))


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 54321])
def test_what_is_written_in_parts_is_read_in_parts(store: BlobStore, size: int) -> None:
    data = random.Random(size).randbytes(size)

    put(store, "b3-Aa_0", data)

    parts = list(store.parts_with_size("b3-Aa_0", 777))
    assert b"".join(piece for _, _, piece in parts) == data
    assert [offset for offset, _, _ in parts] == list(range(0, max(size, 1), 777))
    assert {whole for _, whole, _ in parts} == {size}
    assert store.size("b3-Aa_0") == size
    assert store.path("b3-Aa_0").read_bytes() == data


def test_a_blob_is_not_there_before_its_last_part(store: BlobStore) -> None:
    assert store.write("a", 0, 4, b"12") is False
    assert (store.has("a"), store.path("a"), store.size("a")) == (False, None, None)

    assert store.write("a", 2, 4, b"34") is True
    assert store.has("a")
    assert incoming(store) == []


def test_parts_of_many_blobs_may_come_in_turn(store: BlobStore) -> None:
    for offset in range(0, 1000, 10):
        for name in ("a", "b", "c"):
            store.write(name, offset, 1000, name.encode() * 10)

    assert [content(store, name) for name in ("a", "b", "c")] == [b"a" * 1000, b"b" * 1000, b"c" * 1000]


def test_any_kind_of_buffer_may_be_written(store: BlobStore) -> None:
    store.write("a", 0, 6, bytearray(b"123"))
    store.write("a", 3, 6, memoryview(b"xx456xx")[2:5])

    assert content(store, "a") == b"123456"


@pytest.mark.parametrize(
    ("offset", "size", "data"),
    [
        (5, 10, b"12345"),  # a hole
        (3, 10, b"45678"),  # backwards
        (4, 11, b"5"),  # another size
        (4, 10, b"1234567"),  # beyond the end
        (4, 10, b""),  # nothing
        (-1, 10, b"1"),
    ],
)
def test_a_part_out_of_order_is_refused_and_the_blob_forgotten(
    store: BlobStore, offset: int, size: int, data: bytes
) -> None:
    store.write("a", 0, 10, b"1234")

    with pytest.raises(ProtocolError, match="blob a: a part at"):
        store.write("a", offset, size, data)

    assert incoming(store) == []
    put(store, "a", b"0123456789")
    assert content(store, "a") == b"0123456789"


def test_a_sender_that_gave_up_half_way_may_begin_anew(store: BlobStore) -> None:
    store.write("a", 0, 10, b"1234")

    put(store, "a", b"0123456789")

    assert content(store, "a") == b"0123456789"
    assert incoming(store) == []


@pytest.mark.parametrize(
    ("offset", "size", "data"), [(1, 3, b"23"), (0, -1, b""), (0, 2, b"123"), (0, 5, b"")]
)
def test_a_first_part_must_be_one(store: BlobStore, offset: int, size: int, data: bytes) -> None:
    with pytest.raises(ProtocolError):
        store.write("a", offset, size, data)
    assert incoming(store) == []
    assert not store.has("a")


def test_parts_of_a_blob_that_is_there_are_passed_over(store: BlobStore) -> None:
    put(store, "a", b"first one")
    age(store, "a", 9999)

    put(store, "a", b"other one", part=4)

    assert content(store, "a") == b"first one"
    assert time.time() - store.path("a").stat().st_mtime < 100, "it counts as used"


def test_a_blob_of_another_size_is_damaged_and_replaced(store: BlobStore) -> None:
    (store.root / "a").write_bytes(b"half")

    put(store, "a", b"all of it", part=4)

    assert content(store, "a") == b"all of it"


def test_two_who_send_the_same_blob_at_once_do_not_meet(store: BlobStore) -> None:
    data = random.Random(1).randbytes(100_000)
    threads = [threading.Thread(target=put, args=(store, "a", data, 500, f"w{n}")) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert content(store, "a") == data
    assert incoming(store) == []


def test_an_unfinished_blob_waits_for_whoever_goes_on_with_it(store: BlobStore) -> None:
    store.write("a", 0, 10, b"012", writer="one/1")
    store.abandon("one/1")

    assert not store.has("a")
    assert store.arrived("a", 11, writer="two/1") == 0  # another size
    assert store.arrived("a", 10, writer="two/1") == 3
    assert store.write("a", 3, 10, b"3456789", writer="two/1")
    assert content(store, "a") == b"0123456789"
    assert store.arrived("a", 10, writer="three/1") == 10
    assert incoming(store) == []


def test_a_client_goes_on_with_what_an_earlier_connection_of_it_began(store: BlobStore) -> None:
    """The host may not have noticed yet that the earlier one is gone, and gets the end of what it sent."""
    store.write("a", 0, 10, b"0123", writer="one/1")

    assert store.arrived("a", 10, writer="two/1") == 0  # somebody else's
    assert store.arrived("a", 10, writer="one/2") == 4
    with pytest.raises(ProtocolError):
        store.write("a", 4, 10, b"45", writer="one/1")
    store.abandon("one/1")

    assert store.arrived("a", 10, writer="one/2") == 4
    assert store.write("a", 4, 10, b"456789", writer="one/2")


def test_the_longest_piece_is_kept_and_who_begins_anew_may(store: BlobStore) -> None:
    for number, piece in enumerate((b"01", b"0123", b"0")):
        store.write("a", 0, 10, piece, writer=f"one/{number}")
        store.abandon(f"one/{number}")

    assert len(incoming(store)) == 1
    put(store, "a", b"0123456789", part=4, writer="two/1")
    assert content(store, "a") == b"0123456789"
    assert store.arrived("b", 10, writer="two/1") == 0


def test_what_was_left_goes_when_nobody_comes_or_room_is_short(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        store.write(name, 0, 10, b"012", writer="one/1")
        store.abandon("one/1")
    (first, _) = incoming(store)
    long_ago = time.time() - 2 * STALE_SECONDS
    os.utime(first, (long_ago, long_ago))

    store.prune()
    assert not first.exists()
    assert len(incoming(store)) == 1

    usage = shutil.disk_usage(store.root)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=SPARE_BYTES + 5))
    with pytest.raises(ResourceError):
        store.write("c", 0, 10, b"0", writer="two/1")
    assert incoming(store) == []


@pytest.mark.parametrize(
    "name", ["", "..", "a/b", "../a", "/etc/passwd", "a.b", ".boot", "ä", "a\n", "a\0", "x" * 129, "a b", "*"]
)
def test_a_name_cannot_lead_out_of_the_folder(store: BlobStore, name: str) -> None:
    for use in (store.path, store.has, store.size, store.outbox, lambda n: store.remove([n])):
        with pytest.raises(ProtocolError, match="cannot be a blob's name"):
            use(name)
    with pytest.raises(ProtocolError):
        store.write(name, 0, 1, b"x")
    with pytest.raises(ProtocolError):
        store.parts_with_size(name, 10)


def test_what_is_no_ordinary_file_is_no_blob(store: BlobStore, tmp_path: Path) -> None:
    """A link would show files of the user's as data, a pipe would hold up the agent."""
    (tmp_path / "secret").write_bytes(b"secret")
    (store.root / "link").symlink_to(tmp_path / "secret")
    (store.root / "folder").mkdir()
    os.mkfifo(store.root / "pipe")

    for name in ("link", "folder", "pipe"):
        assert not store.has(name)
        assert store.path(name) is None
    with pytest.raises(ResourceError):
        store.parts_with_size("link", 10)


def test_a_link_in_a_blobs_place_is_not_followed_when_writing(store: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    (store.root / "a").symlink_to(tmp_path / "mine")

    put(store, "a", b"data")

    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert content(store, "a") == b"data"


def test_a_blob_that_is_gone_says_what_to_do(store: BlobStore) -> None:
    with pytest.raises(ResourceError, match=r"blob gone is not on this host any more.*run the call again"):
        store.parts_with_size("gone", 10)


def test_a_blob_that_is_removed_while_it_is_read_is_read_to_its_end(store: BlobStore) -> None:
    put(store, "a", b"0123456789")
    parts = store.parts_with_size("a", 4)
    next(parts)

    store.remove(["a", "never-was"])

    assert not store.has("a")
    assert [data for _, _, data in parts] == [b"4567", b"89"]


# ---------------------------------------------------------------- results


def test_a_finished_file_becomes_a_blob_without_being_copied(store: BlobStore) -> None:
    file = store.outbox("w1") / "result"
    file.write_bytes(b"large")
    inode = file.stat().st_ino

    name = store.adopt(file)

    assert not file.exists()
    assert store.path(name).stat().st_ino == inode
    assert content(store, name) == b"large"


def test_two_results_never_have_the_same_name(store: BlobStore) -> None:
    names = set()
    for _ in range(3):
        file = store.outbox("w1") / "result"
        file.write_bytes(b"the same")
        names.add(store.adopt(file))

    assert len(names) == 3


def test_only_ordinary_files_in_an_outbox_are_adopted(store: BlobStore, tmp_path: Path) -> None:
    """A worker must not make the agent hand out, or take away, other files."""
    outbox = store.outbox("w1")
    (tmp_path / "secret").write_bytes(b"secret")
    (outbox / "link").symlink_to(tmp_path / "secret")
    (outbox / "folder").mkdir()
    (store.root / "blob").write_bytes(b"x")

    for path in [
        tmp_path / "secret",
        outbox / "link",
        outbox / "folder",
        outbox / "missing",
        outbox / "..",
        outbox / ".." / ".." / "incoming",
        outbox.parent / ".." / "incoming",
        store.root / "blob",
    ]:
        with pytest.raises(ProtocolError):
            store.adopt(path)
    assert (tmp_path / "secret").exists()


def test_an_outbox_is_made_once_and_removed_with_what_is_in_it(store: BlobStore) -> None:
    outbox = store.outbox("w1")
    (outbox / "left").write_bytes(b"x")
    assert store.outbox("w1") == outbox

    store.clear_outbox("w1")
    store.clear_outbox("w1")

    assert not outbox.exists()
    assert store.outbox("w1").is_dir()


# ---------------------------------------------------------------- room


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_blob_that_cannot_fit_is_refused_at_its_first_part(store: BlobStore) -> None:
    """Not after hours of sending; and once, while the parts already on their way are passed over."""
    size = 1 << 60
    with pytest.raises(ResourceError, match=f"{size:,} bytes of data cannot be kept in .*free some space"):
        store.write("a", 0, size, b"x")

    assert store.write("a", 1, size, b"x") is False
    assert store.write("a", size - 1, size, b"x") is False
    assert not store.has("a")
    with pytest.raises(ResourceError):
        store.write("a", 0, size, b"x")
    put(store, "a", b"smaller")
    assert content(store, "a") == b"smaller"


def test_room_that_is_promised_is_not_promised_twice(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(blobs_module.shutil, "disk_usage", lambda _: usage(0, 0, SPARE_BYTES + 1000))

    store.write("a", 0, 600, b"x" * 100)
    with pytest.raises(ResourceError, match="room for 500 bytes"):
        store.write("b", 0, 600, b"x" * 100)
    store.write("c", 0, 500, b"x" * 100)


def test_a_disk_that_fails_while_a_blob_is_written_leaves_nothing(store: BlobStore) -> None:
    with no_file_larger_than(100_000):
        store.write("a", 0, 300_000, b"x" * 90_000)
        with pytest.raises(ResourceError, match="cannot be kept"):
            store.write("a", 90_000, 300_000, b"x" * 90_000)
        assert store.write("a", 180_000, 300_000, b"x" * 90_000) is False
    assert incoming(store) == []
    assert not store.has("a")


def test_prune_removes_what_was_used_longest_ago_beyond_the_budget(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, budget_bytes=3000)
    for number in range(6):
        put(store, f"b{number}", b"x" * 1000)
        age(store, f"b{number}", 10_000 - number)
    store.path("b0")

    removed = store.prune({"b2"})

    assert removed == ["b1", "b3", "b4"]
    assert sorted(path.name for path in tmp_path.glob("b*")) == ["b0", "b2", "b5"]


def test_a_blob_used_a_moment_ago_is_not_pruned(tmp_path: Path) -> None:
    """Another agent may just have told a worker its path."""
    store = BlobStore(tmp_path, budget_bytes=0)
    put(store, "a", b"x")

    assert store.prune() == []
    assert store.has("a")


def test_prune_removes_what_dead_agents_left_and_nothing_of_the_living(tmp_path: Path) -> None:
    dead, living = BlobStore(tmp_path, agent=DEAD), BlobStore(tmp_path)
    for store in (dead, living):
        store.write("half", 0, 10, b"1")
        (store.outbox("w1") / "result").write_bytes(b"x")
    put(dead, "whole", b"whole")
    (tmp_path / "strange.tmp").write_bytes(b"x")
    os.utime(tmp_path / "strange.tmp", (1, 1))

    living.prune()

    assert [path.name for path in (tmp_path / ".writers").iterdir()] == [identity()]
    assert living.write("half", 1, 10, b"123456789")
    assert living.adopt(living.outbox("w1") / "result")
    assert content(living, "whole") == b"whole"
    assert not (tmp_path / "strange.tmp").exists()


def test_after_a_boot_only_blobs_that_reached_the_disk_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blob cut short by a power failure would be taken for whole, being under its name."""
    store = BlobStore(tmp_path)
    put(store, "safe", b"safe")
    store.prune()
    put(store, "new", b"new")
    BlobStore(tmp_path)
    assert store.has("new"), "the machine has not started anew"

    monkeypatch.setattr(blobs_module, "boot_id", lambda: "another boot")
    later = BlobStore(tmp_path)

    assert later.has("safe")
    assert not later.has("new")
    put(later, "new", b"new")
    BlobStore(tmp_path)
    assert later.has("new")


def test_all_of_it_is_the_users_alone(store: BlobStore) -> None:
    old = os.umask(0)
    try:
        put(store, "a", b"x")
        store.write("b", 0, 2, b"x")
        store.outbox("w1")
    finally:
        os.umask(old)

    for path in [store.root, *store.root.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path
