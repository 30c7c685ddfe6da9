"""An app's requests are held to its limits, counted, and looked at for signs of trouble."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from support.asgi import Asked, let_others_run

from fal_agent.serving.guard import IS_AGENT
from fal_agent.serving.limits import ANSWERED_503, CHECK_ASKED, CHECK_HEADER, Limits

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Receive, Scope, Send


class Inner:
    """An application that does what the path says; `/wait` goes on when it is let."""

    def __init__(self) -> None:
        self.begun = 0
        self.may_go_on = asyncio.Event()
        self.late: BaseException | None = None  # what sending gave when the time was over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun += 1
        status = int(scope.get("status", 200))
        start = {"type": "http.response.start", "status": status, "headers": scope.get("answer", [])}
        end = {"type": "http.response.body", "body": b"end"}
        if scope["type"] == "websocket":
            await self.may_go_on.wait()
            await send({"type": "websocket.accept", "headers": scope.get("answer", [])})
            return
        if scope["path"] == "/fail":
            raise ValueError("failed")
        if scope["path"] == "/begin":
            await send(start)
            await self.may_go_on.wait()
        if scope["path"] == "/stubborn":
            await self._outlast(send, start)
            return
        if scope["path"] != "/after":
            if scope["path"] == "/wait" or scope["path"].startswith("/.fal/"):
                await self.may_go_on.wait()
            await send(start)
            await send(end)
            return
        await send(start)
        await send(end)
        await self.may_go_on.wait()  # as background tasks do

    async def _outlast(self, send: Send, start: dict[str, Any]) -> None:
        while not self.may_go_on.is_set():
            try:
                await self.may_go_on.wait()
            except asyncio.CancelledError:
                continue  # as a handler in a thread, which cannot be interrupted
        try:
            await send(start)
        except OSError as error:
            self.late = error
            raise


class Setup:
    """Limits around an application, and what they told."""

    def __init__(self, **options: Any) -> None:
        self.inner = Inner()
        self.activity: list[int] = []
        self.unwell: list[str] = []
        self.limits = Limits(
            self.inner, on_activity=self.activity.append, on_unwell=self.unwell.append, **options
        )

    def ask(self, path: str = "/", **more: Any) -> Asked:
        return Asked(self.limits, path=path, **more)


def running(scenario: Callable[..., Any], **options: Any) -> None:
    async def main() -> None:
        await asyncio.wait_for(scenario(Setup(**options)), 30)

    asyncio.run(main())


def test_an_answer_passes_unchanged() -> None:
    async def scenario(setup: Setup) -> None:
        asked = setup.ask()
        await asked.task
        assert (asked.status, asked.body) == (200, b"end")

    running(scenario)
    running(scenario, request_timeout=20, multiplexing=1)


def test_the_activity_is_every_change_of_the_count_with_those_that_wait() -> None:
    async def scenario(setup: Setup) -> None:
        asked = [setup.ask("/wait") for _ in range(3)]
        await let_others_run()
        assert setup.activity == [1, 2, 3]
        assert setup.inner.begun == 1
        setup.inner.may_go_on.set()
        await asyncio.gather(*(one.task for one in asked))
        assert setup.activity == [1, 2, 3, 2, 1, 0]

    running(scenario, multiplexing=1)


def test_a_request_that_fails_is_counted_off_and_gives_its_turn_back() -> None:
    async def scenario(setup: Setup) -> None:
        for _ in range(2):
            with pytest.raises(ValueError, match="failed"):
                await setup.ask("/fail").task
        assert setup.activity == [1, 0, 1, 0]

    running(scenario, multiplexing=1)
    running(scenario, multiplexing=1, request_timeout=20)


def test_a_client_that_leaves_the_queue_is_not_answered() -> None:
    async def scenario(setup: Setup) -> None:
        first, second = setup.ask("/wait"), setup.ask("/wait")
        await let_others_run()
        second.leave()
        await second.task
        assert second.sent == []
        setup.inner.may_go_on.set()
        await first.task
        assert setup.inner.begun == 1

    running(scenario, multiplexing=1)


def test_what_the_agent_asks_is_neither_counted_nor_queued_nor_limited() -> None:
    async def scenario(setup: Setup) -> None:
        setup.ask("/wait")
        await let_others_run()
        check = setup.ask("/", headers=[(CHECK_HEADER, "1")], status=503, **{IS_AGENT: True})
        await check.task
        assert check.status == 503
        assert setup.activity == [1]
        assert setup.unwell == []
        setup.inner.may_go_on.set()

    running(scenario, multiplexing=1)


def test_files_of_the_store_neither_wait_nor_time_out() -> None:
    async def scenario(setup: Setup) -> None:
        first = setup.ask("/wait")
        file = setup.ask("/.fal/files/0/x")
        await first.task  # its time is over
        assert first.status == 504
        assert not file.task.done()
        setup.inner.may_go_on.set()
        await file.task
        assert file.status == 200

    running(scenario, multiplexing=1, request_timeout=0.02)


def test_a_request_that_takes_too_long_is_answered_504(capfd: pytest.CaptureFixture[str]) -> None:
    async def scenario(setup: Setup) -> None:
        asked = setup.ask("/wait", headers=[("origin", "http://page")])
        await asked.task
        assert asked.status == 504
        assert asked.body == b'{"detail":"Request timed out after 0.02 s"}'
        assert (b"access-control-allow-origin", b"http://page") in asked.sent[0]["headers"]
        await setup.ask().task  # and the turn is free again

    running(scenario, multiplexing=1, request_timeout=0.02)
    assert "POST /wait: Request timed out" in capfd.readouterr().err


def test_the_time_begins_with_the_turn() -> None:
    async def scenario(setup: Setup) -> None:
        first, second = setup.ask("/wait"), setup.ask("/wait")
        await first.task
        assert not second.task.done()
        setup.inner.may_go_on.set()
        await second.task
        assert (first.status, second.status) == (504, 200)

    running(scenario, multiplexing=1, request_timeout=0.05)


def test_an_answer_that_has_begun_is_broken_off() -> None:
    async def scenario(setup: Setup) -> None:
        asked = setup.ask("/begin")
        with pytest.raises(Exception, match=r"cut off after 0\.02 s"):
            await asked.task
        assert [message["type"] for message in asked.sent] == ["http.response.start"]

    running(scenario, request_timeout=0.02)


def test_what_goes_on_after_a_whole_answer_has_no_limit() -> None:
    async def scenario(setup: Setup) -> None:
        asked = setup.ask("/after")
        await asyncio.sleep(0.1)  # longer than the limit
        assert not asked.task.done()
        setup.inner.may_go_on.set()
        await asked.task
        assert asked.body == b"end"

    running(scenario, request_timeout=0.02)


def test_a_handler_that_cannot_be_stopped_finds_its_caller_gone(capfd: pytest.CaptureFixture[str]) -> None:
    async def scenario(setup: Setup) -> None:
        asked = setup.ask("/stubborn")
        await asked.task
        assert asked.status == 504
        setup.inner.may_go_on.set()
        await let_others_run()
        assert isinstance(setup.inner.late, OSError)
        assert len(asked.sent) == 2  # the refusal alone

    running(scenario, request_timeout=0.02)
    assert "which had timed out, failed" in capfd.readouterr().err


def test_a_caller_that_is_cut_off_takes_the_handler_along() -> None:
    async def scenario(setup: Setup) -> None:
        asked = setup.ask("/wait")
        await let_others_run()
        asked.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked.task
        assert setup.activity == [1, 0]

    running(scenario, request_timeout=20)


def test_a_websocket_takes_a_place_and_has_no_time_limit() -> None:
    async def scenario(setup: Setup) -> None:
        session = setup.ask(kind="websocket")
        request = setup.ask()
        await asyncio.sleep(0.1)  # longer than the limit
        assert not session.task.done()
        assert not request.task.done()
        setup.inner.may_go_on.set()
        await asyncio.gather(session.task, request.task)
        assert request.status == 200

    running(scenario, multiplexing=1, request_timeout=0.02)


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_a_request_may_ask_for_a_check(kind: str) -> None:
    async def scenario(setup: Setup) -> None:
        setup.inner.may_go_on.set()
        await setup.ask(kind=kind, headers=[(CHECK_HEADER.title(), "")]).task
        assert setup.unwell == [CHECK_ASKED]

    running(scenario)


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_an_answer_may_ask_for_a_check(kind: str) -> None:
    async def scenario(setup: Setup) -> None:
        setup.inner.may_go_on.set()
        await setup.ask(kind=kind, answer=[(CHECK_HEADER.encode(), b"1")]).task
        assert setup.unwell == [CHECK_ASKED]

    running(scenario)


def test_an_answer_of_503_is_told() -> None:
    async def scenario(setup: Setup) -> None:
        await setup.ask(status=503).task
        await setup.ask(status=500).task
        assert setup.unwell == [ANSWERED_503]

    running(scenario)


def test_new_limits_hold_for_what_begins_then() -> None:
    async def scenario(setup: Setup) -> None:
        first, second = setup.ask("/wait"), setup.ask("/wait")
        await let_others_run()
        setup.limits.change(request_timeout=0.02, multiplexing=2)
        await second.task
        assert second.status == 504
        assert not first.task.done()
        setup.inner.may_go_on.set()
        await first.task
        assert first.status == 200

    running(scenario, multiplexing=1)


def test_an_app_that_could_answer_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="one request at a time at least, not 0"):
        Setup(multiplexing=0)


def test_what_is_no_request_passes_by() -> None:
    async def scenario(setup: Setup) -> None:
        await setup.ask(kind="lifespan").task
        assert setup.inner.begun == 1
        assert setup.activity == []

    running(scenario, multiplexing=1)
