"""The requirements of what a cell imports: what is here at its version, and never what is the user's own."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING

import pytest

from fal_notebook.environment import environment_spec
from fal_notebook.inference import infer_requirements

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to install distributions into."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(site: Path, name: str, release: str, *files: str, origin: object = None) -> None:
    about = site / f"{name.replace('-', '_')}-{release}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")
    (about / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    if origin is not None:
        (about / "direct_url.json").write_text(json.dumps(origin))
    for file in files:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).touch()


def test_what_is_installed_is_asked_for_at_its_version_and_once() -> None:
    assert infer_requirements(["pytest", "_pytest.fixtures", "packaging.version"]) == [
        f"packaging=={version('packaging')}",
        f"pytest=={version('pytest')}",
    ]


def test_modules_named_unlike_their_project_are_found(site: Path) -> None:
    install(site, "Some-Project", "1.2", "othername/__init__.py")

    assert infer_requirements(["othername.deep"]) == ["Some-Project==1.2"]


def test_what_needs_no_installing_is_left_out() -> None:
    modules = ["os", "xml.etree", "sys", "__future__", "__main__", "fal_notebook", "fal_agent.wire"]

    assert infer_requirements(modules) == []


def test_the_users_own_modules_are_left_out_wherever_they_lie(site: Path) -> None:
    """A stranger may own that name on the index: to install it would run the stranger's code."""
    (site / "my_secret_project.py").touch()
    (site / "my_package").mkdir()

    assert infer_requirements(["my_secret_project", "my_package.module"]) == []


def test_what_was_installed_from_a_folder_of_the_users_is_left_out(site: Path) -> None:
    origin = {"url": "file:///home/me/mine", "dir_info": {"editable": True}}
    install(site, "mine", "0.1", "mine.py", origin=origin)

    assert infer_requirements(["mine"]) == []


def test_what_came_from_a_repository_is_asked_for_at_its_commit(site: Path) -> None:
    origin = {
        "url": "https://example.org/theirs",
        "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"},
        "subdirectory": "python",
    }
    install(site, "theirs", "0.1", "theirs.py", origin=origin)

    lines = infer_requirements(["theirs"])

    assert lines == ["theirs @ git+https://example.org/theirs@0123456789abcdef#subdirectory=python"]
    assert lines[0] in environment_spec(lines).layers[0]


def test_what_came_from_an_address_is_asked_for_there(site: Path) -> None:
    origin = {"url": "https://example.org/w-1.0-py3-none-any.whl", "archive_info": {}}
    install(site, "w", "1.0", "w.py", origin=origin)

    assert infer_requirements(["w"]) == ["w @ https://example.org/w-1.0-py3-none-any.whl"]


def test_local_versions_are_cut_off(site: Path) -> None:
    """An index has "2.1.0"; "2.1.0+cpu" is only where this one came from."""
    install(site, "framework", "2.1.0+cpu", "framework/__init__.py")

    assert infer_requirements(["framework"]) == ["framework==2.1.0"]


def test_of_projects_that_share_a_namespace_the_right_one_is_taken(site: Path) -> None:
    install(site, "space-one", "1.0", "space/one/__init__.py")
    install(site, "space-two", "2.0", "space/two/__init__.py", "space/two/deep.py")

    assert infer_requirements(["space.two.deep"]) == ["space-two==2.0"]
    assert infer_requirements(["space.one"]) == ["space-one==1.0"]
    assert infer_requirements(["space"]) == ["space-one==1.0", "space-two==2.0"]


def test_of_projects_that_hold_the_same_module_one_is_taken(site: Path) -> None:
    for name in ("vision-headless", "vision"):
        install(site, name, "1.0", "vision/__init__.py")

    assert len(infer_requirements(["vision"])) == 1


@pytest.mark.parametrize(
    ("module", "project"),
    [
        ("not_installed_here.sub", "not-installed-here"),
        ("fitz", "pymupdf"),
        ("google.cloud.nothing_here", "google-cloud-nothing-here"),
        ("google.nothing", "google-nothing"),
        ("MySQLdb.cursors", "mysqlclient"),
    ],
)
def test_what_is_not_installed_here_goes_by_its_usual_name(module: str, project: str) -> None:
    assert infer_requirements([module]) == [project]


def test_what_is_installed_later_is_seen(site: Path) -> None:
    """A person installs something and runs the cell again, in the same kernel."""
    assert infer_requirements(["later"]) == ["later"]

    install(site, "later-project", "1.0", "later.py")
    sys.modules.pop("later", None)

    assert infer_requirements(["later"]) == ["later-project==1.0"]


def test_the_result_is_sorted_and_valid() -> None:
    lines = infer_requirements(["pytest", "numpy.linalg", "absent_thing", "IPython"])

    assert [line.lower() for line in lines] == sorted(line.lower() for line in lines)
    assert environment_spec(lines)
