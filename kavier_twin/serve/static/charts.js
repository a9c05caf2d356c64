/* Small charts on one time axis: mirror and reality up to now, the forecast's fan from there on, objectives across. */

import { element } from "./elements.js";
import { figure, known, kpiName, kpisThat, minute, unitOf } from "./words.js";

const HEIGHT = 150;
export const charts = new Map(); // by KPI: its elements, its uPlot and the columns it shows

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/* What a chart shows: columns of uPlot, and what its marks need. */
function dataOf(view, kpi, statistic) {
  const series = view.history.series.find((one) => one.kpi === kpi && one.statistic === statistic);
  const times = view.history.event_seconds;
  const x = [], observed = [], mirrored = [], low = [], middle = [], high = [];
  const at = (time, real, twin, fan) => {
    x.push(time); observed.push(real); mirrored.push(twin);
    low.push(fan ? fan[0] : null); middle.push(fan ? fan[1] : null); high.push(fan ? fan[2] : null);
  };
  const fan = fanOf(view, kpi, statistic);
  const last = series ? series.mirrored.findLastIndex(known) : -1; // where the fan begins
  times.forEach((time, i) => {
    const twin = series ? series.mirrored[i] : null;
    at(time, series ? series.observed[i] : null, twin, fan.length && i === last ? [twin, twin, twin] : null);
  });
  for (const [time, quantiles] of fan) if (!x.length || time > x[x.length - 1]) at(time, null, null, quantiles);
  return [x, observed, mirrored, high, low, middle];
}

function fanOf(view, kpi, statistic) {
  const today = view.outlook && view.outlook.policies.find((policy) => policy.name === view.today);
  if (!today) return [];
  return today.horizons.flatMap((horizon) => {
    const found = horizon.predicted.find((one) => one.kpi === kpi && one.statistic === statistic);
    if (!found || !known(found.quantiles["0.5"])) return [];
    const keys = Object.keys(found.quantiles).sort((a, b) => a - b);
    const values = [keys[0], "0.5", keys[keys.length - 1]].map((key) => found.quantiles[key] / shareOf(view, kpi));
    return [[view.outlook.event_seconds + horizon.seconds, values]];
  });
}

function shareOf(view, kpi) {
  const [[, row]] = kpisThat((one) => one.name === kpi);
  return row.gauge && row.unit.name === "count" ? Math.max(1, view.replicas) : 1; // history has the mean replica, forecasts their sum
}

function make(kpi, node) {
  const box = element("div", "", "chart"), head = element("h3"), figures = element("p", "", "figures"), plot = element("div", "", "plot");
  plot.setAttribute("role", "img");
  box.append(head, figures, plot);
  node.append(box);
  const chart = { box, head, figures, plot, view: null, slos: [], data: null, uplot: null };
  chart.draw = () => { chart.uplot?.destroy(); chart.uplot = build(chart, kpi); };
  new ResizeObserver(() => {
    if (chart.uplot && plot.clientWidth !== chart.uplot.width) chart.uplot.setSize({ width: plot.clientWidth, height: HEIGHT });
  }).observe(plot);
  return chart;
}

function build(chart, kpi) {
  const ratio = devicePixelRatio, soft = color("soft"), line = color("line"), fan = color("fan");
  const axis = { stroke: soft, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1, size: 4 }, font: "11px system-ui" };
  const top = (data) => {
    const highest = (...columns) => Math.max(0, ...columns.flat().filter(known));
    // A fan far above all else would flatten it as well: it is cut.
    let most = highest(data[1], data[2], data[5]);
    most = Math.max(most, Math.min(highest(data[3]), 3 * most || Infinity));
    // An objective far above would flatten what there is: the words over the chart say so.
    for (const slo of chart.slos) if (slo.threshold > most && slo.threshold <= 2.5 * most) most = slo.threshold;
    return unitOf(kpi).name === "ratio" ? Math.min(1.0, Math.max(1.15 * most, 0.05)) : 1.15 * most || 1;
  };
  const options = {
    width: chart.plot.clientWidth || 320,
    height: HEIGHT,
    cursor: { y: false, drag: { x: false, y: false } },
    legend: { show: false },
    scales: { x: { time: false }, y: { range: (self) => [0, top(self.data)] } },
    axes: [
      { ...axis, size: 26, space: 60, incrs: [1, 5, 10, 30, 60, 120, 300, 600, 900, 1800, 3600], values: (_, ticks) => ticks.map(minute) },
      { ...axis, size: 52, space: 28, values: (_, ticks) => ticks.map((tick) => (tick === 0 ? "0" : figure(tick, kpi))) },
    ],
    series: [
      {},
      { stroke: color("real"), width: 2.5, dash: [2 * ratio, 4 * ratio], cap: "round", points: alone(color("real")) },
      { stroke: color("mirror"), width: 2, points: alone(color("mirror")) },
      { stroke: fan, width: 0.5, spanGaps: true, points: { show: false } },
      { stroke: fan, width: 0.5, spanGaps: true, points: { show: false } },
      { stroke: fan, width: 2, dash: [6 * ratio, 4 * ratio], spanGaps: true, points: { show: false } },
    ],
    bands: [{ series: [3, 4], fill: `${fan}38` }],
    hooks: { draw: [(self) => mark(self, chart, kpi)] },
  };
  return new uPlot(options, chart.data, chart.plot);
}

