"""Call a function and carry what it gives to its end: coroutines, generators, chunks of a map.

Runs in workers, and in the notebook for the host that is the notebook itself, so that a call means
the same on both.
"""

from __future__ import annotations

import inspect
import threading
from typing import TYPE_CHECKING, Any

from fal_agent import failures, pickling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fal_agent.framing import Buffer

__all__ = ["complete", "dump_result", "run_chunk", "run_coroutine", "stream", "stream_async"]


def complete(value: Any) -> Any:
    """Run a coroutine to its end; anything else is already complete."""
    if inspect.iscoroutine(value):
        return run_coroutine(value)
    if inspect.isawaitable(value):

        async def wait() -> Any:
            return await value

        return run_coroutine(wait())
    return value


def run_coroutine(coroutine: Any) -> Any:
    """Run a coroutine to its end, in a thread of its own where an event loop is running.

    Raises:
        BaseException: what the coroutine raises.
    """
    import asyncio  # costs a worker's start 16 ms, and most functions have no need of it

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = asyncio.run(coroutine)
        except BaseException as error:  # noqa: BLE001 - raised again where it belongs
            outcome["error"] = error

    thread = threading.Thread(target=run, name="fal-coroutine", daemon=True)
    thread.start()
    thread.join()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def run_chunk(
    function: Callable[..., Any], first: tuple[Any, ...], chunk: list[tuple[Any, ...]]
) -> tuple[Any, ...]:
    """Call a function for each item of a chunk.

    Args:
        function: the function.
        first: arguments before the item's own: what the setup function made, if there is one.
        chunk: positional arguments of each call.

    Returns:
        The values; kind, message and detail of the failure that ended the chunk, or None; its data.
    """
    values: list[Any] = []
    for item in chunk:
        try:
            value = complete(function(*first, *item))
            values.append(list(value) if inspect.isgenerator(value) else value)
        except Exception as error:  # noqa: BLE001, PERF203 - reported at its item's turn
            kind, message, detail, parts = failures.describe(error)
            return values, (kind, message, detail), [bytes(part) for part in parts]
    return values, None, []


def dump_result(value: Any, label: str) -> Sequence[Buffer]:
    """Pickle what a function gave.

    Raises:
        FalSerializationError: it cannot be pickled.
    """
    return pickling.dump(value, what=f"the result of {label}()")


def stream(items: Any, label: str, send: Callable[[Sequence[Buffer]], None]) -> Any:
    """Send a generator's items as it makes them; give its return value.

    Args:
        items: the generator, closed in any case.
        label: the function's name.
        send: takes the pickle of one item, and waits until there is room for it.
    """
    try:
        while True:
            try:
                item = next(items)
            except StopIteration as end:
                return end.value
            send(pickling.dump(item, what=f"an item of {label}()"))
    finally:
        items.close()


async def stream_async(items: Any, label: str, send: Callable[[Sequence[Buffer]], None]) -> None:
    """Send an asynchronous generator's items as it makes them; arguments as for `stream`."""
    try:
        async for item in items:
            send(pickling.dump(item, what=f"an item of {label}()"))
    finally:
        await items.aclose()
