"""Tab after `%fal` and `%%fal`: commands, options, names of hosts.

Runs in the notebook. Looks at settings only, never at a machine.
"""

from __future__ import annotations

from typing import Any

from fal_notebook.magics.options import cell_parser

__all__ = ["add_completions", "complete_line"]

_NAMES_AFTER = ("connect", "status", "envs", "runs", "stop", "doctor")


def add_completions(shell: Any) -> None:
    """Offer completions in an IPython shell."""
    shell.set_hook("complete_command", lambda _shell, event: complete_line(event.line), re_key=r"%{1,2}fal\b")


def complete_line(line: str) -> list[str]:
    """Give what may stand at the end of a magic's line.

    Args:
        line: the text up to the cursor.
    """
    from fal_notebook.magics.line import COMMANDS

    is_cell = line.lstrip().startswith("%%")
    words = line.split()
    last = "" if line.endswith(" ") else words.pop()
    previous = words[-1] if words else ""
    if is_cell:
        options = [option for action in cell_parser()._actions for option in action.option_strings]  # noqa: SLF001
        offered = _host_names() if previous == "--host" else options
    elif previous in _NAMES_AFTER:
        offered = _host_names()
    else:
        offered = list(COMMANDS) if len(words) <= 1 else []
    return [word for word in offered if word.startswith(last)]


def _host_names() -> list[str]:
    from fal_agent.errors import ConfigurationError
    from fal_notebook import config

    try:
        return ["local", "inline", *config.known_host_names()]
    except ConfigurationError:  # said when a host is used; Tab must not print
        return ["local", "inline"]
