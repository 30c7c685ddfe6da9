"""uv is found, listened to, ended when asked to, and kept to what it was asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.waiting import is_alive, until
from support.wheels import make_wheel, package_settings

from fal_agent.errors import CallCancelledError
from fal_agent.server.environments.command import Supervision, run_command
from fal_agent.server.environments.uv import Uv, UvError

PYTHON = Path(sys.executable)


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def supervision(lines: list[str]) -> Supervision:
    return Supervision(lines.append, threading.Event())


@pytest.fixture
def uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Uv:
    """The real uv, with packages of our own and a cache of its own."""
    monkeypatch.setenv("UV_CONFIG_FILE", str(package_settings(tmp_path / "uv.toml", tmp_path / "wheels")))
    monkeypatch.setenv("UV_PYTHON_DOWNLOADS", "never")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    return Uv.find(tmp_path)


def sh(
    script: str, supervision: Supervision, *, timeout: float = 20.0, stdin: str = ""
) -> tuple[int, str, str, bool]:
    done = run_command(
        ["/bin/sh", "-c", script],
        variables={"PATH": os.defpath},
        stdin=stdin,
        supervision=supervision,
        timeout=timeout,
    )
    return done.status, done.output, done.log, done.timed_out


# ---------------------------------------------------------------- running programs


def test_lines_come_one_by_one_without_terminal_codes(supervision: Supervision, lines: list[str]) -> None:
    script = r"printf '\033[1mbold\033[0m\na\rb\r\n\n\nc\377\nlast' >&2; printf out; exit 3"

    status, output, log, _ = sh(script, supervision)

    assert (status, output) == (3, "out")
    assert lines == ["bold", "a", "b", "c\ufffd", "last"]
    assert log.splitlines()[0] == "bold"


def test_input_of_any_size_is_read(supervision: Supervision) -> None:
    text = "x" * (1 << 20)

    _, output, _, _ = sh("cat", supervision, stdin=text)

    assert output == text


def test_a_flood_of_lines_keeps_only_the_end(supervision: Supervision) -> None:
    _, _, log, _ = sh("yes abcdefghij | head -n 100000 >&2; echo end >&2", supervision)

    assert len(log) <= 256 << 10
    assert log.endswith("end")


def test_a_cancelled_program_ends_with_its_children(tmp_path: Path) -> None:
    cancelled = threading.Event()
    supervision = Supervision(lambda _line: cancelled.set(), cancelled)
    script = f"trap '' TERM; sleep 100 & echo $! > {tmp_path}/child; echo ready >&2; wait; sleep 100"

    with pytest.raises(CallCancelledError):
        sh(script, supervision, timeout=60.0)

    child = int((tmp_path / "child").read_text())
    until(lambda: not is_alive(child))


def test_a_program_that_takes_too_long_is_ended(supervision: Supervision) -> None:
    status, _, _, timed_out = sh("exec sleep 100", supervision, timeout=0.3)

    assert timed_out
    assert status < 0


def test_a_child_left_behind_does_not_hold_up_the_end(supervision: Supervision, tmp_path: Path) -> None:
    """Compiler caches start servers that keep the pipes of whoever started them."""
    status, output, _, timed_out = sh(f"sleep 100 & echo $! > {tmp_path}/child; echo done", supervision)

    assert (status, output, timed_out) == (0, "done\n", False)
    os.kill(int((tmp_path / "child").read_text()), 9)


def test_a_program_that_closes_its_output_is_waited_for(supervision: Supervision, tmp_path: Path) -> None:
    status, _, _, _ = sh(f"exec >&- 2>&-; sleep 0.3; touch {tmp_path}/done; exit 7", supervision)

    assert status == 7
    assert (tmp_path / "done").exists()


# ---------------------------------------------------------------- finding uv


def test_uv_is_looked_for_in_the_agents_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("bin", "chosen", "path"):
        program(tmp_path / folder / "uv")
    monkeypatch.setenv("UV", str(tmp_path / "chosen/uv"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))

    found = []
    for folder in ("bin", "chosen", "path"):
        found.append(Uv.find(tmp_path).program)
        shutil.rmtree(tmp_path / folder)

    assert found == [tmp_path / folder / "uv" for folder in ("bin", "chosen", "path")]


def program(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\nexit 0\n")
    path.chmod(0o755)


def test_a_shim_is_the_last_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyenv puts scripts on PATH that fail unless the current Python has uv."""
    program(tmp_path / "shims" / "uv")
    program(tmp_path / ".local/bin/uv")
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "shims"))

    assert Uv.find(tmp_path / "root").program == tmp_path / ".local/bin/uv"


