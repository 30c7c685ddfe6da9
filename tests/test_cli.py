"""The command `fal-notebook`: what it prints, and with which status it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from support.waiting import until
from typer.testing import CliRunner

import fal_notebook
from fal_notebook import cli
from fal_notebook.config import config_folder, remember_host

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from typer.testing import Result

COMMANDS = ("doctor", "envs", "hosts", "status", "stop")


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty settings folder, and an ssh that knows one machine, which nobody can reach."""
    shutil.rmtree(config_folder(), ignore_errors=True)
    (tmp_path / "ssh_config").write_text("Host closed\n  HostName 127.0.0.1\n  Port 1\n", encoding="utf-8")
    monkeypatch.setenv("FAL_SSH_CONFIG", str(tmp_path / "ssh_config"))
    yield config_folder()
    shutil.rmtree(config_folder(), ignore_errors=True)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments)


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, errors and all."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "fal_notebook.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


# ---------------------------------------------------------------- without a host


def test_the_version_is_the_packages() -> None:
    assert run("--version").output == f"fal-notebook {fal_notebook.__version__}\n"


def test_the_help_lists_every_command_with_a_whole_sentence() -> None:
    output = run("--help").output

    listed = dict(re.findall(r"^  (\w+)  +(.+)$", output, re.MULTILINE))
    assert tuple(sorted(listed)) == COMMANDS
    assert all(text.endswith(".") and not text.endswith("..") for text in listed.values())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_each_of_its_options_has_a_help_text(command: str) -> None:
    result = run(command, "--help")

    assert result.exit_code == 0
    for line in re.findall(r"^  (--?\w.*)$", result.output, re.MULTILINE):
        assert re.search(r"  \w", line), line


def test_an_unknown_command_ends_with_2() -> None:
    assert run("docter").exit_code == 2


def test_hosts_are_listed_with_where_they_are_known_from() -> None:
    remember_host("gpu-box", ssh="me@box", labels=("lab", "h100"), default=True)

    lines = [line.split() for line in run("hosts").output.splitlines()]

    assert lines[0] == ["NAME", "ADDRESS", "FROM", "LABELS"]
    assert lines[1] == ["local", "-", "this", "machine"]
    assert lines[2] == ["*", "gpu-box", "me@box", "settings", "lab,", "h100"]
    assert lines[3] == ["closed", "closed", "ssh"]


def test_a_default_from_the_environment_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAL_HOST", "elsewhere")

    assert re.search(r"^\*  elsewhere  elsewhere  ssh$", run("hosts").output, re.MULTILINE)


def test_a_mistake_in_the_settings_is_one_message_and_status_1(settings: Path) -> None:
    settings.mkdir()
    (settings / "hosts.toml").write_text("[hosts.a]\nlables = []\n")

    done = run_process("hosts")

    assert done.returncode == 1
    assert done.stderr.startswith("fal-notebook: ")
    assert "line 2" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_a_host_out_of_reach_is_one_message_and_status_1() -> None:
    done = run_process("status", "closed")

    assert done.returncode == 1
    assert done.stderr.startswith("fal-notebook: ")
    assert "closed" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_a_host_that_fails_the_doctor_ends_with_1_and_says_what_to_type() -> None:
    result = run("doctor", "closed")

    assert result.exit_code == 1
    assert re.search(
        r"^FAIL  port: .*\n(.*\n)*      do this: ssh -v -F \S+ closed true", result.output, re.MULTILINE
    )


def test_the_doctor_speaks_json() -> None:
    result = run("doctor", "closed", "--json")

    answer = json.loads(result.output)
    assert (result.exit_code, answer["host"], answer["ok"]) == (1, "closed", False)
    assert [check["status"] for check in answer["checks"]] == ["ok", "ok", "fail"]
    assert "true" in answer["checks"][-1]["fix"]


def test_the_doctor_looks_at_the_default_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAL_HOST", "closed")

    assert re.search(r"ssh -v -F \S+ closed", run("doctor").output)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s ago"),
        (59, "59 s ago"),
        (120, "2 min ago"),
        (7200, "2 h ago"),
        (172_800, "2 d ago"),
        (-5, "0 s ago"),
    ],
)
def test_moments_are_told_as_ages(seconds: float, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_000_000.0)

    assert cli._ago(1_000_000.0 - seconds) == text
    assert cli._ago(None) == "never"


def test_importing_the_package_does_not_import_the_command() -> None:
    code = "import sys, fal_notebook; print({'typer', 'rich', 'click'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", code]

    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)

    assert done.stdout == "set()\n"


# ---------------------------------------------------------------- with this machine's agent


def test_the_doctor_finds_this_machine_well() -> None:
    result = run("doctor", "local")

    assert result.exit_code == 0, result.output
    assert re.search(r"^ok    agent: answers on .* cores", result.output, re.MULTILINE)


def test_a_worker_is_shown_with_its_environment_and_stopped() -> None:
    @fal_notebook.function(host="local", keep_alive=60)
    def process_number() -> int:
        return os.getpid()

    run("stop", "local")  # what other tests left
    until(lambda: "no workers" in run("status", "local").output)
    number = process_number()

    shown, environments = run("status", "local").output, run("envs", "local").output
    row = re.search(r"^PROCESS.*\n(\d+) +(\S+) .*idle for \d+ s$", shown, re.MULTILINE)
    assert row, shown
    assert int(row[1]) == number
    assert re.search(r"^\S+: \d+ cores, .* of memory with .* free, .* free on disk$", shown, re.MULTILINE)
    assert re.search(
        rf"^{re.escape(row[2])} +3\.\d+\S*  +\d+ +[\d.]+ [kMG]B  .* ago$", environments, re.MULTILINE
    )

    assert run("stop", "local", "--session", "nobody-has-this").output == "local: ended 0 workers\n"
    assert run("stop", "local").output == "local: ended 1 worker\n"
    until(lambda: "no workers" in run("status", "local").output)
