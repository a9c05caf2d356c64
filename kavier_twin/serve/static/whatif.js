/* The what-if form: a question about the live state, and its answer beside today's policy. */

import { element, interval, probability, table } from "./elements.js";
import { figure, known, kpisThat, label, span } from "./words.js";

const $ = (id) => document.getElementById(id);
const CASES = { today: "today", today_at_load: "current policy, at that load", asked: "asked" };
/* Fields of the question and where they are entered. */
const FIELDS = { load: "w-load", horizon_seconds: "w-minutes", "overrides.replicas": "w-replicas" };

export function settingsKnown(names) {
  if ($("w-settings").childElementCount !== names.length) {
    $("w-settings").replaceChildren(...names.map((name) => new Option(name, name)));
  }
}

export function startWhatIf(page) {
  addChange();
  $("w-token").value = page.token;
  $("w-more").onclick = () => addChange().focus();
  $("whatif-form").onsubmit = async (event) => {
    event.preventDefault();
    for (const input of $("whatif-form").querySelectorAll("input")) input.removeAttribute("aria-invalid");
    $("w-ask").disabled = true;
    $("whatif-answer").replaceChildren(element("p", "Simulating …", "soft"));
    try {
      await askTwin(page, question(page.pool));
    } catch (problem) {
      refuse(problem.message);
    }
    $("w-ask").disabled = false;
  };
}

function addChange() {
  const row = element("div"), name = element("input"), value = element("input"), number = $("w-changes").childElementCount + 1;
  const label = element("label", "Setting"), becomes = element("label", "becomes");
  Object.assign(name, { size: 22, autocomplete: "off", placeholder: "kv_cache_dtype", className: "w-name", id: `w-name-${number}` });
  name.setAttribute("list", "w-settings");
  Object.assign(value, { size: 8, autocomplete: "off", placeholder: "fp8, 0.5x", className: "w-value", id: `w-value-${number}` });
  label.append(name);
  becomes.append(value);
  row.append(label, becomes);
  $("w-changes").append(row);
  return name;
}

function question(pool) {
  const overrides = {};
  for (const row of $("w-changes").children) {
    const [name, value] = row.querySelectorAll("input");
    if (name.value.trim()) overrides[name.value.trim()] = typed(value.value.trim());
  }
  if ($("w-replicas").value.trim()) overrides.replicas = typed($("w-replicas").value.trim());
  return { pool, overrides, load: number("w-load"), horizon_seconds: 60 * number("w-minutes") };
}

function number(id) {
  const value = Number($(id).value.trim().replace(/x$/, ""));
  if ($(id).value.trim() === "" || !Number.isFinite(value)) {
    $(id).setAttribute("aria-invalid", "true");
    throw new Error(`${$(id).labels[0].firstChild.textContent.trim()}: a number is needed`);
  }
  return value;
}

function typed(text) {
  if (text === "true" || text === "false") return text === "true";
  return text !== "" && Number.isFinite(Number(text)) ? Number(text) : text;
}

async function askTwin(page, asked) {
  const token = $("w-token").value || page.token;
  const headers = { "Content-Type": "application/json", ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const answer = await fetch("v1/whatif", { method: "POST", headers, body: JSON.stringify(asked) });
  const found = await answer.json();
  if (answer.ok) { showAnswer(found, page.currency); return; }
  for (const error of found.errors ?? []) {
    const input = FIELDS[error.field] ?? [...$("w-changes").children].flatMap((row) => [...row.querySelectorAll("input")])
      .find((one) => error.field === "overrides" || error.field === `overrides.${one.value.trim()}`)?.id;
    if (input) $(input).setAttribute("aria-invalid", "true");
  }
  if (answer.status === 401) $("w-token").setAttribute("aria-invalid", "true");
  refuse(found.detail);
}

function refuse(why) {
  $("whatif-answer").replaceChildren(element("p", `✕ ${why}`, "notice bad"));
}

function showAnswer(found, currency) {
  const slos = Object.keys(found.cases[0].breach_probability);
  const columns = kpisThat((kpi) => kpi.compared).filter(([metric]) => found.cases.some((one) => known(one.kpis[metric]?.p50)));
  const rows = found.cases.map((one) => {
    const quantiles = (metric) => one.kpis[metric] && { 0.1: one.kpis[metric].p10, 0.5: one.kpis[metric].p50, 0.9: one.kpis[metric].p90 };
    const changed = Object.entries(one.overrides).map(([name, value]) => `${name}=${value}`);
    if (one.load !== 1) changed.push(`load ${one.load}x`);
    const name = element("th", CASES[one.name] ?? one.name);
    if (changed.length) name.append(element("span", changed.join(" "), "soft range"));
    return [name, ...slos.map((slo) => probability(one.breach_probability[slo], one.breach_interval[slo])), ...columns.map(([metric, kpi]) => interval(quantiles(metric), kpi.name))];
  });
  const place = element("div", "", "scroll");
  table(place, ["case", ...slos.map((slo) => `breach ${slo}`), ...columns.map(([, kpi, statistic]) => label(kpi, statistic, currency))], rows, "What if");
  const how = found.vllm_flags.length ? `vllm serve … ${found.vllm_flags.join(" ")}` : found.hypothetical_reasons.join("; ");
  const parts = [element("p", `The next ${span(found.horizon_seconds)}, ${found.scenarios} scenarios at ` +
    `${figure(found.rate_requests_per_second, "")} requests/s; simulated in ${found.duration_seconds.toFixed(1)} s.` +
    (found.calibrated ? "" : " Not calibrated yet: not trusted."), "soft"), place];
  if (how) parts.push(element("p")) && parts.at(-1).append(element("code", how));
  $("whatif-answer").replaceChildren(...parts);
}
