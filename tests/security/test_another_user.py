"""Another account of the host, or of the notebook's machine, reads, lists and reaches nothing of a user's.

The host's user is the account behind the SSH server; the stranger is a second real one, without privileges.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support import http
from support.stranger import POST, as_stranger

import fal_notebook as fal
from fal_notebook.forwarding.forwarder import Forwarder
from fal_notebook.hosts import local

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fal_notebook.hosts.base import Host

SECRET = "s3cr3t-of-the-first-user"
ARGUMENT = "an-argument-of-the-first-user"

# Tries, as the stranger, all there is; gives what succeeded, and what it saw of command lines.
PROBE = r"""
import json, os, socket, sys
paths, sockets, pids, folder = json.load(sys.stdin)
done, seen = [], []
for path in paths:
    try:
        os.listdir(path) if os.path.isdir(path) else open(path, "rb").close()
        done.append("read " + path)
    except OSError:
        pass
    try:
        open(os.path.join(path, "planted") if os.path.isdir(path) else path, "ab").close()
        done.append("wrote " + path)
    except OSError:
        pass
for path in sockets:
    try:
        socket.socket(socket.AF_UNIX).connect(path)
        done.append("connected to " + path)
    except OSError:
        pass
for pid in pids:
    for name in ("environ", "mem", "maps", "fd", "cwd/.", "root/.", "task/%s/environ" % pid):
        path = "/proc/%s/%s" % (pid, name)
        try:
            if os.path.isdir(path):
                os.listdir(path)
            elif not open(path, "rb").read(1):
                continue
            done.append("looked into " + path)
        except OSError:
            pass
    try:
        os.kill(int(pid), 0)
        done.append("signalled %s" % pid)
    except OSError:
        pass
    try:
        seen.append(open("/proc/%s/cmdline" % pid).read())
        seen.append(open("/proc/%s/comm" % pid).read())
    except OSError:
        pass  # it has ended: other tests have processes of that user too
seen += [line for line in open("/proc/net/unix") if " @" in line and "fal" in line]
print(json.dumps([done, seen]))
"""


@pytest.fixture(scope="module")
def busy_host(ssh_host: Host) -> Iterator[Host]:
    """A host with something of everything: runs, blobs, a lane, a session's worker, a secret in use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAL_TEST_SECRET", SECRET)

        @fal.function(host=ssh_host, secrets=["FAL_TEST_SECRET"])
        def work(seconds: float, data: bytes, text: str) -> bytes:
            print(text)
            time.sleep(seconds)
            return data

        @fal.function(host=ssh_host)
        def quick() -> int:
            return 1

        work(0.0, os.urandom(1 << 20), ARGUMENT)
        for _ in range(8):  # by way of a lane in the end
            quick()
        run = work.submit(60.0, b"", ARGUMENT)
        while not any(worker["runs"] for worker in ssh_host.ask("status")["workers"]):
            time.sleep(0.02)
        yield ssh_host
        run.cancel()


def processes_of(uid: int) -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError):  # it has ended
            if path.stat().st_uid == uid:
                yield path.name


def test_the_stranger_gets_at_nothing(busy_host: Any, ssh_server: Any) -> None:
    root = Path(busy_host.connect().welcome.root)
    uid = pwd.getpwnam(ssh_server.user).pw_uid
    paths = [path for path in (root, *root.rglob("*")) if "environments" not in path.parts]
    sockets = [str(path) for path in paths if path.is_socket()]
    pids = list(processes_of(uid))
    assert sockets
    assert len(pids) >= 3
    assert any("journal" in path.name for path in paths)
    assert any(path.parent.name == "blobs" for path in paths)

    done, seen = json.loads(as_stranger(PROBE, [list(map(str, paths)), sockets, pids, str(root)]))

    assert done == []
    shown = "".join(seen)
    assert SECRET not in shown
    assert ARGUMENT not in shown


def test_what_appears_later_is_closed_too(busy_host: Any) -> None:
    """Modes do not depend on the umask that the user's shell sets."""
    root = Path(busy_host.connect().welcome.root)

    assert root.stat().st_mode & 0o777 == 0o700
    others = [path for path in root.iterdir() if path.is_file() and path.stat().st_mode & 0o077]
    assert others == []


def test_nothing_of_it_listens_on_the_network(busy_host: Any, ssh_server: Any) -> None:
    uid = str(pwd.getpwnam(ssh_server.user).pw_uid)
    listening = [
        fields
        for name in ("tcp", "tcp6", "udp", "udp6")
        for fields in map(str.split, Path(f"/proc/net/{name}").read_text().splitlines()[1:])
        if fields[7] == uid and (fields[3] == "0A" or name.startswith("udp"))
    ]

    assert listening == []


# ---------------------------------------------------------------- the ports of apps

FIRE_AND_FORGET = """
import json, socket, sys
port = json.load(sys.stdin)
for _ in range(50):
    client = socket.create_connection(("127.0.0.1", port))
    client.send(b"POST / HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\nContent-Length: 0\\r\\n\\r\\n")
    client.close()
"""


class Door:
    """Answers whoever is let in, and counts them."""

    may_repeat = may_repeat_refused = False

    def __init__(self, *, own_user_only: bool) -> None:
        self.own_user_only, self.asked = own_user_only, 0

    def dial(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        threading.Thread(target=self._answer, args=(theirs,), daemon=True).start()
        return ours

    def _answer(self, end: socket.socket) -> None:
        with end:
            if end.recv(1 << 16):
                self.asked += 1
                with contextlib.suppress(OSError):  # the client did not wait
                    end.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


@pytest.mark.parametrize(("own_user_only", "answer"), [(True, "403"), (False, "200")])
def test_a_port_of_this_machine_is_for_the_account_that_opened_it(own_user_only: bool, answer: str) -> None:
    """Everybody with an account here can dial the loopback address."""
    door = Door(own_user_only=own_user_only)
    with Forwarder(door, name="door") as forwarder:
        said = as_stranger(POST, forwarder.url)
        own = http.post(forwarder.url, timeout=30)

    assert said.startswith(answer)
    assert ("app_auth" in said) == own_user_only
    assert (own.status_code, door.asked) == (200, 1 if own_user_only else 2)


def test_a_stranger_that_does_not_wait_for_the_answer_is_refused_too() -> None:
    """A socket that its owner has closed belongs to nobody; what it asked must not be done."""
    door = Door(own_user_only=True)
    with Forwarder(door, name="door") as forwarder:
        as_stranger(FIRE_AND_FORGET, forwarder.port)
        http.post(forwarder.url, timeout=30)
        while forwarder.connections or forwarder.waiting:
            time.sleep(0.02)

    assert door.asked == 1


# Listens where it is told to, in a process that stays; prints its number.
LISTEN = r"""
import json, os, socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind(json.load(sys.stdin))
listener.listen()
os.chmod(listener.getsockname(), 0o777)
pid = os.fork()
if pid:
    print(pid)
else:
    for number in (0, 1, 2):
        os.close(number)
    time.sleep(60)
"""


def test_a_socket_of_a_stranger_is_not_taken_for_the_agents() -> None:
    """Where the path of ours would be too long, it is below a folder in which everybody may make another."""
    folder = Path(tempfile.mkdtemp(prefix="fal-public-"))
    folder.chmod(0o777)
    path = folder / "agent.sock"
    pid = int(as_stranger(LISTEN, str(path)))
    try:
        with pytest.raises(ConnectionRefusedError, match="another user"):
            local._connect_to(str(path))
        assert local._dial(path) is None
    finally:
        os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder)
