"""Step times from measured operators: NVIDIA's AIConfigurator, where it is installed (extra `silicon`).

Its database holds what single operators took on real cards under vLLM: matrix products, attention, experts,
all-reduces. They are asked once per engine configuration, over a grid of batches, and turned into the same coefficients
that the roofline gives, so that a run never leaves the compiled kernels. Only the library's documented facade is used
(`aiconfigurator_core.sdk`: `EngineHandle`, `run_static_per_op`; Apache-2.0).
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from kavier_twin.catalog.deployment import Deployment, check
from kavier_twin.catalog.gpu import Gpu
from kavier_twin.catalog.model import ModelShape
from kavier_twin.hardware.roofline import TOKENS, Roofline, step_time
from kavier_twin.simulation.settings import StepTime

PACKAGE = "aiconfigurator_core"
DISTRIBUTION = "aiconfigurator-core"

# Our cards that have measurements under vLLM, by the database's names (0.12.0, systems/data).
SYSTEMS = {
    "NVIDIA A100 SXM4 80GB": "a100_sxm",
    "NVIDIA B200 SXM 180GB": "b200_sxm",
    "NVIDIA H100 SXM5 80GB": "h100_sxm",
    "NVIDIA H200 SXM 141GB": "h200_sxm",
    "NVIDIA L40S": "l40s",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "rtx_pro_6000_server",
}
# (products, experts) by our quantizations' names.
_QUANTIZATIONS = {
    "fp16": ("bfloat16", "bfloat16"),
    "bf16": ("bfloat16", "bfloat16"),
    "fp8": ("fp8", "fp8"),
    "int4": ("int4_wo", "int4_wo"),
    "mxfp4": ("bfloat16", "w4a16_mxfp4"),
    "nvfp4": ("nvfp4", "nvfp4"),
}
# Operators whose time depends on the context: dense, and the modules of latent attention.
_ATTENTION = ("attention", "mla")
_LARGEST_DECODE = 512  # of the database's batches of decodes; beyond, prefills give the linear layers
_MEASURED_SHARE = 0.5
# On one GPU: where the tables of decode attention end. What lies beyond is extrapolated: Llama-2-7B with its 32 heads
# came out 20 to 40 % slower than measured requests, where the roofline is within 10 %.
_KV_HEADS = 8


class SiliconUnavailable(Exception):
    """No measured operators for this engine: the message says why."""


@dataclass(frozen=True)
class SiliconTimes:
    """Step times and where they come from."""

    step_time: StepTime
    source: str
    measured_share: float  # of a decode step's operator time; the rest is the library's own estimates


@dataclass(frozen=True)
class _Operators:
    """Seconds per operator of one step."""

    seconds: dict[str, float]
    measured: float  # seconds of those that were measured

    def attention(self) -> float:
        return sum(value for name, value in self.seconds.items() if any(kind in name for kind in _ATTENTION))

    def head(self) -> float:
        return sum(value for name, value in self.seconds.items() if "logits" in name)

    def linear(self) -> float:
        return sum(self.seconds.values()) - self.attention() - self.head()


class _Engine:
    """One compiled engine of the library."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def _ask(self, phase: int, sequences: int, tokens: int) -> _Operators:
        rows = self._handle.run_static_per_op(
            batch_size=sequences,
            beam_width=1,
            isl=tokens,
            osl=2,
            prefix=0,
            seq_imbalance_correction_scale=1.0,
            gen_seq_imbalance_correction_scale=1.0,
        )[phase]
        seconds = {str(name): float(milliseconds) / 1e3 for name, milliseconds, _, _ in rows}
        measured = sum(seconds[str(name)] for name, _, _, source in rows if source in ("silicon", "mixed"))
        return _Operators(seconds, measured)

    def prefill(self, tokens: int) -> _Operators:
        """One sequence of so many new tokens."""
        return self._ask(0, 1, tokens)

    def decode(self, sequences: int, context: int) -> _Operators:
        """A step of so many sequences behind so many tokens each."""
        return self._ask(1, sequences, context)


