"""One app is current; another takes its place when it is set up, and the old one ends when it is done."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest

import fal_notebook as fal
from fal_agent.errors import FalServerlessError
from fal_agent.serving.tenancy import Tenancy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine


class Tenant(fal.App):
    """An app that keeps a diary; its diary, and what holds it up, are given to it."""

    def setup(self) -> None:
        self.diary.append(f"{self.label} setup {os.environ['FAL_RUNNER_STATE']}")
        self.on_setup()

    def handle_exit(self) -> None:
        self.diary.append(f"{self.label} told")

    def teardown(self) -> None:
        self.diary.append(f"{self.label} teardown")

    @fal.endpoint("/")
    async def who(self) -> str:
        return str(self.label)

    @fal.endpoint("/slow")
    async def slow(self) -> str:
        self.began.set()
        await self.may_finish.wait()
        return str(self.label)


def tenant(label: str, diary: list[str], on_setup: Callable[[], Any] = lambda: None) -> Any:
    app: Any = Tenant(_allow_init=True)
    app.label, app.diary, app.on_setup = label, diary, on_setup
    app.began, app.may_finish = asyncio.Event(), asyncio.Event()
    return app


class House:
    """A tenancy that is open, with a client."""

    def __init__(self, tenancy: Tenancy) -> None:
        self.tenancy = tenancy
        transport = httpx.ASGITransport(tenancy.application)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://app")

    async def ask(self, path: str = "/") -> str:
        answer = await self.client.post(path)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()
        return text

    def swap(self, app: Any, **more: Any) -> asyncio.Future[None]:
        return asyncio.wrap_future(self.tenancy.swap(app, **more))


@asynccontextmanager
async def house(first: Any, **options: Any) -> AsyncIterator[House]:
    tenancy = Tenancy(first, **options)
    async with tenancy.lasting(lambda: False):
        tenancy.open()
        yield House(tenancy)


def running(scenario: Callable[[list[str]], Coroutine[Any, Any, None]]) -> list[str]:
    """Run something with a diary, and give that."""
    diary: list[str] = []

    async def main() -> None:
        await asyncio.wait_for(scenario(diary), 30)

    asyncio.run(main())
    return diary


def test_the_first_app_is_set_up_before_and_torn_down_after() -> None:
    async def scenario(diary: list[str]) -> None:
        async with house(tenant("a", diary)) as open_house:
            assert await open_house.ask() == "a"
            diary.append("served")

    assert running(scenario) == ["a setup SETUP", "served", "a teardown"]


def test_a_swap_loses_nothing_and_ends_the_old_one_when_it_is_done() -> None:
    async def scenario(diary: list[str]) -> None:
        old, new = tenant("old", diary), tenant("new", diary)
        async with house(old) as open_house:
            slow = asyncio.ensure_future(open_house.ask("/slow"))
            await old.began.wait()
            is_current = asyncio.Event()
            done = open_house.swap(new, on_current=is_current.set)
            await is_current.wait()
            assert await open_house.ask() == "new"
            assert not done.done()
            old.may_finish.set()
            assert await slow == "old"
            await done

    diary = running(scenario)
    assert diary == [
        *("old setup SETUP", "new setup SETUP", "old told", "old teardown"),
        *("new teardown",),
    ]


def test_the_old_one_answers_while_the_new_one_is_set_up() -> None:
    async def scenario(diary: list[str]) -> None:
        may_be_ready = threading.Event()
        async with house(tenant("old", diary)) as open_house:
            done = open_house.swap(tenant("new", diary, on_setup=lambda: may_be_ready.wait(20)))
            assert await open_house.ask() == "old"  # the loop is free, though setup() waits in a thread
            may_be_ready.set()
            await done
            assert await open_house.ask() == "new"
            assert os.environ["FAL_RUNNER_STATE"] == "RUNNING"

    running(scenario)


def test_a_setup_that_fails_leaves_the_old_one() -> None:
    def fail() -> None:
        raise LookupError("no weights")

    async def scenario(diary: list[str]) -> None:
        async with house(tenant("old", diary)) as open_house:
            with pytest.raises(LookupError, match="no weights"):
                await open_house.swap(tenant("new", diary, on_setup=fail))
            assert await open_house.ask() == "old"

    assert running(scenario)[-1] == "old teardown"


def test_a_setup_that_would_end_the_process_leaves_the_old_one() -> None:
    def leave() -> None:
        raise SystemExit(3)

    async def scenario(diary: list[str]) -> None:
        async with house(tenant("old", diary)) as open_house:
            with pytest.raises(FalServerlessError, match=r"SystemExit\(3\); the app before it stays"):
                await open_house.swap(tenant("new", diary, on_setup=leave))
            assert await open_house.ask() == "old"

    running(scenario)


def test_a_teardown_that_fails_is_told_and_the_new_one_serves() -> None:
    async def scenario(diary: list[str]) -> None:
        old = tenant("old", diary)

        def fail() -> None:
            raise OSError("cannot close")

        async with house(old) as open_house:
            old.teardown = fail
            with pytest.raises(OSError, match="cannot close"):
                await open_house.swap(tenant("new", diary))
            assert await open_house.ask() == "new"

    running(scenario)


def test_swaps_follow_one_another() -> None:
    async def scenario(diary: list[str]) -> None:
        async with house(tenant("a", diary)) as open_house:
            await asyncio.gather(*(open_house.swap(tenant(label, diary)) for label in "bc"))
            assert await open_house.ask() == "c"

    diary = running(scenario)
    assert diary.index("b setup SETUP") < diary.index("c setup SETUP") < diary.index("b teardown")
    assert diary[-1] == "c teardown"
    assert sorted(entry for entry in diary if "teardown" in entry) == [f"{one} teardown" for one in "abc"]


def test_requests_of_the_old_one_are_cut_off_when_its_time_is_over() -> None:
    async def scenario(diary: list[str]) -> None:
        old = tenant("old", diary)
        async with house(old, drain_seconds=0.01) as open_house:
            slow = asyncio.ensure_future(open_house.ask("/slow"))
            await old.began.wait()
            await open_house.swap(tenant("new", diary))
            with pytest.raises(asyncio.CancelledError):
                await slow

    assert running(scenario).count("old teardown") == 1


def test_nobody_takes_over_before_or_after() -> None:
    async def scenario(diary: list[str]) -> None:
        tenancy = Tenancy(tenant("old", diary))
        with pytest.raises(FalServerlessError, match="the server is not serving"):
            tenancy.swap(tenant("new", diary)).result(5)
        async with tenancy.lasting(lambda: False):
            tenancy.open()
            tenancy.tell()
            tenancy.tell()
            with pytest.raises(FalServerlessError, match="has begun to end"):
                tenancy.swap(tenant("new", diary)).result(5)

    assert running(scenario) == ["old setup SETUP", "old told", "old teardown"]


def test_the_end_does_not_wait_for_a_setup() -> None:
    async def scenario(diary: list[str]) -> None:
        is_setting_up, may_be_ready = threading.Event(), threading.Event()

        def wait() -> None:
            is_setting_up.set()
            may_be_ready.wait(20)

        async with house(tenant("old", diary)) as open_house:
            done = open_house.swap(tenant("new", diary, on_setup=wait))
            await asyncio.to_thread(is_setting_up.wait, 20)
        with pytest.raises(FalServerlessError, match="Spawn it anew"):
            await done
        may_be_ready.set()

    assert running(scenario)[-1] == "old teardown"
