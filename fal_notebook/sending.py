"""One cell on its way to its session and back, and what requests and replies look like on the wire.

Runs in the notebook.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

from fal_agent import pickling
from fal_agent.silence import silence
from fal_agent.wire import Failure
from fal_notebook.handles import Handle, gone_error
from fal_notebook.hosts.base import ShowsRuns
from fal_notebook.payload import make_parcel
from fal_notebook.returning import cell_key, find_earlier, told
from fal_notebook.run import Draw, Run, start

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from fal_agent.framing import Buffer
    from fal_agent.wire import Call
    from fal_notebook.exchange import Request
    from fal_notebook.hosts.base import Host, Parcel, Received
    from fal_notebook.names import SessionNames
    from fal_notebook.notebook_cell import NotebookCell
    from fal_notebook.widgets import SessionWidgets

__all__ = ["RETURN_LIMIT", "Sending", "SessionOfCells", "make_request", "open_reply", "return_limit"]

RETURN_LIMIT = 1 << 20  # bytes; a larger value stays on the host. FAL_NOTEBOOK_RETURN_LIMIT overrules it


class SessionOfCells(Protocol):
    """What a cell on its way needs to know of its session."""

    host: Host
    widgets: SessionWidgets

    def call(
        self, label: str, *, timeout: float | None, key: str = "", inputs: dict[str, str] | None = None
    ) -> Call:
        """Say what is to run, and with what."""

    def names_of(self, session: str, namespace: dict[str, Any]) -> SessionNames:
        """Give what is known of the names of a session that this one takes up."""

    def keep_widgets(self) -> None:
        """A run is taken up: its widgets live in this session's worker."""


class Sending:
    """One cell on its way to its session and back.

    Attributes:
        stale: names that the session did not hold as was thought, so that the cell did not run.
        lacks: requirement lines that were not installed as was thought, likewise.
        installed: those that cells have installed beside the environment.
        run: the run, once it has been started.
    """

    run: Run | None = None

    def __init__(
        self,
        session: SessionOfCells,
        names: SessionNames,
        cell: NotebookCell,
        options: argparse.Namespace,
        installed: Sequence[str] = (),
    ) -> None:
        self.stale: list[str] = []
        self.lacks: list[str] = []
        self.installed = list(installed)
        self._is_attached = False
        self._session, self._names, self._cell, self._options = session, names, cell, options
        with silence():
            self._request = names.request(
                cell.names, cell.namespace, returns=not options.no_return, in_background=options.background
            )

    def start(self, on_event: Draw | None = None) -> Run:
        """Send the cell; or show an earlier run of it, whose notebook has gone."""
        host, inputs = self._session.host, self._request.inputs
        folder = getattr(host, "working_folder", None)
        key = cell_key(self._cell.namespace, self._cell.place["code"], self._options, folder=folder)
        earlier = None if self._options.again else find_earlier(host, key)
        if earlier is not None and isinstance(host, ShowsRuns):
            others = earlier.other_inputs(inputs)
            sys.stderr.write(told(earlier, host.name, others))
            if earlier.is_worth_showing and not earlier.is_watched and not others:
                self._names = self._session.names_of(earlier.session, self._cell.namespace)
                self._session.keep_widgets()
                self._is_attached = True
                self.run = Run.attached(
                    host, earlier.run_id, label=self._cell.label, decode=self.decode, on_event=on_event
                )
                return self.run
        self._request.content["installed"] = self.installed
        call = self._session.call(self._cell.label, timeout=self._options.timeout, key=key, inputs=inputs)
        self._session.widgets.belong_to(call)
        parcel = make_request(call, self._request, self._cell.place)
        self.run = start(host, parcel, decode=self.decode, on_event=on_event)
        return self.run

    @property
    def has_raised(self) -> bool:
        """Whether the cell itself raised, so that its session is as it left it."""
        event = Future.result(self.run).event if self.run is not None and self.run.done() else None
        return isinstance(event, Failure) and event.kind in ("user", "interrupted")

    def decode(self, received: Received) -> dict[str, Any]:
        """Take what came back; give the names that the notebook has got."""
        reply, buffers = open_reply(received)
        self.stale, self.lacks, self.installed = reply["stale"], reply["lacks"], reply["installed"]
        if reply["goes_on"]:
            self._session.widgets.watch()
        if self.lacks:
            return {}
        if not self.stale:
            with silence():
                came = self._names.apply(
                    reply, buffers, self._request, self._cell.namespace, is_own=not self._is_attached
                )
            is_kept = self._options.background or self._options.output is not None
            return came if is_kept else {}  # a run that nobody has must not keep values alive
        self._names.forget(self.stale)
        lost = [
            name
            for name in self.stale
            if name in self._cell.names.reads and isinstance(self._cell.namespace.get(name), Handle)
        ]
        if lost:
            raise gone_error(lost, self._session.host.name)
        return {}

    def note_failure(self) -> None:
        """The cell did not end well."""
        with silence():
            self._names.note_failure(self._cell.names, self._request, self._cell.namespace)


def make_request(call: Call, request: Request, place: dict[str, Any], limit: int | None = None) -> Parcel:
    """Make what travels to a session; values of more than `limit` bytes stay there, by default the usual."""
    content = {**request.content, **place, "limit": return_limit() if limit is None else limit}
    return make_parcel(call, None, [pickling.dump(content)[0], *request.parts])


def open_reply(received: Received) -> tuple[dict[str, Any], Sequence[Buffer]]:
    """Give a session's reply, and the buffers beside it; see `fal_agent.worker.session`."""
    return pickling.load(received.data[:1]), received.data[1:]


def return_limit() -> int:
    """Bytes of the largest value that comes back by itself."""
    text = os.environ.get("FAL_NOTEBOOK_RETURN_LIMIT", "")
    return int(text) if text.isdecimal() else RETURN_LIMIT
