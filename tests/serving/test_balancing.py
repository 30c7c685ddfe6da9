"""Which runner gets which request, and who waits: every order of events keeps the promises."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fal_agent.serving.balancing import Balancer, Load, RunnerAddress, Ticket

A, B, C = (RunnerAddress(name, f"/run/{name}") for name in "abc")
RUNNERS = [*(RunnerAddress(f"r{at}", f"/run/r{at}") for at in range(4)), RunnerAddress("r0", "/run/other")]
HINTS = ["", "x", "y"]


class Line:
    """A balancer and the tickets that it granted later on."""

    def __init__(self, **options: Any) -> None:
        self.granted: list[Ticket] = []
        self.balancer = Balancer(on_grant=self.granted.append, **options)

    def ask(self, hint: str = "", now: float = 0.0) -> Ticket:
        ticket = self.balancer.ask(hint, now)
        assert ticket is not None
        return ticket


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order."""

    @initialize(multiplexing=st.integers(1, 3), max_waiting=st.integers(0, 5))
    def begin(self, multiplexing: int, max_waiting: int) -> None:
        self.multiplexing, self.max_waiting = multiplexing, max_waiting
        self.balancer = Balancer(
            multiplexing=multiplexing, max_waiting=max_waiting, on_grant=self.was_granted
        )
        self.tickets: list[Ticket] = []
        self.waiting: list[Ticket] = []
        self.ready: list[RunnerAddress] = []
        self.sick: set[RunnerAddress] = set()
        self.held: dict[Ticket, RunnerAddress] = {}

    def was_granted(self, ticket: Ticket) -> None:
        """A waiting one gets a runner: it is the first in line, and the runner is one that may have it."""
        assert ticket is min(self.waiting, key=lambda one: one.number)
        self.waiting.remove(ticket)
        self.got(ticket)

    def got(self, ticket: Ticket) -> None:
        assert ticket.holder in self.ready
        assert ticket.holder not in self.sick
        self.held[ticket] = ticket.holder

    @rule(hint=st.sampled_from(HINTS))
    def ask(self, hint: str) -> None:
        had_to_wait = len(self.waiting)
        ticket = self.balancer.ask(hint, 0.0)
        if ticket is None:
            assert had_to_wait >= self.max_waiting
        elif ticket.runner is None:
            assert had_to_wait < self.max_waiting
            self.waiting.append(ticket)
        else:
            assert not had_to_wait
            self.got(ticket)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.held, key=lambda one: one.number)))
        del self.held[ticket]
        self.balancer.leave(ticket)
        self.balancer.leave(ticket)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(ticket)
        self.balancer.leave(ticket)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def try_again(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.held, key=lambda one: one.number)))
        del self.held[ticket]
        self.waiting.append(ticket)
        self.balancer.ask_again(ticket, 0.0)

    @rule(runners=st.lists(st.sampled_from(RUNNERS), unique=True))
    def set_runners(self, runners: list[RunnerAddress]) -> None:
        self.ready, self.sick = runners, self.sick & set(runners)
        self.balancer.set_runners(runners)

    @rule(runner=st.sampled_from(RUNNERS))
    def suspect(self, runner: RunnerAddress) -> None:
        is_news = runner in self.ready and runner not in self.sick
        assert self.balancer.suspect(runner) is is_news
        if is_news:
            self.sick.add(runner)

    @rule(runner=st.sampled_from(RUNNERS), hints=st.lists(st.sampled_from(HINTS[1:])))
    def remember_hints(self, runner: RunnerAddress, hints: list[str]) -> None:
        self.balancer.remember_hints(runner, hints)

    @invariant()
    def no_runner_has_more_than_the_limit(self) -> None:
        counts = [list(self.held.values()).count(runner) for runner in RUNNERS]
        assert max(counts) <= self.multiplexing

    @invariant()
    def nobody_waits_while_a_runner_has_room(self) -> None:
        has_room = any(
            list(self.held.values()).count(runner) < self.multiplexing
            for runner in self.ready
            if runner not in self.sick
        )
        assert not (has_room and self.waiting)

    @invariant()
    def the_load_is_what_is_there(self) -> None:
        load = self.balancer.load(1.0)
        assert load.waiting == len(self.waiting)
        assert load.in_flight == len(self.held) == sum(load.per_runner.values())
        for ticket in self.waiting:
            assert ticket.runner is None
        for runner in RUNNERS:
            assert (runner in self.balancer) == (runner in self.ready or runner in self.held.values())

    def teardown(self) -> None:
        """Everyone who waits is served in the end, in order."""
        if not hasattr(self, "balancer"):
            return
        fresh = RunnerAddress("fresh", "/run/fresh")
        self.ready = [fresh]
        self.balancer.set_runners([fresh])
        while self.held:
            self.finish_first()
        assert not self.waiting
        assert self.balancer.load(0.0) == Load(0, 0, 0.0, {"fresh": 0})

    def finish_first(self) -> None:
        ticket = min(self.held, key=lambda one: one.number)
        del self.held[ticket]
        self.balancer.leave(ticket)


