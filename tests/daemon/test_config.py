from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from connectors.kafka.settings import KafkaSettings
from kavier_twin.commands.main import main
from kavier_twin.daemon.config import Settings, read_settings
from kavier_twin.daemon.http_settings import DEFAULT_PORT
from kavier_twin.errors import UserError
from kavier_twin.forecast.forecaster import ForecastSettings
from kavier_twin.mirror.mirror import MirrorSettings
from kavier_twin.simulation.settings import CRUDE_STEP_TIME


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "twin.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def minimal(**more: Any) -> dict[str, Any]:
    return {
        "fleet": {"engine": {"num_gpu_blocks": 100}},
        "sources": [{"type": "trace_file", "path": "requests.jsonl"}],
        **more,
    }


def problems(tmp_path: Path, content: Any) -> list[str]:
    """The problems told, each without the file's name, which each must begin with."""
    path = write(tmp_path, content)
    with pytest.raises(UserError) as caught:
        read_settings(path)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(f"{len(lines)} problem")
    assert all(line.startswith(f"  {path}: ") for line in lines)
    return [line.removeprefix(f"  {path}: ") for line in lines]


def read(tmp_path: Path, content: Any) -> Settings:
    return read_settings(write(tmp_path, content))


def test_defaults(tmp_path: Path) -> None:
    settings = read(tmp_path, minimal())
    assert (settings.pool, settings.http.host, settings.http.port) == ("default", "127.0.0.1", DEFAULT_PORT)
    assert settings.mirror.settings("default") == MirrorSettings()
    assert settings.forecast == ForecastSettings()
    assert not settings.fleet.calibrated
    assert settings.fleet.settings().step_time == CRUDE_STEP_TIME
    assert settings.sources[0].follow


def test_everything_given(tmp_path: Path) -> None:
    settings = read(
        tmp_path,
        minimal(
            pool="chat",
            fleet={
                "replicas": 3,
                "router": "least_loaded",
                "engine": {"num_gpu_blocks": 100, "max_num_seqs": 8},
                "step_time": {"fixed": 0.01},
            },
            mirror={"late_seconds": 5, "calibrate_after_requests": 50},
            forecast={
                "every_seconds": 10,
                "horizons_seconds": [60, 30],
                "policies": [{"name": "today"}, {"name": "small", "overrides": {"num_gpu_blocks": "0.5x"}}],
                "slos": [{"name": "fast", "metric": "ttft_p99_seconds", "threshold": 1.0}],
            },
            http={"host": "::1", "port": 0},
            log_level="debug",
            dead_letters="letters.jsonl",
        ),
    )
    assert settings.fleet.calibrated
    assert settings.fleet.settings().replicas == 3
    assert settings.mirror.settings("chat").pool == "chat"
    assert settings.forecast.horizons_seconds == (30.0, 60.0)
    assert settings.dead_letters == tmp_path / "letters.jsonl"


def test_a_footprint_with_its_carbon_file(tmp_path: Path) -> None:
    (tmp_path / "carbon.csv").write_text("time,gco2_per_kwh\n0,100\n")
    footprint = {"power": {"idle_watts": 70, "max_watts": 700}, "carbon": {"file": "carbon.csv"}}
    content = minimal(fleet={"engine": {"num_gpu_blocks": 100}, "footprint": footprint})
    found = read(tmp_path, content).fleet.settings().footprint
    assert found is not None
    assert found.carbon.points == ((0.0, 100.0),)
    assert found.carbon.file == tmp_path / "carbon.csv"
    (tmp_path / "carbon.csv").write_text("time,gco2_per_kwh\n0,much\n")
    (problem,) = problems(tmp_path, content)
    assert problem.startswith(f"fleet.footprint.carbon.file: {tmp_path / 'carbon.csv'}: line 2: gco2_per_kwh 'much'")
    footprint["power"] = {"idle_watts": 70, "max_wats": 700}
    found_problems = "\n".join(problems(tmp_path, content | {"log_level": "loud"}))
    assert "fleet.footprint.power.max_wats: unknown setting; did you mean max_watts?" in found_problems
    assert "log_level: is 'loud'" in found_problems


def test_paths_count_from_the_settings_file(tmp_path: Path) -> None:
    assert read(tmp_path, minimal()).sources[0].path == tmp_path / "requests.jsonl"


