"""A real Jupyter kernel, driven as a front end drives it."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["PATH", "Cell", "Kernel", "start_kernel", "working_kernel"]

PATH = os.pathsep.join(filter(None, sys.path))  # on which a kernel finds what the tests find

_VIEW = "application/vnd.jupyter.widget-view+json"


@dataclass
class Cell:
    """One executed cell and what a front end shows below it.

    Attributes:
        outputs: dictionaries as in a notebook file; text of one stream is put together.
        status: "ok" or "error"; None while it runs.
        clears: the next output takes the place of those that are there.
        payload: what the reply asks the front end to do, such as to open a pager.
    """

    message_id: str
    outputs: list[dict[str, Any]] = field(default_factory=list)
    status: str | None = None
    clears: bool = False
    payload: list[dict[str, Any]] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What was printed on stdout."""
        return self._stream("stdout")

    @property
    def errors(self) -> str:
        """What was printed on stderr."""
        return self._stream("stderr")

    @property
    def kinds(self) -> list[str]:
        """The kinds of outputs, in order."""
        return [output["output_type"] for output in self.outputs]

    @property
    def result(self) -> str | None:
        """The plain text of the cell's result."""
        found = [o["data"]["text/plain"] for o in self.outputs if o["output_type"] == "execute_result"]
        return found[-1] if found else None

    @property
    def error(self) -> str:
        """The error's name and text."""
        return "".join(f"{o['ename']}: {o['evalue']}" for o in self.outputs if o["output_type"] == "error")

    def _stream(self, name: str) -> str:
        return "".join(o["text"] for o in self.outputs if o["output_type"] == "stream" and o["name"] == name)


