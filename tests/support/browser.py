"""A real Chromium without a window, driven through its DevTools protocol.

One websocket to the browser carries the commands of all tabs. Nothing of it leaves this machine: names of
the form `*.example` mean this machine, all others stay unknown.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
from websockets.sync.client import ClientConnection, connect

from support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Browser", "PageError", "Tab", "require_chromium"]

SECONDS = 30.0  # that starting, a page or a script may take
ADDRESS = "DevTools listening on "
OPTIONS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # It is the app that is to refuse foreign pages, and not the browser, which would ask the user.
    "--disable-features=LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests",
    "--host-resolver-rules=MAP *.example 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
    "--proxy-server=direct://",
)
SUBMIT = """(form => {
    Object.assign(form, {action: url, method: 'post'});
    for (const [name, value] of Object.entries(fields))
        form.append(Object.assign(document.createElement('input'), {name, value}));
    document.body.append(form);
    form.submit();
})(document.createElement('form'))"""
NAMES = ("chromium", "chromium-browser", "google-chrome")


class PageError(Exception):
    """A script of a page failed, or the page could not be had."""


def require_chromium() -> str:
    """Give the browser's path; without one the test is skipped, saying what to install."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium on this machine: `make setup-system` installs it")


class Browser:
    """A running browser with a profile of its own, until `close()`.

    Args:
        folder: an empty folder for its profile and its log.
    """

    def __init__(self, folder: Path) -> None:
        command = [require_chromium(), *OPTIONS, f"--user-data-dir={folder / 'profile'}"]
        if os.geteuid() == 0:
            command.append("--no-sandbox")  # which Chromium refuses to root
        if setpriv := shutil.which("setpriv"):  # a test run that is killed leaves no browser behind
            command = [setpriv, "--pdeathsig", "KILL", *command]
        self._log = folder / "chromium.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "about:blank"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._number = 0
        self._stack = contextlib.ExitStack()
        self._stack.callback(self._end)
        with self._stack:
            opening = connect(self._address(), max_size=None, open_timeout=SECONDS, proxy=None)
            self._socket: ClientConnection = self._stack.enter_context(opening)
            self._stack = self._stack.pop_all()

    def command(self, method: str, *, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Carry out a command of the protocol.

        Raises:
            PageError: it cannot be.
            TimeoutError: there was no answer in time.
        """
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message | ({"sessionId": session} if session else {})))
        deadline = time.monotonic() + SECONDS
        while True:
            answer = json.loads(self._socket.recv(max(deadline - time.monotonic(), 0)))
            if answer.get("id") == self._number:
                break  # what else there is are events
        if "error" in answer:
            raise PageError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, url: str) -> Tab:
        """Show a page in a new tab, with cookies and a cache of its own."""
        context = self.command("Target.createBrowserContext", disposeOnDetach=False)["browserContextId"]
        target = self.command("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        tab = self.tab(target)
        tab.go(url)
        return tab

    def tab(self, target: str) -> Tab:
        """Give a tab, or a frame of another site, that is there already, by its id."""
        session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Tab(self, session)

    def close(self) -> None:
        """End the browser; may be called again."""
        self._stack.close()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _address(self) -> str:
        deadline = time.monotonic() + SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            for line in self._log.read_text(errors="replace").splitlines(keepends=True):
                if line.startswith(ADDRESS) and line.endswith("\n"):
                    return line.removeprefix(ADDRESS).strip()
            time.sleep(0.01)
        raise RuntimeError(f"Chromium did not start; it said:\n{self._log.read_text(errors='replace')}")


class Tab:
    """A tab that shows a page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def go(self, url: str) -> None:
        """Show another page, and wait until it is loaded.

        Raises:
            PageError: there is none; one that says why not is a page.
        """
        failure = self._browser.command("Page.navigate", session=self._session, url=url).get("errorText")
        if failure:
            raise PageError(f"{url}: {failure}")
        self.run("document.readyState == 'complete' || new Promise(done => addEventListener('load', done))")

    def submit(self, url: str, **fields: str) -> None:
        """Post a form to another address, and wait until the page that it answers with is loaded."""
        self.run(f"window.before = true, {SUBMIT}", url=url, fields=fields)
        until(self._shows_another, seconds=SECONDS)

    def _shows_another(self) -> bool:
        try:
            shown: bool = self.run("!window.before && document.readyState == 'complete'")
        except PageError:  # the page before went away meanwhile
            return False
        return shown

    def run(self, script: str, **names: Any) -> Any:
        """Give the value of a JavaScript expression, awaited, as the page's own script would have it.

        Args:
            script: the expression; `await` may be used in it.
            names: JSON values that it knows under these names.

        Raises:
            PageError: it threw something.
        """
        known = ", ".join(names)
        given = ", ".join(json.dumps(value) for value in names.values())
        answer = self._browser.command(
            "Runtime.evaluate",
            session=self._session,
            expression=f"(async ({known}) => ({script}))({given})",
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in answer:
            raise PageError(answer["exceptionDetails"].get("exception", {}).get("description", script))
        return answer["result"].get("value")

    @property
    def text(self) -> str:
        """What the page shows, as text."""
        text: str = self.run("document.body.innerText")
        return text
