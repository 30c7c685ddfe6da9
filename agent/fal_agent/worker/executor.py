"""Run calls, one at a time on the main thread or several in threads, and report how each ended.

Runs in a worker. Calls of a function that allows one call at a time run on the main thread, so that
an interrupt is an ordinary SIGINT for the user's code; with `multiplexing` above 1 each runs in a
thread of its own.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import queue
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from fal_agent import failures, pickling
from fal_agent.calling import complete, dump_result, run_chunk, run_coroutine, stream, stream_async
from fal_agent.duplex import c_signal
from fal_agent.errors import ProtocolError
from fal_agent.references import look_in
from fal_agent.variables import variables_of
from fal_agent.wire import Data, Execute, Failure, Found, Lend, Listening, Look, Reply, Result, Returned, Task
from fal_agent.worker.context import CURRENT_CALL, CallContext
from fal_agent.worker.debugging import clear_frames
from fal_agent.worker.lane import Lane
from fal_agent.worker.opening import Shelf
from fal_agent.worker.outbox import open_data
from fal_agent.worker.session import Sessions
from fal_agent.worker.versions import check_pydantic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fal_agent.duplex import Duplex
    from fal_agent.framing import Buffer
    from fal_agent.worker.app_runner import AppRunner
    from fal_agent.worker.capture import Capture
    from fal_agent.worker.gateway_runner import GatewayRunner
    from fal_agent.worker.secrets import Secrets

__all__ = ["Executor"]


class Executor:
    """The calls of one worker.

    Args:
        duplex: the connection to the agent.
        capture: the process's standard streams.
        secrets: environment variables that calls bring.
    """

    def __init__(self, capture: Capture, secrets: Secrets) -> None:
        self._secrets = secrets
        self.duplex: Optional[Duplex] = None
        self._capture = capture
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._calls: dict[str, CallContext] = {}
        self._known_tasks: dict[str, Task] = {}  # by the agent's names for them
        self._threads: dict[str, int] = {}  # run id -> ident of the thread that runs it
        self._shelf = Shelf()
        self._sessions = Sessions()
        look_in(sessions=self._sessions.value)
        self._switch = threading.Lock()  # an interrupt looks which call runs and strikes, undisturbed
        self._main_run: Optional[str] = None
        self._interruptible = False
        self._struck = False  # SIGINT came for the present call before its code began
        self._early: set[str] = set()  # calls that were interrupted before their turn
        self._lane: Optional[Lane] = None
        self._app: Optional[AppRunner] = None
        self._gateway: Optional[GatewayRunner] = None

    # ------------------------------------------------------------ the connection's thread

    def accept(self, request: Execute, buffers: list[bytes]) -> None:
        """Take a call; it runs when its turn comes."""
        assert self.duplex is not None
        if request.task is not None:
            self._known_tasks[request.template] = request.task
            if request.task.outbox:
                look_in(blobs=Path(request.task.outbox).parents[3])  # see `fal_agent.server.blobs`
        task = self._known_tasks[request.template]
        call = CallContext(request, task, self.duplex.send, self._secrets)
        self._calls[request.run_id] = call
        if request.function_data is not None:
            # Before any call begins: the next may come without the data, and begin first.
            with suppress(OSError):  # a blob that cannot be read is that call's own failure
                data = open_data(request.function_data, buffers, request.blobs)
                self._shelf.keep(task.function or "", data)
        if task.kind == "app" and self._app is not None:
            threading.Thread(target=self._swap, args=(call,), name="fal-swap", daemon=True).start()
        elif task.multiplexing > 1 and task.kind in ("function", "map"):
            threading.Thread(
                target=self._run_in_thread, args=(call, buffers), name=f"fal-{task.label}", daemon=True
            ).start()
        else:
            self._tasks.put((call, buffers))
            if self._lane is not None and self._lane.is_lent:  # the agent did not know yet
                self._lane.recall()

    def lend(self, request: Lend) -> None:
        """Open a lane to a notebook; it is served when its turn comes."""
        assert self.duplex is not None
        try:
            self._lane = Lane(request, self.duplex.send)
        except OSError as error:
            self._capture.log(f"the lane {request.lane} cannot be opened: {error}\n")
            self.duplex.send(Returned(request.lane))
            return
        self._lane.accept(self._tasks.put)
        self.duplex.send(Listening(request.lane))

    def recall(self, lane: str) -> None:
        """End a lane."""
        if self._lane is not None and self._lane.lane == lane:
            self._lane.recall()

    def after_fork(self) -> None:
        """In a forked child: let go of what belongs to the parent."""
        if self._lane is not None:
            self._lane.close_in_child()

    def route(self, runners: list[list[str]]) -> None:
        """Tell the gateway that runs here which runners there are."""
        if self._gateway is not None:
            self._gateway.route(runners)

    def acknowledge(self, run_id: str, credit: int) -> None:
        """The reader of a run dealt with `credit` bytes of its events."""
        call = self._calls.get(run_id)
        if call is not None:
            call.acknowledge(credit)

    def reply(self, message: Reply, text: bytes) -> None:
        """The person answered a prompt."""
        call = self._calls.get(message.run_id)
        if call is not None:
            call.answer(message.number, text.decode("utf-8", "replace"), message.error)

    def look(self, message: Look) -> None:
        """Answer what a person who writes a cell asks, beside the calls; not while one runs."""

        def answer() -> None:
            content = None
            try:
                content = None if self._calls else self._sessions.look(message)
            except Exception:  # noqa: BLE001 - completers run the user's code, and who asks has nothing to mend
                self._capture.log(traceback.format_exc())
            assert self.duplex is not None
            self.duplex.send(Found(message.number, content))

        threading.Thread(target=answer, name="fal-look", daemon=True).start()

    def interrupt(self, run_id: str) -> None:
        """Raise KeyboardInterrupt in one call, if it runs."""
        with self._switch:
            if self._main_run == run_id:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            elif run_id in self._threads:
                self._calls[run_id].is_struck = True
                target = ctypes.c_ulong(self._threads[run_id])
                ctypes.pythonapi.PyThreadState_SetAsyncExc(target, ctypes.py_object(KeyboardInterrupt))
            elif run_id in self._calls:
                self._early.add(run_id)

    # ------------------------------------------------------------ the main thread

    def run_forever(self) -> None:
        """Run calls on the main thread, as long as the process lives."""
        signal.signal(signal.SIGINT, self._on_sigint)
        while True:
            try:
                task = self._tasks.get()
            except KeyboardInterrupt:  # meant for a call that has just ended
                continue
            if isinstance(task, Lane):
                self._serve_lane(task)
            else:
                self._run_here(*task)

    def _run_here(self, call: CallContext, buffers: list[bytes]) -> None:
        with self._switch:
            self._main_run, self._struck = call.run_id, False
        self._run(call, buffers, shared=False)
        if c_signal.getsignal(signal.SIGINT) != self._on_sigint:  # the call has set its own
            signal.signal(signal.SIGINT, self._on_sigint)

    def _serve_lane(self, lane: Lane) -> None:
        """Run the calls that come through a lane, until it ends."""
        try:
            for request, buffers in lane.requests():
                send, task = lane.begin(request).send, self._known_tasks[request.template]
                call = CallContext(request, task, send, self._secrets)
                self._calls[request.run_id] = call
                self._run_here(call, buffers)
        except (ProtocolError, KeyError) as error:
            self._capture.log(f"the lane {lane.lane} carried nonsense: {error!r}\n")
        lane.close()

    def _on_sigint(self, _signum: int, _frame: Any) -> None:
        if self._interruptible:
            struck = CURRENT_CALL.get()
            if struck is not None:
                struck.is_struck = True
            raise KeyboardInterrupt
        self._struck = True

    def _run_in_thread(self, call: CallContext, buffers: list[bytes]) -> None:
        try:
            self._run(call, buffers, shared=True)
        except BaseException:  # noqa: BLE001 - a fault of ours: the process ends, so that the agent tells its calls
            self._capture.log(traceback.format_exc())
            os._exit(os.EX_SOFTWARE)

    # ------------------------------------------------------------ apps

    def _serve(self, call: CallContext, target: Any, setup: Optional[Callable[[], Any]]) -> None:
        """Serve an app or a function on the main thread until the process is told to end, or an error."""
        from fal_agent.worker.app_runner import AppRunner  # needs asyncio, which costs other workers 15 ms

        assert call.task.serve is not None
        assert self.duplex is not None
        self._app = AppRunner(call, call.task.serve, self.duplex.send)
        self._end_on_sigterm(call)
        try:
            self._app.run(target, setup)
        finally:
            self._app = None

    def _serve_port(self, call: CallContext, work: Callable[[], Any]) -> Any:
        """Run a function that has a server of its own on the main thread; give the function's value."""
        from fal_agent.worker.port_runner import PortRunner

        assert call.task.serve is not None
        assert self.duplex is not None
        self._end_on_sigterm(call)
        return PortRunner(call, call.task.serve, self.duplex.send).run(work)

    def _end_on_sigterm(self, call: CallContext) -> None:
        """Let SIGTERM, once nobody else hears it, send what was printed last and end the process."""

        def end(number: int, _frame: Any) -> None:
            self._capture.end(call)
            call.flush()
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

        signal.signal(signal.SIGTERM, end)

    def _serve_gateway(self, call: CallContext) -> None:
        """Be the gateway of an app on the main thread, until SIGTERM."""
        from fal_agent.worker.gateway_runner import GatewayRunner

        assert call.task.serve is not None
        assert self.duplex is not None
        self._gateway = GatewayRunner(call, call.task.serve, self.duplex.send)
        try:
            self._gateway.run()
        finally:
            self._gateway = None

    def _swap(self, call: CallContext) -> None:
        """Load another version of the app that is being served; runs in a thread."""
        token = CURRENT_CALL.set(call)
        try:
            assert self._app is not None
            assert call.task.serve is not None
            self._secrets.put(call.task.serve.app.environ)
            target, setup = self._shelf.function(call.task.function or "", None, reusable=False)
            self._app.swap(target, setup, call.task.serve)
        except BaseException as error:  # noqa: BLE001 - whatever the user's code raises is reported
            self._failure(call, error)()
        else:
            call.finish(lambda data: Result(call.run_id, data, sent_at=time.time()), [])
        finally:
            self._calls.pop(call.run_id, None)
            CURRENT_CALL.reset(token)

    # ------------------------------------------------------------ one call

    def _run(self, call: CallContext, buffers: list[bytes], *, shared: bool) -> None:
        token = CURRENT_CALL.set(call)
        self._capture.begin(call, shared=shared)
        started = time.perf_counter()
        error: Optional[BaseException] = None
        while True:
            try:
                if error is None:
                    finish = self._outcome(call, buffers, started, shared=shared)
                else:
                    finish = self._failure(call, error)
                self._leave(call, shared=shared)
                break
            except KeyboardInterrupt as struck:  # between the user's code and ours
                error = struck
        self._capture.end(call)
        with self._switch:
            self._calls.pop(call.run_id, None)
            self._early.discard(call.run_id)
        CURRENT_CALL.reset(token)
        try:
            finish()
        except OSError as problem:
            self._report_unkept(call, problem)

    def _report_unkept(self, call: CallContext, problem: OSError) -> None:
        """Say that what a call gave cannot be put on the disk, where large data waits for the agent."""
        message = (
            f"what {call.task.label}() gave cannot be kept on the host until it is fetched: {problem}. "
            "Free space there, or return less"
        )
        call.finish(lambda _: Failure(call.run_id, "resources", message, sent_at=time.time()), [])

    def _leave(self, call: CallContext, *, shared: bool) -> None:
        """From here on an interrupt does not strike this call any more."""
        with self._switch:
            ident = self._threads.pop(call.run_id, None)
            if ident is not None:  # one that was raised and has not struck yet is taken back
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), None)
            if self._main_run == call.run_id:
                self._main_run = None
            self._interruptible = self._interruptible and shared

    def _outcome(
        self, call: CallContext, buffers: list[bytes], started: float, *, shared: bool
    ) -> Callable[[], None]:
        """Run the call; give what sends its result or failure."""
        try:
            if shared:
                with self._switch:
                    self._threads[call.run_id] = threading.get_ident()
            else:
                self._interruptible = True
            try:
                if call.run_id in self._early or (self._struck and not shared):
                    raise KeyboardInterrupt
                parts, generator = self._perform(call, buffers)
                if not shared and c_signal.getsignal(signal.SIGINT) != self._on_sigint:
                    call.is_struck = True  # by its own handler, for all we know
            finally:
                if not shared:
                    self._interruptible = False
        except BaseException as error:  # noqa: BLE001 - whatever the user's code raises is reported, SystemExit too
            return self._failure(call, error)
        seconds = time.perf_counter() - started
        return lambda: call.finish(
            lambda data: Result(
                call.run_id,
                data,
                generator=generator,
                seconds=seconds,
                struck=call.is_struck,
                private=call.is_private(parts),
                sent_at=time.time(),
            ),
            parts,
        )

    def _failure(self, call: CallContext, error: BaseException) -> Callable[[], None]:
        kind, message, detail, parts = failures.describe(error, masker=call.masker)
        variables = None
        if call.task.kind != "cell":  # a session keeps its last error for %debug
            variables = variables_of(error) if kind in ("user", "interrupted") else None
            clear_frames(error)

        def make(data: Data) -> Failure:
            return Failure(call.run_id, kind, message, detail=detail, data=data, sent_at=time.time())

        return lambda: call.finish(make, parts, variables)

    def _perform(self, call: CallContext, buffers: list[bytes]) -> tuple[Sequence[Buffer], bool]:
        """Open the call's data, run it, and pickle what it gives."""
        request, task = call.request, call.task
        # Before any of the user's code is opened: what it imports may look.
        self._secrets.put(task.environ if task.serve is None else task.serve.app.environ)
        _enter_folder(task.folder, task.import_path)
        arguments = open_data(request.arguments, buffers, request.blobs)
        check_pydantic(task.pydantic, arguments)
        if task.kind == "cell":
            reply, parts = self._sessions.run(
                task.session or "", pickling.load(arguments[:1]), arguments, call, fresh=task.fresh
            )
            return [*pickling.dump(reply)[:1], *parts], False
        if task.kind == "comm":
            goes_on = self._sessions.hear(
                task.session or "", pickling.load(arguments[:1]), arguments[1:], call
            )
            return dump_result(goes_on, task.label), False
        if task.kind == "gateway":
            self._serve_gateway(call)
            return dump_result(None, task.label), False
        if hasattr(sys, "last_value"):
            self._sessions.forget_errors()
        function_data, digest = request.function_data, task.function or ""
        opened = None if function_data is None else open_data(function_data, buffers, request.blobs)
        function, setup = self._shelf.function(digest, opened, task.reusable, pydantic=task.pydantic)
        if task.serve is not None and task.serve.app.port is None:
            self._serve(call, function, setup)
            return dump_result(None, task.label), False
        positional, named = pickling.load(arguments)
        first = () if setup is None else (self._shelf.setup_value(digest, setup),)
        if task.kind == "map":
            return dump_result(run_chunk(function, first, positional[0]), task.label), False
        if task.serve is not None:
            value = self._serve_port(call, lambda: complete(function(*first, *positional, **named)))
            return dump_result(value, task.label), False
        value = complete(function(*first, *positional, **named))
        if inspect.isgenerator(value):
            return dump_result(stream(value, task.label, call.item), task.label), True
        if inspect.isasyncgen(value):
            run_coroutine(stream_async(value, task.label, call.item))
            return dump_result(None, task.label), True
        return dump_result(value, task.label), False


def _enter_folder(folder: Optional[str], import_path: str) -> None:
    """Make the folder of a call's files the working directory, importable as a script's would be."""
    if folder is None:
        return
    if os.getcwd() != folder:  # noqa: PTH109 - asked for each call, and Path.cwd() takes ten times as long
        os.chdir(folder)
    for path in (folder, os.path.join(folder, import_path) if import_path else folder):  # noqa: PTH118 - as above
        if path not in sys.path:
            sys.path.insert(0, path)
