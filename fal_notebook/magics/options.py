"""The options of `%%fal`, read from its line.

Runs in the notebook. No IPython here, so that the command line's help is the magic's help.
"""

from __future__ import annotations

import argparse
import functools
import shlex
from typing import NoReturn

__all__ = ["CELL_HELP", "CellOptionsError", "cell_parser", "parse_cell_line"]


class CellOptionsError(Exception):
    """The magic's line is wrong; the message says how."""


class _Parser(argparse.ArgumentParser):
    """Raises instead of ending the process: this is a kernel."""

    def error(self, message: str) -> NoReturn:
        raise CellOptionsError(f"{message}. `%%fal?` shows the options")


@functools.cache
def cell_parser() -> argparse.ArgumentParser:
    """Make the parser of `%%fal`'s line."""
    parser = _Parser(
        prog="%%fal",
        description="Run this cell on a host. Names it reads go along, names it assigns come back.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        epilog=(
            "A PEP 723 block (# /// script) in the cell adds its dependencies.\n"
            "Names that are large or cannot be pickled stay on the host; the notebook gets a handle (.get())."
        ),
    )
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="show this, and run nothing")
    add("--host", metavar="NAME", help="a host; default: the current one (%%fal connect NAME)")
    add("-r", "--require", action="append", default=[], metavar="LINE",
        help="a requirement (PEP 508), repeatable; `-r auto` takes them from the cell's imports")  # fmt: skip
    add("--requirements-file", metavar="FILE", help="a requirements.txt")
    add("--python", metavar="X.Y", help="Python of the environment; default: the notebook's")
    add("--machine-type", metavar="TYPE", help="XS, S, M, L, XL, GPU, GPU-<MODEL>, or a label of a host")
    add("--gpu", type=int, metavar="N", help="devices to reserve")
    add("--timeout", type=float, metavar="SECONDS", help="stop the cell after so long")
    add("--secret", action="append", default=[], metavar="NAME",
        help="an environment variable that goes along, hidden in what is shown; repeatable")  # fmt: skip
    add("--session", metavar="NAME", help="the session whose names the cell shares; default: this kernel's")
    add("--fresh", action="store_true", help="start the session anew, in a new process")
    add("--again", action="store_true",
        help="run it even if an earlier run goes on or ended unseen, which would be shown")  # fmt: skip
    add("--no-return", action="store_true", help="bring no names back")
    add("-o", "--output", metavar="NAME", help="put the run into this variable")
    add("--background", action="store_true", help="do not wait; names come back with the run's result()")
    return parser


def parse_cell_line(line: str) -> argparse.Namespace:
    """Read the line of `%%fal`.

    Raises:
        CellOptionsError: it is wrong.
    """
    try:
        words = shlex.split(line, comments=False)
    except ValueError as error:
        raise CellOptionsError(f"the line cannot be read: {error}") from None
    options, unknown = cell_parser().parse_known_args(words)
    if unknown:
        word, text = unknown[0], f"unrecognized arguments: {' '.join(unknown)}"
        if not word.startswith("-"):
            text += f"; a host is named by `--host {word}`, a package by `-r {word}`"
        cell_parser().error(text)
    if options.output is not None and not options.output.isidentifier():
        raise CellOptionsError(f"-o {options.output!r} is not a name that a variable can have")
    if options.timeout is not None and options.timeout <= 0:
        raise CellOptionsError(f"--timeout {options.timeout:g} is not a time; give seconds above 0")
    if options.gpu is not None and options.gpu < 0:
        raise CellOptionsError(f"--gpu {options.gpu} is not a number of devices")
    return options


CELL_HELP = "Run this cell on a host; the names it assigns come back here."
