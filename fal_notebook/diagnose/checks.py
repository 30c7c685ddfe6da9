"""One step of an examination, and how it reads.

Runs in the notebook.
"""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Check", "Examination", "as_json", "as_text", "size_text"]

_TODO = {True: "better", False: "do this"}  # before what could be done, by whether calls can run without it


@dataclass(frozen=True)
class Check:
    """One step of an examination.

    Attributes:
        name: what was looked at, in a word or two.
        ok: whether calls can run as far as this goes.
        detail: what was found.
        fix: what to do about it, mostly a command to type; "" if there is nothing to do.
    """

    name: str
    ok: bool
    detail: str
    fix: str = ""

    @property
    def status(self) -> str:
        """What it comes to: "ok", "note" (calls can run, but something could be better) or "FAIL"."""
        return "FAIL" if not self.ok else "note" if self.fix else "ok"


class Examination:
    """All checks of a host, to be shown in a notebook."""

    def __init__(self, host_name: str, checks: list[Check]) -> None:
        self.host_name, self.checks = host_name, checks

    @property
    def ok(self) -> bool:
        """Whether calls can run there."""
        return all(check.ok for check in self.checks)

    def __repr__(self) -> str:
        return "\n".join(as_text(check) for check in self.checks)

    def _repr_html_(self) -> str:
        rows = "".join(_row(check) for check in self.checks)
        return f"<table style='border-collapse:collapse'><tbody>{rows}</tbody></table>"


def _row(check: Check) -> str:
    colour = {"ok": "#2e7d32", "note": "#b26a00", "FAIL": "#c62828"}[check.status]
    fix = ""
    if check.fix:
        fix = f"<div style='margin-top:2px'>{_TODO[check.ok]}: <code>{html.escape(check.fix)}</code></div>"
    cell = "style='text-align:left;vertical-align:top;white-space:pre-wrap;padding:1px 8px'"
    status = f"<b style='color:{colour}'>{check.status}</b>"
    columns = (status, html.escape(check.name), html.escape(check.detail) + fix)
    return "<tr>" + "".join(f"<td {cell}>{column}</td>" for column in columns) + "</tr>"


def as_json(host_name: str, checks: list[Check]) -> dict[str, Any]:
    """Give an examination in the shape that `fal-notebook doctor --json` prints."""
    rows = [{**asdict(check), "status": check.status.lower()} for check in checks]
    return {"host": host_name, "ok": all(check.ok for check in checks), "checks": rows}


def as_text(check: Check) -> str:
    """Write a check for a terminal: one line, further ones below it, and what to do."""
    first, *rest = check.detail.splitlines() or [""]
    lines = [f"{check.status:4}  {check.name}: {first}", *(f"      {line}" for line in rest)]
    if check.fix:
        lines.append(f"      {_TODO[check.ok]}: {check.fix}")
    return "\n".join(lines)


def size_text(size: float) -> str:
    """A number of bytes for a person: "512 B", "1.5 GB"; units of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:  # noqa: PLR2004 - the step between units
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"  # noqa: PLR2004
        size /= 1000
    return f"{size:.1f} TB"
