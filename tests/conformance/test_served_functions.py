"""Functions that are served (`serve=True`), and functions that run a server of their own (`exposed_port`)."""

from __future__ import annotations

import itertools
import os
import queue
import socket
import threading
import types
from typing import TYPE_CHECKING, Any

import pytest
from support import http
from support.hosts import host_named
from support.spawning import SECONDS
from support.waiting import until

import fal_notebook as fal
from fal_notebook import exceptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

numbers = itertools.count(1)


def renamed(function: Any) -> Any:
    """The function under a name that no other test has: what is served is known by it."""
    code, name = function.__code__, f"{function.__name__}-{os.getpid()}-{next(numbers)}"
    other = types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    other.__annotations__ = dict(function.__annotations__)
    return other


def post(info: Any, path: str = "/", **options: Any) -> httpx.Response:
    return http.post(f"{info.url}{path}", timeout=SECONDS, **options)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def greet(name: str, times: int = 1) -> dict[str, str]:
    """Say hello."""
    print(f"greeting {name}", flush=True)
    return {"text": " ".join(["hello", *[name] * times])}


def page(port: int, text: str = "") -> str:
    """Serve pages until one is asked for that ends it."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"{text} {self.path} {self.headers['Host']}".encode()
            if self.path == "/pid":
                body = str(os.getpid()).encode()
            self.send_response(503 if self.path == "/sick" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            if self.path == "/end":
                threading.Thread(target=server.shutdown).start()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.serve_forever()
    return f"ended {text}"


@pytest.fixture
def here(request: pytest.FixtureRequest) -> Any:
    """This machine: for what is the agent's doing alone, wherever that is."""
    return host_named(request, "local")


@pytest.fixture
def spawned() -> Iterator[list[Any]]:
    """What a test spawns; it is stopped at the end."""
    infos: list[Any] = []
    yield infos
    for info in infos:
        if not info.future.done():
            info.stop()


def test_a_served_function_is_called_by_post(agent_host: Any, spawned: list[Any]) -> None:
    function = fal.function(host=agent_host, serve=True, keep_alive=30)(renamed(greet))

    info = function.spawn()
    spawned.append(info)
    info.wait(startup_timeout=SECONDS)

    assert post(info, json={"name": "you", "times": 2}).json() == {"text": "hello you you"}
    assert post(info, params={"name": "query"}).json() == {"text": "hello query"}
    assert post(info, json={"times": "x"}).status_code == 422
    assert http.get(info.url, timeout=SECONDS).status_code == 405
    document = http.get(f"{info.url}/openapi.json", timeout=SECONDS).json()
    assert list(document["paths"]) == ["/", "/health"]
    assert document["info"]["title"] == function.app_name == info.application
    assert fal.apps.run(info.application, {"name": "client"}) == {"text": "hello client"}
    messages = []
    while not messages or "greeting you\n" not in messages:
        messages.append(info.logs.get(timeout=SECONDS).message)
    assert [app.name for app in fal.apps(agent_host)] == [info.application]

    info.stop()

    assert info.future.result() is None
    assert fal.apps(agent_host) == []


def test_a_setup_function_fills_the_first_parameter(here: Any, spawned: list[Any]) -> None:
    """It runs once; and what is served moves to a new version without a new process."""

    def load() -> dict[str, Any]:
        import os

        return {"pid": os.getpid()}

    def answer(model: dict[str, Any], x: int) -> dict[str, Any]:
        return {**model, "x": x}

    decorate = fal.function(host=here, serve=True, setup_function=load, keep_alive=30)
    function = decorate(renamed(answer))
    spawned.append(function.spawn())

    first = post(spawned[0], json={"x": 1}).json()
    assert first == {"pid": first["pid"], "x": 1}
    assert first["pid"] != os.getpid()
    parameters = http.get(f"{spawned[0].url}/openapi.json").json()["paths"]["/"]["post"]["parameters"]
    assert [parameter["name"] for parameter in parameters] == ["x"]

    def newer(model: dict[str, Any], y: int) -> dict[str, Any]:
        return {**model, "y": y}

    newer.__name__ = function.app_name
    spawned.append(decorate(newer).spawn())
    spawned[1].wait(startup_timeout=SECONDS)
    assert post(spawned[1], json={"y": 2}).json() == {"pid": first["pid"], "y": 2}
    assert spawned[0].future.result(SECONDS) is None


def test_a_setup_function_that_fails_is_the_error(here: Any) -> None:
    def load() -> None:
        raise LookupError("no such weights")

    info = fal.function(host=here, serve=True, setup_function=load)(renamed(lambda _, x: x)).spawn()

    with pytest.raises(LookupError, match="no such weights"):
        info.wait(startup_timeout=SECONDS)
    assert isinstance(info.future.exception(SECONDS), LookupError)


