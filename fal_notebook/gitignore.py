"""Which files of a folder `.gitignore` files leave out, as git would say.

Runs in the notebook; the only file that uses pathspec. A folder's own `.gitignore` holds for what is
below it and overrules those above. What lies in an ignored folder cannot be taken back in, so whoever
walks a folder must not enter those.
"""

from __future__ import annotations

import os
import posixpath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathspec import RegexPattern

__all__ = ["IgnoreRules"]

_NAME = ".gitignore"
_SLASH = "ps_d"


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
            # As git does, a link is not followed.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if not os.path.isfile(path) or os.path.islink(path):  # noqa: PTH113, PTH114
                return self
            raise error from None
        with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
            if not os.path.isfile(path):  # noqa: PTH113 - a folder or a pipe of that name
                return self
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
    from pathspec import GitIgnoreSpec

    patterns: list[RegexPattern] = []
    for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        text = line.removesuffix(b"\r").decode("latin-1")
        try:
            patterns += GitIgnoreSpec.from_lines([text], backend="simple").patterns
        except ValueError:  # git takes it as a pattern that nothing matches
            continue
    return [pattern for pattern in patterns if pattern.include is not None]


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
