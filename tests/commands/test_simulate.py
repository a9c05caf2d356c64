"""`kavier-twin simulate` as a user meets it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kavier_twin.commands.main import main

DATA = Path(__file__).parents[1] / "data"
GOLDEN = DATA / "golden" / "fuzz-04"
RECORDING = DATA / "recordings" / "chat-400"


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["simulate", *arguments, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1  # nothing else there
    return json.loads(out)


def test_requests_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    result = as_json(capsys, str(GOLDEN), "--requests", str(out))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(result["requests"]))
    assert set(lines[0]) == {
        "index",
        "replica",
        "prompt_tokens",
        "output_tokens",
        "cached_tokens",
        "arrival_seconds",
        "scheduled_seconds",
        "first_token_seconds",
        "finish_seconds",
        "preemptions",
    }
    assert sum(line["cached_tokens"] for line in lines) == result["prefix_cache_hit_tokens"]


def test_the_reference_agrees_with_the_jump(capsys: pytest.CaptureFixture[str]) -> None:
    jump, reference = as_json(capsys, str(GOLDEN)), as_json(capsys, str(GOLDEN), "--reference")
    assert jump["engine_steps"] == reference["engine_steps"]
    assert jump["e2e_seconds"]["mean"] == pytest.approx(reference["e2e_seconds"]["mean"], rel=1e-9)


def test_policies_change_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    base = as_json(capsys, str(RECORDING))
    off = as_json(capsys, str(RECORDING), "--policy", "prefix_caching=false")
    small = as_json(capsys, str(RECORDING), "--policy", "num_gpu_blocks=150", "--policy", "max_num_seqs=8")
    assert base["calibration"]["requests"] > 100
    assert off["prefix_cache_hit_ratio"] == 0.0
    assert 0.0 < small["prefix_cache_hit_ratio"] < base["prefix_cache_hit_ratio"]
    assert small["fleet"]["engine"]["num_gpu_blocks"] == 150
    assert max(small["over_time"]["requests_running"]) <= 8


def test_beladys_policy_knows_the_whole_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trace is simulated in parts, but a bound that knows one part only is none."""
    arguments = (str(RECORDING), "--policy", "eviction=belady", "--policy", "num_gpu_blocks=150")
    expected = as_json(capsys, *arguments)["prefix_cache_hit_tokens"]
    monkeypatch.setattr("kavier_twin.recordings.scenario._PART", 20)
    assert as_json(capsys, *arguments)["prefix_cache_hit_tokens"] == expected


def test_goodput(capsys: pytest.CaptureFixture[str]) -> None:
    strict = as_json(capsys, str(RECORDING), "--slo", "ttft_seconds=0.06")
    loose = as_json(capsys, str(RECORDING), "--slo", "ttft_seconds=60")
    assert strict["goodput_ratio"] < loose["goodput_ratio"] == 1.0


def test_a_fleet_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(
        "replicas: 2\nrouter: session_affinity\n"
        "engine: {num_gpu_blocks: 400, block_size: 32}\nstep_time: {fixed: 0.01, per_prefill_token: 1.0e-5}\n"
    )
    result = as_json(capsys, str(RECORDING), "--fleet", str(fleet))
    assert result["calibration"] is None
    assert result["fleet"]["router"] == "session_affinity"


FOOTPRINT = """
power: {idle_watts: 50, max_watts: 300}
pue: 1.2
carbon: {file: carbon.csv}
price_per_gpu_hour: 1.5
"""


def footprint_file(tmp_path: Path, text: str = FOOTPRINT) -> str:
    path = tmp_path / "footprint.yaml"
    path.write_text(text)
    (tmp_path / "carbon.csv").write_text("time,gco2_per_kwh\n1970-01-01T00:00:00Z,100\n3600,200\n")
    return str(path)


