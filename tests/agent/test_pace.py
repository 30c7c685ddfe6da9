"""The size of the parts of a transfer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fal_agent.pace import LARGEST, SMALLEST, Pace


def test_parts_grow_on_a_quick_line_and_shrink_on_a_slow_one() -> None:
    pace = Pace(64 << 10)

    pace.took(0.001)
    assert pace.part_size == 128 << 10
    pace.took(0.5)
    pace.took(0.5)
    assert pace.part_size == 32 << 10


@given(st.integers(0, 1 << 40), st.lists(st.floats(0, 100)))
def test_parts_stay_within_what_a_frame_holds_and_what_a_line_carries_quickly(
    first: int, times: list[float]
) -> None:
    pace = Pace(first)

    for seconds in times:
        pace.took(seconds)
        assert SMALLEST <= pace.part_size <= LARGEST
