"""What a host without Python or uv can be brought: which builds run on its processor and its C library.

Runs in the notebook.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fal_agent.errors import HostUnreachableError

__all__ = ["Platform"]

_MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
_MANYLINUX = (17, 28, *range(31, 41))  # glibc 2.N for which uv can resolve
_OLDEST_GLIBC = 17
_SUPPORTED = "Linux on x86_64 or aarch64, with glibc 2.17 or newer, or musl"


@dataclass(frozen=True)
class Platform:
    """A kind of machine.

    Attributes:
        machine: "x86_64" or "aarch64".
        libc: "glibc" or "musl".
        libc_version: its numbers, such as (2, 36).
    """

    machine: str
    libc: str
    libc_version: tuple[int, ...]

    @classmethod
    def of(cls, host_name: str, *, system: str, machine: str, libc: str) -> Platform:
        """Know a host's platform by what it says of itself.

        Args:
            host_name: for messages.
            system: as `uname -s` says.
            machine: as `uname -m` says.
            libc: "glibc 2.36" or "musl 1.2.3"; empty if it could not be found out.

        Raises:
            HostUnreachableError: nothing that we could bring would run there.
        """
        name, _, version = libc.strip().partition(" ")
        numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
        known = _MACHINES.get(machine)
        is_fine = name == "musl" or (name == "glibc" and numbers >= (2, _OLDEST_GLIBC))
        if system != "Linux" or known is None or not is_fine:
            raise HostUnreachableError(
                f"{host_name!r} is {system} on {machine} with {libc or 'an unknown C library'}: it lacks "
                f"Python or uv, which can be brought to {_SUPPORTED} alone. Nothing was sent. "
                "Install Python 3.9 or newer and uv there"
            )
        return cls(known, name, numbers)

    @property
    def uv_target(self) -> str:
        """The target of the static build of uv, which runs with every C library."""
        return f"{self.machine}-unknown-linux-musl"

    @property
    def python_request(self) -> str:
        """What ends the name of a build of Python that uv downloads: "linux-x86_64-gnu"."""
        return f"linux-{self.machine}-{'gnu' if self.libc == 'glibc' else 'musl'}"

    @property
    def wheel_target(self) -> str:
        """The platform that uv is to choose wheels for."""
        if self.libc == "musl":
            return f"{self.machine}-unknown-linux-musl"
        minor = max(number for number in _MANYLINUX if number <= self.libc_version[1])
        return f"{self.machine}-manylinux_2_{minor}"

    def __str__(self) -> str:
        return f"Linux {self.machine}, {self.libc} {'.'.join(map(str, self.libc_version))}"
