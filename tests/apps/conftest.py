"""What the tests of apps share: apps that `spawn()` serves in threads of this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support.spawned import Spawned

from fal_agent.runtime import app

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Spawned]]:
    """Make `spawn()` work; gives what was spawned, which ends with the test."""
    made: list[Spawned] = []

    def launch(cls: type[app.App], **options: Any) -> Spawned:
        made.append(Spawned(cls, **options))
        return made[-1]

    monkeypatch.setattr(app, "_launcher", launch)
    yield made
    for one in made:
        one.stop()
