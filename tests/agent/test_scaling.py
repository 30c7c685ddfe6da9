"""How many runners an app is to have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fal_agent.server.scaling import most_runners, wanted_runners
from fal_agent.wire import Scaling

scalings = st.builds(
    Scaling,
    min_concurrency=st.integers(0, 4),
    max_concurrency=st.none() | st.integers(4, 9),
    concurrency_buffer=st.integers(0, 3),
    concurrency_buffer_perc=st.integers(0, 200),
    max_multiplexing=st.integers(1, 5),
)


@pytest.mark.parametrize(
    ("scaling", "load", "wanted"),
    [
        (Scaling(), 0, 0),
        (Scaling(), 9, 1),
        (Scaling(max_concurrency=4), 2, 2),
        (Scaling(max_concurrency=4), 9, 4),
        (Scaling(max_concurrency=4, max_multiplexing=3), 7, 3),
        (Scaling(max_concurrency=9, min_concurrency=2), 0, 2),
        (Scaling(max_concurrency=9, min_concurrency=1, concurrency_buffer=3), 0, 3),
        (Scaling(max_concurrency=9, concurrency_buffer=1), 4, 5),
        (Scaling(max_concurrency=9, concurrency_buffer=1, concurrency_buffer_perc=50), 4, 6),
        (Scaling(min_concurrency=2), 9, 2),
    ],
)
def test_runners_follow_the_load_within_the_limits(scaling: Scaling, load: int, wanted: int) -> None:
    assert wanted_runners(scaling, load) == wanted


@given(scalings, st.integers(0, 100))
def test_there_are_never_too_many_or_too_few(scaling: Scaling, load: int) -> None:
    wanted = wanted_runners(scaling, load)

    assert scaling.min_concurrency <= wanted <= most_runners(scaling)
    assert wanted <= wanted_runners(scaling, load + 1)
