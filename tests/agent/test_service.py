"""The agent as a process: how it starts, what it asks for, what it replays, how it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.raw_client import RawClient
from support.waiting import is_alive, until
from uv import find_uv_bin

import fal_agent
from fal_agent import pickling
from fal_agent.wire import (
    Ask,
    Attach,
    BlobPart,
    Call,
    Cancel,
    Failure,
    Hello,
    Ping,
    Resources,
    Result,
    Submit,
)
from fal_notebook.environment import environment_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CODE = Path(fal_agent.__file__).parents[1]
DIGEST = "d" * 64


def start(
    root: Path, *, python: str = sys.executable, idle: float = 20, digest: str = DIGEST, **variables: str
) -> dict[str, Any]:
    """Run `fal_agent start`; gives what it printed."""
    done = subprocess.run(
        [python, "-m", "fal_agent", "start", "--root", root, "--digest", digest, "--idle", str(idle)],
        env={**os.environ, "PYTHONPATH": str(CODE), "UV": find_uv_bin(), **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A host's folder; its path is short, as sockets want it."""
    folder = Path(tempfile.mkdtemp(prefix="fal-service-"))
    yield folder / "root"
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """The folder of the agent that most tests here share."""
    with short_folder() as folder:
        yield folder


@pytest.fixture
def own_root() -> Iterator[Path]:
    """A folder for an agent of the test's own."""
    with short_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def path(root: Path) -> Iterator[Path]:
    """The socket of an agent that runs."""
    socket_path = Path(start(root)["socket"])
    yield socket_path
    client = RawClient(socket_path)
    client.send(Ask("end", "shutdown"))
    client.receive("answer")
    client.close()


@pytest.fixture
def client(path: Path) -> Iterator[RawClient]:
    client = RawClient(path)
    yield client
    client.close()


def call(function: Callable[..., Any], *args: Any, **settings: Any) -> tuple[Submit, list[Any]]:
    """A submit of a function, and its buffers: the arguments', then the function's."""
    (arguments,) = pickling.dump((args, {}))
    (data,) = pickling.dump((function, None))
    digest = uuid.uuid5(uuid.NAMESPACE_OID, data.hex()).hex  # type: ignore[union-attr]
    described = Call(
        kind="function",
        label="f",
        function=digest,
        environment=environment_spec(None),
        client=platform.python_version(),
        **settings,
    )
    submit = Submit(uuid.uuid4().hex[:16], uuid.uuid4().hex, [0], call=described, function_data=[1])
    return submit, [arguments, data]


def test_starting_twice_finds_the_same_agent(root: Path, path: Path) -> None:
    client = RawClient(path)
    client.send(Ask("1", "status"))
    first = client.receive("answer")[0].content["agent"]["pid"]

    assert start(root) == {"socket": str(path)}

    client.send(Ask("2", "status"))
    assert client.receive("answer")[0].content["agent"]["pid"] == first
    client.close()


def test_agents_started_at_once_are_one(own_root: Path) -> None:
    command = [sys.executable, "-m", "fal_agent", "start", "--root", own_root, "--digest", DIGEST]
    environment = {**os.environ, "PYTHONPATH": str(CODE)}
    started = [
        subprocess.Popen([*command, "--idle", "1"], env=environment, stdout=subprocess.PIPE) for _ in "abcd"
    ]
    answers = {process.communicate(timeout=60)[0] for process in started}
    (answer,) = answers
    client = RawClient(Path(json.loads(answer)["socket"]))
    client.send(Ask("1", "status"))
    pid = client.receive("answer")[0].content["agent"]["pid"]
    client.close()

    until(lambda: not is_alive(pid))  # idle for its second


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.12", "3.13"])
def test_the_agent_runs_on_every_supported_python(version: str, own_root: Path) -> None:
    """The host's own Python runs it, whatever the notebook's is."""
    found = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python"))
    python = str(found[-1]) if found else shutil.which(f"python{version}")
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    client = RawClient(Path(start(own_root, python=python, idle=0.5)["socket"]), hello=False)
    client.send(Hello("me"))
    welcome, _ = client.receive("welcome")
    submit, buffers = call(lambda: 41 + 1)
    client.send(submit, buffers)
    result, parts = client.receive("result", "failure")
    client.send(Ask("end", "shutdown"))
    client.receive("answer")
    client.close()

    assert welcome.python.startswith(f"{version}.")
    assert isinstance(result, Result), result
    assert pickling.load(parts) == 42
    until(lambda: not is_alive(welcome.pid))


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving a folder away needs root")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    os.chown(foreign, 65534, 65534)

    answer = start(foreign)

    assert "belongs to another user" in answer["error"]
    assert "FAL_NOTEBOOK_HOME" in answer["error"]


