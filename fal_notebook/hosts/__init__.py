"""Where calls run: this machine, machines that answer to `ssh NAME`, or this very process.

Runs in the notebook. `fal.hosts()` lists them: the package is callable, since its name is also the
name of that function.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fal_notebook.hosts.registry import HostInfo

__all__: list[str] = []


class _Callable(types.ModuleType):
    def __call__(self) -> list[HostInfo]:
        """List the hosts: this machine, those of `hosts.toml`, and those used in this notebook."""
        from fal_notebook.hosts import registry

        return registry.hosts()


sys.modules[__name__].__class__ = _Callable
