"""Which files of a folder are left out: rules in the style of gitignore.

Runs in the notebook, and is imported on workers: pathspec, which reads the patterns, is imported on
first use. The last rule that names a path, or a folder above it, decides; one that begins with "!" brings
files back, also from a folder that is left out.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

__all__ = ["DEFAULT_PATTERNS", "cleaned", "expressions", "is_ignored", "read_patterns"]

DEFAULT_PATTERNS = (
    *(".git", ".gitignore", ".dockerignore", "Dockerfile", "Dockerfile.*", "*.md", "__pycache__"),
    *("*.pyc", ".DS_Store", ".venv", "venv", ".env", "node_modules"),
)

# The parts of pathspec's expressions that need a change; the last takes an escaped character as one.
_PARTS = re.compile(
    r"(?P<name>\(\?P<\w+>)|\[(?P<negation>\^?)(?P<set>\]?[^\]]*)\]|(?P<end>\$)|\\.", re.DOTALL
)
_STARS = re.compile(r"(?<![^/])\*{3,}(?=/|\Z)")  # to git as many as two


def read_patterns(path: Path) -> list[str]:
    """Read a file of one pattern per line.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; it should hold ignore patterns, one per line")
    return cleaned(path.read_text(encoding="utf-8-sig", errors="replace").splitlines())


def cleaned(lines: Iterable[str]) -> list[str]:
    """Trim blanks; drop empty lines and comments."""
    trimmed = (line.strip() for line in lines)
    return [line for line in trimmed if line and not line.startswith("#")]


@lru_cache(maxsize=256)
def expressions(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Give the rules as regular expressions: a path is ignored if any of them is found in it.

    They are for relative POSIX paths of files. A folder may be asked for with "/" behind it; if one is
    found in that, nothing below it is wanted, so it need not be walked.

    Args:
        patterns: gitignore patterns; one that is malformed matches nothing, as in git.
    """
    rules = [rule for rule in map(_rule, patterns) if rule is not None]
    found = []
    for number, (body, ignores) in enumerate(rules):
        if not ignores:
            continue
        back = "|".join(later for later, also_ignores in rules[number + 1 :] if not also_ignores)
        # What may come back lies below folders that must be walked, so these do not match.
        guard = rf"(?!.*/\Z|{back})" if back else ""
        found.append(rf"(?s:\A{guard}{body})")
    return tuple(found)


def is_ignored(relative_path: str, patterns: Sequence[str]) -> bool:
    """Whether rules leave a file out; see `expressions`."""
    return any(re.search(expression, relative_path) for expression in expressions(tuple(patterns)))


def _rule(pattern: str) -> tuple[str, bool] | None:
    """What a pattern matches from the beginning of a path, and whether that is ignored."""
    from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

    if not pattern.removeprefix("!").strip("/"):  # names nothing, which pathspec knows of "/" alone
        return None
    try:
        expression, ignores = GitIgnoreSpecPattern.pattern_to_regex(_STARS.sub("**", pattern))
    except ValueError:
        return None
    if expression is None or ignores is None:
        return None
    body = _PARTS.sub(_adapted, expression)
    return (body[1:] if body.startswith("^") else f".*{body}"), ignores


def _adapted(part: re.Match[str]) -> str:
    if part["name"]:  # an expression made of several cannot have a name twice
        return "(?:"
    if part["end"]:
        return r"\Z"
    if part["set"] is None or part["set"] == "/":
        return part[0]
    return f"(?!/)[{part['negation']}{_set(part['set'])}]"  # in git no set matches "/"


def _set(written: str) -> str:
    """The characters of a set as `re` wants them; a range that runs backwards is its first character."""
    rest, found = written.replace("\\\\", "\\"), ""
    while rest:
        first, size = re.escape(rest[0]), 1
        if len(rest) > 2 and rest[1] == "-":  # noqa: PLR2004 - a range takes three
            first, size = (f"{first}-{re.escape(rest[2])}" if rest[0] <= rest[2] else first), 3
        found, rest = found + first, rest[size:]
    return found
