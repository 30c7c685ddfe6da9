"""An app written for the fal SDK, with only its import changed, does the same on a host as here."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
from support import http
from support.apps import Served
from support.hosts import AGENT_HOSTS, host_named
from support.ported_app import Ported
from support.spawning import SECONDS, spawning
from websockets.sync.client import connect

import fal_notebook as fal

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx


@contextmanager
def here() -> Iterator[str]:
    served = Served(Ported(_allow_init=True))
    yield served.url
    served.stop()


@pytest.fixture(params=["here", *AGENT_HOSTS], scope="module")
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where it is served: in this process, as `run_local` does it, or spawned on a host."""
    if request.param == "here":
        with here() as url:
            yield url
    else:
        with spawning() as spawn:
            yield spawn(Ported, host_named(request, request.param)).url


def post(url: str, **options: Any) -> httpx.Response:
    return http.post(url, timeout=SECONDS, **options)


def test_models_dependencies_and_headers(url: str) -> None:
    answer = post(url, json={"prompt": "a cat", "count": 2, "style": "fancy"}, headers={"x-user": "me"})

    assert answer.status_code == 200, answer.text
    page = answer.json()
    assert page["who"] == "me"
    assert [item["text"] for item in page["items"]] == ["<A CAT!>"] * 2
    assert page["items"][0]["id"] != page["items"][1]["id"]
    assert answer.headers["x-fal-billable-units"] == "2"
    refused = post(url, json={"prompt": "a cat"}, headers={"x-user": "evil"})
    assert (refused.status_code, refused.json()) == (401, {"detail": "not you"})
    for wrong in ({"prompt": "A CAT"}, {"prompt": "a cat", "count": 9}, {"prompt": "a cat", "more": 1}, {}):
        assert post(url, json=wrong).status_code == 422


def test_failures(url: str) -> None:
    answers = {kind: post(f"{url}/fail", json={"kind": kind}) for kind in ("http", "app", "field", "other")}

    assert {kind: answer.status_code for kind, answer in answers.items()} == {
        "http": 400,
        "app": 418,
        "field": 422,
        "other": 500,
    }
    assert answers["http"].json() == {"detail": {"reason": "bad"}}
    assert answers["app"].json() == {"detail": "no good"}
    assert answers["field"].json()["detail"][0]["loc"] == ["body", "prompt"]


def test_streams_files_and_work_after_the_answer(url: str) -> None:
    assert list(fal.apps.stream(url, {"prompt": "one two"})) == [{"word": "one"}, {"word": "two"}]
    post(f"{url}/later", params={"number": 7})
    assert post(f"{url}/later").json() == {"before": {"number": 7}, "has_ticked": True}
    given = post(f"{url}/file", json={"url": "data:text/plain;base64,aGVsbG8="}, headers={"user-agent": "me"})
    assert given.status_code == 200, given.text
    assert (given.text, given.headers["x-agent"]) == ("hello", "me")
    with connect(f"{url.replace('http', 'ws')}/realtime") as session:
        session.send(msgpack.packb({"prompt": "x", "count": 2}))
        assert [msgpack.unpackb(session.recv()) for _ in range(2)] == [
            {"id": "0", "at": 0.0, "text": "x"},
            {"id": "1", "at": 0.0, "text": "x"},
        ]


def test_its_document(url: str) -> None:
    document = http.get(f"{url}/openapi.json", timeout=SECONDS).json()

    assert document["info"]["title"] == "ported"
    schema = document["components"]["schemas"]["Input"]
    assert schema["x-fal-order-properties"] == ["prompt", "style", "count", "format", "seed", "trace"]
    assert schema["properties"]["trace"]["ui"] == {"hidden": True}
    assert schema["properties"]["prompt"]["examples"] == ["a cat"]
    answer = document["paths"]["/"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer == {"$ref": "#/components/schemas/Page_Item_"}
    assert document["paths"]["/realtime"]["x-fal-protocol"]["realtimeMode"] == "server_streaming"
