"""Tell requirement lines from everything that only looks like one.

Runs in the notebook and in the agent. A line that `check_line` accepts names one distribution (PEP
508) and nothing else: no option of an installer, no file to include, no second line, no environment
variable. Whoever hands lines to an installer checks them here first, wherever they come from.
"""

from __future__ import annotations

import re
from typing import Optional

from fal_agent.errors import RequirementError

__all__ = ["canonical_name", "check_line", "distribution_name", "local_path", "masked", "normalised"]

_MAX_LENGTH = 4096  # characters of one line
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_CLAUSE = r"(?:===|==|~=|!=|<=|>=|<|>)\s*[A-Za-z0-9.*+!_-]+"
_CLAUSES = rf"{_CLAUSE}(?:\s*,\s*{_CLAUSE})*"
_LINE = re.compile(
    rf"\s*(?P<name>{_NAME})\s*"
    rf"(?:\[\s*(?P<extras>(?:{_NAME}\s*,\s*)*{_NAME})?\s*\]\s*)?"
    rf"(?:@\s*(?P<url>[a-z+]+://\S+)|(?P<versions>{_CLAUSES})|\(\s*(?P<bracketed>{_CLAUSES})\s*\))?"
    r"\s*(?:;(?P<marker>[\w\s.'\"<>=!~()*+,-]+))?",
    re.ASCII,
)
_SCHEMES = ("https", "http", "file", "git+https", "git+http", "git+ssh", "git+file")
_ARCHIVE = re.compile(r"\.(?:whl|zip|tgz|tbz2?|txz|tlz|tar(?:\.[a-z0-9]+)?)$", re.IGNORECASE)
_PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")


def check_line(line: str) -> None:
    """Refuse what is not exactly one requirement.

    Args:
        line: PEP 508, such as "numpy>=2", "torch[opt]; python_version >= '3.10'",
            "mylib @ git+https://example.org/mylib@v1" or "mylib @ file:///opt/mylib.whl".

    Raises:
        RequirementError: the message names the line, what is wrong with it and what to do.
    """
    wrong = _what_is_wrong(line)
    if wrong is not None:
        raise RequirementError(f"requirement {masked(line)[:200]!r}: {wrong}")


def _what_is_wrong(line: str) -> Optional[str]:
    if not line.strip():
        return "the line is blank; leave it out"
    if len(line) > _MAX_LENGTH:
        return f"it is longer than {_MAX_LENGTH} characters"
    if any(not char.isprintable() for char in line):
        return "it holds a line break or another control character; give one requirement per line"
    if line.lstrip().startswith("-"):
        return _about_option(line.split(maxsplit=1)[0])
    if re.search(r"\s-", line):
        return "it holds an option of an installer; only the requirement itself can be given"
    if "${" in line:
        return "variables are not put in; write the value itself"
    if "\\" in line:
        return "it holds a backslash"
    match = _LINE.fullmatch(line)
    if match is None or _ARCHIVE.search(match["name"]):
        return _about_text(line.strip())
    return _about_url(match["url"]) if match["url"] else None


def _about_option(option: str) -> str:
    name = option.partition("=")[0]
    if name in ("-r", "--requirement"):
        return "files are not included from here; pass the file as a requirements file, or its lines"
    if name in ("-e", "--editable"):
        return "editable installs cannot travel; name the module in local_python_modules=[...] instead"
    if name in ("-i", "--index-url", "--extra-index-url", "--index", "--default-index", "-f", "--find-links"):
        return (
            "options cannot be given as requirements; set the index on the host, "
            "in its ~/.config/uv/uv.toml or as UV_INDEX"
        )
    return f"it starts with the option {name}; only requirements can be given"


def _about_text(text: str) -> str:
    scheme = text.partition("://")[0]
    if "://" in text and scheme.lower() in _SCHEMES:
        return "an address needs the name of what is there: 'NAME @ ADDRESS'"
    if text.startswith((".", "/", "~")) or _ARCHIVE.search(text):
        return "a file must be given as 'NAME @ file:///absolute/path', the path being the host's"
    return "it is not a requirement such as 'numpy>=2' (PEP 508)"


def _about_url(url: str) -> Optional[str]:
    scheme, _, rest = url.partition("://")
    if scheme not in _SCHEMES:
        return f"addresses start with {', '.join(f'{name}://' for name in _SCHEMES)}"
    if rest.rpartition("@")[2].startswith("-") or rest.startswith("-"):
        return "the name of a machine cannot start with a dash"
    if scheme == "file" and not rest.startswith("/"):
        return "a file's address is absolute, with three slashes: file:///path"
    return None


def canonical_name(name: str) -> str:
    """Give a distribution's name as indexes compare it: lower case, runs of `-_.` as one dash."""
    return re.sub(r"[-_.]+", "-", name).lower()


def distribution_name(line: str) -> str:
    """The canonical name of what a line asks for; "" when it is not a requirement."""
    match = _LINE.fullmatch(line)
    return canonical_name(match["name"]) if match else ""


def normalised(line: str) -> str:
    """Give a line such that two that differ only in spelling are the same text."""
    match = _LINE.fullmatch(line)
    if match is None:
        return line.strip()
    text = canonical_name(match["name"])
    if match["extras"]:
        text += (
            f"[{','.join(sorted({canonical_name(extra.strip()) for extra in match['extras'].split(',')}))}]"
        )
    versions = match["versions"] or match["bracketed"]
    if versions:
        text += ",".join(sorted("".join(versions.split()).split(",")))
    if match["url"]:
        text += f" @ {match['url']}"
    if match["marker"] and match["marker"].strip():
        text += f" ; {' '.join(match['marker'].split())}"
    return text


def local_path(line: str) -> Optional[str]:
    """The path of the file or folder that a line's `file://` address names, else None."""
    match = _LINE.fullmatch(line)
    url = match["url"] if match else None
    if not url or not url.startswith("file:///"):
        return None
    from urllib.parse import unquote

    return unquote(url[len("file://") :].partition("#")[0])


def masked(text: str) -> str:
    """Give a text with the user names and passwords of the addresses in it replaced by `***`."""
    return _PASSWORD.sub("***@", text)
