"""Say in a few words what a value is, for a notebook that does not get the value itself.

Runs in a worker. Nothing here may take long or raise, whatever the value's own methods do; libraries
are recognised by the attributes that they share, so that none is imported.
"""

from __future__ import annotations

import base64
import io
import reprlib
import sys
from typing import Any, Optional

__all__ = ["describe_briefly", "describe_value", "from_device", "is_larger", "type_name"]

_REPR_LIMIT = 2000  # characters
_HTML_LIMIT = 50_000  # characters
_ROWS = 5  # of a table's preview
_THUMBNAIL = 192  # pixels, the longer side
_PICTURE_LIMIT = 200_000  # characters
_PICTURES = ("thumbnail", "copy", "save", "convert")

_CONTAINERS = (list, tuple, set, frozenset, dict)


def describe_value(value: Any) -> dict[str, Any]:
    """Describe a value that stays here.

    Returns:
        "type", its qualified name; "size", bytes as far as they can be told quickly, or None;
        "shape", a list of int, or None; "dtype" and "device", text or None; "length", of a text or a
        container, or None; "repr", shortened; and "html", the head of a table or a small copy of a
        picture, or None.
    """
    html = _table_head(value) or _thumbnail(value)
    return {**describe_briefly(value), "repr": _short_repr(value), "html": html}


def describe_briefly(value: Any) -> dict[str, Any]:
    """Describe a value without looking into it: as `describe_value`, but for "repr" and "html"."""
    return {
        "type": type_name(value),
        "size": _rough_size(value),
        "shape": _whole_numbers(_attribute(value, "shape")),
        "dtype": _text_of(value, "dtype"),
        "device": _text_of(value, "device"),
        "length": len(value) if isinstance(value, (str, bytes, bytearray, *_CONTAINERS)) else None,
    }


def is_larger(value: Any, limit: int) -> bool:
    """Whether a value is known to take more than `limit` bytes, or lives in a GPU's memory."""
    size = _rough_size(value)
    return (size is not None and size > limit) or _is_elsewhere(value)


def from_device(value: Any) -> Any:
    """Copy a tensor out of a GPU's memory; anything else is given as it is."""
    copy = _attribute(value, "cpu")
    return copy() if _is_elsewhere(value) and callable(copy) else value


def type_name(value: Any) -> str:
    """The qualified name of a value's type: "numpy.ndarray"."""
    kind = type(value)
    module = getattr(kind, "__module__", None)
    name = getattr(kind, "__qualname__", kind.__name__)
    return str(name) if module in (None, "builtins", "__main__") else f"{module}.{name}"


def _is_elsewhere(value: Any) -> bool:
    return _text_of(value, "device") not in (None, "cpu")


def _rough_size(value: Any) -> Optional[int]:
    """Bytes of a value where that can be told without looking at all of it."""
    if isinstance(value, type):
        return None
    size = _attribute(value, "nbytes")
    if isinstance(size, int):
        return size
    memory_usage = _attribute(value, "memory_usage")
    if callable(memory_usage):
        try:
            used = memory_usage(deep=False)
            return int(used.sum() if hasattr(used, "sum") else used)
        except Exception:  # noqa: BLE001 - not the method of a table that we took it for
            return None
    parameters = _attribute(value, "parameters")
    if callable(parameters):
        try:
            return sum(int(parameter.nbytes) for parameter in parameters())
        except Exception:  # noqa: BLE001 - not the method of a model that we took it for
            return None
    if isinstance(value, (str, bytes, bytearray, *_CONTAINERS)):
        return sys.getsizeof(value)
    return None


def _short_repr(value: Any) -> str:
    try:
        if isinstance(value, _CONTAINERS):  # their repr looks at every item; that of an array does not
            shortener = reprlib.Repr()
            shortener.maxlist = shortener.maxtuple = shortener.maxdict = shortener.maxset = 8
            shortener.maxstring = shortener.maxother = 80
            text = shortener.repr(value)
        else:
            text = repr(value)
    except Exception as error:  # noqa: BLE001 - the user's own __repr__
        return f"<{type_name(value)} whose repr raised {type(error).__name__}>"
    return text if len(text) <= _REPR_LIMIT else text[: _REPR_LIMIT - 1] + "…"


def _table_head(value: Any) -> Optional[str]:
    """HTML of the first rows of what is a table, recognised as pandas and its like are."""
    head, render = _attribute(value, "head"), _attribute(value, "_repr_html_")
    if isinstance(value, type) or not callable(head) or not callable(render):
        return None
    try:
        html = head(_ROWS)._repr_html_()
    except Exception:  # noqa: BLE001 - not the method of a table that we took it for
        return None
    return html if isinstance(html, str) and len(html) <= _HTML_LIMIT else None


def _thumbnail(value: Any) -> Optional[str]:
    """HTML of a small copy of what is a picture, recognised as Pillow's are."""
    if isinstance(value, type) or not all(callable(_attribute(value, name)) for name in _PICTURES):
        return None
    try:
        small = value.copy()
        small.thumbnail((_THUMBNAIL, _THUMBNAIL))
        file = io.BytesIO()
        small.save(file, "PNG")
    except Exception:  # noqa: BLE001 - not the methods of a picture that we took them for
        return None
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img src="data:image/png;base64,{data}">' if len(data) <= _PICTURE_LIMIT else None


def _attribute(value: Any, name: str) -> Any:
    try:
        return getattr(value, name, None)
    except Exception:  # noqa: BLE001 - a property of the user's
        return None


def _text_of(value: Any, name: str) -> Optional[str]:
    found = _attribute(value, name)
    if found is None or isinstance(value, type) or callable(found):
        return None
    try:
        return str(found)[:200]
    except Exception:  # noqa: BLE001 - the user's own __str__
        return None


def _whole_numbers(shape: Any) -> Optional[list[int]]:
    try:
        return [int(length) for length in shape] if len(shape) <= 32 else None  # noqa: PLR2004 - NumPy's limit
    except Exception:  # noqa: BLE001 - not a shape
        return None
