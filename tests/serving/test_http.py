"""HTTP endpoints of a served app: methods, arguments, answers, headers, the current request."""

from __future__ import annotations

import asyncio
import threading
import uuid
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import Request  # noqa: TC002 - FastAPI reads the annotation
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from support.waiting import until

import fal_notebook as fal
from fal_agent.runtime.requests import RequestContext, current_request_id
from fal_agent.serving.http import build_application
from fal_notebook.app import RequestContext as PublicRequestContext
from fal_notebook.ref import get_current_app

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.apps import Served

    Serve = Callable[..., Served]


class Input(BaseModel):
    prompt: str
    steps: int = 4


class Output(BaseModel):
    text: str


class Sample(fal.App):
    def setup(self) -> None:
        self.barrier = threading.Barrier(2, timeout=20)

    @fal.endpoint("/")
    def generate(self, body: Input) -> Output:
        return {"text": body.prompt * body.steps, "dropped": 1}  # type: ignore[return-value]

    @fal.endpoint("/async")
    async def generate_async(self, body: Input) -> Output:
        return Output(text=body.prompt)

    @fal.endpoint("/meet")
    def meet(self) -> str:
        self.barrier.wait()
        return str(current_request_id.get())

    @fal.endpoint("/raw")
    async def raw(self, request: Request) -> dict[str, Any]:
        return {"length": len(await request.body())}

    @fal.endpoint("/stream")
    def stream(self, count: int) -> StreamingResponse:
        def lines() -> Iterator[str]:
            for number in range(count):
                yield f"{self.request_id()}:{number}\n"

        return StreamingResponse(lines(), media_type="text/plain")

    @fal.endpoint("/context")
    async def context(self) -> dict[str, Any]:
        await asyncio.sleep(0)
        request = self.current_request
        assert isinstance(request, RequestContext)
        return {
            "id": request.request_id,
            "endpoint": request.endpoint,
            "lifecycle": request.lifecycle_preference,
            "header": request.headers.get("x-some-header"),
            "app": get_current_app() is self,
        }

    def request_id(self) -> str:
        request = self.current_request
        return "none" if request is None else str(request.request_id)


# ---------------------------------------------------------------- arguments and answers


def test_a_model_is_the_body_and_the_return_annotation_shapes_the_answer(serve: Serve) -> None:
    client = serve(Sample).client

    assert client.post("/", json={"prompt": "a"}).json() == {"text": "aaaa"}
    assert client.post("/async", json={"prompt": "a"}).json() == {"text": "a"}


def test_an_endpoint_may_be_cached_or_static(serve: Serve) -> None:
    class Kinds(fal.App):
        calls: list[str] = []

        @fal.endpoint("/cached")
        @fal.cached
        def cached(self, word: str) -> Output:
            self.calls.append(word)
            return Output(text=word)

        @staticmethod
        @fal.endpoint("/static")
        def static(word: str) -> str:
            return word

    client = serve(Kinds).client

    for _ in range(2):
        assert client.post("/cached", json={"word": "a"}).json() == {"text": "a"}
    assert Kinds.calls == ["a"]
    assert client.post("/static?word=b").json() == "b"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_an_endpoint_is_reached_by_post_alone(serve: Serve, method: str) -> None:
    assert serve(Sample).client.request(method, "/").status_code == 405


def test_handlers_that_are_not_async_overlap(serve: Serve) -> None:
    """They run in threads: each waits for the other one here."""
    served = serve(Sample)
    answers: list[str] = []

    def ask(name: str) -> None:
        with httpx.Client(verify=False, base_url=served.url, timeout=30) as client:
            answers.append(client.post("/meet", headers={"x-fal-request-id": name}).json())

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert sorted(answers) == ["one", "two"]


def test_a_handler_may_take_the_request_itself(serve: Serve) -> None:
    assert serve(Sample).client.post("/raw", content=b"x" * 300_000).json() == {"length": 300_000}


def test_a_streaming_response_streams_within_its_request(serve: Serve) -> None:
    client = serve(Sample).client

    with client.stream("POST", "/stream?count=3", headers={"x-fal-request-id": "me"}) as answer:
        lines = list(answer.iter_lines())

    assert lines == ["me:0", "me:1", "me:2"]
    assert answer.headers["x-fal-request-id"] == "me"


def test_health_is_always_there(serve: Serve) -> None:
    client = serve(Sample).client

    assert client.get("/health").json() == {"version": "unknown"}
    assert client.head("/health").status_code == 200
    assert "head" not in client.get("/openapi.json").json()["paths"]["/health"]


@pytest.mark.parametrize("is_async", [False, True])
def test_health_gives_what_the_app_says(serve: Serve, is_async: bool) -> None:
    class Own(Sample):
        version = "7"

        def health(self) -> Any:
            return {"version": self.version, "well": True}

    class OwnAsync(Sample):
        async def health(self) -> Any:
            return {"version": "7", "well": True}

    answer = serve(OwnAsync if is_async else Own).client.get("/health")

    assert answer.json() == {"version": "7", "well": True}


def test_an_app_without_routes_cannot_be_served() -> None:
    class Empty(fal.App):
        pass

    with pytest.raises(ValueError, match="at least one route"):
        build_application(Empty(_allow_init=True))


def test_every_origin_may_ask(serve: Serve) -> None:
    client = serve(Sample).client
    origin = {"Origin": "http://somewhere.example"}

    asked = client.options(
        "/",
        headers={
            **origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "x-own",
        },
    )
    answer = client.post("/", json={"prompt": "a"}, headers={**origin, "Cookie": "a=b"})
    failure = client.post("/nowhere", headers=origin)

    assert asked.status_code == 200
    assert asked.headers["access-control-allow-headers"] == "x-own"
    assert asked.headers["access-control-allow-credentials"] == "true"
    assert answer.headers["access-control-allow-origin"] == origin["Origin"]
    assert "x-fal-request-id" in answer.headers["access-control-expose-headers"].lower()
    assert "access-control-allow-origin" in failure.headers


