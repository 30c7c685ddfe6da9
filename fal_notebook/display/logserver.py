"""Give a browser the log files, at a loopback address with a secret in it, while this kernel lives.

Runs in the notebook. A page of JupyterLab may not open files by their path, and its own server gives only
what lies below its folder.
"""

from __future__ import annotations

import functools
import os
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["address_of"]


class _Server(ThreadingHTTPServer):
    """Knows the files that it may give, by their addresses."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.owner = os.getpid()
        self.files: dict[str, Path] = {}

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that goes away in the middle is nothing to tell."""


class _Handler(BaseHTTPRequestHandler):
    """Gives a file as text, as far as it has been written."""

    timeout = 60

    def do_GET(self) -> None:
        """Answer a browser."""
        server = self.server
        path = server.files.get(self.path) if isinstance(server, _Server) else None
        try:
            file = path.open("rb") if path is not None else None
        except OSError:  # it was removed, being old
            file = None
        if file is None:
            self.send_error(404)
            return
        with file:
            size = os.fstat(file.fileno()).st_size
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Content-Length", str(size))
            self.end_headers()
            while size and (data := file.read(min(size, 1 << 20))):  # it may grow meanwhile
                self.wfile.write(data)
                size -= len(data)

    def log_message(self, *_args: object) -> None:
        """Say nothing: stderr is the notebook's."""


def address_of(path: Path) -> str:
    """The address of a log file; empty where no server can be had."""
    try:
        server = _server(os.getpid())
    except OSError:
        return ""
    address = f"/{secrets.token_urlsafe(18)}/{path.name}"
    server.files[address] = path
    return f"http://127.0.0.1:{server.server_address[1]}{address}"


@functools.cache
def _server(_process: int) -> _Server:
    """The server of this process, started when the first address is asked for."""
    server = _Server()
    threading.Thread(target=server.serve_forever, name="fal-logs", daemon=True).start()
    return server
