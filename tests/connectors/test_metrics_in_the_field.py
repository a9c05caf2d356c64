"""Metrics as fleets have them: renamed, relabelled, behind gateways, in pods of two engines, from old exporters."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import urllib3
from hypothesis import given
from hypothesis import strategies as st

from connectors.prometheus.engine_config import from_cache_config, from_server_info
from connectors.prometheus.engines import engine_samples
from connectors.prometheus.gpus import gpu_samples
from connectors.prometheus.http import Access, FetchError, HttpClient
from connectors.prometheus.names import canonical, place_of
from connectors.prometheus.readings import parse_exposition
from connectors.prometheus.scrape import EngineTarget, VllmMetricsSource
from connectors.prometheus.servers import Servers
from connectors.prometheus.source import PrometheusSource, Selection
from connectors.secret import SecretPlace
from fake_engines import engine_page, serve_page
from kavier_twin.telemetry import EngineSample, GpuSample, TelemetryRecord
from prometheus_server import Pages, RealPrometheus, RealVictoriaMetrics
from waiting import until, wait_until

Page = tuple[int, str, bytes]
RAY = {"Component": "core_worker", "SessionName": "session_1", "WorkerId": "w1"}


@pytest.fixture
def closing() -> Iterator[list[Any]]:
    """What a test opened."""
    opened: list[Any] = []
    yield opened
    for one in opened:
        one.close()


def scraped(closing: list[Any], page: str, *pods: str, count: int = 1, **settings: Any) -> list[EngineSample]:
    """The first samples of a page that one server, or one in each of the pods, shows."""
    servers = [serve_page(page) for _ in pods or ("",)]
    targets = [EngineTarget(f"{s.url}/metrics", pod) for s, pod in zip(servers, pods or ("",), strict=True)]
    source = VllmMetricsSource(targets, Access(), interval_seconds=0.05, **settings)
    closing += [source, *servers]
    found: dict[tuple[str, str], EngineSample] = {}

    def all_there() -> bool:
        found.update({(s.pod, s.engine): s for s in source.poll(100) if isinstance(s, EngineSample)})
        return len(found) >= count

    until(all_there, f"{count} engines; {source.trouble}", patience_seconds=20.0)
    return [found[key] for key in sorted(found)]


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "totals", "metric_prefix"),
    [
        ("vllm:", ("_total",), ""),
        ("vllm_", ("_total",), ""),
        ("ray_vllm_", ("", "_total"), ""),  # Ray's agent writes counters in both ways
        ("ray_vllm_", ("",), ""),
        ("kserve_vllm:", ("_total",), ""),
        ("", ("_total",), ""),  # NVIDIA NIM
        ("nim_", ("_total",), "nim_"),
        ("inference.engine.", ("",), "inference.engine."),
    ],
)
def test_every_spelling_is_the_same_engine(prefix: str, totals: tuple[str, ...], metric_prefix: str) -> None:
    page = engine_page(prefix="vllm:")
    expected = _samples(page)
    renamed = engine_page(prefix=prefix.replace(".", "_"), totals=totals)
    readings = parse_exposition(renamed)
    if "." in prefix:  # as OpenTelemetry writes without translation, which the text format of old cannot
        readings = [r._replace(name=r.name.replace(prefix.replace(".", "_"), prefix)) for r in readings]
    found = engine_samples(
        readings, pytest.fail, time_seconds=5.0, pool="p", namespace="", pod="a", prefix=metric_prefix
    )
    assert found == expected
    assert (found[0].prompt_tokens, found[0].requests_finished_by_reason) == (8_000, {"stop": 8})


def test_dots_and_units_that_opentelemetry_puts_in_names() -> None:
    assert canonical("vllm.num_requests_running") == "vllm:num_requests_running"
    place = place_of("vllm_kv_cache_usage_perc_ratio")
    assert place is not None
    assert place.field == "kv_cache_usage_ratio"
    assert place_of("vllm_kv_cache_usage_perc_percent") is not None
    assert place_of("vllm.request_success") is not None
    assert place_of("vllm:iteration_tokens_bucket") is not None


def test_names_without_a_prefix_are_an_engines_only_beside_its_running_requests() -> None:
    """`prompt_tokens_total` is a name that anybody may choose."""
    assert _samples('prompt_tokens_total{app="billing"} 9\nrequest_success_total{app="billing"} 4\n') == []
    (sample,) = _samples('num_requests_running{model_name="m"} 3\nprompt_tokens_total{model_name="m"} 9\n')
    assert (sample.requests_running, sample.prompt_tokens) == (3, 9)


def test_what_is_read_of_later_metrics() -> None:
    page = engine_page(
        extra=(
            'vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 10',
            'vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 30',
            'vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 16',
            'vllm:kv_offload_load_bytes_total{engine="0",model_name="m"} 4e9',
            'vllm:kv_offload_load_time_total{engine="0",model_name="m"} 0.5',
            'vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="awake"} 0',
            'vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="weights_offloaded"} 1',
            'vllm:kv_block_lifetime_seconds_bucket{engine="0",model_name="m",le="+Inf"} 4',
            'vllm:kv_block_lifetime_seconds_sum{engine="0",model_name="m"} 80',
            'vllm:kv_block_lifetime_seconds_count{engine="0",model_name="m"} 4',
        )
    )
    (sample,) = _samples(page)
    assert (sample.spec_decode_drafts, sample.spec_decode_draft_tokens, sample.spec_decode_accepted_tokens) == (
        10,
        30,
        16,
    )
    assert (sample.kv_offload_load_bytes, sample.kv_offload_load_seconds) == (4e9, 0.5)
    assert sample.sleep_state == {"awake": 0, "weights_offloaded": 1}
    assert sample.kv_block_lifetime_seconds is not None
    assert sample.kv_block_lifetime_seconds.sum == 80


def _samples(page: str) -> list[EngineSample]:
    return engine_samples(parse_exposition(page), pytest.fail, time_seconds=5.0, pool="p", namespace="", pod="a")


# --- which server ----------------------------------------------------------------------------------------------------


def test_two_servers_in_one_pod(closing: list[Any]) -> None:
    first, second = scraped(closing, engine_page(), "vllm-0", "vllm-0", count=2)
    assert (first.pod, first.engine) == (second.pod, "0")
    assert re.fullmatch(r"0@\d+", second.engine)


def test_two_models_on_one_page_are_two_engines_and_one_can_be_chosen(closing: list[Any]) -> None:
    page = engine_page({"model_name": "a"}) + engine_page({"model_name": "b"})
    found = scraped(closing, page, "vllm-0", count=2)
    assert [(s.engine, s.model, s.requests_running) for s in found] == [("0", "a", 5), ("0@b", "b", 5)]
    server = serve_page(page)
    source = VllmMetricsSource([EngineTarget(f"{server.url}/metrics", "v", model="b")], Access(), interval_seconds=0.05)
    closing += [source, server]
    chosen: list[TelemetryRecord] = []
    wait_until(lambda: chosen.extend(source.poll(10)) or len(chosen) >= 2)
    assert {(s.engine, s.model) for s in chosen if isinstance(s, EngineSample)} == {("0", "b")}


def test_rays_page_has_several_replicas(closing: list[Any]) -> None:
    pages = [engine_page({**RAY, "ReplicaId": r}, prefix="ray_vllm_", totals=("", "_total")) for r in ("a1", "b2")]
    found = scraped(closing, "".join(pages), count=2)
    assert [s.requests_running for s in found] == [5, 5]
    assert len({(s.pod, s.engine) for s in found}) == 2


def test_a_pod_that_is_made_anew_keeps_its_name_and_a_neighbour_gets_its_own() -> None:
    servers = Servers()
    labels = {"namespace": "n", "pod": "vllm-0", "instance": "10.0.0.1:8000"}
    again, beside = {**labels, "instance": "10.0.0.9:8000"}, {**labels, "instance": "10.0.0.9:8001"}
    servers.learn(("vllm:num_requests_running", one) for one in (labels, again, beside))
    assert servers.named(servers.server_of(labels), 0.0) == ("n", "vllm-0", "")
    assert servers.named(servers.server_of(again), 10.0) == ("n", "vllm-0", "")
    assert servers.named(servers.server_of(beside), 10.0) == ("n", "vllm-0", "8001")
    kept = Servers()
    kept.learn([("vllm:num_requests_running", beside)])
    kept.restore(json.loads(json.dumps(servers.save())))
    assert kept.named(kept.server_of(beside), 20.0) == ("n", "vllm-0", "8001")
    # Its port alone is another one from now on.
    assert servers.named(servers.server_of({**labels, "instance": "10.0.0.9:9000"}), 500.0) == ("n", "vllm-0", "")


@pytest.mark.parametrize(
    ("labels", "pod"),
    [
        ({"instance": "prom:9090", "pod": "prometheus-0", "exported_instance": "a:1"}, "a:1"),
        (
            {"instance": "prom:9090", "pod": "prometheus-0", "exported_pod": "vllm-0", "exported_instance": "a:1"},
            "vllm-0",
        ),
        ({"instance": "p:9090", "exported_instance": "q:9090", "exported_exported_instance": "a:1"}, "a:1"),
        ({"instance": "a:1", "k8s_pod_name": "vllm-0"}, "vllm-0"),
        ({"instance": "collector:8889", "service_instance_id": "a:1"}, "a:1"),
    ],
)
def test_the_collector_nearest_to_the_engine_names_it(labels: dict[str, str], pod: str) -> None:
    servers = Servers()
    servers.learn([("vllm:num_requests_running", labels)])
    assert servers.named(servers.server_of(labels), 0.0).pod == pod


@given(
    st.dictionaries(
        st.sampled_from(["instance", "pod", "exported_instance", "namespace", "ReplicaId", "cluster", "zone"]),
        st.sampled_from(["a:1", "a:2", "b"]),
    ),
    st.dictionaries(
        st.sampled_from(["job", "prometheus_replica", "le", "reason", "engine"]), st.text("xy", min_size=1)
    ),
)
def test_labels_of_the_scrape_and_of_vllm_tell_no_servers_apart(labels: dict[str, str], more: dict[str, str]) -> None:
    servers = Servers()
    servers.learn([("vllm:num_requests_running", {**labels, "job": "j", "prometheus_replica": "1"})])
    assert servers.server_of({**labels, **more}) == servers.server_of(labels)


def test_servers_whose_gauges_are_left_out_are_told_apart_all_the_same() -> None:
    """A collector may pass on counters and histograms alone."""
    servers = Servers()
    one, other = {"instance": "a:1", "model_name": "m"}, {"instance": "a:2", "model_name": "m"}
    series = [
        (name, {**labels, **more})
        for labels in (one, other)
        for name, more in (
            ("vllm:generation_tokens_total", {"engine": "0"}),
            ("vllm:request_success_total", {"engine": "0", "finished_reason": "stop", "new_label": "x"}),
            ("vllm:e2e_request_latency_seconds_bucket", {"engine": "0", "le": "1.0"}),
        )
    ]
    servers.learn(series)
    assert {servers.server_of(labels) for _, labels in series} == {(("instance", "a:1"),), (("instance", "a:2"),)}


# --- real Prometheus servers -----------------------------------------------------------------------------------------

OLD_DCGM = (
    'DCGM_FI_DEV_POWER_USAGE{gpu="0",UUID="GPU-b",modelName="A100",container_name="vllm",pod_name="gp",'
    'pod_namespace="llm"} 280\n'
)
AMD = (
    'gpu_package_power{gpu_id="0",gpu_uuid="72ff",hostname="n",card_model="MI300X",pod="gp",namespace="llm"} 530\n'
    'gpu_average_package_power{gpu_id="0",gpu_uuid="72ff",hostname="n",pod="gp",namespace="llm"} 0\n'
    'gpu_gfx_activity{gpu_id="0",gpu_uuid="72ff",hostname="n",card_model="MI300X",pod="gp",namespace="llm"} 90\n'
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus that scrapes all kinds of fleets, each a job of its own."""
    plain = [serve_page(engine_page()) for _ in range(2)]
    ray = serve_page(
        "".join(engine_page({**RAY, "ReplicaId": one}, prefix="ray_vllm_", totals=("", "_total")) for one in ("a", "b"))
    )
    others = {
        "nim": serve_page(engine_page({"model_name": "meta/llama"}, prefix="nim_")),
        "dcgm": serve_page(OLD_DCGM),
        "amd": serve_page(AMD),
    }
    addresses = [page.address for page in plain]
    pod = {"namespace": "llm", "pod": "gp"}
    server = RealPrometheus(
        tmp_path_factory.mktemp("fleet"),
        [
            _job("bare", addresses),
            _job("samepod", addresses, namespace="llm", pod="vllm-0"),
            _job("ray", [ray.address]),
            _job("gp", addresses[:1], **pod),
            *(_job(name, [page.address]) | {"honor_labels": True} for name, page in others.items()),
        ],
    )
    server.start()
    yield server.url
    server.stop()
    for page in (*plain, ray, *others.values()):
        page.close()


