"""Processes are told apart by their start time, and a zombie is nobody."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from fal_agent.server.proc import boot_id, environment_of, identity, is_alive, process, processes


def test_a_process_is_found_with_its_group_session_and_parent() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    try:
        found = process(child.pid)

        assert found is not None
        assert (found.parent, found.group, found.session) == (os.getpid(), child.pid, child.pid)
        assert found in list(processes())
    finally:
        child.communicate(b"\n")
    assert process(child.pid) is None


def test_a_zombie_counts_as_gone() -> None:
    child = subprocess.Popen(["true"])
    deadline = time.monotonic() + 10
    while process(child.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)

    assert process(child.pid) is None
    os.kill(child.pid, 0)  # Linux still knows the number: it is a zombie
    child.wait()


def test_a_command_with_any_name_is_read_right(tmp_path) -> None:
    """The name stands in the middle of the line, and may hold spaces and brackets."""
    program = tmp_path / "a) Z (b"
    program.symlink_to("/bin/sleep")
    child = subprocess.Popen([program, "60"])
    try:
        assert process(child.pid).parent == os.getpid()
    finally:
        child.kill()
        child.wait()


def test_an_identity_holds_for_this_process_only() -> None:
    host, boot, pid, started = identity().split(".")

    assert is_alive(identity())
    assert not is_alive(f"{host}.{boot}.{pid}.{int(started) + 1}"), "another process with the same number"
    assert not is_alive(f"{host}.00000000.{pid}.{started}"), "before the machine started anew"
    assert is_alive(f"not-{host}.{boot}.{pid}.{started}"), "nothing is known of another host"
    assert not is_alive("nonsense")


def test_variables_are_those_of_the_start_and_nobody_elses_are_told() -> None:
    child = subprocess.Popen(["sleep", "60"], env={"MARK": "here"})
    try:
        deadline = time.monotonic() + 10
        while environment_of(child.pid) != b"MARK=here\0" and time.monotonic() < deadline:
            time.sleep(0.01)  # until it is `sleep`, and not yet our own copy
        assert environment_of(child.pid) == b"MARK=here\0"
    finally:
        child.kill()
        child.wait()
    assert environment_of(child.pid) == b""


def test_the_kernel_names_its_boot() -> None:
    assert len(boot_id()) == 36
