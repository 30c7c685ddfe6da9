"""The key that an app's HTTP surface asks for: made, kept, found, and put into headers.

Runs in the notebook. Nothing is looked up before a function here is called, and a secret is in no
`repr` and no message. SSH keys are another matter, and none of this file's.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fal_agent.errors import ConfigurationError
from fal_notebook import config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["Credentials", "FalServerlessKeyCredentials", "colab_secret", "key_credentials", "make_key"]

_ID = re.compile(r"[!-9;-~]+")  # printable ASCII without blanks and without ":"
_SECRET = re.compile(r"[!-~]+")
_PARTS = ("FAL_KEY_ID", "FAL_KEY_SECRET")
_ID_BYTES, _SECRET_BYTES = 8, 32


class Credentials:
    """Who asks; this one is nobody in particular."""

    def to_headers(self) -> dict[str, str]:
        """Give the HTTP headers that a request carries; a new dict each time."""
        return {}

    def to_grpc(self) -> Any:
        """Give `grpc.ChannelCredentials` for a channel with TLS.

        Raises:
            ImportError: grpcio is not installed.
        """
        return _grpc().ssl_channel_credentials()


@dataclass(frozen=True)
class FalServerlessKeyCredentials(Credentials):
    """A key, as `FAL_KEY` holds it.

    Attributes:
        key_id: names the key; no secret.
        key_secret: proves it; not in the `repr`.

    Raises:
        ValueError: a part is empty, or holds a blank or what is not ASCII; or `key_id` holds a ":".
    """

    key_id: str
    key_secret: str = field(repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.key_id, str) or not _ID.fullmatch(self.key_id):
            raise ValueError("key_id must be printable ASCII without blanks and ':', and not empty")
        if not isinstance(self.key_secret, str) or not _SECRET.fullmatch(self.key_secret):
            raise ValueError("key_secret must be printable ASCII without blanks, and not empty")

    def to_headers(self) -> dict[str, str]:
        """Give the `Authorization` header; a new dict each time."""
        return {"Authorization": f"Key {self.key_id}:{self.key_secret}"}

    def to_grpc(self) -> Any:
        """Give `grpc.ChannelCredentials`: TLS, and the key with every call.

        The key is in the call's metadata as `auth-key` (the secret) and `auth-key-id`.

        Raises:
            ImportError: grpcio is not installed.
        """
        grpc = _grpc()
        metadata = (("auth-key", self.key_secret), ("auth-key-id", self.key_id))

        def add_key(_context: Any, callback: Callable[[Any, None], None]) -> None:
            callback(metadata, None)

        return grpc.composite_channel_credentials(
            super().to_grpc(), grpc.metadata_call_credentials(add_key, name="fal-key")
        )


def key_credentials() -> FalServerlessKeyCredentials | None:
    """Look for a key that the user has set; None if there is none.

    The first of: `FAL_KEY` ("<id>:<secret>"); `FAL_KEY_ID` with `FAL_KEY_SECRET`; in Google Colab, the
    notebook's secret `FAL_KEY`, if the user lets the notebook read it. A variable that is empty is not set.

    Raises:
        ConfigurationError: a key is malformed, half of one is missing, or Colab does not answer.
    """
    text = os.environ.get("FAL_KEY", "").strip()
    if text:
        return _parse(text, "FAL_KEY")
    key_id, key_secret = (os.environ.get(name, "").strip() for name in _PARTS)
    if key_id and key_secret:
        return _made(key_id, key_secret, " and ".join(_PARTS))
    if key_id or key_secret:
        there, missing = _PARTS if key_id else reversed(_PARTS)
        raise ConfigurationError(f"{there} is set and {missing} is not; set both, or FAL_KEY alone")
    secret = colab_secret("FAL_KEY")
    return _parse(secret, "the Colab secret FAL_KEY") if secret else None


def make_key() -> FalServerlessKeyCredentials:
    """Give the user's own key; the first call makes it and keeps it in the folder of the settings.

    The file is `key`, readable by its owner alone. Delete it to have a new one made.

    Raises:
        ConfigurationError: the file is malformed, readable by others, or cannot be read or written.
    """
    path = config.config_folder() / "key"
    try:
        kept = _read(path)
        if kept is None:
            with config.exclusive(path.parent):
                kept = _read(path)  # another process may have been quicker
                if kept is None:
                    kept = FalServerlessKeyCredentials(
                        secrets.token_hex(_ID_BYTES), secrets.token_hex(_SECRET_BYTES)
                    )
                    config.replace_whole(path, f"{kept.key_id}:{kept.key_secret}\n")
    except OSError as error:
        raise ConfigurationError(
            f"your key cannot be kept in {path}: {error.strerror or error}; "
            "FAL_NOTEBOOK_CONFIG names another folder"
        ) from error
    return kept


def _read(path: Path) -> FalServerlessKeyCredentials | None:
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read().strip()
    except FileNotFoundError:
        return None
    if stat.S_IMODE(mode) & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigurationError(
            f"others can read your key in {path}; delete the file to have a new key made, "
            f"or run: chmod 600 {path}"
        )
    return _parse(text, f"{path} (delete it to have a new key made)")


def _parse(text: str, where: str) -> FalServerlessKeyCredentials:
    key_id, colon, key_secret = text.partition(":")
    if not colon:
        raise ConfigurationError(f"{where} is not a key: it must be '<id>:<secret>', and has no ':'")
    return _made(key_id.strip(), key_secret.strip(), where)


def _made(key_id: str, key_secret: str, where: str) -> FalServerlessKeyCredentials:
    try:
        return FalServerlessKeyCredentials(key_id, key_secret)
    except ValueError as error:
        raise ConfigurationError(f"{where} is not a key '<id>:<secret>': {error}") from None


def colab_secret(name: str) -> str | None:
    """Give a secret of the Colab notebook; None where this is not Colab, or the user has or gives none.

    Raises:
        ConfigurationError: Colab does not answer.
    """
    if "google.colab" not in sys.modules:  # Colab's kernels import it before any cell runs
        return None
    from google.colab import userdata

    try:
        return str(userdata.get(name)).strip()
    except (userdata.SecretNotFoundError, userdata.NotebookAccessError):
        return None
    except Exception as error:
        raise ConfigurationError(
            f"Colab did not give the secret {name}: {error}; set the environment variable {name} instead"
        ) from error


def _grpc() -> Any:
    try:
        import grpc
    except ImportError as error:
        raise ImportError("to_grpc() needs grpcio; install it: pip install grpcio") from error
    return grpc
