"""A vLLM plugin that lets a CPU server's steps last as long as those of a small GPU would.

A step of the tests' model takes 2 ms on a CPU, and no client here could overload that. With `DEVICE_TIME=1` this sleeps
in `execute_model` until the step has lasted `(FIXED + PER_PREFILL * prefill tokens + PER_DECODE * decodes) * SCALE`
seconds, times a lognormal factor of 5 %. Scheduler, cache, API, metrics and KV events stay vLLM's own.
"""

import os
import random
import time


def load() -> None:
    """Wrap the worker's `execute_model`: the entry point in the group `vllm.general_plugins`."""
    if os.environ.get("DEVICE_TIME") != "1":
        return
    from vllm.v1.worker.gpu_worker import Worker  # the CPU worker derives from it

    if getattr(Worker, "device_time", False):
        return
    inner, rng = Worker.execute_model, random.Random(7)
    defaults = {"FIXED": "0.014", "PER_PREFILL": "70e-6", "PER_DECODE": "0.0006", "SCALE": "1.6"}
    fixed, per_prefill, per_decode, scale = (
        float(os.environ.get(f"DEVICE_TIME_{name}", value)) for name, value in defaults.items()
    )

    def execute_model(self, output):
        began = time.monotonic()
        result = inner(self, output)
        total = output.total_num_scheduled_tokens
        if total > 0:
            decodes = sum(tokens == 1 for tokens in output.num_scheduled_tokens.values())
            seconds = (fixed + per_prefill * (total - decodes) + per_decode * decodes) * scale
            time.sleep(max(0.0, seconds * rng.lognormvariate(0, 0.05) - (time.monotonic() - began)))
        return result

    Worker.execute_model, Worker.device_time = execute_model, True
