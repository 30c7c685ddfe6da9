"""What of the user's SSH configuration only the OpenSSH program can do.

Runs in the notebook; standard library only.
"""

from __future__ import annotations

import base64
import binascii
import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["CANONICALIZE", "UNKNOWN_MATCH", "reason_for_openssh"]

UNKNOWN_MATCH = "falmatch"  # stands in an options' dictionary for a Match that was not understood
CANONICALIZE = "falcanonicalizehostname"  # what paramiko finds instead of that option
KLIST_SECONDS = 5.0

# Options that say something if they are set to anything but these.
_SETTINGS = {
    "bindaddress": (),
    "bindinterface": (),
    CANONICALIZE: ("no", "none"),
    "hostbasedauthentication": ("no",),
    "knownhostscommand": ("none",),
    "pkcs11provider": ("none",),
    "proxyusefdpass": ("no",),
    "revokedhostkeys": ("none",),
    "verifyhostkeydns": ("no",),
}


def reason_for_openssh(options: Any, keys: Iterable[Path], *, keys_given: bool) -> str:
    """Say why paramiko cannot do what the configuration asks for; "" if it can.

    Args:
        options: what the configuration says about the machine, by lower-case names.
        keys: the key files.
        keys_given: whether the configuration names them.
    """
    if UNKNOWN_MATCH in options:
        return f"the configuration has `Match {options[UNKNOWN_MATCH]}`"
    for option, harmless in _SETTINGS.items():
        value = str(options.get(option, "")).lower()
        if value and value not in harmless:
            return f"the configuration sets {option.removeprefix('fal')}"
    existing = [key for key in keys if os.path.isfile(key)]  # noqa: PTH113 - no name is too long for it
    security = [key for key in existing if _is_security_key(key)]
    if security and (keys_given or len(security) == len(existing)):
        return f"{security[0]} is on a security key"
    if str(options.get("gssapiauthentication", "no")).lower() == "yes" and _has_ticket():
        return "there is a Kerberos ticket, and GSSAPIAuthentication is on"
    return ""


def _is_security_key(file: Path) -> bool:
    """Whether a key file only stands for a key in a device; its kind is readable even if it is locked."""
    try:
        text = file.read_text("ascii", "ignore")
        lines = [line for line in text.splitlines() if not line.startswith("-----")]
        return b"sk-" in base64.b64decode("".join(lines)[:400])[:200]
    except (OSError, binascii.Error):
        return False


def _has_ticket() -> bool:
    program = shutil.which("klist")
    if program is None:
        return False
    try:
        done = subprocess.run(
            [program, "-s"], stdin=subprocess.DEVNULL, capture_output=True, timeout=KLIST_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
