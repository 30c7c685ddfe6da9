"""`%fal` without more: what is on a host, and what can be done about it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from support.waiting import until

import fal_notebook as fal
from fal_agent.errors import FalServerlessError
from fal_notebook import panel
from fal_notebook.hosts import registry
from fal_notebook.hosts.registry import HostInfo

if TYPE_CHECKING:
    from fal_notebook.hosts.base import Host


@pytest.fixture
def on_host(agent_host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """The panel knows this host alone."""
    infos = [HostInfo(agent_host.name, None, is_current=True, is_connected=True)]
    monkeypatch.setattr(registry, "hosts", lambda: infos)
    monkeypatch.setitem(registry._known, agent_host.name, agent_host)
    monkeypatch.setattr(panel, "_environments_of", {})
    agent_host.ask("status")
    return agent_host


def rows(kind: str) -> dict[str, Any]:
    (section,) = panel.look(patient=kind == "environment")
    return {row.key: row for row in section.rows if row.kind == kind}


def test_a_run_is_shown_and_can_be_interrupted(on_host: Host) -> None:
    @fal.function(host=on_host)
    def sleep_long() -> None:
        import time

        time.sleep(60)

    run = sleep_long.submit()
    key = f"run {run.run_id}"
    until(lambda: key in rows("run") and " · running · test_a_run" in rows("run")[key].text)

    interrupt = next(action for action in rows("run")[key].actions if action.label == "Interrupt")
    interrupt.do()

    assert isinstance(run.exception(timeout=20), KeyboardInterrupt)
    until(lambda: " · cancelled · " in rows("run")[key].text)
    assert [action.label for action in rows("run")[key].actions] == ["Attach"]


def test_an_environment_in_use_cannot_be_deleted(on_host: Host) -> None:
    @fal.function(host=on_host, keep_alive=60)
    def one() -> int:
        return 1

    one()
    shown = rows("environment").values()

    used = [row for row in shown if row.text.endswith("in use")]
    assert used
    assert not any(row.actions for row in used)
    name = used[0].key.split()[1]
    with pytest.raises(FalServerlessError, match="is in use: stop what runs in it first"):
        on_host.ask("remove_environment", name=name)
    assert not on_host.ask("remove_environment", name="../data")


def test_the_table_says_the_same_in_text(on_host: Host) -> None:
    text = repr(panel.table())

    assert re.search(rf"^→ {on_host.name} +\S+: \d+ cores, .* of memory free", text, re.MULTILINE)
    assert re.search(r"^ +environment +[0-9a-f]{16} · Python 3", text, re.MULTILINE)


def test_a_host_that_is_not_connected_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    infos = [HostInfo("far", "me@far.example", is_current=False, is_connected=False)]
    monkeypatch.setattr(registry, "hosts", lambda: infos)

    (section,) = panel.look()

    assert (section.text, section.rows) == ("me@far.example · not connected", [])
    assert [action.label for action in section.actions] == ["Connect"]


def test_who_occupies_a_gpu_is_told() -> None:
    gpu = {"name": "NVIDIA A10G", "memory_total": 24 * 10**9}
    status = {
        "gpus": [
            {**gpu, "index": 0, "memory_used": 3 * 10**9, "processes": [[11, 3 * 10**9]]},
            {**gpu, "index": 1, "memory_used": 2 * 10**9, "processes": [[4242, 2 * 10**9]]},
            {**gpu, "index": 2, "memory_used": 0, "processes": []},
        ],
        "workers": [{"pid": 11, "devices": [0], "runs": [{"label": "train"}], "idle_seconds": None}],
    }

    assert [row.text.split(" · ")[2:] for row in panel._devices(status)] == [
        ["3.0 GB of 24 GB in use", "train"],
        ["2.0 GB of 24 GB in use", "process 4242"],
        ["0 bytes of 24 GB in use", "free"],
    ]
