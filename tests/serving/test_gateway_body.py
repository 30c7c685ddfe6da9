"""How much of a body lies in the gateway, and whether it can be sent again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from fal_agent.serving.gateway_body import KEPT, Allowance, Body, Upload

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

PART = 1 << 16


class Client:
    """Sends parts of a body as often as it is asked, and leaves at the end."""

    def __init__(self, size: int, part: int = PART) -> None:
        self.size, self.part, self.sent = size, part, 0

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(0)
        if self.sent >= self.size > 0:
            return {"type": "http.disconnect"}
        part = b"x" * min(self.part, self.size - self.sent)
        self.sent += len(part)
        self.size = self.size or -1
        return {"type": "http.request", "body": part, "more_body": self.sent < self.size}


def with_body(
    client: Client, allowance: Allowance, play: Callable[[Body, asyncio.Task[None]], Awaitable[None]]
) -> None:
    async def run() -> None:
        body = Body(client.receive, allowance)
        listening = asyncio.create_task(body.listen())
        try:
            await asyncio.wait_for(play(body, listening), 60)
        finally:
            listening.cancel()

    asyncio.run(run())


async def settle() -> None:
    """Let everyone go on who can."""
    for _ in range(500):
        await asyncio.sleep(0)


async def uploaded(body: Body) -> int:
    return sum([len(part) async for part in Upload(body)])


@pytest.mark.parametrize("size", [1, PART, KEPT - 1, KEPT])
def test_a_small_body_can_be_sent_again(size: int) -> None:
    async def play(body: Body, listening: asyncio.Task[None]) -> None:
        assert [await uploaded(body) for _ in range(3)] == [size] * 3
        assert body.is_replayable
        await listening

    with_body(Client(size), Allowance(), play)


@pytest.mark.parametrize("size", [KEPT + 1, 10 * KEPT])
def test_a_large_body_can_be_sent_once(size: int) -> None:
    async def play(body: Body, listening: asyncio.Task[None]) -> None:
        assert await uploaded(body) == size
        assert not body.is_replayable

    with_body(Client(size), Allowance(), play)


def test_a_large_body_that_nobody_has_read_can_be_sent() -> None:
    async def play(body: Body, listening: asyncio.Task[None]) -> None:
        await settle()
        assert body.is_replayable
        assert await uploaded(body) == 10 * KEPT

    with_body(Client(10 * KEPT), Allowance(), play)


def test_no_more_is_taken_in_than_is_kept() -> None:
    client, allowance = Client(100 * KEPT), Allowance(10 * KEPT)

    async def play(body: Body, listening: asyncio.Task[None]) -> None:
        await settle()
        assert client.sent == KEPT + PART
        assert allowance.left == 9 * KEPT - PART

    with_body(client, allowance, play)


def test_many_small_parts_are_kept_as_one() -> None:
    async def play(body: Body, listening: asyncio.Task[None]) -> None:
        await listening
        assert len([part async for part in Upload(body)]) == 1

    with_body(Client(5000, part=1), Allowance(), play)


def test_when_nothing_may_be_kept_a_body_still_passes_part_by_part() -> None:
    client, allowance = Client(5 * KEPT), Allowance(0)

    async def play(body: Body, listening: asyncio.Task[None]) -> None:
        await settle()
        assert client.sent == PART
        assert await uploaded(body) == 5 * KEPT
        assert not body.is_replayable

    with_body(client, allowance, play)
    assert allowance.left == 0


def test_what_is_discarded_is_given_back_and_the_rest_is_thrown_away() -> None:
    client, allowance = Client(5 * KEPT), Allowance()
    before = allowance.left

    async def play(body: Body, listening: asyncio.Task[None]) -> None:
        await settle()
        assert allowance.left < before
        body.discard()
        await listening
        assert client.sent == 5 * KEPT
        assert allowance.left == before
        assert not body.is_replayable

    with_body(client, allowance, play)


def test_an_empty_body_ends_at_once() -> None:
    async def play(body: Body, listening: asyncio.Task[None]) -> None:
        assert await uploaded(body) == 0
        assert body.is_replayable

    with_body(Client(0), Allowance(), play)
