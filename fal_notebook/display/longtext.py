"""What a run prints, of which a cell shows the beginning and the end when it is much; a file has all of it.

Runs in the notebook. Text is shown as it is up to a bound: characters that a carriage return has
overwritten do not count, so that progress bars go on for ever. What comes after the bound goes to a file
(`logfiles`), and its end is kept to be shown.
"""

from __future__ import annotations

import html
import os
import re
from collections import deque
from typing import TYPE_CHECKING

from fal_notebook.display.logfiles import LogFile
from fal_notebook.display.logserver import address_of
from fal_notebook.display.phases import TextDecoder, size
from fal_notebook.display.publishing import MUTED

if TYPE_CHECKING:
    from fal_notebook.hosts.base import Received

__all__ = ["LIMIT", "LongText", "chosen_limit", "overwritten"]

LIMIT = (
    500_000  # characters that a cell shows as they come; FAL_NOTEBOOK_OUTPUT_LIMIT overrules it, 0: no bound
)
_PER_LINE = 50  # characters of the bound for each line: a browser minds lines as much
_TAIL_BYTES, _TAIL_LINES = 64 << 10, 1000
_RULED = f"{MUTED}; border-top:1px dashed #888; border-bottom:1px dashed #888"
_COLOUR = re.compile(r"\x1b\[[\d;]*m")


