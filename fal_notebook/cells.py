"""Read a cell: which names it takes from outside, which it makes, what it imports, its magics.

Runs in the notebook; no IPython here. Magics and shell lines are replaced by Python of the same
number of lines, so that a syntax error names the line of the cell. When it cannot be known whether
a name is read before the cell makes it, it counts as read: sending too much costs time, sending too
little breaks the cell.
"""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass
from keyword import iskeyword
from typing import TYPE_CHECKING

from fal_notebook.scopes import names_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["CellNames", "analyse"]

_PYTHON_MAGICS = frozenset({"time", "timeit", "prun", "memit", "mprun", "lprun", "capture", "pypy_time"})
_TEXT_MAGICS = frozenset(
    {
        "bash",
        "sh",
        "script",
        "system",
        "sx",
        "!",
        "html",
        "HTML",
        "javascript",
        "js",
        "latex",
        "markdown",
        "svg",
    }
    | {"writefile", "file", "perl", "ruby", "pypy", "python2", "cmd", "cython", "R", "sql", "fal"}
)
_TRANSPARENT = frozenset({"time", "capture"})  # cell magics whose body runs once, in the cell's namespace
_OPTIONS = re.compile(r"(?:-{1,2}[A-Za-z][\w-]*(?:[ =]?\d+)?\s+)*")
_ASSIGNED = re.compile(r"(?P<target>[^\W\d][^=#'\"]*?)\s*=\s*(?P<escaped>[%!].*)", re.DOTALL)
_HELP = re.compile(r"(?:\?{1,2}\s*(?P<before>[%\w.*]+)|(?P<after>(?!\d)[%\w*]+(?:\.\w+)*)\?{1,2})\s*;?")
_AUTOCALL = re.compile(r"[,;/](?P<name>[^\W\d]\w*)")
_AUTOMAGIC = re.compile(r"[^\W\d]\w*\s+[^=(\s]")
_EXPANDED = re.compile(r"\$\$|\$\{?(?P<dollar>[^\W\d]\w*)|\{(?P<braces>[^{}]*)\}")
_OUTPUT_OPTION = re.compile(r"--(?:out|err|proc)[ =]\s*([^\W\d]\w*)")


@dataclass(frozen=True)
class CellNames:
    """What a cell has to do with names.

    Attributes:
        reads: names that it takes from outside, built-in ones included.
        optional: those of `reads` that it needs only in some cases: read in a function's body, or
            after a branch, while the cell may bind them itself.
        binds: names that it may make or change at its top level.
        assured: those of `binds` that it is certain to bind if it runs to its end.
        deletes: names that it may delete.
        imports: modules that it imports, with their full names.
        magics: names of its line magics, "!" for shell lines, "?" for help.
        cell_magics: names of its cell magics, the outermost first.
    """

    reads: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    binds: frozenset[str] = frozenset()
    assured: frozenset[str] = frozenset()
    deletes: frozenset[str] = frozenset()
    imports: frozenset[str] = frozenset()
    magics: tuple[str, ...] = ()
    cell_magics: tuple[str, ...] = ()


def analyse(code: str) -> CellNames:
    """Find what a cell reads, binds and imports, without running it.

    Args:
        code: the cell's text: Python, with top-level `await`, IPython's magics and shell lines.

    Raises:
        SyntaxError: it is not Python; `lineno` counts the lines of `code` from 1.
    """
    cell_magics: list[str] = []
    magics: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever compiles the cell to run it warns
        body = _without_cell_magics(code, cell_magics)
        python = "".join(_python_lines(_undented(body), magics))
        names = names_of(python)
    return CellNames(
        reads=frozenset(names.reads),
        optional=frozenset(((names.uncertain | names.deferred) - names.certain) & names.binds),
        binds=frozenset(names.binds),
        assured=frozenset(names.assured if _TRANSPARENT.issuperset(cell_magics) else ()),
        deletes=frozenset(names.deletes),
        imports=frozenset(names.imports),
        magics=tuple(magics),
        cell_magics=tuple(cell_magics),
    )


def _without_cell_magics(code: str, cell_magics: list[str]) -> str:
    """Give a cell's Python on the same lines: nothing of a cell magic's body unless that is Python."""
    lines = code.splitlines(keepends=True)
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        if not line.startswith("%%"):
            break
        name, _, arguments = line[2:].strip().partition(" ")
        cell_magics.append(name)
        bound = _OUTPUT_OPTION.findall(arguments)
        if name == "capture":
            bound += [word for word in arguments.split() if word.isidentifier()]
        lines[index] = (
            "; ".join([_magic_as_python(name, arguments), *(f"{word} = None" for word in bound)]) + "\n"
        )
        if name in _PYTHON_MAGICS:
            continue
        rest = "".join(lines[index + 1 :])
        if name in _TEXT_MAGICS or not _parses(rest):
            return "".join(lines[: index + 1])
        break
    return "".join(lines)


def _undented(code: str) -> str:
    """Take away what is put before every line when code is pasted: indentation, or `>>>` prompts."""
    lines = code.splitlines(keepends=True)
    first = next((line for line in lines if line.strip()), "")
    if first.startswith(">>> "):
        return "".join(line[4:] if line.startswith((">>> ", "... ")) else "\n" for line in lines)
    indentation = first[: len(first) - len(first.lstrip())]
    if not indentation:
        return code
    return "".join(line[len(indentation) :] if line.startswith(indentation) else line for line in lines)


# ---------------------------------------------------------------- lines that are not Python


