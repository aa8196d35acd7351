"""Log of the events that a service received, by user, in SQLite; events are on disk when `append` returns.

The file is in write-ahead mode with full synchronization, so a kill or a power failure loses nothing that was
acknowledged. It holds raw ids. A forgotten user's events are overwritten on disk; only a keyed hash of the user's id
remains, so that the user's events in a dataset that still has them are not read again.

Events that a newer dataset version also contains are in the log and in the dataset; `ServiceHistories` uses them once.
"""

import hashlib
import secrets
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hllm_torchrec.common.errors import UnavailableError
from hllm_torchrec.data.tombstones import ITEMS, USERS, Tombstones

_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, user TEXT NOT NULL, item TEXT NOT NULL, timestamp INTEGER NOT NULL,
    label REAL, action TEXT
);
CREATE INDEX IF NOT EXISTS events_of_user ON events (user, number);
CREATE TABLE IF NOT EXISTS forgotten (user TEXT PRIMARY KEY);
"""
FORMAT = "1"


@dataclass(frozen=True)
class LoggedEvent:
    """An event with raw ids. label: None if the event is not an exposure; action: name of the action, or None."""

    item: str
    timestamp: int
    label: float | None = None
    action: str | None = None


class EventLog:
    """Opens or creates the file. Any thread may use the object; only one process may open the file at a time.

    Raises:
        ValueError: the file cannot be opened or has another format, or another process has it open.
        UnavailableError: raised by all methods when the file cannot be read or written (for example, a full disk).
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=1, check_same_thread=False, isolation_level=None)
            # EXCLUSIVE keeps the lock of the first write, because a second service on the same file would miss events.
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
                self._connection.execute(f"PRAGMA {pragma}")
            self._connection.executescript(_TABLES)
            facts = {"format": FORMAT, "key": secrets.token_hex(16)}
            self._connection.executemany("INSERT OR IGNORE INTO facts VALUES (?, ?)", facts.items())
            found = dict(self._connection.execute("SELECT name, value FROM facts").fetchall())
        except (sqlite3.Error, OSError) as error:
            is_open = " another service has it open: stop that one, or" if "locked" in str(error) else ""
            raise ValueError(f"{path}: {error}:{is_open} give --state another file") from None
        if found["format"] != FORMAT:
            raise ValueError(f"{path}: format {found['format']}, not {FORMAT}: give --state another file")
        self._key = bytes.fromhex(found["key"])
        self.listeners: list[Callable[[str], None]] = []
        """Called with a user whose events have changed, after the change is on the disk and before the call returns."""

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the lock of the connection; convert errors of SQLite to UnavailableError that names the file."""
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise UnavailableError(f"{self.path}: {error}") from error

    def append(self, user: str, events: Sequence[LoggedEvent]) -> None:
        """Append events of a user; they are on the disk when this returns."""
        rows = [(user, event.item, event.timestamp, event.label, event.action) for event in events]
        with self._held(), self._connection:
            self._connection.execute("BEGIN")
            self._connection.executemany(
                "INSERT INTO events (user, item, timestamp, label, action) VALUES (?, ?, ?, ?, ?)", rows
            )
        for listener in list(self.listeners):
            listener(user)

    def of_user(self, user: str, after: int = 0) -> tuple[list[LoggedEvent], int]:
        """A user's events with a number above `after`, in order of arrival, and the last number (or `after`)."""
        with self._held():
            rows = self._connection.execute(
                "SELECT item, timestamp, label, action, number FROM events WHERE user = ? AND number > ? "
                "ORDER BY number",
                (user, after),
            ).fetchall()
        return [LoggedEvent(*row[:4]) for row in rows], rows[-1][4] if rows else after

    def forget(self, user: str) -> int:
        """Delete a user's events, and store a hash of the user as forgotten; returns the number of deleted events."""
        with self._held():
            with self._connection:
                self._connection.execute("BEGIN")
                deleted = self._connection.execute("DELETE FROM events WHERE user = ?", (user,)).rowcount
                self._connection.execute("INSERT OR IGNORE INTO forgotten VALUES (?)", (self._hash(user),))
            # Without this, the deleted rows would remain in the write-ahead file until it is overwritten.
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for listener in list(self.listeners):
            listener(user)
        return int(deleted)

    def forget_items(self, items: Sequence[str]) -> int:
        """Delete all events of items; returns the number of deleted events."""
        deleted, users = 0, set()
        with self._held():
            with self._connection:
                self._connection.execute("BEGIN")
                for item in items:
                    found = self._connection.execute("SELECT DISTINCT user FROM events WHERE item = ?", (item,))
                    users |= {user for (user,) in found.fetchall()}
                    deleted += self._connection.execute("DELETE FROM events WHERE item = ?", (item,)).rowcount
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for user in users:
            for listener in list(self.listeners):
                listener(user)
        return deleted

    def forget_those_of(self, tombstones: Tombstones) -> int:
        """Forget the users and items that a dataset has forgotten; returns the number of deleted events.

        A user that this log has already forgotten, and who came back, keeps the events logged since then.
        """
        if not tombstones:
            return 0
        with self._held():
            users, items = (
                [raw for (raw,) in self._connection.execute(f"SELECT DISTINCT {column} FROM events").fetchall()]
                for column in ("user", "item")
            )
        gone = [user for user in users if tombstones.find(USERS, user) is not None and not self.is_forgotten(user)]
        deleted = sum(self.forget(user) for user in gone)
        return deleted + self.forget_items([item for item in items if tombstones.find(ITEMS, item) is not None])

    def count(self, user: str, until: int) -> int:
        """Number of a user's events with a number up to `until`."""
        return self._number("WHERE user = ? AND number <= ?", user, until)

    def number_of(self, users: Collection[str], items: Collection[str]) -> int:
        """Number of events whose user is in `users` or whose item is in `items`."""
        of_users = {user: self._number("WHERE user = ?", user) for user in users}
        both = sum(self._number("WHERE user = ? AND item = ?", user, item) for user in of_users for item in items)
        return sum(of_users.values()) + sum(self._number("WHERE item = ?", item) for item in items) - both

    def _number(self, where: str, *values: str | int) -> int:
        with self._held():
            found = self._connection.execute(f"SELECT COUNT(*) FROM events {where}", values).fetchone()
        return int(found[0])

    def is_forgotten(self, user: str) -> bool:
        """True if `forget` was called for the user: the user's events in a dataset must not be read."""
        with self._held():
            found = self._connection.execute("SELECT 1 FROM forgotten WHERE user = ?", (self._hash(user),)).fetchone()
        return found is not None

    def __len__(self) -> int:
        return self._number("")

    def close(self) -> None:
        """Close the file."""
        with self._held():
            self._connection.close()

    def _hash(self, user: str) -> str:
        return hashlib.blake2b(user.encode(), key=self._key, digest_size=16).hexdigest()


def is_event_log(path: Path) -> bool:
    """True if an SQLite file has the tables of an event log.

    Raises:
        sqlite3.Error: the file is damaged, or another process has it open.
    """
    with closing(sqlite3.connect(path, timeout=1)) as connection:
        found = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    return {"facts", "events", "forgotten"} <= found
