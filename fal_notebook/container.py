"""`fal.ContainerImage`: what an image is built from.

Runs in the notebook; it travels to workers by reference, so it imports the standard library alone. It is a
declaration: nothing is built here, and no machine is asked. Passwords and secrets are in no `repr` and
no pickle.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fal_notebook import ignoring
from fal_notebook.dockerfile import copy_add_sources

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

__all__ = ["BUILDERS", "ContainerImage"]

BUILDERS = ("depot", "service", "worker")  # the fal platform's; here the host's own program builds

_DEPRECATED_BUILDERS = ("service", "worker")
_NEVER_PICKLED = ("registries", "secrets")


@dataclass
class ContainerImage:
    """An image, given as a Dockerfile and what goes into it.

    Attributes:
        dockerfile_str: text of the Dockerfile.
        build_args: values of the Dockerfile's `ARG`s by name.
        registries: for each registry that needs a login, {"username": ..., "password": ...}.
        builder: one of `BUILDERS`; kept, without effect.
        compression: kept, without effect.
        force_compression: kept, without effect.
        secrets: values of build secrets by name; they are in no layer and no log.
        context_dir: the folder that COPY and ADD copy from; default: the working folder when this is made.
        dockerignore: patterns of files that are not sent along, as in a `.gitignore`; [] leaves none out.
        dockerignore_path: a file of such patterns. Without either, `.dockerignore` in the context is
            used; without that, a list of what is seldom wanted (`.git`, `*.md`, `__pycache__`, ...).

    Raises:
        ValueError: the Dockerfile is empty, a registry lacks a username or password, or the builder is
            unknown.
        FileNotFoundError: there is no file `dockerignore_path`.
    """

    dockerfile_str: str
    build_args: dict[str, str] = field(default_factory=dict)
    registries: dict[str, dict[str, str]] = field(default_factory=dict, repr=False)
    builder: str | None = None
    compression: str = "gzip"
    force_compression: bool = False
    secrets: dict[str, str] = field(default_factory=dict, repr=False)
    context_dir: str | os.PathLike[str] = field(default_factory=Path.cwd)
    dockerignore: list[str] | None = None
    dockerignore_path: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dockerfile_str, str) or not self.dockerfile_str.strip():
            raise ValueError("Invalid dockerfile: it is empty; give its text, or use from_dockerfile(path)")
        self._patterns = self._find_patterns()
        self._check_registries()
        self._check_builder()

    @classmethod
    def from_dockerfile_str(cls, text: str, **kwargs: Any) -> ContainerImage:
        """Declare an image by the text of its Dockerfile.

        Args:
            text: the Dockerfile.
            kwargs: any other attribute.

        Raises:
            ValueError, FileNotFoundError: as the class.
        """
        return cls(text, **kwargs)

    @classmethod
    def from_dockerfile(cls, path: str | os.PathLike[str], **kwargs: Any) -> ContainerImage:
        """Declare an image by the file that is its Dockerfile; the file's folder is not the context.

        Args:
            path: the Dockerfile, UTF-8.
            kwargs: any other attribute.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: as the class.
        """
        return cls(Path(path).expanduser().read_text(encoding="utf-8-sig"), **kwargs)

    def add_dockerignore(
        self, patterns: Sequence[str] | None = None, path: str | os.PathLike[str] | None = None
    ) -> None:
        """Replace the rules for files that are not sent along, whatever they were.

        Args:
            patterns: gitignore patterns; [] leaves nothing out.
            path: a file of them, one per line.

        Raises:
            ValueError: not exactly one of the two is given.
            FileNotFoundError: there is no such file.
        """
        if (patterns is None) == (path is None):
            raise ValueError("give either patterns or path, and not both")
        if path is not None:
            self._patterns = ignoring.read_patterns(Path(path).expanduser())
            self.dockerignore, self.dockerignore_path = None, path
        elif patterns is not None:
            self._patterns = _cleaned(patterns)
            self.dockerignore, self.dockerignore_path = list(patterns), None

    def is_ignored(self, relative_path: str) -> bool:
        """Whether a file of the context is not sent along.

        Args:
            relative_path: POSIX, from the context folder.
        """
        return ignoring.is_ignored(relative_path, self._patterns)

    def get_copy_add_sources(self) -> list[str]:
        """Give what COPY and ADD take from the context, in order; from the text alone.

        What cannot be read is mentioned once on standard error and left out.
        """
        return copy_add_sources(self.dockerfile_str)

    def to_dict(self) -> dict[str, Any]:
        """Give all of it as plain data, secrets included.

        `docker_files_list` is what `get_copy_add_sources` gives. `docker_ignore` are regular expressions:
        a file is not sent along if one of them is found in its relative POSIX path.
        """
        return {
            "dockerfile_str": self.dockerfile_str,
            "build_args": dict(self.build_args),
            "registries": {name: dict(login) for name, login in self.registries.items()},
            "builder": self.builder,
            "compression": self.compression,
            "force_compression": self.force_compression,
            "secrets": dict(self.secrets),
            "docker_context_dir": str(self.context_dir),
            "docker_files_list": self.get_copy_add_sources(),
            "docker_ignore": list(ignoring.expressions(tuple(self._patterns))),
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), **{name: {} for name in _NEVER_PICKLED}}

    def __copy__(self) -> ContainerImage:
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> ContainerImage:
        other = object.__new__(type(self))
        memo[id(self)] = other
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other

    def _find_patterns(self) -> list[str]:
        from_file = None
        if self.dockerignore_path is not None:
            from_file = ignoring.read_patterns(Path(self.dockerignore_path).expanduser())
        if self.dockerignore is not None:
            return _cleaned(self.dockerignore)
        if from_file is not None:
            return from_file
        usual = Path(self.context_dir) / ".dockerignore"
        return ignoring.read_patterns(usual) if usual.is_file() else list(ignoring.DEFAULT_PATTERNS)

    def _check_registries(self) -> None:
        for name, login in self.registries.items():
            if not isinstance(login, Mapping) or not {"username", "password"} <= set(login):
                raise ValueError(
                    f"Username and password are required for each registry; {name!r} needs "
                    '{"username": ..., "password": ...}'
                )

    def _check_builder(self) -> None:
        if self.builder is None:
            return
        if self.builder not in BUILDERS:
            raise ValueError(f"Invalid builder: {self.builder!r}; the builders are {', '.join(BUILDERS)}")
        if self.builder in _DEPRECATED_BUILDERS:
            sys.stderr.write(
                f"Warning: the builder {self.builder!r} is deprecated, and has no effect here; leave it out\n"
            )


def _cleaned(patterns: Sequence[str]) -> list[str]:
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError("the ignore patterns must be a list of strings")
    return ignoring.cleaned(patterns)
