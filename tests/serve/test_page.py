"""The page in a real browser."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kavier_twin.commands.figures import figure
from kavier_twin.mirror.fidelity.trust import Trust
from kavier_twin.mirror.fidelity.windows import WindowScore
from kavier_twin.scores.scorer import AlertScore, BreachScore, KpiScore, Scores
from kavier_twin.serve.access import Access
from kavier_twin.serve.app import RefusedError
from kavier_twin.serve.models import Compiling, History, Series
from kavier_twin.simulation.kpi_table import KPIS, METRICS
from real_parts import chromium, require
from serve.twins import TOKEN, Served
from serve.views import empty_view, full_view

try:
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import Browser, Page, expect, sync_playwright
except ImportError:
    require("playwright", False, "pip install playwright axe-playwright-python")

pytestmark = [pytest.mark.slow, pytest.mark.real]
PATIENCE_MS = 40_000  # before a test fails: the machine may have much else to do
CHARTS = "async () => (await import('/static/charts.js')).charts"
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium(), args=quiet)
        yield found
        found.close()


def trusted_view(pool: str = "chat") -> Any:
    return replace(
        full_view(pool),
        unix_seconds=time.time(),
        trusted=True,
        untrusted_reasons=(),
        trust={"ttft_seconds": Trust(True)},
    )


@pytest.fixture
def served() -> Iterator[Served]:
    found = Served(Access(token=lambda: TOKEN))
    view = trusted_view()
    ends = (*(60.0 * minute for minute in range(1, 60)), 3590.0)
    # Nobody asked anything for a while, but once.
    queued = [tuple(value if n in (30, 59) else math.nan for n in range(60)) for value in (0.1, 0.2)]
    history = History(
        ends,
        (
            Series("ttft_seconds", "p99", tuple(0.5 + 0.01 * number for number in range(60)), 60 * (0.6,)),
            Series("queue_seconds", "p95", *queued),
            Series("requests_waiting", "", 60 * (2.0,), 60 * (3.0,)),
        ),
    )
    outlook = replace(view.outlook, event_seconds=3580.0, made_unix_seconds=time.time())
    errors = (
        *(score for score in view.errors if (score.kpi, score.statistic) != ("ttft_seconds", "p99")),
        WindowScore("ttft_seconds", "p99", "5m", 500, 1.09, 0.6, -0.1),
        WindowScore("ttft_seconds", "mean", "1h", 4000, 0.2, 0.3, -0.33),  # of which five minutes are known too
    )
    found.views["chat"] = replace(view, errors=errors, event_seconds=3590.0, history=history, outlook=outlook)
    yield found
    found.server.close()


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    """The page, on which nothing went wrong and which asked for nothing from elsewhere."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    found = context.new_page()
    found.set_default_timeout(PATIENCE_MS)
    wrong: list[str] = []
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("request", lambda r: None if r.url.startswith((served.server.url, "data:")) else wrong.append(r.url))
    found.goto(f"{served.server.url}/#token={TOKEN}")
    expect(found.locator("#trust-word")).not_to_have_text("Waiting for the twin")
    yield found
    context.close()
    assert not wrong


def cells(page: Page, place: str) -> list[list[str]]:
    """The body of a table, what stands in each cell on its own line joined by spaces."""
    rows = page.locator(f"{place} tbody tr").all()
    return [[" ".join(cell.inner_text().split()) for cell in row.locator("th, td").all()] for row in rows]


def api(served: Served, path: str) -> Any:
    return json.loads(served.ask("GET", path)[2])["pools"][0]


def test_the_figures_are_those_of_the_api(page: Page, served: Served) -> None:
    page.get_by_text("All figures").click()
    shown = cells(page, "#comparison")
    errors = api(served, "/v1/fidelity")["errors"]
    gauges = api(served, "/v1/state")["gauges"]
    assert [row[0] for row in shown if row[-1] == "now"] == ["requests running", "requests waiting", "KV cache usage"]
    assert len(shown) == 5 + len(gauges)
    ttft = next(entry for entry in errors if entry["statistic"] == "p99")
    row = next(row for row in shown if row[0] == "time to first token, p99")
    figures = [f"{ttft['predicted']:.2f} s", f"{1000 * ttft['observed']:.0f} ms", "−10.0 %"]
    assert row == [row[0], *figures, "500 requests in 5m"]
    assert next(row for row in shown if row[0] == "requests waiting")[2] == "–"  # not known is not zero
    horizon = api(served, "/v1/forecast")["outlook"]["policies"][0]["horizons"][0]
    assert cells(page, "#breach")[0][1] == f"{100 * horizon['breach']['fast']:.0f} % 4 % – 65 %" == "25 % 4 % – 65 %"
    assert cells(page, "#breach")[1][1] == "0 % 0 % – 37 % not trusted"  # the objective's KPI is not


