"""Scores kept across restarts: one SQLite file beside the checkpoints.

What was judged, what is still open, and the requests and readings that it will be judged by. Rows older than
`KEEP_SECONDS` are dropped, so the file's size is bounded by the rate of forecasts. Written in the forecasters' threads,
one transaction a cycle; another process may read it meanwhile (write-ahead log).
"""

from __future__ import annotations

import json
import logging
import math
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from threading import Lock
from typing import Any, Final

from kavier_twin.errors import UserError
from kavier_twin.scores.observed import Ended
from kavier_twin.scores.readings import EngineReading, GpuReading, Reading, SizeReading
from kavier_twin.scores.scorer import JUDGED, Foreseen, Moment, ScoredBreach, ScoredKpi, Settled
from kavier_twin.scores.serving import Foretold

log = logging.getLogger(__name__)

FILE_NAME: Final = "scores.sqlite3"
KEEP_SECONDS: Final = 30 * 86_400.0
_VERSION: Final = 3
_BUSY_SECONDS: Final = 5.0  # another process may be reading
_TABLES: Final = """
CREATE TABLE kpis (pool TEXT, judged REAL, time REAL, horizon REAL, kpi TEXT, low REAL, median REAL, high REAL,
    wide_low REAL, wide_high REAL, persisted REAL, observed REAL, PRIMARY KEY (pool, horizon, kpi, time)) WITHOUT ROWID;
CREATE TABLE breaches (pool TEXT, judged REAL, time REAL, horizon REAL, slo TEXT, probability REAL, breached INTEGER,
    PRIMARY KEY (pool, horizon, slo, time)) WITHOUT ROWID;
CREATE TABLE moments (pool TEXT, judged REAL, time REAL, slo TEXT, probability REAL, breached INTEGER,
    PRIMARY KEY (pool, slo, time)) WITHOUT ROWID;
CREATE TABLE open (pool TEXT, time REAL, horizon REAL, body TEXT, PRIMARY KEY (pool, time, horizon)) WITHOUT ROWID;
CREATE TABLE requests (pool TEXT, id TEXT, arrival REAL, scheduled REAL, first_token REAL, finish REAL,
    prompt_tokens REAL, output_tokens REAL, cached_tokens REAL, PRIMARY KEY (pool, id)) WITHOUT ROWID;
CREATE INDEX requests_finish ON requests (pool, finish);
CREATE TABLE live (pool TEXT, id TEXT, arrival REAL, prompt_tokens INTEGER, PRIMARY KEY (pool, id)) WITHOUT ROWID;
"""
_SINCE_2: Final = """
CREATE TABLE readings (pool TEXT, time REAL, kind TEXT, name TEXT, body TEXT, PRIMARY KEY (pool, time, kind, name))
    WITHOUT ROWID;
"""
_SINCE_3: Final = """
ALTER TABLE kpis ADD COLUMN served REAL;
ALTER TABLE kpis ADD COLUMN known REAL;
ALTER TABLE breaches ADD COLUMN simulated REAL;
DELETE FROM open;
"""
_READINGS: Final = {kind.__name__: kind for kind in (EngineReading, GpuReading, SizeReading)}


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
            log.warning("%s is damaged (%s): moved to %s; scores begin anew", path, error, aside.name)
            self._db = _open(path)

    def close(self) -> None:
        """Write nothing more."""
        with self._lock:
            self._db.close()

    def save(
        self,
        pool: str,
        settled: Settled,
        still_open: Iterable[Foreseen],
        ended: Iterable[tuple[str, Ended]],
        live: Mapping[str, tuple[float, int]],
        read: Iterable[tuple[str, Reading]],
        *,
        now_unix: float,
        forget_before_seconds: float,
    ) -> None:
        """One cycle of a pool. Requests that ended and readings made before `forget_before_seconds` (event time) are
        dropped. Trouble is counted, and logged once for each kind."""
        opened = [
            (pool, one.time_seconds, one.horizon_seconds, json.dumps([one.kpis, one.breach])) for one in still_open
        ]
        try:
            with self._lock, self._db as db:
                db.executemany(
                    f"INSERT OR REPLACE INTO kpis VALUES (?, ?{', ?' * 12})",
                    [(pool, now_unix, *map(_null, row)) for row in settled.kpis],
                )
                db.executemany(
                    "INSERT OR REPLACE INTO breaches VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    [(pool, now_unix, *map(_null, row)) for row in settled.breaches],
                )
                db.executemany(
                    "INSERT OR REPLACE INTO moments VALUES (?, ?, ?, ?, ?, ?)",
                    [(pool, now_unix, *row) for row in settled.moments],
                )
                db.execute("DELETE FROM open WHERE pool = ?", (pool,))
                db.executemany("INSERT INTO open VALUES (?, ?, ?, ?)", opened)
                db.executemany(
                    f"INSERT OR REPLACE INTO requests VALUES (?, ?{', ?' * 7})",
                    [(pool, identity, *map(_null, row)) for identity, row in ended],
                )
                db.execute("DELETE FROM live WHERE pool = ?", (pool,))
                db.executemany(
                    "INSERT INTO live VALUES (?, ?, ?, ?)", [(pool, name, *row) for name, row in live.items()]
                )
                db.executemany(
                    "INSERT OR REPLACE INTO readings VALUES (?, ?, ?, ?, ?)",
                    [(pool, one.time_seconds, type(one).__name__, name, _body(one)) for name, one in read],
                )
                db.execute("DELETE FROM requests WHERE pool = ? AND finish < ?", (pool, forget_before_seconds))
                db.execute("DELETE FROM readings WHERE pool = ? AND time < ?", (pool, forget_before_seconds))
                for table in ("kpis", "breaches", "moments"):
                    db.execute(f"DELETE FROM {table} WHERE pool = ? AND judged < ?", (pool, now_unix - KEEP_SECONDS))
            self._trouble = ""
        except sqlite3.Error as error:
            self.failures += 1
            if str(error) != self._trouble:
                log.error("scores could not be written to %s: %s", self.path, error)
            self._trouble = str(error)

    def judged(self, pool: str) -> Settled:
        """All that was judged of a pool, in order of time."""
        with self._lock:
            return _judged(self._db, pool)

    def open_forecasts(self, pool: str) -> list[Foreseen]:
        """Those whose time had not come, in order of time."""
        with self._lock:
            rows = self._db.execute(
                "SELECT time, horizon, body FROM open WHERE pool = ? ORDER BY time, horizon", (pool,)
            ).fetchall()
        found = []
        for time, horizon, body in rows:
            kpis, breach = json.loads(body)
            told = {kpi: Foretold(*values) for kpi, values in kpis.items()}
            odds = {slo: (said, share) for slo, (said, share) in breach.items()}
            found.append(Foreseen(time, horizon, told, odds))
        return found

    def requests(self, pool: str) -> tuple[list[tuple[str, Ended]], dict[str, tuple[float, int]]]:
        """Requests that ended, by their end, and those under way."""
        with self._lock:
            ended = self._db.execute(
                f"SELECT id, {', '.join(Ended._fields)} FROM requests WHERE pool = ? ORDER BY finish, id", (pool,)
            ).fetchall()
            live = self._db.execute("SELECT id, arrival, prompt_tokens FROM live WHERE pool = ?", (pool,)).fetchall()
        return (
            [(row[0], Ended(*map(_number, row[1:]))) for row in ended],
            {identity: (arrival, prompt) for identity, arrival, prompt in live},
        )

    def readings(self, pool: str) -> list[tuple[str, Reading]]:
        """What engines and GPUs said, in order of time, each with its name."""
        with self._lock:
            rows = self._db.execute(
                "SELECT kind, name, body FROM readings WHERE pool = ? ORDER BY time, kind, name", (pool,)
            ).fetchall()
        return [(name, _READINGS[kind](*map(_value, json.loads(body)))) for kind, name, body in rows]


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
    """Raises UserError for a newer version's file, sqlite3.DatabaseError for a damaged one."""
    db = sqlite3.connect(path, timeout=_BUSY_SECONDS, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # a crash may lose the last cycle, never the file
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version < _VERSION:
            steps = "".join((_TABLES, _SINCE_2, _SINCE_3)[version:])
            db.executescript(f"BEGIN;{steps}PRAGMA user_version = {_VERSION};COMMIT;")
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
    if not 0 < version <= _VERSION:
        raise UserError(
            f"{path}: scores of version {version}, this twin knows {_VERSION}; move the file away, or use the twin "
            "that wrote it"
        )


def _judged(db: sqlite3.Connection, pool: str) -> Settled:
    def rows(table: str, series: str, columns: Iterable[str]) -> list[tuple[Any, ...]]:
        """The newest of each series, as many as scores are of."""
        there = {column[1] for column in db.execute(f"PRAGMA table_info({table})")}  # an older file may be read only
        names = ", ".join(name if name in there else f"NULL AS {name}" for name in columns)
        newest = f"ROW_NUMBER() OVER (PARTITION BY {series} ORDER BY time DESC) AS age"
        chosen = f"SELECT {names}, {newest} FROM {table} WHERE pool = ?"
        return db.execute(f"SELECT {names} FROM ({chosen}) WHERE age <= {JUDGED} ORDER BY time", (pool,)).fetchall()

    names = [name.removesuffix("_seconds") for name in ScoredKpi._fields]
    kpis = [ScoredKpi(*row[:3], *map(_number, row[3:])) for row in rows("kpis", "horizon, kpi", names)]
    of_breach = ("time", "horizon", "slo", "probability", "breached", "simulated")
    breaches = [
        ScoredBreach(time, horizon, slo, probability, bool(breached), _number(simulated))
        for time, horizon, slo, probability, breached, simulated in rows("breaches", "horizon, slo", of_breach)
    ]
    of_moment = ("time", "slo", "probability", "breached")
    moments = [
        Moment(time, slo, probability, bool(breached))
        for time, slo, probability, breached in rows("moments", "slo", of_moment)
    ]
    return Settled(kpis, breaches, moments)


def _unused(path: Path) -> Path:
    """A name beside it that is free."""
    number = 1
    while (found := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return found


def _null(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value  # SQLite has no NaN


def _body(reading: Reading) -> str:
    return json.dumps([_null(value) for value in reading])


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else _number(value)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
