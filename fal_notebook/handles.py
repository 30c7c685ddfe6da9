"""Handles: names in the notebook for values that stayed on a host.

Runs in the notebook. A handle is what a cell leaves when its value is too large to come along, or
cannot be pickled. In cells of the same session its name means the value itself.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Handle"]


class Handle:
    """A value that stayed on a host.

    Attributes:
        host: name of the host.
        session: name of the session that holds the value.
        name: what the value is called there.
        type: its qualified type: "numpy.ndarray".
        size: bytes, where that is known; else None.
        shape: of an array or a table, else None.
        dtype: text, or None.
        device: where a tensor lives, or None.
        preview: its repr, shortened.
    """

    __slots__ = (
        "_fetch",
        "_html",
        "device",
        "dtype",
        "host",
        "name",
        "preview",
        "session",
        "shape",
        "size",
        "type",
        "version",
    )

    def __init__(
        self,
        host: str,
        session: str,
        name: str,
        *,
        version: str,
        described: dict[str, Any],
        fetch: Callable[[Handle], Any],
    ) -> None:
        shape = described.get("shape")
        self.host, self.session, self.name, self.version = host, session, name, version
        self.type = str(described.get("type", "object"))
        self.size: int | None = described.get("size")
        self.shape = None if shape is None else tuple(shape)
        self.dtype: str | None = described.get("dtype")
        self.device: str | None = described.get("device")
        self.preview = str(described.get("repr", ""))
        self._html: str | None = described.get("html")
        self._fetch = fetch

    def get(self) -> Any:
        """Bring the value here; the name in the notebook stays a handle.

        Raises:
            FalServerlessError: the session has ended, or the name stands for something else by now.
            FalSerializationError: the value cannot be pickled.
        """
        __tracebackhide__ = True
        return self._fetch(self)

    def __getattr__(self, attribute: str) -> Any:
        raise AttributeError(
            f"{self.name!r} ({self.type}) stayed on {self.host!r}, so it has no .{attribute} here; "
            f"use it in a %%fal cell, or bring it here: {self.name}.get()"
        )

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{self.name!r} is a handle on a value on {self.host!r}; send {self.name}.get() instead"
        )

    def __repr__(self) -> str:
        return f"<{self._summary()}>"

    def _repr_html_(self) -> str:
        preview = self._html or f"<pre>{html.escape(self.preview)}</pre>"
        return f'<div><span style="color:#777">{html.escape(self._summary())}</span>{preview}</div>'

    def _summary(self) -> str:
        facts = [self.type]
        if self.shape is not None:
            facts.append(" x ".join(map(str, self.shape)) or "scalar")
        facts += [fact for fact in (self.dtype, self.device) if fact]
        if self.size is not None:
            facts.append(_bytes_as_text(self.size))
        return f"{self.name} on {self.host}: {', '.join(facts)}; {self.name}.get() brings it here"


def _bytes_as_text(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:  # noqa: PLR2004 - the step between units
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
