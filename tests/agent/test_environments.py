"""An environment is resolved once, built once, there as a whole or not at all, and found at once.

Everything is built by the real uv from packages of our own, without any network.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.waiting import is_alive, until
from support.wheels import make_project, make_wheel, package_settings

from fal_agent.errors import CallCancelledError, EnvironmentBuildError, RequirementError
from fal_agent.server.environments.builder import WAITING
from fal_agent.server.environments.cache import Environment, EnvironmentCache
from fal_agent.server.environments.uv import Uv
from fal_agent.wire import EnvironmentSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
NEVER = threading.Event()


class Builds:
    """A cache with what its builds told."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cache = EnvironmentCache(root, lambda: Uv.find(root))
        self.stages: list[tuple[str, str]] = []
        self.lines: list[str] = []

    def build(
        self, *layers: list[str], cancelled: threading.Event = NEVER, python: str = PYTHON, **options: Any
    ) -> Environment:
        return self.cache.build(
            EnvironmentSpec(python, list(layers), **options),
            stage=lambda phase, text: self.stages.append((phase, text)),
            log=self.lines.append,
            cancelled=cancelled,
        )

    def phases(self) -> list[str]:
        return [phase for phase, text in self.stages if text != WAITING]

    def left(self) -> list[str]:
        return [path.name for path in (self.root / "environments").iterdir()]


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """The package index of the test: alpha 1.0; beta, which needs alpha."""
    folder = tmp_path / "wheels"
    make_wheel(folder, "alpha", command="say-alpha")
    make_wheel(folder, "beta", requires=("alpha",))
    return folder


