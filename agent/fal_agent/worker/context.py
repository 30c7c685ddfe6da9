"""One call as the worker sees it: what it may emit, and how far ahead of its reader it may run.

Runs in a worker. Everything a call emits leaves in order; more than `WINDOW` unacknowledged bytes
make the emitting thread wait, so a slow reader slows the call down and memory stays bounded.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.framing import Buffer
from fal_agent.masking import Masker, Tail
from fal_agent.wire import (
    WINDOW,
    Clear,
    Comm,
    Data,
    Display,
    Execute,
    Item,
    Log,
    Message,
    Progress,
    Prompt,
    Serving,
    Task,
)
from fal_agent.worker.outbox import Outbox
from fal_agent.worker.secrets import Secrets

if TYPE_CHECKING:
    from fal_agent.runtime.progress import Step

__all__ = ["CURRENT_CALL", "Answer", "CallContext", "tell_progress"]

_ITEM_COST = 8 << 10  # a small item counts for this much, so that a generator runs at most 128 items ahead
_PICTURES = ("image/png", "image/jpeg", "image/gif", "image/webp", "application/pdf")
_FLUSH_BYTES = 64 << 10
_MAX_PROMPT = 64 << 10  # characters

Send = Callable[[Message, Sequence[Buffer]], None]
Answer = tuple[str, str]  # to a prompt: the text, and the name of the exception that it is the message of


class CallContext:
    """What one running call may say.

    Attributes:
        run_id: the run it belongs to.
        request: the message that started it.
        task: what is to run.
        is_struck: an interrupt reached its code.
        is_over: true once its result has been sent; what it says later is not heard.
        parent: id of the front end's message that it answers; "" where there is none.
        gather: hands over what C code and subprocesses wrote until now.
        poll_pipes: whether they wrote something, as `select.epoll().poll` says it.
        are_pipes_read: whether a thread is handing it over just now.
    """

    def __init__(self, request: Execute, task: Task, send: Send, secrets: Optional[Secrets] = None) -> None:
        self.request, self.task, self.run_id = request, task, request.run_id
        self._secrets = secrets or Secrets()
        self._tails: dict[str, Tail] = {}  # by stream: text that may be the beginning of a secret
        self.is_over = self.is_struck = False
        self.parent = ""
        self.gather: Callable[[], None] = _nothing
        self.poll_pipes: Callable[[float, int], Any] = _never
        self.are_pipes_read: Callable[[], bool] = bool
        self._send = send
        self._outbox = Outbox(task.outbox)
        self._unacknowledged = 0
        self._credit = threading.Condition()
        self._emitting = threading.RLock()  # keeps logs and displays in the order they were made
        self._answers: dict[int, queue.SimpleQueue[Answer]] = {}
        self._prompts = 0
        self._passwords: set[int] = set()  # prompts whose answers are secret
        self._text: list[str] = []
        self._text_stream, self._text_request = "stdout", ""
        self._text_size = 0

    # ------------------------------------------------------------ what user code causes

    def write(self, stream: str, text: str, request: str = "") -> None:
        """Take printed text; it is sent soon, or when enough has gathered.

        Args:
            stream: "stdout" or "stderr".
            text: of any length.
            request: id of the request that an app was answering.
        """
        if not text:
            return
        with self._emitting:
            if stream != self._text_stream or request != self._text_request:
                if request == self._text_request:
                    self.flush()
                else:
                    self.flush_all()
                self._text_stream, self._text_request = stream, request
            self._text.append(text)
            self._text_size += len(text)
            if self._text_size >= _FLUSH_BYTES:
                self.flush()

    def flush(self) -> None:
        """Send the text that has gathered, but for what may be the beginning of a secret."""
        with self._emitting:
            if not self._text:
                return
            text, self._text, self._text_size = "".join(self._text), [], 0
            if self.masker is not None:
                text = self._tails.setdefault(self._text_stream, Tail()).take(self.masker, text)
            self._send_text(self._text_stream, text)

    def flush_all(self) -> None:
        """Send all text: something else follows it."""
        with self._emitting:
            self.flush()
            while self._tails:
                stream, tail = self._tails.popitem()
                self._send_text(stream, tail.end(self.masker) if self.masker is not None else "")

    def _send_text(self, stream: str, text: str) -> None:
        data = text.encode("utf-8", "replace")
        for start in range(0, len(data), WINDOW // 2):
            part = data[start : start + WINDOW // 2]
            self._emit(
                Log(
                    self.run_id,
                    stream,
                    request=self._text_request,
                    sent_at=time.time(),
                    cost=len(part),
                ),
                [part],
            )

    @property
    def masker(self) -> Optional[Masker]:
        """Knows the secrets that calls of this process were given; None if there were none."""
        return self._secrets.masker

    def holds_secret(self, parts: Sequence[Buffer]) -> bool:
        """Whether a secret stands in what is about to be sent."""
        return self.masker is not None and self.masker.is_in(parts)

    def is_private(self, parts: Sequence[Buffer]) -> bool:
        """Whether that is so, or what the person answered to `getpass` stands in it."""
        typed = self._secrets.typed
        return self.holds_secret(parts) or (typed is not None and typed.is_in(parts))

    @property
    def has_text(self) -> bool:
        """Whether text waits to be sent."""
        return bool(self._text)

    @property
    def has_credit(self) -> bool:
        """Whether something can be sent without waiting for the reader."""
        return self._unacknowledged < WINDOW // 2

    def display(
        self,
        kind: str,
        data: dict[str, Any],
        metadata: Optional[dict[str, Any]] = None,
        transient: Optional[dict[str, Any]] = None,
    ) -> None:
        """Show a MIME bundle; `kind` is as in `wire.Display`."""
        if self.masker is not None:
            pictures = {kind: item for kind, item in data.items() if kind in _PICTURES}  # long, and no text
            data = {**self.masker.mask_all({**data, **dict.fromkeys(pictures)}), **pictures}
            metadata, transient = self.masker.mask_all(metadata), self.masker.mask_all(transient)
        bundle = {"data": data, "metadata": metadata or {}, "transient": transient or {}}
        content = json.dumps(bundle, default=_as_text).encode()
        self.gather()
        with self._emitting:
            self.flush_all()
            refs, buffers = self._pack([content])
            self._emit(Display(self.run_id, kind, refs, sent_at=time.time(), cost=len(content)), buffers)

    def clear(self, wait: bool = False) -> None:
        """Clear the output of the run's cell, at once or when new output comes."""
        self.gather()
        with self._emitting:
            self.flush_all()
            self._emit(Clear(self.run_id, wait=wait, sent_at=time.time(), cost=64), [])

    def progress(self, step: Step) -> None:
        """Say how far a loop has come."""
        name = step.name if self.masker is None else self.masker.mask(step.name)
        self.gather()
        with self._emitting:
            self.flush_all()
            self._emit(
                Progress(
                    self.run_id,
                    name,
                    step.done,
                    step.total,
                    bar=step.bar,
                    depth=step.depth,
                    over=step.is_over,
                    sent_at=time.time(),
                    cost=128,
                ),
                [],
            )

    def ask(self, text: str, *, password: bool) -> queue.SimpleQueue[Answer]:
        """Ask the person for a line of text; give where the answer will be.

        Args:
            text: what to ask, cut after 64 KiB.
            password: what is typed must not be seen.
        """
        self.gather()
        with self._emitting:
            self.flush_all()
            self._prompts += 1
            answer = self._answers[self._prompts] = queue.SimpleQueue()
            if password:
                self._passwords.add(self._prompts)
            text = text[:_MAX_PROMPT] if self.masker is None else self.masker.mask(text)[:_MAX_PROMPT]
            self._emit(
                Prompt(self.run_id, self._prompts, text, password, sent_at=time.time(), cost=128 + len(text)),
                [],
            )
        return answer

    def comm(self, action: str, comm_id: str, content: dict[str, Any], buffers: Sequence[Buffer]) -> None:
        """Let a widget speak to its other half; see `wire.Comm`."""
        if self.masker is not None:
            content = self.masker.mask_all(content)
        parts = [json.dumps(content, default=_as_text).encode(), *buffers]
        size = sum(len(part) for part in parts)
        self.gather()
        with self._emitting:
            self.flush_all()
            refs, kept = self._pack(parts)
            self._emit(Comm(self.run_id, comm_id, action, refs, sent_at=time.time(), cost=size), kept)

    def serving(self) -> None:
        """Say that an app answers requests."""
        with self._emitting:
            self.flush()
            self._emit(Serving(self.run_id, sent_at=time.time()), [])

    def item(self, parts: Sequence[Buffer]) -> None:
        """Send one item of a generator, when the reader has room for it."""
        size = sum(len(part) for part in parts)
        with self._emitting:
            self.flush()
            refs, buffers = self._pack(parts)
            private = self.is_private(parts)
            cost = max(size, _ITEM_COST)
            self._emit(Item(self.run_id, refs, private=private, sent_at=time.time(), cost=cost), buffers)

    # ------------------------------------------------------------ the executor's side

    def finish(
        self, make: Callable[[Data], Message], parts: Sequence[Buffer], variables: Optional[bytes] = None
    ) -> None:
        """Send the last event, without waiting for the reader.

        Args:
            make: makes the event of the references to its data.
            parts: the data.
            variables: of the frames of a failure; see `fal_agent.variables`.
        """
        with self._emitting:
            self.flush_all()
            refs, buffers = self._pack(parts)
            self.is_over = True
            message: Any = make(refs)
            if variables is not None:
                text = variables if self.masker is None else self.masker.mask(variables.decode()).encode()
                message, buffers = dataclasses.replace(message, variables=len(buffers)), [*buffers, text]
            self._send(message, buffers)

    def answer(self, number: int, text: str, error: str) -> None:
        """The person answered a prompt, or cannot; an answer that nobody waits for any more is forgotten."""
        waiting = self._answers.pop(number, None)
        if waiting is not None:
            if number in self._passwords and not error:
                self._secrets.learn(text)
            waiting.put((text, error))

    def acknowledge(self, credit: int) -> None:
        """The reader dealt with `credit` bytes."""
        with self._credit:
            self._unacknowledged = max(0, self._unacknowledged - credit)
            self._credit.notify_all()

    def _pack(self, parts: Sequence[Buffer]) -> tuple[Data, list[Buffer]]:
        return self._outbox.pack(parts)

    def _emit(self, message: Any, buffers: Sequence[Buffer]) -> None:
        if self.is_over:
            return
        with self._credit:
            while self._unacknowledged and self._unacknowledged + message.cost > WINDOW:
                self._credit.wait(1.0)
            self._unacknowledged += message.cost
        self._send(message, buffers)


def _nothing() -> None:
    """What a call gathers when nobody captures."""


def _never(_seconds: float, _count: int) -> bool:
    """What its pipes hold then."""
    return False


def _as_text(value: Any) -> Any:
    """JSON for what display formatters give besides text: base64 for bytes, as Jupyter does."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        import base64

        return base64.b64encode(bytes(value)).decode("ascii")
    return str(value)


CURRENT_CALL: ContextVar[Optional[CallContext]] = ContextVar("fal_current_call", default=None)


def tell_progress(step: Step) -> None:
    """Say how far a loop of the call of this context has come."""
    call = CURRENT_CALL.get()
    if call is not None and not call.is_over:
        call.progress(step)
