"""`%pip install` and its kin in a cell: into the session alone, at once, without the loss of a name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.kernel import Kernel, working_kernel
from support.wheels import make_wheel

from fal_agent.installing import _Request

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("ipykernel")


@pytest.fixture(scope="module")
def kernel(own_folders: Path) -> Iterator[Kernel]:
    with working_kernel() as kernel:
        yield kernel


@pytest.fixture
def fresh(kernel: Kernel) -> Kernel:
    """The kernel, with a session in which nothing is installed."""
    kernel.run("%%fal --fresh\nimport sys")
    return kernel


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with packages that are on no index: `probe` in two versions, which needs `probe_base`."""
    folder = tmp_path_factory.mktemp("wheels")
    make_wheel(folder, "probe_base")
    for version in ("1.0", "2.0"):
        make_wheel(folder, "probe", version, requires=("probe_base",), command="say-probe")
    return folder


def test_what_a_cell_installs_can_be_imported_and_names_stay(fresh: Kernel, wheels: Path) -> None:
    fresh.run("%%fal\nkept = (n for n in range(3))\nnext(kept)")
    install = f"%pip install --no-index -f {wheels} probe==1.0"
    cell = fresh.run(f"%%fal\n{install}\nimport probe, probe_base\nprobe.VERSION")
    assert (cell.result, cell.error) == ("'1.0'", "")
    assert "+ probe==1.0" in cell.text
    assert fresh.run("%%fal\nnext(kept), probe.__file__.startswith(sys.prefix)").result == "(1, False)"
    again = fresh.run(f"%%fal\n!pip install --no-index --find-links {wheels} probe==1.0 probe_base")
    assert again.text.splitlines() == [
        "Requirement already satisfied: probe==1.0", "Requirement already satisfied: probe_base",
    ]  # fmt: skip


def test_every_way_of_calling_pip_leads_there(fresh: Kernel, wheels: Path) -> None:
    from_there = f"--no-index -f {wheels}"
    fresh.run(f"%%fal\n!{{sys.executable}} -m pip install -q --user {from_there} probe==1.0")
    assert "probe 1.0" in fresh.run("%%fal\n!say-probe").text
    fresh.run(f"%%fal\n%%bash\nuv pip install -U {from_there} probe")
    assert fresh.run("%%fal\n!python -c 'import probe; print(probe.VERSION)'").text.strip() == "2.0"
    assert "probe==2.0" in fresh.run("%%fal\n!pip3 freeze").text
    removed = fresh.run("%%fal\n!pip uninstall -y probe cloudpickle").text
    assert "- probe==2.0" in removed
    assert "cloudpickle is not of this session alone" in removed
    assert "ModuleNotFoundError" in fresh.run("%%fal\nimport probe").error


def test_a_package_that_cannot_be_had_is_told(fresh: Kernel, wheels: Path) -> None:
    cell = fresh.run(f"%%fal\n%pip install --no-index -f {wheels} no_such_probe")
    assert "no-such-probe was not found" in cell.text
    assert "in a session on a host there are pip install, " in fresh.run("%%fal\n!pip wheel probe").text


def test_a_session_whose_process_was_lost_starts_with_what_was_installed(fresh: Kernel, wheels: Path) -> None:
    wheel = next(wheels.glob("probe_base-*.whl"))
    fresh.run(f"%%fal\n%pip install 'probe_base @ {wheel.as_uri()}'")
    assert (
        "WorkerLostError" in fresh.run("%%fal\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)").error
    )
    cell = fresh.run("%%fal\nimport probe_base, sys\nprobe_base.__file__.startswith(sys.prefix)")
    assert (cell.result, cell.error) == ("True", "")
    assert "starts anew with probe_base" in cell.errors


def test_pip_options_are_translated_for_uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local.whl").touch()
    line = (
        "-qU a>=1 --pre --no-cache-dir --user --progress-bar off b -i https://i.example -r needs.txt "
        "-e project local.whl ./here[extra] git+https://g.example/c"
    )
    request = _Request(line.split())
    assert request.is_quiet
    assert request.options == [
        "--upgrade", "--prerelease=allow", "--no-cache", "--index-url", "https://i.example",
    ]  # fmt: skip
    assert request.lines == [
        "a>=1", "b", f"{tmp_path}/local.whl", f"{tmp_path}/here[extra]", "git+https://g.example/c",
    ]  # fmt: skip
    assert (request.files, request.editable) == ([f"{tmp_path}/needs.txt"], [f"{tmp_path}/project"])
