"""What is read from SSH configurations; where `ssh -G` can say the same, it is asked."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from fal_agent.errors import ConfigurationError
from fal_notebook.hosts.ssh_config import Target, resolve
from fal_notebook.hosts.ssh_config_files import config_files

if TYPE_CHECKING:
    from pathlib import Path


def read(tmp_path: Path, text: str, name: str = "box") -> Target:
    path = tmp_path / "config"
    path.write_text(text)
    return resolve(name, [path])


def ssh_says(path: Path, name: str, option: str) -> list[str]:
    """Ask OpenSSH what it makes of a configuration."""
    done = subprocess.run(["ssh", "-G", "-F", str(path), name], capture_output=True, text=True, check=True)
    pairs = (line.split(" ", 1) for line in done.stdout.splitlines())
    return [rest[0] if rest else "" for key, *rest in pairs if key == option]


@pytest.mark.parametrize(
    ("name", "user", "host", "port"),
    [
        ("box", None, "box", 22),
        ("me@box", "me", "box", 22),
        ("me@box:2222", "me", "box", 2222),
        ("box:2222", None, "box", 2222),
        ("ssh://me@box:2222", "me", "box", 2222),
        ("me@corp.com@box", "me@corp.com", "box", 22),
        ("::1", None, "::1", 22),
        ("[::1]:2222", None, "::1", 2222),
        ("me@[fe80::1]:22", "me", "fe80::1", 22),
        (" box ", None, "box", 22),
    ],
)
def test_a_name_may_hold_user_and_port(
    tmp_path: Path, name: str, user: str | None, host: str, port: int
) -> None:
    target = read(tmp_path, "Host *\n  User from-config\n", name)

    assert (target.user, target.hostname, target.port) == (user or "from-config", host, port)


@pytest.mark.parametrize("name", ["", "  ", "me@", "a b", "box:port", "-oProxyCommand=id"])
def test_what_is_no_name_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="is no machine's name"):
        read(tmp_path, "", name)


def test_what_the_name_says_goes_before_what_the_configuration_says(tmp_path: Path) -> None:
    target = read(tmp_path, "Host box\n  User a\n  Port 1\n  HostName h\n", "b@box:2")

    assert (target.user, target.port, target.hostname) == ("b", 2, "h")


CONFIGURATIONS = {
    "first value wins": "Host box\n  Port 1\nHost *\n  Port 2\n  User u\n",
    "patterns and negation": "Host b* !box\n  Port 1\nHost b?x\n  Port 3\n",
    "equals signs and quotes": 'Host=box\n  Port=5\n  User = "me"\n',
    "tokens in the host name": "Host box\n  HostName %h.example.org\n",
    "match host": "Host box\n  HostName real\nMatch host real\n  Port 7\nMatch originalhost box\n  User o\n",
    "match user": "Match user someone\n  Port 7\nHost *\n  Port 8\n",
    "match all": "Match all\n  Port 9\n",
    "match exec": "Match exec true\n  Port 9\nMatch exec false\n  User never\nHost *\n  User always\n",
    "match not exec": 'Match !exec "test %n = box"\n  Port 9\nMatch exec "test %n = box"\n  Port 10\n',
    "case of keywords": "hOST box\n  pORT 11\n  uSER x\n",
    "match host before the name is set": "Match host real\n  Port 7\nHost box\n  HostName real\n",
    "match host after a name with a token": "HostName %h.lab\nMatch host box.lab\n  Port 7\n",
    "match host in capitals": "Match host BOX\n  Port 7\nMatch !host Box\n  User never\n",
    "host in capitals": "Host BOX\n  Port 7\n",
    "match final all": "Match final all\n  Port 7\n",
    "match final host": "HostName real\nMatch final host real\n  Port 7\nMatch host real\n  User u\n",
    "single quotes": "User 'me too'\nHostName 'real'\n",
    "comment behind": 'User "me" # not you\nPort 7 # seven\n',
    "indented and spaced": "\n\n   Host    box   other \n\t\tPort 12\n",
}


@pytest.mark.parametrize("text", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_sections_apply_as_they_do_for_ssh(tmp_path: Path, text: str) -> None:
    target = read(tmp_path, text)
    path = tmp_path / "config"

    assert [str(target.port)] == ssh_says(path, "box", "port")
    assert [target.hostname] == ssh_says(path, "box", "hostname")
    assert [target.user] == ssh_says(path, "box", "user")


FILES = {
    "several places": (
        "Host box\n  IdentityFile /a\n  CertificateFile /c\nHost *\n  IdentityFile /b\n  CertificateFile /d\n"
    ),
    "one twice": "IdentityFile /a\nIdentityFile /a\nCertificateFile /c\nCertificateFile /c\n",
    "tokens and a name with one": (
        "IdentityFile /k/%h\nCertificateFile /c/%h/%n/%p/%r\nHostName %h.lab\nUser u\n"
    ),
    "odd names": "IdentityFile '/k/a b'\nCertificateFile \"/c/a~b\"\n",
}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES.keys())
def test_keys_and_certificates_are_those_of_ssh(tmp_path: Path, text: str) -> None:
    target = read(tmp_path, text)
    tokens = {"%h": target.hostname, "%n": "box", "%p": str(target.port), "%r": target.user}

    for option, found in (
        ("identityfile", target.identity_files),
        ("certificatefile", target.certificate_files),
    ):
        expected = ssh_says(tmp_path / "config", "box", option)
        for token, value in tokens.items():
            expected = [word.replace(token, value) for word in expected]
        assert [str(path) for path in found] == expected


INCLUDES = {
    "at the top": ("Include {folder}/*.conf\nHost *\n  User late\n", "Host box\n  Port 21\n"),
    "a section after it stays its own": ("Include {folder}/a.conf\nPort 23\n", "Host other\n  Port 22\n"),
    "within a section that applies": ("Host box\n  Include {folder}/a.conf\n  User u\n", "Port 24\n"),
    "within one that does not": ("Host other\n  Include {folder}/a.conf\nHost *\n  User u\n", "Port 25\n"),
    "sections within a section": (
        "Host other\n  Include {folder}/a.conf\nHost *\n  User u\n",
        "Host box\n  Port 26\n",
    ),
    "the section goes on after it": (
        "Host box\n  Include {folder}/a.conf\n  Port 28\n",
        "Host no\n  Port 27\n",
    ),
    "within a match": ("Match host b*\n  Include {folder}/a.conf\n", "Match originalhost box\n  Port 29\n"),
    "nothing there": ("Include {folder}/none*\nPort 30\n", ""),
}


@pytest.mark.parametrize(("text", "included"), INCLUDES.values(), ids=INCLUDES.keys())
def test_included_files_apply_as_they_do_for_ssh(tmp_path: Path, text: str, included: str) -> None:
    (tmp_path / "a.conf").write_text(included)

    target = read(tmp_path, text.format(folder=tmp_path))

    assert [str(target.port)] == ssh_says(tmp_path / "config", "box", "port")
    assert [target.user] == ssh_says(tmp_path / "config", "box", "user")


def test_relative_includes_are_sought_in_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh" / "conf.d").mkdir(parents=True)
    (tmp_path / ".ssh" / "conf.d" / "a").write_text("Host box\n  Port 31\n")

    assert read(tmp_path, "Include conf.d/*\nInclude ~/.ssh/conf.d/b\n").port == 31


def test_a_file_that_includes_itself_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="includes itself"):
        read(tmp_path, f"Include {tmp_path}/config\n")


def test_a_condition_that_is_not_understood_does_not_apply(tmp_path: Path) -> None:
    assert read(tmp_path, "Match localnetwork 10.0.0.0/8\n  Port 1\nMatch tagged x\n  Port 2\n").port == 22


@pytest.mark.parametrize("text", ["Port\n", "Host box\n  Port many\n", "Host 'box\n"])
def test_a_configuration_that_cannot_be_understood_is_an_error_naming_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{tmp_path}/config"):
        read(tmp_path, text)


def test_a_key_whose_name_is_too_long_is_not_there(tmp_path: Path) -> None:
    name = "k" * 300

    assert read(tmp_path, f"Host *\n  IdentityFile {tmp_path}/keys/{name}\n").identity_files == (
        tmp_path / "keys" / name,
    )


@pytest.mark.parametrize("option", ["IdentityFile", "CertificateFile", "UserKnownHostsFile", "Include"])
def test_a_path_in_the_home_of_nobody_is_an_error_that_shows_it(tmp_path: Path, option: str) -> None:
    """As where the slash was forgotten."""
    with pytest.raises(ConfigurationError, match=r"'~\.ssh/box': this machine has no user '\.ssh'.*'~/'"):
        read(tmp_path, f"Host *\n  {option} ~.ssh/box\n")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('HostName "', "No closing quotation"),
        ("User 'me", "No closing quotation"),
        ('HostName ""', "it lacks a value"),
        ("User # me", "it lacks a value"),
    ],
)
def test_what_ssh_refuses_is_refused_with_its_line(tmp_path: Path, line: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=f"'box': .*{re.escape(line)}.*{problem}"):
        read(tmp_path, f"Host box\n  {line}\n")


def test_the_first_of_jump_host_and_proxy_command_wins(tmp_path: Path) -> None:
    first = read(tmp_path, "Host *\n  ProxyJump a,me@b:2\n  ProxyCommand nc %h %p\n")
    second = read(tmp_path, "Host *\n  ProxyCommand nc %h %p # 100%%\n  ProxyJump a\n")
    after_none = read(tmp_path, "Host box\n  ProxyJump none\nHost *\n  ProxyCommand nc %h %p\n")
    token = read(tmp_path, "ProxyCommand nc %h %p\nHostName %h.lab\n")
    neither = read(tmp_path, "Host box\n  ProxyCommand none\nHost *\n  ProxyJump a\n")
    none = read(tmp_path, "Host box\n  ProxyJump none\nHost *\n  ProxyJump a\n")
    empty = read(tmp_path, 'Host box\n  ProxyJump ""\nHost *\n  ProxyJump a\n')

    assert (first.jumps, first.proxy_command) == (("a", "me@b:2"), None)
    assert (second.jumps, second.proxy_command) == ((), "nc box 22 # 100%")
    assert (after_none.jumps, after_none.proxy_command) == ((), "nc box 22")
    assert token.proxy_command == "nc box.lab 22"
    assert (neither.jumps, neither.proxy_command) == ((), None)
    assert (none.jumps, none.proxy_command) == (empty.jumps, empty.proxy_command) == ((), None)


def test_files_are_found_with_tokens_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    target = read(
        tmp_path,
        "Host *\n  IdentityFile ~/keys/%h\n  IdentityFile %d/other\n  UserKnownHostsFile ~/a %d/%n\n"
        "  GlobalKnownHostsFile none\n",
    )

    assert target.identity_files == (tmp_path / "keys/box", tmp_path / "other")
    assert target.known_hosts == target.user_known_hosts == (tmp_path / "a", tmp_path / "box")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "/from/environment"),
        ("IdentityAgent SSH_AUTH_SOCK", "/from/environment"),
        ("IdentityAgent none", None),
        ("IdentityAgent $OTHER", "/other"),
        ("IdentityAgent /a/%n.sock", "/a/box.sock"),
    ],
)
def test_the_agent_is_the_one_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: str | None
) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", "/from/environment")
    monkeypatch.setenv("OTHER", "/other")

    assert read(tmp_path, f"Host *\n  {line}\n").agent_socket == expected


def test_the_users_and_then_the_systems_file_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FAL_SSH_CONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text("Host box\n  Port 40\n")

    files = config_files()

    assert files[0] == tmp_path / ".ssh" / "config"
    assert [str(f) for f in files[1:]] in ([], ["/etc/ssh/ssh_config"])
    assert resolve("box", files).ssh_command == "ssh box"


def test_what_to_type_names_the_file_and_the_port(tmp_path: Path) -> None:
    assert read(tmp_path, "", "me@box:2222").ssh_command == f"ssh -F {tmp_path}/config -p 2222 me@box"
