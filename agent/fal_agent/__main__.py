"""The agent's commands: `start` (make sure it listens), `serve` (be it), `dial` (reach a Unix socket).

Runs on the host. `start` prints one line of JSON; `dial` joins its standard input and output to a
socket, for SSH servers that forbid forwarding to sockets.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Optional

from fal_agent.paths import default_root

__all__ = ["main"]


def main(arguments: Optional[list[str]] = None) -> int:
    """Run a command; give the exit status."""
    parser = argparse.ArgumentParser(prog="fal_agent", description=__doc__)
    parser.add_argument("--version", action="version", version=sys.version.partition(" ")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("start", "serve"):
        command = commands.add_parser(name)
        command.add_argument("--root", type=Path, default=default_root())
        command.add_argument("--digest", required=True)
        command.add_argument(
            "--idle", type=float, default=600.0, help="seconds after which an unused agent ends"
        )
        command.add_argument("--label", action="append", default=[], help="label of this machine; repeatable")
        command.add_argument("--files-gb", type=float, default=20.0, help="of files of apps, to keep")
        command.add_argument("--files-days", type=float, default=30.0, help="to keep one nobody fetches")
    commands.add_parser("dial").add_argument("socket", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "dial":
        return dial(options.socket)
    from fal_agent.errors import FalServerlessError
    from fal_agent.server import daemon
    from fal_agent.server.filestore import FileLimits

    root = options.root.expanduser().absolute()
    files = FileLimits(options.files_gb * 1e9, options.files_days * 86400)
    settings = daemon.AgentSettings(options.idle, options.label, files)
    if options.command == "serve":
        return daemon.serve(root, options.digest, settings)
    try:
        print(json.dumps(daemon.start(root, options.digest, settings)))  # noqa: T201 - the answer
    except (OSError, FalServerlessError) as error:
        print(json.dumps({"error": str(error)}))  # noqa: T201 - the answer
        return 1
    return 0


def dial(path: Path) -> int:
    """Join standard input and output to a Unix socket until one of them ends."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
    except OSError as error:
        sys.stderr.write(f"{path}: {error.strerror}\n")
        return 1
    threading.Thread(target=_copy_input, args=(connection,), daemon=True).start()
    while True:
        data = connection.recv(1 << 18)
        if not data:
            return 0
        view = memoryview(data)
        while view:
            view = view[os.write(1, view) :]


def _copy_input(connection: socket.socket) -> None:
    while True:
        data = os.read(0, 1 << 18)
        if not data:
            connection.shutdown(socket.SHUT_WR)
            return
        connection.sendall(data)


if __name__ == "__main__":
    sys.exit(main())
