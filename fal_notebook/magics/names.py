"""`%fal push`, `pull`, `vars` and `reset`: the names of a session. Parse, hand over, show.

Runs in the notebook.
"""

from __future__ import annotations

import argparse
import functools
from typing import TYPE_CHECKING, Any, NoReturn

from IPython.core.error import UsageError

from fal_notebook import variables
from fal_notebook.display.tables import Table
from fal_notebook.handles import bytes_as_text, shape_as_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["NAME_COMMANDS"]


def _push(namespace: dict[str, Any], words: Sequence[str]) -> Table:
    options = _parser("push").parse_args(words)
    told = variables.push(namespace, options.names, host=options.host, session=options.session)
    return Table(["name", "sent"], [[name, what] for name, what in told.items()])


def _pull(namespace: dict[str, Any], words: Sequence[str]) -> Table:
    options = _parser("pull").parse_args(words)
    came = variables.pull(namespace, options.names, host=options.host, session=options.session)
    return Table(["name", "type"], [[name, type(value).__qualname__] for name, value in came.items()])


def _vars(namespace: dict[str, Any], words: Sequence[str]) -> Table:
    options = _parser("vars").parse_args(words)
    rows = [
        [
            found.name,
            found.type,
            " ".join(filter(None, (shape_as_text(found.shape), found.dtype)))
            or ("" if found.length is None else f"{found.length:,}"),
            "" if found.size is None else bytes_as_text(found.size),
            found.device or "",
            found.here,
        ]
        for found in variables.variables(namespace, host=options.host, session=options.session)
    ]
    return Table(["name", "type", "shape or length", "size", "device", "in the notebook"], rows)


def _reset(namespace: dict[str, Any], words: Sequence[str]) -> str:
    options = _parser("reset").parse_args(words)
    count, handles = variables.reset(
        namespace, host=options.host, session=options.session, restart=options.restart
    )
    told = "the session will start anew" if count is None else f"{count} name{'s' * (count != 1)} forgotten"
    if handles:
        told += f"; gone with it: {', '.join(handles)} (run the cells that make them again)"
    return told


NAME_COMMANDS: dict[str, Callable[[dict[str, Any], Sequence[str]], Any]] = {
    "push": _push,
    "pull": _pull,
    "vars": _vars,
    "reset": _reset,
}


class _Parser(argparse.ArgumentParser):
    """Raises instead of ending the process: this is a kernel."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}; see %fal help")


@functools.cache
def _parser(command: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"%fal {command}", add_help=False)
    if command in ("push", "pull"):
        parser.add_argument("names", nargs="+", metavar="NAME")
    if command == "reset":
        parser.add_argument("--restart", action="store_true")
    parser.add_argument("--host", metavar="NAME")
    parser.add_argument("--session", metavar="NAME")
    return parser