def test_the_token_is_a_place_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("first\n")
    access = read(tmp_path, minimal(http={"token": {"file": "token"}, "open_reading": False})).http.access
    assert access.token is not None
    assert access.token() == "first"
    (tmp_path / "token").write_text("renewed")
    assert access.token() == "renewed"
    monkeypatch.delenv("TWIN_TOKEN", raising=False)
    for http, says in (
        ({"token": "s3cret"}, "http.token: expected {env: NAME} or {file: PATH}, never the secret itself"),
        (
            {"token": {"env": "TWIN_TOKEN"}},
            "http.token: the environment variable TWIN_TOKEN is empty or not set; set it",
        ),
        (
            {"token": {"file": "gone"}},
            f"http.token: {tmp_path / 'gone'}: cannot be read (No such file or directory); create it",
        ),
        ({"open_reading": False}, "http: open_reading: false needs a token"),
    ):
        [problem] = problems(tmp_path, minimal(http=http))
        assert problem.startswith(says)
        assert "s3cret" not in problem


def test_all_problems_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        {
            "fleet": {"engine": {"num_gpu_block": 100, "max_num_seqs": 0}, "router": "random"},
            "sources": [{"type": "trace_file"}, {"type": "kafak", "path": "x"}],
            "http": {"port": 70000},
            "forecsat": {},
            "mirror": {"late_seconds": "soon"},
        },
    )
    text = "\n".join(found)
    for where in (
        "fleet.engine.num_gpu_blocks: missing",
        "fleet.engine.num_gpu_block: unknown setting; did you mean num_gpu_blocks?",
        "fleet.engine.max_num_seqs: is 0",
        "fleet.router: is 'random'",
        "sources.0.path: missing",
        "sources.1.type: is 'kafak'; did you mean kafka?",
        "http.port: is 70000",
        "forecsat: unknown setting; did you mean forecast?",
        "mirror.late_seconds: is 'soon'",
    ):
        assert where in text
    assert len(found) == 9, text


