"""This very process as a host, for debugging: breakpoints, `%debug` and prints work as in any code.

Runs in the notebook. A call runs when it is submitted, in the thread that submits it; a generator
runs in a thread of its own, a bounded way ahead of its reader. Function, arguments and result are
pickled and unpickled all the same, so that what cannot travel is found here too. Requirements,
machines, timeouts and numbers of workers mean nothing on this host.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import inspect
import os
import platform
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fal_agent import failures, pickling
from fal_agent.calling import complete, dump_result, run_chunk, run_coroutine, stream, stream_async
from fal_agent.errors import FalServerlessError
from fal_agent.runtime.fingerprints import fingerprint
from fal_agent.wire import WINDOW, Failure, Item, Result
from fal_notebook.hosts.base import Received
from fal_notebook.hosts.inbox import Inbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from fal_agent.framing import Buffer
    from fal_notebook.hosts.base import EventSink, Parcel

__all__ = ["InlineHost"]

_ITEM_COST = 8 << 10  # a small item counts for this much, so that a generator runs at most 128 items ahead
_PACKAGES = (str(Path(failures.__file__).parent), str(Path(__file__).parents[1]))
_MACHINERY = ("asyncio", "concurrent.futures", "threading")


class InlineHost:
    """This process as a host.

    Args:
        name: how messages call it.
    """

    def __init__(self, name: str = "inline") -> None:
        self.name = name
        self._setups: dict[str, Any] = {}  # what setup functions made, by what they do
        self._files = contextlib.ExitStack()
        self._inbox = Inbox()

    def submit(
        self,
        parcel: Parcel,
        sink: EventSink,
        *,
        run_id: str | None = None,
        attended: bool = False,  # noqa: ARG002 - the protocol's
    ) -> InlineExecution:
        """Run a call; when this returns it has ended, unless it is a generator.

        Raises:
            FalServerlessError: the call is a cell, which would run in the notebook's own session anyway.
        """
        if parcel.call.kind == "cell":
            raise FalServerlessError(
                f"cells cannot run on {self.name!r}, which is this process: run the cell without %%fal, "
                "or on the host 'local'"
            )
        execution = InlineExecution(run_id or uuid.uuid4().hex[:16], parcel.call.label, sink)
        execution.run(lambda: self._start(parcel), parcel.call.environ)
        return execution

    def ask(self, question: str, *, timeout: float = 30.0, **arguments: Any) -> Any:  # noqa: ARG002 - the protocol's
        """Answer what is asked of an agent, as far as it means something without one.

        Raises:
            FalServerlessError: it does not.
        """
        if question == "sync":
            return self._inbox.sync(**arguments)
        if question == "status":
            agent = {"pid": os.getpid(), "python": platform.python_version(), "started_at": None}
            return {"machine": {}, "gpus": [], "agent": agent, "workers": []}
        if question in ("environments", "runs", "prune"):
            return []
        if question == "stop":
            return {"workers": 0}
        raise FalServerlessError(f"{self.name!r} is this process and has no agent to ask about {question!r}")

    def upload(self, name: str, data: Buffer, stop: threading.Event) -> None:  # noqa: ARG002 - the protocol's
        """Put content where "sync" finds it; see `fal_notebook.hosts.base.KeepsData`."""
        self._inbox.put(name, data)

    def close(self) -> None:
        """Remove the folders of app files."""
        self._files.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    def _start(self, parcel: Parcel) -> Any:
        """Open the call's data and call the function; gives its value, or the iterator of its items."""
        call = parcel.call
        with _own_modules_kept():
            function, setup = pickling.load(parcel.function_data)
            positional, named = pickling.load([_read_only(parcel, ref) for ref in parcel.arguments])
        first = () if setup is None else (self._setup_value(setup),)
        with self._app_files(parcel):
            if call.kind == "map":
                return run_chunk(function, first, positional[0])
            return complete(function(*first, *positional, **named))

    def _setup_value(self, setup: Callable[[], Any]) -> Any:
        name = fingerprint(setup)
        if name not in self._setups:
            self._setups[name] = setup()
        return self._setups[name]

    @contextlib.contextmanager
    def _app_files(self, parcel: Parcel) -> Iterator[None]:
        """Put app files into a folder that is the working folder, and importable, while the call runs."""
        if not parcel.call.files:
            yield
            return
        folder = self._files.enter_context(tempfile.TemporaryDirectory(prefix="fal-inline-"))
        for relative, blob, mode in parcel.call.files:
            target = Path(folder, relative)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(parcel.blobs[blob])
            target.chmod(0o600 | (int(mode) & 0o111))
        before = Path.cwd()
        os.chdir(folder)
        importable = sorted({folder, str(Path(folder, parcel.call.import_path))})
        for path in importable:
            sys.path.insert(0, path)
        try:
            yield
        finally:
            for path in importable:
                sys.path.remove(path)
            os.chdir(before)


