"""Make the exception that a failure on a host stands for, ready to raise in the notebook.

Runs in the notebook. An error of the user's code comes back as itself: type, arguments, attributes,
notes, chain, and a traceback made of the remote frames, whose source lines Python and IPython find
in `linecache`. Everything else becomes an error of ours that names the host and the next step.
"""

from __future__ import annotations

import ast
import linecache
import sys
import types
from typing import TYPE_CHECKING, Any, NoReturn

from fal_agent import errors, pickling
from fal_notebook.advice import missing_advice, missing_in, requirement_advice
from fal_notebook.alternatives import elsewhere

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fal_agent.framing import Buffer
    from fal_agent.wire import Failure

__all__ = ["add_note", "exception_from", "make_traceback", "reraise"]

_SIGKILL = 9
_RAISED = "<raised>"  # a name that no variable has


def exception_from(failure: Failure, parts: Sequence[Buffer], host_name: str) -> BaseException:
    """Make the exception of a failure.

    Args:
        failure: what the host sent.
        parts: its data.
        host_name: for messages.

    Returns:
        The user's own error for "user" and "interrupted", with the remote traceback set; a
        `UserFunctionException` caused by a class of the same name where the error's class cannot be
        had here; an error of `fal_agent.errors` for the other kinds.
    """
    if failure.kind == "interrupted" and not parts:
        return KeyboardInterrupt()  # before any of the user's code ran
    if failure.kind in ("user", "interrupted"):
        return _user_error(failure, parts, host_name)
    make = _KINDS.get(failure.kind, _general)
    error = make(failure, host_name)
    frames = failure.detail.get("frames")
    return error.with_traceback(make_traceback(frames, {}, host_name)) if frames else error


def reraise(error: BaseException, traceback: types.TracebackType | None) -> NoReturn:
    """Raise an error with a traceback of its own, however often it was raised before.

    Args:
        error: what `exception_from` gave.
        traceback: its `__traceback__` from then.

    Raises:
        BaseException: the error.
    """
    __tracebackhide__ = True
    raise error.with_traceback(traceback)


# ---------------------------------------------------------------- the user's errors


def _user_error(failure: Failure, parts: Sequence[Buffer], host_name: str) -> BaseException:
    detail = failure.detail
    frames = detail.get("frames", ())
    for frame, variables in zip(reversed(frames), detail.get("variables", ()), strict=False):
        frame["variables"] = variables
    described = [detail, *detail.get("chain", ())]
    opened = _open(parts, len(described))
    links: list[BaseException] = []
    for link, description in zip(opened, described, strict=True):
        error = link if link is not None else _stand_in(description)
        _dress(error, description, detail.get("sources", {}), host_name)
        links.append(error)
    for error, description in zip(links, described, strict=True):
        cause, context = description.get("cause"), description.get("context")
        error.__cause__ = None if cause is None else links[cause + 1]
        error.__context__ = None if context is None else links[context + 1]
        error.__suppress_context__ = bool(description.get("suppress"))
        for member, index in zip(
            getattr(error, "exceptions", ()), description.get("group", ()), strict=False
        ):
            member.__traceback__ = links[index + 1].__traceback__
    first = links[0]
    if opened[0] is None:
        return _wrapped(first, failure, host_name)
    if isinstance(first, ModuleNotFoundError) and first.name:
        add_note(first, missing_advice(first.name, host_name))
    elif (requirement := missing_in(first)) is not None:
        add_note(first, requirement_advice(requirement, host_name))
    return first


def _open(parts: Sequence[Buffer], count: int) -> list[BaseException | None]:
    """Unpickle each error of a chain; None for one whose class cannot be had here."""
    pickles: list[Any] = pickling.load(parts) if parts else []
    opened: list[BaseException | None] = []
    for item in [*pickles, *[None] * count][:count]:
        try:
            error = None if item is None else pickling.load(item)
        except Exception:  # noqa: BLE001 - its class is missing here, or refuses: a stand-in tells the same
            error = None
        opened.append(error if isinstance(error, BaseException) else None)
    return opened


