"""Pack functions and arguments for travel.

Runs in the notebook; the only file there that pickles what goes out. Everything travels as it is at
the moment of the call. A function of which nothing has changed is not pickled again: see
`fal_notebook.captures`.
"""

from __future__ import annotations

import contextlib
import inspect
import pickle
import sys
import types
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fal_agent import pickling
from fal_agent.errors import FalSerializationError
from fal_agent.namespaces import Dumped, dump_named
from fal_agent.wire import INLINE_LIMIT, Call
from fal_notebook import local_modules
from fal_notebook.captures import Plan, captured_values
from fal_notebook.hosts.base import Parcel

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from fal_agent.framing import Buffer
    from fal_agent.wire import Data

__all__ = [
    "HUGE",
    "Packed",
    "copied",
    "make_parcel",
    "pack_arguments",
    "pack_function",
    "pack_named",
]

HUGE = 64 << 20  # bytes; a captured value above is named in a warning
_SMALL = 4096  # bytes; a smaller part stays in the message though others become blobs
_MAX_SMALL = 32
_MAX_INLINE_PARTS = 1024

_NO_ARGUMENTS = [pickle.dumps(((), {}), 5)]


@dataclass(frozen=True)
class Packed:
    """A function ready to travel.

    Attributes:
        digest: 32 hex digits that name `parts`.
        parts: the pickle of (function, setup function or None), and its out-of-band buffers.
        reusable: the function captured nothing that can change, so a worker may call it again as it is.
    """

    digest: str
    parts: Sequence[Buffer]
    reusable: bool


# ---------------------------------------------------------------- functions


def pack_function(
    func: Callable[..., Any],
    setup_function: Callable[[], Any] | None = None,
    *,
    local_modules: Sequence[str] = (),
    serializer: str = "cloudpickle",
) -> Packed:
    """Pack a function with all that it uses: closure, defaults, globals, by their values now.

    Args:
        func: any callable.
        setup_function: travels with it.
        local_modules: modules that go by value, besides the local ones (`fal_notebook.local_modules`).
        serializer: "cloudpickle" or "dill".

    Raises:
        FalSerializationError: something it uses cannot be pickled; the message names it.
        SyntaxError: a local module was edited and cannot be loaded any more.
        ValueError: `local_modules` names a module that does not exist.
    """
    options = (tuple(local_modules), serializer, None if setup_function is None else id(setup_function))
    try:
        packing = _packings.get(func)
    except TypeError:  # it cannot be hashed
        return _Packing(func, setup_function, options).pack(func, setup_function)
    if packing is None or packing.options != options or not packing.is_current():
        packing = _Packing(func, setup_function, options)
        with contextlib.suppress(TypeError):  # nothing can refer to it weakly
            _packings[func] = packing
    return packing.pack(func, setup_function)


class _Packing:
    """What is known about packing one function."""

    def __init__(self, func: Any, setup: Any, options: tuple[tuple[str, ...], str, int | None]) -> None:
        self.options = options
        named, self._serializer, _ = options
        local_modules.import_named(named)
        local_modules.reload_edited({*named, *local_modules.local_names()})
        self._by_value = _by_value(named, func, setup)
        functions = (func,) if setup is None else (func, setup)
        self._plan = Plan(functions, self._goes_by_value)
        self._imports = [name for name in sorted(self._plan.imports) if self._is_own_import(name)]
        travelling = {name.partition(".")[0] for name in (*self._plan.modules, *self._imports)}
        self._files = local_modules.files_of(travelling)
        self._packed: Packed | None = None
        self._warned: set[str] = set()

    def is_current(self) -> bool:
        """Whether all that travels is bound as it was."""
        return (not self._files or local_modules.are_as_loaded(self._files)) and self._plan.is_current()

    def pack(self, func: Any, setup: Any) -> Packed:
        """Give the packed function, made anew if anything in it may have changed."""
        if self._packed is not None and self._is_constant:
            return self._packed
        parts = self._dump(func, setup)
        digest = _digest(parts)
        if self._packed is not None and self._packed.digest == digest:
            return self._packed
        self._warn_of_size(func, setup, parts)
        # What is kept must stay as it is whatever becomes of the values.
        self._packed = Packed(digest, [_copied(part) for part in parts], self._is_reusable)
        return self._packed

    @property
    def _is_constant(self) -> bool:
        return self._plan.is_constant and not self._imports

    @property
    def _is_reusable(self) -> bool:
        return self._plan.is_reusable and not self._imports and self._serializer == "cloudpickle"

    def _goes_by_value(self, module_name: str) -> bool:
        return _is_below(module_name, self._by_value)

    def _is_own_import(self, name: str) -> bool:
        """Whether an import statement in the function names a local module; it is imported here then."""
        if not self._goes_by_value(name) and not local_modules.find_own(name):
            return False
        try:
            local_modules.import_named([name])
        except (ImportError, ValueError):  # it may well work on the host
            return False
        self._by_value = {*self._by_value, name.partition(".")[0]}
        return True

    def _dump(self, func: Any, setup: Any) -> list[Buffer]:
        pair: Any = (func, setup)
        if self._serializer == "dill":
            return _dump_with_dill(pair, func)
        if self._imports:
            pair = _WithModules(self._imports, pair)
        attributes = frozenset(self._plan.attributes) if self._plan.is_constant else None
        try:
            return pickling.dump(pair, by_value=self._by_value, attributes=attributes)
        except FalSerializationError as error:
            raise _blame(func, setup, self._by_value, error) from error.__cause__

    def _warn_of_size(self, func: Any, setup: Any, parts: Sequence[Buffer]) -> None:
        if sum(len(part) for part in parts) <= HUGE:
            return
        for name, value in (*captured_values(func), *captured_values(setup)):
            size = _size(value)
            if size > HUGE and name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"{_name(func)}() captures {name!r}, {size / 1e6:.0f} MB pickled, which travels with the "
                    "function. Pass it as an argument, or load it on the host, if that is not what you want",
                    stacklevel=_levels_to_the_user(),
                )


