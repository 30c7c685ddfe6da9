"""Keep matplotlib from showing figures merely because they came back from a host.

Runs in the notebook. A figure that pyplot had open when it was pickled is opened again where it is
unpickled, and shown at the end of the cell: a second time, since the host has shown it.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["figures_stay_closed"]


@contextmanager
def figures_stay_closed() -> Iterator[None]:
    """Take figures that are opened meanwhile out of pyplot's list; they stay usable."""
    before = set(_open_figures())
    try:
        yield
    finally:
        figures = _open_figures()
        for number in set(figures) - before:
            del figures[number]


def _open_figures() -> dict[int, Any]:
    helpers = sys.modules.get("matplotlib._pylab_helpers")
    figures: dict[int, Any] = {} if helpers is None else helpers.Gcf.figs
    return figures
