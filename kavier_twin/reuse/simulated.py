"""The pass over requests that were simulated: each starts when it was first scheduled and ends when it finished."""

from __future__ import annotations

import numpy as np

from kavier_twin.reuse.watch import Content, ReuseWatch
from kavier_twin.simulation.state import FINISHED, Records, Workload


def watch_run(watch: ReuseWatch, workload: Workload, outcomes: Records) -> None:
    """Feed `watch` the requests of `workload` as `outcomes` tells of them; `index` is their row."""
    outcomes = outcomes[outcomes["status"] == FINISHED]
    count = outcomes.size
    times = np.concatenate([outcomes["finish"], outcomes["scheduled"]])
    columns = ("index", "replica", "prompt", "output", "cached", "external")
    rows = list(zip(*(outcomes[name].tolist() for name in columns), strict=True))
    starts = workload.chain_starts
    for place in np.argsort(times, kind="stable").tolist():  # at one time ends come first: they free blocks
        time_seconds = float(times[place])
        index, replica, prompt, output, cached, external = rows[place % count]
        chain = workload.chain[starts[index] : starts[index + 1]]
        content = Content(chain, int(workload.hash_tokens[index]), int(workload.covered[index]))
        if place >= count:
            watch.admitted(index, time_seconds, replica, prompt, content, output)
        else:
            watch.ended(index, time_seconds, cached + external, output, content)
