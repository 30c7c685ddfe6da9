"""Runners of an app whose health check fails are replaced."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any

import pytest
from support import http
from support.spawning import SECONDS, spawning
from support.waiting import until

import fal_notebook as fal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import httpx

numbers = itertools.count(1)
HEADER = {"x-fal-runner-health-check": "1"}


@pytest.fixture
def spawn() -> Iterator[Callable[..., Any]]:
    """Spawn apps with a health check; those that are left are stopped."""
    with spawning() as do:
        yield lambda check, **settings: do(checked(check, **settings), "local")


def checked(policy: fal.HealthCheck | None, **settings: Any) -> Any:
    """An app whose health check fails once it was made sick."""
    settings.setdefault("name", f"checked-{os.getpid()}-{next(numbers)}")

    class Checked(fal.App, **settings):
        def setup(self) -> None:
            self.is_well = True

        @fal.endpoint("/check", health_check=policy)
        def check(self) -> str:
            if not self.is_well:
                raise RuntimeError("not well")
            return "well"

        @fal.endpoint("/sicken")
        def sicken(self, says_so: bool = False) -> Any:
            import os

            from fastapi.responses import JSONResponse

            self.is_well = False
            headers = {"x-fal-runner-health-check": "1"} if says_so else {}
            return JSONResponse(os.getpid(), headers=headers)

        @fal.endpoint("/where")
        def where(self) -> int:
            import os

            return os.getpid()

    return Checked


def post(info: Any, path: str, **options: Any) -> httpx.Response:
    return http.post(f"{info.url}{path}", timeout=SECONDS, **options)


def is_replaced(info: Any, pid: int) -> bool:
    answer = post(info, "/where")
    return answer.status_code == 200 and answer.json() != pid


@pytest.mark.parametrize(("side", "runners"), [("request", 2), ("answer", 1)])
def test_a_check_that_was_asked_for_replaces_a_sick_runner(
    spawn: Callable[..., Any], side: str, runners: int
) -> None:
    """Also one that has just begun, and by the first failure; with several, through their gateway."""
    info = spawn(fal.HealthCheck(call_regularly=False), max_concurrency=runners, startup_timeout=300)

    before = post(info, "/sicken", json={"says_so": side == "answer"}).json()
    if side == "request":
        assert post(info, "/where", headers=HEADER).json() == before

    until(lambda: is_replaced(info, before))


def test_a_new_version_in_the_same_process_brings_its_own_check(spawn: Callable[..., Any]) -> None:
    name = f"versions-{os.getpid()}"
    first = post(spawn(None, name=name), "/where").json()
    second = spawn(fal.HealthCheck(call_regularly=False), name=name)

    before = post(second, "/sicken", json={"says_so": True}).json()

    assert before == first
    until(lambda: is_replaced(second, before))
