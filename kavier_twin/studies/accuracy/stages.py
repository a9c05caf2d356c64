"""Load tests of which only summaries were kept: `stages.json`, runs of one or more stages at a constant rate.

Format of the inference-sim project's real runs: per run the server and the load (`unique_prompts` fixed prompts,
cycled, so that nearly all of a prompt is in the prefix cache), per stage mean and percentiles of TTFT and e2e. Its
TPOT is `derived_tpot_s`, (e2e - TTFT) / (output tokens - 1) of the means: its raw inter-token latencies are per event
of the stream, of which there are about two a token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kavier_twin.catalog.deployment import Deployment
from kavier_twin.catalog.errors import CatalogError
from kavier_twin.errors import UserError, problems_of
from kavier_twin.mirror.calibration.requests import calibrate_means, with_frontend
from kavier_twin.simulation.runs import simulate
from kavier_twin.simulation.settings import FleetSettings, StepTime
from kavier_twin.simulation.state import Records
from kavier_twin.simulation.workload import Workload, make_workload
from kavier_twin.studies.accuracy.result import STATISTICS, Pair, SetResult, Trial
from kavier_twin.studies.accuracy.server import FRONTEND_SECONDS, Prior, Server, from_catalogue


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Latency(_Read):
    """Seconds."""

    mean: float = Field(gt=0.0)
    p50: float = Field(gt=0.0)
    p90: float = Field(gt=0.0)
    p99: float = Field(gt=0.0)


class Length(_Read):
    mean: float = Field(gt=0.0)


class Stage(_Read):
    """What was measured while requests came at one rate."""

    requested_rate: float = Field(gt=0.0)
    sent: int = Field(ge=1)
    success_count: int = Field(ge=0)
    prompt_len: Length
    ttft_s: Latency
    e2e_s: Latency
    derived_tpot_s: float = Field(gt=0.0)


class Prompts(_Read):
    """`num_groups` system prompts, each before `num_prompts_per_group` questions."""

    num_groups: int = Field(ge=1)
    num_prompts_per_group: int = Field(ge=1)
    system_prompt_len: int = Field(ge=0)
    output_len: int = Field(ge=1)


class Load(_Read):
    type: str


class Run(_Read):
    id: str
    model: str
    gpu: str
    tp: int = Field(ge=1)
    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    load: Load
    prompt_structure_effective: Prompts
    excluded_as_overload_by_authors: bool = False
    stages: list[Stage] = Field(min_length=1)

    @property
    def overloaded(self) -> bool:
        """Requests failed, or the authors say so: what was measured is the clients' patience."""
        return self.excluded_as_overload_by_authors or any(s.success_count < s.sent for s in self.stages)


class StagesFile(_Read):
    runs: list[Run] = Field(min_length=1)


def read_stages(path: Path) -> StagesFile:
    """Raises UserError naming the file and the first field that is wrong."""
    try:
        return StagesFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise UserError(f"{path}: {problems_of(error)[0]}") from None


def run_stages(path: Path, name: str, tell: Callable[[str], None]) -> SetResult:
    """Every run from the catalogue alone; the stages after the first also with its means fitted."""
    runs = read_stages(path).runs
    pairs: dict[tuple[str, str, str], list[Pair]] = {}
    notes = []
    for run in runs:
        tell(run.id)
        try:
            prior = from_catalogue(_server(run), f"{path}: {run.id}")
        except CatalogError as error:
            notes.append(f"{run.id} left out: {error}.")
            continue
        workload, stage_of = make_load(run, prior.engine.block_size)
        kind = "the overloaded runs" if run.overloaded else "all stages of the runs that were not overloaded"
        for basis, step_time in prior.step_times.items():
            outcomes = _outcomes(prior, step_time, workload, FRONTEND_SECONDS)
            found = pairs.setdefault((basis, "nothing", kind), [])
            for number in range(len(run.stages)):
                found += _pairs(run, number, outcomes[stage_of == number])
        if run.overloaded:
            notes.append(_overload(run))
        elif len(run.stages) > 1:
            fitted_on = "mean TTFT and e2e of each run's first stage"
            found = pairs.setdefault(("calibrated", fitted_on, "the later stages"), [])
            found += _after_the_first(run, prior, workload, stage_of)
    notes.append(
        "The load tests repeat a few prompts: nearly all of their tokens are prefix hits, so TTFT consists of the "
        "frontend, the wait for the current step, and one step. The frontend is assumed to take "
        f"{1e3 * FRONTEND_SECONDS:g} ms unless it was fitted."
    )
    trials = [Trial(*what, tuple(found)) for what, found in pairs.items()]
    return SetResult(name, f"{len(runs)} load tests of real servers, summaries by stage", tuple(trials), tuple(notes))


