"""From series to samples: names, labels and their traps."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from connectors.prometheus.engine_config import (
    TWIN,
    EngineConfig,
    EngineConfigs,
    from_cache_config,
    from_models,
    from_server_info,
)
from connectors.prometheus.engines import engine_samples
from connectors.prometheus.gpus import gpu_samples, of_pods
from connectors.prometheus.names import PLACES
from connectors.prometheus.readings import Reading, parse_exposition
from connectors.traces.recording import read_metrics
from kavier_twin.telemetry import EngineSample, GpuSample, Histogram

RECORDING = Path(__file__).parents[1] / "data" / "recordings" / "chat-400"


def engines(page: str | list[Reading], rejected: Counter[str] | None = None) -> list[EngineSample]:
    found = Counter[str]() if rejected is None else rejected
    readings = parse_exposition(page) if isinstance(page, str) else page
    return engine_samples(
        readings, lambda reason: found.update([reason]), time_seconds=5.0, pool="p", namespace="n", pod="vllm-0"
    )


def one(page: str | list[Reading]) -> EngineSample:
    (sample,) = engines(page)
    return sample


def gpus(page: str, rejected: Counter[str] | None = None) -> list[GpuSample]:
    found = Counter[str]() if rejected is None else rejected
    return gpu_samples(parse_exposition(page), lambda reason: found.update([reason]), time_seconds=5.0, pool="p")


# --- engines ---------------------------------------------------------------------------------------------------------


def test_a_real_servers_last_page() -> None:
    """Every field that vLLM 0.32 reports, against what the recording's requests and settings say."""
    requests = json.loads((RECORDING / "meta.json").read_text())["requests"] + 1  # a warm-up request
    sample = one(read_metrics(RECORDING)[-1][1])
    assert (sample.engine, sample.model, sample.pod, sample.namespace) == ("0", "tiny", "vllm-0", "n")
    assert (sample.requests_running, sample.requests_waiting, sample.kv_cache_usage_ratio) == (0, 0, 0)
    assert sample.requests_waiting_by_reason == {"capacity": 0, "deferred": 0}
    assert sample.requests_finished_by_reason["length"] == sum(sample.requests_finished_by_reason.values()) == requests
    assert sample.requests_rejected_by_reason == {"max_num_queued_reqs": 0, "max_num_queued_tokens": 0}
    assert sample.prompt_tokens == sample.prefix_cache_queries_tokens == 510_191
    assert sample.prompt_tokens_by_source["local_cache_hit"] == sample.prefix_cache_hits_tokens == 441_408
    assert sample.started_seconds == 1795389881.171482
    for name in ("ttft_seconds", "e2e_seconds", "queue_seconds", "prefill_seconds", "decode_seconds"):
        assert getattr(sample, name).count == requests
    assert sample.request_prompt_tokens is not None
    assert sample.request_generation_tokens is not None
    assert sample.inter_token_latency_seconds is not None
    assert sample.step_tokens is not None
    assert sample.request_prompt_tokens.sum == 510_191
    assert max(sample.request_prompt_tokens.buckets) == 2000  # to the largest below max_model_len, and no infinity
    assert sample.request_generation_tokens.sum == sample.generation_tokens == 28_614
    assert sample.inter_token_latency_seconds.count < 28_614 - requests + 1
    assert sample.step_tokens.count > 1_000


def test_every_field_of_the_table_exists() -> None:
    assert {place.field for place in PLACES.values()} <= EngineSample.model_fields.keys()


def test_each_data_parallel_rank_is_an_engine() -> None:
    page = """
vllm:num_requests_running{engine="0",model_name="m"} 3
vllm:num_requests_running{engine="1",model_name="m"} 4
vllm:num_requests_running{engine="10",model_name="m"} 5
vllm:admission_rejections_total{model_name="m",reason="max_num_queued_reqs"} 7
process_start_time_seconds 1000
"""
    samples = engines(page)
    assert [(sample.engine, sample.requests_running) for sample in samples] == [("0", 3), ("1", 4), ("10", 5)]
    # The process counts rejections once for all its engines: a sum over engines has them once.
    assert [sample.requests_rejected_by_reason for sample in samples] == [{"max_num_queued_reqs": 7}, {}, {}]
    assert {sample.started_seconds for sample in samples} == {1000}


def test_series_without_a_model_are_those_of_the_model_that_the_rank_serves() -> None:
    sample = one('vllm:num_requests_running{engine="0",model_name="m"} 3\nvllm:num_requests_waiting{engine="0"} 2\n')
    assert (sample.engine, sample.model, sample.requests_running, sample.requests_waiting) == ("0", "m", 3, 2)


