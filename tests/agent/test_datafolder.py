"""The agent's data folder: what the mirror adds to blobs, and blobs that were refused."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from typing import TYPE_CHECKING

import pytest

from fal_agent.errors import ResourceError
from fal_agent.mirror.manifests import FileEntry, Manifest, piece_blob
from fal_agent.server.blobs import BlobStore
from fal_agent.server.datafolder import DataFolder

if TYPE_CHECKING:
    from pathlib import Path

Usage = namedtuple("Usage", ["total", "used", "free"])
MANIFEST = Manifest({"a": FileEntry(0o600, 3, ("ab" * 32,))})
PIECE = piece_blob("ab" * 32)


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def send(blobs: BlobStore, name: str, content: bytes) -> None:
    blobs.write(name, 0, len(content), content, writer="me")


def test_contents_come_from_blobs_and_nothing_of_them_is_left(tmp_path: Path, blobs: BlobStore) -> None:
    data = DataFolder(tmp_path / "data", blobs)
    content = MANIFEST.to_bytes()
    states = [data.step("x", "m")["state"]]
    send(blobs, "m", content)
    states.append(data.step("x", "m")["state"])
    send(blobs, PIECE, b"abc")
    states.append(data.step("x", "m")["state"])

    assert states == ["manifest", "missing", "done"]
    assert (tmp_path / "data" / "x" / "a").read_bytes() == b"abc"
    assert not blobs.has("m")
    assert not blobs.has(PIECE)


@pytest.mark.parametrize("name", ["m", PIECE])
def test_a_blob_that_could_not_be_kept_is_an_error_once(
    tmp_path: Path, blobs: BlobStore, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    data = DataFolder(tmp_path / "data", blobs)
    if name == PIECE:
        send(blobs, "m", MANIFEST.to_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(1, 1, 0))
        with pytest.raises(ResourceError):
            send(blobs, name, b"abc")

    refused = data.step("x", "m")
    assert (refused["state"], refused["kind"]) == ("refused", "resources")
    assert re.search(r"cannot be kept.*a second try sends the rest", refused["message"])
    assert data.step("x", "m")["state"] in ("manifest", "missing")


def test_a_request_that_is_wrong_is_told_from_a_host_that_cannot(tmp_path: Path, blobs: BlobStore) -> None:
    refused = DataFolder(tmp_path / "data", blobs).step("../x", "m")

    assert (refused["state"], refused["kind"]) == ("refused", "value")
    assert "/data" in refused["message"]
