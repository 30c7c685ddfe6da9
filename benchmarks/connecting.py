"""Measure how soon a prepared SSH host gives a new process its first result (`make bench-connecting`).

Beside it stands what `ssh HOST true` takes, whose connection is made anew as well. `--write FOLDER` puts
tables into benchmarks.md there, and all figures into benchmarks-connecting.json.
"""

from __future__ import annotations

import sys

from report import CONNECTING_TARGETS
from rounds import run_rounds

SUBJECTS = {"paramiko": ["connecting_work.py", "paramiko"], "openssh": ["connecting_work.py", "openssh"]}

if __name__ == "__main__":
    ways = dict.fromkeys(SUBJECTS, "ssh")
    sys.exit(run_rounds(str(__doc__), SUBJECTS, CONNECTING_TARGETS, by_ssh=ways, section="connecting"))
