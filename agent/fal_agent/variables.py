"""Say in a few words what the variables of a failed call's frames were, for a debugger that comes later.

Runs in workers. The values themselves are let go of with the frames: a model that only a failed call
holds must not keep a GPU's memory. What is told here is sent to the notebook and written down nowhere.
"""

from __future__ import annotations

import json
import keyword
import reprlib
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.frames import user_steps

if TYPE_CHECKING:
    import types

__all__ = ["variables_of"]

_FRAMES = 16  # the innermost ones
_NAMES = 40  # of one frame
_TEXT = 240  # characters of one value
_WHOLE = 96 << 10  # bytes of all together
_LARGEST_INT = 2**53  # that JSON carries everywhere


def variables_of(error: BaseException) -> Optional[bytes]:
    """Describe the local variables of an error's frames, as JSON; None if there are none to speak of.

    It is a list with an object for each of the frames that `fal_agent.frames.user_frames` gives, from
    the innermost outwards: name -> [value] for numbers, short texts and None, or name -> text.
    """
    told: list[dict[str, Any]] = []
    room = _WHOLE
    for step in reversed(user_steps(error)[-_FRAMES:]):
        names = _names_of(step.tb_frame)
        room -= len(json.dumps(names))
        if room < 0:
            break
        told.append(names)
    return json.dumps(told).encode() if any(told) else None


def _names_of(frame: types.FrameType) -> dict[str, Any]:
    if frame.f_code.co_name == "<module>":
        return {}
    names = [name for name in frame.f_locals if name.isidentifier() and not keyword.iskeyword(name)]
    return {name: _told(frame.f_locals[name]) for name in names[:_NAMES]}


def _told(value: Any) -> Any:
    if value is None or type(value) in (bool, float):
        return [value]
    if type(value) is int and abs(value) < _LARGEST_INT:
        return [value]
    if type(value) is str and len(value) <= _TEXT:
        return [value]
    try:
        return _brief.repr(value)[:_TEXT]
    except Exception as problem:  # noqa: BLE001 - a user's __repr__ may do anything
        return f"<{type(value).__name__}, whose repr raised {type(problem).__name__}>"


class _Brief(reprlib.Repr):
    """Short, also for arrays and tables, whose own repr takes long and may speak to a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = _TEXT
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 6
        self.maxlevel = 3

    def repr_instance(self, x: Any, level: int) -> str:
        """Give the type and shape of what has one, else its repr."""
        shape = getattr(x, "shape", None)
        if isinstance(shape, tuple):
            details = [f"shape {tuple(shape)}"]
            details += [str(getattr(x, name)) for name in ("dtype", "device") if hasattr(x, name)]
            return f"<{type(x).__module__}.{type(x).__qualname__}, {', '.join(details)}>"
        return super().repr_instance(x, level)


_brief = _Brief()