def _job(name: str, addresses: list[str], **labels: str) -> dict[str, Any]:
    targets = [{"targets": addresses, "labels": labels}]
    return {"job_name": name, "scrape_interval": "1s", "scrape_timeout": "1s", "static_configs": targets}


def engines_of(closing: list[Any], url: str, count: int, access: Access | None = None, **chosen: Any) -> set[Any]:
    """Pod and engine of all samples that come in the time of three scrapes and more."""
    source = PrometheusSource(
        url, access or Access(), selection=Selection(**chosen), interval_seconds=0.3, warm_up_seconds=5.0
    )
    closing.append(source)
    found: list[TelemetryRecord] = []

    def enough() -> bool:
        found.extend(source.poll(1_000))
        return len({s.time_seconds for s in found if isinstance(s, EngineSample)}) >= 3 * count

    until(enough, f"{count} engines; {source.trouble}", patience_seconds=40.0)
    return {(s.pod, s.engine, s.requests_running) for s in found if isinstance(s, EngineSample)}


@pytest.mark.real
def test_each_kind_of_fleet(fleet: str, closing: list[Any]) -> None:
    assert len(engines_of(closing, fleet, 2, engines={"job": "bare"}, gpus=None)) == 2
    same = engines_of(closing, fleet, 2, engines={"job": "samepod"}, gpus=None)
    assert {pod for pod, _, _ in same} == {"vllm-0"}
    assert sorted("@" in engine for _, engine, _ in same) == [False, True]
    # Both replicas are on one page: their scrapes are at the same time.
    assert engines_of(closing, fleet, 1, engines={"job": "ray"}, gpus=None) == {("a", "0", 5), ("b", "0", 5)}
    nim = engines_of(closing, fleet, 1, engines={"job": "nim"}, gpus=None, metric_prefix="nim_")
    assert {running for _, _, running in nim} == {5}


