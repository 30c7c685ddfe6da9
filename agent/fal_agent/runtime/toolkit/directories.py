"""The folders of a host that outlive a run: data, weights, repositories, files, caches.

Runs wherever user code runs. Each is worked out when it is asked for, so that it follows the environment
of the process; none is made before something is put there. `FAL_PERSISTENT_DIR`,
`FAL_MODEL_WEIGHTS_DIR` and `FAL_REPOSITORY_DIR` can be imported from here.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from fal_agent.paths import default_root

__all__ = [
    "below_data",
    "data_root",
    "files_folder",
    "inductor_folder",
    "lock_of",
    "made",
    "repositories",
    "weights",
]


def data_root() -> Path:
    """What `/data` is on this host: $FAL_PERSISTENT_DIR, else `data` in the folder of fal_notebook."""
    chosen = os.environ.get("FAL_PERSISTENT_DIR")
    return Path(chosen).expanduser().absolute() if chosen else default_root() / "data"


def weights() -> Path:
    """Where `download_model_weights` puts files."""
    return data_root() / ".fal" / "model_weights"


def repositories() -> Path:
    """Where `clone_repository` puts repositories."""
    return data_root() / ".fal" / "repos"


def files_folder() -> Path:
    """Where the files lie that apps give away by URL."""
    return data_root() / ".fal" / "files"


def inductor_folder() -> Path:
    """Where what torch.compile made is shared."""
    return data_root() / ".fal" / "inductor-caches"


def lock_of(*what: str) -> Path:
    """The file whose lock is held by whoever makes what these words name."""
    return data_root() / ".fal" / "locks" / hashlib.sha256("\0".join(what).encode()).hexdigest()[:32]


def below_data(path: str | os.PathLike[str]) -> Path:
    """Give an absolute path as it is, a relative one below the data root."""
    return data_root() / Path(path).expanduser()


def made(folder: Path) -> Path:
    """Make a folder and those above it, for the user alone; what exists stays as it is.

    Raises:
        OSError: it cannot be made.
    """
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)
    return missing[0] if missing else folder


_NAMES = {
    "FAL_PERSISTENT_DIR": data_root,
    "FAL_MODEL_WEIGHTS_DIR": weights,
    "FAL_REPOSITORY_DIR": repositories,
}


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _NAMES[name]()


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
