"""How objects that can change are taken apart, made anew, and changed to what another process says.

Runs in the notebook and in workers. Each kind of object has a shell, from which an empty one is
made, and a content, which is put into one that is there. What is neither of these kinds, and may
change, travels as a whole.
"""

from __future__ import annotations

import abc
import copyreg
import enum
import sys
import types
from collections import deque
from typing import Any, Optional, Protocol

from fal_agent import pickling
from fal_agent.namespaces import function_state, make_function, set_function_state

__all__ = ["KINDS", "WHOLE", "Kind", "kind_of"]

# What never changes, and what pickling does with it makes nothing that could: looked at no further.
_FIXED = (
    *(
        type(None),
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        tuple,
        frozenset,
        range,
        type(...),
        type(NotImplemented),
    ),
    *(types.BuiltinFunctionType, types.ModuleType, types.CodeType, types.MethodType),
    *(property, classmethod, staticmethod),
)
_FIXED_MODULES = frozenset(
    ("datetime", "decimal", "fractions", "uuid", "pathlib", "zoneinfo", "re", "_thread")
)
_WHOLE_PACKAGES = ("matplotlib",)  # a figure's parts know each other before they are whole
# Others, such as those of pydantic, do more than what is in a class's own dict.
_PLAIN_METACLASSES = (type, abc.ABCMeta, type(enum.Enum), type(Protocol))
_NEW = (copyreg.__newobj__, copyreg.__newobj_ex__)  # type: ignore[attr-defined] # typeshed has the latter not


class Kind:
    """One kind of object: how it is taken apart and put together.

    Attributes:
        is_early: its content is put in as soon as it can be: others may need it to be made at all.
    """

    is_early = False

    def shell(self, value: Any) -> Any:
        """Give what an empty object is made of."""

    def make(self, shell: Any) -> Any:
        """Make an empty object."""

    def content(self, value: Any) -> Any:
        """Give what is in an object, as tuples of what does change."""

    def fill(self, value: Any, content: Any) -> None:
        """Make what is in an object this content."""

    def rank(self, value: Any) -> int:  # noqa: ARG002 - the same for all of a kind, mostly
        """When this content is put in; what looks at other objects' content comes after that."""
        return 0


class _List(Kind):
    def make(self, shell: Any) -> Any:  # noqa: ARG002 - the same for all kinds
        return []

    def content(self, value: Any) -> Any:
        return tuple(value)

    def fill(self, value: Any, content: Any) -> None:
        value[:] = content


class _Dict(Kind):
    def rank(self, value: Any) -> int:  # noqa: ARG002
        return 2  # the hashes of what is in it

    def make(self, shell: Any) -> Any:  # noqa: ARG002
        return {}

    def content(self, value: Any) -> Any:
        return tuple(value.items())

    def fill(self, value: Any, content: Any) -> None:
        value.clear()
        value.update(content)


class _Set(Kind):
    def rank(self, value: Any) -> int:  # noqa: ARG002
        return 2  # the hashes of what is in it

    def make(self, shell: Any) -> Any:  # noqa: ARG002
        return set()

    def content(self, value: Any) -> Any:
        return tuple(value)

    def fill(self, value: Any, content: Any) -> None:
        value.clear()
        value.update(content)


class _Bytearray(Kind):
    def make(self, shell: Any) -> Any:  # noqa: ARG002
        return bytearray()

    def content(self, value: Any) -> Any:
        return bytes(value)

    def fill(self, value: Any, content: Any) -> None:
        value[:] = content


class _Cell(Kind):
    """The variable of a function that functions in it use."""

    def make(self, shell: Any) -> Any:  # noqa: ARG002
        return types.CellType()

    def content(self, value: Any) -> Any:
        try:
            return (value.cell_contents,)
        except ValueError:
            return ()

    def fill(self, value: Any, content: Any) -> None:
        if content:
            value.cell_contents = content[0]


