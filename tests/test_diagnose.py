"""The doctor: what it finds on real machines, and that each failure comes with what to type."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest
from support.sshd import start_sshd

from fal_agent.errors import (
    AuthenticationError,
    ConfigurationError,
    FalServerlessError,
    HostKeyError,
    HostUnreachableError,
    LinkLostError,
)
from fal_notebook.config import config_folder, remember_host
from fal_notebook.diagnose import Check, Examination, as_json, diagnose, examine, machine, size_text, way
from fal_notebook.hosts.base import CompletedCommand
from fal_notebook.hosts.ssh_config import resolve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.sshd import SSHServer


@pytest.fixture(autouse=True)
def no_settings() -> Iterator[None]:
    shutil.rmtree(config_folder(), ignore_errors=True)
    yield
    shutil.rmtree(config_folder(), ignore_errors=True)


def until_agent(host_name: str) -> dict[str, Check]:
    """The checks before the agent is started, which others test."""
    found = {}
    for check in examine(host_name, timeout=20):
        found[check.name] = check
        if check.name == "uv":
            break
    return found


def the_failure(checks: list[Check]) -> Check:
    """The last check, which is the only one that failed; and it has a remedy."""
    *before, last = checks
    assert all(check.ok for check in before)
    assert not last.ok
    assert last.fix
    return last


# ---------------------------------------------------------------- this machine


def test_this_machine_can_run_calls() -> None:
    checks = diagnose("local", timeout=60)

    assert [check.name for check in checks if not check.ok] == []
    names = ["folder", "disk", "Python", "uv", "index", "GPU driver", "agent", "GPUs"]
    assert [check.name for check in checks] == names
    assert "cores" in checks[6].detail


def test_the_inline_host_needs_nothing() -> None:
    [check] = diagnose("inline")

    assert check.ok


def test_a_name_that_no_host_can_have_is_the_first_failure() -> None:
    check = the_failure(diagnose("-oProxyCommand=x"))

    assert check.name == "settings"


def test_a_mistake_in_the_settings_names_the_file_to_edit() -> None:
    config_folder().mkdir(parents=True, exist_ok=True)
    (config_folder() / "hosts.toml").write_text("[hosts.a]\nlables = []\n")

    check = the_failure(diagnose("a"))

    assert "did you mean 'labels'" in check.detail
    assert check.fix == f"edit {config_folder() / 'hosts.toml'}"


def test_a_full_disk_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By asking for more room than any disk has."""
    monkeypatch.setattr(machine, "LEAST_DISK", 1 << 80)

    checks = diagnose("local")

    assert [check.name for check in checks if not check.ok] == ["disk"]
    assert checks[-1].name != "agent"
    assert next(check.fix for check in checks if not check.ok).startswith("du -xh ")


def test_a_folder_that_cannot_be_made_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file stands in the folder's way, which stops root as well."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FAL_NOTEBOOK_HOME", str(tmp_path / "file" / "root"))

    checks = diagnose("local")

    assert [check.name for check in checks if not check.ok] == ["folder"]
    assert str(tmp_path / "file") in checks[0].detail


# ---------------------------------------------------------------- what the probe finds


@pytest.mark.parametrize(
    ("facts", "ok", "words"),
    [
        ({"python": "/usr/bin/python3", "version": "3.11.2"}, True, "3.11.2 at /usr/bin/python3"),
        ({"python": "", "old": "Python 3.6.8"}, False, "(there is Python 3.6.8)"),
        ({"python": "", "old": "sh: python3: not found"}, False, "no Python 3.9 or newer with sqlite3"),
        (
            {"python": "", "system": "Linux aarch64"},
            True,
            "will be downloaded or brought along (Linux aarch64)",
        ),
        ({"python": "", "system": "Linux riscv64"}, False, "no Python 3.9 or newer with sqlite3"),
    ],
)
def test_a_python_is_needed(facts: dict[str, str], ok: bool, words: str) -> None:
    check = machine._python("gpu-box", facts)

    assert (check.ok, bool(check.fix)) == (ok, not ok)
    assert words in check.detail


