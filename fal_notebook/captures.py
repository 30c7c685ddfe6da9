"""Find out what a function takes along, and whether that can change unseen.

Runs in the notebook; nothing is pickled here. A `Plan` remembers every place that pickling a
function would read (code, defaults, closures, globals, class attributes) and the very object found
there. While all places hold the same objects, and all objects are of kinds that cannot change, the
function's pickle is the same, and need not be made again.
"""

from __future__ import annotations

import enum
import sys
import types
import weakref
from typing import TYPE_CHECKING, Any

from fal_agent.bytecode import facts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Plan", "captured_values"]

_ABSENT = object()
_MAX_ITEMS, _MAX_DEPTH = 1000, 8  # of a tuple that is looked through
_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, type(...), type(NotImplemented))
_FIXED = frozenset(  # by name, so that nothing is imported for it
    {
        *("datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta", "datetime.timezone"),
        *("decimal.Decimal", "fractions.Fraction", "uuid.UUID", "re.Pattern"),
        *("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath"),
        *("logging.Logger", "logging.RootLogger", "operator.itemgetter", "operator.attrgetter"),
        *("numpy.float64", "numpy.float32", "numpy.int64", "numpy.int32", "numpy.bool", "numpy.bool_"),
        "fal_agent.runtime.cached._CachedDecorator",
    }
)
_WRAPPERS = {
    "fal_agent.runtime.cached.Cached": ("__wrapped__",),
    "fal_notebook.functions.Function": ("raw_func", "settings"),
    "fal_notebook.options.FunctionOptions": ("setup_function",),
}
_CLASS_NOISE = frozenset(("__dict__", "__weakref__", "__doc__", "__annotations__", "__annotate_func__"))


class Plan:
    """What some functions take along.

    Args:
        functions: the function, and its setup function if it has one.
        goes_by_value: whether a module's functions travel by value, by the module's name.

    Attributes:
        is_constant: nothing that travels can change while the plan is current.
        is_reusable: besides, the code has no means to change what it captured.
        attributes: every name and attribute that the code mentions.
        modules: names of the modules whose functions, or that themselves, travel by value.
        imports: modules that import statements inside the functions name.
    """

    def __init__(self, functions: tuple[Any, ...], goes_by_value: Callable[[str], bool]) -> None:
        self.is_constant = True
        self.attributes: set[str] = set()
        self.modules: set[str] = set()
        self.imports: set[str] = set()
        self._writes = False
        self._goes_by_value = goes_by_value
        self._places: list[_Function | _Class] = []
        self._module_places: list[tuple[types.ModuleType, str, Any]] = []
        self._seen: set[int] = set()
        self._open_modules: list[types.ModuleType] = []
        for function in functions:
            self._note(function)
        self._visit_modules()
        del self._seen, self._open_modules

    @property
    def is_reusable(self) -> bool:
        """Whether the loaded function may be called again as it is."""
        return self.is_constant and not self._writes

    def is_current(self) -> bool:
        """Whether every place still holds what it held."""
        for place in self._places:
            if not place.is_current():
                return False
        return all(
            _is_same(vars(module).get(name, _ABSENT), value) for module, name, value in self._module_places
        )

    # ------------------------------------------------------------ finding out

    def _is_fixed(self, value: Any, depth: int = 0) -> bool:
        """Whether a value cannot change unseen; what it leads to is visited."""
        kind = type(value)
        if kind in _PLAIN:
            return True
        if kind in (tuple, frozenset):
            return depth < _MAX_DEPTH and len(value) <= _MAX_ITEMS and self._are_fixed(value, depth + 1)
        if kind is types.FunctionType:
            return self._is_by_reference(value) or self._visit_function(value)
        if issubclass(kind, type):
            return self._is_by_reference(value) or self._visit_class(value)
        if issubclass(kind, types.ModuleType):
            return self._visit_module(value)
        if kind in (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType):
            owner = getattr(value, "__self__", None)
            return owner is None or isinstance(owner, (types.ModuleType, type))
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in _WRAPPERS:
            return self._are_fixed([getattr(value, inner) for inner in _WRAPPERS[name]])
        if issubclass(kind, enum.Enum):
            return self._is_fixed(kind)
        return name in _FIXED

    def _are_fixed(self, values: Iterable[Any], depth: int = 0) -> bool:
        """Whether no value can change unseen; all of them are visited."""
        fixed = True
        for value in values:
            fixed = self._is_fixed(value, depth) and fixed
        return fixed

    def _note(self, value: Any) -> Any:
        """Visit a value, and give what a place remembers of it."""
        if not self._is_fixed(value):
            self.is_constant = False
            return _Kind(type(value))
        return _remember(value)

    def _is_by_reference(self, value: Any) -> bool:
        module_name = getattr(value, "__module__", None)
        if not isinstance(module_name, str) or module_name == "__main__":
            return False
        if self._goes_by_value(module_name):
            self.modules.add(module_name)
            return False
        found: Any = sys.modules.get(module_name)
        for name in value.__qualname__.split("."):
            found = getattr(found, name, None)
        return found is value

    def _visit_function(self, function: types.FunctionType) -> bool:
        if id(function) in self._seen:
            return True
        self._seen.add(id(function))
        found = facts(function.__code__)
        self.attributes |= found.names
        self._writes = self._writes or found.writes
        for name, level in found.imports:
            self.imports.add(_absolute(name, level, function.__globals__.get("__package__")))
        self._places.append(_Function(function, found.globals, self._note))
        return True

    def _visit_class(self, cls: type) -> bool:
        if id(cls) in self._seen:
            return True
        self._seen.add(id(cls))
        if type(cls) not in (type, enum.EnumMeta):
            return False
        self._places.append(_Class(cls, self._note))
        return self._are_fixed(cls.__bases__)

    def _visit_module(self, module: types.ModuleType) -> bool:
        if not self._goes_by_value(module.__name__):
            return sys.modules.get(module.__name__) is module
        self.modules.add(module.__name__)
        if id(module) not in self._seen:
            self._seen.add(id(module))
            self._open_modules.append(module)
        return True

    def _visit_modules(self) -> None:
        """Visit the attributes of modules that the code mentions, until no more turn up."""
        done: set[tuple[str, str]] = set()
        before = -1
        while before != len(done):
            before = len(done)
            for module in list(self._open_modules):
                for name in sorted(self.attributes.intersection(vars(module))):
                    if (module.__name__, name) not in done and not name.startswith("__"):
                        done.add((module.__name__, name))
                        self._module_places.append((module, name, self._note(vars(module)[name])))


