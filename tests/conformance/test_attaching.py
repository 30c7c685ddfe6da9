"""Runs are shown again: output from the first line, what is yet to come, and the value."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from support.waiting import until

import fal_notebook as fal
from fal_notebook import exceptions
from fal_notebook.hosts.local import LocalHost
from fal_notebook.hosts.ssh import SSHHost

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def other(agent_host: Any) -> Iterator[Any]:
    """The same host as another notebook sees it: over a connection of its own."""
    host = (LocalHost if isinstance(agent_host, LocalHost) else SSHHost)(agent_host.name)
    yield host
    host.close()


def printing(host: Any, go: Path) -> Any:
    @fal.function(host=host)
    def work() -> dict[str, int]:
        import time

        print("begun", flush=True)
        while not go.exists():
            time.sleep(0.005)
        print("ended")
        return {"answer": 42}

    return work


def test_a_run_that_goes_on_is_shown_from_its_first_line_and_followed(
    agent_host: Any, other: Any, public_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    go = public_folder / "go"
    run = printing(agent_host, go).submit()
    until(lambda: "begun" in capfd.readouterr().out)

    again = fal.attach(run.run_id, host=other)
    until(lambda: "begun" in capfd.readouterr().out)
    go.touch()

    assert again.result(timeout=30) == {"answer": 42}
    assert run.result(timeout=30) == {"answer": 42}  # whoever started it sees it too


def test_the_notebook_that_has_a_run_may_attach_to_it_as_well(agent_host: Any, public_folder: Path) -> None:
    go = public_folder / "go"
    run = printing(agent_host, go).submit()
    again = [fal.attach(run.run_id, host=agent_host) for _ in range(2)]
    go.touch()

    assert [one.result(timeout=30) for one in (*again, run)] == [{"answer": 42}] * 3


def test_a_run_that_has_ended_gives_its_value_and_its_output(
    agent_host: Any, other: Any, public_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (public_folder / "go").touch()
    run = printing(agent_host, public_folder / "go").submit()
    run.result(timeout=60)
    capfd.readouterr()

    again = fal.attach(run.run_id[:10], host=other)  # the beginning of an id is enough

    assert again.result(timeout=30) == {"answer": 42}
    assert capfd.readouterr().out == "begun\nended\n"


def test_a_run_that_failed_raises_what_it_raised(agent_host: Any, other: Any) -> None:
    @fal.function(host=agent_host)
    def fail() -> None:
        raise LookupError("not here")

    run = fail.submit()
    with pytest.raises(LookupError):
        run.result(timeout=60)

    with pytest.raises(LookupError, match="not here"):
        fal.attach(run.run_id, host=other).result(timeout=30)


def test_a_large_value_comes_again(agent_host: Any, other: Any) -> None:
    @fal.function(host=agent_host)
    def large() -> bytes:
        return bytes(range(256)) * 20_000

    run = large.submit()
    expected = run.result(timeout=60)

    assert fal.attach(run.run_id, host=other).result(timeout=30) == expected


def test_an_attached_run_can_be_stopped(agent_host: Any, other: Any, public_folder: Path) -> None:
    run = printing(agent_host, public_folder / "never").submit()
    until(lambda: [info.state for info in fal.runs(other) if info.run_id == run.run_id] == ["running"])

    fal.attach(run.run_id, host=other).interrupt()

    with pytest.raises(KeyboardInterrupt):
        run.result(timeout=30)


def test_the_one_who_started_it_goes_and_the_one_who_watches_sees_the_rest(
    agent_host: Any, other: Any, public_folder: Path
) -> None:
    go = public_folder / "go"
    owner = (LocalHost if isinstance(agent_host, LocalHost) else SSHHost)(agent_host.name)
    run = printing(owner, go).submit()
    again = fal.attach(run.run_id, host=other)
    owner.close()
    go.touch()

    assert again.result(timeout=30) == {"answer": 42}


def test_runs_are_listed(agent_host: Any) -> None:
    @fal.function(host=agent_host)
    def listed() -> int:
        return 1

    before = time.time()
    listed()

    info = fal.runs(agent_host, limit=1)[0]
    assert (info.host, info.kind, info.state) == (agent_host.name, "function", "done")
    assert info.label.endswith("listed")
    assert info.submitted_at == pytest.approx(before, abs=60)
    assert info.attach().result(timeout=30) == 1
    assert info.result_bytes is not None
    assert 0 < info.result_bytes < 1000
    shown = fal.runs(agent_host, limit=1)
    for text in (repr(shown), shown._repr_html_()):
        assert all(word in text for word in (info.run_id, "done", "ago", agent_host.name, "listed"))


def test_ended_runs_are_forgotten_with_their_results(agent_host: Any, public_folder: Path) -> None:
    @fal.function(host=agent_host)
    def large() -> bytes:
        print("said")
        return bytes(2_000_000)

    run = large.submit()
    run.result(timeout=60)
    goes_on = printing(agent_host, public_folder / "go").submit()
    until(lambda: [info for info in fal.runs(agent_host) if info.run_id == goes_on.run_id])
    assert next(i for i in fal.runs(agent_host) if i.run_id == run.run_id).result_bytes >= 2_000_000

    pruned = fal.prune(agent_host, days=0)

    assert pruned.runs >= 1
    assert pruned.bytes >= 2_000_000
    assert "MB of output and results" in str(pruned) or "GB" in str(pruned)
    assert [info.run_id for info in fal.runs(agent_host)] == [goes_on.run_id]
    (public_folder / "go").touch()
    assert goes_on.result(timeout=30) == {"answer": 42}
    assert fal.prune(agent_host).runs == 0
    with pytest.raises(exceptions.FalServerlessError, match="at least 0"):
        fal.prune(agent_host, days=-1)


def test_an_unknown_run_is_refused(agent_host: Any) -> None:
    with pytest.raises(exceptions.FalServerlessError, match=r"knows no run 'ffffffffffffffff'.*%fal runs"):
        fal.attach("f" * 16, host=agent_host)


def test_an_id_that_could_be_several_is_refused(agent_host: Any) -> None:
    @fal.function(host=agent_host)
    def one() -> int:
        return 1

    for _ in range(2):
        one()
    with pytest.raises(exceptions.FalServerlessError, match=r"runs on .* begin so"):
        fal.attach("", host=agent_host)


def test_this_process_keeps_no_runs() -> None:
    with pytest.raises(exceptions.FalServerlessError, match="keeps no runs"):
        fal.attach("f" * 16, host="inline")
