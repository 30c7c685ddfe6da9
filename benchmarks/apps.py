"""Measure apps of fal_notebook beside uvicorn behind `ssh -L` and Ray Serve (`make bench-apps`).

The same application and the same client for all, in one run on one machine; see `calls.py` for how rounds go.
`--write FOLDER` puts tables into benchmarks.md there, and all figures into benchmarks-apps.json.
"""

from __future__ import annotations

import sys

from report import APP_TARGETS
from rounds import run_rounds

SUBJECTS = {
    "bare": ["app_servers.py", "bare"],
    "ssh": ["app_servers.py", "ssh"],
    "local": ["app_servers.py", "local"],
    "ray": ["app_servers.py", "ray"],
}
BY_SSH = {"bare": "ssh", "ssh": "ssh"}  # subjects that need the server, by what of it

if __name__ == "__main__":
    sys.exit(run_rounds(str(__doc__), SUBJECTS, APP_TARGETS, by_ssh=BY_SSH, section="apps"))
