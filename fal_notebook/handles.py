"""Handles: names in the notebook for values that stayed on a host.

Runs in the notebook. A handle is what a cell leaves when its value is too large to come along, or
cannot be pickled. In cells of the same session its name means the value itself.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any, Protocol

from fal_agent.errors import FalServerlessError
from fal_notebook.trips import Trip, travelling

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fal_agent.framing import Buffer

__all__ = ["Handle", "Keeper", "bytes_as_text", "gone_error", "keepers", "shape_as_text", "unopened"]


class Keeper(Protocol):
    """What looks after handles; see `fal_notebook.keeping`."""

    def get(self, handle: Handle) -> Any:
        """Bring a value here."""

    def move(self, handle: Handle, host: Any, session: str | None) -> Handle:
        """Copy a value to another session."""

    def delete(self, handle: Handle) -> None:
        """Take a value out of its session."""

    def refer(self, handle: Handle, trip: Trip) -> tuple[Any, ...]:
        """Give what a pickle says of a handle that travels."""


keepers: dict[tuple[str, str], Keeper] = {}  # by host and session


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
        length: of a text or a container, else None.
        preview: its repr, shortened.
    """

    __slots__ = (
        "__weakref__",
        "_described",
        "_html",
        "_keeper",
        "device",
        "dtype",
        "host",
        "length",
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
        keeper: Keeper | None,
    ) -> None:
        self.host, self.session, self.name, self.version = host, session, name, version
        self._keeper = keeper
        self.describe(described)

    def describe(self, described: dict[str, Any]) -> None:
        """Know what is said of the value now."""
        self._described = described
        shape = described.get("shape")
        self.type = str(described.get("type", "object"))
        self.size: int | None = described.get("size")
        self.shape = None if shape is None else tuple(shape)
        self.dtype: str | None = described.get("dtype")
        self.device: str | None = described.get("device")
        self.length: int | None = described.get("length")
        self.preview = str(described.get("repr", ""))
        self._html: str | None = described.get("html")

    def get(self) -> Any:
        """Bring the value here; the name in the notebook stays a handle.

        A large one comes in pieces: how far it is is shown, and an interrupt ends it.

        Raises:
            FalServerlessError: the session has ended, or the value is gone; or it cannot be pickled.
        """
        __tracebackhide__ = True
        return self._kept().get(self)

    def to(self, host: Any, *, session: str | None = None) -> Handle:
        """Copy the value to another host, by way of the notebook, in pieces; it also stays where it is.

        Args:
            host: the host, or its name.
            session: there; None is this kernel's own.

        Returns:
            A handle on the copy, for cells and functions over there.

        Raises:
            FalServerlessError: the value is gone, or cannot be pickled.
        """
        __tracebackhide__ = True
        return self._kept().move(self, host, session)

    def delete(self) -> None:
        """Take the value out of its session, and free its memory; the handle stands for nothing then."""
        __tracebackhide__ = True
        self._kept().delete(self)

    def _kept(self) -> Keeper:
        keeper = self._keeper or keepers.get((self.host, self.session))
        if keeper is None:
            raise FalServerlessError(
                f"{self.name!r} is a handle of another kernel, on a value in its session {self.session!r} on "
                f"{self.host!r}; run the cell that made it here: if that session is there, it is taken up"
            )
        return keeper

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # what libraries ask any object for
            raise AttributeError(attribute)
        raise AttributeError(
            f"{self.name!r} ({self.type}) stayed on {self.host!r}, so it has no .{attribute} here; "
            f"use it in a %%fal cell, or bring it here: {self.name}.get()"
        )

    def __reduce__(self) -> Any:
        trip = travelling.get()
        if trip is None:  # it is kept, or copied: another handle on the same value
            return _restore, (self.host, self.session, self.name, self.version, self._described)
        if self.version not in trip.made:
            trip.made[self.version] = self._kept().refer(self, trip)
        return trip.made[self.version]

    def __repr__(self) -> str:
        return f"<{self._summary()}>"

    def _repr_html_(self) -> str:
        preview = self._html or f"<pre>{html.escape(self.preview)}</pre>"
        return f'<div><span style="color:#777">{html.escape(self._summary())}</span>{preview}</div>'

    def _summary(self) -> str:
        facts = [self.type]
        if self.shape is not None:
            facts.append(shape_as_text(self.shape) or "scalar")
        if self.length is not None:
            facts.append(f"{self.length:,} long")
        facts += [fact for fact in (self.dtype, self.device) if fact]
        if self.size is not None:
            facts.append(bytes_as_text(self.size))
        return f"{self.name} on {self.host}: {', '.join(facts)}; {self.name}.get() brings it here"


def _restore(host: str, session: str, name: str, version: str, described: dict[str, Any]) -> Handle:
    """Make a handle anew, as a pickle says."""
    return Handle(host, session, name, version=version, described=described, keeper=None)


def unopened(kind: str | None, parts: Sequence[Buffer], error: Exception) -> dict[str, Any]:
    """Describe a value that came here and could not be opened: a class is missing here, or a device."""
    why = f"cannot be opened here: {type(error).__name__}: {error}"
    return {"type": kind, "size": sum(map(len, parts)), "repr": why}


def shape_as_text(shape: tuple[int, ...] | None) -> str:
    """Say a shape: "3 x 4"; nothing for none, and for a scalar."""
    return " x ".join(map(str, shape or ()))


def bytes_as_text(size: float) -> str:
    """Say a number of bytes: "1.2 GB"."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:  # noqa: PLR2004 - the step between units
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def gone_error(names: Iterable[str], host_name: str) -> FalServerlessError:
    """Make the error that says that values are gone, by the names they had."""
    listed = ", ".join(map(repr, names))
    return FalServerlessError(
        f"{listed} stayed on {host_name!r}, and is gone: the session was started anew, or the name "
        "stands for something else now; run the cell that makes it again"
    )