def test_the_charts_show_mirror_reality_and_the_fan_on_one_axis(page: Page, served: Served) -> None:
    data = page.evaluate(f"{CHARTS}.get('ttft_seconds').data")
    times, observed, mirrored, high, low, middle = data
    told = api(served, "/v1/history")
    assert times[:60] == told["event_seconds"]
    series = next(one for one in told["series"] if (one["kpi"], one["statistic"]) == ("ttft_seconds", "p99"))
    assert mirrored[:60] == series["mirrored"]
    assert observed[:60] == series["observed"]
    assert times[60:] == [3640.0, 3880.0]  # the horizons, from where the forecast began
    assert (high[59], middle[59], low[59]) == (mirrored[59],) * 3  # the fan opens where the mirror stands
    assert (high[-1], middle[-1], low[-1]) == (1.0, 0.75, 0.5)
    chart = page.locator(".chart").first
    expect(chart.locator(".plot")).to_have_attribute(
        "aria-label", "time to first token, p99: mirror 1.09 s, reality 600 ms; ahead 750 ms, between 500 ms and 1.00 s"
    )
    expect(chart).to_contain_text("objective ≤ 1.00 s")
    assert chart.locator("canvas").count() == 1
    waiting = page.locator(".chart[data-kpi=requests_waiting]")
    expect(waiting).to_contain_text("Requests waiting, per replica")
    assert page.evaluate(f"{CHARTS}.get('requests_waiting').data")[4][-1] == 0.25  # of both replicas: half a request
    queue = page.evaluate(f"{CHARTS}.get('queue_seconds').data")
    assert (queue[1][29], queue[1][30], queue[1][31]) == (None, 0.2, None)  # a time without requests is no zero
    expect(page.locator(".chart[data-kpi=kv_cache_usage_ratio]")).to_be_hidden()  # nobody tells


def test_figures_are_written_as_on_the_command_line(page: Page) -> None:
    """Every KPI, over eight orders of magnitude."""
    values = [0.0, 12.0, *np.random.default_rng(0).lognormal(0.0, 4.0, 30).tolist()]
    asked = [[name, value] for name in (*KPIS, *METRICS) for value in values]
    shown = page.evaluate(
        "async (all) => { const w = await import('/static/words.js'); return all.map(([n, v]) => w.figure(v, n)); }",
        asked,
    )
    assert shown == [figure(name, value) for name, value in asked]


def test_how_right_past_forecasts_were_is_told(page: Page, served: Served) -> None:
    expect(page.locator("#scores-words")).to_have_text("No forecast has been scored yet: 0 forecasts pending.")
    kpi = KpiScore("ttft_p99_seconds", 60.0, 40, 0.09, 0.1, 0.9, 0.08, 0.8, 0.6, 0.9, 0.2, 0.4)
    scores = Scores(
        (kpi, replace(kpi, horizon_seconds=300.0, served_error=0.3, served_error_to_persistence_ratio=1.5)),
        (BreachScore("fast", 60.0, 40, 9, 0.04, 0.05, 0.07, ()),),
        (AlertScore("fast", 4, 3, 0.75, 1.0, (30.0, 42.0), 36.0),),
        (),
        1,
        {},
    )
    served.views["chat"] = replace(served.views["chat"], scores=scores)
    expect(page.locator("#scores-words")).to_contain_text("40 forecasts scored; 1 forecast pending")
    expect(page.locator("#scores-words")).to_contain_text("in 1 of 2 figures")
    [row] = cells(page, "#scores")
    assert row[1:] == [
        "80.0 ms ✓ 0.80 × persistence’s · 90 % within interval",
        "300 ms ✕ 1.50 × persistence’s · 90 % within interval",
    ]
    assert cells(page, "#alerts") == [["fast", "4", "75 %", "3", "100 %", "36 s", "0.04 (0.07)"]]


