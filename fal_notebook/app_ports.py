"""The ports of this machine that apps are reached at: one for each app, kept as long as it may be needed.

Runs in the notebook. An app keeps its port over new versions, and also when it ends and is spawned again.
Some time after its end nobody listens there any more.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from fal_agent.errors import ConfigurationError, FalServerlessError, HostError, LinkLostError
from fal_notebook.forwarding import Forwarder
from fal_notebook.prompting import unattended

if TYPE_CHECKING:
    from fal_notebook.hosts.base import ByteStream, Host

__all__ = ["ADDRESS_TIMEOUT", "KEPT_AFTER_END", "close_when_gone", "local_url", "url_if_open"]

ADDRESS_TIMEOUT = 600.0  # seconds to wait for a runner
KEPT_AFTER_END = 60.0  # seconds after an app's end in which its port says so, with status 503
_ANSWER_SECONDS = 10.0  # beyond its patience, in which the agent answers
# Seconds before each try to reach a runner: one that has just died may still be thought to be there.
_PAUSES = (0.0, 0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)

_lock = threading.Lock()
_forwarders: dict[tuple[str, str], Forwarder] = {}  # by host and app
_ports: dict[tuple[str, str], int] = {}  # those that apps had last
_closing: dict[tuple[str, str], threading.Timer] = {}


def local_url(host: Host, name: str, *, patience: float = ADDRESS_TIMEOUT) -> str:
    """Give the local URL of an app, and listen there; mostly the same one as long as this process lives.

    Args:
        host: where the app is.
        name: the app's name there.
        patience: seconds that a connection waits for a runner to be ready.
    """
    key = (host.name, name)
    with _lock:
        forwarder = _forwarders.get(key)
        if forwarder is None or forwarder.is_closed:
            target = _Runners(host, name, patience)
            forwarder = _forwarders[key] = _forwarder(target, name, _ports.get(key, 0))
            _ports[key] = forwarder.port
        return forwarder.url


def url_if_open(host: Host, name: str) -> str | None:
    """Give the local URL that an app had last, without listening there; None if it had none."""
    with _lock:
        port = _ports.get((host.name, name))
    return None if port is None else f"http://127.0.0.1:{port}"


def close_when_gone(host: Host, name: str) -> None:
    """Have an app's port closed in `KEPT_AFTER_END` seconds, unless the host has such an app then."""
    key = (host.name, name)
    with _lock:
        if key in _closing or key not in _forwarders:
            return
        timer = threading.Timer(KEPT_AFTER_END, _close_if_gone, (host, name))
        timer.daemon = True
        _closing[key] = timer
    timer.start()


def _close_if_gone(host: Host, name: str) -> None:
    key = (host.name, name)
    with _lock:
        _closing.pop(key, None)
        forwarder = _forwarders.get(key)
    if forwarder is None or _is_served(host, name):
        return
    with _lock:
        if _forwarders.get(key) is forwarder:
            del _forwarders[key]
    forwarder.close()


def _is_served(host: Any, name: str) -> bool:
    """Whether the host has such an app; no, if nobody is connected there: an agent need not start for it."""
    if not host.is_connected:
        return False
    try:
        return any(app["name"] == name for app in host.ask("apps"))
    except FalServerlessError:  # it broke in this very moment
        return False


def _forwarder(target: _Runners, name: str, port: int) -> Forwarder:
    if port:
        try:
            return Forwarder(target, name=name, port=port)
        except ConfigurationError:  # somebody else has taken it meanwhile
            return Forwarder(target, name=name)
    return Forwarder(target, name=name)


class _Runners:
    """Connects to whichever runner an app has now."""

    def __init__(self, host: Host, name: str, patience: float) -> None:
        self._host, self._name, self._patience = host, name, patience
        self._path: str | None = None
        self._paths: WeakKeyDictionary[ByteStream, str] = WeakKeyDictionary()  # where streams lead
        self._refusing = ""  # the runner that answered 503 last
        self.may_repeat = self.may_repeat_refused = False
        self.own_user_only = True  # until the app is known to ask everybody for a key, or nobody

    def dial(self) -> ByteStream:
        """Connect to a runner; one is started if there is none, and the link is made anew if it broke.

        Raises:
            FalServerlessError: the app has ended, or no runner is ready in time.
            HostError: the host cannot be reached.
        """
        with unattended():  # a request of a browser must not put a question into a cell
            return self._dial()

    def _dial(self) -> ByteStream:
        was_lost = False
        for pause in _PAUSES:
            time.sleep(pause)
            client = self._host.connect()  # type: ignore[attr-defined] # a host that serves apps has an agent
            try:
                path = self._path or self._ask()
                stream: ByteStream = client.dial(path)
            except LinkLostError:
                client.drop()  # this may be the first to notice
                if was_lost:
                    raise
                was_lost = True
            except OSError:  # that runner has gone
                self._path = None
            else:
                self._path = self._paths[stream] = path
                return stream
        raise FalServerlessError(
            f"runners of {self._name!r} on {self._host.name!r} go away as soon as they are there; see its log"
        )

    def refused(self, stream: ByteStream, /) -> None:
        """Connect to another runner from now on than the one that a stream leads to."""
        path = self._paths.get(stream)
        if path is not None:
            self._refusing = path
            if self._path == path:
                self._path = None

    def _ask(self) -> str:
        """Ask the agent for the socket of a runner; it answers when there is one."""
        patience = self._patience
        try:
            answer = self._host.ask(
                "app_address",
                name=self._name,
                patience=patience,
                refusing=self._refusing,
                timeout=patience + _ANSWER_SECONDS,
            )
        except HostError:
            raise
        except FalServerlessError:  # it has ended, or does not come up
            close_when_gone(self._host, self._name)
            raise
        self.may_repeat = bool(answer["may_repeat"])
        self.may_repeat_refused = bool(answer["may_repeat_refused"])
        self.own_user_only = not answer["auth"]
        return str(answer["path"])
