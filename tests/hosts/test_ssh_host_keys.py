"""Knowing a machine again, against real servers and files that ssh-keygen wrote."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fal_agent.errors import HostKeyError
from fal_notebook.hosts.host_keys import check_host_key, fingerprint, known_keys, lookup_name, remember
from fal_notebook.hosts.paramiko_link import open_link
from fal_notebook.hosts.ssh_certificates import key_within
from fal_notebook.hosts.ssh_config import resolve
from tests.support.prompts import Answers
from tests.support.sshd import SSHServer, start_sshd

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOB = bytes(range(51))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SSHServer]:
    with start_sshd(tmp_path / "sshd") as running:
        yield running


def asking(server: SSHServer, answer: str = "ask") -> Path:
    """A configuration in which new keys may be accepted."""
    text = server.host_block.replace("StrictHostKeyChecking yes", f"StrictHostKeyChecking {answer}")
    server.config_path.write_text(text.replace("BatchMode yes", "BatchMode no"))
    return server.config_path


def shown(server: SSHServer) -> str:
    """The fingerprint of the server's key as ssh-keygen shows it."""
    words = ["ssh-keygen", "-l", "-f", str(server.folder / "hostkey.pub")]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[1]


def test_a_new_key_is_shown_and_once_accepted_remembered(server: SSHServer) -> None:
    server.known_hosts.unlink()
    person = Answers(accept=True)
    path = asking(server)

    open_link("gpu-box", ssh_config=path, prompt=person).close()
    open_link("gpu-box", ssh_config=path, prompt=Answers()).close()

    assert len(person.confirmations) == 1
    assert shown(server) in person.confirmations[0]
    assert "'gpu-box'" in person.confirmations[0]
    assert server.known_hosts.read_text() == f"[127.0.0.1]:{server.port} {server.host_key}\n"
    done = subprocess.run(["ssh", "-F", path, "gpu-box", "true"], check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, "ssh does not read what was written"


@pytest.mark.parametrize(
    ("strictness", "to_type"),
    [("ask", "`ssh -F {path} gpu-box` once"), ("yes", "`ssh-keyscan -p {port} 127.0.0.1`")],
)
def test_a_new_key_that_nobody_accepts_is_refused_with_what_to_type(
    server: SSHServer, strictness: str, to_type: str
) -> None:
    server.known_hosts.unlink()
    path = asking(server, strictness)

    with pytest.raises(HostKeyError) as caught:
        open_link("gpu-box", ssh_config=path, prompt=Answers())

    assert shown(server) in str(caught.value)
    assert to_type.format(path=path, port=server.port) in str(caught.value)
    assert not server.known_hosts.exists()


@pytest.mark.parametrize("strictness", ["accept-new", "no"])
def test_a_setting_may_accept_new_keys_unseen(server: SSHServer, strictness: str) -> None:
    server.known_hosts.unlink()
    person = Answers()

    open_link("gpu-box", ssh_config=asking(server, strictness), prompt=person).close()

    assert person.confirmations == []
    assert server.host_key in server.known_hosts.read_text()


@pytest.mark.parametrize("strictness", ["ask", "yes", "no", "accept-new"])
def test_a_changed_key_is_refused_whatever_the_settings(server: SSHServer, strictness: str) -> None:
    old = shown(server)
    server.known_hosts.write_text(f"# first line\n{server.known_hosts.read_text()}")
    server.new_host_key()
    server.restart()
    before = server.known_hosts.read_text()
    person = Answers(accept=True)

    with pytest.raises(HostKeyError) as caught:
        open_link("gpu-box", ssh_config=asking(server, strictness), prompt=person)

    message = str(caught.value)
    assert old in message
    assert shown(server) in message
    assert f"{server.known_hosts}:2" in message
    assert person.confirmations == []
    assert server.known_hosts.read_text() == before
    command = next(line for line in message.splitlines() if "ssh-keygen" in line)
    subprocess.run(["/bin/sh", "-c", command], check=True, capture_output=True)
    open_link("gpu-box", ssh_config=asking(server), prompt=Answers(accept=True)).close()


def test_the_known_kind_of_key_is_asked_for_first(server: SSHServer) -> None:
    """A server has several keys; meeting another than the known one would look like a change."""
    for kind in ("rsa", "ecdsa"):
        subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", server.folder / kind], check=True)
    server.restart(f"HostKey {server.folder}/rsa\nHostKey {server.folder}/ecdsa")
    for kind in ("rsa", "ecdsa"):
        key = " ".join((server.folder / f"{kind}.pub").read_text().split()[:2])
        server.known_hosts.write_text(f"[127.0.0.1]:{server.port} {key}\n")

        open_link("gpu-box", ssh_config=server.config_path).close()


def test_a_key_of_another_kind_is_new_and_the_known_one_is_named(server: SSHServer) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", server.folder / "rsa"], check=True)
    key = " ".join((server.folder / "rsa.pub").read_text().split()[:2])
    server.known_hosts.write_text(f"[127.0.0.1]:{server.port} {key}\n")

    with pytest.raises(HostKeyError, match=f"{server.known_hosts}:1 knows it by another key, ssh-rsa"):
        open_link("gpu-box", ssh_config=server.config_path)


def test_hashed_names_are_recognized_and_written(server: SSHServer) -> None:
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", server.known_hosts], check=True, capture_output=True)
    assert "127.0.0.1" not in server.known_hosts.read_text()
    open_link("gpu-box", ssh_config=server.config_path).close()

    server.known_hosts.unlink()
    path = asking(server)
    path.write_text(path.read_text() + "  HashKnownHosts yes\n")
    open_link("gpu-box", ssh_config=path, prompt=Answers(accept=True)).close()

    assert server.known_hosts.read_text().startswith("|1|")
    words = ["ssh-keygen", "-F", f"[127.0.0.1]:{server.port}", "-f", str(server.known_hosts)]
    assert subprocess.run(words, check=False, capture_output=True).returncode == 0


def test_an_alias_for_the_key_is_honoured(server: SSHServer) -> None:
    server.known_hosts.write_text(f"the-box {server.host_key}\n")
    path = server.config_path
    path.write_text(path.read_text() + "  HostKeyAlias the-box\n")

    open_link("gpu-box", ssh_config=path).close()


def test_a_revoked_key_is_refused(server: SSHServer) -> None:
    server.known_hosts.write_text(f"{server.known_hosts.read_text()}@revoked * {server.host_key}\n")

    with pytest.raises(HostKeyError, match=f"{server.known_hosts}:2 revokes"):
        open_link("gpu-box", ssh_config=server.config_path)


@pytest.mark.parametrize(
    ("patterns", "name", "speaks"),
    [
        ("box", "box", True),
        ("box,other", "other", True),
        ("BOX", "box", True),
        ("*.lab", "a.lab", True),
        ("*.lab,!b.lab", "b.lab", False),
        ("b?x", "box", True),
        ("b?x", "boox", False),
        ("[box]:2222", "[box]:2222", True),
        ("[box]:2222", "box", False),
        ("box", "[box]:2222", False),
        ("[b-d]ox", "cox", False),
        ("|1|broken", "box", False),
    ],
)
def test_the_names_of_a_line_are_matched_as_ssh_does(
    tmp_path: Path, patterns: str, name: str, speaks: bool
) -> None:
    file = tmp_path / "known_hosts"
    file.write_text(f"{patterns} ssh-ed25519 AAAA comment words\n")

    assert bool(known_keys([file], name)) is speaks


def test_lines_that_are_no_keys_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "known_hosts"
    file.write_bytes(b"\n# box ssh-rsa AAAA\nbox\nbox ssh-rsa !!!\n\xff\xfe\nbox ssh-ed25519 AAAA\n")

    assert [(k.line, k.key_type) for k in known_keys([file, tmp_path / "none"], "box")] == [
        (6, "ssh-ed25519")
    ]


def test_a_file_without_a_last_newline_is_extended_by_a_line_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "new" / "known_hosts"
    remember(file, "a", "ssh-ed25519", BLOB)
    file.write_text(file.read_text().rstrip("\n"))

    remember(file, "b", "ssh-ed25519", BLOB)

    assert [len(known_keys([file], name)) for name in "ab"] == [1, 1]
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_a_fingerprint_is_the_one_ssh_keygen_shows(tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "k"], check=True)
    words = ["ssh-keygen", "-l", "-f", str(tmp_path / "k.pub")]
    expected = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[1]
    (tmp_path / "known_hosts").write_text("x " + Path(tmp_path / "k.pub").read_text())

    assert fingerprint(known_keys([tmp_path / "known_hosts"], "x")[0].blob) == expected