def test_a_function_that_opens_a_port_is_reached_at_a_local_url(agent_host: Any, spawned: list[Any]) -> None:
    port = free_port()
    function = fal.function(host=agent_host, exposed_port=port, keep_alive=30)(renamed(page))

    info = function.spawn(port, text="served")
    spawned.append(info)
    info.wait(startup_timeout=SECONDS)

    here = info.url.partition("//")[2]
    assert here != f"127.0.0.1:{port}"
    assert http.get(f"{info.url}/some/path?q=1").text == f"served /some/path?q=1 {here}"
    assert post(info, "/x", content=b"y" * 3_000_000).text == f"served /x {here}"
    assert http.get(f"{info.url}/x", headers={"Origin": "http://elsewhere.example"}).status_code == 403
    assert info.link == info.url  # there need not be a documentation

    assert http.get(f"{info.url}/end").status_code == 200
    assert info.return_value == info.future.result(SECONDS) == "ended served"
    assert until(lambda: info.state == "stopped")


def test_whoever_comes_next_gets_the_port(here: Any, spawned: list[Any]) -> None:
    """A new version, and what replaces a server that is not well: the one before has to end first."""
    port = free_port()
    check = {"path": "/sick", "method": "GET", "call_regularly": False}
    decorate = fal.function(host=here, exposed_port=port, keep_alive=30, health_check_config=check)
    function = decorate(renamed(page))
    spawned.append(function.spawn(port, text="first"))
    assert http.get(f"{spawned[0].url}/", timeout=SECONDS).text.startswith("first /")

    info = function.spawn(port, text="second")
    spawned.append(info)

    assert spawned[0].future.result(SECONDS) is None
    assert http.get(f"{info.url}/", timeout=SECONDS).text.startswith("second /")

    pid = http.get(f"{info.url}/pid", timeout=SECONDS).text
    assert http.get(f"{info.url}/sick", timeout=SECONDS).status_code == 503  # which is its own matter
    assert http.get(f"{info.url}/pid", headers={"x-fal-runner-health-check": "1"}).text == pid
    text = ""
    while "replacing a runner: a health check failed: status 503" not in text:
        text += info.logs.get(timeout=SECONDS).message
    until(lambda: http.get(f"{info.url}/pid", timeout=SECONDS).text not in ("", pid))  # once it has ended


def test_a_port_in_use_is_told_before_the_function_runs(here: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        function = fal.function(host=here, exposed_port=port)(renamed(page))

        with pytest.raises(exceptions.FalServerlessError, match=rf"port {port} .* is in use on this host"):
            function.spawn(port).future.result(SECONDS)


def test_a_websocket_reaches_the_functions_own_server(here: Any, spawned: list[Any]) -> None:
    from websockets.sync.client import connect

    def echo(port: int) -> None:
        import uvicorn

        async def application(_scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await send({"type": "websocket.accept", "subprotocol": "echo"})
            text = (await receive())["text"]
            await send({"type": "websocket.send", "text": text * 2})
            await receive()  # until the client goes

        uvicorn.run(application, port=port, lifespan="off")

    port = free_port()
    decorate = fal.function(host=here, exposed_port=port, keep_alive=30)
    info = decorate(renamed(echo)).spawn(port)
    spawned.append(info)
    info.wait(startup_timeout=SECONDS)

    with connect(info.url.replace("http", "ws"), subprotocols=["echo"], open_timeout=SECONDS) as session:
        assert session.subprotocol == "echo"
        session.send("ab")
        assert session.recv() == "abab"


def test_a_call_serves_until_it_is_interrupted(
    here: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its URL is printed, and what it prints; the value of a function with its own server is returned."""
    port = free_port()
    function = fal.function(host=here, exposed_port=port)(renamed(page))
    urls: queue.Queue[str] = queue.Queue()

    def end() -> None:
        url = next(app.url for app in iter_apps(here, function.app_name))
        http.get(f"{url}/end", timeout=SECONDS)
        urls.put(url)

    threading.Thread(target=end).start()

    assert function(port, text="called") == "ended called"
    assert f"is served at {urls.get(timeout=SECONDS)}; interrupt to stop" in capsys.readouterr().out

    served = fal.function(host=here, serve=True)(renamed(greet))
    monkeypatch.setattr("fal_notebook.run.Run.result", interrupted)
    assert served() is None
    assert fal.apps(here) == []


def iter_apps(host: Any, name: str) -> Any:
    """The app of that name, once it is there."""
    assert until(lambda: any(app.name == name for app in fal.apps(host)))
    return [app for app in fal.apps(host) if app.name == name]


def interrupted(*_args: Any) -> None:
    raise KeyboardInterrupt


def test_what_cannot_be_served_is_refused(here: Any) -> None:
    served = fal.function(host=here, serve=True)(greet)

    with pytest.raises(exceptions.FalServerlessError, match="arguments come with each request"):
        served("you")
    with pytest.raises(exceptions.FalServerlessError, match="arguments come with each request"):
        served.run_local(name="you")
    with pytest.raises(exceptions.FalServerlessError, match=r"has no items.*\.map"):
        served.map(["you"])
    with pytest.raises(exceptions.FalServerlessError, match="more than one runner"):
        served.on(serve=None, exposed_port=8080, min_concurrency=2).spawn()
    with pytest.raises(exceptions.FalServerlessError, match=r"this very process.*greet\.run_local"):
        served.on(host=fal.InlineHost()).spawn()
    assert served.on(serve=False)("you") == {"text": "hello you"}
