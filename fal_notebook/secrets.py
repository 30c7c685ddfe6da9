"""The values that `secrets=["NAME"]` stands for: from the environment, the keyring, or Colab's secrets.

Runs in the notebook. Values are looked up at each call, so that a new one counts at once; what the
keyring gave is remembered for a minute in this process. They are in no message and no `repr`.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any

from fal_agent.errors import ConfigurationError
from fal_notebook.credentials import colab_secret

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["KEYRING_SERVICE", "check_names", "read_secrets"]

KEYRING_SERVICE = "fal_notebook"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OURS = re.compile(r"PATH|HOME|LD_\w+|PYTHON\w*|CUDA_VISIBLE_DEVICES|FAL_NOTEBOOK_\w*|FAL_PERSISTENT_DIR")
_LARGEST = 64 << 10  # bytes; Linux takes twice that for one variable
_REMEMBERED = 60.0  # seconds

_from_keyring: dict[str, tuple[float, str]] = {}


def check_names(name: str, value: Any) -> list[str]:
    """Accept a list of names that environment variables of user code can have.

    Raises:
        ValueError: it is something else; a value that was given by mistake is not repeated.
    """
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name} must be a list of names of secrets, such as {name}=['HF_TOKEN'].")
    for index, item in enumerate(value):
        if not _NAME.fullmatch(item):
            raise ValueError(
                f"{name} holds names of environment variables, not values: item {index} cannot be a name "
                "(letters, digits and _)."
            )
        if _OURS.fullmatch(item):
            raise ValueError(f"{name}: {item} is what a worker itself runs by, and cannot be a secret.")
    return list(dict.fromkeys(value))


def read_secrets(names: Sequence[str], *, what: str) -> dict[str, str]:
    """Give the value of each secret, by name.

    Each is the environment variable of this process; if there is none, the user `NAME` of the service
    "fal_notebook" in the keyring, where the `keyring` package is installed; else, in Google Colab, the
    notebook's secret. One that is empty is not set.

    Args:
        names: as `check_names` gives them.
        what: who asks for them, for the message.

    Raises:
        ConfigurationError: one is not set, or cannot be a variable.
    """
    return {name: _read(name, what) for name in names}


def _read(name: str, what: str) -> str:
    value = os.environ.get(name) or _keyring_secret(name) or colab_secret(name)
    if not value:
        installed = "keyring" in sys.modules
        raise ConfigurationError(
            f"{what} asks for the secret {name}, which is not set here. Set it in this notebook:\n"
            f"    import getpass, os; os.environ[{name!r}] = getpass.getpass()\n"
            f"or keep it in the keyring{'' if installed else ' (pip install keyring)'}:\n"
            f"    keyring set {KEYRING_SERVICE} {name}"
        )
    if "\0" in value or len(value.encode("utf-8", "surrogateescape")) > _LARGEST:
        raise ConfigurationError(
            f"the secret {name} cannot be an environment variable: it holds a NUL or more than 64 KiB"
        )
    return value


def _keyring_secret(name: str) -> str | None:
    """What the keyring has under a name; None without a keyring that works."""
    now = time.monotonic()
    known = _from_keyring.get(name)
    if known is not None and now - known[0] < _REMEMBERED:
        return known[1]
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError:
        return None
    value = None
    with contextlib.suppress(KeyringError):  # no backend, or locked: as if it were not there
        value = keyring.get_password(KEYRING_SERVICE, name)
    if value:
        _from_keyring[name] = (now, value)
    return value
