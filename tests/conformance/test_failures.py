"""Whatever goes wrong is told clearly, at once, and the next call works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import traceback
from typing import TYPE_CHECKING, Any

import pytest

import fal_notebook as fal
from fal_notebook import exceptions

if TYPE_CHECKING:
    from pathlib import Path

    from fal_notebook.hosts.base import Host


class QuotaError(Exception):
    """An error of the user's, with an attribute that its arguments do not hold."""

    def __init__(self, user: str, limit: int) -> None:
        super().__init__(user, limit)
        self.user = user
        self.extra = {"limit": limit}


class StubbornError(Exception):
    """Its constructor does not take what is in `args`."""

    def __init__(self, a: int, *, b: int) -> None:
        super().__init__(f"a={a} b={b}")


def works(host: Host) -> bool:
    """Whether the next call works."""

    @fal.function(host=host)
    def one() -> int:
        return 1

    return one() == 1


def test_an_error_comes_back_as_itself(host: Host) -> None:
    @fal.function(host=host)
    def fail() -> None:
        raise QuotaError("ann", 3)

    with pytest.raises(QuotaError) as caught:
        fail()

    assert type(caught.value) is QuotaError
    assert caught.value.args == ("ann", 3)
    assert caught.value.extra == {"limit": 3}
    assert works(host)


def test_causes_contexts_and_notes_come_along(host: Host) -> None:
    @fal.function(host=host)
    def fail() -> None:
        try:
            {}["key"]
        except KeyError as error:
            wrapped = QuotaError("ann", 3)
            if hasattr(wrapped, "add_note"):
                wrapped.add_note("look at the bill")
            raise wrapped from error

    with pytest.raises(QuotaError) as caught:
        fail()

    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.__cause__.args == ("key",)
    if hasattr(caught.value, "__notes__"):
        assert caught.value.__notes__ == ["look at the bill"]


def test_the_traceback_shows_the_users_lines_and_none_of_ours(host: Host) -> None:
    def inner() -> None:
        raise QuotaError("deep", 1)  # the line that failed

    @fal.function(host=host)
    def outer() -> None:
        inner()

    with pytest.raises(QuotaError) as caught:
        outer()

    text = "".join(traceback.format_exception(caught.value))
    assert 'raise QuotaError("deep", 1)  # the line that failed' in text
    assert "in outer" in text
    remote = list(traceback.extract_tb(caught.value.__traceback__))
    names = [frame.name for frame in remote]
    after = names[names.index("outer") :]
    assert after == ["outer", "inner"]
    assert not any("worker" in frame.filename or "executor" in frame.filename for frame in remote)


def test_an_error_with_a_constructor_of_its_own_comes_back_as_itself(host: Host) -> None:
    @fal.function(host=host)
    def fail() -> None:
        raise StubbornError(1, b=2)

    with pytest.raises(StubbornError, match="a=1 b=2"):
        fail()


def test_an_error_that_cannot_be_rebuilt_is_told_in_its_own_words(agent_host: Host) -> None:
    @fal.function(host=agent_host)
    def fail() -> None:
        class HomelessError(Exception):
            rows = (i for i in range(3))  # the class cannot be pickled

        raise HomelessError("lost my keys")

    with pytest.raises(exceptions.UserFunctionException, match=r"HomelessError.*lost my keys") as caught:
        fail()

    assert type(caught.value.__cause__).__name__ == "HomelessError"
    assert works(agent_host)


def test_an_error_holding_what_cannot_be_pickled_is_told_all_the_same(host: Host) -> None:
    @fal.function(host=host)
    def fail() -> None:
        error = ValueError("with a generator")
        error.items = (i for i in range(3))  # type: ignore[attr-defined]
        raise error

    with pytest.raises((ValueError, exceptions.UserFunctionException), match="with a generator"):
        fail()
    assert works(host)


def test_group_of_errors_comes_back_as_a_group(host: Host) -> None:
    group = getattr(__builtins__, "ExceptionGroup", None) or vars(sys.modules["builtins"]).get(
        "ExceptionGroup"
    )
    if group is None:
        pytest.skip("this Python has no exception groups")

    @fal.function(host=host)
    def fail() -> None:
        raise group("several", [ValueError("a"), KeyError("b")])

    with pytest.raises(group) as caught:
        fail()

    assert [type(error) for error in caught.value.exceptions] == [ValueError, KeyError]


def test_recursion_without_end_is_an_ordinary_error(host: Host) -> None:
    def deeper(n: int) -> int:
        return deeper(n + 1)

    @fal.function(host=host)
    def fail() -> None:
        deeper(0)

    with pytest.raises(RecursionError):
        fail()
    assert works(host)


@pytest.mark.parametrize("status", [0, 3])
def test_sys_exit_is_an_error_of_the_call(host: Host, status: int) -> None:
    @fal.function(host=host)
    def leave() -> None:
        sys.exit(status)

    with pytest.raises(SystemExit) as caught:
        leave()

    assert caught.value.code == status
    assert works(host)


def test_an_argument_that_cannot_be_pickled_is_named(host: Host) -> None:
    @fal.function(host=host)
    def use(number: int, handle: Any) -> None:
        return None

    with pytest.raises(exceptions.FalSerializationError, match=r"argument .*'handle'.* of .*use\(\)"):
        use(1, (i for i in range(3)))
    with pytest.raises(exceptions.FalSerializationError, match="handle"):
        use(1, handle={"inside": [(i for i in range(3))]})
    assert works(host)


