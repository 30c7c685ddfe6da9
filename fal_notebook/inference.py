"""Turn the modules that a cell imports into the requirements that hold them.

Runs in the notebook. What is installed here is asked for at its version here, so that the host runs
what the notebook would; modules of the standard library and of the user's own files are left out,
because the former are there and the latter travel with the code.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fal_agent.requirements import canonical_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from importlib.metadata import Distribution

__all__ = ["infer_requirements", "project_of"]

_OURS = frozenset({"fal_notebook", "fal_agent", "fal"})
_PROJECTS = {  # modules that are named unlike the project that holds them
    "attr": "attrs",
    "bs4": "beautifulsoup4",
    "Crypto": "pycryptodome",
    "cv2": "opencv-python-headless",  # hosts have no screen
    "dateutil": "python-dateutil",
    "docx": "python-docx",
    "dotenv": "python-dotenv",
    "faiss": "faiss-cpu",
    "fitz": "pymupdf",
    "git": "gitpython",
    "jwt": "pyjwt",
    "Levenshtein": "levenshtein",
    "magic": "python-magic",
    "mpl_toolkits": "matplotlib",
    "multipart": "python-multipart",
    "MySQLdb": "mysqlclient",
    "nacl": "pynacl",
    "OpenSSL": "pyopenssl",
    "PIL": "pillow",
    "pkg_resources": "setuptools",
    "pptx": "python-pptx",
    "psycopg2": "psycopg2-binary",
    "pylab": "matplotlib",
    "serial": "pyserial",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "umap": "umap-learn",
    "win32api": "pywin32",
    "wx": "wxpython",
    "yaml": "pyyaml",
    "zmq": "pyzmq",
}


def infer_requirements(imports: Iterable[str]) -> list[str]:
    """Give the requirements of imported modules, sorted.

    Args:
        imports: names of modules, with their dots: "numpy", "google.cloud.storage".

    Returns:
        "numpy==2.4.6" for what is installed here; "NAME" without a version for what is not; what was
        installed from a repository or an archive by its address.
    """
    known = _distributions(_installed_state())
    found: dict[str, str] = {}
    for module in imports:
        top = module.partition(".")[0]
        if not top or top in _OURS or top == "__main__" or top in sys.stdlib_module_names:
            continue
        if top in known:
            for name in _holders(module, known[top]):
                line = _line_of_installed(name)
                if line is not None:
                    found[canonical_name(name)] = line
        elif not _is_local(top):
            project = project_of(module)
            if project is not None:
                found.setdefault(canonical_name(project), project)
    return [found[name] for name in sorted(found)]


def _installed_state() -> tuple[tuple[str, int], ...]:
    """What changes when something is installed or removed: the folders of modules and their times."""
    folders = (Path(path or ".") for path in sys.path)
    return tuple((str(folder), folder.stat().st_mtime_ns) for folder in folders if folder.exists())


@functools.lru_cache(maxsize=1)
def _distributions(_state: tuple[tuple[str, int], ...]) -> Mapping[str, list[str]]:
    from importlib import metadata

    found = {top: list(names) for top, names in metadata.packages_distributions().items()}
    if sys.version_info < (3, 11):  # it looks at `top_level.txt` alone, which few wheels have nowadays
        for distribution in metadata.distributions():
            for top in {
                path.parts[0].partition(".")[0] for path in distribution.files or () if path.suffix == ".py"
            }:
                if top and distribution.metadata["Name"] not in found.setdefault(top, []):
                    found[top].append(distribution.metadata["Name"])
    return found


def project_of(module: str) -> str | None:
    """The project that holds a module which is not installed here; None where nothing can be said."""
    parts = module.split(".")
    if parts[0] == "google":  # many projects share it
        if parts[1:2] == ["protobuf"]:
            return "protobuf"
        depth = 3 if parts[1:2] == ["cloud"] else 2
        return "-".join(parts[:depth]).replace("_", "-") if len(parts) >= depth else None
    return _PROJECTS.get(parts[0], parts[0].strip("_").replace("_", "-")) or None


def _is_local(top: str) -> bool:
    """Whether a module that no distribution holds can be imported here: the user's own files."""
    from importlib.util import find_spec

    if top in sys.modules:
        return True
    try:
        return find_spec(top) is not None
    except (ImportError, ValueError):  # its loader is broken: it is nothing that could be installed
        return False


def _holders(module: str, names: Iterable[str]) -> list[str]:
    """Of the distributions that share a top-level name, those that hold this very module."""
    from importlib.metadata import distribution

    candidates = sorted(set(names), key=canonical_name)
    if len(candidates) == 1:
        return candidates
    files = {name: _modules_of(distribution(name)) for name in candidates}
    path = module
    while path:
        holders = [name for name in candidates if path in files[name]]
        if holders:
            known = _PROJECTS.get(path)
            return [name for name in holders if canonical_name(name) == known] or holders[:1]
        path = path.rpartition(".")[0]
    return candidates  # a namespace alone: whatever lies in it


def _modules_of(found: Distribution) -> set[str]:
    """The modules of a distribution, with their dots; folders without `__init__` are none."""
    modules = set()
    for file in found.files or ():
        parts = file.parts
        if parts[-1] == "__init__.py":
            modules.add(".".join(parts[:-1]))
        elif parts[-1].endswith((".py", ".so", ".pyd")):
            modules.add(".".join([*parts[:-1], parts[-1].partition(".")[0]]))
    return modules


def _line_of_installed(name: str) -> str | None:
    """The requirement that gives the same as what is installed here; None for the user's own folders."""
    from importlib.metadata import distribution

    found = distribution(name)
    origin = _origin(found)
    if "dir_info" in origin:
        return None
    url = str(origin.get("url", ""))
    version_control = origin.get("vcs_info")
    if isinstance(version_control, dict):
        scheme = version_control.get("vcs", "git")
        commit = version_control.get("commit_id")
        folder = origin.get("subdirectory")
        address = url if url.startswith(f"{scheme}+") else f"{scheme}+{url}"
        return f"{name} @ {address}@{commit}" + (f"#subdirectory={folder}" if folder else "")
    if url.startswith(("https://", "http://")):
        return f"{name} @ {url}"
    return f"{name}=={found.version.partition('+')[0]}"  # "+cpu" and the like are on no index


def _origin(found: Distribution) -> Mapping[str, object]:
    """Where a distribution was installed from (PEP 610); empty when that was an index."""
    import json

    text = found.read_text("direct_url.json")
    if not text:
        return {}
    try:
        content = json.loads(text)
    except ValueError:  # another installer's invention
        return {}
    return content if isinstance(content, dict) else {}
