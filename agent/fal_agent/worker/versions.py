"""Refuse data that was pickled with a library whose major version here is another.

Runs in a worker, before the data is opened: afterwards the error would be about the inside of the
library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fal_agent.failures import OpeningError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fal_agent.framing import Buffer

__all__ = ["check_pydantic"]


# What a model's class, or a model of either major version, has in its pickle. Code that merely uses
# pydantic has none of it, and may well run with the other version.
_MARKS = (b"ModelMetaclass", b"__pydantic_fields_set__", b"__fields_set__")


def check_pydantic(notebook: str, parts: Sequence[Buffer]) -> None:
    """Refuse models of another pydantic.

    Args:
        notebook: the version there; empty if the notebook does not use pydantic.
        parts: pickles and their buffers. Large ones, which lie in files, are not looked through.

    Raises:
        OpeningError: the data holds models, and the major versions differ.
    """
    if not notebook or not any(type(part) is bytes and mark in part for part in parts for mark in _MARKS):
        return
    from importlib import metadata  # costs a worker's start 13 ms, and few have models to check

    try:
        here = metadata.version("pydantic")
    except metadata.PackageNotFoundError:
        return  # opening the data will name the module that is missing
    theirs, ours = notebook.partition(".")[0], here.partition(".")[0]
    if theirs != ours:
        raise OpeningError(
            "deserialization",
            f"the notebook has pydantic {notebook} and the environment pydantic {here}; models travel only "
            f'between equal major versions. Ask for "pydantic>={theirs},<{int(theirs) + 1}" in the '
            f"requirements, or install pydantic {ours} for the notebook",
        )