def test_a_host_without_uv_says_how_to_get_it(tmp_path: Path) -> None:
    """In a Python of its own, so that the module `uv` is not there either."""
    script = (
        f"import pathlib, fal_agent.server.environments.uv as u\nu.Uv.find(pathlib.Path({str(tmp_path)!r}))"
    )
    import fal_agent

    shutil.copytree(Path(fal_agent.__file__).parent, tmp_path / "code" / "fal_agent")
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        env={
            "PATH": str(tmp_path),
            "HOME": str(tmp_path),
            "PYTHONPATH": str(tmp_path / "code"),
        },
        capture_output=True,
        text=True,
        timeout=30,
    )

    assert "EnvironmentBuildError: uv is not on this host" in done.stderr
    assert "pip install --user uv" in done.stderr


# ---------------------------------------------------------------- uv itself


def test_lines_that_fail_are_told_in_uvs_own_words(uv: Uv, supervision: Supervision) -> None:
    with pytest.raises(UvError, match="nosuch was not found") as caught:
        uv.compile(["nosuch"], python=PYTHON, supervision=supervision)

    assert caught.value.words.startswith("error")


def test_the_users_own_environment_is_left_alone(
    uv: Uv, supervision: Supervision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables of the shell that started the agent may point anywhere."""
    make_wheel(tmp_path / "wheels", "alpha")
    uv.venv(tmp_path / "theirs", python=PYTHON, supervision=supervision)
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "theirs"))
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path / "theirs"))
    monkeypatch.setenv("UV_PYTHON", "2.7")
    monkeypatch.setenv("UV_SYSTEM_PYTHON", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    monkeypatch.setenv("PYTHONHOME", str(tmp_path / "broken"))

    uv.venv(tmp_path / "ours", python=PYTHON, supervision=supervision)
    uv.install(["alpha==1.0"], python=tmp_path / "ours/bin/python", supervision=supervision)

    assert list((tmp_path / "ours").rglob("alpha.py"))
    assert not list((tmp_path / "theirs").rglob("alpha.py"))


def test_files_are_linked_within_a_file_system(uv: Uv, supervision: Supervision, tmp_path: Path) -> None:
    make_wheel(tmp_path / "wheels", "alpha")
    uv.venv(tmp_path / "ours", python=PYTHON, supervision=supervision)

    uv.install(["alpha==1.0"], python=tmp_path / "ours/bin/python", supervision=supervision)

    (installed,) = (tmp_path / "ours").rglob("alpha.py")
    assert installed.stat().st_nlink > 1


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no second file system")
def test_files_are_copied_between_file_systems_without_a_warning(
    uv: Uv, supervision: Supervision, lines: list[str], tmp_path: Path
) -> None:
    make_wheel(tmp_path / "wheels", "alpha")
    folder = Path("/dev/shm") / f"fal-notebook-test-{os.getpid()}"
    if folder.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    try:
        uv.venv(folder, python=PYTHON, supervision=supervision)
        uv.install(["alpha==1.0"], python=folder / "bin/python", supervision=supervision)

        assert list(folder.rglob("alpha.py"))
        assert not [line for line in lines if "hardlink" in line or "warning" in line]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no second file system")
def test_the_cache_moves_to_the_file_system_of_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    monkeypatch.delenv("UV_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", f"/dev/shm/fal-notebook-none-{os.getpid()}")
    moved, chosen = Uv.find(tmp_path), Uv.find(tmp_path)

    moved.keep_cache_near(tmp_path)
    monkeypatch.setenv("UV_CACHE_DIR", "/dev/shm")
    chosen.keep_cache_near(tmp_path)

    assert moved.cache_folder() == tmp_path / "uv-cache"
    assert chosen.cache_folder() == Path("/dev/shm")


def test_a_program_that_does_not_start_is_named(tmp_path: Path, supervision: Supervision) -> None:
    with pytest.raises(UvError, match=r"nowhere/uv cannot be started"):
        Uv(tmp_path / "nowhere/uv").venv(tmp_path / "x", python=PYTHON, supervision=supervision)


def test_an_interpreter_is_found_past_shims(
    uv: Uv, supervision: Supervision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    program(tmp_path / "shims" / f"python{version}")
    (tmp_path / "shims" / f"python{version}").write_text("#!/bin/sh\necho no such command >&2; exit 127\n")
    real = Path(getattr(sys, "_base_executable", sys.executable)).resolve().parent
    monkeypatch.setenv("PATH", f"{tmp_path / 'shims'}:{real}:{os.defpath}")

    found = uv.python_find(version, supervision=supervision)

    assert found is not None
    assert f"({found.parent}" in " ".join(uv.python_list(supervision=supervision))


def test_a_missing_interpreter_is_none(uv: Uv, supervision: Supervision, lines: list[str]) -> None:
    assert uv.python_find("3.99", supervision=supervision) is None
    assert lines == []
