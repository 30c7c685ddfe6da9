"""The journal's SQLite file: its tables and every statement that is run on them.

Runs in the agent. Several agents may share the file. Errors of SQLite come out as they are; what to
do about them is decided in `fal_agent.server.journal`, which also sees to it that one thread at a
time is in here.

An event's row number is its run's number and its own: `run << 32 | seq`. One tree then holds all
events in the order in which they are read, without an index beside it.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Optional, Union

from fal_agent.errors import ProtocolError
from fal_agent.framing import FrameDecoder
from fal_agent.wire import Failure, Log, encode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "ENDED",
    "STATES",
    "CellRecord",
    "Entry",
    "JournalFile",
    "NewCell",
    "NewEvent",
    "NewRun",
    "NewSeen",
    "NewState",
    "RunRecord",
    "set_aside",
]

STATES = ("queued", "building", "running", "done", "failed", "cancelled", "lost", "lease")
ENDED = frozenset(("done", "failed", "cancelled", "lost", "lease"))
MAX_SEQ = (1 << 32) - 1

_BUSY_SECONDS = 5.0  # how long to wait for another agent's transaction
_READ_BYTES = 1 << 20  # of events in memory at once when they are read
_READ_ROWS = 256
_ROW_BYTES = 300  # what a run takes beside its events, about
_SPARE_PAGES = 2048  # of 4 KiB
_LOST_AHEAD = 1 << 20
_DROPPABLE = frozenset(
    ("log", "display", "clear", "progress")
)  # shown to people; no value and no state in it

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS runs (
        id INTEGER PRIMARY KEY,
        run_id TEXT NOT NULL UNIQUE,
        client_id TEXT NOT NULL,
        label TEXT NOT NULL,
        kind TEXT NOT NULL,
        environment TEXT NOT NULL,
        agent TEXT NOT NULL,
        state TEXT NOT NULL DEFAULT 'queued',
        error TEXT,
        submitted_at REAL NOT NULL,
        started_at REAL,
        finished_at REAL,
        last_seq INTEGER NOT NULL DEFAULT 0,
        bytes INTEGER NOT NULL DEFAULT 0,
        gap_end INTEGER,
        gap_bytes INTEGER NOT NULL DEFAULT 0
    )""",
    "CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY, frame BLOB NOT NULL)",
    """CREATE TABLE IF NOT EXISTS blobs (
        run INTEGER NOT NULL, name TEXT NOT NULL, PRIMARY KEY (run, name)
    ) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS cells (
        run INTEGER PRIMARY KEY, key TEXT NOT NULL, session TEXT NOT NULL, inputs TEXT NOT NULL,
        seen INTEGER NOT NULL DEFAULT 0
    )""",
)
_COLUMNS = (
    "run_id, client_id, label, kind, environment, agent, state, error,"
    " submitted_at, started_at, finished_at, last_seq, bytes,"
    " ifnull((SELECT session FROM cells AS own WHERE own.run = runs.id), '')"
)
_ADD_RUN = (
    "INSERT OR IGNORE INTO runs (run_id, client_id, label, kind, environment, agent, submitted_at)"
    " VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_ADD_EVENT = "INSERT OR IGNORE INTO events SELECT (id << 32) | ?, ? FROM runs WHERE run_id = ?"
_ADD_CELL = (
    "INSERT OR IGNORE INTO cells (run, key, session, inputs) SELECT id, ?, ?, ? FROM runs WHERE run_id = ?"
)
_SET_SEEN = "UPDATE cells SET seen = 1 WHERE run = (SELECT id FROM runs WHERE run_id = ?)"
_ADD_BLOB = "INSERT OR IGNORE INTO blobs SELECT id, ? FROM runs WHERE run_id = ?"
_GROW_RUN = "UPDATE runs SET bytes = bytes + ?, last_seq = max(last_seq, ?) WHERE run_id = ?"
_DROP_EVENTS = "DELETE FROM events WHERE id IN (SELECT id FROM events WHERE id BETWEEN ? AND ? LIMIT ?)"
_SET_STATE = (
    "UPDATE runs SET state = ?, error = ?, started_at = ifnull(started_at, ?), finished_at = ?"
    " WHERE run_id = ? AND finished_at IS NULL"
)


@dataclass(frozen=True)
class RunRecord:
    """What the journal knows of a run. Times are in seconds since the Unix epoch."""

    run_id: str
    client_id: str
    label: str
    kind: str
    environment: str
    agent: str  # identity of the agent that took it, see `fal_agent.server.proc`
    state: str  # one of `STATES`
    error: Optional[str]
    submitted_at: float
    started_at: Optional[float]
    finished_at: Optional[float]
    last_seq: int  # number of its newest event, 0 for none
    bytes: int  # of its events' frames
    session: str = ""  # that a cell ran in


class NewRun(NamedTuple):
    """A run to be recorded."""

    run_id: str
    client_id: str
    label: str
    kind: str
    environment: str
    agent: str
    submitted_at: float


class NewEvent(NamedTuple):
    """An event to be recorded: its frame, and the names of the blobs that it refers to."""

    run_id: str
    seq: int
    frame: bytes
    blobs: Sequence[str]


class NewState(NamedTuple):
    """A change of a run's state to be recorded."""

    run_id: str
    state: str
    error: Optional[str]
    at: float


class NewCell(NamedTuple):
    """What tells the run of a cell from others, to be recorded."""

    run_id: str
    key: str
    session: str
    inputs: str  # JSON object, name -> version


class NewSeen(NamedTuple):
    """The outcome of a cell's run has been shown, which is to be recorded."""

    run_id: str


class CellRecord(NamedTuple):
    """The run of a cell, as the journal knows it."""

    key: str
    inputs: str  # JSON object, name -> version
    is_seen: bool
    run: RunRecord


Entry = Union[NewRun, NewEvent, NewState, NewCell, NewSeen]


class JournalFile:
    """The open file; `path` None keeps everything in memory."""

    def __init__(self, path: Optional[Path]) -> None:
        self.path = path
        if path is not None:
            _create(path)
            self._inode = path.stat().st_ino
        self._db = self._connect()
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise
        self._checkpointer: Optional[sqlite3.Connection] = None

    def _connect(self) -> sqlite3.Connection:
        name = ":memory:" if self.path is None else str(self.path)
        db = sqlite3.connect(name, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA synchronous = NORMAL")
        # A checkpoint inside a commit would make a call wait for the disk: `checkpoint` does it instead.
        db.execute("PRAGMA wal_autocheckpoint = 0")
        return db

    def _prepare(self) -> None:
        tables = self._db.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table'").fetchone()[0]
        if tables < len(_SCHEMA):
            self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA journal_size_limit = 16777216")
        if tables < len(_SCHEMA):
            with self._transaction():
                for statement in _SCHEMA:
                    self._db.execute(statement)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    # ------------------------------------------------------------ writing

    def add_run(self, run: NewRun) -> bool:
        """Record a run at once; False if its id is known."""
        return self._db.execute(_ADD_RUN, run).rowcount == 1

    def write(self, entries: Sequence[Entry]) -> None:
        """Record entries in one transaction. Events and states of runs that are not known are left out."""
        events = [entry for entry in entries if type(entry) is NewEvent]
        states = [entry for entry in entries if type(entry) is NewState]
        grown: dict[str, list[int]] = {}
        for event in events:
            total = grown.setdefault(event.run_id, [0, 0])
            total[0] += len(event.frame)
            total[1] = max(total[1], event.seq)
        with self._transaction():
            db = self._db
            db.executemany(_ADD_RUN, [entry for entry in entries if type(entry) is NewRun])
            for cell in [entry for entry in entries if type(entry) is NewCell]:
                db.execute(_ADD_CELL, (cell.key, cell.session, cell.inputs, cell.run_id))
            db.executemany(_SET_SEEN, [entry for entry in entries if type(entry) is NewSeen])
            db.executemany(_ADD_EVENT, [(event.seq, event.frame, event.run_id) for event in events])
            db.executemany(_ADD_BLOB, [(name, event.run_id) for event in events for name in event.blobs])
            db.executemany(_GROW_RUN, [(size, seq, run_id) for run_id, (size, seq) in grown.items()])
            db.executemany(_SET_STATE, [_state_values(state) for state in states])

    def trim(self, run_id: str, head: int, wanted: int, at: float) -> int:
        """Drop output from a run's middle: after its first `head` bytes, the oldest first.

        A note takes its place, as the last event that was dropped, so that whoever saw any part of
        the run before finds it.

        Returns:
            Bytes that were dropped: `wanted` or a little more, less if values and states are in the way.
        """
        row = self._db.execute(
            "SELECT id, gap_end, gap_bytes FROM runs WHERE run_id = ?", (run_id,)
        ).fetchone()
        if row is None:
            return 0
        run, gap_end, gap_bytes = row
        start = (run << 32 | gap_end) if gap_end else self._after_head(run, head)
        dropped = 0
        while dropped < wanted:
            ids, size, start = self._droppable(run, start, wanted - dropped)
            if start is None:
                break
            if not ids:
                continue
            dropped, gap_bytes, last = dropped + size, gap_bytes + size, ids[-1]
            note = Log(run_id=run_id, stream="stderr", seq=last & MAX_SEQ, sent_at=at)
            text = (
                f"\n[{gap_bytes:,} bytes of output are left out here: they were more than one run may keep]\n"
            )
            with self._transaction():
                if gap_end:
                    self._db.execute("DELETE FROM events WHERE id = ?", (run << 32 | gap_end,))
                self._db.executemany("DELETE FROM events WHERE id = ?", [(i,) for i in ids])
                self._db.execute("INSERT INTO events VALUES (?, ?)", (last, encode(note, [text.encode()])))
                gap_end = last & MAX_SEQ
                self._db.execute(
                    "UPDATE runs SET bytes = bytes - ?, gap_end = ?, gap_bytes = ? WHERE id = ?",
                    (size, gap_end, gap_bytes, run),
                )
        return dropped

    def _after_head(self, run: int, head: int) -> int:
        """The row of the event with which a run's first `head` bytes are full."""
        query = "SELECT id, length(frame) FROM events WHERE id BETWEEN ? AND ? ORDER BY id"
        rows = self._db.execute(query, _range(run))
        end = run << 32
        for row, size in rows:
            end, head = row, head - size
            if head <= 0:
                break
        rows.close()
        return end

    def _droppable(self, run: int, start: int, wanted: int) -> tuple[list[int], int, Optional[int]]:
        """Rows after `start` that may go, their bytes, and the last row looked at (None: there was none)."""
        ids: list[int] = []
        size, end = 0, None
        for end, frame in self.read(run, start & MAX_SEQ):
            if _kind(frame) in _DROPPABLE:
                ids.append(end)
                size += len(frame)
                if size >= wanted:
                    break
        return ids, size, end

    def lose(self, run: RunRecord, message: str, at: float) -> None:
        """End a run whose agent is gone, with a failure that whoever asks for its events gets.

        Its number is far ahead: the last events before the end may have been seen, but not recorded.
        """
        seq = run.last_seq + _LOST_AHEAD
        failure = Failure(run_id=run.run_id, kind="lost", message=message, seq=seq, sent_at=at)
        self.write(
            [NewEvent(run.run_id, seq, encode(failure), ()), NewState(run.run_id, "lost", message, at)]
        )

    def drop_events(self, run_id: str) -> bool:
        """Drop some of a run's events; whether there may be more."""
        number = self.number(run_id)
        if number is None:
            return False
        return self._db.execute(_DROP_EVENTS, (*_range(number), _READ_ROWS)).rowcount == _READ_ROWS

    def drop(self, run_id: str) -> list[str]:
        """Forget a run and its remaining events; gives the names of its blobs."""
        number = self.number(run_id)
        if number is None:
            return []
        with self._transaction():
            names = [row[0] for row in self._db.execute("SELECT name FROM blobs WHERE run = ?", (number,))]
            self._db.execute("DELETE FROM events WHERE id BETWEEN ? AND ?", _range(number))
            self._db.execute("DELETE FROM blobs WHERE run = ?", (number,))
            self._db.execute("DELETE FROM cells WHERE run = ?", (number,))
            self._db.execute("DELETE FROM runs WHERE id = ?", (number,))
        return names

    # ------------------------------------------------------------ reading

    def number(self, run_id: str) -> Optional[int]:
        """The run's number in this file."""
        row = self._db.execute("SELECT id FROM runs WHERE run_id = ?", (run_id,)).fetchone()
        return None if row is None else int(row[0])

    def runs(self, where: str = "1", values: Sequence[object] = (), limit: int = -1) -> list[RunRecord]:
        """Runs that meet a condition over their columns, newest first."""
        query = f"SELECT {_COLUMNS} FROM runs WHERE {where} ORDER BY id DESC LIMIT ?"  # noqa: S608 - ours, not input
        return [RunRecord(*row) for row in self._db.execute(query, (*values, limit))]

    def cells(self, notebook: str) -> list[CellRecord]:
        """The runs of a notebook's cells, newest first; of each cell the newest."""
        query = (
            f"SELECT key, inputs, seen, {_COLUMNS} FROM cells JOIN runs ON cells.run = runs.id"  # noqa: S608
            " WHERE key >= ? AND key < ? ORDER BY runs.id DESC"
        )
        found: dict[str, CellRecord] = {}
        for key, inputs, seen, *run in self._db.execute(query, (f"{notebook}:", f"{notebook};")):
            found.setdefault(key, CellRecord(key, inputs, bool(seen), RunRecord(*run)))
        return list(found.values())

    def outcome(self, run_id: str) -> Optional[bytes]:
        """The frame of a run's last event that is recorded."""
        row = self._db.execute(
            "SELECT frame FROM events JOIN runs ON events.id = (runs.id << 32) | last_seq WHERE run_id = ?",
            (run_id,),
        ).fetchone()
        return None if row is None else bytes(row[0])

    def read(self, number: int, after: int) -> list[tuple[int, bytes]]:
        """Some of a run's events after number `after`: their rows and frames, about 1 MiB at most."""
        first, last = _range(number)
        query = "SELECT id, frame FROM events WHERE id > ? AND id <= ? ORDER BY id LIMIT ?"
        rows = self._db.execute(query, (first | after, last, _READ_ROWS))
        found: list[tuple[int, bytes]] = []
        size = 0
        for row, frame in rows:
            found.append((row, frame))
            size += len(frame)
            if size >= _READ_BYTES:
                break
        rows.close()
        return found

    def ended(self, before: float) -> list[str]:
        """Ids of the runs that ended before a time, oldest first."""
        query = "SELECT run_id FROM runs WHERE finished_at < ? ORDER BY finished_at"
        return [row[0] for row in self._db.execute(query, (before,))]

    def oldest_beyond(self, max_bytes: int) -> list[str]:
        """Ids of the ended runs to drop, oldest first, until the others take `max_bytes` at most."""
        size = f"bytes + {_ROW_BYTES}"
        excess = self._db.execute(f"SELECT ifnull(sum({size}), 0) FROM runs").fetchone()[0] - max_bytes  # noqa: S608
        found: list[str] = []
        if excess <= 0:
            return found
        query = f"SELECT run_id, {size} FROM runs WHERE finished_at IS NOT NULL ORDER BY finished_at"  # noqa: S608
        rows = self._db.execute(query)
        for run_id, taken in rows:
            if excess <= 0:
                break
            found.append(run_id)
            excess -= taken
        rows.close()
        return found

    def blobs(self) -> set[str]:
        """Names of all blobs that recorded events refer to."""
        return {row[0] for row in self._db.execute("SELECT name FROM blobs")}

    # ------------------------------------------------------------ care

    def shrink(self) -> bool:
        """Give some unused pages back to the file system; whether to go on. Some stay, for new runs."""
        if int(self._db.execute("PRAGMA freelist_count").fetchone()[0]) <= _SPARE_PAGES:
            return False
        self._db.executescript("PRAGMA incremental_vacuum(128)")  # `execute` would free a single page
        return True

    def wal_bytes(self) -> int:
        """Size of the write-ahead log."""
        if self.path is None:
            return 0
        try:
            return Path(f"{self.path}-wal").stat().st_size
        except FileNotFoundError:
            return 0

    def checkpoint(self) -> None:
        """Move the write-ahead log into the file, on a connection of its own, so that nobody waits for it."""
        if self.path is not None:
            if self._checkpointer is None:
                self._checkpointer = self._connect()
            self._checkpointer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def set_aside(self, at: float) -> Optional[Path]:
        """Close a damaged file and move it away; gives its new path, None if another agent was first."""
        self.close()
        return set_aside(self.path, self._inode, at) if self.path is not None else None

    def close(self) -> None:
        """Close the file."""
        if self._checkpointer is not None:
            self._checkpointer.close()
        self._db.close()


def set_aside(path: Path, inode: int, at: float) -> Optional[Path]:
    """Move a damaged file away if it is still the one with that inode number; gives its new path."""
    try:
        if path.stat().st_ino != inode:
            return None
    except FileNotFoundError:
        return None
    aside = Path(f"{path}.damaged-{time.strftime('%Y%m%dT%H%M%S', time.gmtime(at))}")
    for end in ("-wal", "-shm", ""):  # the file last: a new one must never meet the old log
        part = Path(f"{path}{end}")
        if part.exists():
            part.rename(f"{aside}{end}")
    return aside


def _create(path: Path) -> None:
    """Make the file for the user alone; SQLite would use the umask.

    One that is there is not opened: closing it again would drop the locks that this process holds on it.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return


def _kind(frame: bytes) -> object:
    """The type of an event, from its frame; None if it is no frame."""
    try:
        frames = FrameDecoder().feed(frame)
    except ProtocolError:  # what cannot be read is left alone
        return None
    return frames[0].header.get("type") if frames else None


def _state_values(change: NewState) -> tuple[Optional[object], ...]:
    started = change.at if change.state == "running" else None
    ended = change.at if change.state in ENDED else None
    return change.state, change.error, started, ended, change.run_id


def _range(number: int) -> tuple[int, int]:
    """First and last row that the events of a run may have."""
    return number << 32, number << 32 | MAX_SEQ