@pytest.mark.real
def test_a_federating_server(fleet: str, tmp_path: Path, closing: list[Any]) -> None:
    """It has the engines' addresses in `exported_instance`; `instance` is the federated server's."""
    outer = RealPrometheus(
        tmp_path,
        [
            _job("federate", [fleet.removeprefix("http://")], pod="prometheus-0")
            | {"metrics_path": "/federate", "params": {"match[]": ['{job="bare"}']}}
        ],
    )
    outer.start()
    try:
        found = engines_of(closing, outer.url, 2, engines={"job": "federate"}, gpus=None)
        assert len({pod for pod, _, _ in found}) == 2
        assert all(pod.startswith("127.0.0.1:") for pod, _, _ in found)
    finally:
        outer.stop()


@pytest.mark.real
def test_what_selects_nothing_says_so_and_lists_what_is_there(fleet: str, closing: list[Any]) -> None:
    def trouble(**chosen: Any) -> str:
        source = PrometheusSource(fleet, Access(), selection=Selection(**chosen), interval_seconds=0.3)
        closing.append(source)
        source.poll(1)
        return str(until(lambda: source.trouble, "the trouble is told", patience_seconds=20.0))

    engines_of(closing, fleet, 2, engines={"job": "bare"}, gpus=None)  # all was scraped
    wrong = trouble(engines={"job": "vllm-prod"})
    assert wrong.startswith('no-engine: no series of vLLM has job="vllm-prod"; there are vLLM series with job bare, gp')
    assert "pod gp, vllm-0" in wrong
    assert wrong.endswith("set engines to what yours have")
    assert "none has a label team" in trouble(engines={"team": "chat"})
    unread = trouble(engines={"job": "dcgm"}, metric_prefix="x_")
    assert "job bare" in unread