def test_servers_without_the_engine_label_are_one_engine() -> None:
    sample = one('vllm:num_requests_running{model_name="m"} 3\nvllm:prompt_tokens_total{model_name="m"} 9\n')
    assert (sample.engine, sample.requests_running, sample.prompt_tokens) == ("", 3, 9)


def test_old_names_and_rays() -> None:
    old = """
vllm:gpu_cache_usage_perc{model_name="m"} 0.5
vllm:gpu_prefix_cache_hits_total{model_name="m"} 10
vllm:gpu_prefix_cache_queries_total{model_name="m"} 40
vllm:time_per_output_token_seconds_bucket{le="0.1",model_name="m"} 1
vllm:time_per_output_token_seconds_bucket{le="+Inf",model_name="m"} 2
vllm:time_per_output_token_seconds_sum{model_name="m"} 0.3
vllm:time_per_output_token_seconds_count{model_name="m"} 2
"""
    sample = one(old)
    assert sample.kv_cache_usage_ratio == 0.5
    assert (sample.prefix_cache_hits_tokens, sample.prefix_cache_queries_tokens) == (10, 40)
    assert sample.inter_token_latency_seconds == Histogram(buckets={0.1: 1}, sum=0.3, count=2)
    assert one(old.replace("vllm:", "vllm_")) == sample


@pytest.mark.parametrize("reverse", [False, True])
def test_of_an_old_and_a_new_name_the_new_counts(reverse: bool) -> None:
    """Servers that renamed a metric showed both for a while; that is one quantity and not two."""
    lines = ['vllm:gpu_cache_usage_perc{engine="0"} 0.2', 'vllm:kv_cache_usage_perc{engine="0"} 0.3']
    assert one("\n".join(reversed(lines) if reverse else lines) + "\n").kv_cache_usage_ratio == 0.3


def test_the_oldest_word_on_the_start_is_the_processs_own() -> None:
    page = 'vllm:prompt_tokens_created{engine="0"} 1010\nvllm:num_requests_running{engine="0"} 1\n'
    assert one(page).started_seconds == 1010
    assert one(page + "process_start_time_seconds 1000\n").started_seconds == 1000


def test_buckets_are_read() -> None:
    """An operator can choose them: --custom-histogram-buckets."""
    page = "".join(
        f'vllm:time_to_first_token_seconds_bucket{{engine="0",le="{le}"}} {count}\n'
        for le, count in (("0.123", 1), ("4.56", 3), ("+Inf", 4))
    )
    page += (
        'vllm:time_to_first_token_seconds_sum{engine="0"} 9.5\nvllm:time_to_first_token_seconds_count{engine="0"} 4\n'
    )
    assert one(page).ttft_seconds == Histogram(buckets={0.123: 1, 4.56: 3}, sum=9.5, count=4)


def test_a_routers_series_of_the_same_name_are_not_an_engines() -> None:
    assert engines('vllm:num_requests_running{server="http://10.0.0.1:8000"} 5\n') == []


def test_what_is_not_a_value_is_left_out_and_counted() -> None:
    rejected: Counter[str] = Counter()
    page = """
vllm:num_requests_running{engine="0"} NaN
vllm:num_requests_waiting{engine="0"} +Inf
vllm:kv_cache_usage_perc{engine="0"} 1.5
vllm:prompt_tokens_total{engine="0"} -1
vllm:generation_tokens_total{engine="0"} 3
vllm:request_queue_time_seconds_sum{engine="0"} 3
"""
    (sample,) = engines(page, rejected)
    assert sample == EngineSample(
        time_seconds=5.0, pool="p", namespace="n", pod="vllm-0", engine="0", generation_tokens=3
    )
    assert rejected == {"bad-value": 4, "incomplete-histogram": 1}


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*PLACES, "up", "vllm_num_requests_running"]),
            st.dictionaries(
                st.sampled_from(["engine", "model_name", "le", "reason", "server", "finished_reason"]),
                st.sampled_from(["", "0", "1", "-1", "nan", "+Inf", "x"]),
            ),
            st.floats(),
        ),
        max_size=40,
    )
)
@example([("vllm:num_requests_running", {}, 8.988465674311579e307)] * 2)  # whose sum is not finite
def test_any_series_make_valid_samples_or_none(series: list[tuple[str, dict[str, str], float]]) -> None:
    for sample in engines([Reading(*row) for row in series]):
        assert EngineSample.model_validate_json(sample.model_dump_json()) == sample


