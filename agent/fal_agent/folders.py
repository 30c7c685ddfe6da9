"""Make a folder that appears whole or not at all.

Runs everywhere.
"""

from __future__ import annotations

import shutil
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["appearing_whole"]


@contextmanager
def appearing_whole(folder: Path) -> Iterator[Path]:
    """Give a folder beside `folder` to fill; it takes that place when the block has ended well.

    Parents are made. Should somebody else be quicker, theirs stays: the name says what is in it.

    Raises:
        OSError: it cannot be made or put in place.
    """
    beside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    beside.mkdir(parents=True, mode=0o700)
    try:
        yield beside
        try:
            beside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
