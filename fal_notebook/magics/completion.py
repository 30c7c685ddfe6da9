"""Tab after `%fal` and `%%fal`: commands, options, names of hosts.

Runs in the notebook. Looks at settings only, never at a machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fal_notebook.magics.options import cell_parser

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["add_completions", "complete_line"]

_NAMES_AFTER = ("connect", "status", "envs", "runs", "stop", "doctor")


def add_completions(shell: Any) -> None:
    """Offer completions in an IPython shell."""

    def complete(_shell: Any, event: Any) -> list[str]:
        return complete_line(event.line, shell.user_ns)

    shell.set_hook("complete_command", complete, re_key=r"%{1,2}fal\b")


def complete_line(line: str, namespace: Mapping[str, Any] | None = None) -> list[str]:
    """Give what may stand at the end of a magic's line.

    Args:
        line: the text up to the cursor.
        namespace: the notebook's names.
    """
    from fal_notebook.magics.line import COMMANDS
    from fal_notebook.magics.names import NAME_COMMANDS

    is_cell = line.lstrip().startswith("%%")
    words = line.split()
    last = "" if line.endswith(" ") else words.pop()
    previous = words[-1] if words else ""
    if previous == "--host":
        offered = _host_names()
    elif previous == "--session":
        offered = _session_names(words)
    elif is_cell:
        offered = [option for action in cell_parser()._actions for option in action.option_strings]  # noqa: SLF001
    elif len(words) > 1 and words[1] in NAME_COMMANDS:
        offered = _name_words(words, namespace or {})
    elif previous in _NAMES_AFTER:
        offered = _host_names()
    else:
        offered = [*COMMANDS, *NAME_COMMANDS] if len(words) <= 1 else []
    return [word for word in offered if word.startswith(last)]


def _name_words(words: list[str], namespace: Mapping[str, Any]) -> list[str]:
    """What may stand in the line of a command about names."""
    options = ["--host", "--session"]
    if words[1] == "push":
        return [*(name for name in namespace if name[:1] != "_"), *options]
    if words[1] == "pull":
        from fal_notebook.variables import known_names

        return [*known_names(_value_of("--host", words), _value_of("--session", words)), *options]
    return [*options, *(["--restart"] if words[1] == "reset" else [])]


def _session_names(words: list[str]) -> list[str]:
    from fal_notebook.session import session_names

    return [name for name in session_names(_value_of("--host", words)) if not name.startswith("kernel-")]


def _value_of(option: str, words: list[str]) -> str | None:
    at = words.index(option) + 1 if option in words else len(words)
    return words[at] if at < len(words) else None


def _host_names() -> list[str]:
    from fal_agent.errors import ConfigurationError
    from fal_notebook import config

    try:
        return ["local", "inline", *config.known_host_names()]
    except ConfigurationError:  # said when a host is used; Tab must not print
        return ["local", "inline"]
