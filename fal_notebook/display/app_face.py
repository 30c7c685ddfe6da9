"""What the card of an app says, as text and as HTML that stays readable in a saved notebook.

Runs in the notebook. Nothing here is live: no script, no widget. Whatever the app or its errors say is
text in the HTML too.
"""

from __future__ import annotations

import html
import textwrap
from dataclasses import dataclass

__all__ = ["AppFace", "hint_html"]


def _themed(name: str, theme: str, plain: str) -> str:
    """A CSS property in the theme's colour.

    Where JupyterLab does not trust a notebook it leaves out whatever refers to the theme: the plain
    colour stands alone before it, and can be read on white and on black.
    """
    return f"{name}:{plain}; {name}:var({theme}, {plain})"


_COLOURS = {
    "ready": _themed("color", "--jp-success-color1", "#2e9447"),
    "failed": _themed("color", "--jp-error-color1", "#d9534f"),
    "stopped": _themed("color", "--jp-ui-font-color2", "#808080"),
}
_BUSY = _themed("color", "--jp-warn-color1", "#c77700")
_MUTED = _themed("color", "--jp-ui-font-color2", "#808080")
_CARD = (
    f"border:1px solid #808080; {_themed('border-color', '--jp-border-color2', '#808080')}; "
    "border-radius:4px; padding:6px 10px; margin:2px 0; overflow-wrap:anywhere"
)
# Turned around, so that a box which is too small shows the end.
_LOG_BOX = (
    "display:flex; flex-direction:column-reverse; max-height:16em; overflow:auto; margin-top:6px; "
    "border-radius:2px; background:var(--jp-layout-color2, rgba(128,128,128,.1))"
)
_LOG = (
    "margin:0; padding:4px 8px; background:none; white-space:pre-wrap; overflow-wrap:anywhere; "
    "font-size:var(--jp-code-font-size, 13px)"
)
_PROBLEM = "margin-top:6px; border-left:3px solid #d9534f"
# A saved notebook may hold the view of a button whose kernel has gone. JupyterLab would say "Error
# displaying widget" there: it is hidden while there is no element in it, only text.
_STYLE = (
    "<style>.jp-OutputArea-child:has(.fal-app)+.jp-OutputArea-child>.jupyter-widgets:not(:has(*)),"
    ".jp-OutputArea-child:has(.fal-app)+.jp-OutputArea-child:has(.fal-nothing){display:none}</style>"
)


@dataclass(frozen=True)
class AppFace:
    """What is known of an app at one moment.

    Attributes:
        name: the app's name.
        host: the name of its host.
        state: "starting", "ready", "stopping", "stopped" or "failed".
        since: when it entered that state, as text.
        doing: what it does to get ready.
        runners: how many runners serve; None when that is not known.
        note: the last remark about its runners.
        url: its local URL.
        link: where a click leads.
        problem: why it failed.
        traceback: the lines of the user's code that led there, as text.
        lines: the end of its log.
        hint: how to stop it; empty where a button does that.
    """

    name: str
    host: str
    state: str
    since: str = ""
    doing: str = ""
    runners: int | None = None
    note: str = ""
    url: str = ""
    link: str = ""
    problem: str = ""
    traceback: str = ""
    lines: tuple[str, ...] = ()
    hint: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in ("stopped", "failed")

    def text(self) -> str:
        """The card as text."""
        head = f"{self.name} on {self.host}: {self.state}"
        said = [" ".join(filter(None, (head, self._aside()))), *self._body_text()]
        said += [f"  {line}" for line in self.lines]
        return "\n".join([*said, *([self.hint] if self.hint and not self.is_over else [])])

    def html(self) -> str:
        """The card as HTML."""
        log = _log_html(self.lines)
        if self.state == "stopped":
            inside = self._head_html()
            if log:
                inside = f'<details><summary style="cursor:pointer">{inside}</summary>{log}</details>'
        else:
            inside = f"{self._head_html()}{self._body_html()}{log}"
            if self.hint and not self.is_over:
                inside += f'<div style="margin-top:4px">{hint_html(self.hint)}</div>'
        return f'{_STYLE}<div class="fal-app" style="{_CARD}">{inside}</div>'

    def _aside(self) -> str:
        """What is said beside the state."""
        said = [f"{'at' if self.is_over else 'since'} {self.since}" if self.since else "", self.doing]
        if self.state == "ready" and self.runners != 1 and self.runners is not None:
            said.append(f"{self.runners} runners" if self.runners else "no runner now: a request starts one")
        return " · ".join(filter(None, said))

    def _body_text(self) -> list[str]:
        if self.state == "failed":
            return [*self.traceback.rstrip().splitlines(), self.problem]
        return [line for line in (self.url if not self.is_over else "", self.note) if line]

    def _head_html(self) -> str:
        colour = _COLOURS.get(self.state, _BUSY)
        aside = self._aside()
        return (
            f"<b>{html.escape(self.name)}</b> on {html.escape(self.host)} &nbsp;"
            f'<b style="{colour}; white-space:nowrap">● {html.escape(self.state)}</b>'
            + (f' <span style="{_MUTED}">{html.escape(aside)}</span>' if aside else "")
        )

    def _body_html(self) -> str:
        if self.state == "failed":
            told = f"{textwrap.dedent(self.traceback).rstrip()}\n{self.problem}".lstrip("\n")
            return f'<pre style="{_LOG}; {_PROBLEM}">{html.escape(told)}</pre>'
        note = f'<div style="{_MUTED}">{html.escape(self.note)}</div>' if self.note else ""
        return f"<div>{_link_html(self.link, self.url)}</div>{note}"


def hint_html(hint: str) -> str:
    """HTML of a hint below a card."""
    return f'<span style="{_MUTED}">{html.escape(hint)}</span>'


def _link_html(link: str, text: str) -> str:
    address = html.escape(link, quote=True)
    return f'<a href="{address}" target="_blank" rel="noopener noreferrer">{html.escape(text)}</a>'


def _log_html(lines: tuple[str, ...]) -> str:
    if not lines:
        return ""
    text = html.escape("\n".join(lines))
    return f'<div style="{_LOG_BOX}"><pre style="{_LOG}">{text}</pre></div>'
