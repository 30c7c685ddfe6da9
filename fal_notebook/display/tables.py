"""A small table that reads well in a terminal and in a saved notebook.

Runs in the notebook.
"""

from __future__ import annotations

import html

__all__ = ["Table"]


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
        head = "".join(f"<th style='text-align:left'>{html.escape(word)}</th>" for word in self.heading)
        body = "".join(
            "<tr>"
            + "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in row)
            + "</tr>"
            for row in self.rows
        )
        top = f"<thead><tr>{head}</tr></thead>" if any(self.heading) else ""
        return f"<table>{top}<tbody>{body or '<tr><td>(none)</td></tr>'}</tbody></table>"
