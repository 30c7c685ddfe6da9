"""`map` reads its input lazily, keeps the order or gives what is there, and bounds what is in flight."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from support.waiting import until

import fal_notebook as fal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fal_notebook.hosts.base import Host


@pytest.mark.parametrize("chunk_size", [None, 1, 7])
def test_values_come_in_the_order_of_the_items(host: Host, chunk_size: int | None) -> None:
    @fal.function(host=host)
    def double(value: int) -> int:
        return value * 2

    assert list(double.map(range(30), chunk_size=chunk_size)) == [i * 2 for i in range(30)]


def test_unordered_values_are_the_same_values(host: Host) -> None:
    @fal.function(host=host)
    def double(value: int) -> int:
        return value * 2

    assert sorted(double.map(range(30), ordered=False, chunk_size=4)) == [i * 2 for i in range(30)]


def test_unordered_values_come_as_they_are_there(agent_host: Host, public_folder: Path) -> None:
    """The first item waits for the others: in order nothing could come."""

    @fal.function(host=agent_host)
    def wait(item: int) -> int:
        import pathlib
        import time

        while item == 0 and not pathlib.Path(public_folder, "go").exists():
            time.sleep(0.005)
        return item

    values = wait.map(range(3), ordered=False, chunk_size=1)
    first = {next(values), next(values)}
    (public_folder / "go").touch()

    assert first == {1, 2}
    assert list(values) == [0]


def test_several_iterables_go_together_and_the_shortest_ends_them(host: Host) -> None:
    @fal.function(host=host)
    def add(a: int, b: int) -> int:
        return a + b

    assert list(add.map([1, 2, 3], itertools.count(10))) == [11, 13, 15]


def test_an_empty_input_gives_nothing(host: Host) -> None:
    @fal.function(host=host)
    def double(value: int) -> int:
        return value * 2

    assert list(double.map([])) == []


def test_an_infinite_input_is_read_lazily_and_only_as_far_as_allowed(host: Host) -> None:
    read = 0

    def numbers() -> Iterator[int]:
        nonlocal read
        while True:
            read += 1
            yield read

    @fal.function(host=host)
    def double(value: int) -> int:
        return value * 2

    values = double.map(numbers(), chunk_size=2, in_flight=3)
    taken = [next(values) for _ in range(8)]
    values.close()

    assert taken == [2, 4, 6, 8, 10, 12, 14, 16]
    assert read <= 8 + 2 * (3 + 1)


def test_no_more_is_in_flight_than_allowed(agent_host: Host, public_folder: Path) -> None:
    @fal.function(host=agent_host)
    def seen(item: int) -> int:
        import pathlib
        import time

        mark = pathlib.Path(public_folder, f"running-{item}")
        mark.touch()
        time.sleep(0.01)
        running = len(list(pathlib.Path(public_folder).glob("running-*")))
        mark.unlink()
        return running

    assert max(seen.map(range(8), chunk_size=1, in_flight=1)) == 1


def test_an_error_comes_at_its_items_turn(host: Host) -> None:
    @fal.function(host=host)
    def divide(value: int) -> float:
        return 12 / value

    values = divide.map([1, 2, 0, 3], chunk_size=4)

    assert [next(values), next(values)] == [12.0, 6.0]
    with pytest.raises(ZeroDivisionError):
        next(values)
    with pytest.raises(StopIteration):
        next(values)


def test_an_error_of_an_own_class_keeps_its_attributes(host: Host) -> None:
    class BadItem(Exception):
        def __init__(self, item: int) -> None:
            super().__init__(item)
            self.item = item

    @fal.function(host=host)
    def check(item: int) -> int:
        if item == 3:
            raise BadItem(item)
        return item

    with pytest.raises(BadItem) as caught:
        list(check.map(range(5)))

    assert caught.value.item == 3


def test_an_error_in_a_later_chunk_does_not_overtake(host: Host) -> None:
    @fal.function(host=host)
    def check(item: int) -> int:
        if item == 5:
            raise ValueError("five")
        return item

    values = check.map(range(10), chunk_size=2, in_flight=2)

    assert list(itertools.islice(values, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="five"):
        next(values)


def test_an_error_of_the_input_is_raised(host: Host) -> None:
    @fal.function(host=host)
    def double(value: int) -> int:
        return value * 2

    def broken() -> Iterator[int]:
        yield 1
        raise LookupError("input")

    with pytest.raises(LookupError, match="input"):
        list(double.map(broken()))


def test_coroutines_and_setup_work_in_a_map(host: Host) -> None:
    @fal.function(host=host, setup_function=lambda: 100)
    async def add(base: int, value: int) -> int:
        return base + value

    assert list(add.map([1, 2, 3])) == [101, 102, 103]


def test_leaving_the_loop_cancels_what_is_in_flight(agent_host: Host, public_folder: Path) -> None:
    @fal.function(host=agent_host, max_concurrency=1)
    def mark(item: int) -> int:
        import pathlib
        import time

        try:
            pathlib.Path(public_folder, str(item)).touch()
            time.sleep(60 if item else 0)
        except KeyboardInterrupt:
            pathlib.Path(public_folder, "stopped").touch()
            raise
        return item

    values = mark.map(range(5), chunk_size=1, in_flight=3)
    assert next(values) == 0
    until((public_folder / "1").exists)
    values.close()

    until((public_folder / "stopped").exists)
    assert not (public_folder / "4").exists()


def test_what_a_map_prints_is_printed(host: Host, capfd: pytest.CaptureFixture[str]) -> None:
    @fal.function(host=host)
    def say(item: int) -> None:
        print("item", item)

    list(say.map(range(5), in_flight=1))

    assert capfd.readouterr().out == "".join(f"item {i}\n" for i in range(5))


@pytest.mark.parametrize("wrong", [{"chunk_size": 0}, {"in_flight": 0}])
def test_numbers_that_cannot_be_are_refused(host: Host, wrong: dict[str, int]) -> None:
    @fal.function(host=host)
    def double(value: int) -> int:
        return value * 2

    with pytest.raises(ValueError, match="must be at least 1"):
        double.map([1], **wrong)
