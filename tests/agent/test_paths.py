"""Where things lie on a host."""

from __future__ import annotations

import os
from pathlib import Path

from fal_agent.paths import socket_path

DIGEST = "0123456789abcdef" * 4


def test_a_socket_lies_in_the_root() -> None:
    assert socket_path(Path("/home/me/.fal_notebook"), DIGEST).is_relative_to("/home/me/.fal_notebook")


def test_roots_with_paths_too_long_for_a_socket_do_not_share_one() -> None:
    roots = [Path("/") / ("deep" * 30) / name for name in ("one", "two")]

    paths = [socket_path(root, DIGEST) for root in roots]

    assert paths[0] != paths[1]
    assert max(len(os.fsencode(path)) for path in paths) < 108
