"""A script that ends with `fal.wrap_app(MyApp)()` serves until it is interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

from support import http

SCRIPT = """
import fal_notebook as fal

class Hello(fal.App, name=NAME):
    def setup(self):
        if FAILS:
            raise LookupError("no such weights")

    def teardown(self):
        print("torn down", flush=True)

    @fal.endpoint("/")
    def hello(self, name: str) -> str:
        return f"hello {name}"

fal.wrap_app(Hello, host="local", keep_alive=30)()
print("over")
"""


def start(*, fails: bool = False) -> subprocess.Popen[str]:
    beginning = f"NAME = 'wrapped-{os.getpid()}-{fails}'\nFAILS = {fails}\n"
    return subprocess.Popen(
        [sys.executable, "-c", beginning + SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_serves_until_it_is_interrupted() -> None:
    with start() as script:
        assert script.stdout is not None
        lines = iter(script.stdout.readline, "")
        url = next(found[0] for line in lines if (found := re.search(r"http://[0-9.:]+", line)))

        assert http.post(url, json={"name": "you"}, timeout=60).json() == "hello you"

        script.send_signal(signal.SIGINT)
        rest, errors = script.communicate(timeout=60)
        assert script.returncode == 0, errors
        assert rest.splitlines()[-2:] == ["torn down", "over"]
        assert rest.count("torn down") == 1


def test_a_setup_that_fails_is_its_error() -> None:
    with start(fails=True) as script:
        rest, errors = script.communicate(timeout=60)

    assert script.returncode == 1
    assert "LookupError: no such weights" in errors
    assert "over" not in rest.splitlines()
