"""What a bare host can be brought is told by its processor and its C library, before anything is sent."""

from __future__ import annotations

import pytest

from fal_agent.errors import HostUnreachableError
from fal_notebook.hosts.platforms import Platform

X86, ARM = "x86_64-unknown-linux-musl", "aarch64-unknown-linux-musl"  # of uv


@pytest.mark.parametrize(
    ("machine", "libc", "uv", "python", "wheels"),
    [
        ("x86_64", "glibc 2.36", X86, "linux-x86_64-gnu", "x86_64-manylinux_2_36"),
        ("aarch64", "glibc 2.31", ARM, "linux-aarch64-gnu", "aarch64-manylinux_2_31"),
        ("arm64", "glibc 2.30", ARM, "linux-aarch64-gnu", "aarch64-manylinux_2_28"),
        ("x86_64", "glibc 2.17", X86, "linux-x86_64-gnu", "x86_64-manylinux_2_17"),
        ("x86_64", "glibc 2.99", X86, "linux-x86_64-gnu", "x86_64-manylinux_2_40"),
        ("x86_64", "musl 1.2.3", X86, "linux-x86_64-musl", "x86_64-unknown-linux-musl"),
    ],
)
def test_a_platform_names_its_builds(machine: str, libc: str, uv: str, python: str, wheels: str) -> None:
    platform = Platform.of("box", system="Linux", machine=machine, libc=libc)

    assert (platform.uv_target, platform.python_request, platform.wheel_target) == (uv, python, wheels)


@pytest.mark.parametrize(
    ("system", "machine", "libc"),
    [
        ("Darwin", "arm64", ""),
        ("Linux", "riscv64", "glibc 2.36"),
        ("Linux", "armv7l", "glibc 2.36"),
        ("Linux", "x86_64", "glibc 2.12"),
        ("Linux", "x86_64", ""),
    ],
)
def test_what_nothing_runs_on_is_refused_clearly(system: str, machine: str, libc: str) -> None:
    with pytest.raises(HostUnreachableError, match=rf"'box' is {system} on {machine}.*Nothing was sent"):
        Platform.of("box", system=system, machine=machine, libc=libc)
