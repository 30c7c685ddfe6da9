"""Apps spawned on a host and reached at a local URL."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from support import http
from support.spawning import SECONDS, spawning
from support.waiting import until

import fal_notebook as fal
from fal_notebook import exceptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import httpx

numbers = itertools.count(1)


@fal.cached
def model() -> float:
    """Stands for what takes long to load; no two are the same."""
    return time.time()


@pytest.fixture
def spawn(agent_host: Any) -> Iterator[Callable[..., Any]]:
    """Spawn apps; those that are left are stopped."""
    with spawning() as do:
        yield lambda cls, *, wait=True: do(cls, agent_host, wait=wait)


def make(**settings: Any) -> Any:
    """A small app class of a name that no other test has."""
    settings.setdefault("name", f"app-{os.getpid()}-{next(numbers)}")

    class Small(fal.App, **settings):
        def setup(self) -> None:
            print("setting up", flush=True)
            self.model = model()

        def teardown(self) -> None:
            print("tearing down", flush=True)

        @fal.endpoint("/")
        def greet(self, name: str, times: int = 1) -> dict[str, str]:
            print(f"greeting {name}", flush=True)
            return {"text": " ".join(["hello", *[name] * times])}

        @fal.endpoint("/where")
        def where(self) -> dict[str, Any]:
            import os

            return {"pid": os.getpid(), "model": self.model}

        @fal.endpoint("/sleep")
        def sleep(self, seconds: float) -> str:
            import time

            time.sleep(seconds)
            return "awake"

        @fal.endpoint("/fail")
        def fail(self, kind: str) -> str:
            if kind == "memory":
                raise RuntimeError("CUDA out of memory, says the driver")
            raise KeyError(kind)

        @fal.realtime("/realtime")
        def double(self, message: dict[str, Any]) -> dict[str, Any]:
            return {"value": message["value"] * 2}

    return Small


def post(info: Any, path: str = "/", **options: Any) -> httpx.Response:
    """One request."""
    headers = {**info.headers, **options.pop("headers", {})}
    return http.post(f"{info.url}{path}", headers=headers, timeout=SECONDS, **options)


def where(info: Any) -> dict[str, Any]:
    answer: dict[str, Any] = post(info, "/where").json()
    return answer


def logs(info: Any) -> list[Any]:
    """The entries that are there."""
    entries = []
    while not info.logs.empty():
        entries.append(info.logs.get())
    return entries


def test_an_app_answers_at_a_local_url(spawn: Callable[..., Any]) -> None:
    info = spawn(make())

    assert info.url.startswith("http://127.0.0.1:")
    assert post(info, json={"name": "world", "times": 2}).json() == {"text": "hello world world"}
    assert post(info, params={"name": "query"}).json() == {"text": "hello query"}
    assert http.get(f"{info.url}/health").json() == {"version": "unknown"}
    assert post(info, json={"times": "x"}).status_code == 422
    assert where(info)["pid"] != os.getpid()
    assert info.state == "ready"


def test_spawning_returns_before_the_app_is_there(spawn: Callable[..., Any]) -> None:
    """And a request waits for it."""
    info = spawn(make(), wait=False)

    assert not info.future.done()
    assert post(info, json={"name": "early"}).json() == {"text": "hello early"}


def test_what_it_prints_is_in_its_logs_with_the_request_that_was_answered(spawn: Callable[..., Any]) -> None:
    info = spawn(make())
    post(info, json={"name": "you"}, headers={"x-fal-request-id": "the-request"})

    found: list[Any] = []
    until(lambda: found.extend(logs(info)) or any("greeting" in entry.message for entry in found))
    by_text = {entry.message.strip(): entry for entry in found}
    assert by_text["setting up"].request_id == ""
    assert by_text["greeting you"].request_id == "the-request"
    assert by_text["greeting you"].source == "USER"


def test_stopping_tears_down_and_leaves_nothing(agent_host: Any, spawn: Callable[..., Any]) -> None:
    info = spawn(make())
    info.stop()

    assert info.future.result(timeout=5) is None
    assert info.state == "stopped"
    assert "tearing down" in [entry.message.strip() for entry in logs(info)]
    assert info.name not in [app["name"] for app in agent_host.ask("apps")]
    answer = http.post(info.url, timeout=SECONDS)
    assert answer.status_code == 503
    assert "spawn it again" in answer.json()["detail"] or "no app" in answer.json()["detail"]


def test_a_context_manager_stops_it(agent_host: Any) -> None:
    with make().spawn(host=agent_host) as info:
        info.wait(startup_timeout=SECONDS)

    assert info.state == "stopped"


def test_a_failing_setup_is_reported_at_once_with_its_own_error(spawn: Callable[..., Any]) -> None:
    class Broken(fal.App, name=f"broken-{os.getpid()}"):
        def setup(self) -> None:
            raise LookupError("no such weights")

        @fal.endpoint("/")
        def run(self) -> str:
            return ""

    info = spawn(Broken, wait=False)

    with pytest.raises(LookupError, match="no such weights"):
        info.wait(startup_timeout=600)
    with pytest.raises(LookupError):
        info.future.result(timeout=5)
    assert info.state == "failed"


def test_a_setup_that_takes_too_long_is_ended(spawn: Callable[..., Any]) -> None:
    class Slow(fal.App, name=f"slow-{os.getpid()}", startup_timeout=1):
        def setup(self) -> None:
            import time

            time.sleep(600)

        @fal.endpoint("/")
        def run(self) -> str:
            return ""

    with pytest.raises(exceptions.CallTimeoutError, match="startup_timeout"):
        spawn(Slow, wait=False).wait(startup_timeout=600)


def test_spawning_again_swaps_without_dropping_a_request_and_keeps_what_is_cached(
    spawn: Callable[..., Any],
) -> None:
    first = spawn(make(name=f"swapped-{os.getpid()}"))
    before = where(first)
    statuses: list[int] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            statuses.append(post(first, json={"name": "x"}).status_code)

    callers = [threading.Thread(target=load) for _ in range(4)]
    for caller in callers:
        caller.start()
    second = spawn(make(name=f"swapped-{os.getpid()}"))
    after = where(second)
    stop.set()
    for caller in callers:
        caller.join()

    assert second.url == first.url
    assert set(statuses) == {200}
    assert after == before
    assert first.future.result(timeout=10) is None
    assert not second.future.done()


def test_spawning_again_with_other_needs_moves_to_another_process(spawn: Callable[..., Any]) -> None:
    name = f"moved-{os.getpid()}"
    first = spawn(make(name=name))
    before = where(first)

    second = spawn(make(name=name, requirements=["packaging"]))

    until(lambda: where(second)["pid"] != before["pid"])
    until(first.future.done)


def test_a_new_version_that_fails_leaves_the_old_one(spawn: Callable[..., Any]) -> None:
    name = f"kept-{os.getpid()}"
    first = spawn(make(name=name))

    class Broken(fal.App, name=name):
        def setup(self) -> None:
            raise LookupError("no such weights")

        @fal.endpoint("/")
        def run(self) -> str:
            return ""

    second = spawn(Broken, wait=False)
    with pytest.raises(LookupError):
        second.future.result(timeout=SECONDS)

    assert post(first, json={"name": "still"}).json() == {"text": "hello still"}
    assert not first.future.done()


def test_an_idle_app_lets_its_runner_go_and_starts_one_for_the_next_request(
    agent_host: Any, spawn: Callable[..., Any]
) -> None:
    info = spawn(make(keep_alive=0.2))
    before = where(info)["pid"]

    until(lambda: [app["state"] for app in agent_host.ask("apps") if app["name"] == info.name] == ["idle"])
    assert where(info)["pid"] != before


def test_a_runner_that_dies_is_replaced(spawn: Callable[..., Any], agent_host: Any) -> None:
    info = spawn(make())
    before = where(info)["pid"]
    fal.function(host=agent_host)(os.kill)(before, signal.SIGKILL)

    assert until(lambda: post(info, "/where").status_code == 200)
    assert where(info)["pid"] != before


def test_an_answer_of_503_replaces_the_runner(spawn: Callable[..., Any]) -> None:
    info = spawn(make(skip_retry_conditions=["server_error"]))
    before = where(info)["pid"]

    assert post(info, "/fail", json={"kind": "memory"}).status_code == 503
    until(lambda: (answer := post(info, "/where")).status_code == 200 and answer.json()["pid"] != before)


def test_another_error_does_not(spawn: Callable[..., Any]) -> None:
    info = spawn(make())
    before = where(info)["pid"]

    assert post(info, "/fail", json={"kind": "x"}).status_code == 500
    assert where(info)["pid"] == before


def test_a_request_that_takes_too_long_gets_504(spawn: Callable[..., Any]) -> None:
    info = spawn(make(request_timeout=0.5))

    assert post(info, "/sleep", json={"seconds": 30}).status_code == 504
    assert post(info, json={"name": "next"}).status_code == 200


def test_a_web_page_from_elsewhere_cannot_reach_it(spawn: Callable[..., Any]) -> None:
    info = spawn(make())

    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"Origin": "null"}):
        answer = post(info, json={"name": "x"}, headers=headers)
        assert answer.status_code == 403, headers
    assert post(info, json={"name": "x"}, headers={"Origin": "http://localhost:8888"}).status_code == 200


def test_a_private_app_wants_the_key(spawn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAL_KEY", "me:secret")
    info = spawn(make(app_auth="private"))

    assert post(info, json={"name": "x"}).status_code == 200
    assert http.post(info.url, json={"name": "x"}).status_code == 401
    wrong = {"Authorization": "Key me:wrong"}
    assert http.post(info.url, json={"name": "x"}, headers=wrong).status_code == 401


def test_a_new_version_in_the_same_process_brings_its_own_rules(
    spawn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAL_KEY", "me:secret")
    name = f"closed-{os.getpid()}"
    first = spawn(make(name=name))
    before = where(first)
    second = spawn(make(name=name, app_auth="private", request_timeout=0.5))

    assert http.post(second.url, json={"name": "x"}).status_code == 401
    assert where(second)["pid"] == before["pid"]
    assert post(second, "/sleep", json={"seconds": 30}).status_code == 504


def test_a_shared_app_wants_the_token_of_its_link(spawn: Callable[..., Any]) -> None:
    info = spawn(make(app_auth="shared"))

    assert http.post(info.url, json={"name": "x"}).status_code == 401
    assert http.get(info.link).status_code == 200
    assert post(info, json={"name": "x"}).status_code == 200


def test_realtime_sessions_go_through_the_url(spawn: Callable[..., Any]) -> None:
    from fal_notebook.realtime_client import connect_realtime

    info = spawn(make())

    with connect_realtime(info.url.replace("http", "ws") + "/realtime") as connection:
        assert connection.run({"value": 21}) == {"value": 42}
        assert connection.run({"value": 4}) == {"value": 8}


def test_an_image_that_an_app_made_is_served_with_it(spawn: Callable[..., Any]) -> None:
    class TextToImage(fal.App, machine_type="XS", name=f"image-{os.getpid()}", requirements=["pillow"]):
        def setup(self) -> None:
            from PIL import ImageFont

            self.font = ImageFont.load_default(20)

        @fal.endpoint("/")
        def generate(self, prompt: str) -> dict[str, str]:
            from PIL import Image, ImageDraw

            picture = Image.new("RGB", (200, 50), "white")
            ImageDraw.Draw(picture).text((5, 5), prompt, font=self.font, fill="black")
            return {"url": fal.toolkit.upload_image(picture)}

    info = spawn(TextToImage)
    answer = post(info, json={"prompt": "hello"})

    picture = http.get(answer.json()["url"])
    assert picture.status_code == 200
    assert picture.headers["content-type"] == "image/png"
    assert picture.content[:4] == b"\x89PNG"


def test_apps_are_listed_and_stopped_by_name(agent_host: Any, spawn: Callable[..., Any]) -> None:
    info = spawn(make())

    (listed,) = [app for app in agent_host.ask("apps") if app["name"] == info.name]
    assert listed["state"] == "ready"
    agent_host.ask("app_stop", name=info.name)
    until(info.future.done)
    with pytest.raises(exceptions.FalServerlessError, match="there is no app"):
        agent_host.ask("app_stop", name=info.name)


def test_what_comes_along_with_an_app(spawn: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("from the notebook")

    class Reads(
        fal.App,
        name=f"reads-{os.getpid()}",
        app_files=["note.txt"],
        app_files_context_dir=str(tmp_path),
    ):
        @fal.endpoint("/")
        def read(self) -> str:
            from pathlib import Path

            return Path("note.txt").read_text()

    assert post(spawn(Reads)).json() == "from the notebook"


def test_the_inline_host_serves_no_apps() -> None:
    with pytest.raises(exceptions.FalServerlessError, match="run_local"):
        make().spawn(host="inline")


def test_models_are_found_by_annotations_that_are_texts(spawn: Callable[..., Any]) -> None:
    """As after `from __future__ import annotations`: the code itself does not name what they mean."""
    code = """
from __future__ import annotations

import fal_notebook as fal
from fastapi import Request, Response
from pydantic import BaseModel


class Input(BaseModel):
    prompt: str


class Output(BaseModel):
    text: str


class Texts(fal.App, name=NAME):
    @fal.endpoint("/")
    def generate(self, input: Input, request: Request, response: Response) -> Output:
        response.headers["x-method"] = request.method
        return Output(text=input.prompt)
"""
    cells: dict[str, Any] = {"__name__": "__main__", "NAME": f"texts-{os.getpid()}"}
    exec(compile(code, "cell", "exec"), cells)
    info = spawn(cells["Texts"])

    answer = post(info, json={"prompt": "hi"})
    assert (answer.json(), answer.headers["x-method"]) == ({"text": "hi"}, "POST")
    assert cells["Texts"].generate.__annotations__["input"] == "Input"  # a model that is edited counts
    document = http.get(f"{info.url}/openapi.json").json()
    assert "Input" in document["components"]["schemas"]
