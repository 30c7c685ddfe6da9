"""A real JupyterLab in a real Chromium, driven as a person drives it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["NEEDS_CHROMIUM", "NEEDS_SUBSHELLS", "Lab", "Server", "find_chromium", "open_lab", "start_server"]

_CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
# JupyterLab's own view of the notebook; the application is in the page because the server was told so.
_KERNEL_IS_IDLE = """() => {
  const panel = window.jupyterapp && jupyterapp.shell.currentWidget;
  const session = panel && panel.sessionContext && panel.sessionContext.session;
  const kernel = session && session.kernel;
  return kernel && kernel.connectionStatus == 'connected' && kernel.status == 'idle';
}"""
# Notebook 7 and JupyterLab share settings and workspaces, and each finds there what only the other has.
_NOT_OURS = ("reading 'schema'", "Command 'filebrowser:open-path' not registered")
SECONDS = 60.0


def find_chromium() -> str | None:
    """Give the path of Chromium, or of a browser like it; None if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, names) if path), None)


NEEDS_CHROMIUM = pytest.mark.skipif(find_chromium() is None, reason="needs Chromium: tools/setup-system")
NEEDS_SUBSHELLS = pytest.mark.skipif(
    int(importlib.metadata.version("ipykernel").partition(".")[0]) < 7,
    reason="an older kernel hears no button while a cell runs",
)


class Lab:
    """One JupyterLab and one page of it.

    Attributes:
        page: the page, as playwright has it.
        folder: where notebooks are.
        problems: what the page said went wrong.
    """

    def __init__(self, url: str, token: str, folder: Path, page: Any) -> None:
        self.folder, self.page = folder, page
        self.problems: list[str] = []
        self._url, self._token = url, token
        page.on("pageerror", lambda error: self._note(str(error)))
        page.set_default_timeout(SECONDS * 1000)

    def _note(self, problem: str) -> None:
        if not any(words in problem for words in _NOT_OURS):
            self.problems.append(problem)

    def write(self, name: str, cells: list[str]) -> Path:
        """Write a notebook with these cells of code."""
        import nbformat

        path = self.folder / name
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.metadata.kernelspec = {
            "name": "python3",
            "display_name": "Python 3 (ipykernel)",
            "language": "python",
        }
        nbformat.write(notebook, path)
        return path

    def open(self, name: str, *, kernel: bool = True, application: str = "lab/tree") -> None:
        """Open a notebook in a fresh page, and wait for its kernel if it is wanted.

        Args:
            name: of the file.
            kernel: wait for the kernel.
            application: "lab/tree" for JupyterLab, "notebooks" for Notebook 7, by the same server.
        """
        self.page.goto(f"{self._url}/{application}/{name}?reset&token={self._token}")
        self.page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell")
        if kernel:
            self.wait_idle()

    def command(self, name: str, arguments: dict[str, Any] | None = None) -> None:
        """Do what a menu's entry does."""
        self.page.evaluate(
            "([name, arguments]) => { jupyterapp.commands.execute(name, arguments); }",
            [name, arguments or {}],
        )

    def run_all(self) -> None:
        """Run every cell; returns at once."""
        self.command("notebook:run-all-cells")

    def run(self, cell: int) -> None:
        """Run one cell, counted from 0; returns at once."""
        self.page.evaluate("cell => { jupyterapp.shell.currentWidget.content.activeCellIndex = cell; }", cell)
        self.command("notebook:run-cell")

    def wait_ended(self, cell: int) -> None:
        """Wait until a cell has its number: what is run before would be left out, should it fail."""
        prompt = self.page.locator(".jp-CodeCell").nth(cell).locator(".jp-InputPrompt")
        prompt.filter(has_text=re.compile(r"\[\d+\]")).first.wait_for()

    def wait_idle(self) -> None:
        """Wait until the kernel has nothing to do."""
        self.page.wait_for_function(_KERNEL_IS_IDLE)

    def save(self) -> None:
        """Save the notebook and wait until it is saved."""
        self.page.evaluate("() => jupyterapp.shell.currentWidget.context.save()")

    def output(self, cell: int) -> Any:
        """What stands below a cell, counted from 0."""
        return self.page.locator(".jp-CodeCell").nth(cell).locator(".jp-Cell-outputArea")

    def kernels(self) -> list[Any]:
        """The kernels that run."""
        return self._ask("/api/kernels")

    def shut_down_kernels(self) -> None:
        """End every kernel."""
        for kernel in self.kernels():
            self._ask(f"/api/kernels/{kernel['id']}", "DELETE")

    def _ask(self, path: str, method: str = "GET") -> Any:
        request = urllib.request.Request(
            f"{self._url}{path}", method=method, headers={"Authorization": f"token {self._token}"}
        )
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            text = answer.read()
        return json.loads(text) if text else None


class Server(NamedTuple):
    """A JupyterLab server on loopback.

    Attributes:
        folder: where notebooks are.
    """

    url: str
    token: str
    folder: Path


@contextlib.contextmanager
def open_lab(server: Server, *, width: int = 1200, height: int = 900) -> Iterator[Lab]:
    """Open a browser with a page of `width` by `height` pixels for JupyterLab; in the end no kernel runs.

    Yields:
        The page, and nothing in it yet.
    """
    from playwright.sync_api import sync_playwright

    chromium = find_chromium()
    assert chromium is not None, "there is no Chromium"
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium, args=_CHROMIUM) as browser,
    ):
        page = browser.new_page(viewport={"width": width, "height": height})
        lab = Lab(server.url, server.token, server.folder, page)
        yield lab
    lab.shut_down_kernels()


@contextlib.contextmanager
def start_server(place: Path, *, dark: bool = False, **environment: str) -> Iterator[Server]:
    """Run JupyterLab with settings of its own.

    Args:
        place: an empty folder for notebooks, settings and the log.
        dark: with JupyterLab's dark theme.
        environment: variables of its kernels besides those of this process.
    """
    folder = place / "work"
    folder.mkdir()
    _settings(place / "settings", dark=dark)
    port, token = _free_port(), secrets.token_hex(16)
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1"),
            *(f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"),
            *(f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"),
            "--JupyterNotebookApp.expose_app_in_browser=True",
        ],
        env={**os.environ, **_folders(place), **environment},
        stdout=(place / "log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        until(lambda: _answers(f"{url}/api/status?token={token}", process, place / "log"), seconds=SECONDS)
        yield Server(url, token, folder)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(SECONDS)


def _folders(place: Path) -> dict[str, str]:
    """Keep this JupyterLab away from the user's."""
    return {
        "JUPYTER_CONFIG_DIR": f"{place}/config",
        "JUPYTER_DATA_DIR": f"{place}/data",
        "JUPYTER_RUNTIME_DIR": f"{place}/runtime",
        "JUPYTERLAB_SETTINGS_DIR": f"{place}/settings",
        "JUPYTERLAB_WORKSPACES_DIR": f"{place}/workspaces",
        "IPYTHONDIR": f"{place}/ipython",
    }


def _settings(folder: Path, *, dark: bool) -> None:
    """No pop-up with news, and the theme."""
    plugins = folder / "@jupyterlab" / "apputils-extension"
    plugins.mkdir(parents=True)
    news = {"fetchNews": "false", "checkForUpdates": False}
    theme = {"theme": "JupyterLab Dark" if dark else "JupyterLab Light"}
    (plugins / "notification.jupyterlab-settings").write_text(json.dumps(news))
    (plugins / "themes.jupyterlab-settings").write_text(json.dumps(theme))


def _answers(url: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
