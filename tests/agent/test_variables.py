"""What is told of a failed call's variables, and that the values themselves are let go of."""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any

import numpy as np
import pytest

from fal_agent.variables import variables_of
from fal_agent.wire import Failure, header, lasting
from fal_agent.worker.debugging import clear_frames


class Model:
    pass


class Silent:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


def told(function: Any) -> list[dict[str, Any]]:
    with pytest.raises(ZeroDivisionError) as caught:
        function()
    return json.loads(variables_of(caught.value) or b"[]")


def test_plain_values_are_themselves_and_others_are_text() -> None:
    def fail() -> None:
        count, name, rate, nothing = 3, "Ada", 0.5, None
        table, silent, large = np.zeros((1000, 1000)), Silent(), 2**70
        print(count, name, rate, nothing, len(table), type(silent), large, 1 / 0)

    names = told(fail)[0]

    assert [names[name] for name in ("count", "name", "rate", "nothing")] == [[3], ["Ada"], [0.5], [None]]
    assert names["table"].startswith("<numpy.ndarray, shape (1000, 1000), float64")
    assert names["silent"].startswith("<Silent instance")
    assert names["large"] == str(2**70)


def test_frames_are_told_from_the_innermost_outwards_within_a_bound() -> None:
    def fail(depth: int) -> None:
        text = "x" * 10_000
        assert text
        if depth == 0:
            print(1 / 0)
        fail(depth - 1)

    names = told(lambda: fail(300))

    assert [frame["depth"] for frame in names[:3]] == [[0], [1], [2]]
    assert len(json.dumps(names)) < 100_000


def test_cleared_frames_hold_nothing_though_they_are_in_a_cycle() -> None:
    seen: list[weakref.ref[Model]] = []

    def fail() -> None:
        model = Model()
        seen.append(weakref.ref(model))
        try:
            print(1 / 0)
        except ZeroDivisionError as error:
            kept = error
            raise ValueError(str(kept)) from kept

    gc.disable()
    try:
        with pytest.raises(ValueError, match="division") as caught:
            fail()
        variables_of(caught.value)  # which reads the frames' variables
        clear_frames(caught.value)
        assert seen[0]() is None
    finally:
        gc.enable()


def test_variables_are_not_among_what_may_be_written_down() -> None:
    failure = Failure("r", "user", "ValueError", data=[0], variables=1)

    content, buffers = lasting(header(failure), [b"error", b'[{"key": ["secret"]}]'])

    assert buffers == [b"error"]
    assert "variables" not in content
