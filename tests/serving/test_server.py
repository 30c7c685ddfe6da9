"""The life of a served app: order, signals, sockets, failures; in child processes where signals matter."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from support import http

import fal_notebook as fal
from fal_agent.errors import FalServerlessError
from fal_agent.serving.server import AppServer, bind_port, bind_socket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.apps import Served

    Serve = Callable[..., Served]

CHILD = """
import asyncio, os, sys, threading, time
import fal_notebook as fal
from fal_agent.serving.server import AppServer, bind_socket

def say(*words):
    print(*words, os.environ.get("FAL_RUNNER_STATE"), flush=True)

class Child(fal.App):
    def setup(self):
        self.may_go_on = threading.Event()
        say("setup")
        if "slow-setup" in sys.argv:
            time.sleep(600)
        if "failing-setup" in sys.argv:
            raise ValueError("no model")

    def handle_exit(self):
        say("handle_exit")
        self.may_go_on.set()
        if "failing-exit" in sys.argv:
            raise OSError("not now")

    async def teardown(self):
        say("teardown")

    @fal.endpoint("/")
    def work(self) -> str:
        say("request")
        self.may_go_on.wait(60)
        say("answer")
        return "done"

AppServer(Child(_allow_init=True), bind_socket(sys.argv[1]), on_ready=lambda: say("ready")).run()
"""


class Child:
    """An app served by a process of its own on a Unix socket."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.path = folder / "app.sock"
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(self.path), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def client(self) -> httpx.Client:
        transport = httpx.HTTPTransport(verify=False, uds=str(self.path))
        return httpx.Client(transport=transport, base_url="http://app", timeout=60)

    def end(self) -> tuple[int, list[str], str]:
        """Wait for its end: exit status, the lines that were left, what it wrote to stderr."""
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out.split("\n")[:-1], err


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    started: list[Child] = []

    def start(*words: str) -> Child:
        started.append(Child(tmp_path, *words))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("words", [(), ("failing-exit",)])
def test_sigterm_tells_the_app_then_drains_then_tears_down_then_ends(
    child: Callable[..., Child], words: tuple[str, ...]
) -> None:
    """A request in flight is answered; what `handle_exit` raises is logged and changes nothing."""
    served = child(*words)
    assert [served.line(), served.line()] == ["setup SETUP", "ready RUNNING"]
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(served.client().post("/").json()))
    asking.start()
    assert served.line() == "request RUNNING"

    served.process.send_signal(signal.SIGTERM)

    status, lines, err = served.end()
    asking.join(60)
    assert lines[0] == "handle_exit RUNNING"
    assert lines[1:] == ["answer RUNNING", "teardown TERMINATING"]
    assert answers == ["done"]
    assert status == -signal.SIGTERM
    assert ("OSError: not now" in err) is bool(words)
    assert not served.path.exists()


def test_sigint_ends_with_an_interrupt(child: Callable[..., Child]) -> None:
    served = child()
    assert [served.line(), served.line()] == ["setup SETUP", "ready RUNNING"]

    served.process.send_signal(signal.SIGINT)

    status, lines, err = served.end()
    assert lines == ["handle_exit RUNNING", "teardown TERMINATING"]
    assert status == -signal.SIGINT
    assert "KeyboardInterrupt" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_setup_ends_at_once(child: Callable[..., Child], number: int) -> None:
    """There is nothing to drain or to tear down yet, and loading a model may take minutes."""
    served = child("slow-setup")
    assert served.line() == "setup SETUP"

    served.process.send_signal(number)

    status, lines, _ = served.end()
    assert (status, lines) == (-number, [])


def test_a_setup_that_fails_ends_the_process_with_its_error(child: Callable[..., Child]) -> None:
    """Body and teardown are skipped, and nobody could ever connect."""
    status, lines, err = child("failing-setup").end()

    assert (status, lines) == (1, ["setup SETUP"])
    assert err.rstrip().endswith("ValueError: no model")


# ---------------------------------------------------------------- the life of an app


class Lived(fal.App):
    def setup(self) -> None:
        self.seen = [("setup", os.environ["FAL_RUNNER_STATE"])]

    def teardown(self) -> None:
        self.seen.append(("teardown", os.environ["FAL_RUNNER_STATE"]))

    def handle_exit(self) -> None:
        self.seen.append(("handle_exit", os.environ["FAL_RUNNER_STATE"]))

    @fal.endpoint("/")
    def run(self) -> None: ...


class LivedAsync(Lived):
    async def setup(self) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        self.seen = [("setup", os.environ["FAL_RUNNER_STATE"])]

    async def teardown(self) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        self.seen.append(("teardown", os.environ["FAL_RUNNER_STATE"]))


@pytest.mark.parametrize("cls", [Lived, LivedAsync])
def test_stopping_from_another_thread_is_as_orderly(serve: Serve, cls: type[Lived]) -> None:
    served = serve(cls)

    served.stop()

    app: Any = served.app
    assert app.seen == [("setup", "SETUP"), ("handle_exit", "RUNNING"), ("teardown", "TERMINATING")]
    assert served.failure is None


