"""Wheels are chosen for the host's platform, checked against the index's hashes, and downloaded once."""

from __future__ import annotations

import hashlib
import http.server
import threading
from typing import TYPE_CHECKING

import pytest

from fal_agent.errors import EnvironmentBuildError
from fal_notebook.hosts.platforms import Platform
from fal_notebook.hosts.wheels import Wheel, chosen_wheels, downloaded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONTENT = b"a wheel"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def platform(machine: str, libc: str = "glibc 2.28") -> Platform:
    return Platform.of("box", system="Linux", machine=machine, libc=libc)


@pytest.mark.parametrize(
    ("machine", "libc", "tag"),
    [
        ("x86_64", "glibc 2.28", "manylinux"),
        ("aarch64", "glibc 2.28", "manylinux"),
        ("x86_64", "musl 1.2.3", "musllinux"),
    ],
)
def test_the_wheels_are_those_of_the_hosts_platform(machine: str, libc: str, tag: str) -> None:
    wheels = chosen_wheels(
        [["markupsafe==3.0.3"], ["packaging"]], python="3.11", target=platform(machine, libc)
    )

    names = sorted(wheel.name for wheel in wheels)
    assert names[0].startswith("markupsafe-3.0.3-cp311-")
    assert tag in names[0]
    assert machine in names[0]
    assert names[1].startswith("packaging-")
    assert all(len(wheel.sha256) == 64 and wheel.size > 0 for wheel in wheels)


def test_what_has_no_wheel_is_told_with_the_platform() -> None:
    with pytest.raises(EnvironmentBuildError, match=r"no wheels for Linux x86_64, glibc 2\.28"):
        chosen_wheels([["fal-notebook-tests-no-such-thing"]], python="3.11", target=platform("x86_64"))


@pytest.fixture
def index() -> Iterator[tuple[str, list[str]]]:
    """A server that gives every file the same content; its address, and what was asked of it."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404 if "missing" in self.path else 200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAL_NOTEBOOK_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("cache")
def test_a_wheel_is_downloaded_once(index: tuple[str, list[str]]) -> None:
    wheel = Wheel(
        "a-1-py3-none-any.whl", f"{index[0]}/a.whl", len(CONTENT), hashlib.sha256(CONTENT).hexdigest()
    )

    files = [downloaded(wheel, stop=lambda: False) for _ in range(2)]

    assert files[0] == files[1]
    assert files[0].read_bytes() == CONTENT
    assert index[1] == ["/a.whl"]


@pytest.mark.parametrize(
    ("path", "digest", "words"),
    [
        ("a.whl", "0" * 64, "damaged"),
        ("missing.whl", hashlib.sha256(CONTENT).hexdigest(), "could not be downloaded"),
    ],
)
def test_what_is_not_what_the_index_says_is_not_kept(
    index: tuple[str, list[str]], cache: Path, path: str, digest: str, words: str
) -> None:

    with pytest.raises(EnvironmentBuildError, match=words):
        downloaded(Wheel("a-1-py3-none-any.whl", f"{index[0]}/{path}", 7, digest), stop=lambda: False)

    assert [item for item in cache.rglob("*") if item.is_file()] == []
