"""Describe an error so that it can be raised again somewhere else, as itself.

Runs in workers, and in the notebook for the host that is the notebook itself. What a person needs to
see (frames, source lines, notes, the chain of causes) goes as text; the exception objects go as
pickles, one for each link of the chain, so that one that cannot be rebuilt spoils no other.
Nothing here raises, whatever the error's own methods do.
"""

from __future__ import annotations

import builtins
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Optional

from fal_agent import pickling
from fal_agent.errors import FalSerializationError
from fal_agent.frames import Sources, format_frames, is_opening, user_frames

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fal_agent.framing import Buffer
    from fal_agent.masking import Masker

__all__ = ["OpeningError", "describe"]

_MAX_LINKS = 24  # errors of one chain, groups included
_MAX_TEXT = 16 << 10  # characters of an error's text
_MAX_PICKLE = 64 << 20  # bytes of one error; a larger one loses its attributes
_MAX_DETAIL = 768 << 10  # bytes as JSON; a frame's header has 1 MiB


class OpeningError(Exception):
    """Data that came to a worker cannot be opened there.

    Attributes:
        kind: "missing" when a module is not there, else "deserialization".
        message: what happened and what to do next.
        detail: for "missing": "module", and "names", what of it is used.
    """

    def __init__(self, kind: str, message: str, detail: Optional[dict[str, Any]] = None) -> None:
        super().__init__(kind, message, detail)
        self.kind, self.message, self.detail = kind, message, detail or {}

    def __str__(self) -> str:
        return self.message


def describe(
    error: BaseException, *, hide: Sequence[str] = (), masker: Optional[Masker] = None
) -> tuple[str, str, dict[str, Any], list[Buffer]]:
    """Describe an error that the user's code raised, or that opening its data met.

    Args:
        error: with the traceback it was caught with.
        hide: folders whose frames are left out, besides our own package's.
        masker: takes secrets out of all of it; texts that the error holds are changed in place.

    Returns:
        The kind and the message of a `wire.Failure`; its detail; and its data.

        The detail describes the error: "type" (qualified name), "module", "text", "notes",
        "frames", and "traceback", the frames as text. "cause", "context" and "group" are positions
        in "chain", which holds such a description of each further error. "sources" maps file names
        to their text, where more than the frames' own lines is known.

        The data is the pickle of a list that holds, for the error and each further one, what
        `pickling.load` makes it from, or None if its class cannot be rebuilt. "stand_in" says that
        this is so for the error itself.
    """
    if masker is not None:
        return _without_secrets(error, hide, masker)
    if isinstance(error, OpeningError):
        return error.kind, error.message, {**error.detail, "frames": []}, []
    if isinstance(error, FalSerializationError):
        return "serialization", str(error), {"frames": user_frames(error, Sources(), hide)}, []
    if is_opening(error, hide):
        return _describe_opening(error)
    sources = Sources()
    links = _links(error)
    described = [_describe_one(link, links, sources, hide) for link in links]
    detail = {**described[0], "chain": described[1:], "sources": sources.texts}
    detail["traceback"] = format_frames(detail["frames"])
    kind = "interrupted" if isinstance(error, KeyboardInterrupt) else "user"
    message = f"{detail['type']}: {detail['text']}" if detail["text"] else str(detail["type"])
    pickles = [_pickle_one(link) for link in links]
    detail["stand_in"] = pickles[0] is None
    data = pickling.dump(pickles) if any(item is not None for item in pickles) else []
    return kind, message[:4096], _fitted(detail), data


def _without_secrets(
    error: BaseException, hide: Sequence[str], masker: Masker
) -> tuple[str, str, dict[str, Any], list[Buffer]]:
    """Describe an error without secrets; one that still holds them then travels as text."""
    for link in _links(error):
        with suppress(Exception):  # a user's class may forbid it
            link.args = tuple(masker.mask_all(list(link.args)))
            vars(link).update({name: masker.mask_all(value) for name, value in vars(link).items()})
    kind, message, detail, data = describe(error, hide=hide)
    if masker.is_in(data):
        data = []
        detail["stand_in"] = True
    return kind, masker.mask(message), masker.mask_all(detail), data


