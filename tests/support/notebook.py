"""A notebook's namespace, and an interpreter that is not the notebook's, for tests of what travels."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fal_agent import pickling
from fal_notebook import payload

if TYPE_CHECKING:
    from fal_notebook.payload import Packed

__all__ = ["Notebook", "call_elsewhere"]

AGENT = Path(pickling.__file__).parent.parent
LIBRARY = Path(payload.__file__).parent.parent


class Notebook:
    """A notebook's namespace: what its cells define belongs to `__main__`."""

    def __init__(self) -> None:
        self.module = sys.modules["__main__"]
        self._before = dict(vars(self.module))

    def run(self, source: str, **names: Any) -> None:
        vars(self.module).update(names)
        exec(source, vars(self.module))

    def __getitem__(self, name: str) -> Any:
        return getattr(self.module, name)

    def close(self) -> None:
        for name in list(vars(self.module)):
            if name not in self._before:
                delattr(self.module, name)


def call_elsewhere(packed: Packed, *args: Any) -> Any:
    """Call a packed function in an interpreter that has neither this folder nor this notebook."""
    code = (
        "import pickle, sys\nfrom fal_agent import pickling\n"
        "parts, args = pickle.load(sys.stdin.buffer)\nfunction, setup = pickling.load(parts)\n"
        "sys.stdout.buffer.write(pickle.dumps(function(*args)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(([bytes(part) for part in packed.parts], args)),
        capture_output=True, timeout=60, check=False, cwd="/", env={"PYTHONPATH": f"{AGENT}:{LIBRARY}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return pickle.loads(done.stdout)