def silicon_step_time(gpu: Gpu, model: ModelShape, deployment: Deployment | None = None) -> SiliconTimes:
    """Step times of one engine from measured operators, and the roofline's estimate of the host's work.

    Raises SiliconUnavailable where the library is not installed or does not know the card, the model or the
    configuration; CatalogError where the model does not divide over the GPUs.
    """
    deployment = deployment or Deployment()
    check(model, deployment)
    system = SYSTEMS.get(gpu.name)
    if system is None:
        raise SiliconUnavailable(f"no measured operators of {gpu.name}")
    if not model.latent and model.kv_heads > _KV_HEADS * deployment.tensor_parallel_size:
        raise SiliconUnavailable(f"decode attention is measured up to {_KV_HEADS} key-value heads a GPU")
    try:
        version = importlib.metadata.version(DISTRIBUTION)
        engine = _Engine(_compile(system, model, deployment))
        times, measured_share = _coefficients(engine, model, deployment)
    except importlib.metadata.PackageNotFoundError:
        raise SiliconUnavailable(f"{DISTRIBUTION} is not installed (extra `silicon`)") from None
    except SiliconUnavailable:
        raise
    except Exception as error:  # the library raises what its layers raise: KeyError, ValueError, its own
        raise SiliconUnavailable(f"AIConfigurator cannot model this: {' '.join(str(error).split())[:200]}") from error
    if measured_share < _MEASURED_SHARE:
        raise SiliconUnavailable(f"only {measured_share:.0%} of a step's operator time is measured for {model.name}")
    return SiliconTimes(times, f"AIConfigurator {version}, operators measured on {system}", measured_share)


# ---- asking the library ----------------------------------------------------------------------------------------------


def _compile(system: str, model: ModelShape, deployment: Deployment) -> Any:
    try:
        from aiconfigurator_core.sdk import EngineHandle
    except ImportError as error:
        raise SiliconUnavailable(f"{DISTRIBUTION} cannot be imported: {error}") from None
    gpus = deployment.expert_gpus
    kept = model.stored_as(deployment.quantization)
    products, experts = _QUANTIZATIONS.get(kept.name, (None, None))
    asked = deployment.quantization or model.named_quantization
    if products is None and asked is not None:
        raise SiliconUnavailable(f"no measured operators of {kept.name}")
    settings: dict[str, Any] = {
        "tp_size": deployment.tensor_parallel_size,
        "attention_dp_size": deployment.data_parallel_size,
        "kvcache_quant_mode": "fp8" if deployment.kv_cache_dtype == "fp8" else "bfloat16",
    }
    if model.experts:
        settings["moe_ep_size"] = gpus if deployment.enable_expert_parallel else 1
        settings["moe_tp_size"] = 1 if deployment.enable_expert_parallel else gpus
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        shipped = _shipped_config(model)
        for name, text in (shipped or {"config.json": json.dumps(_as_llama(model))}).items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        if not shipped or asked is not None:  # else the library takes what its config.json says
            settings |= {"gemm_quant_mode": products, "moe_quant_mode": experts if model.experts else None}
        return EngineHandle.compile(folder, system, "vllm", **settings)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's remarks on the tables that it fills from other frameworks: the measured share tells."""
    logger = logging.getLogger(PACKAGE)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower().replace("meta-llama", "llama") if letter.isalnum())


def _shipped_config(model: ModelShape) -> dict[str, str]:
    """The files that describe the model, by name, where the library ships them: a folder with them keeps it from asking
    the network. Empty if it does not ship them."""
    ours = _plain(model.name.rsplit("/", 1)[-1])
    found: dict[str, str] = {}
    for file in (resources.files(PACKAGE) / "model_configs").iterdir():
        name, is_config, _ = file.name.partition("_config.json")
        quantization = name.endswith("_hf_quant")
        if is_config and _plain(name.removesuffix("_hf_quant").split("--", 1)[-1]) == ours:
            found["hf_quant_config.json" if quantization else "config.json"] = file.read_text(encoding="utf-8")
    return found


