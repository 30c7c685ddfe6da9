"""The secrets of a worker's calls: environment variables while they are wanted, and `***` ever after.

Runs in a worker. Calls that run one after the other share a warm worker whatever secrets they have: the
variables are those of the call that began last, so that models stay cached for all of them, and one
that names no secret finds none. Calls that run at the same time (`max_multiplexing`) share a process
only with calls of the same secrets; the agent sees to that.

They are set in this process and are not among the variables that it was started with, so that they are
not in its `/proc/PID/environ`.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Optional

from fal_agent.masking import Masker, masker_of

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Secrets"]


class Secrets:
    """The secrets of one process.

    Attributes:
        masker: knows all that the process was given so far; None if there were none.
        typed: knows what the person answered to `getpass`; nothing that holds it is journaled.
    """

    def __init__(self) -> None:
        self.masker: Optional[Masker] = None
        self.typed: Optional[Masker] = None
        self._present: Mapping[str, str] = {}
        self._replaced: dict[str, Optional[str]] = {}  # name -> the host's own value, None if there is none
        self._lock = threading.Lock()

    def put(self, variables: Mapping[str, str]) -> None:
        """Let these be the secrets among the environment variables, and no others."""
        if variables == self._present:
            return
        with self._lock:
            self.masker = masker_of(self.masker, variables)
            for name, before in self._replaced.items():
                if os.environ.get(name) != self._present.get(name):  # the user's code has set its own
                    continue
                if before is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = before
            self._replaced = {name: os.environ.get(name) for name in variables}
            os.environ.update(variables)
            self._present = variables

    def learn(self, password: str) -> None:
        """Know what the person answered to `getpass`. It is shown where code prints it, as anywhere."""
        with self._lock:
            self.typed = masker_of(self.typed, {"": password})

    def mask(self, text: str) -> str:
        """Give a text without the secrets."""
        return text if self.masker is None else self.masker.mask(text)
