"""Share what torch.compile made between the workers of a host: one compiles, the next ones start warm.

Runs wherever user code runs; standard library only. The shared archive of a key is of one GPU type, and is
only ever replaced whole. A cache holds code that is run: it lies where the user alone can write.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from fal_agent.runtime.toolkit.archives import unpack
from fal_agent.runtime.toolkit.directories import inductor_folder, lock_of, made
from fal_agent.runtime.toolkit.files import written_whole
from fal_agent.runtime.toolkit.gpu import get_gpu_type
from fal_agent.runtime.toolkit.locking import alone

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["load_inductor_cache", "sync_inductor_cache", "synchronized_inductor_cache"]

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_KEY = re.compile(r"[\w][\w./-]*")
_CHUNK = 1 << 20


def load_inductor_cache(cache_key: str) -> str:
    """Let torch.compile use what was shared under a key.

    Call it before the first compilation. It sets TORCHINDUCTOR_CACHE_DIR to a folder of this process, in
    which what was shared is unpacked.

    Args:
        cache_key: names model and version, such as "my-model/1"; letters, digits and "_./-".

    Returns:
        A digest of the folder's content, for `sync_inductor_cache`.

    Raises:
        ValueError: the key has other characters, or the archive is damaged.
        OSError: there is no room, or a folder cannot be written.
    """
    archive = _archive(cache_key)
    folder = Path(tempfile.mkdtemp(prefix="fal-inductor-"))
    os.environ[_VARIABLE] = str(folder)
    if archive.is_file():
        unpack(archive, folder)
    return _digest(folder)


def sync_inductor_cache(cache_key: str, unpacked_dir_hash: str) -> None:
    """Share what torch.compile has made since `load_inductor_cache`; nothing if there is nothing new.

    Args:
        cache_key: the same as for loading.
        unpacked_dir_hash: what loading gave.

    Raises:
        ValueError: the key has other characters.
        RuntimeError: nothing was loaded in this process.
        OSError: there is no room, or a folder cannot be written.
    """
    archive = _archive(cache_key)
    local = os.environ.get(_VARIABLE)
    if not local:
        raise RuntimeError("call load_inductor_cache() before sync_inductor_cache()")
    folder = Path(local)
    if _digest(folder) == unpacked_dir_hash:
        return

    def fill(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            for path in _files(folder):
                packed.write(path, path.relative_to(folder).as_posix())

    made(archive.parent)
    with alone(lock_of("inductor", str(archive))):
        written_whole(archive, fill)


@contextmanager
def synchronized_inductor_cache(cache_key: str) -> Iterator[None]:
    """Load what was shared under a key, and share what the block compiled if it ends well."""
    before = load_inductor_cache(cache_key)
    yield
    sync_inductor_cache(cache_key, before)


def _archive(cache_key: str) -> Path:
    if not _KEY.fullmatch(cache_key) or ".." in cache_key:
        raise ValueError(f"cache_key={cache_key!r} must be letters, digits and '_./-', such as 'my-model/1'")
    return inductor_folder() / get_gpu_type() / f"{cache_key}.zip"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in _files(folder):
        name = path.relative_to(folder).as_posix().encode()
        digest.update(len(name).to_bytes(8, "big") + name + path.stat().st_size.to_bytes(8, "big"))
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