class InlineExecution:
    """One call that runs, or ran, in this process."""

    def __init__(self, run_id: str, label: str, sink: EventSink) -> None:
        self.run_id = run_id
        self._label, self._sink = label, sink
        self._seq = 0
        self._unacknowledged = 0
        self._changed = threading.Condition()
        self._thread: int | None = None  # the ident of the generator's thread while user code may run in it
        self._stopped = False

    # ------------------------------------------------------------ what the notebook may do

    def receive(self) -> None:
        """Nothing: every event comes through the sink."""

    def acknowledge(self, received: Received) -> None:
        """Let a generator go on."""
        with self._changed:
            self._unacknowledged -= received.event.cost
            self._changed.notify_all()

    def reply(self, number: int, text: str, error: str = "") -> None:
        """Nothing: code that runs here asks for itself."""

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in a generator; any other call has ended."""
        with self._changed:
            self._stopped = True
            if self._thread is not None:
                target = ctypes.c_ulong(self._thread)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(target, ctypes.py_object(KeyboardInterrupt))
            self._changed.notify_all()

    cancel = kill = interrupt

    # ------------------------------------------------------------ the run

    def run(self, start: Callable[[], Any], environ: Mapping[str, str]) -> None:
        """Run a call, with its secrets in the environment, and report how it ended.

        A generator goes on in a thread.
        """
        started = time.perf_counter()
        try:
            with _variables(environ):
                value = start()
            if inspect.isgenerator(value) or inspect.isasyncgen(value):
                context = contextvars.copy_context()
                threading.Thread(
                    target=context.run,
                    args=(self._run_generator, value, environ),
                    name=f"fal-{self._label}",
                    daemon=True,
                ).start()
                return
            parts = dump_result(value, self._label)
        except BaseException as error:  # noqa: BLE001 - whatever the user's code raises is reported, as on any host
            self._fail(error)
            return
        self._end(parts, time.perf_counter() - started)

    def _run_generator(self, items: Any, environ: Mapping[str, str]) -> None:
        with _variables(environ):
            self._produce(items)

    def _produce(self, items: Any) -> None:
        started = time.perf_counter()
        with self._changed:
            self._thread = threading.get_ident()
        try:
            try:
                if inspect.isgenerator(items):
                    value = stream(items, self._label, self._send_item)
                else:
                    value = run_coroutine(stream_async(items, self._label, self._send_item))
            finally:
                with self._changed:
                    self._thread = None
            parts = dump_result(value, self._label)
        except BaseException as error:  # noqa: BLE001 - as above
            self._fail(error)
            return
        self._end(parts, time.perf_counter() - started, generator=True)

    def _send_item(self, parts: Sequence[Buffer]) -> None:
        cost = max(_ITEM_COST, sum(len(part) for part in parts))
        with self._changed:
            thread, self._thread = self._thread, None  # ours runs now: an interrupt must not strike here
            try:
                while self._unacknowledged and self._unacknowledged + cost > WINDOW and not self._stopped:
                    self._changed.wait(1.0)
                if self._stopped:
                    raise KeyboardInterrupt
                self._unacknowledged += cost
            finally:
                self._thread = thread
        data = _copies(parts)
        refs: list[int | str] = list(range(len(data)))
        item = Item(self.run_id, refs, seq=self._count(), sent_at=time.time(), cost=cost)
        self._sink(Received(item, data))

    def _end(self, parts: Sequence[Buffer], seconds: float, *, generator: bool = False) -> None:
        data = _copies(parts)
        refs: list[int | str] = list(range(len(data)))
        result = Result(
            self.run_id, refs, generator=generator, seconds=seconds, seq=self._count(), sent_at=time.time()
        )
        self._sink(Received(result, data))

    def _fail(self, error: BaseException) -> None:
        error.__traceback__ = _without_leading(error.__traceback__, lambda name, _: name == __file__)
        kind, message, detail, parts = failures.describe(error)
        refs: list[int | str] = list(range(len(parts)))
        failure = Failure(
            self.run_id, kind, message, detail=detail, data=refs, seq=self._count(), sent_at=time.time()
        )
        if kind not in ("user", "interrupted"):
            self._sink(Received(failure, parts))
            return
        error.__traceback__ = _without_leading(error.__traceback__, _is_machinery)
        self._sink(Received(failure, parts, error=error))

    def _count(self) -> int:
        self._seq += 1
        return self._seq


@contextlib.contextmanager
def _variables(environ: Mapping[str, str]) -> Iterator[None]:
    """Have what the keyring gave among this process's variables; what came from there is there already."""
    added = {name: value for name, value in environ.items() if os.environ.get(name) != value}
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _own_modules_kept() -> Iterator[None]:
    """Modules that travel by value take their own places on a host; here those places are taken."""
    before = dict(sys.modules)
    try:
        yield
    finally:
        for name, module in list(sys.modules.items()):
            own = before.get(name)
            if own is None or own is module:
                continue
            sys.modules[name] = own
            parent, _, child = name.rpartition(".")
            if vars(sys.modules.get(parent, sys)).get(child) is module:
                setattr(sys.modules[parent], child, own)


def _read_only(parcel: Parcel, ref: int | str) -> memoryview:
    """Give a part of the arguments so that unpickling copies it: the caller's arrays must stay."""
    return memoryview(parcel.buffers[ref] if isinstance(ref, int) else parcel.blobs[ref]).toreadonly()


def _copies(parts: Sequence[Buffer]) -> list[Buffer]:
    """Copy what a call gives, so that it changes no more; arrays made of the copies can be written to."""
    return [bytearray(part) for part in parts]


def _is_machinery(filename: str, module: str) -> bool:
    ours = any(filename.startswith(package + os.sep) for package in _PACKAGES)
    return ours or any(module == name or module.startswith(f"{name}.") for name in _MACHINERY)


def _without_leading(
    traceback: TracebackType | None, unwanted: Callable[[str, str], bool]
) -> TracebackType | None:
    """Leave out the outermost frames as long as they are unwanted; all of them only if all are."""
    while traceback is not None:
        frame = traceback.tb_frame
        if not unwanted(frame.f_code.co_filename, str(frame.f_globals.get("__name__", ""))):
            return traceback
        traceback = traceback.tb_next
    return None
