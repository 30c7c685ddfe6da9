"""What the user has chosen for an agent is told to it when it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fal_notebook.config import HostSettings
from fal_notebook.hosts.agent_host import agent_options

if TYPE_CHECKING:
    import pytest


def test_an_agent_is_told_what_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAL_NOTEBOOK_IDLE", "7")

    assert agent_options(HostSettings("box")) == ["--idle", "7.0"]
    assert agent_options(HostSettings("box", labels=("lab",), files_gb=2.5, files_days=1)) == [
        *("--idle", "7.0"),
        *("--files-gb", "2.5"),
        *("--files-days", "1"),
        *("--label", "lab"),
    ]
