"""Debuggers in a worker: `breakpoint()` asks under the cell, and failed frames live only as long as they may.

Runs in a worker. A debugger reads its commands with `input`, so `fal_agent.worker.asking` leads them to
the notebook.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any, Optional

__all__ = ["clear_frames", "install", "use_interruptible_pdb"]


def install() -> None:
    """Let `breakpoint()` start a debugger that an interrupt ends."""
    sys.breakpointhook = _break


def _break(*args: Any, **options: Any) -> Any:
    if os.environ.get("PYTHONBREAKPOINT"):
        return sys.__breakpointhook__(*args, **options)
    use_interruptible_pdb()
    import pdb

    return pdb.Pdb().set_trace(sys._getframe(1), *args, **options)  # noqa: SLF001


def use_interruptible_pdb() -> None:
    """Let `pdb` be IPython's, as in a kernel, if IPython is here."""
    try:
        debugger: Any = importlib.import_module("IPython.core.debugger")
    except ImportError:
        return
    pdb: Any = importlib.import_module("pdb")

    debugger.Pdb = debugger.InterruptiblePdb
    pdb.Pdb, pdb.set_trace = debugger.Pdb, debugger.set_trace


def clear_frames(error: Optional[BaseException]) -> None:
    """Let go of the values that only the frames of an error hold, of all that it leads to as well.

    A frame that is in a cycle with its error, as `except E as error: kept = error` makes one, would keep
    a model on the GPU until the garbage collector comes.
    """
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        link = waiting.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        for frame, _ in traceback.walk_tb(link.__traceback__):
            frame.f_locals  # noqa: B018 - before Python 3.13 it is a copy, which is brought up to date when read
        waiting += [link.__cause__, link.__context__, *getattr(link, "exceptions", ())]