@pytest.mark.real
def test_a_server_without_engines_says_which_metrics_look_like_theirs(tmp_path: Path, closing: list[Any]) -> None:
    page = serve_page(engine_page(prefix="nim_"))
    server = RealPrometheus(tmp_path, [_job("nim", [page.address])])
    server.start()
    try:
        source = PrometheusSource(server.url, Access(), interval_seconds=0.3)
        closing += [source, page]
        source.poll(1)
        wait_until(lambda: "nim_" in source.trouble, 20.0)
        assert 'there is nim_kv_cache_usage_perc: set metric_prefix: "nim_" if that is an engine\'s' in source.trouble
    finally:
        server.stop()


@pytest.mark.real
@pytest.mark.parametrize(("job", "watts"), [("dcgm", 280.0), ("amd", 530.0)])
def test_gpus_of_old_exporters_and_of_amd(fleet: str, closing: list[Any], job: str, watts: float) -> None:
    selection = Selection({"job": "gp"}, {"job": job})
    source = PrometheusSource(fleet, Access(), selection=selection, interval_seconds=0.3, warm_up_seconds=5.0)
    closing.append(source)
    found: list[GpuSample] = []
    wait_until(lambda: found.extend(r for r in source.poll(1_000) if isinstance(r, GpuSample)) or len(found) > 1, 20.0)
    assert {(gpu.namespace, gpu.pod, gpu.power_watts) for gpu in found} == {("llm", "gp", watts)}
    assert source.power_notes() == []


