"""Lay out the files that travel with a call in a folder of their own.

Runs in the agent. The folder is named by what it holds, so it is made once; it appears whole or not
at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.errors import AppFileUploadException
from fal_agent.folders import appearing_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["lay_out_files"]


def lay_out_files(root: Path, files: Sequence[list[Any]], blob_path: Callable[[str], Optional[Path]]) -> Path:
    """Make the folder that holds `files` and give its path.

    Args:
        root: folder of all such folders.
        files: [relative POSIX path, blob, mode] each.
        blob_path: where a blob lies.

    Raises:
        AppFileUploadException: a path leaves the folder, or a blob is missing.
    """
    name = hashlib.sha256(json.dumps(sorted(files)).encode()).hexdigest()[:24]
    folder = root / name
    if folder.is_dir():
        os.utime(folder)
        return folder
    with appearing_whole(folder) as beside:
        for relative, blob, mode in files:
            source = blob_path(blob)
            if source is None:
                raise AppFileUploadException(f"the content of {relative} did not arrive", relative)
            target = beside / _safe(relative)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            target.chmod(0o600 | (int(mode) & 0o111))
    return folder


def _safe(relative: str) -> PurePosixPath:
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts or "\0" in relative or not path.parts:
        raise AppFileUploadException(f"{relative!r} leaves the folder of the app's files", relative)
    return path
