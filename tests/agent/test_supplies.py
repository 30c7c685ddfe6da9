"""What a build lacks is asked of a notebook that can bring it, and what comes is checked before it counts."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import sys
import tarfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fal_agent.errors import CallCancelledError, EnvironmentBuildError
from fal_agent.server.blobs import BlobStore
from fal_agent.server.environments import cache
from fal_agent.server.environments.cache import EnvironmentCache
from fal_agent.server.environments.unreachable import Lacking, UnreachableError, UnreachablePythonError
from fal_agent.server.supplies import Supplies
from fal_agent.wire import EnvironmentSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

LACKING = Lacking("3.11", [["humanize"]], wants_python=False)
ERROR = UnreachableError("uv could not reach it", "log")
WHEEL = b"PK a wheel"
DIGEST = hashlib.sha256(WHEEL).hexdigest()


class Connection:
    """To a notebook."""

    def __init__(self, *, shares_files: bool = False) -> None:
        self.is_open, self.shares_files = True, shares_files
        self.wants: list[Any] = []
        self.asked = threading.Event()

    def send(self, message: Any) -> None:
        self.wants.append(message)
        self.asked.set()


class Run:
    def __init__(self, connection: Connection | None) -> None:
        self.run_id, self.connection = "run", connection


class Preparation:
    """What waits for the build."""

    def __init__(self, *connections: Connection | None) -> None:
        self.runs = [Run(connection) for connection in connections]
        self.cancelled = threading.Event()
        self.stages: list[str] = []

    def stage(self, _phase: str, text: str) -> None:
        self.stages.append(text)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def blobs(tmp_path: Path) -> Iterator[BlobStore]:
    store = BlobStore(tmp_path / "blobs")
    yield store
    store.close() if hasattr(store, "close") else None


@pytest.fixture
def supplies(tmp_path: Path, blobs: BlobStore) -> Supplies:
    return Supplies(tmp_path, blobs)


class Asking(threading.Thread):
    """A build that has found out what it lacks."""

    def __init__(
        self, supplies: Supplies, preparation: Preparation, loop: Any, lacking: Lacking = LACKING
    ) -> None:
        super().__init__(daemon=True)
        self._ask, self._lacking = supplies.asker(preparation, loop), lacking
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._ask(self._lacking, ERROR)
        except BaseException as error:
            self.error = error

    def outcome(self) -> BaseException | None:
        self.join(20)
        assert not self.is_alive()
        return self.error


def put(blobs: BlobStore, name: str, data: bytes) -> str:
    blobs.write(name, 0, len(data), data)
    return name


def test_what_is_brought_lies_where_uv_finds_it(
    supplies: Supplies, blobs: BlobStore, loop: Any, tmp_path: Path
) -> None:
    connection = Connection()
    preparation = Preparation(None, Connection(shares_files=True), connection)
    asking = Asking(supplies, preparation, loop)
    assert connection.asked.wait(10)
    want = connection.wants[0]
    assert (want.python, want.layers, want.wants_python, want.have) == ("3.11", [["humanize"]], False, [])

    assert supplies.missing(["one", "two"]) == ["one", "two"]
    supplies.note(want.request_id, "half way")
    parts = [put(blobs, "one", WHEEL[:4]), put(blobs, "two", WHEEL[4:])]
    supplies.take(want.request_id, [["a-1-py3-none-any.whl", hashlib.sha256(WHEEL).hexdigest(), parts]], "")

    assert asking.outcome() is None
    assert (tmp_path / "wheels" / "a-1-py3-none-any.whl").read_bytes() == WHEEL
    assert preparation.stages == ["half way"]
    assert supplies.missing(["one", "two"]) == []


def test_the_oldest_wheels_make_room_for_new_ones(
    supplies: Supplies, blobs: BlobStore, loop: Any, tmp_path: Path
) -> None:
    supplies.budget_bytes = 2 * len(WHEEL)
    for number in range(4):
        connection = Connection()
        asking = Asking(supplies, Preparation(connection), loop)
        assert connection.asked.wait(10)
        name = f"a-{number}-py3-none-any.whl"
        supplies.take(connection.wants[0].request_id, [[name, DIGEST, [put(blobs, "one", WHEEL)]]], "")
        assert asking.outcome() is None
        os.utime(tmp_path / "wheels" / name, (number, number))

    assert supplies._have() == ["a-2-py3-none-any.whl", "a-3-py3-none-any.whl"]


def test_a_notebook_that_comes_back_is_asked_again(supplies: Supplies, loop: Any) -> None:
    first, second = Connection(), Connection()
    preparation = Preparation(first)
    asking = Asking(supplies, preparation, loop)
    assert first.asked.wait(10)

    first.is_open = False
    preparation.runs[0].connection = second

    assert second.asked.wait(10)
    assert second.wants == first.wants
    supplies.take(second.wants[0].request_id, [], "")
    assert asking.outcome() is None


def test_without_a_notebook_that_can_help_the_error_stays_what_it_was(supplies: Supplies, loop: Any) -> None:
    assert Asking(supplies, Preparation(Connection(shares_files=True)), loop).outcome() is ERROR


def test_why_a_notebook_cannot_help_is_told_with_the_error(supplies: Supplies, loop: Any) -> None:
    connection = Connection()
    asking = Asking(supplies, Preparation(connection), loop)
    assert connection.asked.wait(10)
    supplies.take(connection.wants[0].request_id, [], "no wheels for it")

    assert "could not reach it\nThe notebook could not bring it either: no wheels for it" in str(
        asking.outcome()
    )


def test_a_build_that_is_cancelled_does_not_wait(supplies: Supplies, loop: Any) -> None:
    connection = Connection()
    preparation = Preparation(connection)
    asking = Asking(supplies, preparation, loop)
    assert connection.asked.wait(10)
    preparation.cancelled.set()

    assert isinstance(asking.outcome(), CallCancelledError)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (["../a-1-py3-none-any.whl", DIGEST], "name of no wheel"),
        (["/tmp/a.whl", DIGEST], "name of no wheel"),
        (["a.tar.gz", DIGEST], "name of no wheel"),
        (["a-1-py3-none-any.whl", "0" * 64], "damaged"),
    ],
)
def test_what_is_not_what_it_should_be_is_refused_and_not_kept(
    supplies: Supplies, blobs: BlobStore, loop: Any, file: list[Any], words: str
) -> None:
    connection = Connection()
    preparation = Preparation(connection)
    asking = Asking(supplies, preparation, loop)
    assert connection.asked.wait(10)

    with pytest.raises(EnvironmentBuildError, match=words):
        supplies.take(connection.wants[0].request_id, [[*file, [put(blobs, "one", WHEEL)]]], "")

    assert supplies._have() == []
    preparation.cancelled.set()
    asking.outcome()


def python_archive(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            if data.startswith(b"->"):
                entry.type, entry.linkname, entry.size = tarfile.SYMTYPE, data[2:].decode(), 0
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def bring_python(supplies: Supplies, blobs: BlobStore, loop: Any, data: bytes) -> BaseException | None:
    connection = Connection()
    preparation = Preparation(connection)
    asking = Asking(supplies, preparation, loop, Lacking("3.11", [], wants_python=True))
    assert connection.asked.wait(10)
    name = "cpython-3.11.7-linux-x86_64-gnu.tar.gz"
    file = [name, hashlib.sha256(data).hexdigest(), [put(blobs, f"b{len(data)}", data)]]
    try:
        supplies.take(connection.wants[0].request_id, [file], "")
    finally:
        preparation.cancelled.set()
    return asking.outcome()


def test_a_python_is_unpacked_where_interpreters_are_looked_for(
    supplies: Supplies, blobs: BlobStore, loop: Any, tmp_path: Path
) -> None:
    data = python_archive(
        ("bin/python3.11", b"#!"), ("bin/python3", b"->python3.11"), ("lib/libstdc++.so.6", b"x")
    )

    bring_python(supplies, blobs, loop, data)

    folder = tmp_path / "pythons" / "cpython-3.11.7-linux-x86_64-gnu"
    assert (folder / "bin" / "python3").read_bytes() == b"#!"
    assert (folder / "bin" / "python3.11").stat().st_mode & 0o777 == 0o700
    assert not (folder / "lib").exists()


@pytest.mark.parametrize(
    "member", [("../outside", b"x"), ("/tmp/outside", b"x"), ("bin/x", b"->../../outside")]
)
def test_a_python_with_paths_that_lead_elsewhere_is_refused(
    supplies: Supplies, blobs: BlobStore, loop: Any, tmp_path: Path, member: tuple[str, bytes]
) -> None:
    with pytest.raises(EnvironmentBuildError, match="has no place in a Python"):
        bring_python(supplies, blobs, loop, python_archive(("bin/python3.11", b"#!"), member))

    assert not (tmp_path / "outside").exists()
    assert [path.name for path in (tmp_path / "pythons").iterdir()] == []


# ---------------------------------------------------------------- the build's side


class Builds:
    """Stands for what builds: fails as often as it is told, and notes from what it was to build."""

    def __init__(self, *failures: Exception) -> None:
        self.failures, self.from_wheels = list(failures), []

    def __call__(self, _folders: Any, uv: Any, _job: Any) -> Any:
        self.from_wheels.append(uv.is_from_wheels)
        return self

    def build(self) -> str:
        if self.failures:
            raise self.failures.pop(0)
        return "built"


class FakeUv:
    program = Path(sys.executable)

    def __init__(self, *, is_from_wheels: bool = False) -> None:
        self.is_from_wheels = is_from_wheels

    def with_wheels(self, _folder: Path) -> FakeUv:
        return FakeUv(is_from_wheels=True)

    def keep_cache_near(self, _root: Path) -> None: ...


def build(root: Path, builds: Builds, monkeypatch: pytest.MonkeyPatch, supply: Any) -> Any:
    monkeypatch.setattr(cache, "Builder", builds)
    environments = EnvironmentCache(root, FakeUv)  # type: ignore[arg-type]
    return environments.build(
        EnvironmentSpec("3.11", [["humanize"]]),
        stage=lambda *_: None,
        log=lambda _: None,
        cancelled=threading.Event(),
        supply=supply,
    )


def test_only_a_host_that_reaches_no_index_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Lacking] = []
    builds = Builds(EnvironmentBuildError("these requirements conflict", ""))

    with pytest.raises(EnvironmentBuildError, match="conflict"):
        build(tmp_path, builds, monkeypatch, lambda lacking, _: asked.append(lacking))

    assert asked == []


def test_a_python_is_asked_for_first_then_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    builds = Builds(UnreachablePythonError("no Python", ""), UnreachableError("no index", ""))

    built = build(tmp_path, builds, monkeypatch, lambda lacking, _: asked.append(lacking.wants_python))

    assert (built, asked) == ("built", [True, False])
    assert builds.from_wheels == [False, False, True]


def test_a_host_with_an_index_that_cannot_download_a_python_is_brought_that_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    for failures in ([UnreachablePythonError("no Python", "")], []):  # the second time it is there
        builds = Builds(*failures)
        build(tmp_path, builds, monkeypatch, lambda lacking, _: asked.append(lacking.wants_python))
        assert not any(builds.from_wheels)

    assert asked == [True]


def test_a_host_that_was_cut_off_a_moment_ago_does_not_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path, Builds(UnreachableError("no index", "")), monkeypatch, lambda *_: None)
    builds = Builds(EnvironmentBuildError("not among the wheels", ""))

    assert build(tmp_path, builds, monkeypatch, lambda *_: None) == "built"
    assert builds.from_wheels == [True, True]