@pytest.mark.parametrize("cls", [Lived, LivedAsync])
def test_the_lifespan_sets_up_and_always_tears_down(cls: type[Lived]) -> None:
    app = cls(_allow_init=True)

    async def fail_within() -> None:
        async with app.lifespan(None):
            raise KeyError("body")

    with pytest.raises(KeyError, match="body"):
        asyncio.run(fail_within())

    assert app.seen == [("setup", "SETUP"), ("teardown", "TERMINATING")]


def test_after_a_failed_setup_nothing_is_torn_down() -> None:
    class Failing(Lived):
        def setup(self) -> None:
            self.seen = []
            raise ValueError("no model")

    app = Failing(_allow_init=True)

    with pytest.raises(ValueError, match="no model"):
        AppServer(app, bind_port(0)).run()

    assert app.seen == []
    assert app.current_request is None


def test_a_teardown_that_fails_is_told(serve: Serve) -> None:
    class Failing(Lived):
        def teardown(self) -> None:
            raise ValueError("still busy")

    served = serve(Failing)
    served.stop()

    assert str(served.failure) == "still busy"


def test_a_setup_that_is_slower_than_allowed_is_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    class Slow(Lived):
        startup_timeout = 0

    async def live(cls: type[Lived]) -> None:
        async with cls(_allow_init=True).lifespan():
            pass

    asyncio.run(live(Slow))
    assert "app setup exceeded startup_timeout" in capsys.readouterr().out
    asyncio.run(live(Lived))
    assert capsys.readouterr().out == ""


def test_the_installed_packages_are_a_line_for_debugging(caplog: pytest.LogCaptureFixture) -> None:
    async def live() -> None:
        async with Lived(_allow_init=True).lifespan():
            pass

    with caplog.at_level("DEBUG", logger="fal_agent.runtime.app"):
        asyncio.run(live())

    assert "pytest==" in caplog.text


def test_as_many_handlers_run_at_once_as_the_app_allows(serve: Serve) -> None:
    """All of them wait for each other here; threads are otherwise fewer. Health is told meanwhile."""

    class Many(Lived):
        max_multiplexing = 45

        def setup(self) -> None:
            super().setup()
            self.all_there = threading.Barrier(self.max_multiplexing + 1, timeout=60)
            self.may_go = threading.Event()

        @fal.endpoint("/")
        def run(self) -> None:
            self.all_there.wait()
            self.may_go.wait(60)

    served = serve(Many)
    app: Any = served.app
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(http.post(served.url, timeout=60).status_code)

    threads = [threading.Thread(target=ask) for _ in range(Many.max_multiplexing)]
    for thread in threads:
        thread.start()
    app.all_there.wait()
    assert served.client.get("/health").status_code == 200
    app.may_go.set()
    for thread in threads:
        thread.join(60)

    assert statuses == [200] * Many.max_multiplexing


def test_requests_that_outlast_the_drain_are_cancelled(serve: Serve) -> None:
    class Endless(Lived):
        @fal.endpoint("/")
        async def run(self) -> None:  # type: ignore[override]
            self.begun.set()
            await asyncio.Event().wait()

        def setup(self) -> None:
            super().setup()
            self.begun = threading.Event()

    served = serve(Endless, drain_seconds=0.1)
    failures: list[Exception] = []

    def ask() -> None:
        try:
            http.post(served.url, timeout=60)
        except httpx.HTTPError as error:
            failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    app: Any = served.app
    assert app.begun.wait(30)

    served.stop()

    asking.join(60)
    assert app.seen[-1] == ("teardown", "TERMINATING")
    assert not asking.is_alive()


# ---------------------------------------------------------------- addresses


def test_a_unix_socket_is_the_users_alone(tmp_path: Path) -> None:
    listener = bind_socket(str(tmp_path / "app.sock"))

    assert (tmp_path / "app.sock").stat().st_mode & 0o777 == 0o600
    listener.close()


def test_a_socket_that_was_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "app.sock"
    bind_socket(str(path)).close()
    assert path.exists()

    bind_socket(str(path)).close()


def test_a_file_in_the_way_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "app.sock"
    path.write_text("precious")

    with pytest.raises(FalServerlessError, match=f"cannot listen at {path}"):
        bind_socket(str(path))

    assert path.read_text() == "precious"


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(FalServerlessError, match=f"cannot listen on port {port} .*Choose another port"):
            bind_port(port)


def test_a_port_that_is_none_is_refused() -> None:
    with pytest.raises(FalServerlessError, match="port 65536"):
        bind_port(65536)


# ---------------------------------------------------------------- metrics


def test_metrics_count_requests_by_path_and_status(serve: Serve) -> None:
    listener = bind_port(0)
    metrics = f"http://127.0.0.1:{listener.getsockname()[1]}/metrics"
    served = serve(Lived, metrics_listener=listener)

    served.client.post("/")
    served.client.post("/")
    for number in range(3):
        served.client.post(f"/nowhere/{number}")

    told = http.get(metrics)
    assert told.headers["content-type"].startswith("text/plain")
    assert 'fal_requests_total{path="/",status="200"} 2' in told.text
    assert 'fal_requests_total{path="unknown",status="404"} 3' in told.text
    assert "fal_requests_in_flight 0" in told.text
