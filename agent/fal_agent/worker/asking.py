"""`input` and `getpass`: what the user's code asks is asked in the notebook, under the cell that runs.

Runs in a worker. The answer comes as a message, which a waiting call may be interrupted before. Answers
are handed to the code that asked and kept nowhere.
"""

from __future__ import annotations

import builtins
import getpass
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from fal_agent.worker.context import CURRENT_CALL

if TYPE_CHECKING:
    import queue

    from fal_agent.worker.context import Answer

__all__ = ["install"]

_LOOK_SECONDS = 0.05  # between two looks of a thread that an interrupt cannot wake

_original_input, _original_getpass = builtins.input, getpass.getpass


def install() -> None:
    """Let this process ask in the notebook; a forked child asks nobody."""
    builtins.input, getpass.getpass = _input, _getpass
    os.register_at_fork(after_in_child=_restore)


def _restore() -> None:
    builtins.input, getpass.getpass = _original_input, _original_getpass


def _input(prompt: object = "", /) -> str:
    """Ask the person at the notebook for a line of text, and give it without its end.

    Raises:
        EOFError: there is nobody to ask.
    """
    return _ask(str(prompt), password=False)


def _getpass(prompt: str = "Password: ", stream: Any = None, **_others: Any) -> str:  # noqa: ARG001 - a terminal's
    """Ask the person at the notebook for a password, which is not seen.

    Raises:
        EOFError: there is nobody to ask.
    """
    return _ask(str(prompt), password=True)


def _ask(text: str, *, password: bool) -> str:
    call = CURRENT_CALL.get()
    if call is None or call.is_over:  # a thread that an earlier call left behind
        raise EOFError("no cell or call is running that could ask for input")
    try:
        answer, error = _wait(call.ask(text, password=password))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Interrupted by user") from None
    if error:
        raise _exception(error, answer)
    return answer


def _wait(answers: queue.SimpleQueue[Answer]) -> Answer:
    if threading.current_thread() is threading.main_thread():
        return answers.get()  # an interrupt ends it
    while answers.empty():  # an interrupt of another thread strikes between two instructions only
        time.sleep(_LOOK_SECONDS)
    return answers.get()


def _exception(name: str, message: str) -> Exception:
    """Make what a kernel would raise; where IPython is not there, what any Python would."""
    if name == "StdinNotImplementedError":
        try:
            from IPython.core.error import StdinNotImplementedError
        except ImportError:
            return EOFError(message)
        error: Exception = StdinNotImplementedError(message)
        return error
    return EOFError(message) if message else EOFError()
