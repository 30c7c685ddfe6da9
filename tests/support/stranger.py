"""A second real account of this machine, without privileges, and what tests have it try."""

from __future__ import annotations

import json
import pwd
import subprocess
from typing import Any

from support.sshd import provide_user

__all__ = ["POST", "as_stranger"]

STRANGER = "falstranger"

# Posts to the URL it is given, and prints the status and what was said of a refusal.
POST = """
import json, sys, urllib.error, urllib.request
try:
    request = urllib.request.Request(json.load(sys.stdin), data=b"", method="POST")
    print(urllib.request.urlopen(request).status)
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
"""


def as_stranger(code: str, given: Any = None, python: str = "/usr/bin/python3") -> str:
    """Run a program of Python as the second account; give what it printed."""
    provide_user(STRANGER)
    account = pwd.getpwnam(STRANGER)
    done = subprocess.run(
        [python, "-I", "-c", code],
        input=json.dumps(given),
        user=account.pw_uid,
        group=account.pw_gid,
        extra_groups=[],
        cwd="/",
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout
