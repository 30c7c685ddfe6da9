"""Give the frames of a traceback that belong to the user, with their source lines.

Runs in workers and in the notebook. Our own frames and those of the machinery that leads to the
user's code are left out. Sources that only this machine has (cells of a session, files that are not
part of an installed library) go along whole while they fit, else the lines around.
"""

from __future__ import annotations

import functools
import itertools
import linecache
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from fal_agent import pickling

if TYPE_CHECKING:
    import types
    from collections.abc import Iterator, Sequence

__all__ = [
    "Sources",
    "format_frames",
    "is_library",
    "is_opening",
    "leave_to_debuggers",
    "user_frames",
    "user_steps",
]

_MAX_FRAMES = 64  # of one error; what is in the middle is left out
_MAX_SOURCE = 256 << 10  # characters of one file, and of all files of one failure
_AROUND = 4  # lines before and after, where the whole file does not travel
_MAX_FUNCTION = 200  # lines above, up to which they begin with the function

_OURS = str(Path(__file__).parent)
_OURS_TOO = str(Path(_OURS).with_name("fal_notebook"))
_STDLIB = str(Path(os.__file__).parent)
_MACHINERY = (
    *("runpy", "asyncio", "concurrent.futures", "threading", "contextlib"),
    *("IPython.core", "nest_asyncio", "starlette", "fastapi", "anyio", "uvloop"),
)


class Sources:
    """The files whose whole text travels with one failure.

    Attributes:
        texts: file name -> text.
    """

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self._left = _MAX_SOURCE

    def add(self, filename: str, namespace: dict[str, Any]) -> bool:
        """Take a file's text along if it should and can; whether it does."""
        if filename in self.texts:
            return True
        if is_library(filename):
            return False
        text = "".join(linecache.getlines(filename, namespace))
        if not text or len(text) > self._left:
            return False
        self.texts[filename] = text
        self._left -= len(text)
        return True


def user_frames(error: BaseException, sources: Sources, hide: Sequence[str]) -> list[dict[str, Any]]:
    """Give the frames of an error's traceback, outermost first.

    Args:
        error: with its traceback.
        sources: takes the files' texts.
        hide: folders whose frames are left out, besides our own.

    Returns:
        For each frame "filename", "lineno", "firstlineno" (of its function), "name", "line" (its
        source line, or None), "end_lineno", "colno" and "end_colno" (or None), and "around" ([number
        of the first line, text]) where the file itself does not travel. A frame after which others
        were left out has "skipped", their number.
    """
    steps = user_steps(error, hide)
    skipped = len(steps) - _MAX_FRAMES
    if skipped > 0:
        steps = steps[: _MAX_FRAMES // 2] + steps[-_MAX_FRAMES // 2 :]
    frames = [_describe(step, sources) for step in steps]
    if skipped > 0:
        frames[_MAX_FRAMES // 2 - 1]["skipped"] = skipped
    return frames


def user_steps(error: BaseException, hide: Sequence[str] = ()) -> list[types.TracebackType]:
    """Give the steps of an error's traceback that are the user's, outermost first."""
    return list(_walk(error.__traceback__, _ours(hide)))


def format_frames(frames: Sequence[dict[str, Any]]) -> str:
    """Write frames as Python writes them."""
    lines = []
    for frame in frames:
        lines.append(f'  File "{frame["filename"]}", line {frame["lineno"]}, in {frame["name"]}\n')
        if frame["line"]:
            lines.append(f"    {frame['line'].strip()}\n")
        if "skipped" in frame:
            lines.append(f"  ({frame['skipped']} more frames)\n")
    return "".join(lines)


@functools.lru_cache(maxsize=4096)
def is_library(filename: str) -> bool:
    """Whether a file belongs to an installed library or to Python itself."""
    parts = Path(filename).parts
    return "site-packages" in parts or "dist-packages" in parts or filename.startswith(_STDLIB + os.sep)


def is_opening(error: BaseException, hide: Sequence[str]) -> bool:
    """Whether an error came out of unpickling a call's data, before any of the user's code ran."""
    folders = _ours(hide)
    step = error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        if code is pickling.load.__code__:
            return True
        if not code.co_filename.startswith(folders):
            return False
        step = step.tb_next
    return False


def _ours(hide: Sequence[str]) -> tuple[str, ...]:
    return tuple(folder.rstrip(os.sep) + os.sep for folder in (_OURS, _OURS_TOO, *hide))


def _walk(step: Optional[types.TracebackType], folders: tuple[str, ...]) -> Iterator[types.TracebackType]:
    leading = True
    while step is not None:
        frame = step.tb_frame
        ours = frame.f_code.co_filename.startswith(folders)
        module = str(frame.f_globals.get("__name__", ""))
        machinery = leading and any(module == name or module.startswith(name + ".") for name in _MACHINERY)
        if not ours and not machinery:
            leading = False
            yield step
        step = step.tb_next


def _describe(step: types.TracebackType, sources: Sources) -> dict[str, Any]:
    frame = step.tb_frame
    code, lineno = frame.f_code, step.tb_lineno
    _, end_lineno, colno, end_colno = _position(code, step.tb_lasti)
    filename = code.co_filename
    line = linecache.getline(filename, lineno, frame.f_globals).rstrip("\n")
    described = {
        "filename": filename,
        "lineno": lineno,
        "firstlineno": min(code.co_firstlineno, lineno),
        "name": code.co_name,
        "line": line or None,
        "end_lineno": end_lineno,
        "colno": colno,
        "end_colno": end_colno,
    }
    if line and not sources.add(filename, frame.f_globals):
        begin = described["firstlineno"]
        first = begin if lineno - begin <= _MAX_FUNCTION else lineno - _AROUND
        around = linecache.getlines(filename, frame.f_globals)[first - 1 : lineno + _AROUND]
        described["around"] = [first, "".join(text[:400] for text in around)]
    return described


def _position(code: types.CodeType, instruction: int) -> Any:
    """Give (line, end line, column, end column) of an instruction; None for what is not known."""
    if instruction < 0 or not hasattr(code, "co_positions"):  # Python 3.11
        return None, None, None, None
    return next(itertools.islice(code.co_positions(), instruction // 2, None), (None,) * 4)


def leave_to_debuggers(error: BaseException) -> None:
    """Make an error the last one that was shown, which `%debug` and `pdb.pm()` look at."""
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
    if sys.version_info >= (3, 12):
        sys.last_exc = error
