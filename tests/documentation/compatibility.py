"""docs/compatibility.md, made from the golden runs that the tests compare.

PYTHONPATH=tests python -m documentation.compatibility > docs/compatibility.md
"""

from __future__ import annotations

from golden.runs import EXACT, INEXACT
from kavier_twin.simulation.versions import PROFILES

_HEAD = """# Compatibility with vLLM

Which features of which version of vLLM the engine reproduces. `engine.vllm` selects the version. Generated: see
`tests/documentation/compatibility.py`; a test keeps it up to date.

- *exact*: every decision (cached tokens, preemptions) is that of vLLM's own scheduler in golden runs, and every time is
  equal to within 1e-9.
- *approximated*: simulated, but not compared with vLLM's own decisions.
- *not modelled*: an engine setting for it in `scenario.json` is refused. A recording's engine runs without it, and a
  warning names the setting. In a live fleet the KPIs that depend on it are wrong.

"""


def page() -> str:
    """The page."""
    versions = list(PROFILES)
    lines = [_HEAD + f"| feature | {' | '.join(versions)} | how it is given |", "|---" * (len(versions) + 2) + "|"]
    rows = [(item.feature, "exact", item.setting) for item in EXACT]
    rows.append(("Host tier: lru and arc, store threshold, asynchronous loads", "exact", "`engine.host_tier`"))
    rows += [(item.feature, item.says, item.what_happens) for item in INEXACT]
    lines += [f"| {feature} | {' | '.join([says] * len(versions))} | {how} |" for feature, says, how in rows]
    lines += ["", "## Switches", "", f"| switch | {' | '.join(versions)} |", "|---" * (len(versions) + 1) + "|"]
    for at, switch in enumerate(PROFILES[versions[0]]._fields):
        values = ("yes" if PROFILES[version][at] else "no" for version in versions)
        lines.append(f"| `{switch}` | {' | '.join(values)} |")
    lines += ["", "`kavier_twin/simulation/versions.py` says what each switch does.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
