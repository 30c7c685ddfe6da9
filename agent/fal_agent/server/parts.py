"""Runs that are parts of an app and speak in the name of its own run.

Runs in the agent, on its event loop. The notebook sees one run, whatever runners come and go.
"""

from __future__ import annotations

import dataclasses
import uuid
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.server.runs import Run
from fal_agent.server.spool import ending
from fal_agent.wire import Ack, Failure, Result, Serving

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fal_agent.framing import Buffer
    from fal_agent.server.prepared import Prepared
    from fal_agent.wire import Event, Message

__all__ = ["Part"]


class _NoJournal:
    """Stands for the journal: what a runner says is recorded as its app's."""

    def set_state(self, *_args: Any, **_options: Any) -> None:
        """Record nothing."""


class Part(Run):
    """A run that speaks in the name of another."""

    def __init__(self, app: Run, prepared: Optional[Prepared] = None) -> None:
        super().__init__(
            uuid.uuid4().hex[:16],
            prepared=prepared or app.prepared,
            arguments=[],
            buffers=[],
            client_id=app.client_id,
            connection=None,
            journal=_NoJournal(),  # type: ignore[arg-type] # it has what a run needs of it
        )
        self.app = app

    def emit(self, event: Event, buffers: Sequence[Buffer] = ()) -> None:
        """Pass an event on as the app's; the last one ends this run alone."""
        if self.is_finished:
            return
        if isinstance(event, (Result, Failure)):
            self.state, _ = ending(event)
            for timer in self.timers.values():
                timer.cancel()
            self.timers.clear()
            self.ended(event, buffers)
            for callback in self.on_finish:
                callback(self)
            return
        self.app.emit(dataclasses.replace(event, run_id=self.app.run_id), buffers)
        if event.cost and self.worker is not None:
            self.worker.send(Ack(self.run_id, 0, event.cost))
        if isinstance(event, Serving):
            self.serves()

    def ended(self, event: Event, buffers: Sequence[Buffer]) -> None:
        """Take the last event."""
        raise NotImplementedError

    def serves(self) -> None:
        """The app answers requests."""

    def on_message(self, message: Message) -> None:
        """Take what the worker says besides events."""
