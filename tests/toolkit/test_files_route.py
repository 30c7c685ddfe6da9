"""The store over HTTP, from a real server."""

from __future__ import annotations

import hashlib
import http.client
import io
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from fal_agent.runtime.toolkit.files import keep
from fal_agent.serving.files import FILES_PATH, files_route
from fal_notebook.toolkit import File

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEXT = b"0123456789" * 100
DIGEST = hashlib.sha256(TEXT).hexdigest()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    app = Starlette(routes=[Mount(FILES_PATH, files_route())])
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(20)


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def test_a_file_is_fetched_by_its_url(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the bytes in the app to the bytes at whoever called it."""
    monkeypatch.setenv("FAL_FILES_URL", f"http://127.0.0.1:{port}{FILES_PATH}")
    url = File.from_bytes(TEXT, file_name="a b\xe9.txt").url
    assert url.startswith(f"http://127.0.0.1:{port}/")

    status, headers, body = ask(port, url.partition(str(port))[2])

    assert (status, body) == (200, TEXT)
    assert headers["content-type"].startswith("text/plain")
    assert headers["content-length"] == str(len(TEXT))
    assert headers["etag"] == f'"{DIGEST}"'


@pytest.mark.parametrize(
    ("name", "content_type"),
    [("a.png", "image/png"), ("a.mp4", "video/mp4"), ("a", "application/octet-stream")],
)
def test_the_name_tells_the_type(port: int, name: str, content_type: str) -> None:
    keep(io.BytesIO(TEXT), name)

    assert ask(port, f"{FILES_PATH}/{DIGEST}/{name}")[1]["content-type"] == content_type


def test_a_page_that_somebody_uploaded_does_not_run_as_the_apps(port: int) -> None:
    keep(io.BytesIO(TEXT), "a.html")

    headers = ask(port, f"{FILES_PATH}/{DIGEST}/a.html")[1]

    assert headers["content-security-policy"] == "sandbox"
    assert headers["x-content-type-options"] == "nosniff"


def test_head_tells_the_size_without_the_content(port: int) -> None:
    keep(io.BytesIO(TEXT), "a")

    status, headers, body = ask(port, f"{FILES_PATH}/{DIGEST}/a", "HEAD")

    assert (status, headers["content-length"], body) == (200, "1000", b"")


@pytest.mark.parametrize(
    ("asked", "status", "body"),
    [
        ("bytes=0-9", 206, TEXT[:10]),
        ("bytes=990-", 206, TEXT[990:]),
        ("bytes=-5", 206, TEXT[-5:]),
        ("bytes=2000-", 416, None),
    ],
)
def test_a_part_of_a_file_is_fetched(port: int, asked: str, status: int, body: bytes | None) -> None:
    keep(io.BytesIO(TEXT), "a")

    found = ask(port, f"{FILES_PATH}/{DIGEST}/a", Range=asked)

    assert found[0] == status
    assert body is None or found[2] == body


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/",
            f"/{DIGEST}",
            f"/{DIGEST}/",
            f"/{DIGEST}/none",
            f"/{DIGEST}/a/",
            f"/{DIGEST}/link",
            "/x/a",
        ),
        *(
            f"/{DIGEST}/../{DIGEST}/a",
            f"/{DIGEST}/%2e%2e/{DIGEST}/a",
            f"/{DIGEST}/..%2f..%2f..%2f..%2fsecret",
        ),
        *(
            f"/{'0' * 64}/secret",
            f"/{DIGEST}/.hidden",
            f"/{DIGEST}/a%00",
            "//etc/passwd",
            f"/{DIGEST}/folder",
        ),
    ],
)
def test_everything_else_is_not_found(port: int, path: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    folder = keep(io.BytesIO(TEXT), "a").path.parent
    (folder / ".hidden").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "folder").mkdir()
    (folder.parent / ("0" * 64)).symlink_to(tmp_path)

    for method in ("GET", "HEAD"):
        status, _headers, body = ask(port, FILES_PATH + path, method)
        assert status == 404
        assert b"secret" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_can_be_changed(port: int, method: str) -> None:
    kept: Any = keep(io.BytesIO(TEXT), "a")

    assert ask(port, f"{FILES_PATH}/{DIGEST}/a", method)[0] == 405
    assert kept.path.read_bytes() == TEXT
