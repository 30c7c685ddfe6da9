"""Calls on their way to the agent, each after what it lacks of them: meaning, function, data.

Runs in the notebook. What the agent has is known until it says otherwise, and is not sent again.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from fal_agent.errors import LinkLostError
from fal_agent.wire import INLINE_LIMIT, Call, Data, Submit
from fal_notebook.hosts.execution import UploadProgress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from fal_agent.framing import Buffer
    from fal_agent.wire import Message
    from fal_notebook.hosts.base import Parcel
    from fal_notebook.hosts.blob_traffic import BlobTraffic
    from fal_notebook.hosts.execution import AgentExecution

__all__ = ["Submissions"]

_KEPT_TEMPLATES = 1024  # fewer than the agent keeps


class Submissions:
    """The calls of one connection.

    Args:
        send: takes a message and its buffers; raises LinkLostError.
        blobs: of the same connection.
        give_up: ends a call whose data cannot be sent, and says why.
    """

    def __init__(
        self,
        send: Callable[[Message, Sequence[Buffer]], None],
        blobs: BlobTraffic,
        give_up: Callable[[AgentExecution, str], None],
    ) -> None:
        self._send, self._blobs, self._give_up = send, blobs, give_up
        self._templates: OrderedDict[int, tuple[str, Call]] = OrderedDict()  # by the identity of the call
        self._naming, self._numbers = threading.Lock(), itertools.count(1)
        self._functions: set[str] = set()  # digests that the agent has

    def send(self, execution: AgentExecution) -> None:
        """Send a call; in the background, if there is data to be sent before it.

        Raises:
            LinkLostError: the connection broke.
        """
        parcel = execution.parcel
        assert parcel is not None
        if self._blobs.known.issuperset(parcel.blobs) and not self._function_needs_blobs(parcel):
            self._submit(execution)
        else:
            self._upload_in_background(execution)

    def send_again(self, execution: AgentExecution, missing: Iterable[str]) -> None:
        """Send a call anew, with all of its data: the agent let go of what it had.

        Args:
            execution: the call, which was turned away.
            missing: names of blobs that the agent has no more.
        """
        self.forget(execution, missing)
        self._upload_in_background(execution)

    def forget(self, execution: AgentExecution, missing: Iterable[str]) -> None:
        """Take it that the agent has nothing of a call."""
        parcel = execution.parcel
        assert parcel is not None
        self._functions.discard(parcel.call.function or "")
        self._blobs.known.difference_update(missing)
        with self._naming:
            self._templates.pop(id(parcel.call), None)

    def template_of(self, call: Call) -> str | None:
        """Our name for a call that the agent has been told; None if there is none."""
        known = self._templates.get(id(call))
        return known[0] if known is not None and known[1] is call else None

    # ------------------------------------------------------------ inside

    def _function_needs_blobs(self, parcel: Parcel) -> bool:
        if not parcel.function_data or parcel.call.function in self._functions:
            return False
        inline = sum(len(part) for part in (*parcel.function_data, *parcel.buffers))
        return inline > INLINE_LIMIT

    def _upload_in_background(self, execution: AgentExecution) -> None:
        threading.Thread(
            target=self._upload, args=(execution,), name=f"fal-upload-{execution.run_id}", daemon=True
        ).start()

    def _upload(self, execution: AgentExecution) -> None:
        """Send what the call's data needs, then the call; runs in a thread."""
        parcel = execution.parcel
        assert parcel is not None
        blobs = dict(parcel.blobs)
        if self._function_needs_blobs(parcel):
            function = parcel.call.function or ""
            blobs.update({_function_blob(function, i): part for i, part in enumerate(parcel.function_data)})
        telling = UploadProgress(execution, sum(len(memoryview(data).cast("B")) for data in blobs.values()))
        try:
            for name, data in blobs.items():
                self._blobs.send_once(name, data, lambda: execution.withdrawn, telling.sent)
                if execution.withdrawn:
                    return
            self._submit(execution)
        except LinkLostError:
            return  # the reading thread reports it to every call
        except Exception as error:
            self._give_up(execution, str(error))
            if not isinstance(error, OSError):  # nothing that was to be expected
                raise

    def _submit(self, execution: AgentExecution) -> None:
        parcel = execution.parcel
        assert parcel is not None
        refs, beside = self._function_refs(parcel)
        with execution.turn:
            if execution.withdrawn:
                return
            template, is_new = self._template(parcel.call)
            self._send(
                Submit(
                    execution.run_id,
                    template,
                    parcel.arguments,
                    call=parcel.call if is_new else None,
                    function_data=refs,
                    again=execution.was_sent,
                    attended=execution.attended,
                ),
                [*parcel.buffers, *beside],
            )
            execution.sent = execution.was_sent = True
        if parcel.call.function is not None:
            self._functions.add(parcel.call.function)

    def _function_refs(self, parcel: Parcel) -> tuple[Data | None, Sequence[Buffer]]:
        """Say where the agent finds the function, and what of it goes beside the call; None: it has it."""
        digest, parts = parcel.call.function, parcel.function_data
        if digest is None or digest in self._functions or not parts:
            return None, ()
        if self._function_needs_blobs(parcel):
            return [_function_blob(digest, index) for index in range(len(parts))], ()
        first = len(parcel.buffers)
        return list(range(first, first + len(parts))), parts

    def _template(self, call: Call) -> tuple[str, bool]:
        """Our name for a call, and whether the agent is yet to be told its meaning."""
        with self._naming:
            name, known = self._templates.get(id(call), ("", None))
            if known is call:
                return name, False
            name = f"t{next(self._numbers)}"
            self._templates[id(call)] = (name, call)  # keeps the call, so that its id stays its own
            if len(self._templates) > _KEPT_TEMPLATES:
                self._templates.popitem(last=False)
            return name, True


def _function_blob(digest: str, index: int) -> str:
    return f"fn-{digest}-{index}"
