"""What a call prints arrives whole, in order, on its own stream, and before its value."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

import fal_notebook as fal
from fal_agent.wire import Log
from fal_notebook.run import start

if TYPE_CHECKING:
    from collections.abc import Callable

    from fal_notebook.hosts.base import Host


class Heard:
    """What one run printed, by stream."""

    def __init__(self) -> None:
        self.stdout, self.stderr = bytearray(), bytearray()

    def take(self, received: Any) -> None:
        if isinstance(received.event, Log) and received.event.source == "user":
            for part in received.data:
                getattr(self, received.event.stream).extend(part)

    @property
    def out(self) -> str:
        return self.stdout.decode()

    @property
    def err(self) -> str:
        return self.stderr.decode()


def heard(function: Any, *args: Any) -> Heard:
    """Run a call and give what it printed."""
    run, said = begin(function, *args)
    run.result(timeout=60)
    return said


def begin(function: Any, *args: Any) -> tuple[Any, Heard]:
    said = Heard()
    host = function.host
    return start(host, function._parcel(host, args, {}), on_event=said.take), said


def on(host: Host, **options: Any) -> Callable[[Any], Any]:
    return fal.function(host=host, **options)


def test_stdout_and_stderr_stay_apart(host: Host, capfd: pytest.CaptureFixture[str]) -> None:
    @fal.function(host=host)
    def speak() -> None:
        print("out")
        print("err", file=sys.stderr)
        print("out again", flush=True)

    speak()

    captured = capfd.readouterr()
    assert captured.out == "out\nout again\n"
    assert captured.err.endswith("err\n")


def test_a_last_line_without_its_end_arrives(host: Host, capfd: pytest.CaptureFixture[str]) -> None:
    @fal.function(host=host)
    def speak() -> None:
        sys.stdout.write("whole\npart")

    speak()

    assert capfd.readouterr().out == "whole\npart"


def test_everything_was_printed_when_the_call_returns(host: Host, capfd: pytest.CaptureFixture[str]) -> None:
    @fal.function(host=host)
    def speak(i: int) -> None:
        print("call", i, end="")

    said = []
    for i in range(30):
        speak(i)
        said.append(capfd.readouterr().out)

    assert said == [f"call {i}" for i in range(30)]


def test_what_a_failing_call_printed_arrives_before_its_error(
    host: Host, capfd: pytest.CaptureFixture[str]
) -> None:
    @fal.function(host=host)
    def fail() -> None:
        print("before")
        raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()

    assert capfd.readouterr().out == "before\n"


def test_carriage_returns_stay(agent_host: Host) -> None:
    """A progress bar draws itself anew with them."""

    @on(agent_host)
    def bar() -> None:
        import subprocess

        for i in range(3):
            print(f"\r{i}", end="")
        subprocess.run(["printf", r"\r100%%\n"], check=True)

    assert heard(bar).out == "\r0\r1\r2\r100%\n"


def test_broken_utf8_breaks_nothing(agent_host: Host) -> None:
    @on(agent_host)
    def shout() -> None:
        import os

        os.write(1, b"a\xff\xfeb\n")
        sys.stdout.buffer.write(b"c\xffd\n")
        print("\udc80 surrogate")

    said = heard(shout).out.split("\n")

    assert said[0] == "a\ufffd\ufffdb"
    assert said[1] == "c\ufffdd"
    assert said[2].endswith(" surrogate")


def test_a_letter_cut_in_two_writes_arrives_as_one(agent_host: Host) -> None:
    @on(agent_host)
    def cut() -> None:
        import os
        import time

        os.write(1, "ä".encode()[:1])
        time.sleep(0.1)
        os.write(1, "ä".encode()[1:] + b"!\n")

    assert heard(cut).out == "ä!\n"


def test_c_code_is_heard(agent_host: Host) -> None:
    """A line without its end lies in C's own buffer until somebody flushes it."""

    @on(agent_host)
    def c_print() -> None:
        import ctypes

        libc = ctypes.CDLL(None)
        libc.printf(b"from C %d\n", 7)
        libc.printf(b"without end")

    assert heard(c_print).out == "from C 7\nwithout end"


def test_subprocesses_are_heard_on_both_streams(agent_host: Host) -> None:
    @on(agent_host)
    def shell() -> None:
        import os

        subprocess.run("echo out; echo err >&2", shell=True, check=True)
        os.system("echo system")

    said = heard(shell)

    assert (said.out, said.err) == ("out\nsystem\n", "err\n")


