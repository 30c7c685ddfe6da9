"""schemathesis reads what a spawned app says about itself, and finds no request that makes it fail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

if TYPE_CHECKING:
    from collections.abc import Iterator

FUZZING = settings(max_examples=30, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
SLOW = {"/drip", "/open"}  # which wait for one another
SECONDS = 30.0


def operations(app: Any) -> Iterator[Any]:
    document = schemathesis.openapi.from_url(f"{app.url}/openapi.json")
    for found in document.get_all_operations():
        operation = found.ok()
        if operation.path not in SLOW:
            yield operation


def test_no_request_makes_an_app_fail(app: Any) -> None:
    """Neither one that fits the document nor one that does not."""
    paths = set()
    with requests.Session() as session:
        session.trust_env = False
        for operation in operations(app):
            paths.add(operation.path)
            for mode in GenerationMode:
                strain(operation, mode, session)

    assert {"/", "/repeat", "/size", "/picture", "/page", "/health"} <= paths


def strain(operation: Any, mode: GenerationMode, session: requests.Session) -> None:
    """Make many requests of one kind."""

    @FUZZING
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        response = case.call(session=session, timeout=SECONDS)

        assert response.status_code < 500, response.text
        assert "x-fal-request-id" in response.headers

    try:
        ask()
    except Unsatisfiable:
        return  # an operation without parameters has no request that does not fit
