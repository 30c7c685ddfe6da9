"""Requests through a gateway to real servers on Unix sockets."""

from __future__ import annotations

import asyncio
import gzip
import itertools
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from support.gateways import PATIENCE, Stage, answer, on_stage

import fal_notebook as fal
from fal_agent.serving.balancing import RunnerAddress
from fal_agent.serving.gateway import Gateway
from fal_agent.serving.http import build_application
from fal_agent.serving.server import bind_socket

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

MEGABYTE = 1 << 20


async def from_socket(path: str, sent: bytes) -> bytes:
    """Send bytes to a gateway and give what it answers until it closes."""
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(sent)
    received = await asyncio.wait_for(reader.read(), PATIENCE)
    writer.close()
    return received


# ---------------------------------------------------------------- what passes


def test_a_request_arrives_as_it_was_sent(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        [runner] = await stage.start("a")
        sent = asyncio.create_task(
            from_socket(
                stage.path,
                b"PUT /a%2Fb//../c;d?x=%20&y=+&x HTTP/1.1\r\nHost: my.host:81\r\nX-Two: 1\r\nx-two: 2\r\n"
                b"Connection: close, X-Mine\r\nX-Mine: no\r\nKeep-Alive: 3\r\nTE: trailers\r\n"
                b"Cookie: a=b\r\nX-Fal-Request-Id: my-id\r\nContent-Length: 5\r\n\r\nhello",
            )
        )
        request = await runner.next()

        assert request.scope["method"] == "PUT"
        assert (request.path, request.scope["query_string"]) == ("/a%2Fb//../c;d", b"x=%20&y=+&x")
        assert sorted(request.headers) == [
            ("content-length", "5"),
            ("cookie", "a=b"),
            ("host", "my.host:81"),
            ("x-fal-request-id", "my-id"),
            ("x-two", "1"),
            ("x-two", "2"),
        ]
        assert await request.body() == b"hello"
        await request.answer()
        assert b"x-fal-request-id: my-id\r\n" in (await sent).lower()

    on_stage(tmp_path, play)


def test_an_answer_arrives_as_it_was_sent(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        [runner] = await stage.start("a")
        asking = stage.ask("/")
        request = await runner.next()
        packed = gzip.compress(b"hello")
        headers = [
            (b"content-encoding", b"gzip"),
            (b"set-cookie", b"a=1"),
            (b"set-cookie", b"b=2"),
            (b"connection", b"x-mine"),
            (b"x-mine", b"no"),
            (b"x-fal-request-id", b"of-the-app"),
        ]
        await request.send({"type": "http.response.start", "status": 418, "headers": headers})
        await request.send({"type": "http.response.body", "body": packed})
        request.over.set()
        response = await asking

        assert response.status_code == 418
        assert response.content == b"hello"
        assert response.headers.get_list("set-cookie") == ["a=1", "b=2"]
        assert response.headers.get_list("x-fal-request-id") == ["of-the-app"]
        assert len(response.headers.get_list("date")) == 1
        assert "x-mine" not in response.headers

    on_stage(tmp_path, play)


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "PATCH"])
def test_a_request_without_a_body_has_none_at_the_runner(tmp_path: Path, method: str) -> None:
    async def play(stage: Stage) -> None:
        [runner] = await stage.start("a")
        asking = asyncio.create_task(stage.client.request(method, "/x"))
        request = await runner.next()

        assert request.values("transfer-encoding") == []
        assert await request.body() == b""
        await request.answer(b"four", content_length="4")
        response = await asking
        assert response.headers["content-length"] == "4"
        assert response.content == (b"" if method == "HEAD" else b"four")

    on_stage(tmp_path, play)


@pytest.mark.parametrize("given", [None, "", "x" * 200])
def test_a_request_without_an_id_gets_one(tmp_path: Path, given: str | None) -> None:
    async def play(stage: Stage) -> None:
        [runner] = await stage.start("a")
        asking = stage.ask(headers={} if given is None else {"x-fal-request-id": given})
        request = await runner.next()
        [minted] = request.values("x-fal-request-id")
        await request.answer()

        assert minted not in ("", given)
        assert (await asking).headers.get_list("x-fal-request-id") == [minted]

    on_stage(tmp_path, play)


