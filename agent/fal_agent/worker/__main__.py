"""Start a worker: `python -m fal_agent.worker DESCRIPTOR`, the descriptor being a socket to the agent.

The worker lives as long as that connection: when the agent is gone it ends itself at once, whatever
the user's code does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import traceback
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.duplex import Duplex
from fal_agent.runtime import progress
from fal_agent.wire import Ack, Execute, Interrupt, Lend, Look, Message, Ready, Recall, Reply, Runners
from fal_agent.worker import asking, datapaths, debugging
from fal_agent.worker.capture import Capture
from fal_agent.worker.context import tell_progress
from fal_agent.worker.executor import Executor
from fal_agent.worker.secrets import Secrets

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


def main(descriptor: int) -> None:
    """Serve calls until the connection ends."""
    _die_with_the_agent()
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    os.register_at_fork(after_in_child=connection.detach)
    log_fd = os.dup(2)
    os.set_inheritable(log_fd, False)
    secrets = Secrets()
    capture = Capture(log_fd, secrets)
    datapaths.install()  # before output is captured: should it fail, the log says why
    capture.install()
    asking.install()
    debugging.install()
    progress.tell_by(tell_progress)
    os.register_at_fork(after_in_child=lambda: progress.tell_by(lambda _step: None))
    executor = Executor(capture, secrets)
    os.register_at_fork(after_in_child=executor.after_fork)

    handlers: dict[type, Callable[[Any, list[bytes]], None]] = {
        Execute: executor.accept,
        Ack: lambda ack, _: executor.acknowledge(ack.run_id, ack.credit),
        Interrupt: lambda interrupt, _: executor.interrupt(interrupt.run_id),
        Reply: lambda reply, buffers: executor.reply(reply, buffers[0] if buffers else b""),
        Look: lambda look, _: executor.look(look),
        Lend: lambda lend, _: executor.lend(lend),
        Recall: lambda recall, _: executor.recall(recall.lane),
        Runners: lambda runners, _: executor.route(runners.runners),
    }

    def on_message(message: Message, buffers: list[bytes]) -> None:
        handler = handlers.get(type(message))
        if handler is not None:
            handler(message, buffers)

    def on_close(problem: Optional[Exception]) -> None:
        if problem is not None:
            os.write(log_fd, f"the connection to the agent broke: {problem}\n".encode())
        os._exit(0)  # the agent is gone or wants this worker gone; the user's code has no say

    executor.duplex = Duplex(connection, on_message, on_close, name="fal-connection")
    executor.duplex.start()
    executor.duplex.send(Ready(pid=os.getpid(), python=sys.version.partition(" ")[0]))
    try:
        executor.run_forever()
    except BaseException:  # noqa: BLE001 - whatever it is, it ends the process
        # A fault of ours: nobody reads standard error any more, and the log is what people will ask for.
        os.write(log_fd, secrets.mask(traceback.format_exc()).encode("utf-8", "replace"))
        os._exit(1)


def _die_with_the_agent() -> None:
    """Ask Linux to kill this process when the agent dies, even while C code holds the interpreter."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):  # not Linux: the end of the connection does it
        return


if __name__ == "__main__":
    main(int(sys.argv[1]))
