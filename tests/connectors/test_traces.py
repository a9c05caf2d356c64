from __future__ import annotations

import gzip
import json
import os
import tempfile
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.traces import FORMATS, Trace, TraceError, base, read_trace
from connectors.traces.recording import read_kv_events, read_metrics, read_steps
from effort import examples
from kavier_twin.telemetry import CarbonSample, EngineSample, RequestFinished, RequestRecord, RequestSeen

DATA = Path(__file__).parents[1] / "data"
MOONCAKE = {"timestamp": 1500, "input_length": 1000, "output_length": 5, "hash_ids": [7, 8]}
GOLDEN = {"arrival_seconds": 0.5, "prompt_tokens": 40, "output_tokens": 8, "hash_ids": [1, 2, 3]}
RECORDING = {
    "id": "s0-0",
    "session": "s0",
    "arrival": 1.0,
    "prompt_tokens": 40,
    "output_tokens": 8,
    "cached_tokens": 32,
    "hash_ids": [2**64 - 1],
    "token_times": [1.25, 1.5, 2.0],
}
BENCH = {
    "request_id": "bench-0",
    "input_toks": 40,
    "output_toks": 8,
    "arrival_time": 1787267980.08,
    "queued_ts": 27536.5,
    "scheduled_ts": 27536.75,
    "first_token_ts": 27537.0,
    "last_token_ts": 27539.5,
}
REQUEST = {"kind": "request", "id": "a", "time_seconds": 3.0, "prompt_tokens": 4, "output_tokens": 2}
SCENARIO = {"hash_block_tokens": 16, "hash_ids_cover": "prompt+output", "engine": {"block_size": 16}}
META = {"block_tokens": 32, "engine": {"block_size": 32}}
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
BURST_2 = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"
KAVIER = "session_id,turn_id,ts,num_input_tokens,num_output_tokens"

EXAMPLES: dict[str, tuple[str | None, str]] = {
    "mooncake": (None, json.dumps(MOONCAKE)),
    "golden": (None, json.dumps(GOLDEN)),
    "recording": (None, json.dumps(RECORDING)),
    "llmservingsim": (None, json.dumps(BENCH)),
    "telemetry": (None, json.dumps(REQUEST)),
    "azure": (AZURE, "2023-11-16 18:15:46.6805900,374,44"),
    "burstgpt": (BURST, "5,ChatGPT,472,18,490,Conversation log"),
    "kavier": (KAVIER, "16,0,0.5,7,11"),
}
"""By line-based format: its header, if it has one, and a good line."""


def write(path: Path, *lines: str | bytes | dict[str, Any], end: str = "\n") -> Path:
    """Write a file of lines, and beside it the settings that golden runs and recordings need."""
    parts = []
    for line in lines:
        text = json.dumps(line) if isinstance(line, dict) else line
        parts.append(text.encode() if isinstance(text, str) else text)
    data = end.encode().join(parts) + end.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    (path.parent / "scenario.json").write_text(json.dumps(SCENARIO))
    (path.parent / "meta.json").write_text(json.dumps(META))
    return path


def example(format: str) -> list[str]:
    header, line = EXAMPLES[format]
    return [line] if header is None else [header, line]


# --- each format --------------------------------------------------------------------------------------------------


def test_mooncake(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "t", MOONCAKE, MOONCAKE | {"timestamp": 500, "hash_ids": []}))
    assert (trace.format, trace.hash_block_tokens, trace.hashes_cover_output) == ("mooncake", 512, False)
    late = trace.records[1]
    assert [record.id for record in trace.records] == ["1", "0"]
    assert (late.time_seconds, late.prompt_tokens, late.output_tokens) == (1.5, 1000, 5)
    assert (late.block_hashes, late.block_tokens, late.session) == ((7, 8), 512, None)


def test_azure_of_both_years(tmp_path: Path) -> None:
    old = write(tmp_path / "old", AZURE, "2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109")
    trace = read_trace(write(old, *old.read_text().splitlines(), end="\r\n"))
    assert trace.format == "azure"
    assert [record.time_seconds for record in trace.records] == [0.0, pytest.approx(4.314579, abs=1e-9)]
    assert [(record.prompt_tokens, record.output_tokens) for record in trace.records] == [(374, 44), (396, 109)]
    new = write(tmp_path / "new", AZURE, "2024-05-12 00:00:00.009930+00:00,2,3", "2024-05-12 00:00:20+00:00,4,5")
    assert [record.time_seconds for record in read_trace(new).records] == [0.0, pytest.approx(19.99007)]


