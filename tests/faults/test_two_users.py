"""Two people use one machine at once: each has an agent, environments, runs and apps of their own."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support import http
from support.sshd import start_sshd
from support.waiting import until

import fal_notebook as fal
from fal_notebook.hosts.ssh import SSHHost

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUIREMENT = "six==1.16.0"


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SSHHost, SSHHost]]:
    """The same machine, as two accounts of it reach it."""
    with (
        start_sshd(tmp_path / "one", name="as-one", user="falremote") as one,
        start_sshd(tmp_path / "two", name="as-two", user="falsecond") as two,
    ):
        config = tmp_path / "ssh_config"
        config.write_text(one.host_block + two.host_block)
        monkeypatch.setenv("FAL_SSH_CONFIG", str(config))
        root = f"~/.fal_notebook/two-users-{uuid.uuid4().hex[:8]}"  # the accounts serve other tests, too
        (tmp_path / "hosts.toml").write_text(
            "".join(f'[hosts.{name}]\nroot = "{root}"\n' for name in ("as-one", "as-two"))
        )
        monkeypatch.setenv("FAL_NOTEBOOK_CONFIG", str(tmp_path))
        hosts = SSHHost("as-one"), SSHHost("as-two")
        yield hosts
        for host in hosts:
            host.ask("shutdown")
            host.close()
        for server in (one, two):
            shutil.rmtree(server.home / root.removeprefix("~/"), ignore_errors=True)


def test_two_users_build_call_and_serve_the_same_at_the_same_time(users: tuple[SSHHost, SSHHost]) -> None:
    @fal.function(requirements=[REQUIREMENT])
    def who(seconds: float) -> tuple[str, str, str]:
        import six

        time.sleep(seconds)
        return getpass.getuser(), six.__version__, str(Path(six.__file__).parents[5])

    runs = [who.on(host=host).submit(1.0) for host in users for _ in range(2)]
    names, versions, homes = zip(*(run.result(timeout=120) for run in runs), strict=True)

    assert names == ("falremote", "falremote", "falsecond", "falsecond")
    assert set(versions) == {"1.16.0"}
    assert homes[0] == homes[1]
    assert homes[2] == homes[3]
    assert homes[0] != homes[2]

    class Greeter(fal.App, name="greeter"):
        @fal.endpoint("/")
        def greet(self) -> str:
            return getpass.getuser()

    apps = [Greeter.spawn(host=host) for host in users]
    try:
        for app in apps:
            app.wait()
        answers = [http.post(app.url).json() for app in apps]
        assert answers == ["falremote", "falsecond"]
        for host in users:
            assert [app["name"] for app in host.ask("apps")] == ["greeter"]
            assert len(host.ask("runs")) == 3
    finally:
        for app in apps:
            app.stop()


def test_the_end_of_one_users_agent_is_nothing_to_the_other(users: tuple[SSHHost, SSHHost]) -> None:
    one, two = users
    pids: list[Any] = [host.ask("status")["agent"]["pid"] for host in users]

    @fal.function(host=two)
    def slow() -> str:
        time.sleep(2)
        return getpass.getuser()

    run = slow.submit()
    os.kill(pids[0], signal.SIGKILL)
    until(lambda: not one.is_connected)

    assert run.result(timeout=30) == "falsecond"
    assert two.ask("status")["agent"]["pid"] == pids[1]
    assert one.ask("status")["agent"]["pid"] != pids[0]
