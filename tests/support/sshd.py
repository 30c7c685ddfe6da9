"""Real OpenSSH servers on loopback, with an unprivileged user of their own on the other side.

Needs root (to add the user and to let sshd become it) and an installed `sshd`; without them the test
that asks is skipped, saying what to do. Outside of the test's folder only the account and its home are
touched.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import pwd
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

__all__ = ["SSHServer", "connection_processes", "provide_user", "require_sshd", "ssh_command", "start_sshd"]

USER = "falremote"
MARK = (
    "fal_notebook tests"  # the account's comment; without it the account is somebody's, and is left as it is
)
USER_EXISTS = 9  # useradd's exit status
PASSED_ON = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "UV_", "PIP_")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
DEFAULTS = """\
PermitRootLogin no
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
AllowTcpForwarding yes
AllowStreamLocalForwarding yes
MaxSessions 10
MaxStartups 100
UseDNS no
PrintMotd no
Subsystem sftp internal-sftp
LogLevel VERBOSE
"""

_sessions: dict[str, int] = {}  # user -> the lock that says this process uses the account


@dataclass
class SSHServer:
    """One running server; `ssh -F config_path name` reaches it, and so does `FAL_SSH_CONFIG=config_path`."""

    name: str
    port: int
    user: str
    folder: Path
    config_path: Path
    key_path: Path
    known_hosts: Path
    log: Path
    public: Path  # readable by the user: authorized_keys, and whatever a test wants both sides to see
    process: subprocess.Popen[bytes] = field(repr=False)
    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()  # words before the server's command, which lead to another network

    @property
    def home(self) -> Path:
        """The home folder of the user on the other side."""
        return Path(pwd.getpwnam(self.user).pw_dir)

    @property
    def host_block(self) -> str:
        """The `Host` section of `config_path`, for configurations that name several servers."""
        return (
            f"Host {self.name}\n"
            f"  HostName {self.address}\n"
            f"  Port {self.port}\n"
            f"  User {self.user}\n"
            f"  IdentityFile {self.key_path}\n"
            "  IdentitiesOnly yes\n"
            "  IdentityAgent none\n"
            f"  UserKnownHostsFile {self.known_hosts}\n"
            "  GlobalKnownHostsFile /dev/null\n"
            "  StrictHostKeyChecking yes\n"
            "  BatchMode yes\n"
        )

    @property
    def host_key(self) -> str:
        """The server's public key as `type base64`."""
        return " ".join((self.folder / "hostkey.pub").read_text().split()[:2])

    def authorize(self, public_key: Path) -> None:
        """Let one more key in."""
        with (self.public / "authorized_keys").open("a") as file:
            file.write(public_key.read_text())

    def new_host_key(self, kind: str = "ed25519") -> None:
        """Give the server another host key, without telling `known_hosts`; takes effect on `restart`."""
        for path in (self.folder / "hostkey", self.folder / "hostkey.pub"):
            path.unlink(missing_ok=True)
        _keygen(self.folder / "hostkey", kind=kind)

    def trust(self) -> None:
        """Write the server's present host key, and only that, to `known_hosts`."""
        self.known_hosts.write_text(f"[{self.address}]:{self.port} {self.host_key}\n")

    def restart(self, extra_config: str = "", *, down: float = 0.0, wait: bool = True) -> None:
        """Break every connection and start again on the same port, `down` seconds later.

        With `wait` it can be reached when this returns.
        """
        self.kill_connections()
        self._end()
        time.sleep(down)
        self.process = _run_server(
            self.folder, self.public, (self.address, self.port), self.user, extra_config, prefix=self.prefix
        )
        if wait:
            _wait_until_listening(self.process, (self.address, self.port), self.log)

    def stop_listening(self) -> None:
        """Break every connection and be away, until `restart`."""
        _signal(self.process.pid, signal.SIGSTOP)  # or a client that is quick would be back already
        self.kill_connections()
        self.process.kill()
        self._end()

    def kill_connections(self) -> list[int]:
        """Break every connection as a crash would; what they started on the host lives on."""
        killed = connection_processes(self.process.pid)
        for pid in killed:
            _signal(pid, signal.SIGKILL)
        for pid in killed:
            while _lives(pid):
                time.sleep(0.005)
        return killed

    def freeze(self) -> None:
        """Stop the server and its connections without closing anything, as a dead network would."""
        for pid in (self.process.pid, *connection_processes(self.process.pid)):
            _signal(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Undo `freeze`."""
        for pid in (self.process.pid, *connection_processes(self.process.pid)):
            _signal(pid, signal.SIGCONT)

    def stop(self) -> None:
        """Break every connection, end the server, and remove its public folder. May be called twice."""
        if self.process.poll() is None:
            self.thaw()
            self.kill_connections()
            self._end()
        shutil.rmtree(self.public, ignore_errors=True)

    def _end(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=10)

    def __enter__(self) -> SSHServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def require_sshd() -> None:
    """Skip the test where no server can be started, saying what to do about it."""
    if _sshd() is None:
        pytest.skip("no sshd on this machine: `make setup-system` installs it")
    if os.geteuid() != 0:
        pytest.skip("starting sshd with a second user needs root: run the tests as root or in a container")


def start_sshd(
    folder: Path,
    *,
    name: str = "gpu-box",
    extra_config: str = "",
    user: str = USER,
    address: str = "127.0.0.1",
    prefix: tuple[str, ...] = (),
) -> SSHServer:
    """Start a server on a free port; `stop()` it, or use it as a context manager.

    Args:
        folder: where its keys, its log and the client's configuration go.
        name: how the client's configuration calls it.
        extra_config: sshd_config lines; they come first, and sshd keeps the first value it meets.
        user: the account on the other side; created when absent.
        address: where it listens.
        prefix: words before its command, which lead to the network that has the address.
    """
    require_sshd()
    provide_user(user)
    folder.mkdir(parents=True, exist_ok=True)
    public = Path(tempfile.mkdtemp(prefix="fal-sshd-"))  # pytest's own folders are closed to other users
    public.chmod(0o755)
    _keygen(folder / "id")
    _keygen(folder / "hostkey")
    shutil.copy(folder / "id.pub", public / "authorized_keys")
    (public / "authorized_keys").chmod(0o644)
    port = _free_port()
    process = _run_server(folder, public, (address, port), user, extra_config, prefix=prefix)
    server = SSHServer(
        name=name,
        port=port,
        user=user,
        folder=folder,
        config_path=folder / "ssh_config",
        key_path=folder / "id",
        known_hosts=folder / "known_hosts",
        log=folder / "sshd.log",
        public=public,
        process=process,
        address=address,
        prefix=prefix,
    )
    server.trust()
    server.config_path.write_text(server.host_block)
    atexit.register(server.stop)
    _wait_until_listening(process, (address, port), server.log)
    return server


def connection_processes(master: int) -> list[int]:
    """The two processes of each connection of the server `master`; not what they run for the user."""
    monitors = _children(master)
    return [pid for monitor in monitors for pid in (monitor, *_children(monitor))]


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return []


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _sshd() -> str | None:
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:/sbin")


def _keygen(path: Path, *, kind: str = "ed25519", passphrase: str = "") -> None:
    if not path.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-f", path], check=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _passed_on() -> str:
    """The `SetEnv` line that lets uv and pip on the other side reach what they reach here."""
    names = [n for n in os.environ if n.startswith(PASSED_ON) or n.upper() in PROXIES]
    pairs = [f"{name}={os.environ[name]}" for name in sorted(names) if '"' not in os.environ[name]]
    return "SetEnv " + " ".join(f'"{pair}"' for pair in pairs) + "\n" if pairs else ""


def _run_server(
    folder: Path,
    public: Path,
    address: tuple[str, int],
    user: str,
    extra_config: str,
    *,
    prefix: tuple[str, ...],
) -> subprocess.Popen[bytes]:
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd separates privileges
    own = (
        f"ListenAddress {address[0]}\nPort {address[1]}\nHostKey {folder}/hostkey\nPidFile none\n"
        f"AuthorizedKeysFile {public}/authorized_keys\nAllowUsers {user}\n"
    )
    config = folder / "sshd_config"
    config.write_text(f"{extra_config}\n{own}{DEFAULTS}{_passed_on()}")
    command = [str(_sshd()), "-D", "-f", str(config), "-E", str(folder / "sshd.log")]
    if setpriv := shutil.which("setpriv"):  # a test run that is killed leaves no server behind
        command = [setpriv, "--pdeathsig", "KILL", *prefix, *command]
    return subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)


def _wait_until_listening(process: subprocess.Popen[bytes], address: tuple[str, int], log: Path) -> None:
    for _ in range(500):
        if process.poll() is not None:
            break
        try:
            with socket.create_connection(address, timeout=5) as probe:
                if probe.recv(4) == b"SSH-":
                    return
        except (ConnectionRefusedError, ConnectionResetError):
            pass  # not yet, or still the one before
        time.sleep(0.01)
    said = log.read_text() if log.exists() else "(no log)"
    raise RuntimeError(f"sshd did not listen on {address}; it said:\n{said}")


def provide_user(user: str) -> None:
    """Have the account and hold on to it until this process ends."""
    if user in _sessions:
        return
    lock = os.open(Path(tempfile.gettempdir(), f"fal-sshd-{user}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_SH)
    # "*" is no password; the default "!" would be a locked account, which sshd refuses without PAM.
    command = ["useradd", "-m", "-s", "/bin/bash", "-p", "*", "-c", MARK, user]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, USER_EXISTS):
        raise RuntimeError(f"useradd {user}: {done.stderr}")
    _sessions[user] = lock
    atexit.register(_leave_user, user)


def _leave_user(user: str) -> None:
    """Empty the account, unless another test run is using it."""
    lock = _sessions.pop(user)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    account = pwd.getpwnam(user)
    if account.pw_gecos.startswith(MARK):
        for folder in Path("/proc").glob("[0-9]*"):
            if _owner(folder) == account.pw_uid:
                _signal(int(folder.name), signal.SIGKILL)
        shutil.rmtree(Path(account.pw_dir, ".fal_notebook"), ignore_errors=True)
    os.close(lock)


def _owner(path: Path) -> int | None:
    try:
        return path.stat().st_uid
    except (FileNotFoundError, ProcessLookupError):
        return None


def ssh_command(server: SSHServer, *command: str) -> list[str]:
    """The OpenSSH client's command line that runs `command` on the server."""
    return ["ssh", "-F", str(server.config_path), server.name, shlex.join(command)]