def test_times_count_from_the_earliest_request(tmp_path: Path) -> None:
    path = write(tmp_path / "t", AZURE, "2023-11-16 00:00:09,1,1", "2023-11-16 00:00:07,2,2", "2023-11-16 00:00:09,3,3")
    assert [(r.id, r.time_seconds) for r in read_trace(path).records] == [("1", 0.0), ("0", 2.0), ("2", 2.0)]


def test_burstgpt(tmp_path: Path) -> None:
    trace = read_trace(
        write(tmp_path / "t", BURST, "5,ChatGPT,472,18,490,Conversation log", "45,GPT-4,10,0,10,API log")
    )
    assert trace.format == "burstgpt"
    first, failed = trace.records
    assert (first.time_seconds, first.model, first.session, first.e2e_seconds) == (0.0, "ChatGPT", None, None)
    assert (failed.time_seconds, failed.output_tokens, failed.finish_reason) == (40.0, 0, "error")


def test_burstgpt_with_sessions(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t",
        BURST_2,
        "19440110.0,1722ac82-0a46,43,GPT-4,906,446,1352,Conversation log",
        "19440161.5,,,ChatGPT,36,29,65,API log",
        "19440162.5,,,ChatGPT,0,0,0,API log",
    )
    trace = read_trace(path)
    chat, api = trace.records
    assert (chat.session, chat.e2e_seconds, chat.finish_reason) == ("1722ac82-0a46", 43.0, None)
    assert (api.session, api.e2e_seconds, api.time_seconds) == (None, None, 51.5)
    assert trace.rejected_by_reason == {"bad-value": 1}
    assert trace.rejected[0].line == 4


def test_kavier(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "t", KAVIER + ",", "16,0,1.5,7,11", "32,0,0,64,0", "48,0,2,9,9,"))
    assert trace.format == "kavier"
    assert trace.rejected_count == 0
    assert [(r.session, r.time_seconds, r.prompt_tokens, r.output_tokens) for r in trace.records] == [
        ("32", 0.0, 64, 0),
        ("16", 1.5, 7, 11),
        ("48", 2.0, 9, 9),
    ]


def test_kavier_with_token_lists(tmp_path: Path) -> None:
    path = write(tmp_path / "t", KAVIER + ",input_tokens,output_tokens", '0,0,0.0,3,2,"[1, 100, 2]","[1, 2]"')
    assert read_trace(path).records[0].prompt_tokens == 3


@pytest.mark.parametrize("form", ["csv", "parquet text", "parquet list"])
def test_kavier_s_tokens_tell_what_is_shared(form: str, tmp_path: Path) -> None:
    """A hash a full block of 16, equal for equal tokens only; a token more or less than told changes nothing."""
    one, other = list(range(40)), [*range(16), *range(100, 124)]
    swapped = [1, 0, *range(2, 40)]
    lists = [one, other, swapped, one[:15], [*one, 7]]
    if form == "csv":
        rows = [f'0,0,{number},{min(len(tokens), 40)},1,"{tokens}"' for number, tokens in enumerate(lists)]
        path = write(tmp_path / "t", KAVIER + ",input_tokens", *rows)
    else:
        columns: dict[str, list[Any]] = {
            "ts": [float(number) for number in range(len(lists))],
            "num_input_tokens": [min(len(tokens), 40) for tokens in lists],
            "num_output_tokens": [1] * len(lists),
            "input_tokens": lists if form == "parquet list" else [str(tokens) for tokens in lists],
        }
        path = write_parquet(tmp_path / "t", columns)
    hashes = [record.block_hashes for record in read_trace(path).records]
    assert [len(own) for own in hashes] == [2, 2, 2, 0, 2]
    assert hashes[1][0] == hashes[0][0]
    assert hashes[1][1] != hashes[0][1]
    assert hashes[2][0] != hashes[0][0]
    assert hashes[4] == hashes[0]


