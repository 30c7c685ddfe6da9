"""Pickle the values of a namespace that two processes share, so that its functions see the other's names.

Runs in the notebook and in workers; cloudpickle is imported on first use. A function defined in a
cell belongs to the namespace that cells share: it travels without the globals that it uses, and
uses those of the namespace where it arrives. Which names it needs there is told beside the pickle.
"""

from __future__ import annotations

import functools
import io
import pickle
import sys
import threading
import types
from collections import ChainMap
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from fal_agent import pickling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fal_agent.framing import Buffer

__all__ = [
    "Dumped",
    "dump_named",
    "function_state",
    "load_named",
    "make_function",
    "opening_in",
    "pickler_in",
    "set_function_state",
]

_opening = threading.local()  # .namespace: where functions that arrive belong


class Dumped:
    """A value of a namespace, pickled.

    Attributes:
        parts: the pickle, then its out-of-band buffers.
        needs: names of the namespace that functions in it use.
    """

    __slots__ = ("needs", "parts")

    def __init__(self, parts: list[Buffer], needs: set[str]) -> None:
        self.parts, self.needs = parts, needs

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(len(part) for part in self.parts)


def dump_named(value: Any, namespace: dict[str, Any]) -> Dumped:
    """Pickle a value that a namespace holds.

    Raises:
        Exception: it cannot be pickled.
    """
    views, keep = pickling.out_of_band()
    file = io.BytesIO()
    pickler = pickler_in()(file, keep, namespace)
    pickler.dump(value)
    return Dumped([file.getvalue(), *views], pickler.needs)


def load_named(parts: Sequence[Buffer], namespace: dict[str, Any]) -> Any:
    """Unpickle what `dump_named` made; functions of the other namespace belong to this one.

    Raises:
        Exception: as `pickling.load`.
    """
    with opening_in(namespace):
        return pickling.load(parts)


@contextmanager
def opening_in(namespace: dict[str, Any]) -> Iterator[None]:
    """Let functions that are unpickled in this thread belong to a namespace."""
    before = getattr(_opening, "namespace", None)
    _opening.namespace = namespace
    try:
        yield
    finally:
        _opening.namespace = before


def make_function(code: types.CodeType, closure: Optional[tuple[Any, ...]]) -> types.FunctionType:
    """Make a function of the namespace that values are being unpickled into; pickles name it."""
    namespace = getattr(_opening, "namespace", None)
    return types.FunctionType(code, {} if namespace is None else namespace, None, None, closure)


def set_function_state(function: types.FunctionType, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Give a function what it had besides its code; pickles name it."""
    attributes, slots = state
    slots.pop("_cloudpickle_submodules", None)  # those of the modules that it uses: they are imported by now
    vars(function).clear()
    vars(function).update(attributes)
    closure = slots.pop("__closure__", None) or ()
    for index, came in enumerate(closure):
        with suppress(ValueError):  # it was not bound yet
            function.__closure__[index].cell_contents = came.cell_contents  # type: ignore[index]
    for name, value in slots.items():
        setattr(function, name, value)


def function_state(function: types.FunctionType) -> tuple[dict[str, Any], dict[str, Any], set[str]]:
    """Give a function's attributes, its slots, and the names of its namespace that it uses."""
    from cloudpickle import cloudpickle

    attributes, slots = cloudpickle._function_getstate(function)  # noqa: SLF001 - there is no other way in
    needs = set(slots.pop("__globals__"))
    return attributes, slots, needs


def _reduce_file(file: io.TextIOWrapper) -> Any:
    """Refuse, where cloudpickle would send a copy of what is in the file."""
    if file in (sys.stdout, sys.stderr):
        from cloudpickle import cloudpickle

        return cloudpickle._file_reduce(file)  # noqa: SLF001 - by its name
    raise pickle.PicklingError(f"the file {file.name!r} is open in one process, and stays there")


@functools.cache
def pickler_in() -> Callable[..., Any]:
    """Give the class of picklers for a namespace; made once, since its base is imported on first use."""
    base: Any = pickling.pickler_type()

    class NamespacePickler(base):  # type: ignore[misc] # cloudpickle has no types
        """Lets functions of one namespace travel without their globals; open files stay."""

        dispatch_table: ClassVar[Any] = ChainMap({io.TextIOWrapper: _reduce_file}, base.dispatch_table)

        def __init__(self, file: Any, keep: Optional[Callable[..., bool]], namespace: dict[str, Any]) -> None:
            super().__init__(file, keep, None)
            self.namespace = namespace
            self.needs: set[str] = set()

        def _dynamic_function_reduce(self, func: types.FunctionType) -> Any:
            if func.__globals__ is not self.namespace:
                return super()._dynamic_function_reduce(func)
            attributes, slots, needs = function_state(func)
            self.needs |= needs
            closure = None
            if func.__closure__ is not None:  # filled later: a function may be in its own closure
                closure = tuple(types.CellType() for _ in func.__closure__)
            return (
                make_function,
                (func.__code__, closure),
                (attributes, slots),
                None,
                None,
                set_function_state,
            )

    return NamespacePickler
