"""What the tests of serving share: apps that are served while a test runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support.apps import Served

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fal_agent.runtime.app import App


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Serve an app class; everything ends with the test."""
    running: list[Served] = []

    def start(cls: type[App], **options: Any) -> Served:
        running.append(Served(cls(_allow_init=True), **options))
        return running[-1]

    yield start
    for served in running:
        served.stop()
