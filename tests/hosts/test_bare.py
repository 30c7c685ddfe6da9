"""From nothing but sshd, a shell and a home folder to the first result of a function with requirements.

The host is real: sshd shuts its user into a folder with busybox and the C library; no index is in reach.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.bare import bare_server
from support.sshd import SSHServer

import fal_notebook as fal
from fal_agent.errors import HostUnreachableError
from fal_agent.wire import Stage
from fal_notebook.hosts import bringing, registry
from fal_notebook.hosts.elf import glibc_needed, is_elf, with_origin_path
from fal_notebook.run import start

if TYPE_CHECKING:
    from collections.abc import Iterator

Bare = tuple[SSHServer, Path]  # and the user's home
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    with (
        bare_server(tmp_path_factory.mktemp("bare"), name="bare-box") as (server, home),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("FAL_SSH_CONFIG", str(server.config_path))
        yield server, home
        host = registry.get_host("bare-box")
        if getattr(host, "is_connected", False):
            host.ask("shutdown")
        host.close()


def with_stages(function: Any) -> tuple[Any, list[str]]:
    """Call a function; give its value, and what was said of the phases before it."""
    stages: list[str] = []

    def take(received: Any) -> None:
        if isinstance(received.event, Stage):
            stages.append(received.event.text)

    run = start(function.host, function._parcel(function.host, (), {}), on_event=take)
    return run.result(timeout=240), stages


def test_a_platform_that_nothing_runs_on_is_refused_before_anything_is_sent(
    bare: Bare,
) -> None:
    home = bare[1]
    uname = home.parents[1] / "bin" / "uname"
    uname.unlink()
    uname.write_text('#!/bin/sh\n[ "$1" = -m ] && echo riscv64 || echo Linux\n')
    uname.chmod(0o755)
    try:
        with pytest.raises(HostUnreachableError, match=r"'bare-box' is Linux on riscv64.*Nothing was sent"):
            registry.get_host("bare-box").connect()  # type: ignore[attr-defined]
    finally:
        uname.unlink()
        uname.symlink_to("busybox")

    assert not (home / ".fal_notebook").exists()


def test_what_is_missing_is_brought_though_the_connection_breaks(
    bare: Bare, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, home = bare
    send, broke = bringing._send, []

    def send_through_a_bad_line(link: Any, places: dict[str, str], data: bytes, **options: Any) -> None:
        """Break the connection while the first large file is on its way."""
        if not broke:
            broke.append(True)
            bringing._arrived(link, places, len(data))
            link.run(bringing._APPEND.format(**places), stdin=data[: 1 << 20])
            server.kill_connections()
        send(link, places, data, **options)

    monkeypatch.setattr(bringing, "_send", send_through_a_bad_line)
    steps_told: list[str] = []
    monkeypatch.setattr(bringing.steps, "tell", steps_told.append)

    @fal.function(host="bare-box", requirements=["humanize", "markupsafe", "python-dateutil"])
    def facts() -> list[Any]:
        import sys

        import humanize
        from dateutil.parser import parse
        from markupsafe import _speedups

        return [
            sys.version.split()[0],
            humanize.intcomma(1_000_000),
            parse("2026-11-27").year,
            _speedups.__name__,
        ]

    found, stages = with_stages(facts)

    assert found == [platform.python_version(), "1,000,000", 2026, "markupsafe._speedups"]
    told = "\n".join(steps_told)
    assert re.search(r"it has no uv: sending one, \d+\.\d MB", told)
    assert "sending uv: going on at 1.0 MB of " in told  # the notebook has connected again by itself
    assert re.search(rf"sending Python {platform.python_version()} \(.*\), \d+\.\d MB", told)
    count = 5 if sys.version_info >= (3, 11) else 6  # an older dateutil needs six
    assert any(re.fullmatch(rf"sending {count} packages, 0\.0 MB of \d\.\d MB", text) for text in stages)
    kept = home / ".fal_notebook"
    assert not list(kept.rglob("*.part"))
    assert kept.stat().st_mode & 0o777 == 0o700

    @fal.function(host="bare-box", requirements=["humanize"])
    def again() -> str:
        import humanize

        return humanize.__name__

    value, stages = with_stages(again)
    assert value == "humanize"  # from what was brought before
    assert not any("sending" in text for text in stages)


def test_what_the_notebook_cannot_find_either_is_told_with_both_reasons(bare: Bare) -> None:
    @fal.function(host="bare-box", requirements=["fal-notebook-tests-no-such-thing"])
    def nothing() -> None: ...

    both = r"(?s)no package index.*could not bring it either.*no wheels.*no-such-thing"
    with pytest.raises(fal.exceptions.EnvironmentBuildError, match=both):
        nothing()


def test_a_program_is_made_to_look_for_libraries_beside_it() -> None:
    program = Path(os.path.realpath("/proc/self/exe")).read_bytes()
    assert is_elf(program)
    assert (2, 2) <= glibc_needed(program) < (3, 0)

    moved = with_origin_path(program)

    if moved is None:
        pytest.skip("this Python was linked without a path for libraries")
    assert len(moved) == len(program)
    assert b"$ORIGIN/../lib\0" in moved
    assert with_origin_path(program, "x" * 4096) is None