class LongText:
    """The text of one run.

    Args:
        label: what the run is of, for the file's name.
        limit: characters that are shown as they come; None for what the user chose, or `LIMIT`.

    Attributes:
        is_long: the bound was reached: nothing more is shown as it comes.
    """

    def __init__(self, label: str, limit: int | None = None) -> None:
        self._label, self._limit = label, chosen_limit() if limit is None else limit
        self._decode = TextDecoder()
        self._columns = {"stdout": 0, "stderr": 0}
        self.is_long = False
        self._begin()

    def _begin(self) -> None:
        self._raw = self._visible = self._lines = 0  # characters; lines
        self._columns = dict.fromkeys(self._columns, 0)
        self._before: list[bytes] = []  # what the file must have, should there be one
        self._file: LogFile | None = None
        self._address = ""
        self._tail: deque[bytes] = deque()
        self._tail_size = self._bytes_after = self._lines_after = 0  # that came after the beginning
        self._is_tail_cut = False

    def take(self, received: Received) -> str:
        """Take a log event; give what of it is to be shown now, after what was given before."""
        data = bytes(received.data[0])
        if self.is_long:
            self._take_more(data)
            return ""
        text = self._decode(received)
        if self._limit == 0:
            return text
        self._keep(data)
        self._raw += len(text)
        self._lines += text.count("\n")
        stream = getattr(received.event, "stream", "stdout")
        gone, self._columns[stream] = overwritten(text, self._columns[stream])
        self._visible += len(text) - gone
        if self._visible > self._limit or self._lines * _PER_LINE > self._limit:
            return self._cut(text)
        return text if self._raw <= self._limit else _last_states(text)

    def clear(self) -> None:
        """What was shown is gone: begin anew. The file, if there is one, stays."""
        if self._file is not None:
            self._file.close()
        self.is_long = False
        self._begin()

    def close(self) -> None:
        """The run is over."""
        if self._file is not None:
            self._file.close() if self.is_long else self._file.discard()

    # ------------------------------------------------------------ what is shown of the rest

    def rest_text(self) -> str:
        """The end, as text, with what was left out and where all of it is."""
        return f"… {self._remark()}\n{self._end(_TAIL_LINES)}".rstrip("\n")

    def rest_html(self, lines: int | None = None) -> str:
        """The same as HTML.

        Args:
            lines: of the end; None for as many as are kept.
        """
        remark = html.escape(self._remark())
        if self._file is not None and not self._file.problem:
            if not self._address:
                self._address = address_of(self._file.path)
            path = html.escape(str(self._file.path))
            if self._address:
                link = f'<a href="{self._address}" target="_blank" rel="noopener noreferrer">{path}</a>'
                remark = remark.replace(path, link)
        return (
            f'<div style="{_RULED}">fal · {remark}</div>'
            f'<pre style="margin:0; padding:0">{html.escape(self._end(lines or _TAIL_LINES))}</pre>'
        )

    def _remark(self) -> str:
        file = self._file
        if file is None:
            return ""
        file.flush()
        end = self._end(_TAIL_LINES)
        lines, count = self._lines_after - end.count("\n") - 1, self._bytes_after - len(end.encode())
        said = f"{max(0, lines):,} lines ({size(max(0, count))}) are not shown here"
        if not file.problem:
            return f"{said}; all of it: {file.path}"
        return f"{said}; {file.path} does not have all of it: {file.problem}"

    def _end(self, lines: int) -> str:
        data = b"".join(self._tail)
        if self._is_tail_cut or len(data) > _TAIL_BYTES:  # it would begin in the middle of a line
            data = data[-_TAIL_BYTES:]
            data = data.partition(b"\n")[2] or data
        text = data.decode("utf-8", "replace").removesuffix("\n").replace("\r\n", "\n")
        return "\n".join(map(_as_a_terminal_shows, text.split("\n")[-lines:]))

    # ------------------------------------------------------------ keeping it

    def _keep(self, data: bytes) -> None:
        """Have all that was printed, in memory until it is much."""
        if self._file is not None:
            self._file.write(data)
        else:
            self._before.append(data)
            if self._raw > self._limit:
                self._write_file()

    def _write_file(self) -> LogFile:
        if self._file is None:
            self._file = LogFile(self._label)
            for data in self._before:
                self._file.write(data)
            self._before.clear()
        return self._file

    def _cut(self, text: str) -> str:
        """The bound is reached within this text: give what is before it, up to the end of a line."""
        self.is_long = True
        self._write_file()
        keep = text[: max(0, len(text) - max(0, self._visible - self._limit))]
        lines = max(0, text.count("\n") - max(0, self._lines - self._limit // _PER_LINE))
        whole, sep, part = keep.rpartition("\n")
        ended = (whole + sep).split("\n")[:-1]
        keep = "".join(f"{line}\n" for line in ended[:lines]) or ("" if ended else part)
        self._add_to_tail(text[len(keep) :].encode("utf-8", "replace"))
        return keep

    def _take_more(self, data: bytes) -> None:
        self._write_file().write(data)
        self._add_to_tail(data)

    def _add_to_tail(self, data: bytes) -> None:
        self._lines_after += data.count(b"\n")
        self._bytes_after += len(data)
        self._tail.append(data)
        self._tail_size += len(data)
        while len(self._tail) > 1 and self._tail_size - len(self._tail[0]) >= _TAIL_BYTES:
            self._tail_size -= len(self._tail.popleft())
            self._is_tail_cut = True


def overwritten(text: str, column: int) -> tuple[int, int]:
    """Count the characters that carriage returns in a text overwrite, also of the line that it goes on.

    Args:
        text: any text.
        column: characters of that line before it.

    Returns:
        The characters, and those of the line that is unfinished now.
    """
    if "\r" not in text:
        after = text.rfind("\n")
        return 0, column + len(text) if after < 0 else len(text) - after - 1
    gone = 0
    for number, line in enumerate(text.split("\n")):
        if number:
            column = 0
        last = line.rfind("\r", 0, len(line.rstrip("\r")))
        if last >= 0:
            gone += column + last + 1
            column = 0
        column += len(line) - last - 1
    return gone, column


def _last_states(text: str) -> str:
    """Leave out what a carriage return overwrites at once, where no line is changed but by its last state."""
    return "\n".join(_last_state(line) if line.count("\r") > 1 else line for line in text.split("\n"))


def _last_state(line: str) -> str:
    first, *others = line.split("\r")
    end = "\r" if not others[-1] else ""
    plain = [_COLOUR.sub("", other) for other in others]
    if any("\x1b" in other for other in plain):  # it moves the cursor
        return line
    if any(other != bare for other, bare in zip(others, plain, strict=True)):
        return f"{first}\r{next((other for other in reversed(others) if other), '')}{end}"
    state = ""
    for other in others:
        state = other + state[len(other) :]
    return f"{first}\r{state}{end}"


def _as_a_terminal_shows(line: str) -> str:
    return _last_state(f"\r{line}").strip("\r") if "\r" in line else line


def chosen_limit() -> int:
    """Characters that a cell shows as they come; 0: all of them."""
    text = os.environ.get("FAL_NOTEBOOK_OUTPUT_LIMIT", "")
    return int(text) if text.isdecimal() else LIMIT