# ---------------------------------------------------------------- places


class _Kind:
    """Stands for a value that may change: only its class is remembered, so that it may go."""

    def __init__(self, kind: type) -> None:
        self.kind = kind


def _remember(value: Any) -> Any:
    """Give what is compared later: the value, or a weak reference, so that it does not stay alive for us."""
    if type(value) in _PLAIN or isinstance(value, types.ModuleType):
        return value
    try:
        return weakref.ref(value)
    except TypeError:
        return value


def _is_same(value: Any, remembered: Any) -> bool:
    if value is remembered:
        return True
    kind = type(remembered)
    if kind is weakref.ref:
        found = remembered()
        return found is not None and value is found
    return kind is _Kind and type(value) is remembered.kind


class _Function:
    """The places of one function."""

    __slots__ = ("_bindings", "_cells", "_code", "_defaults", "_function", "_kwdefaults", "_own")

    def __init__(
        self, function: types.FunctionType, names: tuple[str, ...], note: Callable[[Any], Any]
    ) -> None:
        self._function = weakref.ref(function)
        self._code = function.__code__
        self._defaults = _remember_items(function.__defaults__, note)
        self._kwdefaults = _remember_items((function.__kwdefaults__ or {}).values(), note)
        self._cells = _remember_items(_contents(function), note)
        self._own = _remember_items(vars(function).values(), note)
        space = function.__globals__
        self._bindings = [(name, note(space[name]) if name in space else _ABSENT) for name in names]

    def is_current(self) -> bool:
        function = self._function()
        if function is None or function.__code__ is not self._code:
            return False
        space = function.__globals__
        for name, remembered in self._bindings:
            value = space.get(name, _ABSENT)
            if value is not remembered and not _is_same(value, remembered):
                return False
        if self._cells and not _are_same(_contents(function), self._cells):
            return False
        if not _are_same(function.__defaults__ or (), self._defaults):
            return False
        if not _are_same((function.__kwdefaults__ or {}).values(), self._kwdefaults):
            return False
        return _are_same(vars(function).values(), self._own)


class _Class:
    """The places of one class."""

    __slots__ = ("_cls", "_members")

    def __init__(self, cls: type, note: Callable[[Any], Any]) -> None:
        self._cls = weakref.ref(cls)
        self._members: dict[str, Any] = {}
        for name, value in list(vars(cls).items()):
            if name not in _CLASS_NOISE:
                for inner in _inner(value):
                    note(inner)
                self._members[name] = _remember(value)

    def is_current(self) -> bool:
        cls = self._cls()
        if cls is None:
            return False
        members = {name: value for name, value in vars(cls).items() if name not in _CLASS_NOISE}
        if len(members) != len(self._members):
            return False
        return all(_is_same(members.get(name, _ABSENT), value) for name, value in self._members.items())


def _inner(value: Any) -> Iterator[Any]:
    """Give what a class's attribute is made of."""
    if isinstance(value, (staticmethod, classmethod)):
        yield value.__func__
    elif isinstance(value, property):
        yield from (part for part in (value.fget, value.fset, value.fdel) if part is not None)
    elif not isinstance(value, (types.GetSetDescriptorType, types.MemberDescriptorType)):
        yield value


def _contents(function: types.FunctionType) -> list[Any]:
    return [_content(cell) for cell in function.__closure__ or ()]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return _ABSENT


def _remember_items(values: Any, note: Callable[[Any], Any]) -> tuple[Any, ...]:
    return tuple(value if value is _ABSENT else note(value) for value in values or ())


def _are_same(values: Any, remembered: tuple[Any, ...]) -> bool:
    if not remembered:
        return not values
    return len(values) == len(remembered) and all(map(_is_same, values, remembered))


def _absolute(name: str, level: int, package: str | None) -> str:
    if not level or not package:
        return name
    base = package.rsplit(".", level - 1)[0]
    return f"{base}.{name}" if name else base


# ---------------------------------------------------------------- for messages


def captured_values(function: Any) -> Iterator[tuple[str, Any]]:
    """Give the names and values that a function takes along from around it."""
    if not isinstance(function, types.FunctionType):
        return
    for name, value in zip(function.__code__.co_freevars, _contents(function), strict=True):
        if value is not _ABSENT:
            yield name, value
    for name in facts(function.__code__).globals:
        if name in function.__globals__:
            yield name, function.__globals__[name]
