"""Is this the machine it claims to be? Reading, checking and extending `known_hosts`.

Runs in the notebook; standard library only. A key that differs from the known one is refused whatever
the settings say; a new one is accepted only by a person, or by a setting that says so.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fal_agent.errors import HostKeyError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from fal_notebook.hosts.ssh_config import Target
    from fal_notebook.prompting import Prompt

__all__ = ["KnownKey", "check_host_key", "fingerprint", "known_keys", "lookup_name", "matches", "remember"]

SSH_PORT = 22


@dataclass(frozen=True)
class KnownKey:
    """A line of a known_hosts file that speaks about a host."""

    path: Path
    line: int  # counted from 1
    marker: str  # "", "cert-authority" or "revoked"
    key_type: str
    blob: bytes
    exact: bool = True  # it speaks of this very port, so that another key there is a changed one

    @property
    def place(self) -> str:
        """Where the line is, as file:line."""
        return f"{self.path}:{self.line}"


def lookup_name(host: str, port: int) -> str:
    """Name a host the way known_hosts does."""
    return host.lower() if port == SSH_PORT else f"[{host.lower()}]:{port}"


def fingerprint(blob: bytes) -> str:
    """Give a key's fingerprint as `ssh-keygen -l` shows it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def known_keys(files: Iterable[Path], name: str, *others: str) -> list[KnownKey]:
    """Find the lines of `files` that speak about a host; absent files are empty.

    Args:
        files: in the order in which they count.
        name: the host's, from `lookup_name`.
        others: names whose lines may make the host known, but not a changed one.
    """
    found = []
    for path in files:
        try:
            lines = path.read_bytes().decode("utf-8", "replace").splitlines()
        except (FileNotFoundError, IsADirectoryError):
            continue
        except OSError as error:
            raise HostKeyError(f"{path} cannot be read: {error.strerror}. Check its permissions") from error
        for number, line in enumerate(lines, 1):
            known = _parse(path, number, line, (name, *others))
            if known is not None:
                found.append(known)
    return found


def remember(path: Path, name: str, key_type: str, blob: bytes, *, hashed: bool = False) -> None:
    """Add a line to `path`, which is made with its folder if need be, in one write.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hashed:
        salt = os.urandom(20)
        digest = hmac.new(salt, name.encode(), hashlib.sha1).digest()
        name = f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"
    line = f"{name} {key_type} {base64.b64encode(blob).decode()}\n".encode()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def check_host_key(
    target: Target,
    key_type: str,
    blob: bytes,
    known: Sequence[KnownKey],
    prompt: Prompt,
    *,
    certificate: bytes | None = None,
) -> None:
    """Return if the key may be trusted; a new one that was accepted is remembered.

    Args:
        target: the machine, and what its user's settings say.
        key_type: such as "ssh-ed25519".
        blob: the key the machine showed.
        known: what the known_hosts files say about it.
        prompt: asked about a new key.
        certificate: what the machine showed for its key, if it did.

    Raises:
        HostKeyError: the key is revoked, is not the known one, or is new and was not accepted; or its
            certificate does not hold.
    """
    plain = [k for k in known if not k.marker]
    _refuse_revoked(target, key_type, blob, known)
    if any(k.blob == blob for k in plain):
        return
    if certificate is not None and _is_certified(target, certificate, known):
        return
    changed = [k for k in plain if k.key_type == key_type and k.exact]
    if changed:
        raise HostKeyError(_changed(target, key_type, blob, changed[0]))
    _accept_new(target, key_type, blob, [k for k in known if k.exact or k.marker], prompt)


def _is_certified(target: Target, certificate: bytes, known: Sequence[KnownKey]) -> bool:
    from fal_notebook.hosts.ssh_certificates import check_host_certificate

    revoked = [k.blob for k in known if k.marker == "revoked"]
    authorities = [k for k in known if k.marker == "cert-authority" and k.blob not in revoked]
    return check_host_certificate(target, certificate, authorities)


def _refuse_revoked(target: Target, key_type: str, blob: bytes, known: Sequence[KnownKey]) -> None:
    revoked = [k for k in known if k.marker == "revoked" and k.blob == blob]
    if revoked:
        raise HostKeyError(
            f"{target.label}: the machine at {target.where} shows a host key that {revoked[0].place} revokes "
            f"({_describe(key_type, blob)}). Do not connect; ask its administrator for the key it has now"
        )


def _accept_new(
    target: Target, key_type: str, blob: bytes, known: Sequence[KnownKey], prompt: Prompt
) -> None:
    shown = _describe(key_type, blob)
    note = ""
    if known:
        other = known[0]
        kind = (
            "a certificate authority, which did not sign this key"
            if other.marker == "cert-authority"
            else "another key that is revoked"
            if other.marker
            else f"another key, {other.key_type}"
        )
        note = f" ({other.place} knows it by {kind})"
    if target.strict_host_keys == "ask":
        question = (
            f"{target.label}: the machine at {target.where} is not known yet{note}.\n"
            f"Its host key is {shown}.\n"
            "Is this the machine you mean, and shall its key be remembered?"
        )
        accepted = prompt.confirm(question)
    else:
        accepted = target.strict_host_keys in {"no", "off", "accept-new"}
    if not accepted:
        raise HostKeyError(_not_accepted(target, shown, note))
    if target.user_known_hosts:
        path = target.user_known_hosts[0]
        try:
            remember(path, target.key_name, key_type, blob, hashed=target.hash_known_hosts)
        except OSError as error:
            raise HostKeyError(
                f"{target.label}: its host key could not be written to {path}: {error.strerror}. "
                "Make the file writable, or name another by UserKnownHostsFile"
            ) from error


def _not_accepted(target: Target, shown: str, note: str) -> str:
    """Say what to do about a new key; a terminal's `ssh` asks only where the settings let it."""
    text = (
        f"{target.label}: the host key of {target.where} is not known{note} and was not accepted: "
        f"{shown}. Compare it with the machine's own, then "
    )
    if target.strict_host_keys == "yes":
        place = target.user_known_hosts[0] if target.user_known_hosts else "known_hosts"
        keyscan = f"ssh-keyscan -p {target.port} {shlex.quote(target.hostname)}"
        return text + (
            f"add it to {place}, since StrictHostKeyChecking yes lets nobody be asked: `{keyscan}` prints "
            "its lines"
        )
    return text + f"run `{target.ssh_command}` once in a terminal and type yes"


