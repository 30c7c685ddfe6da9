"""Choose and download the wheels that a host without a package index needs.

Runs in the notebook. uv resolves for the host's platform with the indexes of this machine; what it chose is
downloaded once, checked against the index's hashes, and kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from fal_agent.errors import EnvironmentBuildError
from fal_notebook.digests import cache_folder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from fal_notebook.hosts.platforms import Platform

__all__ = ["Wheel", "chosen_wheels", "downloaded"]

_RESOLVE, _READ = 300.0, 60.0  # seconds for uv, and for a server to go on
_PIECE = 1 << 20
_AS_IT_IS = {"Accept-Encoding": "identity"}


@dataclass(frozen=True)
class Wheel:
    """One file of an index.

    Attributes:
        name: of the file.
        url: where it is; a path, if it is on this machine.
        size: bytes, 0 if the index does not say.
        sha256: 64 hex digits.
    """

    name: str
    url: str
    size: int
    sha256: str


def chosen_wheels(layers: Sequence[Sequence[str]], *, python: str, target: Platform) -> list[Wheel]:
    """Resolve requirement lines for a platform.

    Args:
        layers: install steps; each is resolved by itself, as the host will do with what it gets.
        python: "X.Y".
        target: the host's platform.

    Raises:
        EnvironmentBuildError: they cannot be resolved, or a distribution has no wheel for it.
    """
    found: dict[str, Wheel] = {}
    for lines in layers:
        for package in _locked(lines, python, target).get("packages", []):
            wheel = _wheel_of(package)
            found[wheel.name] = wheel
    return list(found.values())


def _locked(lines: Sequence[str], python: str, target: Platform) -> dict[str, Any]:
    import uv

    command = [uv.find_uv_bin(), "pip", "compile", "-", "--python-version", python, "--python-platform",
               target.wheel_target, "--only-binary", ":all:", "--format", "pylock.toml", "--no-header",
               "--quiet"]  # fmt: skip
    done = subprocess.run(
        command, input="\n".join(lines), capture_output=True, text=True, timeout=_RESOLVE, check=False
    )
    if done.returncode != 0:
        raise EnvironmentBuildError(
            f"uv finds no wheels for {target} and Python {python}:\n{done.stderr.strip()[-4000:]}",
            "",
        )
    locked: dict[str, Any] = tomllib.loads(done.stdout)
    return locked


def _wheel_of(package: dict[str, Any]) -> Wheel:
    wheels = package.get("wheels") or [package.get("archive", {})]
    place = str(wheels[0].get("url") or wheels[0].get("path") or "")
    name, digest = (
        unquote(urlsplit(place).path.rpartition("/")[2]),
        wheels[0].get("hashes", {}).get("sha256", ""),
    )
    if not name.endswith(".whl") or not digest:
        raise EnvironmentBuildError(
            f"{package.get('name')} cannot be brought to the host: it is no wheel of a package index", ""
        )
    return Wheel(name, place, int(wheels[0].get("size") or 0), digest)


def downloaded(wheel: Wheel, *, stop: Callable[[], bool]) -> Path:
    """Give the file of a wheel, downloading it if it is not in the cache folder.

    Raises:
        EnvironmentBuildError: it cannot be downloaded, or is not what the index says.
        OSError: it cannot be written.
    """
    import httpx

    folder = cache_folder() / "wheels" / wheel.sha256[:2]
    path = folder / f"{wheel.sha256}.whl"
    if path.exists():
        return path
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = folder / f".{uuid.uuid4().hex}"
    hasher = hashlib.sha256()
    try:
        with (
            beside.open("xb") as file,
            httpx.stream("GET", wheel.url, headers=_AS_IT_IS, follow_redirects=True, timeout=_READ) as got,
        ):
            got.raise_for_status()
            for data in got.iter_raw(_PIECE):
                hasher.update(data)
                file.write(data)
                if stop():
                    raise EnvironmentBuildError("nobody waits for it any more", "")
        if hasher.hexdigest() != wheel.sha256:
            raise EnvironmentBuildError(f"{wheel.name} came damaged: its SHA-256 is not the index's", "")
        beside.replace(path)
    except httpx.HTTPError as error:
        raise EnvironmentBuildError(f"{wheel.name} could not be downloaded: {error}", "") from None
    finally:
        beside.unlink(missing_ok=True)
    return path
