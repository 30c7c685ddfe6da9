"""Ctrl-C at any moment of a call leaves no lock held that other threads of the connection would wait for."""

from __future__ import annotations

from typing import Any

import pytest

from fal_notebook.hosts.ssh_stream import Stream
from tests.support.strikes import goes_on, strike_at


class Outlet:
    """Takes what a stream sends."""

    def post(self, *_args: Any, **_options: Any) -> None:
        pass


@pytest.mark.timeout(120)
def test_a_stream_whose_user_was_interrupted_takes_what_arrives() -> None:
    stream = Stream(Outlet(), 1)  # type: ignore[arg-type]

    strike_at(lambda: stream.queued(0))
    assert goes_on(lambda: stream.unqueued(0))

    strike_at(lambda: stream.standard_error)
    assert goes_on(lambda: stream.unqueued(0))
