"""A mirror as JSON and arrays, and back: what a checkpoint holds of it.

It holds a kept fork of the fold, and all events since. So the restored mirror can still put events in their place that
come late.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, Final

from kavier_twin.mirror.calibration.online import Change
from kavier_twin.mirror.calibration.requests import Calibration
from kavier_twin.mirror.checkpoint_file import CheckpointError, Saved
from kavier_twin.mirror.fold import Fold, Seen
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.mirror.pace import Pace
from kavier_twin.mirror.phantoms import Arrival, End, EngineLoad, MadeUp
from kavier_twin.simulation.fleet import Fleet, Live
from kavier_twin.simulation.settings import FleetSettings
from kavier_twin.simulation.state import FleetState
from kavier_twin.telemetry import RequestFinished, RequestSeen

MOST_EVENTS: Final = 20_000  # since the fork: a start folds them again


def save(mirror: Mirror) -> Saved:
    """The state after the records taken in so far."""
    time_seconds, fold = mirror.kept_fork(MOST_EVENTS)
    document = {
        "configured": mirror.configured.model_dump(mode="json"),
        "fork_seconds": time_seconds,
        "reached_seconds": mirror.time_seconds,
        "fold": _save_fold(fold),
        "timeline": mirror.timeline.save(),
        "answers": mirror.answers.save(),
        "evidence": mirror.evidence.save(),
    }
    return Saved(document, dict(fold.fleet.state._asdict()))


def restore(saved: Saved, settings: MirrorSettings, fleet: FleetSettings) -> Mirror:
    """The mirror as it was saved. Raises CheckpointError if it was one of another fleet.

    Step times go on from where calibration had taken them; everything else that is configured must be the same.
    """
    document = saved.document
    configured = FleetSettings.model_validate(document["configured"])
    # Step times move with calibration, the footprint with the grid: neither is part of the state.
    same = configured.model_copy(update={"step_time": fleet.step_time, "footprint": fleet.footprint})
    if same != fleet:
        raise CheckpointError("the settings of the fleet have changed since then")
    mirror = Mirror(settings, fleet)
    fold = _restore_fold(Fold(settings, fleet), document["fold"], FleetState(**saved.arrays), fleet)
    mirror.timeline.restore(document["timeline"])
    mirror.answers.restore(document["answers"])
    mirror.evidence.restore(document["evidence"])
    mirror.resume(fold, document["fork_seconds"], document["reached_seconds"])
    return mirror


def _save_fold(fold: Fold) -> dict[str, Any]:
    return {
        "settings": fold.fleet.settings.model_dump(mode="json"),
        "now_seconds": fold.fleet.now_seconds,
        "pods": fold.pods.save(),
        "calibration": None if fold.calibration is None else fold.calibration.save(),
        "calibrated": fold.calibrated,
        "frontend_seconds": fold.frontend_seconds,
        "finished": fold.finished,
        "recent": [_seen(entry) for entry in fold.recent.values()],
        "running": [[identity, *live] for identity, live in fold.running.items()],
        "next_index": fold.next_index,
        "lengths": fold.lengths.save(),
        "finished_at_calibration": fold.finished_at_calibration,
        "calibrated_seconds": fold.calibrated_seconds,
        "calibration_failures": fold.calibration_failures,
        "speed_changes": fold.speed_changes,
        "last_change": fold.last_change,
        "online": fold.online.save(),
        "pace": fold.pace.save(),
        "arrivals": fold.arrivals.save(),
        "loads": [[*engine, load.save()] for engine, load in fold.loads.items()],
        "made_up": [_made_up(event) for *_, event in sorted(fold.made_up, key=itemgetter(0, 1, 2))],
    }


def _restore_fold(fold: Fold, saved: dict[str, Any], state: FleetState, fleet: FleetSettings) -> Fold:
    settings = FleetSettings.model_validate(saved["settings"]).model_copy(update={"footprint": fleet.footprint})
    fold.fleet = Fleet(settings, start_seconds=saved["now_seconds"], state=state)
    fold.pods.restore(saved["pods"])
    fold.calibration = None if saved["calibration"] is None else Calibration.restored(saved["calibration"])
    fold.calibrated = saved["calibrated"]
    fold.frontend_seconds = saved["frontend_seconds"]
    fold.finished = saved["finished"]
    fold.recent = {entry.seen.id: entry for entry in map(_seen_of, saved["recent"])}
    fold.running = {identity: Live(*live) for identity, *live in saved["running"]}
    fold.next_index = saved["next_index"]
    fold.lengths.restore(saved["lengths"])
    fold.finished_at_calibration = saved["finished_at_calibration"]
    fold.calibrated_seconds = saved["calibrated_seconds"]
    fold.calibration_failures = saved["calibration_failures"]
    fold.speed_changes = saved["speed_changes"]
    fold.last_change = Change(*saved["last_change"]) if saved["last_change"] else None
    fold.online.restore(saved["online"])
    fold.pace = Pace(settings.step_time)
    fold.pace.restore(saved["pace"])
    fold.arrivals.restore(saved["arrivals"])
    for *engine, load in saved["loads"]:
        namespace, pod, rank = engine
        fold.loads[namespace, pod, rank] = EngineLoad.restored(load)
    fold.made_up = [_made_up_of(*event) for event in saved["made_up"]]  # sorted, which is a heap
    return fold


def _made_up(event: Arrival | End) -> list[Any]:
    content = event.seen.model_dump(mode="json", exclude_defaults=True) if isinstance(event, Arrival) else None
    return [event.time_seconds, event.number, event.engine, content]


def _made_up_of(time_seconds: float, number: int, engine: list[str], seen: Any) -> MadeUp:
    namespace, pod, rank = engine
    key = (namespace, pod, rank)
    if seen is None:
        return time_seconds, number, key, End(time_seconds, number, key)
    return time_seconds, number, key, Arrival(time_seconds, number, key, RequestSeen.model_validate(seen))


def _seen(entry: Seen) -> list[Any]:
    finished = entry.finished and entry.finished.model_dump(mode="json", exclude_defaults=True)
    return [entry.seen.model_dump(mode="json", exclude_defaults=True), finished]


def _seen_of(entry: list[Any]) -> Seen:
    seen, finished = entry
    return Seen(RequestSeen.model_validate(seen), RequestFinished.model_validate(finished) if finished else None)
