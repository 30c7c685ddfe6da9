"""A function that leaves a trace of each time it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import fal_notebook as fal

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["appender"]


def appender(host: Any, path: Path) -> Any:
    """Give a function on a host that adds the number it is given to a file, and gives it back."""

    @fal.function(host=host)
    def append(number: int) -> int:
        with path.open("a") as file:
            file.write(f"{number}\n")
        return number

    return append
