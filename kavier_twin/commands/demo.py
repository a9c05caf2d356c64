"""`kavier-twin demo`: the twin at work on a shipped recording of a real vLLM, replayed as if live."""

from __future__ import annotations

import argparse
import math
import os
import secrets
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from connectors.secret import SecretPlace
from kavier_twin.commands.client import TOKEN_VARIABLE
from kavier_twin.commands.figures import figure, spread
from kavier_twin.commands.process import StopSignals, leave
from kavier_twin.daemon.daemon import Daemon
from kavier_twin.daemon.feed import Feed
from kavier_twin.daemon.http_settings import DEFAULT_HOST, DEFAULT_PORT, HttpConfig
from kavier_twin.daemon.pool import PoolTwin
from kavier_twin.daemon.warm_up import make_ready
from kavier_twin.errors import UserError, set_up_logging
from kavier_twin.forecast.forecaster import ForecastSettings
from kavier_twin.forecast.slo import Slo
from kavier_twin.mirror.fidelity.windows import WindowScore
from kavier_twin.mirror.mirror import MirrorSettings
from kavier_twin.recordings.recording import read_recording, recorded_engine, recorded_server
from kavier_twin.recordings.replay_source import ReplaySource
from kavier_twin.serve.models import Horizon, Outlook, PolicyOutlook, TwinView
from kavier_twin.simulation.kpi_table import GAUGES, KPIS, RATIO, STATISTICS, Kpi, label_of
from kavier_twin.simulation.settings import CRUDE_STEP_TIME, FleetSettings

TOTAL_SECONDS: Final = 70.0  # that the demo is to take unless a speed is given, compilation included
SHORTEST_REPLAY_SECONDS: Final = 25.0
PLAIN_EVERY_SECONDS: Final = 5.0
POOL: Final = "demo"
MIRROR: Final = MirrorSettings(
    pool=POOL,
    ordering_seconds=0.5,
    recent_seconds=60.0,
    calibrate_after_requests=60,
    recalibrate_every_requests=150,
    bucket_seconds=10.0,  # the recording has few minutes
)
FORECAST: Final = ForecastSettings(
    every_seconds=3.0,
    horizons_seconds=(30.0, 60.0, 120.0),
    scenarios=10,
    workers=2,
    slos=(
        Slo(name="ttft_p99_1s", metric="ttft_p99_seconds", threshold=1.0),
        Slo(name="e2e_p95_3s", metric="e2e_p95_seconds", threshold=3.0),
    ),
)
_SLOW_SECONDS: Final = 4.0  # kernels that come from the cache are ready before
_COMPARED: Final = 3  # KPIs of each policy: a terminal has no room for more


