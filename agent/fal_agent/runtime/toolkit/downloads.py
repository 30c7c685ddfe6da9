"""`download_file` and `download_model_weights`: fetch a file once, and find it there the next time.

Runs wherever user code runs; standard library only. A file appears whole or not at all, and of several
processes that want the same one, one fetches it while the others wait.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, Optional, Union, cast
from urllib.parse import unquote, urlsplit

from fal_agent.errors import DownloadError
from fal_agent.runtime.toolkit.directories import below_data, lock_of, made, weights
from fal_agent.runtime.toolkit.fetching import Response, opened
from fal_agent.runtime.toolkit.files import copied, safe_name, written_whole
from fal_agent.runtime.toolkit.locking import alone

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

__all__ = ["DownloadError", "download_file", "download_model_weights"]

_UNLIMITED = 1 << 62
_LAST_USED = ".last-used"  # its time says when the weights beside it were last asked for


def download_file(
    url: str,
    target_dir: Union[str, os.PathLike[str]],
    *,
    force: bool = False,
    request_headers: Optional[Mapping[str, str]] = None,
    filesize_limit: Optional[float] = None,
) -> Path:
    """Download a file into a folder, unless it is there with the length that the server tells.

    Args:
        url: http or https. The file is called what the server calls it, else what the URL's path ends
            with, else by a hash of the URL.
        target_dir: the folder, made if missing; a relative one is below the data root (`/data`).
        force: download it even if it is there.
        request_headers: sent along, such as an Authorization.
        filesize_limit: megabytes (2**20 bytes) that the file may have; None: any.

    Returns:
        The path of the file.

    Raises:
        DownloadError: it cannot be fetched, is too large, or cannot be written.
    """
    limit = _UNLIMITED if filesize_limit is None else int(filesize_limit * (1 << 20))
    folder = below_data(target_dir)
    try:
        with alone(lock_of("download", str(made(folder)), url)), opened(url, request_headers) as answer:
            path = folder / _name(answer, url)
            if answer.length is not None and answer.length > limit:
                raise _too_large(path.name, filesize_limit)
            if force or not _is_there(path, answer.length):
                _write(answer, path, limit, filesize_limit)
    except OSError as error:
        raise DownloadError(f"{folder} cannot take the download: {error.strerror or error}") from error
    return path


def download_model_weights(
    url: str, force: bool = False, request_headers: Optional[Mapping[str, str]] = None
) -> Path:
    """Download a model's weights into a folder of their own, once for all apps and functions of the host.

    Args:
        url: http or https. Once the file is there, the server is not asked again.
        force: download it even if it is there.
        request_headers: sent along, such as an Authorization.

    Returns:
        The path of the file, in `FAL_MODEL_WEIGHTS_DIR/<sha256 of the URL>/`.

    Raises:
        DownloadError: it cannot be fetched, or cannot be written.
    """
    folder = weights() / hashlib.sha256(url.encode()).hexdigest()
    path = None if force else _weights_in(folder)
    if path is None:
        try:
            # Whoever waited here finds what was fetched meanwhile.
            with alone(lock_of("weights", url)):
                path = None if force else _weights_in(folder)
                if path is None:
                    path = download_file(url, folder, force=force, request_headers=request_headers)
        except OSError as error:
            raise DownloadError(f"{folder} cannot take the weights: {error.strerror or error}") from error
    try:
        (path.parent / _LAST_USED).touch(mode=0o600)
    except OSError:  # weights on a disk that is full or somebody else's can be used too
        return path
    return path


def _weights_in(folder: Path) -> Optional[Path]:
    if not folder.is_dir():
        return None
    return next((path for path in sorted(folder.iterdir()) if path.name[0] != "." and path.is_file()), None)


def _name(answer: Response, url: str) -> str:
    told = answer.headers.get_filename()
    if told:
        return safe_name(PurePosixPath(told.replace("\\", "/")).name)
    last = PurePosixPath(unquote(urlsplit(url).path)).name
    return safe_name(last) if last.strip(" .") else hashlib.sha256(url.encode()).hexdigest()


def _is_there(path: Path, length: Optional[int]) -> bool:
    return length is not None and path.is_file() and path.stat().st_size == length


def _write(answer: Response, path: Path, limit: int, limit_megabytes: Optional[float]) -> None:
    def fill(file: BinaryIO) -> None:
        source = cast("BinaryIO", answer)  # of which only `read` is wanted
        copied(source, file, limit=limit, too_large=lambda: _too_large(path.name, limit_megabytes))

    written_whole(path, fill)


def _too_large(name: str, limit_megabytes: Optional[float]) -> DownloadError:
    return DownloadError(
        f"{name} is larger than filesize_limit allows ({limit_megabytes or 0:g} MB); nothing of it was kept"
    )
