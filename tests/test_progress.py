"""Bars of the user's own loops: what they say, and how they look."""

from __future__ import annotations

from typing import Any

import pytest

import fal_notebook as fal
from fal_agent.runtime import progress as bars
from fal_agent.wire import Progress
from fal_notebook.display.bars import Bars


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[bars.Step]:
    steps: list[bars.Step] = []
    monkeypatch.setattr(bars, "_tellers", [steps.append])
    return steps


def word(done: float, total: float | None = None, name: str = "", **more: Any) -> Progress:
    return Progress(more.pop("run_id", "r"), name, done, total, **more)


# ---------------------------------------------------------------- what a loop says


def test_a_loop_gives_its_items_and_says_where_it_begins_and_ends(told: list[bars.Step]) -> None:
    assert list(fal.progress("abc", desc="letters")) == ["a", "b", "c"]

    assert [(step.done, step.total, step.is_over) for step in told] == [(0, 3, False), (3, 3, True)]
    assert told[0].name == "letters"


def test_of_many_steps_few_are_told(told: list[bars.Step]) -> None:
    for _ in fal.progress(range(100_000)):
        pass

    assert len(told) < 1000
    assert told[-1].done == 100_000


def test_what_has_no_length_has_no_total(told: list[bars.Step]) -> None:
    assert list(fal.progress(iter("ab"))) == ["a", "b"]
    assert told[-1].total is None
    assert list(fal.progress(iter("ab"), total=5)) == ["a", "b"]
    assert told[-1].total == 5


def test_a_loop_that_is_left_ends_where_it_was(told: list[bars.Step]) -> None:
    for item in fal.progress(range(10)):
        if item == 4:
            break

    assert (told[-1].done, told[-1].is_over) == (4, True)


def test_short_loops_in_a_long_one_are_told_seldom_but_their_last_state_is(told: list[bars.Step]) -> None:
    for _ in fal.progress(range(200), desc="outer"):
        for _ in fal.progress(range(3), desc="inner"):
            pass

    inner = [step for step in told if step.depth == 1]
    assert len(inner) < 200
    assert (inner[-1].done, inner[-1].is_over) == (3, True)
    assert {step.depth for step in told if step.name == "outer"} == {0}


def test_a_bar_can_be_moved_by_hand(told: list[bars.Step]) -> None:
    with fal.progress(total=10) as bar:
        bar.update(4)
        bar.update(2.5)

    assert (told[-1].done, told[-1].total) == (6.5, 10)
    with pytest.raises(TypeError, match="give it an iterable"):
        list(bar)


# ---------------------------------------------------------------- how bars look


def test_a_bar_is_a_line_of_text() -> None:
    shown = Bars()
    shown.take(word(0, 8, "work", sent_at=100.0))
    shown.take(word(2, 8, "work", sent_at=102.0))

    assert shown.lines() == ["work:  25% ██░░░░░░░░ 2/8 · 2.0 s · 6.0 s left · 1/s"]
    shown.take(word(8, 8, "work", sent_at=108.0, over=True))
    assert shown.lines() == ["work: 100% ██████████ 8/8 · 8.0 s"]


def test_without_a_total_steps_are_counted() -> None:
    shown = Bars()
    shown.take(word(3, None, "letters", over=True))
    assert shown.lines() == ["letters: 3"]


def test_a_nested_bar_takes_the_place_of_the_one_before() -> None:
    shown = Bars()
    shown.take(word(1, 3, "outer", bar=1))
    shown.take(word(5, 5, "inner", bar=2, depth=1, over=True))
    shown.take(word(0, 5, "inner", bar=3, depth=1))

    assert [line.split(" ·")[0] for line in shown.lines()] == [
        "outer:  33% ███░░░░░░░ 1/3",
        "  inner:   0% ░░░░░░░░░░ 0/5",
    ]
    assert not shown.are_over


def test_bars_of_many_calls_add_up() -> None:
    shown = Bars(adds_up=True)
    for run in range(3):
        shown.take(word(4, 4, "work", run_id=f"{run}", bar=1, over=True))
    shown.take(word(2, 4, "work", run_id="3", bar=1))

    assert shown.lines()[0].startswith("work:  88% ████████░░ 14/16")


def test_markup_in_a_name_stays_text() -> None:
    shown = Bars()
    shown.take(word(1, 2, "<b>"))
    assert "<b>" not in shown.html()
