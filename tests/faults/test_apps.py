"""Whoever dies: an app goes on without its notebook, and is not left behind by its agent."""

from __future__ import annotations

import os
import signal
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest
from support import http
from support.waiting import is_alive, until

import fal_notebook as fal
from fal_notebook import exceptions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import httpx

    from tests.faults.conftest import Bed

NOTEBOOK = """
import fal_notebook as fal
from fal_notebook.hosts.local import LocalHost

class Where(fal.App, {settings}):
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
    kernel = bed.kernel(NOTEBOOK.format(settings='name="where"'))
    url = kernel.says("ready")
    pid = http.post(url, timeout=30).json()
    kernel.kill()

    host = bed.host()
    assert apps(host) == {"where": "ready"}
    (info,) = fal.apps.listed(host)
    assert not info.attended
    monkeypatch.setattr("fal_notebook.apps.get_host", lambda _name: host)
    assert http.post(info.url, timeout=30).json() == pid
    info.stop()
    until(lambda: not is_alive(pid))
    until(lambda: apps(host) == {})
    nothing_is_left()


def test_an_app_with_a_gateway_goes_on_as_configured_without_its_notebook(
    bed: Bed, nothing_is_left: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = 'name="several", min_concurrency=2, max_concurrency=2, max_multiplexing=8'
    kernel = bed.kernel(NOTEBOOK.format(settings=settings))
    kernel.says("ready")
    kernel.kill()

    host = bed.host()
    monkeypatch.setattr("fal_notebook.apps.get_host", lambda _name: host)
    until(lambda: [app["runners"] for app in host.ask("apps")] == [2])
    (info,) = fal.apps.listed(host)
    pids = {http.post(info.url, timeout=30).json() for _ in range(10)}
    os.kill(min(pids), signal.SIGKILL)
    assert {http.post(info.url, timeout=30).status_code for _ in range(10)} == {200}
    until(lambda: [app["runners"] for app in host.ask("apps")] == [2])

    info.stop()

    until(lambda: apps(host) == {})
    nothing_is_left()


def test_an_agent_that_is_killed_takes_its_runners_with_it(
    bed: Bed, nothing_is_left: Callable[[], None]
) -> None:
    host = bed.host()
    info = Pid.spawn(host=host)
    info.wait()
    pid, agent = http.post(info.url, timeout=30).json(), host.ask("status")["agent"]["pid"]
    os.kill(agent, signal.SIGKILL)

    with pytest.raises(exceptions.WorkerLostError):
        info.future.result(timeout=20)
    assert info.state == "failed"
    until(lambda: not is_alive(pid))
    answer = http.post(info.url, timeout=30)
    assert answer.status_code == 503
    assert "pid" in answer.json()["detail"]
    with Pid.spawn(host=host) as again:
        again.wait()
        assert again.url == info.url
        assert http.post(info.url, timeout=30).json() != pid
    nothing_is_left()


def waiting_app(folder: Path, **settings: Any) -> type[fal.App]:
    """Give an app whose first request for the pid waits, which it says by a file; the others do not."""
    begun = folder / "begun"

    class Waits(fal.App, name="waits", **settings):
        @fal.endpoint("/")
        def pid(self, wait: bool) -> int:
            import time

            if wait and not begun.exists():
                begun.touch()
                time.sleep(600)
            return os.getpid()

    return Waits


def ask(info: Any, *, wait: bool = False) -> httpx.Response:
    return http.post(info.url, json={"wait": wait}, timeout=30)


def test_a_request_whose_runner_is_killed_is_answered_by_the_next_one(bed: Bed, tmp_path: Path) -> None:
    with waiting_app(tmp_path).spawn(host=bed.host()) as info:
        info.wait()
        pid = ask(info).json()
        strike = Thread(target=lambda: (until((tmp_path / "begun").exists), os.kill(pid, signal.SIGKILL)))
        strike.start()

        answer = ask(info, wait=True)

        strike.join()
        assert (answer.status_code, answer.json() != pid) == (200, True)


def test_a_request_that_may_not_be_repeated_is_told_that_its_runner_broke(bed: Bed, tmp_path: Path) -> None:
    app = waiting_app(tmp_path, skip_retry_conditions=["connection_error"])
    with app.spawn(host=bed.host()) as info:
        info.wait()
        pid = ask(info).json()
        strike = Thread(target=lambda: (until((tmp_path / "begun").exists), os.kill(pid, signal.SIGKILL)))
        strike.start()

        answer = ask(info, wait=True)

        strike.join()
        assert answer.status_code == 502
        assert "broke" in answer.json()["detail"]
        assert ask(info).json() != pid
