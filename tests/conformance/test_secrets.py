"""Secrets reach the code that names them, and are seen nowhere else on any host."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import fal_notebook as fal
from fal_agent.wire import Log
from fal_notebook.run import start

if TYPE_CHECKING:
    from fal_notebook.hosts.base import Host

NAME = "FAL_TEST_SECRET"
SECRET = "s3cr3t/of+the=test"


@pytest.fixture
def token(agent_host: Host, monkeypatch: pytest.MonkeyPatch) -> str:
    """A secret of this test alone, set after the agent was started, which inherits nothing of it."""
    fal.function(host=agent_host)(os.getpid)()
    value = f"{SECRET}-{time.monotonic_ns()}"
    monkeypatch.setenv(NAME, value)
    return value


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_call_has_the_secrets_that_it_names_and_others_have_none(agent_host: Host, token: str) -> None:
    def seen() -> tuple[str | None, int]:
        value = os.environ.get("FAL_TEST_SECRET")
        return value and hashlib.sha256(value.encode()).hexdigest(), os.getpid()

    wants, plain = fal.function(host=agent_host, secrets=[NAME])(seen), fal.function(host=agent_host)(seen)
    given, worker = wants()
    without, same = plain()
    again = wants()

    assert (given, without, again) == (digest(token), None, (digest(token), worker))
    assert worker == same  # which keeps what was cached for both


def test_a_changed_value_counts_from_the_next_call_on(
    agent_host: Host, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @fal.function(host=agent_host, secrets=[NAME])
    def seen() -> str:
        return hashlib.sha256(os.environ["FAL_TEST_SECRET"].encode()).hexdigest()

    before = [seen() for _ in range(6)]  # by way of a lane in the end
    monkeypatch.setenv(NAME, token + "-changed")

    assert set(before) == {digest(token)}
    assert seen() == digest(token + "-changed")


def test_calls_at_the_same_time_share_a_process_only_with_the_same_secrets(
    agent_host: Host, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @fal.function(host=agent_host, secrets=[NAME], max_multiplexing=4)
    def seen(seconds: float) -> str:
        time.sleep(seconds)
        return hashlib.sha256(os.environ["FAL_TEST_SECRET"].encode()).hexdigest()

    first = seen.submit(1.0)
    monkeypatch.setenv(NAME, token + "-other")
    second = seen.submit(0.1)

    assert second.result(timeout=60) == digest(token + "-other")
    assert first.result(timeout=60) == digest(token)


def heard(function: Any) -> dict[str, str]:
    """Run a call and give what it printed, by stream."""
    said = {"stdout": "", "stderr": ""}

    def take(received: Any) -> None:
        if isinstance(received.event, Log) and received.event.source == "user":
            said[received.event.stream] += b"".join(map(bytes, received.data)).decode()

    start(function.host, function._parcel(function.host, (), {}), on_event=take).result(timeout=60)
    return said


def test_output_of_every_kind_shows_three_stars(agent_host: Host, token: str) -> None:
    @fal.function(host=agent_host, secrets=[NAME])
    def tell() -> None:
        import base64
        import json
        from urllib.parse import quote

        value = os.environ["FAL_TEST_SECRET"]
        print("whole", value)
        sys.stdout.write("cut " + value[:7])
        sys.stdout.flush()
        time.sleep(0.2)
        sys.stdout.write(value[7:] + "\n")
        print("url", f"https://host/?key={quote(value, safe='')}")
        print("json", json.dumps({"key": value}))
        print("basic", base64.b64encode(f"user:{value}".encode()).decode())
        subprocess.run(["/bin/sh", "-c", 'echo child "$FAL_TEST_SECRET" >&2'], check=True)
        print("the end of it")

    said = heard(tell)

    assert token not in said["stdout"] + said["stderr"]
    assert SECRET not in said["stdout"] + said["stderr"]
    lines = said["stdout"].splitlines()
    assert [line.split()[0] for line in lines] == ["whole", "cut", "url", "json", "basic", "the"]
    assert all("***" in line for line in lines[:-1])
    assert lines[1] == "cut ***"
    assert said["stderr"] == "child ***\n"


def test_an_error_does_not_hold_the_secret(agent_host: Host, token: str) -> None:
    @fal.function(host=agent_host, secrets=[NAME])
    def fail() -> None:
        value = os.environ["FAL_TEST_SECRET"]
        try:
            raise KeyError(value)
        except KeyError as error:
            raise RuntimeError(f"refused: {value}", {"headers": [value]}) from error

    with pytest.raises(RuntimeError, match=r"refused: \*\*\*") as caught:
        fail()

    error = caught.value
    texts = [repr(error), repr(error.__cause__), repr(vars(error)), str(caught.getrepr())]
    assert token not in "".join(texts)


def test_nothing_on_the_host_shows_a_secret_but_the_process_that_has_it(agent_host: Host, token: str) -> None:
    """Journal, spools, logs, functions and blobs; the arguments and the first environment of processes."""

    @fal.function(host=agent_host, secrets=[NAME])
    def give() -> list[Any]:
        print(os.environ["FAL_TEST_SECRET"])
        os.write(2, os.environ["FAL_TEST_SECRET"].encode())
        return [os.environ["FAL_TEST_SECRET"], Path("/proc/self/environ").read_bytes()]

    @fal.function(host=agent_host, secrets=[NAME])
    def items() -> Any:
        yield os.environ["FAL_TEST_SECRET"]

    @fal.function(host=agent_host, secrets=[NAME])
    def quick() -> str:
        return os.environ["FAL_TEST_SECRET"]

    @fal.function(host=agent_host, secrets=[NAME])
    def caught_red_handed(root: str, secret: bytes) -> list[str]:
        kept = [path for path in Path(root).rglob("*") if path.is_file() and "environments" not in path.parts]
        if not any("journal" in path.name for path in kept):
            return [f"no journal in {root}"]
        shown = [
            process / name for process in Path("/proc").glob("[0-9]*") for name in ("cmdline", "environ")
        ]
        found = []
        for path in [*kept, *shown]:
            try:
                content = path.read_bytes()
            except OSError:  # it has ended or is gone, or is somebody else's
                continue
            found += [str(path)] if secret in content else []
        return found

    value, environ = give()
    given, named = [value, *items(), *(quick() for _ in range(6))], NAME.encode() in environ
    root = agent_host.connect().welcome.root
    time.sleep(0.2)  # for what is written in groups

    assert given == [token] * 8
    assert not named
    assert caught_red_handed(root, token.encode()) == []


def test_a_value_that_holds_a_secret_is_not_kept_for_later(agent_host: Host, token: str) -> None:
    @fal.function(host=agent_host, secrets=[NAME])
    def give() -> str:
        return os.environ["FAL_TEST_SECRET"]

    run = give.submit()
    assert run.result(timeout=60) == token

    with pytest.raises(fal.exceptions.FalServerlessError, match="held a secret"):
        fal.attach(run.run_id, host=agent_host).result(timeout=60)