# --- GPUs ------------------------------------------------------------------------------------------------------------

ON_MIG = """
DCGM_FI_PROF_GR_ENGINE_ACTIVE{UUID="GPU-a",GPU_I_ID="1",GPU_I_PROFILE="3g.40gb",namespace="n",pod="vllm-0"} 0.7
DCGM_FI_PROF_PIPE_TENSOR_ACTIVE{UUID="GPU-a",GPU_I_ID="1",GPU_I_PROFILE="3g.40gb",namespace="n",pod="vllm-0"} 0.4
DCGM_FI_PROF_GR_ENGINE_ACTIVE{UUID="GPU-a",GPU_I_ID="2",GPU_I_PROFILE="3g.40gb",namespace="n",pod="vllm-1"} 0.1
"""


def test_mig_instances_are_told_apart() -> None:
    samples = gpus(ON_MIG)
    assert [(s.mig_instance, s.mig_profile, s.pod, s.utilization_ratio) for s in samples] == [
        ("1", "3g.40gb", "vllm-0", 0.7),
        ("2", "3g.40gb", "vllm-1", 0.1),
    ]
    assert samples[0].tensor_active_ratio == 0.4


def test_units_and_the_better_of_two_utilizations() -> None:
    labels = '{gpu="0",UUID="GPU-a",modelName="NVIDIA H100 80GB HBM3",Hostname="node-1"}'
    page = f"""
DCGM_FI_DEV_GPU_UTIL{labels} 90
DCGM_FI_PROF_GR_ENGINE_ACTIVE{labels} 0.85
DCGM_FI_PROF_DRAM_ACTIVE{labels} 0.5
DCGM_FI_DEV_POWER_USAGE{labels} 612.5
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{labels} 5000000
DCGM_FI_DEV_FB_USED{labels} 1024
DCGM_FI_DEV_FB_FREE{labels} 2
"""
    (sample,) = gpus(page)
    assert sample.utilization_ratio == 0.85
    assert (sample.power_watts, sample.energy_joules, sample.dram_active_ratio) == (612.5, 5_000, 0.5)
    assert (sample.memory_used_bytes, sample.memory_free_bytes) == (2**30, 2**21)
    assert (sample.model, sample.host) == ("NVIDIA H100 80GB HBM3", "node-1")
    (without,) = gpus(page.replace("DCGM_FI_PROF_GR_ENGINE_ACTIVE", "other"))
    assert without.utilization_ratio == 0.9


def test_both_ways_to_name_the_pod() -> None:
    plain = gpus('DCGM_FI_DEV_GPU_UTIL{UUID="GPU-a",namespace="n",pod="vllm-0",container="vllm"} 5\n')
    own = 'namespace="gpu-operator",pod="dcgm-x"'
    exported = gpus(
        f'DCGM_FI_DEV_GPU_UTIL{{UUID="GPU-a",{own},exported_namespace="n",exported_pod="vllm-0"}} 5\n'
        f'DCGM_FI_DEV_GPU_UTIL{{UUID="GPU-b",{own}}} 0\n'
    )
    assert [(sample.namespace, sample.pod) for sample in plain] == [("n", "vllm-0")]
    assert [(sample.gpu, sample.namespace, sample.pod) for sample in exported] == [
        ("GPU-a", "n", "vllm-0"),
        ("GPU-b", "", ""),  # idle: the exporter's own pod does not use it
    ]


def test_gpus_are_joined_to_the_engines_pods() -> None:
    def gpu(namespace: str, pod: str) -> GpuSample:
        return GpuSample(time_seconds=1.0, gpu="g", namespace=namespace, pod=pod)

    samples = [gpu("n", "vllm-0"), gpu("other", "vllm-0"), gpu("n", "trainer"), gpu("", "vllm-0"), gpu("", "")]
    assert of_pods(samples, {("n", "vllm-0")}) == [samples[0], samples[3]]
    assert of_pods(samples, {("", "")}) == [samples[4]]
    assert of_pods(samples, set()) == []