AnyOrder.TestCase.settings = settings(max_examples=200, stateful_step_count=40)
test_every_order_of_events_keeps_the_promises = AnyOrder.TestCase


def test_the_least_loaded_runner_is_chosen_and_equals_take_turns() -> None:
    line = Line(multiplexing=3)
    line.balancer.set_runners([A, B, C])

    assert [line.ask().holder for _ in range(4)] == [A, B, C, A]
    assert line.balancer.load(0.0).per_runner == {"a": 2, "b": 1, "c": 1}


def test_a_free_runner_with_the_hint_is_preferred_even_if_another_has_less_to_do() -> None:
    line = Line(multiplexing=2)
    line.balancer.set_runners([A, B])
    line.balancer.remember_hints(B, ["lora-1", "lora-2"])

    assert [line.ask("lora-1").holder for _ in range(2)] == [B, B]


def test_nobody_waits_for_the_hinted_runner_while_another_is_free() -> None:
    line = Line(multiplexing=1)
    line.balancer.set_runners([A, B])
    line.balancer.remember_hints(B, ["lora"])

    assert [line.ask("lora").holder for _ in range(2)] == [B, A]


def test_only_the_last_hints_count_and_a_part_of_one_is_none() -> None:
    line = Line(multiplexing=9)
    line.balancer.set_runners([A, B])
    line.balancer.remember_hints(B, ["old"])
    line.balancer.remember_hints(B, ["new-model"])

    assert line.ask("new").holder == A
    assert line.ask("new-model").holder == B
    assert line.ask("old").holder == A


def test_the_oldest_wait_is_told() -> None:
    line = Line(multiplexing=1)
    line.ask(now=10.0)
    line.ask(now=12.0)

    assert line.balancer.load(15.0) == Load(2, 0, 5.0, {})


def test_one_that_tries_again_stands_before_those_that_came_later() -> None:
    line = Line(multiplexing=1, max_waiting=1)
    line.balancer.set_runners([A])
    first, second = line.ask(), line.ask()
    line.balancer.suspect(A)
    line.balancer.ask_again(first, 1.0)

    line.balancer.set_runners([B])

    assert line.granted == [first]
    line.balancer.leave(first)
    assert line.granted == [first, second]


def test_a_suspected_runner_gets_nothing_new_until_it_was_taken_off_the_list() -> None:
    line = Line(multiplexing=1)
    line.balancer.set_runners([A])
    assert line.balancer.suspect(A)
    waiting = line.ask()

    line.balancer.set_runners([A])
    assert waiting.runner is None

    line.balancer.set_runners([])
    line.balancer.set_runners([A])
    assert waiting.runner == A


@pytest.mark.parametrize("options", [{"multiplexing": 0}, {"max_waiting": -1}])
def test_numbers_that_are_too_small_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        Balancer(on_grant=print, **options)


def test_a_ticket_that_waits_has_no_holder() -> None:
    with pytest.raises(ValueError, match="no runner"):
        _ = Line().ask().holder
