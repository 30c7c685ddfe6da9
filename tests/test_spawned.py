"""What a spawned app says in the notebook: the entries of its log."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fal_agent.wire import AppSpec, Log, Stage
from fal_notebook.hosts.base import Received
from fal_notebook.spawned import AppSpawnInfo


def entries(*events: Any) -> list[Any]:
    """What is in the log after some events; each is an event, or one with the text that it brings."""
    info = AppSpawnInfo(
        SimpleNamespace(name="box"),  # type: ignore[arg-type]
        AppSpec(name="painter"),
        headers={},
        token="",
        startup_timeout=None,
        quiet=True,
    )
    for event in events:
        event, *texts = event if isinstance(event, tuple) else (event,)
        info.take(Received(event, [text.encode() for text in texts]))
    return list(info.logs.queue)


def test_each_line_of_the_log_says_whose_it_is_and_when_it_was_said() -> None:
    built, said, failed, told = entries(
        (Log("r", "stderr", "builder", sent_at=1.0), "Resolved 3 packages\n"),
        (Log("r", "stdout", request="req-1", sent_at=2.0), "hello\n"),
        (Log("r", "stderr", sent_at=3.0), "oh no\n"),
        Stage("r", "serve", "replacing a runner", sent_at=4.0),
    )

    assert (built.source, built.level, built.timestamp) == ("BUILDER", "INFO", 1.0)
    assert (said.source, said.level, said.message, said.request_id) == ("USER", "INFO", "hello\n", "req-1")
    assert (failed.source, failed.level, failed.timestamp) == ("USER", "ERROR", 3.0)
    assert (told.source, told.level, told.message) == ("BRIDGE", "INFO", "replacing a runner\n")


def test_the_log_keeps_the_last_entries_of_those_that_nobody_takes() -> None:
    found = entries(*((Log("r", "stdout"), f"{number}\n") for number in range(10_001)))

    assert (len(found), found[0].message, found[-1].message) == (10_000, "1\n", "10000\n")
