"""Many cells in the background at once: each keeps its own output, complete and in order."""

from __future__ import annotations

import pytest
from support.kernel import start_kernel

COUNT = 50
LINES = 40

pytestmark = pytest.mark.timeout(300)


def test_fifty_cells_in_the_background_do_not_mix_their_output() -> None:
    with start_kernel() as kernel:
        kernel.run("%%fal\nimport sys, time")
        # Errors and output of one cell go to one place; a pause lets the others' output be drawn between.
        cells = [
            kernel.run(
                f"%%fal -o run{number} --background\n"
                f"for line in range({LINES}):\n"
                f"    print('cell {number} line', line, file=(sys.stdout, sys.stderr)[line % 2])\n"
                f"    time.sleep(0.001)\n"
                f"'value {number}'"
            )
            for number in range(COUNT)
        ]
        kernel.run(f"for number in range({COUNT}): globals()[f'run{{number}}'].result()")
        for number, cell in enumerate(cells):
            kernel.wait_for(cell, f"cell {number} line {LINES - 1}")
            kernel.wait_for(cell, "background: done")
            text = cell.outputs[0]["data"]["text/plain"]
            said = [line for line in text.splitlines() if line.startswith("cell ")]
            assert said == [f"cell {number} line {line}" for line in range(LINES)]
            assert f"value {number}" in str(cell.outputs[1:])
        kernel.run("%fal stop --all")
