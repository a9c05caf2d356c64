from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.dead_letters import DeadLetters
from connectors.source import Source
from connectors.traces import TraceError, follow, read_trace
from connectors.traces.follow import FollowFile
from kavier_twin.telemetry import EngineSample, RequestRecord, RequestSeen, TelemetryRecord
from memory_source import MemorySource

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def mooncake(milliseconds: int) -> str:
    return json.dumps({"timestamp": milliseconds, "input_length": 5, "output_length": 1, "hash_ids": [1]}) + "\n"


def append(path: Path, text: str) -> None:
    with path.open("a", newline="") as file:
        file.write(text)


def times(source: Source, max_records: int = 1000) -> list[float]:
    return [record.time_seconds for record in source.poll(max_records)]


def test_follows_a_file_as_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "t"
    source = FollowFile(path)
    assert isinstance(source, Source)
    assert (source.name, source.poll(10), source.last_record_seconds) == ("file:t", [], None)  # not there yet
    path.touch()
    assert times(source) == []
    append(path, mooncake(2000) + mooncake(1000) + mooncake(3000)[:20])
    assert times(source) == [2.0, 1.0]  # the order of the file; the last line is not complete
    assert source.last_record_seconds == 2.0
    append(path, mooncake(3000)[20:] + mooncake(4000) + mooncake(5000))
    assert times(source, 2) == [3.0, 4.0]
    assert times(source, 2) == [5.0]
    assert times(source) == []
    assert not source.exhausted
    assert source.rejected() == {}
    source.close()
    source.close()
    append(path, mooncake(6000))
    assert (source.poll(10), source.exhausted) == ([], True)


lines = st.sampled_from(
    [mooncake(0).encode(), mooncake(7).encode(), b"{\n", b"\n", b"\xff\n", "\u2028\u00e9\n".encode()]
)
pieces = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 5)), max_size=10)


@given(data=st.lists(lines, max_size=10).map(b"".join), pieces=pieces)
def test_however_it_grows_the_records_are_those_of_the_whole(data: bytes, pieces: list[tuple[int, int]]) -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "t"
        source = FollowFile(path, "mooncake")
        records: list[TelemetryRecord] = []
        with path.open("ab", buffering=0) as file:
            for size, wanted in [*pieces, (len(data), 1000)]:
                file.write(data[:size])
                data = data[size:]
                found = source.poll(wanted)
                assert len(found) <= wanted
                records += found
        source.close()
        try:
            trace = read_trace(path, "mooncake")
        except TraceError:
            assert records == []
            return
    assert sorted(records, key=lambda record: record.time_seconds) == trace.records
    assert source.rejected() == trace.rejected_by_reason


