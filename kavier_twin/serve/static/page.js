/* The page: asks the API every two seconds and shows what it says. Names from outside are text, never markup. */

import { drawCharts } from "./charts.js";
import { LIKELY, element, interval, keepFocus, named, probability, table } from "./elements.js";
import { drawScores } from "./scores.js";
import { settingsKnown, startWhatIf } from "./whatif.js";
import { clock, errorOf, figure, known, kpiName, kpisThat, label, percent, setKpis, span } from "./words.js";

const $ = (id) => document.getElementById(id);
const EVERY_MS = 2000;
const LATE_CYCLES = 3; // a forecast older than so many cycles is late
const fragment = new URLSearchParams(location.hash.slice(1)); // a token in the fragment never leaves the browser by itself
const page = { pool: fragment.get("pool"), token: fragment.get("token") ?? "", horizon: null, sort: null, replica: null, answeredAt: null, kpis: null, currency: "" };

// --- asking ---------------------------------------------------------------------------------------------------------

async function ask(path) {
  const headers = page.token ? { Authorization: `Bearer ${page.token}` } : {};
  const answer = await fetch(path, { headers, cache: "no-store" });
  if (answer.status === 401 || answer.status === 403) {
    $("token-form").hidden = false;
    throw new Error("a token is required");
  }
  if (!answer.ok) throw new Error((await answer.json()).detail);
  return answer.json();
}

async function askPool(what) {
  return (await ask(`v1/${what}?${new URLSearchParams({ pool: page.pool })}`)).pools[0];
}

async function refresh() {
  try {
    if (!page.kpis) setKpis(page.kpis = await ask("v1/kpis"));
    const state = await ask("v1/state");
    choosePool(state.pools);
    const parts = await Promise.all(["fidelity", "forecast", "policies", "history", "scores"].map(askPool));
    page.answeredAt = Date.now();
    $("token-form").hidden = true;
    if (parts.every((part) => part.pool === page.pool)) draw(state, ...parts); // not of a pool that was left meanwhile
    if (page.replica !== null) await drawReplica();
    connected(null);
  } catch (problem) {
    connected(problem);
  }
  setTimeout(refresh, EVERY_MS);
}

function choosePool(pools) {
  const names = pools.map((pool) => pool.pool);
  if (!names.includes(page.pool)) page.pool = names[0];
  const words = pools.map((pool) => pool.pool + (pool.stale.length ? " ✕ stale" : pool.not_ready.length ? " … not ready" : ""));
  const shown = [...$("pool").options];
  if (shown.map((option) => option.value).join("\n") !== names.join("\n")) {
    $("pool").replaceChildren(...names.map((name, i) => new Option(words[i], name, false, name === page.pool)));
  } else shown.forEach((option, i) => { if (option.text !== words[i]) option.text = words[i]; });
  $("pool").disabled = names.length < 2;
}

$("pool").onchange = () => {
  Object.assign(page, { pool: $("pool").value, replica: null, horizon: null });
  history.replaceState(null, "", `#${new URLSearchParams({ pool: page.pool })}`);
  $("replica").replaceChildren();
  $("whatif-answer").replaceChildren();
};

$("token-form").onsubmit = (event) => {
  event.preventDefault();
  page.token = $("token").value;
};

function connected(problem) {
  document.body.classList.toggle("old", problem !== null);
  $("connection").hidden = problem === null;
  if (problem === null) return;
  const since = page.answeredAt ? ` These figures are ${span(Math.round((Date.now() - page.answeredAt) / 1000))} old.` : "";
  const why = problem instanceof TypeError ? "it is unreachable" : problem.message;
  $("connection").textContent = `✕ No answer from the twin: ${why}.${since}`;
}

// --- showing --------------------------------------------------------------------------------------------------------