def _python_lines(code: str, magics: list[str]) -> Iterator[str]:
    """Give the code's lines, those that are not Python replaced by Python with the same names."""
    statements = list(_statements(code))
    for text, is_start in statements:
        replacement = _as_python(text, magics) if is_start else None
        if replacement is None and len(statements) == 1 and _AUTOMAGIC.match(text) and not _parses(text):
            name, _, arguments = text.strip().partition(" ")  # `cd data`: IPython's automagic
            magics.append(name)
            replacement = _magic_as_python(name, arguments)
        if replacement is None:
            yield text
        else:
            indentation = text[: len(text) - len(text.lstrip())]
            yield indentation + replacement + "\n" * text.count("\n")


def _as_python(text: str, magics: list[str]) -> str | None:
    """Python that stands for a line of IPython's own syntax; None when the line is Python."""
    line = re.sub(r"\\\r?\n", " ", text).strip()
    if help_line := _HELP.fullmatch(line):
        magics.append("?")
        name = (help_line["before"] or help_line["after"]).split(".")[0]
        return _tuple_of({name} if name.isidentifier() and not iskeyword(name) else ())
    if line.startswith(("%", "!")):
        return _escaped_as_python(line, magics)
    if call := _AUTOCALL.match(line):
        return _tuple_of([call["name"]])
    assigned = _ASSIGNED.fullmatch(line)
    if assigned is None or not _parses(f"{assigned['target']} = None"):
        return None
    return f"{assigned['target']} = {_tuple_of(_names_in(_escaped_as_python(assigned['escaped'], magics)))}"


def _escaped_as_python(line: str, magics: list[str]) -> str:
    if line.startswith("!"):
        magics.append("!")
        return _tuple_of(_expanded(line))
    name, _, arguments = line.lstrip("%").strip().partition(" ")
    magics.append(name)
    return _magic_as_python(name, arguments)


def _magic_as_python(name: str, arguments: str) -> str:
    """Python with the names of a magic's arguments: code for `%time f(x)`, else `{name}` and `$name`."""
    if name in _PYTHON_MAGICS and name != "capture":
        options = _OPTIONS.match(arguments)
        python = arguments[options.end() if options else 0 :].strip()
        if name == "time" and python and _parses(python):
            return python
        if python and _parses(python):  # it runs in a namespace of its own
            return _tuple_of(_names_in(python))
    return _tuple_of(_expanded(arguments))


def _expanded(text: str) -> set[str]:
    """The names in `$name`, `${name}` and `{expression}` of a shell line or a magic's arguments."""
    names: set[str] = set()
    for match in _EXPANDED.finditer(text):
        if match["dollar"] and not iskeyword(match["dollar"]):
            names.add(match["dollar"])
        elif match["braces"]:
            expression = match["braces"].partition("!")[0].strip()
            for candidate in (expression, expression.rpartition(":")[0].strip()):
                if candidate and _parses(candidate, mode="eval"):
                    names |= _names_in(candidate)
                    break
    return names


def _names_in(python: str) -> set[str]:
    return names_of(python).reads


def _tuple_of(names: Iterable[str]) -> str:
    return "(" + "".join(f"{name}, " for name in sorted(names)) + ")"


def _parses(code: str, mode: str = "exec") -> bool:
    try:
        ast.parse(code, mode=mode)
    except (SyntaxError, ValueError):  # ValueError: null bytes
        return False
    return True


# ---------------------------------------------------------------- where statements begin


def _statements(code: str) -> Iterator[tuple[str, bool]]:
    """Divide code into lines; say of each whether a statement begins there.

    A line of IPython's own syntax is given together with those that a backslash joins to it.
    """
    scanner = _Scanner()
    lines = code.splitlines(keepends=True)
    index = 0
    while index < len(lines):
        line, index = lines[index], index + 1
        is_start = scanner.is_between_statements
        if is_start and _is_foreign(line):
            while line.rstrip("\r\n").endswith("\\") and index < len(lines):
                line, index = line + lines[index], index + 1
        else:
            scanner.feed(line)
        yield line, is_start


def _is_foreign(line: str) -> bool:
    stripped = line.strip()
    return stripped.startswith(("%", "!", "?")) or _ASSIGNED.fullmatch(stripped) is not None


class _Scanner:
    """Follows brackets, strings and joined lines through code, to know where statements begin."""

    def __init__(self) -> None:
        self._quote: str | None = None
        self._depth = 0
        self._is_joined = False

    @property
    def is_between_statements(self) -> bool:
        """Whether the next line begins a statement."""
        return self._quote is None and self._depth == 0 and not self._is_joined

    def feed(self, line: str) -> None:
        """Read one more line."""
        text = line.rstrip("\r\n")
        self._is_joined = False
        position = 0
        step: Callable[[str, int], int]
        while position < len(text):
            step = self._in_string if self._quote else self._in_code
            position = step(text, position)
        if self._quote is not None and len(self._quote) == 1 and not self._is_joined:
            self._quote = (
                None  # a string that is not closed on its line: a syntax error, for the parser to tell
            )

    def _in_string(self, text: str, position: int) -> int:
        assert self._quote is not None
        if text[position] == "\\":
            self._is_joined = position + 1 == len(text)
            return position + 2
        if text.startswith(self._quote, position):
            position += len(self._quote)
            self._quote = None
            return position
        return position + 1

    def _in_code(self, text: str, position: int) -> int:
        character = text[position]
        if character == "#":
            return len(text)
        if character in "'\"":
            self._quote = character * 3 if text.startswith(character * 3, position) else character
            return position + len(self._quote)
        if character in "([{":
            self._depth += 1
        elif character in ")]}":
            self._depth = max(0, self._depth - 1)
        elif character == "\\":
            self._is_joined = position + 1 == len(text)
        return position + 1