def test_kavier_s_tokens_that_are_none(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t",
        KAVIER + ",input_tokens",
        '0,0,0,3,2,"[1, x]"',
        '0,0,0,3,2,"[[1]]"',
        '0,0,0,3,2,"[1.5]"',
        "0,0,0,3,2,",
    )
    trace = read_trace(path)
    assert [(r.line, r.reason) for r in trace.rejected] == [(line, "bad-value") for line in (2, 3, 4)]
    assert trace.records[0].block_hashes == ()


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    arrow = pytest.importorskip("pyarrow", reason="needs the extra kavier-twin[parquet]")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra kavier-twin[parquet]")
    parquet.write_table(arrow.table(columns), path)
    return path


def test_kavier_parquet(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {
        "session_id": [1, 1, 2],
        "turn_id": [0, 1, 0],
        "ts": [0.0, float("nan"), 3.5],
        "num_input_tokens": [10, 20, 30],
        "num_output_tokens": [1, 2, 3],
    }
    trace = read_trace(write_parquet(tmp_path / "t", columns))
    assert trace.format == "kavier-parquet"
    assert [(r.id, r.session, r.time_seconds) for r in trace.records] == [("0", "1", 0.0), ("2", "2", 3.5)]
    assert [(r.line, r.reason) for r in trace.rejected] == [(2, "bad-value")]


def test_kavier_parquet_that_cannot_be_read(tmp_path: Path) -> None:
    other = write_parquet(tmp_path / "other", {"ts": [1.0]})
    with pytest.raises(TraceError, match="columns not found: num_input_tokens, num_output_tokens"):
        read_trace(other)
    (tmp_path / "cut").write_bytes(other.read_bytes()[:60])
    with pytest.raises(TraceError, match="not a readable Parquet file"):
        read_trace(tmp_path / "cut")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t").write_bytes(b"PAR1....PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(TraceError, match=r"pip install 'kavier-twin\[parquet\]'"):
        read_trace(tmp_path / "t")


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_golden(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, GOLDEN, GOLDEN | {"arrival_seconds": 0, "priority": 3, "session": 4})
    for given_path in (path, tmp_path):
        trace = read_trace(given_path)
        assert (trace.format, trace.path, trace.settings) == ("golden", path, SCENARIO)
        assert (trace.hash_block_tokens, trace.hashes_cover_output) == (16, True)
        second, first = trace.records
        assert (first.id, first.time_seconds, first.priority, first.session) == ("0", 0.5, 0, None)
        assert (first.block_hashes, first.block_tokens, first.hashes_cover_output) == ((1, 2, 3), 16, True)
        assert (second.id, second.priority, second.session) == ("1", 3, "4")


def test_recording(tmp_path: Path) -> None:
    path = write(tmp_path / "requests.jsonl", RECORDING, RECORDING | {"id": "s1-0", "token_times": []})
    for given_path in (path, tmp_path):
        trace = read_trace(given_path)
        assert (trace.format, trace.path, trace.settings) == ("recording", path, META)
        assert (trace.hash_block_tokens, trace.hashes_cover_output) == (32, True)
        record, silent = trace.records
        assert (record.id, record.session, record.cached_tokens) == ("s0-0", "s0", 32)
        assert (record.ttft_seconds, record.e2e_seconds) == (0.25, 1.0)
        assert (record.block_hashes, record.hashes_cover_output) == ((2**64 - 1,), True)
        assert (silent.ttft_seconds, silent.e2e_seconds) == (None, None)


def test_llmservingsim(tmp_path: Path) -> None:
    """A directory with a recording's file names, told apart from one by what the files say."""
    path = write(tmp_path / "requests.jsonl", BENCH, BENCH | {"request_id": "b", "queued_ts": 27530.5})
    meta = {
        "model": "a/model",
        "engine_kwargs": {"max_num_seqs": 128, "max_model_len": None, "kv_cache_dtype": "auto"},
        "resolved_config": {"scheduler_config": {"async_scheduling": True, "policy": "fcfs"}, "cache_config": None},
        "kv_cache": {"num_gpu_blocks": 2588, "block_size": 16, "enable_prefix_caching": False},
        "hardware": {"device_name": "a GPU"},
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    for given_path in (path, tmp_path):
        trace = read_trace(given_path)
        assert (trace.format, trace.hash_block_tokens) == ("llmservingsim", None)
        early, late = trace.records
        assert (early.id, early.time_seconds, late.id, late.time_seconds) == ("b", 0.0, "bench-0", 6.0)
        assert (late.ttft_seconds, late.e2e_seconds, late.queue_seconds) == (0.5, 3.0, 0.25)
        assert trace.settings["engine"] == {
            "model": "a/model",
            "gpu": "a GPU",
            "max_num_seqs": 128,
            "kv_cache_dtype": "auto",
            "async_scheduling": True,
            "scheduling_policy": "fcfs",
            "num_gpu_blocks": 2588,
            "block_size": 16,
            "prefix_caching": False,
        }
    (tmp_path / "meta.json").write_text('{"kv_cache": null, "hardware": 3, "engine_kwargs": []}')
    assert read_trace(tmp_path).settings["engine"] == {}


def test_side_files_of_a_recording(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "steps.jsonl.gz", {"step": 0}, {"step": 1})
    write(tmp_path / "metrics.jsonl.gz", {"t": 5.0, "text": "a 1"}, {"t": "5", "text": "a"}, {"t": 6, "text": 3})
    write(tmp_path / "kv_events.jsonl.gz", {"seq": 0})
    assert read_steps(tmp_path / "steps.jsonl.gz") == [{"step": 0}, {"step": 1}]
    assert list(read_metrics(tmp_path)) == [(5.0, "a 1")]
    assert "2 malformed lines left out, the first is line 2" in caplog.text
    assert list(read_kv_events(tmp_path)) == [{"seq": 0}]
    (tmp_path / "steps.jsonl.gz").unlink()
    with pytest.raises(TraceError, match=r"expected a recording's steps\.jsonl"):
        read_steps(tmp_path)


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_of_several_records_of_a_request_the_fullest_counts(tmp_path: Path, order: tuple[int, ...]) -> None:
    """As the tap sends them: at once, and again when the prompt and the answer are tokenised."""
    whole = RequestSeen(id="a", time_seconds=1.0, prompt_tokens=40, block_hashes=(1, 2), block_tokens=16)
    estimated = RequestSeen(id="a", time_seconds=1.0, prompt_tokens=33, prompt_tokens_from="estimate")
    end = RequestFinished(id="a", time_seconds=4.0, output_tokens=30)
    hashed = end.model_copy(update={"block_hashes": (1, 2, 3, 4)})
    lines = [(whole, estimated, end, hashed)[number].model_dump(mode="json") for number in order]
    trace = read_trace(write(tmp_path / "t", *lines))
    (record,) = trace.records
    assert not trace.rejected
    assert isinstance(record, RequestRecord)
    assert (record.prompt_tokens, record.block_hashes, record.hashes_cover_output) == (40, (1, 2, 3, 4), True)


def test_telemetry_joins_arrivals_with_their_ends(tmp_path: Path) -> None:
    seen = RequestSeen(
        id="b", time_seconds=1.0, session="s", prompt_tokens=40, block_hashes=(1, 2), block_tokens=32, pod="p"
    )
    end = RequestFinished(id="b", time_seconds=4.0, output_tokens=30, cached_tokens=32, block_hashes=(1, 3))
    lines = [
        end.model_dump(mode="json"),  # out of order
        EngineSample(time_seconds=1.0).model_dump(mode="json"),
        REQUEST,
        seen.model_dump(mode="json"),
        seen.model_dump(mode="json"),
        seen.model_dump(mode="json") | {"id": "open"},
        end.model_dump(mode="json") | {"id": "unheard"},
        {"kind": "request_seen", "id": "back", "time_seconds": 9.0, "prompt_tokens": 4},
        {"kind": "request_finished", "id": "back", "time_seconds": 8.0, "output_tokens": 4},
        CarbonSample(time_seconds=1.0, gco2_per_kwh=200.0).model_dump(mode="json"),
    ]
    trace = read_trace(write(tmp_path / "t", *lines))
    assert trace.format == "telemetry"
    assert [record.id for record in trace.records] == ["b", "a"]
    joined = trace.records[0]
    assert isinstance(joined, RequestRecord)
    assert (joined.session, joined.pod, joined.output_tokens, joined.e2e_seconds) == ("s", "p", 30, 3.0)
    assert (joined.block_hashes, joined.hashes_cover_output, joined.cached_tokens) == ((1, 3), True, 32)
    assert (trace.hash_block_tokens, trace.hashes_cover_output) == (32, True)
    assert [(r.line, r.reason) for r in trace.rejected] == [
        (5, "duplicate-id"),
        (6, "unfinished"),
        (7, "unseen"),
        (9, "bad-value"),
    ]


def test_telemetry_round_trip(tmp_path: Path) -> None:
    original = read_trace(write(tmp_path / "requests.jsonl", RECORDING)).records
    path = tmp_path / "t.jsonl"
    path.write_text("".join(record.model_dump_json() + "\n" for record in original))
    assert read_trace(path).records == original
    halves = [half for record in original for half in (record.seen(), record.finished()) if half is not None]
    path.write_text("".join(half.model_dump_json() + "\n" for half in halves))
    assert read_trace(path).records == original


# --- lines that are not right ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "line", "reason"),
    [
        ("mooncake", "{", "not-json"),
        ("mooncake", "[" * 100_000, "not-json"),
        ("mooncake", '{"timestamp": ' + "9" * 5000 + "}", "not-json"),
        ("mooncake", b'{"timestamp": "\xff"}', "not-utf8"),
        ("mooncake", b"\x00", "not-json"),
        ("mooncake", "3", "not-an-object"),
        ("mooncake", {"timestamp": 1, "input_length": 1}, "missing-field"),
        ("mooncake", MOONCAKE | {"timestamp": None}, "missing-field"),
        ("mooncake", MOONCAKE | {"timestamp": float("nan")}, "bad-value"),
        ("mooncake", MOONCAKE | {"timestamp": float("inf")}, "bad-value"),
        ("mooncake", MOONCAKE | {"timestamp": 10**400}, "bad-value"),
        ("mooncake", MOONCAKE | {"timestamp": True}, "bad-value"),
        ("mooncake", MOONCAKE | {"timestamp": "0"}, "bad-value"),
        ("mooncake", MOONCAKE | {"timestamp": -1}, "bad-value"),
        ("mooncake", MOONCAKE | {"input_length": 0}, "bad-value"),
        ("mooncake", MOONCAKE | {"input_length": True}, "bad-value"),
        ("mooncake", MOONCAKE | {"input_length": 1000.5}, "bad-value"),
        ("mooncake", MOONCAKE | {"input_length": 10**30}, "bad-value"),
        ("mooncake", MOONCAKE | {"output_length": -1}, "bad-value"),
        ("mooncake", MOONCAKE | {"output_length": "5"}, "bad-value"),
        ("mooncake", MOONCAKE | {"hash_ids": "ab"}, "bad-value"),
        ("mooncake", MOONCAKE | {"hash_ids": [True]}, "bad-value"),
        ("mooncake", MOONCAKE | {"hash_ids": [-1]}, "bad-value"),
        ("mooncake", MOONCAKE | {"hash_ids": [2**64]}, "bad-value"),
        ("mooncake", MOONCAKE | {"hash_ids": [1, 2, 3]}, "hash-coverage"),
        ("golden", GOLDEN | {"hash_ids": [1, 2, 3, 4]}, "hash-coverage"),
        ("golden", GOLDEN | {"priority": 0.5}, "bad-value"),
        ("golden", GOLDEN | {"session": [1]}, "bad-value"),
        ("golden", GOLDEN | {"session": 10**5000 // 10**1000}, "bad-value"),
        ("recording", RECORDING, "duplicate-id"),
        ("recording", RECORDING | {"id": "x", "token_times": 3}, "bad-value"),
        ("recording", RECORDING | {"id": "x", "token_times": [1.5, None]}, "bad-value"),
        ("recording", RECORDING | {"id": "x", "token_times": [0.5]}, "bad-value"),
        ("recording", RECORDING | {"id": ""}, "missing-field"),
        ("recording", RECORDING | {"id": "\ud800"}, "bad-value"),
        ("llmservingsim", BENCH | {"queued_ts": None}, "missing-field"),
        ("llmservingsim", BENCH | {"request_id": "c", "first_token_ts": 27536.0}, "bad-value"),
        ("telemetry", "{", "not-json"),
        ("telemetry", "3", "not-an-object"),
        ("telemetry", {"id": "x"}, "missing-field"),
        ("telemetry", REQUEST | {"kind": "request_seen_secret"}, "unknown-kind"),
        ("telemetry", REQUEST | {"id": "x", "time_seconds": float("nan")}, "bad-value"),
        ("telemetry", REQUEST | {"id": "x", "prompt_tokens": True}, "bad-value"),
        ("telemetry", REQUEST | {"id": "x", "version": 2}, "bad-value"),
        ("telemetry", REQUEST | {"id": "x", "block_hashes": [1, 2], "block_tokens": 4}, "hash-coverage"),
        ("telemetry", REQUEST | {"id": "x", "block_hashes": [1]}, "bad-value"),
        ("azure", "yesterday,1,2", "bad-value"),
        ("azure", "2023-11-16 18:15:46,1_0,2", "bad-value"),
        ("azure", "2023-11-16 18:15:46,-1,2", "bad-value"),
        ("azure", "2023-11-16 18:15:46,1.0,2", "bad-value"),
        ("azure", "2023-11-16 18:15:46,\u0661,2", "bad-value"),
        ("azure", "2023-11-16 18:15:46," + "9" * 5000 + ",2", "bad-value"),
        ("azure", "2023-11-16 18:15:46,1", "columns"),
        ("azure", "2023-11-16 18:15:46,1,2,3", "columns"),
        ("azure", '"' + "x" * 200_000, "not-csv"),
        ("burstgpt", "nan,GPT-4,1,1,2,API log", "bad-value"),
        ("burstgpt", "1_0,GPT-4,1,1,2,API log", "bad-value"),
        ("burstgpt", "-1,GPT-4,1,1,2,API log", "bad-value"),
        ("burstgpt", "1e999,GPT-4,1,1,2,API log", "bad-value"),
        ("kavier", "16,0,,7,11", "bad-value"),
        ("kavier", "16,0,inf,7,11", "bad-value"),
    ],
)
def test_a_malformed_line_is_counted_and_the_rest_goes_on(
    tmp_path: Path, format: str, line: str | bytes | dict[str, Any], reason: str
) -> None:
    before = example(format)
    trace = read_trace(write(tmp_path / "t", *before, "", line, "  ", end="\n"), format)
    assert len(trace.records) == 1
    assert (trace.rejected_count, trace.rejected_by_reason) == (1, {reason: 1})
    rejected = trace.rejected[0]
    assert (rejected.file, rejected.line, rejected.reason) == (tmp_path / "t", len(before) + 2, reason)
    assert "secret" not in rejected.detail


def test_malformed_lines_keep_their_place_in_the_indices(tmp_path: Path) -> None:
    assert [r.id for r in read_trace(write(tmp_path / "t", "{", MOONCAKE, "{", MOONCAKE)).records] == ["1", "3"]


def test_examples_of_malformed_lines_are_bounded(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "t", MOONCAKE, *["{"] * 1500))
    assert (len(trace.rejected), trace.rejected_count, trace.rejected_by_reason) == (1000, 1500, {"not-json": 1500})


def test_an_endless_line_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MAX_LINE_BYTES", 200)
    trace = read_trace(write(tmp_path / "t", MOONCAKE, "x" * 1001, MOONCAKE, "y" * 1000))
    assert [record.id for record in trace.records] == ["0", "1"]
    assert [(r.line, r.reason) for r in trace.rejected] == [(2, "too-long"), (4, "too-long")]


def test_lines_without_a_final_newline_and_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "t").write_text(f"\ufeff{AZURE}\r\n2023-11-16 00:00:00,1,2\r\n2023-11-16 00:00:01,3,4", newline="")
    trace = read_trace(tmp_path / "t")
    assert (len(trace.records), trace.rejected_count) == (2, 0)


# --- recognition and errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("format", EXAMPLES)
def test_the_format_is_recognised_or_named(tmp_path: Path, format: str, suffix: str) -> None:
    path = write(tmp_path / f"t{suffix}", *example(format))
    assert read_trace(path).format == format
    assert read_trace(os.fspath(path), format) == read_trace(path)


def test_the_first_lines_may_be_damaged(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "t", "{", b"\xff", "x" * 200_000, MOONCAKE))
    assert (trace.format, trace.rejected_count) == ("mooncake", 3)