/* A dot for a value whose neighbours are not known: no line would show it. */
function alone(stroke) {
  const filter = (self, number) => {
    const values = self.data[number];
    return values.map((_, i) => i).filter((i) => known(values[i]) && !known(values[i - 1]) && !known(values[i + 1]));
  };
  return { show: true, size: 5, stroke, fill: stroke, filter };
}

/* The line of now and those of the objectives. */
function mark(self, chart, kpi) {
  const { ctx, bbox } = self, ratio = devicePixelRatio;
  ctx.save();
  ctx.font = `${11 * ratio}px system-ui`;
  ctx.lineWidth = ratio;
  ctx.strokeStyle = ctx.fillStyle = color("soft");
  if (known(chart.now)) {
    const x = Math.round(self.valToPos(chart.now, "x", true));
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    const right = x > bbox.left + 0.85 * bbox.width;
    ctx.textAlign = right ? "right" : "left";
    ctx.fillText("now", x + (right ? -4 : 4) * ratio, bbox.top + bbox.height - 5 * ratio);
  }
  ctx.strokeStyle = color("slo");
  ctx.setLineDash([6 * ratio, 4 * ratio]);
  ctx.lineWidth = 1.5 * ratio;
  for (const slo of chart.slos) {
    if (slo.threshold > self.scales.y.max) continue;
    const y = self.valToPos(slo.threshold, "y", true);
    ctx.beginPath();
    ctx.moveTo(bbox.left, y);
    ctx.lineTo(bbox.left + bbox.width, y);
    ctx.stroke();
  }
  ctx.restore();
}

/* `view`: history, outlook (or null), today (name of today's policy), slos, now (event seconds), replicas (how many). */
export function drawCharts(node, view) {
  for (const [, { name: kpi }, statistic] of kpisThat((one) => one.charted)) {
    if (!charts.has(kpi)) charts.set(kpi, make(kpi, node));
    const chart = charts.get(kpi), share = shareOf(view, kpi);
    chart.slos = view.slos.filter((slo) => slo.kpi === kpi && slo.statistic === statistic)
      .map((slo) => ({ ...slo, threshold: slo.threshold / share }));
    chart.now = view.now;
    chart.data = dataOf(view, kpi, statistic);
    const [, observed, mirrored] = chart.data, newest = mirrored.findLastIndex(known), seen = observed.findLastIndex(known);
    const mirror = figure(mirrored[newest], kpi), real = figure(observed[seen], kpi);
    const title = kpiName(kpi, statistic);
    chart.head.textContent = title[0].toUpperCase() + title.slice(1) + (share > 1 ? ", per replica" : "");
    chart.figures.replaceChildren("mirror ", element("span", mirror, "mirror"), " · reality ", element("span", real, "real"),
      ...chart.slos.flatMap((slo) => [" · ", element("span", `objective ${slo.higher_is_better ? "≥" : "≤"} ${figure(slo.threshold, kpi)}`, "slo")]));
    chart.box.dataset.kpi = kpi;
    const danger = view.outlook?.policies.find((policy) => policy.name === view.today)?.horizons
      .some((horizon) => chart.slos.some((slo) => horizon.breach[slo.name] >= 0.5));
    chart.box.classList.toggle("alert", Boolean(danger));
    chart.plot.setAttribute("aria-label", `${kpiName(kpi, statistic)}: mirror ${mirror}, reality ${real}` + ahead(view, kpi, statistic));
    // A KPI that nobody reports in this pool has no chart.
    chart.box.hidden = newest < 0 && seen < 0;
    if (chart.box.hidden) continue;
    if (chart.uplot) chart.uplot.setData(chart.data);
    else chart.draw();
  }
}

function ahead(view, kpi, statistic) {
  const fan = fanOf(view, kpi, statistic);
  if (!fan.length) return "";
  const [low, middle, high] = fan[fan.length - 1][1].map((value) => figure(value, kpi));
  return `; ahead ${middle}, between ${low} and ${high}`;
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((chart) => chart.draw()));
