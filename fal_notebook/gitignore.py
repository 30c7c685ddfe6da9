"""Which files of a folder `.gitignore` files leave out, as git would say.

Runs in the notebook. pathspec reads the patterns. A folder's own `.gitignore` holds for what is
below it and overrules those above. What lies in an ignored folder cannot be taken back in, so whoever
walks a folder must not enter those.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pathspec import RegexPattern

__all__ = ["IgnoreRules"]

_NAME = ".gitignore"
_SLASH = "ps_d"
_CLASS = re.compile(r"\[:([a-z]+):\]")
_CLASSES = {
    "alnum": "a-zA-Z0-9",
    "alpha": "a-zA-Z",
    "blank": " \t",
    "cntrl": "\x00-\x1f\x7f",
    "digit": "0-9",
    "graph": '"-~!',
    "lower": "a-z",
    "print": " -~",
    "punct": ':-@#-/!"\\[-`{-~',
    "space": " \t\x0b-\r",
    "upper": "A-Z",
    "xdigit": "0-9a-fA-F",
}


class IgnoreRules:
    """The rules for what is directly in one folder.

    Args:
        rules: the folders, relative and POSIX ("" is the one that is walked), that have a
            `.gitignore`, each with its patterns; the innermost last.
    """

    def __init__(self, rules: tuple[tuple[str, list[RegexPattern]], ...] = ()) -> None:
        self._rules = rules

    def entering(self, relative: str, folder: str) -> IgnoreRules:
        """Give the rules for what is in a folder.

        Args:
            relative: the folder's path from the one that is walked, "" for that one itself.
            folder: where it is.

        Raises:
            OSError: its `.gitignore` cannot be read.
        """
        path = os.path.join(folder, _NAME)  # noqa: PTH118 - names need not be text
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return self
        if not stat.S_ISREG(status.st_mode):  # as git does, a link is not followed
            return self
        with open(path, "rb") as file:  # noqa: PTH123
            patterns = _parse(file.read())
        return IgnoreRules((*self._rules, (relative, patterns)))

    def ignores(self, relative: str, *, is_folder: bool) -> bool:
        """Whether something in the folder is left out.

        Args:
            relative: its path from the folder that is walked.
            is_folder: whether it is a folder; a link to one is none.
        """
        if posixpath.basename(relative) == ".git":
            return True
        for folder, patterns in reversed(self._rules):
            inner = relative[len(folder) + 1 :] if folder else relative
            subject = _bytes_as_text(os.fsencode(inner)) + ("/" if is_folder else "")
            for pattern in reversed(patterns):
                if _matches(pattern, subject):
                    return bool(pattern.include)
        return False


def _parse(content: bytes) -> list[RegexPattern]:
    patterns: list[RegexPattern] = []
    for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        text = _CLASS.sub(_expanded, line.removesuffix(b"\r").decode("latin-1"))
        if text.rstrip(" ").endswith("/**/"):  # every folder below; pathspec takes it as "/**"
            text = f"{text.rstrip(' ')}*/"
        try:
            patterns += _quietly_compiled(text) if "[" in text else _compiled(text)
        except ValueError:  # git takes it as a pattern that nothing matches
            continue
    return [pattern for pattern in patterns if pattern.include is not None]


def _compiled(line: str) -> Sequence[RegexPattern]:
    from pathspec import GitIgnoreSpec

    return GitIgnoreSpec.from_lines([line], backend="simple").patterns


def _quietly_compiled(line: str) -> Sequence[RegexPattern]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of `re`, about "[" in a set
        return _compiled(line)


def _expanded(found: re.Match[str]) -> str:
    """Write "[:digit:]" and its like, which pathspec does not know, as ranges."""
    return _CLASSES.get(found[1], found[0])


def _matches(pattern: RegexPattern, subject: str) -> bool:
    """Whether a pattern means this very file or folder, not merely one above it.

    pathspec's expressions also match what is below a folder, and call the slash after it "ps_d";
    without that name a slash at the end of the match wants something after it ("a/**" is not "a").
    """
    if pattern.regex is None:
        return False
    named = _SLASH in pattern.regex.groupindex
    for match in pattern.regex.finditer(subject):
        if named:
            if match[_SLASH] is None or match.end(_SLASH) == len(subject):
                return True
        elif not (match[0].endswith("/") and match.end() == len(subject)):
            return True
    return False


def _bytes_as_text(name: bytes) -> str:
    """Give each byte as a character: to git "?" is one byte. "." in an expression is no newline."""
    return name.decode("latin-1").replace("\n", "\ufffe")
