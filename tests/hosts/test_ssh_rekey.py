"""Changes of keys, whoever starts them, beside everything else that a connection does.

Half a gigabyte each way by default; `FAL_TEST_REKEY_GB` asks for more.
"""

from __future__ import annotations

import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import paramiko
import pytest
from paramiko.common import MSG_NEWKEYS

from fal_notebook.hosts.paramiko_link import open_link
from fal_notebook.hosts.ssh_transport import LinkTransport
from tests.support.socket_server import count_bytes, echo, pour, socket_server
from tests.support.sshd import SSHServer, start_sshd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fal_notebook.hosts.ssh_link import SSHLink


SIZE = int(float(os.environ.get("FAL_TEST_REKEY_GB", "0.5")) * (1 << 30))
LIMIT = 16 << 20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SSHServer]:
    with start_sshd(tmp_path / "sshd") as running:
        running.public.chmod(0o777)
        yield running


@pytest.fixture
def sock(server: SSHServer) -> Iterator[str]:
    with socket_server(server.public / "server.sock") as path:
        yield path


def count_key_changes(link: SSHLink) -> Callable[[], int]:
    """Count from now on how often new keys were taken into use."""
    table, times = link._carrier.transport._handler_table, [0]
    handle = table[MSG_NEWKEYS]

    def counting(message: object) -> None:
        times[0] += 1
        handle(message)

    table[MSG_NEWKEYS] = counting
    return lambda: times[0]


@pytest.mark.timeout(60 + 120 * (SIZE >> 30))
@pytest.mark.parametrize("starter", ["server", "client", "both"])
def test_gigabytes_both_ways_beside_small_calls_survive_changes_of_keys(
    server: SSHServer, sock: str, starter: str
) -> None:
    """Channels open, close and are cut off all the while: each kind of message meets a change of keys."""
    size = SIZE if starter == "server" else SIZE // 4
    if starter != "client":
        server.restart(f"RekeyLimit {LIMIT >> 20}M")
    stop = threading.Event()

    def repeat(call: Callable[[], object]) -> int:
        times = 0
        while not stop.is_set():
            call()
            times += 1
        return times

    def small_call() -> None:
        stream = link.dial(sock)
        assert echo(stream, b"y" * 100) == b"y" * 100
        stream.close()

    def cut_off() -> None:
        stream = link.dial(sock)
        stream.sendall(b"g" + LIMIT.to_bytes(8, "big"))
        stream.recv(1)
        stream.close()

    with open_link("gpu-box", ssh_config=server.config_path) as link, ThreadPoolExecutor(5) as pool:
        changes = count_key_changes(link)
        if starter != "server":
            link._carrier.transport.packetizer.REKEY_BYTES = LIMIT
        bulk = [pool.submit(count_bytes, link.dial(sock), size), pool.submit(pour, link.dial(sock), size)]
        small = [pool.submit(repeat, call) for call in (lambda: link.run("true"), small_call, cut_off)]
        try:
            for transfer in bulk:
                transfer.result()
        finally:
            stop.set()
        calls = [caller.result() for caller in small]

        assert changes() >= size // LIMIT
        assert min(calls) > 5
        assert link.is_alive


class Relay:
    """A way to the server on which what the client sends can be held back."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._target = port
        self.flowing = threading.Event()
        self.flowing.set()
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        server = socket.create_connection(("127.0.0.1", self._target))
        self._sockets += [client, server]
        threading.Thread(target=self._copy, args=(client, server, self.flowing), daemon=True).start()
        self._copy(server, client, None)

    def _copy(self, source: socket.socket, target: socket.socket, gate: threading.Event | None) -> None:
        try:
            while data := source.recv(1 << 16):
                if gate is not None:
                    gate.wait()
                target.sendall(data)
        except OSError:
            return  # one side is gone, and so is this connection

    def close(self) -> None:
        self.flowing.set()
        for each in (self._listener, *self._sockets):
            each.close()


@pytest.mark.timeout(25)  # less than paramiko's own patience with a change of keys that stalls
def test_a_channel_that_closes_during_a_change_of_keys_does_not_stall_it(
    server: SSHServer, tmp_path: Path
) -> None:
    """The closing must be answered, but not before there are new keys, and not by the reading thread."""
    relay = Relay(server.port)
    config = tmp_path / "relayed"
    config.write_text(
        server.host_block.replace(f"Port {server.port}", f"Port {relay.port}").replace(
            "StrictHostKeyChecking yes", "StrictHostKeyChecking no"
        )
    )
    flag = server.public / "flag"
    with open_link("gpu-box", ssh_config=config) as link, ThreadPoolExecutor(2) as pool:
        changes = count_key_changes(link)
        running = link._carrier.transport.open_stream("session", timeout=10)
        running.execute(f"echo ready; while [ ! -e {flag} ]; do sleep 0.02; done")
        assert running.recv(100) == b"ready\n"

        relay.flowing.clear()
        changing = pool.submit(link._carrier.transport.renegotiate_keys)
        while link._carrier.transport.clear_to_send.is_set():
            pass
        waiting = pool.submit(link.run, "echo waited")
        flag.touch()
        assert running.wait_until_gone(10)  # the server has closed it, and our answer cannot have left
        relay.flowing.set()

        changing.result(timeout=20)
        assert waiting.result(timeout=20).stdout == b"waited\n"
        assert changes() == 1
    relay.close()


def test_nothing_is_sent_on_a_channel_after_its_close(server: SSHServer, sock: str) -> None:
    """OpenSSH ends the whole connection over it; a writer may be a moment behind a thread that closes."""
    with open_link("gpu-box", ssh_config=server.config_path) as link:
        stream = link.dial(sock)
        number = stream._remote
        stream.close()
        while stream.number in link._carrier.transport._streams:
            threading.Event().wait(0.01)

        link._carrier.transport.post(b"\x5e" + number.to_bytes(4, "big") + b"\0\0\0\1x", stream)

        assert echo(link.dial(sock), b"alive") == b"alive"


class OpenDoor(paramiko.ServerInterface):
    """Lets everybody in."""

    def check_auth_none(self, username: str) -> int:
        return paramiko.AUTH_SUCCESSFUL


@pytest.mark.parametrize("starter", ["server", "client"])
def test_nothing_but_the_exchange_is_sent_while_keys_change(starter: str) -> None:
    """A server may hang up over anything else. OpenSSH does not, paramiko's own does."""
    ours, theirs = socket.socketpair()
    server = paramiko.Transport(theirs)
    server.add_server_key(paramiko.ECDSAKey.generate())
    server.start_server(event=threading.Event(), server=OpenDoor())
    client = LinkTransport(ours)
    client.start_client(timeout=10)
    client.auth_none("somebody")
    stop = threading.Event()

    def chatter() -> None:
        while not stop.is_set():
            client.post(b"\x50\0\0\0\x04test\0")
            if len(client._outbox) > 100:
                stop.wait(0.001)

    talking = [threading.Thread(target=chatter) for _ in range(2)]
    for thread in talking:
        thread.start()
    try:
        for _ in range(20):
            (server if starter == "server" else client).renegotiate_keys()
    finally:
        stop.set()
        for thread in talking:
            thread.join()

    assert (server.is_active(), client.is_active()) == (True, True)
    client.close()
    server.close()