def test_gzip_cut_short(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gz", *[MOONCAKE | {"timestamp": n * 7919 % 10007} for n in range(5000)])
    (tmp_path / "cut").write_bytes(whole.read_bytes()[:-2000])
    trace = read_trace(tmp_path / "cut")
    assert 0 < len(trace.records) < 5000
    assert [(r.line, r.reason) for r in trace.rejected] == [(len(trace.records) + 1, "damaged-gzip")]
    damaged = bytearray(whole.read_bytes())
    damaged[-8] ^= 1  # the checksum
    (tmp_path / "sum").write_bytes(damaged)
    assert read_trace(tmp_path / "sum").rejected_by_reason == {"damaged-gzip": 1}
    (tmp_path / "stub").write_bytes(whole.read_bytes()[:15])
    with pytest.raises(TraceError, match="unknown format"):
        read_trace(tmp_path / "stub")
    with pytest.raises(TraceError, match="line 1, damaged-gzip"):
        read_trace(tmp_path / "stub", "mooncake")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such file"):
        read_trace(tmp_path / "absent")
    (tmp_path / "empty").touch()
    with pytest.raises(TraceError, match="the file is empty"):
        read_trace(tmp_path / "empty")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TraceError, match="not a regular file"):
        read_trace(tmp_path / "pipe")
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / ("x" * 300))
    with pytest.raises(TraceError, match=r"a directory without the files of a trace; expected golden: trace\.jsonl"):
        read_trace(tmp_path)
    with pytest.raises(TraceError, match="the format azure is a file"):
        read_trace(tmp_path, "azure")


