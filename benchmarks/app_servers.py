"""Serve the benchmark's application and measure it from a client: `app_servers.py local|ssh|bare|ray`.

`ssh` and `bare` take the configuration of an SSH server (`FAL_SSH_CONFIG`) from their environment. `bare` is
uvicorn on a port of the server's machine, behind `ssh -L` with a session open.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import app_work
from app_client import LOOPBACK, PROMPT, request
from timing import Figures, report

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
START_SECONDS = 120
SPAWNS = 3


def ask_client(name: str, port: int) -> Figures:
    """Let the client, a process of its own, ask the server at a port of this machine."""
    command = [sys.executable, str(HERE / "app_client.py"), name, str(port)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    return figures


def first_answer(port: int) -> None:
    """Ask until there is an answer."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with socket.create_connection((LOOPBACK, port), timeout=START_SECONDS) as connection:
                connection.sendall(request(port))
                answer = http.client.HTTPResponse(connection)
                answer.begin()
                if answer.status == 200 and json.loads(answer.read()) == {"length": len(PROMPT)}:
                    return
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing answers at port {port}")
        time.sleep(0.002)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------- ours


def make_app() -> Any:
    """The application as an `App`."""
    from fastapi import WebSocket  # noqa: TC002 - FastAPI reads it in a signature

    import fal_notebook as fal

    class Bench(fal.App, max_multiplexing=100, max_concurrency=1, local_python_modules=["app_work"]):
        @fal.endpoint("/")
        def size(self, prompt: app_work.Prompt) -> dict[str, int]:
            return app_work.size(prompt)

        @fal.endpoint("/echo", is_websocket=True)
        async def echo(self, websocket: WebSocket) -> None:
            await app_work.echo(websocket)

    return Bench


def measure_ours(kind: str) -> Figures:
    """A spawned app: how long it takes to be there, and how it answers."""
    import fal_notebook as fal

    host = fal.local if kind == "local" else fal.SSHHost("gpu-box")
    cls = make_app()
    taken = []
    for _ in range(SPAWNS + 1):  # the first one builds the environment
        started = time.perf_counter()
        app = cls.spawn(host=host)
        port = urlsplit(app.url).port
        assert port is not None
        first_answer(port)
        taken.append(time.perf_counter() - started)
        if len(taken) <= SPAWNS:
            app.stop()
    with app:
        figures = ask_client(f"{kind} app", port)
    return {**figures, f"{kind} app cold spawn": statistics.median(taken[1:])}


# ---------------------------------------------------------------- peers


@contextlib.contextmanager
def running(*command: str) -> Iterator[None]:
    """A process that is ended afterwards."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


def measure_bare() -> Figures:
    """The same application by uvicorn, behind `ssh -L`."""
    far, near = free_port(), free_port()
    uvicorn = [sys.executable, "-m", "uvicorn", "app_bare:app", "--port", str(far), "--log-level", "warning"]
    forward = f"{LOOPBACK}:{near}:{LOOPBACK}:{far}"
    ssh = ["ssh", "-F", os.environ["FAL_SSH_CONFIG"], "-L", forward, "gpu-box", "cat"]
    with running(*uvicorn, "--no-access-log"), running(*ssh):
        first_answer(near)
        return ask_client("ssh -L", near)


def measure_ray() -> Figures:
    """The same application by Ray Serve, one replica, asked at its own port."""
    import app_bare
    import ray
    from ray import serve

    port = free_port()
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    serve.start(http_options={"host": LOOPBACK, "port": port})
    deployment = serve.deployment(max_ongoing_requests=100, num_replicas=1)(
        serve.ingress(app_bare.app)(type("Bench", (), {}))
    )
    serve.run(deployment.bind())
    first_answer(port)
    try:
        return ask_client("ray serve", port)
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    KIND = sys.argv[1]
    report({"bare": measure_bare, "ray": measure_ray}.get(KIND, lambda: measure_ours(KIND))())
