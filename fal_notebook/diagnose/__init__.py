"""Check, step by step, that a host can run calls, and say what to type where it cannot.

Runs in the notebook. A check that fails names its remedy; the steps that it makes impossible are left
out, so that what failed is among the last lines.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from fal_agent.errors import FalServerlessError
from fal_notebook import config
from fal_notebook.diagnose.checks import Check, Examination, as_json, as_text, size_text

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Check", "Examination", "as_json", "as_text", "diagnose", "examine", "size_text"]


def diagnose(host_name: str, *, timeout: float = 30.0) -> list[Check]:
    """Examine a host; see `examine`."""
    return list(examine(host_name, timeout=timeout))


def examine(host_name: str, *, timeout: float = 30.0) -> Iterator[Check]:
    """Examine a host step by step, from the settings to an agent that answers.

    Args:
        host_name: "local", a name of `hosts.toml`, or any name that ssh knows.
        timeout: seconds that each step may take.

    Returns:
        The checks as they are done; the first that fails is among the last.
    """
    from fal_notebook.diagnose import machine, way

    path = shlex.quote(str(config.config_folder() / "hosts.toml"))
    fix = f"edit {path}"
    try:
        known = config.load()
        fix = "fal-notebook hosts   # lists the names that are known"
        settings = known.host(host_name)
    except FalServerlessError as error:
        yield Check("settings", False, str(error), fix)
        return
    if host_name == "inline":
        yield Check("agent", True, "not needed: calls run in this process")
    elif settings.ssh is None:
        yield from machine.examine_here(host_name, settings, timeout)
    else:
        yield from way.examine_over_ssh(host_name, settings, timeout)
