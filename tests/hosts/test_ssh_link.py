"""What a link does, whatever carries it, against a real SSH server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from fal_agent.errors import HostError, LinkLostError
from fal_notebook.hosts.links import open_link
from fal_notebook.hosts.remote_shell import shell_line
from fal_notebook.hosts.ssh_stream import FIRST_WINDOW, WIDEST
from tests.support.socket_server import count_bytes, echo, pour, read_exactly
from tests.support.sshd import SSHServer, start_sshd

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fal_notebook.hosts.ssh_link import SSHLink


SHELLS = ["sh", "bash", "dash", "zsh", "ksh", "fish", "csh", "tcsh", "busybox"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SSHServer]:
    with start_sshd(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture(scope="module", params=["paramiko", "openssh"])
def link(request: pytest.FixtureRequest, server: SSHServer) -> Iterator[SSHLink]:
    with open_link("gpu-box", by=request.param, ssh_config=server.config_path) as opened:
        yield opened


@pytest.fixture
def windowed(server: SSHServer) -> Iterator[SSHLink]:
    """A link whose flow control is ours."""
    with open_link("gpu-box", by="paramiko", ssh_config=server.config_path) as opened:
        yield opened


@pytest.fixture(params=["paramiko", "openssh"])
def by(request: pytest.FixtureRequest) -> str:
    """What carries the link of a test that opens its own."""
    return str(request.param)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[SSHServer]:
    """A server that a test may reconfigure, freeze and break."""
    with start_sshd(tmp_path / "own") as running:
        yield running


# -- commands -----------------------------------------------------------------------------------------


def test_a_command_gives_its_output_its_errors_and_its_status(link: SSHLink) -> None:
    done = link.run("printf out; printf err >&2; exit 7")

    assert (done.status, done.stdout, done.stderr) == (7, b"out", b"err")


def test_a_command_reads_its_input_to_the_end(link: SSHLink) -> None:
    data = os.urandom(5_000_000)

    assert link.run("cat", stdin=data).stdout == data


def test_a_command_that_reads_nothing_is_not_waited_on(link: SSHLink) -> None:
    """More input than any window holds, and nobody to take it."""
    assert link.run("exit 4", stdin=bytes(20_000_000)).status == 4


def test_a_command_killed_by_a_signal_has_no_status(link: SSHLink) -> None:
    assert link.run("kill -9 $$").status == -1


def test_a_process_left_behind_does_not_hold_up_the_command(link: SSHLink) -> None:
    """It keeps the output open; OpenSSH's client would wait for it."""
    done = link.run("sleep 60 & echo $!")

    link.run(f"kill {int(done.stdout)}")
    assert done.status == 0


def test_a_command_that_takes_too_long_is_an_error_and_the_link_goes_on(link: SSHLink) -> None:
    with pytest.raises(HostError, match=r"'gpu-box': a command did not end within 0\.3 s: sleep 30"):
        link.run("sleep 30\necho later", timeout=0.3)

    assert link.run("echo on").stdout == b"on\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_every_login_shell_runs_the_same_script(shell: str, tmp_path: Path) -> None:
    """A server hands the line to the login shell's -c, and the shells' rules of quoting differ."""
    script = """printf '%s|' "$0" 'a  b' "it's" 'back\\slash' 'bang!' "\\$HOME" '100%' '*' "`echo x`" é
case abc in a*) printf 'case';; esac
exit 3"""
    line = shell_line(script, "TOKEN")
    try:
        words = [shell, "sh", "-c", line] if shell == "busybox" else [shell, "-c", line]
        done = subprocess.run(
            words, capture_output=True, check=False, env={**os.environ, "HOME": str(tmp_path)}
        )
    except FileNotFoundError:
        pytest.skip(f"{shell} is not installed here")

    expected = "TOKEN\n/bin/sh|a  b|it's|back\\slash|bang!|$HOME|100%|*|x|é|case"
    assert (done.stdout.decode(), done.returncode) == (expected, 3)
    assert done.stderr == b"TOKEN\n"


def test_what_startup_files_print_is_not_output(own: SSHServer, by: str) -> None:
    """Bash reads such a file for every command; a greeting in it is common."""
    noisy = own.public / "noisy.sh"
    noisy.write_text("printf 'Welcome!'; echo 'disk 93% full' >&2")
    own.restart(f"SetEnv BASH_ENV={noisy}")

    with open_link("gpu-box", by=by, ssh_config=own.config_path) as link:
        done = link.run("echo real; echo problem >&2")

    assert (done.stdout, done.stderr) == (b"real\n", b"problem\n")


