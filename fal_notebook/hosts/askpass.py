"""Questions of a program that would ask at a terminal, put to the person at the notebook instead.

Runs in the notebook; standard library only. `ssh` starts a small program for each question ($SSH_ASKPASS);
that one hands it over through a socket in a private folder and prints the answer. Nothing is written down.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import socket
import struct
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from fal_notebook.prompting import Prompt

__all__ = ["Askpass"]

MAX_QUESTION = 64 << 10  # bytes
HANDOVER_SECONDS = 5.0

# Sends "kind NUL question", then prints the answer; an empty answer is none.
_PROGRAM = """
import os, socket, sys
asking = socket.socket(socket.AF_UNIX)
asking.connect(os.environ["FAL_ASKPASS_SOCKET"])
text = (os.environ.get("SSH_ASKPASS_PROMPT", "") + chr(0) + " ".join(sys.argv[1:])).encode()
asking.sendall(len(text).to_bytes(4, "big") + text)
answer = b""
while piece := asking.recv(4096):
    answer += piece
if not answer:
    sys.exit(1)
sys.stdout.write(answer[1:].decode() + chr(10))
"""


class Askpass:
    """Listens for questions; `answer` puts them to the person in the thread that calls it.

    Args:
        folder: a private one, for the program and its socket.
        prompt: who is asked.
    """

    def __init__(self, folder: Path, prompt: Prompt) -> None:
        self._prompt = prompt
        self._program, self._path = folder / "askpass", folder / "ask"
        script = f'exec {shlex.quote(sys.executable)} -I -S -c {shlex.quote(_PROGRAM)} "$@"\n'
        self._program.write_text(f"#!/bin/sh\n{script}")
        self._program.chmod(0o700)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._path))
        self._listener.listen(8)

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which `ssh` finds it."""
        return {
            "SSH_ASKPASS": str(self._program),
            "SSH_ASKPASS_REQUIRE": "force",
            "DISPLAY": os.environ.get("DISPLAY") or ":0",  # older ones ask in a terminal without it
            "FAL_ASKPASS_SOCKET": str(self._path),
        }

    def answer(self, timeout: float) -> bool:
        """Wait for a question and answer it; False if none came within `timeout` seconds."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        if not poll.poll(timeout * 1000):
            return False
        asking, _ = self._listener.accept()
        asking.settimeout(HANDOVER_SECONDS)
        with asking, contextlib.suppress(OSError):  # the one who asked is gone; so is the question
            kind, _, question = _receive(asking).partition("\0")
            given = self._put(kind, question)
            if given is not None:
                asking.sendall(b"=" + given.encode())
        return True

    def close(self) -> None:
        """Take no more questions."""
        self._listener.close()

    def _put(self, kind: str, question: str) -> str | None:
        if kind == "none":  # something to do, such as touching a key, and nothing to answer
            self._prompt.tell(question)
            return ""
        if kind == "confirm":
            return "yes" if self._prompt.confirm(question) else None
        if "(yes/no" in question:
            text = question.partition("\nAre you sure you want to continue connecting")[0]
            return "yes" if self._prompt.confirm(f"{text}\nIs this the machine you mean?") else "no"
        return self._prompt.ask(question, secret=True)


def _receive(asking: socket.socket) -> str:
    (size,) = struct.unpack("!I", _exactly(asking, 4))
    return _exactly(asking, min(size, MAX_QUESTION)).decode("utf-8", "replace")


def _exactly(asking: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = asking.recv(size - len(data))
        if not piece:
            raise ConnectionResetError("the question was not finished")
        data += piece
    return data