@pytest.mark.real
def test_gpus_that_are_not_found_are_told_of(fleet: str, closing: list[Any]) -> None:
    def note(engines: Mapping[str, str], gpus: Mapping[str, str]) -> str:
        source = PrometheusSource(fleet, Access(), selection=Selection(engines, gpus), interval_seconds=0.3)
        closing.append(source)
        source.poll(1)
        return str(until(source.power_notes, "the note", patience_seconds=20.0)[0])

    assert "they name gp; the engines' pods are vllm-0" in note({"job": "samepod"}, {"job": "dcgm"})
    assert "no GPU series of NVIDIA's dcgm-exporter or AMD's" in note({"job": "samepod"}, {"job": "nothing"})


@pytest.mark.real
def test_victoriametrics(tmp_path: Path, closing: list[Any]) -> None:
    """It answers `time()` with a vector whose value lags behind."""
    pages = [serve_page(engine_page()) for _ in range(2)]
    server = RealVictoriaMetrics(tmp_path, [_job("vllm", [page.address for page in pages])])
    server.start()
    closing += pages
    try:
        assert len(engines_of(closing, server.url, 2, engines={"job": "vllm"}, gpus=None)) == 2
        assert abs(closing[-1].clock_skew_seconds) < 5.0
    finally:
        server.stop()


