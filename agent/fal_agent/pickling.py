"""Turn values into pickles with their large buffers beside them, and back.

Runs in the notebook and in workers; cloudpickle is imported on first use. Data is a list of
buffers: the pickle, then its out-of-band buffers in order. Functions and classes of `__main__`, and
of modules that the caller names, go by value; everything else that can be imported goes by
reference. A class that comes home to the process that made it is that very class, untouched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import pickle
import sys
import threading
import types
import weakref
from typing import TYPE_CHECKING, Any, ClassVar, Optional, cast

from fal_agent.culprits import explain
from fal_agent.errors import FalSerializationError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from fal_agent.framing import Buffer

__all__ = [
    "ATOMS",
    "dump",
    "dump_parts",
    "explain",
    "is_importable",
    "last_of",
    "load",
    "make_class",
    "measure",
    "note_class",
    "pickler_type",
    "sending_by_value",
]

_OUT_OF_BAND = 8 << 10  # bytes; a smaller buffer costs less inside the pickle
_PROTOCOL = 5
ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes))  # their pickles hold nothing else

# What a dataclass compares its fields with by identity; pickled as they are, each becomes another object.
_MARKS = {
    getattr(dataclasses, name): name
    for name in ("MISSING", "KW_ONLY", "_HAS_DEFAULT_FACTORY")
    if hasattr(dataclasses, name)
}

_registering = threading.RLock()  # cloudpickle's list of modules to send by value is one per process
_natives: weakref.WeakSet[type] = weakref.WeakSet()  # classes made here that went out by value
_native_modules: set[str] = set()  # names of modules of this process that went out by value
_opened: set[str] = set()  # names of modules that came in by value
_foreigners: weakref.WeakSet[type] = weakref.WeakSet()  # classes that came in by value


def dump(
    value: Any,
    *,
    what: str = "the value",
    name: str = "",
    by_value: Collection[str] = (),
    attributes: Optional[frozenset[str]] = None,
) -> list[Buffer]:
    """Pickle a value.

    Args:
        value: anything that cloudpickle can pickle, or that holds locks and `lru_cache` wrappers.
        what: how an error names the value: "the result of f()".
        name: what the value is called, the beginning of the path to the culprit.
        by_value: modules, loaded here, whose functions and classes go by value; packages with all
            that is below them.
        attributes: when such a module itself travels, only its attributes of these names go along;
            None takes every one that can be pickled.

    Returns:
        The pickle, then its out-of-band buffers: views on the value's own memory, each of one
        dimension, contiguous and of 8 KiB or more.

    Raises:
        FalSerializationError: it cannot be pickled; the message names the path to the culprit.
    """
    if type(value) in ATOMS:
        return [pickle.dumps(value, _PROTOCOL)]
    try:
        with sending_by_value(by_value):
            return dump_parts(value, attributes)
    except Exception as error:
        with sending_by_value(by_value):
            reason = explain(value, error, _can_pickle, name)
        raise FalSerializationError(f"{what} cannot be pickled, so it cannot travel: {reason}") from error


def load(parts: Sequence[Buffer]) -> Any:
    """Unpickle what `dump` made.

    Args:
        parts: the pickle and its buffers. A writable buffer is used in place, a read-only one is
            copied, so that arrays can be written to as those at home.

    Raises:
        Exception: whatever the value's classes raise; ModuleNotFoundError for modules missing here.
    """
    if len(parts) == 1:
        return pickle.loads(parts[0])
    return pickle.loads(parts[0], buffers=[_writable(part) for part in parts[1:]])


def last_of(*items: Any) -> Any:
    """Give the last item; a pickle names this function to bring other values along."""
    return items[-1]


def measure(value: Any) -> int:
    """Give the bytes that a value takes pickled, buffers included.

    Raises:
        Exception: it cannot be pickled.
    """
    return sum(len(part) for part in dump_parts(value))


def dump_parts(value: Any, attributes: Optional[frozenset[str]] = None) -> list[Buffer]:
    """Pickle as `dump` does, but let errors out as they are; for those who will try something else."""
    views, keep = out_of_band()
    file = io.BytesIO()
    pickler_type()(file, keep, attributes).dump(value)
    return [file.getvalue(), *views]


def out_of_band() -> tuple[list[Buffer], Callable[[pickle.PickleBuffer], bool]]:
    """Give a list, and the buffer callback for a pickler that puts buffers of 8 KiB or more there."""
    views: list[Buffer] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if len(view) < _OUT_OF_BAND:
            return True
        views.append(view)
        return False

    return views, keep


def _writable(part: Buffer) -> Buffer:
    if isinstance(part, memoryview) and not part.readonly:
        return part
    return part if isinstance(part, bytearray) else bytearray(part)


def _can_pickle(value: Any) -> None:
    """Raise what pickling the value raises; its result is thrown away as it is made."""
    pickler_type()(_Nowhere(), lambda _buffer: False, None).dump(value)


class _Nowhere:
    """A file that forgets."""

    def write(self, data: Buffer) -> int:
        return len(data)


# ---------------------------------------------------------------- what goes by value


@contextlib.contextmanager
def sending_by_value(names: Collection[str]) -> Iterator[None]:
    """Tell cloudpickle, for a while, to send modules by value."""
    if not names:
        yield
        return
    import cloudpickle

    with _registering:
        known = cloudpickle.list_registry_pickle_by_value()
        added = [sys.modules[name] for name in names if name in sys.modules and name not in known]
        for module in added:
            cloudpickle.register_pickle_by_value(module)
        try:
            yield
        finally:
            for module in added:
                cloudpickle.unregister_pickle_by_value(module)


def _goes_by_value(module_name: str) -> bool:
    """Whether functions of a module go by value for now."""
    import cloudpickle

    known = cloudpickle.list_registry_pickle_by_value()
    while known and module_name:
        if module_name in known:
            return True
        module_name = module_name.rpartition(".")[0]
    return False


def is_importable(value: Any) -> bool:
    """Whether the other side finds the value under its module and qualified name."""
    module_name = getattr(value, "__module__", None)
    if not isinstance(module_name, str) or module_name == "__main__" or _goes_by_value(module_name):
        return False
    found: Any = sys.modules.get(module_name)
    for name in getattr(value, "__qualname__", "").split("."):
        found = getattr(found, name, None)
    return found is value


# ---------------------------------------------------------------- the pickler


@functools.cache
def pickler_type() -> Callable[..., pickle.Pickler]:
    """Make our pickler's class, once: its base is imported on first use."""
    import _thread
    from collections import ChainMap

    import cloudpickle

    reducers = {
        _thread.LockType: _reduce_lock,
        _thread.RLock: _reduce_rlock,
        functools._lru_cache_wrapper: _reduce_lru_cache,  # noqa: SLF001 - the type has no other name
        types.TracebackType: _reduce_traceback,
        types.CodeType: _reduce_code,
        **dict.fromkeys(map(type, _MARKS), _reduce_mark),
    }

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc] # cloudpickle has no types
        """cloudpickle's pickler with a few more reducers, and classes that keep their home."""

        dispatch_table: ClassVar[Any] = ChainMap(reducers, cloudpickle.Pickler.dispatch_table)

        def __init__(
            self, file: Any, keep: Callable[..., bool], attributes: Optional[frozenset[str]]
        ) -> None:
            super().__init__(file, protocol=_PROTOCOL, buffer_callback=keep)
            self._attributes = attributes

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, types.ModuleType) and _goes_by_value(obj.__name__):
                if obj.__name__ not in _opened:
                    _native_modules.add(obj.__name__)
                state = _module_state(obj, self._attributes)
                return _open_module, (obj.__name__,), state, None, None, _fill_module
            reduced = super().reducer_override(obj)
            if isinstance(obj, type) and type(reduced) is tuple and len(reduced) == 6:  # noqa: PLR2004 - see pickle
                make, arguments, state, _, _, set_state = reduced
                state[0].pop("__slotnames__", None)  # what `copyreg` noted of it when an instance was pickled
                note_class(obj)
                return make_class, (make, *arguments), (set_state, state), None, None, _set_class_state
            return reduced

    return Pickler


