"""Whoever dies: an app goes on without its notebook, and is not left behind by its agent."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from support.waiting import is_alive, until

import fal_notebook as fal
from fal_notebook import exceptions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.faults.conftest import Bed

NOTEBOOK = """
import fal_notebook as fal
from fal_notebook.hosts.local import LocalHost

class Where(fal.App, name="where"):
    @fal.endpoint("/")
    def where(self) -> int:
        import os
        return os.getpid()

info = Where.spawn(host=LocalHost("bench"))
info.wait()
print("ready", info.url, flush=True)
import time
time.sleep(600)
"""


class Pid(fal.App, name="pid"):
    @fal.endpoint("/")
    def pid(self) -> int:
        return os.getpid()


def apps(host: Any) -> dict[str, str]:
    """States by name."""
    return {app["name"]: app["state"] for app in host.ask("apps")}


def test_an_app_goes_on_without_its_notebook_and_is_stopped_from_another(
    bed: Bed, nothing_is_left: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = bed.kernel(NOTEBOOK)
    url = kernel.says("ready")
    pid = httpx.post(url, timeout=30).json()
    kernel.kill()

    host = bed.host()
    assert apps(host) == {"where": "ready"}
    (info,) = fal.apps.listed(host)
    assert not info.attended
    monkeypatch.setattr("fal_notebook.apps.get_host", lambda _name: host)
    assert httpx.post(info.url, timeout=30).json() == pid
    info.stop()
    until(lambda: not is_alive(pid))
    until(lambda: apps(host) == {})
    nothing_is_left()


def test_an_agent_that_is_killed_takes_its_runners_with_it(
    bed: Bed, nothing_is_left: Callable[[], None]
) -> None:
    host = bed.host()
    info = Pid.spawn(host=host)
    info.wait()
    pid, agent = httpx.post(info.url, timeout=30).json(), host.ask("status")["agent"]["pid"]
    os.kill(agent, signal.SIGKILL)

    with pytest.raises(exceptions.WorkerLostError):
        info.future.result(timeout=20)
    until(lambda: not is_alive(pid))
    answer = httpx.post(info.url, timeout=30)
    assert answer.status_code == 503
    assert "pid" in answer.json()["detail"]
    nothing_is_left()


def test_a_runner_killed_while_it_answers_breaks_that_request_alone(bed: Bed, tmp_path: Path) -> None:
    begun = tmp_path / "begun"

    class Waits(fal.App, name="waits"):
        @fal.endpoint("/")
        def pid(self, wait: bool) -> int:
            import time

            if wait:
                begun.touch()
                time.sleep(600)
            return os.getpid()

    host = bed.host()
    info = Waits.spawn(host=host)
    info.wait()
    pid = httpx.post(info.url, json={"wait": False}, timeout=30).json()
    from threading import Thread

    def strike() -> None:
        until(begun.exists)
        os.kill(pid, signal.SIGKILL)

    Thread(target=strike).start()
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(info.url, json={"wait": True}, timeout=30)

    assert httpx.post(info.url, json={"wait": False}, timeout=30).json() != pid
    info.stop()
