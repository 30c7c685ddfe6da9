"""What a call of a worker says is masked from the first secret on, and its variables are its own."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from fal_agent.wire import Clear, Display, Execute, Log, Result, Task
from fal_agent.worker.context import CallContext
from fal_agent.worker.secrets import Secrets

if TYPE_CHECKING:
    from pathlib import Path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECRET, NAME = "hunter22", "FAL_TEST_SECRET"


@pytest.fixture
def secrets() -> Iterator[Secrets]:
    before = dict(os.environ)
    yield Secrets()
    os.environ.clear()
    os.environ.update(before)


class Said:
    """What a call said, in order: [kind, text]."""

    def __init__(self, secrets: Secrets, outbox: Path) -> None:
        self.events: list[list[Any]] = []
        task = Task("function", "f", outbox=str(outbox))
        self.call = CallContext(Execute("run", "t", [], task), task, self._take, secrets)

    def _take(self, message: Any, buffers: Any) -> None:
        if isinstance(message, Log):
            self.events.append([message.stream, bytes(buffers[0]).decode()])
        elif isinstance(message, Display):
            self.events.append(["display", json.loads(bytes(buffers[0]))])
        elif isinstance(message, Clear):
            self.events.append(["clear", None])

    def end(self) -> list[list[Any]]:
        self.call.finish(lambda refs: Result("run", refs), [b"x"])
        return self.events


@pytest.fixture
def said(secrets: Secrets, tmp_path: Path) -> Said:
    secrets.put({NAME: SECRET})
    return Said(secrets, tmp_path)


def test_text_that_is_flushed_in_the_middle_of_a_secret_is_masked(said: Said) -> None:
    for piece in ("a hun", "ter", "22 b\n"):
        said.call.write("stdout", piece)
        said.call.flush()

    assert said.end() == [["stdout", "a "], ["stdout", "*** b\n"]]


def test_each_stream_waits_for_its_own_rest(said: Said) -> None:
    said.call.write("stdout", "hunt")
    said.call.write("stderr", "hunt the ")
    said.call.write("stdout", "er22")
    said.call.write("stderr", "wumpus")

    assert said.end() == [["stderr", "hunt the "], ["stdout", "***"], ["stderr", "wumpus"]]


def test_what_is_held_back_comes_before_what_is_shown_next_and_at_the_end(said: Said) -> None:
    said.call.write("stdout", "push")
    said.call.display("display", {"text/plain": "x"})
    said.call.write("stdout", "h")

    kinds = [[kind, text if kind == "stdout" else None] for kind, text in said.end()]
    assert "".join(text for kind, text in kinds[:2]) == "push"
    assert [kind for kind, _ in kinds] == ["stdout", "stdout", "display", "stdout"]
    assert kinds[-1] == ["stdout", "h"]


def test_a_display_is_masked_everywhere_but_in_pictures(said: Said) -> None:
    data = {
        "text/plain": SECRET,
        "text/html": f"<b>{SECRET}</b>",
        "image/png": SECRET,
        "application/json": [SECRET],
    }
    said.call.display("display", data, {"about": SECRET}, {"display_id": SECRET})

    (_, shown), *_ = said.end()
    assert shown["data"] == {
        "text/plain": "***", "text/html": "<b>***</b>", "image/png": SECRET, "application/json": ["***"]
    }  # fmt: skip
    assert (shown["metadata"], shown["transient"]) == ({"about": "***"}, {"display_id": "***"})


def test_without_secrets_nothing_is_held_back(secrets: Secrets, tmp_path: Path) -> None:
    said = Said(secrets, tmp_path)
    said.call.write("stdout", "hunt")
    said.call.flush()

    assert said.events == [["stdout", "hunt"]]
    assert not said.call.holds_secret([SECRET.encode()])


# ---------------------------------------------------------------- variables


def test_the_variables_are_those_of_the_call_that_began_last(secrets: Secrets) -> None:
    secrets.put({NAME: "one-secret"})
    assert os.environ[NAME] == "one-secret"
    secrets.put({NAME: "another-secret", "FAL_TEST_MORE": "more-secret"})
    assert (os.environ[NAME], os.environ["FAL_TEST_MORE"]) == ("another-secret", "more-secret")
    secrets.put({})
    assert NAME not in os.environ
    assert "FAL_TEST_MORE" not in os.environ
    assert secrets.mask("one-secret another-secret more-secret") == "*** *** ***"


def test_a_variable_of_the_hosts_own_comes_back(secrets: Secrets) -> None:
    os.environ[NAME] = "the host's"
    secrets.put({NAME: SECRET})
    secrets.put({})

    assert os.environ[NAME] == "the host's"


def test_what_the_users_code_sets_itself_stays(secrets: Secrets) -> None:
    secrets.put({NAME: SECRET})
    os.environ[NAME] = "set by the code"
    secrets.put({})

    assert os.environ[NAME] == "set by the code"