def test_what_a_runner_sets_for_one_client_is_not_sent_for_another(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        [runner] = await stage.start("a")
        for _ in range(2):
            async with stage.new_client() as client:
                asking = asyncio.create_task(client.post("/"))
                request = await runner.next()
                assert request.values("cookie") == []
                await request.answer(set_cookie="session=secret")
                await asking

    on_stage(tmp_path, play)


class Sample(fal.App):
    @fal.endpoint("/")
    def work(self, number: int) -> dict[str, Any]:
        return {"number": number, "id": self.current_request.request_id}  # type: ignore[union-attr] # in one

    def provide_hints(self) -> list[str]:
        return ["lora", "other"]


def test_an_app_is_served_through_it(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        app = Sample(_allow_init=True)
        application = build_application(app)
        async with application.router.lifespan_context(application):
            await stage.start("a", "b", application=application)
            response = await stage.client.post("/", json={"number": 3}, headers={"origin": "http://x"})
            preflight = {"origin": "http://x", "access-control-request-method": "POST"}
            stage.gateway.set_runners([])
            allowed = await stage.client.options("/", headers=preflight)
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(application), base_url="http://app"
            ) as direct:
                its_own = await direct.options("/", headers=preflight)

        assert response.json() == {"number": 3, "id": response.headers["x-fal-request-id"]}
        assert response.headers.get_list("x-fal-runner-hints") == ["lora,other"]
        assert len(response.headers.get_list("access-control-allow-origin")) == 1
        assert allowed.status_code == its_own.status_code == 200
        for name in its_own.headers:
            if name.startswith("access-control-"):
                assert allowed.headers[name] == its_own.headers[name]

    on_stage(tmp_path, play)


# ---------------------------------------------------------------- who gets what


def test_no_runner_has_more_requests_than_it_may(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        async def application(scope: Any, receive: Any, send: Any) -> None:
            for _ in range(10):
                await asyncio.sleep(0)
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})

        runners = await stage.start("a", "b", application=application)
        responses = await asyncio.gather(*(stage.ask() for _ in range(60)))

        assert {response.status_code for response in responses} == {204}
        assert [runner.most for runner in runners] == [3, 3]

    on_stage(tmp_path, play, multiplexing=3)


