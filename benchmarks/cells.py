"""Measure `%%fal` cells of a real kernel on the local host, as a front end sees them (`make bench-cells`).

Each round starts one kernel, measures a plain cell beside a `%%fal` cell, and ends it. `--write FOLDER`
puts tables into benchmarks.md there, and all figures into benchmarks-cells.json.
"""

from __future__ import annotations

import sys

from report import CELL_TARGETS
from rounds import run_rounds

SUBJECTS = {"cells": ["cell_work.py"]}

if __name__ == "__main__":
    sys.exit(run_rounds(str(__doc__), SUBJECTS, CELL_TARGETS, by_ssh={}, section="cells"))
