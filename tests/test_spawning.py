"""What is said of an app, or of a served function, when it is sent to a host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import fal_notebook as fal
from fal_agent.errors import FalServerlessError
from fal_agent.wire import HealthPolicy
from fal_notebook import spawning

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Spawn something, and give what would have been sent."""
    kept: list[Any] = []

    def launch(served: Any, _where: Any, *, quiet: bool) -> None:
        kept.append(served)

    monkeypatch.setattr(spawning, "_launch", launch)

    def spawn(spawned: Any) -> Any:
        spawned.spawn()
        return kept.pop()

    return spawn


def work(x: int) -> int:
    return x


def test_what_an_app_does_not_say_has_the_platforms_defaults(sent: Callable[[Any], Any]) -> None:
    class Silent(fal.App, name="silent"):
        @fal.endpoint("/")
        def run(self) -> None: ...

    spec = sent(Silent).spec

    assert (spec.name, spec.auth, spec.grace, spec.port) == ("silent", "", 30.0, None)
    assert (spec.request_timeout, spec.multiplexing, spec.skip_retry) == (None, None, [])
    assert spec.health == HealthPolicy("", "POST", 30.0, 5.0, 3, regularly=True)


def test_what_an_app_says_arrives(sent: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAL_KEY", "id:secret")

    class Telling(fal.App, app_auth="private", max_multiplexing=3, request_timeout=7):
        termination_grace_period_seconds = 2
        skip_retry_conditions = ["timeout"]

        @fal.endpoint(
            "/well",
            health_check=fal.HealthCheck(start_period_seconds=0, timeout_seconds=1, failure_threshold=2),
        )
        def run(self) -> None: ...

    served = sent(Telling)

    assert (served.spec.auth, served.spec.grace, served.spec.multiplexing) == ("private", 2.0, 3)
    assert (served.spec.request_timeout, served.spec.skip_retry) == (7.0, ["timeout"])
    assert served.spec.health == HealthPolicy("/well", "POST", 0, 1, 2, regularly=True)
    assert served.headers == {"Authorization": "Key id:secret"}
    assert len(served.spec.secrets) == 1
    assert "secret" not in served.spec.secrets[0]


def test_a_served_function_is_an_app_of_its_name(sent: Callable[[Any], Any]) -> None:
    function = fal.function(serve=True, exposed_port=8000, max_concurrency=3, setup_function=dict)(work)

    served = sent(function)

    assert (served.target, served.setup_function, served.spec.name) == (work, dict, "work")
    assert served.spec.port is None  # `serve` comes first, as in the fal SDK
    assert spawning._scaling(served, None).max_concurrency == 3
    assert spawning._scaling(served, None).keep_alive == 300


def test_a_function_with_a_port_of_its_own_has_one_runner(sent: Callable[[Any], Any]) -> None:
    check = {"path": "/health", "method": "GET", "failure_threshold": 5}
    function = fal.function(exposed_port=8000, max_concurrency=3, health_check_config=check)(work)

    served = sent(function)

    assert served.spec.port == 8000
    assert served.spec.health == HealthPolicy("/health", "GET", 30.0, 5.0, 5, regularly=True)
    assert spawning._scaling(served, None).max_concurrency == 1
    for more in ({"min_concurrency": 2}, {"concurrency_buffer": 1}, {"concurrency_buffer_perc": 50}):
        with pytest.raises(FalServerlessError, match=r"work opens port 8000 .*more than one runner"):
            sent(function.on(**more))


def test_containers_are_refused_with_what_to_do_instead(sent: Callable[[Any], Any]) -> None:
    image = fal.ContainerImage.from_dockerfile_str("FROM python:3.11")

    class Boxed(fal.App, image=image):
        @fal.endpoint("/")
        def run(self) -> None: ...

    for boxed in (Boxed, fal.function(serve=True, image=image)(work)):
        with pytest.raises(FalServerlessError, match=r"cannot run yet.*requirements"):
            sent(boxed)
