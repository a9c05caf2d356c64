"""A mirror as JSON and arrays, and back: what a checkpoint holds of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple
from typing import Any

from kavier_twin.mirror.calibration.online import Change
from kavier_twin.mirror.calibration.requests import Calibration, Coefficient
from kavier_twin.mirror.checkpoint_file import CheckpointError, Saved
from kavier_twin.mirror.fidelity.windows import WindowScore
from kavier_twin.mirror.mirror import Mirror, MirrorSettings, Seen
from kavier_twin.mirror.pace import Pace
from kavier_twin.simulation.fleet import Fleet, Live
from kavier_twin.simulation.settings import FleetSettings, StepTime
from kavier_twin.simulation.state import FleetState
from kavier_twin.telemetry import RequestFinished, RequestSeen


def save(mirror: Mirror) -> Saved:
    """The state after the records taken in so far."""
    fleet = mirror.fleet
    document = {
        "settings": fleet.settings.model_dump(mode="json"),
        "configured": mirror.configured.model_dump(mode="json"),
        "pods": mirror.pods.save(),
        "now_seconds": fleet.now_seconds,
        "windows": mirror.windows.save(),
        "gauges": mirror.gauges.save(),
        "judge": mirror.judge.save(),
        "scores": [astuple(score) for score in mirror.scores],
        "calibration": _calibration(mirror.calibration),
        "calibrated": mirror.calibrated,
        "frontend_seconds": mirror.frontend_seconds,
        "ingested": dict(mirror.ingested),
        "finished": mirror.finished,
        "stream": mirror._stream.save(),
        "recent": [_seen(entry) for entry in mirror._recent.values()],
        "running": [[identity, *live] for identity, live in mirror._running.items()],
        "next_index": mirror._next_index,
        "lengths": mirror._lengths.save(),
        "finished_at_calibration": mirror._finished_at_calibration,
        "calibrated_seconds": mirror.calibrated_seconds,
        "calibration_failures": dict(mirror.calibration_failures),
        "speed_changes": mirror.speed_changes,
        "last_change": mirror.last_change,
        "online": mirror._online.save(),
        "pace": mirror._pace.save(),
        "arrivals": mirror._arrivals.save(),
    }
    return Saved(document, dict(fleet.state._asdict()))


def restore(saved: Saved, settings: MirrorSettings, fleet: FleetSettings) -> Mirror:
    """The mirror as it was saved. Raises CheckpointError if it was one of another fleet.

    Step times go on from where calibration had taken them; everything else that is configured must be the same.
    """
    document = saved.document
    old = FleetSettings.model_validate(document["settings"])
    configured = FleetSettings.model_validate(document["configured"])
    # Step times move with calibration, the footprint with the grid: neither is part of the state.
    same = configured.model_copy(update={"step_time": fleet.step_time, "footprint": fleet.footprint})
    if same != fleet:
        raise CheckpointError("the fleet's settings have changed since")
    mirror = Mirror(settings, fleet)
    current = old.model_copy(update={"footprint": fleet.footprint})
    mirror.pods.restore(document["pods"])
    mirror.fleet = Fleet(current, start_seconds=document["now_seconds"], state=FleetState(**saved.arrays))
    mirror.windows.restore(document["windows"])
    mirror.gauges.restore(document["gauges"])
    mirror.judge.restore(document["judge"])
    mirror.scores = tuple(WindowScore(*score) for score in document["scores"])
    mirror.calibration = _calibration_of(document["calibration"])
    mirror.calibrated = document["calibrated"]
    mirror.frontend_seconds = document["frontend_seconds"]
    mirror.ingested = Counter(document["ingested"])
    mirror.finished = document["finished"]
    mirror._stream.restore(document["stream"])
    mirror._recent = {entry.seen.id: entry for entry in map(_seen_of, document["recent"])}
    mirror._running = {identity: Live(*live) for identity, *live in document["running"]}
    mirror._next_index = document["next_index"]
    mirror._lengths.restore(document["lengths"])
    mirror._finished_at_calibration = document["finished_at_calibration"]
    mirror.calibrated_seconds = document["calibrated_seconds"]
    mirror.calibration_failures = Counter(document["calibration_failures"])
    mirror.speed_changes = document["speed_changes"]
    mirror.last_change = Change(*document["last_change"]) if document["last_change"] else None
    mirror._online.restore(document["online"])
    mirror._pace = Pace(current.step_time)
    mirror._pace.restore(document["pace"])
    mirror._arrivals.restore(document["arrivals"])
    return mirror


def _seen(entry: Seen) -> list[Any]:
    finished = entry.finished and entry.finished.model_dump(mode="json", exclude_defaults=True)
    return [entry.seen.model_dump(mode="json", exclude_defaults=True), finished]


def _seen_of(entry: list[Any]) -> Seen:
    seen, finished = entry
    return Seen(RequestSeen.model_validate(seen), RequestFinished.model_validate(finished) if finished else None)


def _calibration(calibration: Calibration | None) -> dict[str, Any] | None:
    if calibration is None:
        return None
    return {
        "step_time": calibration.step_time.model_dump(mode="json"),
        "frontend_seconds": calibration.frontend_seconds,
        "requests": calibration.requests,
        "mean_ttft_ratio": calibration.mean_ttft_ratio,
        "mean_e2e_ratio": calibration.mean_e2e_ratio,
        "coefficients": {name: list(found) for name, found in calibration.coefficients.items()},
    }


def _calibration_of(document: dict[str, Any] | None) -> Calibration | None:
    if document is None:
        return None
    coefficients = {name: Coefficient(*found) for name, found in document["coefficients"].items()}
    step_time = StepTime.model_validate(document["step_time"])
    return Calibration(**{**document, "step_time": step_time, "coefficients": coefficients})