class Kernel:
    """A kernel with the extension loaded.

    Attributes:
        cells: every cell that was run, the oldest first.
        widgets: the state of each widget, by its id.
        buffers: the binary buffers of its last message, likewise.
        taken: what `Output` widgets took from the cells that they were open in, likewise.
        updates: how often a display was updated.
    """

    def __init__(self, client: Any, manager: Any) -> None:
        self._client, self._manager = client, manager
        self.cells: list[Cell] = []
        self.widgets: dict[str, dict[str, Any]] = {}
        self.buffers: dict[str, list[bytes]] = {}
        self.taken: dict[str, Cell] = {}
        self.updates = 0
        self._displays: dict[str, list[dict[str, Any]]] = {}
        self._replies: dict[str, dict[str, Any]] = {}

    def run(self, code: str, *, timeout: float = 90.0) -> Cell:
        """Run a cell and wait until it has ended and said all."""
        cell = self.start(code)
        self.wait(cell, timeout=timeout)
        return cell

    def start(self, code: str, *, stdin: bool = False) -> Cell:
        """Send a cell; `stdin` says that somebody is there to answer what it asks."""
        cell = Cell(self._client.execute(code, allow_stdin=stdin))
        self.cells.append(cell)
        return cell

    def asked(self, *, timeout: float = 60.0) -> tuple[str, bool]:
        """Wait until the running cell asks something; give the text, and whether it is a password."""
        content = self._client.get_stdin_msg(timeout=timeout)["content"]
        return content["prompt"], content["password"]

    def answer(self, text: str) -> None:
        """Type a line into the field that asks."""
        self._client.input(text)

    def talk(self, code: str, *answers: str) -> Cell:
        """Run a cell, giving the answers in turn to what it asks."""
        cell = self.start(code, stdin=True)
        for answer in answers:
            self.asked()
            self.answer(answer)
        self.wait(cell)
        return cell

    def wait(self, cell: Cell, *, timeout: float = 90.0) -> None:
        """Wait until a cell has ended."""
        end = time.monotonic() + timeout
        while cell.status is None or not cell.status.endswith("."):
            self._take(end - time.monotonic())
        cell.status = cell.status.rstrip(".")
        while cell.message_id not in self._replies:
            reply = self._client.get_shell_msg(timeout=max(0.0, end - time.monotonic()))
            self._replies[reply["parent_header"]["msg_id"]] = reply["content"]
        cell.payload = self._replies.pop(cell.message_id).get("payload", [])

    def wait_for(self, cell: Cell, text: str, *, timeout: float = 60.0) -> None:
        """Wait until something that contains `text` stands below a cell."""
        end = time.monotonic() + timeout
        while text not in str(cell.outputs):
            self._take(end - time.monotonic())

    def interrupt(self) -> None:
        """Press the stop button."""
        self._manager.interrupt_kernel()

    def kill(self) -> None:
        """End it as the OOM killer does."""
        self._manager.signal_kernel(signal.SIGKILL)
        while self._manager.is_alive():
            time.sleep(0.01)

    def press(self, cell: Cell, *, label: str = "Stop") -> None:
        """Press the button that stands below a cell, as a front end with widgets does."""
        views = [o["data"][_VIEW]["model_id"] for o in cell.outputs if _VIEW in o.get("data", {})]
        assert len(views) == 1, cell.outputs
        assert self.widgets[views[0]]["description"] == label
        content = {"comm_id": views[0], "data": {"method": "custom", "content": {"event": "click"}}}
        self._client.shell_channel.send(self._client.session.msg("comm_msg", content))

    def say(
        self, widget: str, data: dict[str, Any], buffers: list[bytes] | None = None, *, timeout: float = 60.0
    ) -> Cell:
        """Send a message to a widget, and wait until it was dealt with; give what it caused."""
        message = self._client.session.msg("comm_msg", {"comm_id": widget, "data": data})
        caused = Cell(message["header"]["msg_id"])
        self.cells.append(caused)
        self._client.session.send(self._client.shell_channel.socket, message, buffers=buffers)
        end = time.monotonic() + timeout
        while caused.status is None:
            self._take(end - time.monotonic())
        return caused

    def set(self, widget: str, **state: Any) -> Cell:
        """Let a widget have another state, as a person does who moves a slider."""
        self.widgets[widget].update(state)
        return self.say(widget, {"method": "update", "state": state, "buffer_paths": []})

    def view(self, cell: Cell) -> str:
        """The id of the only widget that stands below a cell."""
        (view,) = [o["data"][_VIEW]["model_id"] for o in cell.outputs if _VIEW in o.get("data", {})]
        return view

    def until(self, is_so: Callable[[], bool], *, timeout: float = 60.0) -> None:
        """Listen to the kernel until something is so."""
        end = time.monotonic() + timeout
        while not is_so():
            self._take(end - time.monotonic())

    def complete(self, code: str) -> list[str]:
        """Press Tab at the end of `code`."""
        reply = self._client.complete(code, reply=True, timeout=30)
        return list(reply["content"]["matches"])

    def _take(self, timeout: float) -> None:
        if timeout <= 0:
            raise TimeoutError(f"the kernel said nothing more; the last cell shows {self.cells[-1].outputs}")
        try:
            message = self._client.get_iopub_msg(timeout=min(timeout, 1.0))
        except queue.Empty:
            return
        kind, content = message["msg_type"], message["content"]
        cell = next((c for c in self.cells if c.message_id == message["parent_header"].get("msg_id")), None)
        if kind == "comm_open":
            self.widgets[content["comm_id"]] = dict(content["data"]["state"])
            self.buffers[content["comm_id"]] = list(map(bytes, message["buffers"]))
        elif kind == "comm_msg" and content["comm_id"] in self.widgets:
            self.widgets[content["comm_id"]].update(content["data"].get("state", {}))
            self.buffers[content["comm_id"]] = list(map(bytes, message["buffers"]))
        elif kind == "comm_close":
            self.widgets.pop(content["comm_id"], None)
        elif kind == "update_display_data":
            self.updates += 1
            for output in self._displays.get(content["transient"]["display_id"], []):
                output.update(data=content["data"], metadata=content["metadata"])
        elif cell is not None:
            taker = next(
                (w for w, state in self.widgets.items() if state.get("msg_id") == cell.message_id), None
            )
            if taker is not None and kind != "status":
                cell = self.taken.setdefault(taker, Cell(""))
            self._add(cell, kind, content)

    def _add(self, cell: Cell, kind: str, content: dict[str, Any]) -> None:
        if cell.clears and kind in ("stream", "display_data", "execute_result", "error"):
            cell.outputs.clear()
            cell.clears = False
        if kind == "status" and content["execution_state"] == "idle":
            cell.status = f"{'error' if 'error' in cell.kinds else 'ok'}."
        elif kind == "stream":
            last = cell.outputs[-1] if cell.outputs else {}
            if last.get("output_type") == "stream" and last["name"] == content["name"]:
                last["text"] += content["text"]
            else:
                cell.outputs.append({"output_type": "stream", **content})
        elif kind in ("display_data", "execute_result", "error"):
            cell.outputs.append({"output_type": kind, **content})
            display_id = content.get("transient", {}).get("display_id")
            if display_id:
                self._displays.setdefault(display_id, []).append(cell.outputs[-1])
        elif kind == "clear_output":
            cell.clears = content["wait"]
            if not content["wait"]:
                cell.outputs.clear()


@contextlib.contextmanager
def start_kernel(
    *, extension: bool = True, working_folder: Path | None = None, **environment: str
) -> Iterator[Kernel]:
    """Start a kernel of this Python.

    Args:
        extension: load ours in it.
        working_folder: where it runs; in a folder of its own by default.
        environment: variables besides those of this process.
    """
    inherited = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}  # kernels heed it
    from jupyter_client import KernelManager

    with tempfile.TemporaryDirectory(prefix="fal-kernel-") as folder:
        manager = KernelManager(transport="ipc", ip=f"{folder}/k")
        manager.kernel_cmd = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        manager.connection_file = f"{folder}/connection.json"
        variables = {**inherited, "IPYTHONDIR": f"{folder}/ipython", **environment}
        manager.start_kernel(env=variables, cwd=working_folder or folder)
        client = manager.blocking_client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=60)
            kernel = Kernel(client, manager)
            if extension:
                loaded = kernel.run("%load_ext fal_notebook")
                assert loaded.status == "ok", loaded.outputs
            yield kernel
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)


@contextlib.contextmanager
def working_kernel() -> Iterator[Kernel]:
    """Start a kernel for the tests of a file; what it leaves on hosts is stopped in the end."""
    with start_kernel(PYTHONPATH=PATH) as kernel:
        yield kernel
        kernel.run("%fal stop --all")
