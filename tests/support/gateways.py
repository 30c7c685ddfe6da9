"""A gateway before runners, all real servers on Unix sockets: in one loop, or runners in processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn
from websockets.asyncio.client import unix_connect

from fal_agent.serving.gateway import Gateway, Load, RunnerAddress, serve_gateway
from fal_agent.serving.server import bind_socket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

__all__ = ["PATIENCE", "Runner", "RunnerProcess", "Stage", "answer", "on_stage"]

PATIENCE = 60.0  # seconds that a test waits for what must come


class Runner:
    """A runner in this loop whose requests are answered by the test.

    Attributes:
        address: where it is.
        arrived: each request, as it comes in.
        in_flight: requests that it has.
        most: the most that it has had at a time.
    """

    def __init__(self, folder: Path, name: str, application: Any = None) -> None:
        self.address = RunnerAddress(name, str(folder / f"{name}.sock"))
        self.arrived: asyncio.Queue[Request] = asyncio.Queue()
        self.in_flight = self.most = 0
        self._application = application
        self._server = _Server(
            uvicorn.Config(self, lifespan="off", log_config=None, log_level="critical", access_log=False)
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> Runner:
        self._serving = asyncio.create_task(self._server.serve(sockets=[bind_socket(self.address.path)]))
        await asyncio.wait_for(self._server.ready.wait(), PATIENCE)
        return self

    async def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        for task in list(self._server.server_state.tasks):
            task.cancel()
        if self._serving is not None:
            await self._serving

    async def next(self) -> Request:
        """Wait for the next request."""
        return await asyncio.wait_for(self.arrived.get(), PATIENCE)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            if self._application is not None:
                await self._application(scope, receive, send)
                return
            request = Request(scope, receive, send)
            self.arrived.put_nowait(request)
            await request.over.wait()
        finally:
            self.in_flight -= 1


class Request:
    """One request at a runner."""

    def __init__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope, self.receive, self.send = scope, receive, send
        self.over = asyncio.Event()
        self.headers = [(name.decode(), value.decode("latin-1")) for name, value in scope["headers"]]
        self.path = scope["raw_path"].decode()

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]

    async def body(self) -> bytes:
        body, more = bytearray(), True
        while more:
            message = await self.receive()
            assert message["type"] == "http.request"
            body += message["body"]
            more = message["more_body"]
        return bytes(body)

    async def answer(self, content: bytes = b"", status: int = 200, **headers: str) -> None:
        await self.begin(status, **headers)
        await self.send({"type": "http.response.body", "body": content})
        self.over.set()

    async def begin(self, status: int = 200, **headers: str) -> None:
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})

    async def part(self, content: bytes) -> None:
        await self.send({"type": "http.response.body", "body": content, "more_body": True})

    def break_off(self) -> None:
        """End without having answered."""
        self.over.set()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets=sockets)
        self.ready.set()


CHILD = """
import asyncio, sys, uvicorn
from fal_agent.serving.server import bind_socket

async def application(scope, receive, send):
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})
        return
    more, size = True, 0
    while more:
        message = await receive()
        more, size = message.get("more_body", False), size + len(message.get("body", b""))
    print("in", flush=True)
    if scope["path"] == "/hold":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
        await asyncio.sleep(600)
    await asyncio.sleep(0.005)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"%d" % size})

listener = bind_socket(sys.argv[1])
listener.listen(1000)
print("ready", flush=True)
uvicorn.Server(uvicorn.Config(application, lifespan="off", log_config=None)).run(sockets=[listener])
"""


class RunnerProcess:
    """A runner in a process of its own; it prints a line for each request that it has read."""

    def __init__(self, folder: Path, name: str) -> None:
        self.address = RunnerAddress(name, str(folder / f"{name}.sock"))
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, self.address.path], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.line = self._process.stdout.readline
        assert self.line() == "ready\n"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


class Stage:
    """A gateway that is being served, its clients, its runners and what it reported."""

    def __init__(self, folder: Path, *, drain_seconds: int | None = None, **options: Any) -> None:
        self.folder, self.path = folder, str(folder / "gateway.sock")
        self.loads: list[Load] = []
        self.times: list[float] = []  # of the loads
        self.sick: list[tuple[str, str]] = []
        self._news = asyncio.Event()
        self.gateway = Gateway(
            on_load=self._heard(self._keep_load),
            on_sick=self._heard(lambda name, reason: self.sick.append((name, reason))),
            **options,
        )
        self.stop = asyncio.Event()
        self.runners: list[Runner] = []
        self.processes: list[RunnerProcess] = []
        self.listener = bind_socket(self.path)
        self.listener.listen(1000)
        self.serving = asyncio.create_task(
            serve_gateway(self.gateway, self.listener, self.stop, drain_seconds=drain_seconds)
        )
        self.client = self.new_client()

    def new_client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        transport = httpx.AsyncHTTPTransport(verify=False, uds=self.path, limits=limits)
        return httpx.AsyncClient(transport=transport, base_url="http://app", timeout=PATIENCE)

    def ask(self, path: str = "/", **options: Any) -> asyncio.Task[httpx.Response]:
        """Ask in the background."""
        return asyncio.create_task(self.client.post(path, **options))

    def connect(self, path: str = "/ws", **options: Any) -> Any:
        return unix_connect(self.path, f"ws://app{path}", **options)

    async def start(self, *names: str, application: Any = None) -> list[Runner]:
        """Start runners; they are the ready ones."""
        runners = [await Runner(self.folder, name, application).start() for name in names]
        self.runners += runners
        self.gateway.set_runners([runner.address for runner in runners])
        return runners

    def start_processes(self, *names: str) -> list[RunnerProcess]:
        processes = [RunnerProcess(self.folder, name) for name in names]
        self.processes += processes
        self.gateway.set_runners([process.address for process in processes])
        return processes

    async def until(self, holds: Callable[[], Any]) -> None:
        """Wait until a report makes something true."""

        async def wait() -> None:
            while not holds():
                self._news.clear()
                await self._news.wait()

        await asyncio.wait_for(wait(), PATIENCE)

    async def until_waiting(self, count: int) -> None:
        await self.until(lambda: self.loads and self.loads[-1].waiting == count)

    async def until_idle(self) -> None:
        await self.until(lambda: self.loads and (self.loads[-1].waiting, self.loads[-1].in_flight) == (0, 0))

    def _keep_load(self, load: Load) -> None:
        self.loads.append(load)
        self.times.append(asyncio.get_running_loop().time())

    def _heard(self, keep: Callable[..., None]) -> Callable[..., None]:
        def hear(*news: Any) -> None:
            keep(*news)
            self._news.set()

        return hear

    async def end(self) -> None:
        for process in self.processes:
            process.kill()
        await asyncio.gather(*(runner.stop() for runner in self.runners))
        await self.client.aclose()
        self.stop.set()
        try:
            await asyncio.wait_for(self.serving, PATIENCE)
        finally:
            self.listener.close()


def on_stage(folder: Path, play: Callable[[Stage], Awaitable[None]], **options: Any) -> None:
    """Run what a test does with a gateway, in a loop of its own."""

    async def run() -> None:
        stage = Stage(folder, **options)
        try:
            await play(stage)
        finally:
            await stage.end()

    asyncio.run(run())


def answer(response: httpx.Response) -> tuple[int, str]:
    """Give status and detail of an answer of the gateway itself."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-fal-request-id"]
    content = json.loads(response.content)
    assert list(content) == ["detail"]
    return response.status_code, content["detail"]
