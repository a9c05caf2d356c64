"""Objectives from a YAML file of their own: a list of them, or a mapping with `slos`."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from kavier_twin.errors import UserError, problems_of
from kavier_twin.forecast.slo import Slo
from kavier_twin.simulation.kpi_table import METRICS

_SLOS: TypeAdapter[tuple[Slo, ...]] = TypeAdapter(tuple[Slo, ...])


def read_slos(path: Path) -> tuple[Slo, ...]:
    """Raises UserError that lists every problem."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--slo {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--slo {path}: not YAML: {' '.join(str(error).split())}") from None
    if isinstance(content, dict) and set(content) == {"slos"}:
        content = content["slos"]
    if not isinstance(content, list) or not content:
        raise UserError(
            f"--slo {path}: expected a list such as [{{name: fast, metric: ttft_p99_seconds, threshold: 2.0}}]; "
            f"metrics: {', '.join(METRICS)}"
        )
    try:
        slos = _SLOS.validate_python(content)
    except ValidationError as error:
        problems = [f"  {path}: {problem}" for problem in problems_of(error, known=lambda _: Slo.model_fields)]
        raise UserError("\n".join([f"--slo {path}: {len(problems)} problem(s)", *problems])) from None
    names = [slo.name for slo in slos]
    if len(set(names)) < len(names):
        raise UserError(f"--slo {path}: name: every objective needs a name of its own; there are {', '.join(names)}")
    return slos