class _Function(Kind):
    """A function of the namespace."""

    is_early = True

    def shell(self, value: Any) -> Any:
        return value.__code__, value.__closure__

    def make(self, shell: Any) -> Any:
        return make_function(*shell)

    def content(self, value: Any) -> Any:
        attributes, slots, _ = function_state(value)
        slots.pop("__closure__")
        slots["_cloudpickle_submodules"] = tuple(slots["_cloudpickle_submodules"])
        return tuple(attributes.items()), tuple(slots.items())

    def fill(self, value: Any, content: Any) -> None:
        attributes, slots = content
        set_function_state(value, (dict(attributes), dict(slots)))


class _Class(Kind):
    """A class that travels by value."""

    is_early = True

    def shell(self, value: Any) -> Any:
        pickling.note_class(value)
        make, arguments, *_ = _class_reduced(value)
        return make, tuple(_Items(item) if type(item) is dict else item for item in arguments)

    def make(self, shell: Any) -> Any:
        make, arguments = shell
        thawed = (dict(item.items) if type(item) is _Items else item for item in arguments)
        cls = pickling.make_class(make, *thawed)
        pickling.note_class(cls, came=True)
        return cls

    def content(self, value: Any) -> Any:
        members = _class_reduced(value)[2][0]
        members.pop("__slotnames__", None)  # what `copyreg` noted of it when an instance was pickled
        if "_abc_impl" in members:
            members["_abc_impl"] = tuple(members["_abc_impl"])
        return tuple(members.items())

    def fill(self, value: Any, content: Any) -> None:
        from cloudpickle import cloudpickle

        members = dict(content)
        slots = members.get("__slots__", ())
        kept = {*members, *((slots,) if isinstance(slots, str) else slots)}
        for name in () if issubclass(value, enum.Enum) else list(vars(value)):
            if name not in kept and not (name.startswith("__") and name.endswith("__")):
                delattr(value, name)
        cloudpickle._class_setstate(value, (members, {}))  # noqa: SLF001 - what cloudpickle itself would call


class _Array(Kind):
    """An array of NumPy's."""

    def shell(self, value: Any) -> Any:
        return value.__reduce__()[:2]

    def make(self, shell: Any) -> Any:
        make, arguments = shell
        return make(*arguments)

    def content(self, value: Any) -> Any:
        return value.__reduce__()[2]

    def fill(self, value: Any, content: Any) -> None:
        make, arguments = value.__reduce__()[:2]
        came = make(*arguments)
        came.__setstate__(content)
        if came.shape == value.shape and came.dtype == value.dtype and value.flags.writeable:
            value[...] = came  # others may look at the same memory
        else:
            value.__setstate__(content)


class _Object(Kind):
    """An object with attributes, items, or both, as the pickle protocol takes it apart."""

    def rank(self, value: Any) -> int:
        return 3 if hasattr(value, "__setstate__") or isinstance(value, (list, dict, deque)) else 1

    def shell(self, value: Any) -> Any:
        return value.__reduce_ex__(4)[:2]

    def make(self, shell: Any) -> Any:
        make, arguments = shell
        return make(*arguments)

    def content(self, value: Any) -> Any:
        _, _, *rest = value.__reduce_ex__(4)
        state, listed, mapped = (*rest, None, None, None)[:3]
        if type(state) is dict:
            state = _Items(_without_copies(state, value) if hasattr(type(value), "__setstate__") else state)
        elif type(state) is tuple and all(type(item) in (dict, type(None)) for item in state):
            state = tuple(_Items(item or {}) for item in state)
        return state, tuple(listed or ()), tuple(mapped or ())

    def fill(self, value: Any, content: Any) -> None:
        state, listed, mapped = content
        if isinstance(value, (list, dict, deque)):
            value.clear()
        if hasattr(value, "__dict__"):
            vars(value).clear()
        _set_state(value, state)
        if listed:
            value.extend(listed)
        for key, item in mapped:
            value[key] = item


