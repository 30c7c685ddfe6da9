"""What `fal.function` makes of a function: an object that says of itself what the function says."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import fal_notebook as fal
from fal_notebook.functions import Function


def plain(x: int, *, y: int = 2) -> int:
    """Add two numbers."""
    return x + y


def setup() -> int:
    return 1


def test_it_keeps_the_name_the_text_and_the_function() -> None:
    function = fal.function(requirements=["numpy"], machine_type="M")(plain)

    assert isinstance(function, Function)
    assert function.__wrapped__ is function.raw_func is plain  # type: ignore[attr-defined]
    assert (function.__name__, function.__qualname__, function.__doc__) == (
        *("plain", "plain"),
        "Add two numbers.",
    )
    assert (function.app_name, function.app_auth, function.reraise) == ("plain", None, True)
    assert function.options.environment == {"kind": "virtualenv", "requirements": ["numpy"]}
    assert function.options.host == {"machine_type": "M"}
    assert function.options.gateway == {}


def test_its_host_is_the_one_given_or_the_current_one() -> None:
    inline = fal.InlineHost()

    assert fal.function(host=inline)(plain).host is inline
    assert fal.function(host="local")(plain).host is fal.local
    assert fal.function(plain).host is fal.local


def test_on_a_host_that_knows_fewer_options_the_others_do_not_matter() -> None:
    """The inline host has neither GPUs nor environments: the function is this process's."""
    decorate = fal.function(machine_type="GPU-H100", num_gpus=2, regions=["mars"], requirements=["nothing"])

    assert decorate(plain).on(host=fal.InlineHost())(1) == 3


def test_a_setup_function_is_run_for_a_local_run_too() -> None:
    assert fal.function(setup_function=setup)(plain).run_local(y=5) == 6


@pytest.mark.parametrize("line", ["@fal.function(machine_type='GPU', host='nowhere')", "@fal.cached"])
def test_decorating_asks_nobody_for_anything(line: str) -> None:
    """No key, no machine, no file of settings; nor does a class, or an import."""
    code = f"""
import os, socket
os.environ.pop("FAL_KEY", None)
def refuse(*_, **__):
    raise AssertionError("somebody was asked")
socket.socket.connect = socket.getaddrinfo = refuse
import fal_notebook as fal

{line}
def f(): ...

class App(fal.App, machine_type="GPU", app_auth="private"):
    @fal.endpoint("/")
    def run(self): ...
"""
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