def test_energy_is_told_where_the_hardware_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert as_json(capsys, str(GOLDEN))["impact"] is None  # a run under a virtual clock: no GPU, no watts
    told = as_json(capsys, str(GOLDEN), "--footprint", footprint_file(tmp_path))
    impact = told["impact"]
    assert 60.0 <= impact["power_watts"] <= 360.0
    assert impact["energy_joules"] == pytest.approx(impact["power_watts"] * told["duration_seconds"])
    tokens = told["prompt_tokens"] + told["output_tokens"]
    assert impact["energy_joules_per_million_tokens"] == pytest.approx(1e6 * impact["energy_joules"] / tokens)
    assert impact["carbon_grams"] == pytest.approx(100.0 * impact["energy_joules"] / 3.6e6)
    assert impact["assumed"] == ["loads of the phases from published measurements"]
    assert told["fleet"]["footprint"]["pue"] == 1.2
    assert main(["simulate", str(GOLDEN), "--footprint", footprint_file(tmp_path)]) == 0
    out = capsys.readouterr().out
    for word in ("W mean", "Wh", "gCO2 per million tokens", "EUR per million tokens", "assumed"):
        assert word in out


def test_a_fleet_file_brings_its_footprint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    footprint_file(tmp_path)
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(
        "engine: {num_gpu_blocks: 400}\nstep_time: {fixed: 0.01}\n"
        "footprint: {power: {idle_watts: 50, max_watts: 300}, gpus_per_replica: 2, carbon: {file: carbon.csv}}\n"
    )
    impact = as_json(capsys, str(GOLDEN), "--fleet", str(fleet))["impact"]
    assert impact["power_watts"] > 2 * 50 * 1.5
    assert impact["cost"] is None
    assert impact["carbon_grams"] > 0.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("power: {idle_watts: 50}\n", "power.max_watts"),
        ("power: {idle_watts: 50, max_watts: 300}\ncarbon: {file: gone.csv}\n", "gone.csv: cannot be read"),
        ("pue: 1.2\n", "power"),
        ("- 1\n", "expected a mapping of power"),
    ],
)
def test_mistakes_in_a_footprint_get_a_sentence(
    tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", str(GOLDEN), "--footprint", footprint_file(tmp_path, text)]) == 1
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/no/such/trace"], "no such file"),
        ([str(GOLDEN), "--policy", "nonsense=1"], "unknown policy setting 'nonsense'"),
        ([str(GOLDEN), "--policy", "max_num_seqs"], "expected NAME=VALUE"),
        ([str(GOLDEN), "--policy", "max_num_seqs=-3"], "max_num_seqs"),
        ([str(GOLDEN), "--policy", "num_gpu_blocks=infx"], "a factor such as 0.5x"),
        ([str(GOLDEN), "--slo", "ttft_seconds=soon"], "expected NAME=SECONDS"),
        ([str(GOLDEN), "--pin"], "--pin needs a recording"),
        ([str(GOLDEN), "--fleet", "/no/fleet.yaml"], "/no/fleet.yaml"),
        ([str(GOLDEN), "--requests", "/no/such/folder/out.jsonl"], "/no/such/folder"),
        ([str(RECORDING), "--calibrate-until", "0.001"], "--calibrate-until"),
    ],
)
def test_mistakes_get_a_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *arguments]) == 1
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_every_problem_of_a_fleet_file_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text("replicas: 0\nengine: {num_gpu_blocks: 1, blocksize: 16}\nstep_time: {fixed: -1}\n")
    assert main(["simulate", str(GOLDEN), "--fleet", str(fleet)]) == 1
    said = capsys.readouterr().err
    for field in ("replicas", "engine.num_gpu_blocks", "engine.blocksize", "step_time.fixed"):
        assert field in said


def test_a_person_gets_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(GOLDEN)]) == 0
    out = capsys.readouterr().out
    for word in ("TTFT", "hit ratio", "preemptions", "throughput"):
        assert word in out


