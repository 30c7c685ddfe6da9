"""Record runs and their events, so that nothing is lost when a link, a notebook or the agent ends.

Runs in the agent; several agents may share one file. `add_run` has recorded a run when it returns.
Events and states are queued, and a thread records them in groups, in the order given, within 50 ms:
that is the most that a killed agent can lose. The queue is bounded.

A full disk or a damaged file never stops a call: the journal says so once, keeps what fits into its
queue, tries again every second, and says what could not be recorded when it works again.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Optional, TypeVar

from fal_agent.errors import ResourceError
from fal_agent.server.intents import Intents, left_behind, read_intents
from fal_agent.server.journal_file import (
    ENDED,
    MAX_SEQ,
    STATES,
    CellRecord,
    Entry,
    JournalFile,
    NewCell,
    NewEvent,
    NewRun,
    NewSeen,
    NewState,
    RunRecord,
    set_aside,
)
from fal_agent.server.proc import identity, is_alive, is_of_another_boot
from fal_agent.server.spool import Spool, left_spools

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

__all__ = ["Dropped", "Journal", "RunRecord"]

RUN_BYTES = 256 << 20  # of events that one run may keep before output is left out of its middle
QUEUE_BYTES = 8 << 20  # that may wait to be recorded
GROUP_SECONDS = 0.05  # for which events gather before they are recorded together
RETRY_SECONDS = 1.0
SETTLED_SECONDS = 1.5  # without trouble after which a file counts as working again

_SLICE_ENTRIES, _SLICE_BYTES = 512, 1 << 20  # of one transaction: a new run waits no longer than this takes
_ENTRY_BYTES = 200  # what a queued entry takes beside its frame, about
_TRIM_BYTES = 4 << 20  # left out of a run at a time
_REMEMBERED_ENDS = 10_000
_WAL_BYTES = 4 << 20  # of write-ahead log after which it is moved into the file
_T = TypeVar("_T")


class Dropped(NamedTuple):
    """What `Journal.retain` forgot: runs, names of the blobs that only they needed, and bytes of events."""

    runs: int
    blobs: list[str]
    bytes: int = 0


class Journal:
    """The record of runs and events; may be used from any thread.

    Args:
        path: the SQLite file; its folder is made if need be.
        clock: seconds since the Unix epoch.
        steady: seconds since some moment, of a clock that never jumps.
        on_error: told, once per trouble, what is wrong and what becomes of the record. May be called
            from any thread.
        run_bytes: bytes of events that one run may keep.
        agent: identity of the process that the runs belong to; this one by default.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
        on_error: Optional[Callable[[str], None]] = None,
        run_bytes: int = RUN_BYTES,
        agent: Optional[str] = None,
    ) -> None:
        self.path = path
        self.agent = agent or identity()
        self._clock, self._steady, self._on_error, self._run_bytes = clock, steady, on_error, run_bytes
        self._lock = threading.RLock()  # held while the file is used
        self._room = threading.Condition(threading.Lock())  # held while the queue is used
        self._queue: deque[Entry] = deque()
        self._queued = 0  # bytes
        self._left_out = 0  # events that the queue had no room for while the file could not be written
        self._unsaved: set[str] = set()  # runs that wait in the queue, because the file could not be written
        self._sizes: dict[str, int] = {}  # bytes of the events of each run that goes on
        self._trim_at: dict[str, int] = {}
        self._ended: dict[str, float] = {}  # when the latest runs ended, by a clock that never jumps
        self._failing = self._closing = False
        self._works_since: Optional[float] = None  # while it fails: when all that was queued was written
        self._file = self._open()
        self._intents = Intents(path, self.agent)
        self._work, self._hurry = threading.Event(), threading.Event()
        self._writer = threading.Thread(target=self._write_until_closed, name="journal", daemon=True)
        self._writer.start()

    # ------------------------------------------------------------ writing

    def add_run(
        self,
        run_id: str,
        *,
        client_id: str,
        label: str,
        kind: str,
        environment: str,
        submitted_at: Optional[float] = None,
        again: bool = True,
    ) -> bool:
        """Record a run, "queued"; it is on the disk when this returns.

        With `again` the id may be known already; without it that is not looked up, which is quicker.

        Returns:
            False if the id is known already: the run must not be started a second time.
        """
        at = self._clock() if submitted_at is None else submitted_at
        run = NewRun(run_id, client_id, _text(label), kind, _text(environment), self.agent, at)
        if again:
            return self._add_now(run)
        with self._room:  # so that nobody empties the file between the line and the queue
            try:
                self._intents.add(run)
            except OSError:  # a full disk: SQLite will say so
                noted = False
            else:
                noted = True
                self._queue.append(run)
                self._queued += _size(run)
        if not noted:
            return self._add_now(run)
        if not self._work.is_set():
            self._work.set()
        return True

    def _add_now(self, run: NewRun) -> bool:
        with self._lock:
            with self._room:
                waits = any(isinstance(entry, NewRun) and entry.run_id == run.run_id for entry in self._queue)
            if waits or run.run_id in self._unsaved:
                return False
            try:
                if not self._failing:
                    return self._file.add_run(run)
                if self._file.number(run.run_id) is not None:
                    return False
            except sqlite3.Error as error:
                self._trouble(error)
            self._unsaved.add(run.run_id)
        self._put(run)
        return True

    def append(self, run_id: str, seq: int, frame: bytes, blobs: Sequence[str] = ()) -> None:
        """Record an event soon. Waits only while more than `QUEUE_BYTES` are queued.

        Args:
            run_id: a run that was added; events of others are left out.
            seq: number of the event within its run, from 1.
            frame: the event's bytes, as `fal_agent.wire.encode` makes them.
            blobs: names of the blobs that the event refers to.
        """
        if not 0 < seq <= MAX_SEQ:
            raise ValueError(f"event number {seq} is not between 1 and {MAX_SEQ}")
        self._put(NewEvent(run_id, seq, frame, blobs))

    def set_state(self, run_id: str, state: str, *, error: Optional[str] = None) -> None:
        """Record a run's state soon, in order with `append`. The first state that ends a run stays."""
        if state not in STATES:
            raise ValueError(f"unknown state {state!r}; known: {', '.join(STATES)}")
        self._put(NewState(run_id, state, None if error is None else _text(error), self._clock()))

    def add_cell(self, run_id: str, *, key: str, session: str, inputs: str) -> None:
        """Record soon what a run that was added is found by when its cell is run again."""
        self._put(NewCell(run_id, key, session, inputs))

    def set_seen(self, run_id: str) -> None:
        """Record soon that the outcome of a cell's run was shown."""
        self._put(NewSeen(run_id))

    def take(self, entry: Entry) -> None:
        """Record soon what stands in a file that survives this process: a lane's spool."""
        self._put(entry)

    def record(self) -> bool:
        """Record what is queued; whether all of it is on the disk now."""
        self.flush()
        with self._room:
            return not self._queue and not self._failing

    def _put(self, entry: Entry) -> None:
        with self._room:
            if type(entry) is NewState and entry.state in ENDED:
                self._ended.setdefault(entry.run_id, self._steady())
                if len(self._ended) > _REMEMBERED_ENDS:
                    del self._ended[next(iter(self._ended))]
            while self._queued > QUEUE_BYTES and not (self._failing or self._closing):
                self._room.wait(1.0)
            self._queue.append(entry)
            self._queued += _size(entry)
            if self._queued > QUEUE_BYTES // 2:
                self._hurry.set()
                self._bound()
        if not self._work.is_set():
            self._work.set()

    def _bound(self) -> None:
        """While the file cannot be written, keep the queue in its bound: events go first."""
        if self._failing and self._queued > QUEUE_BYTES:
            kept = [entry for entry in self._queue if not isinstance(entry, NewEvent)]
            while sum(map(_size, kept)) > QUEUE_BYTES // 2:
                del kept[: len(kept) // 2 + 1]
            self._left_out += len(self._queue) - len(kept)
            self._queue = deque(kept)
            self._queued = sum(map(_size, kept))

    def flush(self) -> None:
        """Record what is queued, in this thread; gives up at the first trouble, which is reported."""
        while self._record_some():
            time.sleep(0)  # another thread may want the lock

    def _write_until_closed(self) -> None:
        while not self._closing:
            self._work.wait()
            self._hurry.wait(GROUP_SECONDS)
            self._work.clear()
            self._hurry.clear()
            while self._record_some():
                self._checkpoint_if_due()
            if self._failing and not self._closing:
                self._hurry.wait(RETRY_SECONDS)
                self._reopen()
                self._look_whether_it_works()
                self._work.set()

    def _record_some(self) -> bool:
        """Record one slice of the queue; whether to go on."""
        with self._lock:
            if self._file.path is None:
                return False
            entries = self._take()
            if not entries:
                return False
            try:
                self._file.write(entries)
            except sqlite3.Error as error:
                self._put_back(entries)
                self._trouble(error)
                return False
            try:
                self._count(entries)
            except sqlite3.Error as error:
                self._trouble(error)
            with self._room:
                if not self._queue and self._intents.is_large:
                    self._intents.clear()
            return True

    def _take(self) -> list[Entry]:
        entries: list[Entry] = []
        size = 0
        with self._room:
            while self._queue and len(entries) < _SLICE_ENTRIES and size < _SLICE_BYTES:
                entry = self._queue.popleft()
                size += _size(entry)
                entries.append(entry)
            self._queued -= size
            self._room.notify_all()
        return entries

    def _put_back(self, entries: list[Entry]) -> None:
        with self._room:
            self._queue.extendleft(reversed(entries))
            self._queued += sum(map(_size, entries))

    def _count(self, entries: Sequence[Entry]) -> None:
        """Keep count of what runs hold, and cut those that hold too much."""
        ended = set()
        for entry in entries:
            if isinstance(entry, NewEvent):
                self._sizes[entry.run_id] = self._sizes.get(entry.run_id, 0) + len(entry.frame)
            elif isinstance(entry, NewRun):
                self._unsaved.discard(entry.run_id)
            elif isinstance(entry, NewState) and entry.state in ENDED:
                ended.add(entry.run_id)
        for run_id in {entry.run_id for entry in entries}:
            self._trim_if_due(run_id)
        for run_id in ended:
            self._sizes.pop(run_id, None)
            self._trim_at.pop(run_id, None)

    def _trim_if_due(self, run_id: str) -> None:
        size = self._sizes.get(run_id, 0)
        if size <= self._trim_at.get(run_id, self._run_bytes):
            return
        step = min(self._run_bytes // 4, _TRIM_BYTES)
        size -= self._file.trim(run_id, self._run_bytes // 4, size - self._run_bytes + step, self._clock())
        self._sizes[run_id] = size
        self._trim_at[run_id] = max(self._run_bytes, size + step)  # values and states are never dropped

    # ------------------------------------------------------------ reading

    def run(self, run_id: str) -> Optional[RunRecord]:
        """Look a run up; None when it is unknown or forgotten."""
        found = self._read(lambda file: file.runs("run_id = ?", (run_id,), 1))
        return found[0] if found else None

    def runs(self, *, client_id: Optional[str] = None, limit: int = 100) -> list[RunRecord]:
        """The newest runs, newest first; of one client if given."""
        where, values = ("1", ()) if client_id is None else ("client_id = ?", (client_id,))
        return self._read(lambda file: file.runs(where, values, limit)) or []

    def cells(self, notebook: str) -> list[CellRecord]:
        """The newest run of each cell of a notebook, newest first."""
        return self._read(lambda file: file.cells(notebook)) or []

    def outcome(self, run_id: str) -> Optional[bytes]:
        """The frame of the newest event of a run."""
        return self._read(lambda file: file.outcome(run_id))

    def unfinished(self, agent: Optional[str] = None) -> list[RunRecord]:
        """Runs that have not ended, newest first; of one agent (its identity) if given."""
        found = self._read(lambda file: file.runs("finished_at IS NULL")) or []
        return [run for run in found if agent is None or run.agent == agent]

    def events(self, run_id: str, after: int = 0) -> Iterator[bytes]:
        """Frames of a run's events with numbers above `after`, in order, those queued included.

        Reads about 1 MiB at a time; what is recorded meanwhile comes too. Numbers are missing where
        output was left out.

        Raises:
            ResourceError: the file cannot be read.
        """
        while True:
            some = self._read(partial(self._some_events, run_id=run_id, after=after))
            if not some:
                return
            for seq, frame in some:
                after = seq
                yield frame

    def _some_events(self, file: JournalFile, run_id: str, after: int) -> list[tuple[int, bytes]]:
        """Some events after a number: from the file, or, if it has none, those that it could not take yet."""
        number = file.number(run_id)
        found = [] if number is None else file.read(number, after)
        if found:
            return [(row & MAX_SEQ, frame) for row, frame in found]
        with self._room:
            events = [entry for entry in self._queue if type(entry) is NewEvent and entry.run_id == run_id]
        return [(event.seq, event.frame) for event in events if event.seq > after]

    def blobs(self) -> set[str]:
        """Names of all blobs that recorded events refer to."""
        return self._read(JournalFile.blobs) or set()

    def _read(self, ask: Callable[[JournalFile], _T]) -> Optional[_T]:
        """Ask the file, after recording what is queued; None if it has to be set aside."""
        self.flush()
        with self._lock:
            try:
                return ask(self._file)
            except sqlite3.Error as error:
                self._trouble(error)
                if _is_damage(error):
                    return None
                raise ResourceError(
                    f"the journal {self.path} cannot be read: {error}; look at the disk of that folder"
                ) from error

    # ------------------------------------------------------------ care

    def mark_lost(self) -> list[RunRecord]:
        """End the runs of agents that are gone, as "lost", each with a last event that says so.

        Returns:
            The runs that were ended, as they were before.
        """
        alive = {self.agent: True}
        lost = []
        self._take_over_intents()
        for run in self.unfinished():
            if run.agent not in alive:
                alive[run.agent] = is_alive(run.agent)
            if not alive[run.agent]:
                rebooted = is_of_another_boot(run.agent)
                what = "the machine was started anew" if rebooted else "the agent that ran it ended"
                text = f"{run.label}: {what} before the run did; run it again"
                self._change(partial(JournalFile.lose, run=run, message=text, at=self._clock()))
                lost.append(run)
        return lost

    def _take_over_intents(self) -> None:
        """Record the runs that dead agents had written down, but not yet recorded."""
        for agent, path in left_behind(self.path).items():
            if agent == self.agent or is_alive(agent):
                continue
            for run in read_intents(path):
                self._change(partial(JournalFile.add_run, run=run))
            if not self._failing:
                path.unlink(missing_ok=True)
        for agent, path in left_spools(self.path):
            if agent == self.agent or is_alive(agent):
                continue
            spool = Spool(path, agent)
            self._change(partial(JournalFile.write, entries=list(spool.take())))
            if not self._failing:
                spool.remove()

    def retain(self, *, max_age_seconds: float = 7 * 86400, max_bytes: int = 2 << 30) -> Dropped:
        """Forget ended runs: those older than `max_age_seconds`, then the oldest beyond `max_bytes`.

        Takes time in proportion to what goes; call it from a thread.
        """
        found = self._read(lambda file: file.ended(self._clock() - max_age_seconds)) or []
        kept_since = self._steady() - max_age_seconds  # the machine's clock may have jumped
        old = [run_id for run_id in found if self._ended.get(run_id, kept_since) <= kept_since]
        freed = sum(self._bytes_of(run_id) for run_id in old)
        blobs = [name for run_id in old for name in self._forget(run_id)]
        beyond = self._read(lambda file: file.oldest_beyond(max_bytes)) or []
        freed += sum(self._bytes_of(run_id) for run_id in beyond)
        blobs += [name for run_id in beyond for name in self._forget(run_id)]
        while self._change(JournalFile.shrink):
            self._checkpoint_if_due()
        return Dropped(len(old) + len(beyond), blobs, freed)

    def _bytes_of(self, run_id: str) -> int:
        record = self.run(run_id)
        return 0 if record is None else record.bytes

    def _forget(self, run_id: str) -> list[str]:
        with self._room, contextlib.suppress(OSError):  # a full disk: what is forgotten makes room
            self._intents.forget(run_id)
        while self._change(lambda file: file.drop_events(run_id)):
            self._checkpoint_if_due()
        return self._change(lambda file: file.drop(run_id)) or []

    def _change(self, do: Callable[[JournalFile], _T]) -> Optional[_T]:
        with self._lock:
            try:
                return do(self._file)
            except sqlite3.Error as error:
                self._trouble(error)
                return None

    def close(self) -> None:
        """Record what is queued and close the file; nothing is recorded after that."""
        self._closing = True
        self._hurry.set()
        self._work.set()
        self._writer.join(timeout=10)
        self.flush()
        with self._lock:
            if not self._queue:
                self._intents.close()
            self._file.close()

    # ------------------------------------------------------------ trouble

    def _open(self) -> JournalFile:
        try:
            try:
                return JournalFile(self.path)
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                self._was_set_aside(set_aside(self.path, self.path.stat().st_ino, self._clock()), error)
                return JournalFile(self.path)
        except (sqlite3.Error, OSError) as error:
            self._start_failing("opened", error)
            return JournalFile(None)

    def _trouble(self, error: sqlite3.Error) -> None:
        """Deal with an error of SQLite, under the lock: afterwards there is a file that can be asked."""
        self._work.set()
        if not _is_damage(error):
            self._start_failing("written", error)
            return
        try:
            self._was_set_aside(self._file.set_aside(self._clock()), error)
        except OSError as problem:
            self._start_failing("set aside", problem)
            self._file = JournalFile(None)
        else:
            self._file = self._open()

    def _start_failing(self, what: str, error: Exception) -> None:
        self._works_since = None
        if not self._failing:
            self._failing = True
            self._say(
                f"the journal {self.path} cannot be {what}: {error}; runs go on, but are not recorded until"
                " it can. Look at the free space and the permissions of that folder"
            )

    def _was_set_aside(self, aside: Optional[Path], error: Exception) -> None:
        if aside is not None:
            self._say(f"the journal was damaged ({error}) and starts anew; what was there lies at {aside}")

    def _reopen(self) -> None:
        """Look at the path afresh: the file may have been deleted, or become possible."""
        with self._lock:
            try:
                file = JournalFile(self.path)
            except (sqlite3.Error, OSError):  # still as it was, and said already
                self._works_since = None
                return
            self._file.close()
            self._file = file

    def _look_whether_it_works(self) -> None:
        """Say so if all that was queued has been written for a while: a little fits on a full disk too."""
        with self._lock, self._room:
            if self._queue or self._file.path is None:
                return
            if self._works_since is None:
                self._works_since = self._steady()
            if self._steady() - self._works_since < SETTLED_SECONDS:
                return
            left_out, self._left_out, self._failing = self._left_out, 0, False
        self._say(f"the journal {self.path} can be written again; {left_out} events could not be recorded")

    def _checkpoint_if_due(self) -> None:
        """Move the write-ahead log into the file, between two turns with the lock."""
        try:
            if self._file.wal_bytes() > _WAL_BYTES:
                self._file.checkpoint()
        except sqlite3.Error as error:
            with self._lock:
                self._trouble(error)
        time.sleep(0)  # another thread may want the lock

    def _say(self, text: str) -> None:
        if self._on_error is not None:
            self._on_error(text)


def _size(entry: Entry) -> int:
    if type(entry) is NewEvent:
        return _ENTRY_BYTES + len(entry.frame)
    return _ENTRY_BYTES + (len(entry.label) if isinstance(entry, NewRun) else 0)


def _text(text: str) -> str:
    """`text` as UTF-8 can hold it: half a surrogate pair has no place in the file."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _is_damage(error: Exception) -> bool:
    # Python 3.9 and 3.10 do not give SQLite's error code.
    text = str(error)
    return isinstance(error, sqlite3.DatabaseError) and ("malformed" in text or "not a database" in text)