@pytest.mark.parametrize(
    ("section", "value", "expected"),
    [
        ("sources", [], "sources: "),
        ("sources", [{"type": "trace_file", "path": "x", "format": "moncake"}], "did you mean mooncake?"),
        ("sources", [{"type": "trace_file", "path": "x", "folow": True}], "did you mean follow?"),
        ("sources", [{"type": "trace_file", "path": "gone/x"}], "gone does not exist; create it"),
        ("sources", [{"type": "trace_file", "path": "x", "follow": False}], "x does not exist; correct it"),
        ("dead_letters", "gone/letters", "dead_letters: the directory"),
        ("log_level", "loud", "log_level: is 'loud'"),
        ("pool", "", "pool: is ''"),
        ("forecast", {"horizon_seconds": [60]}, "did you mean horizons_seconds?"),
        (
            "forecast",
            {"policies": [{"name": "a", "overrides": {"num_seqs": 1}}, {"name": "today"}]},
            "policies.0 (a): ",
        ),
        ("forecast", {"slos": [{"name": "a", "metric": "ttft", "threshold": 1}]}, "forecast.slos.0.metric: is 'ttft'"),
        ("forecast", {"slos": [{"name": "a", "metrics": "ttft"}]}, "did you mean metric?"),
        ("fleet", None, "fleet: "),
        ("mirror", {"calibrate_after_requests": 3}, "mirror.calibrate_after_requests: is 3"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, section: str, value: Any, expected: str) -> None:
    assert expected in "\n".join(problems(tmp_path, minimal(**{section: value})))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected a mapping"),
        ("- a\n", "expected a mapping"),
        ("pool: [\n", "not YAML"),
        ("pool: a\npool: b\n", "pool is given twice"),
        ("a: !!python/object:os.system {}\n", "not YAML"),
    ],
)
def test_a_file_that_is_no_settings_file(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        read_settings(write(tmp_path, text))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_settings(tmp_path / "gone.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        read_settings(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        read_settings(tmp_path / "binary")


def test_a_live_pool_does_not_know_the_future(tmp_path: Path) -> None:
    """Belady's policy is for scenarios: refused for the pool, let through as a policy of the forecast."""
    refused = minimal()
    refused["fleet"]["engine"]["eviction"] = "belady"
    (problem,) = problems(tmp_path, refused)
    assert problem.startswith("fleet")
    assert "engine.eviction: belady needs to know future" in problem
    policies = [{"name": "today"}, {"name": "bound", "overrides": {"eviction": "belady"}}]
    assert len(read(tmp_path, minimal(forecast={"policies": policies})).forecast.policies) == 2


def kafka(**more: Any) -> dict[str, Any]:
    return {"type": "kafka", "brokers": ["localhost:9092"], "topics": ["requests"], **more}


def test_a_kafka_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_PASSWORD", "hunter2")
    (tmp_path / "ca.pem").touch()
    sasl = {"mechanism": "SCRAM-SHA-512", "username": "twin", "password": {"env": "KAFKA_PASSWORD"}}
    text = yaml.safe_dump(minimal(sources=[kafka(tls={"ca": "ca.pem"}, sasl=sasl)]))
    settings = read(tmp_path, text.replace("topics:", "start: 2026-01-31T08:00:00+01:00\n  topics:"))
    (source,) = settings.sources
    assert isinstance(source, KafkaSettings)
    assert source.tls is not None
    assert source.tls.ca == tmp_path / "ca.pem"
    assert source.start == 1769842800.0
    assert "hunter2" not in repr(settings)


def test_all_that_is_wrong_with_a_kafka_source(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        minimal(
            sources=[
                kafka(brokers=["localhost"], start="yesterday", topic="requests", topics=["a b"], tls={"cafile": "x"}),
                {"path": "x"},
                kafka(dead_letter_topic="requests"),
                kafka(sasl={"mechanism": "GSSAPI", "username": "twin", "password": "hunter2"}),
                kafka(sasl={"mechanism": "PLAIN", "username": "twin", "password": {}}),
            ]
        ),
    )
    text = "\n".join(found)
    for where in (
        "sources.0.brokers.0: is 'localhost'; expected host:port",
        "sources.0.start: is 'yesterday'; expected earliest, latest, or a time with its zone",
        "sources.0.topic: unknown setting; did you mean topics?",
        "sources.0.topics.0: is 'a b'",
        "sources.0.tls.cafile: unknown setting; did you mean ca?",
        "sources.1.type: missing; add it, one of trace_file, kafka",
        "sources.2: dead_letter_topic is one of topics",
        "sources.3.sasl.mechanism: is 'GSSAPI'",
        "sources.3.sasl.password: expected {env: NAME} or {file: PATH}, never the secret itself",
        "sources.4.sasl.password: give either env",
    ):
        assert where in text
    assert len(found) == 10, text
    assert "hunter2" not in text


def test_what_a_kafka_source_misses_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAFKA_PASSWORD", raising=False)
    sasl = {"mechanism": "PLAIN", "username": "twin", "password": {"env": "KAFKA_PASSWORD"}}
    tls = {"ca": "gone.pem", "key_password": {"file": "gone"}}
    assert sorted(problems(tmp_path, minimal(sources=[kafka(tls=tls, sasl=sasl)]))) == [
        "sources.0.sasl.password: the environment variable KAFKA_PASSWORD is empty or not set; set it",
        f"sources.0.tls.ca: there is no file {tmp_path}/gone.pem; create it or correct the path",
        f"sources.0.tls.key_password: {tmp_path}/gone: cannot be read (No such file or directory); "
        "create it or correct the path",
    ]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="/proc is a directory that nobody can write to")
@pytest.mark.parametrize("place", ["checkpoints", "dead_letters"])
def test_a_directory_that_cannot_be_written_is_one_line(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = {"checkpoints": "{directory: /proc}", "dead_letters": "/proc/letters.jsonl"}[place]
    path = tmp_path / "twin.yaml"
    fleet = "fleet: {engine: {num_gpu_blocks: 100}}"
    path.write_text(f"{fleet}\nsources: [{{type: trace_file, path: a.jsonl}}]\n{place}: {value}\n")
    for words in (["run", "--check"], ["run"]):
        assert main([*words, "--config", str(path)]) == 1
        said = capsys.readouterr().err
        assert "the directory /proc cannot be written to by user" in said
        assert f"{path}: {place}" in said
        assert "Traceback" not in said


def test_a_cache_that_cannot_be_written_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "twin.yaml"
    path.write_text("fleet: {engine: {num_gpu_blocks: 100}}\nsources: [{type: trace_file, path: a.jsonl}]\n")
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/proc/kernels")
    assert main(["run", "--check", "--config", str(path)]) == 0
    assert "/proc/kernels, cannot be written" in capsys.readouterr().out
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kernels"))
    assert main(["run", "--check", "--config", str(path)]) == 0
    assert "warning" not in capsys.readouterr().out