_packings: weakref.WeakKeyDictionary[Any, _Packing] = weakref.WeakKeyDictionary()


class _WithModules:
    """Pickles as its last item, and brings modules along that `import` will find."""

    def __init__(self, names: Sequence[str], value: Any) -> None:
        self._names, self._value = names, value

    def __reduce__(self) -> Any:
        return pickling.last_of, ([sys.modules[name] for name in self._names], self._value)


def _by_value(named: Sequence[str], *functions: Any) -> set[str]:
    """Give the modules that go by value with some functions."""
    own = {local_modules.own_package(function) for function in functions}
    return {*named, *local_modules.local_names(), *(name for name in own if name is not None)}


def _is_below(module_name: str, names: Collection[str]) -> bool:
    while module_name:
        if module_name in names:
            return True
        module_name = module_name.rpartition(".")[0]
    return False


def _blame(
    func: Any, setup: Any, by_value: Collection[str], error: FalSerializationError
) -> FalSerializationError:
    """Say which function cannot be pickled and what of it."""
    for function, role in ((func, "function"), (setup, "setup function")):
        if function is None:
            continue
        try:
            pickling.dump(
                function, what=f"{role} {_name(function)}()", name=_name(function), by_value=by_value
            )
        except FalSerializationError as precise:
            return precise
    return error


def _dump_with_dill(pair: Any, func: Any) -> list[Buffer]:
    import dill

    try:
        return [dill.dumps(pair, protocol=5, recurse=True)]
    except Exception as error:
        raise FalSerializationError(
            f"function {_name(func)}() cannot be pickled by dill, so it cannot travel: "
            f"{type(error).__name__}: {error}"
        ) from error


# ---------------------------------------------------------------- arguments


def pack_arguments(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    label: str = "the function",
    func: Callable[..., Any] | None = None,
    snapshot: bool = True,
) -> list[Buffer]:
    """Pickle the arguments of a call.

    Args:
        args: positional ones.
        kwargs: named ones.
        label: the function's name, for errors.
        func: the function, for the names of its parameters in errors.
        snapshot: copy large buffers, so that they may change while the data travels; False leaves
            views of the arguments' own memory, for a caller that waits.

    Returns:
        The pickle of (args, kwargs), and its out-of-band buffers.

    Raises:
        FalSerializationError: one cannot be pickled; the message names it.
    """
    if not kwargs:
        if not args:
            return _NO_ARGUMENTS  # type: ignore[return-value] # a list of bytes is a list of buffers nobody changes
        if pickling.ATOMS.issuperset(map(type, args)):
            return [pickle.dumps((args, kwargs), 5)]
    by_value = local_modules.follow_edits()
    try:
        parts = pickling.dump((args, kwargs), by_value=by_value)
    except FalSerializationError as error:
        names = _parameter_names(func, len(args))
        raise (
            _blame_argument(args, kwargs, label, names=names, by_value=by_value) or error
        ) from error.__cause__
    return copied(parts) if snapshot else parts


def pack_named(value: Any, *, name: str, namespace: dict[str, Any]) -> Dumped:
    """Pickle one value that has a name in the notebook; functions in it leave the notebook's names here.

    Args:
        value: anything.
        name: for errors.
        namespace: the notebook's.

    Returns:
        The pickle with views on the value's own memory, and the names that functions in it use.

    Raises:
        FalSerializationError: it cannot be pickled; the message names it.
    """
    by_value = local_modules.follow_edits()
    try:
        with pickling.sending_by_value(by_value):
            return dump_named(value, namespace)
    except Exception as error:
        pickling.dump(value, what=repr(name), name=name, by_value=by_value)  # finds what the reason is
        raise FalSerializationError(f"{name!r} cannot be pickled, so it cannot travel: {error}") from error


