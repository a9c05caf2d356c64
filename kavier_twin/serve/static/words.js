/* Numbers, units and names as a reader wants them. */

let kpis = new Map(); // by name, in the order of tables
let metrics = new Map(); // by name: [KPI, statistic]

/* What GET /v1/kpis answers. */
export function setKpis(found) {
  kpis = new Map(found.kpis.map((kpi) => [kpi.name, kpi]));
  metrics = new Map(Object.entries(found.metrics).map(([name, one]) => [name, [kpis.get(one.kpi), one.statistic]]));
}

/* The KPIs that `chosen` picks: [metric, KPI, statistic] of each, the highest of its statistics. */
export function kpisThat(chosen) {
  return [...metrics].filter(([, [kpi, statistic]]) => chosen(kpi) && statistic === (kpi.statistics.at(-1) ?? ""))
    .map(([metric, [kpi, statistic]]) => [metric, kpi, statistic]);
}

export function kpiName(kpi, statistic = "") {
  return (kpis.get(kpi)?.title ?? kpi) + (statistic ? `, ${statistic}` : "");
}

/* The head of a column. */
export function label(kpi, statistic, currency) {
  return `${kpi.label} ${statistic}`.trim() + (kpi.unit.name === "currency" && currency ? `, ${currency}` : "");
}

export function known(value) {
  return value !== null && value !== undefined && Number.isFinite(value);
}

/* Of a KPI or a metric; numbers of other things have none. */
export function unitOf(name) {
  return (kpis.get(name) ?? metrics.get(name)?.[0])?.unit ?? { name: "count", scales: [{ from_value: 0, factor: 1, sign: "" }] };
}

/* A value of a KPI, with three significant digits in the unit that fits it. */
export function figure(value, kpi) {
  if (!known(value)) return "–";
  const scale = unitOf(kpi).scales.findLast((one) => Math.abs(value) >= one.from_value);
  return digits(scale.factor * value, !scale.sign) + scale.sign;
}

function digits(value, whole) {
  const size = Math.abs(value);
  if (size >= 100 || value === 0 || (whole && Number.isInteger(value))) return Math.round(value).toLocaleString("en-US");
  return size >= 10 ? value.toFixed(1) : size >= 0.1 ? value.toFixed(2) : value.toLocaleString("en-US", { maximumSignificantDigits: 2 });
}

/* An error: relative, but for ratios a difference. */
export function errorOf(value, kpi) {
  if (!known(value)) return "–";
  const sign = value > 0 ? "+" : value < 0 ? "−" : "±";
  return sign + (unitOf(kpi).name === "ratio" ? points(value, kpi) : `${(100 * Math.abs(value)).toFixed(1)} %`);
}

/* A difference between two values of a KPI. */
export function points(value, kpi) {
  const size = Math.abs(value);
  return unitOf(kpi).name === "ratio" ? `${(100 * size).toFixed(1)} points` : figure(size, kpi);
}

export function percent(share) {
  return known(share) ? `${Math.round(100 * share)} %` : "–";
}

export function span(seconds) {
  if (seconds >= 3600 && seconds % 3600 === 0) return `${seconds / 3600} h`;
  if (seconds >= 120 || seconds === 60) return `${+(seconds / 60).toFixed(1)} min`;
  return `${+Number(seconds).toFixed(1)} s`;
}

/* The same on an axis. */
export function minute(seconds) {
  return seconds > 1e9 ? new Date(1000 * seconds).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }) : clock(seconds);
}

/* The stream's time: a clock's where it is unix time, else minutes and seconds of the recording. */
export function clock(seconds) {
  if (!known(seconds)) return "–";
  if (seconds > 1e9) return new Date(1000 * seconds).toLocaleTimeString();
  const whole = Math.max(0, Math.floor(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}