def _server(run: Run) -> Server:
    told = {
        "max_model_len": run.max_model_len,
        "max_num_batched_tokens": run.max_num_batched_tokens,
        "max_num_seqs": run.max_num_seqs,
    }
    engine = {name: value for name, value in told.items() if value is not None}
    return Server(run.model, run.gpu, Deployment(tensor_parallel_size=run.tp), engine)


def make_load(run: Run, block_size: int) -> tuple[Workload, np.ndarray]:
    """The run's requests, and the stage of each.

    Request i asks prompt i modulo their number. Every prompt has the mean length (they differ by a few tokens); those
    of a group share its system prompt, in whole blocks. Arrivals are evenly spaced, or Poisson's where the load says
    so.
    """
    prompts = run.prompt_structure_effective
    rng = np.random.default_rng(0)
    arrivals, stage_of, lengths = [], [], []
    start = 0.0
    for number, stage in enumerate(run.stages):
        gaps = np.full(stage.sent, 1.0 / stage.requested_rate)
        if run.load.type == "poisson":
            gaps = rng.exponential(gaps)
        arrivals.append(start + np.cumsum(gaps) - gaps[0])
        start = float(arrivals[-1][-1] + gaps[-1])
        stage_of.append(np.full(stage.sent, number))
        lengths.append(np.full(stage.sent, round(stage.prompt_len.mean)))
    prompt = np.concatenate(lengths)
    kinds = prompts.num_groups * prompts.num_prompts_per_group
    kind = np.arange(prompt.size) % kinds
    blocks = int(prompt.max()) // block_size
    shared = min(blocks, prompts.system_prompt_len // block_size)
    # [kinds, blocks]: equal numbers are equal content
    content = np.arange(kinds * blocks, dtype=np.uint64).reshape(kinds, blocks) + np.uint64(1)
    content[:, :shared] = content[np.arange(kinds) % prompts.num_groups, :shared]
    held = prompt // block_size
    starts = np.concatenate([[0], np.cumsum(held)])
    chain = np.concatenate([content[k, :length] for k, length in zip(kind, held, strict=True)])
    workload = make_workload(
        np.concatenate(arrivals),
        prompt,
        prompts.output_len,
        chain=chain,
        chain_starts=starts,
        hash_tokens=block_size,
        covered=prompt,
    )
    return workload, np.concatenate(stage_of)


def _outcomes(prior: Prior, step_time: StepTime, workload: Workload, frontend_seconds: float) -> Records:
    settings = FleetSettings(engine=prior.engine, step_time=step_time)
    outcomes = simulate(settings, with_frontend(workload, frontend_seconds)).collect()
    return outcomes[np.argsort(outcomes["index"], kind="stable")]


def _after_the_first(run: Run, prior: Prior, workload: Workload, stage_of: np.ndarray) -> list[Pair]:
    settings = FleetSettings(engine=prior.engine, step_time=prior.best)
    first = make_load(run.model_copy(update={"stages": run.stages[:1]}), prior.engine.block_size)[0]
    stage = run.stages[0]
    found = calibrate_means(settings, first, stage.ttft_s.mean, stage.e2e_s.mean, prior=prior.best)
    outcomes = _outcomes(prior, found.step_time, workload, found.frontend_seconds)
    pairs = []
    for number in range(1, len(run.stages)):
        pairs += _pairs(run, number, outcomes[stage_of == number])
    return pairs


def _pairs(run: Run, number: int, outcomes: Records) -> list[Pair]:
    stage = run.stages[number]
    point = f"{run.id}, stage {number}"
    ttft, e2e = outcomes["first_token"] - outcomes["arrival"], outcomes["finish"] - outcomes["arrival"]
    pairs = []
    for metric, measured, predicted in (("TTFT", stage.ttft_s, ttft), ("e2e", stage.e2e_s, e2e)):
        values = (predicted.mean(), *np.quantile(predicted, (0.5, 0.9, 0.99)))
        pairs += [
            Pair(point, metric, name, getattr(measured, name), float(value))
            for name, value in zip(STATISTICS, values, strict=True)
        ]
    tokens = run.prompt_structure_effective.output_len - 1
    pairs.append(Pair(point, "TPOT", "mean", stage.derived_tpot_s, float((e2e - ttft).mean()) / max(1, tokens)))
    return pairs


def _overload(run: Run) -> str:
    failed = sum(stage.sent - stage.success_count for stage in run.stages)
    sent = sum(stage.sent for stage in run.stages)
    return (
        f"{run.id} is overloaded: {failed:,} of {sent:,} requests failed. The measurements cover the requests "
        "that the clients waited for; the simulation's users wait for ever."
    )