@pytest.mark.parametrize(
    ("facts", "ok", "words"),
    [
        (
            {"uv": "/usr/bin/uv", "uv_version": "uv 0.9.0", "system": "Linux x86_64"},
            True,
            "uv 0.9.0 at /usr/bin/uv",
        ),
        ({"uv": "", "system": "Linux x86_64"}, True, "will be brought along"),
        ({"uv": "", "system": "FreeBSD amd64"}, False, "none can be brought to FreeBSD amd64"),
    ],
)
def test_uv_is_needed_or_can_be_brought(facts: dict[str, str], ok: bool, words: str) -> None:
    check = machine._uv(facts)

    assert (check.ok, bool(check.fix)) == (ok, not ok)
    assert words in check.detail


def test_the_probe_passes_over_a_python_that_is_too_old(tmp_path: Path) -> None:
    """The script itself, with a `python3` in front that says no to everything."""
    for name in ("python3", "uv"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    script = machine._PROBE.format(root="'~/nowhere'", python=str(tmp_path / "python3"), uv="")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}

    done = subprocess.run(
        ["sh"], input=script, env=environment, capture_output=True, text=True, timeout=60, check=False
    )

    facts = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    assert not facts["python"].startswith(str(tmp_path))
    assert facts["place"] == str(tmp_path)
    assert facts["uv"] == ""


@pytest.mark.parametrize("line", ["", "df: not found", "a b c"])
def test_a_disk_that_tells_nothing_is_no_failure(line: str) -> None:
    assert machine._disk({"disk": line, "place": "/x"}, "").ok


# ---------------------------------------------------------------- the way there


@pytest.mark.parametrize(
    ("error", "step"),
    [
        (HostKeyError("not known"), "host key"),
        (AuthenticationError("refused"), "login"),
        (ConfigurationError("bad ProxyJump"), "configuration"),
        (HostUnreachableError("refused"), "connection"),
        (LinkLostError("broke during the login"), "connection"),
        (FalServerlessError("something else"), "shell"),
    ],
)
def test_every_error_of_a_connection_has_its_step_and_remedy(error: FalServerlessError, step: str) -> None:
    *_, check = way._refused(resolve("gpu$box", []), error)

    assert (check.name, check.ok) == (step, False)
    assert "'gpu$box'" in check.fix  # quoted for the shell


def test_a_key_that_does_not_exist_is_to_be_made_first(tmp_path: Path) -> None:
    (tmp_path / "c").write_text(f"IdentityFile {tmp_path}/key\n")

    *_, check = way._refused(resolve("box", [tmp_path / "c"]), AuthenticationError("refused"))

    assert check.fix.startswith(
        f"ssh-keygen -t ed25519 -f {tmp_path}/key && ssh-copy-id -i {tmp_path}/key.pub"
    )


def test_a_name_that_cannot_be_looked_up_is_told_from_a_closed_port(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text("")
    monkeypatch.setenv("FAL_SSH_CONFIG", str(tmp_path / "config"))

    assert the_failure(diagnose("no-such-host.invalid")).name == "name"
    assert the_failure(diagnose("nobody@127.0.0.1:1")).name == "port"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SSHServer]:
    with start_sshd(tmp_path_factory.mktemp("sshd"), name="doctor-box") as running:
        yield running


@pytest.fixture
def box(server: SSHServer, monkeypatch: pytest.MonkeyPatch) -> SSHServer:
    monkeypatch.setenv("FAL_SSH_CONFIG", str(server.config_path))
    return server


def test_a_machine_over_ssh_is_looked_at_step_by_step(box: SSHServer) -> None:
    checks = until_agent(box.name)

    assert [name for name, check in checks.items() if not check.ok] == []
    steps = ["configuration", "name", "port", "host key", "login", "shell", "folder", "disk", "Python", "uv"]
    assert list(checks) == steps
    assert checks["shell"].detail == "starts without printing anything"