function draw(state, fidelity, forecast, policies, history, scores) {
  const pool = state.pools.find((one) => one.pool === page.pool);
  if (!pool) return;
  const today = policies.policies.find((policy) => !Object.keys(policy.overrides).length)?.name;
  const age = forecast.outlook ? state.unix_seconds - forecast.outlook.made_unix_seconds : null;
  const late = known(age) && known(forecast.every_seconds)
    && age > LATE_CYCLES * forecast.every_seconds + (forecast.outlook.duration_seconds ?? 0);
  $("version").textContent = `version ${state.version}`;
  $("clock").textContent = `stream at ${clock(pool.event_seconds)} · updated ${new Date().toLocaleTimeString()}`;
  drawTrust(pool, fidelity, forecast, late, age);
  drawCharts($("charts"), {
    history, outlook: forecast.outlook, today, slos: forecast.slos, now: pool.event_seconds, replicas: pool.replicas.length,
  });
  $("charts-none").hidden = history.series.length > 0 || Boolean(forecast.outlook);
  const some = forecast.outlook?.policies.find((one) => one.horizons.length)?.horizons[0].predicted[0];
  if (some) $("fan-words").textContent = `median and ${rangeWords(some.quantiles)} of the scenarios, current policy`;
  keepFocus(() => {
    drawComparison(pool, fidelity);
    drawProbabilities(forecast, today);
    drawForecast(forecast, late, age);
    drawReplicas(pool);
    drawScores(scores);
  });
  drawStream(pool, fidelity, forecast);
  settingsKnown(policies.settings);
}

function rangeWords(quantiles) {
  const keys = Object.keys(quantiles).map(Number).sort((a, b) => a - b);
  return `${100 * keys[0]} to ${100 * keys.at(-1)} % range`;
}

function drawTrust(pool, fidelity, forecast, late, age) {
  const why = fidelity.calibrated ? [...fidelity.untrusted_reasons] : [], notYet = [...pool.not_ready];
  why.unshift(...pool.stale.map((reason) => `stale: ${reason}`));
  if (!pool.stale.length) for (const source of pool.sources) if (source.trouble) why.push(`${source.name} cannot be read: ${source.trouble}`);
  const compiling = pool.compiling;
  $("compiling").hidden = !compiling;
  if (compiling) Object.assign($("compiling"), { max: compiling.kernels, value: compiling.compiled });
  else if (!fidelity.calibrated) notYet.push("step times have not been fitted to this fleet yet");
  if (late) why.push(`the last forecast is ${span(Math.round(age))} old; forecasts are due every ${span(forecast.every_seconds)}`);
  document.body.classList.toggle("stale", pool.stale.length > 0);
  const level = notYet.length ? "warn" : why.length || !fidelity.trusted ? "bad" : "good";
  const [mark, word] = {
    good: ["✓", "Trusted"], warn: ["…", compiling ? "Starting" : "Not trusted yet"], bad: ["✕", pool.stale.length ? "Stale: not trusted" : "Not trusted"],
  }[level];
  const pace = fidelity.step_time_scale_ratio, slower = pace >= 1;
  const good = [`Step times are fitted to ${fidelity.calibrated_on_requests} requests` + (Math.abs(pace - 1) < 0.005 ? "." :
    `; right now the engines are ${(slower ? pace : 1 / pace).toFixed(2)} times ${slower ? "slower" : "faster"}, which the mirror follows.`)];
  if (known(fidelity.exact_cache_ratio)) {
    good.push(`The mirror predicts prefix-cache hits to the token for ${(100 * fidelity.exact_cache_ratio).toFixed(1)} % of requests.`);
  }
  if ($("trust").dataset.word !== word) {
    $("trust").dataset.word = word;
    $("trust").className = `card trust ${level}`;
    $("trust-mark").textContent = mark;
    $("trust-word").textContent = word;
  }
  drawKpis(fidelity);
  const lines = [...notYet, ...why, ...(fidelity.calibrated ? good : [])];
  if ($("trust-why").textContent !== lines.join("")) $("trust-why").replaceChildren(...lines.map((line) => element("li", line)));
}

