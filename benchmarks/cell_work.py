"""One round of `cells.py`: a kernel, and what arrives at a front end when.

Only what is sent on the kernel's publishing channel counts: what a browser makes of it is its own.
"""

from __future__ import annotations

import re
import resource
import time
from typing import TYPE_CHECKING, Any

from jupyter_client.manager import start_new_kernel
from timing import Figures, p50, p95, report

if TYPE_CHECKING:
    from collections.abc import Callable

LINES, WIDTH = 1_000_000, 100  # bytes of a line, with its end
PRINTED = f"for _ in range({LINES}):\n    print('{'x' * (WIDTH - 1)}')"
BACKGROUND, BACKGROUND_LINES = 50, 200


class FrontEnd:
    """What a front end does: sends cells and hears what is published."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def run(self, code: str, hear: Callable[[str, dict[str, Any]], None] | None = None) -> float:
        """Run a cell; give the seconds until the kernel is idle again."""
        started = time.perf_counter()
        message_id = self._client.execute(code, allow_stdin=False, store_history=False)
        while True:
            message = self._client.get_iopub_msg(timeout=600)
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != message_id:
                continue
            if kind == "error":
                raise RuntimeError(f"{content['ename']}: {content['evalue']}")
            if hear is not None:
                hear(kind, content)
            if kind == "status" and content["execution_state"] == "idle":
                return time.perf_counter() - started


def small_cells(front: FrontEnd) -> Figures:
    """A cell that does nothing."""
    for code in ("pass", "%%fal\npass"):
        for _ in range(5):
            front.run(code)
    plain = [front.run("pass") for _ in range(40)]
    ours = [front.run("%%fal\npass") for _ in range(40)]
    return {
        "plain cell p50": p50(plain),
        "%%fal cell p50": p50(ours),
        "%%fal cell p95": p95(ours),
    }


def print_latency(front: FrontEnd) -> Figures:
    """From the moment before a print to its arrival here; both processes have one clock."""
    taken: list[float] = []

    def hear(kind: str, content: dict[str, Any]) -> None:
        if kind == "stream":
            now = time.time()
            taken.extend(now - float(text) for text in re.findall(r"\d+\.\d+", content["text"]))

    front.run("%%fal\nimport time\nfor _ in range(60):\n    print(time.time())\n    time.sleep(0.05)", hear)
    return {"print to front end p50": p50(taken), "print to front end p95": p95(taken)}


def much_text(front: FrontEnd) -> Figures:
    """100 MB in short lines; and what of it reached the front end."""
    figures: Figures = {}
    for name, code in (("plain", PRINTED), ("%%fal", f"%%fal\n{PRINTED}")):
        shown = 0

        def hear(kind: str, content: dict[str, Any]) -> None:
            nonlocal shown
            shown += len(content["text"]) if kind == "stream" else 0

        figures[f"{name} cell prints 100 MB"] = front.run(code, hear)
        print(name, figures[f"{name} cell prints 100 MB"], "shown", shown)
    return figures


def main() -> None:
    """Measure one round."""
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        front = FrontEnd(client)
        front.run("%load_ext fal_notebook")
        front.run("%%fal\npass")
        report({**small_cells(front), **print_latency(front), **much_text(front)})
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


if __name__ == "__main__":
    main()
