"""Tab and Shift-Tab in a `%%fal` cell: the names of its session are asked too, if they can answer at once.

Runs in the notebook. Only a session that was used and whose host is connected is asked, for a moment: a
host that is busy or far away costs no more than that, and none is ever connected for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fal_agent.errors import FalServerlessError
from fal_notebook.session import used_session

if TYPE_CHECKING:
    import argparse

__all__ = ["look"]

_SECONDS = {
    "complete": 0.5,
    "inspect": 1.5,
}  # that a person may wait


def look(options: argparse.Namespace, action: str, code: str, cursor: int, *, detail: int = 0) -> Any:
    """Ask the session that a cell would run in; None if there is none, or it does not answer at once.

    Args:
        options: of the cell's line.
        action: "complete" or "inspect".
        code: the cell without its line.
        cursor: characters of it before the cursor.
        detail: 1 asks for sources too.

    Returns:
        What `fal_agent.worker.looking` says.
    """
    host, session = used_session(options)
    if host is None or not getattr(host, "is_connected", False):
        return None
    seconds = _SECONDS[action]
    try:
        return host.ask(
            "look", timeout=seconds, session=session, action=action, code=code, cursor=cursor, detail=detail
        )
    except FalServerlessError:  # it did not answer in time, or its connection broke: Tab must not print
        return None
