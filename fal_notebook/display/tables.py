"""A small table that reads well in a terminal and in a saved notebook.

Runs in the notebook.
"""

from __future__ import annotations

import html
import time

__all__ = ["Table", "ago"]


def ago(moment: float) -> str:
    """Say how long ago a moment is, given in seconds since the Unix epoch."""
    seconds = max(0.0, time.time() - moment)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


class Table:
    """Rows of text under a heading.

    Args:
        heading: one word per column.
        rows: as many cells each.
    """

    def __init__(self, heading: list[str], rows: list[list[str]]) -> None:
        self.heading, self.rows = heading, rows

    def __repr__(self) -> str:
        lines = [self.heading, *self.rows] if any(self.heading) else self.rows
        if not self.rows:
            return "  ".join(self.heading) + "\n(none)"
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.heading))]
        padded = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
        ]
        return "\n".join(line.rstrip() for line in padded)

    def _repr_html_(self) -> str:
        return self.html()

    def html(self) -> str:
        """The table as HTML; local addresses are links."""
        head = "".join(f"<th style='text-align:left'>{html.escape(word)}</th>" for word in self.heading)
        body = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{_cell_html(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        top = f"<thead><tr>{head}</tr></thead>" if any(self.heading) else ""
        return f"<table>{top}<tbody>{body or '<tr><td>(none)</td></tr>'}</tbody></table>"


def _cell_html(cell: str) -> str:
    text = html.escape(cell)
    if cell.startswith("http://127.0.0.1:"):
        return f'<a href="{text}" target="_blank" rel="noopener noreferrer">{text}</a>'
    return text
