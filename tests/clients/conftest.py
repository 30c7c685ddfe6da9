"""What the tests of foreign clients share: an app on each host, spawned once and reached at its URL."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any

import pytest
from support.client_app import make_app
from support.hosts import AGENT_HOSTS, host_named

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = "me:secret"
SECONDS = 60.0
numbers = itertools.count(1)


@pytest.fixture(scope="module", params=AGENT_HOSTS)
def app(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The app without `app_auth`: whoever is on this machine may use it."""
    yield from _spawn(host_named(request, request.param))


@pytest.fixture(scope="module")
def public_app() -> Iterator[Any]:
    """The app for everybody."""
    yield from _spawn("local", app_auth="public")


@pytest.fixture(scope="module", params=AGENT_HOSTS)
def private_app(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The app for whoever has the key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAL_KEY", KEY)
        yield from _spawn(host_named(request, request.param), app_auth="private")


def _spawn(host: Any, **settings: Any) -> Iterator[Any]:
    name = f"talks-{settings.get('app_auth', 'open')}-{os.getpid()}"
    info = make_app(name, **settings).spawn(host=host)
    try:
        info.wait(startup_timeout=SECONDS)
        yield info
    finally:
        info.stop()


@pytest.fixture
def gate() -> str:
    """A name that no other test has, of what holds a stream back."""
    return f"gate-{next(numbers)}"
