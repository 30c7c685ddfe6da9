"""Read from a Dockerfile's text which files of its context it copies.

Runs in the notebook; standard library only. It looks at nothing but the text, and never raises: what
cannot be read is mentioned once on standard error, and the instructions after it are read all the same.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["copy_add_sources"]

_DIRECTIVE = re.compile(r"#\s*([a-z]+)\s*=\s*(\S.*?)\s*", re.IGNORECASE)
_INSTRUCTION = re.compile(r"([a-z]+)(?:\s+(.*))?", re.IGNORECASE | re.DOTALL)
_FLAG = re.compile(r"""--((?:"[^"]*"|'[^']*'|[^\s"'])*)(?:\s+|\Z)""")
_WORD = re.compile(r"""(?:\\.|"(?:\\.|[^"\\])*"|'[^']*'|[^\s"'\\])+""", re.DOTALL)
_PIECE = re.compile(r"""\\(.)|"((?:\\.|[^"\\])*)"|'([^']*)'""", re.DOTALL)
_HEREDOC = re.compile(r"\d*<<(-?)([^<]+)")
_GLOB = re.compile(r"\[[^\]\s,\"']+\]")  # how a shell pattern begins; else "[" begins a JSON list
_FROM_ELSEWHERE = re.compile(r"https?://|git://|ssh://|git\+ssh://|[\w.-]+@[\w.-]+:", re.IGNORECASE)
_WITH_HEREDOCS = ("RUN", "COPY", "ADD")


class _UnreadableError(ValueError):
    """The arguments of an instruction are not what they seem to be."""


@dataclass(frozen=True)
class _Instruction:
    """One instruction, its lines joined.

    Attributes:
        name: in capitals.
        arguments: all that follows the name.
        line: the number of its first line, from 1.
        escape: the character that escapes another.
    """

    name: str
    arguments: str
    line: int
    escape: str


def copy_add_sources(text: str) -> list[str]:
    """Give what COPY and ADD name as sources in the context, in order, repeats kept.

    A leading "/" is taken off, everything else is as it is written: patterns, "..", "$VAR". What comes
    from another stage or image, from the network, or from the text itself (heredocs) is left out.

    Args:
        text: the Dockerfile. Lines may end with CRLF, instructions may be indented.
    """
    found: list[str] = []
    for instruction in _instructions(text):
        if instruction.name in ("COPY", "ADD"):
            try:
                found += _sources(instruction)
            except _UnreadableError as error:
                sys.stderr.write(
                    f"Warning: line {instruction.line} of the Dockerfile, {instruction.name} "
                    f"{instruction.arguments[:100]}: {error}; its files are not sent along\n"
                )
    return found


# ---------------------------------------------------------------- lines


def _instructions(text: str) -> Iterator[_Instruction]:
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    escape = _escape_character(lines)
    continued = re.compile(rf"(?:(?<=[^{re.escape(escape)}])|^){re.escape(escape)}[ \t]*$")
    number = 0
    while number < len(lines):
        first, joined = number, ""
        while number < len(lines):
            line, number = lines[number], number + 1
            if not line.strip() or line.lstrip().startswith("#"):
                if joined:
                    continue  # neither ends an instruction that goes on
                break
            part = continued.sub("", line)
            joined += part
            if part == line:
                break
        match = _INSTRUCTION.fullmatch(joined.strip())
        if match:
            name, arguments = match[1].upper(), match[2] or ""
            number = _after_heredocs(lines, number, name, arguments)
            yield _Instruction(name, arguments, first + 1, escape)


def _escape_character(lines: list[str]) -> str:
    """What the directive `# escape=` says; directives stand above everything else."""
    for line in lines:
        match = _DIRECTIVE.fullmatch(line.strip())
        if not match:
            break
        if match[1].lower() == "escape" and match[2] == "`":
            return "`"
    return "\\"


def _after_heredocs(lines: list[str], number: int, name: str, arguments: str) -> int:
    """The line after the texts that an instruction brings along; they are not instructions."""
    if name == "ONBUILD":
        match = _INSTRUCTION.fullmatch(arguments)
        name, arguments = (match[1].upper(), match[2] or "") if match else ("", "")
    if name not in _WITH_HEREDOCS:
        return number
    for word in _WORD.finditer(arguments):
        heredoc = _HEREDOC.fullmatch(word[0])
        if heredoc:
            number = _after_heredoc(lines, number, _unquoted(heredoc[2]), tabs=bool(heredoc[1]))
    return number


def _after_heredoc(lines: list[str], number: int, end: str, *, tabs: bool) -> int:
    """The line after the one that ends a text; without an end it is none, and all that follows is read."""
    blanks = ("\t" if tabs else "", None)  # a Dockerfile that is indented as a whole has its ends indented
    for ignored in blanks:
        for place in range(number, len(lines)):
            line = lines[place]
            if (line.lstrip(ignored) if ignored != "" else line) == end:
                return place + 1
    return number


# ---------------------------------------------------------------- arguments


def _sources(instruction: _Instruction) -> list[str]:
    flags, rest = _flags(instruction.arguments)
    if instruction.name == "COPY" and any(flag.partition("=")[0].lower() == "from" for flag in flags):
        return []
    rest = rest.strip()
    if rest.startswith("[") and not _GLOB.match(rest):
        arguments = _json_list(rest)
    else:
        words = _words(rest, instruction.escape)
        arguments = [_unquoted(word, instruction.escape) for word in words if not _HEREDOC.fullmatch(word)]
        if len(words) > 1 and _HEREDOC.fullmatch(words[-1]):
            raise _UnreadableError("it has no destination")
    sources = arguments[:-1]
    if instruction.name == "ADD":
        sources = [source for source in sources if not _FROM_ELSEWHERE.match(source)]
    return [source.lstrip("/") or "." for source in sources]


def _flags(arguments: str) -> tuple[list[str], str]:
    """The flags before the arguments, without their dashes, and what follows them."""
    flags, place = [], 0
    while match := _FLAG.match(arguments, place):
        place = match.end()
        if not match[1]:  # a bare "--" ends the flags
            break
        flags.append(match[1])
    return flags, arguments[place:]


def _json_list(text: str) -> list[str]:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _UnreadableError("it is not a JSON list") from error
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise _UnreadableError("not every item of the list is a string")
    return items


def _words(text: str, escape: str) -> list[str]:
    """Split at blanks that are neither quoted nor escaped; quotes stay in the words."""
    pattern, place, words = _for_escape(_WORD, escape), 0, []
    while place < len(text):
        match = pattern.match(text, place)
        if match:
            words.append(match[0])
            place = match.end()
        elif text[place].isspace():
            place += 1
        else:
            what = "nothing follows the last escape" if text[place] == escape else "a quote is not closed"
            raise _UnreadableError(what)
    return words


def _unquoted(word: str, escape: str = "\\") -> str:
    def plain(piece: re.Match[str]) -> str:
        escaped, double, single = piece.groups()
        if double is not None:  # there an escape means something before a quote and itself only
            return re.sub(rf"{re.escape(escape)}([\"$`\\])", r"\1", double)
        return escaped if escaped is not None else single

    return _for_escape(_PIECE, escape).sub(plain, word)


def _for_escape(pattern: re.Pattern[str], escape: str) -> re.Pattern[str]:
    if escape == "\\":
        return pattern
    return re.compile(pattern.pattern.replace(r"\\", re.escape(escape)), pattern.flags)