@pytest.fixture
def settings(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UV_CONFIG_FILE", str(package_settings(tmp_path / "uv.toml", wheels)))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    monkeypatch.setenv("UV_PYTHON_DOWNLOADS", "never")
    monkeypatch.delenv("FAL_NOTEBOOK_PYTHON", raising=False)
    return tmp_path / "uv.toml"


@pytest.fixture
def builds(tmp_path: Path, settings: Path) -> Builds:
    return Builds(tmp_path / "root")


def no_uv() -> Uv:
    raise AssertionError("nothing needs to be built here")


def version_in(environment: Environment, module: str) -> str:
    script = f"import {module}; print({module}.VERSION)"
    command = [str(environment.python), "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


# ---------------------------------------------------------------- finding


def test_what_is_built_works_and_is_found_without_uv(builds: Builds) -> None:
    built = builds.build(["beta"])

    found = EnvironmentCache(builds.root, no_uv).find(EnvironmentSpec(PYTHON, [["beta"]]))

    assert found == built
    assert built.packages == ["alpha==1.0", "beta==1.0"]
    assert version_in(built, "beta") == "1.0"
    assert builds.phases() == ["resolve", "build"]


def test_what_was_not_built_is_not_found(builds: Builds) -> None:
    builds.build(["alpha"])

    for spec in (EnvironmentSpec(PYTHON, [["beta"]]), EnvironmentSpec("3.8", [["alpha"]])):
        assert builds.cache.find(spec) is None
    assert builds.cache.find(EnvironmentSpec(PYTHON, [["alpha"]], compile_bytecode=True)) is None


def test_an_environment_may_be_empty(builds: Builds) -> None:
    environment = builds.build()

    assert environment.packages == []
    assert environment.python.exists()
    assert builds.cache.find(EnvironmentSpec(PYTHON, [[]])) == environment


def test_scripts_run_where_they_are(builds: Builds) -> None:
    """A script names its interpreter by path, so an environment must not move after it is made."""
    environment = builds.build(["alpha"])

    script = environment.path / "bin" / "say-alpha"
    done = subprocess.run([str(script)], capture_output=True, text=True, timeout=30)

    assert done.stdout == "alpha 1.0\n"
    assert str(environment.path) in script.read_text()


def test_spelling_and_order_do_not_matter(builds: Builds) -> None:
    built = builds.build(["beta >= 1.0", "alpha"])

    same = EnvironmentCache(builds.root, no_uv).find(EnvironmentSpec(PYTHON, [["Alpha", "beta>=1.0"], []]))

    assert same == built


def test_specs_that_resolve_to_the_same_share_an_environment(builds: Builds) -> None:
    one = builds.build(["alpha"])
    other = builds.build(["alpha==1.0"])

    assert other == one
    assert builds.left() == [one.name]


def test_compiled_modules_make_another_environment(builds: Builds) -> None:
    plain = builds.build(["alpha"])
    compiled = builds.build(["alpha"], compile_bytecode=True)

    assert compiled.name != plain.name
    assert list(compiled.path.rglob("alpha.*.pyc"))
    assert not list(plain.path.rglob("alpha.*.pyc"))
    assert builds.phases() == ["resolve", "build", "build"]


def compiled_of(environment: Environment, module: str) -> list[Path]:
    return list(environment.path.rglob(f"{module}.*.pyc"))


def import_in(environment: Environment, module: str) -> list[str]:
    """Import a module as a worker does; gives where Python and the module's code think that it is."""
    script = f"import {module} as m; print(m.__file__, m.main.__code__.co_filename, sep='\\n')"
    settings = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [str(environment.python), "-c", script]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.splitlines()


def test_what_was_compiled_in_one_environment_serves_the_next(builds: Builds) -> None:
    first = builds.build(["alpha"])
    import_in(first, "alpha")
    (compiled,) = compiled_of(first, "alpha")

    second = builds.build(["beta"])  # which needs alpha
    (handed,) = compiled_of(second, "alpha")
    places = import_in(second, "alpha")

    assert handed.samefile(compiled)
    assert places == [str(second.path / "lib" / f"python{PYTHON}" / "site-packages" / "alpha.py")] * 2
    assert handed.samefile(compiled)  # and was used
    assert not compiled_of(second, "beta")


def test_what_was_compiled_from_another_file_is_not_handed_on(builds: Builds, tmp_path: Path) -> None:
    line = f"gamma @ file://{make_wheel(tmp_path / 'own', 'gamma')}"
    first = builds.build([line])
    import_in(first, "gamma")
    make_wheel(tmp_path / "own", "gamma", size=10)  # of the same version

    second = builds.build([line])

    assert compiled_of(first, "gamma")
    assert not compiled_of(second, "gamma")


def test_compiled_modules_that_cannot_be_handed_on_keep_nothing_from_being_built(builds: Builds) -> None:
    first = builds.build(["alpha"])
    (module,) = first.path.rglob("alpha.py")
    (module.parent / "__pycache__").write_text("no folder")

    second = builds.build(["beta"])

    assert version_in(second, "beta") == "1.0"


def test_an_environment_without_interpreter_is_not_found_but_built_again(builds: Builds) -> None:
    """The Python that it was made of may have been removed from the host."""
    built = builds.build(["alpha"])
    built.python.unlink()

    assert builds.cache.find(EnvironmentSpec(PYTHON, [["alpha"]])) is None
    assert version_in(builds.build(["alpha"]), "alpha") == "1.0"


def test_an_environment_without_marker_is_built_again(builds: Builds) -> None:
    built = builds.build(["alpha"])
    (built.path / ".complete").unlink()
    (built.path / "rubbish").touch()

    assert builds.cache.find(EnvironmentSpec(PYTHON, [["alpha"]])) is None
    assert builds.build(["alpha"]) == built
    assert not (built.path / "rubbish").exists()


def test_a_damaged_lock_is_made_anew(builds: Builds) -> None:
    built = builds.build(["alpha"])
    for lock in (builds.root / "locks").glob("*.json"):
        lock.write_text("{")

    assert builds.cache.find(EnvironmentSpec(PYTHON, [["alpha"]])) is None
    assert builds.build(["alpha"]) == built


def test_a_lost_environment_comes_back_from_its_lock_without_index(builds: Builds, wheels: Path) -> None:
    """No resolving and no network: versions stay, and a host that is offline can go on."""
    built = builds.build(["beta"])
    shutil.rmtree(built.path)
    for wheel in wheels.iterdir():
        wheel.write_bytes(b"")  # whoever looks here fails
    builds.stages.clear()

    assert builds.build(["beta"]) == built
    assert builds.phases() == ["build"]


def test_a_lock_that_cannot_be_installed_any_more_is_resolved_anew(builds: Builds, wheels: Path) -> None:
    built = builds.build(["alpha"])
    shutil.rmtree(built.path)
    shutil.rmtree(Path(os.environ["UV_CACHE_DIR"]))
    (wheels / "alpha-1.0-py3-none-any.whl").unlink()
    make_wheel(wheels, "alpha", "1.1")

    assert builds.build(["alpha"]).packages == ["alpha==1.1"]
    assert "Resolved anew: alpha 1.0 -> 1.1" in builds.lines


def test_a_changed_local_wheel_makes_another_environment(builds: Builds, tmp_path: Path) -> None:
    line = f"gamma @ file://{make_wheel(tmp_path / 'own', 'gamma')}"
    before = builds.build([line])
    make_wheel(tmp_path / "own", "gamma", size=10)

    after = builds.build([line])

    assert after.name != before.name
    assert list(after.path.rglob("gamma.bin"))


# ---------------------------------------------------------------- layers and force


def test_a_later_layer_keeps_what_the_earlier_ones_chose(builds: Builds, wheels: Path) -> None:
    make_wheel(wheels, "alpha", "2.0")

    environment = builds.build(["alpha<2"], ["beta"])

    assert environment.packages == ["alpha==1.0", "beta==1.0"]
    assert version_in(environment, "alpha") == "1.0"


def test_a_later_layer_may_overrule_an_earlier_one(builds: Builds, wheels: Path) -> None:
    make_wheel(wheels, "alpha", "2.0")

    environment = builds.build(["alpha<2"], ["alpha>=2"])

    assert environment.packages == ["alpha==2.0"]
    assert version_in(environment, "alpha") == "2.0"


def test_layers_that_did_not_change_keep_their_versions(builds: Builds, wheels: Path) -> None:
    """Adding one package must not upgrade all others."""
    builds.build(["alpha"])
    make_wheel(wheels, "alpha", "2.0")
    make_wheel(wheels, "gamma")

    assert builds.build(["alpha"], ["gamma"]).packages == ["alpha==1.0", "gamma==1.0"]
    assert builds.build(["alpha"], ["beta"]).packages == ["alpha==1.0", "beta==1.0"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_layer_that_needs_an_earlier_one_to_build_gets_it(
    builds: Builds, tmp_path: Path, dynamic: bool
) -> None:
    """Extensions of frameworks import the framework while they are built."""
    line = make_project(tmp_path / "own", "needy", "import alpha", dynamic=dynamic)
    with pytest.raises(EnvironmentBuildError, match="No module named 'alpha'"):
        builds.build(["alpha", line])

    environment = builds.build(["alpha"], [line])

    assert version_in(environment, "needy") == "1.0"
    assert builds.cache.find(EnvironmentSpec(PYTHON, [["alpha"], [line]])) == environment
    shutil.rmtree(environment.path)
    assert builds.build(["alpha"], [line]) == environment


def test_force_takes_newer_versions_under_a_fresh_name(builds: Builds, wheels: Path) -> None:
    """Workers go on in the old environment while the new one is made."""
    old = builds.build(["alpha"])
    make_wheel(wheels, "alpha", "1.1")

    new = builds.build(["alpha"], force=True)

    assert (old.packages, new.packages) == (["alpha==1.0"], ["alpha==1.1"])
    assert version_in(old, "alpha") == "1.0"
    assert builds.cache.find(EnvironmentSpec(PYTHON, [["alpha"]])) == new


def test_force_builds_anew_also_when_nothing_is_newer(builds: Builds) -> None:
    old = builds.build(["alpha"])
    (old.path / "spoilt").touch()

    new = builds.build(["alpha"], force=True)

    assert new.name != old.name
    assert not (new.path / "spoilt").exists()
    assert "Resolved anew: the same packages" in builds.lines


def test_force_that_fails_leaves_the_old_environment(builds: Builds, wheels: Path) -> None:
    old = builds.build(["alpha"])
    for wheel in wheels.iterdir():
        wheel.unlink()

    with pytest.raises(EnvironmentBuildError):
        builds.build(["alpha"], force=True)

    assert builds.cache.find(EnvironmentSpec(PYTHON, [["alpha"]])) == old


# ---------------------------------------------------------------- one build for all


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """A file that slow builds wait for; it is there in the end, so that nothing waits for ever."""
    path = tmp_path / "gate"
    yield path
    path.touch()


def slow_project(folder: Path, gate: Path, end: str = "") -> str:
    """A package whose build writes its process number, and goes on when the gate is open."""
    body = (
        f"pathlib.Path({str(folder / 'pid')!r}).write_text(str(os.getpid())); "
        f"[time.sleep(0.02) for _ in range(3000) if not os.path.exists({str(gate)!r})]; {end}"
    )
    return make_project(folder, "slow", body)


def test_threads_that_ask_at_once_get_one_build(builds: Builds, tmp_path: Path, gate: Path) -> None:
    line = slow_project(tmp_path / "own", gate)

    with ThreadPoolExecutor(6) as threads:
        futures = [threads.submit(builds.build, [line]) for _ in range(6)]
        until(lambda: builds.stages.count(("build", WAITING)) == 5)
        gate.touch()
        environments = [future.result(60) for future in futures]

    assert len({environment.name for environment in environments}) == 1
    assert builds.phases() == ["resolve", "build"]


def test_those_who_wait_for_a_build_that_fails_get_its_failure(
    builds: Builds, tmp_path: Path, gate: Path
) -> None:
    line = slow_project(tmp_path / "own", gate, "raise SystemError('broken on purpose')")

    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(builds.build, [line]) for _ in range(4)]
        until(lambda: builds.stages.count(("build", WAITING)) == 3)
        gate.touch()
        errors = [future.exception(60) for future in futures]

    assert all(isinstance(error, EnvironmentBuildError) for error in errors)
    assert all("broken on purpose" in str(error) for error in errors)
    assert builds.phases() == ["resolve", "build"]
    assert builds.left() == []


BUILD_ELSEWHERE = """
import json, pathlib, sys, threading
from fal_agent.server.environments.cache import EnvironmentCache
from fal_agent.server.environments.uv import Uv
from fal_agent.wire import EnvironmentSpec
root = pathlib.Path(sys.argv[1])
cache = EnvironmentCache(root, lambda: Uv.find(root))
spec = EnvironmentSpec(sys.argv[2], json.loads(sys.argv[3]))
say = lambda *words: print(*words, flush=True)
print("made", cache.build(spec, stage=say, log=lambda line: None, cancelled=threading.Event()).name)
"""


def build_elsewhere(builds: Builds, *layers: list[str]) -> subprocess.Popen[str]:
    import fal_agent

    variables = {**os.environ, "PYTHONPATH": str(Path(fal_agent.__file__).parents[1])}
    command = [sys.executable, "-c", BUILD_ELSEWHERE, str(builds.root), PYTHON, json.dumps(layers)]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)


def test_processes_that_ask_at_once_get_one_build(builds: Builds, tmp_path: Path, gate: Path) -> None:
    line = slow_project(tmp_path / "own", gate)
    with build_elsewhere(builds, [line]) as other:
        until((tmp_path / "own/pid").exists)
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(builds.build, [line])
            until(lambda: builds.stages == [("build", WAITING)])
            gate.touch()
            environment = future.result(60)
        assert other.stdout is not None
        assert f"made {environment.name}" in other.stdout.read()

    assert builds.phases() == []


def test_a_builder_that_was_killed_is_followed_by_the_next(
    builds: Builds, tmp_path: Path, gate: Path
) -> None:
    """uv outlives a killed agent; nobody touches the folder before it has ended too."""
    wheel = make_wheel(tmp_path / "own-wheels", "gamma")
    line = slow_project(tmp_path / "own", gate)
    lines = [line, f"gamma @ file://{wheel}"]
    with build_elsewhere(builds, lines) as other:
        pid = until(lambda: (tmp_path / "own/pid").exists() and (tmp_path / "own/pid").read_text())
        other.send_signal(signal.SIGKILL)
    assert is_alive(int(pid))

    gate.touch()
    environment = builds.build(lines)

    assert version_in(environment, "gamma") == "1.0"
    assert builds.left() == [environment.name]


def test_what_a_killed_builder_left_of_the_folder_is_replaced(
    builds: Builds, tmp_path: Path, gate: Path
) -> None:
    """Killed while it installs: the folder is there, without marker, and uv still writes to it."""
    line = slow_project(tmp_path / "own", gate)
    gate.touch()
    builds.build([line])
    gate.unlink()
    (tmp_path / "own/pid").unlink()
    shutil.rmtree(builds.root / "environments")
    shutil.rmtree(Path(os.environ["UV_CACHE_DIR"]))  # so that installing builds again, from the lock
    with build_elsewhere(builds, [line]) as other:
        until((tmp_path / "own/pid").exists)
        other.send_signal(signal.SIGKILL)
    (half_made,) = builds.left()
    assert not (builds.root / "environments" / half_made / ".complete").exists()

    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(builds.build, [line])
        until(lambda: ("build", WAITING) in builds.stages)
        gate.touch()
        environment = future.result(60)

    assert version_in(environment, "slow") == "1.0"


# ---------------------------------------------------------------- cancelling


def test_a_cancelled_build_ends_uv_and_leaves_nothing(builds: Builds, tmp_path: Path, gate: Path) -> None:
    line, cancelled = slow_project(tmp_path / "own", gate), threading.Event()

    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(builds.build, [line], cancelled=cancelled)
        pid = until(lambda: (tmp_path / "own/pid").exists() and (tmp_path / "own/pid").read_text())
        cancelled.set()
        error = future.exception(60)

    assert isinstance(error, CallCancelledError)
    until(lambda: not is_alive(int(pid)))
    assert builds.left() == []
    gate.touch()
    assert version_in(builds.build([line]), "slow") == "1.0"


def test_waiting_for_anothers_build_can_be_cancelled(builds: Builds, tmp_path: Path, gate: Path) -> None:
    line, cancelled = slow_project(tmp_path / "own", gate), threading.Event()

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(builds.build, [line])
        until((tmp_path / "own/pid").exists)
        second = threads.submit(builds.build, [line], cancelled=cancelled)
        until(lambda: ("build", WAITING) in builds.stages)
        cancelled.set()
        error = second.exception(60)
        gate.touch()
        first.result(60)

    assert isinstance(error, CallCancelledError)


# ---------------------------------------------------------------- bad input and bad luck


@pytest.mark.parametrize(
    "line",
    [
        "-r /etc/passwd",
        "--index-url=https://evil.example",
        "alpha\n-r /etc/passwd",
        "alpha; $(id)",
        "x @ ./x",
    ],
)
def test_lines_that_are_no_requirements_reach_nobody(tmp_path: Path, line: str) -> None:
    cache = EnvironmentCache(tmp_path, no_uv)
    spec = EnvironmentSpec(PYTHON, [["alpha"], [line]])

    with pytest.raises(RequirementError):
        cache.build(spec, stage=lambda *_: None, log=lambda _: None, cancelled=NEVER)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("python", ["--help", "3", "3.11.1", "/bin/sh", "3.11\n", "pypy3.9"])
def test_a_python_that_is_no_version_is_refused(tmp_path: Path, python: str) -> None:
    cache = EnvironmentCache(tmp_path, no_uv)

    with pytest.raises(RequirementError, match=r"must look like '3\.11'"):
        cache.build(EnvironmentSpec(python, []), stage=lambda *_: None, log=lambda _: None, cancelled=NEVER)


def test_an_unknown_package_is_told_in_uvs_words_and_with_its_line(builds: Builds) -> None:
    with pytest.raises(EnvironmentBuildError) as caught:
        builds.build(["alpha", "No_Such>=3"])

    assert "no-such was not found" in str(caught.value)
    assert "Asked for: 'no-such>=3'." in str(caught.value)
    assert "alpha" not in str(caught.value).partition("Asked for")[2]
    assert "no-such" in caught.value.log


def test_a_conflict_is_told_in_uvs_words_and_with_its_lines(builds: Builds, wheels: Path) -> None:
    make_wheel(wheels, "gamma", requires=("alpha>=5",))

    with pytest.raises(EnvironmentBuildError) as caught:
        builds.build(["alpha==1.0", "gamma"])

    assert "depend on alpha>=5" in str(caught.value).replace("depends", "depend")
    assert "Asked for: 'alpha==1.0', 'gamma'." in str(caught.value)


def test_a_package_that_does_not_build_shows_its_own_error(builds: Builds, tmp_path: Path) -> None:
    line = make_project(tmp_path / "own", "broken", "raise SystemError('compiler is missing')")

    with pytest.raises(EnvironmentBuildError, match="compiler is missing") as caught:
        builds.build([line])

    assert "compiler is missing" in caught.value.log
    assert builds.left() == []


def test_an_index_that_cannot_be_reached_is_told_so(
    builds: Builds, settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.write_text("")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")

    with pytest.raises(EnvironmentBuildError, match="index could not be reached from it") as caught:
        builds.build(["alpha"])

    assert "uv.toml" in str(caught.value)
    assert "127.0.0.1:9" in str(caught.value)


def test_passwords_of_addresses_are_not_shown(builds: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")

    with pytest.raises(EnvironmentBuildError) as caught:
        builds.build(["x @ http://me:hunter2@127.0.0.1:9/x-1.0-py3-none-any.whl"])

    assert "127.0.0.1:9/x-1.0" in str(caught.value)
    assert "hunter2" not in str(caught.value) + caught.value.log + "".join(builds.lines)


def test_a_missing_python_is_named_with_those_that_are_there(builds: Builds) -> None:
    with pytest.raises(EnvironmentBuildError) as caught:
        builds.build(["alpha"], python="3.99")

    assert "there is no Python 3.99 on this host" in str(caught.value)
    assert f"{PYTHON}." in str(caught.value).partition("Python that is there")[2]
    assert "uv python install 3.99" in str(caught.value)


def test_the_preferred_python_is_taken_if_its_minor_version_fits(
    builds: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notebook's own Python comes before another of the same minor version."""
    own = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    preferred = tmp_path / "preferred"
    preferred.symlink_to(own)
    unfit = tmp_path / "unfit"
    unfit.write_text("#!/bin/sh\necho cpython 2.7.18\n")
    unfit.chmod(0o755)

    monkeypatch.setenv("FAL_NOTEBOOK_PYTHON", str(unfit))
    first = builds.build(["alpha"])
    monkeypatch.setenv("FAL_NOTEBOOK_PYTHON", str(preferred))
    second = builds.build(["beta"])

    locks = [json.loads(path.read_text()) for path in (builds.root / "locks").glob("*.json")]
    assert str(unfit) not in {lock["python"] for lock in locks}
    assert str(preferred) in {lock["python"] for lock in locks}
    assert [version_in(first, "alpha"), version_in(second, "beta")] == ["1.0", "1.0"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_named_nothing_is_left_and_the_next_try_works(
    wheels: Path, settings: Path, small_disk: Path
) -> None:
    builds = Builds(small_disk / "root")
    make_wheel(wheels, "big", size=8 << 20)

    with pytest.raises(EnvironmentBuildError) as caught:
        builds.build(["big"])

    assert f"{builds.root} is on the file system {small_disk}" in str(caught.value)
    assert "free" in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert builds.left() == []
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert version_in(builds.build(["big"]), "big") == "1.0"


def test_a_disk_without_room_for_the_first_file_is_named_too(settings: Path, small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=4k"], capture_output=True, timeout=30)
    assert shutil.disk_usage(small_disk).free == 0

    with pytest.raises(EnvironmentBuildError, match=f"is on the file system {small_disk}"):
        Builds(small_disk / "root").build(["alpha"])

    ballast.unlink()
    assert version_in(Builds(small_disk / "root").build(["alpha"]), "alpha") == "1.0"


# ---------------------------------------------------------------- keeping house


def use(builds: Builds, environment: Environment, seconds_ago: float) -> None:
    """Pretend that an environment was last used some time ago."""
    builds.cache.touch(environment)
    moment = time.time() - seconds_ago
    os.utime(environment.path / ".complete", (moment, moment))


def test_environments_are_listed_with_what_they_take(builds: Builds, wheels: Path) -> None:
    make_wheel(wheels, "big", size=1 << 20)
    old, new = builds.build(["alpha"]), builds.build(["big", "beta"])
    use(builds, old, 100)
    (builds.root / "environments" / ("0" * 16)).mkdir()
    os.utime(builds.root / "environments" / ("0" * 16), (1, 1))

    first, second, third = builds.cache.infos()

    assert [first["name"], second["name"], third["name"]] == [new.name, old.name, "0" * 16]
    assert (first["packages"], second["packages"]) == (3, 1)
    assert first["python"].startswith(f"{PYTHON}.")
    assert first["bytes"] >= second["bytes"] + (1 << 20)
    assert first["last_used"] > second["last_used"]
    assert [info["complete"] for info in (first, second, third)] == [True, True, False]
    assert json.loads(json.dumps(first)) == first


def test_an_empty_host_has_no_environments(tmp_path: Path) -> None:
    cache = EnvironmentCache(tmp_path / "none", no_uv)

    assert cache.infos() == []
    assert cache.prune(0, set()) == []


def test_the_longest_unused_go_first_and_only_as_many_as_needed(builds: Builds, wheels: Path) -> None:
    made = []
    for age, name in ((300, "one"), (100, "two"), (200, "three")):
        make_wheel(wheels, name, size=1 << 20)
        made.append(builds.build([name]))
        use(builds, made[-1], age)
    one, two, three = made

    removed = builds.cache.prune(3 << 20, set())

    assert removed == [one.name]
    assert set(builds.left()) == {two.name, three.name}
    assert builds.cache.prune(0, {three.name}) == [two.name]
    assert builds.cache.find(EnvironmentSpec(PYTHON, [["three"]])) == three
    assert builds.cache.find(EnvironmentSpec(PYTHON, [["two"]])) is None


def test_files_that_environments_share_count_once(builds: Builds, wheels: Path) -> None:
    """They are links to the same file, and removing one of them frees nothing."""
    make_wheel(wheels, "big", size=4 << 20)
    builds.build(["big"])
    builds.build(["big", "alpha"])

    assert builds.cache.prune(6 << 20, set()) == []


def test_an_environment_that_runs_a_process_stays(builds: Builds) -> None:
    """Agents of other versions share the folder; their workers must not lose their modules."""
    environment = builds.build(["alpha"])
    with subprocess.Popen([str(environment.python), "-c", "input()"], stdin=subprocess.PIPE) as process:
        until(lambda: str(environment.path).encode() in Path(f"/proc/{process.pid}/cmdline").read_bytes())

        assert builds.cache.prune(0, set()) == []
        process.communicate(b"\n")

    assert builds.cache.prune(0, set()) == [environment.name]


def test_what_dead_builders_left_is_removed_and_what_is_being_built_stays(
    builds: Builds, tmp_path: Path, gate: Path
) -> None:
    kept = builds.build(["alpha"])
    dead = builds.root / "environments" / ("0" * 16)
    dead.mkdir()
    (builds.root / "environments" / ".removing-x").mkdir()
    gate.touch()
    line = slow_project(tmp_path / "own", gate)
    alive = builds.build([line])
    shutil.rmtree(alive.path)
    shutil.rmtree(Path(os.environ["UV_CACHE_DIR"]))
    gate.unlink()

    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(builds.build, [line])
        until(lambda: alive.path.exists())
        assert builds.cache.prune(1 << 40, set()) == []
        assert set(builds.left()) == {kept.name, alive.name}
        gate.touch()
        assert future.result(60) == alive


def test_a_use_is_noted(builds: Builds) -> None:
    environment = builds.build(["alpha"])
    use(builds, environment, 1000)
    (before,) = builds.cache.infos()

    builds.cache.touch(environment)

    (after,) = builds.cache.infos()
    assert after["last_used"] > before["last_used"] + 900


def test_the_use_of_what_was_removed_meanwhile_is_no_error(builds: Builds) -> None:
    environment = builds.build(["alpha"])
    builds.cache.prune(0, set())

    builds.cache.touch(environment)

    assert builds.left() == []


def test_folders_are_the_users_alone(builds: Builds) -> None:
    builds.build(["alpha"])

    for name in ("environments", "locks"):
        assert (builds.root / name).stat().st_mode & 0o777 == 0o700
