"""Serve apps for tests by real servers, in a thread of this process."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import httpx

from fal_agent.serving.server import AppServer, bind_port

if TYPE_CHECKING:
    from fal_agent.runtime.app import App


class Served:
    """An app that is being served.

    Attributes:
        app: the app.
        url: where.
        client: an HTTP client of it.
    """

    def __init__(self, app: App, **options: Any) -> None:
        ready = threading.Event()
        listener = bind_port(0)
        self.app = app
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.server = AppServer(app, listener, on_ready=ready.set, **options)
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(ready,))
        self.thread.start()
        assert ready.wait(30)
        if self.failure is not None:
            raise self.failure
        self.client = httpx.Client(verify=False, base_url=self.url, timeout=30)

    def _run(self, ready: threading.Event) -> None:
        try:
            self.server.run()
        except BaseException as error:
            self.failure = error
        finally:
            ready.set()

    def stop(self) -> None:
        if self.thread.is_alive():
            self.client.close()
            self.server.stop()
            self.thread.join(30)
            assert not self.thread.is_alive()
