"""The IPython shell that runs a session's cells, without a terminal.

Runs in a worker. IPython is imported with this module, so the module is imported on first use. What
a cell shows goes to the call that runs it; what it raises is given back, and goes along as IPython
shows it here, since only here are the frames.
"""

from __future__ import annotations

import asyncio
import contextvars
import linecache
import os
import re
import sys
import threading
import types
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from IPython.core import interactiveshell
from IPython.core.compilerop import CachingCompiler
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import select_figure_formats
from traitlets import Type
from traitlets.config import Config

from fal_agent.frames import leave_to_debuggers
from fal_agent.worker.context import CURRENT_CALL
from fal_agent.worker.debugging import clear_frames, use_interruptible_pdb
from fal_agent.worker.kernel_magics import KernelMagics
from fal_agent.worker.marks import bear_marks
from fal_agent.worker.overlay import make_overlay, take_up

if TYPE_CHECKING:
    import ast
    from collections.abc import Callable, Coroutine, Iterator

    from fal_agent.worker.context import CallContext

__all__ = ["SessionShell", "make_shell"]

_REPORTING = ("run_code", "run_ast_nodes", "run_cell_async", "_run_cell")
_OURS = str(Path(__file__).parent) + os.sep
_TURNS = 8  # of the event loop after a callback
_MOMENT = 0.05  # seconds
_OTHER_THREADS = ("fal-", "IPythonHistorySavingThread", "asyncio_")  # none of which speaks by itself
_DEBUGS = re.compile(r"^\s*%(?:debug|tb)\b|\bpdb\b|\blast_(?:value|traceback|exc)\b", re.MULTILINE)
_INLINE = "module://matplotlib_inline.backend_inline"


def make_shell() -> SessionShell:
    """Make the shell of a new session, with a namespace of its own that is called `__main__`."""
    make_overlay()
    config = Config()
    config.HistoryManager.hist_file = ":memory:"  # the notebook keeps the history
    module = types.ModuleType("__main__", "Automatically created module for IPython interactive environment")
    interactiveshell.warn = _warn  # of IPython's own code only
    if "" not in sys.path:  # what lies where `%cd` led can be imported, and hides no library
        libraries = (i for i, path in enumerate(sys.path) if path.endswith("-packages"))
        sys.path.insert(next(libraries, len(sys.path)), "")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is not a writable location", UserWarning)  # nothing is written
        shell = SessionShell(config=config, user_module=module)
    with suppress(Exception):  # a home that cannot be written to: %store is not there then
        shell.extension_manager.load_extension("storemagic")
    return shell


class _Compiler(CachingCompiler):  # type: ignore[misc] # IPython has no types
    """Compiles cells under the name, and with the numbers of lines, that they have in the notebook."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "<cell>"
        self.code = self.source = ""
        self.lines_before = 0

    def expect(self, request: dict[str, Any]) -> None:
        """Know the cell that comes next; `request` is as `fal_agent.worker.session` says."""
        self.name, self.code, self.source = request["filename"], request["code"], request["source"]
        blank = len(self.code) - len(self.code.lstrip())  # IPython drops empty lines at the top
        self.lines_before = request["first_line"] - 1 + self.code[:blank].count("\n")

    def get_code_name(self, raw_code: str, transformed_code: str, number: int) -> str:
        """Give the name of a piece of code: the cell's own, if it is the cell."""
        return (
            self.name
            if raw_code == self.code
            else str(super().get_code_name(raw_code, transformed_code, number))
        )

    def cache(self, transformed_code: str, number: int = 0, raw_code: Optional[str] = None) -> str:
        """Let tracebacks find the cell's lines as they stand in the notebook."""
        name = str(super().cache(transformed_code, number, raw_code))
        if name == self.name:
            linecache.cache[name] = (len(self.source), None, self.source.splitlines(keepends=True), name)
        return name

    def ast_parse(self, source: str, filename: str = "<unknown>", symbol: str = "exec") -> ast.AST:
        """Parse code; the cell's lines are counted as in the notebook, also in warnings about them."""
        above = "\n" * self.lines_before if filename == self.name else ""
        tree: ast.AST = super().ast_parse(above + source, filename, symbol)
        return tree


class _Publisher(DisplayPublisher):  # type: ignore[misc]
    """Hands what `display` shows to the call that shows it."""

    def publish(
        self,
        data: dict[str, Any],
        metadata: Optional[dict[str, Any]] = None,
        source: Any = None,  # noqa: ARG002 - IPython's signature
        *,
        transient: Optional[dict[str, Any]] = None,
        update: bool = False,
        **_others: Any,
    ) -> None:
        """Show a MIME bundle."""
        call = self.shell.call
        if call is not None:
            call.display("update" if update else "display", data, metadata, transient)

    def clear_output(self, wait: bool = False) -> None:
        """Clear the cell's output."""
        call = self.shell.call
        if call is not None:
            call.clear(wait)


