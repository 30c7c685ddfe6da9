"""`run_local`: in a script, in a thread, and in a notebook's kernel."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from support import http
from support.kernel import PATH, start_kernel

import fal_notebook as fal
from fal_agent.errors import FalServerlessError

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = """
import fal_notebook as fal

class Hello(fal.App):
    def teardown(self):
        print("torn down", flush=True)

    @fal.endpoint("/")
    def hello(self, name: str) -> str:
        return "hello " + name

{call}
print("went on", flush=True)
"""
PLAIN = "Hello.run_local(exposed_port=0, exposed_metrics_port=0)"
IN_LOOP = f"""
import asyncio
async def cell():
    {PLAIN}
asyncio.run(cell())
"""


@pytest.fixture
def script() -> Iterator[Any]:
    started: list[subprocess.Popen[str]] = []

    def start(call: str) -> subprocess.Popen[str]:
        code = SCRIPT.replace("{call}", call)
        started.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def url_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    found = re.match(r"Hello is served at (http://127\.0\.0\.1:\d+) ", process.stdout.readline())
    assert found is not None
    return found.group(1)


@pytest.mark.parametrize("call", [PLAIN, IN_LOOP])
def test_an_interrupt_ends_serving_and_the_script_goes_on(script: Any, call: str) -> None:
    """A notebook's cell runs while the loop of its thread is running: the second form."""
    process = script(call)
    url = url_of(process)
    assert http.post(url, json={"name": "you"}, timeout=30).json() == "hello you"

    process.send_signal(signal.SIGINT)

    out, _ = process.communicate(timeout=60)
    assert out == "torn down\nwent on\n"
    assert process.returncode == 0


def test_sigterm_ends_the_script(script: Any) -> None:
    process = script(PLAIN)
    url_of(process)

    process.send_signal(signal.SIGTERM)

    assert process.communicate(timeout=60)[0] == "torn down\n"
    assert process.returncode == -signal.SIGTERM


class Marked(fal.App):
    def setup(self) -> None:
        self.mark = os.environ.get("IS_ISOLATE_AGENT")
        raise ValueError(f"the mark is {self.mark}")

    @fal.endpoint("/")
    def run(self) -> None: ...


@pytest.mark.parametrize("before", [None, "before"])
def test_the_mark_of_runners_is_set_meanwhile(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IS_ISOLATE_AGENT", raising=False)
    if before is not None:
        monkeypatch.setenv("IS_ISOLATE_AGENT", before)

    with pytest.raises(ValueError, match="the mark is 1"):
        Marked.run_local(exposed_port=0)

    assert os.environ.get("IS_ISOLATE_AGENT") == before


def test_the_error_of_setup_comes_out_of_a_running_loop_too() -> None:
    async def cell() -> None:
        Marked.run_local(exposed_port=0)

    with pytest.raises(ValueError, match="the mark is 1"):
        asyncio.run(cell())


def test_it_works_on_another_thread() -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            Marked.run_local(exposed_port=0)
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)

    assert [str(failure) for failure in failures] == ["the mark is 1"]


@pytest.mark.parametrize("name", ["exposed_port", "exposed_metrics_port"])
def test_a_port_in_use_is_a_clear_error(name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        ports = {"exposed_port": 0, name: other.getsockname()[1]}
        with pytest.raises(FalServerlessError, match=f"port {ports[name]} .*Address already in use"):
            Marked.run_local(**ports)


def test_an_app_without_routes_gives_its_ports_back() -> None:
    class Empty(fal.App):
        pass

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    for _ in range(2):
        with pytest.raises(ValueError, match="at least one route"):
            Empty.run_local(exposed_port=port)


def test_options_that_are_none_are_refused() -> None:
    with pytest.raises(TypeError):
        Marked.run_local(port=3)  # type: ignore[call-arg]


CELL = """
import fal_notebook as fal

class Hello(fal.App):
    def setup(self):
        print("set up")

    def teardown(self):
        print("torn down")

    @fal.endpoint("/")
    async def hello(self, name: str) -> str:
        return "hello " + name

Hello.run_local(exposed_port=0, exposed_metrics_port=0)
print("went on")
"""


def test_a_notebooks_cell_serves_until_the_kernel_is_interrupted() -> None:
    pytest.importorskip("ipykernel")
    with start_kernel(PYTHONPATH=PATH) as kernel:
        cell = kernel.start(CELL)
        kernel.wait_for(cell, "interrupt to stop")
        found = re.search(r"http://127\.0\.0\.1:\d+", cell.text)
        assert found is not None
        assert http.post(found[0], json={"name": "you"}, timeout=30).json() == "hello you"

        kernel.interrupt()

        kernel.wait(cell)
        assert cell.status == "ok"
        assert cell.text.startswith("set up\n")
        assert cell.text.endswith("torn down\nwent on\n")
