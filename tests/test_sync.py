"""App files: which are found, which are skipped, which are refused."""

from __future__ import annotations

import os
import socket
import tempfile
import time
import warnings
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from blake3 import blake3

from fal_agent.errors import AppFileUploadException, FileTooLargeError
from fal_notebook import sync
from fal_notebook.options import DEFAULT_APP_FILES_IGNORE
from fal_notebook.sync import FILE_LIMIT, collect_app_files, read_app_files

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """A folder with a few files; `outside` lies beside it."""
    folder = tmp_path / "context"
    for name in (
        "main.py",
        "data/a.csv",
        "data/deep/b.csv",
        "data/deep/c.pyc",
        "__pycache__/m.cpython-311.pyc",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret", encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def names(context: Path, *app_files: str, ignore: tuple[str, ...] = ()) -> list[str]:
    return [file.relative_path for file in collect_app_files(app_files, ignore=ignore, context_dir=context)]


@contextmanager
def readable_by(path: Path, mode: int) -> Iterator[None]:
    """Take rights from a path, and from us the power to ignore that."""
    path.chmod(mode)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        path.chmod(0o755)


@pytest.fixture
def public() -> Iterator[Path]:
    """A context folder that any user can reach; pytest's own is for its owner alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
        (folder / "other").write_text("y")
        yield folder


# ---------------------------------------------------------------- what is found


def test_files_and_folders_are_found(context: Path) -> None:
    assert names(context, "main.py", "data") == [
        "data/a.csv",
        "data/deep/b.csv",
        "data/deep/c.pyc",
        "main.py",
    ]


def test_a_file_is_described_by_content_mode_and_size(context: Path) -> None:
    (context / "main.py").chmod(0o750)

    [file] = collect_app_files(["main.py"], context_dir=context)

    assert file.relative_path == "main.py"
    assert file.path == context / "main.py"
    assert (file.mode, file.size) == (0o750, 7)
    assert file.digest == blake3(b"main.py").hexdigest()


def test_nothing_named_is_nothing_found(context: Path) -> None:
    assert names(context) == []


def test_the_context_itself_may_be_named(context: Path) -> None:
    assert names(context, ".", ignore=(r"\.pyc$",)) == ["data/a.csv", "data/deep/b.csv", "main.py"]


def test_the_context_is_the_working_folder_if_not_said(
    context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(context / "data")

    assert [file.relative_path for file in collect_app_files(["a.csv"])] == ["a.csv"]


def test_a_context_that_is_not_there_is_an_error(context: Path) -> None:
    with pytest.raises(AppFileUploadException, match="set app_files_context_dir"):
        names(context / "main.py", "x")


def test_each_file_is_found_once(context: Path) -> None:
    app_files = ["data", "data/a.csv", "./data/../data/a.csv", str(context / "data" / "a.csv"), "data/"]

    assert names(context, *app_files, ignore=("deep/",)) == ["data/a.csv"]


def test_an_absolute_path_may_be_written_through_the_contexts_real_path(
    context: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(context)

    assert names(tmp_path / "link", str(context / "main.py")) == ["main.py"]


def test_names_of_any_kind_are_kept(context: Path) -> None:
    for name in ("with space", "é", "new\nline", "..dots", "-x"):
        (context / "odd").mkdir(exist_ok=True)
        (context / "odd" / name).write_text(name)

    assert names(context, "odd") == sorted(
        f"odd/{name}" for name in ("with space", "é", "new\nline", "..dots", "-x")
    )


# ---------------------------------------------------------------- ignoring


def test_the_default_patterns_leave_out_what_nobody_wants(context: Path) -> None:
    (context / ".git").mkdir()
    (context / ".git" / "config").write_text("x")

    assert names(context, ".", ignore=DEFAULT_APP_FILES_IGNORE) == [
        "data/a.csv",
        "data/deep/b.csv",
        "main.py",
    ]


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        (r"deep/", ["data/a.csv"]),
        (r"^data/deep/b", ["data/a.csv", "data/deep/c.pyc"]),
        (r"csv", ["data/deep/c.pyc"]),
        (r"^a\.csv", ["data/a.csv", "data/deep/b.csv", "data/deep/c.pyc"]),
        (r"data", []),
    ],
)
def test_patterns_are_searched_in_the_relative_path(context: Path, pattern: str, left: list[str]) -> None:
    assert names(context, "data", ignore=(pattern,)) == left


def test_an_ignored_folder_is_not_even_opened(public: Path) -> None:
    with readable_by(public / "inner", 0o000):
        assert names(public, ".", ignore=("inner/",)) == ["other"]


# ---------------------------------------------------------------- skipping


def test_a_missing_file_is_mentioned_and_skipped(context: Path) -> None:
    with pytest.warns(UserWarning, match=r"'nothing\.txt' is not in .*skipped"):
        assert names(context, "nothing.txt", "main.py") == ["main.py"]


def test_a_link_to_a_folder_is_not_followed(context: Path) -> None:
    (context / "data" / "link").symlink_to(context / "data" / "deep")

    assert names(context, "data", ignore=("deep/",)) == ["data/a.csv"]


def test_a_named_link_to_a_folder_is_mentioned(context: Path) -> None:
    (context / "link").symlink_to("data")

    with pytest.warns(UserWarning, match="'link' is a link to a folder"):
        assert names(context, "link") == []


def test_a_file_behind_a_link_in_the_path_keeps_the_path_it_was_named_by(context: Path) -> None:
    (context / "link").symlink_to("data")

    assert names(context, "link/a.csv") == ["link/a.csv"]


def test_dangling_and_cyclic_links_are_skipped(context: Path) -> None:
    (context / "data" / "dangling").symlink_to("nowhere")
    (context / "data" / "one").symlink_to("two")
    (context / "data" / "two").symlink_to("one")
    (context / "data" / "self").symlink_to(".")

    assert names(context, "data", ignore=("deep/",)) == ["data/a.csv"]


def test_a_named_dangling_link_is_mentioned(context: Path) -> None:
    (context / "dangling").symlink_to("nowhere")

    with pytest.warns(UserWarning, match="'dangling' is not in"):
        assert names(context, "dangling") == []


def test_a_link_to_a_file_inside_is_sent_as_that_file(context: Path) -> None:
    (context / "data" / "link").symlink_to(context / "main.py")

    [file] = collect_app_files(["data/link"], context_dir=context)

    assert (file.relative_path, file.size) == ("data/link", 7)


def test_unreadable_folders_are_mentioned_and_skipped(public: Path) -> None:
    with readable_by(public / "inner", 0o000), pytest.warns(UserWarning, match="inner cannot be read"):
        assert names(public, ".") == ["other"]


def test_unreadable_files_are_mentioned_and_skipped(public: Path) -> None:
    with readable_by(public / "other", 0o000), pytest.warns(UserWarning, match="other cannot be read"):
        assert names(public, ".") == ["inner/file"]


def test_a_file_in_an_unreadable_folder_is_mentioned_and_skipped(public: Path) -> None:
    with readable_by(public / "inner", 0o000), pytest.warns(UserWarning, match="'inner/file' is not in"):
        assert names(public, "inner/file", "other") == ["other"]


def test_what_is_no_file_is_skipped_without_being_opened(context: Path) -> None:
    """Opening a pipe that nobody writes to would wait for ever."""
    os.mkfifo(context / "data" / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(context / "data" / "socket"))
        with pytest.warns(UserWarning, match="is not a regular file") as mentioned:
            assert names(context, "data", ignore=("deep/",)) == ["data/a.csv"]

    assert len(mentioned) == 2


# ---------------------------------------------------------------- refusing


@pytest.mark.parametrize("name", ["../outside/secret", "..", "data/../../outside", "/etc/passwd"])
def test_a_path_out_of_the_context_is_refused(context: Path, name: str) -> None:
    with pytest.raises(AppFileUploadException, match="out of the context folder") as caught:
        names(context, name)

    assert caught.value.relative_path == name


@pytest.mark.parametrize("named", ["data", "data/link", "."])
def test_a_link_out_of_the_context_is_refused_with_the_pattern_that_ignores_it(
    context: Path, tmp_path: Path, named: str
) -> None:
    (context / "data" / "link").symlink_to(tmp_path / "outside" / "secret")

    with pytest.raises(AppFileUploadException, match="out of the context folder") as caught:
        names(context, named)

    assert caught.value.relative_path == "data/link"
    assert str(tmp_path / "outside" / "secret") in str(caught.value)
    pattern = str(caught.value).split("add '")[1].split("'")[0].replace("\\\\", "\\")
    assert "data/link" not in names(context, named, ignore=(pattern,))


def test_a_path_through_a_link_out_of_the_context_is_refused(context: Path, tmp_path: Path) -> None:
    (context / "link").symlink_to(tmp_path / "outside")

    with pytest.raises(AppFileUploadException, match="out of the context folder"):
        names(context, "link/secret")


def test_a_folder_whose_name_begins_like_the_contexts_is_outside(context: Path, tmp_path: Path) -> None:
    (tmp_path / "context-2").mkdir()
    (tmp_path / "context-2" / "file").write_text("x")
    (context / "link").symlink_to(tmp_path / "context-2" / "file")

    with pytest.raises(AppFileUploadException):
        names(context, "link")


def test_a_file_of_more_than_a_gibibyte_is_refused(context: Path) -> None:
    """Before it is read: the file here has holes, and would take no time to make but long to hash."""
    with (context / "data" / "huge").open("wb") as file:
        file.truncate(FILE_LIMIT + 1)

    with pytest.raises(FileTooLargeError, match=r"huge has 1073741825 bytes.*app_files_ignore"):
        names(context, "data")


def test_two_files_on_one_relative_path_are_refused(context: Path) -> None:
    """`link/../a.csv` is a file of the folder above the link's target, yet reads as `a.csv`."""
    (context / "a.csv").write_text("mine")
    (context / "link").symlink_to("data/deep")

    assert collect_app_files(["link/../a.csv"], context_dir=context)[0].size == len("data/a.csv")
    with pytest.raises(AppFileUploadException, match=r"would both be 'a\.csv'"):
        names(context, "a.csv", "link/../a.csv")


# ---------------------------------------------------------------- digests


def settle(path: Path) -> None:
    """Make a file look as if it had not been touched for a while, as far as a user can."""
    os.utime(path, (time.time() - 100, time.time() - 100))


def test_an_edit_is_seen_even_if_size_and_time_stay_the_same(context: Path) -> None:
    path = context / "main.py"
    settle(path)
    before = path.stat()
    [first] = collect_app_files(["main.py"], context_dir=context)

    path.write_text("MAIN.py")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    [second] = collect_app_files(["main.py"], context_dir=context)

    assert first.size == second.size
    assert second.digest == blake3(b"MAIN.py").hexdigest() != first.digest


def test_a_settled_file_is_read_once(context: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = context / "main.py"
    read: list[Path] = []
    original = sync._digest
    monkeypatch.setattr(sync, "_digest", lambda path: (read.append(path), original(path))[1])
    monkeypatch.setattr(sync, "_SETTLED", 0)

    first = collect_app_files(["main.py"], context_dir=context)
    second = collect_app_files(["main.py"], context_dir=context)
    path.chmod(0o700)
    third = collect_app_files(["main.py"], context_dir=context)

    assert first == second
    assert third[0].mode == 0o700
    assert read == [path, path]  # the second time because of the change of mode


def test_a_fresh_file_is_read_again(context: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two edits within one tick of the clock leave the same time stamps."""
    monkeypatch.setattr(sync, "_SETTLED", 10**18)
    path = context / "main.py"
    collect_app_files(["main.py"], context_dir=context)

    assert not [key for key in sync._digests if key[0] == str(path)]


def test_the_memory_of_digests_is_bounded(context: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "_digests", {})
    monkeypatch.setattr(sync, "_SETTLED", 0)
    monkeypatch.setattr(sync, "_REMEMBERED", 2)

    collect_app_files(["."], context_dir=context)

    assert len(sync._digests) == 2


# ---------------------------------------------------------------- contents


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing kept, and four bytes are a small file."""
    monkeypatch.setattr(sync, "_contents", OrderedDict())
    monkeypatch.setattr(sync, "_SMALL", 4)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("content", [b"", b"tiny", b"not tiny", b"x" * 3_000_001])
def test_contents_are_blobs_named_by_their_digest(context: Path, content: bytes) -> None:
    (context / "main.py").write_bytes(content)
    (context / "main.py").chmod(0o640)

    listed, blobs = read_app_files(collect_app_files(["main.py"], context_dir=context))

    blob = f"b3-{blake3(content).hexdigest()}"
    assert listed == [["main.py", blob, 0o640]]
    assert [(name, bytes(data)) for name, data in blobs.items()] == [(blob, content)]


@pytest.mark.usefixtures("fresh")
def test_equal_files_are_one_blob(context: Path) -> None:
    (context / "data" / "a.csv").write_text("same")
    (context / "main.py").write_text("same")

    listed, blobs = read_app_files(collect_app_files(["data/a.csv", "main.py"], context_dir=context))

    assert (len(listed), len(blobs)) == (2, 1)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("content", [b"old", b"old, and longer"])
def test_a_file_cut_short_afterwards_does_not_change_its_blob(context: Path, content: bytes) -> None:
    """Reading a mapped file that was cut would kill the kernel by a bus error."""
    (context / "main.py").write_bytes(content)
    _, blobs = read_app_files(collect_app_files(["main.py"], context_dir=context))

    (context / "main.py").write_bytes(b"")

    assert [bytes(data) for data in blobs.values()] == [content]


@pytest.mark.usefixtures("fresh")
def test_a_file_that_changed_since_it_was_collected_has_the_name_of_what_is_sent(context: Path) -> None:
    """A blob under another's name would reach every later call that wants the other."""
    files = collect_app_files(["main.py"], context_dir=context)
    (context / "main.py").write_text("something new")

    listed, blobs = read_app_files(files)

    assert listed[0][1] == f"b3-{blake3(b'something new').hexdigest()}"
    assert list(blobs) == [listed[0][1]]


@pytest.mark.usefixtures("fresh")
def test_a_file_that_is_gone_is_an_error_with_its_name(context: Path) -> None:
    files = collect_app_files(["main.py"], context_dir=context)
    (context / "main.py").unlink()

    with pytest.raises(AppFileUploadException, match=r"main\.py cannot be read") as caught:
        read_app_files(files)

    assert caught.value.relative_path == "main.py"


@pytest.mark.usefixtures("fresh")
def test_what_is_kept_for_the_next_call_is_bounded_and_the_oldest_goes_first(
    context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "_MEMORY", 6)
    monkeypatch.setattr(sync, "_DISK", 20)
    contents = {"a": b"aaa", "b": b"bbb", "c": b"ccc", "d": b"d" * 10, "e": b"e" * 15}
    for name, content in contents.items():
        (context / name).write_bytes(content)
        read_app_files(collect_app_files([name], context_dir=context))
        if name == "b":  # use "a" once more
            read_app_files(collect_app_files(["a"], context_dir=context))

    assert [bytes(content) for content in sync._contents.values()] == [b"aaa", b"ccc", b"e" * 15]
