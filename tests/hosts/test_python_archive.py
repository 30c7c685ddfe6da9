"""The Python that is brought is the one that uv downloads for the host, without what no host needs."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from typing import TYPE_CHECKING

import pytest

from fal_agent.errors import HostUnreachableError
from fal_notebook.hosts.platforms import Platform
from fal_notebook.hosts.python_archive import python_for

if TYPE_CHECKING:
    from pathlib import Path

MAJOR, MINOR = sys.version_info[:2]
VERSION = f"{MAJOR}.{MINOR}"
LIBRARY = f"python/lib/python{VERSION}"
SYSCONFIG = "# system configuration generated and used by the sysconfig module\nbuild_time_vars = {}\n"
FILES = {
    f"python/bin/python{VERSION}": "#!/bin/sh",
    f"{LIBRARY}/os.py": "here = 1",
    f"{LIBRARY}/_sysconfigdata__linux_aarch64-linux-gnu.py": SYSCONFIG,
    f"{LIBRARY}/test/test_os.py": "",
    f"{LIBRARY}/__pycache__/os.pyc": "",
    f"{LIBRARY}/site-packages/pip/__init__.py": "",
    "python/share/man/python.1": "",
}
TARGET = Platform.of("box", system="Linux", machine="aarch64", libc="glibc 2.31")


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What uv knows of Pythons and may download: one build, for a processor that need not be this one's."""
    archive = tmp_path / "python.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        for name, text in FILES.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text), 0o755
            packed.addfile(entry, io.BytesIO(text.encode()))
    build = {
        "name": "cpython", "arch": {"family": "aarch64", "variant": None}, "os": "linux", "libc": "gnu",
        "major": MAJOR, "minor": MINOR, "patch": 1, "prerelease": "", "variant": None, "build": "1",
        "url": archive.as_uri(), "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
    }  # fmt: skip
    known = tmp_path / "downloads.json"
    known.write_text(json.dumps({f"cpython-{VERSION}.1-linux-aarch64-gnu": build}))
    monkeypatch.setenv("UV_PYTHON_DOWNLOADS_JSON_URL", str(known))
    monkeypatch.setenv("FAL_NOTEBOOK_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("downloads")
def test_a_download_is_packed_small_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = python_for("box", TARGET)

    with tarfile.open(fileobj=io.BytesIO(packed.data)) as archive:
        files = {member.name: member for member in archive}
    assert packed.name == f"cpython-{VERSION}.1-linux-aarch64-gnu"
    assert packed.source == "downloaded by uv"
    assert {"bin/python3", f"bin/python{VERSION}", f"lib/python{VERSION}/os.py"} <= set(files)
    assert not [name for name in files if "test" in name or "pyc" in name or "pip" in name or "share" in name]
    assert files["bin/python3"].linkname == f"python{VERSION}"
    assert files[f"bin/python{VERSION}"].mode == 0o755
    monkeypatch.setenv("UV_PYTHON_DOWNLOADS_JSON_URL", str(tmp_path / "gone.json"))
    assert python_for("another-box", TARGET) == packed


@pytest.mark.usefixtures("downloads")
def test_where_there_is_none_both_reasons_are_told() -> None:
    other = Platform.of("box", system="Linux", machine="x86_64", libc="musl 1.2.3")

    with pytest.raises(HostUnreachableError) as caught:
        python_for("box", other)

    told = str(caught.value)
    assert "'box' (Linux x86_64, musl 1.2) has no Python and cannot download one" in told
    assert "uv cannot download it here" in told
    assert "this notebook's own" in told