def test_the_root_path_is_that_of_the_environment(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAL_APP_ROOT_PATH", "/user/app")
    client = serve(Sample).client

    assert client.get("/openapi.json").json()["servers"] == [{"url": "/user/app"}]
    assert client.post("/async", json={"prompt": "a"}).status_code == 200
    assert client.post("/user/app/async", json={"prompt": "a"}).status_code == 200


# ---------------------------------------------------------------- the current request


def test_the_current_request_holds_its_headers(serve: Serve) -> None:
    headers = {
        "X-Fal-Request-Id": "r1",
        "X-Fal-Endpoint": "someone/app",
        "X-Fal-Object-Lifecycle-Preference": '{"expires": 3}',
        "X-Some-Header": "here",
    }

    answer = serve(Sample).client.post("/context", headers=headers)

    assert answer.json() == {
        "id": "r1",
        "endpoint": "someone/app",
        "lifecycle": {"expires": 3},
        "header": "here",
        "app": True,
    }
    assert answer.headers["x-fal-request-id"] == "r1"


def test_a_request_without_an_id_gets_one(serve: Serve) -> None:
    answer = serve(Sample).client.post("/context")

    assert uuid.UUID(answer.json()["id"])
    assert answer.headers["x-fal-request-id"] == answer.json()["id"]
    assert (answer.json()["endpoint"], answer.json()["lifecycle"]) == (None, None)


@pytest.mark.parametrize("sent", ["", "x" * 129, "tab\there"])
def test_an_id_that_is_none_is_replaced(serve: Serve, sent: str) -> None:
    answer = serve(Sample).client.post("/context", headers={"x-fal-request-id": sent})

    assert uuid.UUID(answer.headers["x-fal-request-id"])


def test_a_preference_that_cannot_be_read_is_none(serve: Serve) -> None:
    headers = {"x-fal-object-lifecycle-preference": "{oops"}

    assert serve(Sample).client.post("/context", headers=headers).json()["lifecycle"] is None


def test_concurrent_requests_see_their_own(serve: Serve) -> None:
    url = serve(Sample).url
    names = [f"r{number}" for number in range(20)]

    async def ask_all() -> list[str]:
        async with httpx.AsyncClient(verify=False, base_url=url, timeout=30) as client:
            asked = [client.post("/context", headers={"x-fal-request-id": name}) for name in names]
            return [answer.json()["id"] for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask_all()) == names


def test_the_current_request_is_none_before_serving_and_empty_between_requests() -> None:
    app = Sample(_allow_init=True)
    assert app.current_request is None

    async def between() -> Any:
        async with app.lifespan():
            return app.current_request

    assert asyncio.run(between()) == PublicRequestContext()


def test_helper_code_reaches_the_app_from_setup_and_from_its_threads(serve: Serve) -> None:
    class Helped(Sample):
        def setup(self) -> None:
            self.seen: list[Any] = [get_current_app()]
            self.served = threading.Event()
            self.watcher = threading.Thread(target=self.watch)
            self.watcher.start()

        def watch(self) -> None:
            self.seen.append(get_current_app())

    app: Any = serve(Helped).app
    app.watcher.join(20)

    assert app.seen == [app, app]
    assert get_current_app() is app  # the one app of this process


# ---------------------------------------------------------------- hints


def test_hints_come_with_each_answer(serve: Serve) -> None:
    class Hinting(Sample):
        def provide_hints(self) -> list[str]:
            return ["lora-a", "lora-b", "snow\N{SNOWMAN}man", "two\nlines", "ümlaut"]

    client = serve(Hinting).client

    for answer in (client.post("/context"), client.get("/health"), client.post("/nowhere")):
        assert answer.headers["X-Fal-Runner-Hints"] == "lora-a,lora-b,ümlaut"


def test_hints_that_cannot_stand_in_a_header_are_dropped_with_a_warning(
    serve: Serve, capfd: pytest.CaptureFixture[str]
) -> None:
    class Hinting(Sample):
        def provide_hints(self) -> list[str]:
            return ["\N{SNOWMAN}"]

    answer = serve(Hinting).client.post("/context")

    assert "X-Fal-Runner-Hints" not in answer.headers
    assert "cannot stand in a header" in capfd.readouterr().err


def test_no_hints_no_header(serve: Serve) -> None:
    assert "X-Fal-Runner-Hints" not in serve(Sample).client.post("/context").headers


def test_hints_that_fail_do_not_cost_the_answer(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    class Failing(Sample):
        def provide_hints(self) -> list[str]:
            raise OSError("no disk")

    answer = serve(Failing).client.post("/context")

    assert answer.status_code == 200
    assert "X-Fal-Runner-Hints" not in answer.headers
    assert "OSError: no disk" in capfd.readouterr().err


def test_an_endless_answer_whose_client_left_stops_and_holds_up_nobody(serve: Serve) -> None:
    """Bytes for a connection that is gone are taken at once: such a handler would never give way."""
    tasks: list[asyncio.Task[Any] | None] = []

    class Endless(fal.App):
        @fal.endpoint("/")
        async def pour(self) -> StreamingResponse:
            async def parts() -> Any:
                tasks.append(asyncio.current_task())
                while True:
                    yield bytes(1 << 16)

            return StreamingResponse(parts())

    served = serve(Endless, drain_seconds=1)
    with served.client.stream("POST", "/") as answer:
        next(answer.iter_raw())

    assert served.client.get("/health").status_code == 200
    until(lambda: tasks[0] is not None and tasks[0].done())
