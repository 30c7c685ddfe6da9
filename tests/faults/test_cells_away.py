"""Cells that are run while their host is away, in a real kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.kernel import PATH, Kernel, start_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.sshd import SSHServer

pytest.importorskip("ipykernel")


@pytest.fixture
def kernel(ssh_server: SSHServer, tmp_path: Path) -> Iterator[Kernel]:
    """A kernel with a session on the server, which has gone away since."""
    with start_kernel(PYTHONPATH=PATH, working_folder=tmp_path) as kernel:
        kernel.run("%load_ext fal_notebook\nimport fal_notebook as fal")
        assert kernel.run("%%fal --host far-box\nx = 1\nx").result == "1"
        ssh_server.stop_listening()
        yield kernel
        ssh_server.restart()
        kernel.run("%fal stop far-box")


def test_a_cell_waits_and_goes_on_with_its_names(kernel: Kernel, ssh_server: SSHServer) -> None:
    cell = kernel.start("%%fal --host far-box\nx += 1\nprint('here')\nx", stdin=True)
    kernel.wait_for(cell, "'far-box' is lost; connecting again until")
    kernel.wait_for(cell, "waiting for far-box")  # instead of how long it has been running
    ssh_server.restart()
    kernel.wait(cell)

    assert cell.text == "here\n"
    assert cell.result == "2"
    assert "Connected to 'far-box' again" in cell.errors


def test_an_interrupt_ends_the_waiting_at_once(kernel: Kernel, ssh_server: SSHServer) -> None:
    cell = kernel.start("%%fal --host far-box\nx += 1")
    kernel.wait_for(cell, "'far-box' is lost; connecting again until")
    kernel.interrupt()
    kernel.wait(cell, timeout=20)
    assert cell.error.startswith("KeyboardInterrupt")

    ssh_server.restart()
    assert kernel.run("%%fal --host far-box\nx").result == "1"  # it did not run later either
