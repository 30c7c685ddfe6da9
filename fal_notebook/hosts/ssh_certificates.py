"""OpenSSH certificates: the plain key that one speaks for, and whether one makes a machine known.

Runs in the notebook; imported on first use, because cryptography is slow to import.
"""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING

from fal_agent.errors import HostKeyError
from fal_notebook.hosts.host_keys import matches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography.hazmat.primitives.serialization.ssh import SSHCertificate

    from fal_notebook.hosts.host_keys import KnownKey
    from fal_notebook.hosts.ssh_config import Target

__all__ = ["SUFFIX", "check_host_certificate", "key_within"]

SUFFIX = "-cert-v01@openssh.com"
_HOST = 2  # the kind of certificate that names machines
_FIELDS = {"ssh-ed25519": 1, "sk-ecdsa-sha2-nistp256@openssh.com": 3}  # of a public key; others have 2


def key_within(certificate: bytes) -> tuple[str, bytes]:
    """Give the type and the blob of the plain public key that a certificate's blob holds.

    Raises:
        ValueError: it is no certificate.
    """
    name, rest = _string(certificate)
    full = name.decode("ascii", "replace")
    if not full.endswith(SUFFIX):
        raise ValueError(f"{full!r} is no certificate")
    plain = full.removesuffix(SUFFIX) + ("@openssh.com" if full.startswith("sk-") else "")
    _nonce, rest = _string(rest)
    end = rest
    for _ in range(_FIELDS.get(plain, 2)):
        _field, end = _string(end)
    encoded = plain.encode()
    return plain, struct.pack("!I", len(encoded)) + encoded + rest[: len(rest) - len(end)]


def check_host_certificate(target: Target, blob: bytes, authorities: Sequence[KnownKey]) -> bool:
    """Say whether a trusted authority vouches for the machine.

    Args:
        target: the machine.
        blob: the certificate that it showed; that it holds the private key has been checked.
        authorities: lines of known_hosts that name authorities for it.

    Returns:
        False if none of the authorities signed it.

    Raises:
        HostKeyError: one did, but the certificate does not hold for this machine now.
    """
    certificate = _read(blob)
    signer = _public_blob(certificate) if certificate is not None else b""
    place = next((known.place for known in authorities if known.blob == signer), None)
    if certificate is None or place is None:
        return False
    problem = _problem(certificate, target.host_key_alias or target.hostname)
    if problem:
        raise HostKeyError(
            f"{target.label}: the machine at {target.where} shows a certificate of the authority in {place}, "
            f"but {problem}. Ask whoever runs that authority to sign the machine's host key anew"
        )
    return True


def _problem(certificate: SSHCertificate, name: str) -> str:
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_cert_signature()
    except InvalidSignature:
        return "its signature is wrong"
    if certificate.type.value != _HOST:
        return "it is a certificate for users, not for machines"
    now = time.time()
    if now < certificate.valid_after:
        return f"it is valid from {_moment(certificate.valid_after)} on, and it is {_moment(now)} here"
    if now >= certificate.valid_before:
        return f"it expired on {_moment(certificate.valid_before)}"
    if certificate.critical_options:
        return "it has conditions that are not known here"
    principals = [principal.decode("utf-8", "replace") for principal in certificate.valid_principals]
    if principals and not any(matches(name.lower(), p.lower()) for p in principals):
        return f"it is for {', '.join(principals)}, not for {name}"
    return ""


def _read(blob: bytes) -> SSHCertificate | None:
    import base64

    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import ssh

    name, _rest = _string(blob)
    try:
        identity = ssh.load_ssh_public_identity(name + b" " + base64.b64encode(blob))
    except (ValueError, UnsupportedAlgorithm):
        return None
    return identity if isinstance(identity, ssh.SSHCertificate) else None


def _public_blob(certificate: SSHCertificate) -> bytes:
    import base64

    from cryptography.hazmat.primitives import serialization

    line = certificate.signature_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return base64.b64decode(line.split()[1])


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _string(data: bytes) -> tuple[bytes, bytes]:
    if len(data) < 4:  # noqa: PLR2004 - the length itself
        raise ValueError("it ends too early")
    (size,) = struct.unpack_from("!I", data)
    if len(data) < 4 + size:
        raise ValueError("it ends too early")
    return data[4 : 4 + size], data[4 + size :]
