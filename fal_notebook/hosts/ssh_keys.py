"""The keys and certificates that a user may get in with: the agent's, and those in files.

Runs in the notebook; one of the files that import paramiko. A key that needed a passphrase stays unlocked in
this process's memory, so that a connection made again asks nobody; a passphrase itself is kept nowhere.
"""

from __future__ import annotations

import base64
import binascii
import copy
import hashlib
import os
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import paramiko  # type: ignore[import-untyped]
from cryptography.exceptions import UnsupportedAlgorithm
from paramiko.agent import AgentSSH  # type: ignore[import-untyped]
from paramiko.pkey import PublicBlob, UnknownKeyType  # type: ignore[import-untyped]

from fal_notebook.hosts.ssh_certificates import SUFFIX, key_within

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from fal_notebook.hosts.ssh_config import Target
    from fal_notebook.prompting import Prompt

__all__ = ["Identity", "Keyring"]

TRIES = 3
AGENT_TIMEOUT = 10.0  # seconds for an agent to take the connection
ANSWER_TIMEOUT = 180.0  # seconds in which a person may touch a key or confirm its use
UNUSABLE = (ValueError, UnknownKeyType, UnsupportedAlgorithm, paramiko.SSHException)

_unlocked: dict[bytes, paramiko.PKey] = {}  # by the SHA-256 of the locked file


@dataclass(frozen=True)
class Identity:
    """Something to offer: a key, perhaps by a certificate that speaks for it, and its name in messages."""

    key: paramiko.PKey
    name: str


@dataclass(frozen=True)
class _Certificate:
    path: Path
    blob: Any  # paramiko's PublicBlob
    subject: bytes  # the plain public key that it speaks for


@dataclass
class Keyring:
    """What one user has for one machine.

    Attributes:
        target: the machine, and what the configuration says about keys.
        prompt: asked for passphrases.
        problems: why a key could not be offered, for the story of a failed login.
        agent_keys: how many keys the agent holds.
    """

    target: Target
    prompt: Prompt
    problems: list[str] = field(default_factory=list)
    agent_keys: int = 0

    def identities(self) -> Iterator[Identity]:
        """Give what to offer, in this order: the agent's, files, files that need a passphrase."""
        agent = self._agent()
        try:
            yield from self._all(list(agent.get_keys()) if agent is not None else [])
        finally:
            if agent is not None:
                agent._close()  # noqa: SLF001 - paramiko has no public way

    def _all(self, in_agent: list[Any]) -> Iterator[Identity]:
        target = self.target
        self.agent_keys = len(in_agent)
        files = [f for f in target.identity_files if self._exists(f)]
        public = {f: _public_blob(f) for f in files}
        certificates = list(self._certificates(files))
        wanted = {blob for blob in public.values() if blob} | {c.subject for c in certificates}
        named = [k for k in in_agent if _subject_of(k) in wanted]
        others = [] if target.identities_only else [k for k in in_agent if k not in named]
        held = {k.blob for k in (*named, *others)}
        for key in (*named, *others):
            name = f"the agent's key {key.comment or key.get_name()}"
            yield from _with_certificates(_as_held(key), name, certificates)
        locked = []
        for file in files:
            if public[file] in held:
                continue
            try:
                key = _load(file)
            except TypeError:  # how it says that a passphrase is needed
                locked.append(file)
            except UNUSABLE:
                self.problems.append(f"key {file} (which cannot be used: not a private key of a known kind)")
            except OSError as error:
                self.problems.append(f"key {file} (which cannot be read: {error.strerror})")
            else:
                yield from _with_certificates(key, f"key {file}", certificates)
        for file in locked:
            key = self._unlock(file)
            if key is not None:
                yield from _with_certificates(key, f"key {file}", certificates)

    def _certificates(self, files: Iterable[Path]) -> Iterator[_Certificate]:
        """Give the certificates that are named, and those that lie beside keys."""
        beside = [file.with_name(f"{file.name}-cert.pub") for file in files]
        for path in (*self.target.certificate_files, *filter(os.path.isfile, beside)):
            certificate = self._certificate(path)
            if certificate is not None:
                yield certificate

    def _certificate(self, path: Path) -> _Certificate | None:
        try:
            blob = PublicBlob.from_file(str(path))
            return _Certificate(path, blob, key_within(blob.key_blob)[1])
        except (ValueError, paramiko.SSHException):
            self.problems.append(f"certificate {path} (which cannot be used: it is none)")
        except OSError as error:
            self.problems.append(f"certificate {path} (which cannot be read: {error.strerror})")
        return None

    def _exists(self, file: Path) -> bool:
        if os.path.exists(file):  # noqa: PTH110 - no name is too long for it
            return True
        if self.target.identities_given:
            self.problems.append(f"key {file} (which does not exist)")
        return False

    def _agent(self) -> Any:
        if self.target.agent_socket is None:
            return None
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(AGENT_TIMEOUT)
        agent = AgentSSH()
        try:
            connection.connect(self.target.agent_socket)
            agent._connect(connection)  # noqa: SLF001 - the public class knows $SSH_AUTH_SOCK only
        except (OSError, paramiko.SSHException):
            connection.close()
            self.problems.append(f"the agent at {self.target.agent_socket} (which does not answer)")
            return None
        connection.settimeout(ANSWER_TIMEOUT)
        return agent

    def _unlock(self, file: Path) -> paramiko.PKey | None:
        """Ask for the passphrase of a key, unless it was unlocked before; None if it is not to be had."""
        digest = hashlib.sha256(file.read_bytes()).digest()
        if digest in _unlocked:
            return _unlocked[digest]
        question = f"Passphrase for {file}: "
        for _ in range(TRIES):
            passphrase = self.prompt.ask(question, secret=True)
            if not passphrase:
                self.problems.append(f"key {file} (which needs a passphrase that was not given)")
                return None
            try:
                _unlocked[digest] = _load(file, passphrase.encode())
            except UNUSABLE:
                question = f"That was not it. Passphrase for {file}: "
            else:
                return _unlocked[digest]
        self.problems.append(f"key {file} (whose passphrase was wrong {TRIES} times)")
        return None


def _load(file: Path, passphrase: bytes | None = None) -> paramiko.PKey:
    """Read a private key alone; paramiko would offer a certificate beside it in the key's place."""
    key = paramiko.PKey.from_path(str(file), passphrase)
    key.public_blob = None
    return key


def _with_certificates(key: Any, name: str, certificates: Iterable[_Certificate]) -> Iterator[Identity]:
    """Give the key, after each certificate that speaks for it."""
    for certificate in certificates:
        if certificate.subject == key.asbytes():
            certified = copy.copy(key)
            certified.public_blob = certificate.blob
            yield Identity(certified, f"{name} with certificate {certificate.path}")
    yield Identity(key, name)


def _as_held(key: Any) -> Any:
    """Make the agent's certificate a key of its own; paramiko would offer the key within under its name."""
    if key.get_name().endswith(SUFFIX):
        key.inner_key = None
    return key


def _subject_of(key: Any) -> bytes:
    """The plain public key of what the agent holds, a certificate or not."""
    return key_within(key.blob)[1] if key.get_name().endswith(SUFFIX) else bytes(key.blob)


def _public_blob(file: Path) -> bytes | None:
    """Read the public half beside a key, to find it in the agent."""
    try:
        return base64.b64decode(file.with_name(file.name + ".pub").read_text().split()[1])
    except (OSError, IndexError, binascii.Error, UnicodeDecodeError):
        return None
