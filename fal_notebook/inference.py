"""Requirements from imports: what `-r auto` means.

Runs in the notebook. An import that is installed here becomes its distribution at the version that
is here; one that is not is taken by its name, or by what a short list of well-known names says.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["infer_requirements"]

_WELL_KNOWN = {
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python-headless",
    "dateutil": "python-dateutil",
    "dotenv": "python-dotenv",
    "fitz": "pymupdf",
    "google": "protobuf",
    "PIL": "pillow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
_OURS = frozenset({"fal_notebook", "fal_agent", "fal"})


def infer_requirements(imports: Iterable[str]) -> list[str]:
    """Give requirement lines for imported modules.

    Args:
        imports: full names of modules, as `import` statements have them.

    Returns:
        Lines such as "numpy==2.4.6", sorted, each distribution once. The standard library, our own
        packages and the notebook's own modules (those under its folder) are left out.
    """
    lines = set()
    for name in {name.partition(".")[0] for name in imports}:
        if name not in sys.stdlib_module_names and name not in _OURS and not _is_local(name):
            lines |= _lines(name)
    return sorted(lines, key=str.lower)


def _lines(module: str) -> set[str]:
    distributions = set(_distributions().get(module, ()))
    if not distributions:
        return {_WELL_KNOWN.get(module, module)}
    return {f"{name}=={importlib.metadata.version(name)}" for name in distributions}


@functools.lru_cache(maxsize=1)
def _distributions() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())


def _is_local(module: str) -> bool:
    """Whether a module lies under the working folder, and not in an environment there."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    here = Path.cwd().resolve()
    for place in places:
        path = Path(place).resolve()
        if path.is_relative_to(here) and not {"site-packages", "dist-packages"} & set(path.parts):
            return True
    return False
