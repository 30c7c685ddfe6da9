"""Bring brief calls of a function into a lane."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["has_lane", "in_lane"]


def has_lane(host: Any) -> bool:
    """Whether calls of this notebook go straight to a worker."""
    return any(lane.is_open and lane.is_dialled for lane in host.connect().lanes.by_template.values())


def in_lane(host: Any, call: Callable[[], Any]) -> None:
    """Make brief calls until they go straight to a worker."""

    def again() -> bool:
        call()
        return has_lane(host)

    until(again)
