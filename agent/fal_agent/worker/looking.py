"""Tab and Shift-Tab in a cell that is being written: what a session's names say about it.

Runs in a worker, in a thread beside its calls, and only while none runs. The answer is plain data:

    complete    [[start, end, text, type, signature], ...]: what may replace characters of the code
    inspect     MIME bundle of what is known of the object at the cursor
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    from fal_agent.wire import Look

__all__ = ["look"]

_MOST = 500  # completions of one answer


def look(shell: Any, message: Look) -> Any:
    """Answer a question about a place in a cell; None if nothing is known.

    Args:
        shell: the session's.
        message: the question.
    """
    return _complete(shell, message) if message.action == "complete" else _inspect(shell, message)


def _complete(shell: Any, message: Look) -> list[Any]:
    from itertools import islice

    from IPython.core.completer import provisionalcompleter, rectify_completions

    completer = shell.Completer
    asks_jedi, completer.use_jedi = (
        completer.use_jedi,
        False,
    )  # it starts slowly; the notebook's reads the code too
    try:
        with provisionalcompleter():
            found = rectify_completions(message.code, completer.completions(message.code, message.cursor))
            return [
                [item.start, item.end, item.text, item.type, item.signature] for item in islice(found, _MOST)
            ]
    finally:
        completer.use_jedi = asks_jedi


def _inspect(shell: Any, message: Look) -> Optional[dict[str, Any]]:
    from IPython.utils.tokenutil import token_at_cursor

    name = token_at_cursor(message.code, message.cursor)
    try:
        bundle: dict[str, Any] = shell.object_inspect_mime(name, detail_level=message.detail)
    except KeyError:
        return None
    return bundle