/* A line a KPI that is observed: trusted or not, and its error over the shortest window that has one. */
function drawKpis(fidelity) {
  const usual = fidelity.errors[0]?.window;
  const lines = Object.entries(fidelity.trust).flatMap(([kpi, trust]) => {
    const error = fidelity.errors.find((one) => one.kpi === kpi && known(one.error));
    if (!error) return [];
    const line = element("li", "", trust.trusted ? "good" : "bad"), name = element("span");
    name.append(element("b", trust.trusted ? "✓" : "✕"), ` ${kpiName(kpi, error.statistic)}`);
    line.append(name, element("span", errorOf(error.error, kpi) + (error.window === usual ? "" : ` (${error.window})`)));
    return [line];
  });
  $("kpis-words").hidden = !lines.length;
  $("kpis-words").textContent = `Error of the mirror over the last ${usual}:`;
  $("trust-kpis").replaceChildren(...lines);
}

/* The gauges of now, and every other KPI over the shortest window that has it. */
function drawComparison(pool, fidelity) {
  const gauges = pool.gauges.map((one) => [kpiName(one.kpi), figure(one.mirrored, one.kpi), figure(one.observed, one.kpi), "–", "now"]);
  const own = (one) => fidelity.errors.find((other) => other.kpi === one.kpi && other.statistic === one.statistic) === one;
  const scores = fidelity.errors.filter((one) => own(one) && !pool.gauges.some((gauge) => gauge.kpi === one.kpi)).map((one) => [
    kpiName(one.kpi, one.statistic), figure(one.predicted, one.kpi), figure(one.observed, one.kpi), errorOf(one.error, one.kpi),
    `${one.observations} requests in ${one.window}`,
  ]);
  table($("comparison"), ["KPI", "mirror", "reality", "error", "over"], [...scores, ...gauges], "Mirror and reality");
}

function drawProbabilities(forecast, today) {
  const policies = forecast.outlook?.policies ?? [];
  const now = policies.find((policy) => policy.name === today && policy.horizons.length);
  if (!now) { $("ahead-alert").hidden = true; $("breach").replaceChildren(element("p", "No forecast yet.", "soft")); return; }
  const cell = (share, interval, trusted) => {
    const node = probability(share, interval);
    if (!trusted) {
      node.className = "doubtful";
      node.append(element("span", "not trusted", "range"));
    }
    const bar = element("span", "", "bar"), fill = element("span");
    fill.style.width = `${100 * (share ?? 0)}%`;
    bar.append(fill);
    node.append(bar);
    return node;
  };
  const rows = Object.keys(now.horizons[0].breach).map((slo) => {
    const objective = forecast.slos.find((one) => one.name === slo);
    const name = named("th", slo);
    if (objective) name.append(element("span", `${kpiName(objective.kpi, objective.statistic)} ${objective.higher_is_better ? "≥" : "≤"} ` +
      figure(objective.threshold, objective.kpi), "soft range"));
    const first = now.first_breach?.[slo];
    const when = first && (known(first["0.5"]) ? `in ${span(Math.round(first["0.5"]))}` : known(first["0.1"])
      ? `in ${span(Math.round(first["0.1"]))} at worst` : "none");
    return [name, ...now.horizons.map((horizon) => cell(horizon.breach[slo], horizon.breach_interval[slo], horizon.breach_trusted[slo])), when ?? "–"];
  });
  const likely = Object.keys(now.horizons[0].breach)
    .flatMap((slo) => now.horizons.filter((horizon) => horizon.breach[slo] >= LIKELY).slice(0, 1).map((horizon) => [slo, horizon.seconds]));
  $("ahead-alert").hidden = !likely.length;
  const alert = likely.length ? `▲ A violation is likely: ${likely.map(([slo, seconds]) => `${slo} within ${span(seconds)}`).join(", ")}.` : "";
  if ($("ahead-alert").textContent !== alert) $("ahead-alert").textContent = alert;
  document.title = `${likely.length ? "▲ " : ""}Kavier Twin`;
  table($("breach"), ["objective", ...now.horizons.map((horizon) => `within ${span(horizon.seconds)}`), "first violation"], rows,
    "Probability of a violation", "breach");
}

