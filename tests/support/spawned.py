"""What `App.spawn()` gives, for tests: the app is served in a thread of this process."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fal_agent.serving.server import AppServer, bind_port
from fal_notebook.app_client import wait_until_healthy

if TYPE_CHECKING:
    from fal_agent.runtime.app import App


class Spawned:
    """An app that is being served, or fails to be."""

    def __init__(self, cls: type[App], *, quiet: bool = False) -> None:
        self.is_quiet = quiet
        self.app = cls(_allow_init=True)
        self.application = cls.app_name
        self.headers = {"x-test": "yes"}
        self.logs: queue.Queue[Any] = queue.Queue()
        self.future: Future[None] = Future()
        self.stream = SimpleNamespace(cancel=self._cancel)
        self.app.say = self.say
        listener = bind_port(0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.server = AppServer(self.app, listener, drain_seconds=1)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def say(self, message: str) -> None:
        self.logs.put(SimpleNamespace(message=message, level="info", source="USER", timestamp=time.time()))

    def wait(self, **options: Any) -> None:
        wait_until_healthy(self.url, problem=self._problem, **options)

    def stop(self) -> None:
        self._cancel()
        self.thread.join(30)
        assert not self.thread.is_alive()

    def _cancel(self) -> None:
        self.server.stop()

    def _problem(self) -> BaseException | None:
        return self.future.exception() if self.future.done() else None

    def _run(self) -> None:
        try:
            self.server.run()
        except BaseException as error:
            self.say(f"failed: {error!r}")
            self.future.set_exception(error)
        else:
            self.future.set_result(None)