def test_dcgms_blanks_are_no_values() -> None:
    rejected: Counter[str] = Counter()
    page = "".join(
        f'{name}{{UUID="GPU-a"}} {value}\n'
        for name, value in (
            ("DCGM_FI_DEV_POWER_USAGE", 2.0**47 + 2),
            ("DCGM_FI_DEV_FB_USED", 0x7FFFFFFFFFFFFFF0),
            ("DCGM_FI_DEV_GPU_UTIL", 0x7FFFFFF0),
            ("DCGM_FI_PROF_DRAM_ACTIVE", math.nan),
            ("DCGM_FI_DEV_FB_FREE", 7),
        )
    )
    (sample,) = gpus(page, rejected)
    assert sample == GpuSample(time_seconds=5.0, pool="p", gpu="GPU-a", memory_free_bytes=7 * 2**20)
    assert rejected == {"bad-value": 4}
    assert gpus("DCGM_FI_DEV_FB_FREE 7\n", rejected) == []
    assert rejected["no-gpu"] == 1


# --- configuration ---------------------------------------------------------------------------------------------------


def cache_config(**changes: str) -> dict[str, str]:
    (labels,) = (
        dict(reading.labels)
        for reading in parse_exposition(read_metrics(RECORDING)[0][1])
        if reading.name == "vllm:cache_config_info"
    )
    return {**labels, **changes}


def test_the_configuration_of_a_real_server() -> None:
    engine = json.loads((RECORDING / "meta.json").read_text())["engine"]
    config = from_cache_config([cache_config()])["0"]
    assert config == EngineConfig(
        block_size=engine["block_size"],
        num_gpu_blocks=engine["num_gpu_blocks"],
        prefix_caching=True,
        kv_cache_dtype="auto",
        gpu_memory_utilization=0.92,
        prefix_caching_hash_algo="sha256",
        effective_attention_block_size=engine["block_size"],
    )


@pytest.mark.parametrize(
    ("blocks", "tokens", "expected"),
    [
        ("800", "12800", 400),
        ("800", "12799", 400),  # vLLM rounds down
        ("700", "12800", 400),  # the ranks differ: the tokens are this rank's
        ("800", "None", 400),
    ],
)
def test_the_blocks_of_data_parallel_engines_are_summed(blocks: str, tokens: str, expected: int) -> None:
    series = [cache_config(engine=rank, num_gpu_blocks=blocks, kv_cache_size_tokens=tokens) for rank in ("0", "1")]
    assert {rank: config.num_gpu_blocks for rank, config in from_cache_config(series).items()} == {
        "0": expected,
        "1": expected,
    }


def test_server_info_tells_the_schedulers_limits() -> None:
    config = from_server_info(
        {
            "vllm_config": {
                "model_config": {"max_model_len": 4096, "dtype": "torch.bfloat16"},
                "cache_config": {"block_size": 16, "num_gpu_blocks": 900, "cache_dtype": "fp8_e4m3"},
                "scheduler_config": {
                    "max_num_seqs": 256,
                    "max_num_batched_tokens": 8192,
                    "policy": "priority",
                    "async_scheduling": True,
                    "enable_chunked_prefill": True,
                },
                "parallel_config": {"tensor_parallel_size": 2, "data_parallel_size": 1},
            }
        }
    )
    assert config.told() == {
        "block_size": 16,
        "num_gpu_blocks": 900,
        "kv_cache_dtype": "fp8",
        "max_model_len": 4096,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
        "enable_chunked_prefill": True,
        "async_scheduling": True,
        "scheduling_policy": "priority",
        "tensor_parallel_size": 2,
        "data_parallel_size": 1,
        "dtype": "torch.bfloat16",
    }


@pytest.mark.parametrize("answer", [None, [], {}, {"vllm_config": "text"}, {"data": [5]}, {"data": None}])
def test_answers_that_tell_nothing(answer: Any) -> None:
    assert from_server_info(answer) == from_models(answer) == EngineConfig()


def test_contradictions_are_told_and_the_first_word_is_kept() -> None:
    configs = EngineConfigs({"num_gpu_blocks": 500, "block_size": 32, "max_num_seqs": 16})
    configs.learn("vllm-0", EngineConfig(num_gpu_blocks=400, block_size=32))
    configs.learn("vllm-1", EngineConfig(num_gpu_blocks=500, max_model_len=4096))
    configs.learn("vllm-1, /v1/models", from_models({"data": [{"id": "m", "max_model_len": 2048}]}))
    assert configs.contradictions() == [
        f"num_gpu_blocks is 400 (vllm-0) but 500 ({TWIN})",
        "max_model_len is 2048 (vllm-1, /v1/models) but 4096 (vllm-1)",
    ]
    assert configs.discovered().told() == {"num_gpu_blocks": 400, "block_size": 32, "max_model_len": 4096}
    configs.learn("vllm-0", EngineConfig(num_gpu_blocks=500, block_size=32))  # restarted with the right settings
    assert len(configs.contradictions()) == 1