def test_ids_run_on(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text(mooncake(0) + "{\n" + mooncake(1))
    source = FollowFile(path, "mooncake")
    records = source.poll(10)
    assert [getattr(record, "id", None) for record in records] == ["0", "2"]
    assert isinstance(records[0], RequestRecord)
    assert records == read_trace(path).records


def test_rotation(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text(AZURE + "2023-11-16 00:00:01,1,1\n")
    source = FollowFile(path)
    assert times(source) == [0.0]
    path.rename(tmp_path / "t.1")
    append(tmp_path / "t.1", "2023-11-16 00:00:02,1,1\n")
    assert times(source) == [1.0]  # the writer still had the old file open
    append(tmp_path / "t.1", "2023-11-16 00:00:03,1,1\n2023-11-16 00:00:0")
    path.write_text(AZURE + "2023-11-16 00:00:04,1,1\n")
    assert times(source) == [2.0, 3.0]  # both files, and time goes on
    assert source.rejected() == {"cut-line": 1}


def test_truncation(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text(mooncake(1000) + mooncake(2000) + "{")
    letters = DeadLetters(tmp_path / "dead")
    source = FollowFile(path, dead_letters=letters)
    assert times(source) == [1.0, 2.0]
    path.write_text(mooncake(3000))  # the same file, cut to nothing and written anew
    assert times(source) == [3.0]
    assert source.rejected() == {"cut-line": 1}
    assert json.loads((tmp_path / "dead").read_text())["line"] == 3


def test_rejected_lines_go_to_the_dead_letters_without_their_text(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text(mooncake(0) + "my secret prompt\n\n" + '{"timestamp": "secret"}\n')
    source = FollowFile(path, dead_letters=DeadLetters(tmp_path / "dead"))
    assert times(source) == [0.0]
    assert source.rejected() == {"not-json": 1, "bad-value": 1}
    text = (tmp_path / "dead").read_text()
    assert "secret" not in text
    letters = [json.loads(line) for line in text.splitlines()]
    assert [(x["file"], x["line"], x["reason"], x["length"]) for x in letters] == [
        (str(path), 2, "not-json", 17),
        (str(path), 4, "bad-value", 24),
    ]
    source.close()


def test_dead_letters_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text("{\n" * 1000)
    source = FollowFile(path, "mooncake", dead_letters=DeadLetters(tmp_path / "dead", max_bytes=2000))
    assert times(source) == []
    assert source.rejected() == {"not-json": 1000}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dead", "dead.1", "t"]
    assert all((tmp_path / name).stat().st_size < 2300 for name in ("dead", "dead.1"))
    assert json.loads((tmp_path / "dead").read_text().splitlines()[-1])["line"] == 1000


def test_dead_letters_that_cannot_be_written_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text("{\n{\n" + mooncake(0))
    letters = DeadLetters(tmp_path / "no directory" / "dead")
    assert times(FollowFile(path, "mooncake", dead_letters=letters)) == [0.0]
    assert letters.lost == 2


def test_a_poll_always_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "SPARE_LINES", 10)
    path = tmp_path / "t"
    path.write_text("{\n" * 25 + mooncake(0))
    source = FollowFile(path, "mooncake")
    polls = [times(source, 1) for _ in range(4)]
    assert polls == [[], [], [0.0], []]


def test_lines_of_no_known_format_are_rejected_until_one_is(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text("what\n" + mooncake(0))
    source = FollowFile(path)
    assert times(source) == [0.0]
    assert source.rejected() == {"unknown-format": 1}


def test_telemetry_comes_as_it_is(tmp_path: Path) -> None:
    records = [
        RequestSeen(id="a", time_seconds=1.0, prompt_tokens=3),
        EngineSample(time_seconds=2.0, requests_running=1),
    ]
    path = tmp_path / "t"
    path.write_text("".join(record.model_dump_json() + "\n" for record in records))
    assert FollowFile(path).poll(10) == records


@pytest.mark.parametrize("named", [True, False])
def test_a_recording_as_it_is_made(tmp_path: Path, named: bool) -> None:
    (tmp_path / "meta.json").write_text('{"block_tokens": 32}')
    line: dict[str, Any] = {"id": "a", "arrival": 1.0, "prompt_tokens": 4, "output_tokens": 1, "token_times": [2.0]}
    path = tmp_path / "requests.jsonl"
    source = FollowFile(path, "recording" if named else None)
    path.write_text(json.dumps(line) + "\n")
    assert times(source) == [1.0]
    assert times(FollowFile(tmp_path)) == [1.0]
    (tmp_path / "meta.json").unlink()
    lost = FollowFile(path)
    assert (lost.poll(10), lost.rejected()) == ([], {"unknown-format": 1})
    with pytest.raises(TraceError, match=r"meta\.json is missing"):
        FollowFile(path, "recording")


@pytest.mark.parametrize("packed", [True, False])
def test_a_whole_file_ends(tmp_path: Path, packed: bool) -> None:
    data = (mooncake(1000) + mooncake(2000).rstrip()).encode()
    path = tmp_path / "t"
    path.write_bytes(gzip.compress(data) if packed else data)
    source = FollowFile(path, follow=False)
    assert times(source, 1) == [1.0]
    assert not source.exhausted
    assert times(source) == [2.0]
    assert source.exhausted


def test_what_cannot_be_followed(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="there is no format 'csv'"):
        FollowFile(tmp_path / "t", "csv")
    with pytest.raises(TraceError, match="not made of lines"):
        FollowFile(tmp_path / "t", "kavier-parquet")
    with pytest.raises(TraceError, match="no such file"):
        FollowFile(tmp_path / "t", follow=False)
    with pytest.raises(TraceError, match="a directory without the files of a trace"):
        FollowFile(tmp_path)


def test_trouble_with_the_file_is_logged_once_and_waited_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "t"
    source = FollowFile(path)
    os.mkfifo(path)
    assert [times(source), times(source)] == [[], []]
    assert caplog.text.count("is not a regular file") == 1
    path.unlink()
    path.write_text(mooncake(0))
    assert times(source) == [0.0]


def test_memory_source() -> None:
    source = MemorySource("test")
    assert isinstance(source, Source)
    assert (source.poll(5), source.last_record_seconds, source.exhausted) == ([], None, False)
    threads = [Thread(target=lambda: [source.push(EngineSample(time_seconds=n)) for n in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    taken: list[float] = []
    while len(taken) < 2000:
        taken += times(source, 7)
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(float(n) for n in range(500) for _ in range(4))
    assert source.last_record_seconds == 499.0
    source.push(EngineSample(time_seconds=1.0))
    source.end()
    assert not source.exhausted
    with pytest.raises(ValueError, match="has ended"):
        source.push(EngineSample(time_seconds=2.0))
    assert times(source) == [1.0]
    assert source.exhausted
    assert source.last_record_seconds == 499.0
    assert source.rejected() == {}
    source.close()