_EXAMPLES = """examples:
  kavier-twin demo
  kavier-twin demo --once --no-ui --speed 1000 --port 0   as fast as it goes, then end
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "demo",
        help="mirror and forecast a recorded vLLM server",
        description="Replay a recording of a real vLLM server: mirror it, forecast it under several policies, "
        "serve metrics and a page. Needs no service and no network.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--speed", type=float, help="speed-up factor (default: the recording takes about a minute)")
    parser.add_argument("--once", action="store_true", help="stop at the end of the recording")
    parser.add_argument("--host", default=DEFAULT_HOST, help=f"address to serve on (default {DEFAULT_HOST})")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help=f"port to serve on, 0: any free one (default {DEFAULT_PORT})"
    )
    parser.add_argument("--no-ui", action="store_true", help="print plain lines instead of the live view")
    parser.add_argument("--recording", type=Path, metavar="DIR", help="recording to play (requests.jsonl, meta.json)")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    if args.speed is not None and not (math.isfinite(args.speed) and args.speed > 0.0):
        raise UserError(f"--speed {args.speed:g}: expected a number above 0, for example 10")
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port {args.port}: expected 0 to 65535")
    set_up_logging("warning")
    console = Console(highlight=False, width=_width())
    trace, samples = read_recording(args.recording)
    fleet = FleetSettings(engine=recorded_engine(trace), step_time=CRUDE_STEP_TIME)
    source = ReplaySource(trace.records, samples, name=f"replay:{trace.path.parent.name}")
    with StopSignals() as signals:
        pool = PoolTwin(
            fleet,
            MIRROR,
            FORECAST,
            event_clock=lambda: source.event_seconds,
            notes=("A recording of a real vLLM server, replayed as if live.",),
        )
        token = _token()
        http = HttpConfig(host=args.host, port=args.port, token=SecretPlace(env=TOKEN_VARIABLE))
        seconds = source.end_seconds - source.start_seconds

        def prepare() -> None:
            began = time.monotonic()
            make_ready()
            left = TOTAL_SECONDS - (time.monotonic() - began)
            source.speed = args.speed or max(1.0, seconds / max(left, SHORTEST_REPLAY_SECONDS))

        daemon = Daemon([pool], [Feed(source)], http=http, prepare=prepare)
        console.print(
            f"Kavier Twin demo: {len(trace.records)} requests to a real {recorded_server(trace)}, {seconds:.0f} s."
        )
        daemon.start()
        assert daemon.http is not None
        # What follows # stays in the browser: the page takes the token from there, for what-ifs.
        console.print(f"Page: {daemon.http.url}/#token={token}   metrics: {daemon.http.url}/metrics   (Ctrl-C ends)\n")
        _wait_for_kernels(console, daemon, signals)
        if not daemon.preparing:
            console.print(f"Replay speed: {source.speed:.1f} times real time.")
        watch = _Watch(console, daemon, source)
        show = watch.live if console.is_terminal and not args.no_ui else watch.plain
        show(signals, once=args.once)
        if signals.received is None and not daemon.failed:
            _sum_up(console, daemon, watch.tense)
        ended = daemon.stop()
    status = 1 if daemon.failed else signals.exit_status
    if not ended:
        leave(status)
    return status


def _width() -> int | None:
    """As wide as the terminal; where there is none, wide enough for the tables."""
    return None if sys.stdout.isatty() else 160


def _token() -> str:
    """The token of this run's what-ifs, put where the server looks for it."""
    return os.environ.setdefault(TOKEN_VARIABLE, secrets.token_urlsafe(9))


def _wait_for_kernels(console: Console, daemon: Daemon, signals: StopSignals) -> None:
    """Tell how far they are; says nothing where they come from the cache."""
    began = told_at = time.monotonic()
    every_seconds = 1.0 if console.is_terminal else PLAIN_EVERY_SECONDS
    with console.status("Loading the simulation kernels ...") as status:
        while daemon.preparing and signals.received is None and not daemon.failed:
            time.sleep(0.1)
            far, now = daemon.view.compiling, time.monotonic()
            if far is None or now - began < _SLOW_SECONDS or now - told_at < every_seconds:
                continue
            told_at = now
            words = f"Compiling the simulation kernels (first run only): {far.compiled} of {far.kernels}"
            words += f" ready after {now - began:.0f} s"
            if console.is_terminal:
                status.update(f"{words} ...")
            else:
                console.print(words)
    if not daemon.preparing:
        console.print(f"Kernels ready after {time.monotonic() - began:.1f} s.")


# --- watching -----------------------------------------------------------------------------------------------------