def test_unknown_formats(tmp_path: Path) -> None:
    path = write(tmp_path / "t", "hello", "world")
    with pytest.raises(TraceError, match="unknown format") as told:
        read_trace(path)
    assert all(name in str(told.value) for name in FORMATS)
    with pytest.raises(TraceError, match="there is no format 'csv'; the formats are telemetry, mooncake"):
        read_trace(path, "csv")


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_without_a_valid_line(tmp_path: Path, format: str) -> None:
    with pytest.raises(TraceError, match=r"t: .*expected") as told:
        read_trace(write(tmp_path / "t", "hello", "world"), format)
    assert FORMATS[format].expected in str(told.value)


def test_only_samples_are_no_trace(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no request found as telemetry"):
        read_trace(write(tmp_path / "t", EngineSample(time_seconds=1.0).model_dump(mode="json")))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "scenario.json is missing"),
        ("{", "expected a JSON object"),
        ("[]", "expected a JSON object"),
        ('{"a": "\\u00e9"}', "expected hash_block_tokens"),
        ('{"hash_block_tokens": true}', "expected hash_block_tokens"),
        ('{"hash_block_tokens": 0}', "expected hash_block_tokens"),
        ('{"hash_block_tokens": 16, "hash_ids_cover": "all"}', "expected hash_ids_cover"),
    ],
)
def test_golden_settings_that_cannot_be_used(tmp_path: Path, text: str | None, told: str) -> None:
    path = write(tmp_path / "trace.jsonl", GOLDEN)
    scenario = tmp_path / "scenario.json"
    scenario.unlink() if text is None else scenario.write_text(text)
    with pytest.raises(TraceError, match=told):
        read_trace(path)


