"""One round of `cells.py`: a kernel, and what arrives at a front end when.

Only what is sent on the kernel's publishing channel counts: what a browser makes of it is its own.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

from jupyter_client.manager import start_new_kernel
from timing import Figures, p50, p95, report

if TYPE_CHECKING:
    from collections.abc import Callable

LINES, WIDTH = 1_000_000, 100  # bytes of a line, with its end
PRINTED = f"for _ in range({LINES}):\n    print('{'x' * (WIDTH - 1)}')"
BACKGROUND, BACKGROUND_LINES = 50, 200
PATIENCE = 300.0  # seconds


class FrontEnd:
    """What a front end does: sends cells and hears what is published."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def run(self, code: str, hear: Callable[[str, dict[str, Any]], None] | None = None) -> float:
        """Run a cell; give the seconds until the kernel is idle again."""
        started = time.perf_counter()
        message_id = self._client.execute(code, allow_stdin=False, store_history=False)
        while True:
            message = self._client.get_iopub_msg(timeout=PATIENCE)
            kind, content = message["msg_type"], message["content"]
            if hear is not None:
                hear(kind, content)
            if message["parent_header"].get("msg_id") != message_id:
                continue
            if kind == "error":
                raise RuntimeError(f"{content['ename']}: {content['evalue']}")
            if kind == "status" and content["execution_state"] == "idle":
                return time.perf_counter() - started


def small_cells(front: FrontEnd) -> Figures:
    """A cell that does nothing."""
    plain, ours = [], []
    for number in range(60):
        seconds = front.run("pass"), front.run("%%fal\npass")
        if number >= 20:
            plain.append(seconds[0])
            ours.append(seconds[1])
    return {"plain cell p50": p50(plain), "%%fal cell p50": p50(ours), "%%fal cell p95": p95(ours)}


def print_latency(front: FrontEnd) -> Figures:
    """From the moment before a print to its arrival here."""
    taken: list[float] = []

    def hear(kind: str, content: dict[str, Any]) -> None:
        if kind == "stream":
            now = time.time()
            taken.extend(now - float(text) for text in re.findall(r"\d+\.\d+", content["text"]))

    front.run("%%fal\nimport time\nfor _ in range(60):\n    print(time.time())\n    time.sleep(0.05)", hear)
    return {"print to front end p50": p50(taken), "print to front end p95": p95(taken)}


def much_text(front: FrontEnd) -> Figures:
    """100 MB in short lines."""
    return {
        "plain cell prints 100 MB": front.run(PRINTED),
        "%%fal cell prints 100 MB": front.run(f"%%fal\n{PRINTED}"),
    }


def background_cells(front: FrontEnd) -> Figures:
    """Cells in the background that print at once; each is to show its own lines, in order."""
    shown: dict[str, str] = {}

    def hear(kind: str, content: dict[str, Any]) -> None:
        if kind in ("display_data", "update_display_data"):
            shown[content["transient"].get("display_id", "")] = content["data"]["text/plain"]

    started = time.perf_counter()
    for cell in range(BACKGROUND):
        code = f"for line in range({BACKGROUND_LINES}):\n    print({cell}, line)"
        front.run(f"%%fal --background --no-return --session s{cell % 2} -o run{cell}\n{code}", hear)
    front.run(f"for cell in range({BACKGROUND}):\n    globals()[f'run{{cell}}'].result()", hear)
    expected = {"\n".join(f"{cell} {line}" for line in range(BACKGROUND_LINES)) for cell in range(BACKGROUND)}
    while not expected <= {text.partition("\n")[2] for text in shown.values()}:
        if time.perf_counter() - started > PATIENCE:
            raise AssertionError("lines of background cells were lost")
        front.run("pass", hear)
    return {f"{BACKGROUND} background cells": time.perf_counter() - started}


def main() -> None:
    """Measure one round."""
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        front = FrontEnd(client)
        front.run("%load_ext fal_notebook")
        front.run("%%fal\npass")
        figures = {**small_cells(front), **print_latency(front), **much_text(front)}
        report({**figures, **background_cells(front)})
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


if __name__ == "__main__":
    main()
