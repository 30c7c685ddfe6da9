"""Files that apps take and give: their URLs, the store behind them, and what may not be opened."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import pickle
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from fal_agent.errors import DownloadError, FileTooLargeError
from fal_agent.runtime.toolkit import file as file_module
from fal_agent.runtime.toolkit import files
from fal_agent.runtime.toolkit.files import FILES_URL, keep, kept_at, safe_name
from fal_notebook.toolkit import Audio, File, Video

if TYPE_CHECKING:
    from collections.abc import Iterator

TEXT = b"hello, file"
DIGEST = hashlib.sha256(TEXT).hexdigest()
BASE = "http://127.0.0.1:8080/.fal/files"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAL_FILES_URL", BASE)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---------------------------------------------------------------- what is accepted


class Request(BaseModel):
    """What an endpoint takes."""

    file: File


@pytest.mark.parametrize("url", ["http://x.org/a.txt", "https://x.org/a", "data:text/plain,hi", "DATA:,x"])
def test_a_plain_string_is_a_files_url(url: str) -> None:
    assert Request(file=url).file.url == url  # type: ignore[arg-type]
    assert Request.model_validate_json(json.dumps({"file": {"url": url}})).file.url == url


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://x.org/a", "/etc/passwd", "", "hello", "javascript:x", "FILE:///etc/passwd"],
)
def test_no_other_url_is_a_file(url: str) -> None:
    with pytest.raises(ValidationError, match="must be http, https or data"):
        File.model_validate(url)
    with pytest.raises(ValidationError, match="must be http, https or data"):
        File(url=url)


def test_a_file_is_four_fields() -> None:
    file = File(url="https://x.org/a", content_type="text/plain", file_name="a", file_size=3)

    assert file.model_dump() == {
        "url": "https://x.org/a",
        "content_type": "text/plain",
        "file_name": "a",
        "file_size": 3,
    }
    assert File(url="https://x.org/a").model_dump(exclude_none=True) == {"url": "https://x.org/a"}
    assert pickle.loads(pickle.dumps(file)) == file


@pytest.mark.parametrize("cls", [Video, Audio])
def test_videos_and_sounds_are_files(cls: type[File]) -> None:
    made = cls.from_bytes(TEXT, "video/mp4", repository="in_memory")

    assert isinstance(made, cls)
    assert made.as_bytes() == TEXT


# ---------------------------------------------------------------- data URLs


def test_in_memory_is_a_url_that_holds_the_data(data: Path) -> None:
    file = File.from_bytes(TEXT, content_type="text/plain", file_name="a.txt", repository="in_memory")

    assert file.url == "data:text/plain;base64," + base64.b64encode(TEXT).decode()
    assert (file.content_type, file.file_name, file.file_size) == ("text/plain", "a.txt", len(TEXT))
    assert not data.exists()


@pytest.mark.parametrize(
    ("url", "content"),
    [
        ("data:text/plain;base64,aGk=", b"hi"),
        ("data:;base64,aGk%3D", b"hi"),
        ("data:,a%20b", b"a b"),
        ("Data:text/plain;charset=utf-8,%C3%A9", "\xe9".encode()),
        ("data:,", b""),
    ],
)
def test_data_urls_are_read(url: str, content: bytes) -> None:
    assert File.model_validate(url).as_bytes() == content


def test_a_data_url_tells_its_type() -> None:
    assert File.model_validate("data:image/png;base64,aGk=").content_type == "image/png"
    assert File.model_validate("data:,x").content_type == "text/plain"


@pytest.mark.parametrize("url", ["data:text/plain", "data:;base64,???", "data:;base64,a"])
def test_a_malformed_data_url_is_a_value_error(url: str) -> None:
    with pytest.raises(ValueError, match="data: URL"):
        File.model_validate(url).as_bytes()


# ---------------------------------------------------------------- the store


@pytest.mark.usefixtures("served")
def test_in_an_app_a_file_is_kept_under_its_digest_and_has_a_url(data: Path) -> None:
    file = File.from_bytes(TEXT, file_name="a b.txt")

    assert file.url == f"{BASE}/{DIGEST}/a%20b.txt"
    assert (file.content_type, file.file_name, file.file_size) == ("text/plain", "a b.txt", len(TEXT))
    path = data / ".fal" / "files" / DIGEST / "a b.txt"
    assert path.read_bytes() == TEXT
    assert [mode(each) for each in (path, path.parent, path.parent.parent, data)] == [
        0o600,
        0o700,
        0o700,
        0o700,
    ]
    assert [each.name for each in path.parent.parent.iterdir()] == [DIGEST]


@pytest.mark.usefixtures("served")
def test_without_a_name_one_is_made_that_fits_the_type() -> None:
    first, second = File.from_bytes(TEXT, "image/png"), File.from_bytes(TEXT)

    assert first.file_name is not None
    assert first.file_name.endswith(".png")
    assert second.content_type == "application/octet-stream"
    assert first.file_name != second.file_name


@pytest.mark.usefixtures("served")
def test_the_request_says_more_than_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """An app may be reached by several addresses at once."""
    token = FILES_URL.set("https://box.example.org/.fal/files/")
    try:
        assert File.from_bytes(TEXT, file_name="a").url == f"https://box.example.org/.fal/files/{DIGEST}/a"
    finally:
        FILES_URL.reset(token)
    monkeypatch.setenv("FAL_FILES_URL", "http://other/.fal/files")
    assert File.from_bytes(TEXT, file_name="a").url == f"http://other/.fal/files/{DIGEST}/a"


def test_without_a_server_small_data_is_in_the_url_and_large_is_on_disk(
    monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    monkeypatch.setattr(files, "DATA_URI_LIMIT", len(TEXT))

    small, large = File.from_bytes(TEXT), File.from_bytes(TEXT + b"!", file_name="x")

    assert small.url.startswith("data:")
    assert large.url.startswith(f"file://{data}/.fal/files/")
    assert large.as_bytes() == TEXT + b"!"
    assert File(url=large.url).as_bytes() == TEXT + b"!"


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("repository", ["fal", "fal_v2", "fal_v3", "cdn"])
def test_the_platforms_repositories_are_the_store(repository: str) -> None:
    assert File.from_bytes(TEXT, file_name="a", repository=repository).url == f"{BASE}/{DIGEST}/a"


def test_an_unknown_repository_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown repository 's3'"):
        File.from_bytes(TEXT, repository="s3")


@pytest.mark.usefixtures("served")
def test_a_file_on_disk_is_copied_into_the_store(tmp_path: Path) -> None:
    source = tmp_path / "a.json"
    source.write_bytes(TEXT)

    file = File.from_path(source)
    source.write_bytes(b"changed")

    assert (file.url, file.content_type) == (f"{BASE}/{DIGEST}/a.json", "application/json")
    assert file.as_bytes() == TEXT
    with pytest.raises(FileNotFoundError):
        File.from_path(tmp_path / "none")


@pytest.mark.usefixtures("served")
def test_our_own_urls_are_read_from_disk_by_whatever_address() -> None:
    """Nothing listens at any of these; the digest says what the content is."""
    File.from_bytes(TEXT, file_name="a\xe9.txt")

    for base in (BASE, "https://elsewhere.example.org/prefix/.fal/files"):
        assert File(url=f"{base}/{DIGEST}/a%C3%A9.txt").as_bytes() == TEXT


def test_many_can_keep_the_same_at_once(data: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        kept = set(pool.map(lambda _: keep(io.BytesIO(TEXT), "a"), range(16)))

    assert len(kept) == 1
    assert [path.name for path in (data / ".fal" / "files").rglob("*")] == [DIGEST, "a"]


def test_what_cannot_be_read_to_its_end_leaves_nothing(data: Path) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise OSError("gone")
            return super().read(4)

    with pytest.raises(OSError, match="gone"):
        keep(Broken(TEXT), "a")

    assert list((data / ".fal" / "files").iterdir()) == []


# ---------------------------------------------------------------- what may not be opened


@pytest.mark.parametrize(
    "path",
    [
        *(
            f"{DIGEST}/../{DIGEST}/a",
            f"{DIGEST}/..",
            f"{DIGEST}/.hidden",
            f"{DIGEST}/",
            f"{DIGEST}/none",
            "a",
        ),
        *(
            f"{DIGEST[:-1]}/a",
            f"{DIGEST.upper()}/a",
            f"../files/{DIGEST}/a",
            f"{DIGEST}/link",
            f"{DIGEST}/%2e%2e",
        ),
        *(f"{DIGEST}/..%2f..%2f..%2fsecret", f"{DIGEST}/a%00", f"{'0' * 64}/secret", f"{DIGEST}/folder"),
    ],
)
def test_only_what_is_in_the_store_is_found(path: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    folder = keep(io.BytesIO(TEXT), "a").path.parent
    (folder / ".hidden").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "folder").mkdir()
    (folder.parent / ("0" * 64)).symlink_to(tmp_path)

    assert kept_at(f"{BASE}/{path}") is None
    assert kept_at(f"file://{folder.parent}/{path}") is None
    assert kept_at(f"{BASE}/{DIGEST}/a") == folder / "a"


def test_a_file_url_of_another_place_is_refused(tmp_path: Path) -> None:
    """Also one that ends like a file of the store."""
    keep(io.BytesIO(TEXT), "a")
    other = tmp_path / DIGEST
    other.mkdir()
    (other / "a").write_text("secret")

    with pytest.raises(ValidationError):
        File(url=(other / "a").as_uri())


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        *(
            ("a.txt", "a.txt"),
            ("../../a", "_.._a"),
            (".env", "env"),
            ("", "file"),
            ("...", "file"),
            ("a/b\\c", "a_b_c"),
        ),
        *(("a\x00\r\nb", "a_b"), (" a ", "a"), ("\xe9", "\xe9"), ("x" * 300 + ".png", "x" * 196 + ".png")),
    ],
)
def test_names_are_made_safe(name: str, safe: str) -> None:
    assert safe_name(name) == safe


@given(st.text())
def test_every_name_becomes_one_that_stays_as_it_is(name: str) -> None:
    safe = safe_name(name)

    assert safe == safe_name(safe)
    assert Path(safe).name == safe
    assert 0 < len(os.fsencode(safe)) <= 200


@given(st.text(min_size=1))
def test_every_file_is_found_again_by_its_url(name: str) -> None:
    token = FILES_URL.set(BASE)
    try:
        file = File.from_bytes(TEXT, file_name=name)
    finally:
        FILES_URL.reset(token)

    assert kept_at(file.url) is not None


# ---------------------------------------------------------------- reading and saving


def test_a_file_of_the_web_is_fetched(web: Any) -> None:
    assert File(url=web.gives("/a.txt", TEXT)).as_bytes() == TEXT


def test_what_cannot_be_fetched_is_a_download_error(web: Any) -> None:
    with pytest.raises(DownloadError, match="404"):
        File(url=web.url + "/none").as_bytes()


def test_what_is_too_large_is_refused(web: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(file_module, "SIZE_LIMIT", len(TEXT) - 1)
    file = File(url=web.gives("/a.txt", TEXT))

    with pytest.raises(FileTooLargeError):
        file.as_bytes()
    with pytest.raises(FileTooLargeError):
        file.save(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_file_is_saved(tmp_path: Path) -> None:
    file = File.from_bytes(TEXT)

    assert file.save(tmp_path / "a") == tmp_path / "a"
    assert file.save(str(tmp_path / "b")).read_bytes() == TEXT


def test_what_is_there_is_replaced_only_when_told(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        File.from_bytes(TEXT).save(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old"

    assert File.from_bytes(TEXT).save(tmp_path / "a", overwrite=True).read_bytes() == TEXT


def test_a_failed_save_keeps_what_was_there(web: Any, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    url = web.gives("/f", b"half", **{"Content-Length": "8"})

    with pytest.raises(DownloadError):
        File(url=url).save(tmp_path / "a", overwrite=True)

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


@pytest.fixture(autouse=True)
def no_context() -> Iterator[None]:
    """Each test begins outside of any request."""
    assert FILES_URL.get() is None
    yield
    assert FILES_URL.get() is None