def test_a_breach_ahead_is_pointed_at(page: Page, served: Served) -> None:
    expect(page.locator("#ahead-alert")).to_be_hidden()
    view = served.views["chat"]
    assert view.outlook is not None
    today = view.outlook.policies[0]
    horizons = (today.horizons[0], replace(today.horizons[1], breach={"fast": 0.75, "steady": 0.0}))
    outlook = replace(view.outlook, policies=(replace(today, horizons=horizons), *view.outlook.policies[1:]))
    served.views["chat"] = replace(view, outlook=outlook)
    expect(page.locator("#ahead-alert")).to_have_text("▲ A violation is likely: fast within 5 min.")
    assert cells(page, "#breach")[0][2].startswith("▲ 75 %")
    expect(page).to_have_title("▲ Kavier Twin")
    expect(page.locator(".chart.alert")).to_have_count(1)


def test_the_page_is_there_while_kernels_are_compiled(page: Page, served: Served) -> None:
    ready = served.views["chat"]
    served.views["chat"] = replace(empty_view(), compiling=Compiling(120, 258))
    expect(page.locator("#trust-word")).to_have_text("Starting")
    expect(page.locator("#trust-why")).to_have_text("compiling kernels, 120 of 258")
    bar = page.locator("#compiling")
    assert (bar.get_attribute("value"), bar.get_attribute("max")) == ("120", "258")
    served.views["chat"] = ready
    expect(page.locator("#trust-word")).to_have_text("Trusted")
    expect(bar).to_be_hidden()


def test_policies_are_sorted_by_any_column_and_back_by_keyboard(page: Page) -> None:
    assert [row[0] for row in cells(page, "#policies")] == ["today", "half recommended", "odd"]
    page.get_by_role("button", name="policy", exact=True).focus()
    page.keyboard.press("Enter")
    assert [row[0].split()[0] for row in cells(page, "#policies")] == ["half", "odd", "today"]
    assert page.locator("#policies th").first.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")  # redrawing has left the focus where it was
    assert [row[0].split()[0] for row in cells(page, "#policies")] == ["today", "odd", "half"]
    page.keyboard.press("Enter")
    assert page.locator("#policies th").first.get_attribute("aria-sort") == "none"
    page.get_by_role("button", name="next 1 min").click()
    assert page.get_by_role("button", name="next 1 min").get_attribute("aria-pressed") == "true"


