/* Forecast accuracy: errors beside persistence's, intervals, alerts. */

import { element, named, table } from "./elements.js";
import { known, kpiName, kpisThat, percent, points, span } from "./words.js";

const $ = (id) => document.getElementById(id);

export function drawScores({ scores }) {
  const shown = kpisThat((kpi) => kpi.charted), names = shown.map(([metric]) => metric);
  const kpis = scores.kpis.filter((one) => names.includes(one.kpi));
  const waiting = `${scores.pending} ${scores.pending === 1 ? "forecast" : "forecasts"} pending`;
  if (!kpis.length) {
    $("scores-words").textContent = `No forecast has been scored yet: ${waiting}.`;
    for (const id of ["scores", "alerts"]) $(id).replaceChildren();
    return;
  }
  const compared = kpis.filter((one) => known(one.served_error_to_persistence_ratio));
  const better = compared.filter((one) => one.served_error_to_persistence_ratio < 1).length;
  $("scores-words").textContent = `${Math.max(...kpis.map((one) => one.forecasts))} forecasts scored; ${waiting}. ` +
    (compared.length ? `Better than persistence in ${better} of ${compared.length} figures.` : "");
  const horizons = [...new Set(kpis.map((one) => one.horizon_seconds))].sort((a, b) => a - b);
  const rows = shown.flatMap(([metric, kpi, statistic]) => {
    const mine = kpis.filter((one) => one.kpi === metric);
    return mine.length ? [[kpiName(kpi.name, statistic), ...horizons.map((seconds) => cell(mine.find((one) => one.horizon_seconds === seconds)))]] : [];
  });
  table($("scores"), ["mean error", ...horizons.map((seconds) => `${span(seconds)} ahead`)], rows, "Forecast accuracy");
  drawAlerts(scores);
}

/* The error, whether that is better than persistence, and how often the interval held what came. */
function cell(score) {
  const node = element("td");
  if (!score || !known(score.served_error)) { node.textContent = "–"; return node; }
  node.append(points(score.served_error, score.kpi));
  const ratio = score.served_error_to_persistence_ratio, parts = [];
  if (known(ratio)) parts.push(`${ratio < 1 ? "✓" : "✕"} ${ratio.toFixed(2)} × persistence’s`);
  if (known(score.widened_coverage_ratio)) parts.push(`${percent(score.widened_coverage_ratio)} within interval`);
  node.append(element("span", parts.join(" · "), "range"));
  return node;
}

function drawAlerts(scores) {
  const rows = scores.alerts.map((one) => {
    const mine = scores.breaches.filter((each) => each.slo === one.slo), last = mine.at(-1);
    return [named("th", one.slo), one.alerts, percent(one.precision), one.breaches, percent(one.recall),
      known(one.median_lead_seconds) ? span(Math.round(one.median_lead_seconds)) : "–",
      last && known(last.brier) ? `${last.brier.toFixed(2)} (${known(last.persistence_brier) ? last.persistence_brier.toFixed(2) : "–"})` : "–"];
  });
  const head = ["objective", "alerts", "followed by a violation", "breaches", "preceded by an alert", "median lead time", "Brier score (persistence’s)"];
  if (rows.length) table($("alerts"), head, rows, "Alerts and violations");
  else $("alerts").replaceChildren();
}