def test_a_port_is_part_of_a_name_unless_it_is_the_usual_one() -> None:
    assert (lookup_name("Box", 22), lookup_name("::1", 2222)) == ("box", "[::1]:2222")


# -- certificates of hosts ----------------------------------------------------------------------------


@pytest.fixture
def authority(server: SSHServer) -> Path:
    """The key of an authority that known_hosts trusts for the server, instead of the server's own."""
    path = server.folder / "authority"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    key = " ".join(path.with_suffix(".pub").read_text().split()[:2])
    server.known_hosts.write_text(f"@cert-authority 127.0.0.* {key}\n")
    return path


def certify(server: SSHServer, authority: Path, *options: str, kind: str = "ed25519") -> None:
    """Give the server a host key of `kind` that the authority signed, and nothing else."""
    server.new_host_key(kind)
    words = [
        "ssh-keygen",
        "-q",
        "-s",
        str(authority),
        "-I",
        "it",
        *options,
        str(server.folder / "hostkey.pub"),
    ]
    subprocess.run(words, check=True, capture_output=True)
    server.restart(f"HostCertificate {server.folder}/hostkey-cert.pub")


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
def test_a_machine_is_known_by_the_certificate_of_an_authority(
    server: SSHServer, authority: Path, kind: str
) -> None:
    certify(server, authority, "-h", "-n", "127.0.0.1", kind=kind)
    before = server.known_hosts.read_text()

    open_link("gpu-box", ssh_config=server.config_path).close()

    assert server.known_hosts.read_text() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-h", "-n", "other-box"), r"it is for other-box, not for 127\.0\.0\.1"),
        (("-h", "-V", "20200101:20200201"), "it expired on 2020-02-0"),
        (("-h", "-V", "20900101:20910101"), "it is valid from 2090-01-01"),
        ((), "it is a certificate for users"),
    ],
)
def test_a_certificate_that_does_not_hold_is_refused_with_the_reason(
    server: SSHServer, authority: Path, options: tuple[str, ...], said: str
) -> None:
    """sshd would not load all of these, so what it showed is checked as if it had."""
    server.new_host_key()
    public = server.folder / "hostkey.pub"
    words = ["ssh-keygen", "-q", "-s", str(authority), "-I", "it", *options, str(public)]
    subprocess.run(words, check=True, capture_output=True)
    certificate = base64.b64decode((server.folder / "hostkey-cert.pub").read_text().split()[1])
    target = resolve("gpu-box", [server.config_path])
    known = known_keys(target.known_hosts, *target.key_names)
    key_type, blob = key_within(certificate)

    assert base64.b64encode(blob).decode() == public.read_text().split()[1]
    with pytest.raises(HostKeyError, match=f"the authority in {server.known_hosts}:1, but {said}"):
        check_host_key(target, key_type, blob, known, Answers(accept=True), certificate=certificate)


