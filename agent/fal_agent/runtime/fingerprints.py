"""Tell whether two functions are the same, by what they do and not by where they stand.

Runs wherever user code runs. A fingerprint covers a function's code (without positions, comments
and docstring), its qualified name, its defaults, its closure, the plain values among the globals it
uses, and, in the same way, the functions and classes that it uses and that do not belong to an
installed library. The same definition made again, by a re-run cell or by unpickling, has the same one.
"""

from __future__ import annotations

import hashlib
import inspect
import types
from typing import Any, Optional

from fal_agent.bytecode import facts
from fal_agent.frames import is_library

__all__ = ["Fingerprint", "fingerprint"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))
_ABSENT = object()
_HAS_DOCSTRING = 0x4000000  # Python 3.13


def fingerprint(function: Any) -> str:
    """Give 32 hex digits that name a function."""
    return Fingerprint(function).digest


class Fingerprint:
    """A function's fingerprint, and whether it still holds.

    Attributes:
        digest: 32 hex digits.
    """

    def __init__(self, function: Any) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # what is told apart by identity must not be replaced unnoticed
        self._bindings: list[tuple[dict[str, Any], str, Any]] = []
        self._codes: list[tuple[types.FunctionType, types.CodeType]] = []
        self._add_value(function, deep=True)
        self.digest = self._hash.hexdigest()

    def is_current(self) -> bool:
        """Whether the functions and globals that it was made of are still the same objects."""
        for namespace, name, value in self._bindings:
            if namespace.get(name, _ABSENT) is not value:
                return False
        return all(function.__code__ is code for function, code in self._codes)

    def _add(self, *items: str) -> None:
        for item in items:
            data = item.encode("utf-8", "surrogatepass")
            self._hash.update(b"%d:" % len(data))
            self._hash.update(data)

    # ------------------------------------------------------------ values

    def _add_value(self, value: Any, *, deep: bool) -> None:
        """Add a value; `deep` also what can be changed in place."""
        if type(value) in _PLAIN:
            self._add(type(value).__name__, repr(value))
        elif isinstance(value, (tuple, frozenset)):
            self._add_items(value, deep=deep)
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, types.ModuleType):
            self._add("module", value.__name__)
        elif isinstance(value, type):
            self._add_class(value)
        elif (wrapped := _wrapped(value)) is not None:
            self._add("wrapper", type(value).__qualname__)
            self._add_function(wrapped)
        elif deep:
            self._add_content(value)
        else:
            self._add("a", type(value).__module__, type(value).__qualname__)

    def _add_items(self, items: Any, *, deep: bool) -> None:
        self._add(type(items).__name__, str(len(items)))
        ordered = items if isinstance(items, tuple) else sorted(items, key=_order)
        for item in ordered:
            self._add_value(item, deep=deep)

    def _add_content(self, value: Any) -> None:
        """Add a value by what it pickles to; by its identity if it cannot be pickled."""
        from fal_agent import pickling

        self._add("content", type(value).__qualname__)
        try:
            parts = pickling.dump_parts(value)
        except Exception:  # noqa: BLE001 - pickling runs the user's code
            self._kept.append(value)
            self._add(str(id(value)))
            return
        for part in parts:
            self._hash.update(b"%d:" % len(part))
            self._hash.update(part)

    # ------------------------------------------------------------ functions and classes

    def _add_function(self, function: types.FunctionType) -> None:
        if self._is_known(function):
            return
        self._add("function", function.__module__ or "", function.__qualname__)
        if is_library(function.__code__.co_filename):
            return
        self._codes.append((function, function.__code__))
        _add_code(self._add, function.__code__, function.__doc__)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._add_value(value, deep=True)
        for cell in function.__closure__ or ():
            self._add_cell(cell)
        found = facts(function.__code__)
        for name in sorted(
            set(found.globals) - found.stored
        ):  # what it sets itself is its result, not its input
            value = function.__globals__.get(name, _ABSENT)
            self._bindings.append((function.__globals__, name, value))
            if value is not _ABSENT:
                self._add(name)
                self._add_value(value, deep=False)

    def _add_cell(self, cell: Any) -> None:
        try:
            value = cell.cell_contents
        except ValueError:  # not bound yet
            self._add("empty")
            return
        self._add_value(value, deep=True)

    def _add_class(self, cls: type) -> None:
        if self._is_known(cls):
            return
        self._add("class", cls.__module__, cls.__qualname__)
        members = [item for item in vars(cls).values() if isinstance(item, types.FunctionType)]
        if not members or is_library(members[0].__code__.co_filename):
            return
        for base in cls.__bases__:
            self._add_class(base)
        for name, value in sorted(vars(cls).items(), key=lambda item: item[0]):
            inner = getattr(value, "__func__", value)
            is_told = isinstance(inner, types.FunctionType) or type(inner) in _PLAIN
            if is_told and name not in ("__doc__", "__firstlineno__"):
                self._add(name)
                self._add_value(inner, deep=False)

    def _is_known(self, value: Any) -> bool:
        """Whether a function or class was added before; then its position stands for it."""
        if id(value) in self._seen:
            self._add("seen", str(self._seen[id(value)]))
            return True
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        return False


def _wrapped(value: Any) -> Optional[types.FunctionType]:
    """Give the function that a decorated one stands for."""
    found = inspect.getattr_static(value, "__wrapped__", None)  # a lazy object must not be woken
    return found if isinstance(found, types.FunctionType) else None


def _order(item: Any) -> tuple[str, str]:
    return type(item).__name__, repr(item)


def _add_code(add: Any, code: types.CodeType, doc: Any = None) -> None:
    """Add what code does; not its file, its lines, or its docstring."""
    counts = (
        code.co_argcount,
        code.co_posonlyargcount,
        code.co_kwonlyargcount,
        code.co_flags & ~_HAS_DOCSTRING,
    )
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    add("code", code.co_name, repr(counts), repr(names), code.co_code.hex())
    for index, constant in enumerate(code.co_consts):
        if isinstance(constant, types.CodeType):
            _add_code(add, constant)
        elif index == 0 and doc is not None and constant == doc:
            add("NoneType", "None")
        else:
            add(type(constant).__name__, _constant_text(constant))


def _constant_text(constant: Any) -> str:
    """Like `repr`, but sets in an order that is the same in every process."""
    if isinstance(constant, (tuple, frozenset)):
        texts = [f"{type(item).__name__}:{_constant_text(item)}" for item in constant]
        return repr(texts if isinstance(constant, tuple) else sorted(texts))
    return repr(constant)
