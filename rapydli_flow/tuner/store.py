"""The SQLite file of tuning results: opened for each operation, shared by many processes, kept aside when broken.

Connections are never kept, so that a fork or another thread finds none of ours. The journal is SQLite's default:
write-ahead logs need shared memory, which file systems of networks lack.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from ..errors import SettingError
from .rows import TABLES, schema

T = TypeVar("T")
VERSION = 1
WAIT_S = 60.0  # for other processes: what they write takes milliseconds
TRIES = 5
BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
BROKEN = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}  # the last: a table is not there
BESIDE = ("", "-journal", "-wal", "-shm")


class Store:
    """A file of tuning results. Reading what is not there finds nothing; the first write makes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of a query; none where the file is not there or cannot be opened."""

        def query() -> list[tuple[Any, ...]]:
            with closing(self._connect("rw")) as db:  # to read: a journal that a killed process left is rolled back
                check_version(db)
                return db.execute(sql, values).fetchall() if _filled(db) else []

        if not self._there():
            return []
        try:
            return self._attempt(query)
        except (sqlite3.Error, OSError) as error:
            if _code(error) != sqlite3.SQLITE_CANTOPEN:
                warnings.warn(f"tuning results in {self.path} cannot be read ({error}).", RuntimeWarning, stacklevel=2)
            return []

    def write(self, change: Callable[[sqlite3.Connection], T]) -> T:
        """Do ``change`` in one transaction: all of it or nothing, and nobody else's writes in between.

        Raises SettingError where the file cannot be written.
        """

        def transaction() -> T:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect("rwc")) as db, _all_or_nothing(db):
                check_version(db)
                if not _filled(db):
                    for statement in (*schema(), f"PRAGMA user_version = {VERSION}"):
                        db.execute(statement)
                return change(db)

        try:
            return self._attempt(transaction)
        except (sqlite3.Error, OSError) as error:
            raise SettingError(
                f"tuning results cannot be written to {self.path} ({error}). Set RAPYDLI_CACHE_DIR to another folder."
            ) from error

    def _there(self) -> bool:
        try:
            return self.path.exists()
        except OSError:  # a folder that may not be searched
            return False

    def _connect(self, mode: str) -> sqlite3.Connection:
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        return sqlite3.connect(uri, uri=True, timeout=WAIT_S, isolation_level=None)

    def _attempt(self, run: Callable[[], T]) -> T:
        for again in range(TRIES):
            try:
                return run()
            except sqlite3.Error as error:
                code = _code(error)
                if again == TRIES - 1 or not (code in BUSY or code in BROKEN or isinstance(error, Newer)):
                    raise
                if code in BUSY:
                    time.sleep(0.05 * 2**again)
                else:
                    self._keep_aside()
        raise AssertionError("unreachable")

    def _keep_aside(self) -> None:
        """Rename a file that cannot be used, with its journal, and say so. One process does; to others it is gone."""
        with _alone_in(self.path.parent):
            fault = self._fault()
            if not fault:
                return
            aside, n = self.path.with_suffix(".unreadable"), 1
            while aside.exists():
                aside, n = self.path.with_suffix(f".unreadable-{n + 1}"), n + 1
            for ending in BESIDE:
                with suppress(FileNotFoundError):
                    os.replace(f"{self.path}{ending}", f"{aside}{ending}")
        message = (
            f"tuning results in {self.path} cannot be used: {fault}. The file is kept as {aside}; a new one begins."
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _fault(self) -> str:
        """What is wrong with the file, and '' if nothing is."""
        if not self._there():
            return ""
        try:
            with closing(self._connect("rw")) as db:
                check_version(db)
                if _filled(db) and not is_ours(db):
                    return "it is a database of something else"
                ((said,),) = db.execute("PRAGMA integrity_check(1)").fetchall()
                return "" if said == "ok" else " ".join(said.split())
        except sqlite3.Error as error:
            return "" if _code(error) in BUSY else str(error)


class Newer(sqlite3.DatabaseError):
    """A file of a later version of this package."""


def check_version(db: sqlite3.Connection) -> None:
    """Raise Newer for a file that this package cannot know."""
    ((version,),) = db.execute("PRAGMA user_version").fetchall()
    if version > VERSION:
        raise Newer(f"it has version {version}, this package reads up to version {VERSION}")


def is_ours(db: sqlite3.Connection) -> bool:
    """Has it our tables?"""
    found = {table: tuple(row[1] for row in db.execute(f"PRAGMA table_info({table})")) for table in TABLES}
    return found == TABLES


def _filled(db: sqlite3.Connection) -> bool:
    """Has it tables? A file that another process is just making has none yet."""
    return db.execute("SELECT 1 FROM sqlite_master").fetchone() is not None


def _code(error: BaseException) -> int:
    """SQLite's number of an error, without what it says more about it."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


@contextmanager
def _all_or_nothing(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        with suppress(sqlite3.Error):  # some errors have rolled back already
            db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, where its file system has them."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