def make_class(make: Callable[..., type], *arguments: Any) -> type:
    """Give the class that is known under an id, or else make it: made again, it would be registered twice.

    Both functions by which cloudpickle makes classes take the id last but one, and use it only in the end.
    """
    from cloudpickle import cloudpickle

    known = cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.get(arguments[-2])  # noqa: SLF001 - no other way to ask
    return make(*arguments) if known is None else cast("type", known)


def note_class(cls: type, *, came: bool = False) -> None:
    """Know a class that goes out by value as one of this process, or one that came as another's."""
    if came and cls not in _natives:
        _foreigners.add(cls)
    elif cls not in _foreigners:
        _natives.add(cls)


def _set_class_state(cls: type, state: tuple[Callable[[type, Any], Any], Any]) -> None:
    """Fill a class that came by value, unless it was made here and has only come home.

    cloudpickle gives the class it knows under the same id. Setting its state would replace the
    methods of the notebook's own class by copies that see copies of the globals.
    """
    if cls in _natives:
        return
    note_class(cls, came=True)
    set_state, content = state
    set_state(cls, content)


def _reduce_lock(_lock: Any) -> tuple[Any, ...]:
    return threading.Lock, ()


def _reduce_rlock(_lock: Any) -> tuple[Any, ...]:
    return threading.RLock, ()