def test_a_captured_value_that_cannot_be_pickled_is_named(host: Host) -> None:
    lines = (i for i in range(3))

    @fal.function(host=host)
    def use() -> int:
        return next(lines)

    with pytest.raises(exceptions.FalSerializationError, match="lines"):
        use()
    assert works(host)


def test_a_result_that_cannot_be_pickled_is_named(host: Host) -> None:
    @fal.function(host=host)
    def make() -> Any:
        return {"fine": 1, "items": (i for i in range(3))}

    with pytest.raises(
        exceptions.FalSerializationError, match=r"the result of .*make\(\).*generator"
    ) as caught:
        make()

    assert "items" in str(caught.value)
    assert works(host)


def test_a_missing_module_of_the_users_is_named_with_the_fix(
    agent_host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies where libraries lie, so it does not travel by itself."""
    site = tmp_path / "site-packages"
    site.mkdir()
    (site / "fal_tests_missing.py").write_text("def helper(): return 1\n")
    monkeypatch.syspath_prepend(str(site))
    from fal_tests_missing import helper  # type: ignore[import-not-found]

    @fal.function(host=agent_host)
    def use() -> int:
        return int(helper())

    with pytest.raises(exceptions.FalMissingDependencyError, match="fal_tests_missing") as caught:
        use()

    assert "requirements=" in str(caught.value)
    assert "helper" in str(caught.value)
    assert agent_host.name in str(caught.value)
    assert works(agent_host)


def test_an_import_inside_the_function_that_fails_says_what_to_add(agent_host: Host) -> None:
    @fal.function(host=agent_host)
    def use() -> Any:
        import fal_tests_no_such_module  # type: ignore[import-not-found]

        return fal_tests_no_such_module

    with pytest.raises(ModuleNotFoundError, match="fal_tests_no_such_module") as caught:
        use()

    assert "requirements=" in "".join(getattr(caught.value, "__notes__", ()))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("exit", "exit status 3"),
        ("segfault", "SIGSEGV"),
        ("kill", "SIGKILL.*ran out of memory.*bigger machine_type"),
        ("abort", "SIGABRT"),
    ],
)
def test_the_death_of_a_worker_is_told_and_the_next_call_works(
    agent_host: Host, how: str, words: str
) -> None:
    @fal.function(host=agent_host)
    def die() -> None:
        import ctypes

        if how == "exit":
            os._exit(3)
        elif how == "segfault":
            ctypes.string_at(0)
        elif how == "abort":
            os.abort()
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(exceptions.WorkerLostError, match=f"(?s){words}") as caught:
        die()

    assert agent_host.name in str(caught.value)
    assert caught.value.exit_status == {"exit": 3, "segfault": -11, "kill": -9, "abort": -6}[how]
    assert works(agent_host)


def test_what_a_dying_worker_printed_last_arrives(
    agent_host: Host, capfd: pytest.CaptureFixture[str]
) -> None:
    @fal.function(host=agent_host)
    def die() -> None:
        import time

        print("last words")
        time.sleep(0.3)
        os._exit(1)

    with pytest.raises(exceptions.WorkerLostError):
        die()

    assert "last words" in capfd.readouterr().out


def test_all_calls_of_a_dead_worker_are_told(agent_host: Host, public_folder: Path) -> None:
    @fal.function(host=agent_host, max_multiplexing=2, max_concurrency=1)
    def wait_or_die(die: bool) -> None:
        import time

        (public_folder / str(die)).touch()
        while not (public_folder / str(not die)).exists():
            time.sleep(0.005)
        if die:
            os._exit(1)
        time.sleep(60)

    runs = [wait_or_die.submit(False), wait_or_die.submit(True)]

    for run in runs:
        assert isinstance(run.exception(timeout=20), exceptions.WorkerLostError)


def test_a_child_that_holds_the_workers_connection_delays_nothing(agent_host: Host) -> None:
    """A forked child inherits every descriptor; the worker's death is noticed all the same."""

    @fal.function(host=agent_host)
    def fork_and_die() -> None:
        import time

        if os.fork() == 0:
            time.sleep(600)
            os._exit(0)
        os._exit(5)

    with pytest.raises(exceptions.WorkerLostError, match="exit status 5"):
        fork_and_die()
    assert works(agent_host)


def test_threads_that_fail_do_not_break_the_worker(agent_host: Host) -> None:
    @fal.function(host=agent_host)
    def start() -> int:
        import threading

        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
        return os.getpid()

    assert start() == start()


@pytest.mark.parametrize("how", ["close", "close the buffer", "replace"])
def test_what_a_call_does_to_the_standard_streams_ends_with_it(
    agent_host: Host, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    @fal.function(host=agent_host, max_concurrency=1)
    def spoil() -> int:
        import io

        if how == "close":
            sys.stdout.close()
        elif how == "close the buffer":
            sys.stdout.buffer.close()
        else:
            sys.stdout = io.StringIO()
        return os.getpid()

    @fal.function(host=agent_host, max_concurrency=1)
    def speak() -> int:
        print("still here", flush=True)
        sys.stdout.buffer.write(b"bytes too\n")
        return os.getpid()

    assert spoil() == speak()
    assert capfd.readouterr().out == "still here\nbytes too\n"


def test_an_error_here_leaves_no_thread_waiting(host: Host, tmp_path: Path) -> None:
    """A script that ends with an uncaught remote error ends, and shows the user's line."""
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import fal_notebook as fal

            @fal.function(host={host.name!r})
            def fail():
                return 1 / 0  # this line

            fail()
            """
        )
    )

    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 1
    assert "return 1 / 0  # this line" in done.stderr
    assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")