class _Watch:
    """What is shown while the replay runs. Remembers the forecast that foresaw most, for the summary."""

    def __init__(self, console: Console, daemon: Daemon, source: ReplaySource) -> None:
        self._console = console
        self._daemon = daemon
        self._source = source
        self.tense: Outlook | None = None

    def go_on(self, signals: StopSignals, *, once: bool) -> bool:
        """Whether to go on: until a signal, or once the recording was followed to its end."""
        outlook = self._daemon.view.outlook
        if outlook is not None and outlook.calibrated and _tension(outlook) > _tension(self.tense):
            self.tense = outlook
        if signals.received is not None or self._daemon.failed:
            return False
        return not (once and self._over())

    def _over(self) -> bool:
        view = self._daemon.view
        return all(source.ended for source in view.sources) and view.buffered_records == 0 and view.outlook is not None

    def live(self, signals: StopSignals, *, once: bool) -> None:
        """Redraw one screen."""
        with Live(console=self._console, auto_refresh=False, transient=once, vertical_overflow="crop") as live:
            while self.go_on(signals, once=once):
                live.update(self._screen(), refresh=True)
                time.sleep(0.25)

    def plain(self, signals: StopSignals, *, once: bool) -> None:
        """A line every few seconds."""
        told_at = -math.inf
        ended = False
        while self.go_on(signals, once=once):
            if not ended and time.monotonic() - told_at >= PLAIN_EVERY_SECONDS:
                told_at = time.monotonic()
                self._console.print(self._line())
                if self._over():
                    ended = True
                    self._console.print("The recording has ended; its last figures are served until Ctrl-C.")
            time.sleep(0.1)

    def _clock(self) -> str:
        return f"{self._source.event_seconds:.0f} of {self._source.end_seconds:.0f} s"

    def _screen(self) -> RenderableType:
        view = self._daemon.view
        title = Text(f"Recording at {self._clock()}", style="bold")
        parts: list[RenderableType] = [title, _trust(view), comparison(view)]
        if view.outlook is not None:
            parts += [policies(view.outlook, brief=True), verdict(view.outlook)]
        else:
            parts.append(Text("No forecast yet.", style="dim"))
        if self._over():
            parts.append(Text("The recording has ended; its last figures are served until Ctrl-C.", style="bold"))
        return Group(*parts)

    def _line(self) -> str:
        view = self._daemon.view
        parts = [f"{self._clock():>12}"]
        for kpi in KPIS.values():
            score = view.score(kpi.name, "mean" if kpi.statistics else "")
            if kpi.compared and score is not None:
                mirrored, observed = figure(kpi.name, score.predicted), figure(kpi.name, score.observed)
                parts.append(f"{kpi.label} {mirrored} (real {observed})")
        today = _today(view.outlook)
        if today is not None:
            horizon = today.horizons[0]
            probabilities = ", ".join(f"{slo} {share:.0%}" for slo, share in horizon.breach.items())
            parts.append(f"violation within {horizon.seconds:g} s: {probabilities}")
        if view.outlook is not None and view.outlook.best is not None:
            parts.append(f"best: {view.outlook.best.policy}")
        if not view.calibrated:
            parts.append("NOT CALIBRATED, not trusted")
        return " | ".join(parts)