def test_requests_wait_in_line_until_a_runner_is_ready_and_go_in_order(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        asking = []
        for number in range(5):
            asking.append(stage.ask(f"/{number}"))
            await stage.until_waiting(number + 1)
        [runner] = await stage.start("a")
        for number in range(5):
            request = await runner.next()
            assert request.path == f"/{number}"
            assert runner.in_flight == 1
            await request.answer()
        assert [response.status_code for response in await asyncio.gather(*asking)] == [200] * 5

    on_stage(tmp_path, play)


def test_one_more_than_may_wait_is_told_so(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        waiting = stage.ask()
        await stage.until_waiting(1)
        status, detail = answer(await stage.ask(headers={"origin": "http://x"}))

        assert (status, "1 requests are waiting" in detail) == (503, True)
        assert stage.sick == []
        waiting.cancel()
        await asyncio.wait({waiting})

    on_stage(tmp_path, play, max_waiting=1)


def test_one_that_waits_too_long_is_told_so_and_pages_may_read_it(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        response = await stage.ask(headers={"origin": "http://x"})

        assert answer(response) == (504, "no runner was free within 0.01 s; try again later")
        assert response.headers["access-control-allow-origin"] in ("*", "http://x")
        await stage.until_idle()

    on_stage(tmp_path, play, queue_timeout=0.01)


def test_a_runner_is_preferred_whose_last_hints_have_the_requests(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        first, second = await stage.start("a", "b")
        for runner, hints in ((first, "x"), (second, "lora, y")):
            asking = stage.ask()
            await (await runner.next()).answer(x_fal_runner_hints=hints)
            await asking
        for _ in range(3):
            asking = stage.ask(headers={"x-fal-runner-hint": "lora"})
            await (await second.next()).answer()
            await asking
        both = [stage.ask(headers={"x-fal-runner-hint": "lora"}) for _ in range(2)]
        await (await first.next()).answer()
        await (await second.next()).answer()
        await asyncio.gather(*both)

    on_stage(tmp_path, play)


def test_a_runner_that_is_no_longer_listed_finishes_what_it_has_and_gets_nothing_new(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        [old] = await stage.start("old")
        last = stage.ask("/last")
        request = await old.next()
        [new] = await stage.start("new")
        following = [stage.ask("/next") for _ in range(2)]
        for _ in following:
            await (await new.next()).answer()
        await asyncio.gather(*following)
        await stage.until(lambda: stage.loads[-1].per_runner == {"old": 1, "new": 0})
        await request.answer(b"done")

        assert (await last).content == b"done"
        await stage.until(lambda: stage.loads[-1].per_runner == {"new": 0})
        assert old.arrived.empty()

    on_stage(tmp_path, play)


def test_the_load_is_told_when_it_has_changed_but_not_all_the_time(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        stage.gateway.set_runners([])
        await stage.until(lambda: stage.loads)
        asking = [stage.ask() for _ in range(3)]
        await stage.until_waiting(3)
        assert (stage.loads[-1].in_flight, stage.loads[-1].per_runner) == (0, {})
        assert stage.loads[-1].oldest_wait_seconds > 0
        [runner] = await stage.start("a")
        for _ in asking:
            await (await runner.next()).answer()
        await stage.until_idle()
        for _ in range(100):
            asking.append(stage.ask())
            await (await runner.next()).answer()
        await asyncio.gather(*asking)
        await stage.until_idle()

        assert stage.loads[-1].per_runner == {"a": 0}
        gaps = [after - before for before, after in itertools.pairwise(stage.times)]
        assert min(gaps) > 0.045  # what 50 ms are to a clock

    on_stage(tmp_path, play)


# ---------------------------------------------------------------- clients that leave


def test_a_client_that_leaves_while_it_waits_is_taken_out_of_the_line(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        leaving = stage.ask("/leaving", content=b"x" * 1000)
        await stage.until_waiting(1)
        staying = stage.ask("/staying")
        await stage.until_waiting(2)
        leaving.cancel()
        await stage.until_waiting(1)
        [runner] = await stage.start("a")
        request = await runner.next()

        assert request.path == "/staying"
        await request.answer()
        await staying

    on_stage(tmp_path, play)


@pytest.mark.parametrize("has_begun", [False, True])
def test_the_runner_is_told_when_the_client_leaves(tmp_path: Path, has_begun: bool) -> None:
    async def play(stage: Stage) -> None:
        [runner] = await stage.start("a")
        leaving = stage.ask("/leaving")
        request = await runner.next()
        await request.body()
        if has_begun:
            await request.begin()
            await request.part(b"some")
        leaving.cancel()

        assert (await asyncio.wait_for(request.receive(), PATIENCE))["type"] == "http.disconnect"
        request.over.set()
        await stage.until_idle()
        assert stage.sick == []

    on_stage(tmp_path, play)


# ---------------------------------------------------------------- runners that fail


def test_a_request_that_was_answered_503_is_tried_at_another_runner(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        first, second = await stage.start("a", "b")
        asking = stage.ask("/x?y", content=b"b" * MEGABYTE, headers={"x-fal-request-id": "me"})
        await (await first.next()).answer(b"GPU error", 503)
        request = await second.next()

        assert (request.path, request.values("x-fal-request-id")) == ("/x", ["me"])
        assert await request.body() == b"b" * MEGABYTE
        await request.answer(b"done")
        assert (await asking).content == b"done"
        assert stage.sick == [("a", "it answered 503")]

    on_stage(tmp_path, play)


def test_a_503_is_passed_on_after_two_more_tries(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        runners = await stage.start("a", "b", "c", "d")
        asking = stage.ask()
        for runner in runners[:3]:
            await (await runner.next()).answer(b"from " + runner.address.name.encode(), 503)
        response = await asking

        assert (response.status_code, response.content) == (503, b"from c")
        assert [name for name, _ in stage.sick] == ["a", "b", "c"]
        assert runners[3].arrived.empty()

    on_stage(tmp_path, play)


@pytest.mark.parametrize(
    ("options", "size"), [({"skip_retry_conditions": ["server_error"]}, 0), ({}, 2 * MEGABYTE)]
)
def test_a_503_is_passed_on_at_once_if_told_so_or_if_the_body_was_large(
    tmp_path: Path, options: dict[str, Any], size: int
) -> None:
    async def play(stage: Stage) -> None:
        first, second = await stage.start("a", "b")
        asking = stage.ask(content=b"x" * size)
        request = await first.next()
        await request.body()
        await request.answer(b"why", 503)
        response = await asking

        assert (response.status_code, response.content) == (503, b"why")
        assert second.arrived.empty()

    on_stage(tmp_path, play, **options)


def test_a_runner_that_cannot_be_reached_is_left_out_and_reported_once(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        [runner] = await stage.start("b")
        gone = RunnerAddress("gone", str(tmp_path / "gone.sock"))
        stage.gateway.set_runners([gone, runner.address])
        asking = [stage.ask() for _ in range(3)]
        for _ in asking:
            await (await runner.next()).answer()

        assert [response.status_code for response in await asyncio.gather(*asking)] == [200] * 3
        [(name, reason)] = stage.sick
        assert (name, "connection broke" in reason) == ("gone", True)

    on_stage(tmp_path, play, multiplexing=2)


def test_a_broken_connection_is_a_502_if_it_is_not_to_be_tried_again(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        stage.gateway.set_runners([RunnerAddress("gone", str(tmp_path / "gone.sock"))])

        assert answer(await stage.ask()) == (502, "the connection to the app's runner broke")

    on_stage(tmp_path, play, skip_retry_conditions=["connection_error"])


def test_a_request_that_takes_too_long_is_a_504_and_is_not_tried_again(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        first, second = await stage.start("a", "b")
        asking = stage.ask()
        request = await first.next()
        await request.body()

        assert answer(await asking) == (504, "the app did not answer within 1 s")
        assert (await asyncio.wait_for(request.receive(), PATIENCE))["type"] == "http.disconnect"
        request.over.set()
        assert second.arrived.empty()
        await stage.until_idle()

    on_stage(tmp_path, play, request_timeout=1.0)


def test_time_in_line_is_not_time_of_the_request(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        waiting = stage.ask()
        await stage.until_waiting(1)
        await asyncio.sleep(1.1)  # longer than one may take
        [runner] = await stage.start("a")
        request = await runner.next()
        await request.answer()

        assert (await waiting).status_code == 200

    on_stage(tmp_path, play, request_timeout=1.0)


@pytest.mark.parametrize("options", [{}, {"request_timeout": 1.0}])
def test_an_answer_that_ends_too_early_does_not_look_complete(
    tmp_path: Path, options: dict[str, float]
) -> None:
    """A handler failed, or took too long; its runner is alive, and is kept."""

    async def play(stage: Stage) -> None:
        [runner] = await stage.start("a")
        asking = stage.ask()
        request = await runner.next()
        await request.begin()
        await request.part(b"some")
        if not options:
            request.break_off()
        with pytest.raises(httpx.RemoteProtocolError):
            await asking
        request.over.set()
        await stage.until_idle()
        assert stage.sick == []

    on_stage(tmp_path, play, **options)


def test_a_small_answer_that_ends_too_early_is_asked_for_again(tmp_path: Path) -> None:
    """A runner may be killed after the head of an answer, before its body."""

    async def play(stage: Stage) -> None:
        [runner] = await stage.start("a")
        asking = stage.ask()
        request = await runner.next()
        await request.begin(content_length="5")
        await request.part(b"half")
        request.break_off()
        await (await runner.next()).answer()

        assert (await asking).status_code == 200
        await stage.until_idle()
        assert stage.sick == []  # it is alive, so it may have been the handler

    on_stage(tmp_path, play)


def test_a_runner_that_dies_in_the_middle_of_an_answer_is_reported(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        [process] = stage.start_processes("a")
        async with stage.client.stream("POST", "/hold") as response:
            parts = response.aiter_raw()
            assert await parts.__anext__() == b"part"
            process.kill()
            with pytest.raises(httpx.RemoteProtocolError):
                await parts.__anext__()
        await stage.until(lambda: stage.sick)
        assert [name for name, _ in stage.sick] == ["a"]

    on_stage(tmp_path, play)


def test_no_request_is_lost_when_a_runner_is_killed_under_load(tmp_path: Path) -> None:
    """Small ones are answered by the other runner; large ones, which are not kept, have a clear status."""

    async def play(stage: Stage) -> None:
        doomed, _other = stage.start_processes("doomed", "other")
        small = [stage.ask(content=b"x" * 1000) for _ in range(160)]
        large = [stage.ask(content=b"x" * (MEGABYTE + 200_000)) for _ in range(40)]
        assert await asyncio.to_thread(doomed.line) == "in\n"
        doomed.kill()
        smalls, larges = await asyncio.gather(*small), await asyncio.gather(*large)

        assert {(response.status_code, response.content) for response in smalls} == {(200, b"1000")}
        assert {response.status_code for response in larges} <= {200, 502}
        for response in larges:
            if response.status_code == 502:
                assert "broke" in answer(response)[1]
        await stage.until(lambda: [name for name, _ in stage.sick] == ["doomed"])
        await stage.until_idle()

    on_stage(tmp_path, play, multiplexing=4)


# ---------------------------------------------------------------- large and slow


def test_an_answer_is_passed_on_part_by_part(tmp_path: Path) -> None:
    """The runner makes the next part only when the client has the one before."""

    async def play(stage: Stage) -> None:
        [runner] = await stage.start("a")

        async def read() -> None:
            async with stage.client.stream("POST", "/") as response:
                assert response.headers["content-type"] == "text/event-stream"
                parts = response.aiter_raw()
                for number in range(5):
                    await request.part(b"data: %d\n\n" % number)
                    assert await parts.__anext__() == b"data: %d\n\n" % number
                await request.send({"type": "http.response.body", "body": b""})
                request.over.set()
                assert [part async for part in parts] == []

        reading = asyncio.create_task(read())
        request = await runner.next()
        await request.begin(content_type="text/event-stream")
        await asyncio.wait_for(reading, PATIENCE)

    on_stage(tmp_path, play)


@pytest.mark.parametrize("length_is_known", [False, True])
def test_a_large_upload_goes_as_fast_as_its_slow_reader(tmp_path: Path, length_is_known: bool) -> None:
    size, made, most_ahead = 100 * MEGABYTE, 0, 0

    async def upload() -> AsyncIterator[bytes]:
        nonlocal made
        for _ in range(size // MEGABYTE):
            made += MEGABYTE
            yield b"x" * MEGABYTE

    async def play(stage: Stage) -> None:
        nonlocal most_ahead
        [runner] = await stage.start("a")
        headers = {"content-length": str(size)} if length_is_known else {}
        asking = stage.ask(content=upload(), headers=headers)
        request = await runner.next()
        read, more = 0, True
        while more:
            message = await request.receive()
            read, more = read + len(message["body"]), message["more_body"]
            most_ahead = max(most_ahead, made - read)
            for _ in range(20):  # turns of the loop that everyone else may use
                await asyncio.sleep(0)
        await request.answer()

        assert (await asking).status_code == 200
        assert read == size
        assert most_ahead < 16 * MEGABYTE

    on_stage(tmp_path, play)


def test_a_large_download_goes_as_fast_as_its_slow_reader(tmp_path: Path) -> None:
    size, made, most_ahead = 100 * MEGABYTE, 0, 0

    async def play(stage: Stage) -> None:
        nonlocal most_ahead
        [runner] = await stage.start("a")

        async def serve() -> None:
            nonlocal made
            request = await runner.next()
            await request.begin()
            while made < size:
                made += MEGABYTE
                await request.part(b"x" * MEGABYTE)
            await request.send({"type": "http.response.body", "body": b""})
            request.over.set()

        serving = asyncio.create_task(serve())
        async with stage.client.stream("POST", "/") as response:
            read = 0
            async for part in response.aiter_raw():
                read += len(part)
                most_ahead = max(most_ahead, made - read)
                for _ in range(20):
                    await asyncio.sleep(0)
        await serving

        assert read == size
        assert most_ahead < 16 * MEGABYTE

    on_stage(tmp_path, play)


def test_a_large_request_that_waits_is_not_read_to_its_end(tmp_path: Path) -> None:
    made = 0

    async def upload() -> AsyncIterator[bytes]:
        nonlocal made
        for _ in range(50):
            made += 1
            yield b"x" * MEGABYTE

    async def play(stage: Stage) -> None:
        large = stage.ask(content=upload())
        await stage.until_waiting(1)
        for number in range(10):
            small = stage.ask("/small", content=b"y" * MEGABYTE)
            await stage.until_waiting(2)
            small.cancel()
            await stage.until_waiting(1)
            assert made < 16, number
        [runner] = await stage.start("a")
        request = await runner.next()
        assert await request.body() == b"x" * 50 * MEGABYTE
        await request.answer()
        await large

    on_stage(tmp_path, play)


def test_an_early_answer_passes_though_the_body_was_not_read(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        [runner] = await stage.start("a")
        asking = stage.ask(content=b"x" * 10 * MEGABYTE)
        await (await runner.next()).answer(b"too large", 413)
        response = await asking

        assert (response.status_code, response.content) == (413, b"too large")
        assert (await asyncio.gather(stage.ask("/next"), serve_one(runner)))[0].content == b"next"

    async def serve_one(runner: Any) -> None:
        await (await runner.next()).answer(b"next")

    on_stage(tmp_path, play)


# ---------------------------------------------------------------- its own life


def test_what_is_in_flight_is_answered_when_it_stops(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        [runner] = await stage.start("a")
        asking = [stage.ask(), stage.ask()]
        request = await runner.next()
        await stage.until_waiting(1)
        stage.stop.set()
        await request.answer(b"one")
        await (await runner.next()).answer(b"two")

        assert {(await one).content for one in asking} == {b"one", b"two"}
        await asyncio.wait_for(stage.serving, PATIENCE)
        assert not (tmp_path / "gateway.sock").exists()

    on_stage(tmp_path, play)


def test_what_takes_too_long_when_it_stops_is_told_so(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        [runner] = await stage.start("a")
        asking = [stage.ask(), stage.ask()]
        request = await runner.next()
        await stage.until_waiting(1)
        stage.stop.set()

        for one in asking:
            assert answer(await one) == (503, "the app is being stopped")
        await asyncio.wait_for(stage.serving, PATIENCE)
        request.over.set()

    on_stage(tmp_path, play, drain_seconds=0)


def test_another_gateway_may_have_taken_the_place_when_one_stops(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        await stage.start("a")
        successor = bind_socket(stage.path)
        stage.stop.set()
        await asyncio.wait_for(stage.serving, PATIENCE)

        assert (tmp_path / "gateway.sock").is_socket()
        successor.close()

    on_stage(tmp_path, play)


def test_nothing_is_waited_for_when_serving_is_cancelled(tmp_path: Path) -> None:
    async def play(stage: Stage) -> None:
        [runner] = await stage.start("a")
        asking = stage.ask()
        request = await runner.next()
        await request.body()
        stage.serving.cancel()
        await asyncio.wait({stage.serving})

        assert (await asyncio.wait_for(request.receive(), PATIENCE))["type"] == "http.disconnect"
        request.over.set()
        assert answer(await asking) == (503, "the app is being stopped")
        stage.serving = asyncio.create_task(asyncio.sleep(0))

    on_stage(tmp_path, play)


def test_unknown_conditions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has teapot; known are connection_error, server_error, timeout"):
        Gateway(skip_retry_conditions=["teapot"], on_load=print, on_sick=print)