@pytest.mark.parametrize("source", ["requests", "steps", "metrics"])
def test_a_recording_is_calibrated_from_what_there_is(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All three see the same engine; only requests show what HTTP and tokenisation add."""
    assert main(["simulate", str(RECORDING), "--json", "--calibrate-from", source, "--calibrate-until", "0.6"]) == 0
    found = json.loads(capsys.readouterr().out)["calibration"]
    assert found["fitted_to"] == source
    assert found["requests"] > 10  # requests, steps or scrapes
    step = found["step_time"]
    # A decode step of one sequence of some hundred tokens: 12 to 20 ms on that machine at that time.
    one = step["fixed"] + step["per_decode_sequence"] + 300 * step["per_context_token"]
    assert 0.008 < one < 0.025
    assert (found["frontend_seconds"] > 0.0) == (source == "requests")
    for coefficient in found["coefficients"].values():
        assert coefficient["standard_deviation"] is None or coefficient["standard_deviation"] >= 0.0


def test_a_closed_loop_needs_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    """Four users of whom nobody thinks keep four requests live until the last ones are sent."""
    loop = "users=4,prompt=100-200,output=50,requests=80"
    result = as_json(capsys, "--closed-loop", loop)
    assert (result["requests"], result["requests_finished"], result["output_tokens"]) == (80, 80, 80 * 50)
    assert result["requests_running"] + result["requests_waiting"] == pytest.approx(4.0, rel=0.02)
    thinking = as_json(capsys, "--closed-loop", f"{loop},think=exponential:3,seed=1")
    assert thinking["requests_per_second"] < 0.5 * result["requests_per_second"]


def test_a_closed_loop_over_the_requests_of_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    """As the recording, but for the times: the same prompts find the same prefixes."""
    result = as_json(capsys, str(RECORDING), "--closed-loop", "users=8")
    given = as_json(capsys, str(RECORDING))
    assert result["prompt_tokens"] == given["prompt_tokens"]
    assert result["prefix_cache_hit_ratio"] == pytest.approx(given["prefix_cache_hit_ratio"], abs=0.1)
    assert result["requests_running"] + result["requests_waiting"] > 7.5


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "give a TRACE, or --closed-loop"),
        (["--closed-loop", "users=2"], "prompt and output are needed"),
        (["--closed-loop", "users=2,prompt=9-3,output=1"], "prompt: .*LOW-HIGH"),
        (["--closed-loop", "users=0,prompt=9,output=1"], "users: "),
        (["--closed-loop", "users=2,prompt=9,output=1,colour=3"], "colour: "),
        (["--closed-loop", "two"], "expected NAME=VALUE"),
        (["--closed-loop", "users=2,prompt=900000,output=1"], "never be served"),
        ([str(RECORDING), "--closed-loop", "users=2,prompt=9"], "are the TRACE's"),
        ([str(RECORDING), "--closed-loop", "users=2", "--pin"], "exclude each other"),
    ],
)
def test_closed_loops_that_cannot_be(arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *arguments]) == 1
    err = capsys.readouterr().err
    assert re.search(what, err)
    assert err.count("\n") == 1


def test_a_trace_in_unix_time_is_simulated_from_its_first_request_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As records of a live fleet are: 56 years before it nothing is to be simulated."""
    found = []
    for began in (0.0, 1_790_000_000.0):
        requests = [
            {"kind": "request", "id": str(n), "time_seconds": began + n, "prompt_tokens": 500, "output_tokens": 20}
            for n in range(50)
        ]
        path = tmp_path / "trace.jsonl"
        path.write_text("".join(json.dumps(request) + "\n" for request in requests))
        found.append(as_json(capsys, str(path)))
    assert found[0]["e2e_seconds"]["mean"] == pytest.approx(found[1]["e2e_seconds"]["mean"], rel=1e-5)
    assert found[0]["impact"]["energy_joules"] == pytest.approx(found[1]["impact"]["energy_joules"], rel=1e-5)