def _sum_up(console: Console, daemon: Daemon, tense: Outlook | None) -> None:
    """The final figures, and what one scrape found."""
    assert daemon.http is not None
    view = daemon.view
    console.print()
    console.print(_trust(view))
    console.print(comparison(view))
    if tense is not None and tense is not view.outlook:
        console.print(policies(tense, "Forecast at the most critical moment"))
        console.print(verdict(tense))
    if view.outlook is not None:
        console.print(policies(view.outlook, "Last forecast"))
        console.print(verdict(view.outlook))
    with urllib.request.urlopen(f"{daemon.http.url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    series = sum(line.startswith("kavier_twin_") for line in lines)
    console.print(f"\nScraped {daemon.http.url}/metrics: {series} kavier_twin_ series served.")


# --- what it looks like -------------------------------------------------------------------------------------------


def comparison(view: TwinView) -> Table:
    """Mirror and reality: every KPI over the shortest window that has it, and the gauges of now."""
    table = Table(title="Mirror and reality", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("KPI")
    for name, style in (("mirror", "cyan"), ("reality", "yellow"), ("error", ""), ("over", "dim")):
        table.add_column(name, justify="right", style=style)
    for score in view.errors:
        if score.kpi not in GAUGES and view.score(score.kpi, score.statistic) is score:
            name = KPIS[score.kpi].title + (f", {score.statistic}" if score.statistic else "")
            values = (figure(score.kpi, value) for value in (score.predicted, score.observed))
            table.add_row(name, *values, _error(score), f"{score.observations} requests in {score.window}")
    for gauge in view.gauges:
        values = (figure(gauge.kpi, value) for value in (gauge.mirrored, gauge.observed))
        table.add_row(KPIS[gauge.kpi].title, *values, "", "now")
    return table


def policies(outlook: Outlook, when: str = "Forecast", *, brief: bool = False) -> Table:
    """Policies compared, best first: at the longest horizon the KPIs, over all horizons the probabilities."""
    horizons = max((policy.horizons for policy in outlook.policies), key=len, default=())
    seconds = [f"{horizon.seconds:g}" for horizon in horizons]
    table = Table(
        title=f"{when} ({outlook.event_seconds:.0f} s): the next {seconds[-1]} s by policy, best first",
        caption=f"Median (10 – 90 %) of {outlook.scenarios} scenarios at {outlook.rate_per_second:.1f} requests/s, the "
        f"same for all policies. Probability of an SLO violation in % within {' / '.join(seconds)} s.",
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("policy", no_wrap=True)
    kpis = [kpi for kpi in KPIS.values() if kpi.compared][:_COMPARED]
    for kpi in kpis:
        table.add_column(label_of(kpi.metric), justify="right", no_wrap=not brief)
    slos = list(horizons[-1].breach)
    for slo in slos:
        table.add_column(f"violation\n{slo}", justify="right")
    if not brief:
        table.add_column("vllm serve flags", overflow="fold")
    for number, policy in enumerate(outlook.policies):
        if not policy.horizons:
            table.add_row(policy.name, policy.problem)
            continue
        last = policy.horizons[-1]
        cells = [_spread(last, kpi) for kpi in kpis]
        probabilities = [" / ".join(f"{100 * h.breach[slo]:.0f}" for h in policy.horizons) for slo in slos]
        if not brief:
            probabilities.append(" ".join(policy.flags) or ("as it is" if policy.deployable else "hypothetical"))
        best = number == 0 and outlook.best is not None
        table.add_row(policy.name, *cells, *probabilities, style="bold green" if best else "")
    return table


def verdict(outlook: Outlook) -> Text:
    """The best policy, why, and how to deploy it."""
    if outlook.best is None:
        return Text("No recommendation: the current policy could not be simulated.")
    best = outlook.best
    text = Text.assemble(("Best: ", "bold"), (best.policy, "bold green"), f": {best.reason}")
    if best.flags:
        text.append(f"\n      vllm serve ... {' '.join(best.flags)}")
    if not outlook.calibrated:
        text.append("\n      made before calibration: not trusted", style="yellow")
    return text


def _trust(view: TwinView) -> Text:
    if not view.calibrated:
        return Text("Not calibrated yet: step times are a default, figures are not trusted.", style="yellow")
    text = Text(
        f"Calibrated on {view.calibrated_on_requests} requests of this stream; {view.finished_requests} "
        f"finished. Observed steps last {view.step_time_scale_ratio:.2f} times as long as modelled.",
        style="green",
    )
    if math.isfinite(view.exact_cache_ratio):
        text.append(f" Prefix hits are exact to the token for {view.exact_cache_ratio:.1%} of requests.")
    return text


def _today(outlook: Outlook | None) -> PolicyOutlook | None:
    found = (policy for policy in outlook.policies if policy.horizons and policy.in_force) if outlook else iter(())
    return next(found, None)


def _tension(outlook: Outlook | None) -> float:
    today = _today(outlook)
    return sum(sum(horizon.breach.values()) for horizon in today.horizons) if today else 0.0


def _error(score: WindowScore) -> str:
    """Relative, of a ratio the difference."""
    if not math.isfinite(score.error):
        return "–"
    return f"{100 * score.error:+.1f} points" if KPIS[score.kpi].unit == RATIO else f"{score.error:+.1%}"


def _spread(horizon: Horizon, kpi: Kpi) -> str:
    return spread(kpi.name, *(horizon.quantile(*STATISTICS[kpi.metric], quantile) for quantile in (0.1, 0.5, 0.9)))
