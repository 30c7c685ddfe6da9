"""Downloads from a real server: names, reuse, limits, and what goes wrong on the way."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from fal_agent.errors import DownloadError
from fal_agent.runtime.toolkit import fetching
from fal_notebook.toolkit import download_file, download_model_weights

if TYPE_CHECKING:
    from pathlib import Path

BODY = bytes(range(256)) * 5000  # more than one piece


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- a file


def test_a_file_comes_whole_into_the_folder(web: Any, tmp_path: Path) -> None:
    path = download_file(web.gives("/a/model.bin", BODY), tmp_path / "to" / "here")

    assert path == tmp_path / "to" / "here" / "model.bin"
    assert path.read_bytes() == BODY
    assert files_in(path.parent) == ["model.bin"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("target", ["models/x", "models"])
def test_a_relative_folder_is_below_the_data_root(web: Any, data: Path, target: str) -> None:
    assert download_file(web.gives("/f", b"x"), target) == data / target / "f"


@pytest.mark.parametrize(
    ("path", "disposition", "name"),
    [
        ("/x", 'attachment; filename="told.bin"', "told.bin"),
        ("/x", "attachment; filename*=UTF-8''na%C3%AFve.txt", "na\xefve.txt"),
        ("/x", 'attachment; filename="../../etc/passwd"', "passwd"),
        ("/x", 'attachment; filename="C:\\\\dir\\\\evil.txt"', "evil.txt"),
        ("/x", 'attachment; filename=".hidden"', "hidden"),
        ("/a/b%20c.bin", "", "b c.bin"),
        ("/a/%2e%2e", "", None),
        ("/", "", None),
    ],
)
def test_the_name_is_the_servers_else_the_urls_else_a_hash(
    web: Any, tmp_path: Path, path: str, disposition: str, name: str | None
) -> None:
    url = web.gives(path, b"x", Content_Disposition=disposition)

    found = download_file(url, tmp_path / "to")

    assert found == tmp_path / "to" / (name or hashlib.sha256(url.encode()).hexdigest())


def test_a_query_is_not_part_of_the_name(web: Any, tmp_path: Path) -> None:
    assert download_file(web.gives("/m.bin", b"x") + "?token=1", tmp_path).name == "m.bin"


def test_a_file_of_the_same_length_is_kept_unless_forced(web: Any, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    url = web.gives("/f", b"new")

    assert download_file(url, tmp_path).read_bytes() == b"old"
    assert download_file(url, tmp_path, force=True).read_bytes() == b"new"


@pytest.mark.parametrize(("body", "length"), [(b"longer", None), (b"new", "")])
def test_a_file_of_another_or_unknown_length_is_replaced(
    web: Any, tmp_path: Path, body: bytes, length: str | None
) -> None:
    (tmp_path / "f").write_bytes(b"old")
    headers = {} if length is None else {"Content-Length": length}

    assert download_file(web.gives("/f", body, **headers), tmp_path).read_bytes() == body


def test_headers_go_along_but_secrets_do_not_follow_to_another_host(web: Any, tmp_path: Path) -> None:
    """Signed addresses of a store, where a redirect leads, are refused with a second authorization."""
    port = web.url.rpartition(":")[2]
    web.gives("/there", b"x")
    near = web.gives("/near", b"", status=302, Location="/there")
    far = web.gives("/far", b"", status=307, Location=f"http://localhost:{port}/there")

    for url in (near, far):
        download_file(url, tmp_path, force=True, request_headers={"Authorization": "Key a:b", "X-Other": "1"})

    sent = [headers for path, headers in web.asked if path == "/there"]
    assert [headers.get("Authorization") for headers in sent] == ["Key a:b", None]
    assert [headers["X-Other"] for headers in sent] == ["1", "1"]


def test_many_at_once_fetch_it_once(web: Any, tmp_path: Path) -> None:
    url = web.gives("/model.bin", BODY)

    with ThreadPoolExecutor(6) as pool:
        paths = set(pool.map(lambda _: download_model_weights(url), range(6)))

    assert web.paths == ["/model.bin"]
    assert [path.read_bytes() for path in paths] == [BODY]


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("length", [None, ""])
def test_a_file_beyond_the_limit_is_refused_and_nothing_is_kept(
    web: Any, tmp_path: Path, length: str | None
) -> None:
    headers = {} if length is None else {"Content-Length": length}
    url = web.gives("/big.bin", bytes((1 << 20) + 1), **headers)

    with pytest.raises(DownloadError, match=r"big.bin is larger than filesize_limit allows \(1 MB\)"):
        download_file(url, tmp_path / "to", filesize_limit=1)

    assert files_in(tmp_path / "to") == []


def test_a_file_of_exactly_the_limit_is_taken(web: Any, tmp_path: Path) -> None:
    url = web.gives("/f", bytes(1 << 19))

    assert download_file(url, tmp_path, filesize_limit=0.5).stat().st_size == 1 << 19


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_refusal_is_told_with_its_status(web: Any, tmp_path: Path, status: int) -> None:
    with pytest.raises(DownloadError, match=f"/f: the server answered {status}"):
        download_file(web.gives("/f", b"", status=status), tmp_path)


def test_what_breaks_off_is_not_kept(web: Any, tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "f").write_bytes(b"old")
    url = web.gives("/f", b"half", **{"Content-Length": "8"})

    with pytest.raises(DownloadError, match="broke off"):
        download_file(url, tmp_path / "to", force=True)

    assert (tmp_path / "to" / "f").read_bytes() == b"old"
    assert files_in(tmp_path / "to") == ["f"]


def test_a_server_that_stops_sending_is_given_up(
    web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "TIMEOUT", 0.2)
    done = threading.Event()

    def stall(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "8")
        handler.end_headers()
        handler.wfile.write(b"half")
        done.wait(60)

    try:
        with pytest.raises(DownloadError, match=r"broke off: .*timed out"):
            download_file(web.answers_with("/f", stall), tmp_path)
    finally:
        done.set()

    assert files_in(tmp_path) == ["data"]


def test_a_server_that_is_not_there_is_told(tmp_path: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen

        with pytest.raises(DownloadError, match=r"cannot be reached: .*refused"):
            download_file(f"http://127.0.0.1:{bound.getsockname()[1]}/f", tmp_path)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://x.org/a", "data:,x", "/etc/passwd", "", "http://[x/"]
)
def test_only_http_is_opened(url: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"cannot be (downloaded|reached)"):
        download_file(url, tmp_path)


def test_a_redirect_to_a_file_is_not_followed(web: Any, tmp_path: Path) -> None:
    url = web.gives("/f", b"", status=302, Location="file:///etc/passwd")

    with pytest.raises(DownloadError):
        download_file(url, tmp_path)


def test_redirects_without_end_are_given_up(web: Any, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="302"):
        download_file(web.gives("/f", b"", status=302, Location="/f"), tmp_path)


def test_errors_show_neither_passwords_nor_signatures(web: Any, tmp_path: Path) -> None:
    host = web.url.removeprefix("http://")

    with pytest.raises(DownloadError) as caught:
        download_file(f"http://me:hush@{host}/none?signature=hush", tmp_path)

    assert "hush" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_a_download_error(web: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(DownloadError, match="cannot take the download"):
        download_file(web.gives("/f", b"x"), tmp_path / "file")


# ---------------------------------------------------------------- weights


def test_weights_lie_below_the_hash_of_their_url_and_are_reused(web: Any, data: Path) -> None:
    url = web.gives("/w/model.safetensors", BODY)
    folder = data / ".fal" / "model_weights" / hashlib.sha256(url.encode()).hexdigest()

    first, second = download_model_weights(url), download_model_weights(url)

    assert first == second == folder / "model.safetensors"
    assert first.read_bytes() == BODY
    assert web.paths == ["/w/model.safetensors"]


def test_using_weights_is_marked(web: Any) -> None:
    url = web.gives("/m", b"x")
    mark = download_model_weights(url).parent / ".last-used"

    os.utime(mark, (0, 0))

    download_model_weights(url)

    assert mark.stat().st_mtime > 0


def test_weights_can_be_fetched_again(web: Any) -> None:
    url = web.gives("/m", b"old")
    download_model_weights(url)
    web.gives("/m", b"new")

    assert download_model_weights(url).read_bytes() == b"old"
    assert download_model_weights(url, force=True).read_bytes() == b"new"


def test_weights_that_failed_are_tried_again(web: Any) -> None:
    url = web.gives("/m", b"x", status=503)
    with pytest.raises(DownloadError):
        download_model_weights(url, request_headers={"Authorization": "Key a:b"})

    web.gives("/m", b"x")

    assert download_model_weights(url).read_bytes() == b"x"
    assert web.asked[0][1]["Authorization"] == "Key a:b"