def _changed(target: Target, key_type: str, blob: bytes, old: KnownKey) -> str:
    forget = f"ssh-keygen -f {shlex.quote(str(old.path))} -R {shlex.quote(target.key_name)}"
    return (
        f"{target.label}: the host key of {target.where} is not the one that is known. "
        "Either the machine was set up anew, or another machine answers in its place.\n"
        f"  known:  {_describe(old.key_type, old.blob)}, in {old.place}\n"
        f"  shown:  {_describe(key_type, blob)}\n"
        "If the machine's administrator confirms the new key, forget the old one and connect again:\n"
        f"  {forget}"
    )


def _describe(key_type: str, blob: bytes) -> str:
    return f"{key_type} {fingerprint(blob)}"


def _parse(path: Path, number: int, line: str, names: tuple[str, ...]) -> KnownKey | None:
    """Read one line; None if it is no key or speaks of other hosts."""
    fields = line.split()
    marker = ""
    if fields and fields[0].startswith("@"):
        marker = fields.pop(0)[1:]
    if len(fields) < 3 or fields[0].startswith("#"):  # noqa: PLR2004
        return None
    spoken_of = [name for name in names if _speaks_of(fields[0], name)]
    if not spoken_of:
        return None
    try:
        blob = base64.b64decode(fields[2], validate=True)
    except binascii.Error:
        return None
    return KnownKey(path, number, marker, fields[1], blob, exact=spoken_of[0] == names[0])


def _speaks_of(patterns: str, name: str) -> bool:
    if patterns.startswith("|1|"):
        return _is_hash_of(patterns, name)
    matched = False
    for pattern in patterns.lower().split(","):
        bare = pattern.removeprefix("!")
        if matches(name, bare):
            if bare != pattern:
                return False
            matched = True
    return matched


def _is_hash_of(hashed: str, name: str) -> bool:
    try:
        salt, digest = (base64.b64decode(part) for part in hashed.split("|")[2:4])
    except (binascii.Error, ValueError):
        return False
    return hmac.compare_digest(hmac.new(salt, name.encode(), hashlib.sha1).digest(), digest)


def matches(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern of * and ?; brackets stand for themselves."""
    expression = "".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in pattern)
    return re.fullmatch(expression, name) is not None