def _gateway(fleet: str, guard: Callable[[str, Mapping[str, str], str], Page | None]) -> Any:
    """A server that asks `guard` (path, headers, query) before it passes a query on."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0))).decode()
            query = parse_qs(body).get("query", [""])[0]
            answer = guard(self.path, {name.lower(): value for name, value in self.headers.items()}, query)
            if answer is None:
                path = re.sub(r"^/[^/]*(?=/api/)", "", self.path).partition("?")[0]
                kind = {"content-type": "application/x-www-form-urlencoded"}
                passed = urllib3.request("POST", fleet + path, body=body, headers=kind, retries=False)
                answer = (passed.status, "application/json", passed.data)
            self.send_response(answer[0])
            self.send_header("content-length", str(len(answer[2])))
            self.end_headers()
            self.wfile.write(answer[2])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    server.close = lambda: (server.shutdown(), server.server_close())  # type: ignore[attr-defined]
    return server


@pytest.mark.real
def test_tenants(fleet: str, closing: list[Any], tmp_path: Path) -> None:
    """Mimir wants a header, the proxy of OpenShift a parameter of the query."""

    def guard(path: str, headers: Mapping[str, str], _: str) -> Page | None:
        if path.startswith("/tenant") and headers.get("x-scope-orgid") != "team-a":
            return 401, "text/plain", b"no org id\n"
        if path.startswith("/ns") and not path.endswith("?namespace=llm"):
            return 400, "text/plain", b'Bad Request. The "namespace" query parameter must be provided.\n'
        return None

    gateway = _gateway(fleet, guard)
    closing.append(gateway)
    chosen: dict[str, Any] = {"engines": {"job": "bare"}, "gpus": None}
    secret = tmp_path / "tenant"
    secret.write_text("team-a\n")
    for value in ("team-a", SecretPlace(file=secret)):
        access = Access(headers={"X-Scope-OrgID": value})
        assert len(engines_of(closing, f"{gateway.url}/tenant", 2, access, **chosen)) == 2
    assert len(engines_of(closing, f"{gateway.url}/ns?namespace=llm", 2, **chosen)) == 2
    for path, hint in (("/tenant", "headers: {X-Scope-OrgID: team-a}"), ("/ns", "?namespace=llm")):
        source = PrometheusSource(gateway.url + path, Access())
        closing.append(source)
        source.poll(1)
        wait_until(lambda source=source, hint=hint: source.trouble.endswith(hint) or hint in source.trouble, 10.0)


@pytest.mark.real
@pytest.mark.parametrize(
    ("status", "error"),
    [
        (422, "query processing would load too many samples into memory in query execution"),
        (400, "the query time range exceeds the limit (query length: 5m15s, limit: 1m40s)"),
    ],
)
def test_a_limit_on_what_a_query_may_read(fleet: str, closing: list[Any], status: int, error: str) -> None:
    """Ranges above 40 s are refused; a warm-up of ten minutes is read all the same."""
    longest = [0.0]

    def guard(_: str, __: Mapping[str, str], query: str) -> Page | None:
        seconds = float(found[1]) / 1e3 if (found := re.search(r"\[(\d+)ms\]", query)) else 0.0
        if seconds > 40.0:
            return status, "application/json", json.dumps({"status": "error", "error": error}).encode()
        longest[0] = max(longest[0], seconds)
        return None

    gateway = _gateway(fleet, guard)
    selection = Selection({"job": "bare"}, None)
    source = PrometheusSource(gateway.url, Access(), selection=selection, interval_seconds=0.3, warm_up_seconds=600.0)
    closing += [gateway, source]
    found: set[str] = set()
    wait_until(
        lambda: found.update(s.pod for s in source.poll(1_000) if isinstance(s, EngineSample)) or len(found) > 1, 30
    )
    assert 20.0 < longest[0] <= 40.0
    assert source.trouble == ""


def test_a_limit_that_nothing_keeps_within_says_what_to_do(closing: list[Any]) -> None:
    def page(path: str, _: object) -> Page:
        return 422, "application/json", b'{"status":"error","error":"too many samples"}'

    server = Pages(page)
    source = PrometheusSource(server.url, Access(), interval_seconds=0.05)
    closing += [source, server]
    source._api.now = lambda: 1_000.0  # type: ignore[method-assign]
    source.poll(1)
    wait_until(lambda: "raise the server's limit, or select fewer series by engines" in source.trouble, 20.0)


# --- HTTP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_within_the_server_are_followed(closing: list[Any], status: int) -> None:
    page = engine_page().encode()
    asked: list[str] = []

    def answer(path: str, headers: Mapping[str, str]) -> Page:
        asked.append(path)
        assert headers.get("X-Key") == "k"
        return (status, "text/plain", b"/metrics/") if path == "/metrics" else (200, "text/plain", page)

    server = Pages(answer)
    closing.append(server)
    assert HttpClient(Access(headers={"X-Key": "k"})).get(f"{server.url}/metrics") == page
    assert asked == ["/metrics", "/metrics/"]


def test_redirects_elsewhere_are_not_followed_but_named(closing: list[Any]) -> None:
    asked: list[str] = []
    other = Pages(lambda path, _: asked.append(path) or (200, "text/plain", b"stolen"))
    server = Pages(lambda *_: (302, "text/plain", f"{other.url}/login?token=abc".encode()))
    closing += [server, other]
    with pytest.raises(FetchError, match=rf"^http-302: .* redirects to {other.url}/login; set this") as e:
        HttpClient(Access()).get(f"{server.url}/metrics")
    assert "abc" not in str(e.value)
    assert asked == []
    loop = Pages(lambda *_: (307, "text/plain", b"/metrics"))
    closing.append(loop)
    with pytest.raises(FetchError, match=r"^too-many-redirects"):
        HttpClient(Access()).get(f"{loop.url}/metrics")


def test_a_secret_that_no_header_can_hold_is_not_shown(closing: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "hush\nhush")
    server = Pages(lambda *_: (200, "text/plain", b""))
    closing.append(server)
    for access in (Access(headers={"X-Key": SecretPlace(env="KEY")}), Access(bearer_token=SecretPlace(env="KEY"))):
        with pytest.raises(FetchError, match="holds a line break") as caught:
            HttpClient(access).get(server.url)
        assert "hush" not in str(caught.value)


def test_the_address_of_a_server_is_enough(closing: list[Any]) -> None:
    server = serve_page(engine_page(), version='{"version": "0.32.0"}')
    source = VllmMetricsSource([EngineTarget(server.url)], Access(), interval_seconds=0.05)
    closing += [source, server]
    found: list[Any] = []
    wait_until(lambda: found.extend(source.poll(10)) or found)
    assert found[0].vllm_version == "0.32.0"
    assert EngineTarget("http://nim:8000/v1/metrics").base == "http://nim:8000"
    assert EngineTarget("http://a:8000/vllm/metrics/").base == "http://a:8000/vllm"


def test_a_page_of_something_else_says_what_it_has(closing: list[Any]) -> None:
    def trouble(page: str) -> str:
        server = serve_page(page)
        source = VllmMetricsSource([EngineTarget(server.url, "p")], Access(), interval_seconds=0.05)
        closing.extend([source, server])
        source.poll(1)
        wait_until(lambda: source.trouble)
        return source.trouble

    assert "has no metric of vLLM but python_info; is vLLM run with --disable-log-stats?" in trouble("python_info 1\n")
    assert 'set metric_prefix: "nim_"' in trouble(engine_page(prefix="nim_"))


# --- GPUs ------------------------------------------------------------------------------------------------------------


def gpus(page: str) -> list[GpuSample]:
    return gpu_samples(parse_exposition(page), pytest.fail, time_seconds=5.0, pool="p")


def test_the_forms_in_which_exporters_name_the_pod() -> None:
    operator = 'pod="dcgm-x",namespace="gpu-operator"'
    for labels in (
        'pod="v",namespace="n"',
        'pod_name="v",pod_namespace="n"',
        f'{operator},pod_name="v",pod_namespace="n"',
        f'{operator},exported_pod="v",exported_namespace="n"',
        f'{operator},exported_pod_name="v",exported_pod_namespace="n"',
    ):
        (sample,) = gpus(f'DCGM_FI_DEV_POWER_USAGE{{UUID="g",{labels}}} 280\n')
        assert (sample.namespace, sample.pod) == ("n", "v"), labels


def test_dcgm_exporter_1_and_amds_units_and_blanks() -> None:
    (old,) = gpus('dcgm_power_usage{gpu="0",uuid="g",pod_name="v",pod_namespace="n"} 250\n')
    assert (old.gpu, old.pod, old.power_watts) == ("g", "v", 250)
    page = """
