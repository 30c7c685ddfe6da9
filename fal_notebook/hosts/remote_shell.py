"""Shell scripts for machines whose login shells differ, and what comes back from them.

Runs in the notebook; standard library only. Every script is told to print a token first, so that what
start-up files print can be told from its own output.
"""

from __future__ import annotations

import string
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from fal_agent.framing import Buffer

__all__ = [
    "LINGER",
    "MAX_OUTPUT",
    "Session",
    "after",
    "feed",
    "read_all",
    "read_past",
    "shell_line",
    "shortened",
    "upload_script",
]

READ_SIZE = 1 << 18
MAX_OUTPUT = 64 << 20  # bytes that a command may print
MAX_NOISE = 1 << 20  # bytes that start-up files may print
LINGER = 0.5  # seconds to wait for more output after a command has ended
PLAIN = frozenset(string.ascii_letters + string.digits + " _-./=:,@+")

_UPLOAD = """
set -e
umask 077
path={path}
folder=$(dirname "$path")
[ -d "$folder" ] || mkdir -p "$folder"
part="$path.{token}.part"
trap 'rm -f "$part"' EXIT
trap '' PIPE
cat > "$part"
[ $(wc -c < "$part") -eq {size} ] || {{ echo "only a part of it arrived" >&2; exit 1; }}
chmod {mode:o} "$part"
mv -f "$part" "$path"
"""


class Session(Protocol):
    """A command that runs on the machine: its input, its output, its end."""

    def sendall(self, data: Buffer, /) -> None:
        """Give it input, waiting as long as it takes none; raises OSError when it takes no more."""

    def recv(self, size: int, /, *, timeout: float | None = None) -> bytes:
        """Wait for output, at most `size` bytes; b"" at its end; raises TimeoutError or OSError."""

    def end_input(self) -> None:
        """Say that no more input will come."""

    def wait_until_gone(self, timeout: float) -> bool:
        """Wait for the end of everything; False if it did not come within `timeout` seconds."""

    def close(self) -> None:
        """Let go of it."""

    @property
    def exit_status(self) -> int | None:
        """How it ended; None as long as that is not known, -1 if a signal did it."""

    @property
    def standard_error(self) -> bytes:
        """What it wrote there, the last of it."""


def upload_script(place: str, token: str, size: int, mode: int) -> str:
    """Write the script that puts its input at `place`, a word of the shell, whole or not at all."""
    return _UPLOAD.format(path=place, token=token, size=size, mode=mode)


def shell_line(script: str, token: str) -> str:
    """Write `script` as a line that means the same to every login shell.

    It begins by printing `token` on both outputs, so that what start-up files print can be told apart.
    Only letters, digits and a few signs stand for themselves; no shell finds anything in there to expand.
    """
    script = f"printf '{token}\\n'; printf '{token}\\n' >&2\n{script}"
    if "\0" in script:
        raise ValueError("a shell script cannot hold a NUL character")
    coded = "".join(
        c if c in PLAIN else "".join(f"\\0{byte:03o}" for byte in c.encode("utf-8", "surrogateescape"))
        for c in script
    )
    return f"""exec /bin/sh -c 'eval "$(printf %b "{coded}")"'"""


def feed(stream: Session, data: Buffer) -> None:
    """Give a command all its input, as far as it takes it."""
    try:
        if len(data):
            stream.sendall(data)
        stream.end_input()
    except OSError:
        return  # the command ended without reading it all; its exit status tells


def read_all(stream: Session, deadline: float) -> bytes:
    """Read a command's output to its end.

    Raises:
        TimeoutError: it did not end by `deadline`, of the monotonic clock.
        OverflowError: it is more than `MAX_OUTPUT`.
    """
    pieces: list[bytes] = []
    size = 0
    while size <= MAX_OUTPUT:
        left = deadline - time.monotonic()
        # A process that the command left behind may hold its output open for ever.
        ended = stream.exit_status is not None
        try:
            data = stream.recv(READ_SIZE, timeout=LINGER if ended else max(min(left, LINGER), 0.0))
        except TimeoutError:
            if ended:
                return b"".join(pieces)
            if left <= 0:
                raise
            continue
        if not data:
            return b"".join(pieces)
        pieces.append(data)
        size += len(data)
    raise OverflowError


def read_past(stream: Session, mark: bytes, deadline: float) -> bytes:
    """Read until after the line that is `mark`; gives what came with it beyond."""
    output = b""
    while len(output) <= MAX_NOISE:
        data = stream.recv(READ_SIZE, timeout=max(deadline - time.monotonic(), 0.0))
        output += data
        found, rest = after(mark, output)
        if found:
            return rest
        if not data:
            break
    said = (output + stream.standard_error).decode("utf-8", "replace").strip()[-300:]
    raise ConnectionRefusedError(f"the login shell ran no command; it said: {said or 'nothing'}")


def after(mark: bytes, output: bytes) -> tuple[bool, bytes]:
    """Cut off everything up to the line `mark`; gives whether it was there, and the rest."""
    _, found, rest = output.partition(mark + b"\n")
    return bool(found), rest if found else output


def shortened(command: str) -> str:
    """Give the beginning of a script, for messages."""
    line = command.strip().partition("\n")[0]
    return line if len(line) <= 80 else line[:77] + "..."  # noqa: PLR2004 - about a line
