"""Proving who the user is: keys, passwords, questions of the server.

Runs in the notebook; one of the files that import paramiko. Passwords and answers go from the prompt to the
server and are kept nowhere.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import paramiko  # type: ignore[import-untyped]

from fal_agent.errors import AuthenticationError, HostError, LinkLostError
from fal_notebook.hosts.ssh_keys import ANSWER_TIMEOUT, TRIES, Keyring
from fal_notebook.prompting import SilentPrompt

if TYPE_CHECKING:
    from fal_notebook.hosts.ssh_config import Target
    from fal_notebook.hosts.ssh_transport import LinkTransport
    from fal_notebook.prompting import Prompt

__all__ = ["log_in"]


def log_in(transport: LinkTransport, target: Target, prompt: Prompt) -> None:
    """Authenticate `target.user` by whatever the server takes and the user has.

    Raises:
        AuthenticationError: nothing worked; says what was tried and what to do.
        LinkLostError: the connection broke meanwhile.
    """
    transport.auth_timeout = ANSWER_TIMEOUT
    login = _Login(transport, target, SilentPrompt() if target.batch else prompt)
    try:
        done = login.run()
    except (paramiko.SSHException, OSError, EOFError) as error:
        raise login.failure() from error
    if not done:
        raise login.failure()


@dataclass
class _Login:
    """One attempt to get in; each step says whether the user is now authenticated."""

    transport: LinkTransport
    target: Target
    prompt: Prompt
    offered: frozenset[str] = frozenset()  # what the server takes
    tried: list[str] = field(default_factory=list)
    agent_keys: int = 0

    def run(self) -> bool:
        if self._attempt(self.transport.auth_none):
            return True
        return (
            (self._may("publickey") and self._keys())
            or (self._may_ask("keyboard-interactive") and self._interactive())
            or (self._may_ask("password") and self._password())
        )

    def failure(self) -> HostError:
        """The error that tells why it did not work."""
        if not self.transport.is_cut_off:
            return AuthenticationError(self.story())
        return LinkLostError(
            f"{self.target.label}: the connection to {self.target.where} broke during the login "
            f"({self.transport.why_lost()}). Try again; a server also breaks it off where the login takes "
            f"long, or where it blocks this address: see whether `{self.target.ssh_command}` works in a "
            "terminal"
        )

    def story(self) -> str:
        """Tell what happened and what to do next."""
        target = self.target
        tried = ", ".join(self.tried) or "nothing, because there was nothing to try"
        methods = ", ".join(sorted(self.offered)) or "nothing it named"
        text = f"{target.label}: {target.where} did not let user {target.user!r} in. Tried: {tried}. "
        text += f"The server takes: {methods}. "
        if not self.transport.is_active():
            text += f"It then broke off ({self.transport.why_lost()}). "
            if self.agent_keys > 1:
                text += (
                    f"The agent holds {self.agent_keys} keys, which may be more than the server listens to: "
                    "name the right one by IdentityFile, with IdentitiesOnly yes. "
                )
        if not self.tried and self._may("publickey"):
            text += "There is no key here: `ssh-keygen -t ed25519` makes one. "
        if isinstance(self.prompt, SilentPrompt) and not target.batch and self._could_ask():
            text += (
                "Nobody could be asked for a password here: connect once from a notebook or a terminal where "
                "it can be typed. "
            )
        return text + (
            f"See whether `{target.ssh_command}` works in a terminal; give the server your key with "
            "ssh-copy-id; or name another user (user@host, or User in the SSH configuration)"
        )

    def _could_ask(self) -> bool:
        return any(self._may(method) for method in ("keyboard-interactive", "password"))

    def _may(self, method: str) -> bool:
        return method in self.offered and method in self.target.methods

    def _may_ask(self, method: str) -> bool:
        return self._may(method) and not isinstance(self.prompt, SilentPrompt)

    def _attempt(self, method: Any, *arguments: Any) -> bool:
        """Try one method; a refusal and a half success update what the server takes."""
        try:
            remaining = method(self.target.user, *arguments)
        except paramiko.BadAuthenticationType as refusal:
            self.offered = frozenset(refusal.allowed_types)
            return False
        except paramiko.AuthenticationException:
            if not self.transport.is_active():
                raise
            return False
        if remaining:
            self.offered = frozenset(remaining)
            return False
        return True

    # -- keys -----------------------------------------------------------------------------------------

    def _keys(self) -> bool:
        keyring = Keyring(self.target, self.prompt, self.tried)
        for identity in keyring.identities():
            self.agent_keys = keyring.agent_keys
            if not self._may("publickey"):
                return False  # a key was half of it; the rest is not a key
            self.tried.append(identity.name)
            if self._attempt(self.transport.auth_publickey, identity.key):
                return True
        return False

    # -- questions ------------------------------------------------------------------------------------

    def _password(self) -> bool:
        for _ in range(TRIES):
            question = f"{self.target.user}@{self.target.hostname}'s password: "
            given = self.prompt.ask(question, secret=True)
            if given is None:
                return False
            self.tried.append("password")
            if self._attempt(self._send_password, given):
                return True
            if not self._may("password"):
                return False
        return False

    def _send_password(self, user: str, password: str) -> list[str]:
        # paramiko would try to answer the server's own questions with it, which is done better here.
        return list(self.transport.auth_password(user, password, fallback=False))

    def _interactive(self) -> bool:
        for _ in range(TRIES):
            self.tried.append("keyboard-interactive")
            answered, done = self._conversation()
            if done or not answered or not self._may("keyboard-interactive"):
                return done
        return False

    def _conversation(self) -> tuple[bool, bool]:
        """Let the server ask; gives whether the person answered, and whether that was enough.

        paramiko hands the questions to the transport's thread. They are put on this one, where a
        notebook can show them and where an interrupt arrives.
        """
        asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        answers: queue.SimpleQueue[list[str]] = queue.SimpleQueue()

        def put(title: str, instructions: str, fields: list[tuple[str, bool]]) -> list[str]:
            asked.put((title, instructions, fields))
            return answers.get(timeout=ANSWER_TIMEOUT)

        def attempt() -> None:
            try:
                asked.put(self._attempt(self.transport.auth_interactive, put))
            except (paramiko.SSHException, OSError, EOFError) as error:
                asked.put(error)

        threading.Thread(target=attempt, name="fal-ssh-login", daemon=True).start()
        answered = True
        while True:
            item = asked.get()
            if isinstance(item, bool):
                return answered, item
            if isinstance(item, Exception):
                raise item
            given = self._answers(*item) if answered else None
            answered = given is not None
            answers.put(given if given is not None else [""] * len(item[2]))

    def _answers(self, title: str, instructions: str, fields: list[tuple[str, bool]]) -> list[str] | None:
        heading = "\n".join(part.strip() for part in (title, instructions) if part.strip())
        given = []
        for text, echo in fields:
            answer = self.prompt.ask(f"{heading}\n{text}" if heading else text, secret=not echo)
            if answer is None:
                return None
            given.append(answer)
            heading = ""
        return given
