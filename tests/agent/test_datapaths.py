"""Python code that says `/data/...`: what is translated, what is left alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fal_agent
from fal_agent.worker.datapaths import DataPaths


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data folder with something in it."""
    (tmp_path / "root" / "ours").mkdir(parents=True)
    (tmp_path / "root" / "ours" / "a.txt").write_text("a")
    return tmp_path / "root"


def paths(root: Path, *, own: bool) -> DataPaths:
    """The rule for a host with or without a folder of its own that is called as the data folder is."""
    prefix = root.parent / "data"
    if own:
        prefix.mkdir()
    return DataPaths(str(root), str(prefix))


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("{data}", "{root}"),
        ("{data}/", "{root}/"),
        ("{data}/x/y", "{root}/x/y"),
        ("{data}/x/../y", "{root}/x/../y"),
        ("{data}base", "{data}base"),
        ("{data}/../etc", "{data}/../etc"),
        ("{data}/..", "{data}/.."),
        ("x{data}", "x{data}"),
        ("", ""),
    ],
)
def test_exactly_the_data_folder_and_what_is_below_is_meant(root: Path, path: str, meant: str) -> None:
    rule = paths(root, own=False)
    names = {"data": str(root.parent / "data"), "root": str(root)}
    path, meant = path.format(**names), meant.format(**names)

    assert rule.translate(path) == meant
    assert rule.translate(path.encode()) == meant.encode()
    assert str(rule.translate(Path(path or "."))) == (str(Path(meant or ".")))


@pytest.mark.parametrize("value", [3, None, 1.5, ["/data"]])
def test_what_is_no_path_is_passed_on(root: Path, value: Any) -> None:
    assert paths(root, own=False).translate(value) is value


def test_on_a_host_with_its_own_folder_only_our_names_are_translated(root: Path) -> None:
    rule, data = paths(root, own=True), root.parent / "data"

    assert rule.translate(f"{data}/ours/new.txt") == f"{root}/ours/new.txt"
    assert rule.translate(f"{data}/theirs") == f"{data}/theirs"
    assert rule.translate(str(data)) == str(data)


def test_where_the_user_may_not_write_new_names_are_ours(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda _path, mode: mode == os.X_OK)
    rule, data = paths(root, own=True), root.parent / "data"
    (data / "theirs").touch()

    assert rule.translate(f"{data}/new") == f"{root}/new"
    assert rule.translate(f"{data}/theirs") == f"{data}/theirs"
    assert rule.translate(f"{data}/ours") == f"{root}/ours"
    assert rule.translate(str(data)) == str(data)


