"""A real SSH server for the notebooks that are replayed on it, known to kernels as `gpu-box`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.sshd import start_sshd

from fal_notebook.hosts import registry

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def gpu_box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a host that is reached through the server; its agent ends with the tests."""
    server = start_sshd(tmp_path_factory.mktemp("sshd"), name="gpu-box")
    root = server.home / ".fal_notebook" / f"replay-{os.getpid()}"  # other test runs have theirs
    settings = Path(os.environ["FAL_NOTEBOOK_CONFIG"]) / "hosts.toml"
    settings.parent.mkdir(exist_ok=True)
    settings.write_text(f'[hosts.gpu-box]\nroot = "~/.fal_notebook/{root.name}"\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAL_SSH_CONFIG", str(server.config_path))
        yield "gpu-box"
        host = registry.get_host("gpu-box")
        host.ask("shutdown")
        host.close()
    shutil.rmtree(root, ignore_errors=True)
    server.stop()
