"""Spawned apps under load, through the whole chain: a client, the notebook's port, the link, a gateway or
none, a runner. Each module has hosts of its own, whose processes may be killed. The sizes are those of a
quick run; $FAL_TEST_SCALE multiplies them."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.spawning import spawning
from support.sshd import SSHServer, start_sshd
from support.waiting import is_alive, until

import fal_notebook as fal
from fal_notebook.hosts.local import LocalHost
from fal_notebook.hosts.ssh import SSHHost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SCALE = int(os.environ.get("FAL_TEST_SCALE", "1"))
WAYS = {"local", "ssh", "single", "gateway"}
QUICK = (
    {"local", "single"},
    {"ssh", "gateway"},
    {"local"},
    {"single"},
    {"gateway"},
    set(),
)  # not all of them

numbers = itertools.count(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take half of the ways in a quick run: each link, with and without a gateway."""

    def is_left_out(item: pytest.Item) -> bool:
        words = WAYS.intersection(item.name.rpartition("[")[2].rstrip("]").split("-"))
        return SCALE == 1 and words not in QUICK and item.path.parent.name == "load"

    left_out = [item for item in items if is_left_out(item)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SSHServer]:
    """An OpenSSH server, whose connections may be broken."""
    name = f"load-box-{next(numbers)}"
    with start_sshd(tmp_path_factory.mktemp("sshd"), name=name) as running:
        root = running.home / ".fal_notebook" / f"load-{os.getpid()}-{next(numbers)}"
        settings = Path(os.environ["FAL_NOTEBOOK_CONFIG"]) / "hosts.toml"
        settings.parent.mkdir(exist_ok=True)
        before = settings.read_text() if settings.exists() else None
        settings.write_text(f'[hosts.{name}]\nroot = "~/.fal_notebook/{root.name}"\n')
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FAL_SSH_CONFIG", str(running.config_path))
            yield running
        settings.unlink() if before is None else settings.write_text(before)
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the local agent under load, which is not that of the other tests."""
    return tmp_path_factory.mktemp("load") / "root"


@pytest.fixture(scope="module", params=["local", "ssh"])
def host(request: pytest.FixtureRequest, root: Path) -> Iterator[Any]:
    """This machine, or one reached over SSH."""
    if request.param == "local":
        made: Any = LocalHost(f"load-{next(numbers)}")
    else:
        made = SSHHost(request.getfixturevalue("server").name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAL_NOTEBOOK_HOME", str(root))
        yield made
        agent = made.ask("status")["agent"]["pid"]
        made.ask("shutdown")
        made.close()
        until(lambda: not is_alive(agent))  # the next module's host starts one of its own


@pytest.fixture(scope="session")
def app() -> Callable[..., type[fal.App]]:
    """Make apps with settings."""
    return make_app


def make_app(**settings: Any) -> type[fal.App]:
    """Give an app that can be loaded in several ways."""

    class Loaded(fal.App, name=f"loaded-{os.getpid()}-{next(numbers)}", **settings):
        requirements = ["httpx>=0.27"]  # as with a gateway: one environment for all

        @fal.endpoint("/")
        def work(self, seconds: float = 0.0) -> int:
            import os
            import time

            time.sleep(seconds)
            return os.getpid()

        @fal.endpoint("/digest")
        async def digest(self, request: Any) -> dict[str, Any]:
            import hashlib

            digest, size = hashlib.sha256(), 0
            async for piece in request.stream():
                digest.update(piece)
                size += len(piece)
            return {"sha256": digest.hexdigest(), "size": size}

        @fal.endpoint("/pour")
        async def pour(self, mib: int) -> Any:
            from fastapi.responses import StreamingResponse

            async def pieces() -> Any:
                for _ in range(mib):
                    yield bytes(1 << 20)

            return StreamingResponse(pieces())

        @fal.endpoint("/echo", is_websocket=True)
        async def echo(self, websocket: Any) -> None:
            import os

            await websocket.accept()
            await websocket.send_text(str(os.getpid()))
            async for text in websocket.iter_text():
                await websocket.send_text(text)

    from fastapi import Request, WebSocket

    Loaded.digest.__annotations__["request"] = Request
    Loaded.echo.__annotations__["websocket"] = WebSocket
    return Loaded


@pytest.fixture
def spawn(host: Any) -> Iterator[Callable[..., Any]]:
    """Spawn apps, which are stopped in the end."""
    with spawning() as do:
        yield lambda *, on=host, **settings: do(make_app(**settings), on)
