"""The host's end of widgets: comms whose other half is in the notebook's front end.

Runs in a worker that has the `comm` package, which ipywidgets brings. What a widget says goes out with
the call that runs, in order with what that shows; what its other half says is delivered between calls,
on the session's thread, as in a kernel.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.worker.context import CURRENT_CALL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fal_agent.framing import Buffer
    from fal_agent.worker.context import CallContext

__all__ = ["are_open", "deliver", "hook", "speak_for"]

_MAX_HELD = 8 << 20  # bytes that are held for the next call; the oldest are forgotten

_Said = tuple[str, str, dict[str, Any], list["Buffer"]]  # as `CallContext.comm` takes it


class _Line:
    """How what widgets say leaves this process: with the call of the context, or with the next one."""

    def __init__(self) -> None:
        self._speaker: Optional[CallContext] = None  # the session's present call
        self._held: deque[_Said] = deque()
        self._size = 0
        self._lock = threading.Lock()

    def speak_for(self, call: CallContext) -> None:
        """A call of a session begins: it also says what threads have said since the one before."""
        with self._lock:
            held, self._held, self._size = self._held, deque(), 0
            self._speaker = call
        for said in held:
            call.comm(*said)

    @property
    def call(self) -> Optional[CallContext]:
        """The call that says what is said now; None between calls."""
        for call in (CURRENT_CALL.get(), self._speaker):
            if call is not None and not call.is_over:
                return call
        return None

    def say(self, said: _Said) -> None:
        call = self.call
        if call is not None:
            call.comm(*said)
            return
        action, comm_id, content, buffers = said
        with self._lock:
            self._held.append((action, comm_id, content, [bytes(buffer) for buffer in buffers]))
            self._size += _size(self._held[-1])
            while self._size > _MAX_HELD:
                self._size -= _size(self._held.popleft())


class _Kernel:
    """What an `Output` widget asks for the message whose output it takes."""

    def get_parent(self, channel: str = "shell") -> dict[str, Any]:  # noqa: ARG002 - a kernel's signature
        """The front end's message that the present call answers."""
        call = _line.call
        return {"header": {"msg_id": call.parent}} if call is not None and call.parent else {}


_line = _Line()
speak_for = _line.speak_for
_comm_class: Any = None


def hook() -> None:
    """Let comms made from now on lead to the notebook, if this environment knows comms at all."""
    global _comm_class  # noqa: PLW0603 - the class can only be made where the package is
    if "comm" not in sys.modules and importlib.util.find_spec("comm") is None:
        return
    comm: Any = importlib.import_module("comm")
    if _comm_class is None:
        _comm_class = _make_class(importlib.import_module("comm.base_comm").BaseComm)
        _comm_class.manager = importlib.import_module("comm.base_comm").CommManager()
    if comm.create_comm is not _create:  # at first, or after somebody imported ipykernel here
        comm.create_comm, comm.get_comm_manager = _create, _manager


def are_open() -> bool:
    """Whether there are widgets in this process."""
    return _comm_class is not None and bool(_comm_class.manager.comms)


def deliver(action: str, message: dict[str, Any]) -> None:
    """Hand a front end's message to the comm that it is for."""
    if _comm_class is not None:
        getattr(_comm_class.manager, f"comm_{action}")(None, "", message)


def _create(*args: Any, **options: Any) -> Any:
    return _comm_class(*args, **options)


def _manager() -> Any:
    return _comm_class.manager


def _make_class(base: Any) -> Any:
    class HostComm(base):  # type: ignore[misc]
        """A comm whose messages go to the notebook."""

        kernel = _Kernel()
        manager: Any = None

        def publish_msg(
            self,
            msg_type: str,
            data: Optional[dict[str, Any]] = None,
            metadata: Optional[dict[str, Any]] = None,
            buffers: Optional[Sequence[Buffer]] = None,
            **keys: Any,
        ) -> None:
            """Send "comm_open", "comm_msg" or "comm_close"."""
            content = {"data": data or {}, "metadata": metadata or {}, **keys}
            views: list[Buffer] = [memoryview(buffer).cast("B") for buffer in buffers or ()]
            _line.say((msg_type[len("comm_") :], self.comm_id, content, views))

    return HostComm


def _size(said: _Said) -> int:
    return len(str(said[2])) + sum(map(len, said[3]))
