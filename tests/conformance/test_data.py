"""Arrays and megabytes: they arrive whole, writable, once, and beside small calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import fal_notebook as fal

if TYPE_CHECKING:
    from fal_notebook.hosts.base import Host

NUMPY = [f"numpy=={np.__version__}"]
MEGABYTE = 1 << 20


def test_sixty_four_megabytes_go_there_and_come_back(host: Host) -> None:
    data = np.random.default_rng(1).bytes(64 * MEGABYTE)

    @fal.function(host=host)
    def reverse(value: bytes) -> bytes:
        return value[::-1]

    assert reverse(data) == data[::-1]


def test_a_small_call_passes_a_large_one_on_its_way(agent_host: Host) -> None:
    """The small call is begun second and has ended before the large one has."""
    data = np.random.default_rng(2).bytes(96 * MEGABYTE)

    @fal.function(host=agent_host)
    def size(value: bytes) -> int:
        return len(value)

    small = size.submit(b"x")
    small.result(timeout=20)
    ended: list[str] = []
    large = size.submit(data)
    large.add_done_callback(lambda _run: ended.append("large"))
    small = size.submit(b"xy")
    small.add_done_callback(lambda _run: ended.append("small"))

    assert (small.result(timeout=60), large.result(timeout=60)) == (2, 96 * MEGABYTE)
    assert ended == ["small", "large"]


def test_arrays_arrive_equal_and_can_be_written_to(host: Host) -> None:
    array = np.arange(100_000, dtype="float64").reshape(1000, 100)

    @fal.function(host=host, requirements=NUMPY)
    def add_one(value: Any) -> Any:
        value += 1
        return value

    result = add_one(array)
    result[0, 0] = -1

    assert array[0, 0] == 0
    assert result.shape == (1000, 100)
    np.testing.assert_array_equal(result.ravel()[1:], array.ravel()[1:] + 1)


def test_arrays_of_every_shape_arrive(host: Host) -> None:
    arrays = [
        np.zeros(0),
        np.zeros((3, 0, 2)),
        np.array(5.0),
        np.asfortranarray(np.arange(60_000).reshape(200, 300)),
        np.arange(100_000)[::3],
        np.array(["a", "bb"] * 2000),
        np.array([{"a": 1}, None], dtype=object),
        np.random.default_rng(0).random(50_000).astype("float16"),
        np.arange("2020-01-01", "2020-01-04", dtype="datetime64[D]"),
    ]

    @fal.function(host=host, requirements=NUMPY)
    def same(values: Any) -> Any:
        return values

    for sent, got in zip(arrays, same(arrays), strict=True):
        assert got.dtype == sent.dtype
        assert got.shape == sent.shape
        np.testing.assert_array_equal(got, sent)


def test_many_buffers_arrive_in_their_order(host: Host) -> None:
    arrays = [np.full(2000, i) for i in range(1500)]

    @fal.function(host=host, requirements=NUMPY)
    def back(values: Any) -> Any:
        return values[::-1]

    assert [array[0] for array in back(arrays)] == list(range(1499, -1, -1))


def test_an_array_that_was_sent_once_is_not_sent_again(agent_host: Host) -> None:
    array = np.random.default_rng(3).random(MEGABYTE)  # 8 MiB

    @fal.function(host=agent_host, requirements=NUMPY)
    def total(value: Any) -> float:
        return float(value.sum())

    client: Any = agent_host.connect()  # type: ignore[attr-defined]
    sent: list[str] = []
    original = client.blobs._send

    def counting(name: str, *arguments: Any) -> None:
        sent.append(name)
        original(name, *arguments)

    client.blobs._send = counting
    try:
        first, second = total(array), total(array)
        array[0] += 1
        third = total(array)
    finally:
        del client.blobs._send

    assert first == second == pytest.approx(third - 1)
    assert len(sent) == len(set(sent)) == 2


def test_data_that_cannot_be_sent_ends_the_call(agent_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    @fal.function(host=agent_host, requirements=NUMPY)
    def total(value: Any) -> float:
        return float(value.sum())

    client: Any = agent_host.connect()  # type: ignore[attr-defined]
    monkeypatch.setattr(client.blobs, "_send", fail)
    monkeypatch.setattr("threading.excepthook", lambda _: None)

    with pytest.raises(fal.exceptions.LinkLostError, match="could not be sent: no room"):
        total(np.zeros(MEGABYTE))


def test_a_large_captured_array_travels(host: Host) -> None:
    table = np.arange(MEGABYTE)

    @fal.function(host=host, requirements=NUMPY)
    def look(at: int) -> tuple[int, int]:
        table[at] += 1
        return int(table[at]), len(table)

    assert look(7) == (8, MEGABYTE)
    assert look(7) == (8, MEGABYTE)  # fresh for each call
    assert table[7] == 7


def test_an_array_changed_right_after_submit_travels_as_it_was(agent_host: Host) -> None:
    array = np.zeros(2 * MEGABYTE)

    @fal.function(host=agent_host, requirements=NUMPY)
    def total(value: Any) -> float:
        return float(value.sum())

    run = total.submit(array)
    array[:] = 1

    assert run.result(timeout=60) == 0.0


def test_large_values_of_a_map_and_of_a_generator_arrive(host: Host) -> None:
    @fal.function(host=host, requirements=NUMPY)
    def full(i: int) -> Any:
        return np.full(100_000, i)

    assert [int(a.sum()) for a in full.map(range(6), chunk_size=2)] == [i * 100_000 for i in range(6)]