def test_a_socket_file_left_by_a_killed_agent_is_no_obstacle(own_root: Path) -> None:
    first = start(own_root, idle=0.5)
    client = RawClient(Path(first["socket"]))
    client.send(Ask("1", "status"))
    pid = client.receive("answer")[0].content["agent"]["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_alive(pid))
    assert Path(first["socket"]).exists()

    second = start(own_root, idle=0.5)
    other = RawClient(Path(second["socket"]))
    other.send(Ping(1))

    assert other.receive("pong")[0].number == 1
    other.send(Ask("end", "shutdown"))
    other.receive("answer")
    other.close()
    client.close()


def test_a_call_runs_and_its_function_need_not_be_sent_again(client: RawClient) -> None:
    submit, buffers = call(lambda a: a + 1, 1)
    client.send(submit, buffers)
    _, parts = client.receive("result", "failure")
    again = replace(submit, run_id=uuid.uuid4().hex[:16], call=None, function_data=None)
    client.send(again, buffers[:1])
    _, parts_again = client.receive("result", "failure")

    assert pickling.load(parts) == pickling.load(parts_again) == 2


def test_a_function_the_agent_does_not_have_is_asked_for(client: RawClient) -> None:
    submit, buffers = call(lambda: 1)
    client.send(replace(submit, function_data=None), buffers[:1])

    need, _ = client.receive("need", "result", "failure")

    assert submit.call is not None
    assert need.names == [submit.call.function]
    client.send(submit, buffers)
    assert isinstance(client.receive("result", "failure")[0], Result)


def test_a_blob_the_agent_does_not_have_is_asked_for(client: RawClient) -> None:
    submit, buffers = call(len, b"")
    name = f"b3-{uuid.uuid4().hex}"
    by_blob = replace(submit, arguments=[name], function_data=[0])
    client.send(by_blob, buffers[1:])
    need, _ = client.receive("need", "result", "failure")
    assert need.names == [name]

    (content,) = pickling.dump(((b"12345",), {}))
    size = len(content)
    client.send(BlobPart(name, 0, size), [content[: size // 2]])
    client.send(BlobPart(name, size // 2, size), [content[size // 2 :]])
    client.send(by_blob, buffers[1:])

    _, parts = client.receive("result", "failure")
    assert pickling.load(parts) == 5


def test_events_are_numbered_without_gaps_and_replayed_alike(path: Path, client: RawClient) -> None:
    submit, buffers = call(lambda: [print(i, flush=True) for i in range(5)] and 7)
    client.send(submit, buffers)
    result, _ = client.receive("result", "failure")
    other = RawClient(path)
    other.send(submit, buffers)
    events = []
    while not events or events[-1].type != "result":
        events.append(other.receive("stage", "log", "result", "failure")[0])
    other.close()

    assert [event.seq for event in events] == list(range(1, result.seq + 1))


def test_a_run_that_still_runs_is_followed_after_sending_its_submit_again(
    path: Path, client: RawClient, tmp_path: Path
) -> None:
    go = tmp_path / "go"

    def work() -> int:
        import time

        print("begun", flush=True)
        while not go.exists():
            time.sleep(0.005)
        return 9

    submit, buffers = call(work)
    client.send(submit, buffers)
    client.receive("log")
    client.close()
    other = RawClient(path)
    other.send(submit, buffers)
    _log, text = other.receive("log")
    go.touch()
    _, parts = other.receive("result", "failure")
    other.close()

    assert bytes(text[0]) == b"begun\n"
    assert pickling.load(parts) == 9


def test_what_the_machine_does_not_have_is_refused(client: RawClient) -> None:
    submit, buffers = call(lambda: 1, resources=Resources(machine_types=["GPU-H100"]))
    client.send(submit, buffers)

    failure, _ = client.receive("result", "failure")

    assert failure.kind == "resources"
    assert "H100" in failure.message


def test_another_python_is_refused_before_anything_is_opened(client: RawClient) -> None:
    submit, buffers = call(lambda: 1)
    assert submit.call is not None
    client.send(replace(submit, call=replace(submit.call, client="3.1.0")), buffers)

    failure, _ = client.receive("result", "failure")

    assert failure.kind == "python"
    assert "3.1" in failure.message


def test_a_run_cancelled_while_its_environment_is_built_is_cancelled_at_once(client: RawClient) -> None:
    submit, buffers = call(lambda: 1)
    assert submit.call is not None
    spec = replace(submit.call.environment, force=True)
    client.send(replace(submit, call=replace(submit.call, environment=spec)), buffers)
    client.send(Cancel(submit.run_id))

    failure, _ = client.receive("result", "failure")

    assert isinstance(failure, Failure)
    assert failure.kind == "cancelled"


def test_agents_of_two_sources_share_a_folder_and_one_reports_what_the_other_lost(own_root: Path) -> None:
    """As while an upgraded notebook works beside an old one."""

    def wait() -> None:
        import time

        time.sleep(600)

    old, new = (RawClient(Path(start(own_root, digest=letter * 64)["socket"])) for letter in "ab")
    submit, parts = call(wait)
    old.send(submit, parts)
    old.send(Ask("1", "status"))
    agent = old.receive("answer")[0].content["agent"]["pid"]
    until(lambda: state_of(new, submit.run_id) in ("running", "queued"))

    new.send(Attach(submit.run_id))
    assert "another version of the agent has it" in new.receive("failure")[0].message
    os.kill(agent, signal.SIGKILL)
    until(lambda: not is_alive(agent))

    new.send(Ask("2", "status"))
    other = new.receive("answer")[0].content["agent"]["pid"]
    before = resource.prlimit(other, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))  # as on a full disk
    new.send(Attach(submit.run_id))
    failure = new.receive("failure")[0]
    assert (failure.kind, "the agent that ran it ended" in failure.message) == ("lost", True), failure
    resource.prlimit(other, resource.RLIMIT_FSIZE, before)
    until(lambda: state_of(new, submit.run_id) == "lost")
    new.send(Attach(submit.run_id))
    failure = new.receive("failure")[0]
    assert failure.kind == "lost"
    assert "the agent that ran it ended" in failure.message
    new.send(Ask("end", "shutdown"))
    new.receive("answer")
    for client in (old, new):
        client.close()


def state_of(client: RawClient, run_id: str) -> str | None:
    client.send(Ask(uuid.uuid4().hex, "runs"))
    runs = client.receive("answer")[0].content
    return next((run["state"] for run in runs if run["run_id"] == run_id), None)
