"""Asking the person at the notebook or terminal a question.

Runs in the notebook. Answers are handed to whoever asked and kept nowhere; secrets are not echoed. Where
nobody can answer (a script, a notebook executed without its owner), every question is answered with no.
"""

from __future__ import annotations

import getpass
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ConsolePrompt", "Prompt", "SilentPrompt", "default_prompt", "read_line", "unattended"]


class Prompt(Protocol):
    """A way to ask the person."""

    def ask(self, text: str, *, secret: bool) -> str | None:
        """Ask for a line of text, not echoed if `secret`; None if nobody answers."""

    def confirm(self, text: str) -> bool:
        """Ask a yes-or-no question; False if nobody answers."""

    def tell(self, text: str) -> None:
        """Say something that needs no answer."""


class SilentPrompt:
    """Nobody is there to answer."""

    def ask(self, text: str, *, secret: bool) -> str | None:  # noqa: ARG002 - nobody hears the question
        """Give no answer."""
        return None

    def confirm(self, text: str) -> bool:  # noqa: ARG002 - nobody hears the question
        """Answer no."""
        return False

    def tell(self, text: str) -> None:
        """Say nothing, since nobody listens."""


class ConsolePrompt:
    """Asks through `input` and `getpass`, which IPython kernels turn into a field under the cell."""

    def ask(self, text: str, *, secret: bool) -> str | None:
        """Ask for a line of text; None at end of input, or if the front end takes none."""
        try:
            # Kernels replace both functions, so they are looked up anew each time.
            return getpass.getpass(text) if secret else input(text)
        except EOFError:
            return None
        except RuntimeError as error:
            if type(error).__name__ == "StdinNotImplementedError":  # IPython's; not worth importing it for
                return None
            raise
        except NotImplementedError:
            return None

    def confirm(self, text: str) -> bool:
        """Ask until the answer is yes or no, three times at most."""
        question = f"{text} (yes/no) "
        for _ in range(3):
            answer = self.ask(question, secret=False)
            if answer is None or answer.strip().lower() in {"no", "n"}:
                return False
            if answer.strip().lower() == "yes":
                return True
            question = "Please type yes or no: "
        return False

    def tell(self, text: str) -> None:
        """Write a line where errors are written."""
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def read_line(text: str, *, secret: bool) -> tuple[str, str]:
    """Ask for a line of text on behalf of code elsewhere.

    Args:
        text: what to ask.
        secret: what is typed must not be seen.

    Returns:
        What was typed and "", or the message and the name of the exception that the code gets instead.
    """
    try:
        return (getpass.getpass(text) if secret else input(text)), ""
    except (EOFError, OSError, RuntimeError) as error:  # at the end of the input, or without any
        name = type(error).__name__
        return str(error), name if name == "StdinNotImplementedError" else "EOFError"


_here = threading.local()


@contextmanager
def unattended() -> Iterator[None]:
    """Ask nobody within, in this thread: what goes on in the background must not put a field into a cell."""
    before = getattr(_here, "is_unattended", False)
    _here.is_unattended = True
    try:
        yield
    finally:
        _here.is_unattended = before


def default_prompt() -> Prompt:
    """Give the way to ask that fits where this process runs."""
    if getattr(_here, "is_unattended", False):
        return SilentPrompt()
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if getattr(shell, "kernel", None) is not None:
        return ConsolePrompt()
    if sys.stdin is not None and sys.stdin.isatty():
        return ConsolePrompt()
    return SilentPrompt()