class _Hook(DisplayHook):  # type: ignore[misc]
    """Hands the value of a cell's last expression to the call."""

    def write_output_prompt(self) -> None:
        """Write nothing: the notebook numbers its results itself."""

    def write_format_data(
        self, format_dict: dict[str, Any], md_dict: Optional[dict[str, Any]] = None
    ) -> None:
        """Show the value."""
        call = self.shell.call
        if call is not None and format_dict:
            call.display("result", format_dict, md_dict)


class SessionShell(InteractiveShell):  # type: ignore[misc]
    """Runs cells in one namespace."""

    execution_count: int
    kernel = None  # libraries ask whether a shell has one, to know a notebook from a terminal
    compiler_class = Type(_Compiler)
    displayhook_class = Type(_Hook)
    display_pub_class = Type(_Publisher)

    def __init__(self, **options: Any) -> None:
        self._call: Optional[CallContext] = None
        self._depth = 0
        self._is_ending = False  # the cell's own error is being shown
        self._has_told = False  # it was, here or where its sources are
        self._plots_are_inline = False
        self._context = contextvars.copy_context()
        super().__init__(**options)
        self.loop_runner = _run_coroutine
        self.set_hook("show_in_pager", _show_page, 0)
        self.register_magics(KernelMagics)

    @property
    def call(self) -> Optional[CallContext]:
        """The call that shows something now; None between calls."""
        call = CURRENT_CALL.get()
        if call is None or call.is_over:  # a thread or a task that an earlier cell left behind
            call = self._call
        return None if call is None or call.is_over else call

    @contextmanager
    def _tee(self, channel: str) -> Iterator[None]:  # noqa: ARG002 - IPython's signature
        """Keep no copy of what a cell prints, as IPython does for its history: it may be gigabytes."""
        yield

    def become_current(self) -> None:
        """Be what `get_ipython()` gives, and have the namespace that `__main__` is."""
        for cls in type(self)._walk_mro():  # noqa: SLF001 - several shells live here, IPython knows of one
            cls._instance = self
        sys.modules["__main__"] = self.user_module
        self._show_plots_inline()

    def run_cell_of(self, request: dict[str, Any], call: CallContext) -> Optional[BaseException]:
        """Run a cell as it stands in the notebook; give what it raised.

        Args:
            request: see `fal_agent.worker.session`.
            call: takes what the cell shows.
        """
        if not _DEBUGS.search(request["code"]):
            self.forget_error()
        elif "pdb" in request["code"]:
            use_interruptible_pdb()
        self.compile.expect(request)
        self._count_as(request["number"])
        if call.parent:
            bear_marks(self)
        self._has_told = False
        result = self._run(self._run_as_kernels_do(request["code"]), call)
        error: Optional[BaseException] = result.error_before_exec or result.error_in_exec
        if error is not None and not self._has_told:  # the user's own handler dealt with it
            self._tell_error(type(error).__name__, _text_of(error), None, is_own=True)
        return error

    def forget_error(self) -> None:
        """Let go of the frames of the last error, and of what only they hold."""
        clear_frames(getattr(sys, "last_value", None))
        for name in ("last_type", "last_value", "last_traceback", "last_exc"):
            if hasattr(sys, name):
                delattr(sys, name)
        result = self.last_execution_result
        if result is not None:
            result.error_before_exec = result.error_in_exec = None
        self.InteractiveTB.tb = self.InteractiveTB.pdb = None

    def run_callback(self, callback: Callable[[], None], call: CallContext) -> None:
        """Run what a front end's message causes; `call` takes what it shows."""

        async def run() -> None:
            callback()
            for _ in range(_TURNS):  # tasks that it woke go on; the loop stands still between calls
                await asyncio.sleep(0)

        self._run(run(), call)

    def let_tasks_go_on(self, call: CallContext) -> None:
        """Let tasks that cells have left behind run for a moment; `call` takes what they show."""
        if self._tasks():
            self._run(asyncio.sleep(_MOMENT), call)

    @property
    def goes_on(self) -> bool:
        """Whether threads or tasks of the user's are left that may do something between calls."""
        return bool(self._tasks()) or any(
            thread is not threading.main_thread() and not thread.name.startswith(_OTHER_THREADS)
            for thread in threading.enumerate()
        )

    def _tasks(self) -> set[Any]:
        return asyncio.all_tasks(_loop())

    def _run(self, coroutine: Coroutine[Any, Any, Any], call: CallContext) -> Any:
        self._call, self._depth = call, 0
        try:
            return _run_coroutine(self._run_in_loop(coroutine))
        finally:
            self._call = None
            for variable, value in self._context.items():  # such as NumPy's print options; a task has a copy
                variable.set(value)

    async def _run_in_loop(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run while an event loop runs, as a kernel does: tasks may be made in any cell."""
        try:
            return await coroutine
        finally:
            self._context = contextvars.copy_context()

    async def _run_as_kernels_do(self, code: str) -> Any:
        problem = None
        try:
            transformed = self.transform_cell(code)
        except Exception:  # noqa: BLE001 - IPython shows it when it is told of it
            transformed, problem = code, sys.exc_info()
        if not self.should_run_async(code, transformed_cell=transformed, preprocessing_exc_tuple=problem):
            return self.run_cell(code, store_history=True)
        self._depth = 1
        try:
            result = await self.run_cell_async(
                code, store_history=True, transformed_cell=transformed, preprocessing_exc_tuple=problem
            )
            self.events.trigger("post_execute")
            self.events.trigger("post_run_cell", result)
        finally:
            self._depth = 0
        return result

    def forget_outputs(self) -> None:
        """Let go of the results that `_`, `Out` and the like keep."""
        self.displayhook.flush()

    def _count_as(self, number: int) -> None:
        """Give the next cell the number that it has in the notebook, so that `Out[5]` is the one there."""
        if number < self.execution_count:  # another notebook shares the session
            return
        self.execution_count = number
        history = self.history_manager
        for inputs in (history.input_hist_parsed, history.input_hist_raw):
            inputs.extend([""] * (number - len(inputs)))

    def _show_plots_inline(self) -> None:
        """Let matplotlib's figures show at the end of the cell, whenever it is imported."""
        if self._plots_are_inline:
            return
        os.environ["MPLBACKEND"] = _INLINE  # a worker has no screen
        backend = sys.modules.get("matplotlib_inline.backend_inline")
        if backend is not None:
            self._plots_are_inline = True
            if (
                backend.flush_figures not in self.events.callbacks["post_execute"]
            ):  # an older session had it first
                backend.configure_inline_support(self, _INLINE)
                settings = backend.InlineBackend.instance()
                select_figure_formats(self, settings.figure_formats, **settings.print_figure_kwargs)
        elif "matplotlib" in sys.modules:  # a function used it in this worker before
            sys.modules["matplotlib"].use(_INLINE)

    # ------------------------------------------------------------ what IPython calls

    def run_cell(self, *args: Any, **options: Any) -> Any:
        """Run a cell, or what `%run` and the like take from a file."""
        self._depth += 1
        try:
            return super().run_cell(*args, **options)
        finally:
            self._depth -= 1

    def showtraceback(self, *args: Any, **options: Any) -> None:
        """Show an error: the cell's own as the last thing of it, or one that a magic or a repr met."""
        with self._telling(sys._getframe(1)) as is_told:  # noqa: SLF001 - who calls says whose error it is
            if is_told:
                super().showtraceback(*args, **options)

    def showsyntaxerror(self, *args: Any, **options: Any) -> None:
        """As `showtraceback`."""
        with self._telling(sys._getframe(1)):  # noqa: SLF001
            super().showsyntaxerror(*args, **options)

    def showindentationerror(self) -> None:
        """As `showtraceback`."""
        with self._telling(sys._getframe(1)):  # noqa: SLF001
            super().showindentationerror()

    @contextmanager
    def _telling(self, caller: Any) -> Iterator[bool]:
        """Let the notebook know when it is the cell's own error that is shown; give whether to show it."""
        error = sys.exc_info()[1]
        _hide_own_frames(error)
        if self._is_ending or self._depth != 1 or caller.f_code.co_name not in _REPORTING:
            yield True
            return
        assert error is not None
        if not _has_sources(error):  # the notebook has, and shows the error itself
            self._has_told = True
            leave_to_debuggers(error)
            yield False
            return
        self._is_ending, self._has_told = True, False
        try:
            yield True
        finally:
            self._is_ending = False
        if not self._has_told:  # it was printed: groups of exceptions, mistakes in using a magic
            self._tell_error(type(error).__name__, _text_of(error), None, is_own=True)
            self._has_told = True

    def _showtraceback(self, etype: Any, evalue: Any, stb: list[str]) -> None:
        """Hand an error as it is shown to the call."""
        self._last_traceback = stb
        self._tell_error(str(etype.__name__), _text_of(evalue), stb, is_own=self._is_ending)
        self._has_told = True

    def _tell_error(self, name: str, text: str, lines: Optional[list[str]], *, is_own: bool) -> None:
        call = self.call
        if call is not None:
            shown = {"ename": name, "evalue": text, "traceback": lines}
            call.display("error", shown, {"own": is_own})

    def ask_exit(self) -> None:
        """Say how a session ends, where a terminal's shell would end."""
        print("The session goes on; %fal stop ends it.", file=sys.stderr)  # noqa: T201 - IPython's way to the user

    def system(self, cmd: str) -> None:
        """Run a command of the shell; what it installed can be imported."""
        super().system(cmd)
        take_up()

    def set_next_input(self, s: str, replace: bool = False) -> None:
        """Put text into the notebook's next cell, or in place of this one, as `%load` does."""
        call = self.call
        if call is not None:
            call.display("next_input", {"text/plain": s}, {"replace": replace})

    def enable_matplotlib(self, gui: Any = None) -> Any:
        """Draw figures inline; what would draw them in the page needs a kernel."""
        if gui in ("notebook", "nbagg"):
            raise UsageError(
                "the notebook backend of matplotlib needs a kernel beside it; a session on a host shows "
                "figures with `%matplotlib inline`"
            )
        return super().enable_matplotlib(gui)

    def enable_gui(self, gui: Any = None) -> None:
        """Accept `%matplotlib inline`; there is no screen for another toolkit's windows."""
        if gui not in (None, "", "inline"):
            raise UsageError(
                f"a session on a host has no screen for {gui}; `%matplotlib inline` shows figures here"
            )

    def init_io(self) -> None:
        """Leave the streams alone: the worker captures them."""


def _loop() -> asyncio.AbstractEventLoop:
    """The loop that runs while a cell does."""
    from IPython.core.async_helpers import get_asyncio_loop

    loop: asyncio.AbstractEventLoop = get_asyncio_loop()
    return loop


def _run_coroutine(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a cell that awaits. An interrupt cancels it, and lets its `finally` blocks run."""
    loop = _loop()
    task = loop.create_task(coroutine)
    try:
        return loop.run_until_complete(task)
    except KeyboardInterrupt as interrupt:
        task.cancel()
        outcome = loop.run_until_complete(asyncio.gather(task, return_exceptions=True))[0]
        cancelled = getattr(outcome, "error_in_exec", outcome)  # it was raised where the cell was waiting
        raise interrupt.with_traceback(getattr(cancelled, "__traceback__", None)) from None


def _show_page(shell: SessionShell, data: Any, start: int = 0, **_options: Any) -> None:
    """Hand what IPython would put into a pager (help, sources) to the notebook's pager."""
    call = shell.call
    if call is not None:
        bundle = data if isinstance(data, dict) and "text/plain" in data else {"text/plain": str(data)}
        call.display("page", bundle, {"start": start})


def _warn(message: Any, *args: Any, **options: Any) -> None:
    """Warn on behalf of IPython, but not how to leave it after SystemExit: the notebook says so itself."""
    if "To exit:" not in str(message):
        options["stacklevel"] = options.get("stacklevel", 1) + 1
        warnings.warn(message, *args, **options)


def _hide_own_frames(error: Optional[BaseException]) -> None:
    """Leave the frames of ours that user code called (`open`, made to know `/data`) out of tracebacks."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        step = error.__traceback__
        while step is not None:
            while step.tb_next is not None and step.tb_next.tb_frame.f_code.co_filename.startswith(_OURS):
                step.tb_next = step.tb_next.tb_next
            step = step.tb_next
        error = error.__cause__ or error.__context__


def _has_sources(error: Optional[BaseException]) -> bool:
    """Whether the lines of all Python files that an error went through are known here."""
    step = error.__traceback__ if error is not None else None
    while step is not None:
        name = step.tb_frame.f_code.co_filename
        if name.endswith(".py") and not linecache.getline(name, step.tb_lineno, step.tb_frame.f_globals):
            return False
        step = step.tb_next
    return True


def _text_of(error: Any) -> str:
    try:
        return str(error)
    except Exception as problem:  # noqa: BLE001 - the user's own __str__
        return f"<its text cannot be had: __str__ raised {type(problem).__name__}>"


# Libraries recognise a notebook by the name of its shell, and show rich output and wide tables then.
SessionShell.__name__ = SessionShell.__qualname__ = "ZMQInteractiveShell"
SessionShell.__module__ = "ipykernel.zmqshell"