def _stand_in(description: dict[str, Any]) -> BaseException:
    """Make an error of a class of the same name and module."""
    name = str(description.get("type", "Exception"))
    namespace = {"__module__": description.get("module", "builtins"), "__qualname__": name}
    cls = types.new_class(
        name.rpartition(".")[2], (Exception,), exec_body=lambda body: body.update(namespace)
    )
    error: BaseException = cls(description.get("text", ""))
    for note in description.get("notes", ()):
        add_note(error, note)
    return error


def _wrapped(error: BaseException, failure: Failure, host_name: str) -> BaseException:
    """Say that the class of an error cannot be had here."""
    module = failure.detail.get("module", "builtins")
    wrapper = errors.UserFunctionException(
        f"{failure.message}\n(raised on {host_name!r}; its class {module}.{failure.detail.get('type')} "
        "cannot be rebuilt in this notebook)"
    )
    wrapper.__cause__ = error
    return wrapper.with_traceback(error.__traceback__)


def _dress(
    error: BaseException, description: dict[str, Any], sources: dict[str, str], host_name: str
) -> None:
    """Give an error the traceback of the remote frames."""
    frames = description.get("frames", ())
    error.__traceback__ = make_traceback(frames, sources, host_name)
    skipped = sum(frame.get("skipped", 0) for frame in frames)
    if skipped:
        add_note(error, f"({skipped} frames in the middle of the traceback are not shown)")


def add_note(error: BaseException, note: str) -> None:
    """`add_note`, also on Python 3.10, where tracebacks do not print notes yet."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.__notes__ = [*getattr(error, "__notes__", ()), note]  # type: ignore[attr-defined] # Python 3.11


# ---------------------------------------------------------------- tracebacks


def make_traceback(
    frames: Sequence[dict[str, Any]], sources: dict[str, str], host_name: str
) -> types.TracebackType | None:
    """Make a traceback of frames as `fal_agent.frames.user_frames` describes them.

    A file that is the same here is shown as that file. One that this machine does not have is put
    into `linecache`; one that is another here is shown under "HOST:NAME".

    Args:
        frames: outermost first.
        sources: text of files by name.
        host_name: for the names of files that differ.
    """
    traceback: types.TracebackType | None = None
    for frame in reversed(frames):
        step = _step({**frame, "filename": _show(frame, sources, host_name)})
        traceback = types.TracebackType(traceback, step.tb_frame, step.tb_lasti, step.tb_lineno)
    return traceback


def _step(frame: dict[str, Any]) -> types.TracebackType:
    """Make one step of a traceback: raise at that very place of a file of that name.

    The code that raises begins where the real function does, because IPython shows lines from there.
    """
    function = types.FunctionType(_raising_code(frame), {_RAISED: _Marker, "__name__": "<remote>"})
    try:
        function(*map(_variable, frame.get("variables", {}).values()))
    except _Marker as marker:
        own = marker.__traceback__
    step = own.tb_next if own is not None else None
    assert step is not None
    return step


def _raising_code(frame: dict[str, Any]) -> types.CodeType:
    line = max(int(frame["lineno"]), 1)
    begin = min(max(int(frame.get("firstlineno") or 1), frame["around"][0] if "around" in frame else 1), line)
    here = {
        "lineno": line,
        "end_lineno": max(int(frame.get("end_lineno") or line), line),
        "col_offset": frame.get("colno") or 0,
        "end_col_offset": frame.get("end_colno") or 0,
    }
    there: dict[str, Any] = {
        "lineno": begin,
        "end_lineno": here["end_lineno"],
        "col_offset": 0,
        "end_col_offset": 0,
    }
    (definition,) = ast.parse("def function(): pass").body
    assert isinstance(definition, ast.FunctionDef)
    definition.body = [ast.Raise(ast.Name(_RAISED, ast.Load(), **here), None, **here)]
    definition.args.args = [ast.arg(name, **there) for name in frame.get("variables", ())]
    for name, value in there.items():
        setattr(definition, name, value)
    module = compile(ast.Module([definition], []), frame["filename"], "exec")
    code: types.CodeType = next(item for item in module.co_consts if isinstance(item, types.CodeType))
    if sys.version_info >= (3, 11):
        code = code.replace(co_qualname=frame["name"])
    return code.replace(co_name=frame["name"])


def _variable(told: Any) -> Any:
    """Give what stands for a variable's value: itself, if it is plain, or its text."""
    return told[0] if isinstance(told, list) else Elsewhere(told)


