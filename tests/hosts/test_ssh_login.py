"""Getting in, or being told why not, at a real SSH server."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import threading
from typing import TYPE_CHECKING

import paramiko  # type: ignore[import-untyped]
import pytest

from fal_agent.errors import AuthenticationError, LinkLostError
from fal_notebook.hosts.paramiko_link import open_link
from fal_notebook.hosts.ssh_transport import LinkTransport
from fal_notebook.prompting import SilentPrompt, unattended
from tests.support.prompts import Answers
from tests.support.sshd import SSHServer, start_sshd

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SSHServer]:
    with start_sshd(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def own(tmp_path: Path) -> Iterator[SSHServer]:
    with start_sshd(tmp_path / "own") as running:
        yield running


@pytest.fixture
def password(own: SSHServer) -> Iterator[SSHServer]:
    """A server whose user has a password, and no key that gets in."""
    (own.public / "authorized_keys").write_text("")
    given = subprocess.run(
        ["chpasswd", "-c", "SHA512"],
        input=f"{own.user}:{PASSWORD}",
        text=True,
        capture_output=True,
        check=False,
    )
    assert given.returncode == 0, given.stderr
    yield own
    subprocess.run(["usermod", "-p", "*", own.user], check=True)


def keygen(path: Path, *, kind: str = "ed25519", passphrase: str = "", pem: bool = False) -> Path:
    words = [
        "ssh-keygen",
        "-q",
        "-t",
        kind,
        "-N",
        passphrase,
        "-f",
        str(path),
        *(["-m", "PEM"] if pem else []),
    ]
    subprocess.run(words, check=True)
    return path


def config(server: SSHServer, path: Path, *lines: str) -> Path:
    """Write a configuration that reaches the server but has `lines` instead of its keys."""
    kept = [line for line in server.host_block.splitlines() if not re.match(r"\s*(Identit|BatchMode)", line)]
    path.write_text("\n".join([kept[0], *lines, *kept[1:]]) + "\n")
    return path


def who(config_path: Path, name: str = "gpu-box", **options: object) -> str:
    with open_link(name, ssh_config=config_path, **options) as link:  # type: ignore[arg-type]
        return link.run("id -un").stdout.decode().strip()


@pytest.mark.parametrize("kind", ["ed25519", "rsa", "ecdsa"])
@pytest.mark.parametrize("pem", [False, True])
def test_every_usual_kind_of_key_gets_in(server: SSHServer, tmp_path: Path, kind: str, pem: bool) -> None:
    key = keygen(tmp_path / "key", kind=kind, pem=pem)
    server.authorize(key.with_suffix(".pub"))

    path = config(server, tmp_path / "c", f"IdentityFile {key}", "IdentityAgent none")

    assert who(path) == server.user


def test_several_keys_are_tried_in_turn(server: SSHServer, tmp_path: Path) -> None:
    wrong = keygen(tmp_path / "wrong")

    path = config(
        server,
        tmp_path / "c",
        f"IdentityFile {wrong}",
        f"IdentityFile {server.key_path}",
        "IdentityAgent none",
    )

    assert who(path) == server.user


def test_a_wrong_key_is_an_error_that_says_what_was_tried(server: SSHServer, tmp_path: Path) -> None:
    wrong = keygen(tmp_path / "wrong")
    path = config(server, tmp_path / "c", f"IdentityFile {wrong}", "IdentityAgent none")

    with pytest.raises(AuthenticationError) as caught:
        who(path)

    message = str(caught.value)
    assert f"'gpu-box': 127.0.0.1 port {server.port} did not let user {server.user!r} in" in message
    assert f"Tried: key {wrong}." in message
    assert "The server takes: publickey." in message
    assert f"`ssh -F {path} gpu-box`" in message
    assert "ssh-copy-id" in message


def test_a_wrong_user_is_an_error_that_names_the_user(server: SSHServer) -> None:
    with pytest.raises(AuthenticationError, match="did not let user 'nobody-here' in") as caught:
        who(server.config_path, "nobody-here@gpu-box")

    assert "'nobody-here@gpu-box'" in str(caught.value)


def test_a_key_that_does_not_exist_or_is_none_is_named(server: SSHServer, tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_text("not a key")
    path = config(
        server,
        tmp_path / "c",
        f"IdentityFile {junk}",
        f"IdentityFile {tmp_path}/missing",
        "IdentityAgent none",
    )

    with pytest.raises(AuthenticationError) as caught:
        who(path)

    assert f"key {tmp_path}/missing (which does not exist)" in str(caught.value)
    assert f"key {junk} (which cannot be used" in str(caught.value)


def test_a_passphrase_is_asked_for_in_secret_up_to_three_times(server: SSHServer, tmp_path: Path) -> None:
    key = keygen(tmp_path / "key", passphrase="open sesame")
    server.authorize(key.with_suffix(".pub"))
    path = config(server, tmp_path / "c", f"IdentityFile {key}", "IdentityAgent none")
    person = Answers("wrong", "wrong again", "open sesame")

    assert who(path, prompt=person) == server.user
    assert [secret for _, secret in person.questions] == [True] * 3
    assert all(str(key) in text for text, _ in person.questions)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (["a", "b", "c", "d"], "whose passphrase was wrong 3 times"),
        ([], "needs a passphrase that was not given"),
    ],
)
def test_a_passphrase_that_is_not_to_be_had_is_an_error(
    server: SSHServer, tmp_path: Path, answers: list[str], said: str
) -> None:
    key = keygen(tmp_path / "key", passphrase="open sesame")
    path = config(server, tmp_path / "c", f"IdentityFile {key}", "IdentityAgent none")

    with pytest.raises(AuthenticationError, match=said):
        who(path, prompt=Answers(*answers))


def test_a_passphrase_is_not_asked_for_when_another_key_gets_in(server: SSHServer, tmp_path: Path) -> None:
    locked = keygen(tmp_path / "locked", passphrase="open sesame")
    path = config(
        server,
        tmp_path / "c",
        f"IdentityFile {locked}",
        f"IdentityFile {server.key_path}",
        "IdentityAgent none",
    )
    person = Answers()

    assert who(path, prompt=person) == server.user
    assert person.questions == []


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[str]:
    """An ssh-agent of its own, without keys."""
    path = str(tmp_path / "agent")
    process = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL)
    while not os.path.exists(path):  # noqa: PTH110 - a socket
        assert process.poll() is None
    yield path
    process.kill()
    process.wait()


def add(agent: str, *keys: Path) -> None:
    for key in keys:
        subprocess.run(["ssh-add", "-q", str(key)], env={**os.environ, "SSH_AUTH_SOCK": agent}, check=True)


def test_an_agent_gets_in_without_a_file(server: SSHServer, tmp_path: Path, agent: str) -> None:
    add(agent, server.key_path)
    path = config(server, tmp_path / "c", "IdentityFile none", f"IdentityAgent {agent}")

    assert who(path) == server.user


def test_the_agent_of_the_environment_is_found(
    server: SSHServer, tmp_path: Path, agent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(agent, server.key_path)
    monkeypatch.setenv("SSH_AUTH_SOCK", agent)

    assert who(config(server, tmp_path / "c", "IdentityFile none")) == server.user


def test_an_agent_spares_the_passphrase_of_a_key_it_holds(
    server: SSHServer, tmp_path: Path, agent: str
) -> None:
    """The file is locked, the agent was given its contents."""
    key = keygen(tmp_path / "key")
    add(agent, key)
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "open sesame", "-f", key], check=True)
    server.authorize(key.with_suffix(".pub"))
    person = Answers()

    path = config(
        server, tmp_path / "c", f"IdentityFile {key}", f"IdentityAgent {agent}", "IdentitiesOnly yes"
    )

    assert who(path, prompt=person) == server.user
    assert person.questions == []


def test_identities_only_keeps_the_agents_other_keys_out(own: SSHServer, tmp_path: Path, agent: str) -> None:
    """A server that listens to two keys never hears the third."""
    own.restart("MaxAuthTries 3")
    add(agent, *(keygen(tmp_path / f"other{i}") for i in range(5)), own.key_path)
    keys = (f"IdentityFile {own.key_path}", f"IdentityAgent {agent}")

    assert who(config(own, tmp_path / "c", *keys, "IdentitiesOnly yes")) == own.user


def test_too_many_keys_of_an_agent_are_an_error_that_says_so(
    own: SSHServer, tmp_path: Path, agent: str
) -> None:
    own.restart("MaxAuthTries 3")
    add(agent, *(keygen(tmp_path / f"other{i}") for i in range(5)), own.key_path)

    with pytest.raises(AuthenticationError) as caught:
        who(config(own, tmp_path / "c", "IdentityFile none", f"IdentityAgent {agent}"))

    assert "Too many authentication failures" in str(caught.value)
    assert "The agent holds 6 keys" in str(caught.value)
    assert "IdentitiesOnly yes" in str(caught.value)


@pytest.mark.parametrize("step", ["auth_none", "auth_publickey"])
def test_a_connection_that_breaks_during_the_login_is_no_refusal(
    own: SSHServer, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    attempt = getattr(LinkTransport, step)

    def cut_off(transport: LinkTransport, *arguments: object) -> object:
        own.kill_connections()
        return attempt(transport, *arguments)

    monkeypatch.setattr(LinkTransport, step, cut_off)

    with pytest.raises(LinkLostError, match=r"'gpu-box': the connection to .* broke during the login"):
        who(own.config_path)


def test_an_agent_that_is_gone_is_passed_over(server: SSHServer, tmp_path: Path) -> None:
    path = config(server, tmp_path / "c", f"IdentityFile {server.key_path}", f"IdentityAgent {tmp_path}/no")

    assert who(path) == server.user


def test_a_password_is_asked_for_in_secret(password: SSHServer, tmp_path: Path) -> None:
    password.restart("PasswordAuthentication yes")
    person = Answers("wrong", PASSWORD)
    path = config(password, tmp_path / "c", "IdentityFile none", "IdentityAgent none")

    assert who(path, prompt=person) == password.user
    assert person.questions == [(f"{password.user}@127.0.0.1's password: ", True)] * 2


def test_three_wrong_passwords_are_an_error(password: SSHServer, tmp_path: Path) -> None:
    password.restart("PasswordAuthentication yes")
    person = Answers("a", "b", "c", PASSWORD)
    path = config(password, tmp_path / "c", "IdentityFile none", "IdentityAgent none")

    with pytest.raises(AuthenticationError, match="Tried: password, password, password"):
        who(path, prompt=person)


@pytest.mark.parametrize("way", ["nobody", "BatchMode yes", "PasswordAuthentication no"])
def test_no_password_is_asked_for_where_that_is_unwanted(
    password: SSHServer, tmp_path: Path, way: str
) -> None:
    password.restart("PasswordAuthentication yes")
    person = SilentPrompt() if way == "nobody" else Answers(PASSWORD)
    lines = [] if way == "nobody" else [way]
    path = config(password, tmp_path / "c", *lines, "IdentityFile none", "IdentityAgent none")

    with pytest.raises(AuthenticationError, match=r"Tried: nothing.*The server takes: .*password") as caught:
        who(path, prompt=person)
    assert ("Nobody could be asked for a password here" in str(caught.value)) == (way == "nobody")
    assert getattr(person, "questions", []) == []


def test_a_servers_own_questions_are_put_to_the_person(password: SSHServer, tmp_path: Path) -> None:
    """As one-time codes are asked for; here PAM asks for the password."""
    if not os.path.exists("/etc/pam.d/sshd"):  # noqa: PTH110 - asked once
        pytest.skip("PAM is not set up for sshd here")
    password.restart("UsePAM yes\nKbdInteractiveAuthentication yes\nPasswordAuthentication no")
    path = config(password, tmp_path / "c", "IdentityFile none", "IdentityAgent none")
    person = Answers(PASSWORD)

    assert who(path, prompt=person) == password.user
    assert len(person.questions) == 1
    assert "Password" in person.questions[0][0]
    assert person.questions[0][1] is True


def test_a_servers_questions_may_go_unanswered(password: SSHServer, tmp_path: Path) -> None:
    if not os.path.exists("/etc/pam.d/sshd"):  # noqa: PTH110 - asked once
        pytest.skip("PAM is not set up for sshd here")
    password.restart("UsePAM yes\nKbdInteractiveAuthentication yes\nPasswordAuthentication no")
    path = config(password, tmp_path / "c", "IdentityFile none", "IdentityAgent none")

    with pytest.raises(AuthenticationError, match="Tried: keyboard-interactive"):
        who(path, prompt=Answers(None))


def test_a_key_and_a_password_may_both_be_wanted(password: SSHServer, tmp_path: Path) -> None:
    password.authorize(password.key_path.with_suffix(".pub"))
    password.restart("PasswordAuthentication yes\nAuthenticationMethods publickey,password")
    path = config(password, tmp_path / "c", f"IdentityFile {password.key_path}", "IdentityAgent none")

    assert who(path, prompt=Answers(PASSWORD)) == password.user


def test_the_usual_keys_are_found_where_none_is_named(
    server: SSHServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    shutil.copy(server.key_path, home / ".ssh" / "id_ed25519")
    monkeypatch.setenv("HOME", str(home))

    assert who(config(server, tmp_path / "c", "IdentityAgent none")) == server.user


def test_a_second_factor_is_asked_for_after_a_key(password: SSHServer, tmp_path: Path) -> None:
    if not os.path.exists("/etc/pam.d/sshd"):  # noqa: PTH110 - asked once
        pytest.skip("PAM is not set up for sshd here")
    password.authorize(password.key_path.with_suffix(".pub"))
    interactive = "keyboard-interactive:pam"
    password.restart(
        "UsePAM yes\nKbdInteractiveAuthentication yes\nPasswordAuthentication no\n"
        f"AuthenticationMethods publickey,{interactive},{interactive}"
    )
    path = config(password, tmp_path / "c", f"IdentityFile {password.key_path}", "IdentityAgent none")
    person = Answers(PASSWORD, PASSWORD)

    assert who(path, prompt=person) == password.user
    assert [secret for _, secret in person.questions] == [True, True]


class _Questions(paramiko.ServerInterface):  # type: ignore[misc] # paramiko is untyped
    """A server that asks three things at once, one of which may be seen."""

    def __init__(self) -> None:
        self.answers: list[str] = []

    def get_allowed_auths(self, _user: str) -> str:
        return "keyboard-interactive"

    def check_auth_interactive(self, _user: str, _kinds: str) -> paramiko.InteractiveQuery:
        return paramiko.InteractiveQuery(
            "Two factors", "Look at your token.", ("Name: ", True), ("PIN: ", False), ("Code: ", False)
        )

    def check_auth_interactive_response(self, responses: list[str]) -> int:
        self.answers = list(responses)
        good = self.answers == ["ada", "1234", "567890"]
        return int(paramiko.AUTH_SUCCESSFUL if good else paramiko.AUTH_FAILED)


def test_several_questions_at_once_are_put_one_by_one(tmp_path: Path) -> None:
    """As servers with a PIN and a one-time code ask; sshd has no module here that does."""
    key = paramiko.ECDSAKey.generate()
    asking = _Questions()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def serve() -> None:
            transport = paramiko.Transport(listener.accept()[0])
            transport.add_server_key(key)
            transport.start_server(server=asking)

        serving = threading.Thread(target=serve)
        serving.start()
        (tmp_path / "known").write_text(f"[127.0.0.1]:{port} {key.get_name()} {key.get_base64()}\n")
        (tmp_path / "c").write_text(
            f"Host box\n  HostName 127.0.0.1\n  Port {port}\n  UserKnownHostsFile {tmp_path}/known\n"
            "  IdentityFile none\n  IdentityAgent none\n"
        )
        person = Answers("ada", "1234", "567890")

        open_link("box", ssh_config=tmp_path / "c", prompt=person).close()
        serving.join()

    assert [secret for _, secret in person.questions] == [False, True, True]
    assert person.questions[0][0] == "Two factors\nLook at your token.\nName: "
    assert asking.answers == ["ada", "1234", "567890"]


# -- certificates and keys that stay unlocked -----------------------------------------------------------


@pytest.fixture(scope="module")
def authority(server: SSHServer) -> Path:
    """A key whose certificates the server trusts."""
    path = keygen(server.folder / "authority")
    shutil.copy(path.with_suffix(".pub"), server.public / "authority.pub")
    server.restart(f"TrustedUserCAKeys {server.public}/authority.pub")
    return path


def certified(server: SSHServer, authority: Path, path: Path, kind: str) -> Path:
    """Make a key whose only way in is the certificate beside it."""
    key = keygen(path, kind=kind)
    words = ["ssh-keygen", "-q", "-s", authority, "-I", "me", "-n", server.user, key.with_suffix(".pub")]
    subprocess.run(words, check=True, capture_output=True)
    return key


@pytest.mark.parametrize(
    ("kind", "way"), [("ed25519", "beside"), ("ecdsa", "named"), ("rsa", "agent"), ("ed25519", "agent")]
)
def test_a_certificate_gets_in(
    server: SSHServer, authority: Path, tmp_path: Path, agent: str, *, kind: str, way: str
) -> None:
    key = certified(server, authority, tmp_path / "key", kind)
    certificate = tmp_path / "key-cert.pub"
    lines = [f"IdentityFile {key}", "IdentityAgent none"]
    if way == "named":
        certificate = certificate.rename(tmp_path / "elsewhere.pub")
        lines = [f"CertificateFile {tmp_path}/none.pub", f"CertificateFile {certificate}", *lines]
    if way == "agent":
        add(agent, key)
        lines = ["IdentityFile none", f"IdentityAgent {agent}"]

    assert who(config(server, tmp_path / "c", *lines)) == server.user


def test_a_certificate_that_the_server_does_not_trust_leaves_the_key_itself(
    own: SSHServer, tmp_path: Path
) -> None:
    authority = keygen(tmp_path / "authority")
    key = certified(own, authority, tmp_path / "key", "ed25519")
    own.authorize(key.with_suffix(".pub"))

    assert who(config(own, tmp_path / "c", f"IdentityFile {key}", "IdentityAgent none")) == own.user


def test_a_certificate_that_is_none_is_named(server: SSHServer, tmp_path: Path) -> None:
    (tmp_path / "junk.pub").write_text("junk")
    wrong = keygen(tmp_path / "wrong")
    path = config(
        server,
        tmp_path / "c",
        f"CertificateFile {tmp_path}/junk.pub",
        f"IdentityFile {wrong}",
        "IdentityAgent none",
    )

    with pytest.raises(AuthenticationError, match=rf"certificate {tmp_path}/junk.pub \(which cannot be used"):
        who(path)


def test_a_key_stays_unlocked_for_connections_that_nobody_attends(server: SSHServer, tmp_path: Path) -> None:
    key = keygen(tmp_path / "key", passphrase="open sesame")
    server.authorize(key.with_suffix(".pub"))
    path = config(server, tmp_path / "c", f"IdentityFile {key}", "IdentityAgent none")
    assert who(path, prompt=Answers("open sesame")) == server.user

    with unattended():
        assert who(path) == server.user

    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "open sesame", "-N", "another", "-f", key], check=True)
    with pytest.raises(AuthenticationError, match="needs a passphrase that was not given"):
        who(path, prompt=SilentPrompt())  # another file is another key
