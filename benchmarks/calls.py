"""Measure calls of fal_notebook beside its peers and a floor, in one run on one machine (`make bench`).

Each round starts every subject once, one after the other, as a process group of its own that is
ended afterwards. Ratios are taken within a round, so that a busy minute of the machine hits both
sides. `--write FOLDER` puts tables into benchmarks.md there, and all figures into benchmarks-calls.json.
"""

from __future__ import annotations

import sys

from report import TARGETS
from rounds import run_rounds

SUBJECTS = {
    "floor": ["floor.py"],
    "local": ["ours.py", "local"],
    "loky": ["peers.py", "loky"],
    "execnet": ["peers.py", "execnet"],
    "ipyparallel": ["peers.py", "ipyparallel"],
    "dask": ["peers.py", "dask"],
    "ray": ["peers.py", "ray"],
    "ssh": ["ours.py", "ssh"],
    "far": ["ours.py", "far"],
    "environments": ["ours.py", "environments"],
    "imports": ["ours.py", "imports"],
}
BY_SSH = {"ssh": "ssh", "far": "far"}  # subjects that need the SSH server, by the way to it

if __name__ == "__main__":
    sys.exit(run_rounds(str(__doc__), SUBJECTS, TARGETS, by_ssh=BY_SSH, section="calls"))
