"""Find secrets in text, also where they are encoded or cut in two, and put `***` in their place.

Runs in workers, and in the notebook for the host that is the notebook itself. Without secrets nothing
here costs anything. What code does to a secret on purpose, such as printing it backwards, is not undone.
"""

from __future__ import annotations

import base64
import html
import json
import re
from typing import TYPE_CHECKING, Any, Optional
from urllib.parse import quote, quote_plus

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fal_agent.framing import Buffer

__all__ = ["MASK", "Masker", "Tail", "masker_of"]

MASK = "***"
_SHORTEST = 4  # characters; what is shorter stands in too much that is no secret
_SHORTEST_PIECE = 8  # of a line of a secret, or of what is left of one in base64
_KEPT = 256  # values; the oldest is let go when there are more
_SCANNED = 8 << 20  # bytes of one part of a pickle that are looked through


class Masker:
    """Knows some secrets, and what they look like encoded.

    Args:
        values: the secrets; those of less than four characters are left alone.
    """

    def __init__(self, values: Iterable[str]) -> None:
        self.values = [value for value in dict.fromkeys(values) if len(value) >= _SHORTEST][-_KEPT:]
        self._forms = sorted({form for value in self.values for form in _forms(value)}, key=len, reverse=True)
        self._pattern = re.compile(_alternatives(self._forms)) if self._forms else None
        self._bytes = [value.encode("utf-8", "surrogateescape") for value in self.values]

    def mask(self, text: str) -> str:
        """Give a text without the secrets."""
        if self._pattern is None or not text:
            return text
        return self._pattern.sub(MASK, text)

    def mask_all(self, value: Any) -> Any:
        """Give JSON-like data without the secrets, in keys too; what holds none is the same object."""
        if isinstance(value, str):
            return self.mask(value)
        if isinstance(value, dict):
            return {self.mask_all(key): self.mask_all(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.mask_all, value)) if type(value) in (list, tuple) else value
        return value

    def is_in(self, parts: Sequence[Buffer]) -> bool:
        """Whether a secret stands, as it is, in data; of a large part the first 8 MiB are looked at."""
        return any(
            value in (part if isinstance(part, bytes) and len(part) <= _SCANNED else bytes(part[:_SCANNED]))
            for part in parts
            for value in self._bytes
        )

    def boundary(self, text: str) -> int:
        """Give how many characters of a text can be masked and shown although more will follow."""
        shown = len(text) - self._unfinished(text)
        if shown < len(text) and self._pattern is not None:
            for found in self._pattern.finditer(text):
                if found.start() < shown < found.end():  # whole, and its end looks like another's beginning
                    shown = found.end()
        return shown

    def _unfinished(self, text: str) -> int:
        """How many characters at the end of a text may be the beginning of a secret."""
        longest = 0
        for form in self._forms:
            end = text[-(len(form) - 1) :]  # at least three characters
            at = end.find(form[0])
            while at >= 0 and len(end) - at > longest:
                if form.startswith(end[at:]):
                    longest = len(end) - at
                    break
                at = end.find(form[0], at + 1)
        return longest


class Tail:
    """Masks a text that comes in pieces: what may be the beginning of a secret waits for the next piece."""

    def __init__(self) -> None:
        self._held = ""

    def take(self, masker: Masker, text: str) -> str:
        """Give what of the text so far can be shown."""
        text = self._held + text
        shown = masker.boundary(text)
        self._held = text[shown:]
        return masker.mask(text[:shown])

    def end(self, masker: Masker) -> str:
        """Give what was held back: no more text comes."""
        held, self._held = self._held, ""
        return masker.mask(held)


def masker_of(known: Optional[Masker], variables: Mapping[str, str]) -> Optional[Masker]:
    """Give a masker that knows the values of some variables besides what `known` knows; None for nothing."""
    if not variables or (known is not None and set(variables.values()) <= set(known.values)):
        return known
    return Masker([*(known.values if known is not None else ()), *variables.values()])


def _forms(value: str) -> set[str]:
    """Give what a secret looks like where it is shown."""
    data = value.encode("utf-8", "surrogateescape")
    percent = {quote(data, safe=""), quote(data), quote_plus(data)}
    forms = {
        value,
        *percent,
        *(re.sub("%..", lambda match: match[0].lower(), form) for form in percent),
        *(json.dumps(value, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)),
        repr(value)[1:-1],
        repr(data)[2:-1],
        html.escape(value),
        html.escape(value, quote=False),
        data.hex(),
        data.hex().upper(),
        *(line for line in value.splitlines() if len(line) >= _SHORTEST_PIECE),
    }
    for shift in range(3):  # base64 of a text that it stands in looks so, by where it begins there
        encoded = base64.b64encode(b"\0" * shift + data)
        left, right = (0, 2, 3)[shift], (0, 3, 2)[(shift + len(data)) % 3]
        core = encoded[left : len(encoded) - right].decode()
        if len(core) >= _SHORTEST_PIECE:
            forms |= {core, core.translate(str.maketrans("+/", "-_"))}
    return {form for form in forms if len(form) >= _SHORTEST}


def _alternatives(forms: Sequence[str]) -> str:
    """Give a pattern of the forms, the longest first, grouped by their first character for speed."""
    groups: dict[str, list[str]] = {}
    for form in forms:
        groups.setdefault(form[0], []).append(re.escape(form[1:]))
    return "|".join(f"{re.escape(first)}(?:{'|'.join(rest)})" for first, rest in groups.items())
