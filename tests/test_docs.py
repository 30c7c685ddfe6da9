"""The documents tell the truth about what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def project() -> dict[str, object]:
    """The `[project]` table of pyproject.toml."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    table: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def make_targets() -> list[str]:
    """The targets that `make help` lists."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """The names that headings of a Markdown file can be linked by."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_within_the_repository_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)

    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path) if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)

    assert not broken


@pytest.mark.parametrize("target", make_targets())
def test_every_make_target_is_explained(target: str) -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

    assert re.search(rf"`(make )?{target}\b", README)
    assert target == "help" or f"`make {target}`" in contributing


def test_the_readme_names_only_make_targets_that_exist() -> None:
    named = set(re.findall(r"(?:^\$ |`)make ([a-z-]+)", README, re.MULTILINE))

    assert named <= set(make_targets())


def test_the_newest_version_of_the_changelog_is_the_projects() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\d+\.\d+\.\d+)", changelog, re.MULTILINE)

    assert newest is not None
    assert newest[1] == project()["version"]


def test_the_readme_names_every_public_name() -> None:
    import fal_notebook

    missing = [name for name in fal_notebook.__all__ if not re.search(rf"\bfal\.{name}\b", README)]

    assert not missing


def test_the_readme_uses_only_public_names() -> None:
    import fal_notebook

    used = set(re.findall(r"\bfal\.([A-Za-z_]+)\b", README)) - {"ai"}

    assert used <= set(fal_notebook.__all__)


def test_the_readme_names_every_option_of_the_cell_magic() -> None:
    from fal_notebook.magics.options import cell_parser

    named = set(re.findall(r"`(--?[a-z][a-z-]*)", README))
    spellings = [set(action.option_strings) for action in cell_parser()._actions]

    assert [options for options in spellings if not options & named] == []


def test_the_readme_names_every_command() -> None:
    """Those of the terminal and those of the notebook, as the programs know them."""
    from fal_notebook.cli import app
    from fal_notebook.magics.line import COMMANDS
    from fal_notebook.magics.names import NAME_COMMANDS

    rows = dict(re.findall(r"^\| \*\*(.+?)\*\* \| (.+) \|$", README, re.MULTILINE))
    commands = {item.name or getattr(item.callback, "__name__", "") for item in app.registered_commands}

    assert set(re.findall(r"`(?:fal-notebook )?([a-z]+)`", rows["Command line"])) == commands
    assert set(re.findall(r"`(?:%fal )?([a-z]+)`", rows["Line magic"])) == {*COMMANDS, *NAME_COMMANDS}