def test_an_account_without_a_shell_is_an_error_with_its_words(own: SSHServer, by: str) -> None:
    own.restart("ForceCommand echo This account is not available; exit 1")

    with open_link("gpu-box", by=by, ssh_config=own.config_path) as link, pytest.raises(HostError) as caught:
        link.run("true")

    assert "runs no commands; it said: This account is not available" in str(caught.value)


def test_more_commands_at_once_than_the_server_allows_take_turns(own: SSHServer, by: str) -> None:
    own.restart("MaxSessions 2")

    with open_link("gpu-box", by=by, ssh_config=own.config_path) as link, ThreadPoolExecutor(12) as pool:
        done = list(pool.map(lambda i: link.run(f"sleep 0.05; echo {i}"), range(24)))

    assert [d.stdout for d in done] == [f"{i}\n".encode() for i in range(24)]


# -- files --------------------------------------------------------------------------------------------


def test_an_uploaded_file_is_there_whole_with_its_mode_and_private_folders(
    server: SSHServer, link: SSHLink
) -> None:
    data = os.urandom(3_000_001)

    link.upload("~/.fal-test/a b/it's.bin", data, mode=0o750)

    target = server.home / ".fal-test" / "a b" / "it's.bin"
    folder = target.parent
    try:
        assert target.read_bytes() == data
        assert target.stat().st_mode & 0o777 == 0o750
        assert [folder.stat().st_mode & 0o777, folder.parent.stat().st_mode & 0o777] == [0o700, 0o700]
        assert [p.name for p in folder.iterdir()] == ["it's.bin"]
    finally:
        link.run("rm -r ~/.fal-test")


def test_an_empty_file_can_be_uploaded_over_another(link: SSHLink, server: SSHServer) -> None:
    link.upload("~/.fal-test-empty", b"before")

    link.upload("~/.fal-test-empty", b"")

    assert link.run("wc -c < ~/.fal-test-empty; rm ~/.fal-test-empty").stdout.strip() == b"0"


def test_a_file_that_cannot_be_written_is_an_error_with_the_reason(link: SSHLink) -> None:
    with pytest.raises(HostError, match=r"/proc/nowhere/x could not be written there: .*mkdir"):
        link.upload("/proc/nowhere/x", bytes(2_000_000))


def test_a_full_disk_leaves_nothing_behind(link: SSHLink, own: SSHServer) -> None:
    """A small file system of its own stands for the disk."""
    disk = own.public / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=777", "fal-test", disk], check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs CAP_SYS_ADMIN")
    try:
        with pytest.raises(HostError, match="No space left on device"):
            link.upload(f"{disk}/big", bytes(4_000_000))
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_upload_cut_off_in_the_middle_leaves_no_file(own: SSHServer, by: str) -> None:
    """The far end sees a file that simply ends early; it must not take it for the whole."""
    with open_link("gpu-box", by=by, ssh_config=own.config_path) as link:
        own.public.chmod(0o777)
        target = own.public / "cut"
        cutter = threading.Thread(target=_kill_when_growing, args=(own, own.public))
        cutter.start()
        with pytest.raises(LinkLostError):
            link.upload(str(target), bytes(1_500_000_000))
        cutter.join()

    _wait_for(lambda: not [p for p in own.public.iterdir() if p.name.startswith("cut")])
    assert not target.exists()


def _kill_when_growing(server: SSHServer, folder: Path) -> None:
    _wait_for(lambda: any(p.stat().st_size for p in folder.glob("cut*")))
    server.kill_connections()


def _wait_for(condition: object) -> None:
    pause = threading.Event()
    for _ in range(1000):
        if condition():  # type: ignore[operator]
            return
        pause.wait(0.01)
    pytest.fail("what was waited for did not happen")


# -- sockets ------------------------------------------------------------------------------------------


def test_a_dialled_socket_carries_bytes_both_ways(link: SSHLink, sock: str) -> None:
    data = os.urandom(3_000_000)
    stream = link.dial(sock)

    assert echo(stream, data) == data
    stream.close()


def test_the_end_of_the_other_side_is_the_end_of_the_stream(link: SSHLink, sock: str) -> None:
    stream = link.dial(sock)
    stream.sendall(b"g" + (5).to_bytes(8, "big"))

    assert read_exactly(stream, 99) == bytes(5)
    assert stream.recv(1) == b""


def test_sending_to_a_side_that_has_left_is_an_error(link: SSHLink, sock: str) -> None:
    stream = link.dial(sock)
    stream.sendall(b"g" + (0).to_bytes(8, "big"))
    assert stream.recv(1) == b""

    with pytest.raises(OSError, match="closed"):
        stream.sendall(bytes(1 << 30))
    assert link.run("echo on").stdout == b"on\n"