def copied(parts: Sequence[Buffer]) -> list[Buffer]:
    """Copy the buffers that are views on memory which may change while the data travels."""
    return [parts[0], *map(_copied, parts[1:])]


def _blame_argument(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    label: str,
    *,
    names: Sequence[str | None],
    by_value: Collection[str],
) -> FalSerializationError | None:
    """Say which argument cannot be pickled and what of it; None if each of them can by itself."""
    named = [
        *((f"argument {index + 1}", names[index], value) for index, value in enumerate(args)),
        *((f"argument {name!r}", name, value) for name, value in kwargs.items()),
    ]
    for what, name, value in named:
        with_name = what if name is None or repr(name) in what else f"{what} ({name!r})"
        try:
            pickling.dump(value, what=f"{with_name} of {label}()", name=name or "", by_value=by_value)
        except FalSerializationError as precise:
            return precise
    return None


def _parameter_names(func: Callable[..., Any] | None, count: int) -> list[str | None]:
    """Give the names of the first parameters, None where there is none."""
    names: list[str | None] = []
    if func is not None:
        try:
            parameters = inspect.signature(func).parameters.values()
        except (TypeError, ValueError):  # written in C, without a signature
            parameters = ()  # type: ignore[assignment]
        plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names.extend(parameter.name for parameter in parameters if parameter.kind in plain)
    return [*names, *[None] * count][:count]


# ---------------------------------------------------------------- parcels


def make_parcel(
    call: Call,
    packed: Packed | None,
    arguments: Sequence[Buffer],
    *,
    blobs: dict[str, Buffer] | None = None,
) -> Parcel:
    """Put a call and its data together.

    Args:
        call: what is to run.
        packed: the function; None for cells.
        arguments: pickle and buffers. More than `INLINE_LIMIT` bytes of them go as blobs named by
            their content, so that the same data is sent to a host once.
        blobs: others that the call refers to, by name.
    """
    refs, buffers, own = split(arguments)
    return Parcel(
        call=call,
        arguments=refs,
        buffers=buffers,
        blobs={**own, **(blobs or {})},
        function_data=packed.parts if packed is not None else (),
    )


def split(parts: Sequence[Buffer]) -> tuple[Data, list[Buffer], dict[str, Buffer]]:
    """Part data into what travels in the message and what travels as blobs.

    Returns:
        The references; the buffers of the message; the blobs by name.
    """
    if len(parts) < _MAX_INLINE_PARTS and sum(map(len, parts)) <= INLINE_LIMIT:
        return list(range(len(parts))), list(parts), {}
    refs: Data = []
    buffers: list[Buffer] = []
    blobs: dict[str, Buffer] = {}
    for part in parts:
        if len(part) <= _SMALL and len(buffers) < _MAX_SMALL:
            refs.append(len(buffers))
            buffers.append(part)
        else:
            name = f"b3-{_digest([part])}"
            refs.append(name)
            blobs[name] = part
    return refs, buffers, blobs


# ---------------------------------------------------------------- small things


def _digest(parts: Sequence[Buffer]) -> str:
    """Give 32 hex digits (128 bits of BLAKE3) that name data."""
    from blake3 import blake3

    hasher = blake3(max_threads=blake3.AUTO) if sum(map(len, parts)) > 1 << 20 else blake3()
    for part in parts:
        hasher.update(b"%d:" % len(part))
        hasher.update(part)
    return hasher.hexdigest(length=16)


def _copied(part: Buffer) -> Buffer:
    """Copy a view on memory that somebody may write to."""
    return bytes(part) if isinstance(part, memoryview) and not isinstance(part.obj, bytes) else part


def _name(function: Any) -> str:
    name: str = getattr(function, "__qualname__", None) or type(function).__qualname__
    return name


def _levels_to_the_user() -> int:
    """Give the `stacklevel`, for whoever called this, of the nearest code that is not ours."""
    ours = str(Path(__file__).parent)
    level, frame = 1, sys._getframe(1)  # noqa: SLF001 - inspect.stack() reads every source file
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        level, frame = level + 1, frame.f_back
    return level


def _size(value: Any) -> int:
    """Give the bytes of a value pickled; 0 where that cannot be found out by itself."""
    if isinstance(value, (types.ModuleType, types.FunctionType, type)):
        return 0
    try:
        return pickling.measure(value)
    except Exception:  # noqa: BLE001 - it travelled as part of the whole; by itself it need not
        return 0
