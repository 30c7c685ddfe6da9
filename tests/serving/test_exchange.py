"""One application takes another's place; each request is answered by one of them from beginning to end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from support.asgi import Asked, let_others_run

from fal_agent.serving.exchange import Exchange

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send


class Slow:
    """An application that answers with its name, in two parts, when it is let."""

    def __init__(self, name: str) -> None:
        self.name = name.encode()
        self.may_finish = asyncio.Event()
        self.cancelled = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": self.name, "more_body": True})
        try:
            await self.may_finish.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        await send({"type": "http.response.body", "body": self.name})


def test_a_request_is_answered_by_who_was_current_when_it_came() -> None:
    async def scenario() -> None:
        old, new = Slow("old"), Slow("new")
        exchange = Exchange(old)
        before = Asked(exchange)
        await let_others_run()
        emptied = asyncio.ensure_future(exchange.swap(new))
        after = Asked(exchange)
        await let_others_run()
        assert not emptied.done()
        old.may_finish.set()
        await emptied
        new.may_finish.set()
        await asyncio.gather(before.task, after.task)

        assert before.body == b"oldold"
        assert after.body == b"newnew"

    asyncio.run(scenario())


def test_the_new_one_is_current_at_once() -> None:
    async def scenario() -> None:
        old, new = Slow("old"), Slow("new")
        exchange = Exchange(old)
        emptied = exchange.swap(new)  # not awaited yet
        new.may_finish.set()
        asked = Asked(exchange)
        await asked.task
        await emptied

        assert asked.body == b"newnew"

    asyncio.run(scenario())


def test_one_that_answers_nothing_is_over_at_once() -> None:
    async def scenario() -> None:
        exchange = Exchange(Slow("old"))
        await exchange.swap(Slow("new"))
        await exchange.swap(Slow("newer"))

    asyncio.run(scenario())


def test_what_outlasts_the_patience_is_cancelled() -> None:
    async def scenario() -> None:
        old, new = Slow("old"), Slow("new")
        exchange = Exchange(old)
        asked = [Asked(exchange), Asked(exchange)]
        await let_others_run()
        await exchange.swap(new, patience=0.01)

        assert old.cancelled == 2
        for one in asked:
            with pytest.raises(asyncio.CancelledError):
                await one.task
            assert one.body == b"old"

    asyncio.run(scenario())


def test_one_that_fails_is_over_too() -> None:
    async def fails(_scope: Scope, _receive: Receive, _send: Send) -> None:
        await asyncio.sleep(0)
        raise ValueError("no")

    async def scenario() -> None:
        exchange = Exchange(fails)
        asked = Asked(exchange)
        await asyncio.sleep(0)
        await exchange.swap(Slow("new"))
        with pytest.raises(ValueError, match="no"):
            await asked.task

    asyncio.run(scenario())