def _as_llama(model: ModelShape) -> dict[str, Any]:
    """A `config.json` of the same sizes: an operator's time does not depend on what the model is called."""
    if model.experts or model.latent or model.mlp_matrices != 3:
        raise SiliconUnavailable(f"AIConfigurator does not ship {model.name}, and it is no plain gated transformer")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.attention_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_model_len,
        "tie_word_embeddings": model.tied_embeddings,
        "torch_dtype": "bfloat16",
    }


# ---- from operators to coefficients ----------------------------------------------------------------------------------

_SEQUENCES = (1, 8, 32, 128, 256)
_CONTEXTS = (128, 512, 1024, 2048, 4096, 8192)
_PREFILLS = (256, 512, 1024, 2048, 4096, 8192, 16_384)


def _coefficients(engine: _Engine, model: ModelShape, deployment: Deployment) -> tuple[StepTime, float]:
    host = Roofline()
    synchronous = 0.0 if deployment.async_scheduling else 1.0
    typical = engine.decode(32, 1024)
    at_rest, per_sequence, per_context = _decode_attention(engine)
    per_token, per_pair = _prefill_attention(engine)
    linear = [engine.decode(n, 1).linear() if n <= _LARGEST_DECODE else engine.prefill(n).linear() for n in TOKENS]
    step_time = StepTime(
        fixed=host.seconds_per_step + synchronous * host.seconds_per_step_synchronous + at_rest + typical.head(),
        per_prefill_token=per_token,
        per_decode_sequence=(
            host.seconds_per_sequence + synchronous * host.seconds_per_sequence_synchronous + per_sequence
        ),
        per_context_token=per_context,
        per_prefill_attention=per_pair,
        # Measured times wobble by a few percent from batch to batch; a larger batch is never faster.
        linear_layers=tuple(zip(map(float, TOKENS), np.maximum.accumulate(linear).tolist(), strict=True)),
    )
    return step_time, typical.measured / sum(typical.seconds.values())


def _fitted(rows: list[tuple[float, ...]], seconds: list[float]) -> npt.NDArray[np.float64]:
    """Non-negative coefficients with the least relative error."""
    weights = 1.0 / np.array(seconds)
    matrix = np.array(rows) * weights[:, None]
    scale = np.maximum(matrix.max(axis=0), 1e-300)  # columns differ by many orders of magnitude
    solution, _ = nnls(matrix / scale, np.ones(len(seconds)))
    return np.asarray(solution / scale, np.float64)


def _decode_attention(engine: _Engine) -> tuple[float, float, float]:
    """(seconds at rest, per sequence, per context token) of the attention of a decode step."""
    grid = [(b, c, engine.decode(b, c).attention()) for b in _SEQUENCES for c in _CONTEXTS]
    at_rest, per_sequence, per_context = _fitted([(1.0, b, b * c) for b, c, _ in grid], [row[2] for row in grid])
    return float(at_rest), float(per_sequence), float(per_context)


def _prefill_attention(engine: _Engine) -> tuple[float, float]:
    """(seconds per token, per pair of tokens) of the attention of a prefill."""
    seconds = [engine.prefill(n).attention() for n in _PREFILLS]
    per_token, per_pair = _fitted([(n, n * (n + 1) / 2) for n in _PREFILLS], seconds)
    return float(per_token), float(per_pair)


@dataclass(frozen=True)
class Prior:
    """Step times, where they come from, and why from there."""

    step_time: StepTime
    source: str
    reason: str


def prior(gpu: Gpu, model: ModelShape, deployment: Deployment | None = None) -> Prior:
    """Step times from measured operators where there are any for this engine, else from the data sheet.

    Raises CatalogError where the model does not divide over the GPUs.
    """
    try:
        silicon = silicon_step_time(gpu, model, deployment)
    except SiliconUnavailable as error:
        own = Roofline.of(gpu) != Roofline()
        shares = "with shares measured on this card" if own else "with the shares usual on other cards"
        return Prior(step_time(gpu, model, deployment), f"roofline of {gpu.name}, {shares}", str(error))
    return Prior(
        silicon.step_time,
        silicon.source,
        f"measured operators are {silicon.measured_share:.0%} of a decode step's time",
    )