amd_gpu_average_package_power{gpu_id="0",serial_number="s",hostname="h",card_model="MI300X"} 0
amd_gpu_package_power{gpu_id="0",serial_number="s",hostname="h",card_model="MI300X"} 65535
amd_gpu_power_usage{gpu_id="0",serial_number="s",hostname="h",card_model="MI300X"} 520
amd_gpu_energy_consumed{gpu_id="0",serial_number="s",hostname="h",card_model="MI300X"} 7000000
amd_gpu_gfx_activity{gpu_id="0",serial_number="s",hostname="h",card_model="MI300X"} 90
amd_gpu_used_vram{gpu_id="0",serial_number="s",hostname="h",card_model="MI300X"} 2
"""
    (amd,) = gpus(page)
    assert (amd.gpu, amd.host, amd.model, amd.mig_instance) == ("s", "h", "MI300X", "")
    assert (amd.power_watts, amd.energy_joules, amd.utilization_ratio) == (520, 7, 0.9)
    assert amd.memory_used_bytes == 2**21


# --- what engines say of their caches --------------------------------------------------------------------------------


def config(**labels: str) -> dict[str, str]:
    return {"engine": "0", "block_size": "16", "num_gpu_blocks": "400", "enable_prefix_caching": "True", **labels}


@pytest.mark.parametrize(
    ("labels", "capacity"),
    [
        (config(kv_cache_size_tokens="6400", kv_cache_max_concurrency="1.56"), (16, 400)),
        # Requests of 4,090 tokens take 256 blocks, of which the last is not full.
        (config(kv_cache_size_tokens="6390", kv_cache_max_concurrency="1.56"), (16, 400)),
        # Requests of 40 tokens take three blocks: ten of 133 requests more than whole blocks would have.
        (config(kv_cache_size_tokens="5333", kv_cache_max_concurrency="133.33"), (16, 400)),
        (config(kv_cache_size_tokens="6400"), (16, 400)),
        (config(), (16, 400)),
        # Context parallelism over two GPUs: a block spans both.
        (config(kv_cache_size_tokens="12800", effective_attention_block_size="32"), (32, 400)),
    ],
)
def test_capacities_that_fit_together_are_taken_as_they_are(labels: dict[str, str], capacity: tuple[int, int]) -> None:
    found = from_cache_config([labels])["0"]
    assert ((found.block_size, found.num_gpu_blocks), found.capacity_note) == (capacity, "")


HYBRID = config(
    block_size="8",
    num_gpu_blocks="320",
    kv_cache_size_tokens="463459",
    kv_cache_max_concurrency="1.77",
    mamba_block_size="16",
)
# Requests of 8,192 tokens take 902 blocks of ten layers.
SLIDING = config(num_gpu_blocks="10888", kv_cache_size_tokens="98884", kv_cache_max_concurrency="12.07")


@pytest.mark.parametrize("labels", [HYBRID, SLIDING])
def test_the_capacity_of_a_model_with_several_kinds_of_layers_is_its_tokens(labels: dict[str, str]) -> None:
    tokens = int(labels["kv_cache_size_tokens"])
    for found in (from_cache_config([labels])["0"], from_server_info({"vllm_config": {"cache_config": labels}})):
        assert found.block_size is not None
        assert found.num_gpu_blocks is not None
        assert found.block_size * found.num_gpu_blocks == pytest.approx(tokens, rel=1e-3)
        assert f"num_gpu_blocks {labels['num_gpu_blocks']}" in found.capacity_note
        assert f"is not kv_cache_size_tokens {tokens}" in found.capacity_note


def test_data_parallel_ranks_of_a_hybrid_model() -> None:
    """The blocks are summed over the ranks, the tokens are not."""
    ranks = [{**HYBRID, "engine": rank, "num_gpu_blocks": "640"} for rank in ("0", "1")]
    for found in from_cache_config(ranks).values():
        assert found.block_size == 8
        assert found.num_gpu_blocks == 463_459 // 8


def test_a_hybrid_model_of_an_older_vllm_does_not_tell_its_capacity() -> None:
    found = from_cache_config([{k: v for k, v in HYBRID.items() if not k.startswith("kv_cache")}])["0"]
    assert found.num_gpu_blocks is None
    assert "set fleet.engine.num_gpu_blocks" in found.capacity_note


@given(st.integers(16, 200_000), st.sampled_from([1, 8, 16, 32, 128]), st.integers(64, 200_000))
def test_a_cache_of_equal_blocks_is_never_taken_for_another(blocks: int, size: int, longest: int) -> None:
    """As vLLM counts it, whatever the longest request."""
    concurrency = blocks / -(-longest // size)
    labels = config(
        block_size=str(size),
        num_gpu_blocks=str(blocks),
        kv_cache_size_tokens=str(int(concurrency * longest)),
        kv_cache_max_concurrency=str(concurrency),
    )
    found = from_cache_config([labels])["0"]
    assert (found.num_gpu_blocks, found.capacity_note) == (blocks, "")


def test_a_source_that_never_found_an_engine_looks_at_once(closing: list[Any]) -> None:
    """Within its first interval, and with few queries."""
    queries: list[str] = []
    began = time.time()

    class Direct:
        def post(self, _: str, fields: Mapping[str, str]) -> bytes:
            queries.append(fields["query"])
            scalar = {"resultType": "scalar", "result": [began, str(began)]}
            matrix = {"resultType": "matrix" if "ms]" in fields["query"] else "vector", "result": []}
            return json.dumps({"status": "success", "data": scalar if "time()" in fields["query"] else matrix}).encode()

        def close(self) -> None:
            pass

    source = PrometheusSource("http://unused", Access(), selection=Selection({"job": "x"}, None), interval_seconds=60.0)
    closing.append(source)
    source._api._http = Direct()  # type: ignore[assignment]
    source.poll(1)
    wait_until(lambda: source.trouble.startswith("no-engine: no vLLM series such as vllm:num_requests"))
    assert len(queries) <= 6
