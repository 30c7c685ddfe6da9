"""What ends or breaks under a spawned app: the app itself, its agent, the link to its host."""

from __future__ import annotations

import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from support import http
from support.sshd import connection_processes
from support.waiting import is_alive, until

from fal_notebook import app_ports, exceptions
from fal_notebook.hosts.ssh import SSHHost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import httpx
    from support.sshd import SSHServer

SEVERAL = {"min_concurrency": 2, "max_concurrency": 2, "max_multiplexing": 20}
SECONDS = 60.0


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def workers(host: Any) -> list[int]:
    return [worker["pid"] for worker in host.ask("status")["workers"]]


def ask(info: Any, seconds: float = 0.0) -> httpx.Response:
    return http.post(info.url, json={"seconds": seconds}, timeout=SECONDS)


@pytest.mark.parametrize("shape", [SEVERAL, {}], ids=["gateway", "single"])
def test_nothing_is_left_of_a_stopped_app(
    host: Any, spawn: Callable[..., Any], shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_ports, "KEPT_AFTER_END", 0.5)
    info = spawn(**shape)
    port = int(info.url.rpartition(":")[2])
    assert ask(info).status_code == 200
    pids = workers(host)
    assert len(pids) >= 1
    kept = socket.create_connection(("127.0.0.1", port))

    info.stop()

    until(lambda: not any(map(is_alive, pids)))
    assert host.ask("apps") == []
    until(lambda: not listens(port))
    assert kept.recv(10) == b""
    kept.close()
    until(lambda: not [thread for thread in threading.enumerate() if f"forward {info.name}" in thread.name])
    assert str(port) in info.url
    assert not listens(port)  # to look at a stopped app is not to open its port


def test_a_stopped_app_says_so_and_is_at_the_same_port_when_it_is_spawned_again(
    host: Any, app: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_ports, "KEPT_AFTER_END", 0.5)
    cls = app()
    with cls.spawn(host=host) as first:
        first.wait(startup_timeout=SECONDS)
        url = first.url
        assert ask(first).status_code == 200
    answer = http.post(url, json={}, timeout=SECONDS)
    assert (answer.status_code, first.name in answer.json()["detail"]) == (503, True)
    until(lambda: not listens(int(url.rpartition(":")[2])))

    with cls.spawn(host=host) as second:
        second.wait(startup_timeout=SECONDS)

        assert second.url == url
        assert ask(second).status_code == 200


def test_an_app_that_is_spawned_again_at_once_keeps_its_port_open(
    host: Any, app: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_ports, "KEPT_AFTER_END", 0.5)
    cls = app()
    with cls.spawn(host=host) as first:
        first.wait(startup_timeout=SECONDS)
        url = first.url
    with cls.spawn(host=host) as second:
        second.wait(startup_timeout=SECONDS)
        until(lambda: (host.name, second.name) not in app_ports._closing)

        assert (second.url, ask(second).status_code) == (url, 200)


@pytest.fixture
def far(server: SSHServer) -> Iterator[SSHHost]:
    """The SSH server as a host, with a connection of its own."""
    made = SSHHost(server.name)
    yield made
    made.ask("stop", everything=True)
    made.close()


@pytest.mark.parametrize("shape", [SEVERAL, {}], ids=["gateway", "single"])
def test_a_link_that_breaks_is_told_to_requests_and_made_anew_by_the_next(
    far: SSHHost, server: SSHServer, app: Callable[..., Any], shape: dict[str, Any]
) -> None:
    info = app(**shape).spawn(host=far)
    info.wait(startup_timeout=SECONDS)
    pids = workers(far)
    with ThreadPoolExecutor(10) as pool:
        asking = [pool.submit(ask, info, 2.0) for _ in range(10)]
        until(lambda: sum(one["in_flight"] for one in far.ask("apps")))
        server.kill_connections()
        answers = [request.result(timeout=SECONDS) for request in asking]

    broken = [answer for answer in answers if answer.status_code != 200]  # the others had not come so far
    assert {answer.status_code for answer in broken} <= {502, 503}
    assert all(answer.json()["detail"] for answer in broken)
    with ThreadPoolExecutor(10) as pool:
        again = list(pool.map(lambda _: ask(info), range(20)))
    assert {answer.status_code for answer in again} == {200}
    assert len(connection_processes(server.process.pid)) == 2  # one connection for all of them
    assert set(pids) <= set(workers(far))
    assert info.state == "ready", info.future.exception()

    info.stop()

    assert info.state == "stopped"
    until(lambda: not any(map(is_alive, pids)))


def test_a_host_that_is_away_is_told_and_found_again(
    far: SSHHost, server: SSHServer, app: Callable[..., Any]
) -> None:
    info = app().spawn(host=far)
    info.wait(startup_timeout=SECONDS)
    server.stop_listening()
    try:
        answers = [ask(info) for _ in range(2)]
    finally:
        server.restart()

    assert [answer.status_code for answer in answers] == [503, 503]
    assert server.name in answers[0].json()["detail"]
    assert ask(info).status_code == 200
    info.kill()
    until(lambda: far.ask("apps") == [])


@pytest.mark.parametrize("shape", [SEVERAL], ids=["gateway"])
def test_a_gateway_that_is_killed_is_replaced(
    host: Any, spawn: Callable[..., Any], shape: dict[str, Any]
) -> None:
    info = spawn(**shape)
    until(lambda: sum(one["runners"] for one in host.ask("apps")) == 2)
    with ThreadPoolExecutor(20) as pool:
        runners = {answer.json() for answer in pool.map(lambda _: ask(info, 0.1), range(40))}
        (gateway,) = set(workers(host)) - runners
        asking = [pool.submit(ask, info, 1.0) for _ in range(10)]
        until(lambda: sum(one["in_flight"] for one in host.ask("apps")) == 10)
        os.kill(gateway, signal.SIGKILL)
        answers = [request.result(timeout=SECONDS) for request in asking]

    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json() for answer in answers} <= runners


@pytest.mark.parametrize("shape", [SEVERAL], ids=["gateway"])
def test_an_agent_that_is_killed_leaves_no_runner_and_the_app_can_be_spawned_again(
    host: Any, app: Callable[..., Any], shape: dict[str, Any]
) -> None:
    cls = app(**shape)
    info = cls.spawn(host=host)
    info.wait(startup_timeout=SECONDS)
    url = info.url
    agent, pids = host.ask("status")["agent"]["pid"], workers(host)
    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, info, 30.0) for _ in range(4)]
        until(lambda: app_ports._forwarders[host.name, info.name].connections == 4)
        os.kill(agent, signal.SIGKILL)
        answers = [request.result(timeout=SECONDS) for request in asking]

    assert {answer.status_code for answer in answers} <= {502, 503}
    assert all(answer.json()["detail"] for answer in answers)
    with pytest.raises(exceptions.WorkerLostError):
        info.future.result(timeout=20)
    until(lambda: not any(map(is_alive, pids)))
    with cls.spawn(host=host) as again:
        again.wait(startup_timeout=SECONDS)
        assert (again.url, ask(again).status_code) == (url, 200)
    assert info.state == "failed"