// --- policies -------------------------------------------------------------------------------------------------------

function predictedOf(horizon, kpi, statistic) {
  return horizon?.predicted.find((one) => one.kpi === kpi && one.statistic === statistic)?.quantiles;
}

function drawForecast(forecast, late, age) {
  const outlook = forecast.outlook;
  page.currency = forecast.currency;
  if (!outlook) {
    $("ahead-words").textContent = "No forecast yet.";
    for (const id of ["best", "horizons", "policies"]) $(id).replaceChildren();
    return;
  }
  const horizons = [...new Set(outlook.policies.flatMap((policy) => policy.horizons.map((one) => one.seconds)))].sort((a, b) => a - b);
  if (!horizons.includes(page.horizon)) page.horizon = horizons.at(-1);
  $("ahead-words").textContent = `${late ? "LATE: made" : "Made"} ${span(Math.max(0, Math.round(age)))} ago, from the state ` +
    `at ${clock(outlook.event_seconds)}: ${outlook.scenarios} scenarios at ${figure(outlook.rate_per_second, "")} requests/s, ` +
    "the same for all policies." + (outlook.calibrated ? "" : " Made before calibration: not trusted.");
  $("ahead-words").classList.toggle("bad-text", late);
  drawBest(outlook);
  $("horizons").replaceChildren(...horizons.map((seconds) => {
    const button = element("button", `next ${span(seconds)}`);
    button.type = "button";
    button.dataset.key = `horizon ${seconds}`;
    button.setAttribute("aria-pressed", String(seconds === page.horizon));
    button.onclick = () => { page.horizon = seconds; keepFocus(() => drawForecast(forecast, late, age)); };
    return button;
  }));
  drawPolicies(forecast, outlook, () => keepFocus(() => drawForecast(forecast, late, age)));
}

function drawBest(outlook) {
  const best = outlook.best;
  if (!best) { $("best").replaceChildren(element("p", "No recommendation: the current policy could not be simulated.")); return; }
  const words = element("p");
  words.append(element("span", "recommended", "tag"), " ", element("b", best.policy), ` · ${best.reason}`);
  if (!best.deployable) words.append(" · ", element("span", "hypothetical: vllm serve has no flags for all of it", "tag warn"));
  $("best").replaceChildren(words);
  if (best.flags.length) $("best").append(flags(best.flags, "vllm serve … ", "best"));
}

/* Flags with a button that copies them. */
function flags(list, before, key) {
  const node = element("div", "", "flags"), text = list.join(" ");
  const button = element("button", "Copy");
  button.type = "button";
  button.dataset.key = `copy ${key}`;
  button.setAttribute("aria-label", `Copy ${text}`);
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(node.firstChild); // no right to the clipboard: marked, to be copied by hand
      button.textContent = "Marked";
    }
  };
  node.append(element("code", before + text), button);
  return node;
}