def test_a_machine_over_ssh_can_run_calls(box: SSHServer) -> None:
    checks = diagnose(box.name, timeout=60)

    assert [check.detail for check in checks if not check.ok] == []
    assert [check.name for check in checks[-3:]] == ["agent", "GPUs", "forwarding"]
    assert checks[-1].fix == ""


def test_a_shell_that_prints_at_its_start_is_a_note(box: SSHServer) -> None:
    start_up = box.home / ".bashrc"
    before = start_up.read_text() if start_up.exists() else ""
    start_up.write_text("echo welcome, $USER\n")
    try:
        check = until_agent(box.name)["shell"]
    finally:
        start_up.write_text(before)

    assert check.ok
    assert "welcome" in check.detail
    assert check.fix


def test_a_folder_of_another_user_is_found(box: SSHServer) -> None:
    remember_host(box.name, root="/root/of-somebody-else")

    check = until_agent(box.name)["folder"]

    assert not check.ok
    assert "is not writable" in check.detail


def test_an_unknown_host_key_is_the_failure(
    box: SSHServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "config"
    other.write_text(box.config_path.read_text().replace(str(box.known_hosts), str(tmp_path / "empty")))
    monkeypatch.setenv("FAL_SSH_CONFIG", str(other))

    check = the_failure(diagnose(box.name))

    assert check.name == "host key"
    assert check.fix.startswith(f"ssh -F {other} {box.name} true")


def test_a_changed_host_key_comes_with_the_command_that_forgets_the_old_one(
    box: SSHServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    key = " ".join((tmp_path / "other.pub").read_text().split()[:2])
    (tmp_path / "known").write_text(f"[127.0.0.1]:{box.port} {key}\n")
    other = tmp_path / "config"
    other.write_text(box.config_path.read_text().replace(str(box.known_hosts), str(tmp_path / "known")))
    monkeypatch.setenv("FAL_SSH_CONFIG", str(other))

    check = the_failure(diagnose(box.name))

    assert check.name == "host key"
    assert check.fix.startswith("ssh-keygen ")
    assert f"-R '[127.0.0.1]:{box.port}'" in check.fix


def test_a_wrong_key_is_a_failure_of_the_login(
    box: SSHServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    other = tmp_path / "config"
    other.write_text(box.config_path.read_text().replace(str(box.key_path), str(tmp_path / "other")))
    monkeypatch.setenv("FAL_SSH_CONFIG", str(other))

    check = the_failure(diagnose(box.name))

    assert check.name == "login"
    assert check.fix == f"ssh-copy-id -i {tmp_path}/other.pub -F {other} {box.name}"


def test_where_sockets_are_forbidden_that_is_a_note(box: SSHServer) -> None:
    box.restart("DisableForwarding yes")
    try:
        check = diagnose(box.name, timeout=60)[-1]
    finally:
        box.restart()

    assert (check.name, check.status) == ("forwarding", "note")
    assert "AllowStreamLocalForwarding yes" in check.fix


def test_a_way_through_another_machine_is_told(box: SSHServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies behind it cannot be looked up or reached from here."""
    first = box.host_block.replace(f"Host {box.name}", "Host gate")
    path = box.folder / "jump_config"
    path.write_text(f"{box.host_block}  ProxyJump gate\n{first}")
    monkeypatch.setenv("FAL_SSH_CONFIG", str(path))

    checks = until_agent(box.name)

    assert list(checks)[:2] == ["configuration", "host key"]
    assert checks["configuration"].detail.endswith("by way of gate")


def test_what_answers_without_speaking_ssh_is_told_from_a_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAL_SSH_CONFIG", str(tmp_path / "config"))
    (tmp_path / "config").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answering = threading.Thread(target=lambda: listener.accept()[0].sendall(b"HTTP/1.1 400 Bad\r\n\r\n"))
        answering.start()
        check = the_failure(diagnose(f"127.0.0.1:{listener.getsockname()[1]}"))
        answering.join()

    assert check.name == "port"
    assert "'HTTP/1.1 400 Bad'" in check.detail


# ---------------------------------------------------------------- what else the probe finds


@pytest.mark.parametrize(
    ("facts", "check", "status", "words"),
    [
        ({"place": "/h", "writable": "yes", "executable": "yes"}, "folder", "ok", "can be written"),
        ({"place": "/h", "writable": "yes"}, "folder", "FAIL", "mounted noexec"),
        ({"place": "/h", "trouble": "sh: /h/x: Permission denied"}, "folder", "FAIL", "Permission denied"),
        ({"place": "/h", "trouble": "head: /h/x: Disk quota exceeded"}, "folder", "ok", ""),
        (
            {"place": "/h", "trouble": "head: /h/x: Disk quota exceeded"},
            "disk",
            "FAIL",
            "Disk quota exceeded",
        ),
        ({"disk": "x 1 1 100000000 1% /", "inodes": "x 9 9 0 100% /"}, "disk", "FAIL", "no inodes"),
        ({"disk": "x 1 1 100000000 1% /", "inodes": "x 0 0 0 - /"}, "disk", "ok", "GB free on /"),
        ({"disk": "x 1 1 1000000 1% /"}, "disk", "note", "not for one with torch"),
        ({"disk": "x 1 1 100000 1% /"}, "disk", "FAIL", "102 MB free"),
        ({}, "GPU driver", "ok", "no NVIDIA GPU"),
        ({"driver": "550.1"}, "GPU driver", "ok", "NVIDIA 550.1"),
        (
            {"driver": "no devices", "driver_fails": "yes"},
            "GPU driver",
            "note",
            "does not answer: no devices",
        ),
        ({"clock": "1000"}, "clock", "ok", "agrees"),
        ({"clock": "900"}, "clock", "note", "100 s behind"),
        ({"clock": "1200"}, "clock", "note", "198 s ahead of"),
        ({"clock": "?"}, "clock", "ok", "does not tell"),
    ],
)
def test_what_is_found_is_judged(facts: dict[str, str], check: str, status: str, words: str) -> None:
    if check in {"folder", "disk"}:
        facts = {"disk": "x 1 1 100000000 1% /", **facts}
    judged = {
        "folder": lambda: machine._folder("/h/root", facts),
        "disk": lambda: machine._disk(facts, "ssh box"),
        "GPU driver": lambda: machine._driver(facts),
        "clock": lambda: machine._clock(facts, 1000.0, 1002.0),
    }[check]()

    assert (judged.name, judged.status) == (check, status)
    assert words in judged.detail


def test_an_index_out_of_reach_is_a_note_with_the_programs_words() -> None:
    def run(_script: str) -> CompletedCommand:
        return CompletedCommand(2, b"", b"error: no route\n  hint: none\n")

    check = machine._index({}, run)

    assert check.status == "note"
    assert check.detail.splitlines()[1:] == ["  error: no route", "  hint: none"]
    assert "uv.toml" in check.fix


def test_an_examination_reads_well_as_text_html_and_json() -> None:
    checks = [Check("name", True, "fine"), Check("port", False, "no <b>\nsecond", "type this")]
    examination = Examination("box", checks)

    assert repr(examination) == "ok    name: fine\nFAIL  port: no <b>\n      second\n      do this: type this"
    assert "no &lt;b&gt;" in examination._repr_html_()
    assert "<code>type this</code>" in examination._repr_html_()
    assert not examination.ok
    assert as_json("box", checks)["checks"][1] == {
        "name": "port",
        "ok": False,
        "detail": "no <b>\nsecond",
        "fix": "type this",
        "status": "fail",
    }


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (123_456_789, "123 MB"),
        (2 << 30, "2.1 GB"),
        (5e13, "50.0 TB"),
    ],
)
def test_sizes_are_readable(size: float, text: str) -> None:
    assert size_text(size) == text