def test_a_folder_that_the_user_may_not_enter_is_none(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    rule, data = paths(root, own=True), root.parent / "data"

    assert rule.translate(f"{data}/x") == f"{root}/x"
    assert rule.translate(str(data)) == str(root)


def test_nothing_is_needed_where_the_host_leads_there_by_itself(root: Path) -> None:
    (root.parent / "data").symlink_to(root)

    assert not DataPaths(str(root), str(root.parent / "data")).is_needed


SCRIPT = """
import json, os, sys, pickle
import lzma, bz2, pathlib, shutil, glob, tempfile, zipfile
from fal_agent.worker import datapaths
datapaths.install(sys.argv[2], sys.argv[1])
data = sys.argv[1]
from pathlib import Path
"""


def runs(python: str) -> bool:
    """Whether this is a Python; what a version manager puts on PATH may be none."""
    return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0


@pytest.fixture(params=["this", "3.9", "3.10", "3.11", "3.12", "3.13", "3.14"])
def python(request: pytest.FixtureRequest) -> str:
    """Each Python that is here: they keep the functions in different places."""
    if request.param == "this":
        return sys.executable
    kept = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{request.param}.*/bin/python"))
    found = str(kept[-1]) if kept else shutil.which(f"python{request.param}")
    if found is None or not runs(found):
        pytest.skip(f"there is no Python {request.param}")
    return found


def run(root: Path, code: str, python: str = sys.executable) -> Any:
    """Run code in a process where the functions are wrapped; `data` is what stands for the folder."""
    sources = (
        [str(Path(fal_agent.__file__).parents[1])] if python != sys.executable else filter(None, sys.path)
    )
    done = subprocess.run(
        [python, "-c", SCRIPT + code, "/data-of-the-tests", str(root)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sources)},
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_ways_of_python_to_read_and_write_files_get_there(root: Path, python: str) -> None:
    seen = run(
        root,
        """
with open(f"{data}/w.txt", "w") as file: file.write("w")
Path(data, "p.txt").write_text("p")
Path(data, "d", "e").mkdir(parents=True)
os.makedirs(f"{data}/m/n")
fd = os.open(f"{data}/o.bin", os.O_CREAT | os.O_WRONLY); os.write(fd, b"o"); os.close(fd)
shutil.copy2(f"{data}/ours/a.txt", f"{data}/d/copied.txt")
os.replace(f"{data}/w.txt", f"{data}/r.txt")
with lzma.open(f"{data}/l.xz", "wb") as file: file.write(b"l")
with bz2.open(f"{data}/b.bz2", "wb") as file: file.write(b"b")
with zipfile.ZipFile(f"{data}/z.zip", "w") as file: file.writestr("x", "y")
os.symlink("a.txt", f"{data}/ours/link")
shutil.rmtree(f"{data}/m")
os.chdir(f"{data}/ours")
print(json.dumps([
    sorted(os.listdir(data)),
    sorted(os.path.join(folder, name) for folder, _, files in os.walk(data) for name in files),
    sorted(glob.glob(f"{data}/**/*.txt", recursive=True)),
    sorted(str(path.relative_to(data)) for path in Path(data).rglob("*")),
    [entry.path for entry in os.scandir(f"{data}/d") if entry.is_file()],
    Path(f"{data}/ours/a.txt").exists(), os.path.isfile(f"{data}/ours/a.txt"),
    os.path.getsize(f"{data}/ours/a.txt"), os.readlink(f"{data}/ours/link"), open("a.txt").read(),
    os.access(f"{data}/ours", os.R_OK), os.path.exists(f"{data}/absent"),
]))
""",
        python,
    )

    names = ["b.bz2", "d", "l.xz", "o.bin", "ours", "p.txt", "r.txt", "z.zip"]
    data = "/data-of-the-tests"
    files = ["b.bz2", "d/copied.txt", "l.xz", "o.bin", "ours/a.txt", "ours/link", "p.txt", "r.txt", "z.zip"]
    texts = [f"{data}/{name}" for name in ("d/copied.txt", "ours/a.txt", "p.txt", "r.txt")]
    everything = sorted([*files, "d", "d/e", "ours"])
    assert seen == [
        names, [f"{data}/{name}" for name in files], texts, everything, [f"{data}/d/copied.txt"],
        True, True, 1, "a.txt", "a", True, False,
    ]  # fmt: skip
    assert (root / "p.txt").read_text() == "p"
    assert not Path(data).exists()


def test_numpy_and_pandas_get_there(root: Path) -> None:
    pytest.importorskip("pandas")
    seen = run(
        root,
        """
import numpy, pandas
numpy.save(f"{data}/n.npy", numpy.arange(3))
pandas.DataFrame({"x": [1, 2]}).to_csv(f"{data}/p.csv", index=False)
numpy.arange(4, dtype="u1").tofile(f"{data}/raw")
print(json.dumps([numpy.load(f"{data}/n.npy").tolist(), pandas.read_csv(f"{data}/p.csv")["x"].tolist(),
    numpy.load(f"{data}/n.npy", mmap_mode="r").tolist(), numpy.fromfile(f"{data}/raw", dtype="u1").tolist()]))
""",
    )

    assert seen == [[0, 1, 2], [1, 2], [0, 1, 2], [0, 1, 2, 3]]


def test_modules_there_can_be_imported(root: Path) -> None:
    (root / "ours" / "fal_tests_there.py").write_text("VALUE = 7\n")

    assert run(root, 'sys.path.insert(0, f"{data}/ours"); import fal_tests_there as m; print(m.VALUE)') == 7


def test_functions_keep_their_names_and_can_be_pickled(root: Path) -> None:
    seen = run(
        root,
        """
import posix, io, inspect
print(json.dumps([os.stat.__name__, pickle.loads(pickle.dumps(os.stat)) is os.stat,
    pickle.loads(pickle.dumps(open)) is open, posix.listdir is os.listdir, io.open is open,
    os.stat in os.supports_follow_symlinks, os.open in os.supports_dir_fd,
    "follow_symlinks" in inspect.signature(os.stat).parameters]))
""",
    )

    assert seen == ["stat", *[True] * 7]


def test_a_function_that_does_not_know_about_paths_is_left_alone(root: Path) -> None:
    assert run(root, "print(json.dumps([os.getcwd.__class__.__name__, os.close(os.dup(1))]))") == [
        "builtin_function_or_method",
        None,
    ]