class _Copy:
    """A list or dict that `__getstate__` has just made; it is not one that anybody else has."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        kind = type(self.value)
        return kind, (tuple(self.value.items()) if kind is dict else tuple(self.value),)


class _Whole(Kind):
    """Anything else: what changed is another object."""


class _Items:
    """A dict that pickling has just made, which nobody else will ever see."""

    __slots__ = ("items",)

    def __init__(self, items: Any) -> None:
        self.items = tuple(items.items()) if type(items) is dict else items

    def __reduce__(self) -> Any:
        return _Items, (self.items,)


WHOLE = _Whole()
_CLASS, _FUNCTION, _ARRAY, _OBJECT = _Class(), _Function(), _Array(), _Object()
_BUILT_IN: dict[type, Kind] = {
    list: _List(), dict: _Dict(), set: _Set(), bytearray: _Bytearray(), types.CellType: _Cell(),
}  # fmt: skip
KINDS: dict[str, Kind] = {
    type(kind).__name__: kind for kind in (*_BUILT_IN.values(), _CLASS, _FUNCTION, _ARRAY, _OBJECT)
}


def kind_of(value: Any, namespace: dict[str, Any]) -> Optional[Kind]:
    """Say what kind of object this is; None for what does not change, or travels by its name."""
    kind = type(value)
    if kind in _FIXED or kind in (_Items, _Copy) or kind.__module__ in _FIXED_MODULES:
        return None
    if kind in _BUILT_IN:
        return _BUILT_IN[kind]
    if isinstance(value, type):
        if len(_class_reduced(value)) <= 2:  # noqa: PLR2004 - by name, see pickle
            return None
        return _CLASS if kind in _PLAIN_METACLASSES or not pickling.is_importable(kind) else WHOLE
    if kind is types.FunctionType:
        if pickling.is_importable(value):
            return None
        return _FUNCTION if value.__globals__ is namespace else WHOLE
    if str(kind.__module__).partition(".")[0] == "numpy":
        return _kind_of_numpys(value, kind)
    if str(kind.__module__).partition(".")[0] in _WHOLE_PACKAGES:
        return WHOLE
    if kind in pickling.pickler_type().dispatch_table:  # type: ignore[attr-defined]
        return None if kind.__module__ == "dataclasses" else WHOLE  # the marks that dataclasses look for
    return _OBJECT if _can_be_filled(value, kind) else WHOLE


def _kind_of_numpys(value: Any, kind: type) -> Optional[Kind]:
    numpy = sys.modules["numpy"]
    if isinstance(value, (numpy.generic, numpy.dtype)):
        return None
    return _ARRAY if kind is numpy.ndarray and not value.dtype.hasobject else WHOLE


def _can_be_filled(value: Any, kind: type) -> bool:
    """Whether an object is made empty, and filled then."""
    own: Any = kind
    if own.__reduce_ex__ is object.__reduce_ex__ and own.__reduce__ is object.__reduce__:
        if getattr(own, "__getstate__", None) is getattr(object, "__getstate__", None):
            return True
        state = value.__reduce_ex__(4)[2]  # of its own making: what is in a dict can be told from copies
        return state is None or type(state) is dict
    if not isinstance(value, (dict, list, deque)):
        return False
    reduced = value.__reduce_ex__(4)
    if not isinstance(reduced, tuple):
        return False
    return reduced[0] in _NEW or any(items is not None for items in reduced[3:5])


def _class_reduced(cls: type) -> tuple[Any, ...]:
    """Give what cloudpickle makes of a class: six items if it travels by value."""
    from cloudpickle import cloudpickle

    if pickling.is_importable(cls):
        return ()
    reduced = cloudpickle._class_reduce(cls)  # noqa: SLF001 - there is no other way in
    return reduced if isinstance(reduced, tuple) else ()


def _set_state(value: Any, state: Any) -> None:
    if state is None:
        return
    is_plain = type(state) is _Items
    if hasattr(value, "__setstate__"):
        value.__setstate__(dict(state.items) if is_plain else _thawed(state))
        return
    attributes, slots = (state, None) if is_plain else state
    vars(value).update(attributes.items) if attributes.items else None
    for name, item in slots.items if slots is not None else ():
        setattr(value, name, item)


def _without_copies(state: dict[str, Any], value: Any) -> dict[str, Any]:
    """Mark what is in a state and in no attribute of the object."""
    own = {id(item) for item in vars(value).values()} if hasattr(value, "__dict__") else set()
    return {
        name: _Copy(item) if type(item) in (list, dict, set) and id(item) not in own else item
        for name, item in state.items()
    }


def _thawed(state: Any) -> Any:
    if type(state) is tuple and all(type(item) is _Items for item in state):
        return tuple(dict(item.items) for item in state)
    return state
