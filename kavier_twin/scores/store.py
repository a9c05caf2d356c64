"""Scores kept across restarts: one SQLite file beside the checkpoints.

It holds what was judged, and nothing else: forecasts that are still open, and what they will be judged by, are part of
the checkpoints. Each row has the number of the first checkpoint that counts it. `roll_back` drops the rows that the
checkpoint a pool goes on from does not count; they are judged again. Rows older than `KEEP_SECONDS` are dropped, so the
file's size is bounded by the rate of forecasts. Written in the forecasters' threads, one transaction a cycle; another
process may read it meanwhile (write-ahead log).
"""

from __future__ import annotations

import logging
import math
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from threading import Lock
from typing import Any, Final, NamedTuple

from kavier_twin.errors import UserError
from kavier_twin.scores.scorer import JUDGED, Moment, ScoredBreach, ScoredKpi, Settled

log = logging.getLogger(__name__)

FILE_NAME: Final = "scores.sqlite3"
KEEP_SECONDS: Final = 30 * 86_400.0
_VERSION: Final = 1
_BUSY_SECONDS: Final = 5.0  # another process may be reading
_TABLES: Final = """
CREATE TABLE kpis (pool TEXT, checkpoint INTEGER, judged REAL, time REAL, horizon REAL, kpi TEXT, low REAL, median REAL,
    high REAL, wide_low REAL, wide_high REAL, persisted REAL, observed REAL, served REAL, known REAL,
    PRIMARY KEY (pool, horizon, kpi, time)) WITHOUT ROWID;
CREATE TABLE breaches (pool TEXT, checkpoint INTEGER, judged REAL, time REAL, horizon REAL, slo TEXT, probability REAL,
    breached INTEGER, simulated REAL, PRIMARY KEY (pool, horizon, slo, time)) WITHOUT ROWID;
CREATE TABLE moments (pool TEXT, checkpoint INTEGER, judged REAL, time REAL, slo TEXT, probability REAL,
    breached INTEGER, PRIMARY KEY (pool, slo, time)) WITHOUT ROWID;
"""


class ScoreStore:
    """Thread-safe. A file that cannot be read is moved aside and a new one begun; `failures` counts failed writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failures = 0
        self._lock = Lock()
        self._trouble = ""
        try:
            self._db = _open(path)
        except sqlite3.DatabaseError as error:
            aside = _unused(path)
            for suffix in ("", "-wal", "-shm"):
                damaged = path.with_name(path.name + suffix)
                if damaged.exists():
                    damaged.rename(aside.with_name(aside.name + suffix))
            log.warning("%s is damaged (%s): moved to %s; scores start from scratch", path, error, aside.name)
            self._db = _open(path)

    def close(self) -> None:
        """Write nothing more."""
        with self._lock:
            self._db.close()

    def save(self, pool: str, settled: Settled, checkpoint: int, now_unix: float) -> None:
        """What a pool judged in one cycle, first counted by the checkpoint of this number. Trouble is counted, and
        logged once for each kind."""
        try:
            with self._lock, self._db as db:
                for table, rows in settled._asdict().items():
                    values = [(pool, checkpoint, now_unix, *map(_null, row)) for row in rows]
                    if values:
                        holes = ", ".join("?" * len(values[0]))
                        db.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({holes})", values)
                    db.execute(f"DELETE FROM {table} WHERE pool = ? AND judged < ?", (pool, now_unix - KEEP_SECONDS))
            self._trouble = ""
        except sqlite3.Error as error:
            self.failures += 1
            if str(error) != self._trouble:
                log.error("cannot write scores to %s: %s", self.path, error)
            self._trouble = str(error)

    def roll_back(self, pool: str, checkpoint: int | None) -> None:
        """Drop what the checkpoint of this number does not count. None: the pool begins anew, and all of it stays."""
        with self._lock, self._db as db:
            for table in Settled._fields:
                if checkpoint is None:
                    db.execute(f"UPDATE {table} SET checkpoint = 0 WHERE pool = ?", (pool,))
                else:
                    db.execute(f"DELETE FROM {table} WHERE pool = ? AND checkpoint > ?", (pool, checkpoint))

    def judged(self, pool: str) -> Settled:
        """All that was judged of a pool, in order of time."""
        with self._lock:
            return _judged(self._db, pool)


def read_judged(path: Path) -> dict[str, Settled]:
    """All that a file holds, by pool, for who does not write it. Raises UserError."""
    if not path.is_file():
        raise UserError(f"--db {path}: there is no such file; a daemon with checkpoints keeps {FILE_NAME} among them")
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=_BUSY_SECONDS)) as db:
            _check_version(db, path)
            pools = [
                pool
                for (pool,) in db.execute("SELECT pool FROM kpis UNION SELECT pool FROM moments ORDER BY 1").fetchall()
            ]
            return {pool: _judged(db, pool) for pool in pools}
    except sqlite3.Error as error:
        raise UserError(f"--db {path}: not a file of scores: {error}") from None


def _open(path: Path) -> sqlite3.Connection:
    """Raises UserError for another version's file, sqlite3.DatabaseError for a damaged one."""
    path.touch(mode=0o600)  # before SQLite makes it readable to all; its log takes the same mode
    db = sqlite3.connect(path, timeout=_BUSY_SECONDS, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")  # checkpoints count on what was written
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            db.executescript(f"BEGIN;{_TABLES}PRAGMA user_version = {_VERSION};COMMIT;")
        _check_version(db, path)
        (sound,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if sound != "ok":
            raise sqlite3.DatabaseError(sound)
    except BaseException:
        db.close()
        raise
    return db


def _check_version(db: sqlite3.Connection, path: Path) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version != _VERSION:
        raise UserError(
            f"{path}: scores of version {version}, this twin knows {_VERSION}; move the file away, or use the twin "
            "that wrote it"
        )


def _judged(db: sqlite3.Connection, pool: str) -> Settled:
    def rows(table: str, series: str, columns: Iterable[str]) -> list[tuple[Any, ...]]:
        """The newest of each series, as many as scores are of."""
        names = ", ".join(columns)
        newest = f"ROW_NUMBER() OVER (PARTITION BY {series} ORDER BY time DESC) AS age"
        chosen = f"SELECT {names}, {newest} FROM {table} WHERE pool = ?"
        return db.execute(f"SELECT {names} FROM ({chosen}) WHERE age <= {JUDGED} ORDER BY time", (pool,)).fetchall()

    def names(kind: type[NamedTuple]) -> list[str]:
        return [name.removesuffix("_seconds") for name in kind._fields]

    return Settled(
        [ScoredKpi(*row[:3], *map(_number, row[3:])) for row in rows("kpis", "horizon, kpi", names(ScoredKpi))],
        [
            ScoredBreach._make((*row[:4], bool(row[4]), _number(row[5])))
            for row in rows("breaches", "horizon, slo", names(ScoredBreach))
        ],
        [Moment._make((*row[:3], bool(row[3]))) for row in rows("moments", "slo", names(Moment))],
    )


def _unused(path: Path) -> Path:
    """A name beside it that is free."""
    number = 1
    while (found := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return found


def _null(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value  # SQLite has no NaN


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