function drawPolicies(forecast, outlook, again) {
  const at = (policy) => policy.horizons.find((one) => one.seconds === page.horizon);
  const slos = [...new Set(outlook.policies.flatMap((policy) => Object.keys(at(policy)?.breach ?? {})))];
  const columns = kpisThat((kpi) => kpi.compared).map(([, kpi, statistic]) => [kpi, statistic]).filter(([kpi, statistic]) =>
    outlook.policies.some((policy) => known(predictedOf(at(policy), kpi.name, statistic)?.["0.5"])));
  const sorters = [
    (policy) => policy.name,
    ...slos.map((slo) => (policy) => at(policy)?.breach[slo]),
    ...columns.map(([kpi, statistic]) => (policy) => predictedOf(at(policy), kpi.name, statistic)?.["0.5"]),
  ];
  const titles = ["policy", ...slos.map((slo) => `breach ${slo}`),
    ...columns.map(([kpi, statistic]) => label(kpi, statistic, forecast.currency))];
  const head = titles.map((title, i) => {
    const cell = element("th"), button = element("button", title);
    const way = page.sort && page.sort[0] === i ? page.sort[1] : 0;
    button.type = "button";
    button.dataset.key = `sort ${i}`;
    if (way) button.append(way > 0 ? " ▲" : " ▼");
    cell.setAttribute("aria-sort", way ? (way > 0 ? "ascending" : "descending") : "none");
    button.onclick = () => { page.sort = way < 0 ? null : [i, way > 0 ? -1 : 1]; again(); };
    cell.append(button);
    return cell;
  });
  head.push(element("th", "vllm serve flags", "left"));
  const rows = sorted(outlook.policies, sorters).map((policy) => {
    const row = [named("th", policy.name)], horizon = at(policy), isBest = outlook.best?.policy === policy.name;
    if (isBest) row[0].append(" ", element("span", "recommended", "tag"));
    row.className = isBest ? "best" : "";
    if (!horizon) {
      const why = element("td", policy.problem || "not simulated", "left soft");
      why.colSpan = head.length - 1;
      return Object.assign([row[0], why], { className: "" });
    }
    for (const slo of slos) row.push(probability(horizon.breach[slo], horizon.breach_interval[slo]));
    for (const [kpi, statistic] of columns) row.push(interval(predictedOf(horizon, kpi.name, statistic), kpi.name));
    const how = element("td", "", "left");
    how.append(policy.flags.length ? flags(policy.flags, "", policy.name)
      : element("span", policy.deployable ? "as it is" : "hypothetical", "soft"));
    row.push(how);
    return row;
  });
  table($("policies"), head, rows, "Policies");
}

/* The recommended policy first and the order of the twin, unless a column was chosen. */
function sorted(policies, sorters) {
  if (!page.sort) return policies;
  const [column, way] = page.sort, key = sorters[column];
  const order = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
  return [...policies].sort((a, b) => {
    const [x, y] = [key(a), key(b)], [has, hasToo] = [x ?? null, y ?? null].map((value) => value !== null);
    return has && hasToo ? way * order(x, y) : Number(hasToo) - Number(has); // what is not known is last either way
  });
}

// --- replicas -------------------------------------------------------------------------------------------------------

function drawReplicas(pool) {
  const rows = pool.replicas.map((one) => {
    const button = element("button", page.replica === one.replica ? "Hide" : "Cache and batch");
    button.type = "button";
    button.dataset.key = `replica ${one.replica}`;
    button.setAttribute("aria-expanded", String(page.replica === one.replica));
    button.setAttribute("aria-controls", "replica");
    button.onclick = () => {
      page.replica = page.replica === one.replica ? null : one.replica;
      keepFocus(() => drawReplicas(pool));
      drawReplica();
    };
    const usage = element("td"), meter = element("span", "", "meter"), fill = element("i");
    fill.style.width = `${100 * (one.kv_cache_usage_ratio ?? 0)}%`;
    meter.append(fill);
    usage.append(meter, figure(one.kv_cache_usage_ratio, "kv_cache_usage_ratio"));
    const more = element("td");
    more.append(button);
    return [element("th", one.pod || `replica ${one.replica}`), one.state, usage, one.requests_running, one.requests_waiting,
      figure(one.prefix_cache_hit_ratio, "prefix_cache_hit_ratio"), one.requests_finished, one.preemptions, more];
  });
  const head = ["replica", "state", "KV cache usage", "running", "waiting", "hit ratio", "finished", "preempted", "details"];
  table($("replicas"), head, rows, "Mirrored replicas");
}

