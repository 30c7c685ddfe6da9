"""Tab and Shift-Tab in a cell that is to run on a host: its session is asked, if it can answer at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support.kernel import Kernel, working_kernel
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("ipykernel")


@pytest.fixture(scope="module")
def kernel(own_folders: Path) -> Iterator[Kernel]:
    with working_kernel() as kernel:
        kernel.run("notebook_value = [1]")
        yield kernel


def complete(kernel: Kernel, code: str) -> dict[str, Any]:
    """What a front end gets for Tab at the end of the code."""
    content: dict[str, Any] = kernel._client.complete(code, len(code), reply=True, timeout=30)["content"]
    return content


def inspect(kernel: Kernel, code: str, detail: int = 0) -> str:
    """What a front end shows for Shift-Tab at the end of the code."""
    reply = kernel._client.inspect(code, len(code), detail, reply=True, timeout=30)["content"]
    return str(reply["data"].get("text/plain", ""))


def test_nothing_is_started_or_connected_for_tab(kernel: Kernel) -> None:
    assert complete(kernel, "%%fal\nnotebook_va")["matches"] == ["notebook_value"]
    assert "list" in inspect(kernel, "%%fal\nnotebook_value")
    assert kernel.run(
        "from fal_notebook.hosts import registry\nregistry.get_host('local').is_connected"
    ).result == ("False")


def test_the_names_of_the_session_are_known(kernel: Kernel) -> None:
    kernel.run(
        "%%fal --no-return\nclass Remote:\n    def far_method(self, a, b=2):\n"
        "        'Does it there.'\nremote_value = Remote()\nnotebook_there = 1"
    )
    code = "%%fal\nx = 1\nremote_value.far_m"
    until(lambda: complete(kernel, code)["matches"], seconds=60)  # the first answer may come too late
    reply = complete(kernel, code)
    assert [code[: reply["cursor_start"]] + match for match in reply["matches"]] == [f"{code}ethod"]
    assert "Does it there." in inspect(kernel, "%%fal\nremote_value.far_method")
    assert "Source:" in inspect(kernel, "%%fal\nremote_value.far_method", 1)
    both = ["notebook_there", "notebook_value"]
    until(lambda: complete(kernel, "%%fal\nnotebook_")["matches"] == both, seconds=60)


def test_other_cells_lines_and_sessions_are_left_alone(kernel: Kernel) -> None:
    assert "remote_value" not in complete(kernel, "remote_v")["matches"]
    assert "--session" in complete(kernel, "%%fal --se")["matches"]
    assert complete(kernel, "%%fal --session other\nremote_v")["matches"] == []
    assert complete(kernel, "%%fal --nonsense\nremote_v")["matches"] == []


def test_a_session_that_is_busy_is_not_waited_for(kernel: Kernel) -> None:
    kernel.run("%%fal --background -o busy\nimport time\nwhile True: time.sleep(0.01)")
    assert complete(kernel, "%%fal\nnotebook_")["matches"] == ["notebook_value"]
    kernel.run("busy.cancel()")
