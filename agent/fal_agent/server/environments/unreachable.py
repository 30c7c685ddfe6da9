"""Errors of builds that fail for want of a network, and what they lack.

Runs in the agent.
"""

from __future__ import annotations

from dataclasses import dataclass

from fal_agent.errors import EnvironmentBuildError

__all__ = ["Lacking", "UnreachableError", "UnreachablePythonError"]


class UnreachableError(EnvironmentBuildError):
    """Packages are neither in uv's cache nor can they be downloaded."""


class UnreachablePythonError(UnreachableError):
    """There is no interpreter of a version, and none could be downloaded."""


@dataclass(frozen=True)
class Lacking:
    """What somebody else might bring."""

    python: str  # "X.Y"
    layers: list[list[str]]  # requirement lines
    wants_python: bool
