"""The tables of the SQLite store, and the steps that its calls are made of. No step waits or begins a transaction.

keys: what is there. events: the log of changes, one row a revision without gaps; a value of NULL is a removal. meta: one
row with the last revision, and the store's clock: `clock` is what to add to CLOCK_BOOTTIME of the boot `boot`, `seen` the
store's time at the last change.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from wincey.model.errors import StoreError
from wincey.store.kv import Change, Entry

HISTORY = 5000
"""Revisions that the log of changes keeps."""

APPLICATION_ID = 0x77696E63
"""What marks a file as ours: "winc"."""

SCHEMA_VERSION = 1

_SCHEMA = (
    """CREATE TABLE meta (
        id INTEGER PRIMARY KEY CHECK (id = 1),
        revision INTEGER NOT NULL,
        boot TEXT NOT NULL,
        clock REAL NOT NULL,
        seen REAL NOT NULL)""",
    """CREATE TABLE keys (
        key TEXT PRIMARY KEY,
        value BLOB NOT NULL,
        revision INTEGER NOT NULL,
        created INTEGER NOT NULL,
        expires REAL)""",
    "CREATE INDEX keys_expires ON keys (expires) WHERE expires IS NOT NULL",
    """CREATE TABLE events (
        revision INTEGER PRIMARY KEY,
        key TEXT NOT NULL,
        value BLOB,
        created INTEGER,
        permanent INTEGER)""",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)


@contextmanager
def transaction(db: sqlite3.Connection, kind: str) -> Iterator[None]:
    """All or nothing. kind: DEFERRED to read, IMMEDIATE to write."""
    db.execute(f"BEGIN {kind}")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def check_schema(db: sqlite3.Connection) -> bool:
    """Whether our tables are there (not yet in an empty file); raises StoreError when the file is not for us."""
    if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
        return False
    if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise StoreError("is a database of another program; name another file")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"has schema version {version} and this program knows {SCHEMA_VERSION}; "
            "use the version of wincey that wrote it, or move the file away to begin anew"
        )
    return True


def make_schema(db: sqlite3.Connection, first_revision: int) -> None:
    """Make the tables in an empty file."""
    for statement in _SCHEMA:
        db.execute(statement)
    db.execute("INSERT INTO meta VALUES (1, ?, '', 0, 0)", (first_revision,))


def set_clock(db: sqlite3.Connection, boot: str, boottime: float, wall: float) -> float:
    """The offset of the store's clock to CLOCK_BOOTTIME, chosen when this boot is new to the store. All in seconds."""
    known, clock, seen = db.execute("SELECT boot, clock, seen FROM meta").fetchone()
    if known != boot:
        clock = max(wall, seen) - boottime
        db.execute("UPDATE meta SET boot = ?, clock = ?", (boot, clock))
    return float(clock)


def last_revision(db: sqlite3.Connection) -> int:
    """The revision of the last change."""
    return int(db.execute("SELECT revision FROM meta").fetchone()[0])


def find(db: sqlite3.Connection, key: str) -> Entry | None:
    """The entry of a key."""
    row = db.execute("SELECT key, value, revision, created, expires IS NULL FROM keys WHERE key = ?", (key,)).fetchone()
    return _entry(*row) if row else None


def find_below(db: sqlite3.Connection, prefix: str) -> list[Entry]:
    """The entries below a prefix, by key."""
    rows = db.execute(
        "SELECT key, value, revision, created, expires IS NULL FROM keys WHERE key >= ? AND key < ? ORDER BY key",
        _bounds(prefix),
    )
    return [_entry(*row) for row in rows]


def put(
    db: sqlite3.Connection, now: float, key: str, value: bytes, *, ttl: float | None, created: int | None = None
) -> Entry:
    """Put a key, made at the revision `created` (None: with this one)."""
    revision = _advance(db, now)
    created = created or revision
    expires = None if ttl is None else now + ttl
    db.execute("INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?, ?)", (key, value, revision, created, expires))
    db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?)", (revision, key, value, created, ttl is None))
    return Entry(key, value, revision, created, "", ttl is None)


def remove(db: sqlite3.Connection, now: float, key: str) -> None:
    """Delete a key that is there."""
    db.execute("DELETE FROM keys WHERE key = ?", (key,))
    db.execute("INSERT INTO events (revision, key) VALUES (?, ?)", (_advance(db, now), key))


def set_expiry(db: sqlite3.Connection, key: str, expires: float) -> None:
    """Move the time limit of a key, without an event."""
    db.execute("UPDATE keys SET expires = ? WHERE key = ?", (expires, key))


def expiry(db: sqlite3.Connection, key: str, created: int) -> tuple[float | None] | None:
    """When the key made at revision `created` expires (None: never), in a tuple; None when it is gone."""
    row: tuple[float | None] | None = db.execute(
        "SELECT expires FROM keys WHERE key = ? AND created = ?", (key, created)
    ).fetchone()
    return row


def next_expiry(db: sqlite3.Connection) -> float | None:
    """When the next key expires."""
    moment: float | None = db.execute("SELECT min(expires) FROM keys WHERE expires IS NOT NULL").fetchone()[0]
    return moment


def expire(db: sqlite3.Connection, now: float) -> None:
    """Turn every key that is due into a removal, in the order they fell due."""
    removed = db.execute(
        "INSERT INTO events (revision, key)"
        " SELECT ? + row_number() OVER (ORDER BY expires, key), key FROM keys WHERE expires <= ?",
        (last_revision(db), now),
    ).rowcount
    db.execute("DELETE FROM keys WHERE expires <= ?", (now,))
    _advance(db, now, removed)


def changes_below(db: sqlite3.Connection, prefix: str, after: int) -> list[Change] | None:
    """The changes after a revision, in order; None when the log does not reach back to it."""
    last = last_revision(db)
    oldest = db.execute("SELECT min(revision) FROM events").fetchone()[0]
    if after > last or (after < last and after + 1 < oldest):
        return None
    rows = db.execute(
        "SELECT key, value, revision, created, permanent FROM events"
        " WHERE revision > ? AND key >= ? AND key < ? ORDER BY revision",
        (after, *_bounds(prefix)),
    )
    return [Change(row[0], None, row[2]) if row[1] is None else Change(row[0], _entry(*row)) for row in rows]


def _advance(db: sqlite3.Connection, now: float, count: int = 1) -> int:
    """Take `count` revisions and drop the oldest events; returns the last one taken."""
    revision = last_revision(db) + count
    db.execute("UPDATE meta SET revision = ?, seen = ?", (revision, now))
    db.execute("DELETE FROM events WHERE revision <= ?", (revision - HISTORY,))
    return revision


def _bounds(prefix: str) -> tuple[str, str]:
    """The least text that a key below a prefix can be, and the least one after all of them: "0" follows "/"."""
    return prefix, prefix.removesuffix("/") + "0"


def _entry(key: str, value: bytes, revision: int, created: int, permanent: int) -> Entry:
    return Entry(key, value, revision, created, "", bool(permanent))
