"""The marks by which libraries know that they run in a notebook, and choose rich output.

Runs in a worker whose session belongs to a notebook's kernel.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

__all__ = ["bear_marks"]

_MODULE = "ipykernel.zmqshell"


def bear_marks(shell: Any) -> None:
    """Let a shell look like a kernel's to those who ask its settings, or which modules there are.

    An environment that has the real ipykernel is left as it is.
    """
    shell.config.setdefault("IPKernelApp", type(shell.config)())
    if _MODULE not in sys.modules and importlib.util.find_spec("ipykernel") is None:
        stand_in: Any = types.ModuleType(_MODULE, "Says that this is a notebook; there is no kernel here.")
        stand_in.ZMQInteractiveShell = type(shell)
        sys.modules[_MODULE] = stand_in