def test_closing_a_stream_lets_its_reader_go(link: SSHLink, sock: str) -> None:
    stream = link.dial(sock)
    stream.sendall(b"i")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(stream.recv, 1)

        stream.close()

        with pytest.raises(OSError, match="closed"):
            reading.result(timeout=30)


def test_a_socket_nobody_listens_on_refuses(link: SSHLink) -> None:
    with pytest.raises(ConnectionRefusedError, match=r"'gpu-box': nothing listens at /nowhere/a\.sock"):
        link.dial("/nowhere/a.sock")

    assert link.is_alive


def test_blocks_of_several_writers_are_never_mixed(link: SSHLink, sock: str) -> None:
    stream = link.dial(sock)
    stream.sendall(b"e")
    size, count = 200_000, 5
    blocks = [bytes([letter]) * size for letter in b"abc"]
    writers = [
        threading.Thread(target=lambda b=block: [stream.sendall(b) for _ in range(count)]) for block in blocks
    ]
    for writer in writers:
        writer.start()

    got = read_exactly(stream, size * count * len(blocks))

    for writer in writers:
        writer.join()
    pieces = [got[i : i + size] for i in range(0, len(got), size)]
    assert sorted(pieces) == sorted(blocks * count)


def test_a_stream_that_nobody_reads_holds_up_no_other(link: SSHLink, sock: str) -> None:
    stalled = link.dial(sock)
    stalled.sendall(b"i")
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(stalled.sendall, bytes(32 << 20))

        assert echo(link.dial(sock), b"y" * 1_000_000) == b"y" * 1_000_000
        assert link.run("echo on").stdout == b"on\n"

        assert not sending.done()
        stalled.close()
        with pytest.raises(OSError, match="closed"):
            sending.result(timeout=30)


def test_a_reader_that_pauses_bounds_what_is_held_in_memory(windowed: SSHLink, sock: str) -> None:
    """The window is what may wait here unread; the rest stays with the sender."""
    stream = windowed.dial(sock)
    stream.sendall(b"g" + (1 << 30).to_bytes(8, "big"))
    stream.recv(1)

    count_bytes(windowed.dial(sock), 64 << 20)  # time enough for the other to run ahead

    assert sum(map(len, stream._incoming)) <= FIRST_WINDOW
    stream.close()


def test_many_that_pause_hold_little_each_and_nobody_up(windowed: SSHLink, sock: str) -> None:
    paused = [windowed.dial(sock) for _ in range(100)]
    for stream in paused:
        stream.sendall(b"g" + (1 << 30).to_bytes(8, "big"))
    for stream in paused:
        stream.recv(1)

    count_bytes(windowed.dial(sock), 16 << 20)
    pour(windowed.dial(sock), 16 << 20)

    assert all(sum(map(len, stream._incoming)) <= FIRST_WINDOW for stream in paused)
    with ThreadPoolExecutor(20) as pool:  # a storm of ends
        list(pool.map(lambda stream: stream.close(), paused))
    assert echo(windowed.dial(sock), b"still there") == b"still there"


def test_the_window_widens_for_a_quick_reader_and_is_given_back(windowed: SSHLink, sock: str) -> None:
    transport = windowed._carrier.transport
    spare = transport._spare
    stream = windowed.dial(sock)

    pour(stream, 64 << 20)

    assert FIRST_WINDOW < stream.window <= WIDEST
    assert transport._spare == spare - stream.window + FIRST_WINDOW
    stream.close()
    _wait_for(lambda: transport._spare == spare)


def test_an_interrupt_while_sending_breaks_nothing_but_the_sending(link: SSHLink, sock: str) -> None:
    """Ctrl-C arrives in the main thread, perhaps in the middle of a packet."""
    stream = link.dial(sock)
    stream.sendall(b"s" + (1 << 40).to_bytes(8, "big"))
    main = threading.main_thread().ident
    assert main is not None
    interrupts = 0
    for _ in range(15):
        timer = threading.Timer(0.02, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
        try:
            while True:
                stream.sendall(bytes(1 << 20))
        except KeyboardInterrupt:
            interrupts += 1
        timer.join()
    stream.close()

    assert interrupts == 15
    assert echo(link.dial(sock), b"z" * 500_000) == b"z" * 500_000
    assert link.run("echo on").stdout == b"on\n"


def test_importing_the_package_does_not_import_paramiko() -> None:
    """It is slow to import, and most cells run on this machine."""
    code = "import sys, fal_notebook, fal_notebook.hosts.base; sys.exit('paramiko' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