def _reduce_mark(mark: Any) -> str:
    return _MARKS[mark]


def _reduce_traceback(_traceback: Any) -> tuple[Any, ...]:
    """Frames stay where they are; tracebacks of failures travel as text (see `fal_agent.failures`)."""
    return _nothing, ()


def _reduce_code(code: types.CodeType) -> tuple[Any, ...]:
    """Keep the name of the file: cloudpickle from 3.1.3 on replaces it, and tracebacks lose their lines."""
    import cloudpickle

    make, arguments = cloudpickle.Pickler.dispatch_table[types.CodeType](code)
    return _make_code, (make, arguments, "".join(code.co_filename))


def _make_code(
    make: Callable[..., types.CodeType], arguments: tuple[Any, ...], filename: str
) -> types.CodeType:
    return make(*arguments).replace(co_filename=filename)


def _reduce_lru_cache(wrapper: Any) -> Any:
    if is_importable(wrapper):
        return wrapper.__qualname__
    return _make_lru_cache, (wrapper.__wrapped__, wrapper.cache_parameters())


def _make_lru_cache(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def _nothing() -> None:
    return None


# ---------------------------------------------------------------- modules by value

_KEPT = ("__doc__", "__file__", "__package__", "__path__")


def _module_state(module: types.ModuleType, attributes: Optional[frozenset[str]]) -> dict[str, Any]:
    """Give what travels of a module."""
    state = {name: vars(module)[name] for name in _KEPT if name in vars(module)}
    for name, value in list(vars(module).items()):
        if name.startswith("__") and name.endswith("__"):
            continue
        if name in attributes if attributes is not None else _travels(value):
            state[name] = value
    if "__path__" in state:
        state["__path__"] = list(state["__path__"])
    return state


def _travels(value: Any) -> bool:
    """Whether pickling works; functions, classes and modules are taken at their word."""
    if isinstance(value, (types.FunctionType, type, types.ModuleType, int, str, float, bytes, type(None))):
        return True
    try:
        _can_pickle(value)
    except Exception:  # noqa: BLE001 - a module may hold anything, and most of it is not used
        return False
    return True


def _open_module(name: str) -> types.ModuleType:
    """Make a module that came by value; `import` finds it from now on, unless it came home."""
    module = types.ModuleType(name)
    if name in _native_modules:
        return module
    _opened.add(name)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)
    return module


def _fill_module(module: types.ModuleType, state: dict[str, Any]) -> None:
    vars(module).update(state)
