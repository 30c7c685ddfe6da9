"""`clone_repository`: a git repository at a commit, cloned once and found there the next time.

Runs wherever user code runs; the only file here that runs `git`. A clone appears whole or not at all; what
comes from the caller reaches git as an argument that cannot be an option.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import uuid
from typing import TYPE_CHECKING, Optional, Union
from urllib.parse import urlsplit

from fal_agent.errors import DownloadError
from fal_agent.folders import appearing_whole
from fal_agent.runtime.toolkit.directories import below_data, lock_of, made, repositories
from fal_agent.runtime.toolkit.locking import alone

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["clone_repository"]

_SHORTEST_HASH = 8  # digits, of which a folder's name has as many
_HASH = re.compile(r"[0-9a-fA-F]{%d,64}" % _SHORTEST_HASH)  # noqa: UP031 - braces of a pattern
_SCHEMES = ("https", "http", "ssh", "git", "file")
_SCP_LIKE = re.compile(r"[\w.-]+@[\w.-]+:[^:].*")
_TIMEOUT = 3600.0  # seconds for one command of git
_ENVIRONMENT = {
    "GIT_TERMINAL_PROMPT": "0",  # nobody is there to answer
    "GIT_HTTP_LOW_SPEED_LIMIT": "1000",  # bytes per second, below which a download has stalled
    "GIT_HTTP_LOW_SPEED_TIME": "60",
    "GIT_ADVICE": "0",
}


def clone_repository(
    https_url: str,
    *,
    commit_hash: Optional[str] = None,
    target_dir: Union[str, os.PathLike[str], None] = None,
    repo_name: Optional[str] = None,
    force: bool = False,
    include_to_path: bool = False,
) -> Path:
    """Clone a git repository with its submodules, unless it is there at that commit.

    Args:
        https_url: where it is; https, http, ssh, git, file, or user@host:path.
        commit_hash: the commit, at least 8 hex digits; None: what the repository's HEAD is when it is
            first cloned.
        target_dir: the folder for it; default `FAL_REPOSITORY_DIR`. A relative one is below the data root.
        repo_name: name of its own folder; default: the URL's. The first 8 digits of the hash are added.
        force: clone it again, in place of what is there.
        include_to_path: put it first in `sys.path`, once.

    Returns:
        The path of the repository.

    Raises:
        ValueError: the hash is too short or is none, or the URL or name cannot be right.
        DownloadError: git is missing, or could not clone it; the message has git's words.
    """
    _check(https_url, commit_hash)
    name = _folder_name(https_url, repo_name, commit_hash)
    folder = repositories() if target_dir is None else below_data(target_dir)
    path = folder / name
    try:
        with alone(lock_of("clone", str(path))):
            if force or not _is_at(path, commit_hash):
                _clone(https_url, commit_hash, path)
    except OSError as error:
        raise DownloadError(f"{folder} cannot take {name}: {error.strerror or error}") from error
    if include_to_path and str(path) not in sys.path:
        sys.path.insert(0, str(path))
    return path


def _check(url: str, commit_hash: Optional[str]) -> None:
    if commit_hash is not None and not _HASH.fullmatch(commit_hash):
        raise ValueError(
            f"commit_hash={commit_hash!r} must be at least {_SHORTEST_HASH} hex digits, "
            "so that it names one commit for sure"
        )
    is_known = urlsplit(url).scheme.lower() in _SCHEMES and "://" in url
    if not url.isprintable() or not (is_known or _SCP_LIKE.fullmatch(url)):
        raise ValueError(f"{url!r} is not the address of a git repository; use https://...")


def _folder_name(url: str, repo_name: Optional[str], commit_hash: Optional[str]) -> str:
    name = repo_name
    if name is None:
        name = re.split(r"[/:]", url.rstrip("/"))[-1].removesuffix(".git") if url else ""
    if not name or name.startswith(".") or "/" in name or not name.isprintable():
        raise ValueError(f"{name!r} cannot be a folder's name; give another in repo_name=")
    return name if commit_hash is None else f"{name}-{commit_hash[:_SHORTEST_HASH].lower()}"


def _is_at(path: Path, commit_hash: Optional[str]) -> bool:
    if not (path / ".git").exists():
        return False
    try:
        head = _git("-C", str(path), "rev-parse", "--verify", "HEAD").strip()
    except DownloadError:  # it is no repository any more, and is cloned anew
        return False
    return commit_hash is None or head.startswith(commit_hash.lower())


def _clone(url: str, commit_hash: Optional[str], path: Path) -> None:
    made(path.parent)
    with appearing_whole(path) as beside:
        if commit_hash is None:
            _git("clone", "--quiet", "--recursive", "--", url, str(beside))
        else:
            _git("clone", "--quiet", "--no-checkout", "--", url, str(beside))
            _git("-C", str(beside), "checkout", "--quiet", "--detach", commit_hash)
            if not _is_at(beside, commit_hash):  # a branch may be called like a hash
                raise DownloadError(f"{url} has no commit {commit_hash}")
            _git("-C", str(beside), "submodule", "--quiet", "update", "--init", "--recursive")
        old = path.with_name(f".{path.name}-old-{uuid.uuid4().hex[:8]}")
        if path.exists() or path.is_symlink():
            path.rename(old)
    if old.is_symlink() or old.is_file():
        old.unlink()
    elif old.exists():
        shutil.rmtree(old)


def _git(*arguments: str) -> str:
    program = shutil.which("git")
    if program is None:
        raise DownloadError(
            "git is not installed on this host; install it, or bring the files along otherwise"
        )
    outside = {  # a repository that this process happens to stand in is not meant
        name: value
        for name, value in os.environ.items()
        if name not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    }
    try:
        done = subprocess.run(
            [program, *arguments],
            env={**_ENVIRONMENT, **outside},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DownloadError(f"git took longer than {_TIMEOUT:g} s: git {arguments[0]}") from error
    if done.returncode:
        raise DownloadError(f"git could not do it: {done.stderr.strip()[-2000:] or done.returncode}")
    return done.stdout