def test_lines_of_python_and_of_subprocesses_keep_their_order(agent_host: Host) -> None:
    @on(agent_host)
    def both() -> None:
        for i in range(20):
            print("python", i)
            subprocess.run(["echo", "child", str(i)], check=True)

    assert heard(both).out == "".join(f"python {i}\nchild {i}\n" for i in range(20))


def test_a_captured_subprocess_is_not_heard(agent_host: Host) -> None:
    @on(agent_host)
    def capture() -> str:
        return subprocess.check_output(["echo", "mine"], text=True)

    run, said = begin(capture)

    assert run.result(timeout=20) == "mine\n"
    assert said.out == ""


def test_two_hundred_thousand_lines_arrive_complete_and_in_order(agent_host: Host) -> None:
    @on(agent_host)
    def many(n: int) -> None:
        for i in range(n):
            print(i)

    lines = heard(many, 200_000).out.split("\n")

    assert lines == [*map(str, range(200_000)), ""]


def test_megabytes_of_a_subprocess_arrive_complete(agent_host: Host) -> None:
    @on(agent_host)
    def many() -> None:
        subprocess.run(["seq", "1", "300000"], check=True)

    assert heard(many).out == "".join(f"{i}\n" for i in range(1, 300_001))


def test_one_very_long_line_arrives_whole(agent_host: Host) -> None:
    @on(agent_host)
    def long() -> None:
        print("é" * 3_000_000)

    assert heard(long).out == "é" * 3_000_000 + "\n"


def test_threads_of_a_call_are_heard(agent_host: Host) -> None:
    @on(agent_host)
    def threads() -> None:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda i: sys.stdout.write(f"thread {i}\n"), range(6)))

    assert sorted(heard(threads).out.splitlines()) == [f"thread {i}" for i in range(6)]


def test_forked_children_are_heard(agent_host: Host) -> None:
    @on(agent_host)
    def fork() -> int:
        import multiprocessing

        def child(i: int) -> None:
            print("child", i)

        context = multiprocessing.get_context("fork")
        children = [context.Process(target=child, args=(i,)) for i in range(3)]
        for process in children:
            process.start()
        for process in children:
            process.join()
        print("parent")
        return sum(process.exitcode or 0 for process in children)

    run, said = begin(fork)

    assert run.result(timeout=30) == 0
    assert sorted(said.out.splitlines()) == ["child 0", "child 1", "child 2", "parent"]


def test_logging_and_warnings_are_heard(agent_host: Host) -> None:
    @on(agent_host)
    def log() -> None:
        import logging
        import warnings

        logging.getLogger("mine").warning("logged")
        warnings.warn("warned", stacklevel=1)

    said = heard(log)

    assert "logged" in said.err
    assert "UserWarning: warned" in said.err


def test_calls_at_the_same_time_are_told_apart(agent_host: Host) -> None:
    """Prints, threads, subprocesses and `os.system` of several calls in one process."""

    @on(agent_host, max_multiplexing=4, max_concurrency=1)
    def speak(name: str) -> None:
        import os
        import time

        for _ in range(5):
            print(name, "print")
            thread = threading.Thread(target=lambda: print(name, "thread"))
            thread.start()
            thread.join()
            subprocess.run(["sh", "-c", f"echo {name} child; echo {name} err >&2"], check=True)
            os.system(f"echo {name} system")
            time.sleep(0.002)

    begun = {name: begin(speak, name) for name in "abcd"}
    for run, _ in begun.values():
        run.result(timeout=60)

    for name, (_, said) in begun.items():
        assert said.out == f"{name} print\n{name} thread\n{name} child\n{name} system\n" * 5
        assert said.err == f"{name} err\n" * 5


def test_output_comes_while_the_call_runs(agent_host: Host, public_folder: Any) -> None:
    from support.waiting import until

    release = public_folder / "release"

    @on(agent_host)
    def wait() -> None:
        import time

        print("waiting")
        while not release.exists():
            time.sleep(0.005)

    run, said = begin(wait)
    until(lambda: said.out == "waiting\n")
    assert not run.done()
    release.touch()
    run.result(timeout=20)


def test_a_thread_that_outlives_its_call_disturbs_no_other(agent_host: Host, public_folder: Any) -> None:
    from support.waiting import until

    @on(agent_host, max_concurrency=1)
    def leave_thread() -> None:
        import time

        def late() -> None:
            while not (public_folder / "go").exists():
                time.sleep(0.005)
            print("late")
            (public_folder / "said").touch()

        threading.Thread(target=late, daemon=True).start()

    @on(agent_host, max_concurrency=1)
    def other() -> int:
        return 1

    run, said = begin(leave_thread)
    run.result(timeout=20)
    (public_folder / "go").touch()
    until((public_folder / "said").exists)

    assert said.out == ""
    assert other() == 1