async function drawReplica() {
  const number = page.replica;
  if (number === null) { $("replica").replaceChildren(); return; }
  let detail;
  try {
    detail = await ask(`v1/state/${encodeURIComponent(page.pool)}/replicas/${number}`);
  } catch (problem) {
    $("replica").replaceChildren(element("p", problem.message, "bad-text"));
    return;
  }
  if (page.replica !== number) return;
  const share = (blocks) => `${(100 * blocks / Math.max(1, detail.blocks)).toFixed(1)}%`;
  const cache = element("div", "", "cache"), use = element("i", "", "use"), kept = element("i", "", "kept");
  use.style.width = share(detail.blocks_in_use);
  kept.style.width = share(detail.blocks_cached);
  cache.append(use, kept);
  cache.setAttribute("role", "img");
  const words = `${detail.blocks_in_use} of ${detail.blocks} blocks in use, ${detail.blocks_cached} cached for reuse (hatched), ` +
    `${detail.blocks_empty} empty; ${detail.block_tokens} tokens a block; ${detail.evictions} evicted so far`;
  cache.setAttribute("aria-label", words);
  const batch = element("div", "", "batch");
  const most = Math.max(1, ...detail.requests.map((one) => one.prompt_tokens + one.output_tokens));
  for (const one of detail.requests) {
    const tokens = element("div", "", "tokens");
    const parts = [["hit", one.cached_tokens], ["prompt", one.prompt_tokens - one.cached_tokens], ["output", one.output_tokens]];
    for (const [cls, count] of parts) {
      const part = element("i", "", cls);
      part.style.width = `${100 * count / most}%`;
      if (count) tokens.append(part);
    }
    batch.append(element("span", one.state), tokens,
      element("span", `${one.cached_tokens} hit of ${one.prompt_tokens} + ${one.output_tokens} tokens, ${span(one.age_seconds.toFixed(1))}`));
  }
  const title = element("h3", `${detail.summary.pod || `Replica ${number}`}: ${detail.summary.requests_running} of at most ${detail.max_num_seqs} running, ` +
    `${detail.summary.requests_waiting} waiting`);
  const legend = element("p", "Prompt (hatched: found in the cache), then output so far.", "soft");
  const scrolled = $("replica").querySelector(".batch")?.scrollTop ?? 0;
  $("replica").replaceChildren(title, cache, element("p", words, "soft"), ...(detail.requests.length ? [batch, legend] : []));
  batch.scrollTop = scrolled;
}

// --- the stream -----------------------------------------------------------------------------------------------------

function drawStream(pool, fidelity, forecast) {
  $("notes").replaceChildren(...pool.notes.map((note) => element("p", note, "soft")));
  const facts = [
    ...Object.entries(pool.records).map(([result, count]) => [`records ${result.replaceAll("_", " ")}`, count]),
    ["finished requests", pool.finished_requests],
    ...Object.entries(pool.dropped).map(([reason, count]) => [reason.replaceAll("_", " "), count]),
    ["lag of the mirror", known(pool.lag_seconds) ? `${pool.lag_seconds.toFixed(1)} s` : "–"],
    ["buffered records", pool.buffered_records],
    ...Object.entries(forecast.forecasts).map(([result, count]) => [`forecasts ${result}`, count]),
    ["duration of the last forecast", known(forecast.outlook?.duration_seconds) ? `${forecast.outlook.duration_seconds.toFixed(2)} s` : "–"],
    ...pool.sources.map((source) => [source.name, source.ended ? "ended" : source.trouble || "open"]),
  ];
  $("facts").replaceChildren(...facts.map(([name, value]) => {
    const row = element("div");
    row.append(element("dt", name), element("dd", String(value)));
    return row;
  }));
}

if (page.token) history.replaceState(null, "", page.pool ? `#${new URLSearchParams({ pool: page.pool })}` : location.pathname);
startWhatIf(page);
refresh();
