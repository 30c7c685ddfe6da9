"""What the process of an app is given, and how it ends."""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support import http
from support.spawning import SECONDS, spawning
from support.stranger import POST, as_stranger
from support.waiting import is_alive, until

import fal_notebook as fal
from fal_notebook import exceptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import httpx

numbers = itertools.count(1)


@pytest.fixture
def spawn() -> Iterator[Callable[..., Any]]:
    """Spawn apps; those that are left are stopped."""
    with spawning() as do:
        yield lambda cls, host="local": do(cls, host)


def fresh() -> str:
    """A name that no other app has."""
    return f"process-{os.getpid()}-{next(numbers)}"


def post(info: Any, path: str = "/", **options: Any) -> httpx.Response:
    return http.post(f"{info.url}{path}", timeout=SECONDS, **options)


def said(info: Any) -> list[str]:
    """What the app itself has printed."""
    entries = []
    while not info.logs.empty():
        entries.append(info.logs.get())
    return [entry.message.strip() for entry in entries if entry.source == "USER"]


# ---------------------------------------------------------------- secrets


def reading(*secrets: str) -> Any:
    class Reads(fal.App, name=fresh(), secrets=list(secrets)):
        @fal.endpoint("/")
        def read(self, name: str) -> str | None:
            import os

            print("asked for", name, os.environ.get(name))
            return os.environ.get(name)

    return Reads


def test_the_secrets_that_an_app_names_are_in_its_environment(
    agent_host: Any, spawn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fal.function(host=agent_host)(os.getpid)()  # the agent is there, and inherits nothing of what follows
    monkeypatch.setenv("FAL_TEST_TOKEN", "t0ken-of-the-test")
    monkeypatch.setenv("FAL_TEST_OTHER", "not named")
    info = spawn(reading("FAL_TEST_TOKEN"), agent_host)

    assert post(info, json={"name": "FAL_TEST_TOKEN"}).json() == "t0ken-of-the-test"
    assert post(info, json={"name": "FAL_TEST_OTHER"}).json() is None


def test_a_secret_is_nowhere_on_the_hosts_disk(
    spawn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, own_folders: Path
) -> None:
    monkeypatch.setenv("FAL_TEST_TOKEN", "t0ken-of-the-test")
    info = spawn(reading("FAL_TEST_TOKEN"))
    assert post(info, json={"name": "FAL_TEST_TOKEN"}).status_code == 200
    info.stop()
    assert "asked for FAL_TEST_TOKEN ***" in said(info)

    kept = [path for folder in ("blobs", "run") for path in (own_folders / "root" / folder).rglob("*")]
    kept += [path for path in (own_folders / "root").iterdir() if path.is_file()]

    assert kept
    assert not [path for path in kept if path.is_file() and b"t0ken-of-the-test" in path.read_bytes()]


def test_a_secret_that_is_not_set_here_is_told_before_anything_runs() -> None:
    with pytest.raises(exceptions.ConfigurationError, match="FAL_TEST_NONE, which is not set"):
        reading("FAL_TEST_NONE").spawn(host="local")


# ---------------------------------------------------------------- other accounts of this machine


def test_an_app_without_app_auth_is_for_the_account_that_spawned_it(spawn: Callable[..., Any]) -> None:
    class Greets(fal.App, name=fresh()):
        @fal.endpoint("/")
        def greet(self) -> str:
            return "hello"

    info = spawn(Greets)
    said = as_stranger(POST, info.url)

    assert said.startswith("403")
    assert "app_auth" in said
    assert post(info).json() == "hello"


# ---------------------------------------------------------------- the end


def test_the_end_is_told_then_what_was_begun_is_finished_then_it_is_torn_down(
    spawn: Callable[..., Any],
) -> None:
    class Ends(fal.App, name=fresh()):
        def setup(self) -> None:
            import threading

            self.is_told = threading.Event()
            self.say("setup")

        def say(self, what: str) -> None:
            import os

            print(what, os.environ["FAL_RUNNER_STATE"], flush=True)

        def handle_exit(self) -> None:
            self.say("told")
            self.is_told.set()

        def teardown(self) -> None:
            self.say("teardown")

        @fal.endpoint("/")
        def work(self) -> str:
            self.say("work")
            self.is_told.wait(30)
            self.say("answer")
            return "done"

    info = spawn(Ends)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, info)
        seen = said(info)
        until(lambda: "work RUNNING" in seen or seen.extend(said(info)))
        info.stop()
        assert answer.result(SECONDS).json() == "done"

    assert seen + said(info) == [
        *("setup SETUP", "work RUNNING", "told RUNNING", "answer RUNNING", "teardown TERMINATING"),
    ]
    assert info.state == "stopped"


def test_what_does_not_end_within_its_grace_is_made_to(spawn: Callable[..., Any]) -> None:
    class Stubborn(fal.App, name=fresh()):
        termination_grace_period_seconds = 1

        def teardown(self) -> None:
            import time

            print("tearing down", flush=True)
            time.sleep(600)

        @fal.endpoint("/")
        def where(self) -> int:
            import os

            return os.getpid()

    info = spawn(Stubborn)
    pid = post(info).json()
    info.stop()

    assert said(info) == ["tearing down"]
    until(lambda: not is_alive(pid))


# ---------------------------------------------------------------- trying again


@pytest.mark.parametrize(("most", "skipped", "tries"), [(2, [], 3), (2, ["server_error"], 1), (1, [], 3)])
def test_a_request_that_was_answered_503_is_tried_on_fresh_runners_unless_the_app_says_no(
    spawn: Callable[..., Any], tmp_path: Path, most: int, skipped: list[str], tries: int
) -> None:
    note = str(tmp_path / "tries")

    class Full(fal.App, name=fresh(), max_concurrency=most, skip_retry_conditions=skipped):
        @fal.endpoint("/")
        def fail(self) -> None:
            import os
            from pathlib import Path

            with Path(note).open("a") as file:
                file.write(f"{os.getpid()}\n")
            raise RuntimeError("CUDA out of memory, says the driver")

    info = spawn(Full)

    answer = post(info, json={})

    assert (answer.status_code, answer.json()) == (503, {"detail": "CUDA error: out of memory"})
    pids = Path(note).read_text().split()
    assert len(pids) == len(set(pids)) == tries