def test_the_recommended_flags_are_copied(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    expect(page.locator("#best")).to_contain_text("vllm serve … --max-num-seqs 3")
    page.locator("#best").get_by_role("button").click()
    expect(page.locator("#best").get_by_role("button")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "--max-num-seqs 3"


def test_a_what_if_is_entered_and_answered(page: Page, served: Served) -> None:
    page.get_by_label("Setting").fill("kv_cache_dtype")
    page.get_by_label("becomes").fill("fp8")
    page.get_by_label("Replicas", exact=True).fill("6")
    page.get_by_label("Load").fill("1.5")
    page.get_by_label("Horizon").fill("10")
    page.get_by_role("button", name="Simulate").click()
    expect(page.locator("#whatif-answer table")).to_be_visible()
    [asked] = served.pools["chat"].asked
    assert asked.overrides == {"kv_cache_dtype": "fp8", "replicas": 6}
    assert (asked.load, asked.horizon_seconds, asked.pool) == (1.5, 600.0, "chat")
    today, changed = cells(page, "#whatif-answer")
    assert today[:3] == ["today", "25 % 10 % – 50 %", "500 ms 400 ms – –"]
    assert changed[0] == "asked kv_cache_dtype=fp8 replicas=6 load 1.5x"
    expect(page.locator("#whatif-answer")).to_contain_text("vllm serve … --kv-cache-dtype fp8")


def test_a_what_if_refused_says_why_and_marks_the_field(page: Page, served: Served) -> None:
    served.pools["chat"].refusal = RefusedError("overrides", "unknown policy setting 'kv_dtype'")
    page.get_by_label("Setting").fill("kv_dtype")
    page.get_by_role("button", name="Simulate").click()
    expect(page.locator("#whatif-answer")).to_contain_text("unknown policy setting 'kv_dtype'")
    expect(page.get_by_label("Setting")).to_have_attribute("aria-invalid", "true")
    page.get_by_label("Load").fill("much")
    page.get_by_role("button", name="Simulate").click()
    expect(page.locator("#whatif-answer")).to_contain_text("Load factor: a number is needed")
    page.get_by_label("Load").fill("1")
    page.get_by_label("Horizon").fill("61")
    page.get_by_role("button", name="Simulate").click()
    expect(page.locator("#whatif-answer")).to_contain_text("at most 3600")
    expect(page.get_by_label("Horizon")).to_have_attribute("aria-invalid", "true")
    page.locator("#w-token").fill("wrong")
    page.get_by_role("button", name="Simulate").click()
    expect(page.locator("#whatif-answer")).to_contain_text("Authorization")
    expect(page.locator("#w-token")).to_have_attribute("aria-invalid", "true")


def test_trusted_stale_and_gone_look_so(page: Page, served: Served) -> None:
    trust = page.locator("#trust")
    expect(trust).to_have_class("card trust good")
    expect(trust).to_contain_text("✓ Trusted")
    expect(trust).to_contain_text("Error of the mirror over the last 5m")
    assert trust.locator("#trust-kpis li").all_inner_texts() == ["✓ time to first token, mean\n+10.0 %"]
    why = "ttft_seconds mean is 40 % off"
    served.views["chat"] = replace(served.views["chat"], trusted=False, untrusted_reasons=(why,))
    expect(trust).to_have_class("card trust bad")
    expect(trust).to_contain_text("✕ Not trusted")
    expect(trust).to_contain_text(why)
    served.views["chat"] = replace(served.views["chat"], stale=("kafka: no broker answers",))
    expect(trust).to_contain_text("Stale: not trusted")
    expect(trust).to_contain_text("stale: kafka: no broker answers")
    expect(page.locator("body")).to_have_class("stale")
    outlook = replace(served.views["chat"].outlook, made_unix_seconds=time.time() - 1000.0)
    served.views["chat"] = replace(served.views["chat"], outlook=outlook)
    expect(page.locator("#ahead-words")).to_contain_text("LATE")
    expect(trust).to_contain_text("forecasts are due every 30 s")
    served.views["chat"] = empty_view()
    expect(trust).to_have_class("card trust warn")
    expect(trust).to_contain_text("no telemetry record has been processed yet")
    expect(page.locator("#policies")).to_be_empty()
    served.server.close()
    expect(page.locator("#connection")).to_contain_text("it is unreachable")
    expect(page.locator("body")).to_have_class("old")


def test_a_replica_is_opened_and_closed_by_keyboard(page: Page, served: Served) -> None:
    button = page.locator("#replicas").get_by_role("button").first
    button.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#replica")).to_contain_text("0 of 299 blocks in use")
    expect(button).to_have_attribute("aria-expanded", "true")
    page.keyboard.press("Enter")
    expect(page.locator("#replica")).to_be_empty()
    assert [row[0] for row in cells(page, "#replicas")] == ["vllm-0", "replica 1"]


def test_pools_are_chosen_between(page: Page, served: Served) -> None:
    served.pools["code"] = served.pools["chat"]
    served.views["code"] = replace(trusted_view("code"), finished_requests=77)
    expect(page.locator("#pool")).to_be_enabled()
    page.locator("#pool").select_option("code")
    expect(page.locator("#facts")).to_contain_text("77")
    assert page.url.endswith("#pool=code")


def test_names_from_outside_are_never_markup(page: Page, served: Served) -> None:
    served.views["chat"] = replace(served.views["chat"], notes=("<img src=x onerror=alert(1)>",))
    expect(page.locator("#notes")).to_contain_text("<img src=x")
    assert page.locator("#notes img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_is_accessible_in_light_and_dark(browser: Browser, served: Served, scheme: Any) -> None:
    """Axe looks at contrast, names, roles, tables, focus: WCAG 2.2 as far as a program can tell."""
    context = browser.new_context(
        viewport={"width": 360, "height": 740}, device_scale_factor=2, is_mobile=True, color_scheme=scheme
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{served.server.url}/#token={TOKEN}")
    expect(page.locator("#policies tbody tr")).to_have_count(3)
    page.locator("#replicas").get_by_role("button").first.click()
    expect(page.locator("#replica")).to_contain_text("blocks in use")
    page.get_by_role("button", name="Simulate").click()
    expect(page.locator("#whatif-answer table")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 360  # nothing sticks out
    found = Axe().run(page)
    assert not found.response["violations"], found.generate_report()
    context.close()
