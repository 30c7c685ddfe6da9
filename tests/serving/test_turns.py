"""Turns are given in order, and whoever leaves does not keep one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from support.asgi import let_others_run

from fal_agent.serving.turns import Inbox, Turns

if TYPE_CHECKING:
    from starlette.types import Message

MEGABYTE = 1 << 20


class Client:
    """What a client sends."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Message] = asyncio.Queue()
        self.inbox = Inbox(self.queue.get)

    def says(self, body: bytes, *, more: bool = False) -> None:
        self.queue.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def leaves(self) -> None:
        self.queue.put_nowait({"type": "http.disconnect"})


def asking(turns: Turns, client: Client | None = None) -> asyncio.Future[bool]:
    return asyncio.ensure_future(turns.take((client or Client()).inbox))


def test_no_more_turns_are_out_than_there_are_places_and_they_go_in_order() -> None:
    async def scenario() -> None:
        turns = Turns(2)
        asked = [asking(turns) for _ in range(5)]
        for out in (2, 3, 4, 5):
            await let_others_run()
            assert [task.done() for task in asked] == [True] * out + [False] * (5 - out)
            assert turns.waiting == 5 - out
            turns.leave()

    asyncio.run(scenario())


def test_without_places_everybody_has_a_turn() -> None:
    async def scenario() -> list[bool]:
        turns = Turns(None)
        return [await turns.take(Client().inbox) for _ in range(100)]

    assert all(asyncio.run(scenario()))


def test_who_goes_away_while_waiting_has_no_turn() -> None:
    async def scenario() -> None:
        turns = Turns(1)
        await turns.take(Client().inbox)
        client = Client()
        leaving, staying = asking(turns, client), asking(turns)
        await let_others_run()
        client.says(b"half", more=True)
        client.leaves()

        assert await leaving is False
        turns.leave()
        assert await staying is True
        assert turns.waiting == 0

    asyncio.run(scenario())


def test_a_turn_that_came_when_its_task_was_cancelled_goes_to_the_next() -> None:
    async def scenario() -> None:
        turns = Turns(1)
        await turns.take(Client().inbox)
        first, second = asking(turns), asking(turns)
        await let_others_run()
        turns.leave()  # the first has the turn now, and has not seen it
        first.cancel()

        with pytest.raises(asyncio.CancelledError):
            await first
        assert await second is True

    asyncio.run(scenario())


def test_more_places_let_in_those_that_wait() -> None:
    async def scenario() -> None:
        turns = Turns(1)
        asked = [asking(turns) for _ in range(3)]
        await let_others_run()
        turns.places = None
        turns.admit()

        assert await asyncio.gather(*asked) == [True] * 3

    asyncio.run(scenario())


def test_fewer_places_take_nobodys_turn() -> None:
    async def scenario() -> None:
        turns = Turns(2)
        await turns.take(Client().inbox)
        await turns.take(Client().inbox)
        turns.places = 1
        third = asking(turns)
        turns.leave()
        await let_others_run()
        assert not third.done()
        turns.leave()
        assert await third is True

    asyncio.run(scenario())


def test_what_was_read_while_waiting_is_given_in_order() -> None:
    async def scenario() -> list[Any]:
        turns = Turns(1)
        await turns.take(Client().inbox)
        client = Client()
        waiting = asking(turns, client)
        client.says(b"one", more=True)
        client.says(b"two", more=True)
        await let_others_run()
        assert client.queue.empty()  # both were read ahead
        turns.leave()
        await waiting
        client.says(b"three")
        return [(await client.inbox.receive())["body"] for _ in range(3)]

    assert asyncio.run(scenario()) == [b"one", b"two", b"three"]


def test_no_more_than_a_megabyte_is_read_while_waiting() -> None:
    async def scenario() -> int:
        turns = Turns(1)
        await turns.take(Client().inbox)
        client = Client()
        waiting = asking(turns, client)
        for _ in range(8):
            client.says(bytes(MEGABYTE // 2), more=True)
        await let_others_run()
        left = client.queue.qsize()
        turns.leave()
        await waiting
        return left

    assert asyncio.run(scenario()) == 6


def test_a_connection_that_fails_while_waiting_is_told_and_keeps_no_turn() -> None:
    async def broken() -> Message:
        raise OSError("gone")

    async def scenario() -> None:
        turns = Turns(1)
        await turns.take(Client().inbox)
        with pytest.raises(OSError, match="gone"):
            await turns.take(Inbox(broken))
        assert turns.waiting == 0
        turns.leave()
        assert await turns.take(Client().inbox) is True

    asyncio.run(scenario())