def test_settings_that_are_not_text(tmp_path: Path) -> None:
    path = write(tmp_path / "requests.jsonl", RECORDING)
    (tmp_path / "meta.json").write_bytes(b"\xff")
    with pytest.raises(TraceError, match=r"meta\.json: .* not UTF-8"):
        read_trace(path)


# --- anything at all ----------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def mutated(line: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """The line with one field replaced by anything."""
    change = st.tuples(st.sampled_from(sorted(line)), json_values)
    return change.map(lambda pair: json.dumps(line | {pair[0]: pair[1]}).encode())


fields = st.sampled_from(["", "0", "1", "12", "-1", "1e9", "nan", "2023-11-16 18:15:46", '"', "x", "9" * 30])
any_line = st.one_of(
    st.sampled_from([line.encode() for format in EXAMPLES for line in example(format)]),
    st.binary(max_size=40),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.lists(fields, min_size=1, max_size=7).map(lambda values: ",".join(values).encode()),
    *[mutated(line) for line in (MOONCAKE, GOLDEN, RECORDING, REQUEST)],
)


@examples(300)
@given(lines=st.lists(any_line, max_size=12), format=st.sampled_from([None, *FORMATS]), end=st.booleans())
def test_anything_gives_a_trace_or_a_trace_error(lines: list[bytes], format: str | None, end: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = write(Path(directory) / "t", b"")
        data = b"\n".join(lines) + (b"\n" if end else b"")
        path.write_bytes(data)
        try:
            trace = read_trace(path, format)
        except TraceError:
            return
    assert isinstance(trace, Trace)
    assert trace.records == sorted(trace.records, key=lambda record: record.time_seconds)
    assert len({record.id for record in trace.records}) == len(trace.records)
    assert trace.rejected_count == len(trace.rejected) == sum(trace.rejected_by_reason.values())
    if not data.startswith(base.GZIP_MAGIC):
        headers = 0 if EXAMPLES[trace.format][0] is None else 1
        not_empty = sum(1 for line in data.split(b"\n") if line.strip())
        assert len(trace.records) + trace.rejected_count + headers == not_empty


# --- real data ----------------------------------------------------------------------------------------------------


def test_real_mooncake_loads_whole(shared_data: Path) -> None:
    trace = read_trace(shared_data / "mooncake" / "conversation_trace.jsonl")
    assert (trace.format, len(trace.records), trace.rejected_count) == ("mooncake", 12_031, 0)
    assert trace.records[-1].time_seconds == pytest.approx(3537, abs=1)


def test_real_azure(shared_data: Path) -> None:
    trace = read_trace(shared_data / "azure" / "AzureLLMInferenceTrace_conv.csv")
    assert (trace.format, len(trace.records), trace.rejected_count) == ("azure", 19_366, 0)
    assert (trace.records[0].prompt_tokens, trace.records[-1].output_tokens) == (374, 183)
    assert trace.records[-1].time_seconds == pytest.approx(3501.721937)


def test_real_kavier(shared_data: Path) -> None:
    decode = read_trace(shared_data / "kavier" / "input_decode_accuracy.csv")
    prefill = read_trace(shared_data / "kavier" / "input_prefill_accuracy.csv")
    assert [record.output_tokens for record in decode.records][-1] == 13_940
    assert [record.prompt_tokens for record in prefill.records][-1] == 16_384
    assert decode.rejected_count == prefill.rejected_count == 0


@pytest.mark.parametrize("directory", sorted((DATA / "golden").iterdir()), ids=lambda directory: directory.name)
def test_real_golden_runs(directory: Path) -> None:
    trace = read_trace(directory)
    assert trace.format == "golden"
    assert len(trace.records) == trace.settings["summary"]["requests"]
    assert sum(record.prompt_tokens for record in trace.records) == trace.settings["summary"]["prompt_tokens"]
    assert trace.rejected_count == 0


@pytest.mark.parametrize("directory", sorted((DATA / "recordings").iterdir()), ids=lambda directory: directory.name)
def test_real_recordings(directory: Path) -> None:
    trace = read_trace(directory)
    assert trace.format == "recording"
    assert (len(trace.records), trace.rejected_count) == (trace.settings["requests"], 0)
    assert all(record.e2e_seconds is not None for record in trace.records)
    assert read_steps(directory)


def test_what_a_real_engine_says_of_itself() -> None:
    directory = DATA / "recordings" / "chat-400"
    pages = read_metrics(directory)
    assert len(pages) > 100
    assert all("vllm:" in text for _, text in pages)
    assert {"recv", "seq", "batch"} <= read_kv_events(directory)[0].keys()
