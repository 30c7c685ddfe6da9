"""The notebook of a scripted run of the fault suite: makes one kind of calls, or comes back to one.

A script in a process of its own, which may be killed at any moment. What the calls print goes to its
standard output; what they give goes to a file, a line each: `value KEY VALUE`, `error KEY TYPE TEXT`, `end`.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fal_notebook as fal
from fal_notebook.exceptions import HostUnreachableError
from fal_notebook.hosts.ssh import SSHHost

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DIGEST_BYTES", "KINDS", "expected_text", "expected_values", "payload"]

DIGEST_BYTES = 3_000_000  # of an argument and of a result that travel as blobs


def payload(token: str, size: int = DIGEST_BYTES) -> bytes:
    """Bytes that only this token has."""
    return random.Random(token).randbytes(size)


def mark(effects: str, token: str, key: object) -> None:
    """Leave a line that says that a call ran."""
    fd = os.open(effects, os.O_WRONLY | os.O_APPEND)
    os.write(fd, f"{token} {key} {os.getpid()}\n".encode())
    os.close(fd)


def lines(token: str, effects: str, count: int, pause: float) -> str:
    """Print at a pace, with a child beside."""
    import subprocess

    mark(effects, token, "run")
    child = subprocess.Popen(["sleep", "600"])
    try:
        for number in range(count):
            print(f"{token} {number}", flush=True)
            time.sleep(pause)
    finally:
        child.kill()
        child.wait()
    return f"{token}:{count}"


def burst(token: str, effects: str, count: int, pause: float) -> str:
    """Print as fast as possible, then wait, then print once more."""
    mark(effects, token, "run")
    for number in range(count - 1):
        print(f"{token} {number}")
    time.sleep(pause)
    print(f"{token} {count - 1}")
    return f"{token}:{count}"


def items(token: str, effects: str, count: int, pause: float) -> Any:
    """Give items at a pace."""
    mark(effects, token, "run")
    for number in range(count):
        print(f"{token} {number}", flush=True)
        time.sleep(pause)
        yield number


def large(token: str, effects: str, count: int, pause: float, data: bytes) -> bytes:
    """Take and give megabytes."""
    mark(effects, token, "run")
    for number in range(count):
        print(f"{token} {number}", flush=True)
        time.sleep(pause)
    return bytes(data[::-1])


def brief(token: str, effects: str, number: int) -> int:
    """One of many calls that take no time."""
    mark(effects, token, number)
    return number


KINDS = ("lines", "burst", "items", "large", "cell", "brief", "map")


def expected_text(kind: str, token: str, count: int) -> str:
    """What is printed by a call that was not ended."""
    if kind in ("brief", "map"):
        return ""
    return "".join(f"{token} {number}\n" for number in range(count))


def expected_values(kind: str, token: str, count: int) -> dict[str, str]:
    """What the calls give, by key."""
    if kind == "items":
        return {str(number): str(number) for number in range(count)} | {"run": "done"}
    if kind in ("brief", "map"):
        return {str(number): str(number) for number in range(count)}
    if kind == "large":
        return {"run": hashlib.sha256(payload(token)[::-1]).hexdigest()}
    return {"run": f"{token}:{count}"}


class Client:
    """Does what a plan says: "kind", "token", "count", "pause", "effects", "report", "host", and "run_id"."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan, self.kind, self.token = plan, plan["kind"], plan["token"]
        self.host = SSHHost(plan["host"])
        self.report = Path(plan["report"]).open("a")  # noqa: SIM115 - for as long as the process lives

    def tell(self, *words: object) -> None:
        self.report.write(" ".join(str(word).replace("\n", " ") for word in words) + "\n")
        self.report.flush()

    def value_of(self, key: object, get: Callable[[], Any]) -> None:
        try:
            value = get()
        except Exception as error:
            self.tell("error", key, type(error).__name__, error)
            return
        if self.kind == "items":
            self.iterate(value)
            return
        if isinstance(value, dict):
            value = value["answer"]
        if isinstance(value, (bytes, bytearray, memoryview)):
            value = hashlib.sha256(value).hexdigest()
        self.tell("value", key, value)

    def iterate(self, values: Any) -> None:
        try:
            for value in values:
                self.tell("value", value, value)
        except Exception as error:
            self.tell("error", "run", type(error).__name__, error)
        else:
            self.tell("value", "run", "done")

    def function(self, function: Any) -> Any:
        function.__name__ = function.__qualname__ = self.token  # the run's label
        return fal.function(host=self.host)(function)

    def start(self) -> None:
        plan = self.plan
        arguments = (self.token, plan["effects"])
        if self.kind == "brief":
            call = self.function(brief)
            for number in range(plan["count"]):
                self.value_of(number, lambda number=number: call(*arguments, number))
        elif self.kind == "map":
            call = self.function(brief)
            runs: list[Any] = []
            try:
                runs += (call.submit(*arguments, number) for number in range(plan["count"]))
            except HostUnreachableError as error:
                for number in range(len(runs), plan["count"]):
                    self.tell("error", number, type(error).__name__, error)
            for number, run in enumerate(runs):
                self.value_of(number, run.result)
        elif self.kind == "cell":
            self.value_of("run", self.cell)
        else:
            extra = (payload(self.token),) if self.kind == "large" else ()
            call = self.function({"lines": lines, "burst": burst, "items": items, "large": large}[self.kind])
            values = (*arguments, plan["count"], plan["pause"], *extra)
            self.value_of("run", lambda: call(*values) if plan["waits"] else call.submit(*values).result())

    def cell(self) -> Any:
        from IPython.core.interactiveshell import InteractiveShell

        shell = InteractiveShell.instance()
        shell.run_line_magic("load_ext", "fal_notebook")
        plan = self.plan
        code = (
            f"token = {self.token!r}\n"
            "import os, time\n"
            f"fd = os.open({plan['effects']!r}, os.O_WRONLY | os.O_APPEND)\n"
            "_ = os.write(fd, f'{token} run {os.getpid()}\\n'.encode())\n"
            "os.close(fd)\n"
            f"for number in range({plan['count']}):\n"
            "    print(token, number, flush=True)\n"
            f"    time.sleep({plan['pause']})\n"
            f"answer = f'{{token}}:{plan['count']}'\n"
        )
        shell.run_cell_magic("fal", f"--host {plan['host']}", code)
        return shell.user_ns["answer"]

    def attach(self) -> None:
        run = fal.attach(self.plan["run_id"], host=self.host)
        self.value_of("run", run.result)

    def work(self) -> None:
        self.attach() if self.plan.get("run_id") else self.start()
        self.tell("end")
        self.host.close()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(90)  # for the judge of something that hangs
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    Client(json.loads(sys.argv[1])).work()
