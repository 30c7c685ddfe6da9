"""Handles on every host that has processes of its own: as arguments, elsewhere, and gone."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest

import fal_notebook as fal
from fal_agent.errors import FalServerlessError
from fal_notebook.handles import Handle
from fal_notebook.hosts import registry

if TYPE_CHECKING:
    from support.cells import CellNotebook

SIZE = 2_000_000


@pytest.fixture
def big(notebook: CellNotebook) -> Handle:
    """A handle on 2 MB of zeros."""
    notebook.run(f"import os\nhome = os.getpid()\nbig = bytearray({SIZE})")
    handle: Handle = notebook.here["big"]
    return handle


def test_a_function_is_given_the_value_itself(notebook: CellNotebook, big: Handle) -> None:
    """It runs in the session's own process then, and what it changes is changed there."""

    @fal.function(host=notebook.host)
    def touch(value: Any, others: dict[str, list[Any]]) -> tuple[int, bool, int]:
        import os

        value[0] = 7
        return len(value), others["all"][0] is value, os.getpid()

    assert touch(big, {"all": [big]}) == (SIZE, True, notebook.here["home"])
    notebook.run("first = big[0]")
    assert notebook.here["first"] == 7


def test_a_function_elsewhere_on_the_host_gets_a_copy(notebook: CellNotebook, big: Handle) -> None:
    @fal.function(host=notebook.host)
    def measure(_number: int) -> tuple[int, int]:
        import os

        return len(big), os.getpid()

    notebook.run("big[0] = 1")
    ((size, process),) = measure.map([1])
    assert size == SIZE
    assert process > 0


def test_handles_in_containers_are_values_in_cells(notebook: CellNotebook, big: Handle) -> None:
    notebook.here["held"] = {"it": [big]}
    notebook.run("same = held['it'][0] is big\nlength = len(held['it'][0])")
    assert (notebook.here["same"], notebook.here["length"]) == (True, SIZE)
    assert notebook.here["held"]["it"][0] is big


def test_a_handle_goes_to_another_session_and_may_be_deleted(notebook: CellNotebook, big: Handle) -> None:
    notebook.run("big[1] = 5")
    moved = big.to(notebook.host, session="other")
    notebook.here["copy"] = moved
    notebook.run("second = copy[1]", "--session other")
    assert notebook.here["second"] == 5
    big.delete()
    with pytest.raises(FalServerlessError, match=r"'big' stayed on .* is gone"):
        big.get()
    assert moved.get()[1] == 5


def test_a_handle_goes_to_another_host(notebook: CellNotebook, big: Handle) -> None:
    """Also as an argument: it is relayed, in pieces."""
    other = registry.get_host("local" if notebook.host.name != "local" else "inline")

    @fal.function(host=other)
    def length(value: Any) -> int:
        return len(value)

    assert length(big) == SIZE


def test_a_cell_on_another_host_gets_a_copy_once(notebook: CellNotebook, big: Handle) -> None:
    notebook.run("start = len(big)", "--session elsewhere")
    notebook.run("kept = big", "--session elsewhere")
    notebook.run("same = kept is big, big[0]", "--session elsewhere")
    assert (notebook.here["start"], notebook.here["same"]) == (SIZE, (True, 0))
    notebook.run("big[0] = 3")
    notebook.run("now = big[0]", "--session elsewhere")
    assert notebook.here["now"] == 3
    assert notebook.here["big"] is big


def test_a_large_value_comes_in_pieces(notebook: CellNotebook) -> None:
    notebook.run("import hashlib\nlong = os.urandom(40 << 20) if (os := __import__('os')) else b''")
    notebook.run("digest = hashlib.sha256(long).hexdigest()")
    import hashlib

    assert hashlib.sha256(notebook.here["long"].get()).hexdigest() == notebook.here["digest"]


def test_a_value_that_was_fetched_does_not_go_back(notebook: CellNotebook, big: Handle) -> None:
    notebook.here["big"] = big.get()
    notebook.run("before = big")
    notebook.here["big"][0] = 9
    notebook.run("now, then = big[0], before[0]")
    assert (notebook.here["now"], notebook.here["then"]) == (9, 0)


def test_what_cannot_leave_its_process_says_so(notebook: CellNotebook) -> None:
    notebook.run("items = (i for i in range(3))")
    items = notebook.here["items"]
    with pytest.raises(FalServerlessError, match="cannot be brought here: it cannot be pickled"):
        items.get()

    @fal.function(host=notebook.host)
    def total(numbers: Any) -> int:
        return sum(numbers)

    assert total(items) == 3


def test_a_handle_can_be_kept_and_is_told_when_it_is_of_another_kernel(big: Handle) -> None:
    assert pickle.loads(pickle.dumps(big)).get() == big.get()
    stranger = Handle("box", "kernel-1", "x", version="v", described={"type": "list"}, keeper=None)
    with pytest.raises(FalServerlessError, match="of another kernel"):
        stranger.get()
