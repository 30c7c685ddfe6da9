"""Links by the ssh program: its login and its errors; what links do is tested in test_ssh_link.py."""

from __future__ import annotations

import base64
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import fal_notebook
from fal_agent.errors import (
    AuthenticationError,
    ConfigurationError,
    FalServerlessError,
    HostKeyError,
    HostUnreachableError,
)
from fal_notebook.hosts import links, openssh_link
from fal_notebook.hosts.links import open_link
from fal_notebook.hosts.ssh_config import resolve
from fal_notebook.prompting import SilentPrompt
from tests.support.prompts import Answers
from tests.support.sshd import SSHServer, start_sshd

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SSHServer]:
    with start_sshd(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_told", set())


def config(server: SSHServer, path: Path, *lines: str) -> Path:
    """Write the server's section with `lines` first, in which questions may be asked."""
    first, rest = server.host_block.replace("BatchMode yes", "").split("\n", 1)
    path.write_text("\n".join([first, *lines, rest]))
    return path


def who(path: Path, **options: object) -> str:
    with open_link("gpu-box", ssh_config=path, **options) as link:  # type: ignore[arg-type]
        return link.run("id -un").stdout.decode().strip()


# -- logging in ---------------------------------------------------------------------------------------


def test_a_passphrase_is_asked_for_once_and_in_secret(
    server: SSHServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the user has no agent, this process has one."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "open sesame", "-f", key], check=True)
    server.authorize(key.with_suffix(".pub"))
    path = config(server, tmp_path / "c", f"IdentityFile {key}")
    text = path.read_text().replace(f"IdentityFile {server.key_path}", "").replace("IdentityAgent none", "")
    path.write_text(text)
    person = Answers("wrong", "open sesame")

    assert who(path, by="openssh", prompt=person) == server.user
    assert [secret for _, secret in person.questions] == [True, True]
    assert str(key) in person.questions[0][0]
    assert who(path, by="openssh", prompt=SilentPrompt()) == server.user, "the key did not stay unlocked"


def test_a_new_host_key_is_shown_and_once_accepted_remembered(server: SSHServer, tmp_path: Path) -> None:
    known = tmp_path / "known"
    lines = (f"UserKnownHostsFile {known}", "StrictHostKeyChecking ask")
    path = config(server, tmp_path / "c", *lines)
    words = ["ssh-keygen", "-l", "-f", str(server.folder / "hostkey.pub")]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[1]

    with pytest.raises(HostKeyError, match="was not accepted"):
        who(path, by="openssh", prompt=Answers(accept=False))
    person = Answers(accept=True)
    assert who(path, by="openssh", prompt=person) == server.user

    assert len(person.confirmations) == 1
    assert shown in person.confirmations[0]
    assert server.host_key.split()[1] in known.read_text()


def test_the_users_own_shared_connections_are_left_alone(server: SSHServer, tmp_path: Path) -> None:
    lines = ("ControlMaster auto", f"ControlPath {tmp_path}/control", "LocalForward 1 localhost:1")
    path = config(server, tmp_path / "c", *lines)

    with open_link("gpu-box", by="openssh", ssh_config=path) as link:
        assert link.run("echo on").stdout == b"on\n"
        assert not (tmp_path / "control").exists()


def test_ssh_ends_with_the_process_that_started_it(server: SSHServer, tmp_path: Path) -> None:
    """Even if that is killed; and its private folder goes."""
    code = (
        "import os, sys, pathlib\n"
        "from fal_notebook.hosts.openssh_link import open_link\n"
        "link = open_link('gpu-box', ssh_config=pathlib.Path(sys.argv[1]))\n"
        "print(link._carrier._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    folders = str(Path(fal_notebook.__file__).parents[1])
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": f"{folders}:{folders}/agent"}
    words = [sys.executable, "-c", code, str(server.config_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout, done.stderr
    leader = int(done.stdout)

    for _ in range(1000):
        if not _group(leader) and not list(tmp_path.iterdir()):
            break
        time.sleep(0.01)
    assert _group(leader) == []
    assert list(tmp_path.iterdir()) == []


def _group(leader: int) -> list[str]:
    """The processes of a group that still do something."""
    done = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(None, 2) for line in done.stdout.splitlines()]
    return [args for group, state, *args in rows if int(group) == leader and state[0] not in "ZX"]  # type: ignore[misc]


# -- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "kind", "said"),
    [
        ("HostName no-such-host.invalid", HostUnreachableError, "the machine's name could not be looked up"),
        ("Port 1", HostUnreachableError, "the connection was refused: no server listens there"),
        ("User nobody-here", AuthenticationError, "the server did not let you in.*Permission denied"),
        (
            "UserKnownHostsFile /dev/null",
            HostKeyError,
            "its host key is not known, and StrictHostKeyChecking yes",
        ),
        ("NoSuchOption yes", ConfigurationError, "ssh does not understand its configuration.*nosuchoption"),
        (
            "ProxyCommand sh -c 'exit 3'",
            HostUnreachableError,
            "the ProxyCommand or ProxyJump did not connect",
        ),
        ("Ciphers 3des-cbc", HostUnreachableError, "no method in common"),
    ],
)
def test_what_ssh_says_becomes_an_error_of_ours(
    server: SSHServer, tmp_path: Path, lines: str, kind: type[FalServerlessError], said: str
) -> None:
    path = config(server, tmp_path / "c", lines)

    with pytest.raises(kind) as caught:
        who(path, by="openssh")

    message = " ".join(str(caught.value).split())
    assert message.startswith(("'gpu-box': ", "'gpu-box', at a machine on the way: "))
    assert re.search(said, message, re.IGNORECASE), message


def test_a_changed_host_key_comes_with_the_command_that_forgets_the_old_one(
    server: SSHServer, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    known = tmp_path / "known"
    known.write_text(f"[127.0.0.1]:{server.port} {other.with_suffix('.pub').read_text()}")
    path = config(server, tmp_path / "c", f"UserKnownHostsFile {known}")

    with pytest.raises(HostKeyError, match="is not the one that is known") as caught:
        who(path, by="openssh")

    message = str(caught.value)
    assert "ssh-keygen -f" in message.splitlines()[-1]
    assert "SHA256:" in message
    assert f"{known}:1" in message
    assert "@@@" not in message


def test_without_the_program_the_error_says_what_to_install(
    server: SSHServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")

    with pytest.raises(ConfigurationError, match="Install the OpenSSH client"):
        openssh_link.open_link("gpu-box", ssh_config=server.config_path)


# -- which of the two ---------------------------------------------------------------------------------


def is_by_ssh(path: Path, person: Answers, by: str | None = None) -> bool:
    with open_link("gpu-box", by=by, ssh_config=path, prompt=person) as link:
        return type(link._carrier).__module__ == openssh_link.__name__


def test_what_paramiko_cannot_do_is_done_by_ssh_which_is_said_once(server: SSHServer, tmp_path: Path) -> None:
    path = config(server, tmp_path / "c", "HostbasedAuthentication yes")
    person = Answers()

    assert [is_by_ssh(path, person), is_by_ssh(path, person)] == [True, True]
    assert person.told == [
        "'gpu-box' is connected to by the ssh program, because the configuration sets hostbasedauthentication"
    ]
    assert not is_by_ssh(path, person, by="paramiko")


def test_a_server_without_a_method_in_common_with_paramiko_is_reached_by_ssh(
    server: SSHServer, tmp_path: Path
) -> None:
    server.restart("Ciphers chacha20-poly1305@openssh.com")
    person = Answers()

    assert is_by_ssh(server.config_path, person)
    assert "no method in common with paramiko" in person.told[0]
    server.restart()


def test_a_setting_chooses_the_program(server: SSHServer, tmp_path: Path) -> None:
    person = Answers()

    assert not is_by_ssh(server.config_path, person)
    assert is_by_ssh(server.config_path, person, by="openssh")
    assert person.told == []


def reason(tmp_path: Path, text: str) -> str:
    (tmp_path / "config").write_text(text)
    return resolve("box", [tmp_path / "config"]).openssh_reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("Match exec true\n  User me\n", ""),
        ("Match host box localnetwork 10.0.0.0/8\n  Port 1\n", "`Match localnetwork 10.0.0.0/8`"),
        ("Match host other localnetwork 10.0.0.0/8\n  Port 1\n", ""),
        ("Host box\n  Tag work\nMatch tagged work\n  Port 1\n", "`Match tagged work`"),
        ("CanonicalizeHostname no\n", ""),
        ("CanonicalizeHostname yes\n", "canonicalizehostname"),
        ("PKCS11Provider /usr/lib/pkcs11.so\n", "pkcs11provider"),
        ("Host other\n  PKCS11Provider /usr/lib/pkcs11.so\n", ""),
        ("KnownHostsCommand /usr/bin/keys %H\n", "knownhostscommand"),
        ("RevokedHostKeys ~/.ssh/revoked\n", "revokedhostkeys"),
    ],
)
def test_what_only_ssh_can_do_is_seen_in_the_configuration(tmp_path: Path, text: str, expected: str) -> None:
    found = reason(tmp_path, text)

    assert (expected in found) if expected else (found == "")


def test_a_key_in_a_device_is_seen_in_its_file(tmp_path: Path) -> None:
    """Written as ssh-keygen does; making one needs the device."""

    def text(data: bytes) -> bytes:
        return struct.pack("!I", len(data)) + data

    public = text(b"sk-ssh-ed25519@openssh.com") + text(bytes(32)) + text(b"ssh:")
    body = b"openssh-key-v1\0" + text(b"none") * 2 + text(b"") + struct.pack("!I", 1) + text(public)
    coded = base64.encodebytes(body).decode()
    key = tmp_path / "key"
    key.write_text(f"-----BEGIN OPENSSH PRIVATE KEY-----\n{coded}-----END OPENSSH PRIVATE KEY-----\n")

    assert reason(tmp_path, f"IdentityFile {key}\n") == f"{key} is on a security key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "plain"], check=True)
    assert reason(tmp_path, f"IdentityFile {tmp_path}/plain\n") == ""


@pytest.mark.parametrize(("status", "expected"), [(0, "Kerberos"), (1, "")])
def test_kerberos_is_used_where_there_is_a_ticket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, expected: str
) -> None:
    """Distributions turn GSSAPIAuthentication on for everybody."""
    (tmp_path / "klist").write_text(f"#!/bin/sh\nexit {status}\n")
    (tmp_path / "klist").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    found = reason(tmp_path, "GSSAPIAuthentication yes\n")

    assert (expected in found) if expected else (found == "")
    assert shutil.which("klist") == str(tmp_path / "klist")


def test_a_module_that_is_imported_when_used_is_there_for_everybody(tmp_path: Path) -> None:
    """Another library may want it, in whatever way it says so."""
    (tmp_path / "wanted").mkdir()
    (tmp_path / "wanted" / "__init__.py").write_text("print('imported'); value = 7\n")
    (tmp_path / "wanted" / "part.py").write_text("other = 8\n")
    code = (
        "import sys, importlib.util\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from fal_notebook.hosts.links import _import_when_used as later\n"
        "later('wanted'); later('wanted'); later('no_such_module')\n"
        "import wanted\n"
        "print('before', importlib.util.find_spec('wanted') is not None)\n"
        "from wanted import value\n"
        "import wanted.part\n"
        "print(value, wanted.part.other, sys.modules['wanted'].value, 'no_such_module' in sys.modules)\n"
    )
    folders = str(Path(fal_notebook.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": f"{folders}:{folders}/agent"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=60
    )

    assert done.stdout.splitlines() == ["before True", "imported", "7 8 7 False"], done.stderr