class Elsewhere:
    """A value that stayed on a host and was let go of there: only its text is known."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


class _Marker(Exception):  # noqa: N818 - never seen
    """What is raised to get at a frame."""


def _show(frame: dict[str, Any], sources: dict[str, str], host_name: str) -> str:
    """Give the name under which `linecache` has the lines of a frame's file."""
    filename = str(frame["filename"])
    first, text = 1, sources.get(filename)
    if text is None:
        first, text = frame.get("around") or (0, None)
    if text is None:
        return filename
    lines = text.splitlines(keepends=True)
    known = linecache.getlines(filename)
    if _stripped(known[first - 1 : first - 1 + len(lines)]) == _stripped(lines):
        return filename
    name = f"{host_name}:{filename}" if known and filename not in _shown else filename
    _shown.add(name)
    present = [] if name not in linecache.cache else linecache.getlines(name)
    merged = present + ["\n"] * (first - 1 + len(lines) - len(present))
    merged[first - 1 : first - 1 + len(lines)] = lines
    # Without a modification time the entry is not looked for on disk and stays.
    linecache.cache[name] = (sum(map(len, merged)), None, merged, name)
    return name


def _stripped(lines: Sequence[str]) -> list[str]:
    return [line.rstrip() for line in lines]


_shown: set[str] = set()  # names in `linecache` that are ours


# ---------------------------------------------------------------- other failures


def _missing(failure: Failure, host_name: str) -> BaseException:
    module = str(failure.detail.get("module", "?"))
    names = [str(name) for name in failure.detail.get("names", ()) if not str(name).startswith("_")]
    used = f" (used: {', '.join(names)})" if names else ""
    return errors.FalMissingDependencyError(
        f"the call could not be opened on {host_name!r}: module {module!r} is missing there{used}; "
        f"{missing_advice(module, host_name)}"
    )


def _lost(failure: Failure, host_name: str) -> BaseException:
    status = failure.detail.get("exit_status")
    message = _named(failure.message, host_name)
    if status in (-_SIGKILL, 128 + _SIGKILL) and "memory" not in message:
        message += "; most likely the machine ran out of memory. Use less memory, or a bigger machine_type"
    message += (
        ". What that process kept (cached values, names of a session) is gone; the next call starts a new one"
    )
    return errors.WorkerLostError(message, status if isinstance(status, int) else None)


def _environment(failure: Failure, host_name: str) -> BaseException:
    return errors.EnvironmentBuildError(
        _named(failure.message, host_name), str(failure.detail.get("log", ""))
    )


def _resources(failure: Failure, host_name: str) -> BaseException:
    message = _named(failure.message, host_name)
    if "resources" in failure.detail:
        message = "\n".join([message, *elsewhere(failure.detail["resources"], host_name)])
    return errors.ResourceError(message)


def _named(message: str, host_name: str) -> str:
    """Name the host in a message that does not."""
    return message if repr(host_name) in message else f"on {host_name!r}: {message}"


def _as(cls: Callable[[str], BaseException]) -> Callable[[Failure, str], BaseException]:
    return lambda failure, host_name: cls(_named(failure.message, host_name))


_general = _as(errors.FalServerlessError)

_KINDS: dict[str, Callable[[Failure, str], BaseException]] = {
    "serialization": _as(errors.FalSerializationError),
    "deserialization": _general,
    "missing": _missing,
    "environment": _environment,
    "requirement": _as(errors.RequirementError),
    "resources": _resources,
    "python": _general,
    "timeout": _as(errors.CallTimeoutError),
    "cancelled": _as(errors.CallCancelledError),
    "unknown": _general,
    "lost": _lost,
    "link": _as(errors.LinkLostError),
    "unreachable": _as(errors.HostUnreachableError),
    "agent": _general,
}
