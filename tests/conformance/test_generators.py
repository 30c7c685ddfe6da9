"""Generators give their items as they are made, and stop when nobody wants more."""

from __future__ import annotations

import asyncio
import itertools
import os
from typing import TYPE_CHECKING, Any

import pytest
from support.waiting import until

import fal_notebook as fal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from fal_notebook.hosts.base import Host


def test_items_come_in_order_and_the_return_value_is_kept(host: Host) -> None:
    @fal.function(host=host)
    def count(n: int) -> Iterator[int]:
        yield from range(n)
        return "end"

    items = count(1000)

    assert next(items) == 0
    assert list(items) == list(range(1, 1000))
    assert items.value == "end"
    assert list(items) == []


def test_an_asynchronous_generator_streams_as_well(host: Host) -> None:
    @fal.function(host=host)
    async def count(n: int) -> AsyncIterator[int]:
        for i in range(n):
            await asyncio.sleep(0)
            yield i

    assert list(count(5)) == [0, 1, 2, 3, 4]


def test_items_arrive_while_the_generator_still_runs(host: Host, public_folder: Path) -> None:
    """The generator waits for a file that is made only when its first item has arrived."""
    seen = public_folder / "seen"

    @fal.function(host=host)
    def steps() -> Iterator[str]:
        import pathlib
        import time

        yield "first"
        for _ in range(2000):
            if pathlib.Path(seen).exists():
                break
            time.sleep(0.005)
        yield "seen" if pathlib.Path(seen).exists() else "not seen"

    items = steps()
    first = next(items)
    seen.touch()

    assert (first, next(items)) == ("first", "seen")


def test_an_infinite_generator_does_not_run_far_ahead(host: Host, public_folder: Path) -> None:
    made = public_folder / "made"

    @fal.function(host=host)
    def forever() -> Iterator[int]:
        for i in itertools.count():
            made.write_text(str(i))
            yield i

    items = forever()
    taken = [next(items) for _ in range(10)]
    until(lambda: made.exists() and made.read_text())
    seen = [""]
    while (now := made.read_text()) != seen[-1] or not now:  # until it waits for its reader
        seen.append(now)
        until(lambda: made.read_text() != seen[-1], seconds=0.3, must=False)
    items.close()

    assert taken == list(range(10))
    assert int(made.read_text()) < 10 + 300


def test_a_large_stream_arrives_whole(host: Host) -> None:
    @fal.function(host=host)
    def blocks() -> Iterator[bytes]:
        for i in range(40):
            yield bytes([i]) * 300_000

    assert [(block[0], len(block)) for block in blocks()] == [(i, 300_000) for i in range(40)]


def test_closing_a_generator_stops_it_there(host: Host, public_folder: Path) -> None:
    ended = public_folder / "ended"

    @fal.function(host=host)
    def forever() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            ended.touch()

    items = forever()
    next(items)
    items.close()

    until(ended.exists)
    assert list(items) == []


def test_leaving_the_loop_stops_the_generator_and_its_worker_serves_on(
    agent_host: Host, public_folder: Path
) -> None:
    ended = public_folder / "ended"

    @fal.function(host=agent_host)
    def forever() -> Iterator[int]:
        try:
            for _ in itertools.count():
                yield os.getpid()
        finally:
            ended.touch()

    @fal.function(host=agent_host, max_concurrency=1)
    def pid() -> int:
        return os.getpid()

    for worker in forever():
        assert worker != os.getpid()
        break
    until(ended.exists)

    assert pid() == worker


def test_a_generator_that_computes_is_interrupted_by_closing(agent_host: Host, public_folder: Path) -> None:
    ended = public_folder / "ended"

    @fal.function(host=agent_host)
    def slow() -> Iterator[int]:
        import time

        yield 1
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            ended.touch()
            raise

    items = slow()
    next(items)
    items.close()

    until(ended.exists)


def test_an_error_in_the_middle_comes_after_the_items_before_it(host: Host) -> None:
    @fal.function(host=host)
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise LookupError("third")

    items = broken()

    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(LookupError, match="third"):
        next(items)


def test_an_item_that_cannot_be_pickled_is_named(host: Host) -> None:
    @fal.function(host=host)
    def lazy() -> Iterator[Any]:
        yield 1
        yield (i for i in range(3))

    items = lazy()

    assert next(items) == 1
    with pytest.raises(fal.exceptions.FalSerializationError, match=r"an item of .*lazy\(\)"):
        next(items)


def test_submitting_a_generator_gives_its_items(host: Host) -> None:
    @fal.function(host=host)
    def count(n: int) -> Iterator[int]:
        yield from range(n)

    run = count.submit(3)

    assert list(run.result(timeout=20)) == [0, 1, 2]


def test_aio_gives_an_asynchronous_iterator(host: Host) -> None:
    @fal.function(host=host)
    def count(n: int) -> Iterator[int]:
        yield from range(n)

    async def collect() -> list[int]:
        return [item async for item in count.aio(4)]

    assert asyncio.run(collect()) == [0, 1, 2, 3]


def test_two_generators_can_be_read_in_turn(host: Host) -> None:
    @fal.function(host=host)
    def count(step: int) -> Iterator[int]:
        yield from range(0, 5 * step, step)

    assert list(zip(count(1), count(10), strict=True)) == [(0, 0), (1, 10), (2, 20), (3, 30), (4, 40)]


def test_what_a_generator_prints_stands_before_the_item_it_made_next(
    host: Host, capfd: pytest.CaptureFixture[str]
) -> None:
    @fal.function(host=host)
    def talk() -> Iterator[int]:
        for i in range(3):
            print("making", i)
            yield i

    list(talk())

    assert capfd.readouterr().out == "making 0\nmaking 1\nmaking 2\n"
