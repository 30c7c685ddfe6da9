"""The files that travel with a function or an app: which they are, given where it is defined.

Runs in the notebook. What is defined in a file takes its files from that file's folder; what is defined in
a notebook, from the kernel's working folder.
"""

from __future__ import annotations

import inspect
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fal_notebook.sync import collect_app_files, read_app_files

if TYPE_CHECKING:
    from fal_agent.framing import Buffer
    from fal_notebook.options import FunctionOptions

__all__ = ["TravellingFiles", "travelling_files"]


@dataclass(frozen=True)
class TravellingFiles:
    """What a call takes along.

    Attributes:
        files: [relative path, blob, mode] of each, as `wire.Call` has them.
        blobs: contents by name.
        import_path: the folder among them that the defining file lay in; "" for the topmost.
    """

    files: list[list[Any]] = field(default_factory=list)
    blobs: dict[str, Buffer] = field(default_factory=dict)
    import_path: str = ""


def travelling_files(defined: Any, settings: FunctionOptions) -> TravellingFiles:
    """Read the `app_files` of a function or an app; the file that defines it is left out: it travels itself.

    Args:
        defined: the function or class.
        settings: its settings.

    Raises:
        FileTooLargeError: a file is larger than 1 GiB.
        AppFileUploadException: a path leads out of the context folder, or a file cannot be read.
    """
    if not settings.app_files:
        return TravellingFiles()
    source = _defining_file(defined)
    context = settings.app_files_context_dir
    if context is None and source is not None:
        context = str(source.parent)
    found = collect_app_files(settings.app_files, ignore=settings.app_files_ignore, context_dir=context)
    if source is not None:
        real = source.resolve()
        found = [file for file in found if file.path.resolve() != real]
    files, blobs = read_app_files(found)
    return TravellingFiles(files, blobs, _below(Path(context or os.curdir).expanduser(), source))


def _defining_file(defined: Any) -> Path | None:
    """Give the file that something is defined in; None for a notebook, or if it has none."""
    unwrapped = inspect.unwrap(defined)
    module = sys.modules.get(getattr(unwrapped, "__module__", None) or type(unwrapped).__module__)
    file = getattr(module, "__file__", None)
    return Path(file).absolute() if file and Path(file).is_file() else None


def _below(context: Path, source: Path | None) -> str:
    """Give the path from the context folder to the folder of the defining file, if that is below it."""
    if source is None:
        return ""
    folder, top = source.parent.resolve(), context.resolve()
    return folder.relative_to(top).as_posix() if top in folder.parents else ""
