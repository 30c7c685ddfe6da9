"""docs/security.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
DOCUMENT = (TESTS.parent / "docs" / "security.md").read_text(encoding="utf-8")


def test_every_test_that_the_document_names_is_there() -> None:
    named = re.findall(r"`((?:\w+/)?test_\w+\.py)(?:::(test_\w+))?`", DOCUMENT)
    assert len(named) > 20
    for file, test in named:
        source = (TESTS / file).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in source, f"{file}::{test}"


def test_tests_that_are_named_without_their_file_are_there() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))

    for test in re.findall(r"[` ](test_\w+)`", DOCUMENT):
        assert f"def {test}(" in sources, test