def test_a_certificate_of_an_unknown_authority_makes_nobody_known(server: SSHServer, authority: Path) -> None:
    stranger = server.folder / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", stranger], check=True)
    certify(server, stranger, "-h", "-n", "127.0.0.1")

    with pytest.raises(
        HostKeyError, match="knows it by a certificate authority, which did not sign this key"
    ):
        open_link("gpu-box", ssh_config=server.config_path)


def test_a_revoked_authority_vouches_for_nobody(server: SSHServer, authority: Path) -> None:
    key = " ".join(authority.with_suffix(".pub").read_text().split()[:2])
    server.known_hosts.write_text(f"{server.known_hosts.read_text()}@revoked * {key}\n")
    certify(server, authority, "-h", "-n", "127.0.0.1")

    with pytest.raises(HostKeyError):
        open_link("gpu-box", ssh_config=server.config_path)


def test_a_line_without_a_port_makes_every_port_known(server: SSHServer) -> None:
    """As `ssh` has it; another key there is a new one, not a changed one."""
    server.known_hosts.write_text(f"127.0.0.1 {server.host_key}\n")
    open_link("gpu-box", ssh_config=server.config_path).close()

    server.new_host_key()
    server.restart()
    person = Answers(accept=True)
    open_link("gpu-box", ssh_config=asking(server), prompt=person).close()

    assert len(person.confirmations) == 1