def _describe_opening(error: BaseException) -> tuple[str, str, dict[str, Any], list[Buffer]]:
    """Describe an error that came out of unpickling."""
    text = _text(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return "missing", text, {"module": error.name, "names": [], "frames": []}, []
    message = f"what was sent cannot be opened there: {type(error).__name__}: {text}"
    return "deserialization", message, {"frames": user_frames(error, Sources(), ())}, []


# ---------------------------------------------------------------- one link of the chain


def _links(error: BaseException) -> list[BaseException]:
    """Give the error and every other that it leads to, each once."""
    links = [error]
    for link in links:  # grows meanwhile
        for other in (link.__cause__, link.__context__, *_group(link)):
            if other is not None and len(links) < _MAX_LINKS and not any(other is known for known in links):
                links.append(other)
    return links


def _group(error: BaseException) -> tuple[BaseException, ...]:
    """Give the errors in an exception group."""
    group_type = getattr(builtins, "BaseExceptionGroup", None)  # Python 3.11
    if group_type is None or not isinstance(error, group_type):
        return ()
    members: tuple[BaseException, ...] = error.exceptions
    return members


def _describe_one(
    error: BaseException, links: list[BaseException], sources: Sources, hide: Sequence[str]
) -> dict[str, Any]:
    def position(other: Optional[BaseException]) -> Optional[int]:
        found = [index for index, link in enumerate(links) if link is other]
        return found[0] - 1 if found and found[0] > 0 else None

    return {
        "type": type(error).__qualname__,
        "module": type(error).__module__,
        "text": _text(error),
        "notes": _notes(error),
        "frames": user_frames(error, sources, hide),
        "cause": position(error.__cause__),
        "context": position(error.__context__),
        "suppress": bool(error.__suppress_context__),
        "group": [index for index in map(position, _group(error)) if index is not None],
    }


def _text(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception as problem:  # noqa: BLE001 - a user's __str__ may do anything
        text = f"<its text cannot be had: __str__ raised {type(problem).__name__}>"
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}... ({len(text)} characters in all)"


def _notes(error: BaseException) -> list[str]:
    notes = getattr(error, "__notes__", None)
    if not isinstance(notes, (list, tuple)):
        return []
    return [note[:_MAX_TEXT] for note in notes if isinstance(note, str)][:32]


# ---------------------------------------------------------------- pickles that open again


def _pickle_one(error: BaseException) -> Optional[list[bytes]]:
    """Give data known to open as an error of the same class; None if there is no way."""
    for make in (_as_it_is, _rebuilt, _bare):
        try:
            parts = [bytes(part) for part in pickling.dump_parts(make(error))]
            if sum(map(len, parts)) <= _MAX_PICKLE and _is_like(pickling.load(parts), error, make):
                return parts
        except Exception:  # noqa: BLE001, S112, PERF203 - the next way asks less of the class
            continue
    return None


def _is_like(opened: Any, error: BaseException, make: Any) -> bool:
    """Whether it says what the error says: pickle calls a constructor with `args` it may have changed."""
    return type(opened) is type(error) and (make is not _as_it_is or _text(opened) == _text(error))


def _as_it_is(error: BaseException) -> Any:
    """The class's own way."""
    return error


def _rebuilt(error: BaseException) -> Any:
    """Past the class's constructor, with each argument and attribute that can be pickled."""
    arguments = tuple(item if _is_fine(item) else _stand_in(item) for item in error.args)
    state = {name: item for name, item in vars(error).items() if _is_fine(item)}
    return _Rebuilt(type(error), arguments, state)


def _bare(error: BaseException) -> Any:
    """Its class and its text."""
    return _Rebuilt(type(error), (_text(error),), {})


class _Rebuilt:
    """Pickles as an error made by `rebuild_error`."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def __reduce__(self) -> Any:
        return rebuild_error, self._arguments


def rebuild_error(
    cls: type[BaseException], arguments: tuple[Any, ...], state: dict[str, Any]
) -> BaseException:
    """Make an error without its class's constructor, which may ask for other arguments than it keeps."""
    error = cls.__new__(cls, *arguments)
    error.args = arguments
    vars(error).update(state)
    return error


def _is_fine(value: Any) -> bool:
    try:
        pickling.load(pickling.dump_parts(value))
    except Exception:  # noqa: BLE001 - pickling and unpickling run the user's code
        return False
    return True


def _stand_in(value: Any) -> str:
    try:
        return repr(value)[:256]
    except Exception:  # noqa: BLE001 - a user's __repr__ may do anything
        return f"<{type(value).__name__}>"


# ---------------------------------------------------------------- the limit of a frame's header


def _fitted(detail: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is least missed until the detail fits a frame's header."""
    if _size(detail) > _MAX_DETAIL:
        detail["sources"] = {}
    if _size(detail) > _MAX_DETAIL:
        for described in (detail, *detail["chain"]):
            for frame in described["frames"]:
                frame.pop("around", None)
    if _size(detail) > _MAX_DETAIL:
        for described in (detail, *detail["chain"]):
            described["text"], described["notes"] = described["text"][:1024], []
            described["frames"] = described["frames"][-8:]
        detail["traceback"] = format_frames(detail["frames"])
    return detail


def _size(detail: dict[str, Any]) -> int:
    return len(json.dumps(detail))
